"""The benchmarks as they are downloaded: what lies where, and what the values in masks mean.

Nothing is converted, and nothing is ever written into a dataset's folder. To add a dataset, add its
row to BENCHMARKS, its names to classes/NAME.txt, and a reader if its masks are of a new kind.
"""
from collections import namedtuple
from pathlib import Path
from typing import Callable, NamedTuple, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from losses import IGNORE
from sources import readers
from sources.readers import read_image
from support.errors import UserError

CLASSES = Path(__file__).parent / "classes"
STRANGE = IGNORE - 1  # marks values that no mask should hold


class Layout(NamedTuple):
    """A way in which a dataset lies below a root. In paths, {split} is train or val, {ade} training
    or validation; images whose path has neither are of all splits, and not all have masks."""
    images: str
    masks: str  # files with the images' stems, or one .json that holds them all
    raw: Sequence[int]  # the mask's value of each class
    ignored: Sequence[int]  # values that are no class, if they are not in raw
    lists: Sequence[str] = ()  # files that list the split's stems: the first that exists
    read: Callable = readers.read_mask
    note: str = ""
    short_side: int | None = None  # larger images, and their labels, are brought to this


# The first layout whose masks are there is read; expected: {split: its numbers of images, if known}
Benchmark = namedtuple("Benchmark", "layouts, expected, download")

COCO = [i for i in range(182) if i not in (11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90)]
PC59 = (2, 9, 18, 19, 22, 23, 25, 31, 33, 34, 44, 45, 46, 59, 65, 68, 72, 80, 85, 98, 104, 105, 113,
        115, 144, 158, 159, 162, 187, 189, 207, 220, 232, 258, 259, 260, 284, 295, 296, 308, 324,
        326, 347, 349, 354, 355, 360, 366, 368, 397, 415, 416, 420, 424, 427, 440, 445, 454, 458)
ADE847 = [int(line.split()[0]) for line in (CLASSES / "ade20k-847.txt").read_text().splitlines()]
COCO_JPG, READY = "coco-stuff/images/{split}2017/*.jpg", "annotations_detectron2/"
ADE, ADE_JPG = "ADEChallengeData2016/", "ADEChallengeData2016/images/{ade}/*.jpg"
ADE21, ADE21_STEM = "ADE20K_2021_17_01/", "images/ADE/{ade}/*/*/ADE_{split}_????????"
VOC10, VOC12 = "VOCdevkit/VOC2010/", "VOCdevkit/VOC2012/"
JPG10, JPG12 = VOC10 + "JPEGImages/*.jpg", VOC12 + "JPEGImages/*.jpg"
DETAIL, MAT = VOC10 + "trainval_merged.json", VOC10 + "trainval/*.mat"
LISTS10 = VOC10 + "pascalcontext_{split}.txt", DETAIL, VOC10 + "ImageSets/Main/{split}.txt"
LISTS12 = (VOC12 + "ImageSets/Segmentation/{split}.txt",)
TAR10 = "VOCtrainval_03-May-2010.tar of host.robots.ox.ac.uk/pascal/VOC/voc2010"
TAR12 = "VOCtrainval_11-May-2012.tar of host.robots.ox.ac.uk/pascal/VOC/voc2012"

