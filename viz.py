"""Every picture the project draws. Nothing here computes a result."""
import colorsys
import functools
import hashlib
import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from losses import IGNORE

VOID = (0, 0, 0)


@functools.lru_cache(8)
def colours(names):
    """{name: (r, g, b)} for a vocabulary, a tuple of names.

    Ten colours follow from a name's hash, in an order of preference; it gets the first that no name before it in the
    alphabet came near to. So a name looks the same in every picture of a vocabulary, and mostly in all of them.
    """
    chosen = {}
    for name in sorted(names):
        digest = hashlib.sha256(name.encode()).digest()
        candidates = 255 * np.array([colorsys.hsv_to_rgb(h / 256, 0.4 + 0.6 * s / 255, 0.5 + 0.5 * v / 255)
                                     for h, s, v in zip(digest[::3], digest[1::3], digest[2::3])])       # [10,3]
        taken = np.array([VOID, *chosen.values()], float)                                                # [n,3]
        red = (candidates[:, None, 0] + taken[:, 0]) / 512                                          # "redmean" distance
        weights = np.stack([2 + red, np.full_like(red, 4), 3 - red], -1)
        apart = ((weights * (candidates[:, None] - taken) ** 2).sum(-1) ** 0.5).min(1)                   # [10]
        best = candidates[np.argmax(apart > 140) if (apart > 140).any() else apart.argmax()]
        chosen[name] = tuple(int(c) for c in best.round())
    return chosen


def paint(labels, names):
    """Labels [H,W] -> PIL image in the colours of the names; IGNORE is black."""
    found = colours(tuple(names))
    palette = np.array([found[n] for n in names] + [VOID], np.uint8)                       # IGNORE = -1 finds the last
    return Image.fromarray(palette[np.asarray(labels)])


def overlay(image, labels, names, opacity=0.55):
    """The picture in gray with its labels in colour over it."""
    return Image.blend(image.convert("L").convert("RGB"), paint(labels, names), opacity)


def highlight(image, mask):
    """The picture with everything dimmed but the patches of mask, bool [rows,cols]."""
    keep = Image.fromarray(np.asarray(mask, np.uint8) * 255).resize(image.size, Image.Resampling.NEAREST)
    dim = Image.blend(image.convert("RGB"), Image.new("RGB", image.size, (255, 255, 255)), 0.82)
    return Image.composite(image.convert("RGB"), dim, keep)


def present(names, *label_maps, shares=False):
    """[(name, colour)] of the classes in label maps, largest area first, for a legend; with shares, of all labelled pixels."""
    counts = sum(np.bincount(labels[labels != IGNORE].ravel(), minlength=len(names)) for labels in map(np.asarray, label_maps))
    found = colours(tuple(names))
    text = lambda i: f"{100 * counts[i] / counts.sum():.1f} % " * shares + " ".join(names[i].split())
    return [(text(i), found[names[i]]) for i in np.argsort(-counts, kind="stable") if counts[i]]


def font(size):
    """DejaVu Sans, which matplotlib brings: PIL's own font knows few letters that are not English."""
    import matplotlib
    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), size)


