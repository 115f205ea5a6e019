"""Evaluation: label maps by sliding windows, confusion matrices, mIoU; and your own pictures.

    python evaluate.py --checkpoint out/toy/last.pt --datasets toy                  one process
    torchrun --nproc_per_node=8 evaluate.py --checkpoint out/coco-stuff/last.pt --datasets all
    python evaluate.py --checkpoint FILE --image photo.jpg --classes "cat, sofa, wooden floor"

Scores are printed and written to eval/DATASET.json beside the checkpoint. photo.jpg.rpmd.png will
show the labels of photo.jpg.
"""
import argparse
import hashlib
import json
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from open_clip.tokenizer import get_clean_fn
from PIL import Image
from tqdm import tqdm

import data
from losses import IGNORE, correctly_classified, patch_labels
from model import tokenize
from support import accidents, checkpoint
from support.files import UserError, reading, write_json


def resize(x, size):
    """Bilinear without antialiasing, as CAT-Seg resizes everything: [B,C,h,w] -> [B,C,*size]."""
    return F.interpolate(x, size, mode="bilinear", align_corners=False)


def views(image, size, sliding):
    """A PIL image -> [V,3,size,size], normalised, and the side of the canvas on which they lie.

    sliding: CAT-Seg's five views. The image is brought to a shortest side of 5/3 size (640 for
    384), squeezed to a square canvas, and seen through four overlapping windows and as a whole.
    Otherwise only the whole."""
    canvas = round(size * 5 / 3) if sliding else size
    scale = min(canvas / min(image.size), 4 * canvas / max(image.size))
    width, height = (max(1, int(side * scale + 0.5)) for side in image.size)
    pixels = np.array(image.resize((width, height), Image.Resampling.BILINEAR))
    x = data.normalise(torch.from_numpy(pixels).permute(2, 0, 1))[None]  # [1,3,height,width]
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
def encode_names(model, names):
    """T [K,D] of K class names."""
    return model.encode_text(model.tokenize(names))


