"""Evaluation: label maps by sliding windows, confusion matrices, mIoU.

    python evaluate.py --checkpoint out/last.pt --datasets toy                                    one process
    torchrun --nproc_per_node=8 evaluate.py --checkpoint last.pt --datasets coco-stuff --data-root DIR

Every image is evaluated once, whatever the number of processes. Writes out/eval/DATASET.json beside the printed table.
"""
import argparse
import json
import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageOps
from tqdm import tqdm

import data
import model as segmenter
from losses import IGNORE


def start_processes(minutes=30):
    """Join torchrun's process group, if there is one. Returns (rank, number of processes, device)."""
    rank, world, local = (int(os.environ.get(name, n)) for name, n in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(minutes=minutes))
    return rank, world, device


def resize(x, size):
    """Bilinear without antialiasing, as CAT-Seg resizes everything: [B,C,h,w] -> [B,C,*size]."""
    return F.interpolate(x, size, mode="bilinear", align_corners=False)


def views(image, size, sliding):
    """A PIL image -> [V,3,size,size], normalised, and the side of the canvas on which the views lie.

    sliding: CAT-Seg's five views. The image is brought to a shortest side of 5/3 size (640 for 384), squeezed to a square
    canvas, and seen through four overlapping windows and once as a whole. Otherwise only the whole.
    """
    canvas = round(size * 5 / 3) if sliding else size
    scale = min(canvas / min(image.size), 4 * canvas / max(image.size))
    width, height = (max(1, int(side * scale + 0.5)) for side in image.size)
    x = data.normalise(image.resize((width, height), Image.Resampling.BILINEAR))[None]
    whole = resize(x, (size, size))
    if not sliding:
        return whole, canvas
    x, far = resize(x, (canvas, canvas)), canvas - size
    return torch.cat([x[..., top:top + size, left:left + size] for top in (0, far) for left in (0, far)] + [whole]), canvas


def merge(scores, canvas):
    """Scores of the views [V,c,size,size] -> [1,c,canvas,canvas]: windows averaged where they overlap, then with the whole."""
    size, far = scores.shape[-1], canvas - scores.shape[-1]
    whole = resize(scores[-1:], (canvas, canvas))
    if len(scores) == 1:
        return whole
    total = scores.new_zeros(1, scores.shape[1], canvas, canvas)
    count = scores.new_zeros(canvas, canvas)
    for window, (top, left) in zip(scores, [(t, l) for t in (0, far) for l in (0, far)]):
        total[0, :, top:top + size, left:left + size] += window
        count[top:top + size, left:left + size] += 1
    return (total / count + whole) / 2


@torch.inference_mode()
def class_scores(model, image, text, sliding=True, zero_shot=False, size=None, chunk=16):
    """Yields (first class, probabilities [1,c,H,W]) for successive chunks of the classes text [K,D].

    H, W: `size`, the image's own by default.
    In chunks, because a photograph with many classes has gigabytes of scores. Probabilities are sigmoids of the head's
    logits; with zero_shot, CLIP's own cosines of patch and text.
    """
    x, canvas = views(image, model.image_size, sliding)
    logits = []
    for view in x.to(text.device).split(1 if text.device.type == "cpu" else len(x)):
        patches, middle = model.encode_image(view)
        logits.append(model.cost(patches, text) if zero_shot else model.segment(patches, middle, text))
    for first in range(0, len(text), chunk):
        scores = resize(torch.cat([l[:, first:first + chunk] for l in logits]).float(), x.shape[2:])
        scores = scores if zero_shot else scores.sigmoid()
        yield first, resize(merge(scores, canvas), size or image.size[::-1])


def label_map(model, image, text, **options):
    """Argmax of `class_scores` over the classes: int64 [H,W], on text's device. Ties go to the lower class."""
    best = label = None
    for first, scores in class_scores(model, image, text, **options):
        top, index = scores[0].max(0)
        if best is None:
            best, label = top, index
        else:
            label = torch.where(top > best, index + first, label)
            best = torch.maximum(top, best)
    return label


def segment(model, image, names, **options):
    """Label every pixel of a PIL image with one of the names (a list of strings). Returns int64 [H,W], indices into names."""
    if isinstance(names, str) or not names:
        raise ValueError(f"names should be a list of at least one class name, not {names!r}")
    model.eval()
    with torch.inference_mode():
        text = model.encode_text(model.tokenize(names))
    return label_map(model, ImageOps.exif_transpose(image).convert("RGB"), text, **options)


def confusion_matrix(prediction, labels, num_classes):
    """int64 [K,K], row = label, column = prediction; pixels labelled IGNORE count nowhere. Any shape, equal for both."""
    counted = labels != IGNORE
    labels, prediction = labels[counted].long(), prediction[counted].long()
    for name, values in (("label", labels), ("prediction", prediction)):
        if len(values) and not 0 <= values.min() <= values.max() < num_classes:
            raise ValueError(f"a {name} lies outside 0..{num_classes - 1}: {values.min()}..{values.max()}")
    return torch.bincount(labels * num_classes + prediction, minlength=num_classes ** 2).reshape(num_classes, -1)


