"""A process that has imported the project once, and forks for each command that a test runs: that
saves the seconds which the imports take, and nothing else is shared. conftest.run talks to it.

A line of JSON on standard input, {"argv", "env", "cwd", "processes",
"out", "err"}, is a command; the line
that comes back is the exit status. Several processes get torchrun's environment, and when one of
them fails the others are asked to end.
"""

import contextlib
import json
import os
import runpy
import signal
import socket
import sys
import traceback
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import study.__main__  # noqa: E402, F401
import train  # noqa: E402, F401


def become(job, environment):
    """In a child: run the script as `python SCRIPT ...` would, and leave with its status."""
    os.setpgrp()
    for target, path in ((1, job["out"]), (2, job["err"])):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), target)
    os.chdir(job["cwd"])
    os.environ.update(job["env"], **environment)
    sys.argv = job["argv"]
    status = 0
    try:
        if sys.argv[0] == "-m":
            sys.argv = sys.argv[1:]
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        else:
            sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
            runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as e:
        status = e.code if isinstance(e.code, int) else 0 if e.code is None else 1
        if isinstance(e.code, str):
            print(e.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        status = 1
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)


def serve(job):
    """Run a command. Returns its exit status, the first that is not 0 of several processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    children = set()
    for rank in range(job["processes"]):
        torchrun = {}
        if job["processes"] > 1:
            torchrun = {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "MASTER_PORT": port,
                "WORLD_SIZE": str(job["processes"]),
                "MASTER_ADDR": "127.0.0.1",
            }
        child = os.fork()
        if not child:
            become(job, torchrun)
        children.add(child)
    status = 0
    while children:
        child, ended = os.wait()
        children.discard(child)
        status = status or os.waitstatus_to_exitcode(ended)
        if status:
            for other in children:
                os.kill(other, signal.SIGTERM)
    return status


if __name__ == "__main__":
    for line in sys.stdin:
        print(serve(json.loads(line)), flush=True)
