"""Tables of trainings: what each part of the method is worth, and what chance alone could do.

A table is a file tables/NAME.txt: a line for each row, its name and, after a bar, train.py's flags.
What follows a comma in a name is the row's setting; rows are compared with others of their setting.
Every row has the same seeds. A seed is a toy world: another split of the names, other scenes,
another CLIP, initialisation and order. On pictures seed i holds out the i-th list of --unseen.
"""
import contextlib
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

import numpy as np
import torch
from scipy import stats
from tqdm import tqdm

from data import open_dataset
from study.measures import SHIFTS, in_words, pearson
from support import pictures
from support.errors import UserError
from support.runs import Interruption, read_log, write_json
from support.tables import format_table

TABLES = {path.stem: path for path in sorted(Path(__file__).with_name("tables").glob("*.txt"))}
UNTRAINED = "untrained CLIP"
METRICS = ("seen", "unseen", "harmonic")  # mIoU in per cent
WORLD = {"--dataset", "--seed", "--unseen", "--out", "--restart"}  # flags that a run's seed decides
ROOT = Path(__file__).parents[1]
children = []  # processes that train, or have


def read_table(verb):
    """{row: flags of train.py} of a table."""
    rows = re.findall(r"^(.*)\|(.*)$", TABLES[verb].read_text(), re.MULTILINE)
    return {name.strip(): flags.strip() for name, flags in rows}


def setting(row):
    """What follows the comma in a row's name."""
    return row.partition(", ")[2]


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
    """A fingerprint of all code but tests."""
    files = [path for folder in (".", "sources", "study", "support")
             for path in sorted(Path(ROOT, folder).glob("*.py"))]
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:12]


def train(flags, out):
    """The results.json of a run: read if it has ended and had these flags, else trained, in a
    process of its own. Or a sentence on why that failed."""
    path, log = out / "results.json", out / "output.txt"
    with contextlib.suppress(OSError, ValueError, KeyError):
        results = json.loads(path.read_text())
        if results["made_by"]["flags"] == flags:
            return results
    begin, version = time.time(), code()
    command = [sys.executable, str(ROOT / "train.py"), *flags, "--out", str(out), "--restart"]
    out.mkdir(parents=True, exist_ok=True)
    with log.open("w") as output:
        child = subprocess.Popen(command, stdout=output, stderr=output)
    children.append(child)
    if child.wait():
        last = (log.read_text(errors="replace").strip() or "no output").splitlines()[-1]
        return f"exit status {child.returncode}, {log} ends with: {last[:300]}"
    for checkpoint in out.rglob("last.pt"):
        checkpoint.unlink()  # 40 MB that nothing needs
    made_by = {"flags": flags, "code": version, "minutes": (time.time() - begin) / 60}
    results = {**json.loads(path.read_text()), "made_by": made_by}
    write_json(results, path)
    return results


def train_all(jobs, args):
    """`train` for (flags, folder) of many runs, some side by side, on a CPU with one thread each.
    Raises UserError in the end when some failed."""
    on_cpu = not torch.cuda.is_available()
    if on_cpu:
        os.environ["OMP_NUM_THREADS"] = "1"
    Interruption(at_once=True)
    with ThreadPoolExecutor(args.jobs or (os.cpu_count() if on_cpu else 1)) as pool:
        try:
            results = pool.map(train, *zip(*jobs))
            results = list(tqdm(results, args.verb, len(jobs), unit="run"))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            for child in children:
                child.terminate()
    failed = [result for result in results if isinstance(result, str)]
    if failed:
        raise UserError(f"{len(failed)} of {len(jobs)} runs failed; the same command tries them "
                        f"again. The first: {failed[0]}")
    if {result["made_by"]["code"] for result in results} != {code()}:
        print(f"note: some of the runs in {args.out} were made by another version of the code; "
              "another --out runs them anew")
    return results


def figures(results, untrained=False):
    """A run, of its results.json; untrained: of the CLIP that it started from."""
    scores, end, shift = results["trained"], results["end"], results["shift"]
    if untrained:
        scores, end = results["zero_shot"], {**results["before_tpa"], "reference_drift": 0.0}
        shift = dict.fromkeys(SHIFTS, 0.0)
    return {**{key: scores[key] for key in METRICS},
            "share_before": results["before_tpa"]["reference_share"],
            "share_after": end["reference_share"], "drift": end["reference_drift"],
            **{key: shift[key] for key in SHIFTS}, **results["made_by"]}


