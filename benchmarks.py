"""The benchmarks as they are downloaded, and folders of one's own: what lies where, how masks are encoded, how to check it.

Nothing is converted, and nothing is ever written into a dataset's folder. To add a dataset, add a row to SOURCES, its names
to classes/, and a reader if its masks are of a new kind. (data.py makes training samples of what is read here.)
"""
import argparse
import functools
import json
import os
import sys
from pathlib import Path
from typing import Callable, NamedTuple, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

import viz
from data import IMAGE_TYPES, NAMES, DataError, open_dataset, read_image, read_names, reading
from losses import IGNORE

MASK_TYPES = (".png", ".tif", ".tiff", ".mat")
STRANGE = IGNORE - 1                                                                  # marks values no mask should hold


# Readers: path of a mask -> its raw values [H,W]. `Files.load` checks what they return.

def read_mask(path):
    """A picture of one channel; of a palette its indices, never its colours."""
    with reading(path, "a mask"):
        return np.asarray(Image.open(path))


def read_ade_colours(path):
    """ADE20K's *_seg.png: red and green hold the id of the object's class."""
    with reading(path, "an ADE20K mask"):
        picture = Image.open(path)
        if picture.mode != "RGB":
            raise ValueError(f"it should be RGB and is {picture.mode}")
        red, green, _ = np.moveaxis(np.asarray(picture, np.uint16), -1, 0)
        return red // 10 * 256 + green


def read_label_map(path):
    """PASCAL-Context's .mat files."""
    with reading(path, "a LabelMap"):
        from scipy.io import loadmat
        return loadmat(path)["LabelMap"] + np.uint16(0)                                    # never 8 bits


class RunLengths(NamedTuple):
    """The masks of one image in the JSON of PASCAL in Detail."""
    where: str
    phase: str
    size: tuple  # height, width
    masks: list  # of (category id, run lengths), in the file's order

    def __str__(self):
        return self.where


def read_painted(image):
    """RunLengths -> category ids, later masks over earlier ones, 0 where there is none."""
    with reading(image, "run-length masks"):
        from pycocotools.mask import decode, frPyObjects
        if not 0 < image.size[0] * image.size[1] < 2e8:                                    # the decoder does not ask
            raise ValueError(f"sides of {image.size}")
        canvas = np.zeros(image.size, np.uint16)
        for category, runs in image.masks:
            if tuple(runs["size"]) != image.size:
                raise ValueError(f"a mask of {runs['size']} in an image of {list(image.size)}")
            canvas[decode(frPyObjects(runs, *image.size) if isinstance(runs["counts"], list) else runs) > 0] = category
        return canvas


def read_detail(path):
    """The JSON of PASCAL in Detail -> {stem: RunLengths}."""
    with reading(path, "annotations of PASCAL in Detail"):
        content, found = json.loads(path.read_text()), {}
        for image in content["images"]:
            name, size = image["file_name"], (image["height"], image["width"])
            found[image["image_id"]] = RunLengths(f"{path}, {name}", image["phase"], size, [])
        for mask in content["annos_segmentation"]:
            found[mask["image_id"]].masks.append((mask["category_id"], mask["segmentation"]))
        return {Path(image["file_name"]).stem: found[image["image_id"]] for image in content["images"]}


# What lies where.

class Source(NamedTuple):
    """One way in which a dataset lies below a root. In paths, {split} is train or val, {ade} training or validation."""
    images: str
    masks: str                      # files with the images' stems, or one .json that holds them all
    raw: Sequence[int] | None       # the mask's value of each class; None: the first column of the file of names
    ignored: Sequence[int] | None   # values that are no class; None: all others
    ids: Sequence[str] | None = ()  # files that list the split's stems, first that exists; (): images and masks must
    read: Callable = read_mask      # match one to one; None: there are more images than masks
    short_side: int | None = None   # larger images, and their labels, are brought to this
    note: str = ""


