"""Datasets as they are downloaded, and training samples that depend on nothing but a seed and a draw number.

| name        | folder under --data-root | splits     | masks                                 | labels                      |
|-------------|--------------------------|------------|---------------------------------------|-----------------------------|
| coco-stuff  | coco-stuff or coco       | train, val | uint8 png 0..181, 255 = ignore        | rank among the 171 ids used |
| folder:PATH | (PATH itself)            | train, val | png of indices, 255 (65535) = ignore  | line number in classes.txt  |
| toy, toy:N  | (drawn by toy.py)        | train, val |                                       | index of the name           |

A dataset has `len()`, `names`, and `load(i) -> (PIL RGB image, int64 labels [H,W] with IGNORE, path)`. To add one, add a
row to LAYOUTS. Everything wrong with the data raises DataError, one sentence that names the path.
"""
import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from losses import IGNORE

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)   # CLIP's
IMAGE_TYPES, MASK_TYPES = (".jpg", ".jpeg", ".png", ".webp", ".bmp"), (".png", ".tif", ".tiff")
COCO_STUFF_ABSENT = (11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90)     # ids that no mask uses
LAYOUTS = {  # name: (images, masks) below the data root, first pair that exists; {} is the split. Then raw value -> label
    "coco-stuff": ([("coco-stuff/images/{}2017", "coco-stuff/annotations/{}2017"),
                    ("coco/{}2017", "coco/stuffthingmaps/{}2017")],
                   [i for i in range(182) if i not in COCO_STUFF_ABSENT]),
}


class DataError(ValueError):
    """Something wrong with a dataset, in one sentence that names the path."""


def open_dataset(name, root, split):
    """A dataset by name (see the table above); root is the folder that holds them all. Raises DataError."""
    if split not in ("train", "val"):
        raise DataError(f"--split {split}: the splits are train and val")
    if name == "toy" or name.startswith("toy:"):
        import toy  # the only one that is drawn rather than read
        seed = name[4:] or "0"
        if not seed.isdecimal():
            raise DataError(f"--dataset {name}: a world is toy or toy:N with a whole number N")
        return toy.Scenes(int(seed), split)
    if name.startswith("folder:"):
        root = Path(name.removeprefix("folder:"))
        names = read_names(root / "classes.txt")
        return Folder(root / "images" / split, root / "masks" / split, names, range(len(names)))
    if name not in LAYOUTS:
        raise DataError(f"--dataset {name}: known are {', '.join(LAYOUTS)}, folder:PATH, toy and toy:N")
    if root is None:
        raise DataError(f"--dataset {name} needs --data-root, the folder that holds {LAYOUTS[name][0][0][0].split('/')[0]}/")
    pairs, raw = LAYOUTS[name]
    pairs = [[Path(root) / side.format(split) for side in pair] for pair in pairs]
    images, masks = next(([i, m] for i, m in pairs if i.is_dir()), pairs[0])
    return Folder(images, masks, read_names(Path(__file__).parent / "classes" / f"{name}.txt"), raw)


def read_names(path):
    """Class names from a text file, one a line."""
    try:
        names = [line.strip() for line in Path(path).read_text(encoding="utf-8-sig").rstrip().splitlines()]
    except (OSError, UnicodeDecodeError) as e:
        raise DataError(f"{path} should hold the class names, one a line, and can't be read ({type(e).__name__})") from e
    repeated = sorted({n for n in names if names.count(n) > 1})
    if not all(names) or not names or repeated:
        raise DataError(f"{path} " + (f"names {repeated[0]!r} twice" if repeated and repeated[0] else
                                      "has an empty line among its names" if names else "holds no class name"))
    return names


class Folder:
    """Images and masks in two folders, matched by stem. raw: the mask value of each class, in the order of names."""

    def __init__(self, images, masks, names, raw):
        self.names, self.raw = names, list(raw)
        self.table = np.full(65536, IGNORE, np.int64)
        self.table[self.raw] = np.arange(len(names))
        found = [files(folder, types) for folder, types in ((images, IMAGE_TYPES), (masks, MASK_TYPES))]
        lonely = sorted(found[0].keys() ^ found[1].keys())
        if lonely:
            there = next(f[lonely[0]] for f in found if lonely[0] in f)
            raise DataError(f"{there} has no partner in {masks if lonely[0] in found[0] else images} "
                            f"({len(lonely)} such files): images and masks must have the same names")
        self.pairs = [(found[0][stem], found[1][stem]) for stem in sorted(found[0])]

    def __len__(self):
        return len(self.pairs)

    def load(self, i):
        image_path, mask_path = self.pairs[i]
        image = read_image(image_path)
        mask = read_mask(mask_path)
        if mask.shape != image.size[::-1]:
            raise DataError(f"{mask_path} is {mask.shape[1]} x {mask.shape[0]}, its image {image.width} x {image.height}")
        void = 255 if mask.dtype == np.uint8 else 65535
        if void in self.raw:
            raise DataError(f"{mask_path} has 8 bits, too few for {len(self.names)} classes and the ignore value 255")
        labels = self.table[mask]                                                          # [H,W]
        strange = labels == IGNORE
        strange &= mask != void
        if strange.any():
            raise DataError(f"{mask_path} holds the value {mask[strange][0]}, which is no class of its {len(self.names)} "
                            f"(expected {min(self.raw)}..{max(self.raw)}, or {void} to ignore)")
        return image, labels, str(image_path)


