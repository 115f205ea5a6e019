"""The paper's analysis: what becomes of CLIP's features, reference patches above all, while CLIP is fine-tuned.

    python study.py pictures --checkpoint out/last.pt --dataset toy          Figure 1 made of one's own data
    python study.py shift --checkpoints out/step-*.pt plain/last.pt --dataset toy
    python study.py ablate --seeds 8         train every part of the method, many times; also curve, spread, sweep: see ablate.py

`shift` compares checkpoints: a run's snapshots (train.py --snapshot-every), or runs with different --adapt and --distill.
Checkpoints hold what of the original CLIP has trained since, so nothing else is needed. Written to --out: pictures.png;
shift.json and shift.png.
"""
import argparse
import copy
import json
import os
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

import data
import evaluate
import model as segmenter
import runs
import viz
from ema import MomentumEncoder
from losses import IGNORE, patch_labels, reference_mask

SHIFTS = {"shift_reference": "shift of reference patches", "shift_noisy": "shift of noisy patches",
          "shift_text": "shift of texts"}
SCORES = ("seen", "unseen", "mIoU_ground_truth")                                           # in per cent
PROMPTS = (segmenter.PROMPT, "a photo of a {}", "there is a {} here", "a close view of the {}", "{}")  # for texts' variance


@torch.no_grad()
def reference_share(model, tokens, batches, device, momentum=None):
    """Share of the labelled patches that are reference patches, Eq. (1), of the momentum encoder (of the model without one).

    Over batches of (images, target, paths), and over all processes. momentum: a MomentumEncoder.
    """
    sums, text = torch.zeros(2, dtype=torch.float64, device=device), model.encode_text(tokens)
    for images, target, _ in batches:
        labels, images = patch_labels(target.to(device), model.grid), images.to(device)
        teacher = momentum.encode_image(images) if momentum else model.encode_image(images)[0]
        sums += torch.stack([reference_mask(teacher, text, labels).sum(), (labels != IGNORE).sum()])
    return ratio_over_processes(sums)


@torch.no_grad()
def reference_drift(model, original, original_text, batches, device):
    """1 - cos of the model's features to the original CLIP's, averaged over the original's reference patches.

    Over batches of (images, target, paths), and over all processes. original: a MomentumEncoder; original_text: its T.
    """
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    for images, target, _ in batches:
        labels, images = patch_labels(target.to(device), model.grid), images.to(device)
        patches, first = model.encode_image(images)[0], original.encode_image(images)
        anchors = reference_mask(first, original_text, labels)
        sums += torch.stack([(1 - F.cosine_similarity(patches, first, dim=-1))[anchors].double().sum(), anchors.sum()])
    return ratio_over_processes(sums)


def ratio_over_processes(sums):
    if dist.is_initialized():
        dist.all_reduce(sums)
    return (sums[0] / sums[1].clamp(min=1)).item()


def one_view(model, image, labels):
    """A picture squeezed to the model's size: (images [1,3,S,S], patch labels [1,L])."""
    device, size = model.logit_scale.device, model.image_size
    target = F.interpolate(torch.from_numpy(labels).float()[None, None], (size, size), mode="nearest").long()[0]
    return evaluate.views(image, size, sliding=False)[0].to(device), patch_labels(target, model.grid).to(device)


def nearest_class(patches, text, count):
    """The class that each patch's feature names: patches [...,D], text [K,D] -> [...], names from `count` on being one class."""
    return (F.normalize(patches, dim=-1) @ F.normalize(text, dim=-1).T).argmax(-1).clamp(max=count - 1)


@torch.no_grad()
def example_sheet(model, original, original_text, momentum, dataset, sliding, count=6):
    """A row per image, the paper's Figure 1 made of one's own data. Returns a PIL image.

    Columns: picture, ground truth, the reference patches of the original CLIP and of the momentum encoder (if there is one),
    the patches that the model's own features name rightly, and the labels that its head makes of them. original, momentum:
    MomentumEncoders.
    """
    text, names, rows, maps = model.encode_text(model.tokenize(dataset.names)), dataset.evaluated, [], []
    for i in np.linspace(0, len(dataset) - 1, min(count, len(dataset))).astype(int):
        image, labels, _ = dataset.load(i)
        prediction = evaluate.label_map(model, image, text, sliding=sliding).clamp(max=len(names) - 1).cpu().numpy()
        view, patches = one_view(model, image, labels)
        seen_by = [(original.encode_image(view), original_text), (model.encode_image(view)[0], text)]
        if momentum:
            seen_by.insert(1, (momentum.encode_image(view), text))
        masks = [(nearest_class(v, t, len(names)) == patches).reshape(model.grid).cpu().numpy() for v, t in seen_by]
        rows.append([image, viz.paint(labels, names), *(viz.highlight(image, mask) for mask in masks),
                     viz.paint(prediction, names)])
        maps += [labels, prediction]
    titles = ["picture", "ground truth", "reference patches\nof the original CLIP", "patches that are right\nin the target CLIP",
              "prediction"]
    if momentum:
        titles.insert(3, "reference patches of\nthe momentum encoder")
    return viz.grid(titles, rows, entries=viz.present(names, *maps))