def mean_iou(confusion, classes=None):
    """Both mIoU definitions in circulation, in [0, 1], NaN where no class counts.

    confusion [K,K] from `confusion_matrix`; classes: average over these only (the whole matrix still counts as errors).
    "ground_truth" averages over the classes that occur in the labels (detectron2 since July 2022, so CAT-Seg and SED);
    "union" also over classes that are only predicted, with IoU 0 (detectron2 0.6, mmsegmentation, so MAFT+ and SAN).
    """
    iou, labelled, union = class_iou(confusion)
    chosen = torch.zeros(len(iou), dtype=torch.bool, device=iou.device)
    chosen[slice(None) if classes is None else torch.as_tensor(classes, device=iou.device)] = True
    return {"ground_truth": iou[chosen & labelled].mean().item(), "union": iou[chosen & (union > 0)].mean().item()}


def class_iou(confusion):
    """IoU of each class [K] (0 where its union is empty), which classes have ground truth, and the unions in pixels."""
    c = confusion.double()
    union = c.sum(0) + c.sum(1) - c.diagonal()
    return c.diagonal() / union.clamp(min=1), c.sum(1) > 0, union


def evaluate(model, dataset, device, sliding=True, zero_shot=False, rank=0, world=1, desc="evaluating"):
    """Confusion matrix over a dataset, summed over processes, each of which takes every world-th image."""
    model.eval()
    with torch.inference_mode():
        text = model.encode_text(model.tokenize(dataset.names))
    count = len(dataset.evaluated)                                                         # all names from the last on are one
    total = torch.zeros(count, count, dtype=torch.int64, device=device)
    for i in tqdm(range(rank, len(dataset), world), desc, disable=rank > 0, leave=False):
        image, labels, _ = dataset.load(i)
        prediction = label_map(model, image, text, sliding=sliding, zero_shot=zero_shot).clamp(max=count - 1)
        total += confusion_matrix(prediction, torch.from_numpy(labels).to(device), count)
    if world > 1:
        dist.all_reduce(total)
    return total


def summary(confusion, names, seen=None):
    """A confusion matrix as plain numbers in per cent: both mIoU, pixel accuracy, IoU per class; and if `seen` (names that
    segmentation training showed) holds some of the names and not all, mIoU of seen and unseen ones and their harmonic mean."""
    iou, labelled, _ = class_iou(confusion)
    percent = lambda x: 100 * x if x == x else None  # JSON has no NaN
    result = {f"mIoU_{name}": percent(value) for name, value in mean_iou(confusion).items()}
    result["pixel_accuracy"] = 100 * (confusion.diagonal().sum() / confusion.sum().clamp(min=1)).item()
    groups = [[i for i, n in enumerate(names) if (n in (seen or ())) == value] for value in (True, False)]
    if all(groups):
        a, b = (percent(mean_iou(confusion, group)["ground_truth"]) for group in groups)
        result |= {"seen": a, "unseen": b, "harmonic": 2 * a * b / max(a + b, 1e-9) if None not in (a, b) else None}
    result["classes"] = {n: 100 * v if there else None for n, v, there in zip(names, iou.tolist(), labelled.tolist())}
    return result


def table(rows):
    """Rows of cells as lines of a Markdown table, numbers with one decimal; the first row is the header."""
    cells = [[f"{c:.1f}" if isinstance(c, float) else str(c) for c in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells)]
    padded = [[row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:]))] for row in cells]
    lines = ["| " + " | ".join(row) + " |" for row in padded]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|"] + lines[1:])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="of train.py, or one that CAT-Seg published")
    parser.add_argument("--datasets", nargs="+", default=["toy"], help=f"{', '.join(data.NAMES)}; all: "
                        f"{', '.join(data.REPORTED)}")
    parser.add_argument("--split", default="val")
    parser.add_argument("--data-root", help="the folder that holds the datasets")
    parser.add_argument("--classes", help="other names for the dataset's classes: a file, or comma-separated")
    parser.add_argument("--views", choices=("sliding", "whole"), help="CAT-Seg's five views, or one (default: one for toy)")
    parser.add_argument("--zero-shot", action="store_true", help="CLIP itself, without the head")
    parser.add_argument("--out", default="out/eval", help="folder for one JSON file per dataset")
    args = parser.parse_args()
    rank, world, device = start_processes()
    try:
        checkpoint = segmenter.read_checkpoint(args.checkpoint)
        net = segmenter.from_checkpoint(checkpoint, args.checkpoint).to(device)
        names = [n for name in args.datasets for n in (data.REPORTED if name == "all" else [name])]
        datasets = [data.open_dataset(name, args.data_root, args.split, args.classes) for name in names]
        Path(args.out).mkdir(parents=True, exist_ok=True)
        for name, dataset in zip(names, datasets):
            sliding = args.views != "whole" if args.views else not name.startswith("toy")
            confusion = evaluate(net, dataset, device, sliding, args.zero_shot, rank, world, desc=name)
            if rank == 0:
                result = {"dataset": name, "split": args.split, "images": len(dataset), "source": dataset.source, "checkpoint": args.checkpoint,
                          "zero_shot": args.zero_shot, "views": 5 if sliding else 1,
                          **summary(confusion, dataset.evaluated, checkpoint.get("names"))}
                file = name.replace(":", "-").replace("/", "_") + "-zero-shot" * args.zero_shot + ".json"
                path = Path(args.out) / file
                path.write_text(json.dumps(result, indent=1))
                print(table([["per cent", name], *([k, v] for k, v in result.items() if isinstance(v, float))]))
                print(f"written to {path}")
    except (ValueError, OSError) as e:
        sys.exit(f"error: {e}")


if __name__ == "__main__":
    main()