BENCHMARKS = {  # what lies in READY was prepared by the scripts of other repositories
    "coco-stuff": Benchmark([
        Layout(COCO_JPG, "coco-stuff/annotations/{split}2017/*.png", COCO, [255]),
        Layout("coco/{split}2017/*.jpg", "coco/stuffthingmaps/{split}2017/*.png", COCO, [255]),
        Layout(COCO_JPG, "coco-stuff/" + READY + "{split}2017/*.png", range(171), [255])],
        {"train": [118_287], "val": [5000]}, "train2017.zip and val2017.zip of cocodataset.org/#"
        "download, stuffthingmaps_trainval2017.zip of github.com/nightrome/cocostuff"),
    "ade20k-847": Benchmark([
        Layout(ADE21 + ADE21_STEM + ".jpg", ADE21 + ADE21_STEM + "_seg.png", ADE847, range(65536),
               read=readers.read_ade_colours, short_side=512),
        Layout(ADE21 + "images_detectron2/{ade}/*.jpg", ADE21 + READY + "{ade}/*.tif", range(847),
               [65535])],
        {"train": [], "val": [2000]}, "ADE20K_2021_17_01.zip of ade20k.csail.mit.edu (register)"),
    "pc-459": Benchmark([
        Layout(JPG10, MAT, range(1, 460), [0], LISTS10, readers.read_label_map),
        Layout(JPG10, VOC10 + READY + "pc459_{split}/*.tif", range(459), [65535])],
        {"train": [4998], "val": [5104, 5105]},
        TAR10 + " and trainval.tar.gz of www.cs.stanford.edu/~roozbeh/pascal-context"),
    "ade20k-150": Benchmark([
        Layout(ADE_JPG, ADE + "annotations/{ade}/*.png", range(1, 151), [0]),
        Layout(ADE_JPG, ADE + READY + "{ade}/*.png", range(150), [255])],
        {"train": [20_210], "val": [2000]},
        "ADEChallengeData2016.zip of sceneparsing.csail.mit.edu"),
    "pc-59": Benchmark([
        Layout(JPG10, DETAIL, PC59, range(65536), LISTS10, readers.read_painted),
        Layout(JPG10, MAT, PC59, range(65536), LISTS10, readers.read_label_map, " (trainval_merged"
               ".json is missing: these masks only approximate the published ones)"),
        Layout(JPG10, VOC10 + READY + "pc59_{split}/*.png", range(59), [255], note=" (as OVSeg "
               "prepares them their classes are in another order: look at the picture of python "
               "-m sources.check)")],
        {"train": [4998], "val": [5104, 5105]},
        TAR10 + " and trainval_merged.json of github.com/zhanghang1989/detail-api"),
    "voc-20": Benchmark([
        Layout(JPG12, VOC12 + "SegmentationClass/*.png", range(1, 21), [0, 255], LISTS12),
        Layout(JPG12, VOC12 + READY + "{split}/*.png", range(20), [255])],
        {"train": [1464], "val": [1449]}, TAR12),
    "voc-20b": Benchmark([  # fewer labels than names: the last one stands for all from the 21st on
        Layout(JPG12, VOC12 + "SegmentationClass/*.png", [*range(1, 21), 0], [255], LISTS12),
        Layout(JPG12, VOC12 + "annotations_detectron2_bg/{split}/*.png", range(21), [255])],
        {"val": [1449]}, TAR12),
}


def open_benchmark(name, root, split, names):
    """The benchmark of this name, from the first of its layouts that is there."""
    layouts, expected, download = BENCHMARKS[name]
    if split not in expected:
        raise UserError(f"--dataset {name} is for evaluation only, its background being 39 names: "
                        "train on voc-20")
    places = [locate(root, layout.masks, split)[0] for layout in layouts]
    there = [place.is_file() or place.is_dir() and any(place.iterdir()) for place in places]
    if not any(there):
        tops = {layout.images.split("/")[0] for layout in layouts}
        near = [folder for folder in (*root.resolve().parents[:2], *root.glob("*/"))
                if any((folder / top).is_dir() for top in tops)]
        hint = f"--data-root should be {near[0]}, or " if near else ""
        places = ", ".join(map(str, places))
        raise UserError(f"--dataset {name}: nothing is in {places}; the root is --data-root, else "
                        "$RPMD_DATA, else $DETECTRON2_DATASETS, else ./datasets, here "
                        f"{root}; {hint}download {download}")
    dataset = Files(root, split, names, layouts[there.index(True)])
    if expected[split] and len(dataset) not in expected[split]:
        dataset.warning = (f"--dataset {name}: {split} has {len(dataset)} images, and a complete "
                           f"download {expected[split][0]}")
    return dataset