def interval(numbers):
    """Of two numbers or more: mean, its 95 % interval and p against 0 by Student's t, standard
    deviation, how many are above 0, and the numbers."""
    numbers = np.array(numbers, float)
    n, mean, sd = len(numbers), numbers.mean(), numbers.std(ddof=1)
    error = sd / np.sqrt(n)
    half = stats.t.ppf(0.975, n - 1) * error
    p = 2 * stats.t.sf(abs(mean) / error, n - 1) if error else float(mean == 0)
    return {"mean": mean, "low": mean - half, "high": mean + half, "p": p, "sd": sd,
            "above": (numbers > 0).sum(), "n": n, "each": numbers}


def holm(p):
    """Holm's correction of p values for their number."""
    p = np.array(p, float)
    times = p * (p >= p[:, None]).sum(1)  # by how many are as large or larger
    return [min(1.0, times[p <= one].max()) for one in p]


def summarise(name, runs, base=None):
    """A summary of a row's runs {seed: run}, paired by seed with those of the row base."""
    summary = {"row": name, "seeds": runs}
    for seed, run in runs.items():
        if run["harmonic"] is None:
            raise UserError(f"{name}, seed {seed}: none of the seen, or none of the unseen names "
                            "has ground truth to be scored on")
    for key in (*METRICS, "share_before", "share_after", "drift", *SHIFTS):
        summary[key] = interval([run[key] for run in runs.values()])
    if base and base is not runs:
        summary["against"] = {
            key: interval([run[key] - base[seed][key] for seed, run in runs.items()])
            for key in METRICS}
    return summary


def check_arguments(args, rows):
    """Refuses, before anything is run, what can't be."""
    fits = args.dataset.startswith("folder:") if args.unseen else args.dataset == "toy"
    if not fits:
        raise UserError(f"--dataset {args.dataset}: {args.verb} takes toy, or folder:PATH and "
                        '--unseen "NAME, NAME", what to hold out of training, together')
    if args.seeds < 2:
        raise UserError(f"--seeds {args.seeds}: what chance does takes two or more to tell")
    for unseen in args.unseen or ():
        open_dataset(args.dataset, None, "train", unseen=unseen)
        if args.seeds % len(args.unseen):
            raise UserError(f"--seeds {args.seeds} is no multiple of the {len(args.unseen)} lists "
                            "of --unseen")
    varied = WORLD.union(" ".join(rows.values()).split())
    for word in args.further:
        if word.startswith("--") and word.partition("=")[0] in varied:
            raise UserError(f"{word} can't be given for all runs: it is what {args.verb} varies")


def bases(rows, against):
    """{setting: the row that others of this setting are compared with}: the first of those that
    `against` names."""
    return {setting(row): row for row in reversed(matching([against], rows, "--against"))}


def matching(words, rows, flag):
    """The rows that words name: those with the word for a method, or else in their name."""
    found = set()
    for word in words:
        named = {row for row in rows if word in (row, row.partition(", ")[0])}
        named = named or {row for row in rows if word.casefold() in row.casefold()}
        if not named:
            raise UserError(f"{flag} {word}: no row has that in its name; they are "
                            f"{'; '.join(rows)}")
        found |= named
    return [row for row in rows if row in found]


def compare(args, rows, base):
    """Train rows {name: flags} with every seed. Returns their summaries, paired with the row that
    base has for their setting, after that of the untrained CLIP."""
    check_arguments(args, rows)
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    # all seeds of the first row come first: they pre-train the CLIPs that the others find
    jobs = {(row, seed): variant(rows[row], seed, args) for row in rows for seed in seeds}
    results = dict(zip(jobs, train_all(jobs.values(), args)))
    first = next(iter(rows))
    found = {UNTRAINED: {seed: figures(results[first, seed], untrained=True) for seed in seeds}}
    for row in rows:
        found[row] = {seed: figures(results[row, seed]) for seed in seeds}
        for seed, run in found[row].items():
            log = read_log(jobs[row, seed][1] / "log.jsonl")
            run["evaluations"] = [[line["step"], line["unseen"], line["reference_share"]]
                                  for line in log if "mIoU_union" in line]
    return [summarise(row, runs, found.get(base.get(setting(row)))) for row, runs in found.items()]


