"""Checkpoints and published weights: what is read, and what is refused, how."""
import functools
import hashlib
import json
import math
import os
import pickle
import resource

import open_clip
import pytest
import torch
import torch.nn as nn

import model
from cat_seg_reference import SMALL, to_cat_seg
from ema import MomentumEncoder, frozen_copy
from model import build
from support import checkpoint
from support.files import UserError

pytestmark = pytest.mark.filterwarnings("ignore")  # of torch, on odd files
assert_equal = functools.partial(torch.testing.assert_close, rtol=0, atol=0)
VISION = dict(image_size=32, patch_size=8, width=32, layers=3, head_width=16, pool_type="avg")
TEXT = dict(context_length=20, vocab_size=50, width=32, layers=2, heads=2)


class Bomb:
    def __reduce__(self):
        return (os.system, ("touch exploded",))


def refusal(function, *arguments):
    """The text of the UserError that a call raises: one line, and not advice to run code."""
    with pytest.raises(UserError) as e:
        function(*arguments)
    assert "\n" not in str(e.value) and len(str(e.value)) < 700
    return str(e.value)


@pytest.fixture
def make(monkeypatch):
    """make(seed) -> what train.py saves and resumes, of a model of half a megabyte."""
    monkeypatch.setattr(model, "TINY", dict(embed_dim=16, vision_cfg=VISION, text_cfg=TEXT))

    def go(seed):
        torch.manual_seed(seed)
        segmenter = build("tiny", 32, 16)
        trained = [p for p in segmenter.parameters() if p.requires_grad]
        return dict(model=segmenter, original=frozen_copy(segmenter),
                    momentum=MomentumEncoder(segmenter.image_encoder, 0.5),
                    optimiser=torch.optim.AdamW([dict(params=trained, base_lr=0.1)], 0.1),
                    scaler=torch.amp.GradScaler("cpu", enabled=True), names=["red", "blue"],
                    data="abc", log=[{"step": 0}],
                    args={"steps": 9, "dataset": "x", "restart": False, "lr": 0.1})

    return go


def take_step(run):
    """A step with gradients of one, which the momentum encoder follows."""
    for p in run["optimiser"].param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    run["optimiser"].step()
    run["momentum"].update()


@pytest.fixture
def saved(make, tmp_path):
    """(path of a checkpoint of step 3, what was saved)."""
    run = make(0)
    take_step(run)
    checkpoint.save(tmp_path / "last.pt", step=3, **run)
    return tmp_path / "last.pt", run


def test_what_is_saved_is_resumed(saved, make):
    path, run = saved
    again = make(1) | {"log": []}
    assert checkpoint.resume(path, **again) == 3 and again["log"] == run["log"]
    assert_equal(run["model"].state_dict(), checkpoint.load(path).state_dict())
    for k in ("image_encoder", "text_encoder"):
        assert_equal(*(getattr(each["original"], k).state_dict() for each in (run, again)))
    for flag in set(checkpoint.FREE) - {"restart"}:
        other = run["args"] | {flag: "other"}
        assert checkpoint.resume(path, **again | {"args": other}) == 3
    for each in (run, again):  # the optimisers' moments are equal too
        take_step(each)
    for k in ("model", "momentum"):
        assert_equal(run[k].state_dict(), again[k].state_dict())
    assert checkpoint.resume(path.with_name("none.pt"), **again) is None
    path.with_name("results.json").touch()
    assert "holds results, but no" in refusal(
        functools.partial(checkpoint.resume, path.with_name("none.pt"), **again))


def test_weights_are_loaded_from_a_compiled_model_and_not_from_another_clip(saved, make):
    path, run = saved
    state, again = run["model"].state_dict(), make(1)["model"]
    names = {f"_orig_mod.{name}": t for name, t in state.items()}  # as torch.compile has them
    torch.save(dict(config=again.config, model=names), path)
    checkpoint.load_weights(again, path)
    assert_equal(state, again.state_dict())
    torch.save(dict(config=again.config | {"clip": "ViT-B-16"}, model=names), path)
    assert "they are of --clip ViT-B-16" in refusal(checkpoint.load_weights, again, path)