class Part:
    """Some of a dataset's images, evenly spread; all of them for count 0."""

    def __init__(self, dataset, count):
        self.names, self.evaluated, self.dataset = dataset.names, dataset.evaluated, dataset
        self.indices = np.linspace(0, len(dataset) - 1, min(count or len(dataset), len(dataset))).astype(int)

    def __len__(self):
        return len(self.indices)

    def load(self, i):
        return self.dataset.load(self.indices[i])


class Spread:
    """Intra-class variance and inter-class separation of unit vectors, gathered by class.

    Variance: 1 - cos of a vector to its class's mean direction, first averaged over a class and then over classes. With u
    the mean of a class's unit vectors, that is 1 - |u|. Separation: 1 - cos between two classes' mean directions, averaged
    over pairs of classes.
    """

    def __init__(self, num_classes, width, device):
        self.sums = torch.zeros(num_classes, width, dtype=torch.float64, device=device)
        self.counts = torch.zeros(num_classes, dtype=torch.float64, device=device)

    def add(self, vectors, classes):
        """vectors [n,D] of any length, classes [n]."""
        self.sums.index_add_(0, classes, F.normalize(vectors, dim=-1).double())
        self.counts.index_add_(0, classes, torch.ones_like(classes, dtype=torch.float64))

    def result(self):
        """(variance, separation); separation is None for fewer than two classes."""
        there = self.counts > 0
        means = self.sums[there] / self.counts[there, None]
        cosines, n = F.normalize(means, dim=-1) @ F.normalize(means, dim=-1).T, len(means)
        separation = 1 - (cosines.sum() - cosines.diagonal().sum()) / (n * (n - 1)) if n > 1 else None
        return (1 - means.norm(dim=-1)).mean().item(), None if separation is None else separation.item()


@torch.no_grad()
def shift_statistics(model, original, first_text, dataset, desc="patches"):
    """The paper's quantities for one model against the original CLIP, over a dataset's images, each squeezed to one view.

    original: a MomentumEncoder of the original CLIP; first_text: that CLIP's T, of the dataset's names [K,D].
    Reference patches: those that the original CLIP names rightly, Eq. (1). Noisy patches ("globally contaminated"): those
    that it gives to the image's dominant class, the one with the most patches, though they belong to another.
    Returns a dict of numbers: shift_reference, shift_noisy, shift_text: 1 - cos to the original CLIP's features, averaged
    over these patches and over class names. contamination: among the patches that this model names wrongly, the share that it
    gives to the image's dominant class. right_share: of the labelled patches, those that this model names rightly. And
    variance and separation of patches and of texts, as `Spread` has them; a name's texts are its PROMPTS.
    """
    tokens, K, classes = model.tokenize(dataset.names), len(dataset.names), len(dataset.evaluated)
    device, text = tokens.device, model.encode_text(tokens)
    sums, spread = torch.zeros(7, dtype=torch.float64, device=device), Spread(K, text.shape[1], device)
    for i in tqdm(range(len(dataset)), desc, leave=False):
        image, labels, _ = dataset.load(i)
        view, labels = one_view(model, image, labels)
        known = (labels != IGNORE)[0]
        if not known.any():
            continue
        patches, first = model.encode_image(view)[0][0][known], original.encode_image(view)[0][known]
        labels = labels[0][known]
        dominant = labels.bincount(minlength=K).argmax()
        guess, first_guess = nearest_class(patches, text, classes), nearest_class(first, first_text, classes)
        reference, wrong = first_guess == labels, guess != labels
        noisy = ~reference & (first_guess == dominant)
        drift = (1 - F.cosine_similarity(patches, first, dim=-1)).clamp(min=0)
        sums += torch.stack([drift[reference].sum(), reference.sum(), drift[noisy].sum(), noisy.sum(),
                             (wrong & (guess == dominant)).sum(), wrong.sum(), (~wrong).sum()]).double()
        spread.add(patches, labels)
    texts = Spread(K, text.shape[1], device)
    for prompt in PROMPTS:
        texts.add(model.encode_text(model.tokenize(dataset.names, prompt)), torch.arange(K, device=device))
    share = lambda a, b: (sums[a] / sums[b]).item() if sums[b] else None
    variance, separation = spread.result()
    text_variance, text_separation = texts.result()
    return {"shift_reference": share(0, 1), "shift_noisy": share(2, 3),
            "shift_text": (1 - F.cosine_similarity(text, first_text, dim=-1)).clamp(min=0).mean().item(), "contamination": share(4, 5),
            "right_share": (sums[6] / (sums[5] + sums[6])).item(), "patch_variance": variance,
            "patch_separation": separation, "text_variance": text_variance, "text_separation": text_separation}


