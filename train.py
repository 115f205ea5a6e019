"""Train reference patch momentum distillation (RPMD).

    python train.py                                 the embedded toy world, minutes on a laptop
    python train.py --dataset coco-stuff            one GPU
    torchrun --nproc_per_node=8 train.py --dataset coco-stuff
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 \\
        train.py --dataset coco-stuff
    python train.py --dataset folder:PATH --steps 2000        your own images, masks, classes.txt

The same command resumes an interrupted run from its last checkpoint. Everything is written to
--out, by default out/DATASET: log.jsonl (a line per logged step), last.pt (checkpoint),
results.json, curves.png, examples.png.
"""
import argparse
import functools
import json
import math
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.nn.parallel import DistributedDataParallel as DDP
from tqdm import tqdm

import data
import evaluate
from ema import MomentumEncoder, frozen_copy
from losses import (IGNORE, class_prototypes, class_reference_masks, contrast_mask,
                    correctly_classified, cpa_loss, patch_labels, pooled_loss, segmentation_loss,
                    spd_loss, total_loss)
from model import Segmenter
from support import accidents, checkpoint
from support.accidents import say
from support.files import UserError, digest, number, replacing, write_json
from tpa import pre_align

# The paper prints no hyperparameters. For a real CLIP, ours have not been tuned yet.
RECIPE = dict(
    # CAT-Seg's. weight_decay is 0 on norms, channels is the width of the head, jitter 1 is SSD's
    steps=80_000, batch_size=4, lr=2e-4, clip_lr_factor=0.01, weight_decay=1e-4, clip_grad=0.01,
    image_size=384, channels=128, prior=None, jitter=1.0,
    # MAFT+'s
    lambda_pooled=0.1,
    # ours; so is alpha, 1 - 3 / steps: a memory of a third of the run
    lambda_spd=1.0, lambda_cpa=1.0, tau=0.1, tpa_steps=200, tpa_lr=2e-6,
    log_every=50, eval_every=10_000, save_every=1000, snapshot_every=0)
TOY = dict(  # with --clip tiny. All ours; learning rates and lambda_spd were tuned on toy worlds
    steps=320, lr=2.5e-3, clip_lr_factor=0.3, clip_grad=0.1, image_size=64, channels=32, prior=0.08,
    jitter=0.2, lambda_pooled=0.03, lambda_spd=0.3, lambda_cpa=0.1, alpha=0.99, tpa_steps=10,
    tpa_lr=5e-4, log_every=10, eval_every=160, save_every=80)


