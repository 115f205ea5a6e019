"""Starting processes, signals, the exit on errors, and the lock of a run's folder."""
import contextlib
import ctypes
import errno
import os
import re
import signal
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from tqdm import tqdm

from support.files import UserError

TIMEOUT = timedelta(minutes=30)  # how long a process waits for the others
# Ctrl-C; schedulers; SLURM's --signal=USR1@90; a closed terminal
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP")
           if hasattr(signal, name)]
stop_asked = False  # by a signal during training


@contextlib.contextmanager
def door():
    """Context manager for a main function. On a UserError, too little memory, a killed data loader
    or the loss of another process, print one sentence and exit with status 1; on a signal, exit
    with 130. Any other exception is a bug and keeps its traceback."""
    sys.stdout, sys.stderr = Stream(sys.stdout), Stream(sys.stderr)
    answer_signals(signal.default_int_handler)  # raises KeyboardInterrupt
    status = 1
    try:
        yield
        if dist.is_initialized():
            dist.destroy_process_group()
        return
    except UserError as e:
        message = f"error: {e}"
    except KeyboardInterrupt:
        status, message = 130, "stopped"
    except (MemoryError, RuntimeError) as e:
        first_line = str(e).strip().partition("\n")[0]
        if isinstance(e, MemoryError) or re.search("out of memory|allocate memory", first_line):
            message = (f"error: too little memory ({first_line}); in training, --accumulate 2 "
                       "halves the images in a forward pass")
        elif first_line.startswith("DataLoader worker"):  # it was killed
            message = f"error: {first_line} Is there enough memory? Try --workers 0"
        elif dist.is_initialized() and re.search("gloo|nccl", str(e), re.IGNORECASE):
            message = (f"error: rank {dist.get_rank()} lost contact with another process "
                       f"({first_line}); that process says why, unless it hangs or was killed")
        else:
            raise
    print(message, file=sys.stderr, flush=True)
    if dist.is_initialized():
        os._exit(status)  # at once: threads of collectives would wait for the other processes
    sys.exit(status)


class Stream:
    """stdout or stderr. When it breaks (its reader has ended, its terminal was closed), it becomes
    /dev/null and the run goes on; characters that it cannot show are escaped."""

    def __init__(self, stream):
        self.stream = stream or open(os.devnull, "w")  # None where it was closed at the start
        if hasattr(self.stream, "reconfigure"):  # not in a notebook
            self.stream.reconfigure(errors="backslashreplace")

    def write(self, text):
        try:
            self.stream.write(text)
            self.stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())

    def __getattr__(self, name):
        return getattr(self.stream, name)


def answer_signals(handler):
    """Install a handler for SIGNALS, except those that are ignored (by nohup or a shell's &)."""
    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)


def ask_to_stop(number, frame):
    """Answers a signal during training: the loop finishes its step, saves and ends."""
    global stop_asked
    stop_asked = True


def anyone_asked_to_stop():
    """True if any process was asked to stop. Called after every step by all processes."""
    answer = torch.tensor(int(stop_asked))
    if dist.is_initialized():
        dist.all_reduce(answer, op=dist.ReduceOp.MAX)
    return bool(answer)


def leave_group(worker_id):
    """worker_init_fn: take a data-loader worker out of the process group that Ctrl-C and torchrun
    signal. The training process handles the signal and stops its workers itself."""
    os.setpgrp()


def torchrun():
    """(rank, world size, local rank) from torchrun's environment variables, else (0, 1, 0)."""
    needed = {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    if not needed <= os.environ.keys() or os.environ["WORLD_SIZE"] == "1":
        return 0, 1, 0
    return tuple(int(os.environ.get(name, 0)) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))


def start_processes():
    """Join torchrun's process group, if any; set TF32 on GPUs. Returns (rank, world size, device).
    Collectives use gloo on CPU tensors and NCCL on GPU tensors. Raises UserError."""
    rank, world, local = torchrun()
    device, backend = torch.device("cpu"), "gloo"
    if torch.cuda.is_available():
        if local >= torch.cuda.device_count():
            raise UserError(f"there is no GPU for process {local} of this machine, which has "
                            f"{torch.cuda.device_count()}: start one process per GPU")
        device, backend = torch.device("cuda", local), "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32, as cuDNN's convolutions by default
    else:
        with contextlib.suppress(OSError, AttributeError):  # another C library than glibc
            mallopt = ctypes.CDLL("libc.so.6").mallopt
            # keep the memory of large tensors: faulting it in anew can take half of a step's time
            mallopt(-4, 0)  # M_MMAP_MAX
            mallopt(-1, -1)  # M_TRIM_THRESHOLD
    if world > 1:
        dist.init_process_group(backend, timeout=TIMEOUT,
                                device_id=device if device.type == "cuda" else None)
    return rank, world, device


def is_first():
    return not dist.is_initialized() or dist.get_rank() == 0


def say(text):
    """Print on process 0."""
    if is_first():
        tqdm.write(text)


def agree(values):
    """Raise UserError unless `values`, {name: value}, are equal on all processes. A collective."""
    if dist.is_initialized():
        everyone = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, values)
        for rank, others in enumerate(everyone):
            for name, value in values.items():
                if others[name] != value:
                    raise UserError(f"{name} differs between process {dist.get_rank()} and process "
                                    f"{rank}: {value} and {others[name]}")


def lock_folder(out):
    """Make the folder `out` and keep other runs out of it until this process, the first of its
    group, has ended, however that happens. Raises UserError."""
    if torchrun()[0] > 0:
        return
    try:
        import fcntl  # not on Windows
        out.mkdir(parents=True, exist_ok=True)
        lock = os.open(out / ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not flock, which loaders inherit
    except BlockingIOError:
        raise UserError(f"--out {out} is in use by another run: use another, or wait") from None
    except (ImportError, OSError) as e:
        if getattr(e, "errno", None) not in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP):
            raise UserError(f"--out {out} can't be written to, or locked ({e})") from e
        say(f"note: {out} is on a file system without locks ({e}): start no second run in it")
    for leftover in out.glob("." + 16 * "[0-9a-f]" + ".partial"):  # `replacing` was killed
        leftover.unlink()
