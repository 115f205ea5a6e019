"""Train reference patch momentum distillation (RPMD).

    python train.py                                 the embedded toy world, minutes on a laptop
    python train.py --dataset coco-stuff            one GPU
    torchrun --nproc_per_node=8 train.py --dataset coco-stuff
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 \\
        train.py --dataset coco-stuff
    python train.py --dataset folder:PATH --steps 2000        your own images, masks, classes.txt

An interrupted run goes on where it stopped when the same command is given again. Everything lands
in --out, by default out/DATASET: log.jsonl (a line per logged step), last.pt (checkpoint),
results.json, curves.png, examples.png.
"""
import support.signals  # noqa: F401, first: it handles Ctrl-C during the slow imports
import math
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
from tqdm import tqdm

import data
from ema import MomentumEncoder, frozen_copy
from losses import (IGNORE, class_prototypes, class_reference_masks, contrast_mask, cpa_loss,
                    patch_labels, reference_mask, segmentation_loss, spd_loss, total_loss)
from model import PROMPT_START
from sources import tiny_clip
from study import progress
from study.rivals import pooled_loss
from support import checkpoints, runs, weights
from support.command_line import parse_training
from support.flags import (below_one, non_negative, non_negative_int, positive, positive_int,
                           probability)
from tpa import pre_align

# The paper gives no hyperparameters. "ours": chosen here, as is all that differs with the tiny CLIP
# (on toy worlds, docs/results.md). For real CLIPs nobody has tuned ours yet.
CAT_SEG, MAFT, OURS = "CAT-Seg's", "MAFT+'s", "ours"
RECIPE = {
    # flag: (default with a real CLIP, with --clip tiny, what it may be, whose default, help)
    "steps": (80_000, 320, positive_int, CAT_SEG, "optimiser steps of joint training"),
    "batch-size": (4, 4, positive_int, CAT_SEG, "images per step, all GPUs; at least one per pass"),
    "lr": (2e-4, 2.5e-3, positive, CAT_SEG, "learning rate of the head"),
    "clip-lr-factor": (0.01, 0.3, non_negative, CAT_SEG, "CLIP's learning rate divided by --lr"),
    "weight-decay": (1e-4, 1e-4, non_negative, CAT_SEG, "of AdamW, 0 on norms"),
    "clip-grad": (0.01, 0.1, positive, CAT_SEG, "largest norm of the gradient"),
    "image-size": (384, 64, positive_int, CAT_SEG, "side of the training crops"),
    "channels": (128, 32, positive_int, CAT_SEG, "width of the head"),
    "prior": (0.0, 0.08, below_one, OURS, "initial probability of each class, 0: about 0.5"),
    "jitter": (1.0, 0.2, non_negative, CAT_SEG, "strength of the colour jitter, 1 as in SSD"),
    "lambda-spd": (1.0, 0.3, non_negative, OURS, "weight of SPD, Eq. (6)"),
    "lambda-cpa": (1.0, 0.1, non_negative, OURS, "weight of CPA, Eq. (6)"),
    "lambda-pooled": (0.1, 0.1, non_negative, MAFT, "weight of --distill pooled"),
    "tau": (0.1, 0.1, positive, OURS, "temperature of CPA, Eq. (5)"),
    "alpha": (0.99996, 0.99, probability, OURS, "of E^M: it forgets in 1 / (1 - alpha) steps"),
    "tpa-steps": (200, 10, non_negative_int, OURS, "steps of TPA, 0 with none and pooled"),
    "tpa-lr": (2e-6, 5e-4, positive, OURS, "learning rate of TPA"),
    "log-every": (50, 10, positive_int, OURS, "steps between lines in log.jsonl"),
    "eval-every": (10_000, 100, non_negative_int, OURS, "steps between evaluations, 0: at the end"),
    "save-every": (1000, 100, non_negative_int, OURS, "steps between checkpoints, 0: as evaluated"),
    "snapshot-every": (0, 0, non_negative_int, OURS, "steps between files of weights, 0: none"),
}


def parse(argv=None):
    """The flags: those of RECIPE, and others, which support/command_line.py lists."""
    return parse_training(__doc__, RECIPE, data.NAMES, argv)


