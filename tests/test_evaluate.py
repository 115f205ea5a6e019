"""Evaluation: windows, confusion matrices, both mIoU, own pictures, and what is printed."""
import functools
import json
import math
import sys
import types
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import data
import evaluate
from losses import IGNORE
from support import accidents, pictures
from support.files import UserError

up = functools.partial(F.interpolate, mode="bilinear", align_corners=False)


def photo(width, height):
    small = np.random.default_rng(0).integers(0, 255, (height // 10, width // 10, 3), np.uint8)
    return Image.fromarray(small).resize((width, height))


@pytest.fixture
def command(tiny, tmp_path, monkeypatch, capsys):
    """Runs evaluate.main in this process, on `tiny` as tmp_path/last.pt with further contents:
    command(*flags, **contents) -> (exit status, what it printed)."""
    def call(*flags, **contents):
        path = tmp_path / "last.pt"
        torch.save(dict(config=tiny.config, model=tiny.state_dict(), **contents), path)
        monkeypatch.setattr("sys.argv", ["evaluate.py", f"--checkpoint={path}", *map(str, flags)])
        with pytest.raises(SystemExit) as e, accidents.door():
            evaluate.main()
            sys.exit(0)
        return e.value.code, "".join(capsys.readouterr())

    return call


def tensor(image):
    return data.normalise(torch.from_numpy(np.array(image)).permute(2, 0, 1))[None]


@pytest.mark.parametrize("size", [(130, 90), (90, 130)])
def test_sliding_windows_by_a_plain_loop(tiny, size):
    """CAT-Seg's inference for image_size 64: a canvas of 107, windows at 0 and 43, the whole."""
    image, names = photo(*size), ["thing 1", "thing 2", "thing 3"]
    tokens, scale = tiny.eval().tokenize(names), 107 / min(size)
    resized = [int(side * scale + 0.5) for side in size]
    x = tensor(image.resize(resized, Image.Resampling.BILINEAR))
    with torch.no_grad():
        def probabilities(view):
            return up(tiny(view, tokens)[0], 64).sigmoid()

        square, total, count = up(x, 107), torch.zeros(1, 3, 107, 107), torch.zeros(107, 107)
        for top in (0, 43):
            for left in (0, 43):
                part = (..., slice(top, top + 64), slice(left, left + 64))
                total[part] += probabilities(square[part])
                count[part] += 1
        whole = up(probabilities(up(x, 64)), 107)
        expected = up((total / count + whole) / 2, size[::-1])
        text = tiny.encode_text(tokens)
    scores = torch.cat([s for _, s in evaluate.class_scores(tiny, image, text, chunk=2)], 1)
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-6)
    labels = evaluate.segment(tiny, image, names)
    assert labels.dtype == torch.int64 and torch.equal(labels, expected[0].argmax(0))


def test_zero_shot_is_clips_own_argmax(tiny):
    image = photo(64, 64)
    with torch.no_grad():
        text = tiny.encode_text(tiny.tokenize(["red", "green", "blue"]))
        patches = tiny.encode_image(tensor(image))[0]
        cosine = F.cosine_similarity(patches[0, :, None], text, dim=-1).T.reshape(1, 3, 8, 8)
    found = evaluate.label_map(tiny, image, text, sliding=False, zero_shot=True)
    assert torch.equal(found, up(cosine, 64)[0].argmax(0)) and len(found.unique()) > 1


def test_ties_go_to_the_lower_class_also_of_an_earlier_chunk(monkeypatch):
    chunks = [(0, torch.tensor([0.5, 1.0, 1.0])), (3, torch.tensor([1.0, 0.5, 1.0]))]
    chunks = [(first, scores.view(1, 3, 1, 1)) for first, scores in chunks]
    monkeypatch.setattr(evaluate, "class_scores", lambda *inputs, **options: chunks)
    assert evaluate.label_map(None, None, None).tolist() == [[1]]


def test_segment_takes_paths_pictures_and_arrays(tiny, tmp_path):
    def segment(image, names=("a", "b")):
        return evaluate.segment(tiny, image, list(names), sliding=False)

    image = photo(130, 90)
    image.save(tmp_path / "photo.png")
    for same in (tmp_path / "photo.png", str(tmp_path / "photo.png"), np.asarray(image)):
        assert torch.equal(segment(same), segment(image))
    turned = image.transpose(Image.Transpose.ROTATE_270)
    image.getexif()[0x0112] = 6
    assert torch.equal(segment(image), segment(turned))
    for wrong in (None, np.zeros((4, 4, 3)), np.zeros((4, 4, 5), np.uint8), "nowhere.jpg"):
        with pytest.raises(UserError, match="can't be read as an image"):
            segment(wrong)
    assert torch.equal(evaluate.segment(tiny, image, "a, b", sliding=False), segment(image))
    for names in ([], ["a", "a"], ["Sky", "sky"], ["bank, river", "bank, money"]):
        with pytest.raises(UserError):
            segment(image, names)


def test_confusion_and_both_miou_equal_sets():
    """Class 4 is only predicted, class 5 never."""
    rng, K = np.random.default_rng(0), 6
    labels = torch.from_numpy(rng.choice([IGNORE, 0, 1, 2, 3, 5], (40, 50)))
    prediction = torch.from_numpy(rng.integers(0, 5, (40, 50)))
    confusion = evaluate.confusion_matrix(prediction, labels, K)
    pairs = zip(labels.flatten().tolist(), prediction.flatten().tolist())
    pairs = [(g, p) for g, p in pairs if g != IGNORE]
    assert confusion.tolist() == [[pairs.count((g, p)) for p in range(K)] for g in range(K)]
    iou = [sum(g == k == p for g, p in pairs) / sum(k in pair for pair in pairs) for k in range(K)]
    means = evaluate.mean_iou(confusion)
    assert means["ground_truth"] == pytest.approx((sum(iou) - iou[4]) / 5)
    assert means["union"] == pytest.approx(sum(iou) / 6)
    of_two = evaluate.mean_iou(confusion, [0, 4])
    assert list(of_two.values()) == pytest.approx([iou[0], (iou[0] + iou[4]) / 2])
    assert math.isnan(evaluate.mean_iou(confusion * 0)["ground_truth"])
    for maps in ((prediction, labels + 1), (prediction + 2, labels)):
        with pytest.raises(ValueError, match=r"outside 0\.\.5: \d\.\.6"):
            evaluate.confusion_matrix(*maps, K)


@pytest.mark.parametrize("seen", [["a", "z"], [" A", "z"], ["a, the first letter"]])
def test_summary_separates_seen_from_unseen(seen):
    confusion = torch.tensor([[8, 2, 0], [0, 5, 5], [0, 0, 10]])
    result = evaluate.summary(confusion, ["a", "b", "c"], seen)
    ious = dict(a=80, b=500 / 12, c=1000 / 15)
    assert result["classes"] == pytest.approx(ious)
    unseen = (ious["b"] + ious["c"]) / 2
    assert (result["seen"], result["unseen"]) == pytest.approx((80, unseen))
    assert result["harmonic"] == pytest.approx(2 * 80 * unseen / (80 + unseen))
    assert result["pixel_accuracy"] == pytest.approx(2300 / 30)
    for names in (["a", "b", "C"], ["a", "b", "background"]):
        assert "unseen" not in evaluate.summary(confusion, names, ["a", "b", "c"])
    assert evaluate.summary(0 * confusion, names)["pixel_accuracy"] is None


def test_every_image_is_counted_once_in_two_processes(tiny, folder, monkeypatch):
    dataset, other = data.open_dataset(f"folder:{folder}"), []
    dataset.sliding = False
    asked = mock.Mock(return_value="")
    monkeypatch.setattr(data, "doubt_about_255", asked)
    whole = evaluate.evaluate(tiny, dataset)
    assert whole["pixels"] == 3 * (60 * 80 - 1)  # one pixel of each is void
    monkeypatch.setattr("torch.distributed.all_reduce", other.append)
    evaluate.evaluate(tiny, dataset, rank=1, world=2)
    assert 0 < other[0].sum() < whole["pixels"]
    monkeypatch.setattr("torch.distributed.all_reduce", lambda total: total.add_(other.pop(0)))
    assert evaluate.evaluate(tiny, dataset, rank=0, world=2) == whole
    (_, counts), *_, (_, added) = [call.args for call in asked.call_args_list]
    assert torch.equal(counts, added) and counts.sum() == 3 * 60 * 80
    monkeypatch.setattr("torch.distributed.all_reduce", lambda total: None)
    assert evaluate.evaluate(tiny, dataset, rank=7, world=8)["pixels"] == 0  # more than images
    monkeypatch.setattr(accidents, "stop_asked", True)
    with pytest.raises(KeyboardInterrupt):
        evaluate.evaluate(tiny, dataset)


def test_processes_agree_on_weights_images_and_names(tiny, folder, command, monkeypatch):
    agree = mock.Mock(side_effect=UserError("they differ"))
    monkeypatch.setattr(accidents, "agree", agree)
    own = f"--datasets=folder:{folder}"
    for flags in ("", "", "--zero-shot", "--classes=a,b,c"):
        command(own, *flags.split(), original={})
    tiny.head.logit.bias.data += 1e-3
    assert "there is no 'original' in it" in command(own, "--zero-shot")[1]
    command(own)
    told = list(map(str, agree.call_args_list))
    assert told[0] == told[1] and len(set(told)) == 4


def test_background_stands_for_all_names_from_the_last_label_on(tiny, monkeypatch):
    """voc-20b: a prediction of any name after the last label counts as background."""
    dataset = data.open_dataset("toy")
    dataset.evaluated = ["a", "b", "background"]
    monkeypatch.setattr(type(dataset), "__len__", lambda self: 1)
    dataset.load = lambda i: (photo(64, 64), np.array([[0, 1, 2, 2]]), "x")
    monkeypatch.setattr(evaluate, "label_map", lambda *a, **k: torch.tensor([[0, 4, 3, 1]]))
    scores = evaluate.evaluate(tiny, dataset)["classes"]
    assert scores == pytest.approx({"a": 100, "b": 0, "background": 100 / 3})


def test_zero_shot_is_the_clip_that_training_began_with(tiny, folder, tmp_path, command):
    """Also of a checkpoint of the version before, which held more."""
    dataset = data.open_dataset(f"folder:{folder}")
    original = {n: p.clone() for n, p in tiny.state_dict().items() if "text_encoder" in n}
    before = evaluate.evaluate(tiny, dataset, zero_shot=True)["classes"]
    for parameter in tiny.text_encoder.parameters():
        parameter.data += torch.randn_like(parameter)
    assert evaluate.evaluate(tiny, dataset, zero_shot=True)["classes"] != before
    older = dict(momentum={"alpha": 0.9, "tensors": original}, facts={"zero_shot": {}}, scaler={},
                 optimiser={"state": {}}, names=["red thing"], args={"dataset": "folder:x"})
    command(f"--datasets=folder:{folder}", "--zero-shot", original=original, **older)
    (file,) = tmp_path.glob("eval/*.json")
    assert json.loads(file.read_text())["classes"] == before


def test_scores_are_printed_and_written(folder, tmp_path, command):
    status, said = command(f"--datasets=folder:{folder}")
    assert status == 0 and said.count(" thing ") == 3 and "| mIoU_ground_truth" in said
    (file,) = tmp_path.glob("eval/*.json")
    assert f"written to {file}" in said and json.loads(file.read_text())["images"] == 3
    (tmp_path / "file").touch()
    status, said = command(f"--datasets=folder:{folder}", f"--out={tmp_path}/file")
    assert status == 1 and "can't be written" in said and "| mIoU_ground_truth" in said
    table = evaluate.format_table([["class", "IoU"], ["a|é", 12.345], ["b", None]])
    assert table.splitlines()[2:] == [r"| a\|é  | 12.3 |", r"| b     |    - |"]


def test_nothing_is_overwritten_by_something_else(tmp_path):
    """What differs from eval/DATASET beside the checkpoint is in the name, which stays short."""
    def path(name="toy", flags="", checkpoint="last.pt", words="abc"):
        args = evaluate.parse([f"--checkpoint={tmp_path / checkpoint}", *flags.split()])
        return evaluate.result_path(name, types.SimpleNamespace(names=list(words)), args)

    assert path() == tmp_path / "eval" / "toy.json" and path("toy:3").name == "toy-3.json"
    paths = [path(), path("pc-59"), path(f"folder:{'long/' * 50}"),
             path(f"folder:x/{'long/' * 50}"), path(flags="--zero-shot"), path(checkpoint="b.pt"),
             path(flags="--classes=f"), path(flags="--classes=f", words="acb"),
             path(checkpoint="b.pth"), path(checkpoint="zero-shot.pt"), path(flags="--out=o"),
             path(flags="--out=o", checkpoint="x/last.pt")]
    assert len(set(paths)) == len(paths)


def test_pictures_of_ones_own(tiny, tmp_path, command, monkeypatch):
    """What can't be read is named, the others are done; no two are written to one file."""
    own, sheets = tmp_path / "my pictures", []
    monkeypatch.setattr(pictures, "sheet", lambda path, *_: sheets.append(path.name))
    labelled = mock.Mock(wraps=pictures.labelled)
    monkeypatch.setattr(pictures, "labelled", labelled)
    own.mkdir()
    photo(130, 90).save(own / "a.jpg")
    photo(100, 80).convert("RGBA").save(own / "a.png")
    (own / "broken.jpg").write_bytes(b"no picture")
    (own / "a.HEIC").write_bytes(b"unknown")
    (own / "a.png.rpmd.png").touch()
    photo(100, 80).save(tmp_path / "a.jpg")
    (tmp_path / "a.png").write_bytes(b"no picture")
    status, said = command("--classes=cat, wooden floor", f"--out={own}",
                           "--image", tmp_path / "a.png", own, tmp_path / "a.jpg")
    assert status == 1 and said.count("can't be read as an image") == 3
    assert "broken.jpg can't" in said and "a.HEIC can't" in said
    assert f"{tmp_path / 'a.jpg'} would overwrite {own / 'a.jpg'}.rpmd.png" in said
    assert sheets == ["a.jpg.rpmd.png", "a.png.rpmd.png"]
    ((_, labels),) = labelled.call_args_list[0].args[1]
    assert np.array_equal(labels, evaluate.segment(tiny, own / "a.jpg", ["cat", "wooden floor"]))
    assert "a.jpg.rpmd.png: " in said and "% cat" in said
    (tmp_path / "empty").mkdir()
    assert "there is no picture" in command("--classes=cat", f"--image={tmp_path}/empty")[1]


def test_doubtful_names_are_told(tiny, folder, command, capsys, monkeypatch):
    """Refused where they are the user's own, a note for a published list, a warning where a toy
    world's CLIP never saw the words."""
    own, args = f"--datasets=folder:{folder}", {"dataset": "toy:3"}
    status, said = command(own, "--classes=Sky, sky, tree", args=args)
    assert status == 1 and "'Sky'" in said and "'sky'" in said
    evaluate.check_names(["Sky", "sky"], 20)
    assert capsys.readouterr().out.startswith("note: ")
    evaluate.check_names(["cat " * 11], 20, own_words=True)  # 9 of the prompt and its ends
    with pytest.raises(UserError, match="too long for the text"):
        evaluate.check_names(["dog", "cat " * 12], 20, own_words=True)
    said = command(own, args=args)[1]
    assert "warning: " in said and "'red thing'" in said
    monkeypatch.setattr("sources.toy.SPLIT_SIZES", {"train": 1, "val": 1})
    status, said = command("--datasets=toy", args=args)
    assert status == 0 and "warning" not in said and "| mIoU_ground_truth" in said


def test_examples_show_three_images(tiny, folder, monkeypatch):
    """Patches that are named correctly are kept, before training and by the momentum encoder."""
    dataset, sheets = data.open_dataset(f"folder:{folder}", classes="red, Green, blue"), []
    monkeypatch.setattr(pictures, "sheet", lambda path, *sheet: sheets.append(sheet))
    monkeypatch.setattr(evaluate, "correctly_classified", lambda patches, *_: patches[..., 0] > 0)
    for momentum in (None, lambda view: (torch.ones(1, 64, 2), None)):
        evaluate.examples("x.png", tiny, tiny, momentum, dataset, ["green", "blue"])
    (titles, rows, legend, caption), (_, with_momentum, *_) = sheets
    assert len(rows) == 3 and len(titles) == len(rows[0]) == 5
    starred = [entry.get_label() for entry in legend if "*" in entry.get_label()]
    assert "* " in caption and starred == [" red *"]
    for row in with_momentum:
        assert np.array_equal(row[3], row[0]) and not np.array_equal(row[2], row[0])
