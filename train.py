"""Train reference patch momentum distillation (RPMD).

    python train.py                                                     the embedded toy world, minutes on a laptop
    python train.py --dataset folder:my-data --steps 2000 --out mine    your own images, masks and classes.txt
    python train.py --dataset coco-stuff --data-root DIR --out coco     one GPU
    torchrun --nproc_per_node=8 train.py --dataset coco-stuff --data-root DIR --out coco8
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 train.py ...

An interrupted run goes on where it stopped when the same command is given again. Everything lands in --out: log.jsonl (a
line per logged step), last.pt (checkpoint), results.json, curves.png, examples.png.
"""
import argparse
import contextlib
import json
import math
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import data
import evaluate
import model as segmenter
import runs
import study
import toy
import tpa
import viz
from ema import MomentumEncoder
from losses import (IGNORE, class_prototypes, class_reference_masks, contrast_mask, cpa_loss, patch_labels, pooled_loss,
                    reference_mask, segmentation_loss, spd_loss, total_loss)

# flag: (default with a real CLIP, default with --clip tiny, help). CAT-Seg's values are marked; the paper states none of
# its own, so the rest are ours.
RECIPE = {
    "steps": (80_000, 160, "optimiser steps of joint training (CAT-Seg's)"),
    "batch-size": (4, 8, "images per step, over all processes; one for each process if these are more (CAT-Seg's)"),
    "lr": (2e-4, 2.5e-3, "learning rate of the head (CAT-Seg's)"),
    "clip-lr-factor": (0.01, 0.2, "learning rate of CLIP's q and v, as a part of --lr (CAT-Seg's)"),
    "weight-decay": (1e-4, 1e-4, "of AdamW, 0 on norms (CAT-Seg's)"),
    "clip-grad": (0.01, 0.1, "largest norm of the gradient (CAT-Seg's)"),
    "image-size": (384, 64, "side of the training crops (CAT-Seg's)"),
    "channels": (128, 32, "width of the head (CAT-Seg's)"),
    "prior": (0.0, 0.08, "probability of a class at a pixel that the head starts from, 0 = as its weights fall (CAT-Seg's)"),
    "jitter": (1.0, 0.2, "strength of the colour jitter, 1 is SSD's (CAT-Seg's; weak where colours have names)"),
    "lambda-spd": (1.0, 0.1, "weight of SPD, Eq. (6) (ours)"),
    "lambda-cpa": (1.0, 0.1, "weight of CPA, Eq. (6) (ours)"),
    "lambda-pooled": (0.1, 0.1, "weight of --distill pooled (MAFT+'s)"),
    "tau": (0.1, 0.1, "temperature of CPA, Eq. (5) (ours)"),
    "alpha": (0.999, 0.99, "momentum of the momentum encoder (ours)"),
    "tpa-steps": (200, 10, "warm-up steps of text-to-patch pre-alignment, 0 = off; off for --distill none, pooled (ours)"),
    "tpa-lr": (2e-6, 5e-4, "learning rate of that (ours)"),
    "log-every": (50, 10, "steps between lines in log.jsonl"),
    "eval-every": (10_000, 100, "steps between evaluations, 0 = only at the end"),
    "save-every": (1000, 100, "steps between checkpoints"),
    "snapshot-every": (0, 0, "steps between files of weights alone, step-N.pt, for study.py; 0 = none"),
}
FIXED = ("dataset", "classes", "unseen", "clip", "pretrained", "init_cat_seg", "image_size", "channels", "adapt", "distill",
         "batch_size", "seed")  # what cannot change on resume


