"""Every picture the project draws. Nothing here computes a result."""
import functools
import itertools
import textwrap
import zlib

import matplotlib.colors
import numpy as np
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

from losses import IGNORE


@functools.lru_cache(8)
def colours(names):
    """[K+1,3] for a tuple of names: of twenty colours with a name for their seed, the first that no
    name before it in the alphabet came near to. Black is the last, where IGNORE = -1 finds it."""
    palette = np.zeros((len(names) + 1, 3), np.uint8)
    for i in np.argsort(names):
        random = np.random.default_rng(zlib.crc32(names[i].encode()))
        candidates = 255 * matplotlib.colors.hsv_to_rgb(random.uniform((0, 0.4, 0.5), 1, (20, 3)))
        apart = np.linalg.norm(candidates[:, None] - palette, axis=-1).min(1)  # [20]
        palette[i] = candidates[np.minimum(apart, 100).argmax()]  # 100 away, or else the farthest
    return palette


def thin(pixel_labels):
    """Labels [H,W] -> those that are drawn: of larger maps at most 8,000 a side."""
    step = -(-max(pixel_labels.shape) // 8000)
    return pixel_labels[::step, ::step]


def paint(pixel_labels, names):
    """Labels [H,W] -> PIL image in the colours of the names; IGNORE is black."""
    return Image.fromarray(colours(tuple(names))[thin(pixel_labels)])


def overlay(image, pixel_labels, names):
    """The picture in gray, its labels in colour over it, and white lines between them."""
    pixel_labels = thin(pixel_labels)
    gray = image.resize(pixel_labels.shape[::-1]).convert("L").convert("RGB")
    drawn = np.array(Image.blend(gray, paint(pixel_labels, names), 0.55))
    thick = 1 + pixel_labels.shape[1] // 1000
    drawn[:-thick][pixel_labels[thick:] != pixel_labels[:-thick]] = 255
    drawn[:, :-thick][pixel_labels[:, thick:] != pixel_labels[:, :-thick]] = 255
    return Image.fromarray(drawn)


def highlight(image, mask):
    """The picture with everything dimmed but the patches of mask, bool [rows,cols]."""
    dim = Image.blend(image, Image.new("RGB", image.size, "white"), 0.82)
    return Image.composite(image, dim, Image.fromarray(mask).resize(image.size))


def legend_entries(names, *label_maps, shares=False):
    """[(name, colour)] of the classes in label maps, largest first; shares: with their areas."""
    counts = sum(np.bincount(m[m != IGNORE], minlength=len(names)) for m in map(thin, label_maps))
    entries = []
    for i in np.argsort(-counts, kind="stable")[:np.count_nonzero(counts)]:
        share = f"{100 * counts[i] / counts.sum():.1f} % " if shares else ""
        text = textwrap.shorten(share + names[i], 48, placeholder="…")
        entries.append((text, tuple(colours(tuple(names))[i].tolist())))
    return entries


def grid(titles, rows, entries, cell=(192, 576)):
    """A sheet: titles, rows of PIL images scaled to fit cells, and a legend of boxes and texts of
    at most 48 letters, (text, colour) each."""
    step = cell[0] + 8
    width = max(640, 8 + len(rows[0]) * step)
    size = max(14, width // 80)
    font = ImageFont.truetype(matplotlib.get_data_path() + "/fonts/ttf/DejaVuSans.ttf", size)
    strips = [Image.new("RGB", (width, 3 * size if titles else 8), "white")]
    for i, title in enumerate(titles):
        ImageDraw.Draw(strips[0]).text((8 + i * step, 4), title, "black", font)
    for row in rows:
        scales = [min(cell[0] / image.width, cell[1] / image.height) for image in row]
        row = [image.resize([max(1, round(side * scale)) for side in image.size], Image.BOX)
               for image, scale in zip(row, scales)]
        strips.append(Image.new("RGB", (width, 8 + max(image.height for image in row)), "white"))
        for i, image in enumerate(row):
            strips[-1].paste(image, (8 + i * step, 0))
    x = width
    for text, colour in entries:
        length = 3 * size + int(font.getlength(text))
        if x + length > width:
            x = 8
            strips.append(Image.new("RGB", (width, 3 * size // 2), "white"))
            pen = ImageDraw.Draw(strips[-1])
        pen.rectangle((x, 0, x + size, size), colour, "black")
        pen.text((x + 3 * size // 2, size // 2), text, "black", font, anchor="lm")
        x += length
    return Image.fromarray(np.vstack(strips))


def segmentation(image, pixel_labels, names):
    """The picture with its labels [H,W] over it and their shares, enlarged if it is small."""
    drawn = overlay(image, pixel_labels, names)
    entries = legend_entries(names, pixel_labels, shares=True)
    return grid([], [[drawn]], entries, (max(480, drawn.width), max(1440, drawn.height)))


def samples(dataset, indices):
    """A sheet of pictures from a dataset, with their labels over them and alone."""
    names = dataset.evaluated
    items = [dataset.load(i)[:2] for i in indices]
    rows = [[image, overlay(image, pixel_labels, names), paint(pixel_labels, names)]
            for image, pixel_labels in items]
    entries = legend_entries(names, *(pixel_labels for _, pixel_labels in items))
    return grid(["picture", "labels over it", "labels"], rows, entries, (288, 864))


def comparison(image, pixel_labels, prediction, names):
    """A picture, its ground truth and its prediction beside each other."""
    row = [image, overlay(image, pixel_labels, names), overlay(image, prediction, names)]
    entries = legend_entries(names, pixel_labels, prediction)
    return grid(["picture", "ground truth", "prediction"], [row], entries, (480, 1440))


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


def trade_off(path, summaries):
    """Seen against unseen mIoU of rows with the same seeds, those that differ only in their setting
    joined by a line. summaries: what study.compare.summarise gives."""
    scores = np.array([[row[key]["each"] for key in ("seen", "unseen")] for row in summaries])
    own = scores - scores.mean(0)  # [rows,2,seeds]: worlds differ in what they allow, alike for all
    errors = own.std(2, ddof=1) / scores.shape[2] ** 0.5
    lines = {}
    for row, mean, error in zip(summaries, scores.mean(2), errors):
        method, _, setting = row["row"].partition(", ")
        lines.setdefault(method, []).append((setting, *mean, *error))
    ax = Figure(figsize=(7, 5.2), layout="constrained").subplots()
    for (method, points), marker in zip(lines.items(), itertools.cycle("*Pos^Dv")):
        settings, x, y, x_error, y_error = zip(*points)
        line, *_ = ax.errorbar(x, y, y_error, x_error, f"{marker}-", label=method, elinewidth=0.7)
        for name, *at in zip(settings, x, y):
            ax.annotate(name, at, (5, 5), textcoords="offset points", fontsize=8,
                        color=line.get_color(), bbox=dict(pad=0.8, fc="white", lw=0, alpha=0.7))
    ax.set(xlabel="mIoU on seen classes, %", ylabel="mIoU on unseen classes, %")
    ax.set_title("bars: one standard error over seeds, after a seed's mean over all points\n"
                 "is taken off", fontsize=9)
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8)
    ax.figure.savefig(path, dpi=110)


def over_steps(path, summaries):
    """Plot what rows were evaluated at as they trained, means over seeds: share of reference
    patches and unseen mIoU. Nothing where no row was evaluated before its end."""
    share, unseen = [], []
    for row in summaries:
        runs = [run.get("evaluations", []) for run in row["seeds"].values()]
        if len(runs[0]) > 1 and len(set(map(len, runs))) == 1:
            step, miou, patches = np.mean(runs, 0).T
            style = "o--" if "frozen" in row["row"] else "o-"
            share.append(("", 100 * step / step[-1], 100 * patches, style))  # one legend is enough
            unseen.append((row["row"], 100 * step / step[-1], miou, style))
    if share:
        save_plot(path, [
            ("reference patches (of the teacher)", "% of the steps", "% of labelled ones", share),
            ("unseen", "% of the steps", "mIoU, %", unseen)])


def curves(lines, path):
    """Draw a run's log.jsonl: losses, share of reference patches, and mIoU against steps."""
    def found(key, style="-", scale=1):
        points = [(one["step"], scale * one[key]) for one in lines if one.get(key) is not None]
        return [(key, *zip(*points), style)] if points else []  # plain runs lack distillation's

    miou = found("seen", "o-") + found("unseen", "o-") + found("harmonic", "o-")
    save_plot(path, [
        ("losses", "step", "", found("segmentation_loss") + found("spd_loss") + found("cpa_loss")
         + found("pooled_loss")),
        ("reference patches", "step", "% of labelled patches", found("reference_share", scale=100)),
        ("evaluation", "step", "mIoU, %", miou or found("mIoU_ground_truth", "o-"))])