def pearson(x, y):
    """Pearson's correlation of two lists of numbers; None for fewer than three pairs without None or NaN, or where one does
    not vary."""
    pairs = np.array(list(zip(x, y)), float).reshape(-1, 2)                                # None becomes NaN
    pairs = pairs[np.isfinite(pairs).all(1)]
    if len(pairs) < 3 or (pairs.std(0) < 1e-12).any():
        return None
    return float(np.corrcoef(pairs.T)[0, 1])


def read(path, device):
    """(checkpoint, its model, the same with the original CLIP's weights) of a checkpoint of train.py."""
    checkpoint = segmenter.read_checkpoint(path)
    if "original" not in checkpoint:
        raise ValueError(f"{path} does not hold the original CLIP's weights: it is no checkpoint of this version's train.py")
    net = segmenter.from_checkpoint(checkpoint, path).to(device).eval()
    net.set_trained(checkpoint["args"]["adapt"])
    original = copy.deepcopy(net)
    segmenter.load_state(original, {**checkpoint["model"], **checkpoint["original"]}, path)
    return checkpoint, net, original


def pictures(args, device):
    checkpoint, net, original = read(args.checkpoint, device)
    dataset = data.open_dataset(args.dataset, args.data_root, args.split, args.classes)
    momentum = None
    if checkpoint["momentum"]:
        momentum = MomentumEncoder(net, 1.0)
        momentum.load_state_dict(checkpoint["momentum"])
    with torch.no_grad():
        text = original.encode_text(original.tokenize(dataset.names))
    path = Path(args.out, "pictures.png")
    sheet = example_sheet(net, MomentumEncoder(original, 1.0), text, momentum, dataset, args.sliding, args.images or 6)
    sheet.save(path)
    print(f"written to {path}")


@torch.no_grad()
def shift(args, device):
    dataset = Part(data.open_dataset(args.dataset, args.data_root, args.split, args.classes), args.images)
    rows, out = [], Path(args.out)

    def row(name, step, model, original, seen):
        zero_shot, first_text = model is original, original.encode_text(original.tokenize(dataset.names))
        confusion = evaluate.evaluate(model, dataset, device, args.sliding, zero_shot, desc=f"mIoU of {name}")
        scores = evaluate.summary(confusion, dataset.evaluated, seen)
        rows.append({"checkpoint": name, "step": step, **{key: scores.get(key) for key in SCORES},
                     **shift_statistics(model, MomentumEncoder(original, 1.0), first_text, dataset, f"patches of {name}")})
        correlate(args, rows, len(dataset), out / "shift.json")                          # after each: it may take hours

    for path in args.checkpoints:
        checkpoint, net, original = read(path, device)
        if not rows:
            row("original CLIP", 0, original, original, checkpoint["names"])
        row(path, checkpoint["step"], net, original, checkpoint["names"])
    show = lambda key, v: "-" if v is None else f"{v:.1f}" if key in SCORES else f"{v:.3f}"
    print(evaluate.table([["", *(r["checkpoint"] for r in rows)]] +
                         [[key, *(show(key, r[key]) for r in rows)] for key in rows[0] if key not in ("checkpoint", "step")]))
    found, target = correlate(args, rows, len(dataset), out / "shift.json")
    texts = {key: "not defined" if v is None else f"{v:+.2f}" for key, v in found.items()}
    print(f"\nPearson correlation with {target} over {len(rows) - 1} checkpoint(s): " +
          ", ".join(f"{key} {text}" for key, text in texts.items()))
    viz.save_plot(out / "shift.png", [
        (f"n = {len(rows) - 1}, r {text}", f"{SHIFTS[key]}, 1 - cos", f"mIoU ({target}), %",
         [("", [r[key] for r in rows[1:]], [r[target] for r in rows[1:]], "o")]) for key, text in texts.items()])
    print(f"written to {out}: shift.json, shift.png")