def step_losses(model, momentum, images, pixel_labels, tokens, args):
    """RPMD, top to bottom as in the paper's Figure 1, on one micro-batch.

    model: Segmenter, or DDP around one. momentum: a MomentumEncoder; with an alpha of 1 this is
    --distill frozen. tokens: of `Segmenter.tokenize`, with its usual prompt. Returns L_total, and
    for `progress.log_step` its terms, weighed by process, and this process's numbers of patches.
    """
    with runs.autocast(images.device, args.precision):
        # [B,K,4H,4W], V [B,L,D], T [K,D]; PROMPT_START saves work and changes nothing
        logits, patches, text = model(images, tokens, PROMPT_START)
        momentum_patches, _ = momentum(images)  # V^M [B,L,D]
    logits, patches, text = logits.float(), patches.float(), text.float()
    momentum_patches = momentum_patches.float()

    labels = patch_labels(pixel_labels, unwrap(model).grid)  # G [B,L]
    mask = reference_mask(momentum_patches, text, labels)  # Eq. (1)
    normalise = args.spd_features == "normalised"
    spd = spd_loss(patches, momentum_patches, mask, normalise)  # Eq. (2)
    class_masks = class_reference_masks(mask, labels, len(text))  # Eq. (3)
    prototypes, valid = class_prototypes(momentum_patches, class_masks)  # Eq. (4)
    correct = reference_mask(patches, text, labels)
    cpa = cpa_loss(patches, prototypes, valid, labels, correct, args.tau)  # Eq. (5)
    seg = segmentation_loss(logits, pixel_labels, args.ignored)  # L_SEG

    q = contrast_mask(valid, labels, correct)
    counts = [counted_pixels(pixel_labels, args), mask.any(-1).sum(), q.any(-1).sum()]
    seg, spd, cpa = weigh_by_process([seg, spd, cpa], counts)
    loss = total_loss(seg, spd, cpa, args.lambda_spd, args.lambda_cpa)  # Eq. (6)
    figures = dict(segmentation_loss=seg, spd_loss=spd, cpa_loss=cpa, total_loss=loss,
                   reference_patches=mask.sum(), labelled_patches=(labels != IGNORE).sum(),
                   contrast_patches=q.sum())
    return loss, figures


def rival_losses(model, original, images, pixel_labels, tokens, args):
    """The same of what RPMD is compared with: plain CAT-Seg (--distill none, original None), and
    MAFT+'s pooled distillation from the CLIP that training began with (pooled, original: a
    MomentumEncoder whose alpha is 1). They have no reference patches: the patches logged as such
    are those that the trained encoder predicts correctly."""
    with runs.autocast(images.device, args.precision):
        logits, patches, text = model(images, tokens, PROMPT_START)
    patches = patches.float()
    seg = segmentation_loss(logits.float(), pixel_labels, args.ignored)
    [seg] = weigh_by_process([seg], [counted_pixels(pixel_labels, args)])
    labels = patch_labels(pixel_labels, unwrap(model).grid)
    correct = reference_mask(patches, text.float(), labels)
    figures = dict(segmentation_loss=seg, total_loss=seg,
                   reference_patches=correct.sum(), labelled_patches=(labels != IGNORE).sum())
    if args.distill == "pooled":
        with runs.autocast(images.device, args.precision):
            original_patches, _ = original(images)
        pooled = pooled_loss(patches, original_patches.float(), unwrap(model).grid)
        figures["pooled_loss"] = pooled
        figures["total_loss"] = seg + args.lambda_pooled * pooled
    return figures["total_loss"], figures


def unwrap(model):
    return getattr(model, "module", model)


def counted_pixels(pixel_labels, args):
    """How many pixels L_SEG is a mean over."""
    if args.ignored == "skip":
        return (pixel_labels != IGNORE).sum()
    return torch.full((), pixel_labels.numel(), device=pixel_labels.device)


def weigh_by_process(losses, counts):
    """Scale each loss so that DDP's mean of gradients over processes is the gradient of the loss on
    the joined batch.

    A loss is a mean over the process's own N items: pixels, images with a reference patch, images
    whose Q is not empty. N differs between processes, so each mean is multiplied by its N over the
    average N.
    """
    if not dist.is_initialized():
        return losses
    counts = torch.stack(counts).double()
    total = counts.clone()
    dist.all_reduce(total)
    shares = (dist.get_world_size() * counts / total.clamp(min=1)).float()
    return [share * loss for share, loss in zip(shares, losses)]


