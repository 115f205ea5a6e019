"""Raw layouts written on the spot, what is wrong with data, and samples that depend on nothing but seed and draw number."""
import json

import numpy as np
import pytest
import torch
from PIL import Image

import data
from losses import IGNORE

ABSENT = {11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90}


def coco(root, layout):
    """Two images a split: every used id and 255 in the first mask, nothing but 255 in the second, whose jpg is gray."""
    images, masks = {"coco-stuff": ("coco-stuff/images/{}2017", "coco-stuff/annotations/{}2017"),
                     "coco": ("coco/{}2017", "coco/stuffthingmaps/{}2017")}[layout]
    values = [v for v in range(182) if v not in ABSENT] + [255]
    for split in ("train", "val"):
        for folder in (images, masks):
            (root / folder.format(split)).mkdir(parents=True)
        first = np.resize(np.array(values, np.uint8), (20, 20))
        Image.fromarray(first).save(root / masks.format(split) / "000000000001.png")
        Image.new("RGB", (20, 20), "red").save(root / images.format(split) / "000000000001.jpg")
        Image.fromarray(np.full((8, 9), 255, np.uint8)).save(root / masks.format(split) / "000000000002.png")
        Image.new("L", (9, 8), 99).save(root / images.format(split) / "000000000002.jpg")
    return first


@pytest.mark.parametrize("layout", ["coco-stuff", "coco"])
def test_coco_stuff(tmp_path, layout):
    raw = coco(tmp_path, layout)
    dataset = data.open_dataset("coco-stuff", tmp_path, "val")
    assert len(dataset) == 2 and len(dataset.names) == 171
    assert [dataset.names[i] for i in (0, 79, 80, 137, 170)] == ["person", "toothbrush", "banner", "road", "wood"]
    image, labels, path = dataset.load(0)
    assert image.mode == "RGB" and labels.dtype == np.int64 and path.endswith("val2017/000000000001.jpg")
    rank = {v: i for i, v in enumerate(sorted(set(range(182)) - ABSENT))} | {255: IGNORE}
    assert np.array_equal(labels, np.vectorize(rank.get)(raw)) and set(labels.ravel()) == set(range(-1, 171))
    gray, void, _ = dataset.load(1)
    assert gray.mode == "RGB" and gray.size == (9, 8) and (void == IGNORE).all()


def test_coco_absent_and_one_based_ids_are_refused(tmp_path):
    coco(tmp_path, "coco")
    path = tmp_path / "coco/stuffthingmaps/val2017/000000000002.png"
    for value in (11, 182, 200):
        Image.fromarray(np.full((8, 9), value, np.uint8)).save(path)
        with pytest.raises(data.DataError, match=f"000000000002.png holds the value {value}"):
            data.open_dataset("coco-stuff", tmp_path, "val").load(1)


def test_folder(folder):
    dataset = data.open_dataset(f"folder:{folder}", None, "train")
    assert dataset.names == ["red thing", "green thing", "blue thing"] and len(dataset) == 6
    image, labels, path = dataset.load(2)
    raw = np.asarray(Image.open(folder / "masks/train/2.png")).astype(int)
    assert np.array_equal(labels, np.where(raw == 255, IGNORE, raw)) and labels[0, 0] == IGNORE and path.endswith("2.jpg")
    wide = np.array([[0, 1, 2, 65535]], np.uint16).repeat(4, 0)
    Image.fromarray(wide).save(folder / "masks/train/2.png")
    Image.new("RGB", (4, 4)).save(folder / "images/train/2.jpg")
    assert dataset.load(2)[1][0].tolist() == [0, 1, 2, IGNORE]


def test_palette_masks_give_indices_not_colours(folder):
    mask = Image.fromarray(np.full((60, 80), 2, np.uint8), "P")
    mask.putpalette([9, 9, 9, 8, 8, 8, 200, 100, 50])
    mask.save(folder / "masks/train/0.png")
    assert (data.open_dataset(f"folder:{folder}", None, "train").load(0)[1] == 2).all()


