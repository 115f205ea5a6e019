"""The benchmarks as they are downloaded: where their files lie, and what values in masks mean.

Nothing is converted, and nothing is written into a dataset's folder. A new dataset needs an entry
in BENCHMARKS, its names in classes/NAME.txt, and a reader if its masks are of a new kind.
"""
from pathlib import Path
from typing import Callable, NamedTuple, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from losses import IGNORE
from sources import readers
from support.files import UserError

CLASSES = Path(__file__).parent / "classes"
UNKNOWN = IGNORE - 1  # marks values that no mask should hold


class Layout(NamedTuple):
    """A way in which a dataset lies below a root. In paths, {split} is train or val, {ade} training
    or validation; images whose path has neither are of all splits, and not all have masks."""
    images: str
    masks: str  # files with the images' stems, or one .json that holds them all
    raw: Sequence[int]  # the mask's value of each class
    ignored: Sequence[int]  # values that are no class, if they are not in raw
    lists: Sequence[str] = ()  # files that list the split's stems: the first that exists counts
    read: Callable = readers.read_mask
    note: str = ""
    short_side: float = float("inf")  # larger images are resized to it, with their labels


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

# {name: (its layouts, of which the first whose masks are there is read; {split: numbers of images
# of a complete download})}. What lies in READY was prepared by other repositories' scripts.
BENCHMARKS = {
    "coco-stuff": ([
        Layout(COCO_JPG, "coco-stuff/annotations/{split}2017/*.png", COCO, [255]),
        Layout("coco/{split}2017/*.jpg", "coco/stuffthingmaps/{split}2017/*.png", COCO, [255]),
        Layout(COCO_JPG, "coco-stuff/" + READY + "{split}2017/*.png", range(171), [255])],
        {"train": [118_287], "val": [5000]}),
    "ade20k-847": ([
        Layout(ADE21 + ADE21_STEM + ".jpg", ADE21 + ADE21_STEM + "_seg.png", ADE847, range(65536),
               read=readers.read_ade_colours, short_side=512),
        Layout(ADE21 + "images_detectron2/{ade}/*.jpg", ADE21 + READY + "{ade}/*.tif", range(847),
               [65535])],
        {"train": [25_574], "val": [2000]}),
    "pc-459": ([
        Layout(JPG10, MAT, range(1, 460), [0], LISTS10, readers.read_label_map),
        Layout(JPG10, VOC10 + READY + "pc459_{split}/*.tif", range(459), [65535])],
        {"train": [4998], "val": [5104, 5105]}),
    "ade20k-150": ([
        Layout(ADE_JPG, ADE + "annotations/{ade}/*.png", range(1, 151), [0]),
        Layout(ADE_JPG, ADE + READY + "{ade}/*.png", range(150), [255])],
        {"train": [20_210], "val": [2000]}),
    "pc-59": ([
        Layout(JPG10, DETAIL, PC59, range(65536), LISTS10, readers.read_painted),
        Layout(JPG10, MAT, PC59, range(65536), LISTS10, readers.read_label_map,
               " (approximate: trainval_merged.json is missing)"),
        Layout(JPG10, VOC10 + READY + "pc59_{split}/*.png", range(59), [255],
               note=" (wrong if OVSeg wrote them, whose classes are in another order)")],
        {"train": [4998], "val": [5104, 5105]}),
    "voc-20": ([
        Layout(JPG12, VOC12 + "SegmentationClass/*.png", range(1, 21), [0, 255], LISTS12),
        Layout(JPG12, VOC12 + READY + "{split}/*.png", range(20), [255])],
        {"train": [1464], "val": [1449]}),
    "voc-20b": ([  # fewer labels than names: the last one stands for all from the 21st on
        Layout(JPG12, VOC12 + "SegmentationClass/*.png", [*range(1, 21), 0], [255], LISTS12),
        Layout(JPG12, VOC12 + "annotations_detectron2_bg/{split}/*.png", range(21), [255])],
        {"val": [1449]}),
}


