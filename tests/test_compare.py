"""Comparisons over seeds: statistics against known numbers, runs found again or made again, the
verbs from the command line."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import train
from conftest import ROOT, run
from losses import IGNORE
from sources import tiny_clip
from sources.registry import open_dataset
from study import compare
from study.measures import SHIFTS
from support.errors import UserError


def results(seed, gain=0.0):
    """Made-up results of a run."""

    def score(plus):
        unseen = 30.0 + seed**2 + 2 * plus
        return {"seen": 50.0 + seed + plus, "unseen": unseen, "harmonic": 40.0 + seed - plus}

    shift = {"shift_reference": 0.1 * seed, "shift_noisy": 0.2, "shift_text": 0.3 - 0.1 * seed}
    return {
        "zero_shot": score(0),
        "trained": score(gain),
        "before_tpa": {"reference_share": 0.5, "reference_drift": 1e-9},
        "end": {"reference_share": 0.75, "reference_drift": 0.25},
        "shift": shift,
        "made_by": {"flags": [], "code": "", "minutes": 1.0},
    }


def summary(name, gains, base=None):
    """The summary of runs with these gains, {seed: gain}."""
    runs = {seed: compare.figures(results(seed, gain)) for seed, gain in gains.items()}
    return compare.summarise(name, runs, base)


def test_interval_by_hand():
    """Mean 2, standard deviation 2, and Student's t of 2 degrees of freedom, which tables give as
    4.303."""
    got = compare.interval([0, 2, 4])
    assert (got["mean"], got["sd"], got["above"], got["n"]) == (2, 2, 2, 3)
    assert got["high"] - 2 == pytest.approx(4.303 * 2 / 3**0.5, abs=2e-3)
    assert got["low"] == pytest.approx(4 - got["high"])
    assert compare.interval([-1, 1, 0])["above"] == 1


def test_rows_are_paired_by_seed():
    base = {seed: compare.figures(results(seed)) for seed in (3, 1, 2)}
    row = summary("a", {1: 1.0, 2: -1.0, 3: 3.0}, base)
    apart = row["against"]
    assert list(apart["seen"]["each"]) == [1, -1, 3] and apart["harmonic"]["above"] == 1
    assert list(apart["unseen"]["each"]) == [2, -2, 6]
    assert row["seen"]["mean"] == pytest.approx(53)
    assert row["seen"]["sd"] == pytest.approx(np.std([52, 51, 56], ddof=1))
    assert row["share_before"]["mean"] == 0.5 and row["share_after"]["mean"] == 0.75
    assert row["drift"]["mean"] == 0.25
    table = compare.markdown([row, summary("plain", {1: 0.0, 2: 0.0})])
    assert "| +1.0 [-4.0, +6.0] |" in table and "2 of 3" in table and "0.50 → 0.75" in table
    start = {seed: compare.figures(results(seed, gain=9.0), untrained=True) for seed in base}
    start = compare.summarise("zero-shot", start, base)
    assert start["against"]["unseen"]["mean"] == 0
    assert start["share_after"]["mean"] == 0.5 and start["drift"]["mean"] == 0
    base[1]["unseen"] = base[1]["harmonic"] = None
    with pytest.raises(UserError, match="a, seed 1: none of the seen, or none of the unseen names"):
        compare.summarise("a", base)


def test_correlations():
    """As they are, and after every seed's mean over rows is taken away: easy worlds with large
    shifts say nothing then."""
    of_rows = [{1: 1.0, 2: 4.0, 3: 2.0}, {1: 0.0, 2: 1.0, 3: 5.0}]
    of_rows = [{s: compare.figures(results(s, gain)) for s, gain in g.items()} for g in of_rows]
    for runs in of_rows:
        for seed, figures in runs.items():
            figures["shift_text"] = 10.0 * seed - figures["seen"]  # in a seed, falls as it rises
    rows = [compare.summarise("", runs) for runs in of_rows]
    found, within_seeds = compare.correlations(rows)
    expected = np.corrcoef([1, 2, 3] * 2, [33, 42, 43, 31, 36, 49])[0, 1]
    assert found["shift_reference"] == pytest.approx(expected)
    assert found["shift_noisy"] is within_seeds["shift_noisy"] is None
    assert within_seeds["shift_text"] == pytest.approx(-1) and found["shift_text"] > -0.9
    assert within_seeds["shift_reference"] is None
    text = compare.describe_correlations(rows)
    assert f"6 runs: shift of reference patches {expected:+.2f}, shift of noisy patches not" in text
    assert text.endswith("shift of texts -1.00.")
    of_rows[1][2]["shift_text"] = None  # a seed with one row left: no pair
    rows = [compare.summarise("", runs) for runs in of_rows]
    expected = np.corrcoef([-0.5, 0.5, 0, 1.5, -1.5], [1, -1, 0, -3, 3])[0, 1]
    assert compare.correlations(rows)[1]["shift_text"] == pytest.approx(expected)


def arguments(tmp_path, **more):
    usual = dict(verb="ablate", dataset="toy", unseen=None, seeds=3, first_seed=5, jobs=2)
    usual |= dict(rows=None, against="plain", further=[], out=str(tmp_path))
    return SimpleNamespace(**{**usual, **more})


def in_place_of_train(monkeypatch, make):
    """Programs that write make(flags of train.py) to results.json."""

    class Program:
        def __init__(self, command, stdout, stderr):
            args = train.parse(command[2:])
            Path(args.out, "results.json").write_text(json.dumps(make(args)))

        def wait(self):
            return 0

        def terminate(self):
            pass

    monkeypatch.setattr(compare.subprocess, "Popen", Program)


def test_every_row_has_the_same_seeds_and_runs_are_made_once(tmp_path, monkeypatch, capsys):
    made, version = [], ["one"]

    def make(args):
        made.append((args.distill, args.seed, args.dataset))
        time.sleep(0.02 if args.seed == 5 else 0)  # the first one ends last
        return results(args.seed)

    in_place_of_train(monkeypatch, make)
    monkeypatch.setattr(compare, "code", lambda: version[0])
    rows = {"plain": "--distill none", "rpmd": "--distill rpmd --clip-lr-factor 0.1"}
    found = compare.compare(arguments(tmp_path, jobs=3), rows, {"": "plain"})
    assert sorted(made) == [(d, s, f"toy:{s}") for d in ("none", "rpmd") for s in (5, 6, 7)]
    assert [row["row"] for row in found] == ["untrained CLIP", "plain", "rpmd"]
    assert [list(row["seeds"]) for row in found] == [[5, 6, 7]] * 3, "in order"
    assert found[1]["seeds"][6]["unseen"] == results(6)["trained"]["unseen"]
    assert ["against" in row for row in found] == [True, False, True]
    made.clear()
    compare.compare(arguments(tmp_path, seeds=4), rows, {"": "plain"})
    assert sorted(made) == [("none", 8, "toy:8"), ("rpmd", 8, "toy:8")]
    made.clear()
    assert "another version" not in capsys.readouterr().out
    (tmp_path / "runs/distill-none/seed-6/results.json").write_text("{")  # cut off
    version[0] = "two"
    compare.compare(arguments(tmp_path), rows, {"": "plain"})
    assert made == [("none", 6, "toy:6")] and "another version" in capsys.readouterr().out
    made.clear()
    compare.compare(arguments(tmp_path, jobs=1, further=["--steps", "7"]), rows, {"": "plain"})
    compare.compare(arguments(tmp_path), rows, {"": "plain"})
    assert len(made) == 6, "other flags, other runs, beside the first ones"
    assert [run[1] for run in made] == [5, 6, 7] * 2, "a seed's CLIP is made by one run"


def test_a_seed_decides_the_world_unless_the_row_does(tmp_path):
    args = arguments(tmp_path, further=["--steps", "9"])
    flags, out = compare.variant("--dataset toy:1", 4, args)
    parsed = train.parse(flags)
    assert (parsed.dataset, parsed.seed, parsed.steps) == ("toy:1", 4, 9)
    assert out == tmp_path / "runs/steps-9-dataset-toy-1/seed-4"
    args = arguments(tmp_path, dataset="folder:x", unseen=["a, b", "c"])
    for seed, unseen in ((5, "a, b"), (6, "c"), (7, "a, b")):  # from the first seed on
        flags, out = compare.variant("--distill none", seed, args)
        parsed = train.parse(flags)
        assert (parsed.unseen, parsed.pretrained, parsed.clip) == (unseen, "crops", "tiny")
        assert out == tmp_path / f"runs/distill-none-folder-x/seed-{seed}"


@pytest.mark.parametrize(
    "wrong, sentence",
    [
        (dict(seeds=1), "--seeds 1: what chance does takes two or more"),
        (dict(dataset="folder:x"), "--dataset folder:x: ablate takes .* and --unseen .* together"),
        (dict(unseen=["a"]), "--dataset toy: ablate takes toy, or folder:PATH"),
        (dict(dataset="toy:3"), "--dataset toy:3: ablate takes toy, or folder:PATH"),
        (dict(dataset="toy:3", unseen=["a"]), "--dataset toy:3: ablate takes toy, or folder:PATH"),
        (dict(dataset="folder:nowhere", unseen=["a"]), "nowhere"),
        (dict(further=["--distill", "none"]), "--distill can't be given for all runs"),
        (dict(further=["--seed=3"]), "--seed=3 can't be given"),
    ],
)
def test_what_cant_be_run_is_refused(tmp_path, wrong, sentence):
    with pytest.raises(UserError, match=sentence):
        compare.compare(arguments(tmp_path, **wrong), {"plain": "--distill none"}, {"": "plain"})


def test_lists_that_do_not_fit_are_refused(tmp_path, folder):
    for lists, sentence in (
        (["red thing", "blue thing"], "--seeds 3 is no multiple of the 2 lists of --unseen"),
        (["red thing, blue"], "--unseen blue: the dataset has no such name"),
    ):
        with pytest.raises(UserError, match=sentence):
            args = arguments(tmp_path, dataset=f"folder:{folder}", unseen=lists)
            compare.compare(args, {"plain": "--distill none"}, {"": "plain"})


def test_rows_that_match_nothing(tmp_path):
    with pytest.raises(UserError, match="--rows tap: no row has .* they are plain fine-tuning; "):
        compare.tabulate(arguments(tmp_path, rows=["frozen", "tap"]))


class Forked:
    """subprocess.Popen that takes less time: train.py by the tests' fork server, to its end."""

    def __init__(self, command, stdout, stderr):
        done = run(*command[1:], check=False)
        stdout.write(done.stdout + done.stderr)
        self.returncode = done.returncode

    def wait(self):
        return self.returncode

    def terminate(self):
        pass