def break_size(f): Image.new("L", (8, 8)).save(f / "masks/train/0.png")
def break_range(f): Image.fromarray(np.full((60, 80), 3, np.uint8)).save(f / "masks/train/0.png")
def break_channels(f): Image.new("RGB", (80, 60)).save(f / "masks/train/0.png")
def break_image(f): (f / "images/train/0.jpg").write_bytes((f / "images/train/0.jpg").read_bytes()[:300])
def break_mask(f): (f / "masks/train/0.png").write_bytes(b"no picture")
def break_partner(f): (f / "masks/train/0.png").unlink()
def break_orphan(f): (f / "images/train/0.jpg").unlink()
def break_names(f): (f / "classes.txt").write_text("a\nb\na")
def break_gap(f): (f / "classes.txt").write_text("a\n\nb\nc")
def break_twins(f): Image.new("RGB", (80, 60)).save(f / "images/train/0.png")
def break_bits(f): (f / "classes.txt").write_text("\n".join(f"c{i}" for i in range(256)))
def break_no_names(f): (f / "classes.txt").unlink()
def break_split(f): [p.unlink() for p in (f / "images/train").iterdir()]


@pytest.mark.parametrize("broken, words", [
    (break_size, "0.png is 8 x 8, its image 80 x 60"), (break_range, "0.png holds the value 3, which none of the 3 classes has"),
    (break_channels, "0.png should be a mask of one channel of indices, not uint8"), (break_image, "0.jpg can't be read as an image"),
    (break_mask, "0.png can't be read as a mask"), (break_partner, "0.jpg has no partner 0 in .*masks"),
    (break_orphan, "0.png has no partner 0 in .*images"), (break_names, "classes.txt names 'a' twice"),
    (break_gap, "classes.txt has no name on line 2"), (break_twins, "has a twin of another type"), (break_bits, "has 8 bits, too few for 256 classes"),
    (break_no_names, "classes.txt can't be read as class names"), (break_split, "images.train holds no file . of type"),
])
def test_bad_input_is_one_sentence_with_the_path(folder, broken, words):
    broken(folder)
    with pytest.raises(data.DataError, match=words) as e:
        data.open_dataset(f"folder:{folder}", None, "train").load(0)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("name, root, words", [
    ("coco", None, "known are coco-stuff"), ("coco-stuff", None, "needs --data-root"), ("toy:x", None, "whole number"),
    ("coco-stuff", "/nowhere", "nothing is in /nowhere/coco-stuff/annotations/val2017, /nowhere/coco/"),
    ("folder:/nowhere", None, "/nowhere/classes.txt")])
def test_datasets_that_are_not_there(name, root, words):
    with pytest.raises(data.DataError, match=words):
        data.open_dataset(name, root, "val")


def test_samples_are_a_function_of_seed_and_draw(folder):
    crops = lambda seed=0: data.TrainingCrops(data.open_dataset(f"folder:{folder}", None, "train"), 32, seed)
    a, b, other = crops(), crops(), crops(1)
    later = b[13]                                                                          # in another order
    assert torch.equal(a[13][0], later[0]) and torch.equal(a[13][1], later[1]) and a[13][2] == later[2]
    assert not torch.equal(a[13][0], other[13][0])
    assert a[0][0].shape == (3, 32, 32) and a[0][1].shape == (32, 32) and a[0][1].dtype == torch.int64
    for first in (0, 6, 12):                                                               # every epoch sees every image once
        assert len({a[d][2] for d in range(first, first + 6)}) == 6
    assert [a[d][2] for d in range(6)] != [a[d][2] for d in range(6, 12)]


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_the_same_for_any_number_of_workers_and_processes(folder, workers):
    crops = data.TrainingCrops(data.open_dataset(f"folder:{folder}", None, "train"), 32, 0)
    whole = list(data.batches(crops, 4, 3, 5))
    parts = [list(data.batches(crops, 2, 3, 5, rank, 2, workers)) for rank in (0, 1)]
    for (images, labels, paths), *shares in zip(whole, *parts):
        assert torch.equal(images, torch.cat([s[0] for s in shares])) and torch.equal(labels, torch.cat([s[1] for s in shares]))
        assert list(paths) == [p for s in shares for p in s[2]]


def test_augmentation_keeps_image_and_labels_together(folder):
    """Red, green and blue areas stay under their labels through resize, crop and flip; hue jitter off."""
    crops = data.TrainingCrops(data.open_dataset(f"folder:{folder}", None, "train"), 48, 0, jitter=0)
    for draw in range(12):
        image, labels, _ = crops[draw]
        inner = torch.nn.functional.max_pool2d(labels[None].float(), 9, 1, 4)[0] == -torch.nn.functional.max_pool2d(-labels[None].float(), 9, 1, 4)[0]
        inner &= labels != IGNORE
        assert inner.any() and (image.argmax(0) == labels)[inner].float().mean() > 0.98


