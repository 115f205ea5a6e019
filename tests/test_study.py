"""The study: its statistics against plain loops and known cases, runs made once, and both verbs."""
import copy
import json
from itertools import combinations
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import evaluate
from data import open_dataset
from ema import MomentumEncoder
from losses import IGNORE
from study import shift, sweep
from study.__main__ import parse
from support.files import UserError


def cosine(a, b):
    return float(np.dot(a, b) / np.linalg.norm(a) / np.linalg.norm(b))


@torch.no_grad()
def moved(model, by=0.5):
    """A copy whose q and v projections lie elsewhere, as after training."""
    other = copy.deepcopy(model)
    torch.manual_seed(1)
    for name, p in other.named_parameters():
        if name.endswith(("q_proj_weight", "v_proj_weight")):
            p += by * p.std() * torch.randn_like(p)
    return other.eval()


@torch.no_grad()
def test_statistics_equal_loops(tiny, folder):
    """Each quantity, patch by patch; one of the four classes has no patches."""
    (folder / "classes.txt").write_text("red thing\ngreen thing\nblue thing\nnowhere")
    original, model = tiny.eval(), moved(tiny)
    dataset = open_dataset(f"folder:{folder}", None, "train")
    text, first_text = (evaluate.encode_names(m, dataset.names).numpy() for m in (model, original))
    reference, noisy, wrong, members = [], [], [], [[], [], []]
    for image, pixel_labels, _ in map(dataset.load, range(len(dataset))):
        view, _ = evaluate.views(image, 64, sliding=False)
        own, first = (m.encode_image(view)[0][0].numpy() for m in (model, original))
        small = pixel_labels[np.arange(64) * 60 // 64][:, np.arange(64) * 80 // 64]
        blocks = small.reshape(8, 8, 8, 8).swapaxes(1, 2).reshape(64, 64)  # [patches, pixels]
        labels = [np.bincount(block + 1).argmax() - 1 for block in blocks]  # IGNORE is -1
        dominant = np.bincount([g for g in labels if g != IGNORE]).argmax()
        for v, v0, g in zip(own, first, labels):
            if g == IGNORE:
                continue
            nearest = np.argmax([cosine(v, t) for t in text])
            first_nearest = np.argmax([cosine(v0, t) for t in first_text])
            members[g].append(v / np.linalg.norm(v))
            if first_nearest == g:
                reference.append(1 - cosine(v, v0))
            elif first_nearest == dominant:
                noisy.append(1 - cosine(v, v0))
            if nearest != g:
                wrong.append(nearest == dominant)
    assert min(len(reference), len(noisy), sum(wrong)) > 5
    means = [np.mean(own, 0) for own in members]
    within = [np.mean([1 - cosine(v, mean) for v in own]) for own, mean in zip(members, means)]
    expected = dict(
        shift_reference=np.mean(reference), shift_noisy=np.mean(noisy),
        shift_text=np.mean([1 - cosine(a, b) for a, b in zip(text, first_text)]),
        contamination=np.mean(wrong), patch_variance=np.mean(within),
        patch_separation=np.mean([1 - cosine(a, b) for a, b in combinations(means, 2)]),
        text_separation=np.mean([1 - cosine(a, b) for a, b in combinations(text, 2)]))
    assert shift.statistics(model, original, dataset) == pytest.approx(expected, rel=1e-3)
    same = shift.statistics(original, original, dataset)
    assert same["shift_reference"] == same["shift_text"] == 0
    dataset.load = lambda i, load=dataset.load: (load(i)[0], np.full((60, 80), IGNORE), "")
    numbers = shift.statistics(original, original, dataset)  # of no patches
    assert [key for key in numbers if numbers[key] is not None] == ["shift_text", "text_separation"]


def test_shift(tiny, folder, tmp_path, monkeypatch, capsys):
    """Correlations begin with three checkpoints: two are always on a line."""
    views = evaluate.views  # one view is quicker than five
    monkeypatch.setattr(evaluate, "views", lambda image, size, sliding: views(image, size, False))
    paths = [str(tmp_path / f"{by}.pt") for by in (0.1, 0.3, 0.5)]
    for path, by in zip(paths, (0.1, 0.3, 0.5)):
        torch.save(dict(config=tiny.config, model=moved(tiny, by).state_dict(),
                        original=tiny.state_dict(), names=["red thing"]), path)
    for count in (2, 3):
        shift.shift(parse(["shift", "--dataset", f"folder:{folder}", "--out", str(tmp_path),
                           "--checkpoints", *paths[:count]]))
        result = json.loads((tmp_path / "shift.json").read_text())
        rows = result["rows"]
        assert [row["checkpoint"] for row in rows] == ["original CLIP", *paths[:count]]
        assert (result["correlation"]["shift_text"] is None) == (count == 2)
    x, y = ([row[key] for row in rows[1:]] for key in ("shift_text", "unseen"))
    assert result["correlation"]["shift_text"] == pytest.approx(np.corrcoef(x, y)[0, 1])
    moves = [row["shift_reference"] for row in rows]
    assert moves[0] == 0 and sorted(moves) == moves and moves[3] > 2 * moves[1] > 0
    assert "| shift_noisy " in capsys.readouterr().out


def test_pictures(tiny, folder, tmp_path, monkeypatch):
    drawn, model = [], moved(tiny)
    monkeypatch.setattr(evaluate, "examples", lambda *arguments: drawn.append(arguments))
    momentum = MomentumEncoder(model.image_encoder, 0.9).state_dict()
    torch.save(dict(config=tiny.config, model=model.state_dict(), original=tiny.state_dict(),
                    momentum=momentum, args={"adapt": "both"}, names=["red thing"]),
               tmp_path / "c.pt")
    shift.pictures(parse(["pictures", "--dataset", f"folder:{folder}",
                          "--checkpoint", str(tmp_path / "c.pt")]))
    ((_, _, original, momentum, _, seen),) = drawn
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(momentum(x)[0], model.encode_image(x)[0])
    assert torch.equal(original.encode_image(x)[0], tiny.eval().encode_image(x)[0])
    assert seen == ["red thing"]


def test_interval_on_known_cases():
    p = 2 / 2 ** 6  # two of the 64 ways to choose signs
    assert sweep.interval([1.0] * 6) == pytest.approx((1, 1, 1, p), abs=0.004)
    values = np.random.default_rng(1).normal(0.3, 1, 200)
    mean, low, high, p = sweep.interval(values)
    error = values.std() / 200 ** 0.5  # of so many the mean is normal
    assert (low, high) == pytest.approx((mean - 1.96 * error, mean + 1.96 * error), abs=0.02)
    assert p < 0.001 and sweep.interval(values - values.mean())[3] > 0.99


@pytest.fixture
def stub(tmp_path, monkeypatch):
    """A sweep over a table whose train.py adds --gain to its score; it returns its runs."""
    calls = []

    def train(command, **options):
        flags = dict(zip(command[2::2], command[3::2]))
        calls.append(" ".join(flags[key] for key in ("--dataset", "--seed", "--gain")))
        flags["--out"].mkdir(parents=True)
        (flags["--out"] / "last.pt").write_text("weights")
        results = {}
        for name, gain in (("start", 0), ("trained", float(flags["--gain"]))):
            score = 30 + int(flags["--seed"]) + gain
            results[name] = dict(seen=60, unseen=score, harmonic=score,
                                 reference_share_teacher=0.5)
        (flags["--out"] / "results.json").write_text(json.dumps(results))
        return SimpleNamespace(returncode="--fail" in flags, stderr="why\nit was to fail")

    def run(table, *flags):
        (tmp_path / "demo.txt").write_text(f"A title\n\n{table}\n")
        calls.clear()
        args = parse(["sweep", "demo", "--out", str(tmp_path / "out"), *flags])
        args.run(args)
        return sorted(calls)

    monkeypatch.setattr(sweep, "TABLES", tmp_path)
    monkeypatch.setattr("subprocess.run", train)
    return run


def test_a_row_is_compared_with_the_first_of_its_setting(stub, tmp_path, capsys):
    gains = {"a": 1, "b": 3, "a, x": 10, "b, x": 8}
    stub("\n".join(f"{row} | --gain {gains[row]}" for row in gains), "--seeds=2", "--first-seed=5")
    table = capsys.readouterr().out
    assert " 38.5 (+2.0 [+2.0, +2.0]) |" in table and " 43.5 (-2.0 [-2.0, -2.0]) |" in table
    lines = [json.loads(line) for line in (tmp_path / "out/demo.jsonl").read_text().splitlines()]
    scores = [30 + seed + gain for gain in (*gains.values(), 0) for seed in (5, 6)]
    assert [line["unseen"] for line in lines] == scores and lines[-1]["row"] == "zero-shot CLIP"
    assert (tmp_path / "out/demo.png").exists() and not list(tmp_path.rglob("last.pt"))


def test_a_run_is_made_once_for_its_flags(stub, monkeypatch):
    monkeypatch.setattr(sweep, "report", lambda *of_runs: None)
    table = "plain | --gain 1\nours | --gain 3"
    assert stub(table, "--seeds=2") == ["toy:1 1 1", "toy:1 1 3", "toy:2 2 1", "toy:2 2 3"]
    assert stub(table, "--seeds=3") == ["toy:3 3 1", "toy:3 3 3"]
    others = stub("plain | --gain 1", "--seeds=2", "--steps", "5", "--gain", "9", "--seed", "9")
    assert others == ["toy:1 1 1", "toy:2 2 1"], "further flags count; the table's come before them"
    with pytest.raises(UserError, match="train.py .*--gain 4 .*failed: it was to fail"):
        stub("plain | --gain 4", "--fail", "yes")