COCO = [i for i in range(182) if i not in (11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90)]    # ids that masks use
PC59 = (2, 9, 18, 19, 22, 23, 25, 31, 33, 34, 44, 45, 46, 59, 65, 68, 72, 80, 85, 98, 104, 105, 113, 115, 144, 158,
        159, 162, 187, 189, 207, 220, 232, 258, 259, 260, 284, 295, 296, 308, 324, 326, 347, 349, 354, 355, 360, 366,
        368, 397, 415, 416, 420, 424, 427, 440, 445, 454, 458)                             # ids among the 459
COCO_JPG, A150_JPG = "coco-stuff/images/{split}2017/*.jpg", "ADEChallengeData2016/images/{ade}/*.jpg"
A847, A847_STEM = "ADE20K_2021_17_01/", "ADE20K_2021_17_01/images/ADE/{ade}/*/*/ADE_{split}_????????"
V10, V12 = "VOCdevkit/VOC2010/", "VOCdevkit/VOC2012/"
V10_JPG, V12_JPG = V10 + "JPEGImages/*.jpg", V12 + "JPEGImages/*.jpg"
LISTS = (V10 + "pascalcontext_{split}.txt", V10 + "trainval_merged.json", V10 + "ImageSets/Main/{split}.txt")
VOC = (V12 + "ImageSets/Segmentation/{split}.txt",)
SOURCES = {  # of each dataset the first whose masks exist; those in annotations_detectron2 come from others' scripts
    "coco-stuff": [
        Source(COCO_JPG, "coco-stuff/annotations/{split}2017/*.png", COCO, (255,)),
        Source("coco/{split}2017/*.jpg", "coco/stuffthingmaps/{split}2017/*.png", COCO, (255,)),
        Source(COCO_JPG, "coco-stuff/annotations_detectron2/{split}2017/*.png", range(171), (255,))],
    "ade20k-150": [
        Source(A150_JPG, "ADEChallengeData2016/annotations/{ade}/*.png", range(1, 151), (0,)),
        Source(A150_JPG, "ADEChallengeData2016/annotations_detectron2/{ade}/*.png", range(150), (255,))],
    "ade20k-847": [
        Source(A847_STEM + ".jpg", A847_STEM + "_seg.png", None, None, read=read_ade_colours, short_side=512),
        Source(A847 + "images_detectron2/{ade}/*.jpg", A847 + "annotations_detectron2/{ade}/*.tif", range(847), (65535,))],
    "pc-59": [
        Source(V10_JPG, V10 + "trainval_merged.json", PC59, None, LISTS, read_painted),
        Source(V10_JPG, V10 + "trainval/*.mat", PC59, None, LISTS, read_label_map,
               note="trainval_merged.json is missing: these masks only approximate the published ones"),
        Source(V10_JPG, V10 + "annotations_detectron2/pc59_{split}/*.png", range(59), (255,), None,
               note="as OVSeg prepares them their classes are in another order: look at the picture of data.py --check")],
    "pc-459": [
        Source(V10_JPG, V10 + "trainval/*.mat", range(1, 460), (0,), LISTS, read_label_map),
        Source(V10_JPG, V10 + "annotations_detectron2/pc459_{split}/*.tif", range(459), (65535,), None)],
    "voc-20": [
        Source(V12_JPG, V12 + "SegmentationClass/*.png", range(1, 21), (0, 255), VOC),
        Source(V12_JPG, V12 + "annotations_detectron2/{split}/*.png", range(20), (255,), None)],
    "voc-20b": [  # fewer labels than names: the last one, "background", stands for all names from the 21st on
        Source(V12_JPG, V12 + "SegmentationClass/*.png", (*range(1, 21), 0), (255,), VOC),
        Source(V12_JPG, V12 + "annotations_detectron2_bg/{split}/*.png", range(21), (255,), None)],
}
PC_IMAGES = {"train": (4998,), "val": (5104, 5105)}
EXPECTED = {  # images of a complete download
    "coco-stuff": {"train": (118_287,), "val": (5000,)}, "ade20k-150": {"train": (20_210,), "val": (2000,)},
    "ade20k-847": {"val": (2000,)}, "pc-59": PC_IMAGES, "pc-459": PC_IMAGES,
    "voc-20": {"train": (1464,), "val": (1449,)}, "voc-20b": {"val": (1449,)}}


