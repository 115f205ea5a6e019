"""Datasets by name, and training samples that depend on nothing but a seed and a draw number.

| name        | below --data-root    | masks                      | label                 | ignored   | train / val     |
|-------------|----------------------|----------------------------|-----------------------|-----------|-----------------|
| coco-stuff  | coco-stuff or coco   | 8-bit png, 0..181          | rank of the 171 used  | 255       | 118,287 / 5,000 |
| ade20k-150  | ADEChallengeData2016 | 8-bit png, 1..150          | value - 1             | 0         | 20,210 / 2,000  |
| ade20k-847  | ADE20K_2021_17_01    | rgb png, R // 10 * 256 + G | line with that id     | other ids | ? / 2,000       |
| pc-59       | VOCdevkit/VOC2010    | json of run lengths        | rank of the 59 used   | unpainted | 4,998 / 5,104   |
| pc-459      | VOCdevkit/VOC2010    | mat with LabelMap, 1..459  | value - 1             | 0         | 4,998 / 5,104   |
| voc-20      | VOCdevkit/VOC2012    | palette png, 1..20         | value - 1             | 0, 255    | 1,464 / 1,449   |
| voc-20b     | VOCdevkit/VOC2012    | palette png, 0..20         | value - 1, or 20 of 0 | 255       | none / 1,449    |
| folder:PATH | PATH itself          | 8- or 16-bit png, tif      | value                 | 255,65535 |                 |
| toy, toy:N  | (drawn by toy.py)    |                            |                       |           | 32 / 160        |

Names are in classes/NAME.txt, or PATH/classes.txt, one a line. benchmarks.py reads the files; a dataset is added there, as
a row of SOURCES. Whatever is wrong with the data raises DataError, one sentence that names the path, and
`python data.py --check NAME --data-root DIR` reads a whole dataset before a long run does.
"""
import collections
import contextlib
import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from losses import IGNORE

REPORTED = ("ade20k-847", "pc-459", "ade20k-150", "pc-59", "voc-20", "voc-20b")            # on which the field compares
NAMES = ("coco-stuff", *REPORTED, "folder:PATH", "toy", "toy:N")
IMAGE_TYPES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)   # CLIP's


class DataError(ValueError):
    """Something wrong with a dataset, in one sentence that names the path."""


@contextlib.contextmanager
def reading(path, kind):
    """Whatever a decoder stumbles over in a broken file becomes a DataError: they raise all sorts of exceptions."""
    try:
        yield
    except ImportError as e:
        raise DataError(f"{path} needs a package to be read: pip install {e.name}") from e
    except Exception as e:
        what = f"there is no {e} in it" if isinstance(e, KeyError) else " ".join(str(e).split()) or type(e).__name__
        raise DataError(f"{path} can't be read as {kind} ({what[:200]})") from e


def read_image(path):
    """A picture file -> PIL image, as `upright_rgb` makes it. Raises DataError."""
    with reading(path, "an image"):
        return upright_rgb(Image.open(path))