def test_a_spoiled_field_is_refused_before_training(saved, make, monkeypatch):
    path, _ = saved
    contents, again = torch.load(path, weights_only=True), make(1)
    first, nothing = contents["optimiser"]["state"][0], torch.zeros(2)
    moments = dict.fromkeys(first, nothing)
    for field, values in {
            "step": (2.5, -1, 10), "scaler": [{"scale": "x"}], "names": [["red"]], "data": ["abd"],
            "momentum": (None, {}, {"visual.proj": torch.zeros(2)}), "model": [{}],
            "optimiser": ({}, contents["optimiser"] | {"state": {0: moments}},
                          contents["optimiser"] | {"state": {0: first | {"exp_avg_sq": nothing}}}),
            "original": (3, {"logit_scale": torch.zeros(7)}), "args": (None, {"lr": 0.2})}.items():
        without = {name: value for name, value in contents.items() if name != field}
        for spoiled in (without, *(contents | {field: value} for value in values)):
            monkeypatch.setattr(checkpoint, "read", lambda path: spoiled)  # noqa: B023
            with pytest.raises(UserError, match=str(path)):
                checkpoint.resume(path, **again)


def test_a_full_disk_keeps_the_old_checkpoint(saved):
    path, run = saved
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10**5, limits[1]))
    try:
        with pytest.raises(UserError, match=f"{path} can't be written"):
            checkpoint.save(path, step=4, **run)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before and [*path.parent.iterdir()] == [path]


def test_what_is_no_checkpoint_is_refused_at_once_and_not_executed(saved, tmp_path, monkeypatch):
    """Without taking the memory that it claims. (Broken ones: test_accidents.py.)"""
    path, run = saved
    monkeypatch.chdir(tmp_path)
    config, state = run["model"].config, run["model"].state_dict()
    good, vast = dict(config=config, model=state), torch.zeros(1).char().expand(10**6, 10**6)
    nan = torch.tensor([math.nan])
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for contents, words in (  # what the file holds, and what the refusal says
            ([1, 2], ""), ({"model": {"a": Bomb()}}, "holds more than"), (good | {"config": 3}, ""),
            (good | {"config": config | {"clip": "hf-hub:x/y"}}, "open_clip has no model"),
            (good | {"config": config | {"image_size": 10**9}}, "16..2048"),
            (good | {"config": config | {"channels": 10**6}}, "size mismatch"),
            (good | {"config": config | {"clip": "ViT-bigG-14"}}, "Missing key(s)"),
            ({"model": {}, "config": config | {"layers": 10**9}}, "Missing key(s)"),
            (good | {"config": {"clip": "tiny", "image_size": 32}}, "there is no 'channels' in it"),
            (good | {"model": state | {"logit_scale": torch.zeros(()).to_sparse()}}, ""),
            (good | {"model": state | {"logit_scale": nan}}, "logit_scale is not finite"),
            (good | {"model": state | {"logit_scale": vast}}, "claims more memory")):
        torch.save(contents, "file")
        text = refusal(checkpoint.load, "file")
        assert text.startswith("file can't be read as a checkpoint") and words in text, text
    (tmp_path / "file").write_bytes(pickle.dumps(Bomb()))
    refusal(checkpoint.load, "file")
    assert not (tmp_path / "exploded").exists()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < memory + 500_000  # kilobytes
    os.mkfifo("pipe")
    for name in ("nowhere", ".", "pipe"):
        assert refusal(checkpoint.load, name) == f"{name}: no such checkpoint file"


def test_a_cat_seg_checkpoint_is_told_by_its_content_and_every_name_counts(tmp_path):
    with torch.device("meta"):
        ours = build("ViT-B-16-quickgelu").state_dict()
    mask = {"sem_seg_head.predictor.transformer.layers.0.swin_block.block_2.attn_mask": None}
    assert checkpoint.from_cat_seg(to_cat_seg(ours) | mask).keys() == ours.keys()
    for shape, clip in checkpoint.CAT_SEG.items():
        kernel = {"sem_seg_head.predictor.clip_model.visual.conv1.weight": torch.zeros(shape)}
        torch.save({"model": kernel, "iteration": 7}, tmp_path / "c.pth")
        found = checkpoint.read(tmp_path / "c.pth")
        assert found["config"] == dict(clip=clip, image_size=384, channels=128)
        assert [*found["model"]] == ["image_encoder.visual.conv1.weight"]
        assert "Missing key(s)" in refusal(checkpoint.load, tmp_path / "c.pth")


