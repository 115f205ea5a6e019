"""Many runs of train.py side by side. The same command goes on where it stopped."""
import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from tqdm import tqdm

from data import open_dataset
from support.errors import UserError
from support.runs import Interruption, write_json

ROOT = Path(__file__).parents[1]
CODE = ("train.py", "model.py", "losses.py", "ema.py", "tpa.py", "data.py", "evaluate.py",
        "study/rivals.py", "sources/toy.py", "sources/tiny_clip.py")  # which decide a run's result
WORLD = {"--dataset", "--seed", "--unseen", "--out", "--restart"}  # flags that a run's seed decides
children = []  # processes that train, or have


def check(rows, args):
    """Refuse what can't be run before anything is."""
    if args.seeds < 2:
        raise UserError(f"--seeds {args.seeds}: what chance does takes two or more to tell")
    pictures = args.dataset.startswith("folder:")
    if not pictures and args.dataset != "toy":
        raise UserError(f"--dataset {args.dataset}: {args.verb} takes toy or folder:PATH")
    if pictures != bool(args.unseen):
        raise UserError('--dataset folder:PATH and --unseen "NAME, NAME", what to hold out of '
                        "segmentation training, go together")
    for unseen in args.unseen or ():
        open_dataset(args.dataset, None, "train", unseen=unseen)
        if args.seeds % len(args.unseen):
            raise UserError(f"--seeds {args.seeds} is no multiple of the {len(args.unseen)} lists "
                            "of --unseen")
    varied = {word for flags in rows.values() for word in flags.split() if word.startswith("--")}
    for word in args.further:
        if word.partition("=")[0] in WORLD | varied:
            raise UserError(f"{word} can't be given for all runs: it is what {args.verb} varies")


def variant(flags, seed, args):
    """(flags of train.py, of which the last holds of two equal ones; folder of the run)."""
    world, kind = ["--dataset", f"toy:{seed}"], [*args.further, flags]
    if args.dataset != "toy":
        unseen = args.unseen[(seed - args.first_seed) % len(args.unseen)]
        world = ["--dataset", args.dataset, "--clip", "tiny", "--pretrained", "crops",
                 "--unseen", unseen]
        kind.append(args.dataset)
    rest = ["--seed", str(seed), "--eval-every", "0", "--save-every", "0"]
    name = re.sub(r"[^\w.]+", "-", " ".join(kind)).strip("-")
    flags = [*world, *rest, *args.further, *shlex.split(flags)]
    return flags, Path(args.out, "runs", name, f"seed-{seed}")


def code():
    """A fingerprint of what is in CODE."""
    return hashlib.sha256(b"".join((ROOT / name).read_bytes() for name in CODE)).hexdigest()[:12]


def finished(flags, out):
    """The results.json of a run that has ended and had these flags, or None."""
    try:
        results = json.loads((out / "results.json").read_text())
        return results if results["made_by"]["flags"] == flags else None
    except (OSError, ValueError, KeyError):
        return None


def run(flags, out):
    """Train once, in a process of its own. Returns its results, or a sentence on why not."""
    out.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(ROOT / "train.py"), *flags, "--out", str(out), "--restart"]
    begin, log = time.time(), out / "output.txt"
    with log.open("w") as output:
        child = subprocess.Popen(command, stdout=output, stderr=output)
    children.append(child)
    if child.wait():
        last = (log.read_text(errors="replace").strip() or "no output").splitlines()[-1]
        return f"exit status {child.returncode}, {log} ends with: {last[:300]}"
    results = json.loads((out / "results.json").read_text())
    minutes = (time.time() - begin) / 60
    results["made_by"] = {"flags": flags, "code": code(), "minutes": minutes}
    write_json(results, out / "results.json")
    (out / "last.pt").unlink(missing_ok=True)  # 40 MB that nothing needs
    return results


def run_all(rows, args):
    """Every row {name: flags} with every seed, on a CPU with one thread each. Runs that have ended
    are read. Returns {name: {seed: results}}; raises UserError in the end when some failed."""
    check(rows, args)
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    # all seeds of the first row come first: they pre-train the CLIPs that the others find
    jobs = {(row, seed): variant(rows[row], seed, args) for row in rows for seed in seeds}
    found = {job: finished(*jobs[job]) for job in jobs}
    todo = [job for job in jobs if found[job] is None]
    if {results["made_by"]["code"] for results in found.values() if results} - {code()}:
        print(f"note: some of the runs found in {args.out} were made by another version of the "
              "code; another --out runs them anew")
    jobs_at_once = args.jobs or (1 if torch.cuda.is_available() else os.cpu_count())
    if not torch.cuda.is_available():
        os.environ["OMP_NUM_THREADS"] = "1"
    Interruption(at_once=True)
    with ThreadPoolExecutor(jobs_at_once) as pool:
        try:
            made = pool.map(lambda job: run(*jobs[job]), todo)
            for result, job in zip(tqdm(made, args.verb, len(todo), unit="run"), todo):
                found[job] = result
                if isinstance(result, str):
                    tqdm.write(result)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for child in children:
                child.terminate()
            raise
    failed = [result for result in found.values() if isinstance(result, str)]
    if failed:
        raise UserError(f"{len(failed)} of {len(jobs)} runs failed; the same command tries them "
                        f"again. The first: {failed[0]}")
    return {row: {seed: found[row, seed] for seed in seeds} for row in rows}