def test_pictures_end_to_end(tmp_path, folder, capsys, monkeypatch):
    """One row and two splits, one run of which can't write to its folder at first: it does not stop
    the other, and the same command makes it alone."""
    run("train.py", "--help")  # starts the server, by the real Popen
    monkeypatch.setattr(compare.subprocess, "Popen", Forked)
    lists, further = ["red thing", "green thing, blue thing"], ["--steps", "2"]
    further += ["--pretrained", "none"]
    more = dict(
        dataset=f"folder:{folder}", unseen=lists, seeds=2, first_seed=1, further=further, jobs=1
    )
    args = arguments(tmp_path, rows=["plain fine-tuning"], **more)
    flags, blocked = compare.variant(compare.read_table("ablate")["plain fine-tuning"], 1, args)
    (blocked / ".lock").mkdir(parents=True)  # where a file should go
    with pytest.raises(UserError, match="1 of 2 runs failed; the same command tries") as refused:
        compare.tabulate(args)
    assert re.search("exit status 1, .* error: .*seed-1 can't be written to", str(refused.value))
    assert not (tmp_path / "ablate.md").exists()
    [other] = tmp_path.rglob("results.json")
    before = other.stat().st_mtime

    (blocked / ".lock").rmdir()
    compare.tabulate(args)
    assert (tmp_path / "ablate.md").read_text().strip() in capsys.readouterr().out
    assert (tmp_path / "ablate.png").stat().st_size > 5000 and not list(tmp_path.rglob("last.pt"))
    lines = [json.loads(line) for line in (tmp_path / "ablate.jsonl").read_text().splitlines()]
    rows = ["untrained CLIP", "plain fine-tuning"]
    assert [(line["row"], line["seed"]) for line in lines] == [(r, s) for r in rows for s in (1, 2)]
    made_later = lines[2]
    assert [line["flags"][line["flags"].index("--unseen") + 1] for line in lines] == lists * 2
    assert len(list(tmp_path.rglob("results.json"))) == 2 and other.stat().st_mtime == before
    trained = json.loads((blocked / "results.json").read_text())
    assert trained["args"]["unseen"] == lists[0]
    assert made_later["seen"] == trained["trained"]["seen"] and made_later["minutes"] > 0
    made_by = {key: made_later[key] for key in ("flags", "code", "minutes")}
    assert trained["made_by"] == made_by
    assert (made_by["flags"], made_by["code"]) == (flags, compare.code())


