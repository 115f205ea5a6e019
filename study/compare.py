"""The verbs that train: what each part of the method is worth, and what chance alone could do.

A run is a dict of figures, a row of the table is {seed: run}, the same seeds in every row. A seed
is a toy world: another split of the names, other scenes, another CLIP, initialisation and order. On
pictures seed i holds out the i-th of the lists given to --unseen."""
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
from sources import tiny_clip
from study.measures import SHIFTS, in_words, pearson
from support import pictures
from support.errors import UserError
from support.runs import Interruption, write_json
from support.tables import format_table

ZERO_SHOT, PLAIN, RPMD = "CLIP, zero-shot", "plain fine-tuning", "RPMD: + SPD + CPA + TPA"
PARTS = {  # row of the table: flags of train.py
    "head only": "--distill none --tpa-steps 0 --adapt none",
    PLAIN: "--distill none --tpa-steps 0",
    "+ TPA": "--distill none --tpa-steps 10",
    "+ SPD": "--distill rpmd --tpa-steps 0 --lambda-cpa 0",
    "+ CPA": "--distill rpmd --tpa-steps 0 --lambda-spd 0",
    "+ SPD + CPA": "--distill rpmd --tpa-steps 0",
    RPMD: "--distill rpmd --tpa-steps 10",
    "RPMD, frozen teacher": "--distill frozen --tpa-steps 10",
    "MAFT+'s pooled distillation": "--distill pooled --tpa-steps 0",
    "plain, visual encoder only": "--distill none --tpa-steps 0 --adapt visual",
    "plain, text encoder only": "--distill none --tpa-steps 0 --adapt text"}
METHODS = (PLAIN, "RPMD, frozen teacher", RPMD)  # of the curve
RATES = ("0.03", "0.1", "0.2", "0.5", "1")  # of CLIP, as a part of the head's
RATE = " --clip-lr-factor 1"  # of the table: plain overfits
SWEEP = {  # rates, and one more thing at a time
    PLAIN: (*RATES, "0.1 --lr 0.005", "0.1 --steps 320", "0.1 --steps 320 --batch-size 4"),
    "+ SPD + CPA": (
        *RATES, "0.2 --steps 320", "0.2 --steps 320 --batch-size 4", "0.2 --lambda-spd 0.3",
        "0.2 --lambda-spd 1", "0.5 --lambda-spd 0.3", "0.5 --lambda-spd 1", "0.2 --lambda-cpa 0.03",
        "0.2 --lambda-cpa 0.3", "0.2 --tau 0.05", "0.2 --alpha 0.999",
        "0.2 --spd-features raw --lambda-spd 0.01", "0.2 --tpa-steps 10 --tpa-lr 1e-4",
        "0.2 --tpa-steps 10 --tpa-lr 5e-4")}
METRICS = ("seen", "unseen", "harmonic")  # mIoU in per cent
WORLD = {"--dataset", "--seed", "--unseen", "--out", "--restart"}  # flags that a run's seed decides
ROOT = Path(__file__).parents[1]
children = []  # processes that train, or have


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
    minutes = (time.time() - begin) / 60
    made_by = {"flags": flags, "code": version, "minutes": minutes}
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
    """Of two numbers or more: mean, its 95 % interval by Student's t, standard deviation, ..."""
    numbers = np.array(numbers, float)
    n, mean, sd = len(numbers), numbers.mean(), numbers.std(ddof=1)
    half = stats.t.ppf(0.975, n - 1) * sd / np.sqrt(n)
    return {"mean": mean, "low": mean - half, "high": mean + half, "sd": sd,
            "above": (numbers > 0).sum(), "n": n, "each": numbers}


def summarise(name, runs, base=None):
    """A summary of a row's runs, paired by seed with those of the row base."""
    summary = {"row": name, "seeds": runs}
    for seed, run in runs.items():
        if run["harmonic"] is None:
            raise UserError(f"{name}, seed {seed}: none of the seen, or none of the unseen names "
                            "has ground truth to be scored on")
    for key in (*METRICS, "share_before", "share_after", "drift", *SHIFTS):
        summary[key] = interval([run[key] for run in runs.values()])
    if base:
        summary["against_plain"] = {
            key: interval([run[key] - base[seed][key] for seed, run in runs.items()])
            for key in METRICS}
    return summary