def parse(argv=None):
    """The flags. What has no flag is set in RECIPE and TOY."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    cuda = torch.cuda.is_available()
    bf16 = cuda and torch.cuda.is_bf16_supported(including_emulation=False)

    def setting(add, flag, kind, about):
        """A flag whose default is in RECIPE, or in TOY with the tiny CLIP."""
        name = flag[2:].replace("-", "_")
        toy = f"; tiny CLIP {TOY[name]:g}" if name in TOY else ""
        add(flag, type=kind, help=f"{about} (default {RECIPE[name]:g}{toy})")

    add = parser.add_argument_group("data").add_argument
    add("--dataset", default="toy", help=f"{', '.join(data.NAMES)} (default toy)")
    add("--data-root", help=data.ROOT_HELP)
    add("--unseen", help="class names to hold out of training and to score separately, "
                         "comma-separated")
    add("--workers", type=number(int, 0), default=4 if cuda else 0,
        help="loader processes per GPU (default 4; 0 without a GPU)")

    add = parser.add_argument_group("model").add_argument
    add("--clip", help="tiny (default for toy), or a ViT of open_clip (default ViT-B-16-quickgelu)")
    add("--pretrained", help="CLIP's weights: a tag of open_clip (default openai), a file, toy "
        "(default for toy) or none (default with --init-cat-seg, or tiny and other data)")
    add("--init-cat-seg", metavar="FILE", help="start from a checkpoint that CAT-Seg published; "
                                               "its CLIP then counts as the original")
    add("--adapt", default="both", choices=("both", "visual", "text", "none"),
        help="encoders of CLIP that are trained (default both)")
    setting(add, "--image-size", number(int, 16, 2048), "side of the training crops")
    add("--precision", choices=("fp32", "bf16", "fp16"), default="bf16" if bf16 else "fp32",
        help="mixed precision (default bf16 on GPUs that have it, else fp32)")
    add("--compile", action="store_true", help="torch.compile; the first step takes minutes")

    add = parser.add_argument_group("method").add_argument
    add("--distill", default="rpmd", choices=("rpmd", "frozen", "pooled", "none"),
        help="rpmd (default); baselines: frozen (RPMD with the original CLIP as the teacher), "
             "pooled (MAFT+'s distillation), none (plain CAT-Seg)")
    setting(add, "--lambda-spd", number(float, 0), "weight of SPD in Eq. (6)")
    setting(add, "--lambda-cpa", number(float, 0), "weight of CPA in Eq. (6)")
    setting(add, "--tau", number(float, 1e-6), "temperature of CPA, Eq. (5)")
    add("--alpha", type=number(float, 0, 1), help="EMA decay; the memory is about 1 / (1 - alpha) "
        f"steps (default 1 - 3 / steps; tiny CLIP {TOY['alpha']:g}); rpmd only")
    add("--spd-features", default="normalised", choices=("normalised", "raw"),
        help="features that Eq. (2) compares: unit vectors (default), or raw as in the paper")
    setting(add, "--tpa-steps", number(int, 0), "TPA steps; rpmd or frozen, if text is trained")
    setting(add, "--tpa-lr", number(float, 0), "learning rate of TPA")

    add = parser.add_argument_group("schedule and run").add_argument
    setting(add, "--steps", number(int, 1), "optimiser steps of joint training")
    setting(add, "--batch-size", number(int, 1), "global batch size; by default at least 1 per GPU")
    add("--accumulate", type=number(int, 1), default=1,
        help="micro-batches per step; SPD and CPA are averaged within each (default 1)")
    setting(add, "--lr", number(float, 0), "learning rate of the head")
    setting(add, "--clip-lr-factor", number(float, 0), "CLIP's learning rate, in multiples of --lr")
    setting(add, "--eval-every", number(int, 0), "steps between evaluations, 0: only at the end")
    setting(add, "--save-every", number(int, 0), "steps between checkpoints, 0: at evaluations")
    setting(add, "--snapshot-every", number(int, 0), "steps between checkpoints to keep, 0: none")
    add("--seed", type=number(int, 0, 2**31 - 1), default=0,
        help="seed of the head's weights, the data order and the augmentation (default 0)")
    add("--out", type=os.path.expanduser, help="folder for all results (default out/DATASET)")
    add("--restart", action="store_true", help="overwrite the run in --out instead of resuming it")

    args = parser.parse_args(argv)
    toy = args.dataset.startswith("toy")
    if args.clip is None:
        args.clip = "tiny" if toy else "ViT-B-16-quickgelu"
    defaults = dict(RECIPE, pretrained="openai")
    if args.clip == "tiny":
        defaults.update(TOY, pretrained="toy" if toy else "none")
    if args.init_cat_seg is not None:
        defaults["pretrained"] = "none"
        if args.pretrained not in (None, "none"):
            raise UserError("--init-cat-seg replaces the weights of --pretrained: leave one out")
    world = accidents.torchrun()[1]
    defaults["batch_size"] = math.ceil(RECIPE["batch_size"] / world) * world
    folder = Path(args.dataset.removeprefix("folder:").replace("toy:", "toy-")).expanduser()
    defaults["out"] = f"out/{Path(os.path.abspath(folder)).name}"
    for name, value in defaults.items():  # of flags not given, and of settings without a flag
        if getattr(args, name, None) is None:
            setattr(args, name, value)
    if args.alpha is None:
        args.alpha = max(0.0, 1 - 3 / args.steps)
    if args.distill != "rpmd":
        args.alpha = 1.0  # the teacher stays as it is
    if args.batch_size % (world * args.accumulate):
        raise UserError(f"--batch-size {args.batch_size} does not divide among {world} processes "
                        f"times --accumulate {args.accumulate}")
    if args.distill not in ("rpmd", "frozen") or args.adapt not in ("both", "text"):
        args.tpa_steps = 0
    for counter in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"):
        if args.restart and os.environ.get(counter, "0") != "0":  # a scheduler repeats the command
            say(f"note: --restart is ignored, since {counter} is {os.environ[counter]}")
            args.restart = False
    return args


def autocast(device, precision):
    """Mixed precision on a device; fp32 means none (on GPUs, products in TF32)."""
    dtype = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    return torch.autocast(device.type, dtype, enabled=dtype is not None)


def step_losses(model, momentum, images, pixel_labels, tokens, args):
    """The losses of RPMD on one micro-batch, in the order of the paper's Figure 1.

    model: Segmenter, or DDP around one. momentum: MomentumEncoder. images [B,3,S,S], normalised as
    for CLIP; pixel_labels int64 [B,S,S]; tokens [K,n] from `Segmenter.tokenize`. Returns (L_total,
    a dict for the log: its terms and patch counts). SPD and CPA are scaled by `weigh_by_process`.
    """
    with autocast(images.device, args.precision):
        logits, patches, text = model(images, tokens)  # [B,K,4H,4W], V [B,L,D], T [K,D]
        momentum_patches, _ = momentum(images)  # V^M [B,L,D]
    logits, patches, text = logits.float(), patches.float(), text.float()
    momentum_patches = momentum_patches.float()

    grid = [side // 4 for side in logits.shape[2:]]  # (H, W); DDP hides model.grid
    labels = patch_labels(pixel_labels, grid)  # G [B,L]
    reference = correctly_classified(momentum_patches, text, labels)  # Eq. (1)
    normalise = args.spd_features == "normalised"
    spd = spd_loss(patches, momentum_patches, reference, normalise)  # Eq. (2)
    class_masks = class_reference_masks(reference, labels, len(text))  # Eq. (3)
    prototypes, valid = class_prototypes(momentum_patches, class_masks)  # Eq. (4)
    correct = correctly_classified(patches, text, labels)
    q = contrast_mask(valid, labels, correct)
    cpa = cpa_loss(patches, prototypes, valid, labels, q, args.tau)  # Eq. (5)
    seg = segmentation_loss(logits, pixel_labels)  # L_SEG

    spd, cpa = weigh_by_process([spd, cpa], [reference.any(-1).sum(), q.any(-1).sum()])
    loss = total_loss(seg, spd, cpa, args.lambda_spd, args.lambda_cpa)  # Eq. (6)
    metrics = dict(segmentation_loss=seg, spd_loss=spd, cpa_loss=cpa, total_loss=loss,
                   reference_patches=reference.sum(), labelled_patches=(labels != IGNORE).sum(),
                   contrast_patches=q.sum())
    return loss, metrics


def rival_losses(model, teacher, images, pixel_labels, tokens, args):
    """`step_losses` for the baselines. --distill none: L_SEG alone, as in CAT-Seg. pooled: plus
    MAFT+'s distillation from `teacher`, a MomentumEncoder with alpha 1, that is, the CLIP training
    began with. Logged as reference_patches: the student's own correctly classified patches."""
    with autocast(images.device, args.precision):
        logits, patches, text = model(images, tokens)
        if args.distill == "pooled":
            teacher_patches, _ = teacher(images)
    patches = patches.float()
    grid = [side // 4 for side in logits.shape[2:]]
    loss = segmentation_loss(logits.float(), pixel_labels)
    metrics = dict(segmentation_loss=loss)
    if args.distill == "pooled":
        metrics["pooled_loss"] = pooled_loss(patches, teacher_patches.float(), grid)
        loss = loss + args.lambda_pooled * metrics["pooled_loss"]
    labels = patch_labels(pixel_labels, grid)
    correct = correctly_classified(patches, text.float(), labels)
    return loss, metrics | dict(total_loss=loss, reference_patches=correct.sum(),
                                labelled_patches=(labels != IGNORE).sum())


def weigh_by_process(losses, counts):
    """Scale each loss so that DDP's mean of gradients over processes is the gradient of the loss on
    the joined batch.

    A loss is a mean over N of this process's images: those with a reference patch for SPD, those
    with a non-empty Q for CPA. counts: N of each loss. N differs between processes, so each mean is
    multiplied by N over the average N. (L_SEG is a mean over equally many pixels everywhere.)"""
    if not dist.is_initialized():
        return losses
    counts = torch.stack(counts)
    total = counts.clone()
    dist.all_reduce(total)
    shares = counts * dist.get_world_size() / total.clamp(min=1)
    return [share * loss for share, loss in zip(shares, losses)]


def build_model(args, rank):
    """The segmenter as training begins, with the CLIP that --pretrained names."""
    accidents.agree({"digest of weights": [digest(args.pretrained), digest(args.init_cat_seg)]})
    torch.manual_seed(args.seed)  # the head's first weights
    pretrained, network = args.pretrained, None
    if pretrained == "toy":
        from sources import tiny_clip
        pretrained = tiny_clip.prepare(args.dataset, rank)
    if pretrained != "none":
        network = checkpoint.load_clip(args.clip, pretrained)
    elif args.init_cat_seg is None:
        say("warning: --pretrained none: CLIP's first weights are random")
    try:
        model = Segmenter(args.clip, args.image_size, args.channels, network, args.prior)
    except ValueError as e:
        raise UserError(f"--clip {args.clip} with --image-size {args.image_size}: {e}") from e
    if args.init_cat_seg is not None:
        checkpoint.load_weights(model, args.init_cat_seg)
    model.set_trained(args.adapt)
    if args.distill != "none" and args.adapt in ("text", "none"):
        say(f"warning: --adapt {args.adapt} leaves --distill {args.distill} no weights to protect")
    return model


def build_optimiser(model, args):
    """AdamW: the head at --lr, CLIP at --clip-lr-factor of it, no weight decay on norms."""
    head = [p for name, p in model.head.named_parameters() if "norm" not in name]
    norms = [p for name, p in model.head.named_parameters() if "norm" in name]
    encoders = (*model.image_encoder.parameters(), *model.text_encoder.parameters())
    clip = [p for p in encoders if p.requires_grad]
    groups = [dict(name="head", params=head, base_lr=args.lr),
              dict(name="norms", params=norms, base_lr=args.lr, weight_decay=0.0),
              dict(name="clip", params=clip, base_lr=args.lr * args.clip_lr_factor)]
    return torch.optim.AdamW(groups, lr=args.lr, weight_decay=args.weight_decay,
                             fused=torch.cuda.is_available())


def set_learning_rate(optimiser, step, steps):
    """Cosine from each group's base rate to 0."""
    for group in optimiser.param_groups:
        group["lr"] = group["base_lr"] * 0.5 * (1 + math.cos(math.pi * step / steps))


def due(n, step):
    """True if step is a multiple of n; 0 stands for never."""
    return n > 0 and step % n == 0


def refuse_non_finite(metrics, grad_norm, scaler, where):
    """Raise UserError if a loss is not finite, or the gradient (left to the scaler under fp16)."""
    sums = torch.stack(list(metrics.values())).tolist()
    terms = [name for name, n in zip(metrics, sums) if not math.isfinite(n)]
    if terms or not (math.isfinite(grad_norm) or scaler.is_enabled()):
        what = " and ".join(terms) or "the gradient, but no loss on this process,"
        raise UserError(f"{what} became NaN or infinite at {where}")


@torch.no_grad()
def reference_share(model, momentum, tokens, batches):
    """Share of the labelled patches that are reference patches, Eq. (1), over batches and all
    processes. momentum: MomentumEncoder, or None to count the student's own patches."""
    text = model.encode_text(tokens)
    encode = momentum or model.encode_image
    sums = torch.zeros(2, dtype=torch.float64, device=text.device)
    for images, pixel_labels, _ in batches:
        labels = patch_labels(pixel_labels, model.grid)
        reference = correctly_classified(encode(images)[0], text, labels)
        sums += torch.stack([reference.sum(), (labels != IGNORE).sum()])
    if dist.is_initialized():
        dist.all_reduce(sums)
    reference, labelled = sums.tolist()
    if not labelled:
        say("warning: in the sampled crops, no class is the most frequent label of any patch, so "
            "none can be a reference patch")
    return reference / max(1, labelled)


def add_line(log, path, **line):
    """Add a line to the log. Process 0 rewrites log.jsonl: it may hold lines after the checkpoint
    from which the run has resumed."""
    log.append(line)
    if accidents.is_first():
        with replacing(path) as file:
            file.write("".join(json.dumps(line) + "\n" for line in log).encode())


def step_line(step, metrics, optimiser, micro_batches, grad_norm, seconds):
    """One step's entry in the log. metrics: sums over this process's micro-batches. Entries named
    *_loss are averaged over micro-batches and processes; patch counts are summed. grad_norm is None
    when it is not finite; gpu_memory_gb is the peak since the start, in 10^9 bytes."""
    sums = torch.stack(list(metrics.values()))
    count = micro_batches
    if dist.is_initialized():
        dist.all_reduce(sums)
        count *= dist.get_world_size()
    line = dict(step=step)
    for name, n in zip(metrics, sums.tolist()):
        line[name] = n / count if name.endswith("_loss") else n
    line["reference_share"] = line.pop("reference_patches") / max(1, line.pop("labelled_patches"))
    rates = {group["name"]: group["lr"] for group in optimiser.param_groups}
    return dict(line, lr=rates["head"], lr_clip=rates["clip"], seconds=round(seconds, 3),
                grad_norm=grad_norm if math.isfinite(grad_norm) else None,
                gpu_memory_gb=round(torch.cuda.max_memory_allocated() / 1e9, 2))


def report(out, log, args, model, original, momentum, val_set, seen):
    """Write results.json and the pictures, and print scores and reference patches at the start,
    after TPA and at the end. seen: the names that training showed."""
    write_json(dict(args=vars(args), start=log[0], trained=log[-1]), out / "results.json")
    start = [line for line in log if line["step"] == 0]
    scores = ["seen", "unseen", "harmonic"] if "seen" in log[-1] else ["mIoU_ground_truth"]
    rows = [["per cent", *scores, "reference patches"]]
    names = ["CLIP, zero-shot", "after TPA"][:len(start)] + [f"trained (--distill {args.distill})"]
    for name, line in zip(names, [*start, log[-1]]):  # start: the evaluation, and perhaps TPA
        rows.append([name, *map(line.get, scores), 100 * line["reference_share_teacher"]])
    say(evaluate.format_table(rows))
    from support import pictures  # with matplotlib, which takes a while
    pictures.curves(log, out / "curves.png")
    evaluate.examples(out / "examples.png", model, original, momentum, val_set, seen)
    say(f"written to {out}: examples.png, curves.png, results.json, log.jsonl, last.pt")


def main(args):
    """Train, evaluate and report. Returns the exit status 130 if asked to stop, else None."""
    # processes
    rank, world, device = accidents.start_processes()
    out = Path(args.out)
    last = out / "last.pt"

    # data
    train_set = data.open_dataset(args.dataset, args.data_root, "train", unseen=args.unseen)
    val_set = data.open_dataset(args.dataset, args.data_root, "val")
    fingerprints = [train_set.fingerprint, val_set.fingerprint]
    accidents.agree({**vars(args), "digest of images and names": fingerprints})
    say(f"training: {train_set.description}\nvalidation: {val_set.description}")
    crops = data.TrainingCrops(train_set, args.image_size, args.seed, args.jitter)
    batches = functools.partial(data.batches, crops, rank=rank, world=world, workers=args.workers,
                                device=device)

    # student, teacher, optimiser
    model = build_model(args, rank).to(device)
    evaluate.check_names(val_set.names, model.text_encoder.context_length, val_set.own_words)
    tokens = model.tokenize(train_set.names)
    original = frozen_copy(model)  # CLIP as training begins
    # TPA leaves the visual encoder as it is, so E^M can begin here. (frozen, pooled: alpha is 1)
    momentum = MomentumEncoder(model.image_encoder, args.alpha) if args.distill != "none" else None
    optimiser = build_optimiser(model, args)
    scaler = torch.amp.GradScaler(device.type, enabled=args.precision == "fp16")

    # resume
    log = []
    run = dict(model=model, original=original, momentum=momentum, optimiser=optimiser, log=log,
               scaler=scaler, args=vars(args), names=train_set.names, data=fingerprints)
    step = checkpoint.resume(last, **run)
    add = functools.partial(add_line, log, out / "log.jsonl")

    far = 10 ** 9  # no run has this step: a fixed sample of crops (about 32, or one larger batch)
    sample = list(batches(args.batch_size, far, far + max(1, 32 // args.batch_size)))
    share = functools.partial(reference_share, model, momentum, tokens, sample)

    def evaluation(zero_shot=False):
        """Scores on the validation images, and reference patches of the sample."""
        scores = evaluate.evaluate(model, val_set, train_set.names, zero_shot, rank, world)
        return dict(scores, reference_share_teacher=share())

    # text-to-patch pre-alignment
    if step is None:
        step = 0
        add(step=0, **evaluation(zero_shot=True))
        if args.tpa_steps:
            warm_up = tqdm(batches(args.batch_size, 0, args.tpa_steps), "TPA", args.tpa_steps,
                           disable=rank > 0, leave=False)
            loss = pre_align(model, tokens, warm_up, args.tpa_steps, args.tpa_lr)
            refuse_non_finite({"tpa_loss": torch.tensor(loss)}, 0.0, scaler, "the end of TPA")
            add(step=0, tpa_loss=loss, reference_share_teacher=share())
        checkpoint.save(last, step=0, **run)

    # joint training
    losses_of = step_losses if args.distill in ("rpmd", "frozen") else rival_losses
    network = DDP(model, gradient_as_bucket_view=True) if world > 1 else model
    if args.compile:
        model.compile()
    parts = args.accumulate  # micro-batches of a step
    micro_batches = batches(args.batch_size // parts, step * parts, args.steps * parts)
    bar = tqdm(range(step + 1, args.steps + 1), "train", args.steps, initial=step, disable=rank > 0)
    evaluated = [line["step"] for line in log if "mIoU_union" in line]
    if (due(args.eval_every, step) or step == args.steps) and step not in evaluated:
        add(step=step, **evaluation())  # last.pt is saved before the evaluation of its step
    accidents.answer_signals(accidents.ask_to_stop)
    for step in bar:
        begin = time.time()
        model.train()  # evaluation sets eval mode
        set_learning_rate(optimiser, step - 1, args.steps)
        metrics, paths = {}, []
        try:
            for part in range(1, parts + 1):
                images, pixel_labels, files = next(micro_batches)
                if world > 1:  # read by DDP's forward: all-reduce in the last micro-batch only
                    network.require_backward_grad_sync = part == parts
                loss, terms = losses_of(network, momentum, images, pixel_labels, tokens, args)
                scaler.scale(loss / parts).backward()
                for name, value in terms.items():
                    metrics[name] = metrics.get(name, 0) + value.detach().double()
                paths += files
            scaler.unscale_(optimiser)
            grad_norm = nn.utils.clip_grad_norm_(model.parameters(), args.clip_grad).item()
            refuse_non_finite(metrics, grad_norm, scaler, f"step {step}; images {', '.join(paths)}")
        except (UserError, RuntimeError):  # NaN, a broken image, a lost process: no weight changed
            checkpoint.save(last, step=step - 1, **run)
            raise
        scaler.step(optimiser)  # skipped under fp16 if a gradient is not finite
        scaler.update()
        optimiser.zero_grad()
        if momentum and math.isfinite(grad_norm):  # the step was not skipped
            momentum.update()  # E^M = alpha E^M + (1 - alpha) E

        if due(args.log_every, step) or step == args.steps:
            add(**step_line(step, metrics, optimiser, parts, grad_norm, time.time() - begin))
            bar.set_postfix(loss=log[-1]["total_loss"], reference=log[-1]["reference_share"])
        stop = accidents.anyone_asked_to_stop()
        if stop or step == args.steps or due(args.eval_every, step) or due(args.save_every, step):
            checkpoint.save(last, step=step, **run)
        if due(args.snapshot_every, step):
            checkpoint.save(out / f"step-{step:06d}.pt", step=step, **run)
        if stop:
            say(f"stopped after step {step} as asked; the same command resumes from {last}")
            return 130
        if due(args.eval_every, step) or step == args.steps:
            add(step=step, **evaluation())

    if rank == 0:
        report(out, log, args, model, original, momentum, val_set, train_set.names)


if __name__ == "__main__":
    with accidents.door():
        arguments = parse()
        accidents.lock_folder(Path(arguments.out))
        status = main(arguments)
    sys.exit(status)
