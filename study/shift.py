"""The verbs that read checkpoints of train.py."""
import copy
from pathlib import Path

import torch

from data import open_dataset
from ema import MomentumEncoder
from evaluate import evaluate, is_sliding, summary
from study.measures import SHIFTS, Subset, example_sheet, in_words, pearson, shift_statistics
from support.errors import UserError
from support.pictures import save_plot
from support.runs import write_json
from support.tables import format_table
from support.weights import from_checkpoint, load_state, read_checkpoint

METRICS = ("seen", "unseen", "mIoU_ground_truth")  # in per cent


def read(path):
    """(checkpoint of train.py, its model, the same with the original CLIP's weights)."""
    checkpoint = read_checkpoint(path)
    if "original" not in checkpoint:
        raise UserError(f"{path} does not hold the original CLIP's weights: "
                        "it is no checkpoint of this version's train.py")
    model = from_checkpoint(checkpoint, path).to("cuda" if torch.cuda.is_available() else "cpu")
    model.eval().set_trained(checkpoint["args"]["adapt"])
    original = copy.deepcopy(model)
    load_state(original, {**checkpoint["model"], **checkpoint["original"]}, path)
    return checkpoint, model, original


@torch.no_grad()
def pictures(args):
    """Draw what the encoders see: the paper's Figure 1 made of one's own data."""
    checkpoint, model, original = read(args.checkpoint)
    dataset = open_dataset(args.dataset, args.data_root, args.split, args.classes)
    momentum = None
    if checkpoint["momentum"]:
        momentum = MomentumEncoder(model.image_encoder, 1.0)
        momentum.load_state_dict(checkpoint["momentum"])
    text = original.encode_text(original.tokenize(dataset.names))
    sheet = example_sheet(model, original.image_encoder, text, momentum, dataset,
                          is_sliding(args.views, args.dataset), args.images or 6)
    sheet.save(Path(args.out, "pictures.png"))
    print(f"written to {args.out}: pictures.png")


@torch.no_grad()
def shift(args):
    """Measure what fine-tuning moved: the original CLIP and each checkpoint, correlated."""
    dataset = open_dataset(args.dataset, args.data_root, args.split, args.classes)
    dataset, sliding = Subset(dataset, args.images), is_sliding(args.views, args.dataset)
    rows = []
    for path in args.checkpoints:
        checkpoint, model, original = read(path)
        text = original.encode_text(original.tokenize(dataset.names))
        models = [(path, checkpoint["step"], model)]
        if not rows:
            models.insert(0, ("original CLIP", 0, original))
        for name, step, one in models:
            confusion = evaluate(one, dataset, text.device, sliding, zero_shot=one is original)
            scores = summary(confusion, dataset.evaluated, checkpoint["names"])
            rows.append({"checkpoint": name, "step": step,
                         **{key: scores.get(key) for key in METRICS},
                         **shift_statistics(one, original.image_encoder, text, dataset, name)})
        metric = "mIoU_ground_truth" if rows[0]["unseen"] is None else "unseen"
        trained = {key: [row[key] for row in rows[1:]] for key in (metric, *SHIFTS)}
        found = {key: pearson(trained[key], trained[metric]) for key in SHIFTS}
        correlation = {"with": metric, "checkpoints": len(rows) - 1, **found}
        result = {"dataset": args.dataset, "split": args.split, "images": len(dataset),
                  "rows": rows, "correlation": correlation}
        write_json(result, Path(args.out, "shift.json"))  # after each: it may take hours
    table = [["", *(row["checkpoint"] for row in rows)]]
    for key in list(rows[0])[2:]:
        digits = 1 if key in METRICS else 3
        cells = ("-" if row[key] is None else f"{row[key]:.{digits}f}" for row in rows)
        table.append([key, *cells])
    texts, panels = [], []
    for key, r in found.items():
        texts.append(f"{key} {in_words(r)}")
        dots = ("", trained[key], trained[metric], "o")
        panels.append((f"n = {len(rows) - 1}, r {in_words(r)}", f"{SHIFTS[key]}, 1 - cos",
                       f"mIoU ({metric}), %", [dots]))
    save_plot(Path(args.out, "shift.png"), panels)
    print(f"{format_table(table)}\n\nPearson correlation with {metric} over {len(rows) - 1} "
          f"checkpoint(s): {', '.join(texts)}\nwritten to {args.out}: shift.json, shift.png")