def compare(args, rows, against, start=None):
    """Train every row {name: flags} with every seed. Returns their summaries; where `start` is a
    row from whose runs the untrained CLIP is told, that comes first. against: {row: the one it is
    paired with}. What can't be run is refused before anything is."""
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
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    # all seeds of the first row come first: they pre-train the CLIPs that the others find
    jobs = {(row, seed): variant(rows[row], seed, args) for row in rows for seed in seeds}
    results = dict(zip(jobs, train_all(jobs.values(), args)))
    found = {row: {seed: figures(results[row, seed]) for seed in seeds} for row in rows}
    if start:
        of_clip = {seed: figures(results[start, seed], untrained=True) for seed in seeds}
        found = {ZERO_SHOT: of_clip, **found}
    return [summarise(row, runs, found.get(against.get(row))) for row, runs in found.items()]


def correlations(summaries):
    """Of each shift with unseen mIoU over all runs, {shift: Pearson's r or None}; and within seeds:
    after a seed's mean over rows is taken from both, since some worlds are easier than others."""
    found = {key: [s[key]["each"] for s in summaries] for key in ("unseen", *SHIFTS)}
    return [{key: pearson(found[key], found["unseen"], within_seeds) for key in SHIFTS}
            for within_seeds in (False, True)]


def describe_correlations(summaries):
    """`correlations` as a sentence."""
    count = sum(len(s["seeds"]) for s in summaries)
    found, within_seeds = map(in_words, correlations(summaries))
    return (f"Pearson correlation with unseen mIoU over {count} runs: {found}; "
            f"within seeds: {within_seeds}.")


def markdown(summaries):
    """The table."""
    rows = [["", *METRICS, *(f"{key} − plain" for key in METRICS), "unseen better in",
             "reference share", "drift"]]
    for s in summaries:
        cells = [s["row"], *("{mean:.1f} ± {sd:.1f}".format(**s[key]) for key in METRICS)]
        pairs = [""] * 4
        if "against_plain" in s:
            pairs = ["{mean:+.1f} [{low:+.1f}, {high:+.1f}]".format(**interval)
                     for interval in s["against_plain"].values()]
            pairs.append("{above} of {n}".format(**s["against_plain"]["unseen"]))
        share = f"{s['share_before']['mean']:.2f} → {s['share_after']['mean']:.2f}"
        rows.append([*cells, *pairs, share, f"{s['drift']['mean']:.3f}"])
    return format_table(rows)


def write(args, summaries, text, points=None):
    """VERB.md, printed too; VERB.jsonl, a run a line; VERB.png: differences, or of a curve's points
    {method: [(rate, summary)]} the trade-off, and the table ends with each method's best."""
    md, jsonl, png = (Path(args.out, f"{args.verb}.{kind}") for kind in ("md", "jsonl", "png"))
    table = summaries
    if points:
        table = [*summaries, *at_best_rates(points)]
        pictures.trade_off(png, points, summaries[:2])
    else:
        paired = {s["row"]: s["against_plain"] for s in summaries if "against_plain" in s}
        pictures.differences(png, {key: {row: pairs[key] for row, pairs in paired.items()}
                                   for key in ("unseen", "seen")})
    lines = [json.dumps({"row": s["row"], "seed": seed, **run}) + "\n"
             for s in summaries for seed, run in s["seeds"].items()]
    jsonl.write_text("".join(lines))
    text = (f"{markdown(table)}\n\n{text}\n\nmIoU in per cent, mean ± standard deviation over "
            "seeds; [95 % interval of the mean paired difference]; share of reference patches in "
            "training images before and after, of the teacher where there is one; drift of "
            "reference patches in validation images, 1 − cos.\n")
    md.write_text(text)
    print(f"{text}\nwritten to {args.out}: {md.name}, {jsonl.name}, {png.name}")


