"""The analysis: every quantity against plain loops, both verbs from the command line."""
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import data
import evaluate
import model as segmenter
import study
from conftest import run
from ema import MomentumEncoder
from losses import IGNORE


def moved(model, by=0.3):
    """A copy of a segmenter whose q and v projections were moved a little."""
    other = segmenter.build("tiny", image_size=64, channels=32)
    other.load_state_dict(model.state_dict())
    torch.manual_seed(1)
    with torch.no_grad():
        for name, p in other.named_parameters():
            if name.endswith(("q_proj_weight", "v_proj_weight")):
                p += by * p.std() * torch.randn_like(p)
    return other.eval()


def cosine(a, b):
    return float(np.dot(a, b) / np.linalg.norm(a) / np.linalg.norm(b))


def statistics(model, original, dataset):
    with torch.no_grad():
        text = original.encode_text(original.tokenize(dataset.names))
    return study.shift_statistics(model, MomentumEncoder(original, 1.0), text, dataset)


def test_spread_equals_loops():
    rng = np.random.default_rng(0)
    vectors, classes = rng.normal(size=(30, 5)) + 0.5, rng.choice([0, 1, 3], 30)
    spread = study.Spread(5, 5, "cpu")
    for part in (slice(0, 13), slice(13, 30)):
        spread.add(torch.tensor(vectors[part]), torch.tensor(classes[part]))
    units = {c: [v / np.linalg.norm(v) for v, k in zip(vectors, classes) if k == c] for c in (0, 1, 3)}
    means = {c: sum(u) / len(u) for c, u in units.items()}
    variance = np.mean([np.mean([1 - cosine(u, means[c]) for u in units[c]]) for c in units])
    separation = np.mean([1 - cosine(means[a], means[b]) for a in units for b in units if a != b])
    assert spread.result() == pytest.approx((variance, separation), rel=1e-9)


def test_pearson():
    assert study.pearson([1, 2, 3, None], [2, 4, 6, 9]) == pytest.approx(1)
    x, y = [1.0, 2, 4, 8], [3.0, 1, 2, -5]
    a, b = np.array(x) - np.mean(x), np.array(y) - np.mean(y)
    assert study.pearson(x, y) == pytest.approx(a @ b / np.sqrt(a @ a * (b @ b)))
    assert study.pearson([1, 2], [3, 4]) is None and study.pearson([1, 1, 1], [1, 2, 3]) is None


def test_shift_statistics_equal_loops(tiny, folder):
    tiny.eval()
    target, dataset = moved(tiny), data.open_dataset(f"folder:{folder}", None, "train")
    got = statistics(target, tiny, dataset)
    with torch.no_grad():
        tokens = tiny.tokenize(dataset.names)
        text, first_text = target.encode_text(tokens).numpy(), tiny.encode_text(tokens).numpy()
        drifts, counts = {"reference": [], "noisy": []}, {"wrong": 0, "contaminated": 0, "right": 0}
        for i in range(len(dataset)):
            image, labels, _ = dataset.load(i)
            view = evaluate.views(image, 64, sliding=False)[0]
            big = F.interpolate(torch.tensor(labels).float()[None, None], (64, 64), mode="nearest")[0, 0].numpy()
            own, first = target.encode_image(view)[0][0].numpy(), tiny.encode_image(view)[0][0].numpy()
            grid = []
            for p in range(64):
                values, n = np.unique(big[p // 8 * 8:][:8, p % 8 * 8:][:, :8], return_counts=True)
                grid.append(int(values[n.argmax()]))
            dominant = np.bincount([g for g in grid if g != IGNORE]).argmax()
            for v, v0, g in zip(own, first, grid):
                if g == IGNORE:
                    continue
                guess, guess0 = (int(np.argmax([cosine(a, t) for t in ts])) for a, ts in ((v, text), (v0, first_text)))
                if guess0 == g:
                    drifts["reference"].append(1 - cosine(v, v0))
                elif guess0 == dominant:
                    drifts["noisy"].append(1 - cosine(v, v0))
                counts["right" if guess == g else "wrong"] += 1
                counts["contaminated"] += guess != g and guess == dominant
    assert min(len(d) for d in drifts.values()) > 5 and counts["contaminated"] > 5
    assert got["shift_reference"] == pytest.approx(np.mean(drifts["reference"]), rel=1e-3)
    assert got["shift_noisy"] == pytest.approx(np.mean(drifts["noisy"]), rel=1e-3)
    assert got["shift_text"] == pytest.approx(np.mean([1 - cosine(a, b) for a, b in zip(text, first_text)]), rel=1e-3)
    assert got["contamination"] == pytest.approx(counts["contaminated"] / counts["wrong"])
    assert got["right_share"] == pytest.approx(counts["right"] / (counts["right"] + counts["wrong"]))
    still = statistics(tiny, tiny, dataset)
    assert abs(still["shift_reference"]) < 1e-6 and abs(still["shift_text"]) < 1e-6
    assert still["text_variance"] > 0.001 and got["patch_separation"] != still["patch_separation"]


def checkpoint(path, model, original, names):
    state = {k: v for k, v in original.state_dict().items() if k.endswith(("q_proj_weight", "v_proj_weight"))}
    torch.save(dict(config=model.config, model=model.state_dict(), original=state, names=names, step=7, momentum=None,
                    args={"adapt": "both"}), path)


def test_both_verbs(tiny, folder, tmp_path):
    names = ["red thing", "blue thing"]
    for by in (0.1, 0.3, 0.5):
        checkpoint(tmp_path / f"{by}.pt", moved(tiny, by), tiny, names)
    files = [tmp_path / f"{by}.pt" for by in (0.1, 0.3, 0.5)]
    done = run("study.py", "shift", "--checkpoints", *files, "--dataset", f"folder:{folder}", "--out", tmp_path / "s", "--views", "whole")
    found = json.loads((tmp_path / "s/shift.json").read_text())
    assert [r["checkpoint"] for r in found["rows"]] == ["original CLIP", *map(str, files)]
    moves = [r["shift_reference"] for r in found["rows"]]
    assert moves[0] == pytest.approx(0, abs=1e-6) and sorted(moves) == moves and moves[3] > 2 * moves[1] > 0
    assert "shift_noisy" in done.stdout and "over 3 checkpoint(s)" in done.stdout and "unseen" in done.stdout
    pairs = [(r["shift_reference"], r["unseen"]) for r in found["rows"][1:]]
    assert found["correlation"]["shift_reference"] == pytest.approx(study.pearson(*zip(*pairs)), nan_ok=True)
    run("study.py", "pictures", "--checkpoint", files[0], "--dataset", f"folder:{folder}", "--out", tmp_path / "s", "--images", "2", "--views", "whole")
    assert {p.name for p in (tmp_path / "s").iterdir()} == {"shift.json", "shift.png", "pictures.png"}
    assert Image.open(tmp_path / "s/pictures.png").width == 5 * 200 + 8


def test_a_checkpoint_without_the_original_is_refused(tiny, tmp_path):
    torch.save(dict(config=tiny.config, model=tiny.state_dict()), tmp_path / "c.pt")
    done = run("study.py", "shift", "--checkpoints", tmp_path / "c.pt", "--out", tmp_path / "s", check=False)
    assert done.returncode == 1 and "does not hold the original CLIP's weights" in done.stderr and "Traceback" not in done.stderr
