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
from support import runs
from support.errors import UserError

ROOT = Path(__file__).parents[1]
WATCHING = ("pictures", "tables", "labelling", "check", "compare", "many", "shift", "__main__")
WORLD = {"--dataset", "--seed", "--unseen", "--out", "--restart"}  # flags that a run's seed decides
children = []  # processes that train, or have


def check(rows, args):
    """Refuse what can't be run before anything is."""
    lists = args.unseen or []
    fits = args.dataset.startswith("folder:") if lists else args.dataset == "toy"
    if not fits:
        raise UserError(f"--dataset {args.dataset}: {args.verb} takes toy, or folder:PATH and "
                        '--unseen "NAME, NAME", what to hold out of segmentation training, together')
    if args.seeds < 2:
        raise UserError(f"--seeds {args.seeds}: what chance does takes two or more to tell")
    if args.seeds % max(1, len(lists)):
        raise UserError(f"--seeds {args.seeds} is no multiple of the {len(lists)} lists of --unseen")
    for unseen in lists:
        open_dataset(args.dataset, None, "train", unseen=unseen)
    varied = WORLD.union(" ".join(rows.values()).split())
    for word in args.further:
        if word.startswith("--") and word.partition("=")[0] in varied:
            raise UserError(f"{word} can't be given for all runs: it is what {args.verb} varies")


def variant(flags, seed, args):
    """(flags of train.py, of which the last holds of two equal ones; folder of the run)."""
    world, kind = ["--dataset", f"toy:{seed}"], [*args.further, flags]
    if args.unseen:
        unseen = args.unseen[(seed - args.first_seed) % len(args.unseen)]
        world = ["--dataset", args.dataset, "--clip", "tiny", "--pretrained", "crops",
                 "--unseen", unseen]
        kind.append(args.dataset)
    rest = ["--seed", str(seed), "--eval-every", "0", "--save-every", "0"]
    name = re.sub(r"[^\w.]+", "-", " ".join(kind)).strip("-")
    flags = [*world, *rest, *args.further, *shlex.split(flags)]
    return flags, Path(args.out, "runs", name, f"seed-{seed}")


def code():
    """A fingerprint of all files but tests and those WATCHING, which decide nothing of a run."""
    files = [path for folder in ("", "sources", "study", "support")
             for path in sorted(Path(ROOT, folder).glob("*.py")) if path.stem not in WATCHING]
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:12]


def finished(flags, out):
    """The results.json of a run that has ended and had these flags, or None."""
    try:
        results = json.loads((out / "results.json").read_text())
        return results if results["made_by"]["flags"] == flags else None
    except (OSError, ValueError, KeyError):
        return None


def run(flags, out):
    """Train once, in a process of its own. Returns its results, or a sentence on why not."""
    made_by, begin, log = {"flags": flags, "code": code()}, time.time(), out / "output.txt"
    out.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(ROOT / "train.py"), *flags, "--out", str(out), "--restart"]
    with log.open("w") as output:
        child = subprocess.Popen(command, stdout=output, stderr=output)
    children.append(child)
    if child.wait():
        last = (log.read_text(errors="replace").strip() or "no output").splitlines()[-1]
        return f"exit status {child.returncode}, {log} ends with: {last[:300]}"
    made_by["minutes"] = (time.time() - begin) / 60
    (out / "last.pt").unlink(missing_ok=True)  # 40 MB that nothing needs
    results = json.loads((out / "results.json").read_text())
    runs.write_json({**results, "made_by": made_by}, out / "results.json")
    return finished(flags, out)


def run_all(rows, args):
    """Every row {name: flags} with every seed, on a CPU with one thread each. Runs that have ended
    are read. Returns {name: {seed: results}}; raises UserError in the end when some failed."""
    check(rows, args)
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    # all seeds of the first row come first: they pre-train the CLIPs that the others find
    jobs = {(row, seed): variant(rows[row], seed, args) for row in rows for seed in seeds}
    side_by_side = args.jobs or 1
    if not torch.cuda.is_available():
        side_by_side = args.jobs or os.cpu_count()
        os.environ["OMP_NUM_THREADS"] = "1"
    runs.Interruption(at_once=True)
    with ThreadPoolExecutor(side_by_side) as pool:
        try:
            found = pool.map(lambda job: finished(*job) or run(*job), jobs.values())
            found = dict(zip(jobs, tqdm(found, args.verb, len(jobs), unit="run")))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            for child in children:
                child.terminate()
    failed = [result for result in found.values() if isinstance(result, str)]
    if failed:
        raise UserError(f"{len(failed)} of {len(jobs)} runs failed; the same command tries them "
                        f"again. The first: {failed[0]}")
    if {results["made_by"]["code"] for results in found.values()} != {code()}:
        print(f"note: some of the runs in {args.out} were made by another version of the code; "
              "another --out runs them anew")
    return {row: {seed: found[row, seed] for seed in seeds} for row in rows}
