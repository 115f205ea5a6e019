"""Datasets by name, what is wrong with them, and samples that depend on nothing but a seed and a
draw number."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import data
from losses import IGNORE
from sources import check
from sources.augment import colour_jitter
from sources.benchmarks import BENCHMARKS
from sources.registry import NAMES, REPORTED, data_root, open_dataset, read_names
from support.errors import UserError

ABSENT = {11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90}


def coco(root, layout):
    """Two images a split: every used id and 255 in the first mask, nothing but 255 in the second,
    whose jpg is gray."""
    images, masks = {
        "coco-stuff": ("coco-stuff/images/{}2017", "coco-stuff/annotations/{}2017"),
        "coco": ("coco/{}2017", "coco/stuffthingmaps/{}2017"),
    }[layout]
    values = [v for v in range(182) if v not in ABSENT] + [255]
    first = np.resize(np.array(values, np.uint8), (20, 20))
    for split in ("train", "val"):
        image_folder, mask_folder = root / images.format(split), root / masks.format(split)
        for place in (image_folder, mask_folder):
            place.mkdir(parents=True)
        Image.fromarray(first).save(mask_folder / "000000000001.png")
        Image.new("RGB", (20, 20), "red").save(image_folder / "000000000001.jpg")
        Image.fromarray(np.full((8, 9), 255, np.uint8)).save(mask_folder / "000000000002.png")
        Image.new("L", (9, 8), 99).save(image_folder / "000000000002.jpg")
    return first


@pytest.mark.parametrize("layout", ["coco-stuff", "coco"])
def test_coco_stuff(tmp_path, layout):
    raw = coco(tmp_path, layout)
    dataset = open_dataset("coco-stuff", tmp_path, "val")
    assert len(dataset) == 2 and len(dataset.names) == 171
    known = {0: "person", 79: "toothbrush", 80: "banner", 137: "road", 170: "wood"}
    assert {i: dataset.names[i] for i in known} == known
    image, labels, path = dataset.load(0)
    assert image.mode == "RGB" and labels.dtype == np.int64
    assert path.endswith("val2017/000000000001.jpg")
    rank = {v: i for i, v in enumerate(sorted(set(range(182)) - ABSENT))} | {255: IGNORE}
    assert np.array_equal(labels, np.vectorize(rank.get)(raw))
    assert set(labels.ravel()) == set(range(-1, 171))
    gray, void, _ = dataset.load(1)
    assert gray.mode == "RGB" and gray.size == (9, 8) and (void == IGNORE).all()


def test_coco_absent_and_one_based_ids_are_refused(tmp_path):
    coco(tmp_path, "coco")
    path = tmp_path / "coco/stuffthingmaps/val2017/000000000002.png"
    for value in (11, 182, 200):
        Image.fromarray(np.full((8, 9), value, np.uint8)).save(path)
        with pytest.raises(UserError, match=f"000000000002.png holds the value {value}"):
            open_dataset("coco-stuff", tmp_path, "val").load(1)


def test_folder(folder):
    dataset = open_dataset(f"folder:{folder}", None, "train")
    assert dataset.names == ["red thing", "green thing", "blue thing"] and len(dataset) == 6
    image, labels, path = dataset.load(2)
    raw = np.asarray(Image.open(folder / "masks/train/2.png")).astype(int)
    assert np.array_equal(labels, np.where(raw == 255, IGNORE, raw)) and labels[0, 0] == IGNORE
    assert path.endswith("2.jpg")
    wide = np.array([[0, 1, 2, 65535]], np.uint16).repeat(4, 0)
    Image.fromarray(wide).save(folder / "masks/train/2.png")
    Image.new("RGB", (4, 4)).save(folder / "images/train/2.jpg")
    assert dataset.load(2)[1][0].tolist() == [0, 1, 2, IGNORE]


def test_palette_masks_give_indices_not_colours(folder):
    mask = Image.fromarray(np.full((60, 80), 2, np.uint8), "P")
    mask.putpalette([9, 9, 9, 8, 8, 8, 200, 100, 50])
    mask.save(folder / "masks/train/0.png")
    assert (open_dataset(f"folder:{folder}", None, "train").load(0)[1] == 2).all()


def break_size(f):
    Image.new("L", (8, 8)).save(f / "masks/train/0.png")


def break_range(f):
    Image.fromarray(np.full((60, 80), 3, np.uint8)).save(f / "masks/train/0.png")


def break_channels(f):
    Image.new("RGB", (80, 60)).save(f / "masks/train/0.png")


def break_image(f):
    (f / "images/train/0.jpg").write_bytes((f / "images/train/0.jpg").read_bytes()[:300])


def break_mask(f):
    (f / "masks/train/0.png").write_bytes(b"no picture")


def break_partner(f):
    (f / "masks/train/0.png").unlink()


def break_orphan(f):
    (f / "images/train/0.jpg").unlink()


def break_names(f):
    (f / "classes.txt").write_text("a\nb\na")


def break_gap(f):
    (f / "classes.txt").write_text("a\n\nb\nc")


def break_twins(f):
    Image.new("RGB", (80, 60)).save(f / "images/train/0.png")


def break_bits(f):
    (f / "classes.txt").write_text("\n".join(f"c{i}" for i in range(256)))


def break_no_names(f):
    (f / "classes.txt").unlink()


def break_split(f):
    [p.unlink() for p in (f / "images/train").iterdir()]


@pytest.mark.parametrize(
    "broken, words",
    [
        (break_size, "0.png is 8 x 8, its image 80 x 60"),
        (break_range, "0.png holds the value 3, which none of the 3 classes has"),
        (break_channels, "0.png should be a mask of one channel of indices, not uint8"),
        (break_image, "0.jpg can't be read as an image"),
        (break_mask, "0.png can't be read as a mask"),
        (break_partner, "0.jpg has no partner 0 in .*masks"),
        (break_orphan, "0.png has no partner 0 in .*images"),
        (break_names, "classes.txt names 'a' twice"),
        (break_gap, "classes.txt has no name on line 2"),
        (break_twins, "has a twin of another type"),
        (break_bits, "has 8 bits, too few for 256 classes"),
        (break_no_names, "classes.txt can't be read as class names"),
        (break_split, "images.train holds no file . of type"),
    ],
)
def test_bad_input_is_one_sentence_with_the_path(folder, broken, words):
    broken(folder)
    with pytest.raises(UserError, match=words) as e:
        open_dataset(f"folder:{folder}", None, "train").load(0)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    "name, words",
    [
        ("coco", "known are coco-stuff, ade20k-847"),
        ("toy:x", "whole number"),
        ("toy:", "whole number"),
        ("folder:/nowhere", "/nowhere/classes.txt"),
        ("folder:", "--dataset folder: needs the path"),
        ("folder", "--dataset folder needs the path of a folder, as in folder:PATH"),
    ],
)
def test_datasets_that_are_not_there(name, words):
    with pytest.raises(UserError, match=words):
        open_dataset(name)


@pytest.fixture
def nowhere(tmp_path, monkeypatch):
    """No variable that says where datasets are, and a current folder without any."""
    for variable in ("RPMD_DATA", "DETECTRON2_DATASETS"):
        monkeypatch.delenv(variable, raising=False)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path


@pytest.mark.parametrize("name", BENCHMARKS)
def test_what_is_missing_is_said_with_where_it_was_looked_for_and_what_to_download(nowhere, name):
    with pytest.raises(UserError) as e:
        open_dataset(name, nowhere)
    said, benchmark = str(e.value), BENCHMARKS[name]
    assert f"--dataset {name}: nothing is in" in said and "\n" not in said and ". " not in said
    order = "--data-root, else $RPMD_DATA, else $DETECTRON2_DATASETS, else ./datasets"
    assert order in said and benchmark.download in said and len(said) < 900
    for layout in benchmark.layouts:
        place = layout.masks.format(split="val", ade="validation").partition("*")[0].rstrip("/")
        assert str(nowhere / place) in said
    assert re.search(r"\.(zip|tar|tar\.gz|json) of [a-z0-9.]+\.\w+", benchmark.download)


def test_the_root_is_the_flag_then_two_variables_then_a_folder(nowhere, monkeypatch):
    """Each is taken before the next, and an empty one is none."""
    coco(nowhere / "here/datasets", "coco")
    assert data_root() == Path("datasets") and len(open_dataset("coco-stuff")) == 2
    for variable in ("DETECTRON2_DATASETS", "RPMD_DATA"):
        monkeypatch.setenv(variable, "")
        assert data_root() == Path("datasets")
    for variable in ("DETECTRON2_DATASETS", "RPMD_DATA"):
        monkeypatch.setenv(variable, str(nowhere / variable))
        assert data_root() == nowhere / variable and data_root("flag") == Path("flag")
        with pytest.raises(UserError, match=f"{variable}/coco-stuff/annotations"):
            open_dataset("coco-stuff")
    assert len(open_dataset("coco-stuff", nowhere / "here/datasets")) == 2


def test_a_part_of_a_dataset_is_read_with_a_warning(tmp_path, folder, monkeypatch):
    """Of 5,000 images 2 are there. What is complete, or of unknown size, has no warning."""
    coco(tmp_path, "coco")
    warned = "--dataset coco-stuff: val has 2 images, and a complete download 5000"
    for unseen in (None, "person"):
        assert open_dataset("coco-stuff", tmp_path, "val", unseen=unseen).warning == warned
    complete = BENCHMARKS["coco-stuff"]._replace(expected={"val": [1, 2], "train": []})
    monkeypatch.setitem(BENCHMARKS, "coco-stuff", complete)
    assert [open_dataset("coco-stuff", tmp_path, s).warning for s in ("val", "train")] == ["", ""]
    assert open_dataset("toy").warning == "" == open_dataset(f"folder:{folder}").warning


def test_names_of_datasets():
    assert NAMES == ("coco-stuff", *REPORTED, "folder:PATH", "toy", "toy:N")
    assert all(set(layout.raw) <= set(range(65536)) for b in BENCHMARKS.values() for layout in b[0])
    offered = (data.NAMES, data.REPORTED, data.open_dataset, data.read_names)
    assert offered == (NAMES, REPORTED, open_dataset, read_names)


def test_names_held_out(folder):
    """Their pixels carry no label, those of the others the rank among what is left."""
    whole = open_dataset(f"folder:{folder}", split="train")
    part = open_dataset(f"folder:{folder}", split="train", unseen="green thing")
    assert part.names == part.evaluated == ["red thing", "blue thing"] and len(part) == len(whole)
    assert part.source == whole.source
    for i in range(len(whole)):
        labels, held_out = whole.load(i)[1], part.load(i)[1]
        assert held_out.tolist() == [[[0, -1, 1, -1][v] for v in row] for row in labels.tolist()]
    Image.fromarray(np.full((60, 80), 7, np.uint8)).save(folder / "masks/train/0.png")
    with pytest.raises(UserError, match="0.png holds the value 7, which none of the 3 classes"):
        part.load(0)
    toys = [open_dataset("toy", split="train", unseen=u) for u in (None, ["sand", "brick"])]
    for i in range(4):
        labels, held_out = (toy.load(i)[1] for toy in toys)
        names = np.array([*toys[0].names, "none"])[labels]
        assert (held_out == IGNORE).tolist() == np.isin(names, ["sand", "brick"]).tolist()
        known = held_out != IGNORE
        assert (np.array(toys[1].names)[held_out] == names)[known].all()


LIKE_NO_NAME = (
    "names.csv",
    "my names.JSON",
    "a/b",
    "../../outside",
    "lists/",
    "20",
    "-",
    "{}",
    "3.5",
)


@pytest.mark.parametrize(
    "classes, words",
    [
        ("sky, road,, tree", "--classes has no name on item 3"),
        ("", "--classes has no name on item 1"),
        ("a,", "on item 2"),
        ([], "--classes holds no class name"),
        ("a, b, a", "names 'a' twice"),
        ([f"c{i}" for i in range(65_536)], "--classes holds 65536 names"),
        *[
            (lone, re.escape(f"--classes {lone!r} is hardly the name of a class: was a file meant"))
            for lone in LIKE_NO_NAME
        ],
        ("names.txt", "names.txt can't be read as class names"),
        (Path("no.csv"), "no.csv can't be read as class names"),
    ],
)
def test_vocabularies_that_are_refused(classes, words):
    with pytest.raises(UserError, match=words) as e:
        read_names(classes)
    assert "\n" not in str(e.value) and len(str(e.value)) < 300


def test_vocabularies_that_are_taken(tmp_path):
    odd = ["🙂", "../../outside", "/root/outside", "a\x00b", "c:\\d", "{}", "%s", "日本"]
    odd += ["-" * 500, "1", "names.csv"]
    assert read_names(", ".join(odd)) == odd == read_names(odd)
    for lone in (
        "🙂",
        "日本",
        "cat",
        "St. Bernard",
        "c:\\d",
        "7up",
        "%s",
        "traffic-light",
        "a\x00b",
    ):
        assert read_names(lone) == [lone]
    for name, text in (("names.csv", "a/b\n7"), ("names", "1\ta/b\r\n2\t7\r\n\r\n")):
        (tmp_path / name).write_text(text)
        for path in (tmp_path / name, str(tmp_path / name)):
            assert read_names(path) == ["a/b", "7"]
    (tmp_path / "gap").write_text("a\n\nb")
    with pytest.raises(UserError, match="gap has no name on line 2"):
        read_names(str(tmp_path / "gap"))
    with pytest.raises(UserError, match="--unseen has no name on item 2"):
        read_names("a,,b", "--unseen")
    assert read_names("tv/radio", "--unseen") == ["tv/radio"]  # the dataset has it or has not


def test_every_draw_of_an_image_looks_different(folder):
    for path in [*folder.glob("*/train/[1-9].*")]:
        path.unlink()
    crops = data.TrainingCrops(data.open_dataset(f"folder:{folder}", None, "train"), 32, 0)
    assert len(crops.dataset) == 1
    looks = [crops[draw][0] for draw in range(4)]
    assert not any(torch.equal(a, b) for i, a in enumerate(looks) for b in looks[:i])


def test_samples_are_a_function_of_seed_and_draw(folder):
    dataset = open_dataset(f"folder:{folder}", None, "train")
    a, b, other = (data.TrainingCrops(dataset, 32, seed) for seed in (0, 0, 1))
    image, labels, path = b[13]
    assert torch.equal(a[12][0], b[12][0])  # in another order
    assert torch.equal(a[13][0], image) and torch.equal(a[13][1], labels) and a[13][2] == path
    assert not torch.equal(other[13][0], image)
    assert image.shape == (3, 32, 32) and labels.shape == (32, 32) and labels.dtype == torch.int64
    for first in (0, 6, 12):  # every epoch sees every image once
        assert len({a[d][2] for d in range(first, first + 6)}) == 6
    assert [a[d][2] for d in range(6)] != [a[d][2] for d in range(6, 12)]


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_the_same_for_any_number_of_workers_and_processes(folder, workers):
    crops = data.TrainingCrops(open_dataset(f"folder:{folder}", None, "train"), 32, 0)
    whole = list(data.batches(crops, 4, 3, 5))
    parts = [list(data.batches(crops, 2, 3, 5, rank, 2, workers)) for rank in (0, 1)]
    for (images, labels, paths), *shares in zip(whole, *parts):
        assert torch.equal(images, torch.cat([s[0] for s in shares]))
        assert torch.equal(labels, torch.cat([s[1] for s in shares]))
        assert list(paths) == [p for s in shares for p in s[2]]


def test_augmentation_keeps_image_and_labels_together(folder):
    """Red, green and blue areas stay under their labels through resize, crop and flip; hue jitter
    off."""
    crops = data.TrainingCrops(open_dataset(f"folder:{folder}", None, "train"), 48, 0, jitter=0)
    for draw in range(12):
        image, labels, _ = crops[draw]
        largest = F.max_pool2d(labels[None].float(), 9, 1, 4)[0]
        smallest = -F.max_pool2d(-labels[None].float(), 9, 1, 4)[0]
        inner = (largest == smallest) & (labels != IGNORE)
        assert inner.any() and (image.argmax(0) == labels)[inner].float().mean() > 0.98


def test_padding_is_gray_and_ignored():
    """A panorama whose longest side meets the limit first is shorter than the crop, and padded."""
    image, labels = Image.new("RGB", (1000, 100), "white"), np.zeros((100, 1000), np.int64)
    out, out_labels = data.augment(image, labels, 64, 0.0, np.random.default_rng(0))
    assert out.size == (64, 64) and set(np.unique(out_labels)) == {IGNORE, 0}
    pixels, padded = np.asarray(out), out_labels == IGNORE
    assert (pixels[padded] == 128).all() and (pixels[~padded] == 255).all()
    assert (~padded).sum() == 22 * 64


def test_jitter_is_ssds():
    """Hue by at most 18 of 180 steps, everything off half of the time, nothing at strength 0."""
    image = Image.new("RGB", (1, 1), (200, 100, 50))

    def hues(strength, times):
        outs = [colour_jitter(image, strength, np.random.default_rng(i)) for i in range(times)]
        pixels = np.concatenate([np.asarray(out) for out in outs]).astype(int)  # [times,1,3]
        hue = [np.asarray(im.convert("HSV"))[0, 0, 0].astype(int) for im in (*outs, image)]
        return pixels, (np.array(hue[:-1]) - hue[-1] + 128) % 256 - 128

    _, turns = hues(1.0, 300)
    assert 15 < abs(turns).max() <= 30 and (abs(turns) <= 2).mean() > 0.4
    pixels, _ = hues(0.0, 20)
    assert abs(pixels - np.asarray(image)).max() <= 2


def test_sixteen_bit_gray_images_keep_their_tones(folder):
    tones = np.linspace(0, 65535, 80 * 60).astype(np.uint16).reshape(60, 80)
    Image.fromarray(tones).save(folder / "images/train/0.png")
    (folder / "images/train/0.jpg").unlink()
    tones = np.asarray(open_dataset(f"folder:{folder}", None, "train").load(0)[0])[..., 0]
    assert tones.min() == 0 and tones.max() == 255 and len(np.unique(tones)) == 256


def test_images_are_turned_upright(folder):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (60, 80)).save(folder / "images/train/0.jpg", exif=exif)
    assert open_dataset(f"folder:{folder}", None, "train").load(0)[0].size == (80, 60)


def checked(monkeypatch, capsys, *words):
    """python -m sources.check in this process -> (exit status, what it prints)."""
    monkeypatch.setattr("sys.argv", ["check.py", "--workers", "0", *map(str, words)])
    with pytest.raises(SystemExit) as e:
        check.main()
    return int(e.value.code), capsys.readouterr().out


def test_check_reads_a_whole_dataset(folder, tmp_path, monkeypatch, capsys):
    """Exit status 0, the share of each class and a picture; 1, and every broken file by its path;
    not a single good mask."""

    def check_folder(*flags):
        return checked(monkeypatch, capsys, f"folder:{folder}", "--out", tmp_path / "c", *flags)

    status, said = check_folder()
    (report,) = tmp_path.glob("c/*train/report.json")
    masks = (folder / "masks/train").iterdir()
    labels = np.concatenate([np.asarray(Image.open(p)).ravel() for p in masks])
    shares = json.loads(report.read_text())["percent_of_pixels"]
    assert status == 0 and said.count("; see ") == 2 and "not usable" not in said
    assert shares["green thing"] == pytest.approx(100 * (labels == 1).mean())
    assert shares["(ignored)"] == pytest.approx(100 * (labels == 255).mean())
    assert f"{shares['green thing']:7.2f} % of the pixels  green thing" in said
    assert "0 of 4 occur in none of 6 masks" in said and "warning" not in said
    assert Image.open(report.parent / "samples.png").width > 800
    check_folder("--split", "train", "--sample", "4")
    assert json.loads(report.read_text())["read"] == 4
    break_range(folder), break_image(folder)
    Image.new("L", (8, 8)).save(folder / "masks/train/4.png")
    status, said = check_folder("--split", "train")
    assert status == 1 and "masks/train/4.png is 8 x 8" in said
    assert "images/train/0.jpg can't be read" in said
    for path in (folder / "masks/val").iterdir():
        path.write_bytes(b"no picture")
    status, said = check_folder("--split", "val")
    assert status == 1 and said.count("can't be read as a mask") == 3 and "not usable" in said
    assert check_folder("--split", "val", "--sample", "1")[1].count("can't be read as a mask") == 1
    status, said = check_folder("--split", "val", "--classes", "a, b")
    assert status == 1 and said.count("--classes has 2 names") == 1


def test_check_warns_of_what_train_warns_of(folder, tmp_path, monkeypatch, capsys):
    """A part of a dataset is usable; several datasets in one call; what is there of none."""
    coco(tmp_path, "coco")
    words = "--data-root", tmp_path, "--out", tmp_path / "c"
    status, said = checked(monkeypatch, capsys, "coco-stuff", f"folder:{folder}", *words)
    assert status == 0 and said.count("; see ") == 4 and "not usable" not in said
    for split, expected in (("train", 118_287), ("val", 5000)):
        warning = f"--dataset coco-stuff: {split} has 2 images, and a complete download {expected}"
        assert f"warning: {warning}\n" in said and said.count("warning: ") == 2
        report = json.loads((tmp_path / f"c/coco-stuff-{split}/report.json").read_text())
        assert report["warning"] == warning and report["wrong"] == []
    status, said = checked(monkeypatch, capsys, "voc-20b", "coco-stuff", *words)
    assert status == 1 and said.count("not usable: --dataset voc-20b") == 1  # it has no train
    assert said.count("; see ") == 2
