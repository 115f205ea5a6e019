"""CAT-Seg's augmentation of a training image, with random numbers from a generator."""
import numpy as np
from PIL import Image, ImageOps

from losses import IGNORE


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
