"""What each part of the method is worth: many seeds, the same for every variant, and what chance alone could do.

    python study.py ablate --seeds 8                        each part alone, all together, and what they are compared with
    python study.py curve --seeds 8                         seen against unseen over learning rates of CLIP, three methods
    python study.py spread --seeds 5                        how far scores move by the training seed, and by the split
    python study.py sweep                                   how the tiny CLIP's recipe was chosen, on seeds of its own
    python study.py ablate --dataset folder:PATH --unseen "car, fence" "tree, road" --seeds 4       the same on pictures

A seed is a toy world of its own: another split of the names, other scenes, another CLIP, another initialisation and order.
On pictures seed i holds out the i-th of the lists given to --unseen. Runs are train.py's, side by side, one thread each, and
stay in --out, one folder each; the same command goes on where it stopped, and verbs share the runs they have in common.
Further flags are train.py's and hold for every run. Each verb writes VERB.md, VERB.json (every run) and VERB.png.
"""
import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import data
import evaluate
import runs
import study
import toy
import viz

HERE = Path(__file__).parent
# row of the table: flags of train.py
PARTS = {
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
    "plain, text encoder only": "--distill none --tpa-steps 0 --adapt text",
}
PLAIN, RPMD = "plain fine-tuning", "RPMD: + SPD + CPA + TPA"
METHODS = (PLAIN, "RPMD, frozen teacher", RPMD)                                            # of the curve
RATES = ("0.03", "0.1", "0.2", "0.5", "1")                                                 # of CLIP, as a part of the head's
RATE = "--clip-lr-factor 1"                                                                # of the table: plain overfits
SWEEP = {f"{name}, {rest}": f"{PARTS[name]} --clip-lr-factor {rest}" for name, rests in {
    PLAIN: (*RATES, "0.1 --lr 0.005", "0.1 --steps 320", "0.1 --steps 320 --batch-size 4"),
    "+ SPD + CPA": (*RATES, "0.2 --steps 320", "0.2 --steps 320 --batch-size 4", "0.2 --lambda-spd 0.3", "0.2 --lambda-spd 1",
                    "0.5 --lambda-spd 0.3", "0.5 --lambda-spd 1", "0.2 --lambda-cpa 0.03", "0.2 --lambda-cpa 0.3", "0.2 --tau 0.05",
                    "0.2 --alpha 0.999", "0.2 --spd-features raw --lambda-spd 0.01", "0.2 --tpa-steps 10 --tpa-lr 1e-4",
                    "0.2 --tpa-steps 10 --tpa-lr 5e-4"),
}.items() for rest in rests}                                                               # one thing at a time
SCORES = ("seen", "unseen", "harmonic")
WORLD = {"--dataset", "--seed", "--unseen", "--out", "--restart"}                          # flags that a run's seed decides
children = set()                                                                           # runs that are under way


def variant(flags, seed, args):
    """(flags of train.py for a row and a seed, folder of the run). Of a flag given twice the last one holds."""
    world = ["--dataset", f"toy:{seed}"]
    if args.dataset != "toy":
        unseen = args.unseen[(seed - args.first_seed) % len(args.unseen)]
        world = ["--dataset", args.dataset, "--clip", "tiny", "--pretrained", "crops", "--unseen", unseen]
    rest = ["--seed", str(seed), "--eval-every", "0", "--save-every", "0", *args.further, *shlex.split(flags)]
    kind = " ".join([*args.further, flags] + ([] if args.dataset == "toy" else [args.dataset]))
    return world + rest, Path(args.out, "runs", re.sub(r"[^\w.]+", "-", kind).strip("-"), f"seed-{seed}")


def code():
    """A fingerprint of the project's code, without the files that only watch."""
    files = sorted(p for p in HERE.glob("*.py") if p.name not in ("ablate.py", "study.py", "viz.py", "runs.py", "benchmarks.py"))
    return hashlib.sha256(b"".join(p.read_bytes() for p in files)).hexdigest()[:12]


