"""Datasets by name: a benchmark (see benchmarks.py), folder:PATH for pictures of one's own, toy or
toy:N. Whatever is wrong with one raises UserError, a sentence that names the path or the flag.
"""
import collections
import os
import re
from pathlib import Path

import numpy as np

from losses import IGNORE
from sources.benchmarks import BENCHMARKS, CLASSES, STRANGE, Files, Layout, open_benchmark
from sources.toy import Scenes
from support.errors import UserError, reading

NAMES = (*BENCHMARKS, "folder:PATH", "toy", "toy:N")
REPORTED = ("ade20k-847", "pc-459", "ade20k-150", "pc-59", "voc-20", "voc-20b")  # by the field
NO_NAME = re.compile(r"/|\.\w+$|^[!-@[-`{-~\s]+$")  # a path, or nothing but digits and punctuation


def open_dataset(name, root=None, split="val", classes=None, unseen=None):
    """A dataset by name; root is the folder that holds the benchmarks, see `data_root`.

    It has `len()`, `names` (its vocabulary), `evaluated` (the classes that are scored: the names,
    except in voc-20b), `source` (in words, what is read), `warning` (of images that are missing, or
    "") and `load(i) -> (PIL RGB image, int64 labels [H,W] with IGNORE, path)`.
    classes: other names, as many as the dataset has: a list, a file, or comma-separated text.
    unseen: names to hold out, likewise: the vocabulary lacks them, their pixels carry no label.
    """
    if split not in ("train", "val"):
        raise UserError(f"--split {split}: the splits are train and val")
    kind, _, where = name.partition(":")
    if kind == "toy":
        seed = "0" if name == "toy" else where
        if not seed.isdecimal() or len(seed) > 9:
            raise UserError(f"--dataset {name}: a world is toy or toy:N, N being a whole number "
                            "of at most nine digits")
        dataset = Scenes(int(seed), split)
    elif kind == "folder":
        if not where:
            raise UserError(f"--dataset {name} needs the path of a folder, as in folder:PATH")
        folder = Path(where).expanduser()
        names = read_names(folder / "classes.txt")
        ignored = [value for value in (255, 65535) if value >= len(names)]
        layout = Layout("images/{split}/*", "masks/{split}/*", range(len(names)), ignored)
        dataset = Files(folder, split, names, layout)
    elif name in BENCHMARKS:
        names = read_names(CLASSES / f"{name}.txt")
        dataset = open_benchmark(name, data_root(root), split, names)
    else:
        raise UserError(f"--dataset {name}: known are {', '.join(NAMES)}")
    if classes is not None:
        names, needed = read_names(classes), len(dataset.names)
        if len(names) != needed and not (name == "voc-20b" and len(names) > 20):
            raise UserError(f"--classes has {len(names)} names, and {name} needs {needed}")
        dataset.names = names
    if unseen:
        hold_out(dataset, read_names(unseen, "--unseen"))
    dataset.evaluated = dataset.names
    if name == "voc-20b":  # its last label stands for all names from the 21st on
        dataset.evaluated = [*dataset.names[:20], "background"]
    return dataset


def data_root(root=None):
    """The folder that holds the benchmarks: root, or what the environment says, or ./datasets."""
    variables = os.environ.get("RPMD_DATA") or os.environ.get("DETECTRON2_DATASETS")
    return Path(root or variables or "datasets")


def hold_out(dataset, unseen):
    """Take names out of a dataset's vocabulary, and their labels out of its masks."""
    strange = [name for name in unseen if name not in dataset.names]
    if strange:
        raise UserError(f"--unseen {strange[0]}: the dataset has no such name, but "
                        f"{', '.join(dataset.names)[:300]}")
    seen = [i for i, name in enumerate(dataset.names) if name not in unseen]
    if not seen:
        raise UserError("--unseen holds out every name of the dataset: nothing is left to train on")
    rank = np.full(len(dataset.names) - STRANGE, IGNORE)  # -1 and -2 count from the end
    rank[seen] = range(len(seen))
    rank[STRANGE] = STRANGE
    dataset.lookup, dataset.names = rank[dataset.lookup], [dataset.names[i] for i in seen]


def read_names(classes, flag="--classes"):
    """Class names: a list of them, a file (one a line, what follows a tab if there is one), or
    comma-separated text, in which a lone name must not look like a path."""
    where, unit, names = flag, "item", classes
    if isinstance(classes, str):
        names = [name.strip() for name in classes.split(",")]
        if os.path.isfile(classes) or classes.endswith(".txt"):
            classes = Path(classes)
        elif flag == "--classes" and len(names) == 1 and NO_NAME.search(names[0]):
            raise UserError(f"{flag} {names[0][:100]!r} is hardly the name of a class: was a file "
                            "meant, which is not there?")
    if isinstance(classes, Path):
        where, unit = classes, "line"
        with reading(classes, "class names, one a line"):
            if os.path.getsize(classes) > 1e7:
                raise ValueError("it has more than 10 MB")
            lines = classes.read_text(encoding="utf-8-sig").rstrip().splitlines()
        names = [line.split("\t")[-1].strip() for line in lines]
    if not names:
        raise UserError(f"{where} holds no class name")
    if len(names) > 65_535:
        raise UserError(f"{where} holds {len(names)} names, more than masks of 16 bits tell apart")
    if "" in names:
        raise UserError(f"{where} has no name on {unit} {names.index('') + 1}")
    twice = [name for name, count in collections.Counter(names).items() if count > 1]
    if twice:
        raise UserError(f"{where} names {twice[0][:100]!r} twice")
    return list(names)