def at_rates(chosen):
    """Rows for {method: learning rates of CLIP, with what else changes}."""
    return {f"{name}, {rate}": f"{PARTS[name]} --clip-lr-factor {rate}"
            for name, rates in chosen.items() for rate in rates}


def ablate(args):
    """Train each part of the method over many seeds."""
    chosen = {PLAIN}
    for word in args.rows or PARTS:
        matching = {name for name in PARTS if word.casefold() in name.casefold()}
        if not matching:
            raise UserError(f"--rows {word}: no row has that in its name; they are "
                            f"{', '.join(PARTS)}")
        chosen |= matching
    rate = RATE if args.dataset == "toy" else ""
    rows = {name: flags + rate for name, flags in PARTS.items() if name in chosen}
    against = dict.fromkeys({ZERO_SHOT, *rows} - {PLAIN}, PLAIN)
    summaries = compare(args, rows, against, start=PLAIN)
    write(args, summaries, describe_correlations(summaries[1:]))


def spread(args):
    """Train over seeds in one world, over splits with one CLIP, over both: what moves scores."""
    first, clip = args.first_seed, shlex.quote(str(tiny_clip.clip_checkpoint(args.first_seed)))
    origins = {"training seed": f" --dataset toy:{first}",
               "split and scenes": f" --seed {first} --pretrained {clip}", "all, CLIP too": ""}
    rows = {f"{name}, {origin}": PARTS[name] + RATE + flags
            for origin, flags in origins.items() for name in (PLAIN, RPMD)}
    against = {f"{RPMD}, {origin}": f"{PLAIN}, {origin}" for origin in origins}
    summaries = compare(args, rows, against)
    deviations = [f"{origin} {summary['against_plain']['unseen']['sd']:.1f}"
                  for origin, summary in zip(origins, summaries[1::2])]
    write(args, summaries, "Standard deviation of the difference on unseen classes, by what "
                           f"differs between runs: {', '.join(deviations)}.")


def sweep(args):
    """Train what the tiny recipe was chosen from: rates, then one thing changed at a time."""
    rows, plain = at_rates(SWEEP), f"{PLAIN}, 0.1"
    summaries = compare(args, rows, dict.fromkeys(rows.keys() - {plain}, plain))
    write(args, summaries, f"Differences are to {plain}.")


def curve(args):
    """Train over CLIP's learning rates: seen against unseen, and each method at its best rate."""
    rows = {"head only": PARTS["head only"], **at_rates(dict.fromkeys(METHODS, RATES))}
    against = {f"{name}, {rate}": f"{PLAIN}, {rate}" for name in METHODS[1:] for rate in RATES}
    summaries = compare(args, rows, against, start="head only")
    trained = summaries[2:]
    text = [describe_correlations(trained)]
    for i, rate in enumerate(RATES):
        text.append(f"At a rate of {rate}: {describe_correlations(trained[i::len(RATES)])}")
    points = {name: list(zip(RATES, trained[i * len(RATES):])) for i, name in enumerate(METHODS)}
    write(args, summaries, "\n".join(text), points)


def at_best_rates(points):
    """Summaries of each method at the rate with the best mean harmonic mean, which flatters one
    with several rates near its best, and at rates chosen for each seed on the other seeds, which
    wrongs it. points: {method: [(rate, summary)]}."""
    summaries, plain = [], {}
    for name, curve in points.items():
        rows = [summary for _, summary in curve]
        harmonic = np.array([row["harmonic"]["each"] for row in rows])  # [rates,seeds]
        best = np.full(harmonic.shape[1], harmonic.mean(1).argmax())
        others = (harmonic.sum(1, keepdims=True) - harmonic).argmax(0)
        for choice, rates in (("best rate", best), ("best rate on the other seeds", others)):
            runs = {seed: rows[rate]["seeds"][seed] for seed, rate in zip(rows[0]["seeds"], rates)}
            taken = ", ".join(RATES[rate] for rate in np.unique(rates))
            summaries.append(summarise(f"{name}, {choice} ({taken})", runs, plain.get(choice)))
            plain.setdefault(choice, runs)
    return summaries
