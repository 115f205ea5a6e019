"""Datasets by name, class names, odd pictures and masks, training crops, and sources/check.py."""
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import data
import evaluate
import train
from data import open_dataset, read_names
from losses import IGNORE
from sources import check
from support.files import UserError

GRAY = Image.new("L", (8, 8))
MANY = "\n".join(map(hex, range(256)))


def trained(folder, **options):
    return open_dataset(f"folder:{folder}", None, "train", **options)


def put(folder, mask=None, image=None, **saving):
    """Replace the first training mask or image by an array or a PIL image."""
    for path, content in (("masks/train/0.png", mask), ("images/train/0.jpg", image)):
        if content is not None:
            content = content if isinstance(content, Image.Image) else Image.fromarray(content)
            kind = "TIFF" if content.mode in ("I", "F") else "PNG"  # whatever the file is called
            content.save(folder / path, kind, **saving)


def refused(words, function, *arguments, **options):
    """The function raises UserError, one line that these words are found in. Returns it."""
    with pytest.raises(UserError, match=words) as e:
        function(*arguments, **options)
    assert "\n" not in str(e.value)
    return str(e.value)


def test_folder(folder):
    GRAY.save(folder / "images/train/0.jpg.rpmd.png")  # evaluate.py's
    (folder / "images/train/Thumbs.db").write_bytes(b"litter")
    dataset = trained(folder)
    assert dataset.names == ["red thing", "green thing", "blue thing"] and len(dataset) == 6
    image, labels, path = dataset.load(2)
    raw = np.asarray(Image.open(folder / "masks/train/2.png")).astype(int)
    assert np.array_equal(labels, np.where(raw == 255, IGNORE, raw)) and labels[0, 0] == IGNORE
    assert path.endswith("2.jpg") and dataset.own_words
    put(folder, np.array([[0, 1, 2, 65535]], np.uint16), Image.new("RGB", (4, 1)))
    assert trained(folder).load(0)[1].tolist() == [[0, 1, 2, IGNORE]]


def test_the_same_data_elsewhere_have_the_same_fingerprint(folder, tmp_path):
    first = trained(folder).fingerprint
    moved = folder.rename(tmp_path / "moved")
    assert trained(f"{moved}/").fingerprint == first != trained(moved, classes="a,b,c").fingerprint
    for name in ("images/train/{}.jpg", "masks/train/{}.png"):
        (moved / name.format(0)).rename(moved / name.format(9))
    (moved / "images/train/8.gif").touch()
    assert trained(moved).fingerprint != first and "folders there: 1" in trained(moved).source


@pytest.mark.parametrize("words, harm", {
    "size .8, 8., and its image .80, 60": lambda f: put(f, GRAY),
    "value 3, which is none of 3 classes": lambda f: put(f, np.full((60, 80), 3, np.uint8)),
    "value -1, .*in 0..2, nor the ignored 255": lambda f: put(f, np.full((60, 80), -1, np.int32)),
    "value 65536, which": lambda f: put(f, np.full((60, 80), 65536, np.int32)),
    "mask of one channel .*, not uint8": lambda f: put(f, Image.new("RGB", (80, 60))),
    "0.jpg can't be read as an im": lambda f: os.truncate(f / "images/train/0.jpg", 300),
    "0.png can't be read as a mask": lambda f: GRAY.save(f / "masks/train/0.png", "jpeg"),
    "0.png .*not a regular file":
        lambda f: [act(f / "masks/train/0.png") for act in (os.unlink, os.mkfifo)],
    "masks/train has no file 0 ": lambda f: (f / "masks/train/0.png").unlink(),
    "images/train has no file 0 ": lambda f: (f / "images/train/0.jpg").unlink(),
    "has a twin of another type": lambda f: GRAY.save(f / "images/train/0.png"),
    "integers up to 255 and 65535, not uint8": lambda f: (f / "classes.txt").write_text(MANY),
    "0.jpg .*cannot identify": lambda f: (f / "images/train/0.jpg").write_bytes(b"%!PS-Adobe-3.0")
}.items())
def test_bad_input_is_one_sentence_with_the_path(folder, words, harm):
    harm(folder)
    assert str(folder) in refused(words, lambda: trained(folder).load(0))


