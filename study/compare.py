"""The verbs that train: what each part of the method is worth, and what chance alone could do.

A run is a dict of figures, a row of the table is {seed: run}, the same seeds in every row. A seed
is a toy world: another split of the names, other scenes, another CLIP, initialisation and order. On
pictures seed i holds out the i-th of the lists given to --unseen.
"""
import json
import shlex
from pathlib import Path

import numpy as np
from scipy import stats

from sources import tiny_clip
from study.many import run_all
from study.measures import SHIFTS, in_words, pearson
from support import pictures
from support.errors import UserError
from support.tables import format_table

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


def figures(results):
    """A run, of its results.json."""
    return {**{key: results["trained"][key] for key in METRICS},
            "share_before": results["before_tpa"]["reference_share"],
            "share_after": results["end"]["reference_share"],
            "drift": results["end"]["reference_drift"],
            **{key: results["shift"][key] for key in SHIFTS}, **results.get("made_by", {})}


def zero_shot(results):
    """The same of the CLIP that the run started from."""
    end, shift = {**results["before_tpa"], "reference_drift": 0.0}, dict.fromkeys(SHIFTS, 0.0)
    return figures({**results, "trained": results["zero_shot"], "end": end, "shift": shift})


def interval(differences):
    """Of paired differences, two or more: their mean, its 95 % interval by Student's t, ..."""
    d = np.asarray(differences, float)
    n, mean, sd = len(d), d.mean(), d.std(ddof=1)
    half = stats.t.ppf(0.975, n - 1) * sd / np.sqrt(n)
    return {"mean": mean, "low": mean - half, "high": mean + half, "sd": sd,
            "above": (d > 0).sum(), "n": n, "each": d}


def summarise(name, runs, base=None):
    """A summary of a row's runs, paired by seed with those of the row base."""
    for seed, run in runs.items():
        if None in (run[key] for key in METRICS):
            raise UserError(f"{name}, seed {seed}: none of the seen, or none of the unseen names "
                            "has ground truth to be scored on")
    summary = {"row": name, "seeds": runs}
    for key in (*METRICS, "share_before", "share_after", "drift"):
        values = np.array([run[key] for run in runs.values()])
        summary[key] = {"mean": values.mean(), "sd": values.std(ddof=1)}
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
    count = sum(len(s["seeds"]) for s in summaries)
    found, within_seeds = (", ".join(f"{SHIFTS[key]} {in_words(r)}" for key, r in related.items())
                           for related in correlations(summaries))
    return (f"Pearson correlation with unseen mIoU over {count} runs: {found}; within seeds: "
            f"{within_seeds}.")


def markdown(summaries):
    """The table."""
    table = [["", *METRICS, *(f"{key} − plain" for key in METRICS), "unseen better in",
              "reference share", "drift"]]
    for s in summaries:
        pairs = [""] * 4
        if "against_plain" in s:
            pairs = ["{mean:+.1f} [{low:+.1f}, {high:+.1f}]".format(**s["against_plain"][key])
                     for key in METRICS]
            pairs.append("{above} of {n}".format(**s["against_plain"]["unseen"]))
        scores = ["{mean:.1f} ± {sd:.1f}".format(**s[key]) for key in METRICS]
        share = f"{s['share_before']['mean']:.2f} → {s['share_after']['mean']:.2f}"
        table.append([s["row"], *scores, *pairs, share, f"{s['drift']['mean']:.3f}"])
    return format_table(table)


def compare(args, rows, against, start=None):
    """Train every row {name: flags}. Returns their summaries; where `start` is a row from whose
    runs the untrained CLIP is told, that comes first. against: {row: the one it is paired with}."""
    results, found = run_all(rows, args), {}
    if start:
        found[ZERO_SHOT] = {seed: zero_shot(r) for seed, r in results[start].items()}
    for row, of_row in results.items():
        found[row] = {seed: figures(r) for seed, r in of_row.items()}
    return [summarise(row, runs, found.get(against.get(row))) for row, runs in found.items()]


def write(args, summaries, text, more=()):
    """VERB.md, which is printed too, and VERB.jsonl, a run a line."""
    text = f"{markdown([*summaries, *more])}\n\n{text}\n\n{FOOTNOTE}"
    Path(args.out, f"{args.verb}.md").write_text(text + "\n")
    with Path(args.out, f"{args.verb}.jsonl").open("w") as file:
        for summary in summaries:
            for seed, run in summary["seeds"].items():
                file.write(json.dumps({"row": summary["row"], "seed": seed, **run}) + "\n")
    print(f"{text}\n\nwritten to {args.out}: {args.verb}.md, {args.verb}.jsonl, {args.verb}.png")


def draw_differences(args, summaries):
    paired = {s["row"]: s["against_plain"] for s in summaries if "against_plain" in s}
    panels = {key: {row: pairs[key] for row, pairs in paired.items()} for key in ("unseen", "seen")}
    pictures.differences(Path(args.out, f"{args.verb}.png"), panels)


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
    draw_differences(args, summaries)
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
    draw_differences(args, summaries)
    write(args, summaries, "Standard deviation of the difference on unseen classes, by what "
                           f"differs between runs: {', '.join(deviations)}.")


def sweep(args):
    """Train what the tiny recipe was chosen from: rates, then one thing changed at a time."""
    rows, plain = at_rates(SWEEP), f"{PLAIN}, 0.1"
    summaries = compare(args, rows, dict.fromkeys(rows.keys() - {plain}, plain))
    draw_differences(args, summaries)
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
    pictures.trade_off(Path(args.out, "curve.png"), points, summaries[:2])
    write(args, summaries, "\n".join(text), at_best_rates(points))


def at_best_rates(points):
    """Summaries of each method at the rate with the best mean harmonic mean, which flatters one
    with several rates near its best, and at rates chosen for each seed on the other seeds, which
    wrongs it. points: {method: [(rate, summary)]}."""
    summaries, plain = [], {}
    for name, curve in points.items():
        rows = [summary for _, summary in curve]
        seeds, harmonic = list(rows[0]["seeds"]), values(rows, "harmonic")  # [rates,seeds]
        best = harmonic.mean(1).argmax()
        others = [np.delete(harmonic, i, 1).mean(1).argmax() for i in range(len(seeds))]
        for choice, rates in (("best rate", [best] * len(seeds)),
                              ("best rate on the other seeds", others)):
            runs = {seed: rows[rate]["seeds"][seed] for seed, rate in zip(seeds, rates)}
            taken = ", ".join(RATES[rate] for rate in sorted(set(rates)))
            summaries.append(summarise(f"{name}, {choice} ({taken})", runs, plain.get(choice)))
            plain.setdefault(choice, runs)
    return summaries