def open_files(name, root, split):
    """A benchmark, from the first of its SOURCES that is there, or folder:PATH. Raises DataError."""
    if name.startswith("folder:"):
        root = Path(name.removeprefix("folder:")).expanduser()
        names = read_names(root / "classes.txt")
        ignored = [value for value in (255, 65535) if value >= len(names)]
        return Files(root, split, names, Source("images/{split}/*", "masks/{split}/*", range(len(names)), ignored))
    if name not in SOURCES:
        raise DataError(f"--dataset {name}: known are {', '.join(NAMES)}")
    tops = list(dict.fromkeys(source.images.split("/")[0] for source in SOURCES[name]))
    if root is None:
        raise DataError(f"--dataset {name} needs --data-root, the folder that holds {' or '.join(tops)}")
    if name == "voc-20b" and split == "train":
        raise DataError("--dataset voc-20b is for evaluation only, its background being 39 names: train on voc-20")
    root = Path(root)
    wanted = [fixed_part(root, source.masks, split) for source in SOURCES[name]]
    there = [path.is_file() or path.is_dir() and any(path.iterdir()) for path in wanted]
    source = next((s for s, found in zip(SOURCES[name], there) if found), None)
    if source is None:
        near = [p for p in (*root.resolve().parents[:2], *root.glob("*/")) if any((p / top).is_dir() for top in tops)]
        hint = f"; --data-root should be {near[0]}" if near else ""
        raise DataError(f"--dataset {name}: nothing is in {', '.join(map(str, dict.fromkeys(wanted)))}{hint}")
    vocabulary = Path(__file__).parent / "classes" / f"{name}.txt"
    if source.raw is None:
        source = source._replace(raw=[int(line.split("\t")[0]) for line in vocabulary.read_text().splitlines()])
    return Files(root, split, read_names(vocabulary), source)


class Files:
    """Images and masks as a Source describes them, with the surface that `data.open_dataset` promises."""

    def __init__(self, root, split, names, source):
        self.names, self.raw, self.read_mask, self.short_side = names, list(source.raw), source.read, source.short_side
        self.table = np.full(65536, IGNORE if source.ignored is None else STRANGE, np.int64)
        self.table[list(source.ignored or ())] = IGNORE
        self.table[self.raw] = np.arange(len(self.raw))
        image_folder, mask_place = (fixed_part(root, pattern, split) for pattern in (source.images, source.masks))
        images = find_files(root, source.images, split, IMAGE_TYPES)
        masks = (read_detail(mask_place) if mask_place.suffix == ".json" else
                 find_files(root, source.masks, split, MASK_TYPES))
        self.source = f"{image_folder} with {mask_place}" + f" ({source.note})" * bool(source.note)
        ids, listed = (masks if source.ids is None else images | masks), None
        if source.ids:
            lists = [fixed_part(root, path, split) for path in source.ids]
            listed = next((path for path in lists if path.is_file()), None)
            if listed is None:
                raise DataError(f"no list says which images are in {split}: none of {', '.join(map(str, lists))} exists")
            ids = read_list(listed, split, masks)
            self.source += f", as {listed} lists them"
        for found, folder in ((images, image_folder), (masks, mask_place)):
            lonely = sorted(i for i in ids if i not in found)
            if lonely:
                there = masks.get(lonely[0], images.get(lonely[0], listed))
                raise DataError(f"{there} has no partner {lonely[0][:100]} in {folder} ({len(lonely)} such): every image needs a "
                                f"mask of the same name, and the reverse")
        self.pairs = [(images[i], masks[i]) for i in sorted(set(ids))]

    @property
    def evaluated(self):
        """The classes that are scored. With fewer labels than names, the last label stands for all names from it on."""
        return self.names if len(self.raw) == len(self.names) else [*self.names[:len(self.raw) - 1], "background"]

    def __len__(self):
        return len(self.pairs)

    def load(self, i):
        path, mask_path = self.pairs[i]
        image, mask = read_image(path), self.read_mask(mask_path)
        if mask.ndim != 2 or mask.dtype.kind not in "ui" or not 0 <= mask.min() <= mask.max() < 65536:
            raise DataError(f"{mask_path} should be a mask of one channel of indices, not {mask.dtype} of shape {mask.shape}")
        if mask.shape != image.size[::-1]:
            raise DataError(f"{mask_path} is {mask.shape[1]} x {mask.shape[0]}, its image {image.width} x {image.height}")
        if mask.dtype == np.uint8 and max(self.raw) >= 255:
            raise DataError(f"{mask_path} has 8 bits, too few for {len(self.raw)} classes and the ignore value")
        labels = self.table.take(mask)                                                        # [H,W]
        if labels.min() == STRANGE:
            void = [value for value in (0, 255, 65535) if self.table[value] == IGNORE]
            hint = "; are these the ids of labels.txt, which are larger by one?" if self.raw == COCO else ""
            raise DataError(f"{mask_path} holds the value {mask[labels == STRANGE][0]}, which none of the {len(self.raw)} "
                            f"classes has (they lie in {min(self.raw)}..{max(self.raw)}, and "
                            f"{' or '.join(map(str, void))} is ignored){hint}")
        if self.short_side and min(image.size) > self.short_side:
            image, labels = shrink(image, labels, self.short_side)
        return image, labels, str(path)


