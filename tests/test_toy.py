"""The toy world is a function of its seed and split; the tiny CLIP is pre-trained once."""
import numpy as np
import pytest
import torch

from data import open_dataset
from sources import tiny_clip, toy


def test_worlds_differ_and_repeat():
    a, b, other = (open_dataset(name, None, "val") for name in ("toy", "toy:0", "toy:1"))
    (image, labels, path), again = a.load(7), b.load(7)
    assert np.array_equal(image, again[0]) and np.array_equal(labels, again[1])
    assert not np.array_equal(image, other.load(7)[0]) and path == "toy:0/val/7"
    assert toy.seen_objects(0) != toy.seen_objects(1)
    assert a.fingerprint == b.fingerprint != other.fingerprint


def test_what_is_drawn_stays_what_the_published_figures_were_measured_on():
    image, labels, _ = open_dataset("toy", None, "train").load(3)
    views = [view(np.random.default_rng(0))[0] for view in (tiny_clip.closeup, tiny_clip.scene)]
    sums = [int(np.sum(drawn)) for drawn in (image, labels, *views)]
    assert sums == pytest.approx([1512497, 106092, 391259, 1549078], rel=1e-4)


def test_training_scenes_show_seen_objects_only():
    train, val = (open_dataset("toy", None, split) for split in ("train", "val"))
    seen = [toy.NAMES[i] for i in toy.seen_objects(0)]
    assert train.names == seen + list(toy.BACKGROUNDS) and val.names == toy.NAMES
    for dataset in (train, val):
        found = set()
        for i in range(0, len(dataset), 3):
            image, labels, _ = dataset.load(i)
            assert image.size == labels.shape == (64, 64) and labels.dtype == np.int64
            found |= set(labels.flat)
        assert found == set(range(len(dataset.names)))


def test_contrastive_loss_by_hand():
    images, texts = torch.eye(2), torch.eye(2)
    present = torch.tensor([[True, False], [True, True]])
    b = np.log(np.exp([0, 1]).sum())
    a = b - 1  # -log p of the right one of two
    to_text = (a + (b + (b - 1)) / 2) / 2
    to_image = ((a + (a + 1)) / 2 + a) / 2
    loss = tiny_clip.contrastive_loss(images, texts, present, 1.0).item()
    assert loss == pytest.approx((to_text + to_image) / 2, rel=1e-5)


def test_pretraining_repeats_itself():
    first, again, other = (tiny_clip.pretrain(seed, (1, 1), (4, 2)) for seed in (0, 0, 1))
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert not torch.equal(first["visual.proj"], other["visual.proj"])


def test_cache(tmp_path, monkeypatch):
    """A CLIP is pre-trained once for each seed, and anew when a recipe's file changes."""
    monkeypatch.setenv("RPMD_CACHE", str(tmp_path / "a" / "b"))
    seeds = []
    monkeypatch.setattr(tiny_clip, "pretrain", lambda seed: seeds.append(seed) or {"seed": seed})
    path = tiny_clip.prepare("toy:3", 0)
    assert torch.load(path, weights_only=True)["seed"] == 3 and path.parent == tmp_path / "a" / "b"
    assert path == tiny_clip.prepare("toy:3", 0) and list(path.parent.iterdir()) == [path]
    assert tiny_clip.prepare("toy:4", 1) != path and seeds == [3]  # the first process does it
    assert tiny_clip.prepare("folder:a", 0) == tiny_clip.prepare("toy", 0) and seeds == [3, 0]
    changed = tmp_path / "toy.py"
    changed.write_text("# another recipe")
    monkeypatch.setattr(toy, "__file__", str(changed))
    assert tiny_clip.prepare("toy:3", 0) != path and seeds == [3, 0, 3]
