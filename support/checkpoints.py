"""Checkpoints of a training: written whole or not at all, and taken back bit for bit."""
import shutil

import torch

from support import runs, weights
from support.errors import UserError, reading, replacing

FIXED = ("dataset", "classes", "unseen", "clip", "pretrained", "init_cat_seg", "image_size",
         "channels", "adapt", "distill", "batch_size", "seed")  # what cannot change on resume
OURS = ("last.pt", "step-*.pt", "log.jsonl", "results.json", "curves.png", "examples.png")


def is_due(run):
    """Whether a checkpoint should be written after this step."""
    periods = (run.args.save_every, run.args.snapshot_every, run.args.eval_every)
    return run.step == run.args.steps or any(runs.due(n, run.step) for n in periods)


def save(run):
    """last.pt, and the weights alone as step-N.pt where --snapshot-every says so."""
    if run.rank > 0:
        return
    state = dict(config=run.model.config, model=run.model.state_dict(),
                 original=run.original_weights, step=run.step, args=vars(run.args),
                 momentum=run.momentum.state_dict() if run.momentum else None,
                 names=run.train_set.names, images=len(run.train_set))
    if runs.due(run.args.snapshot_every, run.step):
        write_checkpoint(state, run.out / f"step-{run.step:06d}.pt")
    write_checkpoint(dict(state, optimiser=run.optimiser.state_dict(), facts=run.facts,
                          scaler=run.scaler.state_dict()), run.last)


def set_aside(run):
    """Move what an older run has left into a folder of its own, previous-N."""
    left = [p for pattern in OURS for p in run.out.glob(pattern)]
    if run.rank == 0 and any(p.suffix == ".pt" for p in left):  # else it has not come far
        numbers = (int(p.name[9:]) for p in run.out.glob("previous-*") if p.name[9:].isdecimal())
        previous = run.out / f"previous-{max(numbers, default=0) + 1}"
        previous.mkdir()
        for old in left:
            old.replace(previous / old.name)


def resume(run):
    """Take back what last.pt holds, and the log up to it; flags that may change hold from here on.
    Nothing where there is none, which all processes agree on. Raises UserError."""
    args, state = run.args, {}
    if run.last.exists() and not args.restart:
        state = weights.read_checkpoint(run.last)
    runs.agree_on(state.get("step"),
                  f"--out {run.out} should be one folder for all nodes: the step of {run.last}")
    if not state:
        return
    with reading(run.last, "a checkpoint to go on from"):
        compare_flags(run, state)
        if state["step"] > args.steps:
            raise UserError(f"{run.last} has {state['step']} steps, more than --steps "
                            f"{args.steps}: use another --out, or --restart")
        run.step = state["step"]
        run.facts = state["facts"]
        weights.load_state(run.model, {**state["model"], **state["original"]}, run.last)
        run.keep_original()  # as it was then, whatever --pretrained gives today
        weights.load_state(run.model, state["model"], run.last)
        for group, now in zip(state["optimiser"]["param_groups"], run.optimiser.param_groups):
            for key in ("base_lr", "weight_decay", "fused"):  # as flags and machine are now
                group[key] = now[key]
        run.optimiser.load_state_dict(state["optimiser"])
        if state["scaler"]:
            run.scaler.load_state_dict(state["scaler"])
        if run.momentum:
            state["momentum"]["alpha"] = run.momentum.alpha
            run.momentum.load_state_dict(state["momentum"])
    # the last evaluation is about to come again
    lines = [line for line in runs.read_log(run.log.path) if line["step"] <= run.step
             and not (line["step"] == args.steps and "mIoU_union" in line)]
    run.log.begin(lines)
    if run.step == args.steps:
        run.say(f"{run.last} is complete: evaluating it again; --restart trains anew")
    else:
        run.say(f"going on from {run.last} at step {run.step}")


def check_space(run):
    """Raises UserError if the disk has no room for two whole checkpoints: weights, and of what
    trains a momentum, an original and two averages of AdamW's."""
    trained = sum(p.nbytes for p in run.model.parameters() if p.requires_grad)
    needed = 2 * (sum(t.nbytes for t in run.model.state_dict().values()) + 4 * trained)
    free = shutil.disk_usage(run.out).free
    if run.facts:  # it goes on from last.pt
        free += run.last.stat().st_size  # one of the two is there
    if run.rank == 0 and free < needed:
        raise UserError(f"--out {run.out} has {free / 1e6:,.0f} MB left, and needs "
                        f"{needed / 1e6:,.0f}")


def write_checkpoint(contents, path):
    """Write a checkpoint whole or not at all. Raises UserError."""
    with replacing(path) as file:
        torch.save(contents, file)


def compare_flags(run, state):
    """Refuse another model or order of data than the checkpoint's; say what else has changed."""
    args, names, path = run.args, run.train_set.names, run.last
    if not {"args", "step", "optimiser", "facts", "names"} <= state.keys():
        raise UserError(f"{path} is no checkpoint that training can go on from: "
                        "use another --out, or --restart")
    if state["names"] != names:
        raise UserError(f"{path} was trained with other classes ({len(state['names'])}, such as "
                        f"{state['names'][0]!r}) than --dataset {args.dataset} has now "
                        f"({len(names)}): use another --out, or --restart")
    images = state.get("images", len(run.train_set))
    if images != len(run.train_set):
        raise UserError(f"{path} was trained on {images} images, and --dataset {args.dataset} has "
                        f"{len(run.train_set)} now: use another --out, or --restart")
    before, now = state["args"], vars(args)
    changed = [name for name in now if before.get(name) != now[name]]
    for name in sorted(changed, key=lambda name: name not in FIXED):
        flag = "--" + name.replace("_", "-")
        if name in FIXED:
            raise UserError(f"{flag} {now[name]} does not go with {path}, which was trained with "
                            f"{flag} {before.get(name)}: use another --out, or --restart")
        if name in ("tpa_steps", "tpa_lr") and (state["step"] or "after_tpa" in state["facts"]):
            setattr(args, name, before.get(name))  # that is over
        elif name not in ("out", "restart", "timeout", "compile"):
            run.say(f"{flag} is now {now[name]}, was {before.get(name)}")