def open_benchmark(name, root, split):
    """The benchmark of this name, from the first of its layouts that is there."""
    if name not in BENCHMARKS:
        raise UserError(f"--dataset {name}: should be one of {', '.join(BENCHMARKS)}, folder:PATH, "
                        "toy, toy:N")
    layouts, expected = BENCHMARKS[name]
    if split not in expected:
        raise UserError(f"--dataset {name} is for evaluation only: train on voc-20")
    places = [locate(root, layout.masks, split)[0] for layout in layouts]
    there = [place.is_file() or place.is_dir() and any(place.glob("[!.]*")) for place in places]
    if not any(there):
        raise UserError(f"--dataset {name}: nothing is in {', '.join(map(str, places))} "
                        f"(--data-root is {root}; docs/data.md says what to download)")
    lines = (CLASSES / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    names = [line.split("\t")[-1] for line in lines]
    dataset = Files(root, split, names, layouts[there.index(True)])
    if len(dataset) not in expected[split]:
        dataset.source += f" (warning: a complete download has {expected[split][0]} images)"
    return dataset


class Files:
    """Images and masks as a Layout describes them, one of `data.open_dataset`'s datasets."""

    def __init__(self, root, split, names, layout):
        self.names, self.layout = names, layout
        self.lookup = np.full(65537, UNKNOWN)  # label of each raw value, and of all others
        self.lookup[list(layout.ignored)] = IGNORE
        self.lookup[list(layout.raw)] = range(len(layout.raw))
        image_place, images, others = find_files(root, layout.images, split, readers.IMAGE_TYPES)
        mask_place, masks, _ = find_files(root, layout.masks, split, readers.MASK_TYPES)
        self.source = f"{image_place} with {mask_place}{layout.note}"
        if others:
            self.source += f" (other files or folders there: {others})"
        stems = masks
        if layout.lists:
            lists = [locate(root, path, split)[0] for path in layout.lists]
            listed = next((path for path in lists if path.is_file()), lists[0])
            stems = readers.read_list(listed, split, masks)
            self.source += f", as {listed} lists them"
        elif "{" in layout.images:
            stems = images | masks
        unpaired = sorted(stem for stem in stems if stem not in images or stem not in masks)
        if unpaired:
            place = mask_place if unpaired[0] in images else image_place
            raise UserError(f"{place} has no file {unpaired[0][:99]} (files without a partner: "
                            f"{len(unpaired)})")
        self.pairs = [(images[stem], masks[stem]) for stem in sorted(set(stems))]
        self.files = [image.name for image, _ in self.pairs]

    def __len__(self):
        return len(self.pairs)

    def load(self, i):
        path, where = self.pairs[i]
        image, mask = readers.read_image(path), self.layout.read(where)
        raw, ignored = self.layout.raw, self.layout.ignored[0]
        too_few_bits = mask.dtype == np.uint8 and max(raw) >= 255
        if mask.ndim != 2 or mask.dtype.kind not in "ui" or too_few_bits:
            raise UserError(f"{where} should be a mask of one channel of integers up to {max(raw)} "
                            f"and {ignored}, not {mask.dtype} of shape {mask.shape}")
        pixel_labels = self.lookup[mask.astype(np.int64).clip(-1, 65536)]
        unknown = mask[pixel_labels == UNKNOWN]
        if unknown.size:
            raise UserError(f"{where} holds the value {unknown[0]}, which is none of {len(raw)} "
                            f"classes in {min(raw)}..{max(raw)}, nor the ignored {ignored}")
        if mask.shape[::-1] != image.size:
            raise UserError(f"{where} is of size {mask.shape[::-1]}, and its image {image.size}")
        if min(image.size) > self.layout.short_side:
            image, pixel_labels = shrink(image, pixel_labels, self.layout.short_side)
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
    """A Layout's path -> (its folder; {stem: path} of the files of these types, except hidden ones,
    evaluate.py's *.rpmd.png and mmsegmentation's *_labelTrainIds.png; how many other files)."""
    place, inner = locate(root, pattern, split)
    if place.suffix == ".json":
        return place, readers.read_detail(place), 0
    found, others = {}, 0
    for path in sorted(place.glob(inner)):
        stem = path.stem.removesuffix("_seg") if inner.endswith("_seg.png") else path.stem
        ours = path.suffix.lower() in types and not path.name.startswith(".")
        if ours and not stem.endswith("_labelTrainIds") and ".rpmd" not in stem:
            if stem in found:
                raise UserError(f"{path} has a twin of another type in {place}")
            found[stem] = path
        elif not path.name.startswith("."):
            others += 1
    if not found:
        raise UserError(f"{place} holds no file {inner} of type {', '.join(types)}")
    return place, found, others
