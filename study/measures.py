"""What fine-tuning does to CLIP's features, in numbers and pictures, and the verbs that tell it of
checkpoints of train.py. `original` is the image encoder before training, frozen."""
import copy
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import evaluate
from data import open_dataset
from ema import MomentumEncoder
from losses import IGNORE, patch_labels
from model import PROMPT
from support import pictures as drawing
from support import runs, tables, weights
from support.errors import UserError

SHIFTS = {"shift_reference": "shift of reference patches",
          "shift_noisy": "shift of noisy patches", "shift_text": "shift of texts"}
PROMPTS = (PROMPT, "a photo of a {}", "there is a {} here", "a close view of the {}", "{}")
METRICS = ("seen", "unseen", "mIoU_ground_truth")  # of `shift`, in per cent


class Subset(torch.utils.data.Subset):
    """Some of a dataset's images, evenly spread; all of them for count 0."""

    def __init__(self, dataset, count):
        count = min(count or len(dataset), len(dataset))
        super().__init__(dataset, np.linspace(0, len(dataset) - 1, count).astype(int))
        self.names = dataset.names
        self.evaluated = dataset.evaluated

    def load(self, i):
        return self.dataset.load(self.indices[i])


def varied(dataset, count):
    """A Subset of images that show different things: of ten times as many, evenly spread, each one
    taken is that whose shares of classes are farthest from those of the ones before."""
    some = Subset(dataset, 10 * count)
    shares = []
    for i in range(len(some)):
        pixel_labels = some.load(i)[1]
        known = pixel_labels[pixel_labels != IGNORE]
        shares.append(np.bincount(known, minlength=len(dataset.evaluated)) / pixel_labels.size)
    shares = torch.from_numpy(np.stack(shares))  # [n,K]
    apart = torch.cdist(shares, shares, p=1).fill_diagonal_(-1)  # [n,n]; none is taken twice
    taken = [0]
    while len(taken) < min(count, len(some)):
        taken.append(apart[taken].amin(0).argmax().item())
    some.indices = some.indices[sorted(taken)]
    return some


def views(model, dataset, desc="patches"):
    """Of each image: the picture, its labels [H,W], and both squeezed to the model's size, as
    [1,3,S,S] and patch labels [1,L]."""
    device, size = model.logit_scale.device, model.image_size
    for i in tqdm(range(len(dataset)), desc, leave=False):
        image, pixel_labels, _ = dataset.load(i)
        view, _ = evaluate.views(image, size, sliding=False)
        small = torch.from_numpy(pixel_labels).float()[None, None]  # [1,1,H,W]
        small = F.interpolate(small, (size, size), mode="nearest")[0].long()
        yield image, pixel_labels, view.to(device), patch_labels(small, model.grid).to(device)


def nearest_class(patches, text, count):
    """What patches [...,D] name of text [K,D] -> [...]; names from `count` on are one class."""
    cosine = F.normalize(patches, dim=-1) @ F.normalize(text, dim=-1).T
    return cosine.argmax(-1).clamp(max=count - 1)


@torch.no_grad()
def example_sheet(model, original, original_text, momentum, dataset, sliding, count=6):
    """The paper's Figure 1 made of one's own data, a row per image, as a PIL image. Columns:
    picture, ground truth, reference patches of the original CLIP and of the momentum encoder (or
    None), patches that the model's own features name rightly, its head's labels."""
    text, names = model.encode_text(model.tokenize(dataset.names)), dataset.evaluated
    encoders = {"reference patches\nof the original CLIP": (original, original_text)}
    if momentum:
        encoders["reference patches of\nthe momentum encoder"] = (momentum, text)
    encoders["correct patches of\nthe trained encoder"] = (model.encode_image, text)
    rows, label_maps = [], []
    for image, pixel_labels, view, view_labels in views(model, varied(dataset, count)):
        row = [image, drawing.paint(pixel_labels, names)]
        for encode, texts in encoders.values():
            right = nearest_class(encode(view)[0], texts, len(names)) == view_labels
            row.append(drawing.highlight(image, right.reshape(model.grid).cpu().numpy()))
        prediction = evaluate.label_map(model, image, text, sliding=sliding)
        prediction = prediction.clamp(max=len(names) - 1).cpu().numpy()
        rows.append([*row, drawing.paint(prediction, names)])
        label_maps += [pixel_labels, prediction]
    titles = ["picture", "ground truth", *encoders, "prediction"]
    return drawing.grid(titles, rows, drawing.legend_entries(names, *label_maps))


