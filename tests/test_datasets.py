"""The seven datasets in every layout they come in, written on the spot: labels, lists, faults,
vocabularies."""

import json
import re
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conftest import ROOT, run
from losses import IGNORE
from sources import readers
from sources.registry import open_dataset
from support.errors import UserError

mat, rle = pytest.importorskip("scipy.io"), pytest.importorskip("pycocotools.mask")

ABSENT = [11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90]
PC59 = """2 9 18 19 22 23 25 31 33 34 44 45 46 59 65 68 72 80 85 98 104 105 113 115 144 158 159
162 187 189 207 220 232 258 259 260 284 295 296 308 324 326 347 349 354 355 360 366 368 397 415 416
420 424 427 440 445 454 458"""
PC59 = [int(i) for i in PC59.split()]
CLASSES = ROOT / "sources/classes"


def lines(name):
    return (CLASSES / f"{name}.txt").read_text(encoding="utf-8").splitlines()


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


def write(root, layout, raw, number=1, split="val", gray=False):
    """One image of noise and its mask of raw values, as the dataset comes, and its line in the
    validation list."""
    image, mask = paths(root, layout, number, split)
    rng, raw = np.random.default_rng(number), np.asarray(raw)
    noise = rng.integers(0, 256, raw.shape if gray else (*raw.shape, 3), np.uint8)
    Image.fromarray(noise).save(image, quality=95)
    if mask.suffix == ".mat":
        mat.savemat(mask, {"LabelMap": raw.astype(np.uint16)})
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
    """What lies beside the files of real datasets: other splits, parts, and what systems and
    scripts leave behind."""
    for folder in {p.parent for p in root.rglob("*.*") if p.is_file()}:
        first = min(folder.glob("[!.]*.*"))
        for name in (".DS_Store", f"._{first.name}", "Thumbs.db", f"{first.stem}.json"):
            (folder / name).write_bytes(b"litter")
        if "annotations" in str(folder) or "stuffthingmaps" in str(folder):
            Image.new("L", (3, 3)).save(folder / f"{first.stem}_labelTrainIds.png")
        if folder.name == "JPEGImages":
            Image.new("RGB", (3, 3)).save(folder / "2007_000032.jpg")
        if folder.name == "attic":
            train = root / ADE21 / "images/ADE/training/home/attic"
            for path in (folder / "ADE_val_00000001", train):
                path.mkdir(parents=True)
            part = "ADE_val_00000001/instance_000_ADE_val_00000001"
            for stem in (part, "ADE_val_00000001_parts_1"):
                Image.new("RGB", (3, 3)).save(folder / f"{stem}.png")
            others = [train / "ADE_frame_00000002", train / "ADE_train_00000001"]
            for stem in (folder / "ADE_frame_00000001", *others):
                Image.new("RGB", (3, 3)).save(f"{stem}.jpg")
                Image.new("RGB", (3, 3)).save(f"{stem}_seg.png")


def load_all(layout, root, split="val"):
    """The dataset, and {stem of an image: (image, labels)}."""
    dataset = open_dataset(LAYOUTS[layout][0], root, split)
    loaded = [dataset.load(i) for i in range(len(dataset))]
    assert all(image.mode == "RGB" and labels.dtype == np.int64 for image, labels, _ in loaded)
    return dataset, {Path(path).stem: (image, labels) for image, labels, path in loaded}


def refused(layout, root, *words):
    """Opening and loading raises UserError: one sentence with a path below root and these words.
    Returns it."""
    with pytest.raises(UserError) as e:
        load_all(layout, root)
    said = str(e.value)
    assert "\n" not in said and ". " not in said, said
    assert str(root) in said and all(str(w) in said for w in words), said
    return said


WITH_TRAIN = ("coco-stuff", "coco", "coco-stuff ready", "ade20k-150")


