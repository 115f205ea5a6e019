"""How far fine-tuning moved CLIP's features, and what it did to unseen classes."""
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import evaluate
from data import open_dataset
from ema import MomentumEncoder
from losses import IGNORE
from support import checkpoint
from support.files import reading, write_json


def read(path):
    """(checkpoint of train.py, its Segmenter, the same with CLIP as training began)."""
    contents = checkpoint.read(path)
    with reading(path, "a checkpoint of train.py"):
        before = {**contents, "model": {**contents["model"], **contents["original"]}}
    models = [checkpoint.build_from(either, path) for either in (contents, before)]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return contents, *(model.to(device).eval() for model in models)


def pictures(args):
    """Draw the reference patches of CLIP and of the momentum encoder, and a checkpoint's labels."""
    contents, model, original = read(args.checkpoint)
    dataset = open_dataset(args.dataset, args.data_root)
    momentum = None
    if contents["momentum"]:
        model.set_trained(contents["args"]["adapt"])  # the momentum encoder owns just these
        momentum = MomentumEncoder(model.image_encoder, 1.0)
        momentum.load_state_dict(contents["momentum"])
    path = Path(args.out, "examples.png")
    evaluate.examples(path, model, original, momentum, dataset, contents["names"])
    print(f"written: {path}")


@torch.no_grad()
def statistics(model, original, dataset):
    """What the paper measures of a Segmenter against `original`, the same with CLIP as training
    began, as a dictionary; docs/study.md says what each number means. None: nothing to average."""
    names, last = dataset.names, len(dataset.evaluated) - 1  # names from `last` on are one class
    text, original_text = (evaluate.encode_names(m, names) for m in (model, original))
    sums = torch.zeros_like(text, dtype=torch.float64)  # [K,D], of a class's patches' unit vectors
    counts = torch.zeros_like(sums[:, :1])
    reference, noisy, contaminated = [], [], []
    for i in range(len(dataset)):
        view, labels = evaluate.patch_view(model, *dataset.load(i)[:2])  # [1,3,S,S], [1,L]
        labelled = labels != IGNORE
        labels = labels[labelled]  # [n]
        patches, original_patches = (F.normalize(m.encode_image(view)[0][labelled])
                                     for m in (model, original))  # [n,D]
        nearest = (patches @ text.T).argmax(1).clamp(max=last)
        original_nearest = (original_patches @ original_text.T).argmax(1).clamp(max=last)
        dominant = labels.bincount(minlength=len(names)).argmax()  # the image's largest class
        moved = (patches - original_patches).square().sum(1) / 2  # 1 - cos
        right = original_nearest == labels  # reference patches, Eq. (1)
        reference.append(moved[right])
        noisy.append(moved[~right & (original_nearest == dominant)])
        contaminated.append(nearest[nearest != labels] == dominant)
        sums.index_add_(0, labels, patches.double())
        counts += labels.bincount(minlength=len(names))[:, None]
    means = (sums / counts)[counts[:, 0] > 0]
    metrics = dict(
        shift_reference=torch.cat(reference).mean(),
        shift_noisy=torch.cat(noisy).mean(),
        shift_text=(text - original_text).square().sum(1).mean() / 2,
        contamination=torch.cat(contaminated).double().mean(),
        patch_variance=1 - means.norm(dim=1).mean(),  # cos to the mean is |mean| on average
        patch_separation=F.pdist(F.normalize(means)).square().mean() / 2,
        text_separation=F.pdist(text).square().mean() / 2)
    return {key: None if value.isnan() else value.item() for key, value in metrics.items()}


def shift(args):
    """Measure how far the features of CLIP moved in checkpoints, and mIoU on unseen classes."""
    dataset = open_dataset(args.dataset, args.data_root)
    rows = []
    for path in args.checkpoints:
        contents, model, original = read(path)
        models = {path: model} if rows else {"original CLIP": original, path: model}
        for name, segmenter in models.items():
            scores = evaluate.evaluate(segmenter, dataset, contents["names"],
                                       zero_shot=segmenter is original)
            row = {key: scores.get(key) for key in ("seen", "unseen", "mIoU_ground_truth")}
            rows.append({"checkpoint": name, **row, **statistics(segmenter, original, dataset)})
    metric = "mIoU_ground_truth" if rows[0]["unseen"] is None else "unseen"
    correlations = {"with": metric}
    for key in ("shift_reference", "shift_noisy", "shift_text"):
        pairs = np.array([(row[key], row[metric]) for row in rows[1:]], float)  # None becomes NaN
        r = np.corrcoef(pairs.T)[0, 1] if len(pairs) > 2 else np.nan
        correlations[key] = None if np.isnan(r) else r
    table = [["", *(row["checkpoint"] for row in rows), f"r with {metric}"]]
    for key in list(rows[0])[1:]:
        numbers = [row[key] for row in rows] + [correlations.get(key)]
        table.append([key, *("-" if x is None else f"{x:.3g}" for x in numbers)])
    path = write_json({"rows": rows, "correlation": correlations}, Path(args.out, "shift.json"))
    print(f"{evaluate.format_table(table)}\n\nwritten: {path}")