@torch.inference_mode()
def class_scores(model, image, text, sliding=True, zero_shot=False, chunk=None):
    """Yields (first class, scores [1,c,H,W]) for successive chunks of the classes of text [K,D],
    because a photograph with many classes has gigabytes of scores. image: PIL. Scores are sigmoids
    of the head's logits or, with zero_shot, CLIP's cosines. chunk: classes at a time."""
    x, canvas = views(image, model.image_size, sliding)
    H, W = image.height, image.width
    on_cpu = text.device.type == "cpu"
    logits = []
    for view in x.to(text.device).split(1 if on_cpu else len(x)):
        patches, middle = model.encode_image(view)
        logits.append(model.cost(patches, text) if zero_shot
                      else model.compute_logits(patches, middle, text))
    chunk = chunk or max(1, min(16 if on_cpu else 64, 2 ** 26 // (H * W)))  # classes at once
    for first in range(0, len(text), chunk):
        scores = torch.cat([of_view[:, first:first + chunk] for of_view in logits]).float()
        scores = resize(scores, x.shape[2:])
        scores = scores if zero_shot else scores.sigmoid()
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
    """Label every pixel of an image (a path, a PIL image or uint8 [H,W,3]; turned upright as its
    EXIF says). names: a list, or a file or text as for --classes. Returns int64 [H,W], indices into
    names. options: those of `class_scores`; sliding=False takes one view. Raises UserError."""
    from sources.readers import read_image
    names = data.read_names(names, "the list of names")
    check_names(names, model.text_encoder.context_length, own_words=True)
    return label_map(model.eval(), read_image(image), encode_names(model, names), **options)


def normalised_name(name):
    """What the tokenizer makes of a class name: its first synonym, in small letters."""
    return get_clean_fn("lower")(name.partition(",")[0])


def check_names(names, context_length=77, own_words=False, trained_on=""):
    """Check that the text encoder tells all names apart and reads them in full. If not, raise
    UserError if own_words (the user chose the names), else print a note. trained_on: the
    checkpoint's dataset; if it is a toy world, warn of words that its CLIP never saw."""
    first = {}
    for name, tokens in zip(names, tokenize(names, context_length).tolist()):
        other, problem = first.setdefault(tuple(tokens), name), ""
        if other != name:
            problem = (f"the text encoder reads the names {other!r} and {name!r} alike, so one of "
                       "them can never be predicted")
        elif tokens[-1] and tokenize([name], context_length + 1).shape[1] > context_length:
            problem = f"the name {name[:100]!r} is too long for the text encoder"
        if problem and own_words:
            raise UserError(problem)
        if problem:
            accidents.say(f"note: {problem}")
    if trained_on.startswith("toy"):
        from sources.toy import NAMES
        words = set(" ".join(NAMES).split())
        unknown = [name for name in names if not words.issuperset(normalised_name(name).split())]
        if unknown:
            accidents.say(f"warning: the toy world's CLIP has no words for {unknown[0]!r}")


def confusion_matrix(prediction, pixel_labels, num_classes):
    """int64 [K,K], row = label, column = prediction, of label maps of any shape. Pixels labelled
    IGNORE count nowhere. Raises ValueError for other values outside 0..K-1."""
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

    confusion [K,K] from `confusion_matrix`; classes: indices to average over (errors that involve
    other classes still count). "ground_truth" averages over the classes that occur in the
    labels (detectron2 since July 2022, so CAT-Seg and SED); "union" also over classes that are only
    predicted, with IoU 0 (detectron2 0.6, mmsegmentation, so MAFT+ and SAN)."""
    iou, labelled = (values[classes] for values in class_iou(confusion))
    return {"ground_truth": iou[labelled].mean().item(), "union": iou.nanmean().item()}


def summary(confusion, names, seen=None):
    """Scores of a confusion matrix, in per cent or None: mIoU_ground_truth, mIoU_union, pixels (a
    number), pixel_accuracy, classes {name: IoU}. If `seen`, the training names, covers some names
    but not all: also seen, unseen (ground-truth mIoU) and their harmonic mean, harmonic. Names are
    compared as the tokenizer reads them; an unseen "background" counts in neither group."""
    def percent(x):
        return None if np.isnan(x) else 100 * x  # JSON has no NaN

    result = {f"mIoU_{name}": percent(value) for name, value in mean_iou(confusion).items()}
    result["pixels"] = confusion.sum().item()
    result["pixel_accuracy"] = percent((confusion.double().trace() / confusion.sum()).item())
    seen = set(map(normalised_name, seen or ()))
    read = list(map(normalised_name, names))
    shown = [i for i, name in enumerate(read) if name in seen]
    others = [i for i, name in enumerate(read) if name not in {*seen, "background"}]
    if shown and others:
        a = mean_iou(confusion, shown)["ground_truth"]
        b = mean_iou(confusion, others)["ground_truth"]
        harmonic = 2 * a * b / max(a + b, 1e-9)  # NaN if one is
        result |= {"seen": percent(a), "unseen": percent(b), "harmonic": percent(harmonic)}
    iou, labelled = class_iou(confusion)
    iou[~labelled] = torch.nan
    result["classes"] = {name: percent(value) for name, value in zip(names, iou.tolist())}
    return result


def predict(model, dataset, image, text, zero_shot=False):
    """`label_map` as indices into dataset.evaluated; names past its end count as its last entry."""
    labels = label_map(model, image, text, sliding=dataset.sliding, zero_shot=zero_shot)
    return labels.clamp(max=len(dataset.evaluated) - 1)


def evaluate(model, dataset, seen=None, zero_shot=False, rank=0, world=1):
    """`summary` of a dataset. Each of the processes (world) takes every world-th image."""
    text = encode_names(model.eval(), dataset.names)
    K = len(dataset.evaluated)
    total = torch.zeros(K + 1, K + 1, dtype=torch.int64, device=text.device)  # row K: IGNORE
    for i in tqdm(range(rank, len(dataset), world), "evaluating", disable=rank > 0, leave=False):
        if accidents.stop_asked:
            raise KeyboardInterrupt
        image, pixel_labels, _ = dataset.load(i)
        labels = torch.from_numpy(np.where(pixel_labels == IGNORE, K, pixel_labels))
        prediction = predict(model, dataset, image, text, zero_shot)
        total += confusion_matrix(prediction, labels.to(text.device), K + 1)
    if world > 1:
        dist.all_reduce(total)
    if message := data.doubt_about_255(dataset, total.sum(1).cpu()):
        accidents.say(f"warning: {message}")
    return summary(total[:K, :K], dataset.evaluated, seen)


def patch_view(model, image, pixel_labels):
    """An image as one whole view [1,3,S,S] on the model's device, and its patches' labels [1,L]."""
    device, size = model.logit_scale.device, model.image_size
    view, _ = views(image, size, sliding=False)
    small = torch.from_numpy(pixel_labels).float()[None, None]  # [1,1,H,W]
    small = F.interpolate(small, (size, size), mode="nearest")[0].long()
    return view.to(device), patch_labels(small, model.grid).to(device)


@torch.inference_mode()
def examples(path, model, original, momentum, dataset, seen):
    """Draw, for three images of a dataset, the reference patches before and after training, and
    the prediction. original: the Segmenter with CLIP as training began; momentum: MomentumEncoder,
    or None for the model's own patches; seen: the training names."""
    from support import pictures
    seen = set(map(normalised_name, seen))
    unseen = [name for name in dataset.evaluated if normalised_name(name) not in seen]
    encode = momentum or model.encode_image
    first_text, text = encode_names(original, dataset.names), encode_names(model, dataset.names)
    rows, label_maps = [], []
    for i in np.linspace(0, len(dataset) - 1, min(3, len(dataset))).astype(int):
        image, pixel_labels, _ = dataset.load(i)
        view, labels = patch_view(model, image, pixel_labels)
        before = correctly_classified(original.encode_image(view)[0], first_text, labels)  # [1,L]
        after = correctly_classified(encode(view)[0], text, labels)
        masks = [mask.reshape(model.grid).cpu().numpy() for mask in (before, after)]
        prediction = predict(model, dataset, image, text).cpu().numpy()
        rows.append([image, pictures.paint(pixel_labels),
                     *(pictures.highlight(image, mask) for mask in masks),
                     pictures.paint(prediction)])
        label_maps += [pixel_labels, prediction]
    titles = ["picture", "ground truth", "reference patches:\nCLIP before training",
              f"reference patches:\n{'momentum' if momentum else 'trained'} encoder", "prediction"]
    caption = ("Full colour: patches whose feature is nearest to the name of their label.   "
               "* a name outside the training set.")
    legend = pictures.legend(dataset.evaluated, label_maps, unseen)
    pictures.sheet(path, titles, rows, legend, caption)


def format_table(rows):
    """Rows of cells as a Markdown table, the first of which is the header; None becomes "-"."""
    def text(cell):
        if cell is None:
            return "-"
        return f"{cell:.1f}" if isinstance(cell, float) else str(cell).replace("|", "\\|")

    cells = [list(map(text, row)) for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells)]
    cells.insert(1, ["-" * width for width in widths])
    padded = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in cells]
    return "\n".join(f"| {' | '.join(row)} |" for row in padded)


