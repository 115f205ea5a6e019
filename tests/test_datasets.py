"""The seven benchmarks in every layout they come in, written on the spot."""
import functools
import hashlib
import itertools
import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data import open_dataset
from losses import IGNORE
from sources import readers
from sources.benchmarks import BENCHMARKS, CLASSES
from support.files import UserError

rle = pytest.importorskip("pycocotools.mask")

ABSENT = [11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90]


def lines(name):
    return (CLASSES / f"{name}.txt").read_text(encoding="utf-8").splitlines()


PC59 = [lines("pc-459").index(name) + 1 for name in lines("pc-59")]
ADE847 = [int(line.split("\t")[0]) for line in lines("ade20k-847")]
ADE, ADE21 = "ADEChallengeData2016", "ADE20K_2021_17_01"
VOC10, VOC12 = "VOCdevkit/VOC2010", "VOCdevkit/VOC2012"
JPEG10, JPEG12, MASKS12 = f"{VOC10}/JPEGImages", f"{VOC12}/JPEGImages", f"{VOC12}/SegmentationClass"
CS, HOME = "coco-stuff", f"{ADE21}/images/ADE/validation/home/attic"
READY = "annotations_detectron2"
LISTS = {VOC12: "ImageSets/Segmentation/val.txt", VOC10: "pascalcontext_val.txt"}

COCO = {v: i for i, v in enumerate(sorted(set(range(182)) - set(ABSENT)))} | {255: IGNORE}
A847 = {v: IGNORE for v in range(12 * 256 + 200)} | {v: i for i, v in enumerate(ADE847)}
P59 = {v: IGNORE for v in range(460)} | {v: i for i, v in enumerate(PC59)}
CS_JPG, ADE_JPG = CS + "/images/{s}2017", ADE + "/images/{t}"
ADE21_JPG, ADE21_TIF = f"{ADE21}/images_detectron2/validation", f"{ADE21}/{READY}/validation"


def from_one(classes, others):
    return {v: v - 1 for v in range(1, classes + 1)} | others


def ready(classes, void=255):
    return {v: v for v in range(classes)} | {void: IGNORE}


# dataset, images, masks, their type, {value: label}; in folders {s} is the split, {t} its long name
LAYOUTS = {
    "coco-stuff": ("coco-stuff", CS_JPG, CS + "/annotations/{s}2017", ".png", COCO),
    "coco": ("coco-stuff", "coco/{s}2017", "coco/stuffthingmaps/{s}2017", ".png", COCO),
    "coco-stuff ready": ("coco-stuff", CS_JPG, f"{CS}/{READY}/{{s}}2017", ".png", ready(171)),
    "ade20k-150": ("ade20k-150", ADE_JPG, ADE + "/annotations/{t}", ".png", from_one(150, {0: -1})),
    "ade20k-150 ready": ("ade20k-150", ADE_JPG, f"{ADE}/{READY}/{{t}}", ".png", ready(150)),
    "ade20k-847": ("ade20k-847", HOME, HOME, "_seg.png", A847),
    "ade20k-847 ready": ("ade20k-847", ADE21_JPG, ADE21_TIF, ".tif", ready(847, 65535)),
    "pc-59": ("pc-59", JPEG10, VOC10 + "/trainval", ".mat", P59),
    "pc-59 ready": ("pc-59", JPEG10, f"{VOC10}/{READY}/pc59_val", ".png", ready(59)),
    "pc-459": ("pc-459", JPEG10, VOC10 + "/trainval", ".mat", from_one(459, {0: IGNORE})),
    "pc-459 ready": ("pc-459", JPEG10, f"{VOC10}/{READY}/pc459_val", ".tif", ready(459, 65535)),
    "voc-20": ("voc-20", JPEG12, MASKS12, ".png", from_one(20, {0: IGNORE, 255: IGNORE})),
    "voc-20 ready": ("voc-20", JPEG12, f"{VOC12}/{READY}/val", ".png", ready(20)),
    "voc-20b": ("voc-20b", JPEG12, MASKS12, ".png", from_one(20, {0: 20, 255: IGNORE})),
    "voc-20b ready": ("voc-20b", JPEG12, f"{VOC12}/{READY}_bg/val", ".png", ready(21)),
}


