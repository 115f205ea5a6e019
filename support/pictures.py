"""Every picture the project draws: arrays and PIL images go in, a png file comes out. Only
functions that draw import this file, because matplotlib is slow to import."""
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from PIL import Image

from losses import IGNORE
from support.files import replacing


# Colours of labels 0..1023, and black where IGNORE = -1 finds it: uint8 [1025,3]. They are PASCAL
# VOC's, lightened: the bits of label + 1 go to red, green and blue in turn.
PALETTE = np.zeros((1025, 3), np.uint8)
for bit in range(11):
    PALETTE[:-1, bit % 3] += (np.arange(1, 1025) >> bit & 1).astype(np.uint8) << 7 - bit // 3
PALETTE[:-1] = 64 + 0.75 * PALETTE[:-1]


def paint(pixel_labels):
    """Labels [H,W] -> PIL image in the labels' colours; IGNORE is black."""
    return Image.fromarray(PALETTE[np.where(pixel_labels == IGNORE, IGNORE, pixel_labels % 1024)])


def overlay(image, pixel_labels):
    """The picture in gray, its labels [H,W] in colour over it, and white lines between them."""
    gray = image.convert("L").convert("RGB")
    blended = np.array(Image.blend(gray, paint(pixel_labels), 0.6))
    blended[:-1][pixel_labels[1:] != pixel_labels[:-1]] = 255
    blended[:, :-1][pixel_labels[:, 1:] != pixel_labels[:, :-1]] = 255
    return Image.fromarray(blended)


def highlight(image, mask):
    """The picture with everything faded but the patches of mask, bool [rows,cols]."""
    faded = Image.blend(image, Image.new("RGB", image.size, "white"), 0.82)
    return Image.composite(image, faded, Image.fromarray(mask).resize(image.size))


def legend(names, label_maps, unseen=(), shares=False):
    """A list of matplotlib patches: the twelve largest classes in label maps, how many more there
    are, and pixels without a label. Names in `unseen` get a star. shares: with a class's share of
    the labelled pixels."""
    labels = np.concatenate([pixel_labels.ravel() for pixel_labels in label_maps])
    known = labels[labels != IGNORE]
    counts = np.bincount(known, minlength=len(names))
    largest = np.argsort(-counts, kind="stable")[:np.count_nonzero(counts)]
    entries = []
    for i in largest[:12]:
        text = names[i] if len(names[i]) < 30 else f"{names[i][:14]}…{names[i][-14:]}"
        if names[i] in unseen:
            text += " *"
        if shares:
            text = f"{100 * counts[i] / len(known):.1f} % {text}"
        entries.append((text, PALETTE[i % 1024] / 255))
    if len(largest) > 12:
        entries.append((f"and {len(largest) - 12} more", "white"))
    if len(known) < len(labels):
        entries.append(("no label", "black"))
    return [Patch(facecolor=colour, edgecolor="black", label=f" {text}")  # it hides "_text"
            for text, colour in entries]


def sheet(path, titles, rows, patches, caption=""):
    """Write rows of PIL images with titles over the columns; below, a caption and a legend."""
    heights = [max(image.height / image.width for image in row) for row in rows]
    heights = np.clip(heights, 0.1, 3)  # of a row, in widths of a column
    size = (9, 9 / len(titles) * heights.sum() + 1)  # inches
    figure = Figure(size, dpi=150, layout="compressed")
    axes = figure.subplots(len(rows), len(titles), squeeze=False, height_ratios=heights)
    for ax, image in zip(axes.flat, sum(rows, [])):
        ax.imshow(image)
        ax.set_axis_off()
    for ax, title in zip(axes[0], titles):
        ax.set_title(title, fontsize=8)
    legend = figure.legend(handles=patches, title=caption, ncols=3, fontsize=8, title_fontsize=8,
                           alignment="left", frameon=False, loc="outside lower left")
    for text in legend.get_texts():
        text.set_parse_math(False)  # a name may hold $
    with replacing(Path(path)) as file:
        figure.savefig(file, format="png", bbox_inches="tight", pad_inches=0.06)


def labelled(path, rows, names, shares=False):
    """Write rows of (picture, labels [H,W]), the labels drawn over the picture beside it. Returns
    the texts of the legend."""
    patches = legend(names, [labels for _, labels in rows], shares=shares)
    drawn = [[image, overlay(image, labels)] for image, labels in rows]
    sheet(path, ["picture", "labels"], drawn, patches)
    return [patch.get_label().strip() for patch in patches]


def curves(lines, path):
    """Write what a run's log.jsonl says by step: losses, share of reference patches, and mIoU."""
    panels = {
        "loss": ("segmentation_loss", "spd_loss", "cpa_loss", "pooled_loss"),
        "reference patches, share": ("reference_share", "reference_share_teacher"),
        "mIoU, % (step 0: zero-shot)": ("seen", "unseen", "harmonic", "mIoU_ground_truth")}
    figure = Figure((13, 3.6), dpi=130, layout="constrained")
    axes = figure.subplots(1, len(panels))
    for ax, (title, keys) in zip(axes, panels.items()):
        for key in keys:
            points = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
            if points:
                ax.plot(*zip(*points), ".-", label=key)
        ax.set(xlabel="training step", ylabel=title)
        ax.grid(alpha=0.3)
        if ax.lines:
            ax.legend(fontsize=8)
    axes[0].set_yscale("log")
    with replacing(Path(path)) as file:
        figure.savefig(file, format="png")