def correlations(summaries):
    """Of each shift with unseen mIoU over all runs, {shift: Pearson's r or None}; and within seeds:
    after a seed's mean over rows is taken from both, since some worlds are easier than others."""
    found = {key: [s[key]["each"] for s in summaries] for key in ("unseen", *SHIFTS)}
    return [{key: pearson(found[key], found["unseen"], within_seeds) for key in SHIFTS}
            for within_seeds in (False, True)]


def describe_correlations(summaries, where=""):
    count = sum(len(s["seeds"]) for s in summaries)
    found, within_seeds = map(in_words, correlations(summaries))
    return (f"Pearson correlation with unseen mIoU over {count} runs{where}: {found}; "
            f"within seeds: {within_seeds}.")


def markdown(summaries):
    rows = [["", *METRICS, *(f"difference, {key}" for key in METRICS), "p of harmonic, Holm",
             "unseen better in", "reference share", "drift"]]
    claims = [s for s in summaries if "against" in s and s["row"] != UNTRAINED]
    p = holm([s["against"]["harmonic"]["p"] for s in claims])
    corrected = {s["row"]: f"{one:.3f}" for s, one in zip(claims, p)}
    for s in summaries:
        cells = [s["row"], *("{mean:.1f} ± {sd:.1f}".format(**s[key]) for key in METRICS)]
        pairs = [""] * 5
        if "against" in s:
            pairs = ["{mean:+.1f} [{low:+.1f}, {high:+.1f}]".format(**interval)
                     for interval in s["against"].values()]
            better = "{above} of {n}".format(**s["against"]["unseen"])
            pairs += [corrected.get(s["row"], ""), better]
        share = f"{s['share_before']['mean']:.2f} → {s['share_after']['mean']:.2f}"
        rows.append([*cells, *pairs, share, f"{s['drift']['mean']:.3f}"])
    return format_table(rows)


def tabulate(args):
    """Train the rows of a table and write NAME.md, printed too; NAME.jsonl, a run a line; NAME.png:
    seen against unseen; and of rows with an --eval-every, over their steps, NAME-steps.png."""
    rows = read_table(args.verb)
    base = bases(rows, args.against)
    if args.rows:
        wanted = matching(args.rows, rows, "--rows")
        wanted += [base.get(setting(row)) for row in wanted]
        rows = {row: flags for row, flags in rows.items() if row in wanted}
    shown = {row.partition(", ")[0] for row in base.values() if row in rows} or {"nothing"}
    summaries = compare(args, rows, base)
    trained = [s for s in summaries[1:] if "--adapt none" not in rows[s["row"]]]
    text = [markdown(summaries), "", describe_correlations(trained)]
    for one in dict.fromkeys(setting(s["row"]) for s in trained):
        some = [s for s in trained if setting(s["row"]) == one]
        if one and len(some) > 1:
            text.append(describe_correlations(some, f" at {one}"))
    text += [
        "", "mIoU in per cent, mean ± standard deviation over seeds; mean paired difference to "
        f"{', '.join(sorted(shown))} (of the same setting), with its 95 % interval, not corrected; "
        "p of the paired t test, by Holm for the trained rows of this table; share of reference "
        "patches in training images before and after, of the teacher where there is one; drift of "
        "reference patches in validation images, 1 − cos.", ""]
    md, jsonl, png = (Path(args.out, f"{args.verb}.{kind}") for kind in ("md", "jsonl", "png"))
    lines = [json.dumps({"row": s["row"], "seed": seed, **run}) + "\n"
             for s in summaries for seed, run in s["seeds"].items()]
    jsonl.write_text("".join(lines))
    md.write_text("\n".join(text))
    pictures.trade_off(png, summaries)
    pictures.over_steps(png.with_stem(f"{args.verb}-steps"), summaries)
    print(*text, f"written to {args.out}: {md.name}, {jsonl.name}, {png.name}", sep="\n")