class Run:
    """One training: its flags, processes, data and models, which the phases below share."""

    def __init__(self, args):
        self.args = args
        self.interruption = runs.Interruption(at_once=True)
        self.rank, self.world, self.device = runs.start_processes(args.timeout)
        self.out = Path(args.out)
        self.out.mkdir(parents=True, exist_ok=True)
        self.last = self.out / "last.pt"
        self.log = runs.Log(self.out / "log.jsonl", self.rank)
        self.step = 0
        self.facts = {}  # scores and shares of reference patches from before joint training

        self.train_set = data.open_dataset(args.dataset, args.data_root, "train", args.classes,
                                           args.unseen)
        self.val_set = data.open_dataset(args.dataset, args.data_root, "val", args.classes)
        for split, dataset in (("training", self.train_set), ("validation", self.val_set)):
            self.say(f"{args.dataset}: {len(dataset)} {split} images of {len(dataset.names)} "
                     f"classes, from {dataset.source}")
            if dataset.warning:
                self.say(f"warning: {dataset.warning}")
        self.crops = data.TrainingCrops(self.train_set, args.image_size, args.seed, args.jitter)

        self.model = build_model(args, self.rank).to(self.device)
        if args.compile:  # its forward(); evaluation calls the encoders and the head by themselves
            runs.compile_forward(self.model)
            self.say("--compile: the first step takes minutes, until the model is compiled")
        self.tokens = self.model.tokenize(self.train_set.names)
        self.keep_original()
        self.momentum = None
        if args.distill != "none":  # TPA leaves the visual encoder as it is: E^M can begin here
            alpha = args.alpha if args.distill == "rpmd" else 1.0
            self.momentum = MomentumEncoder(self.model.image_encoder, alpha)
        self.optimiser = build_optimiser(self.model, args)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=args.precision == "fp16")

    def keep_original(self):
        """Keep CLIP as training begins with it: its image encoder, its T, and what trains of it."""
        self.original = frozen_copy(self.model.image_encoder)
        with torch.no_grad():
            self.original_text = self.model.encode_text(self.model.tokenize(self.val_set.names))
        self.original_weights = {name: p.detach().clone()
                                 for name, p in self.model.named_parameters()
                                 if p.requires_grad and not name.startswith("head.")}

    def say(self, text):
        if self.rank == 0:
            tqdm.write(text)

    def batches(self, crops, size, start, stop):
        """Batches number start..stop-1; of each, this process takes its `size` images."""
        return data.batches(crops, size, start, stop, self.rank, self.world, self.args.workers)


def build_model(args, rank):
    """The segmenter at its start, with the CLIP that --pretrained names."""
    pretrained = None if args.pretrained == "none" else args.pretrained
    if pretrained in ("toy", "crops"):
        pretrained = tiny_clip.prepare(args, rank)
    torch.manual_seed(args.seed)  # the head's initial weights
    model = weights.build(args.clip, pretrained, args.image_size, args.channels)
    if args.prior:
        nn.init.constant_(model.head.logit.bias, math.log(args.prior / (1 - args.prior)))
    if args.init_cat_seg:
        state = weights.read_checkpoint(args.init_cat_seg)["model"]
        weights.load_state(model, state, args.init_cat_seg)
    model.set_trained(args.adapt)
    model.head.recompute = args.recompute_head
    return model


def build_optimiser(model, args):
    """AdamW: head at --lr, CLIP at --clip-lr-factor of it, no weight decay on norms."""
    head = [p for name, p in model.head.named_parameters() if "norm" not in name]
    norms = [p for name, p in model.head.named_parameters() if "norm" in name]
    encoders = [*model.image_encoder.parameters(), *model.text_encoder.parameters()]
    clip = [p for p in encoders if p.requires_grad]
    groups = [dict(name="head", params=head, base_lr=args.lr),
              dict(name="norms", params=norms, base_lr=args.lr, weight_decay=0.0),
              dict(name="clip", params=clip, base_lr=args.lr * args.clip_lr_factor)]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=args.lr, weight_decay=args.weight_decay,
                             fused=torch.cuda.is_available())


def set_learning_rate(optimiser, step, steps):
    """Cosine from each group's base rate to 0."""
    for group in optimiser.param_groups:
        group["lr"] = group["base_lr"] * 0.5 * (1 + math.cos(math.pi * step / steps))