def test_datasets_that_are_not_there(tmp_path, monkeypatch):
    """The root is the flag, else $RPMD_DATA, else $DETECTRON2_DATASETS, else ./datasets."""
    for name in ("coco", "toy:x", "folder:", f"toy:{10 ** 9}"):
        refused(f"{name}: should be one of coco-.*folder:PATH, toy, toy:N", open_dataset, name)
    monkeypatch.setenv("DETECTRON2_DATASETS", "")
    monkeypatch.setenv("RPMD_DATA", "")
    monkeypatch.chdir(tmp_path)
    refused("voc-20: nothing is in datasets/VOC.*, datasets/VOC.*", open_dataset, "voc-20")
    for variable in ("DETECTRON2_DATASETS", "RPMD_DATA"):
        monkeypatch.setenv(variable, variable)
        refused(f"root is {variable};", open_dataset, "voc-20")
    refused("root is flag;", open_dataset, "voc-20", "flag")


def test_names_held_out(folder):
    """Their pixels carry no label, those of the others the rank among what is left."""
    (folder / "classes.txt").write_text("red thing\ngreen thing, verde\nblue thing")
    whole, part = trained(folder), trained(folder, unseen="green thing")
    assert part.names == part.evaluated == ["red thing", "blue thing"]
    ranks = np.array([0, -1, 1, -1])
    assert all(np.array_equal(part.load(i)[1], ranks[whole.load(i)[1]]) for i in range(len(whole)))
    put(folder, np.full((60, 80), 7, np.uint8))
    refused("0.png holds the value 7, which is none of 3 classes", part.load, 0)
    refused("--unseen x: should be some, but not", trained, folder, unseen="x")
    refused("--unseen .* name 1 is ''", trained, folder, unseen="")
    refused("--unseen red .*but not all", trained, folder, unseen=part.names + ["green thing"])
    whole, part = (open_dataset("toy", None, "train", unseen=u) for u in (None, "sand, brick"))
    names, left = np.array(whole.names)[whole.load(0)[1]], part.load(0)[1]
    assert np.array_equal(left == IGNORE, np.isin(names, ["sand", "brick"]))
    assert (np.array(part.names)[left] == names)[left != IGNORE].all()


@pytest.mark.parametrize("classes, words", [
    ("sky, road,, tree", "--classes .* name 3 is ''"), ('["a", 3]', "name 2 is '3'"),
    ([], "should hold 1 to 32767 class names"), ([f"c{i}x" for i in range(32_768)], "holds 32768"),
    ("a, b, a", "names 'a' twice"), (Path("no.csv"), "no.csv can't be read as class names"),
    ("no.csv", "no.csv can't be read as class names"), ("0 red\n1 blue", "name 1 is '0 red'"),
    ("# label:color_rgb\na", "name 1 is '# label:color_rgb'"), ("a\n0: red", "name 2 is '0: red'"),
    ("0,red", "name 1 is '0'"), ("background:0,0,0::", "'background:0'"), ("- a", "name 1"),
    ("a; b", "name 1 is 'a; b'"), ('{"0": "red"}', "name 1 is '{"), ('"a","b"', "name 1 is '.a"),
    ([", red"], "name 1 is ', red'"), ("names: [a, b]", "name 1"), ("./a.yaml", "a.yaml can't be"),
    ("a=1", "name 1"), ("// a", "name 1"), ("<name>a</name>", "name 1"), ("a\nb\u200b", "name 2"),
    ("__ignore__\na", "name 1"), ("wall 1 2 3", "name 1"), ("CLASSES = (", "name 1 is 'CLASSES"),
    ("'a',\n'b',", "name 1"), ("n01440764 tench", "name 1"), (["a", "b\ud800"], r"'b\\ud800'"),
    (["a", "b\x1b[31m"], r"'b\\x1b"), ("a, " + 301 * "b", "at most 300 letters .* name 2 is 'b")])
