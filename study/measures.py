"""Quantities of one model that the paper argues with: reference patches, shift, dispersion.

`original` is the image encoder before training, frozen, and `momentum` a MomentumEncoder or None.
Batches are of (images [B,3,H,W], pixel labels [B,H,W], paths)."""
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

import evaluate
from losses import IGNORE, patch_labels, reference_mask
from model import PROMPT
from support import pictures

SHIFTS = {"shift_reference": "shift of reference patches",
          "shift_noisy": "shift of noisy patches", "shift_text": "shift of texts"}
PROMPTS = (PROMPT, "a photo of a {}", "there is a {} here", "a close view of the {}", "{}")


@torch.no_grad()
def reference_patches(model, encode, text, batches):
    """Reference patches, Eq. (1), of an image encoder with texts [K,D], over all processes: (their
    share of the labelled patches, 1 - cos of the model's features to the encoder's on them)."""
    sums = torch.zeros(3, dtype=torch.float64, device=text.device)
    for images, pixel_labels, _ in batches:
        images = images.to(text.device)
        labels = patch_labels(pixel_labels.to(text.device), model.grid)
        patches, _ = model.encode_image(images)
        teacher_patches, _ = encode(images)
        mask = reference_mask(teacher_patches, text, labels)
        drift = 1 - F.cosine_similarity(patches, teacher_patches, dim=-1)[mask]
        sums += torch.stack([mask.sum(), (labels != IGNORE).sum(), drift.double().sum()])
    if dist.is_initialized():
        dist.all_reduce(sums)
    reference, labelled, drift = sums.tolist()
    return reference / max(1, labelled), drift / max(1, reference)


class Subset(torch.utils.data.Subset):
    """Some of a dataset's images, evenly spread; all of them for count 0."""

    def __init__(self, dataset, count):
        count = min(count or len(dataset), len(dataset))
        super().__init__(dataset, np.linspace(0, len(dataset) - 1, count).astype(int))
        self.names = dataset.names
        self.evaluated = dataset.evaluated

    def load(self, i):
        return self.dataset.load(self.indices[i])


def one_view(model, image, labels):
    """A picture squeezed to the model's size: (images [1,3,S,S], patch labels [1,L])."""
    device, size = model.logit_scale.device, model.image_size
    view, _ = evaluate.views(image, size, sliding=False)
    pixel_labels = torch.from_numpy(labels).float()[None, None]  # [1,1,H,W]
    pixel_labels = F.interpolate(pixel_labels, (size, size), mode="nearest")[0].long()
    return view.to(device), patch_labels(pixel_labels, model.grid).to(device)


def nearest_class(patches, text, count):
    """What patches [...,D] name of text [K,D] -> [...]; names from `count` on are one class."""
    cosine = F.normalize(patches, dim=-1) @ F.normalize(text, dim=-1).T
    return cosine.argmax(-1).clamp(max=count - 1)


@torch.no_grad()
def example_sheet(model, original, original_text, momentum, dataset, sliding, count=6):
    """The paper's Figure 1 made of one's own data, a row per image. Returns a PIL image.

    Columns: picture, ground truth, reference patches of the original CLIP and of the momentum
    encoder (if any), patches that the model's own features name rightly, its head's labels."""
    text, names = model.encode_text(model.tokenize(dataset.names)), dataset.evaluated
    encoders = {"reference patches\nof the original CLIP": (original, original_text)}
    if momentum:
        encoders["reference patches of\nthe momentum encoder"] = (momentum, text)
    encoders["patches that are right\nin the target CLIP"] = (model.encode_image, text)
    rows, label_maps = [], []
    for i in Subset(dataset, count).indices:
        image, labels, _ = dataset.load(i)
        view, view_labels = one_view(model, image, labels)
        row = [image, pictures.paint(labels, names)]
        for encode, texts in encoders.values():
            right = nearest_class(encode(view)[0], texts, len(names)) == view_labels
            row.append(pictures.highlight(image, right.reshape(model.grid).cpu().numpy()))
        prediction = evaluate.label_map(model, image, text, sliding=sliding)
        prediction = prediction.clamp(max=len(names) - 1).cpu().numpy()
        rows.append([*row, pictures.paint(prediction, names)])
        label_maps += [labels, prediction]
    titles = ["picture", "ground truth", *encoders, "prediction"]
    return pictures.grid(titles, rows, pictures.legend_entries(names, *label_maps))


