"""Evaluation: label maps by sliding windows, confusion matrices, mIoU; and pictures of one's own.

    python evaluate.py --checkpoint out/toy/last.pt --datasets toy                  one process
    torchrun --nproc_per_node=8 evaluate.py --checkpoint out/coco-stuff/last.pt --datasets all
    python evaluate.py --checkpoint FILE --image photo.jpg --classes "cat, sofa, wooden floor"

Every image is evaluated once, whatever the number of processes. Tables are also written, to
eval/DATASET.json beside the checkpoint; a picture's labels to photo.seg.png beside the picture.
"""
import support.signals  # noqa: F401, first: it handles Ctrl-C during the slow imports
import functools
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

import data
from losses import IGNORE
from sources.readers import as_image, read_image
from support import labelling, pictures, runs, weights
from support.command_line import parse_evaluation
from support.errors import UserError, reading
from support.tables import format_result


def resize(x, size):
    """Bilinear without antialiasing, as CAT-Seg resizes everything: [B,C,h,w] -> [B,C,*size]."""
    return F.interpolate(x, size, mode="bilinear", align_corners=False)


def is_sliding(views, dataset):
    """Whether to take CAT-Seg's five views: as --views says, by default not of a toy world."""
    return views == "sliding" if views else not dataset.startswith("toy")


def views(image, size, sliding):
    """A PIL image -> [V,3,size,size], normalised, and the side of the canvas on which they lie.

    sliding: CAT-Seg's five views. The image is brought to a shortest side of 5/3 size (640 for
    384), squeezed to a square canvas, and seen through four overlapping windows and as a whole.
    Otherwise only the whole.
    """
    canvas = round(size * 5 / 3) if sliding else size
    scale = min(canvas / min(image.size), 4 * canvas / max(image.size))
    width, height = (max(1, int(side * scale + 0.5)) for side in image.size)
    x = data.normalise(image.resize((width, height), Image.Resampling.BILINEAR))[None]
    whole = resize(x, (size, size))
    if not sliding:
        return whole, canvas
    x = resize(x, (canvas, canvas))
    step = canvas - size  # from a window to the next: one lies in each corner
    windows = x[0].unfold(1, size, step).unfold(2, size, step).flatten(1, 2)  # [3,4,size,size]
    return torch.cat([windows.transpose(0, 1), whole]), canvas


def merge(scores, canvas):
    """Scores of the views [V,c,size,size] -> [1,c,canvas,canvas]: windows averaged where they
    overlap, then with the whole."""
    size = scores.shape[-1]
    whole = resize(scores[-1:], (canvas, canvas))
    if len(scores) == 1:
        return whole
    windows = scores[:-1].flatten(1).T[None]  # [1,c*size*size,4], in the order of `views`
    total = F.fold(windows, canvas, size, stride=canvas - size)  # [1,c,canvas,canvas]
    count = F.fold(torch.ones_like(windows[:, :size * size]), canvas, size, stride=canvas - size)
    return (total / count + whole) / 2