def files(folder, types):
    """{stem: path} of the files in a folder that have one of the types."""
    if not folder.is_dir():
        raise DataError(f"{folder} does not exist or is no folder")
    paths = [p for p in folder.iterdir() if p.suffix.lower() in types and not p.name.startswith(".")]
    found = {p.stem: p for p in paths}
    if not found:
        raise DataError(f"{folder} holds no file of type {', '.join(types)}")
    if len(found) < len(paths):
        twin = next(p for p in paths if found[p.stem] != p)
        raise DataError(f"{twin} and {found[twin.stem].name} differ only in their type")
    return found


def read_image(path):
    """RGB, turned upright as its EXIF data says. Raises DataError."""
    try:
        image = ImageOps.exif_transpose(Image.open(path))
        if image.mode.startswith("I"):                                                     # 16 bits, which PIL would clip
            image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
        return image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as e:
        raise DataError(f"{path} can't be read as an image ({str(e) or type(e).__name__})") from e


def read_mask(path):
    """Raw values of a mask, uint8 or uint16 [H,W]; a palette's indices, never its colours. Raises DataError."""
    try:
        mask = np.asarray(Image.open(path))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as e:
        raise DataError(f"{path} can't be read as a mask ({str(e) or type(e).__name__})") from e
    if mask.ndim != 2 or mask.dtype.kind not in "ui" or not 0 <= mask.min() <= mask.max() < 65536:
        raise DataError(f"{path} should be a mask of one channel of indices, and is {mask.dtype} of shape {mask.shape}")
    return mask if mask.dtype == np.uint8 else mask.astype(np.uint16)


def normalise(image):
    """PIL RGB image -> float [3,H,W] with CLIP's mean and standard deviation."""
    x = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
    return (x - mean) / std


class TrainingCrops(torch.utils.data.Dataset):
    """Augmented training samples. Item d (a draw number) is a pure function of (seed, d), so that neither the number of
    workers nor of processes nor an interruption changes what is trained on.

    Draws 0..N-1 visit each of the N images once in a random order, the next N again in another one. An item is
    (image float [3,size,size] normalised, labels int64 [size,size], path).
    """

    def __init__(self, dataset, size, seed, jitter=1.0):
        self.dataset, self.size, self.seed, self.jitter = dataset, size, seed, jitter
        self.epoch, self.order = None, None

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, draw):
        epoch, place = divmod(draw, len(self.dataset))
        if epoch != self.epoch:
            self.epoch, self.order = epoch, np.random.default_rng((self.seed, 0, epoch)).permutation(len(self.dataset))
        image, labels, path = self.dataset.load(int(self.order[place]))
        image, labels = augment(image, labels, self.size, self.jitter, np.random.default_rng((self.seed, 1, draw)))
        return normalise(image), torch.from_numpy(labels), path


def augment(image, labels, size, jitter, rng):
    """CAT-Seg's augmentation: shortest side to `size` (longest at most 1333/384 of it), random crop, SSD's colour jitter
    (times `jitter`), flip, padding with 128 and IGNORE. PIL image, labels [H,W] -> PIL image size x size, labels [size,size]."""
    scale = min(size / min(image.size), round(size * 1333 / 384) / max(image.size))
    width, height = (max(1, int(side * scale + 0.5)) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    labels = Image.fromarray(labels.astype(np.int32)).resize((width, height), Image.Resampling.NEAREST)
    left, top = rng.integers(max(width - size, 0) + 1), rng.integers(max(height - size, 0) + 1)
    box = (left, top, min(left + size, width), min(top + size, height))
    image, labels = colour_jitter(image.crop(box), jitter, rng), np.asarray(labels.crop(box), np.int64)
    if rng.uniform() < 0.5:
        image, labels = ImageOps.mirror(image), labels[:, ::-1]
    padded = Image.new("RGB", (size, size), (128, 128, 128))
    padded.paste(image)
    missing = [(0, size - n) for n in labels.shape]
    return padded, np.pad(labels, missing, constant_values=IGNORE)


def colour_jitter(image, strength, rng):
    """SSD's photometric distortion, each with probability one half: brightness, contrast, saturation, hue. 1 is SSD's strength."""
    flags, (b, c, s, h) = rng.uniform(size=5) < 0.5, strength * rng.uniform(-1, 1, 4)
    brightness, contrast, saturation, hue = 32 * b, 1 + 0.5 * c, 1 + 0.5 * s, 18 * h
    stretch = lambda image, a, b: image.point([int(min(max(a * v + b, 0), 255)) for v in range(256)] * 3)
    image = stretch(image, 1, brightness) if flags[0] else image
    image = stretch(image, contrast, 0) if flags[1] and flags[4] else image                # contrast before or after
    if flags[2] or flags[3]:
        h, s, v = image.convert("HSV").split()
        s = s.point([int(min(t * saturation, 255)) for t in range(256)]) if flags[2] else s
        h = h.point([int(t + hue * 256 / 180) % 256 for t in range(256)]) if flags[3] else h   # OpenCV's hue has 180 steps
        image = Image.merge("HSV", (h, s, v)).convert("RGB")
    return stretch(image, contrast, 0) if flags[1] and not flags[4] else image


def batches(crops, batch_size, start, stop, rank=0, world=1, workers=0):
    """Batches of draws for steps start..stop-1: each step takes the next batch_size*world draws, this rank its share.

    Returns an iterable over (images [b,3,S,S], labels [b,S,S], paths).
    """
    mine = [[(step * world + rank) * batch_size + i for i in range(batch_size)] for step in range(start, stop)]
    return torch.utils.data.DataLoader(crops, batch_sampler=mine, num_workers=workers, pin_memory=torch.cuda.is_available(),
                                       worker_init_fn=leave_process_group)


def leave_process_group(worker):
    """Signals sent to the whole process group (Ctrl-C, torchrun's SIGTERM) are the training process's to answer; its loader
    processes end when it ends them."""
    os.setpgrp()
