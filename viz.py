"""Every picture the project draws. Nothing here computes a result."""
import colorsys
import hashlib
import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from losses import IGNORE

VOID = (0, 0, 0)


def colour(name):
    """The colour of a class, a function of its name alone: the same in every picture of every run."""
    h, s, v = hashlib.sha256(name.encode()).digest()[:3]
    return tuple(round(255 * c) for c in colorsys.hsv_to_rgb(h / 256, 0.55 + 0.45 * s / 255, 0.6 + 0.4 * v / 255))


def paint(labels, names):
    """Labels [H,W] -> PIL image in the colours of the names; IGNORE is black."""
    palette = np.array([colour(n) for n in names] + [VOID], np.uint8)                      # IGNORE = -1 finds the last
    return Image.fromarray(palette[np.asarray(labels)])


def overlay(image, labels, names, opacity=0.55):
    """The picture with its labels in colour over it."""
    return Image.blend(image.convert("RGB"), paint(labels, names), opacity)


def highlight(image, mask):
    """The picture with everything dimmed but the patches of mask, bool [rows,cols]."""
    keep = Image.fromarray(np.asarray(mask, np.uint8) * 255).resize(image.size, Image.Resampling.NEAREST)
    dim = Image.blend(image.convert("RGB"), Image.new("RGB", image.size, (255, 255, 255)), 0.82)
    return Image.composite(image.convert("RGB"), dim, keep)


def grid(titles, rows, cell=192, legend=()):
    """A sheet of pictures: a row of titles, then rows of PIL images, then names with their colours. Returns a PIL image."""
    gap, font = 8, ImageFont.load_default(15)
    columns, lines, x, y = len(titles), [], gap, 0
    for name in legend:                                                                    # flow the legend into lines
        width = 30 + int(font.getlength(name))
        if x + width > columns * (cell + gap):
            x, y = gap, y + 22
        lines.append((x, y, name))
        x += width + 10
    heights = [max(round(im.height * cell / im.width) for im in row) for row in rows]
    title_height = 20 * max(t.count("\n") + 1 for t in titles) + gap
    sheet = Image.new("RGB", (columns * (cell + gap) + gap, title_height + sum(h + gap for h in heights) + (y + 30) * bool(legend)), "white")
    pen, top = ImageDraw.Draw(sheet), title_height
    for i, title in enumerate(titles):
        pen.multiline_text((gap + i * (cell + gap), gap // 2), title, "black", font)
    for row, height in zip(rows, heights):
        for i, im in enumerate(row):
            smooth = Image.Resampling.NEAREST if im.width < cell else Image.Resampling.BILINEAR
            sheet.paste(im.resize((cell, round(im.height * cell / im.width)), smooth), (gap + i * (cell + gap), top))
        top += height + gap
    for x, y, name in lines:
        pen.rectangle((x, top + y, x + 16, top + y + 16), colour(name), "black")
        pen.text((x + 22, top + y), name, "black", font)
    return sheet


def samples(dataset, indices):
    """A sheet of pictures from a dataset, their labels over them, and the labels alone. Returns a PIL image."""
    items = [dataset.load(i) for i in indices]
    rows = [[image, overlay(image, labels, dataset.evaluated), paint(labels, dataset.evaluated)] for image, labels, _ in items]
    legend = present(dataset.evaluated, *(labels for _, labels, _ in items))
    return grid(["picture", "labels over it", "labels"], rows, 288, legend)


def present(names, *label_maps):
    """The names that occur in label maps, for a legend."""
    found = sorted({int(v) for labels in label_maps for v in np.unique(labels)} - {IGNORE})
    return [names[i] for i in found]


def curves(log, path):
    """Draw a run's log.jsonl: losses, share of reference patches, and mIoU against steps."""
    from matplotlib.figure import Figure
    lines = [json.loads(line) for line in Path(log).read_text().splitlines()]
    steps, evals = [l for l in lines if "total_loss" in l], [l for l in lines if "mIoU_ground_truth" in l]
    axes = Figure(figsize=(13, 3.6), layout="constrained").subplots(1, 3)
    for key in ("segmentation_loss", "spd_loss", "cpa_loss"):
        axes[0].plot([l["step"] for l in steps], [l[key] for l in steps], label=key, lw=1.2)
    axes[1].plot([l["step"] for l in steps], [100 * l["reference_share"] for l in steps], label="of labelled patches", lw=1.2)
    for key in ("seen", "unseen", "harmonic") if evals and "seen" in evals[0] else ("mIoU_ground_truth",):
        axes[2].plot([l["step"] for l in evals], [l[key] for l in evals], "o-", label=key, lw=1.2, ms=3)
    for ax, title, unit in zip(axes, ("losses", "reference patches", "evaluation"), ("", "%", "mIoU, %")):
        ax.set(title=title, xlabel="step", ylabel=unit)
        ax.grid(alpha=0.3)
        ax.legend(fontsize=8)
    axes[0].set_yscale("log")
    axes[0].figure.savefig(path, dpi=110)