def test_the_fingerprint_is_of_all_code_but_tests(tmp_path, monkeypatch):
    for file in ("train.py", "sources/toy.py", "support/runs.py", "study/rivals.py"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text("1")
    monkeypatch.setattr(compare, "ROOT", tmp_path)
    found = {compare.code()}
    for file in tmp_path.rglob("*.py"):
        file.write_text("2")
        found.add(compare.code())
    assert len(found) == 5
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests/test_toy.py").write_text("3")
    assert compare.code() in found


def test_crops_carry_the_names_of_what_they_show(folder):
    """The classes of this dataset are colours: the points of a crop that have a label show its
    colour."""
    dataset = open_dataset(f"folder:{folder}", None, "train")
    rng, right = np.random.default_rng(0), []
    for view, side in zip(tiny_clip.crop_views(dataset), (32, 64)):
        for _ in range(20):
            image, labels = view(rng)
            assert image.shape == (side, side, 3) and image.dtype == np.uint8
            assert set(labels.flat) <= {IGNORE, 0, 1, 2}
            middle = ((np.arange(6) + 0.5) * side / 6).astype(int)
            right.append((image[middle][:, middle].argmax(-1) == labels).mean())
    assert np.mean(right) > 0.85  # borders between cells blur


def test_a_run_with_a_clip_from_crops(folder, tmp_path, monkeypatch):
    """What a comparison on pictures asks of train.py: pre-trained once, scored apart, measured."""
    monkeypatch.setenv("RPMD_CACHE", str(tmp_path / "cache"))
    pretrain, short = tiny_clip.pretrain, dict(steps=(3, 1), batches=(8, 4), progress=False)
    monkeypatch.setattr(tiny_clip, "pretrain", lambda *args, **_: pretrain(*args, **short))
    args = arguments(tmp_path, dataset=f"folder:{folder}", unseen=["red thing"], first_seed=0)
    flags, out = compare.variant("--steps 1 --tpa-steps 1 --batch-size 2", 0, args)
    assert train.train(train.parse([*flags, "--out", str(out)])) == 0
    assert len(list((tmp_path / "cache").glob("crops-clip-0-*.pt"))) == 1
    found = json.loads((out / "results.json").read_text())
    assert list(found["classes"]) == ["red thing", "green thing", "blue thing"]
    figures = compare.figures({**found, "made_by": {}})
    assert set(figures) > {*SHIFTS, *compare.METRICS} and None not in figures.values()


def made_up(monkeypatch, trained):
    """Runs whose three scores are all what trained(flags of train.py) gives."""

    def make(args):
        scores = dict.fromkeys(("seen", "unseen", "harmonic"), trained(args))
        return {**results(args.seed), "trained": scores}

    in_place_of_train(monkeypatch, make)


TABLE = """What is made up.

plain, slow         | --distill none --clip-lr-factor 0.1
plain, fast         | --distill none --clip-lr-factor 1
head only           | --distill none --adapt none --tpa-steps 0
ours, slow          | --distill rpmd --clip-lr-factor 0.1
ours, fast          | --distill rpmd --clip-lr-factor 1
"""


@pytest.fixture
def made_up_table(tmp_path, monkeypatch):
    path = tmp_path / "made_up.txt"
    path.write_text(TABLE)
    monkeypatch.setitem(compare.TABLES, "made_up", path)
    return arguments(tmp_path, verb="made_up")


def test_a_row_is_paired_with_one_of_its_setting(made_up_table, tmp_path, monkeypatch):
    """Plain fine-tuning loses 20 where it is fast, the other 8 of it, and wins 3 to 5 by seed
    where it is slow."""

    def trained(args):
        gain = args.seed - 2 if args.distill == "rpmd" else 0
        fast = args.clip_lr_factor == 1
        return 50.0 - (20 if fast else 0) + gain + (8 if fast and args.distill == "rpmd" else 0)

    made_up(monkeypatch, trained)
    compare.tabulate(made_up_table)
    text = (tmp_path / "made_up.md").read_text()
    assert (tmp_path / "made_up.png").stat().st_size > 5000
    table = text.partition("\n\n")[0].splitlines()[2:]
    lines = {line.split("|")[1].strip(): line for line in table}
    assert list(lines) == ["untrained CLIP", *compare.read_table("made_up")]
    assert lines["ours, slow"].count("+4.0 [+1.5, +6.5]") == 3
    assert lines["ours, fast"].count("+12.0 [+9.5, +14.5]") == 3
    for row in ("untrained CLIP", "plain, slow", "plain, fast", "head only"):
        assert "[" not in lines[row], row
    assert "mean paired difference to plain (of the same setting)" in text
    assert "over 12 runs:" in text and "over 6 runs at fast:" in text and "at head" not in text
    assert len((tmp_path / "made_up.jsonl").read_text().splitlines()) == 6 * 3


def test_differences_to_another_row(made_up_table, tmp_path, monkeypatch):
    made_up(monkeypatch, lambda args: 50.0 + (args.seed if args.distill == "rpmd" else 0))
    made_up_table.against, made_up_table.rows = "ours", ["slow"]
    compare.tabulate(made_up_table)
    text = (tmp_path / "made_up.md").read_text()
    assert "| plain, slow " in text and "-6.0 [-8.5, -3.5]" in text and "head only" not in text
    assert "paired difference to ours (of" in text
    named = {"RPMD without TPA": "", "RPMD": "", "plain, 1": "", "RPMD, 1": ""}
    assert compare.bases(named, "RPMD") == {"": "RPMD", "1": "RPMD, 1"}
    assert compare.bases(named, "TPA") == {"": "RPMD without TPA"}
    assert compare.matching(["RPMD"], named, "--rows") == ["RPMD", "RPMD, 1"]
    assert compare.matching(["RPMD, 1"], named, "--rows") == ["RPMD, 1"]
    assert compare.matching(["plain", "without"], named, "") == ["RPMD without TPA", "plain, 1"]
    made_up_table.against = "theirs"
    with pytest.raises(UserError, match="--against theirs: no row has that in its name"):
        compare.tabulate(made_up_table)


def test_p_values_by_hand():
    """t = 2 / (2 / sqrt 3) = 1.732 of 2 degrees of freedom; Holm's correction of 4 p values as in
    a table: times 4, 3, 2, 1 in their order, and never below one before."""
    assert compare.interval([0, 2, 4])["p"] == pytest.approx(0.2254, abs=1e-4)
    assert compare.interval([1, 1])["p"] == 0 and compare.interval([0, 0])["p"] == 1
    corrected = compare.holm([0.04, 0.01, 0.03, 0.005])
    assert list(corrected) == pytest.approx([0.06, 0.03, 0.06, 0.02])
    assert list(compare.holm([0.9, 0.8])) == [1, 1]


@pytest.mark.parametrize("verb", compare.TABLES)
def test_every_row_has_flags_that_train_takes_and_a_folder_of_its_own(tmp_path, verb):
    rows = compare.read_table(verb)
    made = [compare.variant(flags, 1, arguments(tmp_path)) for flags in rows.values()]
    for flags, out in made:
        train.parse(flags)
        assert len(out.parent.name) < 200
    assert len({out for _, out in made}) == len(rows) > 3
    assert compare.TABLES[verb].read_text().splitlines()[0].endswith(".")
    assert compare.matching(["plain fine-tuning"], rows, "--against")


def test_a_stopped_comparison_leaves_no_run_behind(tmp_path, folder):
    """SIGTERM to the parent alone: no child trains on, and nothing is broken."""
    command = ["-m", "study", "ablate", "--unseen", "blue thing", "--seeds", "2", "--jobs", "2"]
    command += ["--rows", "frozen", "--steps", "100000"]
    command += ["--pretrained", "none", "--dataset", f"folder:{folder}", "--out", tmp_path / "o"]
    parent = subprocess.Popen(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    deadline = time.time() + 120
    while not list((tmp_path / "o").rglob("log.jsonl")) and time.time() < deadline:
        time.sleep(0.2)
    assert list((tmp_path / "o").rglob("log.jsonl"))
    parent.terminate()
    _, errors = parent.communicate(timeout=120)
    assert parent.returncode == 130 and "Traceback" not in errors
    left = subprocess.run(["pgrep", "-f", str(tmp_path)], capture_output=True, text=True).stdout
    assert not left.split()


def test_evaluations_on_the_way_are_kept_and_drawn(made_up_table, tmp_path, monkeypatch):
    """Of rows with an --eval-every: raw numbers for every run, and a picture of their means."""
    drawn = []

    def make(args):
        lines = [dict(step=2, total_loss=1.0)]
        for step in (2, 4) if args.clip_lr_factor == 1 else (4,):
            miou = args.seed + step
            lines.append(dict(step=step, unseen=miou, mIoU_union=9, reference_share=step / 10))
        Path(args.out, "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return results(args.seed)

    in_place_of_train(monkeypatch, make)
    monkeypatch.setattr(compare.pictures, "save_plot", lambda path, panels: drawn.append(panels))
    compare.tabulate(made_up_table)
    runs = [json.loads(line) for line in (tmp_path / "made_up.jsonl").read_text().splitlines()]
    kept = {(run["row"], run["seed"]): run.get("evaluations") for run in runs}
    assert kept["ours, fast", 6] == [[2, 8, 0.2], [4, 10, 0.4]]
    assert kept["ours, slow", 6] == [[4, 10, 0.4]] and kept["untrained CLIP", 6] is None
    [[share, unseen]] = drawn
    assert [curve[0] for curve in unseen[3]] == ["plain, fast", "ours, fast"]
    _, x, y, _ = unseen[3][0]
    assert list(x) == [50, 100] and list(y) == [8, 10]
    assert list(share[3][0][2]) == pytest.approx([20, 40])


def test_rows_of_a_setting_without_a_base(made_up_table, tmp_path, monkeypatch):
    """They are shown without differences."""
    made_up(monkeypatch, lambda args: 50.0)
    made_up_table.rows = ["head only"]
    compare.tabulate(made_up_table)
    table = (tmp_path / "made_up.md").read_text().partition("\n\n")[0]
    assert "| head only" in table and "| plain" not in table and "[" not in table
