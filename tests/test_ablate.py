"""Comparisons over seeds: statistics against known numbers, runs found again or made again, the verbs from the command line."""
import json
import os
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import ablate
import data
import study
import toy
import train
from conftest import run
from losses import IGNORE


def results(seed, gain=0.0):
    """Made-up results of a run."""
    score = lambda plus: {"seen": 50.0 + seed + plus, "unseen": 30.0 + seed ** 2 + 2 * plus, "harmonic": 40.0 + seed - plus}
    return {"zero_shot": score(0), "trained": score(gain), "before_tpa": {"reference_share": 0.5, "reference_drift": 0.0},
            "end": {"reference_share": 0.75, "reference_drift": 0.25},
            "shift": {"shift_reference": 0.1 * seed, "shift_noisy": 0.2, "shift_text": 0.3 - 0.1 * seed}}


def test_interval_by_hand():
    """Mean 2, standard deviation 2, and Student's t of 2 degrees of freedom, which tables give as 4.303."""
    got = ablate.interval([0, 2, 4])
    assert (got["mean"], got["above"], got["n"]) == (2, 2, 3)
    assert got["high"] - 2 == pytest.approx(4.303 * 2 / 3 ** 0.5, abs=2e-3) and got["low"] == pytest.approx(4 - got["high"])
    assert ablate.interval([3.0])["low"] is None and ablate.interval([-1, 1, 0])["above"] == 1


def test_rows_are_paired_by_seed():
    base = {3: results(3), 1: results(1), 2: results(2)}
    row = ablate.summarise("a", "--flag", {s: results(s, gain) for s, gain in ((1, 1.0), (2, -1.0), (3, 3.0))}, base)
    assert row["against_plain"]["seen"]["each"] == [1, -1, 3] and row["against_plain"]["unseen"]["each"] == [2, -2, 6]
    assert row["seen"]["mean"] == pytest.approx(53) and row["seen"]["sd"] == pytest.approx(np.std([52, 51, 56], ddof=1))
    assert row["against_plain"]["harmonic"]["above"] == 1 and list(row["seeds"]) == [1, 2, 3]
    assert row["share_before"]["mean"] == 0.5 and row["share_after"]["mean"] == 0.75 and row["drift"]["mean"] == 0.25
    assert "+1.0 [" in ablate.markdown([row]) and "2 of 3" in ablate.markdown([row])
    assert "against_plain" not in ablate.summarise("plain", "", base, None)
    none = {1: {**results(1), "trained": {**results(1)["trained"], "unseen": None}}}
    with pytest.raises(ValueError, match="a, seed 1: none of the seen, or none of the unseen names has ground truth"):
        ablate.summarise("a", "", none, None)
    start = ablate.summarise("zero-shot", "", ablate.zero_shot(base), base)
    assert start["against_plain"]["unseen"]["mean"] == 0 and start["share_after"]["mean"] == 0.5 and start["drift"]["mean"] == 0


def test_correlations():
    """As they are, and after every seed's mean over rows is taken away: easy worlds with large shifts say nothing then."""
    found = {"a": {1: results(1, 1.0), 2: results(2, 4.0), 3: results(3, 2.0)}, "b": {1: results(1, 0.0), 2: results(2, 1.0), 3: results(3, 5.0)}}
    for row in found.values():
        for seed, r in row.items():
            r["shift"]["shift_text"] = 10.0 * seed - r["trained"]["seen"]                   # in a seed, falls as its score rises
    got = ablate.correlations(found)
    assert got["runs"] == 6 and got["unseen"]["shift_noisy"] is None and got["unseen_within_seeds"]["shift_noisy"] is None
    assert got["unseen"]["shift_reference"] == pytest.approx(np.corrcoef([1, 2, 3] * 2, [33, 42, 43, 31, 36, 49])[0, 1])
    assert got["unseen_within_seeds"]["shift_text"] == pytest.approx(-1) and got["unseen_within_seeds"]["shift_reference"] is None
    assert got["unseen"]["shift_text"] > -0.9
    found["b"][2]["shift"]["shift_text"] = None                                                  # a seed with one row left: no pair
    got = ablate.correlations(found)
    assert got["unseen_within_seeds"]["shift_text"] == pytest.approx(np.corrcoef([-.5, .5, 0, 1.5, -1.5], [1, -1, 0, -3, 3])[0, 1])