def start(run):
    """Score the untrained CLIP; then text-to-patch pre-alignment."""
    args, facts = run.args, run.facts
    if not facts:
        checkpoints.set_aside(run)
        facts["zero_shot"], _ = progress.score(run, zero_shot=True)
        facts["before_tpa"] = progress.measure(run)
        with run.interruption.immediate(False):  # which would tear the file
            checkpoints.save(run)  # lest an interrupted pre-alignment costs this too
    if "after_tpa" in facts:
        return
    run.log.begin([])
    if not args.tpa_steps:
        return
    warm_up = run.batches(run.crops, args.batch_size // run.world, 0, args.tpa_steps)
    bar = tqdm(warm_up, "TPA", disable=run.rank > 0, leave=False)
    with run.interruption.immediate(True):
        facts["tpa_loss"] = pre_align(run.model, run.tokens, bar, args.tpa_lr, run.device)
    facts["after_tpa"] = progress.measure(run)
    run.log.append(step=0, tpa_loss=facts["tpa_loss"], before=facts["before_tpa"],
                   after=facts["after_tpa"])
    run.say(f"TPA: share of reference patches {facts['before_tpa']['reference_share']:.3f} "
            f"-> {facts['after_tpa']['reference_share']:.3f}")


def joint_training(run):
    """The loop. Returns whether it was asked to stop."""
    args, momentum, optimiser, scaler = run.args, run.momentum, run.optimiser, run.scaler
    losses_of = step_losses if args.distill in ("rpmd", "frozen") else rival_losses
    model = run.model
    if run.world > 1:
        model = nn.parallel.DistributedDataParallel(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    parts = args.accumulate  # micro-batches of a step
    size = args.batch_size // run.world // parts  # images of a micro-batch
    batches = iter(run.batches(run.crops, size, run.step * parts, args.steps * parts))
    bar = tqdm(range(run.step + 1, args.steps + 1), desc="training", total=args.steps,
               initial=run.step, disable=run.rank > 0)
    for step in bar:
        run.step = step
        begin = time.time()
        model.train()  # evaluation has switched it
        set_learning_rate(optimiser, step - 1, args.steps)
        figures, paths = {}, []
        for part in range(1, parts + 1):
            images, pixel_labels, files = next(batches)
            images = images.to(run.device, non_blocking=True)
            pixel_labels = pixel_labels.to(run.device, non_blocking=True)
            if run.world > 1:  # DDP reads it in forward: sum gradients after the last part alone
                model.require_backward_grad_sync = part == parts
            loss, found = losses_of(model, momentum, images, pixel_labels, run.tokens, args)
            scaler.scale(loss / parts).backward()
            for name, value in found.items():
                figures[name] = figures.get(name, 0) + value.detach().double()
            paths += files
        scaler.unscale_(optimiser)
        grad_norm = nn.utils.clip_grad_norm_(trained, args.clip_grad).item()
        runs.refuse_non_finite(run, figures, grad_norm, paths)
        scaler.step(optimiser)  # under fp16 it skips the step if a gradient is not finite
        scaler.update()
        optimiser.zero_grad()
        if momentum and math.isfinite(grad_norm):  # else there was no step to follow
            momentum.update()  # E^M = alpha E^M + (1 - alpha) E

        if runs.due(args.log_every, step) or step == args.steps:
            bar.set_postfix(progress.log_step(run, figures, grad_norm, time.time() - begin))
        stop = runs.anyone(run.interruption.asked)  # Ctrl-C or SIGTERM, in any process
        if stop or checkpoints.is_due(run):
            checkpoints.save(run)
        if stop:
            return True
        progress.evaluate_if_due(run)
    return False


def train(args):
    """The whole job. Returns the exit status: 0, or 130 when it was asked to stop."""
    run = Run(args)
    checkpoints.resume(run)
    checkpoints.check_space(run)
    if not run.step:
        start(run)
    with run.interruption.immediate(False):  # from here on, Ctrl-C waits for the end of a step
        checkpoints.save(run)
        progress.evaluate_if_due(run)  # if the run was interrupted in the middle of one
        stopped = joint_training(run)
    if stopped:
        run.say(f"stopped after step {run.step} as asked; the same command goes on from {run.last}"
                ", unless it says --restart")
        return 130
    with run.interruption.immediate(True):
        progress.finish(run)
    return 0


def main():
    with runs.one_sentence_for_errors():
        args = parse()
        with runs.only_run_in(Path(args.out)):
            status = train(args)
    sys.exit(status)


if __name__ == "__main__":
    main()
