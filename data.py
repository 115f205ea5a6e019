"""Datasets by name, and training crops that depend on nothing but a seed and a draw number."""
import hashlib
import json
import os
import re
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from losses import IGNORE
from support import accidents
from support.files import UserError, reading

ROOT_HELP = ("folder of the benchmarks (default $RPMD_DATA, else $DETECTRON2_DATASETS, else "
             "./datasets)")
REPORTED = ("ade20k-847", "pc-459", "ade20k-150", "pc-59", "voc-20", "voc-20b")  # by papers
NAMES = ("coco-stuff", *REPORTED, "folder:PATH", "toy", "toy:N")  # for help
# what is not a plain name: empty, quoted, a comment, a list item; a number, alone or listed with a
# name; Python, JSON, YAML or XML; more than 300 characters
NOT_A_NAME = re.compile(r"""\s*$|[#,"*/|•]|\(?'.*'|__|-\s|\(?\d+\s*([:,)]|$)|n\d{8}|"""
                        r".*[,:|]\s*[\d.]+\s*([:,|]|$)|.*(\s\d+){3}$|.*[][{}<>;=]|.{301}")
HEADER = re.compile(r"((class|label)[ _]?)?names?|class(es)?|labels?", re.IGNORECASE)
FILE_NAME = re.compile(r"[^,\n]*\.[a-z]{3,5}")
MEAN = torch.tensor((0.48145466, 0.4578275, 0.40821073)).view(3, 1, 1)  # CLIP's
STD = torch.tensor((0.26862954, 0.26130258, 0.27577711)).view(3, 1, 1)


def open_dataset(name, root=None, split="val", classes=None, unseen=None):
    """A dataset by name. root: the folder that holds the benchmarks (default: $RPMD_DATA, else
    $DETECTRON2_DATASETS, else ./datasets); split: train or val. Raises UserError.

    classes: names to use instead, as many as the dataset has: a list, file or text (`read_names`).
    unseen: names to hold out, given likewise: they leave `names`, and their pixels become IGNORE.
    The dataset has `len()`, `load(i) -> (PIL RGB image, int64 labels [H,W], path)`, `names` (the
    vocabulary), `evaluated` (the classes scored: `names`, except in voc-20b), `source` (the paths
    read), `description` (a sentence), `sliding` (evaluate with CAT-Seg's five views), `own_masks`
    and `own_words` (masks, names are the user's), and `fingerprint` (a digest of the names and of
    the images' file names)."""
    kind, _, where = name.partition(":")
    if re.fullmatch(r"toy(:\d{1,9})?", name):
        from sources.toy import Scenes
        dataset = Scenes(int(where or 0), split)
    elif kind == "folder" and where:
        from sources.benchmarks import Files, Layout
        folder = Path(where).expanduser()
        names = read_names(folder / "classes.txt")
        ignored = [value for value in (255, 65535) if value >= len(names)]
        layout = Layout("images/{split}/*", "masks/{split}/*", range(len(names)), ignored)
        dataset = Files(folder, split, names, layout)
    else:
        from sources.benchmarks import open_benchmark
        variables = os.environ.get("RPMD_DATA") or os.environ.get("DETECTRON2_DATASETS")
        dataset = open_benchmark(name, Path(root or variables or "datasets"), split)
    if classes is not None:
        names, needed = read_names(classes), len(dataset.names)
        if len(names) != needed and not (name == "voc-20b" and len(names) > 20):
            raise UserError(f"--classes has {len(names)} names, and {name} needs {needed}")
        if name == "voc-20b" and "background" in names[:20]:
            raise UserError("--classes: the first 20 names of voc-20b are those of its objects")
        dataset.names = names
    if unseen is not None:
        hold_out(dataset, read_names(unseen, "--unseen"))
    dataset.evaluated = dataset.names
    if name == "voc-20b":  # its last label stands for all names from the 21st on
        dataset.evaluated = [*dataset.names[:20], "background"]
    dataset.description = f"{len(dataset)} images of {len(dataset.names)} names, {dataset.source}"
    dataset.sliding = kind != "toy"
    dataset.own_masks = kind == "folder"
    dataset.own_words = dataset.own_masks or classes is not None
    identity = json.dumps([dataset.names, dataset.files])
    dataset.fingerprint = hashlib.sha256(identity.encode()).hexdigest()
    return dataset