def arguments(tmp_path, **more):
    return SimpleNamespace(**{**dict(verb="ablate", dataset="toy", unseen=None, seeds=3, first_seed=5, jobs=2, rows=None, further=[],
                                     out=str(tmp_path)), **more})


def test_every_row_has_the_same_seeds_and_runs_are_made_once(tmp_path, monkeypatch, capsys):
    made, version = [], ["one"]

    def make(flags, out):
        args = train.parse(flags)
        made.append((args.distill, args.seed, args.dataset))
        time.sleep(0.02 * (args.seed == 5))                                                # the first one ends last
        out.mkdir(parents=True, exist_ok=True)
        mark = {"made_by": {"flags": flags, "code": version[0], "minutes": 1.0}}
        (out / "results.json").write_text(json.dumps({**results(args.seed), **mark}))
        return json.loads((out / "results.json").read_text())
    monkeypatch.setattr(ablate, "run", make)
    monkeypatch.setattr(ablate, "code", lambda: version[0])
    rows = {"plain": "--distill none", "rpmd": "--distill rpmd --clip-lr-factor 0.1"}
    found = ablate.run_all(rows, arguments(tmp_path, jobs=3))
    assert sorted(made) == [(d, s, f"toy:{s}") for d in ("none", "rpmd") for s in (5, 6, 7)]
    assert {m[1] for m in made[:3]} == {5, 6, 7}, "a seed's CLIP is made by one run, before the others want it"
    assert [list(by_seed) for by_seed in found.values()] == [[5, 6, 7]] * 2, "in the order of seeds, whichever ended first"
    made.clear()
    ablate.run_all(rows, arguments(tmp_path, seeds=4))
    assert sorted(made) == [("none", 8, "toy:8"), ("rpmd", 8, "toy:8")]
    made.clear()
    (tmp_path / "runs/distill-none/seed-6/results.json").write_text("{")                   # cut off
    version[0] = "two"
    ablate.run_all(rows, arguments(tmp_path))
    assert made == [("none", 6, "toy:6")] and "5 of the runs found" in capsys.readouterr().out
    made.clear()
    ablate.run_all(rows, arguments(tmp_path, further=["--steps", "7"]))
    ablate.run_all(rows, arguments(tmp_path))
    assert len(made) == 6, "other flags, other runs, beside the first ones"


def test_a_seed_decides_the_world_unless_the_row_does(tmp_path):
    flags, out = ablate.variant("--dataset toy:1", 4, arguments(tmp_path, further=["--steps", "9"]))
    args = train.parse(flags)
    assert (args.dataset, args.seed, args.steps) == ("toy:1", 4, 9) and out.name == "seed-4"
    for seed, unseen in ((5, "a, b"), (6, "c"), (7, "a, b")):                              # from the first seed on
        args = train.parse(ablate.variant("--distill none", seed, arguments(tmp_path, dataset="folder:x", unseen=["a, b", "c"]))[0])
        assert (args.unseen, args.pretrained, args.clip, args.seed) == (unseen, "crops", "tiny", seed)


@pytest.mark.parametrize("wrong, sentence", [
    (dict(seeds=0), "--seeds 0"), (dict(seeds=1, verb="spread"), "nothing to compare"), (dict(jobs=0), "--jobs 0"),
    (dict(dataset="folder:x"), "needs --unseen"), (dict(dataset="folder:x", verb="spread"), "only ablate and curve"),
    (dict(dataset="folder:x", unseen=["a", "b"]), "no multiple of the 2 lists"), (dict(unseen=["a"]), "--unseen is for pictures"),
    (dict(dataset="toy:3"), "--dataset toy:3"), (dict(dataset="folder:nowhere", unseen=["a"]), "nowhere"),
    (dict(further=["--distill", "none"]), "--distill can't be given for all runs"), (dict(further=["--seed=3"]), "--seed=3 can't")])