def test_padding_is_gray_and_ignored():
    """A panorama whose longest side meets the limit first is shorter than the crop, and padded."""
    image, labels = Image.new("RGB", (1000, 100), "white"), np.zeros((100, 1000), np.int64)
    out, out_labels = data.augment(image, labels, 64, 0.0, np.random.default_rng(0))
    assert out.size == (64, 64) and set(np.unique(out_labels)) == {IGNORE, 0}
    pixels, padded = np.asarray(out), out_labels == IGNORE
    assert (pixels[padded] == 128).all() and (pixels[~padded] == 255).all() and (~padded).sum() == 22 * 64


def test_jitter_is_ssds():
    """Hue by at most 18 of 180 steps, everything off half of the time, nothing at strength 0."""
    image = Image.new("RGB", (1, 1), (200, 100, 50))
    hue = lambda im: np.asarray(im.convert("HSV"))[0, 0, 0].astype(int)
    outs = [data.colour_jitter(image, 1.0, np.random.default_rng(i)) for i in range(300)]
    turns = np.array([(hue(o) - hue(image) + 128) % 256 - 128 for o in outs])
    assert 15 < abs(turns).max() <= 30 and (abs(turns) <= 2).mean() > 0.4
    assert all(np.array_equal(np.asarray(data.colour_jitter(image, 0.0, np.random.default_rng(i))), np.asarray(image)) or
               abs(np.asarray(data.colour_jitter(image, 0.0, np.random.default_rng(i))).astype(int) - np.asarray(image)).max() <= 2 for i in range(20))


def test_sixteen_bit_gray_images_keep_their_tones(folder):
    Image.fromarray(np.linspace(0, 65535, 80 * 60).astype(np.uint16).reshape(60, 80)).save(folder / "images/train/0.png")
    (folder / "images/train/0.jpg").unlink()
    tones = np.asarray(data.open_dataset(f"folder:{folder}", None, "train").load(0)[0])[..., 0]
    assert tones.min() == 0 and tones.max() == 255 and len(np.unique(tones)) == 256


def test_images_are_turned_upright(folder):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (60, 80)).save(folder / "images/train/0.jpg", exif=exif)
    assert data.open_dataset(f"folder:{folder}", None, "train").load(0)[0].size == (80, 60)


def test_check_reads_a_whole_dataset(folder, tmp_path, monkeypatch, capsys):
    """Exit status 0, the share of each class and a picture; 1, and every broken file by its path; not a single good mask."""
    import benchmarks

    def check(*flags):
        monkeypatch.setattr("sys.argv", ["data.py", "--check", f"folder:{folder}", "--workers", "0", "--out", str(tmp_path / "c"), *flags])
        with pytest.raises(SystemExit) as e:
            benchmarks.main()
        return e.value.code, capsys.readouterr().out

    status, said = check()
    report, = tmp_path.glob("c/*train/report.json")
    labels = np.concatenate([np.asarray(Image.open(p)).ravel() for p in (folder / "masks/train").iterdir()])
    shares = json.loads(report.read_text())["percent_of_pixels"]
    assert status == 0 and said.count("; see ") == 2 and "not usable" not in said
    assert shares["green thing"] == pytest.approx(100 * (labels == 1).mean())
    assert shares["(ignored)"] == pytest.approx(100 * (labels == 255).mean())
    assert Image.open(report.parent / "samples.png").width > 800
    break_range(folder), break_image(folder)
    Image.new("L", (8, 8)).save(folder / "masks/train/4.png")
    status, said = check("--split", "train")
    assert status == 1 and "masks/train/4.png is 8 x 8" in said and "images/train/0.jpg can't be read" in said
    for path in (folder / "masks/val").iterdir():
        path.write_bytes(b"no picture")
    status, said = check("--split", "val")
    assert status == 1 and said.count("can't be read as a mask") == 3 and "not usable" in said
    assert check("--split", "val", "--sample", "1")[1].count("can't be read as a mask") == 1
    assert check("--split", "val", "--classes", "a, b")[1].count("--classes has 2 names") == 1