@pytest.fixture
def clip(tmp_path, monkeypatch):
    """A small CLIP that open_clip knows as ViT-small."""
    (tmp_path / "ViT-small.json").write_text(json.dumps(SMALL))
    open_clip.add_model_config(tmp_path / "ViT-small.json")
    monkeypatch.chdir(tmp_path)
    return open_clip.model.CLIP(**SMALL)


def test_clip_in_published_formats(clip, monkeypatch):
    """A state dict, open_clip's training checkpoint, safetensors; a program only if it is one that
    OpenAI published, whose address holds its digest."""
    from safetensors.torch import save_file
    state = {name: tensor.clone() for name, tensor in clip.state_dict().items()}
    torch.save(state | dict.fromkeys(checkpoint.OPENAI_CONSTANTS, torch.tensor(7)), "plain.pt")
    compiled = {f"module._orig_mod.{name}": tensor for name, tensor in state.items()}
    torch.save({"state_dict": compiled}, "training.pt")
    save_file(state, "model.safetensors")
    clip.attn_mask = None
    for module in clip.half().modules():
        module.__class__ = nn.Module  # OpenAI's programs hold half precision; nothing runs here
    torch.jit.script(clip).save("archive.pt")
    refusal(checkpoint.load_clip, "ViT-small", "archive.pt")
    with open("archive.pt", "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    tags = {"openai": dict(url=f"https://x/{digest}/a.pt", quick_gelu=True)}
    monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda clip, tag: tags.get(tag, {}))
    for name in ("plain.pt", "training.pt", "model.safetensors", "archive.pt"):
        loaded, tolerance = checkpoint.load_clip("ViT-small", name), 1e-3 * (name == "archive.pt")
        torch.testing.assert_close(dict(loaded.state_dict()), state, rtol=tolerance, atol=tolerance)


def test_weights_of_another_gelu_or_mean_are_refused(clip, tmp_path, capsys):
    """open_clip says which they need: of its tags, and in the config beside a file."""
    torch.save(clip.state_dict(), "plain.pt")
    checkpoint.load_clip("ViT-small", "plain.pt")
    assert "taken to have the GELU of --clip ViT-small" in capsys.readouterr().out
    config = tmp_path / "open_clip_config.json"
    half = {"model_cfg": SMALL, "preprocess_cfg": {"mean": [0.5] * 3}}
    for contents, words in (({"model_cfg": {"width": 1}}, "the other GELU"),
                            (half, "a mean of (0.5, 0.5, 0.5)")):
        config.write_text(json.dumps(contents))
        assert words in refusal(checkpoint.load_clip, "ViT-small", "plain.pt")
    assert "the other GELU" in refusal(checkpoint.load_clip, "ViT-B-16", "openai")
    assert "mean of (0.5" in refusal(checkpoint.load_clip, "ViT-L-14", "laion2b_s32b_b82k")


def test_clip_files_and_models_that_do_not_fit(clip, tmp_path, monkeypatch):
    other = open_clip.model.CLIP(**{**SMALL, "embed_dim": 16}).state_dict()
    nan = clip.state_dict() | {"logit_scale": torch.tensor(math.nan)}
    files = {"other.pt": other, "bomb.pt": Bomb(), "list.pt": [1], "nan.pt": nan}
    for name, contents in files.items():
        torch.save(contents, name)
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "other.pt").read_bytes()[:5000])
    for name in ("", *files, "cut.safetensors", "nowhere.pt", "no-tag"):
        text = refusal(checkpoint.load_clip, "ViT-small", name)
        assert text.startswith(f"--pretrained {name} can't be read as weights of --clip"), text
    assert not (tmp_path / "exploded").exists()
    monkeypatch.setattr(open_clip, "create_model", None)
    for name in ("ViT-B-17", "hf-hub:x/y", "RN50", "ViT-B-16-SigLIP"):
        assert f"weights of --clip {name} (" in refusal(checkpoint.load_clip, name, "openai")