@torch.inference_mode()
def class_scores(model, image, text, sliding=True, zero_shot=False, size=None, chunk=None):
    """Yields (first class, probabilities [1,c,H,W]) for successive chunks of the classes of text
    [K,D]: a photograph with many classes has gigabytes of scores.

    H, W: `size`, the image's own by default. Probabilities are sigmoids of the head's logits; with
    zero_shot, CLIP's own cosines of patch and text.
    """
    x, canvas = views(image, model.image_size, sliding)
    logits = []
    for view in x.to(text.device).split(1 if text.device.type == "cpu" else len(x)):
        patches, middle = model.encode_image(view)
        if zero_shot:
            logits.append(model.cost(patches, text))
        else:
            logits.append(model.compute_logits(patches, middle, text))
    H, W = size or image.size[::-1]
    chunk = chunk or min(16, max(1, 2 ** 26 // (H * W)))  # classes at once
    for first in range(0, len(text), chunk):
        scores = torch.cat([of_view[:, first:first + chunk] for of_view in logits]).float()
        scores = resize(scores, x.shape[2:])
        if not zero_shot:
            scores = scores.sigmoid()
        yield first, resize(merge(scores, canvas), (H, W))


def label_map(model, image, text, **options):
    """Argmax of `class_scores` over the classes: int64 [H,W]. Ties go to the lower class."""
    best, label = -torch.inf, 0
    for first, scores in class_scores(model, image, text, **options):
        top, index = scores[0].max(0)
        label = torch.where(top > best, index + first, label)
        best = top.clamp(min=best)
    return label


def segment(model, image, names, **options):
    """Label every pixel of an image (a path, a PIL image, or uint8 [H,W,3]) with one of the names,
    a list of strings. Returns int64 [H,W], indices into names. options: those of `class_scores`;
    sliding=False looks only once. Raises UserError."""
    if isinstance(names, str) or not names:
        raise UserError(f"names should be a list of at least one class name, not {names!r}")
    names = data.read_names(names, "the list of names")
    model.eval()
    with torch.inference_mode():
        text = model.encode_text(model.tokenize(names))
    return label_map(model, as_image(image), text, **options)


def confusion_matrix(prediction, pixel_labels, num_classes):
    """int64 [K,K], row = label, column = prediction, of label maps of any shape. Pixels labelled
    IGNORE count nowhere."""
    counted = pixel_labels != IGNORE
    true = pixel_labels[counted].long()
    predicted = prediction[counted].long()
    for name, values in (("label", true), ("prediction", predicted)):
        if len(values) and not 0 <= values.min() <= values.max() < num_classes:
            raise ValueError(f"a {name} lies outside 0..{num_classes - 1}: "
                             f"{values.min()}..{values.max()}")
    pairs = torch.bincount(true * num_classes + predicted, minlength=num_classes ** 2)
    return pairs.reshape(num_classes, -1)


def class_iou(confusion):
    """IoU of each class [K], NaN where it has no pixels; and which classes have ground truth."""
    c = confusion.double()
    return c.diagonal() / (c.sum(0) + c.sum(1) - c.diagonal()), c.sum(1) > 0


def mean_iou(confusion, classes=slice(None)):
    """Both mIoU definitions in circulation, in [0, 1], NaN where no class counts.

    confusion [K,K] from `confusion_matrix`; classes: average over this list of them (the whole
    matrix still counts as errors). "ground_truth" averages over the classes that occur in the
    labels (detectron2 since July 2022, so CAT-Seg and SED); "union" also over classes that are only
    predicted, with IoU 0 (detectron2 0.6, mmsegmentation, so MAFT+ and SAN).
    """
    iou, labelled = (values[classes] for values in class_iou(confusion))
    return {"ground_truth": iou[labelled].mean().item(), "union": iou.nanmean().item()}


def percent(x):
    return None if np.isnan(x) else 100 * x  # JSON has no NaN


def summary(confusion, names, seen=None):
    """A confusion matrix as plain numbers in per cent: both mIoU, pixel accuracy, IoU per class. If
    `seen` (names that segmentation training showed) holds some of the names and not all, also mIoU
    of seen and unseen ones and their harmonic mean."""
    result = {f"mIoU_{name}": percent(value) for name, value in mean_iou(confusion).items()}
    right = confusion.diagonal().sum().item()
    result["pixel_accuracy"] = 100 * right / max(1, confusion.sum().item())
    shown = [i for i, name in enumerate(names) if name in (seen or ())]
    others = [i for i, name in enumerate(names) if name not in (seen or ())]
    if shown and others:
        a = mean_iou(confusion, shown)["ground_truth"]
        b = mean_iou(confusion, others)["ground_truth"]
        harmonic = 2 * a * b / max(a + b, 1e-9)  # NaN if one is
        result |= {"seen": percent(a), "unseen": percent(b), "harmonic": percent(harmonic)}
    iou, labelled = class_iou(confusion)
    iou[~labelled] = torch.nan
    result["classes"] = {name: percent(value) for name, value in zip(names, iou.tolist())}
    return result


def evaluate(model, dataset, device, sliding=True, zero_shot=False, rank=0, world=1,
             desc="evaluating", keep=None):
    """Confusion matrix over a dataset, summed over processes, of which each takes every world-th
    image. keep: called as keep(i, image, pixel_labels, prediction, path) for every image. A
    KeyboardInterrupt is raised with the confusion matrix and number of images of this process."""
    model.eval()
    with torch.inference_mode():
        text = model.encode_text(model.tokenize(dataset.names))
    count = len(dataset.evaluated)
    total = torch.zeros(count, count, dtype=torch.int64, device=device)
    done = 0
    try:
        for i in tqdm(range(rank, len(dataset), world), desc, disable=rank > 0, leave=False):
            image, pixel_labels, path = dataset.load(i)
            prediction = label_map(model, image, text, sliding=sliding, zero_shot=zero_shot)
            prediction = prediction.clamp(max=count - 1)  # of voc-20b all names from the last on
            if keep:
                keep(i, image, pixel_labels, prediction.cpu().numpy(), path)
            pixel_labels = torch.from_numpy(pixel_labels).to(device)
            total += confusion_matrix(prediction, pixel_labels, count)
            done += 1
    except KeyboardInterrupt:
        raise KeyboardInterrupt(total, done) from None
    if world > 1:
        dist.all_reduce(total)
    return total


def evaluate_dataset(name, dataset, model, checkpoint, args, rank, world, device):
    stem = (name + "-zero-shot" if args.zero_shot else name).replace(":", "-").replace("/", "_")
    folder = Path(args.out or Path(args.checkpoint).parent / "eval", stem)
    sliding = is_sliding(args.views, name)

    def report(confusion, images, ending):
        result = {"dataset": name, "split": args.split, "images": images, "source": dataset.source,
                  "checkpoint": args.checkpoint, "zero_shot": args.zero_shot,
                  "views": 5 if sliding else 1, "pixels": confusion.sum().item(),
                  **summary(confusion, dataset.evaluated, checkpoint.get("names"))}
        print(format_result(result))
        print("written to", runs.write_json(result, Path(f"{folder}{ending}")))

    try:
        confusion = evaluate(model, dataset, device, sliding, args.zero_shot, rank, world, name,
                             functools.partial(labelling.keep, folder, dataset, args))
    except KeyboardInterrupt as e:
        if rank == 0 and e.args:
            report(*e.args, ".partial.json")
            print(f"interrupted: this is what the first process had after {e.args[1]} of "
                  f"{len(dataset)} images")
        raise
    if rank == 0:
        report(confusion, len(dataset), ".json")


def compile_parts(model):
    """--compile: the parts of the model that evaluation calls, each by itself."""
    head = model.head
    runs.compile_forward(model.image_encoder, *head.spatial, *head.classes, *head.decoder)


def main():
    args = parse_evaluation(__doc__, data.NAMES, data.REPORTED)
    with runs.one_sentence_for_errors():
        runs.Interruption(at_once=True)
        rank, world, device = runs.start_processes(args.timeout)
        checkpoint = weights.read_checkpoint(args.checkpoint)
        if args.zero_shot:
            with reading(args.checkpoint, "a checkpoint"):
                checkpoint["model"] |= checkpoint.get("original", {})
        model = weights.from_checkpoint(checkpoint, args.checkpoint).to(device).eval()
        del checkpoint["model"]  # one copy is enough
        if args.compile:
            compile_parts(model)
        if args.image:
            wrong = label_pictures(model, checkpoint, args) if rank == 0 else []
            sys.exit("\n".join(wrong) or 0)
        names = []
        for name in args.datasets:
            names += data.REPORTED if name == "all" else [name]
        datasets = [data.open_dataset(n, args.data_root, args.split, args.classes) for n in names]
        for name, dataset in zip(names, datasets):
            if rank == 0:
                print(f"{name}: {len(dataset)} images, {len(dataset.names)} names, "
                      f"from {dataset.source}")
            evaluate_dataset(name, dataset, model, checkpoint, args, rank, world, device)


def label_pictures(model, checkpoint, args):
    """--image: label pictures with --classes. Returns what went wrong, a sentence for each."""
    if not args.classes:
        raise UserError('--image needs --classes, as in --classes "cat, sofa, wooden floor"')
    names = data.read_names(args.classes)
    sliding = is_sliding(args.views, str(checkpoint.get("args", {}).get("dataset")))
    stems = labelling.find_images(args.image, args.out)
    with torch.inference_mode():
        text = model.encode_text(model.tokenize(names))
    wrong = []
    for stem, path in tqdm(stems.items(), "pictures", disable=len(stems) == 1):
        try:
            image = read_image(path)
        except UserError as e:
            wrong.append(f"error: {e}")
            continue
        pixel_labels = label_map(model, image, text, sliding=sliding, zero_shot=args.zero_shot)
        pixel_labels = pixel_labels.cpu().numpy()
        labelling.save(pictures.segmentation(image, pixel_labels, names), f"{stem}.seg.png")
        if args.save_labels:
            labelling.save(labelling.label_image(pixel_labels, names), f"{stem}.labels.png")
        found = [entry for entry, _ in pictures.legend_entries(names, pixel_labels, shares=True)]
        tqdm.write(f"{stem}.seg.png: {', '.join(found)}")
    return wrong


if __name__ == "__main__":
    main()