def result_path(name, dataset, args):
    """The file of a dataset's results: what differs from the default is in its name."""
    weights = Path(args.checkpoint).resolve()
    kind, _, place = name.partition(":")
    folder = str(Path(place).expanduser().resolve()) if kind == "folder" else ""
    words = [Path(folder).name[:40] or name.replace(":", "-")]
    if args.zero_shot:
        words.append("zero-shot")
    if weights.name != "last.pt":
        words.append(weights.stem)
    digested = [folder, args.classes and dataset.names, args.out and str(weights),
                weights.name != "last.pt" and weights.name]
    if any(digested):
        words.append(hashlib.sha256(json.dumps(digested).encode()).hexdigest()[:8])
    return Path(args.out or weights.parent / "eval", "-".join(words) + ".json")


def label_pictures(model, trained_on, args):
    """--image: label pictures, or all files of folders, with --classes. Those that can't be read
    are listed at the end, as a UserError."""
    from sources.readers import read_image
    from support import pictures
    if not args.classes:
        raise UserError('--image needs --classes, as in --classes "cat, sofa, wooden floor"')
    names = data.read_names(args.classes)
    check_names(names, model.text_encoder.context_length, own_words=True, trained_on=trained_on)
    text = encode_names(model, names)
    paths = []
    for place in map(Path, args.image):
        files = [path for path in place.glob("[!.]*") if not path.is_dir()]
        paths += sorted(files) if place.is_dir() else [place]
    paths = [path for path in dict.fromkeys(paths) if ".rpmd." not in path.name]  # written here
    if not paths:
        raise UserError(f"--image {' '.join(args.image)}: there is no picture")
    done, wrong = set(), []
    for path in tqdm(paths, "pictures", leave=False):
        target = Path(args.out or path.parent, f"{path.name}.rpmd.png")  # a name that nobody uses
        try:
            if target in done:
                raise UserError(f"{path} would overwrite {target}, of another picture")
            image = read_image(path)
            labels = label_map(model, image, text, zero_shot=args.zero_shot).cpu().numpy()
            shares = pictures.labelled(target, [(image, labels)], names, shares=True)
            done.add(target)
            tqdm.write(f"{target}: {', '.join(shares)}")
        except UserError as e:
            wrong.append(str(e))
    if wrong:
        raise UserError(f"{len(wrong)} of {len(paths)} files are not labelled: {'; '.join(wrong)}")