def shrink(image, labels, short_side):
    """Bring the short side to this many pixels: bilinear without antialias; labels by the indices of OpenCV's nearest."""
    scale = short_side / min(image.size)
    size = [round(side * scale) for side in labels.shape]                                  # height, width
    x = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float()
    x = F.interpolate(x, size, mode="bilinear", align_corners=False)[0].round().byte()
    rows, columns = (np.minimum((np.arange(n) * (1 / (n / old))).astype(int), old - 1) for n, old in zip(size, labels.shape))
    return Image.fromarray(x.permute(1, 2, 0).numpy()), labels[rows[:, None], columns]


def fixed_part(root, pattern, split):
    """The folder or file below root that a Source's pattern begins with, before the first wildcard."""
    parts = pattern.format(split=split, ade={"train": "training", "val": "validation"}[split]).split("/")
    return Path(root, *parts[:next((i for i, part in enumerate(parts) if "*" in part or "?" in part), len(parts))])


def find_files(root, pattern, split, types):
    """{stem: path} of the files that a Source's pattern names and that have one of the types, without hidden ones and the
    *_labelTrainIds.png that mmsegmentation puts beside COCO-Stuff's masks."""
    folder = fixed_part(root, pattern, split)
    if not folder.is_dir():
        raise DataError(f"{folder} does not exist or is no folder")
    inner = "/".join(pattern.format(split=split, ade="").split("/")[len(folder.relative_to(root).parts):])
    paths = sorted(p for p in folder.glob(inner) if p.suffix.lower() in types
                   and not p.name.startswith(".") and not p.stem.endswith("_labelTrainIds"))
    found = {p.stem.removesuffix("_seg") if inner.endswith("_seg.png") else p.stem: p for p in paths}
    if not found:
        raise DataError(f"{folder} holds no file {inner}" + f" of type {', '.join(types)}" * inner.endswith("*"))
    twins = [p for p in paths if p not in set(found.values())]
    if twins:
        raise DataError(f"{twins[0]} has a twin of another type in {folder}")
    return found


