"""What is measured of a training as it goes, and what it shows at its end."""
import torch
import torch.distributed as dist

from data import TrainingCrops
from evaluate import evaluate, is_sliding, summary
from study import measures
from support import pictures, runs
from support.errors import writing
from support.tables import format_table


def score(run, zero_shot=False):
    """mIoU on the validation images: (numbers in per cent, IoU of each class)."""
    sliding = is_sliding(None, run.args.dataset)
    confusion = evaluate(run.model, run.val_set, run.device, sliding, zero_shot, run.rank, run.world)
    result = summary(confusion, run.val_set.evaluated, run.train_set.names)
    classes = result.pop("classes")
    return result, classes


@torch.no_grad()
def measure(run, momentum):
    """Share of reference patches in training (of the momentum encoder, or for None of the model),
    and drift of the original's in validation, on about 32 crops each."""
    args, model = run.args, run.model
    steps, size = max(1, 32 // args.batch_size), args.batch_size // run.world
    val_crops = TrainingCrops(run.val_set, args.image_size, args.seed, jitter=0.0)
    share, _ = measures.reference_patches(
        model, momentum or model.encode_image, model.encode_text(run.tokens),
        run.batches(run.crops, 0, steps, size))
    _, drift = measures.reference_patches(
        model, run.original, run.original_text, run.batches(val_crops, 0, steps, size))
    return {"reference_share": share, "reference_drift": max(drift, 0.0)}


def log_step(run, names, figures, grad_norm, seconds):
    """A line of log.jsonl, over all processes: means of losses, counts of patches. Returns what the
    progress bar shows of it."""
    if run.world > 1:
        dist.all_reduce(figures)
    line = dict(zip(names, figures.tolist()))
    for name in names:
        if name.endswith("_loss"):
            line[name] /= run.world * run.args.accumulate
    line["contrast_patches"] = int(line["contrast_patches"])
    line["reference_share"] = line.pop("reference_patches") / max(1, line.pop("labelled_patches"))
    rates = {group["name"]: group["lr"] for group in run.optimiser.param_groups}
    run.log.append(step=run.step, **line, lr=rates["head"], lr_clip=rates.get("clip", 0.0),
                   grad_norm=float(grad_norm), seconds=round(seconds, 3),
                   memory_gb=runs.peak_memory(run.device))
    return dict(seg=line["segmentation_loss"], spd=line["spd_loss"], cpa=line["cpa_loss"],
                ref=line["reference_share"])


def evaluate_if_due(run):
    """A line of log.jsonl every --eval-every steps, unless it is there already."""
    logged = any(line["step"] == run.step and "mIoU_union" in line for line in run.log.lines)
    if logged or run.step == run.args.steps or not runs.due(run.args.eval_every, run.step):
        return
    with run.interruption.immediate(True):
        run.log.append(step=run.step, **score(run)[0], **measure(run, run.momentum))
        if run.rank == 0:
            pictures.curves(run.log.path, run.out / "curves.png")


def finish(run):
    """Evaluate, print the tables, write results.json, curves.png and examples.png."""
    scores, classes = score(run)
    end = measure(run, run.momentum)
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
        pictures.curves(run.log.path, path)
    sheet = measures.example_sheet(*models, run.momentum, run.val_set,
                                   is_sliding(None, run.args.dataset))
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
