"""The embedded toy world: scenes with pixel labels, and a tiny CLIP pre-trained on the spot from image-level captions.

A scene is a textured background with one to three objects. An object's class is a colour and a fill pattern ("striped
red"), so names compose from two words and all 48 combinations can be recognised by someone who has learnt the words; its
outline means nothing. Eight combinations, in which every colour and every pattern occurs, are seen in segmentation
training; the other 40 are only ever seen by CLIP, which knows which names an image holds but not where.

`toy` is world 0, `toy:3` world 3: another split of the names, other scenes, another CLIP.
"""
import functools
import hashlib
import math
import os
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

import model as segmenter
from losses import IGNORE

SIZE = 64
COLOURS = {"red": (220, 40, 40), "orange": (250, 140, 20), "yellow": (240, 225, 50), "green": (40, 170, 60),
           "cyan": (50, 205, 215), "blue": (50, 80, 220), "purple": (140, 50, 190), "pink": (245, 140, 190)}
PATTERNS = ("plain", "banded", "striped", "checkered", "dotted", "diagonal")
BACKGROUNDS = {"grass": (95, 135, 75), "sand": (200, 180, 140), "water": (95, 130, 160), "brick": (150, 105, 90)}
OBJECTS = [f"{pattern} {colour}" for colour in COLOURS for pattern in PATTERNS]
NAMES = OBJECTS + list(BACKGROUNDS)          # 48 objects, then 4 backgrounds: the index is the label
SPLIT_SIZES = {"train": 32, "val": 160}


def seen_objects(seed):
    """The 8 objects of world `seed` that segmentation training shows: every colour once, every pattern at least once."""
    rng = np.random.default_rng((seed, 0))
    patterns = np.concatenate([rng.permutation(6), rng.choice(6, 2, replace=False)])
    return sorted(int(colour * 6 + pattern) for colour, pattern in zip(rng.permutation(8), patterns))


def draw_pattern(rng, name, y, x):
    """Where the darker tone of a pattern lies: bool [h,w], with a random period (7 to 10 pixels) and phase."""
    period, lean = rng.uniform(7, 10), rng.choice([-1, 1])
    y, x = y + rng.uniform(0, period), x + rng.uniform(0, period)
    wave = lambda t: (t / period) % 1 < 0.5
    return {"plain": lambda: np.zeros_like(x, dtype=bool), "banded": lambda: wave(y), "striped": lambda: wave(x),
            "checkered": lambda: wave(y) ^ wave(x), "diagonal": lambda: wave((x + lean * y) / math.sqrt(2)),
            "dotted": lambda: ((y / period % 1 - 0.5) ** 2 + (x / period % 1 - 0.5) ** 2) < 0.3 ** 2}[name]()


