"""The toy world: a function of its seed, split as promised. The tiny CLIP that learns from the
names of what pictures hold, and what it depends on."""

import numpy as np
import pytest
import torch
from PIL import Image

from model import TINY
from sources import tiny_clip, toy
from sources.registry import open_dataset
from support.errors import UserError


@pytest.mark.parametrize("seed", range(20))
def test_an_unseen_name_holds_a_word_that_training_never_shows(seed):
    seen = {toy.OBJECTS[i] for i in toy.seen_objects(seed)}
    words = {word for name in seen for word in name.split()}
    assert len(seen) == 24 and len(words & set(toy.COLOURS)) == 6
    assert len(words & set(toy.PATTERNS)) == 4
    assert all(set(name.split()) - words for name in set(toy.OBJECTS) - seen)


def test_worlds_differ_and_repeat():
    a, b, other = (open_dataset(name, None, "val") for name in ("toy", "toy:0", "toy:1"))
    image, labels, path = a.load(7)
    assert np.array_equal(np.asarray(image), np.asarray(b.load(7)[0])) and path == "toy:0/val/7"
    assert np.array_equal(labels, b.load(7)[1])
    assert not np.array_equal(np.asarray(image), np.asarray(other.load(7)[0]))
    assert toy.seen_objects(0) != toy.seen_objects(1)


def test_training_scenes_show_seen_objects_only():
    train, val = (open_dataset("toy", None, split) for split in ("train", "val"))
    seen = [toy.NAMES[i] for i in toy.seen_objects(0)]
    assert train.names == seen + list(toy.BACKGROUNDS) and val.names == toy.NAMES
    assert len(train.names) == 28 and len(val.names) == 52
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
    red, green, _ = np.median(image[where], 0)
    assert red > 150 > 80 > green and np.median(image[~where][:, 1]) > 100


def test_contrastive_loss_by_hand():
    images, texts = torch.eye(2), torch.eye(2)
    present = torch.tensor([[True, False], [True, True]])
    b = np.log(np.exp([0, 1]).sum())
    a = b - 1  # -log p of the right one of two
    to_text = (a + (b + (b - 1)) / 2) / 2
    to_image = ((a + (a + 1)) / 2 + a) / 2
    loss = tiny_clip.contrastive_loss(images, texts, present, 1.0).item()
    assert loss == pytest.approx((to_text + to_image) / 2, rel=1e-5)


SHORT = dict(steps=(3, 2), batches=(8, 4), progress=False)


def test_pretraining_repeats_itself():
    """A few steps give the same weights twice, and others for another seed."""
    first, again, other = (tiny_clip.pretrain(seed, **SHORT) for seed in (0, 0, 1))
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert not torch.equal(first["visual.proj"], other["visual.proj"])
    assert first["visual.positional_embedding"].shape == (65, TINY["vision_cfg"]["width"])


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache of its own, in which pre-training puts nothing but the seed."""
    monkeypatch.setenv("RPMD_CACHE", str(tmp_path / "a" / "b"))
    pretrained = []

    def pretrain(seed, names, views, progress):
        pretrained.append(seed)
        return {"seed": torch.tensor(seed)}

    monkeypatch.setattr(tiny_clip, "pretrain", pretrain)
    return pretrained


def test_cache(cache, tmp_path):
    path = tiny_clip.clip_checkpoint(3)
    assert torch.load(path, weights_only=True)["seed"] == 3 and path.parent == tmp_path / "a" / "b"
    assert tiny_clip.clip_checkpoint(3) == path and list(path.parent.iterdir()) == [path]
    assert cache == [3]  # found, not trained again
    assert tiny_clip.clip_checkpoint(4) != path and cache == [3, 4]


def lighter_bricks(brightness):
    return np.where(brightness == 0.95, 0.97, brightness)


@pytest.mark.parametrize(
    "what, change",
    [
        ("draw_pattern", np.logical_not),
        ("inside", np.logical_not),
        ("draw_background", lighter_bricks),
    ],
)
def test_another_way_to_draw_gets_another_clip(cache, monkeypatch, what, change):
    path, draw = tiny_clip.clip_checkpoint(0), getattr(toy, what)
    monkeypatch.setattr(toy, what, lambda *args: change(draw(*args)))
    assert tiny_clip.clip_checkpoint(0) != path and cache == [0, 0]


def test_what_a_clip_does_not_depend_on_keeps_it(cache, monkeypatch):
    """But its own sizes are what it depends on, and every colour is."""
    path = tiny_clip.clip_checkpoint(0)
    monkeypatch.setattr(toy, "SPLIT_SIZES", {"train": 1, "val": 2})
    monkeypatch.setattr(toy, "__doc__", "another text")
    assert tiny_clip.clip_checkpoint(0) == path and cache == [0]
    for name, colour in toy.COLOURS.items():
        with monkeypatch.context() as m:
            m.setitem(toy.COLOURS, name, (*colour[:2], colour[2] + 9))
            assert tiny_clip.clip_checkpoint(0) != path
    monkeypatch.setattr(tiny_clip, "TINY", {**TINY, "embed_dim": 8})
    assert tiny_clip.clip_checkpoint(0) != path


def test_a_clip_of_crops_depends_on_the_pictures(cache, folder):
    def path(classes=None, seed=0):
        dataset = open_dataset(f"folder:{folder}", split="train", classes=classes)
        return tiny_clip.clip_checkpoint(seed, dataset)

    first = path()
    assert path() == first and cache == [0] and first.name.startswith("crops-clip-0-")
    assert path("a, b, c") != first and path(seed=1) != first
    picture = folder / "images/train/3.jpg"
    picture.write_bytes((folder / "images/train/4.jpg").read_bytes())
    assert path() != first
    for mask in (folder / "masks/train").iterdir():
        Image.new("L", (80, 60), 255).save(mask)
    with pytest.raises(UserError, match="--pretrained crops: a hundred crops of .* show nothing"):
        path()
