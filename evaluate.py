"""Evaluation: label maps by sliding windows, confusion matrices, mIoU; and pictures of one's own.

    python evaluate.py --checkpoint out/last.pt --datasets toy                                    one process
    torchrun --nproc_per_node=8 evaluate.py --checkpoint last.pt --datasets all --data-root DIR   the six benchmarks
    python evaluate.py --checkpoint out/last.pt --image photo.jpg --classes "cat, sofa, wooden floor"

Every image is evaluated once, whatever the number of processes. The tables are also written, to --out/DATASET.json; a
picture's labels to photo.seg.png beside it, or in --out.
"""
import argparse
import glob
import json
import os
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

import data
import model as segmenter
import runs
import viz
from losses import IGNORE


def resize(x, size):
    """Bilinear without antialiasing, as CAT-Seg resizes everything: [B,C,h,w] -> [B,C,*size]."""
    return F.interpolate(x, size, mode="bilinear", align_corners=False)


def is_sliding(views, dataset):
    """Whether a dataset is evaluated in CAT-Seg's five views: as --views says, and by default unless it is a toy world."""
    return views == "sliding" if views else not dataset.startswith("toy")


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
    """Label every pixel of a PIL image with one of the names (a list of strings). Returns int64 [H,W], indices into names.

    options: those of `class_scores`; sliding=False looks once instead of five times.
    """
    if isinstance(names, str) or not names:
        raise ValueError(f"names should be a list of at least one class name, not {names!r}")
    model.eval()
    with torch.inference_mode():
        text = model.encode_text(model.tokenize(names))
    return label_map(model, data.upright_rgb(image), text, **options)


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


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM during an evaluation. Holds what this process had: confusion matrix, number of images."""


def evaluate(model, dataset, device, sliding=True, zero_shot=False, rank=0, world=1, desc="evaluating", keep=None):
    """Confusion matrix over a dataset, summed over processes, each of which takes every world-th image.

    keep: called as keep(i, image, labels, prediction, path) for every image, labels and prediction [H,W] on the CPU.
    """
    model.eval()
    with torch.inference_mode():
        text = model.encode_text(model.tokenize(dataset.names))
    count = len(dataset.evaluated)                                                  # all names from the last on are one
    total = torch.zeros(count, count, dtype=torch.int64, device=device)
    done = 0
    try:
        for i in tqdm(range(rank, len(dataset), world), desc, disable=rank > 0, leave=False):
            image, labels, path = dataset.load(i)
            prediction = label_map(model, image, text, sliding=sliding, zero_shot=zero_shot).clamp(max=count - 1)
            if keep:
                keep(i, image, labels, prediction.cpu().numpy(), path)
            total += confusion_matrix(prediction, torch.from_numpy(labels).to(device), count)
            done += 1
    except KeyboardInterrupt as e:
        raise Interrupted(total, done) from e
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


TITLES = {"mIoU_ground_truth": "mIoU over classes with ground truth (as CAT-Seg, SED)",
          "mIoU_union": "mIoU also over classes only predicted (as MAFT+, SAN)", "pixel_accuracy": "pixel accuracy",
          "seen": "mIoU of names that training showed", "unseen": "mIoU of the others", "harmonic": "harmonic mean of these"}


def evaluate_datasets(net, checkpoint, args, rank, world, device):
    """--datasets: a table and a JSON file for each, and what --save-labels and --save-pictures ask for."""
    names = [n for name in args.datasets for n in (data.REPORTED if name == "all" else [name])]
    datasets = [data.open_dataset(name, args.data_root, args.split, args.classes) for name in names]
    for name, dataset in zip(names, datasets):
        if rank == 0:
            print(f"{name}: {len(dataset)} images, {len(dataset.names)} names, from {dataset.source}")
        out = Path(args.out or "out/eval", (name + "-zero-shot" * args.zero_shot).replace(":", "-").replace("/", "_"))
        out.parent.mkdir(parents=True, exist_ok=True)
        drawn = range(0, len(dataset), max(1, len(dataset) // args.save_pictures)) if args.save_pictures else ()

        def keep(i, image, labels, prediction, path):
            if args.save_labels:
                save_labels(prediction, len(dataset.evaluated), out / "labels" / f"{Path(path).stem}.png")
            if i in drawn[:args.save_pictures]:
                (out / "pictures").mkdir(parents=True, exist_ok=True)
                viz.comparison(image, labels, prediction, dataset.evaluated).save(out / "pictures" / f"{Path(path).stem}.png")

        sliding = is_sliding(args.views, name)
        images, interruption = len(dataset), None
        try:
            confusion = evaluate(net, dataset, device, sliding, args.zero_shot, rank, world, name, keep)
        except Interrupted as e:
            interruption = e
            confusion, images = e.args
        if rank == 0:
            result = {"dataset": name, "split": args.split, "images": images, "source": dataset.source,
                      "checkpoint": args.checkpoint, "zero_shot": args.zero_shot, "views": 5 if sliding else 1,
                      **summary(confusion, dataset.evaluated, checkpoint.get("names"))}
            path = out.with_name(out.name + (".partial.json" if interruption else ".json"))
            path.write_text(json.dumps(result, indent=1))
            ranked = sorted(result["classes"].items(), key=lambda c: -1 if c[1] is None else c[1], reverse=True)
            print(table([["class", "IoU"], *([n, "no pixels" if v is None else v] for n, v in ranked)]) + "\n")
            print(table([["per cent", name], *([TITLES[k], v] for k, v in result.items() if k in TITLES and v is not None)]))
            if interruption:
                print(f"interrupted: this is what the first process had after {images} of {len(dataset)} images")
            print(f"written to {path}" + (f" and {out}" if out.is_dir() else ""))
        if interruption:
            raise interruption


def label_images(net, checkpoint, args):
    """--image: label pictures with the names in --classes and draw them. Returns what went wrong, a sentence for each."""
    if not args.classes:
        raise ValueError('--image needs --classes, as in --classes "cat, sofa, wooden floor"')
    names, paths, wrong = data.read_names(args.classes), [], []
    for pattern in args.image:
        found = glob.glob(f"{glob.escape(pattern)}/*" if os.path.isdir(pattern) else pattern)
        found = [p for p in sorted(found) if Path(p).suffix.lower() in data.IMAGE_TYPES and not p.endswith((".seg.png", ".labels.png"))]
        found = [pattern] if os.path.isfile(pattern) else found
        if not found:
            raise ValueError(f"--image {pattern}: there is no such picture")
        paths += map(Path, found)
    targets = {}
    for path in dict.fromkeys(paths):
        twins = [p for p in paths if p.stem == path.stem and p.suffix != path.suffix]
        target = Path(args.out or path.parent, (path.name if twins else path.stem) + ".seg.png")
        if target in targets:
            raise ValueError(f"--image: {path} and {targets[target]} would both be written to {target}")
        targets[target] = path
    sliding = is_sliding(args.views, str(checkpoint.get("args", {}).get("dataset")))
    with torch.inference_mode():
        text = net.encode_text(net.tokenize(names))
    for target, path in tqdm(targets.items(), "pictures", disable=len(targets) == 1):
        try:
            image = data.read_image(path)
        except data.DataError as e:
            wrong.append(f"error: {e}")
            continue
        labels = label_map(net, image, text, sliding=sliding, zero_shot=args.zero_shot).cpu().numpy()
        target.parent.mkdir(parents=True, exist_ok=True)
        viz.segmentation(image, labels, names).save(target)
        if args.save_labels:
            save_labels(labels, len(names), target.with_name(target.name.replace(".seg.png", ".labels.png")))
        shares = np.bincount(labels.ravel(), minlength=len(names)) / labels.size
        tqdm.write(f"{target}: " + ", ".join(f"{100 * shares[i]:.1f} % {names[i]}" for i in np.argsort(-shares) if shares[i]))
    return wrong


def save_labels(labels, count, path):
    """Write labels [H,W] as a png, in 16 bits if there are more than 256 classes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(labels.astype(np.uint8 if count <= 256 else np.uint16)).save(path)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--checkpoint", required=True, help="of train.py, or one that CAT-Seg published")
    p.add_argument("--datasets", nargs="+", default=["toy"], help=f"{', '.join(data.NAMES)}; all: {', '.join(data.REPORTED)}")
    p.add_argument("--split", default="val")
    p.add_argument("--data-root", help="the folder that holds the datasets")
    p.add_argument("--image", nargs="+", help="pictures, folders of pictures or patterns, to label instead of a dataset's")
    p.add_argument("--classes", help="names to look for, a file or comma-separated (a dataset's own are the default)")
    p.add_argument("--views", choices=("sliding", "whole"), help="CAT-Seg's five views, or one (default: one for toy)")
    p.add_argument("--zero-shot", action="store_true", help="CLIP itself, without the head")
    p.add_argument("--save-labels", action="store_true", help="write the predicted labels as png, 16-bit from 257 classes on")
    p.add_argument("--save-pictures", type=int, default=0, metavar="N", help="draw N images: ground truth, prediction")
    p.add_argument("--timeout", type=float, default=30, help="minutes that a process waits for the others (default 30)")
    p.add_argument("--out", help="folder to write to (default out/eval; with --image, beside the picture)")
    args = p.parse_args()
    with runs.one_sentence_for_errors():
        rank, world, device = runs.start_processes(args.timeout)
        runs.Interruption(at_once=True)
        checkpoint = segmenter.read_checkpoint(args.checkpoint)
        net = segmenter.from_checkpoint(checkpoint, args.checkpoint).to(device).eval()
        if not args.image:
            evaluate_datasets(net, checkpoint, args, rank, world, device)
        elif rank == 0:
            sys.exit("\n".join(label_images(net, checkpoint, args)) or 0)


if __name__ == "__main__":
    main()
