"""Predicted labels as files: of a dataset's images, and of pictures of one's own."""
import glob
import os
import re
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

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
    for path in dict.fromkeys(paths):
        twins = any(p.stem == path.stem and p.suffix != path.suffix for p in paths)
        stem = Path(out or path.parent, path.name if twins else path.stem)
        if stem in stems:
            raise UserError(f"--image: {path} and {stems[stem]} would both be written to "
                            f"{stem}.seg.png")
        stems[stem] = path
    return stems


def label_files(label, args, names):
    """--image: label pictures with the names and draw them. label: path -> PIL image, labels [H,W].
    Returns what went wrong, a sentence for each."""
    stems = find_images(args.image, args.out)
    kind = np.min_scalar_type(len(names) - 1)  # 16 bits from 257 names on
    wrong = []
    for stem, path in tqdm(stems.items(), "pictures", disable=len(stems) == 1):
        try:
            image, pixel_labels = label(path)
        except UserError as e:
            wrong.append(f"error: {e}")
            continue
        save(pictures.segmentation(image, pixel_labels, names), Path(f"{stem}.seg.png"))
        if args.save_labels:
            save(Image.fromarray(pixel_labels.astype(kind)), Path(f"{stem}.labels.png"))
        found = [text for text, _ in pictures.legend_entries(names, pixel_labels, shares=True)]
        tqdm.write(f"{stem}.seg.png: {', '.join(found)}")
    return wrong


class Keeper:
    """Writes what --save-labels and --save-pictures ask for of a dataset's images."""

    def __init__(self, folder, dataset, args):
        self.folder = folder
        self.names = dataset.evaluated
        self.save_labels = args.save_labels
        count = min(args.save_pictures, len(dataset))
        self.drawn = np.linspace(0, len(dataset) - 1, count).astype(int)

    def __call__(self, i, image, pixel_labels, prediction, path):
        file = f"{Path(path).stem}.png"
        if self.save_labels:
            pixel_labels = prediction.astype(np.min_scalar_type(len(self.names) - 1))
            save(Image.fromarray(pixel_labels), self.folder / "labels" / file)
        if i in self.drawn:
            picture = pictures.comparison(image, pixel_labels, prediction, self.names)
            save(picture, self.folder / "pictures" / file)


def save(image, path):
    """Write a PIL image, and its folder if need be. Raises UserError."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