def test_what_cant_be_run_is_refused(tmp_path, wrong, sentence):
    with pytest.raises(ValueError, match=sentence):
        ablate.run_all({"plain": "--distill none"}, arguments(tmp_path, **wrong))


def test_rows_that_match_nothing(tmp_path):
    with pytest.raises(ValueError, match="--rows tap: no row has that in its name; they are head only, plain"):
        ablate.ablate(arguments(tmp_path, rows=["frozen", "tap"]))


def test_a_failed_run_does_not_stop_the_others(tmp_path, folder):
    command = ["study.py", "ablate", "--dataset", f"folder:{folder}", "--unseen", "blue thing", "--seeds", "2", "--rows", "frozen", "--steps", "2",
               "--pretrained", "none", "--out", tmp_path / "o"]
    blocked = tmp_path / "o/runs" / ablate.variant(ablate.PARTS["RPMD, frozen teacher"], 2, arguments(
        tmp_path, dataset=f"folder:{folder}", unseen=["blue thing"], further=["--steps", "2", "--pretrained", "none"]))[1].relative_to(tmp_path / "runs")
    (blocked / "log.jsonl").mkdir(parents=True)                                            # where a file should go
    done = run(*command, check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr and not (tmp_path / "o/ablate.md").exists()
    assert "1 of 4 runs failed; the same command tries them again" in done.stderr and "exit status 1" in done.stderr and "log.jsonl" in done.stderr
    assert len(list((tmp_path / "o/runs").glob("*/seed-*/results.json"))) == 3
    (blocked / "log.jsonl").rmdir()
    run(*command)
    assert (tmp_path / "o/ablate.md").exists()


def test_pictures_end_to_end(tmp_path, folder):
    command = ["study.py", "ablate", "--dataset", f"folder:{folder}", "--unseen", "red thing", "green thing, blue thing", "--seeds", "2",
               "--rows", "frozen", "--steps", "2", "--pretrained", "none", "--out", tmp_path / "o"]
    done = run(*command)
    found = json.loads((tmp_path / "o/ablate.json").read_text())
    assert [row["row"] for row in found["rows"]] == ["CLIP, zero-shot", "plain fine-tuning", "RPMD, frozen teacher"]
    assert all(list(row["seeds"]) == ["1", "2"] for row in found["rows"]) and found["correlations"]["runs"] == 4
    held_out = [json.loads(p.read_text())["args"]["unseen"] for p in sorted((tmp_path / "o/runs").glob("*distill-none*/*/results.json"))]
    assert held_out == ["red thing", "green thing, blue thing"]
    assert (tmp_path / "o/ablate.md").read_text().strip() in done.stdout and (tmp_path / "o/ablate.png").stat().st_size > 5000
    assert not list((tmp_path / "o").rglob("last.pt"))
    before = {p: p.stat().st_mtime for p in (tmp_path / "o/runs").rglob("results.json")}
    run(*command)
    assert before == {p: p.stat().st_mtime for p in (tmp_path / "o/runs").rglob("results.json")}


def test_names_held_out(folder):
    whole, part = (data.open_dataset(f"folder:{folder}", None, "train", unseen=u) for u in (None, "green thing"))
    assert part.names == ["red thing", "blue thing"] and len(part) == len(whole)
    labels, seen = whole.load(0)[1], part.load(0)[1]
    expected = np.vectorize({0: 0, 1: IGNORE, 2: 1, IGNORE: IGNORE}.get)(labels)
    assert (seen == expected).all() and (labels == IGNORE).any() and (seen == 1).any()
    with pytest.raises(data.DataError, match="--unseen grey thing: the dataset has no such name"):
        data.open_dataset(f"folder:{folder}", None, "train", unseen="grey thing")
    with pytest.raises(data.DataError, match="--unseen names 'red thing' twice"):
        data.open_dataset(f"folder:{folder}", None, "train", unseen="red thing, red thing")
    with pytest.raises(data.DataError, match="every name"):
        data.open_dataset(f"folder:{folder}", None, "train", unseen=whole.names)


def test_crops_carry_the_names_of_what_they_show(folder):
    """The classes of this dataset are colours: the points of a crop that have a label show its colour."""
    dataset, rng = data.open_dataset(f"folder:{folder}", None, "train"), np.random.default_rng(0)
    right = []
    for view, side in zip(toy.crop_views(dataset), (32, 64)):
        for _ in range(20):
            image, labels = view(rng)
            assert image.shape == (side, side, 3) and image.dtype == np.uint8 and set(labels.flat) <= {IGNORE, 0, 1, 2}
            middle = ((np.arange(6) + 0.5) * side / 6).astype(int)
            right.append((image[middle][:, middle].argmax(-1) == labels).mean())
    assert np.mean(right) > 0.85                                                           # borders between cells blur


def test_a_clip_from_crops_repeats_itself_and_is_cached(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("RPMD_CACHE", str(tmp_path / "cache"))
    dataset = data.open_dataset(f"folder:{folder}", None, "train")
    short = dict(names=dataset.names, views=toy.crop_views(dataset), steps=(3, 1), batches=(8, 4), progress=False)
    first, again = toy.pretrain(0, **short), toy.pretrain(0, **short)
    assert all(torch.equal(first[k], again[k]) and first[k].isfinite().all() for k in first)
    monkeypatch.setattr(toy, "pretrain", lambda *_, **__: first)
    monkeypatch.setattr(sys, "argv", ["train.py", "--dataset", f"folder:{folder}", "--clip", "tiny", "--pretrained", "crops", "--unseen",
                                      "red thing", "--steps", "1", "--tpa-steps", "1", "--batch-size", "2", "--out", str(tmp_path / "o")])
    train.train(train.parse(), 0, 1, torch.device("cpu"))
    assert len(list((tmp_path / "cache").glob("crops-clip-0-*.pt"))) == 1
    scores = json.loads((tmp_path / "o/results.json").read_text())
    assert set(scores["shift"]) >= set(study.SHIFTS) and {"seen", "unseen", "harmonic"} <= set(scores["trained"])
    assert list(scores["classes"]) == ["red thing", "green thing", "blue thing"]


def made_up(monkeypatch, trained):
    def make(flags, out):
        args = train.parse(flags)
        return {**results(args.seed), "trained": dict.fromkeys(("seen", "unseen", "harmonic"), trained(args))}
    monkeypatch.setattr(ablate, "run", make)


def test_curve_compares_best_with_best(tmp_path, monkeypatch):
    """Made-up scores that peak at another rate for every method: the differences are those of the peaks, seed by seed."""
    peak = {"none": 1, "frozen": 2, "rpmd": 3}
    place = lambda args: ablate.RATES.index(f"{args.clip_lr_factor:g}")
    made_up(monkeypatch, lambda args: 50.0 + args.seed - (place(args) - peak[args.distill]) ** 2 +
            (args.distill == "rpmd") * (2 + 0.5 * args.seed))
    ablate.curve(arguments(tmp_path, verb="curve", first_seed=1))
    found = json.loads((tmp_path / "curve.json").read_text())
    assert list(found["best"].values()) == [ablate.RATES[i] for i in (1, 2, 3)]
    at_plain, *at_best = found["gains"].values()
    assert at_plain[ablate.RPMD]["harmonic"]["each"] == [-1.5, -1, -0.5] and at_plain[ablate.METHODS[1]]["seen"]["mean"] == -1
    for gains in at_best:
        assert gains[ablate.RPMD]["harmonic"]["each"] == [2.5, 3.0, 3.5] and gains[ablate.METHODS[1]]["unseen"]["mean"] == 0
    assert "the end of the range" not in (tmp_path / "curve.md").read_text()
    assert (tmp_path / "curve.png").stat().st_size > 5000
    assert len(found["rows"]) == 17 and all(len(row["seeds"]) == 3 for row in found["rows"])


def test_luck_at_one_rate_is_no_gain(tmp_path, monkeypatch):
    """Every method is as good at every rate, but for one seed's luck at one of them: it counts among the best over all seeds,
    and not where that seed's rate is chosen without it."""
    made_up(monkeypatch, lambda args: 50.0 + 9 * (args.distill == "rpmd" and args.seed == 2 and args.clip_lr_factor == 1))
    ablate.curve(arguments(tmp_path, verb="curve", first_seed=1))
    gains = json.loads((tmp_path / "curve.json").read_text())["gains"]
    each = {choice: by_method[ablate.RPMD]["harmonic"]["each"] for choice, by_method in gains.items()}
    assert list(each.values()) == [[0, 0, 0], [0, 9, 0], [0, 0, 0]]
    assert f"{ablate.RPMD}: 53.0, at 1, the end of the range" in (tmp_path / "curve.md").read_text()


def test_spread_and_sweep(tmp_path, monkeypatch):
    monkeypatch.setattr(toy, "clip_checkpoint", lambda seed: tmp_path / "with space" / "clip.pt")
    seen = []
    made_up(monkeypatch, lambda args: seen.append((args.dataset, args.seed, args.pretrained)) or
            30.0 + args.seed * (args.distill == "rpmd") + 4 * (args.distill == "rpmd" and args.dataset == "toy:2"))
    ablate.spread(arguments(tmp_path, verb="spread", first_seed=1))
    found = json.loads((tmp_path / "spread.json").read_text())
    clip = str(tmp_path / "with space" / "clip.pt")
    assert set(seen) == {("toy:1", s, "toy") for s in (1, 2, 3)} | {(f"toy:{s}", 1, clip) for s in (1, 2, 3)} | {(f"toy:{s}", s, "toy") for s in (1, 2, 3)}
    assert found["deviation"] == pytest.approx({"training seed": 1.0, "split and scenes": np.std([1, 5, 1], ddof=1),
                                                "all, CLIP too": np.std([1, 6, 3], ddof=1)})
    ablate.sweep(arguments(tmp_path, verb="sweep"))
    rows = json.loads((tmp_path / "sweep.json").read_text())["rows"]
    assert [row["row"] for row in rows if "against_plain" not in row] == ["plain fine-tuning, 0.1"] and len(rows) == len(ablate.SWEEP)
    assert rows[-1]["against_plain"]["unseen"]["each"] == [5, 6, 7]


def test_every_row_has_flags_that_train_takes_and_a_folder_of_its_own(tmp_path):
    """Also with the rate of the table, whose runs the curve finds again."""
    args = arguments(tmp_path)
    rows = [*(f"{flags} {ablate.RATE}" for flags in ablate.PARTS.values()), *ablate.SWEEP.values()]
    made = [ablate.variant(flags, 1, args) for flags in rows]
    for flags, _ in made:
        train.parse(flags)
    assert len({out for _, out in made}) == len(set(rows))
    assert ablate.RATE.split()[1] in ablate.RATES


def test_a_stopped_comparison_leaves_no_run_behind(tmp_path, folder):
    """SIGTERM to the parent alone: no child trains on, and nothing is broken."""
    command = [sys.executable, ablate.HERE / "study.py", "ablate", "--dataset", f"folder:{folder}", "--unseen", "blue thing", "--seeds", "1", "--rows",
               "frozen", "--steps", "100000", "--pretrained", "none", "--out", tmp_path / "o"]
    parent = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    deadline = time.time() + 120
    while not list((tmp_path / "o").rglob("log.jsonl")) and time.time() < deadline:
        time.sleep(0.2)
    assert list((tmp_path / "o").rglob("log.jsonl"))
    parent.terminate()
    _, errors = parent.communicate(timeout=120)
    assert parent.returncode == 130 and "Traceback" not in errors
    left = subprocess.run(["pgrep", "-f", str(tmp_path)], capture_output=True, text=True).stdout.split()
    assert not left