def paths(root, layout, number=1, split="val"):
    """The image and the mask with a number, their folders made."""
    _, images, masks, kind, _ = LAYOUTS[layout]
    stems = {"c": f"{number:012}", "a": f"ADE_{split}_{number:08}"}
    stem = stems.get(layout[0], f"2008_{number:06}")
    longer = {"train": "training", "val": "validation"}[split]
    found = [root / folder.format(s=split, t=longer) for folder in (images, masks)]
    [folder.mkdir(parents=True, exist_ok=True) for folder in found]
    return found[0] / f"{stem}.jpg", found[1] / (stem + kind)


MAT_TYPES = {"u1": (2, 9), "u2": (4, 11), "i2": (3, 10), "i4": (5, 12), "u4": (6, 13), "f8": (9, 6)}


def element(kind, content):
    """A data element of MATLAB 5; up to 4 bytes share a word with their type and size."""
    if len(content) <= 4:
        return struct.pack("<HH", kind, len(content)) + content.ljust(4, b"\0")
    return struct.pack("<II", kind, len(content)) + content + bytes(-len(content) % 8)


def write_mat(path, arrays, packed=True):
    file = b"MATLAB 5.0 MAT-file".ljust(124) + b"\0\1IM"
    for name, array in arrays.items():
        stored, matlab = MAT_TYPES[array.dtype.str[1:]]
        array = np.atleast_2d(array)
        flags, sides = struct.pack("<II", matlab, 0), np.array(array.shape, "<i4").tobytes()
        parts = element(6, flags), element(5, sides), element(1, name.encode())
        whole = element(14, b"".join(parts) + element(stored, array.tobytes("F")))
        if packed:
            content = zlib.compress(whole)
            whole = struct.pack("<II", 15, len(content)) + content
        file += whole
    path.write_bytes(file)