def mean(values):
    """The mean of a vector as a number, None of an empty one."""
    return values.double().mean().item() if len(values) else None


def dispersion(sums, counts):
    """(Intra-class variance, inter-class separation) of unit vectors, from their sums [K,D] and
    counts [K] by class; None without a class, the latter also with a single one.

    Variance: 1 - cos of a vector to its class's mean direction, averaged over a class, then over
    classes; with u the mean of a class's vectors, that is 1 - |u|. Separation: 1 - cos between two
    classes' mean directions, averaged over pairs."""
    means = sums[counts > 0] / counts[counts > 0, None]  # [n,D]
    distances = F.pdist(F.normalize(means, dim=-1))  # of unit vectors: its square is 2 - 2 cos
    return mean(1 - means.norm(dim=-1)), mean(distances.square() / 2)


@torch.no_grad()
def shift_statistics(model, original, original_text, dataset, desc="patches"):
    """The paper's quantities of a model against the original CLIP, each image as one view: a dict
    of numbers, None where there is nothing to average.

    Reference patches: those that the original CLIP, with its texts original_text [K,D], names
    rightly, Eq. (1). Noisy ones ("globally contaminated"): those that it gives to the image's
    dominant class, that of most patches, though they belong to another. shift_...: 1 - cos to the
    original CLIP's features, averaged over these patches, and over class names. contamination: of
    the patches that this model names wrongly, the share that it gives to the dominant class.
    right_share: of the labelled patches, those that it names rightly. ..._variance and
    ..._separation: see `dispersion`; a class name's texts are its PROMPTS."""
    names, K, evaluated = dataset.names, len(dataset.names), len(dataset.evaluated)
    text = model.encode_text(model.tokenize(names))
    patch_sums, counts = torch.zeros_like(text, dtype=torch.float64), 0
    found = []
    for _, _, view, labels in views(model, dataset, desc):
        known = labels != IGNORE  # [1,L]
        labels = labels[known]  # [n]
        patches, first = model.encode_image(view)[0][known], original(view)[0][known]  # [n,D]
        shift = (1 - F.cosine_similarity(patches, first, dim=-1)).clamp(min=0)
        here = labels.bincount(minlength=K)
        guess = nearest_class(patches, text, evaluated)
        first_guess = nearest_class(first, original_text, evaluated)
        right, reference = guess == labels, first_guess == labels
        noisy = ~reference & (first_guess == here.argmax())
        found.append((shift[reference], shift[noisy], (guess == here.argmax())[~right], right))
        patch_sums.index_add_(0, labels, F.normalize(patches, dim=-1).double())
        counts = counts + here
    reference, noisy, contamination, right_share = (mean(torch.cat(one)) for one in zip(*found))
    shift_text = mean((1 - F.cosine_similarity(text, original_text, dim=-1)).clamp(min=0))
    patch_variance, patch_separation = dispersion(patch_sums, counts)
    texts = (model.encode_text(model.tokenize(names, prompt)) for prompt in PROMPTS)
    text_sums = sum(F.normalize(vectors, dim=-1).double() for vectors in texts)
    text_variance, text_separation = dispersion(text_sums, torch.full_like(counts, len(PROMPTS)))
    return dict(shift_reference=reference, shift_noisy=noisy, shift_text=shift_text,
                contamination=contamination, right_share=right_share,
                patch_variance=patch_variance, patch_separation=patch_separation,
                text_variance=text_variance, text_separation=text_separation)


def pearson(x, y, within_columns=False):
    """Pearson's correlation of lists or arrays, over the pairs without None or NaN; within_columns:
    after its mean over rows is taken from each. None for fewer than three such pairs, or where one
    of the two does not vary."""
    pairs = np.array([x, y], float)  # None becomes NaN
    pairs[:, np.isnan(pairs).any(0)] = np.nan
    if within_columns:
        pairs -= np.ma.masked_invalid(pairs).mean(1, keepdims=True).filled(np.nan)
    pairs = pairs[:, np.isfinite(pairs[0])]
    if pairs.shape[1] < 3 or (pairs.std(1) < 1e-12).any():
        return None
    return float(np.corrcoef(pairs)[0, 1])