def hold_out(dataset, unseen):
    """Take names out of a dataset's vocabulary, and their labels out of its masks. The first of
    comma-separated synonyms may stand for all."""
    firsts = [name.partition(",")[0].strip() for name in dataset.names]
    unknown = [name for name in unseen if name not in (*dataset.names, *firsts)]
    seen = [i for i, (name, first) in enumerate(zip(dataset.names, firsts))
            if name not in unseen and first not in unseen]
    if unknown or not seen:
        raise UserError(f"--unseen {', '.join(unknown or unseen)[:100]}: should be some, but not "
                        f"all, of the dataset's names: {str(dataset.names)[:300]}")
    new_label = np.full(len(dataset.names), IGNORE)
    new_label[seen] = range(len(seen))
    dataset.lookup = np.where(dataset.lookup < 0, dataset.lookup, new_label[dataset.lookup])
    dataset.names = [dataset.names[i] for i in seen]


def read_names(classes, flag="--classes"):
    """Class names: a list, a file (one a line) or text (split at commas and line ends). A file or
    text may also be a JSON list. Raises UserError, also for what is hardly a name, as `0: red`."""
    where, separator, names = flag, r"[,\n]\s*", classes
    if isinstance(names, str) and (os.path.isfile(names) or FILE_NAME.fullmatch(names)):
        classes = Path(classes)
    if isinstance(classes, Path):
        where, separator = classes, "\n"
        with reading(classes, "class names, one a line"):
            names = classes.read_text(encoding="utf-8-sig")
    if isinstance(names, str) and names.lstrip().startswith("["):
        with reading(where, "a JSON list of names"):
            names = json.loads(names)
    elif isinstance(names, str):
        names = [name.strip() for name in re.split(separator, names.rstrip())]
    if not 0 < len(names) < 2 ** 15:
        raise UserError(f"{where} should hold 1 to 32767 class names, and holds {len(names)}")
    numbered = len(names) > 1 and all(re.match(r"\d+\W", str(name)) for name in names)
    for i, name in enumerate(names, 1):
        header = i == 1 and isinstance(classes, Path) and HEADER.fullmatch(str(name))
        if (numbered or header or not isinstance(name, str) or NOT_A_NAME.match(name)
                or not name.replace("\xa0", " ").isprintable()):
            raise UserError(f"{where} should hold names of classes alone (a file, one a line), of "
                            f"at most 300 letters each, and name {i} is {str(name)[:100]!r}")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"{where} names {twice[:100]!r} twice")
    if len(names) == 1 and flag == "--classes":
        accidents.say(f"warning: every pixel will be {names[0][:100]!r}, the only class")
    return list(names)


def doubt_about_255(dataset, counts):
    """A warning if the user's masks seem to store a class as 255, or "". counts: pixels of each
    class, and of IGNORE at the end."""
    absent = [name for name, n in zip(dataset.evaluated, counts) if n == 0]
    # as with masks of 0 and 255: all classes but one have pixels, or only one has
    one_apart = absent and len(absent) in (1, len(dataset.evaluated) - 1)
    if dataset.own_masks and one_apart and counts[-1] > 0.001 * counts.sum():
        return f"no pixel is {absent[0]!r}, but some are ignored: is that class stored as 255?"
    return ""


def normalise(images):
    """uint8 [...,3,H,W] -> float, with CLIP's mean and standard deviation, on the same device."""
    mean, std = (x.to(images.device, non_blocking=True) for x in (MEAN, STD))
    return (images / 255).sub_(mean).div_(std)


class TrainingCrops(torch.utils.data.Dataset):
    """Augmented training samples. Item d (the draw number) is a pure function of (seed, d), so the
    training data do not depend on the number of workers or processes, or on interruptions.

    Draws 0..N-1 visit each of the N images once in a random order, the next N again in another one.
    An item is (image uint8 [3,size,size], pixel labels int16 [size,size], path)."""

    def __init__(self, dataset, size, seed, jitter=1.0):
        self.dataset = dataset
        self.size = size
        self.seed = seed
        self.jitter = jitter
        self.orders = {}  # of the current epoch only

    def __getitem__(self, draw):
        epoch, place = divmod(draw, len(self.dataset))
        if epoch not in self.orders:
            rng = np.random.default_rng((self.seed, 0, epoch))
            self.orders = {epoch: rng.permutation(len(self.dataset))}
        image, pixel_labels, path = self.dataset.load(int(self.orders[epoch][place]))
        rng = np.random.default_rng((self.seed, 1, draw))
        image, pixel_labels = augment(image, pixel_labels, self.size, self.jitter, rng)
        image = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
        return image, torch.from_numpy(pixel_labels.astype(np.int16)), path