def test_vocabularies_that_are_refused(classes, words):
    refused(words, read_names, classes)


def test_vocabularies_that_are_taken(tmp_path, capsys):
    assert read_names("chaise\xa0longue\nlane #2") == ["chaise\xa0longue", "lane #2"]
    odd = ["🙂", "../../outside", "c:\\d", "tv/radio", "日本", "-" * 300, "n.csv", "7up", "C#"]
    assert read_names(", ".join(odd)) == odd == read_names(odd)
    assert read_names('["truck, 18-wheeler"]') == ["truck, 18-wheeler"]
    assert "warning: every pixel will be 'truck, 18-wheeler'" in capsys.readouterr().out
    assert read_names("1 euro") == ["1 euro"]
    assert read_names("sky\nroad, tree,\ngrass\n\n") == ["sky", "road", "tree", "grass"]
    for text in ("a/b\nc, d", "a/b\r\nc, d\r\n\r\n", '[\n "a/b",\n "c, d"\n]\n'):
        (tmp_path / "names.txt").write_text(text, encoding="utf-8-sig")
        assert read_names(str(tmp_path / "names.txt")) == ["a/b", "c, d"]
    for text in ("name,r,g,b\nred,200,40,40", "class_name\nred"):
        (tmp_path / "names.txt").write_text(text)
        refused("name [12] is '", read_names, str(tmp_path / "names.txt"))


def test_pictures_and_masks_are_turned_as_their_own_exif_says(folder, monkeypatch):
    pixels, exif = np.random.default_rng(0).integers(0, 3, (60, 80, 3), np.uint8), Image.Exif()
    views = {2: pixels[:, ::-1], 3: pixels[::-1, ::-1], 6: np.rot90(pixels)}
    for orientation, turned in views.items():
        exif[0x0112] = orientation
        put(folder, turned[..., 0].copy(), turned.copy(), exif=exif)
        with monkeypatch.context() as patch:
            patch.setattr(Image.Exif, "tobytes", None)  # Pillow reads tags that it can't write
            image, labels, _ = trained(folder).load(0)
        assert np.array_equal(image, pixels) and np.array_equal(labels, pixels[..., 0])
    put(folder, pixels[..., 0])
    assert np.array_equal(trained(folder).load(0)[1], pixels[..., 0])


def test_masks_of_inverted_values_are_refused(folder):
    for mode in ("L", "1"):
        mask = Image.new(mode, (80, 60), 1)
        mask.save(folder / "masks/train/0.png", "TIFF", tiffinfo={262: 0})
        refused("values are inverted: WhiteIsZero", trained(folder).load, 0)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_masks_of_few_bits_or_a_palette_give_the_indices_in_the_file(folder, bits):
    indices = np.random.default_rng(0).integers(0, 2 if bits == 1 else 3, (60, 80), np.uint8)
    mask = Image.fromarray(indices)
    if bits == 8:
        mask.putpalette([9, 9, 9, 8, 8, 8, 200, 100, 50])
    put(folder, mask, bits=bits)
    assert np.array_equal(trained(folder).load(0)[1], indices)
    if bits in (2, 4):  # also a TIFF file, which Pillow reads and can't write
        pixels = np.packbits(np.unpackbits(indices[..., None], axis=-1)[..., -bits:]).tobytes()
        tags = {256: 80, 257: 60, 258: bits, 259: 1, 262: 1, 273: 8, 278: 60, 279: len(pixels)}
        tiff = struct.pack("<2sHI", b"II", 42, 8 + len(pixels)) + pixels + struct.pack("<H", 8)
        tiff += b"".join(struct.pack("<HHII", t, 4, 1, n) for t, n in tags.items()) + bytes(4)
        (folder / "masks/train/0.png").write_bytes(tiff)
        assert np.array_equal(trained(folder).load(0)[1], indices)


