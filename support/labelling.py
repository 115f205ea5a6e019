"""Predicted labels as files: of a dataset's images, and of pictures of one's own."""
import glob
import os
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from support import pictures, runs
from support.errors import UserError

IMAGE_TYPES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


def find_images(patterns):
    """What --image names: files, folders of pictures, patterns -> a list of paths."""
    paths = []
    for pattern in patterns:
        found = [pattern]
        if not os.path.isfile(pattern):
            inside = f"{glob.escape(pattern)}/*" if os.path.isdir(pattern) else pattern
            found = [path for path in sorted(glob.glob(inside))
                     if path.lower().endswith(IMAGE_TYPES)
                     and not path.endswith((".seg.png", ".labels.png"))]
        if not found:
            raise UserError(f"--image {pattern}: there is no such picture")
        paths += map(Path, found)
    return list(dict.fromkeys(paths))


def output_names(paths, out):
    """{path of the labelled picture: path of the picture}, beside it or in the folder out."""
    targets = {}
    for path in paths:
        twins = [p for p in paths if p.stem == path.stem and p.suffix != path.suffix]
        written = Path(out or path.parent, (path.name if twins else path.stem) + ".seg.png")
        if written in targets:
            raise UserError(f"--image: {path} and {targets[written]} would both be written to "
                            f"{written}")
        targets[written] = path
    return targets


def label_files(label, args, names):
    """--image: label pictures with the names and draw them. label: path -> PIL image, labels [H,W].
    Returns what went wrong, a sentence for each."""
    written = output_names(find_images(args.image), args.out)
    wrong = []
    for target, path in tqdm(written.items(), "pictures", disable=len(written) == 1):
        try:
            image, labels = label(path)
        except UserError as e:
            wrong.append(f"error: {e}")
            continue
        with runs.writing_folder(target.parent):
            target.parent.mkdir(parents=True, exist_ok=True)
            pictures.segmentation(image, labels, names).save(target)
        if args.save_labels:
            file = target.name.replace(".seg.png", ".labels.png")
            save_labels(labels, len(names), target.with_name(file))
        share = 100 * np.bincount(labels.ravel(), minlength=len(names)) / labels.size
        found = [f"{share[i]:.1f} % {names[i]}" for i in np.argsort(-share) if share[i]]
        tqdm.write(f"{target}: {', '.join(found)}")
    return wrong


class Keeper:
    """Writes what --save-labels and --save-pictures ask for of a dataset's images."""

    def __init__(self, folder, dataset, args):
        self.folder = folder
        self.names = dataset.evaluated
        self.save_labels = args.save_labels
        count = min(args.save_pictures, len(dataset))
        self.drawn = set(np.linspace(0, len(dataset) - 1, count).astype(int).tolist())

    def __call__(self, i, image, pixel_labels, prediction, path):
        file = f"{Path(path).stem}.png"
        if self.save_labels:
            save_labels(prediction, len(self.names), self.folder / "labels" / file)
        if i in self.drawn:
            (self.folder / "pictures").mkdir(parents=True, exist_ok=True)
            picture = pictures.comparison(image, pixel_labels, prediction, self.names)
            picture.save(self.folder / "pictures" / file)


def save_labels(pixel_labels, count, path):
    """Write pixel labels [H,W] as a png, in 16 bits if there are more than 256 classes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixel_labels.astype(np.uint8 if count <= 256 else np.uint16)).save(path)
