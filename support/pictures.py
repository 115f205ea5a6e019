"""Every picture the project draws. Nothing here computes a result."""
import functools
import hashlib
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.colors import hsv_to_rgb
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

from losses import IGNORE
from support.runs import read_log

VOID = (0, 0, 0)
FONT = Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")  # PIL's has few letters


@functools.lru_cache(8)
def colours(names):
    """{name: (r, g, b)} for a tuple of names. Ten colours follow from a name's hash; it gets the
    first of them that no name before it in the alphabet came near to."""
    chosen = {}
    for name in sorted(names):
        digest = np.frombuffer(hashlib.sha256(name.encode()).digest(), np.uint8, 30)
        hsv = digest.reshape(10, 3) * (1, 0.6, 0.5) / (256, 255, 255) + (0, 0.4, 0.5)
        candidates = 255 * hsv_to_rgb(hsv)  # [10,3]
        taken = np.array([VOID, *chosen.values()], float)  # [n,3]
        red = (candidates[:, None, 0] + taken[:, 0]) / 512  # the "redmean" distance of colours
        weights = np.stack([2 + red, np.full_like(red, 4), 3 - red], -1)  # [10,n,3]
        apart = ((weights * (candidates[:, None] - taken) ** 2).sum(-1) ** 0.5).min(1)  # [10]
        best = np.minimum(apart, 140).argmax()  # the first that is 140 away, or else the farthest
        chosen[name] = tuple(int(c) for c in candidates[best].round())
    return chosen


def paint(labels, names):
    """Labels [H,W] -> PIL image in the colours of the names; IGNORE is black."""
    palette = [*map(colours(tuple(names)).get, names), VOID]  # IGNORE = -1 finds the last
    return Image.fromarray(np.array(palette, np.uint8)[np.asarray(labels)])


def overlay(image, labels, names, opacity=0.55):
    """The picture in gray with its labels in colour over it."""
    return Image.blend(image.convert("L").convert("RGB"), paint(labels, names), opacity)


def highlight(image, mask):
    """The picture with everything dimmed but the patches of mask, bool [rows,cols]."""
    keep = Image.fromarray(np.asarray(mask, np.uint8) * 255).resize(image.size, Image.NEAREST)
    dim = Image.blend(image, Image.new("RGB", image.size, "white"), 0.82)
    return Image.composite(image, dim, keep)


def legend_entries(names, *label_maps, shares=False):
    """[(name, colour)] of the classes in label maps, largest first; shares: with their areas."""
    counts = sum(np.bincount(m[m != IGNORE], minlength=len(names)) for m in label_maps)
    entries = []
    for i in np.argsort(-counts, kind="stable")[:np.count_nonzero(counts)]:
        share = f"{100 * counts[i] / counts.sum():.1f} % " if shares else ""
        entries.append((share + " ".join(names[i].split()), colours(tuple(names))[names[i]]))
    return entries


def legend(entries, width, size=15):
    """A strip of this width, with a box and text per (text, colour), in lines as they fit."""
    letters = ImageFont.truetype(FONT, size)
    places = []
    x = y = gap = size // 2
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