def finished(flags, out):
    """The results.json of a run that has ended and had these flags, or None."""
    try:
        results = json.loads((out / "results.json").read_text())
        return results if results["made_by"]["flags"] == flags else None
    except (OSError, ValueError, KeyError):
        return None


def run(flags, out):
    """Train once, in a process of its own with one thread. Returns its results, or the sentence that says why there are none."""
    out.mkdir(parents=True, exist_ok=True)
    begin, env = time.time(), dict(os.environ) if torch.cuda.is_available() else dict(os.environ, OMP_NUM_THREADS="1")
    command = [sys.executable, str(HERE / "train.py"), *flags, "--out", str(out), "--restart"]
    with open(out / "output.txt", "w") as output:
        child = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=env)
        children.add(child)
        status = child.wait()
        children.discard(child)
    if status:
        last = ((out / "output.txt").read_text(errors="replace").strip().splitlines() or ["no output"])[-1]
        return f"exit status {status}, {out / 'output.txt'} ends with: {last[-300:]}"
    results = json.loads((out / "results.json").read_text())
    results["made_by"] = {"flags": flags, "code": code(), "minutes": (time.time() - begin) / 60}
    temporary = out / "results.tmp"
    temporary.write_text(json.dumps(results, indent=1))
    temporary.replace(out / "results.json")
    (out / "last.pt").unlink(missing_ok=True)                                              # 40 MB that nothing needs
    return results


def check(rows, args):
    """Refuse what can't be run before anything is."""
    if args.seeds < 1 + (args.verb == "spread") or args.jobs < 1 or args.first_seed < 0:
        raise ValueError(f"--seeds {args.seeds} --jobs {args.jobs} --first-seed {args.first_seed}: there is nothing to compare")
    if args.dataset == "toy" and args.unseen:
        raise ValueError("--unseen is for pictures: a toy world's seed splits its names")
    if args.dataset != "toy":
        if args.verb not in ("ablate", "curve") or not args.dataset.startswith("folder:"):
            raise ValueError(f"{args.verb} --dataset {args.dataset}: only ablate and curve take another than toy, folder:PATH")
        if not args.unseen:
            raise ValueError('--dataset folder:PATH needs --unseen "NAME, NAME": what to hold out of segmentation training')
        if args.seeds % len(args.unseen):
            raise ValueError(f"--seeds {args.seeds} is no multiple of the {len(args.unseen)} lists of --unseen")
        for unseen in args.unseen:
            data.open_dataset(args.dataset, None, "train", unseen=unseen)
    set_here = WORLD | {word for flags in rows.values() for word in flags.split() if word.startswith("--")}
    for word in args.further:
        if word.partition("=")[0] in set_here:
            raise ValueError(f"{word} can't be given for all runs: it is what {args.verb} varies")


def run_all(rows, args):
    """Every row with every seed: {row: {seed: results}}. Runs that have ended are read. Raises ValueError in the end when
    some failed, which the same command then tries again."""
    check(rows, args)
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    jobs = [(row, seed, *variant(flags, seed, args)) for seed in seeds for row, flags in rows.items()]
    found, failed = {job[:2]: finished(*job[2:]) for job in jobs}, []
    todo = [job for job in jobs if found[job[:2]] is None]
    older = sum(r is not None and r["made_by"]["code"] != code() for r in found.values())
    if older:
        print(f"note: {older} of the runs found in {args.out} were made by another version of the code; another --out runs them anew")
    first = {job[1]: job for job in reversed(todo)}.values()      # of each seed: it pre-trains the CLIP that the others find
    bar = tqdm(total=len(jobs), initial=len(jobs) - len(todo), desc=args.verb, unit="run", smoothing=0)
    runs.Interruption(at_once=True)
    with ThreadPoolExecutor(args.jobs) as pool:
        try:
            for part in (first, [job for job in todo if job not in first]):
                for done in as_completed(futures := {pool.submit(run, *job[2:]): job[:2] for job in part}):
                    found[futures[done]] = done.result()
                    bar.update()
                    if isinstance(done.result(), str):
                        failed.append(done.result())
                        tqdm.write(done.result())
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for child in list(children):
                child.terminate()
            raise
    bar.close()
    if failed:
        raise ValueError(f"{len(failed)} of {len(jobs)} runs failed; the same command tries them again. The first: {failed[0]}")
    return {row: {seed: found[row, seed] for seed in seeds} for row in rows}


