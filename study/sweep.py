"""Tables of trainings over seeds: what a method is worth, and what chance alone does.

A table is a file study/tables/NAME.txt: a title, then a line per row, its name and, after a bar,
flags of train.py. What follows a comma in a name is the row's setting. A row is compared with the
first row of its setting. A seed is a toy world and the head's first weights."""
import hashlib
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from evaluate import format_table
from support.files import UserError, replacing

TABLES = Path(__file__).with_name("tables")
TRAIN = Path(__file__).parents[1] / "train.py"
METRICS = ("seen", "unseen", "harmonic")  # mIoU in per cent


def sweep(args):
    """Train a table's rows on the same worlds and compare them. Runs in --out are not made again,
    even if the code has changed. Further flags are train.py's; a row's own take precedence."""
    title, *lines = (TABLES / f"{args.table}.txt").read_text().splitlines()
    jobs = []
    for line in filter(None, lines):  # the first row pre-trains each world's CLIP for the others
        row, flags = line.split("|")
        for seed in range(args.first_seed, args.first_seed + args.seeds):
            words = ["--eval-every", "0", "--save-every", "0", *args.further, *flags.split(),
                     "--dataset", f"toy:{seed}", "--seed", str(seed)]
            jobs.append((row.strip(), seed, words, Path(args.out, "runs")))
    with ThreadPoolExecutor(args.jobs) as pool:  # when a run fails, `map` starts no more of them
        runs = list(tqdm(pool.map(train, *zip(*jobs)), args.table, len(jobs), unit="run"))
    trained, untrained = zip(*runs)
    report([*trained, *untrained[:args.seeds]], title, Path(args.out, args.table))


def train(row, seed, flags, folder):
    """Train in a process of its own, on one thread, unless the folder holds the results of these
    flags. Returns two lines of NAME.jsonl: the end, and the CLIP that it began with."""
    out = folder / f"{seed}-{hashlib.sha256(' '.join(flags).encode()).hexdigest()[:8]}"
    if not (out / "results.json").exists():
        done = subprocess.run([sys.executable, TRAIN, *flags, "--out", out], capture_output=True,
                              errors="replace", env=dict(os.environ, OMP_NUM_THREADS="1"))
        if done.returncode:
            last = (done.stderr.strip() or "(nothing)").splitlines()[-1]
            raise UserError(f"train.py {' '.join(flags)} failed: {last[:300]}")
        (out / "last.pt").unlink()  # 40 MB that nothing here needs
    results = json.loads((out / "results.json").read_text())
    lines = []
    for name, metrics in ((row, results["trained"]), ("zero-shot CLIP", results["start"])):
        metrics = {key: metrics[key] for key in (*METRICS, "reference_share_teacher")}
        lines.append(dict(row=name, seed=seed, **metrics, flags=flags))
    return lines


def interval(differences, resamples=20_000):
    """(mean, low, high, p) of differences [n]: 95 % bootstrap interval, two-sided sign-flip p."""
    rng = np.random.default_rng(0)
    samples = rng.choice(differences, (resamples, len(differences)))
    low, high = np.percentile(samples.mean(1), [2.5, 97.5])
    flipped = (rng.choice([-1, 1], samples.shape) * differences).mean(1)
    mean = np.mean(differences)
    as_extreme = (abs(flipped) >= abs(mean) - 1e-9).sum()
    return mean, low, high, (1 + as_extreme) / (1 + resamples)


def report(lines, title, path):
    """Print a table of runs, draw it as PATH.png and write the runs to PATH.jsonl."""
    from matplotlib.figure import Figure
    rows, firsts = {}, {}
    for line in lines:
        rows.setdefault(line["row"], []).append(line)
    figure = Figure(figsize=(12, 2 + len(rows) / 4), layout="constrained")
    axes = figure.subplots(1, len(METRICS), sharey=True)
    table = [["mIoU, %", *METRICS, "p of harmonic", "reference patches, %"]]
    for row, runs in rows.items():
        first = firsts.setdefault(row.partition(", ")[2], runs)  # with this setting
        cells = [row]
        for ax, key in zip(axes, METRICS):
            mean = np.mean([run[key] for run in runs])
            differences = [run[key] - other[key] for run, other in zip(runs, first)]
            difference, low, high, p = interval(differences)
            cells.append(f"{mean:.1f} ({difference:+.1f} [{low:+.1f}, {high:+.1f}])")
            ax.errorbar(mean, row, xerr=[[difference - low], [high - difference]], fmt="ko")
            ax.set_xlabel(f"mIoU, {key}, %")
        share = np.mean([100 * run["reference_share_teacher"] for run in runs])
        table.append([*cells, f"{p:.3f}", share])
    ax.invert_yaxis()
    first = next(iter(rows)).partition(",")[0]
    figure.suptitle(f"{title}\n(bars: 95 % interval of the difference to {first})")
    with replacing(Path(f"{path}.png")) as file:
        figure.savefig(file, format="png", dpi=110)
    with replacing(Path(f"{path}.jsonl")) as file:
        file.write("".join(json.dumps(line) + "\n" for line in lines).encode())
    print(f"{title}\n\n{format_table(table)}\n\nIn brackets: mean difference to the first row with "
          "the same setting, world by world, and its 95 % bootstrap interval. p: by sign flips.\n"
          f"written: {path}.jsonl, {path}.png")