def parse(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, epilog=(
        "ours: not in the paper. For the tiny CLIP chosen on toy worlds 101 to 103, which no table of results shows;\n"
        "`study.py sweep` is that choice, docs/sweep.md what it gave. For real CLIPs nobody has tuned them yet."))
    p.add_argument("--dataset", default="toy", help=f"{', '.join(data.NAMES)} (default toy)")
    p.add_argument("--classes", help="other names for the dataset's classes: a file, or comma-separated")
    p.add_argument("--unseen", help="names to hold out of segmentation training, to be scored apart: a file, or comma-separated")
    p.add_argument("--data-root", help="the folder that holds the datasets")
    p.add_argument("--out", default="out", help="where everything is written (default out)")
    p.add_argument("--clip", help="tiny, or an open_clip ViT (default: tiny for toy, else ViT-B-16-quickgelu)")
    p.add_argument("--pretrained", help="open_clip tag, checkpoint file, toy, crops (a tiny CLIP, pre-trained on crops of the "
                                        "training images and the names of what they hold), or none "
                                        "(default: openai; toy for the toy world, none for another dataset with tiny)")
    p.add_argument("--adapt", default="both", choices=("both", "visual", "text", "none"), help="what of CLIP trains")
    p.add_argument("--init-cat-seg", metavar="FILE", help="start from a checkpoint of CAT-Seg, whose CLIP is the original then")
    p.add_argument("--distill", default="rpmd", choices=("rpmd", "frozen", "pooled", "none"),
                   help="rpmd (default); frozen: the same with the original CLIP as teacher; pooled: MAFT+'s; none: plain CAT-Seg")
    for flag, (real, tiny, text) in RECIPE.items():
        p.add_argument(f"--{flag}", type=type(real), help=f"{text}; default {real:g} (for the tiny CLIP {tiny:g}, ours)")
    p.add_argument("--spd-features", default="normalised", choices=("normalised", "raw"),
                   help="what Eq. (2) compares: unit vectors, or CLIP's features as they are (ours; default normalised)")
    p.add_argument("--ignored", default="negative", choices=("negative", "skip"),
                   help="unlabelled pixels: negatives of every class, as in CAT-Seg (default), or left out of L_SEG")
    p.add_argument("--accumulate", type=int, default=1,
                   help="passes per step, each over a part of the batch; SPD and CPA average within a part (default 1)")
    p.add_argument("--recompute-head", action="store_true", help="save memory: compute the head again in the backward pass")
    p.add_argument("--precision", choices=("fp32", "bf16", "fp16"), help="default bf16 where the GPU has it, else fp32")
    p.add_argument("--workers", type=int, default=None, help="loader processes (default: 4 with a GPU, else 0)")
    p.add_argument("--seed", type=int, default=0, help="of the head's first weights, of images' order and augmentation")
    p.add_argument("--timeout", type=float, default=30, help="minutes that a process waits for the others (default 30)")
    p.add_argument("--restart", action="store_true", help="ignore a checkpoint in --out and train anew")
    args = p.parse_args(argv)
    args.clip = args.clip or ("tiny" if args.dataset.startswith("toy") else "ViT-B-16-quickgelu")
    world = int(os.environ.get("WORLD_SIZE", 1))
    if args.batch_size is None:
        args.batch_size = max(RECIPE["batch-size"][args.clip == "tiny"], world * args.accumulate)
    if args.tpa_steps is None and (args.distill in ("none", "pooled") or args.adapt in ("visual", "none")):
        args.tpa_steps = 0  # TPA is part of RPMD, and for a text encoder that trains
    for flag, (real, tiny, _) in RECIPE.items():
        name = flag.replace("-", "_")
        if getattr(args, name) is None:
            setattr(args, name, tiny if args.clip == "tiny" else real)
    if args.pretrained is None:
        args.pretrained = "toy" if args.dataset.startswith("toy") and args.clip == "tiny" else \
            "none" if args.clip == "tiny" or args.init_cat_seg else "openai"
    cuda = torch.cuda.is_available()
    bf16 = cuda and torch.cuda.is_bf16_supported(including_emulation=False)
    args.precision = args.precision or ("bf16" if bf16 else "fp32")
    args.workers = args.workers if args.workers is not None else 4 * cuda
    return args