def in_words(correlations):
    """{shift: Pearson's r or None} as text."""
    numbers = ("not defined" if r is None else f"{r:+.2f}" for r in correlations.values())
    return ", ".join(f"{SHIFTS[key]} {number}" for key, number in zip(correlations, numbers))


def read(path):
    """(checkpoint of train.py, its model, the same with the original CLIP's weights)."""
    checkpoint = weights.read_checkpoint(path)
    if "original" not in checkpoint:
        raise UserError(f"{path} does not hold the original CLIP's weights: "
                        "it is no checkpoint of this version's train.py")
    model = weights.from_checkpoint(checkpoint, path)
    model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    model.set_trained(checkpoint["args"]["adapt"])
    original = copy.deepcopy(model)
    weights.load_state(original, {**checkpoint["model"], **checkpoint["original"]}, path)
    return checkpoint, model, original


@torch.no_grad()
def pictures(args):
    """Draw what the encoders see: the paper's Figure 1 made of one's own data."""
    checkpoint, model, original = read(args.checkpoint)
    dataset = open_dataset(args.dataset, args.data_root)
    momentum = None
    if checkpoint["momentum"]:
        momentum = MomentumEncoder(model.image_encoder, 1.0)
        momentum.load_state_dict(checkpoint["momentum"])
    text = original.encode_text(original.tokenize(dataset.names))
    sheet = example_sheet(model, original.image_encoder, text, momentum, dataset,
                          evaluate.is_sliding(None, args.dataset), args.images or 6)
    sheet.save(Path(args.out, "pictures.png"))
    print(f"written to {args.out}: pictures.png")


@torch.no_grad()
def shift(args):
    """Measure what fine-tuning moved: the original CLIP and each checkpoint, correlated."""
    dataset = Subset(open_dataset(args.dataset, args.data_root), args.images)
    rows = []
    for path in args.checkpoints:
        checkpoint, model, original = read(path)
        text = original.encode_text(original.tokenize(dataset.names))
        models = {path: model} if rows else {"original CLIP": original, path: model}
        for name, one in models.items():
            confusion = evaluate.evaluate(one, dataset, text.device, zero_shot=one is original,
                                          sliding=evaluate.is_sliding(None, args.dataset))
            scores = evaluate.summary(confusion, dataset.evaluated, checkpoint["names"])
            step = 0 if one is original else checkpoint["step"]
            rows.append({"checkpoint": name, "step": step,
                         **{key: scores.get(key) for key in METRICS},
                         **shift_statistics(one, original.image_encoder, text, dataset, name)})
        metric = "mIoU_ground_truth" if rows[0]["unseen"] is None else "unseen"
        trained = {key: [row[key] for row in rows[1:]] for key in rows[0]}
        found = {key: pearson(trained[key], trained[metric]) for key in SHIFTS}
        result = {"dataset": args.dataset, "images": len(dataset), "rows": rows,
                  "correlation": {"with": metric, "checkpoints": len(rows) - 1, **found}}
        runs.write_json(result, Path(args.out, "shift.json"))  # after each: it may take hours
    table = [["", *(row["checkpoint"] for row in rows)]]
    for key in list(rows[0])[2:]:
        digits = 1 if key in METRICS else 3
        numbers = ("-" if row[key] is None else f"{row[key]:.{digits}f}" for row in rows)
        table.append([key, *numbers])
    panels = [(in_words({key: found[key]}), "1 - cos to the original CLIP", f"mIoU ({metric}), %",
               [("", trained[key], trained[metric], "o")]) for key in SHIFTS]
    drawing.save_plot(Path(args.out, "shift.png"), panels)
    print(f"{tables.format_table(table)}\n\nPearson correlation with {metric} over {len(rows) - 1} "
          f"checkpoint(s): {in_words(found)}\nwritten to {args.out}: shift.json, shift.png")