def dispersion(sums, counts):
    """(Intra-class variance, inter-class separation) of unit vectors, from their sums [K,D] and
    counts [K] by class; None without a class, the latter also with a single one.

    Variance: 1 - cos of a vector to its class's mean direction, averaged over a class, then over
    classes; with u the mean of a class's vectors, that is 1 - |u|. Separation: 1 - cos between two
    classes' mean directions, averaged over pairs."""
    there = counts > 0
    means = sums[there] / counts[there, None]  # [n,D]
    n = len(means)
    variance = (1 - means.norm(dim=-1)).mean().item() if n else None
    if n < 2:
        return variance, None
    cosines = F.normalize(means, dim=-1) @ F.normalize(means, dim=-1).T  # [n,n]
    return variance, 1 - ((cosines.sum() - cosines.diagonal().sum()) / (n * (n - 1))).item()


@torch.no_grad()
def shift_statistics(model, original, original_text, dataset, desc="patches"):
    """The paper's quantities of one model against the original CLIP, each image as one view: a dict
    of numbers, None where there is nothing to average.

    Reference patches: those that the original CLIP, with its texts original_text [K,D], names
    rightly, Eq. (1). Noisy patches ("globally contaminated"): those that it gives to the image's
    dominant class, the one with the most patches, though they belong to another. shift_...: 1 - cos
    to the original CLIP's features, averaged over these patches, and over class names.
    contamination: of the patches that this model names wrongly, the share that it gives to the
    dominant class. right_share: of the labelled patches, those that it names rightly. ..._variance
    and ..._separation: see `dispersion`; a class name's texts are its PROMPTS."""
    names, K, count = dataset.names, len(dataset.names), len(dataset.evaluated)
    text = model.encode_text(model.tokenize(names))
    sums, counts, patch_sums = (torch.zeros(size, dtype=torch.float64, device=text.device)
                                for size in ((4, 2), K, text.shape))
    for i in tqdm(range(len(dataset)), desc, leave=False):
        image, labels, _ = dataset.load(i)
        view, labels = one_view(model, image, labels)
        known = labels != IGNORE  # [1,L]
        labels = labels[known]  # [n]
        patches, first = model.encode_image(view)[0][known], original(view)[0][known]  # [n,D]
        guess = nearest_class(patches, text, count)
        first_guess = nearest_class(first, original_text, count)
        here = labels.bincount(minlength=K)
        right, reference = guess == labels, first_guess == labels
        noisy = ~reference & (first_guess == here.argmax())
        contaminated = ~right & (guess == here.argmax())
        shift = (1 - F.cosine_similarity(patches, first, dim=-1)).clamp(min=0)
        sums += torch.stack([
            shift[reference].sum(), reference.sum(), shift[noisy].sum(), noisy.sum(),
            contaminated.sum(), (~right).sum(), right.sum(), known.sum()]).view(4, 2)
        patch_sums.index_add_(0, labels, F.normalize(patches, dim=-1).double())
        counts += here
    reference, noisy, contamination, right_share = (
        total / number if number else None for total, number in sums.tolist())
    shift_text = (1 - F.cosine_similarity(text, original_text, dim=-1)).clamp(min=0).mean().item()
    texts = (model.encode_text(model.tokenize(names, prompt)) for prompt in PROMPTS)
    text_sums = sum(F.normalize(vectors, dim=-1).double() for vectors in texts)
    result = {"shift_reference": reference, "shift_noisy": noisy, "shift_text": shift_text,
              "contamination": contamination, "right_share": right_share}
    result["patch_variance"], result["patch_separation"] = dispersion(patch_sums, counts)
    counts = torch.full_like(counts, len(PROMPTS))
    result["text_variance"], result["text_separation"] = dispersion(text_sums, counts)
    return result


def pearson(x, y):
    """Pearson's correlation of two lists or arrays, over the pairs without None or NaN. None for
    fewer than three such pairs, or where one of the two does not vary."""
    pairs = np.array([np.ravel(x), np.ravel(y)], float)  # None becomes NaN
    pairs = pairs[:, np.isfinite(pairs).all(0)]
    if pairs.shape[1] < 3 or (pairs.std(1) < 1e-12).any():
        return None
    return float(np.corrcoef(pairs)[0, 1])


def in_words(correlation):
    return "not defined" if correlation is None else f"{correlation:+.2f}"
