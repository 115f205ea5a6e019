"""Keeping a run alive: its processes, its folder, checkpoints and log, and how it ends when
something goes wrong."""
import contextlib
import ctypes
import fcntl
import json
import math
import os
import re
import resource
import shlex
import shutil
import socket
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from support import signals
from support.errors import UserError, replacing, writing
from support.signals import Interruption  # noqa: F401, offered here

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h
control = None  # process group for small messages between CPUs, whatever the devices
roll_call = None  # another one, which says who is missing when a collective has failed


def keep_memory():
    """Have glibc keep what large tensors free instead of faulting it in anew at every step. Nothing
    where there is no glibc, or LD_PRELOAD brings an allocator."""
    with contextlib.suppress(OSError, AttributeError):
        if not os.environ.get("LD_PRELOAD"):
            mallopt = ctypes.CDLL("libc.so.6").mallopt
            for option, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1)):
                mallopt(option, value)


def start_processes(minutes):
    """Join torchrun's process group, if there is one, in which a process waits for the others for
    so many minutes. Returns (rank, number of processes, device)."""
    global control, roll_call
    keep_memory()
    rank, world, local = (int(os.environ.get(name, default)) for name, default in
                          (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32, as cuDNN's convolutions by default
    if world > 1:
        timeout = timedelta(minutes=minutes)
        dist.init_process_group("gloo" if device.type == "cpu" else "nccl", timeout=timeout)
        control = dist.new_group(backend="gloo", timeout=timeout)
        roll_call = dist.new_group(backend="gloo", timeout=timeout)
    return rank, world, device


def anyone(asks):
    """Whether any process asks. Once a step, it is also where a process that hangs is missed."""
    if control is None:
        return asks
    answer = torch.tensor(int(asks))
    dist.all_reduce(answer, op=dist.ReduceOp.MAX, group=control)
    return bool(answer)


def agree_on(value, what):
    """Raises UserError when the processes do not all have the same value."""
    if control is not None:
        values = [None] * dist.get_world_size()
        dist.all_gather_object(values, value, group=control)
        if len(set(values)) > 1:
            raise UserError(f"{what} differs between processes: {sorted(set(values), key=str)}")


def compile_forward(*modules):
    """Have the forward pass of modules compiled when it first runs. Raises UserError where there is
    no compiler to call."""
    compiler = shlex.split(os.environ.get("CXX", "c++"))[0]
    if not shutil.which(compiler):
        raise UserError(f"--compile needs a C++ compiler, and there is no {compiler}")
    for module in modules:
        module.compile()


def leave_process_group(worker):
    """For loader processes: signals to the whole process group (Ctrl-C, torchrun's SIGTERM) are the
    training process's to answer; its loaders end when it ends them."""
    os.setpgrp()


def autocast(device, precision):
    """Mixed precision on a device; fp32 means none (on GPUs, products in TF32)."""
    dtype = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    return torch.autocast(device.type, dtype, enabled=dtype is not None)


def refuse_non_finite(run, figures, grad_norm, paths):
    """Under fp16 an infinite gradient is the scaler's to skip; an infinite loss is nobody's."""
    sums = torch.stack(list(figures.values()))
    if sums.isfinite().all() and (math.isfinite(grad_norm) or run.scaler.is_enabled()):
        return
    terms = [name for name, n in zip(figures, sums.tolist())
             if not math.isfinite(n) and name != "total_loss"]
    what = " and ".join(terms) or "the gradient, not the losses of this process,"
    raise UserError(f"step {run.step}: {what} became NaN or infinite; images {', '.join(paths)}; "
                    f"nothing was written after {run.last}")


def peak_memory(device):
    """The most memory this process has held so far, in GB: of the GPU's, or resident."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated() / 1e9, 2)
    unit = 1e9 if sys.platform == "darwin" else 1e6  # bytes there, kilobytes elsewhere
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit, 2)


@contextlib.contextmanager
def one_sentence_for_errors():
    """A UserError ends this process with its sentence instead of a traceback (RPMD_TRACEBACK=1 in
    the environment brings it back), and so does losing contact with another process. Any other
    exception keeps its traceback."""
    sys.stdout.reconfigure(errors="backslashreplace")  # names of files may hold any byte
    try:
        yield
        signals.ignore()
        if dist.is_initialized():
            dist.destroy_process_group()
    except UserError as e:
        if os.environ.get("RPMD_TRACEBACK"):
            raise
        text = str(e).strip()
        if text.startswith("Caught "):  # in a loader process, whose traceback comes before it
            text = text.splitlines()[-1].partition(": ")[2]
        leave(f"error: {text}")
    except RuntimeError as e:
        if control is None or not re.search("gloo|nccl", str(e), re.IGNORECASE):
            raise
        leave(f"error: rank {dist.get_rank()} lost contact with {who_is_missing()}")
    except KeyboardInterrupt:
        signals.ignore()
        print("stopped", file=sys.stderr)
        sys.exit(130)


def leave(sentence):
    """End with exit status 1 and this as the last line. With others around, at once: their
    collectives would keep this process's threads waiting. torchrun repeats its error file."""
    for bar in list(getattr(tqdm, "_instances", ())):
        bar.close()
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if error_file:
        about = {"message": sentence, "timestamp": int(time.time())}
        Path(error_file).write_text(json.dumps(about))
    if control is None:
        sys.exit(sentence)
    sys.stdout.flush()
    print(sentence, file=sys.stderr, flush=True)
    os._exit(1)


def who_is_missing():
    """After a collective failed: which process hangs, found out by those that do not."""
    try:
        dist.monitored_barrier(roll_call, timedelta(seconds=5), wait_all_ranks=True)
    except RuntimeError as e:
        hanging = re.search(r"Ranks? ([\d, ]+) failed", str(e))
        if hanging:
            return f"rank {hanging[1]}, which hangs"
    return ("another, which has ended: see its error, or torchrun's summary; where memory ran out, "
            "--accumulate 2 and --recompute-head need less")


def due(n, step):
    """Whether step is a multiple of n and not 0; never when n is 0."""
    return n > 0 and step > 0 and step % n == 0


@contextlib.contextmanager
def only_run_in(out):
    """Make the folder of a run and keep other runs out of it. The operating system's lock ends with
    its holder, process 0, however that ends. Raises UserError, which names the holder."""
    if int(os.environ.get("RANK", 0)) > 0:
        yield
        return
    with writing(f"--out {out}"):
        out.mkdir(parents=True, exist_ok=True)
        lock = open(out / ".lock", "a+")
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not flock, which loaders inherit
    except BlockingIOError:
        lock.seek(0)
        holder = lock.read().strip() or "another process"
        raise UserError(f"--out {out} is in use by {holder}: use another --out, or wait") from None
    lock.truncate(0)
    print(f"process {os.getpid()} on {socket.gethostname()}", file=lock, flush=True)
    for leftover in out.glob("*.tmp"):  # of a process that was killed
        leftover.unlink()
    with lock:
        yield


class Log:
    """A file of JSON lines, which process 0 writes and all remember. Raises UserError."""

    def __init__(self, path, rank):
        self.path = path
        self.rank = rank
        self.lines = []

    def begin(self, lines):
        """Begin the file anew with these lines; it is never without the old ones."""
        self.lines = list(lines)
        if self.rank == 0:
            with replacing(self.path) as file:
                file.writelines(f"{json.dumps(line)}\n".encode() for line in lines)

    def append(self, **line):
        self.lines.append(line)
        if self.rank == 0:
            with writing(self.path), self.path.open("a") as file:
                file.write(json.dumps(line) + "\n")


def read_log(path):
    """The lines of a log.jsonl; one that a power cut left unfinished is dropped."""
    lines = []
    with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):
        for line in path.read_text(errors="replace").splitlines():
            lines.append(json.loads(line))
    return lines


def write_json(contents, path):
    """Write a file, its folder if need be. Returns the path. Raises UserError."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(contents, indent=1))
    return path
