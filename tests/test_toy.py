"""The toy world: a function of its seed, split as promised, and a CLIP that learns from captions."""
import numpy as np
import pytest
import torch

import data
import toy
from model import TINY


@pytest.mark.parametrize("seed", range(20))
def test_seen_objects_hold_every_word(seed):
    seen = [toy.OBJECTS[i].split() for i in toy.seen_objects(seed)]
    assert len(seen) == 8 and {c for _, c in seen} == set(toy.COLOURS) and {p for p, _ in seen} == set(toy.PATTERNS)


def test_worlds_differ_and_repeat():
    a, b, other = (data.open_dataset(name, None, "val") for name in ("toy", "toy:0", "toy:1"))
    image, labels, path = a.load(7)
    assert np.array_equal(np.asarray(image), np.asarray(b.load(7)[0])) and np.array_equal(labels, b.load(7)[1]) and path == "toy:0/val/7"
    assert not np.array_equal(np.asarray(image), np.asarray(other.load(7)[0]))
    assert toy.seen_objects(0) != toy.seen_objects(1)


def test_training_scenes_show_seen_objects_only():
    train, val = (data.open_dataset("toy", None, split) for split in ("train", "val"))
    assert train.names == [toy.NAMES[i] for i in toy.seen_objects(0)] + list(toy.BACKGROUNDS) and val.names == toy.NAMES
    assert len(train.names) == 12 and len(val.names) == 52
    found = {"train": set(), "val": set()}
    for dataset in (train, val):
        for i in range(len(dataset)):
            image, labels, _ = dataset.load(i)
            assert image.size == (64, 64) and labels.shape == (64, 64) and labels.dtype == np.int64
            found[dataset.split] |= {dataset.names[k] for k in np.unique(labels)}
    assert found["train"] == set(train.names) and found["val"] == set(toy.NAMES)


def test_labels_lie_where_things_are():
    """A plain red disc: its pixels are red, the others are the background's."""
    rng = np.random.default_rng(0)
    image, labels = toy.draw(rng, 0, [toy.OBJECTS.index("plain red")], [20])
    where = labels == toy.OBJECTS.index("plain red")
    assert 0.1 < where.mean() < 0.6 and set(np.unique(labels)) == {0, 48}
    assert np.median(image[where][:, 0]) > 150 > 80 > np.median(image[where][:, 1]) and np.median(image[~where][:, 1]) > 100


def test_contrastive_loss_by_hand():
    images, texts = torch.eye(2), torch.eye(2)
    present = torch.tensor([[True, False], [True, True]])
    a, b = np.log(np.exp([1, 0]).sum()) - 1, np.log(np.exp([0, 1]).sum())                  # -log p of the right / of either
    to_text = (a + (b + (b - 1)) / 2) / 2
    to_image = ((a + (a + 1)) / 2 + a) / 2
    assert toy.contrastive_loss(images, texts, present, 1.0).item() == pytest.approx((to_text + to_image) / 2, rel=1e-5)


def test_pretraining_repeats_itself():
    """A dozen steps give the same weights twice, and others for another seed."""
    kwargs = dict(steps=(10, 2), batches=(24, 8), progress=False)
    first, again, other = toy.pretrain(0, **kwargs), toy.pretrain(0, **kwargs), toy.pretrain(1, **kwargs)
    assert all(torch.equal(first[k], again[k]) for k in first) and not torch.equal(first["visual.proj"], other["visual.proj"])
    assert first["visual.positional_embedding"].shape == (65, TINY["vision_cfg"]["width"])


def test_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RPMD_CACHE", str(tmp_path / "a" / "b"))
    monkeypatch.setattr(toy, "pretrain", lambda seed, names, views, progress: {"seed": torch.tensor(seed)})
    path = toy.clip_checkpoint(3)
    assert torch.load(path, weights_only=True)["seed"] == 3 and path.parent == tmp_path / "a" / "b"
    monkeypatch.setattr(toy, "pretrain", None)                                             # found, not trained again
    assert toy.clip_checkpoint(3) == path and len(list(path.parent.iterdir())) == 1