def test_pictures_of_more_than_8_bits_are_scaled_or_refused(folder):
    tones = np.linspace(0, 65535, 80 * 60).reshape(60, 80)
    for kind in (np.uint16, np.int32, np.float32):
        put(folder, image=tones.astype(kind))
        gray = np.asarray(trained(folder).load(0)[0])[..., 0]
        assert np.array_equal(gray, (tones.astype(kind) // 257).astype(int))
    hot = np.where(tones < 65535, 1 / 32, 1)  # one pixel alone is bright
    for kind, scale, found in ((np.int32, 2, "0..131070"), (np.uint16, 1 / 16, "0..4095"),
                               (np.float32, 1 / 65535, "0..1,"), (np.int32, -1, "-65535..0"),
                               (np.uint16, hot, "0..65535, 99 % of them below 2027")):
        put(folder, image=(tones * scale).astype(kind))
        refused(f"images/train/0.jpg .* lie in {found}", trained(folder).load, 0)
    head = struct.pack(">IIBBBBB", 80, 60, 16, 2, 0, 0, 0)
    for value in (200, 65535):  # in colour, which Pillow reads, as 8 bits, and can't write
        rows, png = (b"\0" + 240 * struct.pack(">H", value)) * 60, b"\x89PNG\r\n\x1a\n"
        for chunk in (b"IHDR" + head, b"IDAT" + zlib.compress(rows), b"IEND"):
            png += struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
        (folder / "images/train/0.jpg").write_bytes(png)
        if value == 200:
            refused("0.jpg .*more than 8 bits should fill", trained(folder).load, 0)
    assert (np.asarray(trained(folder).load(0)[0]) == 255).all()


def test_samples_are_a_function_of_seed_and_draw(folder):
    dataset = trained(folder)
    a, b, other = (data.TrainingCrops(dataset, 32, seed) for seed in (0, 0, 1))
    image, labels, path = b[13]
    assert torch.equal(a[12][0], b[12][0])  # in another order
    assert torch.equal(a[13][0], image) and torch.equal(a[13][1], labels) and a[13][2] == path
    assert not torch.equal(other[13][0], image)
    assert image.shape == (3, 32, 32) and image.dtype == torch.uint8
    assert labels.shape == (32, 32) and labels.dtype == torch.int16
    order = [a[draw][2] for draw in range(12)]
    assert len(set(order[:6])) == len(set(order[6:])) == 6  # an epoch sees every image once
    assert order[:6] != order[6:]
    dataset.pairs = dataset.pairs[:1]
    looks = {data.TrainingCrops(dataset, 32, 0)[draw][0].numpy().tobytes() for draw in range(4)}
    assert len(looks) == 4


def test_batches_are_the_same_for_any_number_of_workers_and_processes(folder):
    crops = data.TrainingCrops(trained(folder), 32, 0)
    whole = list(data.batches(crops, 4, 3, 5))
    parts = [list(data.batches(crops, 4, 3, 5, rank, 2, workers=2 * rank)) for rank in (0, 1)]
    assert len(whole) == len(parts[0]) == 2
    first = torch.stack([crops[draw][0] for draw in range(12, 16)])
    torch.testing.assert_close(whole[0][0], (first / 255 - data.MEAN) / data.STD)
    for (images, labels, paths), *shares in zip(whole, *parts):
        assert torch.equal(images, torch.cat([s[0] for s in shares]))
        assert torch.equal(labels, torch.cat([s[1] for s in shares]))
        assert list(paths) == [p for s in shares for p in s[2]]
    assert len(next(iter(data.batches(crops, 2, 0, 10 ** 12)))[2]) == 2  # no list of all draws


def test_augmentation_keeps_image_and_labels_together(folder):
    crops = data.TrainingCrops(trained(folder), 48, 0, jitter=0)
    for draw in range(8):
        image, labels = crops[draw][0], crops[draw][1].float()
        largest = F.max_pool2d(labels[None], 9, 1, 4)[0]
        smallest = -F.max_pool2d(-labels[None], 9, 1, 4)[0]
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
    """Hue by at most 18 of 180 steps, and off half of the time."""
    image = Image.new("RGB", (1, 1), (200, 100, 50))
    outs = [data.colour_jitter(image, 1.0, np.random.default_rng(i)) for i in range(100)]
    hues = np.array([np.asarray(out.convert("HSV"))[0, 0, 0] for out in (*outs, image)], int)
    turns = (hues[:-1] - hues[-1] + 128) % 256 - 128
    assert np.array_equal(data.colour_jitter(image, 0.0, np.random.default_rng(0)), image)
    assert 15 < abs(turns).max() <= 30 and (abs(turns) <= 2).mean() > 0.4


def checked(folder, capsys):
    """What a check of the training split prints."""
    check.check(trained(folder), "mine", set())
    return capsys.readouterr().out


def test_check_reads_a_whole_dataset(folder, capsys, monkeypatch):
    drawn = []
    monkeypatch.setattr("support.pictures.labelled", lambda path, *rows: drawn.append(rows))
    monkeypatch.setattr("os.cpu_count", lambda: 0)  # loaders
    monkeypatch.setattr("sys.argv", ["check.py", f"folder:{folder}"])
    check.main()
    assert "train: usable; samples" in (said := capsys.readouterr().out) and "val: usable" in said
    said = checked(folder, capsys)
    labels = [np.asarray(Image.open(path)) for path in (folder / "masks/train").iterdir()]
    assert "usable; samples" in said and "warning" not in said
    assert [len(rows) for rows, _ in drawn] == [4, 3, 4]
    for label, name in ((1, "green thing"), (255, "(ignored)")):
        assert f"{100 * (np.array(labels) == label).mean():7.2f} % of the pixels  {name}" in said
    put(folder, GRAY)
    os.truncate(folder / "images/train/4.jpg", 300)
    refused("2 of 6 items are broken", checked, folder, capsys)
    said = capsys.readouterr().out
    assert "masks/train/0.png is of size" in said and "images/train/4.jpg can't be read" in said


def test_doubts_about_palettes_and_whether_255_is_a_class(tiny, folder, capsys, monkeypatch):
    monkeypatch.setattr("support.pictures.labelled", lambda *rows: None)
    for i, palette in enumerate(([0] * 9, [0] * 300, [0] * 6 + [9, 9, 9])):
        path = folder / ("masks/val/0.png" if i == 2 else f"masks/train/{i}.png")
        mask = Image.fromarray(np.asarray(Image.open(path)) % 3)
        mask.putpalette(palette)
        mask.save(path)
        monkeypatch.setattr("sys.argv", ["check.py", f"folder:{folder}"])
        check.main()
        assert ("warning: palettes differ" in capsys.readouterr().out) == (i == 2)
    scribble = np.full((60, 80), 255, np.uint8)
    scribble[::12] = 0
    for path in (folder / "masks/train").iterdir():
        Image.fromarray(scribble).save(path)
    (folder / "classes.txt").write_text("road\nRoad")
    refused("'road' and 'Road' alike", checked, folder, capsys)
    (folder / "classes.txt").write_text("background\nroad")
    assert "warning: no pixel is 'road'" in checked(folder, capsys)
    dataset = trained(folder)
    assert data.doubt_about_255(dataset, np.array([2, 2, 4])) == ""
    evaluate.evaluate(tiny, dataset)
    assert "warning: no pixel is 'road'" in capsys.readouterr().out
    crop = torch.zeros(1, 3, 64, 64), torch.full((1, 64, 64), IGNORE), []
    assert train.reference_share(tiny, None, tiny.tokenize(dataset.names), [crop]) == 0
    assert "none can be a reference" in capsys.readouterr().out
    assert data.doubt_about_255(dataset, np.array([90, 0, 0])) == ""  # nothing is ignored
    dataset.evaluated = ["background", "road", "sky", "sea"]
    assert data.doubt_about_255(dataset, np.array([90, 1, 0, 0, 9])) == ""  # rare classes, and void