class Files:
    """Images and masks as a Layout describes them, one of `registry.open_dataset`'s datasets."""
    warning = ""

    def __init__(self, root, split, names, layout):
        self.names, self.layout = names, layout
        self.lookup = np.full(65536, STRANGE)  # label of each raw value
        self.lookup[list(layout.ignored)] = IGNORE
        self.lookup[list(layout.raw)] = range(len(layout.raw))
        image_place, images = find_files(root, layout.images, split, readers.IMAGE_TYPES)
        mask_place, masks = find_files(root, layout.masks, split, readers.MASK_TYPES)
        self.source = f"{image_place} with {mask_place}{layout.note}"
        stems, listed = masks, None
        if layout.lists:
            lists = [locate(root, path, split)[0] for path in layout.lists]
            listed = next((path for path in lists if path.is_file()), None)
            stems = readers.read_list(listed, split, masks) if listed else []
            if not stems:
                listed = listed or " or ".join(map(str, lists))
                raise UserError(f"no image of {split} is listed in {listed}")
            self.source += f", as {listed} lists them"
        elif "{" in layout.images:
            stems = images | masks
        lonely = sorted(stem for stem in stems if stem not in images or stem not in masks)
        if lonely:
            there = masks.get(lonely[0], images.get(lonely[0], listed))
            place = mask_place if lonely[0] in images else image_place
            raise UserError(f"{there} has no partner {lonely[0][:100]} in {place} ({len(lonely)} "
                            "such): every image needs a mask of the same name, and the reverse")
        self.pairs = [(images[stem], masks[stem]) for stem in sorted(set(stems))]

    def __len__(self):
        return len(self.pairs)

    def load(self, i):
        path, where = self.pairs[i]
        raw, ignored, short_side = self.layout.raw, self.layout.ignored, self.layout.short_side
        image, mask = read_image(path), self.layout.read(where)
        if mask.ndim != 2 or mask.dtype.kind not in "ui" or (mask != mask.astype(np.uint16)).any():
            raise UserError(f"{where} should be a mask of one channel of indices, not {mask.dtype} "
                            f"of shape {mask.shape}")
        if mask.shape[::-1] != image.size:
            sides = "{} x {}, its image {} x {}".format(*mask.shape[::-1], *image.size)
            raise UserError(f"{where} is {sides}")
        if mask.dtype == np.uint8 and max(raw) >= 255:
            raise UserError(f"{where} has 8 bits, too few for {len(raw)} classes and the ignore "
                            "value")
        pixel_labels = self.lookup.take(mask)  # [H,W]
        if pixel_labels.min() == STRANGE:
            hint = "; are these labels.txt's ids, which are larger by one?" if raw is COCO else ""
            raise UserError(f"{where} holds the value {mask[pixel_labels == STRANGE][0]}, which "
                            f"none of the {len(raw)} classes has (they lie in {min(raw)}.."
                            f"{max(raw)}, and {' or '.join(map(str, ignored))} is ignored){hint}")
        if short_side and min(image.size) > short_side:
            image, pixel_labels = shrink(image, pixel_labels, short_side)
        return image, pixel_labels, str(path)


def shrink(image, pixel_labels, short_side):
    """Bring the short side to this many pixels: the image bilinear without antialias, the labels by
    the indices of OpenCV's nearest."""
    size = [round(side * (short_side / min(image.size))) for side in pixel_labels.shape]
    x = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float()  # [1,3,H,W]
    x = F.interpolate(x, size, mode="bilinear", align_corners=False)[0].round().byte()
    for axis, (new, old) in enumerate(zip(size, pixel_labels.shape)):
        nearest = (np.arange(new) * (1 / (new / old))).astype(int)
        pixel_labels = pixel_labels.take(np.minimum(nearest, old - 1), axis)
    return Image.fromarray(x.permute(1, 2, 0).numpy()), pixel_labels


def locate(root, pattern, split):
    """A Layout's path -> (the file, or the folder before the first wildcard; the rest)."""
    pattern = pattern.format(split=split, ade={"train": "training", "val": "validation"}[split])
    place, star, rest = pattern.partition("*")
    return Path(root, place), star + rest


def find_files(root, pattern, split, types):
    """A Layout's path -> (its folder; {stem: path} of files of these types in it, but hidden ones
    and the *_labelTrainIds.png that mmsegmentation puts beside COCO-Stuff's masks)."""
    place, inner = locate(root, pattern, split)
    if place.suffix == ".json":
        return place, readers.read_detail(place)
    found = {}
    for path in sorted(place.glob(inner)):
        stem = path.stem.removesuffix("_seg") if inner.endswith("_seg.png") else path.stem
        ours = path.suffix.lower() in types and not path.name.startswith(".")
        if ours and not stem.endswith("_labelTrainIds"):
            if stem in found:
                raise UserError(f"{path} has a twin of another type in {place}")
            found[stem] = path
    if not found:
        raise UserError(f"{place} holds no file {inner} of type {', '.join(types)}")
    return place, found