def interval(differences):
    """Mean of paired differences, its 95 % interval by Student's t, and how many are above 0. Bounds are None for n < 2."""
    from scipy import stats
    d = np.asarray(differences, float)
    half = stats.t.ppf(0.975, len(d) - 1) * d.std(ddof=1) / np.sqrt(len(d)) if len(d) > 1 else None
    return {"mean": float(d.mean()), "low": None if half is None else float(d.mean() - half),
            "high": None if half is None else float(d.mean() + half), "above": int((d > 0).sum()), "n": len(d), "each": d.tolist()}


def summarise(name, flags, results, base):
    """A row of the table from its runs {seed: results}, paired with those of base, {seed: results} too (None: with nothing)."""
    per_seed = {}
    for seed, r in results.items():
        if None in (r["trained"][key] for key in SCORES):
            raise ValueError(f"{name}, seed {seed}: none of the seen, or none of the unseen names has ground truth to be scored on")
        per_seed[seed] = {**{key: r["trained"][key] for key in SCORES}, "share_before": r["before_tpa"]["reference_share"],
                          "share_after": r["end"]["reference_share"], "drift": r["end"]["reference_drift"],
                          **{key: r["shift"][key] for key in study.SHIFTS}, **r.get("made_by", {})}
    row = {"row": name, "flags": flags}
    for key in (*SCORES, "share_before", "share_after", "drift"):
        values = np.array([one[key] for one in per_seed.values()])
        row[key] = {"mean": float(values.mean()), "sd": float(values.std(ddof=1)) if len(values) > 1 else None}
    if base is not None:
        row["against_plain"] = {key: interval([results[s]["trained"][key] - base[s]["trained"][key] for s in results]) for key in SCORES}
    return {**row, "seeds": per_seed}


def zero_shot(results):
    """Runs {seed: results} with the untrained CLIP's figures in place of the trained model's."""
    none = dict.fromkeys(study.SHIFTS, 0.0)
    start = lambda r: {"reference_share": r["before_tpa"]["reference_share"], "reference_drift": 0.0}
    return {s: {**r, "trained": r["zero_shot"], "end": start(r), "shift": none} for s, r in results.items()}


def correlations(found):
    """Pearson's correlation of each shift with unseen mIoU over all runs of {row: {seed: results}}: as they are, and within
    seeds, that is after the mean over a seed's rows is taken from both, since some worlds are easier than others."""
    table = lambda get: np.array([[get(r) for r in by_seed.values()] for by_seed in found.values()], float)   # [rows,seeds]
    unseen, related = table(lambda r: r["trained"]["unseen"]), {"unseen": {}, "unseen_within_seeds": {}}
    for key in study.SHIFTS:
        shift = table(lambda r: r["shift"][key])                                           # NaN where it isn't defined
        score = np.where(np.isnan(shift), np.nan, unseen)
        related["unseen"][key] = study.pearson(shift.ravel(), score.ravel())
        centred = (v - np.ma.masked_invalid(v).mean(0).filled(np.nan) for v in (shift, score))
        related["unseen_within_seeds"][key] = study.pearson(*(v.ravel() for v in centred))
    return {"runs": unseen.size, **related}


def signed(v):
    """An `interval` in words."""
    return f"{v['mean']:+.1f}" + (f" [{v['low']:+.1f}, {v['high']:+.1f}]" if v["low"] is not None else "")