def correlate(args, rows, images, path):
    """Write the rows so far, and the correlation of each shift with mIoU over them but the first, the original CLIP.
    Returns ({shift: Pearson's r or None}, name of the mIoU)."""
    target = "unseen" if rows[0]["unseen"] is not None else "mIoU_ground_truth"
    found = {key: pearson([r[key] for r in rows[1:]], [r[target] for r in rows[1:]]) for key in SHIFTS}
    path.write_text(json.dumps({"dataset": args.dataset, "split": args.split, "images": images, "rows": rows,
                                "correlation": {"with": target, "checkpoints": len(rows) - 1, **found}}, indent=1))
    return found, target


def compare(args, device):
    import ablate  # which trains, and so needs all the rest
    ablate.VERBS[args.verb](args)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = p.add_subparsers(required=True, dest="verb")
    draw = verbs.add_parser("pictures", help="draw what the encoders see")
    draw.add_argument("--checkpoint", required=True, help="of train.py")
    measure = verbs.add_parser("shift", help="measure what fine-tuning moved")
    measure.add_argument("--checkpoints", required=True, nargs="+", help="of train.py, whole or snapshots")
    for verb, run in ((draw, pictures), (measure, shift)):
        verb.set_defaults(run=run)
        verb.add_argument("--dataset", default="toy", help=", ".join(data.NAMES))
        verb.add_argument("--data-root", help="the folder that holds the datasets")
        verb.add_argument("--split", default="val")
        verb.add_argument("--classes", help="other names for the dataset's classes: a file, or comma-separated")
        verb.add_argument("--images", type=int, default=0, help="how many, evenly spread (default 6 to draw, all to measure)")
        verb.add_argument("--views", choices=("sliding", "whole"), help="for the head's labels (default: one view for toy)")
        verb.add_argument("--out", default="out/study", help="folder for the results (default out/study)")
    for verb, text in (("ablate", "train each part of the method over many seeds"), ("curve", "train over CLIP's learning rates"),
                       ("spread", "train to see what a seed changes"), ("sweep", "train what the tiny recipe was chosen from")):
        many = verbs.add_parser(verb, help=text, allow_abbrev=False, description=f"{text}, several runs side by side with one thread "
                                "each. Writes VERB.md, VERB.json and VERB.png to --out. The same command goes on where it stopped. Flags of "
                                "train.py are passed on to every run.")
        many.set_defaults(run=compare)
        many.add_argument("--seeds", type=int, default=3 if verb == "sweep" else 5, help="how many (default %(default)s)")
        many.add_argument("--first-seed", type=int, default=101 if verb == "sweep" else 1, help="the first of them (default %(default)s)")
        many.add_argument("--dataset", default="toy", help="toy (default), or folder:PATH for ablate and curve")
        many.add_argument("--unseen", nargs="+", help="of pictures, the names to hold out: comma-separated, a list for each split")
        if verb == "ablate":
            many.add_argument("--rows", nargs="+", help="only rows with these words in their name, and plain fine-tuning")
        many.add_argument("--jobs", type=int, default=1 if torch.cuda.is_available() else os.cpu_count(),
                          help="runs side by side (default: one on a GPU, else as many as there are cores)")
        many.add_argument("--out", default="out/ablate", help="folder for the runs and results (default out/ablate)")
    args, further = p.parse_known_args()
    if args.run is not compare and further:
        p.error(f"unrecognized arguments: {' '.join(further)}")
    args.further = further
    with runs.one_sentence_for_errors():
        if args.run is not compare:
            args.sliding = evaluate.is_sliding(args.views, args.dataset)
        Path(args.out).mkdir(parents=True, exist_ok=True)
        args.run(args, torch.device("cuda" if torch.cuda.is_available() else "cpu"))


if __name__ == "__main__":
    main()
