"""Read whole datasets, to find what is wrong before a long run does: exit status 0 if nothing is.

    python -m sources.check ade20k-150 --data-root DIR

prints counts, shares of the classes, and files that are broken or don't match, and writes a report
and a picture of four samples.
"""
import argparse
import functools
import os
import sys
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from sources.registry import BENCHMARKS, NAMES, open_dataset
from support import pictures, runs
from support.errors import UserError
from support.flags import non_negative_int


def inspect(dataset, i):
    """Read one item: (pixels of each label, and of IGNORE at the end; what is wrong with it)."""
    count = len(dataset.evaluated) + 1
    try:
        return np.bincount(dataset.load(i)[1].ravel() % count, minlength=count), ""  # -1 is last
    except UserError as e:
        return np.zeros(count, int), str(e)


def check(name, split, args):
    """Read a split, print and write what is in it and what is wrong. Returns if it can be used."""
    dataset = open_dataset(name, args.data_root, split, args.classes)
    print(f"{name}, {split}: {len(dataset)} images from {dataset.source}")
    count = min(args.sample or len(dataset), len(dataset))
    indices = np.linspace(0, len(dataset) - 1, count).astype(int).tolist()
    loader = torch.utils.data.DataLoader(indices, None, num_workers=args.workers,
                                         collate_fn=functools.partial(inspect, dataset))
    counts, errors = zip(*tqdm(loader, "reading", leave=False))
    wrong = [error for error in errors if error]
    good = [i for i, error in zip(indices, errors) if not error]
    percent = 100 * sum(counts) / max(1, np.sum(counts))
    share = dict(zip([*dataset.evaluated, "(ignored)"], percent.tolist()))
    for found in sorted(share, key=share.get, reverse=True)[:15]:
        print(f"{share[found]:7.2f} % of the pixels  {found}")
    absent = [found for found in share if share[found] == 0]
    print(f"{len(absent)} of {len(share)} occur in none of {len(good)} masks: "
          f"{', '.join(absent[:20]) or '-'}")
    out = Path(args.out, f"{name}-{split}".replace("/", "_").replace(":", "-"))
    report = dict(dataset=name, split=split, source=dataset.source, images=len(dataset),
                  read=len(indices), wrong=wrong, warning=dataset.warning, percent_of_pixels=share)
    runs.write_json(report, out / "report.json")
    if good:
        some = good[::max(1, len(good) // 4)][:4]
        pictures.samples(dataset, some).save(out / "samples.png")
    if dataset.warning:
        print(f"warning: {dataset.warning}")
    verdict = "not usable as it is" if wrong else "usable"
    print(*wrong, f"{verdict}; see {out}/report.json and samples.png", sep="\n")
    return not wrong


def main():
    p = argparse.ArgumentParser("python -m sources.check", description=__doc__.splitlines()[0])
    add = p.add_argument
    add("names", nargs="+", metavar="NAME", help=", ".join(NAMES))
    add("--data-root", help="their folder (else $RPMD_DATA, $DETECTRON2_DATASETS or ./datasets)")
    add("--split", choices=("train", "val"), help="default: both")
    add("--classes", help="other names: a file, or comma-separated")
    add("--sample", type=non_negative_int, default=0, help="so many images, evenly spread (all)")
    add("--workers", type=non_negative_int, default=os.cpu_count(), help="processes (one per core)")
    add("--out", default="out/check", help="for the report and the picture (default: out/check)")
    args, usable = p.parse_args(), True
    for name in args.names:
        has = BENCHMARKS[name].expected if name in BENCHMARKS else ("train", "val")
        for split in [args.split] if args.split else has:
            try:
                usable &= check(name, split, args)
            except (UserError, OSError) as e:
                print(f"{name}, {split}: not usable: {e}")
                usable = False
    sys.exit(not usable)


if __name__ == "__main__":
    main()
