"""Predicted labels as files: of a dataset's images, and of pictures of one's own."""
import collections
import glob
import os
import re
from pathlib import Path

import numpy as np
from PIL import Image

from support import pictures
from support.errors import UserError, writing

PICTURE = re.compile(r"(?<!\.seg)(?<!\.labels)\.(jpe?g|png|webp|bmp)$", re.IGNORECASE)


def find_images(patterns, out):
    """What --image names: files, folders of pictures, patterns -> {path of its results but for the
    ending, beside the picture or in the folder out: path of the picture}."""
    paths = []
    for pattern in patterns:
        inside = f"{glob.escape(pattern)}/*" if os.path.isdir(pattern) else pattern
        found = [path for path in sorted(glob.glob(inside)) if PICTURE.search(path)]
        if os.path.isfile(pattern):
            found = [pattern]
        if not found:
            raise UserError(f"--image {pattern}: there is no such picture")
        paths += map(Path, found)
    stems = {}
    alike = collections.Counter(Path(name).stem for name in {path.name for path in paths})
    for path in dict.fromkeys(paths):
        stem = Path(out or path.parent, path.name if alike[path.stem] > 1 else path.stem)
        if stem in stems:
            raise UserError(f"--image: {path} and {stems[stem]} would both be written to "
                            f"{stem}.seg.png")
        stems[stem] = path
    return stems


def keep(folder, dataset, args, i, image, pixel_labels, prediction, path):
    """Write what --save-labels and --save-pictures ask for of a dataset's i-th image."""
    names = dataset.evaluated
    if args.save_labels:
        save(label_image(prediction, names), folder / "labels" / f"{Path(path).stem}.png")
    if i in np.linspace(0, len(dataset) - 1, min(args.save_pictures, len(dataset))).astype(int):
        picture = pictures.comparison(image, pixel_labels, prediction, names)
        save(picture, folder / "pictures" / f"{Path(path).stem}.png")


def label_image(pixel_labels, names):
    """Labels as a PIL image of 8 bits, from 257 names on of 16."""
    return Image.fromarray(pixel_labels.astype(np.min_scalar_type(len(names) - 1)))


def save(image, path):
    """Write a PIL image, and its folder if need be. Raises UserError."""
    with writing(path):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
