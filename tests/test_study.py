"""The measures of one model against plain loops, and the verbs that read checkpoints."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import evaluate
from conftest import run
from data import open_dataset
from ema import frozen_copy
from losses import IGNORE
from model import build
from study import measures
from study.__main__ import parse
from support.errors import UserError


def moved(model, by=0.3):
    """A copy of a segmenter whose q and v projections were moved a little."""
    other = build("tiny", image_size=64, channels=32)
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
    encoder = frozen_copy(original.image_encoder)
    return measures.shift_statistics(model, encoder, text, dataset)


def test_dispersion_equals_loops():
    """Of five classes, of which two are empty."""
    rng = np.random.default_rng(0)
    classes = rng.choice([0, 1, 3], 30)
    units = [v / np.linalg.norm(v) for v in rng.normal(size=(30, 5)) + 0.5]
    by_class = {c: [u for u, k in zip(units, classes) if k == c] for c in (0, 1, 3)}
    sums, counts = np.zeros((5, 5)), np.zeros(5)
    for c, vectors in by_class.items():
        sums[c], counts[c] = sum(vectors), len(vectors)
    variance = np.mean([np.mean([1 - cosine(u, sums[c]) for u in by_class[c]]) for c in by_class])
    pairs = [(a, b) for a in by_class for b in by_class if a != b]
    separation = np.mean([1 - cosine(sums[a], sums[b]) for a, b in pairs])
    sums, counts = torch.tensor(sums), torch.tensor(counts)
    assert measures.dispersion(sums, counts) == pytest.approx((variance, separation), rel=1e-9)
    assert measures.dispersion(sums[:1], counts[:1])[1] is None
    assert measures.dispersion(sums[2:3], counts[2:3]) == (None, None)


def test_pearson():
    assert measures.pearson([1, 2, 3, None], [2, 4, 6, 9]) == pytest.approx(1)
    x, y = [1.0, 2, 4, 8], [3.0, 1, 2, -5]
    a, b = np.array(x) - np.mean(x), np.array(y) - np.mean(y)
    assert measures.pearson(x, y) == pytest.approx(a @ b / np.sqrt(a @ a * (b @ b)))
    assert measures.pearson([1, 2], [3, 4]) is None
    assert measures.pearson([1, 1, 1], [1, 2, 3]) is None
    x, y = [[1, 2, 30], [2, 4, None]], [[5, 1, 2], [6, 3, 4]]  # two columns are whole: +1, +2
    assert measures.pearson(x, y, within_columns=True) == pytest.approx(
        np.corrcoef([-0.5, 0.5, -1, 1, 0], [-0.5, 0.5, -1, 1, 0])[0, 1]
    )


def test_a_subset_is_spread_evenly(folder):
    dataset = open_dataset(f"folder:{folder}", None, "train")
    some, all_of_it = measures.Subset(dataset, 3), measures.Subset(dataset, 0)
    assert [some.load(i)[2] for i in range(len(some))] == [dataset.load(i)[2] for i in (0, 2, 5)]
    assert len(all_of_it) == len(measures.Subset(dataset, 99)) == 6


def patch_labels_by_counting(labels):
    """Labels [H,W] as an image of 64 x 64 -> the most frequent one in each of 8 x 8 patches."""
    labels = torch.tensor(labels).float()[None, None]
    large = F.interpolate(labels, (64, 64), mode="nearest")[0, 0].numpy()
    grid = []
    for p in range(64):
        patch = large[p // 8 * 8 :, p % 8 * 8 :][:8, :8]
        found, counts = np.unique(patch, return_counts=True)
        grid.append(int(found[counts.argmax()]))
    return grid


def test_shift_statistics_equal_loops(tiny, folder):
    tiny.eval()
    target, dataset = moved(tiny), open_dataset(f"folder:{folder}", None, "train")
    got = statistics(target, tiny, dataset)
    tokens = tiny.tokenize(dataset.names)
    with torch.no_grad():
        text, first_text = target.encode_text(tokens).numpy(), tiny.encode_text(tokens).numpy()
    drifts = {"reference": [], "noisy": []}
    counts = {"wrong": 0, "contaminated": 0, "right": 0}
    for i in range(len(dataset)):
        image, labels, _ = dataset.load(i)
        view = evaluate.views(image, 64, sliding=False)[0]
        with torch.no_grad():
            own = target.encode_image(view)[0][0].numpy()
            first = tiny.encode_image(view)[0][0].numpy()
        grid = patch_labels_by_counting(labels)
        dominant = np.bincount([g for g in grid if g != IGNORE]).argmax()
        for v, v0, g in zip(own, first, grid):
            if g == IGNORE:
                continue
            guess = int(np.argmax([cosine(v, t) for t in text]))
            first_guess = int(np.argmax([cosine(v0, t) for t in first_text]))
            if first_guess == g:
                drifts["reference"].append(1 - cosine(v, v0))
            elif first_guess == dominant:
                drifts["noisy"].append(1 - cosine(v, v0))
            counts["right" if guess == g else "wrong"] += 1
            counts["contaminated"] += guess != g and guess == dominant
    assert min(len(d) for d in drifts.values()) > 5 and counts["contaminated"] > 5
    shift_text = np.mean([1 - cosine(a, b) for a, b in zip(text, first_text)])
    assert got["shift_reference"] == pytest.approx(np.mean(drifts["reference"]), rel=1e-3)
    assert got["shift_noisy"] == pytest.approx(np.mean(drifts["noisy"]), rel=1e-3)
    assert got["shift_text"] == pytest.approx(shift_text, rel=1e-3)
    assert got["contamination"] == pytest.approx(counts["contaminated"] / counts["wrong"])
    labelled = counts["right"] + counts["wrong"]
    assert got["right_share"] == pytest.approx(counts["right"] / labelled)
    still = statistics(tiny, tiny, dataset)
    assert abs(still["shift_reference"]) < 1e-6 and abs(still["shift_text"]) < 1e-6
    assert still["text_variance"] > 0.001
    assert got["patch_separation"] != still["patch_separation"]


def test_nothing_labelled_is_no_number(tiny, folder):
    """A dataset without a labelled pixel: None instead of a division by zero."""
    dataset = open_dataset(f"folder:{folder}", None, "val")
    load = dataset.load
    dataset.load = lambda i: (load(i)[0], np.full((60, 80), IGNORE), "")
    got = statistics(tiny.eval(), tiny, dataset)
    assert {got[key] for key in ("shift_noisy", "contamination", "right_share")} == {None}
    assert got["shift_reference"] is got["patch_variance"] is got["patch_separation"] is None


def checkpoint(path, model, original, names):
    state = {
        k: v
        for k, v in original.state_dict().items()
        if k.endswith(("q_proj_weight", "v_proj_weight"))
    }
    contents = dict(config=model.config, model=model.state_dict(), original=state, names=names)
    torch.save(dict(contents, step=7, momentum=None, args={"adapt": "both"}), path)


def test_both_verbs(tiny, folder, tmp_path):
    names = ["red thing", "blue thing"]
    files = [tmp_path / f"{by}.pt" for by in (0.1, 0.3, 0.5)]
    for by, file in zip((0.1, 0.3, 0.5), files):
        checkpoint(file, moved(tiny, by), tiny, names)
    out = tmp_path / "new" / "s"
    where = ["--dataset", f"folder:{folder}", "--out", out]
    done = run("-m", "study", "shift", "--checkpoints", *files, *where)
    found = json.loads((out / "shift.json").read_text())
    assert [r["checkpoint"] for r in found["rows"]] == ["original CLIP", *map(str, files)]
    assert [r["step"] for r in found["rows"]] == [0, 7, 7, 7]
    moves = [r["shift_reference"] for r in found["rows"]]
    assert moves[0] == pytest.approx(0, abs=1e-6)
    assert sorted(moves) == moves and moves[3] > 2 * moves[1] > 0
    assert "| shift_noisy " in done.stdout and "unseen over 3 checkpoint(s)" in done.stdout
    pairs = [(r["shift_reference"], r["unseen"]) for r in found["rows"][1:]]
    expected = measures.pearson(*zip(*pairs))
    assert found["correlation"]["shift_reference"] == pytest.approx(expected)
    run("-m", "study", "pictures", "--checkpoint", files[0], *where, "--images", "2")
    assert {p.name for p in out.iterdir()} == {"shift.json", "shift.png", "pictures.png"}
    with Image.open(out / "pictures.png") as sheet:
        assert sheet.width == 5 * 200 + 8


def test_what_cant_be_read_or_written_is_a_sentence(tiny, tmp_path):
    file = tmp_path / "c.pt"
    torch.save(dict(config=tiny.config, model=tiny.state_dict()), file)
    with pytest.raises(UserError, match="c.pt does not hold the original CLIP's weights"):
        measures.read(file)
    command = ["-m", "study", "shift", "--checkpoints", file, "--out", file / "s"]
    done = run(*command, check=False)
    assert done.returncode == 1 and f"{file / 's'} can't be written to" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "command, flag",
    [
        ("shift --checkpoints a --images -1", "--images"),
        ("pictures --checkpoint a --images x", "--images"),
        ("ablate --seeds 0", "--seeds"),
        ("ablate --jobs 0", "--jobs"),
        ("ablate --first-seed -1", "--first-seed"),
        ("shift --checkpoints a --steps 3", "--steps"),
    ],
)
def test_flags_that_make_no_sense_are_refused(command, flag, capsys):
    with pytest.raises(SystemExit):
        parse(command.split())
    assert flag in capsys.readouterr().err.splitlines()[-1]


def test_flags_of_train_are_passed_on():
    args = parse(["ablate", "--seeds", "4", "--steps", "7", "--lr=0.1"])
    assert (args.seeds, args.first_seed, args.dataset) == (4, 1, "toy")
    assert args.further == ["--steps", "7", "--lr=0.1"]


def test_examples_are_of_images_that_differ():
    """A film of two scenes, of which neighbouring frames are alike, and one picture of a third."""

    class Film:
        names = evaluated = ["a", "b", "c"]

        def __len__(self):
            return 30

        def load(self, i):
            scene = 2 if i == 17 else i // 15
            return None, np.full((4, 4), scene), f"{i}"

    chosen = measures.varied(Film(), 3)
    assert {int(chosen.load(i)[1][0, 0]) for i in range(len(chosen))} == {0, 1, 2}
    assert len(measures.varied(Film(), 6)) == 6 and len(measures.varied(Film(), 99)) == 30
    assert len(set(measures.varied(Film(), 6).indices)) == 6