@pytest.mark.parametrize(
    "layout, split",
    [*((name, "val") for name in LAYOUTS), *((name, "train") for name in WITH_TRAIN)],
)
def test_every_value_of_every_layout(tmp_path, layout, split):
    """All values in one mask, nothing but void in the other, whose image is gray."""
    name, *_, label = LAYOUTS[layout]
    values = np.random.default_rng(0).permutation(list(label))
    raw = np.resize(values, (len(values) // 23 + 1, 23))
    void = max(v for v in label if label[v] == IGNORE)
    write(tmp_path, layout, raw, 1, split)
    write(tmp_path, layout, np.full((5, 9), void), 2, split, gray=True)
    litter(tmp_path)
    dataset, loaded = load_all(layout, tmp_path, split)
    (image, mask), (empty, _) = paths(tmp_path, layout, 1, split), paths(tmp_path, layout, 2, split)
    assert len(dataset) == 2 and set(loaded) == {image.stem, empty.stem}
    wanted = [[label[v] for v in row] for row in raw.tolist()]
    picture, labels = loaded[image.stem]
    gray, nothing = loaded[empty.stem]
    assert labels.tolist() == wanted and nothing.tolist() == [[IGNORE] * 9] * 5
    assert np.array_equal(picture, Image.open(image)) and gray.size == (9, 5)
    found = {v for row in wanted for v in row}
    assert found == {IGNORE, *range(len(dataset.evaluated))}  # no class is left out
    for path in (image, mask):
        assert str(path.parent.relative_to(tmp_path)).removesuffix("/home/attic") in dataset.source
    assert ("approximat" in dataset.source) == (layout == "pc-59")  # for want of the JSON
    assert dataset.names == [line.split("\t")[-1].strip() for line in lines(name)]
    background = dataset.names[:20] + ["background"]
    assert dataset.evaluated == (background if name == "voc-20b" else dataset.names)


@pytest.mark.parametrize(
    "layout, raw, label",
    [
        ("coco-stuff", 181, 170),
        ("coco", 12, 11),
        ("ade20k-150", 150, 149),
        ("ade20k-847", 2978, 0),
        ("pc-459", 431, 430),
        ("pc-459", 459, 458),
        ("pc-59", 258, 33),
        ("pc-59", 458, 58),
        ("voc-20", 20, 19),
        ("voc-20b", 0, 20),
    ],
)
def test_values_by_hand_and_raw_masks_before_prepared_ones(tmp_path, layout, raw, label):
    if f"{layout} ready" in LAYOUTS:
        write(tmp_path, f"{layout} ready", [[7, 7]])
    write(tmp_path, layout, [[raw, raw]])
    assert [m.tolist() for _, m in load_all(layout, tmp_path)[1].values()] == [[[label, label]]]


@pytest.mark.parametrize(
    "layout, value",
    [
        *[(layout, v) for layout in ("coco-stuff", "coco") for v in (*ABSENT, 182, 254)],
        ("coco-stuff ready", 171),
        ("ade20k-150", 151),
        ("ade20k-150 ready", 150),
        ("ade20k-847 ready", 847),
        ("pc-459", 460),
        ("pc-459 ready", 459),
        ("pc-59 ready", 59),
        ("voc-20", 21),
        ("voc-20 ready", 20),
        ("voc-20b", 21),
        ("voc-20b ready", 21),
    ],
)
def test_values_of_no_class_are_refused(tmp_path, layout, value):
    write(tmp_path, layout, [[1, 2, value]])
    said = refused(layout, tmp_path, paths(tmp_path, layout)[1])
    assert re.search(rf"\b{value}\b", said.replace(str(tmp_path), ""))


def test_coco_ids_counted_from_one_are_refused(tmp_path):
    write(tmp_path, "coco", [[v + 1 for v in COCO if v != 255]])  # labels.txt's ids
    refused("coco", tmp_path, paths(tmp_path, "coco")[1])


@pytest.mark.parametrize(
    "layout, shape",
    [
        ("ade20k-847 ready", (2, 3)),
        ("pc-459 ready", (2, 3)),
        ("ade20k-847", (2, 3)),
        ("ade20k-847", (2, 5)),
        ("ade20k-847", (2, 3, 4)),
        ("voc-20", (2, 3, 3)),
        ("ade20k-150", (2, 3, 3)),
    ],
)
def test_masks_of_too_few_bits_or_other_channels_are_refused(tmp_path, layout, shape):
    write(tmp_path, layout, np.ones(shape[:2], int))
    Image.fromarray(np.ones(shape, np.uint8)).save(paths(tmp_path, layout)[1])
    refused(layout, tmp_path, paths(tmp_path, layout)[1])


@pytest.mark.parametrize(
    "height, width, size",
    [
        (768, 801, (534, 512)),
        (801, 768, (512, 534)),
        (520, 597, (588, 512)),
        (512, 530, (530, 512)),
        (511, 513, (513, 511)),
    ],
)
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
        x = np.clip((np.arange(n) + 0.5) * N / n - 0.5, 0, N - 1)
        low, part = x.astype(int), (x % 1).reshape((-1, 1, 1) if axis == 0 else (1, -1, 1))
        below, above = (np.take(wanted, i, axis) for i in (low, np.minimum(low + 1, N - 1)))
        wanted = below * (1 - part) + above * part
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
    """458 wood becomes 58, 2 aeroplane 0, 9 bag 1; 1 and 431 are none of the 59, and cover them all
    the same."""
    detail(
        tmp_path,
        {1: ("val", 2, 6), 2: ("val", 3, 1), 3: ("train", 1, 2)},
        [
            (1, 458, [[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 0, 0]]),
            (3, 2, [[1, 1]]),
            (2, 9, [[0], [1], [1]]),
            (1, 2, [[0, 1, 1, 1, 1, 0], [0, 0, 0, 0, 0, 0]]),
            (1, 1, [[0, 0, 1, 1, 0, 0], [0, 0, 1, 0, 0, 0]]),
            (2, 458, [[0], [0], [1]]),
            (1, 9, [[0, 0, 0, 1, 0, 0], [1, 0, 0, 0, 0, 0]]),
            (1, 431, [[0, 0, 0, 0, 0, 1], [0, 1, 0, 0, 0, 0]]),
        ],
    )
    second = {"LabelMap": np.full((2, 6), 9, np.uint16)}
    mat.savemat(paths(tmp_path, "pc-59")[1], second)
    dataset, loaded = load_all("pc-59", tmp_path)
    assert {stem: labels.tolist() for stem, (_, labels) in loaded.items()} == {
        "2008_000001": [[58, 0, -1, 1, 0, -1], [1, -1, -1, 58, -1, -1]],
        "2008_000002": [[-1], [1], [58]],
    }
    assert "trainval_merged.json" in dataset.source and "approximat" not in dataset.source
    val = tmp_path / VOC10 / "pascalcontext_val.txt"
    val.write_text("2008_000002")
    assert list(load_all("pc-59", tmp_path)[1]) == ["2008_000002"]
    Image.new("RGB", (7, 5)).save(paths(tmp_path, "pc-59", 2)[0])
    refused("pc-59", tmp_path, "2008_000002", "7 x 5")
    val.write_text("2008_000007")  # not in the JSON
    Image.new("RGB", (7, 5)).save(paths(tmp_path, "pc-59", 7)[0])
    refused("pc-59", tmp_path, "2008_000007")
    (tmp_path / VOC10 / "trainval_merged.json").write_text('{"images": [')
    refused("pc-59", tmp_path, "trainval_merged.json")


@pytest.mark.parametrize("name", ["pc-459", "pc-59"])
def test_pascal_context_lists_in_order_of_preference(tmp_path, name):
    for number in range(1, 6):
        write(tmp_path, "pc-459", [[2, 9]], number)
    detail(
        tmp_path,
        {1: ("train", 1, 2), 2: ("val", 1, 2), 3: ("val", 1, 2)},
        [(n, 2, [[1, 1]]) for n in (1, 2, 3)],
    )
    Image.new("RGB", (2, 1)).save(paths(tmp_path, "pc-459", 9)[0])  # has no .mat
    lists = {
        "pascalcontext_val.txt": [1],
        "trainval_merged.json": [2, 3],
        "ImageSets/Main/val.txt": [3, 4],
    }
    for listed, numbers in (
        ("pascalcontext_val.txt", [1]),
        ("ImageSets/Main/val.txt", [3, 4, 9]),
        ("ImageSets/Segmentation/val.txt", [5]),
    ):
        (tmp_path / VOC10 / listed).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / VOC10 / listed).write_text("".join(f"2008_{n:06}\n" for n in numbers))
    for listed, numbers in lists.items():
        dataset, loaded = load_all(name, tmp_path)
        assert sorted(loaded) == [f"2008_{n:06}" for n in numbers] and listed in dataset.source
        (tmp_path / VOC10 / listed).unlink()
    refused(name, tmp_path, "pascalcontext_val.txt")  # never ImageSets/Segmentation


@pytest.mark.parametrize(
    "layout, name", [("voc-20", f"{VOC12}/{LISTS[VOC12]}"), ("pc-459", f"{VOC10}/{LISTS[VOC10]}")]
)
def test_lists(tmp_path, layout, name):
    for number in (1, 2, 3):
        write(tmp_path, layout, [[1, 2]], number)
    for text in (
        b"2008_000003\n2008_000001",
        b"2008_000003\r\n2008_000001\r\n",
        b"2008_000003\r\n2008_000001\r\n\r\n",
    ):
        (tmp_path / name).write_bytes(text)
        assert set(load_all(layout, tmp_path)[1]) == {"2008_000003", "2008_000001"}
    for text in (b"", b"\r\n", b"\xff\xfe\x00"):
        (tmp_path / name).write_bytes(text)
        refused(layout, tmp_path, name)
    (tmp_path / name).unlink()
    refused(layout, tmp_path, name)


def image_gone(image, mask):
    image.unlink()


def mask_gone(image, mask):
    mask.unlink()


def image_cut(image, mask):
    image.write_bytes(image.read_bytes()[:-200])


def mask_cut(image, mask):
    mask.write_bytes(mask.read_bytes()[: mask.stat().st_size // 2])


def image_empty(image, mask):
    image.write_bytes(b"")


def mask_empty(image, mask):
    mask.write_bytes(b"")


def other_size(image, mask):
    Image.new("RGB", (7, 5)).save(image)


def split_empty(image, mask):
    [p.unlink() for f in (image, mask) for p in f.parent.iterdir() if p.is_file()]


@pytest.mark.parametrize(
    "fault",
    [image_gone, mask_gone, image_cut, mask_cut, image_empty, mask_empty, other_size, split_empty],
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_broken_pairs_are_refused(tmp_path, layout, fault):
    if fault == mask_gone and "JPEGImages" in LAYOUTS[layout][1] and "ready" in layout:
        pytest.skip("JPEGImages holds other splits too, so that the masks are the list")
    for number in (1, 2):
        write(tmp_path, layout, np.random.default_rng(0).integers(1, 11, (30, 40)), number)
    image, mask = paths(tmp_path, layout, 2)
    fault(image, mask)
    words = {other_size: [image.stem, "7 x 5", "40 x 30"], split_empty: []}
    refused(layout, tmp_path, *words.get(fault, [image.stem]))


OTHERS = {"a": np.arange(3.0), "LabelMaps": np.ones((2, 2)), "c": {"LabelMap": 7}, "d": ["x", 1]}


@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (1, 3), (2, 4), (5, 3), (30, 40)])
@pytest.mark.parametrize("packed", [True, False])
def test_mat_files_as_scipy_reads_them(tmp_path, shape, packed):
    """Up to 4 bytes of values are written in a way of their own."""
    path = tmp_path / "x.mat"
    for kind in (np.uint8, np.uint16, np.int16, np.int32, np.uint32, np.float64):
        wanted = np.random.default_rng(0).integers(0, 100, shape).astype(kind)
        for others in ({}, OTHERS):
            mat.savemat(path, {**others, "LabelMap": wanted, "z": 1}, do_compression=packed)
            found = readers.read_label_map(path)
            assert np.array_equal(found, wanted) and found.dtype == kind(0) + np.uint16(0)


def test_a_mat_without_label_map_is_refused(tmp_path):
    write(tmp_path, "pc-459", [[1, 2]])
    path = paths(tmp_path, "pc-459")[1]
    for content in (OTHERS, {"LabelMap": np.ones((2, 2, 2), np.uint8)}):
        mat.savemat(path, content)
        refused("pc-459", tmp_path, "2008_000001.mat", "LabelMap")
    mat.savemat(path, {"LabelMap": np.ones((1, 2))})
    refused("pc-459", tmp_path, "2008_000001.mat should be a mask of one channel of indices")
    mat.savemat(path, {"LabelMap": np.ones((0, 2), np.uint16)})
    refused("pc-459", tmp_path, "2008_000001.mat is 2 x 0, its image 2 x 1")


BROKEN_MATS = """import sys
from pathlib import Path
sys.path.insert(0, {root!r})
from sources.readers import read_label_map
from support.errors import UserError
path, whole, said = Path({path!r}), Path({path!r}).read_bytes(), []
words = [whole[:at] + word + whole[at + 4:] for at in range(0, min(len(whole), 260), 4)
         for word in (bytes(4), b"\\xff" * 4, b"\\xff\\xff\\xff\\x7f", b"\\0\\0\\1\\0")]
for content in words + [whole[:n] for n in range(0, len(whole), 7)]:
    path.write_bytes(content)
    try:
        said.append(str(read_label_map(path).shape))
    except UserError as e:
        said.append(str(e))
        assert str(path) in said[-1] and "\\n" not in said[-1], said[-1]
print(len(said), "read,", len(set(said)), "sentences")
"""


@pytest.mark.parametrize("packed", [True, False])
def test_broken_mats_never_end_the_process(tmp_path, packed):
    """scipy's reader crashes where the type of the values is 0. A process of its own reads every
    file with four other bytes in its headers, and every beginning of it."""
    path, script = tmp_path / "x.mat", tmp_path / "script.py"
    labels = np.random.default_rng(0).integers(1, 460, (9, 13)).astype(np.uint16)
    mat.savemat(path, {"LabelMap": labels}, do_compression=packed)
    script.write_text(BROKEN_MATS.format(root=str(ROOT), path=str(path)))
    done = run(script, check=False, timeout=60)
    assert done.returncode == 0, (done.returncode, done.stderr[-2000:])
    assert "sentences" in done.stdout


def test_a_mat_that_unpacks_to_too_much_is_refused(tmp_path, monkeypatch):
    """A million zeros in a file of a few kB: no more than MOST are unpacked."""
    flags, sides = struct.pack("<4I", 6, 8, 6, 0), struct.pack("<2I2i", 5, 8, 1000, 1000)
    array = flags + sides + readers.MAT_NAME + struct.pack("<II", 2, 10**6) + bytes(10**6)
    packed = zlib.compress(struct.pack("<II", 14, len(array)) + array)
    path = tmp_path / "x.mat"
    path.write_bytes(bytes(124) + b"\0\1IM" + struct.pack("<II", 15, len(packed)) + packed)
    assert len(packed) < 5000 and readers.read_label_map(path).shape == (1000, 1000)
    monkeypatch.setattr(readers, "MOST", 10**5)
    with pytest.raises(UserError, match="x.mat can't be read as a LabelMap"):
        readers.read_label_map(path)


@pytest.mark.parametrize(
    "layout, below",
    [
        ("ade20k-150", ADE),
        ("ade20k-847", ADE21),
        ("coco-stuff", "coco-stuff"),
        ("coco", "coco"),
        ("pc-459", "VOCdevkit"),
        ("pc-59", VOC10),
        ("voc-20", "VOCdevkit"),
        ("voc-20b", VOC12),
    ],
)
def test_a_root_too_deep_is_answered_with_the_right_one(tmp_path, layout, below):
    write(tmp_path, layout, [[1, 2]])
    said = refused(layout, tmp_path / below)
    root = re.escape(str(tmp_path))
    assert re.search(rf"--data-root should be {root}(?![/\w])", said), said  # not a folder in it


def test_nothing_is_written_into_the_datasets(tmp_path):
    for layout in LAYOUTS:
        write(tmp_path / layout, layout, [[1, 2]])
    detail(tmp_path / "json", {1: ("val", 1, 2)}, [(1, 2, [[1, 1]])])

    def tree():
        found = {}
        for path in tmp_path.rglob("*"):
            found[path] = path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else None
        return found

    before = tree()
    for path in before:
        path.chmod(0o444 if path.is_file() else 0o555)
    try:
        assert all(len(load_all(layout, tmp_path / layout)[1]) == 1 for layout in LAYOUTS)
        assert len(load_all("pc-59", tmp_path / "json")[1]) == 1 and tree() == before
    finally:
        for path in before:
            path.chmod(0o755)


def test_classes_replace_the_names(tmp_path):
    write(tmp_path, "pc-459", [[1, 2]])
    write(tmp_path, "voc-20", [[1, 2]])
    spaced, twenty = CLASSES / "pc-459-spaced.txt", [f"thing {i}" for i in range(20)]
    assert open_dataset("pc-459", tmp_path, "val", str(spaced)).names == lines("pc-459-spaced")
    for classes in (twenty, ",".join(twenty), ", ".join(twenty)):
        dataset = open_dataset("voc-20", tmp_path, "val", classes)
        assert dataset.names == twenty == dataset.evaluated
        assert dataset.load(0)[1].tolist() == [[0, 1]]
    dataset = open_dataset("voc-20b", tmp_path, "val", twenty + [f"other {i}" for i in range(39)])
    assert dataset.evaluated == twenty + ["background"]
    assert len(dataset.names) == 59 and dataset.names[:20] == twenty
    more = ",".join(twenty) + ",x"
    wrong = {"19": twenty[1:], "21": more, "459": str(spaced), "no.txt": "no.txt"}
    for word, classes in wrong.items():
        with pytest.raises(UserError, match=word) as e:
            open_dataset("voc-20", tmp_path, "val", classes)
        assert "\n" not in str(e.value)


def test_vocabularies():
    for name, count, known in (
        ("coco-stuff", 171, {0: "person", 79: "toothbrush", 170: "wood"}),
        ("voc-20", 20, {19: "tvmonitor"}),
        ("ade20k-150", 150, {0: "wall", 1: "building", 149: "flag"}),
        ("pc-59", 59, {0: "aeroplane", 36: "person"}),
        ("pc-459", 459, {2: "airconditioner", 430: "unknown"}),
        ("pc-459-spaced", 459, {2: "air conditioner"}),
        ("ade20k-847", 847, {0: "2978\twall", 1: "312\tbuilding, edifice"}),
        ("voc-20b", 59, {10: "diningtable"}),
    ):
        assert len(set(lines(name))) == len(lines(name)) == count
        assert {i: lines(name)[i] for i in known} == known
    assert lines("pc-59") == sorted(lines("pc-59")) and len(set(PC59)) == 59
    assert [lines("pc-459")[i - 1] for i in PC59] == lines("pc-59")
    assert [n.replace(" ", "") for n in lines("pc-459-spaced")] == lines("pc-459")
    others = [n for n in lines("pc-59") if n not in lines("voc-20") + ["table"]]
    assert lines("voc-20b") == lines("voc-20") + others
    first = {n.split("\t")[1].split(", ")[0] for n in lines("ade20k-847")}
    assert len(set(ADE847)) == 847 and len(first) == 847 - 10


def test_vocabularies_against_the_files_they_come_from():
    folder = Path(ROOT).parent / "shared" / "data"
    if not (folder / "ade847.tsv").exists():
        pytest.skip("needs the datasets' own lists")
    assert lines("ade20k-847") == (folder / "ade847.tsv").read_text().splitlines()
    rows = (folder / "objectInfo150.txt").read_text().splitlines()[1:]
    first = [row.split("\t")[4].split(", ")[0].strip() for row in rows]
    assert [n.strip() for n in lines("ade20k-150")] == first
    numbered = [f"{i}: {name}" for i, name in enumerate(lines("pc-459-spaced"), 1)]
    assert numbered == (folder / "pc459-labels.txt").read_text().splitlines()