def upright_rgb(image):
    """A PIL image of any mode -> RGB, turned upright as its EXIF data says, 16 bits scaled to 8."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):                                                         # which PIL would clip
        image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
    return image.convert("RGB")


def open_dataset(name, root, split, classes=None, unseen=None):
    """A dataset by name (see the table above); root is the folder that holds them all. Raises DataError.

    It has `len()`, `names` (its vocabulary), `evaluated` (the classes that are scored: the names, except in voc-20b),
    `source` (in words, what is read) and `load(i) -> (PIL RGB image, int64 labels [H,W] with IGNORE, path)`.
    classes: other names, as many as the dataset has: a list, a file, or comma-separated text. unseen: names to hold out
    (`SeenOnly`), given likewise.
    """
    if split not in ("train", "val"):
        raise DataError(f"--split {split}: the splits are train and val")
    if name == "toy" or name.startswith("toy:"):
        import toy  # the only one that is drawn rather than read
        seed = name[4:] or "0"
        if not seed.isdecimal():
            raise DataError(f"--dataset {name}: a world is toy or toy:N with a whole number N")
        dataset = toy.Scenes(int(seed), split)
    else:
        import benchmarks
        dataset = benchmarks.open_files(name, root, split)
    if classes is not None:
        names = read_names(classes)
        if len(names) != len(dataset.names) and not (name == "voc-20b" and len(names) > 20):
            raise DataError(f"--classes has {len(names)} names, and {name} needs {len(dataset.names)}")
        dataset.names = names
    return SeenOnly(dataset, read_names(unseen, "--unseen")) if unseen else dataset


class SeenOnly:
    """A dataset with some of its names held out: the vocabulary lacks them, and their pixels carry no label."""

    def __init__(self, dataset, unseen):
        strange = [name for name in unseen if name not in dataset.names]
        if strange:
            raise DataError(f"--unseen {strange[0]}: the dataset has no such name, but {', '.join(dataset.names)[:300]}")
        seen = [i for i, name in enumerate(dataset.names) if name not in unseen]
        if not seen:
            raise DataError("--unseen holds out every name of the dataset: nothing is left to train on")
        self.dataset, self.source, self.names = dataset, dataset.source, [dataset.names[i] for i in seen]
        self.rank = np.full(len(dataset.names) + 1, IGNORE)                                # the last is for IGNORE, -1
        self.rank[seen] = range(len(seen))

    @property
    def evaluated(self):
        return self.names

    def __len__(self):
        return len(self.dataset)

    def load(self, i):
        image, labels, path = self.dataset.load(i)
        return image, self.rank[labels], path


def read_names(classes, flag="--classes"):
    """Class names: a list of them, a file (one a line, what follows a tab if there is one), or comma-separated text."""
    where, names = flag, classes
    if isinstance(classes, Path) or isinstance(classes, str) and (os.path.isfile(classes) or classes.endswith(".txt")):
        with reading(classes, "class names, one a line"):
            if os.path.getsize(classes) > 1e7:
                raise ValueError("it has more than 10 MB")
            lines = Path(classes).read_text(encoding="utf-8-sig").rstrip().splitlines()
        where, names = classes, [line.split("\t")[-1].strip() for line in lines]
    elif isinstance(classes, str):
        names = [name.strip() for name in classes.split(",")]
    if len(names) > 65_535:
        raise DataError(f"{where} holds {len(names)} names, more than masks of 16 bits can tell apart")
    if not names or "" in names:
        raise DataError(f"{where} " + (f"has no name on line {names.index('') + 1}" if names else "holds no class name"))
    twice = [name for name, count in collections.Counter(names).items() if count > 1]
    if twice:
        raise DataError(f"{where} names {twice[0][:100]!r} twice")
    return list(names)


def normalise(image):
    """PIL RGB image -> float [3,H,W] with CLIP's mean and standard deviation."""
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
    return (torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255).sub_(mean).div_(std)


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
    (times `jitter`), flip, padding with 128 and IGNORE. PIL image, labels [H,W] -> PIL image, labels, both size x size."""
    scale = min(size / min(image.size), round(size * 1333 / 384) / max(image.size))
    width, height = (max(1, int(side * scale + 0.5)) for side in image.size)
    left, top = rng.integers(max(width - size, 0) + 1), rng.integers(max(height - size, 0) + 1)
    columns, rows = np.arange(left, min(left + size, width)), np.arange(top, min(top + size, height))
    x, y = image.width / width, image.height / height                                      # only the crop is resized
    box = (x * left, y * top, min(x * (columns[-1] + 1), image.width), min(y * (rows[-1] + 1), image.height))
    image = colour_jitter(image.resize((len(columns), len(rows)), Image.Resampling.BILINEAR, box), jitter, rng)
    labels = labels[(y * (rows + 0.5)).astype(int)[:, None], (x * (columns + 0.5)).astype(int)]    # nearest
    if rng.uniform() < 0.5:
        image, labels = ImageOps.mirror(image), labels[:, ::-1]
    padded = Image.new("RGB", (size, size), (128, 128, 128))
    padded.paste(image)
    missing = [(0, size - n) for n in labels.shape]
    return padded, np.pad(labels, missing, constant_values=IGNORE)


def colour_jitter(image, strength, rng):
    """SSD's photometric distortion: brightness, contrast, saturation, hue, each with probability one half. strength 1: SSD's."""
    flags, (b, c, s, h) = rng.uniform(size=5) < 0.5, strength * rng.uniform(-1, 1, 4)
    brightness, contrast, saturation, hue = 32 * b, 1 + 0.5 * c, 1 + 0.5 * s, 18 * h
    stretch = lambda image, a, b: image.point([int(min(max(a * v + b, 0), 255)) for v in range(256)] * 3)
    image = stretch(image, 1, brightness) if flags[0] else image
    image = stretch(image, contrast, 0) if flags[1] and flags[4] else image                # contrast before or after
    if flags[2] or flags[3]:
        h, s, v = image.convert("HSV").split()
        s = s.point([int(min(t * saturation, 255)) for t in range(256)]) if flags[2] else s
        h = h.point([int(t + hue * 256 / 180) % 256 for t in range(256)]) if flags[3] else h  # OpenCV's hue has 180 steps
        image = Image.merge("HSV", (h, s, v)).convert("RGB")
    return stretch(image, contrast, 0) if flags[1] and not flags[4] else image


def batches(crops, batch_size, start, stop, rank=0, world=1, workers=0):
    """Batches of draws for steps start..stop-1: each step takes the next batch_size*world draws, this rank its share.

    Returns an iterable over (images [b,3,S,S], labels [b,S,S], paths).
    """
    mine = [[(step * world + rank) * batch_size + i for i in range(batch_size)] for step in range(start, stop)]
    return torch.utils.data.DataLoader(crops, batch_sampler=mine, num_workers=workers, worker_init_fn=leave_process_group,
                                       pin_memory=torch.cuda.is_available())


def leave_process_group(worker):
    """Signals to the whole process group (Ctrl-C, torchrun's SIGTERM) are the training process's to answer; its loader
    processes end when it ends them."""
    os.setpgrp()


if __name__ == "__main__":
    import benchmarks
    benchmarks.main()