def legend(entries, width, size=15):
    """A strip of this width with a box and a text per (text, colour), in as many lines as it takes. Returns a PIL image."""
    letters, gap, places, x, y = font(size), size // 2, [], size // 2, size // 2
    for text, colour in entries:
        while letters.getlength(text) > width - 2 * size - 2 * gap and len(text) > 2:
            text = text[:-2] + "…"
        step = int(2 * size + letters.getlength(text) + gap)
        if x + step > width and x > gap:
            x, y = gap, y + round(1.5 * size)
        places.append((x, y, text, colour))
        x += step
    strip = Image.new("RGB", (width, y + round(1.5 * size)), "white")
    pen = ImageDraw.Draw(strip)
    for x, y, text, colour in places:
        pen.rectangle((x, y, x + size, y + size), colour, "black")
        pen.text((x + round(1.4 * size), y + size // 2), text, "black", letters, anchor="lm")
    return strip


def stack(*images):
    """Pictures of one width below each other."""
    sheet, y = Image.new("RGB", (images[0].width, sum(im.height for im in images)), "white"), 0
    for im in images:
        sheet.paste(im, (0, y))
        y += im.height
    return sheet


def segmentation(image, labels, names):
    """The picture with its labels over it, their outlines, and a legend with each name's share. Returns a PIL image at
    least 480 pixels wide: small pictures are enlarged, others keep their size."""
    scale = max(1, -(-480 // image.width))
    image = image.convert("RGB").resize((image.width * scale, image.height * scale), Image.Resampling.BICUBIC)
    large = np.asarray(labels).repeat(scale, 0).repeat(scale, 1)
    drawn, t = np.array(overlay(image, large, names)), 1 + image.width // 1000
    drawn[:-t][large[t:] != large[:-t]] = 255
    drawn[:, :-t][large[:, t:] != large[:, :-t]] = 255
    return stack(Image.fromarray(drawn), legend(present(names, labels, shares=True), image.width, max(15, image.width // 60)))


def grid(titles, rows, cell=192, entries=()):
    """A sheet of pictures: a row of titles, then rows of PIL images, then a legend. Returns a PIL image."""
    gap, letters = 8, font(14)
    heights = [max(1, *(round(im.height * cell / im.width) for im in row)) for row in rows]
    top = 18 * max(t.count("\n") + 1 for t in titles) + gap
    sheet = Image.new("RGB", (len(titles) * (cell + gap) + gap, top + sum(h + gap for h in heights)), "white")
    pen = ImageDraw.Draw(sheet)
    for i, title in enumerate(titles):
        pen.multiline_text((gap + i * (cell + gap), gap // 2), title, "black", letters)
    for row, height in zip(rows, heights):
        for i, im in enumerate(row):
            smooth = Image.Resampling.NEAREST if im.width < cell else Image.Resampling.BILINEAR
            sheet.paste(im.resize((cell, max(1, round(im.height * cell / im.width))), smooth), (gap + i * (cell + gap), top))
        top += height + gap
    return stack(sheet, legend(entries, sheet.width)) if entries else sheet


def samples(dataset, indices):
    """A sheet of pictures from a dataset, with their labels over them and alone. Returns a PIL image."""
    items, names = [dataset.load(i) for i in indices], dataset.evaluated
    rows = [[image, overlay(image, labels, names), paint(labels, names)] for image, labels, _ in items]
    return grid(["picture", "labels over it", "labels"], rows, 288, present(names, *(labels for _, labels, _ in items)))


def comparison(image, labels, prediction, names):
    """A picture, its ground truth and its prediction beside each other. Returns a PIL image."""
    row = [image, overlay(image, labels, names), overlay(image, prediction, names)]
    return grid(["picture", "ground truth", "prediction"], [row], 480, present(names, labels, prediction))


def save_plot(path, panels):
    """Line and scatter plots beside each other, written to path. panels: (title, x label, y label, curves), a curve being
    (label, x, y, matplotlib format)."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(4.4 * len(panels), 3.6), layout="constrained")
    for ax, (title, xlabel, ylabel, curves) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        for label, x, y, style in curves:
            ax.plot(x, y, style, label=label, lw=1.2, ms=4)
        ax.set(title=title, xlabel=xlabel, ylabel=ylabel)
        ax.locator_params(axis="x", nbins=5)                                               # so that no two numbers meet
        ax.grid(alpha=0.3)
        if ax.get_legend_handles_labels()[0]:
            ax.legend(fontsize=8)
        if title == "losses":
            ax.set_yscale("log")
    figure.savefig(path, dpi=110)


def differences(path, panels):
    """Paired differences to plain fine-tuning: a dot for every seed, their mean and its 95 % interval. panels: {score: {row:
    what ablate.interval gives}}."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(3 + 3.4 * len(panels), 1 + 0.36 * len(next(iter(panels.values())))), layout="constrained")
    for ax, (score, rows) in zip(figure.subplots(1, len(panels), sharey=True, squeeze=False)[0], panels.items()):
        for y, value in enumerate(rows.values()):
            ax.plot(value["each"], [y] * value["n"], "o", color="tab:gray", ms=4, alpha=0.5)
            if value["low"] is not None:
                ax.plot([value["low"], value["high"]], [y, y], "-", color="tab:blue", lw=2)
            ax.plot([value["mean"]], [y], "D", color="tab:blue", ms=5)
        ax.axvline(0, color="black", lw=0.8)
        ax.set(yticks=range(len(rows)), yticklabels=list(rows), xlabel=f"mIoU on {score} classes, minus plain fine-tuning's")
        ax.grid(alpha=0.3, axis="x")
    ax.invert_yaxis()                                                                      # of both: they share it
    figure.savefig(path, dpi=110)


def trade_off(path, methods, starts):
    """Seen against unseen mIoU: a curve for each method, {name: [(rate, row of ablate.summarise)]}, and rows that have no
    rate, such as the CLIP they start from. Bars are one standard error over seeds after a seed's mean over all rows is taken
    off: worlds differ in what they allow, equally for every method."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(7, 5.2), layout="constrained")
    ax = figure.subplots()
    score = lambda row, key: np.array([one[key] for one in row["seeds"].values()])         # [seeds]
    level = {key: np.mean([score(row, key) for rows in methods.values() for _, row in rows], 0) for key in ("seen", "unseen")}
    error = lambda row, key: (score(row, key) - level[key]).std(ddof=len(row["seeds"]) > 1) / len(row["seeds"]) ** 0.5
    for (name, rows), style, place in zip(methods.items(), ("o-", "s--", "D-"), ((-5, 5), (5, 5), (5, -11))):
        x, y = ([row[key]["mean"] for _, row in rows] for key in ("seen", "unseen"))
        bars = ([error(row, key) for _, row in rows] for key in ("unseen", "seen"))
        line = ax.errorbar(x, y, *bars, fmt=style, label=name, lw=1.4, ms=5, elinewidth=0.7, alpha=0.8)
        for (rate, _), a, b in zip(rows, x, y):
            ax.annotate(rate, (a, b), xytext=place, textcoords="offset points", fontsize=8, color=line[0].get_color(),
                        ha="right" if place[0] < 0 else "left", bbox=dict(boxstyle="round,pad=0.1", fc="white", lw=0, alpha=0.7))
    for row, marker in zip(starts, "*P"):
        ax.plot([row["seen"]["mean"]], [row["unseen"]["mean"]], "k" + marker, ms=9, label=row["row"])
    ax.set(xlabel="mIoU on seen classes, %", ylabel="mIoU on unseen classes, %")
    ax.set_title("by learning rate of CLIP, as a part of the head's; bars: one standard error\nover seeds, "
                 "after a seed's mean over all points is taken off", fontsize=9)
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8, loc="lower right")
    figure.savefig(path, dpi=110)


def curves(log, path):
    """Draw a run's log.jsonl: losses, share of reference patches, and mIoU against steps."""
    lines = [json.loads(line) for line in Path(log).read_text().splitlines()]
    steps, scores = [l for l in lines if "total_loss" in l], [l for l in lines if l.get("mIoU_ground_truth") is not None]
    line = lambda key, source, style="-", scale=1: (key, [l["step"] for l in source], [scale * l[key] for l in source], style)
    keys = ("seen", "unseen", "harmonic") if scores and "seen" in scores[0] else ("mIoU_ground_truth",)
    save_plot(path, [
        ("losses", "step", "", [line(key, steps) for key in ("segmentation_loss", "spd_loss", "cpa_loss")]),
        ("reference patches", "step", "% of labelled patches", [line("reference_share", steps, scale=100)]),
        ("evaluation", "step", "mIoU, %", [line(key, scores, "o-") for key in keys])])
