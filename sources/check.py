"""Check datasets before training: python -m sources.check NAME ... --data-root DIR

Reads every file, prints what is broken or else the share of each class and any warnings, and draws
samples in out/check. Stops at the first dataset that can't be used, with status 1."""
import argparse
import functools
import os
import re
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import data
import evaluate
from sources import readers
from support import accidents
from support.files import UserError


def inspect(dataset, i):
    """Item i: (pixels of each class and of IGNORE, its mask's palette), or the error it raises."""
    try:
        bins = len(dataset.evaluated) + 1  # the last one is for IGNORE, which is -1
        counts = np.bincount(dataset.load(i)[1].ravel() % bins, minlength=bins)
        if hasattr(dataset, "pairs") and dataset.layout.read is readers.read_mask:
            return counts, readers.read_palette(dataset.pairs[i][1])
        return counts, {}
    except UserError as e:
        return e


def check(dataset, title, colours):
    """Read a dataset and print what is in it. colours: set of (index, colour) in the palettes of
    its other split, to which its own are added. Raises UserError if it can't be used as it is."""
    print(f"{title}: {dataset.description}")
    evaluate.check_names(dataset.names, own_words=dataset.own_words)
    loader = torch.utils.data.DataLoader(
        range(len(dataset)), None, num_workers=os.cpu_count(),
        worker_init_fn=accidents.leave_group, collate_fn=functools.partial(inspect, dataset))
    items = list(tqdm(data.in_loaders(loader), "reading", len(dataset), leave=False))
    wrong = [item for item in items if isinstance(item, UserError)]
    if wrong:
        print(*wrong, sep="\n")
        raise UserError(f"{title}: {len(wrong)} of {len(items)} items are broken")
    counts = sum(counts for counts, _ in items)
    for n, name in sorted(zip(counts, [*dataset.evaluated, "(ignored)"]), reverse=True):
        print(f"{100 * n / counts.sum():7.2f} % of the pixels  {name}")
    if message := data.doubt_about_255(dataset, counts):
        print(f"warning: {message}")
    colours.update(entry for _, palette in items for entry in palette.items())
    if len(colours) > len(dict(colours)):
        print("warning: palettes differ: does an index mean the same class in all of the masks?")
    from support import pictures
    path = Path("out/check", re.sub("[/: ]", "-", title)[-50:] + ".png")
    samples = range(0, len(dataset), max(1, len(dataset) // 4))[:4]
    pictures.labelled(path, [dataset.load(i)[:2] for i in samples], dataset.evaluated)
    print(f"{title}: usable; samples: {path}")


def main():
    parser = argparse.ArgumentParser("python -m sources.check", description="Check datasets.")
    parser.add_argument("names", nargs="+", metavar="NAME", help=", ".join(data.NAMES))
    parser.add_argument("--data-root", help=data.ROOT_HELP)
    parser.add_argument("--split", choices=("train", "val"), help="default: both")
    args = parser.parse_args()
    for name in args.names:
        colours = set()
        splits = ["val"] if name == "voc-20b" else ["train", "val"]
        for split in [args.split] if args.split else splits:
            check(data.open_dataset(name, args.data_root, split), f"{name} {split}", colours)


if __name__ == "__main__":
    with accidents.door():
        main()
