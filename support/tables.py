"""Results as tables of text."""

TITLES = {"mIoU_ground_truth": "mIoU over classes with ground truth (as CAT-Seg, SED)",
          "mIoU_union": "mIoU also over classes only predicted (as MAFT+, SAN)",
          "pixel_accuracy": "pixel accuracy",
          "seen": "mIoU of names that training showed",
          "unseen": "mIoU of the others",
          "harmonic": "harmonic mean of these"}


def format_table(rows):
    """Rows of cells as a Markdown table, numbers with one decimal; the first row is the header."""
    cells = [[f"{c:.1f}" if isinstance(c, float) else str(c) for c in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = []
    for first, *others in cells:
        padded = [first.ljust(widths[0]), *map(str.rjust, others, widths[1:])]
        lines.append("| " + " | ".join(padded) + " |")
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def format_result(result):
    """IoU by class, best first, then the summary: what evaluate.summary gives, as text."""
    ious = {name: -1.0 if iou is None else iou for name, iou in result["classes"].items()}
    classes = [["class", "IoU"]]
    for name in sorted(ious, key=ious.get, reverse=True):
        classes.append([name, ious[name] if ious[name] >= 0 else "no pixels"])
    means = [["per cent", result["dataset"]]]
    means += [[TITLES[key], result[key]] for key in TITLES if result.get(key) is not None]
    return f"{format_table(classes)}\n\n{format_table(means)}"
