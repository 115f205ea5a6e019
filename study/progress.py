"""What is measured of a training as it goes, and what it shows at its end."""
import math

import torch
import torch.distributed as dist
import torch.nn.functional as F

from data import TrainingCrops
from evaluate import evaluate, is_sliding, summary
from losses import IGNORE, patch_labels, reference_mask
from study import measures
from support import pictures, runs
from support.errors import UserError, writing
from support.tables import format_table


def score(run, zero_shot=False):
    """mIoU on the validation images: (numbers in per cent, IoU of each class)."""
    confusion = evaluate(run.model, run.val_set, run.device, is_sliding(None, run.args.dataset),
                         zero_shot, run.rank, run.world)
    result = summary(confusion, run.val_set.evaluated, run.train_set.names)
    classes = result.pop("classes")
    return result, classes


@torch.no_grad()
def measure(run):
    """On about 32 crops each: the share of reference patches, Eq. (1), among the labelled ones in
    training, of the momentum encoder (without one, of the model); and 1 - cos of the model's
    features to the original CLIP's on the latter's reference patches in validation."""
    args, model = run.args, run.model
    steps, size = max(1, 32 // args.batch_size), args.batch_size // run.world
    val_crops = TrainingCrops(run.val_set, args.image_size, args.seed, jitter=0.0)
    teachers = ((run.momentum or model.encode_image, model.encode_text(run.tokens), run.crops),
                (run.original, run.original_text, val_crops))
    sums = torch.zeros(2, 3, dtype=torch.float64, device=run.device)
    for i, (encode, text, crops) in enumerate(teachers):
        for images, pixel_labels, _ in run.batches(crops, size, 0, steps):
            images, pixel_labels = images.to(run.device), pixel_labels.to(run.device)
            labels = patch_labels(pixel_labels, model.grid)
            patches, _ = model.encode_image(images)
            teacher_patches, _ = encode(images)
            mask = reference_mask(teacher_patches, text, labels)
            drift = 1 - F.cosine_similarity(patches, teacher_patches, dim=-1)[mask]
            sums[i] += torch.stack([mask.sum(), (labels != IGNORE).sum(), drift.double().sum()])
    if run.world > 1:
        dist.all_reduce(sums)
    (reference, labelled, _), (of_original, _, drift) = sums.tolist()
    if not labelled:
        raise UserError(f"--dataset {args.dataset}: there is nothing to learn from, no label in "
                        f"{steps * args.batch_size} training crops of {run.train_set.source}")
    return {"reference_share": reference / labelled,
            "reference_drift": max(0.0, drift / max(1, of_original))}


def log_step(run, figures, grad_norm, seconds):
    """A line of log.jsonl, over all processes: of figures called ..._loss the mean over processes
    and micro-batches, of others (..._patches) the sum. Returns what the progress bar shows."""
    sums = torch.stack(list(figures.values()))
    if run.world > 1:
        dist.all_reduce(sums)
    line = dict(zip(figures, sums.tolist()))
    for name in figures:
        if name.endswith("_loss"):
            line[name] /= run.world * run.args.accumulate
    line["reference_share"] = line.pop("reference_patches") / max(1, line.pop("labelled_patches"))
    rates = {group["name"]: group["lr"] for group in run.optimiser.param_groups}
    run.log.append(step=run.step, **line, lr=rates["head"], lr_clip=rates.get("clip", 0.0),
                   grad_norm=grad_norm if math.isfinite(grad_norm) else None,
                   seconds=round(seconds, 3), memory_gb=runs.peak_memory(run.device))
    shown = dict(seg="segmentation_loss", spd="spd_loss", cpa="cpa_loss", pooled="pooled_loss",
                 ref="reference_share")
    return {short: line[name] for short, name in shown.items() if name in line}


def evaluate_if_due(run):
    """A line of log.jsonl every --eval-every steps, unless it is there already."""
    logged = any(line["step"] == run.step and "mIoU_union" in line for line in run.log.lines)
    if logged or run.step == run.args.steps or not runs.due(run.args.eval_every, run.step):
        return
    with run.interruption.immediate(True):
        run.log.append(step=run.step, **score(run)[0], **measure(run))
        if run.rank == 0:
            with writing(run.out / "curves.png") as path:
                pictures.curves(run.log.lines, path)


def finish(run):
    """Evaluate, print the tables, write results.json, curves.png and examples.png."""
    scores, classes = score(run)
    end = measure(run)
    run.log.append(step=run.step, **scores, **end)
    if run.rank > 0:
        return
    models = run.model, run.original, run.original_text
    shift = measures.shift_statistics(*models, measures.Subset(run.val_set, 100))
    results = dict(args=vars(run.args), **run.facts, trained=scores, end=end, shift=shift,
                   classes=classes)
    runs.write_json(results, run.out / "results.json")
    run.say(report(results))
    with writing(run.out / "curves.png") as path:
        pictures.curves(run.log.lines, path)
    sliding = is_sliding(None, run.args.dataset)
    sheet = measures.example_sheet(*models, run.momentum, run.val_set, sliding)
    with writing(run.out / "examples.png") as path:
        sheet.save(path)
    run.say(f"\nwritten to {run.out}: examples.png, curves.png, results.json, log.jsonl, last.pt")


def report(results):
    """results.json as two tables."""
    columns = ["mIoU_ground_truth", "mIoU_union"]
    if "seen" in results["trained"]:
        columns = ["seen", "unseen", "harmonic"]
    scores = [["", *columns]]
    trained = f"trained (--distill {results['args']['distill']})"
    for name, key in (("CLIP, zero-shot", "zero_shot"), (trained, "trained")):
        scores.append([name, *(results[key][column] for column in columns)])
    patches = [["reference patches", "at the start", "after TPA", "at the end"]]
    moments = [results["before_tpa"], results.get("after_tpa"), results["end"]]
    for name, key in (("share of the labelled patches", "reference_share"),
                      ("drift from the original CLIP", "reference_drift")):
        patches.append([name, *(f"{m[key]:.3f}" if m else "-" for m in moments)])
    return (f"\nmIoU in per cent on the validation images\n{format_table(scores)}\n\n"
            f"{format_table(patches)}")