def draw_background(rng, name, y, x):
    """Brightness of a background's texture, [h,w] around 1."""
    a, b = rng.uniform(0, 7, 2)
    return {"grass": lambda: 1 + 0.25 * rng.standard_normal(x.shape),
            "sand": lambda: 1 + 0.06 * rng.standard_normal(x.shape),
            "water": lambda: 1 + 0.15 * np.sin(0.8 * y + 1.5 * np.sin(0.15 * x + a) + b),
            "brick": lambda: np.where(((y + a) % 6 < 1.2) | ((x + b + 5 * ((y + a) // 6 % 2)) % 10 < 1.2), 1.35, 0.95)}[name]()


def inside(rng, y, x, radius):
    """The pixels of a randomly placed, randomly shaped outline: bool [h,w]."""
    cy, cx = rng.uniform(0.2, 0.8, 2) * y.shape
    angle, shape = rng.uniform(0, 2 * math.pi), rng.integers(4)
    u, v = np.cos(angle) * (x - cx) + np.sin(angle) * (y - cy), np.cos(angle) * (y - cy) - np.sin(angle) * (x - cx)
    if shape == 0:
        return u ** 2 + v ** 2 < radius ** 2                                               # disc
    if shape == 1:
        return np.maximum(abs(u), abs(v)) < 0.88 * radius                                  # square
    if shape == 2:
        return np.maximum(abs(u) * 0.87 + v * 0.5, -v) < 0.72 * radius                     # triangle
    return (u / 1.25) ** 2 + (v / 0.8) ** 2 < radius ** 2                                  # ellipse


def draw(rng, background, objects, radii, size=SIZE):
    """A scene: uint8 [size,size,3] and int64 labels [size,size]. Later objects hide earlier ones."""
    y, x = np.mgrid[:size, :size].astype(float)
    names = list(BACKGROUNDS)
    image = draw_background(rng, names[background], y, x)[..., None] * np.array(BACKGROUNDS[names[background]], float)
    labels = np.full((size, size), len(OBJECTS) + background, np.int64)
    for obj, radius in zip(objects, radii):
        pattern, colour = OBJECTS[obj].split()
        fill = np.array(COLOURS[colour], float) + rng.normal(0, 12, 3)
        fill = np.where(draw_pattern(rng, pattern, y, x)[..., None], 0.35 * fill, fill)
        where = inside(rng, y, x, radius)
        image[where], labels[where] = fill[where], obj
    light = 1 + 0.15 * (rng.uniform(-1, 1) * (x / size - 0.5) + rng.uniform(-1, 1) * (y / size - 0.5))
    image = image * light[..., None] * rng.uniform(0.85, 1.1) + rng.normal(0, 8, image.shape)
    return image.clip(0, 255).astype(np.uint8), labels


class Scenes:
    """Split "train" (seen objects only) or "val" (all) of a world, with the surface of every data.py dataset.

    Training names are the seen objects and the backgrounds; validation names are all 52.
    """

    def __init__(self, seed, split):
        self.seed, self.split = seed, split
        self.objects = seen_objects(seed) if split == "train" else list(range(len(OBJECTS)))
        self.kept = self.objects + list(range(len(OBJECTS), len(NAMES)))
        self.names = [NAMES[i] for i in self.kept]
        self.source = "toy.py"

    @property
    def evaluated(self):
        return self.names

    def __len__(self):
        return SPLIT_SIZES[self.split]

    def load(self, i):
        """(PIL image, int64 labels [64,64], "toy:SEED/SPLIT/i")."""
        rng = np.random.default_rng((self.seed, 1 + list(SPLIT_SIZES).index(self.split), i))
        objects = rng.choice(self.objects, rng.integers(1, 4))
        image, labels = draw(rng, rng.integers(4), objects, rng.uniform(14, 22, len(objects)))
        return Image.fromarray(image), np.searchsorted(self.kept, labels), f"toy:{self.seed}/{self.split}/{i}"


# The tiny CLIP. It learns from images and the names of what they hold, nothing about where. 85 % of its images are close-ups,
# most of them of a single thing, which comes near to labels for patches: kinder than the web was to CLIP.

def closeup(rng):
    """A 32 x 32 view: half of them of one object alone, a fifth of background alone, the rest of both. (image, labels)"""
    kind = rng.uniform()
    radius = [80] if kind < 0.5 else [] if kind < 0.7 else [rng.uniform(12, 18)]
    return draw(rng, rng.integers(4), rng.integers(48, size=len(radius)), radius, SIZE // 2)


def scene(rng):
    n = rng.integers(1, 4)
    return draw(rng, rng.integers(4), rng.integers(48, size=n), rng.uniform(14, 22, n))


def crop_views(dataset):
    """The two kinds of views that `pretrain` takes, of a dataset's pictures: square crops, whose names are those that lie
    at some of 6 x 6 points of the crop."""
    @functools.lru_cache(256)
    def load(i):                                                                           # shrunk: all of it stays in memory
        image, labels, _ = dataset.load(i)
        width, height = (max(1, round(side * min(1, 430 / min(image.size)))) for side in image.size)
        rows, columns = ((np.arange(n) + 0.5) * old / n for n, old in ((height, image.height), (width, image.width)))
        return image.resize((width, height)), labels[rows.astype(int)[:, None], columns.astype(int)].astype(np.int32)

    def crop(rng, side, smallest):
        for _ in range(100):
            image, labels = load(int(rng.integers(len(dataset))))
            size = rng.uniform(smallest, 1) * min(image.size)
            left, top = rng.uniform(0, image.width - size), rng.uniform(0, image.height - size)
            points = (np.arange(6) + 0.5) * size / 6
            here = labels[(top + points).astype(int)[:, None], (left + points).astype(int)]
            if (here != IGNORE).any():
                box = (left, top, left + size, top + size)
                return np.asarray(image.resize((side, side), Image.Resampling.BILINEAR, box)), here
        raise ValueError(f"--pretrained crops: a hundred crops of {dataset.source} show nothing that has a label")

    return lambda rng: crop(rng, SIZE // 2, 0.15), lambda rng: crop(rng, SIZE, 0.5)


def pooled_features(visual, images, offset):
    """open_clip's image embedding for views smaller than the model's: tokens take a window of the position grid."""
    x = visual.conv1(images)                                                               # [B,width,h,w]
    (h, w), side = x.shape[2:], visual.grid_size[0]
    position = visual.positional_embedding[1:].unflatten(0, (side, side))[offset[0]:offset[0] + h, offset[1]:offset[1] + w]
    x = x.flatten(2).transpose(1, 2) + position.flatten(0, 1)
    first = (visual.class_embedding + visual.positional_embedding[0]).expand(len(x), 1, -1)
    x = visual.ln_post(visual.transformer(visual.ln_pre(torch.cat([first, x], 1))))
    return F.normalize(x[:, 1:].mean(1) @ visual.proj, dim=-1)                             # [B,D]


def contrastive_loss(images, texts, present, scale):
    """InfoNCE both ways, with several right answers. images [B,D], texts [K,D], present bool [B,K]."""
    logits, present = scale * images @ texts.T, present.float()
    to_text = -(logits.log_softmax(1) * present / present.sum(1, keepdim=True)).sum(1).mean()
    used = present.sum(0) > 0
    to_image = -(logits.log_softmax(0) * present / present.sum(0).clamp(min=1)).sum(0)[used].mean()
    return (to_text + to_image) / 2


def pretrain(seed, names=NAMES, views=(closeup, scene), steps=(220, 80), batches=(192, 96), lr=1e-3, progress=True):
    """The state dict of a tiny CLIP (open_clip's own names), pre-trained for world `seed`. Deterministic per seed.

    views: two functions of a random generator that draw a picture, first of 32 x 32 and then of 64 x 64 pixels, and labels.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        clip = open_clip.model.CLIP(**segmenter.TINY)
    tokens = segmenter.tokenize(names, clip.context_length)
    tokens = F.pad(tokens, (0, clip.context_length - tokens.shape[1]))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD))
    optimiser = torch.optim.AdamW(clip.parameters(), lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, sum(steps))
    rng = np.random.default_rng((seed, 3))
    bar = tqdm(range(sum(steps)), "pre-training the tiny CLIP", disable=not progress)
    for step in bar:
        make, n = (views[0], batches[0]) if step < steps[0] else (views[1], batches[1])
        images, labels = zip(*(make(rng) for _ in range(n)))
        present = torch.stack([torch.from_numpy(np.bincount(l[l != IGNORE], minlength=len(names)) > 0) for l in labels])
        images = (torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 255 - mean) / std
        room = (SIZE - images.shape[-1]) // clip.visual.patch_size[0]
        offset = rng.integers(room + 1, size=2)
        with torch.autocast("cpu", torch.bfloat16):
            features = pooled_features(clip.visual, images, offset)
            texts = clip.encode_text(tokens, normalize=True)
        loss = contrastive_loss(features.float(), texts.float(), present, clip.logit_scale.exp().clamp(max=100))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.2f}")
    return clip.state_dict()


def cache_folder():
    """$RPMD_CACHE, or rpmd/ in the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "rpmd"
    return Path(os.environ.get("RPMD_CACHE", default))


def clip_checkpoint(seed, dataset=None, progress=True):
    """Path of the tiny CLIP of world `seed`, or of crops of a dataset's pictures and the names of what they hold; pre-trained
    first if need be. An edited toy.py gets a new one."""
    names, views, kind = (NAMES, (closeup, scene), "toy") if dataset is None else (dataset.names, crop_views(dataset), "crops")
    about = [segmenter.TINY] if dataset is None else \
        [segmenter.TINY, str(Path(dataset.load(0)[2]).resolve()), len(dataset), dataset.names]
    recipe = hashlib.sha256(Path(__file__).read_bytes() + "".join(map(repr, about)).encode()).hexdigest()[:12]
    path = cache_folder() / f"{kind}-clip-{seed}-{recipe}.pt"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        state = pretrain(seed, names, views, progress=progress)
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        torch.save(state, temporary)
        temporary.replace(path)
    return path