def build_model(args, rank, device):
    """The segmenter at its start, with the CLIP that --pretrained names. Process 0 pre-trains the toy world's if need be."""
    pretrained = None if args.pretrained == "none" else args.pretrained
    if pretrained in ("toy", "crops"):
        seed, pictures = int(args.dataset.partition(":")[2] or 0) if args.dataset.startswith("toy") else 0, None
        if pretrained == "crops":
            seed, pictures = args.seed, data.open_dataset(args.dataset, args.data_root, "train", args.classes)
        if rank == 0:
            toy.clip_checkpoint(seed, pictures)
        if dist.is_initialized():
            dist.barrier()
        pretrained = str(toy.clip_checkpoint(seed, pictures))
    torch.manual_seed(args.seed)                                                           # the head's initial weights
    model = segmenter.build(args.clip, pretrained, args.image_size, args.channels)
    if args.init_cat_seg:
        segmenter.load_state(model, segmenter.read_checkpoint(args.init_cat_seg)["model"], args.init_cat_seg)
    model.set_trained(args.adapt)
    if args.prior:
        nn.init.constant_(model.head.logit.bias, math.log(args.prior / (1 - args.prior)))
    model.head.recompute = args.recompute_head
    return model.to(device)


def build_optimiser(model, args):
    """AdamW: head at --lr, CLIP at --clip-lr-factor of it, no weight decay on norms. Groups remember their base rate."""
    norms = {p for m in model.head.modules() if isinstance(m, (nn.LayerNorm, nn.GroupNorm)) for p in m.parameters()}
    head = list(model.head.parameters())
    clip = [p for part in (model.image_encoder, model.text_encoder) for p in part.parameters() if p.requires_grad]
    groups = [dict(name="head", params=[p for p in head if p not in norms], base_lr=args.lr, weight_decay=args.weight_decay),
              dict(name="norms", params=[p for p in head if p in norms], base_lr=args.lr, weight_decay=0.0),
              dict(name="clip", params=clip, base_lr=args.lr * args.clip_lr_factor, weight_decay=args.weight_decay)]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=args.lr)


def set_learning_rate(optimiser, step, steps):
    """Cosine from each group's base rate to 0."""
    for group in optimiser.param_groups:
        group["lr"] = group["base_lr"] * 0.5 * (1 + math.cos(math.pi * step / steps))


FIGURES = ("segmentation_loss", "spd_loss", "cpa_loss", "pooled_loss", "total_loss", "reference_patches", "labelled_patches",
           "contrast_patches")


def step_losses(model, momentum, images, target, tokens, args):
    """Everything the paper defines, for one pass. model: Segmenter, or DDP around one. momentum: None for --distill none,
    where the target is its own teacher: SPD is 0 then, and the reference patches are the target's.

    Returns (loss, figures). loss is L_total, scaled so that the mean over processes of its gradient is the gradient on the
    joined batch: SPD and CPA average over the images that have reference patches, and a process may have more of them than
    another. figures: this process's share of the sums that FIGURES names.
    """
    net = getattr(model, "module", model)
    amp = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[args.precision]
    with torch.autocast(images.device.type, amp, enabled=amp is not None):
        logits, patches, text = model(images, tokens)                                  # [B,K,4H,4W], V [B,L,D], T [K,D]
        momentum_patches = momentum.encode_image(images) if momentum else patches.detach() # V^M [B,L,D]
    logits, patches, text, momentum_patches = (t.float() for t in (logits, patches, text, momentum_patches))

    labels = patch_labels(target, net.grid)                                                # G [B,L]
    mask = reference_mask(momentum_patches, text, labels)                                  # Eq. (1)
    unit = (lambda v: F.normalize(v, dim=-1)) if args.spd_features == "normalised" else (lambda v: v)
    spd = spd_loss(unit(patches), unit(momentum_patches), mask)                            # Eq. (2)
    class_masks = class_reference_masks(mask, labels, len(text))                           # Eq. (3)
    prototypes, valid = class_prototypes(momentum_patches, class_masks)                    # Eq. (4)
    correct = reference_mask(patches, text, labels)
    cpa = cpa_loss(patches, prototypes, valid, labels, correct, args.tau)                  # Eq. (5)
    seg = segmentation_loss(logits, target, args.ignored)
    pooled = pooled_loss(patches, momentum_patches, net.grid)                              # MAFT+'s, to compare with

    q = contrast_mask(valid, labels, correct)
    counted = (target != IGNORE).sum() if args.ignored == "skip" else torch.tensor(target.numel(), device=target.device)
    if dist.is_initialized():
        counts = torch.stack([counted, mask.any(-1).sum(), q.any(-1).sum()]).double()
        total = counts.clone()
        dist.all_reduce(total)
        weights = (dist.get_world_size() * counts / total.clamp(min=1)).float()
        seg, spd, cpa = (weight * loss for weight, loss in zip(weights, (seg, spd, cpa)))
    if args.distill == "none":
        loss = seg
    elif args.distill == "pooled":
        loss = seg + args.lambda_pooled * pooled
    else:
        loss = total_loss(seg, spd, cpa, args.lambda_spd, args.lambda_cpa)                 # Eq. (6)
    figures = torch.stack([seg, spd, cpa, pooled, loss, mask.sum(), (labels != IGNORE).sum(), q.sum()])
    return loss, figures.detach().double()


