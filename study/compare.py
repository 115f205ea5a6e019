"""The verbs that train: what each part of the method is worth, and what chance alone could do.

A run is a dict of figures, a row of the table is {seed: run}, the same seeds in every row. A seed
is a toy world: another split of the names, other scenes, another CLIP, initialisation and order. On
pictures seed i holds out the i-th of the lists given to --unseen."""
import json
import shlex
from pathlib import Path

import numpy as np
from scipy import stats

from sources import tiny_clip
from study.many import run_all
from study.measures import SHIFTS, in_words, pearson
from support import pictures, tables
from support.errors import UserError

PARTS = {  # row of the table: flags of train.py
    "head only": "--distill none --tpa-steps 0 --adapt none",
    "plain fine-tuning": "--distill none --tpa-steps 0",
    "+ TPA": "--distill none --tpa-steps 10",
    "+ SPD": "--distill rpmd --tpa-steps 0 --lambda-cpa 0",
    "+ CPA": "--distill rpmd --tpa-steps 0 --lambda-spd 0",
    "+ SPD + CPA": "--distill rpmd --tpa-steps 0",
    "RPMD: + SPD + CPA + TPA": "--distill rpmd --tpa-steps 10",
    "RPMD, frozen teacher": "--distill frozen --tpa-steps 10",
    "MAFT+'s pooled distillation": "--distill pooled --tpa-steps 0",
    "plain, visual encoder only": "--distill none --tpa-steps 0 --adapt visual",
    "plain, text encoder only": "--distill none --tpa-steps 0 --adapt text"}
ZERO_SHOT, PLAIN, RPMD = "CLIP, zero-shot", "plain fine-tuning", "RPMD: + SPD + CPA + TPA"
METHODS = (PLAIN, "RPMD, frozen teacher", RPMD)  # of the curve
RATES = ("0.03", "0.1", "0.2", "0.5", "1")  # of CLIP, as a part of the head's
RATE = "--clip-lr-factor 1"  # of the table: plain overfits
SWEEP = {  # rates, and one more thing at a time
    PLAIN: (*RATES, "0.1 --lr 0.005", "0.1 --steps 320", "0.1 --steps 320 --batch-size 4"),
    "+ SPD + CPA": (
        *RATES, "0.2 --steps 320", "0.2 --steps 320 --batch-size 4", "0.2 --lambda-spd 0.3",
        "0.2 --lambda-spd 1", "0.5 --lambda-spd 0.3", "0.5 --lambda-spd 1", "0.2 --lambda-cpa 0.03",
        "0.2 --lambda-cpa 0.3", "0.2 --tau 0.05", "0.2 --alpha 0.999",
        "0.2 --spd-features raw --lambda-spd 0.01", "0.2 --tpa-steps 10 --tpa-lr 1e-4",
        "0.2 --tpa-steps 10 --tpa-lr 5e-4")}
METRICS = ("seen", "unseen", "harmonic")  # mIoU in per cent
FOOTNOTE = ("mIoU in per cent, mean ± standard deviation over seeds; [95 % interval of the mean "
            "paired difference]; share of reference patches in training images before and after, "
            "of the teacher where there is one; drift of reference patches in validation images, "
            "1 − cos.")


def figures(results, untrained=False):
    """A run, of its results.json; untrained: of the CLIP that it started from."""
    scores, end, shift = results["trained"], results["end"], results["shift"]
    if untrained:
        scores, end = results["zero_shot"], {**results["before_tpa"], "reference_drift": 0.0}
        shift = dict.fromkeys(SHIFTS, 0.0)
    return {**{key: scores[key] for key in METRICS},
            "share_before": results["before_tpa"]["reference_share"],
            "share_after": end["reference_share"], "drift": end["reference_drift"],
            **{key: shift[key] for key in SHIFTS}, **results.get("made_by", {})}


def interval(numbers):
    """Of two numbers or more: mean, its 95 % interval by Student's t, standard deviation, ..."""
    numbers = np.array(numbers, float)
    n, mean, sd = len(numbers), numbers.mean(), numbers.std(ddof=1)
    half = stats.t.ppf(0.975, n - 1) * sd / np.sqrt(n)
    return {"mean": mean, "low": mean - half, "high": mean + half, "sd": sd,
            "above": (numbers > 0).sum(), "n": n, "each": numbers}


def summarise(name, runs, base=None):
    """A summary of a row's runs, paired by seed with those of the row base."""
    for seed, run in runs.items():
        if None in (run["seen"], run["unseen"]):
            raise UserError(f"{name}, seed {seed}: none of the seen, or none of the unseen names "
                            "has ground truth to be scored on")
    summary = {"row": name, "seeds": runs}
    for key in (*METRICS, "share_before", "share_after", "drift"):
        summary[key] = interval([run[key] for run in runs.values()])
    if base:
        summary["against_plain"] = {
            key: interval([run[key] - base[seed][key] for seed, run in runs.items()])
            for key in METRICS}
    return summary