def markdown(rows):
    """The rows of `summarise` as a table."""
    score = lambda v: f"{v['mean']:.1f}" + (f" ± {v['sd']:.1f}" if v["sd"] is not None else "")
    table = [["", *SCORES, *(f"{key} − plain" for key in SCORES), "unseen better in", "reference share", "drift"]]
    for r in rows:
        apart = r.get("against_plain")
        pairs = [*(signed(apart[key]) for key in SCORES), f"{apart['unseen']['above']} of {apart['unseen']['n']}"] if apart else [""] * 4
        table.append([r["row"], *(score(r[key]) for key in SCORES), *pairs,
                      f"{r['share_before']['mean']:.2f} → {r['share_after']['mean']:.2f}", f"{r['drift']['mean']:.3f}"])
    return evaluate.table(table)


def write(args, rows, text, **more):
    """VERB.md and VERB.json, and print what is in the first."""
    text = "\n\n".join([markdown(rows), text,
                        "mIoU in per cent, mean ± standard deviation over seeds; [95 % interval of the mean paired difference]; share "
                        "of reference patches in training images before and after, of the teacher where there is one; drift of "
                        "reference patches in validation images, 1 − cos."])
    out = Path(args.out)
    (out / f"{args.verb}.md").write_text(text + "\n")
    about = {"verb": args.verb, "dataset": args.dataset, "unseen": args.unseen, "first_seed": args.first_seed, "seeds": args.seeds,
             "flags_for_all": args.further}
    (out / f"{args.verb}.json").write_text(json.dumps({**about, "rows": rows, **more}, indent=1))
    print(f"{text}\n\nwritten to {out}: {args.verb}.md, {args.verb}.json, {args.verb}.png")


def say_correlations(related):
    show = lambda values: ", ".join(f"{study.SHIFTS[k]} {'not defined' if r is None else f'{r:+.2f}'}" for k, r in values.items())
    return (f"Pearson correlation with unseen mIoU over {related['runs']} runs: {show(related['unseen'])}; within seeds: "
            f"{show(related['unseen_within_seeds'])}.")


def draw_differences(args, rows):
    viz.differences(Path(args.out, f"{args.verb}.png"), {key: {row["row"]: row["against_plain"][key] for row in rows if "against_plain" in row}
                                                         for key in ("unseen", "seen")})


def ablate(args):
    """The table: every part of the method."""
    chosen = {name for word in args.rows or PARTS for name in PARTS if word.casefold() in name.casefold()}
    for word in args.rows or ():
        if not any(word.casefold() in name.casefold() for name in PARTS):
            raise ValueError(f"--rows {word}: no row has that in its name; they are {', '.join(PARTS)}")
    rate = f" {RATE}" if args.dataset == "toy" else ""
    rows = {name: flags + rate for name, flags in PARTS.items() if name in chosen | {PLAIN}}
    found = run_all(rows, args)
    lines = [summarise("CLIP, zero-shot", "", zero_shot(found[PLAIN]), found[PLAIN])]
    lines += [summarise(name, rows[name], found[name], None if name == PLAIN else found[PLAIN]) for name in rows]
    related = correlations(found)
    draw_differences(args, lines)
    write(args, lines, say_correlations(related), correlations=related)


