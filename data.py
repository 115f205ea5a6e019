"""Training samples that depend on nothing but a seed and a draw number.

`open_dataset` opens a dataset by name (sources/benchmarks.py says how each lies on disk). It has
`len()`, `names` and `load(i) -> (PIL RGB image, int64 pixel labels [H,W] with IGNORE, path)`. Here
its images become augmented crops, and crops become batches.
"""
import numpy as np
import torch
from PIL import Image, ImageOps

from losses import IGNORE
from sources.registry import NAMES, REPORTED, open_dataset, read_names  # noqa: F401, offered here
from support import runs

MEAN = (0.48145466, 0.4578275, 0.40821073)  # CLIP's
STD = (0.26862954, 0.26130258, 0.27577711)


def normalise(image):
    """PIL RGB image -> float [3,H,W] with CLIP's mean and standard deviation."""
    mean = torch.tensor(MEAN).view(3, 1, 1)
    std = torch.tensor(STD).view(3, 1, 1)
    return (torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255).sub_(mean).div_(std)


class TrainingCrops(torch.utils.data.Dataset):
    """Augmented training samples. Item d (a draw number) is a pure function of (seed, d), so that
    neither the number of workers nor of processes nor an interruption changes what is trained on.

    Draws 0..N-1 visit each of the N images once in a random order, the next N again in another one.
    An item is (image float [3,size,size] normalised, pixel labels int64 [size,size], path).
    """

    def __init__(self, dataset, size, seed, jitter=1.0):
        self.dataset = dataset
        self.size = size
        self.seed = seed
        self.jitter = jitter
        self.epoch = None
        self.order = None

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, draw):
        epoch, place = divmod(draw, len(self.dataset))
        if epoch != self.epoch:
            rng = np.random.default_rng((self.seed, 0, epoch))
            self.epoch = epoch
            self.order = rng.permutation(len(self.dataset))
        image, pixel_labels, path = self.dataset.load(int(self.order[place]))
        rng = np.random.default_rng((self.seed, 1, draw))
        image, pixel_labels = augment(image, pixel_labels, self.size, self.jitter, rng)
        return normalise(image), torch.from_numpy(pixel_labels), path


def augment(image, pixel_labels, size, jitter, rng):
    """CAT-Seg's augmentation: shortest side to `size` (longest at most 1333/384 of it), random
    crop, SSD's colour jitter (times `jitter`), flip, padding with 128 and IGNORE. PIL image, pixel
    labels [H,W] -> PIL image, pixel labels, both size x size.
    """
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
    with probability one half, the contrast before or after the others. strength 1 is SSD's."""
    with_brightness, with_contrast, with_saturation, with_hue, first = rng.uniform(size=5) < 0.5
    b, c, s, h = strength * rng.uniform(-1, 1, 4)
    if with_brightness:
        image = stretch(image, 1, 32 * b)
    if with_contrast and first:
        image = stretch(image, 1 + 0.5 * c, 0)
    if with_saturation or with_hue:
        hue, saturation, value = image.convert("HSV").split()
        if with_saturation:
            saturation = saturation.point([int(min(v * (1 + 0.5 * s), 255)) for v in range(256)])
        if with_hue:  # at most 18 of OpenCV's 180 steps
            hue = hue.point([int(v + 18 * h * 256 / 180) % 256 for v in range(256)])
        image = Image.merge("HSV", (hue, saturation, value)).convert("RGB")
    if with_contrast and not first:
        image = stretch(image, 1 + 0.5 * c, 0)
    return image


def stretch(image, factor, offset):
    """factor * v + offset for every value of an RGB image, within 0..255."""
    return image.point([int(min(max(factor * v + offset, 0), 255)) for v in range(256)] * 3)


def batches(crops, batch_size, start, stop, rank=0, world=1, workers=0):
    """Batches of draws for steps start..stop-1: each step takes the next batch_size * world draws,
    of which this rank takes its share. Returns an iterable over (images [b,3,S,S], pixel labels
    [b,S,S], paths)."""
    mine = []
    for step in range(start, stop):
        first = (step * world + rank) * batch_size
        mine.append(range(first, first + batch_size))
    return torch.utils.data.DataLoader(crops, batch_sampler=mine, num_workers=workers,
                                       worker_init_fn=runs.leave_process_group,
                                       pin_memory=torch.cuda.is_available())