def parse(argv=None):
    p = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    add, either = p.add_argument, p.add_mutually_exclusive_group().add_argument
    add("--checkpoint", required=True, help="checkpoint of train.py, or one that CAT-Seg published")
    either("--datasets", nargs="+", default=["toy"], metavar="NAME",
           help=f"{', '.join(data.NAMES)}; all: {', '.join(data.REPORTED)} (default toy)")
    add("--data-root", help=data.ROOT_HELP)
    either("--image", nargs="+", metavar="PATH", help="label these pictures or folders instead; "
                                                       "needs --classes")
    add("--classes", help="class names, a file or comma-separated; replace a dataset's own")
    add("--zero-shot", action="store_true", help="the original CLIP, without the head")
    add("--out", help="folder for results (default: eval/ beside the checkpoint; with --image, "
                      "beside the picture)")
    return p.parse_args(argv)


def main():
    args = parse()
    rank, world, device = accidents.start_processes()
    contents = checkpoint.read(args.checkpoint)
    with reading(args.checkpoint, "a checkpoint"):
        if args.zero_shot:
            contents["model"] |= contents["original"]
        trained_on = str(contents.get("args", {}).get("dataset"))
        seen = [str(name) for name in contents.get("names", ())]
    model = checkpoint.build_from(contents, args.checkpoint).to(device).eval()
    if args.image:
        if rank == 0:
            label_pictures(model, trained_on, args)
        return

    names = []
    for name in args.datasets:
        names += data.REPORTED if name == "all" else [name]
    datasets = [data.open_dataset(name, args.data_root, "val", args.classes) for name in names]
    accidents.agree({"--checkpoint": contents["digest"], "--zero-shot": args.zero_shot,
                     "digest of images and names": [dataset.fingerprint for dataset in datasets]})
    for dataset in datasets:
        check_names(dataset.names, model.text_encoder.context_length, dataset.own_words, trained_on)
    for name, dataset in zip(names, datasets):
        accidents.say(f"{name}: {dataset.description}")
        result = dict(
            dataset=name, images=len(dataset), source=dataset.source, checkpoint=args.checkpoint,
            step=contents.get("step"), zero_shot=args.zero_shot,
            **evaluate(model, dataset, seen, args.zero_shot, rank, world))
        if rank == 0:
            rows = [("per cent", name)]
            rows += [(key, value) for key, value in result.items() if isinstance(value, float)]
            rows += sorted(result["classes"].items(), key=lambda row: -(row[1] or 0))
            print(format_table(rows))
            print(f"written to {write_json(result, result_path(name, dataset, args))}")


if __name__ == "__main__":
    with accidents.door():
        main()
