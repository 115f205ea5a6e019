"""Evaluation: sliding windows, chunks of classes, confusion matrices, both mIoU, and shards over
processes."""

import copy
import json
import math
import os
import re
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import data
import evaluate
from conftest import run
from losses import IGNORE
from support import pictures
from support.errors import UserError


def photo(width, height, seed=0):
    rng = np.random.default_rng(seed)
    return Image.fromarray(
        rng.integers(0, 255, (height // 10, width // 10, 3), dtype=np.uint8)
    ).resize((width, height))


def by_hand(model, image, names):
    """The specification of CAT-Seg's inference for image_size 64 (canvas 107, windows at 0 and
    43), step by step."""
    width, height = image.size
    scale = 107 / min(image.size)
    x = data.normalise(
        image.resize(
            (int(width * scale + 0.5), int(height * scale + 0.5)), Image.Resampling.BILINEAR
        )
    )[None]
    up = lambda t, *size: F.interpolate(t, size, mode="bilinear", align_corners=False)
    square, small, tokens = up(x, 107, 107), up(x, 64, 64), model.tokenize(names)
    prob = lambda view: up(model(view, tokens)[0], 64, 64).sigmoid()
    total, count = torch.zeros(1, len(names), 107, 107), torch.zeros(107, 107)
    for top in (0, 43):
        for left in (0, 43):
            total[..., top : top + 64, left : left + 64] += prob(
                square[..., top : top + 64, left : left + 64]
            )
            count[top : top + 64, left : left + 64] += 1
    return up((total / count + up(prob(small), 107, 107)) / 2, height, width)


@pytest.mark.parametrize("size", [(130, 90), (90, 130)])
def test_sliding_windows_by_hand(tiny, size):
    tiny.eval()
    image, names = photo(*size), [f"thing {i}" for i in range(5)]
    with torch.no_grad():
        expected, text = by_hand(tiny, image, names), tiny.encode_text(tiny.tokenize(names))
    got = torch.cat([s for _, s in evaluate.class_scores(tiny, image, text, chunk=2)], 1)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)
    labels = evaluate.segment(tiny, image, names)
    assert labels.shape == size[::-1] and labels.dtype == torch.int64
    assert torch.equal(labels, expected[0].argmax(0))
    assert torch.equal(
        labels, evaluate.segment(tiny, image, names, chunk=2)
    )  # chunks change no label


def test_zero_shot_is_clips_own_argmax(tiny):
    image, names = photo(64, 64), ["red", "green", "blue"]
    with torch.no_grad():
        patches, text = (
            tiny.encode_image(data.normalise(image)[None])[0],
            tiny.encode_text(tiny.tokenize(names)),
        )
        cosine = F.cosine_similarity(patches[0, :, None], text, dim=-1).T.reshape(1, 3, 8, 8)
        expected = F.interpolate(cosine, (64, 64), mode="bilinear", align_corners=False)[0].argmax(
            0
        )
    got = evaluate.label_map(tiny, image, text, sliding=False, zero_shot=True)
    assert torch.equal(got, expected) and len(got.unique()) > 1


def random_maps(seed, K=6):
    """Labels without class 4, predictions without class 5, some pixels ignored; class 4 is only
    predicted."""
    rng = np.random.default_rng(seed)
    labels, prediction = rng.choice([-1, 0, 1, 2, 3, 5], (40, 50)), rng.integers(0, 5, (40, 50))
    return torch.from_numpy(prediction), torch.from_numpy(labels)


@pytest.mark.parametrize("seed", range(3))
def test_confusion_and_both_miou_equal_sets(seed):
    K, (prediction, labels) = 6, random_maps(seed)
    confusion = evaluate.confusion_matrix(prediction, labels, K)
    pairs = [
        (g, p)
        for g, p in zip(labels.flatten().tolist(), prediction.flatten().tolist())
        if g != IGNORE
    ]
    assert confusion.tolist() == [[pairs.count((g, p)) for p in range(K)] for g in range(K)]
    iou = {}
    for k in range(K):
        union = sum(g == k or p == k for g, p in pairs)
        iou[k] = sum(g == k and p == k for g, p in pairs) / union if union else None
    labelled = [iou[k] for k in range(K) if any(g == k for g, _ in pairs)]
    everything = [v for v in iou.values() if v is not None]
    assert len(labelled) == 5 and len(everything) == 6
    result = evaluate.mean_iou(confusion)
    assert result["ground_truth"] == pytest.approx(sum(labelled) / 5) and result[
        "union"
    ] == pytest.approx(sum(everything) / 6)
    some = evaluate.mean_iou(confusion, [0, 4])
    assert some["ground_truth"] == pytest.approx(iou[0]) and some["union"] == pytest.approx(
        (iou[0] + iou[4]) / 2
    )
    assert math.isnan(evaluate.mean_iou(confusion * 0)["ground_truth"])


def test_values_outside_the_vocabulary_are_refused():
    ok, bad = torch.tensor([0, 1], dtype=torch.uint8), torch.tensor([0, 2])
    assert evaluate.confusion_matrix(ok, ok, 2).tolist() == [[1, 0], [0, 1]]
    for args in ((ok, bad), (bad, ok)):
        with pytest.raises(ValueError, match=r"outside 0\.\.1: 0\.\.2"):
            evaluate.confusion_matrix(*args, 2)


def test_segment_turns_photographs_upright_and_wants_a_list(tiny):
    exif, image = Image.Exif(), photo(130, 90)
    exif[0x0112] = 6
    turned = photo(130, 90)
    turned.info["exif"] = exif.tobytes()
    turned.getexif()[0x0112] = 6
    assert evaluate.segment(tiny, turned, ["a", "b"]).shape == (130, 90)
    assert torch.equal(
        evaluate.segment(tiny, turned, ["a", "b"]),
        evaluate.segment(tiny, image.transpose(Image.Transpose.ROTATE_270), ["a", "b"]),
    )
    for names in ("cat", []):
        with pytest.raises(ValueError, match="list of at least one class name"):
            evaluate.segment(tiny, image, names)


def test_segment_takes_paths_and_arrays_and_nothing_else(tiny, tmp_path):
    image, names = photo(130, 90), ["a", "b"]
    image.save(tmp_path / "photo.png")
    expected = evaluate.segment(tiny, image, names)
    for other in (tmp_path / "photo.png", str(tmp_path / "photo.png"), np.asarray(image)):
        assert torch.equal(evaluate.segment(tiny, other, names), expected)
    gray = np.asarray(image.convert("L"))
    assert evaluate.segment(tiny, gray, names).shape == (90, 130)
    wrong = [None, 3, torch.zeros(3, 4, 4), np.zeros((4, 4, 3)), np.zeros((4, 4, 5), np.uint8)]
    for thing in wrong:
        with pytest.raises(UserError):
            evaluate.segment(tiny, thing, names)
    with pytest.raises(UserError, match="nowhere.jpg can't be read as an image"):
        evaluate.segment(tiny, "nowhere.jpg", names)
    for wrong, words in ((["a", "a"], "names 'a' twice"), (["a", ""], "no name on item 2")):
        with pytest.raises(UserError, match=words):
            evaluate.segment(tiny, image, wrong)


def test_pixel_accuracy_is_exact():
    """A billion pixels, of which one is wrong: float32 would call that 100 %."""
    confusion = torch.tensor([[999_999_999, 1], [0, 10**12]])
    right, total = 999_999_999 + 10**12, 10**9 + 10**12
    got = evaluate.summary(confusion, ["a", "b"])["pixel_accuracy"]
    assert got == pytest.approx(100 * right / total, rel=1e-15) and got < 100


@pytest.mark.parametrize("size", [(1, 3000), (3000, 1), (6_000, 4_000)])
def test_memory_stays_bounded_for_any_picture(tiny, tmp_path, monkeypatch, size):
    """At most 64 million scores at once, and a drawing whose longer side stays in bounds."""
    largest, resize = [], evaluate.resize

    def watch(x, to):
        largest.append(x.shape[1] * to[0] * to[1])
        return resize(x, to)

    monkeypatch.setattr(evaluate, "resize", watch)
    image, names = Image.new("RGB", size, "gray"), [f"thing {i}" for i in range(3)]
    labels = evaluate.segment(tiny, image, names, sliding=False)
    assert labels.shape == size[::-1] and max(largest) <= max(2**26, size[0] * size[1])
    drawn = pictures.segmentation(image, labels.numpy(), names)
    assert max(drawn.size) <= max(8_500, 480) and drawn.width * drawn.height < 70e6


def test_summary_separates_seen_from_unseen():
    confusion = torch.tensor([[8, 2, 0], [0, 5, 5], [0, 0, 10]])
    result = evaluate.summary(confusion, ["a", "b", "c"], seen=["a", "z"])
    ious = [8 / 10, 5 / 12, 10 / 15]
    assert result["classes"] == pytest.approx({n: 100 * v for n, v in zip("abc", ious)})
    seen, unseen = 80.0, 50 * (5 / 12 + 10 / 15)
    assert result["seen"] == pytest.approx(seen) and result["unseen"] == pytest.approx(unseen)
    assert result["harmonic"] == pytest.approx(2 * seen * unseen / (seen + unseen)) and result[
        "pixel_accuracy"
    ] == pytest.approx(100 * 23 / 30)
    assert "unseen" not in evaluate.summary(confusion, ["a", "b", "c"], seen=["a", "b", "c"])


def test_two_processes_count_every_image_once(tiny, folder, tmp_path):
    """3 images on 2 processes: the integer confusion matrix, and so every figure, is that of one
    process."""
    torch.save(
        dict(config=tiny.config, model=tiny.state_dict(), names=["red thing"]), tmp_path / "c.pt"
    )
    results = []
    for processes in (1, 2):
        done = run(
            "evaluate.py",
            "--checkpoint",
            tmp_path / "c.pt",
            "--datasets",
            f"folder:{folder}",
            "--out",
            tmp_path / str(processes),
            processes=processes,
        )
        (file,) = (tmp_path / str(processes)).iterdir()
        results.append(json.loads(file.read_text()))
        assert done.stdout.count("mIoU over classes with ground truth") == 1
        assert re.search(r"per cent +\| folder:.*my d", done.stdout)
    assert results[0] == results[1] and results[0]["images"] == 3 and "unseen" in results[0]


def save(model, path, **more):
    torch.save(dict(config=model.config, model=model.state_dict(), **more), path)
    return path


def command(monkeypatch, *arguments):
    """Run evaluate.py's main in this process; returns what it exits with."""
    monkeypatch.setattr("sys.argv", ["evaluate.py", *map(str, arguments)])
    try:
        return evaluate.main()
    except SystemExit as e:
        return e.code


def test_zero_shot_is_the_clip_that_training_began_with(tiny, folder, tmp_path, monkeypatch):
    """Not what became of it."""
    dataset = data.open_dataset(f"folder:{folder}")
    expected = evaluate.evaluate(tiny, dataset, "cpu", sliding=False, zero_shot=True)
    original = {n: p.clone() for n, p in tiny.state_dict().items() if "text_encoder" in n}
    trained = copy.deepcopy(tiny)
    torch.manual_seed(0)
    for parameter in trained.text_encoder.parameters():
        parameter.data += torch.randn_like(parameter)
    drifted = evaluate.evaluate(trained, dataset, "cpu", sliding=False, zero_shot=True)
    assert not torch.equal(drifted, expected)
    command(
        monkeypatch,
        "--checkpoint",
        save(trained, tmp_path / "c.pt", original=original),
        "--datasets",
        f"folder:{folder}",
        "--views",
        "whole",
        "--zero-shot",
        "--out",
        tmp_path / "o",
    )
    (file,) = (tmp_path / "o").iterdir()
    scores = evaluate.summary(expected, dataset.names)
    assert json.loads(file.read_text())["classes"] == scores["classes"]
    wrong = save(trained, tmp_path / "w.pt", original=3)
    said = command(monkeypatch, "--checkpoint", wrong, "--zero-shot")
    assert said.startswith("error: ") and "w.pt can't be read as a checkpoint" in said


def test_labels_and_pictures_of_a_dataset(tiny, folder, tmp_path, monkeypatch, capsys):
    path = save(tiny, tmp_path / "c.pt")
    assert not command(
        monkeypatch,
        "--checkpoint",
        path,
        "--datasets",
        f"folder:{folder}",
        "--out",
        tmp_path / "o",
        "--save-labels",
        "--save-pictures",
        2,
        "--views",
        "whole",
    )
    (out,) = (p for p in (tmp_path / "o").iterdir() if p.is_dir())
    dataset = data.open_dataset(f"folder:{folder}", None, "val")
    for i in range(3):
        image, pixel_labels, _ = dataset.load(i)
        expected = evaluate.segment(tiny, image, dataset.names, sliding=False).numpy()
        assert np.array_equal(np.asarray(Image.open(out / "labels" / f"{i}.png")), expected)
        if i != 1:
            sheet = pictures.comparison(image, pixel_labels, expected, dataset.names)
            assert np.array_equal(np.asarray(Image.open(out / "pictures" / f"{i}.png")), sheet)
    assert len(list((out / "pictures").iterdir())) == 2
    classes = [
        line.split("|")[2].strip()
        for line in capsys.readouterr().out.splitlines()
        if " thing " in line
    ]
    assert len(classes) == 3 and classes == sorted(classes, key=float, reverse=True)


def test_labels_beyond_255_take_16_bits(tiny, folder, tmp_path, monkeypatch):
    (folder / "classes.txt").write_text("\n".join(f"thing {i}" for i in range(300)))
    for split in ("train", "val"):
        for mask in (folder / "masks" / split).iterdir():
            Image.fromarray(np.asarray(Image.open(mask)).astype(np.uint16)).save(mask)
    monkeypatch.setattr(evaluate, "label_map", lambda *a, **k: torch.full((60, 80), 299))
    assert not command(
        monkeypatch,
        "--checkpoint",
        save(tiny, tmp_path / "c.pt"),
        "--datasets",
        f"folder:{folder}",
        "--out",
        tmp_path / "o",
        "--save-labels",
    )
    (labels,) = (np.asarray(Image.open(p)) for p in (tmp_path / "o").glob("*/labels/0.png"))
    assert (labels == 299).all()


def test_an_interrupted_evaluation_says_what_it_had(tiny, folder, tmp_path, monkeypatch, capsys):
    calls, whole = [], evaluate.label_map

    def third(*arguments, **options):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return whole(*arguments, **options)

    monkeypatch.setattr(evaluate, "label_map", third)
    status = command(
        monkeypatch,
        "--checkpoint",
        save(tiny, tmp_path / "c.pt"),
        "--datasets",
        f"folder:{folder}",
        "--out",
        tmp_path / "o",
    )
    assert status == 130 and "had after 2 of 3 images" in capsys.readouterr().out
    (file,) = (tmp_path / "o").iterdir()
    assert file.name.endswith(".partial.json") and json.loads(file.read_text())["images"] == 2


def test_background_stands_for_all_names_from_the_last_label_on(tiny):
    """voc-20b: 59 names, 21 classes; a prediction of any of the last 39 counts as background."""

    class Pictures:
        names, evaluated = list("abcde"), ["a", "b", "background"]
        __len__ = lambda self: 1
        load = lambda self, i: (photo(64, 64), np.array([[0, 1, 2, 2]]).repeat(2, 0), "x")

    prediction = torch.tensor([[0, 4, 3, 1]]).repeat(2, 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "label_map", lambda *a, **k: prediction)
        confusion = evaluate.evaluate(tiny, Pictures(), torch.device("cpu"))
    assert confusion.tolist() == [[2, 0, 0], [0, 0, 2], [0, 2, 2]]


def test_pictures_of_ones_own(tiny, tmp_path, monkeypatch, capsys):
    """Any mode and size; a folder and a pattern; the broken one is named and the others are done
    all the same."""
    exif, pictures = Image.Exif(), tmp_path / "my pictures"
    pictures.mkdir()
    exif[0x0112] = 6
    photo(100, 80).save(pictures / "small.jpg")
    photo(100, 80).save(os.fsencode(pictures) + b"/odd\xff.bmp")
    photo(100, 80).save(pictures / "small.png")
    photo(130, 90).save(pictures / "turned.jpg", exif=exif)
    photo(100, 80).convert("RGBA").save(pictures / "see-through.png")
    photo(100, 80).convert("L").save(pictures / "gray.png")
    Image.fromarray(np.full((80, 100), 40000, np.uint16)).save(pictures / "sixteen.png")
    (pictures / "broken.jpg").write_bytes(b"no picture")
    options = (
        "--checkpoint",
        save(tiny, tmp_path / "c.pt"),
        "--classes",
        "cat, sofa, wooden floor",
    )
    wrong = command(monkeypatch, *options, "--image", pictures)
    assert (
        wrong.startswith("error: ")
        and "broken.jpg can't be read as an image" in wrong
        and "\n" not in wrong
    )
    names = {"small.jpg", "small.png", "turned", "see-through", "gray", "sixteen", "odd\udcff"}
    assert {p.name for p in pictures.glob("*.seg.png")} == {f"{n}.seg.png" for n in names}
    assert (
        Image.open(pictures / "turned.seg.png").height > 130 * 5
        and "cat" in capsys.readouterr().out
    )
    assert not command(
        monkeypatch,
        *options,
        "--image",
        f"{pictures}/s*.jpg",
        pictures / "gray.png",
        "--out",
        tmp_path / "o",
    )
    assert {p.name for p in (tmp_path / "o").iterdir()} == {"small.seg.png", "gray.seg.png"}


@pytest.mark.parametrize(
    "arguments, words",
    [
        (
            ("--image", "nowhere.jpg", "--classes", "a"),
            "--image nowhere.jpg: there is no such picture",
        ),
        (("--image", "LICENSE"), "--image needs --classes"),
        (("--image", "LICENSE", "--classes", "a, a"), "names 'a' twice"),
        (("--datasets", "toy", "--classes", "a, b"), "--classes has 2 names, and toy needs 52"),
    ],
)
def test_bad_arguments_are_one_sentence(tiny, tmp_path, monkeypatch, arguments, words):
    assert words in command(monkeypatch, "--checkpoint", save(tiny, tmp_path / "c.pt"), *arguments)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("--checkpoint", "nowhere.pt"), "nowhere.pt: no such checkpoint"),
        (("--checkpoint", "README.md"), "README.md can't be read as a checkpoint of tensors"),
    ],
)
def test_bad_input_is_one_sentence(arguments, words):
    done = run("evaluate.py", *arguments, check=False)
    assert done.returncode == 1 and words in done.stderr and "Traceback" not in done.stderr


def test_compiled_parts_label_alike(tiny, monkeypatch):
    """--compile, traced and then run as it is, with chunks of classes of two sizes."""
    tiny.eval()
    image = Image.effect_noise((60, 50), 90).convert("RGB")
    with torch.inference_mode():
        text = tiny.encode_text(tiny.tokenize([f"thing {i}" for i in range(20)]))
    [(_, expected)] = evaluate.class_scores(tiny, image, text, sliding=False, chunk=20)
    monkeypatch.setenv("CXX", sys.executable)
    module_compile = torch.nn.Module.compile
    compiled = []

    def compile_(module):
        compiled.append(module)
        module_compile(module, backend="eager", fullgraph=True)

    monkeypatch.setattr(torch.nn.Module, "compile", compile_)
    evaluate.compile_parts(tiny)
    assert len(compiled) == 7
    [(_, got)] = evaluate.class_scores(tiny, image, text, sliding=False, chunk=20)
    torch.testing.assert_close(got, expected)