def read_list(path, split, masks):
    """The stems that a list names: the first word of each line, or of a .json the images of that phase."""
    if path.suffix == ".json":
        details = masks if any(isinstance(m, RunLengths) for m in masks.values()) else read_detail(path)
        ids = [stem for stem, image in details.items() if image.phase == split]
    else:
        with reading(path, "a list of images"):
            ids = [Path(line.split()[0]).stem for line in path.read_text().splitlines() if line.strip()]
    if path.parent.name == "Main":                                                         # PASCAL-Context lacks a few
        ids = [i for i in ids if i in masks]
    if not ids:
        raise DataError(f"{path} lists no image of {split}")
    return ids


def inspect(dataset, i):
    """Read one item: (pixels of each label, and of IGNORE at the end; what is wrong with it)."""
    count = len(dataset.evaluated) + 1
    try:
        return np.bincount(dataset.load(i)[1].ravel() % count, minlength=count), ""         # -1 becomes the last
    except DataError as e:
        return np.zeros(count, int), str(e)


def check(name, split, args):
    """Read a split of a dataset, print and write what is in it and what is wrong. Returns whether it can be used."""
    dataset = open_dataset(name, args.data_root, split, args.classes)
    print(f"{name}, {split}: {len(dataset)} images from {dataset.source}")
    indices = range(0, len(dataset), max(1, len(dataset) // args.sample) if args.sample else 1)
    loader = torch.utils.data.DataLoader(indices, None, num_workers=args.workers,
                                         collate_fn=functools.partial(inspect, dataset))
    pixels, errors = zip(*tqdm(loader, "reading", leave=False))
    wrong, good = [e for e in errors if e], [i for i, e in zip(indices, errors) if not e]
    expected = EXPECTED.get(name, {}).get(split)
    if expected and len(dataset) not in expected:
        wrong.append(f"there are {len(dataset)} images, and {expected[0]} were expected")
    pixels = sum(pixels)
    share = dict(zip([*dataset.evaluated, "(ignored)"], (100 * pixels / max(1, pixels.sum())).tolist()))
    print("\n".join(f"{s:7.2f} % of the pixels  {n}" for n, s in sorted(share.items(), key=lambda x: -x[1])[:15]))
    absent = [n for n, s in share.items() if s == 0]
    print(f"{len(absent)} of {len(share)} occur in none of {len(good)} masks" +
          f": {', '.join(absent[:20])}" * bool(absent))
    out = Path(args.out, f"{name}-{split}".replace("/", "_").replace(":", "-"))
    out.mkdir(parents=True, exist_ok=True)
    report = dict(dataset=name, split=split, source=dataset.source, images=len(dataset), read=len(indices), wrong=wrong,
                  percent_of_pixels=share)
    (out / "report.json").write_text(json.dumps(report, indent=1))
    if good:
        viz.samples(dataset, good[::max(1, len(good) // 4)][:4]).save(out / "samples.png")
    print("\n".join([*wrong, f"{'not usable as it is' if wrong else 'usable'}; see {out}/report.json and samples.png"]))
    return not wrong


def main():
    p = argparse.ArgumentParser("data.py", description="Read a whole dataset: exit status 0 if it can be used, else 1.")
    p.add_argument("--check", required=True, metavar="NAME", help=", ".join(NAMES))
    p.add_argument("--data-root", help="the folder that holds the datasets")
    p.add_argument("--split", choices=("train", "val"), help="default: both")
    p.add_argument("--classes", help="other names: a file, or comma-separated")
    p.add_argument("--sample", type=int, default=0, help="read about this many images, evenly spread (default: all)")
    p.add_argument("--workers", type=int, default=os.cpu_count(), help="processes that read (default: one per core)")
    p.add_argument("--out", default="out/check", help="folder for the report and the picture (default out/check)")
    args, usable = p.parse_args(), True
    for split in [args.split] if args.split else ["val"] if args.check == "voc-20b" else ["train", "val"]:
        try:
            usable &= check(args.check, split, args)
        except (DataError, OSError) as e:
            print(f"{args.check}, {split}: not usable: {e}")
            usable = False
    sys.exit(not usable)


if __name__ == "__main__":
    main()
