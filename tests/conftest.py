"""What the tests share: the project on the path, a tiny segmenter, pictures of a dataset made on
the spot."""

import functools
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
torch.set_num_threads(min(2, torch.get_num_threads()))
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # by a script's `pytest &`; children inherit
    signal.signal(signal.SIGINT, signal.default_int_handler)

from model import build  # noqa: E402
from support import pictures  # noqa: E402


@pytest.fixture
def tiny():
    torch.manual_seed(0)
    return build("tiny", image_size=64, channels=32)


@pytest.fixture
def folder(tmp_path):
    """A dataset of one's own: 3 classes, 6 training and 3 validation images of 80 x 60, one pixel
    of void in each."""
    root, rng = tmp_path / "my dätä", np.random.default_rng(0)
    for split, n in (("train", 6), ("val", 3)):
        for kind in ("images", "masks"):
            (root / kind / split).mkdir(parents=True)
        for i in range(n):
            mask = np.repeat(np.repeat(rng.integers(0, 3, (6, 8), dtype=np.uint8), 10, 0), 10, 1)
            image = np.array([(200, 40, 40), (40, 200, 40), (40, 40, 200)], np.uint8)[
                mask
            ] + rng.integers(0, 30, (60, 80, 3), dtype=np.uint8)
            mask[0, 0] = 255
            Image.fromarray(image).save(root / "images" / split / f"{i}.jpg")
            Image.fromarray(mask).save(root / "masks" / split / f"{i}.png")
    (root / "classes.txt").write_text("red thing\ngreen thing\nblue thing")
    return root


@pytest.fixture
def no_plots(monkeypatch):
    """Drawing curves takes a third of a small run; test_pictures and test_readme draw them."""
    monkeypatch.setattr(pictures, "curves", lambda lines, path: path.write_text("a plot"))


@functools.cache
def server():
    """The fork server, which lives as long as the tests do; see forkserver.py."""
    env = dict(os.environ, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
    command = [sys.executable, str(ROOT / "tests" / "forkserver.py")]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    return subprocess.Popen(command, cwd=ROOT, env=env, **pipes)


def run(*command, processes=1, check=True, fork=True, timeout=300, cwd=ROOT, env=None):
    """Run one of the project's scripts as a user would; with fork=False in processes of its own, of
    several ones by torchrun. Returns a CompletedProcess."""
    command = list(map(str, command))
    if fork:
        with tempfile.TemporaryDirectory() as folder:
            out, err = Path(folder, "out"), Path(folder, "err")
            job = dict(argv=command, env=env or {}, cwd=str(cwd), processes=processes)
            job.update(out=str(out), err=str(err))
            print(json.dumps(job), file=server().stdin, flush=True)
            if not select.select([server().stdout], [], [], timeout)[0]:
                server().kill()
                server.cache_clear()
                raise TimeoutError(f"{command} takes more than {timeout} seconds")
            status = int(server().stdout.readline())
            done = subprocess.CompletedProcess(command, status, out.read_text(), err.read_text())
    else:
        launcher = []
        if processes > 1:
            launcher = ["-m", "torch.distributed.run", "--standalone"]
            launcher.append(f"--nproc_per_node={processes}")
        env = dict(os.environ, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="", **(env or {}))
        done = subprocess.run(
            [sys.executable, *launcher, *command],
            cwd=cwd,
            env=env,
            text=True,
            capture_output=True,
            timeout=timeout,
        )
    assert not check or done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done


def visible(folder):
    """The names of a folder's files, without hidden ones."""
    return {path.name for path in folder.iterdir() if not path.name.startswith(".")}
