"""The embedded toy world: scenes with pixel labels. `toy` is world 0; another number (`toy:3`)
splits the names in another way, and has other scenes and another CLIP (see tiny_clip.py).

A scene is a textured background with one to three objects. An object's class is a colour and a fill
pattern ("striped red"); its shape does not matter. Segmentation training shows the 24 combinations
of six colours and four patterns. The other 24 have a colour or a pattern that only the CLIP has
seen, and that was told which names an image shows, but not where.
"""
import numpy as np
from PIL import Image

from losses import IGNORE

SIZE = 64
COLOURS = {"red": (220, 40, 40), "orange": (250, 140, 20), "yellow": (240, 225, 50),
           "green": (40, 170, 60), "cyan": (50, 205, 215), "blue": (50, 80, 220),
           "purple": (140, 50, 190), "pink": (245, 140, 190)}
PATTERNS = ("plain", "banded", "striped", "checkered", "dotted", "diagonal")
BACKGROUNDS = {"grass": (95, 135, 75), "sand": (200, 180, 140), "water": (95, 130, 160),
               "brick": (150, 105, 90)}
OBJECTS = [f"{pattern} {colour}" for colour in COLOURS for pattern in PATTERNS]
NAMES = OBJECTS + list(BACKGROUNDS)  # 48 objects, then 4 backgrounds: the index is the label
SPLIT_SIZES = {"train": 256, "val": 480}


def seen_objects(seed):
    """The 24 objects that a world's training shows: all pairs of 6 colours and 4 patterns."""
    rng = np.random.default_rng((seed, 0))
    colours, patterns = rng.permutation(8)[:6], rng.permutation(6)[:4]
    return sorted((6 * colours[:, None] + patterns).ravel().tolist())


def draw_pattern(rng, name, y, x):
    """Where a pattern is dark: bool [h,w], with a random period (7 to 10 pixels) and phase."""
    period, lean = rng.uniform(7, 10), rng.choice([-1, 1])
    y, x = y + rng.uniform(0, period), x + rng.uniform(0, period)
    if name == "dotted":
        return (y / period % 1 - 0.5) ** 2 + (x / period % 1 - 0.5) ** 2 < 0.3 ** 2
    across, along, diagonal = (t / period % 1 < 0.5 for t in (y, x, (x + lean * y) / np.sqrt(2)))
    return {"plain": np.zeros_like(across), "banded": across, "striped": along,
            "checkered": across ^ along, "diagonal": diagonal}[name]


def draw_background(rng, name, y, x):
    """Brightness of a background's texture, [h,w] around 1."""
    a, b = rng.uniform(0, 7, 2)
    if name in ("grass", "sand"):
        return 1 + {"grass": 0.25, "sand": 0.06}[name] * rng.standard_normal(x.shape)
    if name == "water":
        return 1 + 0.15 * np.sin(0.8 * y + 1.5 * np.sin(0.15 * x + a) + b)
    shifted = x + b + 5 * ((y + a) // 6 % 2)  # every other row of bricks
    return np.where(((y + a) % 6 < 1.2) | (shifted % 10 < 1.2), 1.35, 0.95)


def inside(rng, y, x, radius):
    """The pixels of a randomly placed, randomly shaped outline: bool [h,w]."""
    cy, cx = rng.uniform(0.2, 0.8, 2) * y.shape
    angle, shape = rng.uniform(0, 2 * np.pi), rng.integers(4)
    u = np.cos(angle) * (x - cx) + np.sin(angle) * (y - cy)
    v = np.cos(angle) * (y - cy) - np.sin(angle) * (x - cx)
    disc, ellipse = u ** 2 + v ** 2, (u / 1.25) ** 2 + (v / 0.8) ** 2
    square = np.maximum(abs(u), abs(v)) < 0.88 * radius
    triangle = np.maximum(abs(u) * 0.87 + v * 0.5, -v) < 0.72 * radius
    return (disc < radius ** 2, square, triangle, ellipse < radius ** 2)[shape]


def draw(rng, background, objects, radii, size=SIZE):
    """A scene: uint8 [size,size,3], int64 pixel labels [size,size]. Later objects hide others."""
    y, x = np.mgrid[:size, :size].astype(float)
    name, colour = list(BACKGROUNDS.items())[background]
    image = draw_background(rng, name, y, x)[..., None] * np.array(colour, float)
    pixel_labels = np.full((size, size), len(OBJECTS) + background, np.int64)
    for label, radius in zip(objects, radii):
        pattern, colour = OBJECTS[label].split()
        fill = np.array(COLOURS[colour], float) + rng.normal(0, 12, 3)
        fill = np.where(draw_pattern(rng, pattern, y, x)[..., None], 0.35 * fill, fill)
        where = inside(rng, y, x, radius)
        image[where], pixel_labels[where] = fill[where], label
    right, down = rng.uniform(-1, 1, 2)
    light = 1 + 0.15 * (right * (x / size - 0.5) + down * (y / size - 0.5))
    image = image * light[..., None] * rng.uniform(0.85, 1.1) + rng.normal(0, 8, image.shape)
    return image.clip(0, 255).astype(np.uint8), pixel_labels


class Scenes:
    """A split of a world, one of `data.open_dataset`'s datasets: "train" names and shows the seen
    objects and the backgrounds, "val" all."""
    source = "sources/toy.py"

    def __init__(self, seed, split):
        self.seed, self.split = seed, split
        self.files = [f"toy:{seed}/{split}"]
        self.objects = seen_objects(seed) if split == "train" else list(range(len(OBJECTS)))
        labels = self.objects + list(range(len(OBJECTS), len(NAMES)))
        self.names = [NAMES[i] for i in labels]
        self.lookup = np.full(len(NAMES), IGNORE)
        self.lookup[labels] = range(len(labels))

    def __len__(self):
        return SPLIT_SIZES[self.split]

    def load(self, i):
        rng = np.random.default_rng((self.seed, 1 + list(SPLIT_SIZES).index(self.split), i))
        objects = rng.choice(self.objects, rng.integers(1, 4))
        image, labels = draw(rng, rng.integers(4), objects, rng.uniform(14, 22, len(objects)))
        return Image.fromarray(image), self.lookup[labels], f"toy:{self.seed}/{self.split}/{i}"