def write(root, layout, raw, number=1, split="val", gray=False):
    """One image of noise and its mask of raw values, as the dataset comes, and its line in the
    validation list."""
    image, mask = paths(root, layout, number, split)
    rng, raw = np.random.default_rng(number), np.asarray(raw)
    noise = rng.integers(0, 256, raw.shape if gray else (*raw.shape, 3), np.uint8)
    Image.fromarray(noise).save(image, quality=95)
    if mask.suffix == ".mat":
        write_mat(mask, {"LabelMap": raw.astype(np.uint16)})
    elif mask.name.endswith("_seg.png"):  # id = R // 10 * 256 + G, whatever B is
        noise = rng.integers(0, 256, raw.shape)
        colours = np.stack([raw // 256 * 10 + noise % 10, raw % 256, noise], -1)
        Image.fromarray(colours.astype(np.uint8)).save(mask)
    else:
        picture = Image.fromarray(raw.astype(np.uint16 if mask.suffix == ".tif" else np.uint8))
        if mask.parent.name == "SegmentationClass":  # any palette: colours mean nothing
            picture.putpalette(rng.integers(0, 256, 768, np.uint8).tobytes())
        picture.save(mask)
    for folder, name in LISTS.items():
        if image.is_relative_to(root / folder) and "ready" not in layout:
            (root / folder / name).parent.mkdir(parents=True, exist_ok=True)
            with open(root / folder / name, "a") as f:
                f.write(image.stem + "\n")


def litter(root):
    """What lies beside the files of real datasets: other splits and parts, and what systems and
    scripts leave behind."""
    attic, part = root / HOME, "ADE_val_00000001"
    train = root / ADE21 / "images/ADE/training/home/attic/ADE_train_00000001"
    for folder in {p.parent for p in root.rglob("*.*") if p.is_file()}:
        first = min(folder.glob("[!.]*.*"))
        (folder / f"._{first.name}").write_bytes(b"litter")
        pictures = [folder / f"{first.stem}_labelTrainIds.png"]
        if folder.name == "JPEGImages":
            pictures += [folder / "2007_000032.jpg"]
        if folder == attic:
            pictures += [attic / part / f"instance_000_{part}.png", attic / f"{part}_parts_1.png",
                         Path(f"{train}.jpg"), Path(f"{train}_seg.png")]
        for path in pictures:
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (3, 3)).save(path)


def load_all(layout, root, split="val"):
    """The dataset, and {stem of an image: (image, labels)}."""
    dataset = open_dataset(LAYOUTS[layout][0], root, split)
    loaded = [dataset.load(i) for i in range(len(dataset))]
    assert all(image.mode == "RGB" and labels.dtype == np.int64 for image, labels, _ in loaded)
    return dataset, {Path(path).stem: (image, labels) for image, labels, path in loaded}


def refused(layout, root, *words, split="val"):
    """Opening and loading raises UserError with a path below root and these words."""
    with pytest.raises(UserError) as e:
        load_all(layout, root, split)
    said = str(e.value)
    assert "\n" not in said and all(str(w) in said for w in (root, *words)), said


@pytest.mark.parametrize("layout, split", [
    *((layout, "val") for layout in LAYOUTS), ("coco-stuff", "train"), ("coco", "train"),
    ("coco-stuff ready", "train"), ("ade20k-150", "train")])
def test_every_value_of_every_layout(tmp_path, layout, split):
    """All values in one mask, nothing but void in the other, whose image is gray. Prepared masks
    that lie beside raw ones are not read."""
    name, *_, label = LAYOUTS[layout]
    values = np.random.default_rng(0).permutation(list(label))
    raw = np.resize(values, (len(values) // 23 + 1, 23))
    void = max(v for v in label if label[v] == IGNORE)
    if f"{layout} ready" in LAYOUTS:
        write(tmp_path, f"{layout} ready", [[7, 7]], 1, split)
    write(tmp_path, layout, raw, 1, split)
    write(tmp_path, layout, np.full((5, 9), void), 2, split, gray=True)
    litter(tmp_path)
    dataset, loaded = load_all(layout, tmp_path, split)
    (image, mask), (empty, _) = paths(tmp_path, layout, 1, split), paths(tmp_path, layout, 2, split)
    assert set(loaded) == {image.stem, empty.stem}
    wanted = [[label[v] for v in row] for row in raw.tolist()]
    picture, labels = loaded[image.stem]
    gray, nothing = loaded[empty.stem]
    assert labels.tolist() == wanted and nothing.tolist() == [[IGNORE] * 9] * 5
    assert np.array_equal(picture, Image.open(image)) and gray.size == (9, 5)
    assert set(labels.flat) == {IGNORE, *range(len(dataset.evaluated))}  # no class is left out
    for path in (image, mask):
        assert str(path.parent.relative_to(tmp_path)).removesuffix("/home/attic") in dataset.source
    assert ("approximat" in dataset.source) == (layout == "pc-59")  # for want of the JSON
    assert dataset.names == [line.split("\t")[-1].strip() for line in lines(name)]
    background = dataset.names[:20] + ["background"]
    assert dataset.evaluated == (background if name == "voc-20b" else dataset.names)
    above = max(value for value in label if label[value] != IGNORE) + 1
    for value in {above, *ABSENT} - label.keys():  # of no class, and not ignored
        write(tmp_path, layout, [[1, 2, value]], 1, split)
        refused(layout, tmp_path, mask.name, f"the value {value},", split=split)


@pytest.mark.parametrize("height, width, size", [
    (801, 768, (512, 534)), (520, 597, (588, 512)), (511, 513, (513, 511))])
def test_ade20k_847_is_evaluated_at_a_short_side_of_512(tmp_path, height, width, size):
    raw = np.random.default_rng(0).choice(ADE847, (height, width))
    write(tmp_path, "ade20k-847", raw)
    ((image, labels),) = load_all("ade20k-847", tmp_path)[1].values()
    assert image.size == size and labels.shape == size[::-1]
    sides = [(size[1], height), (size[0], width)]
    rows, columns = ([min(int(i * (1 / (n / N))), N - 1) for i in range(n)] for n, N in sides)
    assert labels.tolist() == [[A847[v] for v in row] for row in raw[rows][:, columns].tolist()]
    wanted = np.asarray(Image.open(paths(tmp_path, "ade20k-847")[0]), np.float64)
    for axis, (n, N) in enumerate(sides):  # of two neighbours, without antialias
        linear = functools.partial(np.interp, (np.arange(n) + 0.5) * N / n - 0.5, np.arange(N))
        wanted = np.apply_along_axis(linear, axis, wanted)
    assert abs(np.asarray(image) - wanted).max() <= 1.5


def detail(root, images, annotations):
    """trainval_merged.json and its images. images: {number: (phase, h, w)}; annotations:
    [(number, category, mask)]."""
    content = {"images": [], "annos_segmentation": []}
    for number, (phase, height, width) in images.items():
        path = paths(root, "pc-59", number)[0]
        Image.new("RGB", (width, height)).save(path)
        sizes = dict(phase=phase, height=height, width=width)
        content["images"].append(dict(file_name=path.name, image_id=2008000000 + number, **sizes))
    for number, category, mask in annotations:
        counts = rle.encode(np.asfortranarray(mask, np.uint8))["counts"].decode()
        runs = dict(size=list(np.shape(mask)), counts=counts)
        about = dict(image_id=2008000000 + number, category_id=category)
        content["annos_segmentation"].append(dict(segmentation=runs, **about))
    (root / VOC10 / "trainval_merged.json").write_text(json.dumps(content))


def test_pc_59_from_the_json_paints_in_file_order(tmp_path):
    """458 wood becomes 58, 2 aeroplane 0, 9 bag 1; 431 is none of the 59, and covers them all the
    same."""
    detail(tmp_path, {1: ("val", 1, 6), 2: ("val", 3, 1), 3: ("train", 1, 2)}, [
        (1, 458, [[1, 1, 1, 1, 0, 0]]), (3, 2, [[1, 1]]), (2, 9, [[0], [1], [1]]),
        (1, 2, [[0, 1, 1, 1, 1, 0]]), (2, 458, [[0], [0], [1]]), (1, 431, [[0, 0, 1, 1, 0, 0]]),
        (1, 9, [[0, 0, 0, 1, 0, 0]])])
    write_mat(paths(tmp_path, "pc-59")[1], {"LabelMap": np.full((1, 6), 9, np.uint16)})
    dataset, loaded = load_all("pc-59", tmp_path)
    assert {stem: labels.tolist() for stem, (_, labels) in loaded.items()} == {
        "2008_000001": [[58, 0, -1, 1, 0, -1]], "2008_000002": [[-1], [1], [58]]}
    assert "trainval_merged.json" in dataset.source and "approximat" not in dataset.source
    Image.new("RGB", (7, 5)).save(paths(tmp_path, "pc-59", 2)[0])
    refused("pc-59", tmp_path, "2008_000002", "(7, 5)")
    (tmp_path / VOC10 / "trainval_merged.json").write_text('{"images": [')
    refused("pc-59", tmp_path, "trainval_merged.json")


@pytest.mark.parametrize("name", ["pc-459", "pc-59"])
def test_pascal_context_lists_in_order_of_preference(tmp_path, name):
    for number in range(1, 6):
        write(tmp_path, "pc-459", [[2, 9]], number)
    sizes = {1: ("train", 1, 2), 2: ("val", 1, 2), 3: ("val", 1, 2)}
    detail(tmp_path, sizes, [(n, 2, [[1, 1]]) for n in (1, 2, 3)])
    (tmp_path / VOC10 / "pascalcontext_val.txt").write_text("2008_000001")
    main = tmp_path / VOC10 / "ImageSets/Main/val.txt"
    main.parent.mkdir(parents=True)
    main.write_text("2008_000003\n2008_000001\n2008_000009")
    for listed, numbers in {"pascalcontext_val.txt": "1", "trainval_merged.json": "23",
                            "ImageSets/Main/val.txt": "13"}.items():  # 9 has no mask
        dataset, loaded = load_all(name, tmp_path)
        assert sorted(loaded) == [f"2008_00000{n}" for n in numbers] and listed in dataset.source
        (tmp_path / VOC10 / listed).unlink()
    refused(name, tmp_path, "pascalcontext_val.txt")


def test_lists_and_parts_of_a_dataset(tmp_path, monkeypatch):
    path = tmp_path / VOC12 / LISTS[VOC12]
    for number in (1, 2, 3):
        write(tmp_path, "voc-20", [[1, 2]], number)
    path.write_bytes(b"\xef\xbb\xbf2008_000003\r\n2008_000001\r\n\r\n")
    dataset, loaded = load_all("voc-20", tmp_path)
    assert set(loaded) == {"2008_000003", "2008_000001"}
    assert "warning: a complete download has 1449 images" in dataset.description
    monkeypatch.setitem(BENCHMARKS, "voc-20", (BENCHMARKS["voc-20"][0], {"val": [2]}))
    assert "warning" not in open_dataset("voc-20", tmp_path).description
    path.write_bytes(b"2008_000007")
    refused("voc-20", tmp_path, "2008_000007")
    path.write_bytes(b"")
    refused("voc-20", tmp_path, path)
    path.unlink()
    refused("voc-20", tmp_path, path)


def test_mat_files(tmp_path):
    """Every type of values, sizes from one value on, other arrays before and after."""
    path, shapes = tmp_path / "x.mat", ((1, 1), (1, 3), (5, 3), (30, 40))
    for kind, shape, packed in itertools.product(MAT_TYPES, shapes, (True, False)):
        wanted = np.random.default_rng(0).integers(0, 100, shape).astype(kind)
        arrays = {"a": np.arange(3.0), "LabelMaps": wanted + 1, "LabelMap": wanted, "z": wanted}
        write_mat(path, arrays, packed)
        found = readers.read_label_map(path)
        assert np.array_equal(found, wanted) and found.dtype == np.result_type(kind, np.uint16)


def test_a_mat_of_something_else_is_refused(tmp_path):
    write(tmp_path, "pc-459", [[1, 2]])
    path = paths(tmp_path, "pc-459")[1]
    for words, name, array in (
            ("there is no 'LabelMap'", "LabelMaps", np.ones((1, 2), "u2")),
            ("a mask of one channel", "LabelMap", np.ones((1, 2)))):
        write_mat(path, {name: array})
        refused("pc-459", tmp_path, path, words)
    path.write_bytes(path.read_bytes()[:150])
    refused("pc-459", tmp_path, path)


def test_classes_replace_the_names(tmp_path):
    write(tmp_path, "voc-20", [[1, 2]])
    twenty = [f"thing {i}" for i in range(20)]
    dataset = open_dataset("voc-20", tmp_path, "val", ", ".join(twenty))
    assert dataset.names == twenty == dataset.evaluated and dataset.own_words
    assert dataset.load(0)[1].tolist() == [[0, 1]]
    dataset = open_dataset("voc-20b", tmp_path, "val", twenty + [f"other {i}" for i in range(39)])
    assert dataset.evaluated == twenty + ["background"] and len(dataset.names) == 59
    for name, count in (("voc-20", 19), ("voc-20", 21), ("voc-20b", 20)):
        with pytest.raises(UserError, match=f"has {count} names, and {name} needs"):
            open_dataset(name, tmp_path, "val", [f"thing {i}" for i in range(count)])
    with pytest.raises(UserError, match="the first 20 names of voc-20b"):
        open_dataset("voc-20b", tmp_path, "val", ["background", *twenty])


def test_vocabularies():
    """Their files are what they were when they were compared with the datasets' own lists."""
    contents = b"".join(path.read_bytes() for path in sorted(CLASSES.glob("*.txt")))
    assert hashlib.sha256(contents).hexdigest()[:16] == "b28cbb807d1f1e45"