def curve(args):
    """Seen against unseen over CLIP's learning rates, and the methods compared with plain fine-tuning at rates that are chosen
    by the mean harmonic mean: at plain's best; each at its own best; and that again with a seed's rates chosen on the other
    seeds. The second flatters a method that has several rates near its best, the third wrongs it."""
    rows = {(name, rate): f"{PARTS[name]} --clip-lr-factor {rate}" for name in METHODS for rate in RATES}
    found = run_all({"head only": PARTS["head only"]} | {", ".join(row): flags for row, flags in rows.items()}, args)
    head, found = found.pop("head only"), dict(zip(rows, found.values()))
    lines = {row: summarise(", ".join(row), rows[row], by_seed, None if row[0] == PLAIN else found[PLAIN, row[1]])
             for row, by_seed in found.items()}
    starts = [summarise("CLIP, zero-shot", "", zero_shot(head), None), summarise("head only", PARTS["head only"], head, None)]
    harmonic = np.array([[[r["trained"]["harmonic"] for r in found[name, rate].values()] for rate in RATES] for name in METHODS])
    best, text, seeds = harmonic.mean(-1).argmax(-1), [], list(head)                                 # harmonic [methods,rates,seeds]
    for name, values, i in zip(METHODS, harmonic.mean(-1), best):
        edge = ", the end of the range" if i in (0, len(RATES) - 1) else ""
        text.append(f"Best mean harmonic mean of {name}: {values[i]:.1f}, at {RATES[i]}{edge}.")

    def others_best(m, s):
        others = np.delete(harmonic[m], s, axis=-1) if len(seeds) > 1 else harmonic[m]
        return others.mean(-1).argmax()

    gains = {}
    for choice, rate in (("both at plain's best rate", lambda m, s: best[0]), ("each at its best rate", lambda m, s: best[m]),
                         ("each at its best rate on the other seeds", others_best)):
        score = lambda m, s, key: found[METHODS[m], RATES[rate(m, s)]][seeds[s]]["trained"][key]
        gains[choice] = {}
        for m, name in enumerate(METHODS[1:], 1):
            gain = {key: interval([score(m, s, key) - score(0, s, key) for s in range(len(seeds))]) for key in SCORES}
            gains[choice][name] = gain
            text.append(f"{name} against {PLAIN}, {choice}: {', '.join(f'{key} {signed(v)}' for key, v in gain.items())}; "
                        f"harmonic mean better in {gain['harmonic']['above']} of {gain['harmonic']['n']}.")
    related = correlations(found)
    by_rate = {rate: correlations({row: by_seed for row, by_seed in found.items() if row[1] == rate}) for rate in RATES}
    viz.trade_off(Path(args.out, "curve.png"), {name: [(rate, lines[name, rate]) for rate in RATES] for name in METHODS}, starts)
    write(args, [*starts, *lines.values()], "\n".join([*text, "", say_correlations(related)]),
          best={name: RATES[i] for name, i in zip(METHODS, best)}, gains=gains, correlations=related, correlations_by_rate=by_rate)


def spread(args):
    """Where the spread comes from: training seeds in one world, splits with one CLIP, or all of it."""
    first = args.first_seed
    clip = shlex.quote(str(toy.clip_checkpoint(first)))
    origins = {"training seed": f"--dataset toy:{first}", "split and scenes": f"--seed {first} --pretrained {clip}", "all, CLIP too": ""}
    rows = {(name, origin): f"{PARTS[name]} {RATE} {flags}".strip() for origin, flags in origins.items() for name in (PLAIN, RPMD)}
    found = dict(zip(rows, run_all({", ".join(row): flags for row, flags in rows.items()}, args).values()))
    lines = [summarise(", ".join(row), rows[row], found[row], None if row[0] == PLAIN else found[PLAIN, row[1]]) for row in rows]
    deviation = {}
    for (name, origin), line in zip(rows, lines):
        if name == RPMD:
            deviation[origin] = float(np.std(line["against_plain"]["unseen"]["each"], ddof=1))
    draw_differences(args, lines)
    write(args, lines, "Standard deviation of the difference on unseen classes, by what differs between runs: " +
          ", ".join(f"{origin} {value:.1f}" for origin, value in deviation.items()) + ".", deviation=deviation)


def sweep(args):
    """How the recipe was chosen: the rate for both methods, then one thing changed at a time."""
    found, plain = run_all(SWEEP, args), f"{PLAIN}, 0.1"
    lines = [summarise(name, SWEEP[name], by_seed, None if name == plain else found[plain]) for name, by_seed in found.items()]
    draw_differences(args, lines)
    write(args, lines, f"Differences are to {plain}.")


VERBS = {"ablate": ablate, "curve": curve, "spread": spread, "sweep": sweep}