def values(summaries, key):
    """A figure of every run: [rows,seeds], NaN where it isn't defined."""
    return np.array([[run[key] for run in s["seeds"].values()] for s in summaries], float)


def correlations(summaries):
    """Of each shift with unseen mIoU over all runs, {shift: Pearson's r or None}; and within seeds:
    after a seed's mean over rows is taken from both, since some worlds are easier than others."""
    found, within_seeds = {}, {}
    for key in SHIFTS:
        pair = np.stack([values(summaries, key), values(summaries, "unseen")])  # [2,rows,seeds]
        pair[:, np.isnan(pair).any(0)] = np.nan
        found[key] = pearson(*pair)
        means = np.ma.masked_invalid(pair).mean(1, keepdims=True).filled(np.nan)
        within_seeds[key] = pearson(*(pair - means))
    return found, within_seeds


def describe_correlations(summaries):
    """`correlations` as a sentence."""
    found, within_seeds = correlations(summaries)
    count = values(summaries, "unseen").size
    return (f"Pearson correlation with unseen mIoU over {count} runs: {in_words(found)}; within "
            f"seeds: {in_words(within_seeds)}.")


def markdown(summaries):
    """The table."""
    rows = [["", *METRICS, *(f"{key} − plain" for key in METRICS), "unseen better in",
             "reference share", "drift"]]
    for s in summaries:
        pairs = [""] * 4
        if "against_plain" in s:
            pairs = ["{mean:+.1f} [{low:+.1f}, {high:+.1f}]".format(**s["against_plain"][key])
                     for key in METRICS]
            pairs.append("{above} of {n}".format(**s["against_plain"]["unseen"]))
        scores = ["{mean:.1f} ± {sd:.1f}".format(**s[key]) for key in METRICS]
        share = f"{s['share_before']['mean']:.2f} → {s['share_after']['mean']:.2f}"
        rows.append([s["row"], *scores, *pairs, share, f"{s['drift']['mean']:.3f}"])
    return tables.format_table(rows)


def compare(args, rows, against, start=None):
    """Train every row {name: flags}. Returns their summaries; where `start` is a row from whose
    runs the untrained CLIP is told, that comes first. against: {row: the one it is paired with}."""
    results, found = run_all(rows, args), {}
    if start:
        found[ZERO_SHOT] = {seed: figures(r, untrained=True) for seed, r in results[start].items()}
    for row, of_row in results.items():
        found[row] = {seed: figures(r) for seed, r in of_row.items()}
    return [summarise(row, runs, found.get(against.get(row))) for row, runs in found.items()]


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
    lines = [json.dumps({"row": s["row"], "seed": seed, **run})
             for s in summaries for seed, run in s["seeds"].items()]
    jsonl.write_text("\n".join(lines) + "\n")
    text = f"{markdown(table)}\n\n{text}\n\n{FOOTNOTE}\n"
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
    rate = f" {RATE}" if args.dataset == "toy" else ""
    rows = {name: flags + rate for name, flags in PARTS.items() if name in chosen}
    against = dict.fromkeys({ZERO_SHOT, *rows} - {PLAIN}, PLAIN)
    summaries = compare(args, rows, against, start=PLAIN)
    write(args, summaries, describe_correlations(summaries[1:]))


def spread(args):
    """Train over seeds in one world, over splits with one CLIP, over both: what moves scores."""
    first, clip = args.first_seed, shlex.quote(str(tiny_clip.clip_checkpoint(args.first_seed)))
    origins = {"training seed": f" --dataset toy:{first}",
               "split and scenes": f" --seed {first} --pretrained {clip}", "all, CLIP too": ""}
    rows = {f"{name}, {origin}": f"{PARTS[name]} {RATE}{flags}"
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
        harmonic = values(rows, "harmonic")  # [rates,seeds]
        best = np.full(harmonic.shape[1], harmonic.mean(1).argmax())
        others = [np.delete(harmonic, i, 1).mean(1).argmax() for i in range(len(best))]
        for choice, rates in (("best rate", best), ("best rate on the other seeds", others)):
            runs = {seed: rows[rate]["seeds"][seed] for seed, rate in zip(rows[0]["seeds"], rates)}
            taken = ", ".join(RATES[rate] for rate in np.unique(rates))
            summaries.append(summarise(f"{name}, {choice} ({taken})", runs, plain.get(choice)))
            plain.setdefault(choice, runs)
    return summaries