def augment(image, pixel_labels, size, jitter, rng):
    """CAT-Seg's augmentation: shortest side to `size` (longest at most 1333/384 of it), random
    crop, SSD's colour jitter (times `jitter`), flip, padding with 128 and IGNORE. PIL image, pixel
    labels [H,W] -> PIL image, pixel labels, both size x size."""
    scale = min(size / min(image.size), round(size * 1333 / 384) / max(image.size))
    width, height = (max(1, int(side * scale + 0.5)) for side in image.size)
    left = rng.integers(max(width - size, 0) + 1)
    top = rng.integers(max(height - size, 0) + 1)
    right = min(left + size, width)
    bottom = min(top + size, height)
    x, y = image.width / width, image.height / height  # only what is cropped gets resized
    box = (x * left, y * top, min(x * right, image.width), min(y * bottom, image.height))
    image = image.resize((right - left, bottom - top), Image.Resampling.BILINEAR, box)
    image = colour_jitter(image, jitter, rng)
    rows = (y * (np.arange(top, bottom) + 0.5)).astype(int)  # nearest
    columns = (x * (np.arange(left, right) + 0.5)).astype(int)
    pixel_labels = pixel_labels[rows[:, None], columns]
    if rng.uniform() < 0.5:
        image = ImageOps.mirror(image)
        pixel_labels = pixel_labels[:, ::-1]
    padded = Image.new("RGB", (size, size), (128, 128, 128))
    padded.paste(image)
    missing = [(0, size - n) for n in pixel_labels.shape]
    return padded, np.pad(pixel_labels, missing, constant_values=IGNORE)


def colour_jitter(image, strength, rng):
    """SSD's photometric distortion of a PIL image: brightness, contrast, saturation and hue, each
    with probability one half, contrast before or after saturation and hue. strength 1 is SSD's."""
    *happens, contrast_first = rng.uniform(size=5) < 0.5
    b, c, s, h = strength * rng.uniform(-1, 1, 4) * happens  # 0 changes nothing
    image = stretch(image, 1, 32 * b)
    if contrast_first:
        image = stretch(image, 1 + 0.5 * c, 0)
    if s or h:  # the way to HSV and back is not exact
        hue, saturation, value = image.convert("HSV").split()
        saturation = saturation.point([int(min(v * (1 + 0.5 * s), 255)) for v in range(256)])
        # at most 18 of OpenCV's 180 steps
        hue = hue.point([int(v + 18 * h * 256 / 180) % 256 for v in range(256)])
        image = Image.merge("HSV", (hue, saturation, value)).convert("RGB")
    if not contrast_first:
        image = stretch(image, 1 + 0.5 * c, 0)
    return image


def stretch(image, factor, offset):
    """factor * v + offset for every value of an RGB image, within 0..255."""
    return image.point([int(min(max(factor * v + offset, 0), 255)) for v in range(256)] * 3)


def batches(crops, batch_size, start, stop, rank=0, world=1, workers=0, device="cpu"):
    """Batches of draws for steps start..stop-1: each step takes the next batch_size draws, of which
    each of `world` processes has its share. Yields this rank's b of them: (images [b,3,S,S] with
    CLIP's mean and standard deviation, pixel labels int64 [b,S,S], paths), on the device."""
    b = batch_size // world
    firsts = range(start * batch_size + rank * b, stop * batch_size, batch_size)
    draws = (range(first, first + b) for first in firsts)
    for images, pixel_labels, paths in in_loaders(torch.utils.data.DataLoader(
            crops, batch_sampler=draws, num_workers=workers, pin_memory=torch.cuda.is_available(),
            worker_init_fn=accidents.leave_group, timeout=300 if workers else 0)):
        images = normalise(images.to(device, non_blocking=True))
        yield images, pixel_labels.to(device, non_blocking=True).long(), paths


def in_loaders(loader):
    """Iterate over a DataLoader. Whatever ends one of its workers becomes a UserError."""
    try:
        yield from loader
    except (UserError, OSError, EOFError, MemoryError, RuntimeError) as e:
        if not loader.num_workers:
            raise
        message = (str(e).strip() or type(e).__name__).splitlines()[-1]  # after a traceback
        if isinstance(e, UserError):
            raise UserError(message.partition(": ")[2]) from e
        raise UserError(f"a loader process failed ({message}); try --workers 0, in Docker a larger "
                        "--shm-size, or a $TMPDIR shorter than 70 characters") from e
