"""Keeping a run alive: its processes, its checkpoints and log, and how it ends when something goes wrong."""
import contextlib
import json
import os
import re
import resource
import shutil
import signal
import sys
from datetime import timedelta

import torch
import torch.distributed as dist

control = None     # process group for small messages between CPUs, whatever the devices
roll_call = None   # another one, which says who is missing when a collective has failed


def start_processes(minutes):
    """Join torchrun's process group, if there is one. Returns (rank, number of processes, device).

    minutes: how long a process waits for the others before it gives up.
    """
    global control, roll_call
    rank, world, local = (int(os.environ.get(name, n)) for name, n in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world > 1:
        timeout = timedelta(minutes=minutes)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timeout)
        control, roll_call = (dist.new_group(backend="gloo", timeout=timeout) for _ in range(2))
    return rank, world, device


@contextlib.contextmanager
def one_sentence_for_errors():
    """What is wrong with the input, the disk or another process ends this process with a sentence instead of a traceback
    (which RPMD_TRACEBACK=1 in the environment brings back)."""
    try:
        yield
        if dist.is_initialized():
            dist.destroy_process_group()
    except (ValueError, OSError) as e:
        if os.environ.get("RPMD_TRACEBACK"):
            raise
        text = str(e).strip() or type(e).__name__
        if text.startswith("Caught "):                                              # in a loader process: its traceback
            text = text.splitlines()[-1].removeprefix("data.DataError: ")
        leave(f"error: {text}")
    except RuntimeError as e:
        if control is None or not re.search("gloo|nccl", str(e), re.IGNORECASE):
            raise
        leave(f"error: rank {dist.get_rank()} lost contact with {who_is_missing()}")
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)


def leave(sentence):
    """End with exit status 1. With others around, at once: their collectives would keep this process's threads waiting."""
    if control is None:
        sys.exit(sentence)
    print(sentence, file=sys.stderr, flush=True)
    os._exit(1)


def who_is_missing():
    """After a collective failed: which process hangs, found out by those that do not."""
    try:
        dist.monitored_barrier(roll_call, timedelta(seconds=5), wait_all_ranks=True)
        hanging = None
    except RuntimeError as e:
        hanging = re.search(r"Ranks? ([\d, ]+) failed", str(e))
    return f"rank {hanging[1]}, which hangs" if hanging else "another, which has ended: see its error, or torchrun's summary"


class Interruption:
    """Ctrl-C and SIGTERM ask for a stop after the running step; where nothing is lost (at_once), or at a second Ctrl-C, they
    raise KeyboardInterrupt."""

    def __init__(self, at_once=False):
        self.asked, self.at_once = False, at_once
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.ask)

    def ask(self, number, frame):
        if self.at_once or self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True


@contextlib.contextmanager
def writing(path):
    """Gives the path; what goes wrong while it is written becomes an OSError that names it."""
    try:
        yield path
    except (OSError, RuntimeError) as e:                                                   # torch.save raises either
        raise OSError(f"{path} can't be written ({e}); the last good checkpoint stays as it is") from e


def write_checkpoint(contents, path):
    """Write a checkpoint whole or not at all: under another name, down to the disk, then renamed. Raises OSError."""
    temporary = path.with_suffix(".tmp")
    try:
        with writing(path), temporary.open("wb") as file:
            torch.save(contents, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def loading(path):
    """What goes wrong while a checkpoint's content is taken over becomes a ValueError that names the file."""
    try:
        yield
    except Exception as e:                                                          # it may be a stranger's, or damaged
        sentence = ((str(e) if isinstance(e, ValueError) else f"{type(e).__name__}: {e}").splitlines() or [""])[0][:300]
        raise ValueError(sentence if str(path) in sentence else f"training can't go on from {path} ({sentence})") from e


class Log:
    """A file of JSON lines that begins anew with these. Raises OSError."""

    def __init__(self, path, lines):
        self.path, temporary = path, path.with_suffix(".tmp")
        with writing(path), temporary.open("w") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
        temporary.replace(path)                                                            # never without the old lines

    def append(self, **line):
        with writing(self.path), self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")


def read_log(path):
    """The lines of a log.jsonl; one that a power cut left unfinished is dropped."""
    lines = []
    for line in path.read_text().splitlines() if path.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):
            lines.append(json.loads(line))
    return lines


def check_folder(out, needed):
    """Make the folder of a run. Raises ValueError if it can't be written to, or has no room for `needed` bytes."""
    out.mkdir(parents=True, exist_ok=True)
    if not os.access(out, os.W_OK):
        raise ValueError(f"--out {out} can't be written to")
    if shutil.disk_usage(out).free < needed:
        raise ValueError(f"--out {out} has {shutil.disk_usage(out).free / 1e9:.1f} GB left, and needs {needed / 1e9:.1f}")


def check_flags(args, state, fixed, names, path, say):
    """Refuse to go on from a checkpoint under another model or data order; list the flags that changed otherwise.

    args: the flags now. state: the checkpoint. fixed: the flags that may not change. names: the classes of the training data.
    """
    if not {"args", "step", "optimiser", "facts", "names"} <= state.keys():
        raise ValueError(f"{path} is no checkpoint that training can go on from: use another --out, or --restart")
    if state["names"] != names:
        raise ValueError(f"{path} was trained with other classes ({len(state['names'])}, such as {state['names'][0]!r}) than "
                         f"--dataset {args.dataset} has now ({len(names)}): use another --out, or --restart")
    changed = [(name, state["args"].get(name), now) for name, now in vars(args).items() if state["args"].get(name) != now]
    for name, before, now in sorted(changed, key=lambda c: c[0] not in fixed):
        flag = "--" + name.replace("_", "-")
        if name in fixed:
            raise ValueError(f"{flag} {now} does not go with {path}, which was trained with {flag} {before}: "
                             f"use another --out, or --restart")
        if name not in ("out", "restart", "timeout", "tpa_steps", "tpa_lr"):
            say(f"{flag} is now {now}, was {before}")


def check_agreement(value, what):
    """Raises ValueError when the processes do not all have the same value."""
    if control is not None:
        values = [None] * dist.get_world_size()
        dist.all_gather_object(values, value, group=control)
        if len(set(values)) > 1:
            raise ValueError(f"{what} differs between processes: {sorted(set(values), key=str)}")


def anyone(asks):
    """Whether any process asks. Once a step, it is also where a process that hangs is missed."""
    if control is None:
        return asks
    answer = torch.tensor(int(asks))
    dist.all_reduce(answer, op=dist.ReduceOp.MAX, group=control)
    return bool(answer)


def peak_memory(device):
    """The most memory this process has held so far, in GB: of the GPU's, or resident."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated() / 1e9, 2)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e9 if sys.platform == "darwin" else 1e6), 2)