def segmentation(image, pixel_labels, names):
    """The picture with its labels [H,W] over it, their outlines, and a legend with their shares.
    Small pictures are enlarged towards a width of 480, unless that makes them longer than 2,000;
    a side of more than 30,000 is reduced to that. The sheet is always at least 480 wide."""
    scale = max(1, min(-(-480 // image.width), 2000 // max(image.size)))
    scale = min(scale, 30_000 / max(image.size))
    width, height = [max(1, round(side * scale)) for side in image.size]
    columns = np.arange(width) * image.width // width
    rows = np.arange(height) * image.height // height
    labels = pixel_labels[np.ix_(rows, columns)]
    image = image.convert("RGB").resize((width, height), Image.BICUBIC, reducing_gap=3)
    drawn = np.array(overlay(image, labels, names))
    thick = 1 + width // 1000
    drawn[:-thick][labels[thick:] != labels[:-thick]] = 255
    drawn[:, :-thick][labels[:, thick:] != labels[:, :-thick]] = 255
    drawn = np.pad(drawn, [(0, 0), (0, max(0, 480 - width)), (0, 0)], constant_values=255)
    entries = legend_entries(names, pixel_labels, shares=True)
    strip = legend(entries, drawn.shape[1], max(15, width // 60))
    return Image.fromarray(np.vstack([drawn, strip]))


def fit(image, cell):
    """The picture at a width of `cell` pixels; a very tall one narrower, at three times as high."""
    scale = min(cell / image.width, 3 * cell / image.height)
    size = [max(1, round(side * scale)) for side in image.size]
    return image.resize(size, Image.NEAREST if scale > 1 else Image.BILINEAR, reducing_gap=3)


def grid(titles, rows, entries, cell=192):
    """A sheet of pictures: a row of titles, then rows of PIL images, then a legend."""
    gap = 8
    width = gap + len(titles) * (cell + gap)
    columns = range(gap, width, cell + gap)
    height = gap + 18 * max(title.count("\n") + 1 for title in titles)
    strips = [Image.new("RGB", (width, height), "white")]
    for x, title in zip(columns, titles):
        pen = ImageDraw.Draw(strips[0])
        pen.multiline_text((x, gap // 2), title, "black", ImageFont.truetype(FONT, 14))
    for row in rows:
        row = [fit(image, cell) for image in row]
        strips.append(Image.new("RGB", (width, gap + max(im.height for im in row)), "white"))
        for x, image in zip(columns, row):
            strips[-1].paste(image, (x, 0))
    return Image.fromarray(np.vstack([*strips, legend(entries, width)]))


def samples(dataset, indices):
    """A sheet of pictures from a dataset, with their labels over them and alone."""
    names = dataset.evaluated
    items = [dataset.load(i)[:2] for i in indices]
    rows = [[image, overlay(image, labels, names), paint(labels, names)] for image, labels in items]
    entries = legend_entries(names, *(labels for _, labels in items))
    return grid(["picture", "labels over it", "labels"], rows, entries, 288)


def comparison(image, labels, prediction, names):
    """A picture, its ground truth and its prediction beside each other."""
    row = [image, overlay(image, labels, names), overlay(image, prediction, names)]
    entries = legend_entries(names, labels, prediction)
    return grid(["picture", "ground truth", "prediction"], [row], entries, 480)


def save_plot(path, panels):
    """Plots beside each other, written to path. panels: (title, x label, y label, curves), a curve
    being (label, x, y, matplotlib format); a panel without curves is left out."""
    panels = [panel for panel in panels if panel[3]] or panels
    figure = Figure(figsize=(4.4 * len(panels), 3.6), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for ax, (title, xlabel, ylabel, curves) in zip(axes, panels):
        for label, x, y, style in curves:
            ax.plot(x, y, style, label=label, lw=1.2, ms=4)
        ax.set(title=title, xlabel=xlabel, ylabel=ylabel)
        ax.set_yscale("log" if title == "losses" else "linear")
        ax.locator_params(axis="x", nbins=5)  # so that no two numbers meet
        ax.grid(alpha=0.3)
        if ax.get_legend_handles_labels()[0]:
            ax.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def differences(path, panels):
    """Paired differences to plain fine-tuning: a dot per seed, their mean and its 95 % interval.
    panels: {score: {row: what study.compare.interval gives}}."""
    count = len(next(iter(panels.values())))
    figure = Figure(figsize=(3 + 3.4 * len(panels), 1 + 0.36 * count), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for ax, (score, rows) in zip(axes, panels.items()):
        for y, value in enumerate(rows.values()):
            ax.plot(value["each"], [y] * value["n"], "o", color="tab:gray", ms=4, alpha=0.5)
            x = np.array([value["low"], value["mean"], value["high"]], float)  # None becomes NaN
            ax.plot(x, [y] * 3, "D-", color="tab:blue", lw=2, ms=5, markevery=[1])
        ax.axvline(0, color="black", lw=0.8)
        ax.set(yticks=range(count), yticklabels=list(rows))
        ax.set_xlabel(f"mIoU on {score} classes, minus plain fine-tuning's")
        ax.grid(alpha=0.3, axis="x")
    ax.invert_yaxis()  # of all: they share it
    figure.savefig(path, dpi=110)


def trade_off(path, methods, starts):
    """Seen against unseen mIoU: a curve for each method, {name: [(rate, row)]}, of the same rates
    and seeds, and rows without a rate; a row is what study.compare.summarise gives."""
    def by_seed(row):
        return [(one["seen"], one["unseen"]) for one in row["seeds"].values()]

    scores = np.array([[by_seed(row) for _, row in rows] for rows in methods.values()])
    means = scores.mean(2)  # of [methods,rates,seeds,2]
    seeds = scores.shape[2]
    own = scores - scores.mean((0, 1))  # worlds differ in what they allow, equally for all methods
    errors = own.std(2, ddof=min(1, seeds - 1)) / seeds ** 0.5  # [methods,rates,2]
    ax = Figure(figsize=(7, 5.2), layout="constrained").subplots()
    looks = (("o-", (-20, 5)), ("s--", (5, 5)), ("D-", (5, -11)))
    for (name, points), mean, error, (style, place) in zip(methods.items(), means, errors, looks):
        line, *_ = ax.errorbar(*mean.T, *error.T[::-1], fmt=style, label=name, elinewidth=0.7)
        for (rate, _), at in zip(points, mean):
            ax.annotate(rate, at, place, textcoords="offset points", fontsize=8,
                        color=line.get_color(), bbox=dict(pad=0.8, fc="white", lw=0, alpha=0.7))
    for row, marker in zip(starts, ("k*", "kP")):
        ax.plot(row["seen"]["mean"], row["unseen"]["mean"], marker, ms=9, label=row["row"])
    ax.set(xlabel="mIoU on seen classes, %", ylabel="mIoU on unseen classes, %")
    ax.set_title("by learning rate of CLIP, as a part of the head's; bars: one standard error\n"
                 "over seeds, after a seed's mean over all points is taken off", fontsize=9)
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8, loc="lower right")
    ax.figure.savefig(path, dpi=110)


def curves(log, path):
    """Draw a run's log.jsonl: losses, share of reference patches, and mIoU against steps."""
    lines = read_log(Path(log))

    def found(key, style="-", scale=1):
        points = [(one["step"], scale * one[key]) for one in lines if one.get(key) is not None]
        return [(key, *zip(*points), style)] if points else []  # plain runs lack distillation's

    miou = found("seen", "o-") + found("unseen", "o-") + found("harmonic", "o-")
    save_plot(path, [
        ("losses", "step", "", found("segmentation_loss") + found("spd_loss") + found("cpa_loss")),
        ("reference patches", "step", "% of labelled patches", found("reference_share", scale=100)),
        ("evaluation", "step", "mIoU, %", miou or found("mIoU_ground_truth", "o-"))])
