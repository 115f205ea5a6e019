"""What the tests share: a tiny segmenter, a small folder dataset, training in this process."""
import multiprocessing
import signal
import sys
from multiprocessing import forkserver
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)  # tests start processes
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # by a script's `pytest &`; children inherit
    signal.signal(signal.SIGINT, signal.default_int_handler)

from model import TINY, build  # noqa: E402
from support import accidents  # noqa: E402

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["train", "pytest"])


def pytest_collection_modifyitems(items):
    """Tests that need the fork server, whose imports take a while, come last."""
    items.sort(key=lambda item: "start" in item.fixturenames)
    if items and "start" in items[-1].fixturenames:
        forkserver.ensure_running()


@pytest.fixture
def tiny():
    torch.manual_seed(0)
    return build("tiny", image_size=64, channels=32)


@pytest.fixture
def folder(tmp_path):
    """A dataset of one's own: 3 classes, 6 training and 3 validation images of 80 x 60, one pixel
    of void in each."""
    root, rng = tmp_path / "my dätä", np.random.default_rng(0)
    colours = np.array([(200, 40, 40), (40, 200, 40), (40, 40, 200)], np.uint8)
    for split, n in (("train", 6), ("val", 3)):
        for kind in ("images", "masks"):
            (root / kind / split).mkdir(parents=True)
        for i in range(n):
            mask = rng.integers(0, 3, (6, 8), dtype=np.uint8).repeat(10, 0).repeat(10, 1)
            image = colours[mask] + rng.integers(0, 30, (60, 80, 3), dtype=np.uint8)
            mask[0, 0] = 255
            Image.fromarray(image).save(root / "images" / split / f"{i}.jpg")
            Image.fromarray(mask).save(root / "masks" / split / f"{i}.png")
    (root / "classes.txt").write_text("red thing\ngreen thing\nblue thing")
    return root


@pytest.fixture
def training(folder, tmp_path, monkeypatch):
    """Trains in this process, a few steps of the tiny model on `folder`: training(name, *flags)
    -> the folder tmp_path/name of the run. What training changes in the process is put back."""
    import evaluate
    import train
    from support import pictures
    handlers = {number: signal.getsignal(number) for number in accidents.SIGNALS}
    views = evaluate.views  # one view is quicker than five
    monkeypatch.setattr(evaluate, "views", lambda image, size, sliding: views(image, size, False))
    # drawing takes half of so small a run; test_train's two processes draw
    monkeypatch.setattr(pictures, "curves", lambda lines, path: path.write_text("a plot"))
    monkeypatch.setattr(evaluate, "examples", lambda path, *_: path.write_text("pictures"))
    monkeypatch.setitem(train.TOY, "log_every", 1)

    def go(name, *flags):
        defaults = (f"--dataset=folder:{folder}", f"--out={tmp_path / name}", "--clip=tiny",
                    "--steps=6", "--tpa-steps=2", "--eval-every=0", "--save-every=2")
        monkeypatch.setitem(train.TOY, "channels", 16)
        monkeypatch.setitem(TINY, "text_cfg", TINY["text_cfg"] | dict(width=32, heads=2))
        monkeypatch.setattr(accidents, "stop_asked", False)
        train.main(train.parse([*defaults, *map(str, flags)]))
        return tmp_path / name

    yield go
    for number, handler in handlers.items():
        signal.signal(number, handler)