def train(args, rank, world, device):
    if args.accumulate < 1 or args.batch_size < 1 or args.batch_size % (world * args.accumulate):
        raise ValueError(f"--batch-size {args.batch_size} does not divide among {world} processes x "
                         f"--accumulate {args.accumulate}")
    say = tqdm.write if rank == 0 else lambda *_: None
    out = Path(args.out)
    runs.check_folder(out, 0)

    # data and model
    train_set, val_set = (data.open_dataset(args.dataset, args.data_root, split, args.classes, unseen)
                          for split, unseen in (("train", args.unseen), ("val", None)))
    for split, part in (("training", train_set), ("validation", val_set)):
        say(f"{args.dataset}: {len(part)} {split} images of {len(part.names)} classes, from {part.source}")
    crops = data.TrainingCrops(train_set, args.image_size, args.seed, args.jitter)
    sliding, per_process = evaluate.is_sliding(None, args.dataset), args.batch_size // world

    def loader(dataset, start, stop, size=per_process):
        return data.batches(dataset, size, start, stop, rank, world, args.workers)

    model = build_model(args, rank, device)
    tokens, val_tokens = model.tokenize(train_set.names), model.tokenize(val_set.names)
    original = MomentumEncoder(model, alpha=1.0)                                        # a frozen copy, to compare with
    original_weights = {name: p.detach().clone() for name, p in model.named_parameters()
                        if p.requires_grad and not name.startswith("head.")}               # what trains of CLIP
    with torch.no_grad():
        original_text = model.encode_text(val_tokens)

    def measure(model, momentum=None):
        """Share of reference patches in training, drift of the original's in validation, on about 32 crops each."""
        passes = max(1, 32 // args.batch_size)
        val_crops = data.TrainingCrops(val_set, args.image_size, args.seed, 0.0)
        return {"reference_share": study.reference_share(model, tokens, loader(crops, 0, passes), device, momentum),
                "reference_drift": study.reference_drift(model, original, original_text, loader(val_crops, 0, passes), device)}

    def score(zero_shot=False):
        title = "zero-shot" if zero_shot else "evaluating"
        confusion = evaluate.evaluate(model, val_set, device, sliding, zero_shot, rank, world, title)
        result = evaluate.summary(confusion, val_set.evaluated, train_set.names)
        return {k: v for k, v in result.items() if k != "classes"}, result["classes"]

    # resume, or zero-shot figures and TPA
    last, log = out / "last.pt", out / "log.jsonl"
    state = None if args.restart or not last.exists() else segmenter.read_checkpoint(last)
    lines = runs.read_log(log) if state else []
    runs.check_agreement(state.get("step") if state else None, f"--out {out} should be one folder for all nodes: the step of {last}")
    if state:
        with runs.loading(last):
            runs.check_flags(args, state, FIXED, train_set.names, last, say)
            segmenter.load_state(model, state["model"], last)
            facts, first = state["facts"], state["step"]
            if first > args.steps:
                raise ValueError(f"{last} has {first} steps, more than --steps {args.steps}: use another --out, or --restart")
        say(f"going on from {last} at step {first}" if first < args.steps else
            f"{last} is complete: evaluating it again; --restart trains anew")
    else:
        facts, first = {"zero_shot": score(zero_shot=True)[0], "before_tpa": measure(model)}, 0
        if args.tpa_steps:
            warm_up = loader(crops, 0, args.tpa_steps)
            progress = lambda it: tqdm(it, "TPA", disable=rank > 0, leave=False)
            facts["tpa_loss"] = tpa.pre_align(model, tokens, warm_up, args.tpa_lr, device, progress)
            facts["after_tpa"] = measure(model)
            say("TPA: share of reference patches {reference_share:.3f}".format(**facts["before_tpa"]) +
                " -> {reference_share:.3f}".format(**facts["after_tpa"]))

    # momentum encoder, optimiser, DDP
    alpha = {"rpmd": args.alpha, "frozen": 1.0, "pooled": 1.0, "none": None}[args.distill]
    momentum = None if alpha is None else MomentumEncoder(model, alpha)
    optimiser = build_optimiser(model, args)
    scaler = torch.amp.GradScaler(device.type, enabled=args.precision == "fp16")
    if state:
        settings = [{k: group[k] for k in ("base_lr", "weight_decay")} for group in optimiser.param_groups]
        with runs.loading(last):
            optimiser.load_state_dict(state["optimiser"])
            for group, now in zip(optimiser.param_groups, settings):                   # changed flags hold from here on
                group.update(now)
            if state["scaler"] and scaler.is_enabled():
                scaler.load_state_dict(state["scaler"])
            if momentum:
                momentum.load_state_dict(state["momentum"])
                momentum.alpha = alpha
        del state
    devices = [device] if device.type == "cuda" else None
    ddp = nn.parallel.DistributedDataParallel(model, devices) if world > 1 else model
    trained = [p for p in model.parameters() if p.requires_grad]
    # two whole checkpoints: weights, and of what trains a momentum, an original and two averages of AdamW's
    runs.check_folder(out, 2 * (sum(t.nbytes for t in model.state_dict().values()) + 4 * sum(p.nbytes for p in trained)))

    def save(step):
        weights = dict(config=model.config, model=model.state_dict(), original=original_weights, step=step, args=vars(args),
                       momentum=momentum.state_dict() if momentum else None, names=train_set.names)
        if rank == 0 and every(args.snapshot_every, step):
            runs.write_checkpoint(weights, out / f"step-{step:06d}.pt")
        if rank == 0:
            whole = dict(weights, optimiser=optimiser.state_dict(), scaler=scaler.state_dict(), facts=facts)
            runs.write_checkpoint(whole, last)

    save(first)
    # the log so far, without the last evaluation, which is about to come again
    keep = [l for l in lines if l["step"] <= first and not (l["step"] == args.steps and "mIoU_union" in l)]
    record = runs.Log(log, keep).append if rank == 0 else lambda **line: None
    if "tpa_loss" in facts and not any(line["step"] == 0 for line in keep):
        record(step=0, tpa_loss=facts["tpa_loss"], before=facts["before_tpa"], after=facts["after_tpa"])

    # joint training
    stop = runs.Interruption()

    def evaluate_at(step):
        if every(args.eval_every, step) and step < args.steps:
            stop.at_once = True                                               # it may take minutes, and can be repeated
            record(step=step, **score()[0], **measure(model, momentum))
            stop.at_once = False
            if rank == 0:
                viz.curves(log, out / "curves.png")

    if not any(line["step"] == first and "mIoU_union" in line for line in keep):           # it was cut short
        evaluate_at(first)
    bar = tqdm(total=args.steps, initial=first, desc="training", disable=rank > 0)
    parts = iter(loader(crops, first * args.accumulate, args.steps * args.accumulate, per_process // args.accumulate))
    for step in range(first + 1, args.steps + 1):
        begin, halt = time.time(), runs.anyone(stop.asked)
        ddp.train()
        set_learning_rate(optimiser, step - 1, args.steps)
        figures, paths = 0, []
        for part in range(args.accumulate):
            images, target, files = next(parts)
            images, target = images.to(device, non_blocking=True), target.to(device, non_blocking=True)
            apart = world > 1 and part < args.accumulate - 1                           # gradients meet at the last part
            with ddp.no_sync() if apart else contextlib.nullcontext():
                loss, sums = step_losses(ddp, momentum, images, target, tokens, args)
                scaler.scale(loss / args.accumulate).backward()
            figures, paths = figures + sums, paths + list(files)
        scaler.unscale_(optimiser)
        grad_norm = nn.utils.clip_grad_norm_(trained, args.clip_grad)
        # under fp16 an infinite gradient is the scaler's to skip, a loss that is not finite nobody's
        if not figures.isfinite().all() or not (math.isfinite(grad_norm) or scaler.is_enabled()):
            raise ValueError(non_finite(step, figures, paths, last))
        scaler.step(optimiser)
        scaler.update()
        optimiser.zero_grad()
        if momentum and math.isfinite(grad_norm):
            momentum.update()

        if every(args.log_every, step) or step == args.steps:
            if world > 1:
                dist.all_reduce(figures)
            sums = dict(zip(FIGURES, figures.tolist()))
            losses = {name: sums[name] / world / args.accumulate for name in FIGURES[:5]}
            share = sums["reference_patches"] / max(1, sums["labelled_patches"])
            rates = {group["name"]: group["lr"] for group in optimiser.param_groups}
            record(step=step, **losses, reference_share=share, contrast_patches=int(sums["contrast_patches"]), lr=rates["head"],
                   lr_clip=rates.get("clip", 0.0), grad_norm=float(grad_norm), seconds=round(time.time() - begin, 3),
                   memory_gb=runs.peak_memory(device))
            bar.set_postfix(seg=f"{losses['segmentation_loss']:.3f}", spd=f"{losses['spd_loss']:.3f}",
                            cpa=f"{losses['cpa_loss']:.3f}", ref=f"{share:.2f}")
        bar.update()
        if halt and step < args.steps:
            save(step)
            bar.close()
            say(f"stopped after step {step} as asked; the same command goes on from {last}")
            return 130
        if step == args.steps or any(every(n, step) for n in (args.save_every, args.snapshot_every, args.eval_every)):
            save(step)
        evaluate_at(step)
    bar.close()
    stop.at_once = True

    # the end: evaluate, print, draw
    scores, classes = score()
    end = measure(model, momentum)
    record(step=args.steps, **scores, **end)
    if rank == 0:
        shift = study.shift_statistics(model, original, original_text, study.Part(val_set, 100))
        results = dict(args=vars(args), **facts, trained=scores, end=end, shift=shift, classes=classes)
        with runs.writing(out / "results.json") as path:
            path.write_text(json.dumps(results, indent=1))
        say(report(results))
        with runs.writing(out / "curves.png") as path:
            viz.curves(log, path)
        with runs.writing(out / "examples.png") as path:
            study.example_sheet(model, original, original_text, momentum, val_set, sliding).save(path)
        say(f"\nwritten to {out}: examples.png, curves.png, results.json, log.jsonl, last.pt")
    return 0


def report(results):
    """results.json as two tables."""
    columns = ["seen", "unseen", "harmonic"] if "seen" in results["trained"] else ["mIoU_ground_truth", "mIoU_union"]
    rows = {"CLIP, zero-shot": results["zero_shot"], f"trained (--distill {results['args']['distill']})": results["trained"]}
    moments = [results["before_tpa"], results.get("after_tpa"), results["end"]]
    quantities = {"share of the labelled patches": "reference_share", "drift from the original CLIP": "reference_drift"}
    scores = evaluate.table([["", *columns]] + [[name, *(row[c] for c in columns)] for name, row in rows.items()])
    patches = evaluate.table([["reference patches", "at the start", "after TPA", "at the end"]] + [
        [name, *(f"{m[key]:.3f}" if m else "-" for m in moments)] for name, key in quantities.items()])
    return f"\nmIoU in per cent on the validation images\n{scores}\n\n{patches}"


def every(n, step):
    """Whether step is a multiple of n and not 0; never when n is 0."""
    return n > 0 and step > 0 and step % n == 0


def non_finite(step, figures, paths, last):
    terms = [name for name, value in zip(FIGURES[:4], figures.tolist()) if not math.isfinite(value)]
    what = " and ".join(terms) or "the gradient, not the losses of this process,"
    return f"step {step}: {what} became NaN or infinite; images {', '.join(paths)}; nothing was written after {last}"


def main():
    args = parse()
    with runs.one_sentence_for_errors():
        status = train(args, *runs.start_processes(args.timeout))
    sys.exit(status)


if __name__ == "__main__":
    main()
