"""Training from the command line and step by step: resuming, several processes, and what stops
it."""

import json
import math
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import train
from conftest import ROOT, run, visible
from model import build
from support import runs
from support.errors import UserError

FAST = [
    "--clip",
    "tiny",
    "--pretrained",
    "none",
    "--batch-size",
    "4",
    "--steps",
    "6",
    "--tpa-steps",
    "2",
    "--channels",
    "16",
    "--log-every",
    "1",
    "--eval-every",
    "0",
    "--save-every",
    "2",
]

FILES = {"last.pt", "log.jsonl", "results.json", "curves.png", "examples.png"}


@pytest.fixture
def go(folder, tmp_path, monkeypatch, no_plots):
    """Train in this process: go("name", *flags) -> the checkpoint in tmp_path/name."""

    def go(name, *flags):
        monkeypatch.setattr(
            sys,
            "argv",
            [
                "train.py",
                "--dataset",
                f"folder:{folder}",
                "--out",
                str(tmp_path / name),
                *FAST,
                *flags,
            ],
        )
        train.train(train.parse())
        return torch.load(tmp_path / name / "last.pt", weights_only=True)

    return go


def tensors(checkpoint):
    """Every tensor that training changes, by name."""
    optimiser = {
        f"{i}.{k}": v
        for i, state in checkpoint["optimiser"]["state"].items()
        for k, v in state.items()
    }
    return {
        **checkpoint["model"],
        **{"momentum." + k: v for k, v in checkpoint["momentum"]["tensors"].items()},
        **optimiser,
    }


def log(folder):
    return runs.read_log(folder / "log.jsonl")


def test_a_step_is_figure_1(tiny):
    """Reference patches and prototypes are the momentum encoder's, Q and the losses the
    target's."""
    torch.manual_seed(1)
    momentum = train.MomentumEncoder(tiny.image_encoder, 0.0)
    with torch.no_grad():
        for p in tiny.image_encoder.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    names, images = ["red", "green", "blue"], torch.randn(2, 3, 64, 64)
    tokens, pixel_labels = tiny.tokenize(names), torch.randint(-1, 3, (2, 8, 8))
    pixel_labels = pixel_labels.repeat_interleave(8, 1).repeat_interleave(8, 2)
    args = train.parse(["--lambda-spd", "2", "--lambda-cpa", "3", "--spd-features", "raw"])
    loss, figures = train.step_losses(tiny, momentum, images, pixel_labels, tokens, args)
    with torch.no_grad():
        text = tiny.encode_text(tokens)
        V, V_M = tiny.encode_image(images)[0], momentum(images)[0]
        G = pixel_labels[:, ::8, ::8].flatten(1)
        right, right_M = (
            F.cosine_similarity(v[:, :, None], text, dim=-1).argmax(-1) == G for v in (V, V_M)
        )
        assert right.any() and right_M.any() and not torch.equal(right, right_M)
        spd, cpa, in_q = [], [], 0
        for b in range(2):
            spd.append((V[b] - V_M[b]).square().sum(-1)[right_M[b]].mean())
            valid = [c for c in range(3) if (right_M[b] & (G[b] == c)).any()]
            P = torch.stack([V_M[b][right_M[b] & (G[b] == c)].mean(0) for c in valid])
            terms = [
                -(F.cosine_similarity(V[b, p], P, dim=-1) / 0.1).log_softmax(0)[
                    valid.index(G[b, p])
                ]
                for p in range(64)
                if right[b, p] and G[b, p] in valid
            ]
            cpa.append(sum(terms) / len(terms))
            in_q += len(terms)
    figures = {name: value.item() for name, value in figures.items()}
    assert figures["spd_loss"] == pytest.approx(sum(spd).item() / 2, rel=1e-4)
    assert figures["cpa_loss"] == pytest.approx(sum(cpa).item() / 2, rel=1e-4)
    assert figures["reference_patches"] == right_M.sum() and figures["contrast_patches"] == in_q
    assert figures["labelled_patches"] == (G >= 0).sum()
    expected = figures["segmentation_loss"] + 2 * figures["spd_loss"] + 3 * figures["cpa_loss"]
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_losses_are_weighed_by_the_images_that_count(tiny, monkeypatch):
    """L_SEG by pixels, SPD by images with a reference patch, CPA by images whose Q is not empty."""
    masks = iter(
        [torch.tensor([True, True, True, False]), torch.tensor([True, False, False, True])]
    )
    counts = []
    monkeypatch.setattr(train, "reference_mask", lambda *_: next(masks)[:, None].expand(4, 64))
    monkeypatch.setattr(train, "weigh_by_process", lambda a, b: counts.extend(b) or a)
    momentum = train.MomentumEncoder(tiny.image_encoder, 1.0)
    pixel_labels = torch.zeros(4, 64, 64, dtype=torch.long)
    pixel_labels[:, :8] = -1
    args = train.parse(["--ignored", "skip"])
    images, tokens = torch.randn(4, 3, 64, 64), tiny.tokenize(["red", "green"])
    train.step_losses(tiny, momentum, images, pixel_labels, tokens, args)
    assert [int(n) for n in counts] == [4 * 56 * 64, 3, 1]


def test_a_run(go, tmp_path):
    checkpoint = go("a")
    lines = log(tmp_path / "a")
    steps = [l for l in lines if "total_loss" in l]
    assert [l["step"] for l in steps] == [1, 2, 3, 4, 5, 6] and checkpoint["step"] == 6
    for l in steps:
        assert l["total_loss"] == pytest.approx(
            l["segmentation_loss"] + 0.3 * l["spd_loss"] + 0.1 * l["cpa_loss"], rel=1e-5
        )
        assert {
            "reference_share",
            "contrast_patches",
            "lr",
            "lr_clip",
            "grad_norm",
            "seconds",
            "memory_gb",
        } <= l.keys()
        assert l["lr"] == pytest.approx(
            2.5e-3 * 0.5 * (1 + math.cos(math.pi * (l["step"] - 1) / 6))
        )
    assert (
        steps[-1]["segmentation_loss"] < steps[0]["segmentation_loss"] and steps[-1]["spd_loss"] > 0
    )
    results = json.loads((tmp_path / "a" / "results.json").read_text())
    assert (
        0 <= results["zero_shot"]["mIoU_union"] <= 100
        and results["trained"]["mIoU_union"] == lines[-1]["mIoU_union"]
    )
    assert results["before_tpa"]["reference_drift"] < 1e-6 < results["end"]["reference_drift"]
    assert visible(tmp_path / "a") == FILES


def test_an_interrupted_run_ends_bit_for_bit_like_an_uninterrupted_one(go, tmp_path, monkeypatch):
    whole, calls, update = go("whole"), [], train.MomentumEncoder.update

    def power_cut(self):
        calls.append(0)
        if len(calls) == 4:
            raise KeyboardInterrupt
        update(self)

    monkeypatch.setattr(train.MomentumEncoder, "update", power_cut)
    with pytest.raises(KeyboardInterrupt):
        go("cut")
    assert torch.load(tmp_path / "cut" / "last.pt", weights_only=True)["step"] == 2
    monkeypatch.setattr(train.MomentumEncoder, "update", update)
    again = go("cut", "--workers", "2")
    a, b = tensors(whole), tensors(again)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    (tmp_path / "cut" / "log.jsonl").open("a").write(
        '{"step": 6, "tot'
    )  # a line that a power cut left
    assert [l["step"] for l in runs.read_log(tmp_path / "cut" / "log.jsonl")][-1] == 6
    untimed = lambda folder: [
        {k: v for k, v in l.items() if k not in ("seconds", "memory_gb")} for l in log(folder)
    ]
    assert untimed(tmp_path / "whole") == untimed(tmp_path / "cut")


def test_a_resumed_run_keeps_its_original_clip(go, tmp_path, monkeypatch):
    """Also where --pretrained would give another one today."""
    a, build_model = go("a", "--steps", "2"), train.build_model

    def another(args, rank):
        model = build_model(args, rank)
        with torch.no_grad():
            for p in model.image_encoder.parameters():
                if p.requires_grad:
                    p.mul_(2)
        return model

    monkeypatch.setattr(train, "build_model", another)
    b = go("a", "--steps", "3")
    assert a["original"].keys() == b["original"].keys()
    assert all(torch.equal(a["original"][k], t) for k, t in b["original"].items())
    drift = json.loads((tmp_path / "a/results.json").read_text())["end"]["reference_drift"]
    assert 0 < drift < 0.1


def test_a_finished_run_is_evaluated_again_not_trained(go, tmp_path):
    a = go("a")
    before = log(tmp_path / "a")
    b = go("a")
    assert (
        all(torch.equal(a["model"][k], b["model"][k]) for k in a["model"])
        and log(tmp_path / "a") == before
    )
    assert torch.equal(
        go("a", "--restart")["model"]["head.logit.weight"], a["model"]["head.logit.weight"]
    )


def test_two_processes_equal_one_on_the_joined_batch(folder, tmp_path):
    """With images that have no label, and so no reference patch: each process has another number
    of those that count."""
    for i in (1, 4):
        Image.new("L", (80, 60), 255).save(folder / f"masks/train/{i}.png")
    for n in (1, 2):
        run(
            "train.py",
            "--dataset",
            f"folder:{folder}",
            "--out",
            tmp_path / str(n),
            *FAST,
            "--steps",
            "5",
            "--tpa-lr",
            "1e-5",
            "--lambda-spd",
            "10",
            "--lambda-cpa",
            "10",
            processes=n,
        )
    one, two = (torch.load(tmp_path / str(n) / "last.pt", weights_only=True) for n in (1, 2))
    for part in (lambda c: c["model"], lambda c: c["momentum"]["tensors"]):
        for name, t in part(one).items():
            torch.testing.assert_close(part(two)[name], t, rtol=0, atol=1e-5, msg=name)
    a, b = log(tmp_path / "1"), log(tmp_path / "2")
    for x, y in zip(a, b):
        assert all(
            x[k] == pytest.approx(y[k], rel=1e-3, abs=1e-5)
            for k in x
            if k not in ("seconds", "memory_gb", "grad_norm")
        )


def test_the_command_as_it_stands(tmp_path):
    """torchrun train.py --dataset coco-stuff: data where CAT-Seg's users have them, results in
    out/coco-stuff, also where a toy run is; evaluate.py writes beside the checkpoint."""
    for split in ("train", "val"):
        for place in (f"images/{split}2017", f"annotations/{split}2017"):
            (tmp_path / "data" / "coco-stuff" / place).mkdir(parents=True)
        for i in range(3):
            folder, name = tmp_path / "data/coco-stuff", f"{i:012}"
            Image.new("RGB", (70, 66), ("red", "green", "blue")[i]).save(
                folder / f"images/{split}2017/{name}.jpg"
            )
            Image.new("L", (70, 66), (0, 1, 255)[i]).save(
                folder / f"annotations/{split}2017/{name}.png"
            )
    (tmp_path / "out/toy").mkdir(parents=True)
    small = ("--clip", "tiny", "--pretrained", "none", "--steps", "2", "--channels", "16")
    small += ("--image-size", "64", "--batch-size", "2", "--tpa-steps", "1")
    where = dict(cwd=tmp_path, env={"DETECTRON2_DATASETS": str(tmp_path / "data")})
    done = run(
        ROOT / "train.py", "--dataset", "coco-stuff", *small, processes=2, fork=False, **where
    )
    out = tmp_path / "out/coco-stuff"
    assert visible(out) == FILES and "171 classes" in done.stdout
    assert (
        "warning: --dataset coco-stuff: val has 3 images, and a complete download 5000"
        in done.stdout
    )
    checkpoint = ("--checkpoint", out / "last.pt", "--datasets", "coco-stuff")
    run(ROOT / "evaluate.py", *checkpoint, "--views", "whole", **where)
    assert (out / "eval/coco-stuff.json").exists()
    nowhere = dict(cwd=tmp_path, env={"RPMD_DATA": str(tmp_path / "no")})
    done = run(ROOT / "train.py", "--dataset", "coco-stuff", *small, check=False, **nowhere)
    words = ("--data-root", "$RPMD_DATA", "$DETECTRON2_DATASETS", "./datasets", "train2017.zip")
    assert done.returncode == 1 and all(word in done.stderr for word in words), done.stderr


def test_accumulation_equals_the_whole_batch(go, tmp_path):
    """AdamW and clipping forgive a gradient of another length: its norm is looked at as well."""
    a, b = (
        go("a", "--distill", "none", "--steps", "3"),
        go("b", "--distill", "none", "--steps", "3", "--accumulate", "2"),
    )
    for name, t in a["model"].items():
        torch.testing.assert_close(b["model"][name], t, rtol=0, atol=1e-5, msg=name)
    norms = [[x["grad_norm"] for x in log(tmp_path / n) if "grad_norm" in x] for n in "ab"]
    assert len(norms[0]) == 3 and norms[1] == pytest.approx(norms[0], rel=1e-3)


@pytest.mark.parametrize("adapt", ["visual", "text", "none"])
def test_adapt(go, adapt):
    a = go(
        "a", "--adapt", adapt, "--steps", "2", *(["--tpa-steps", "0"] if adapt != "text" else [])
    )
    torch.manual_seed(0)
    start = build("tiny", 64, 16).state_dict()
    changed = {k.split(".")[0] for k, t in a["model"].items() if not torch.equal(t, start[k])}
    assert (
        changed
        == {"head"} | {"visual": {"image_encoder"}, "text": {"text_encoder"}, "none": set()}[adapt]
    )


def test_frozen_teacher_and_no_teacher(go):
    start = build("tiny", 64, 16)
    a = go("a", "--distill", "frozen", "--tpa-steps", "0", "--seed", "3")
    torch.manual_seed(3)
    start = build("tiny", 64, 16).image_encoder.state_dict()
    assert a["momentum"]["tensors"] and all(
        torch.equal(t, start[k]) for k, t in a["momentum"]["tensors"].items()
    )
    assert go("b", "--distill", "none")["momentum"] is None


def test_pooled_distillation_keeps_the_original_as_teacher(go):
    a, b = (
        go("a", "--distill", "pooled", "--tpa-steps", "0"),
        go("b", "--distill", "none", "--tpa-steps", "0"),
    )
    torch.manual_seed(0)
    start = build("tiny", 64, 16).image_encoder.state_dict()
    assert all(torch.equal(t, start[k]) for k, t in a["momentum"]["tensors"].items())
    name = "image_encoder.visual.transformer.resblocks.3.attn.v_proj_weight"
    assert not torch.equal(a["model"][name], b["model"][name])


def test_nan_stops_before_the_step_and_names_its_origin(go, tmp_path, monkeypatch):
    calls, steps, loss, step = [], [], train.cpa_loss, torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: steps.append(0) or step(self))

    def poisoned(*args):
        calls.append(0)
        return loss(*args) * (math.nan if len(calls) == 4 else 1)

    monkeypatch.setattr(train, "cpa_loss", poisoned)
    with pytest.raises(
        UserError,
        match=r"step 4: cpa_loss became NaN or infinite; images .*\.jpg, .*\.jpg; "
        r"nothing was written after .*last.pt",
    ):
        go("a", "--tpa-steps", "0")
    assert len(steps) == 3
    good = torch.load(tmp_path / "a" / "last.pt", weights_only=True)
    assert good["step"] == 2 and all(t.isfinite().all() for t in tensors(good).values())


def test_changed_flags(go, capsys):
    go("a", "--steps", "2")
    for flags, words in (
        (["--seed", "1"], "--seed 1 does not go with .*last.pt, which was trained with --seed 0"),
        (["--channels", "32"], "--channels 32 does not go"),
        (["--distill", "frozen"], "--distill frozen does not go"),
    ):
        with pytest.raises(UserError, match=words):
            go("a", *flags)
    changed = go(
        "a",
        "--steps",
        "4",
        "--tau",
        "0.5",
        "--alpha",
        "0.5",
        "--lr",
        "1e-3",
        "--weight-decay",
        "0.25",
        "--clip-lr-factor",
        "0.03",
    )
    assert changed["step"] == 4 and changed["momentum"]["alpha"] == 0.5
    assert [(g["base_lr"], g["weight_decay"]) for g in changed["optimiser"]["param_groups"]] == [
        (1e-3, 0.25),
        (1e-3, 0),
        (pytest.approx(3e-5), 0.25),
    ]
    out = capsys.readouterr().out
    assert "--steps is now 4, was 2" in out and "--tau is now 0.5, was 0.1" in out


@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_broken_image_stops_the_run_with_its_path(folder, tmp_path, workers):
    (folder / "images/train/3.jpg").write_bytes(b"\xff\xd8 no more")
    done = run(
        "train.py",
        "--dataset",
        f"folder:{folder}",
        "--out",
        tmp_path / "o",
        *FAST,
        "--workers",
        workers,
        check=False,
    )
    last = done.stderr.strip().splitlines()[-1]
    assert (
        done.returncode == 1
        and last.startswith("error: ")
        and "3.jpg can't be read as an image" in last
        and "Traceback" not in done.stderr
    )


@pytest.mark.parametrize(
    "flags, words",
    [
        (
            ["--dataset", "coco-stuff", "--data-root", "/nowhere"],
            "nothing is in /nowhere/coco-stuff/annotations/train2017, /nowhere/coco/",
        ),
        (["--batch-size", "3", "--accumulate", "2"], "--batch-size 3 does not divide"),
        (
            ["--dataset", "toy", "--clip", "ViT-B-16", "--pretrained", "openai"],
            "use --clip ViT-B-16-quickgelu",
        ),
    ],
)
def test_bad_flags_are_one_sentence(tmp_path, flags, words):
    done = run("train.py", "--out", tmp_path / "o", *flags, check=False)
    assert (
        done.returncode == 1
        and words in done.stderr
        and "Traceback" not in done.stderr
        and done.stderr.count("\n") == 1
    )


def test_sigterm_finishes_the_step_and_writes_a_checkpoint(folder, tmp_path):
    out = tmp_path / "o"
    command = [
        sys.executable,
        "train.py",
        "--dataset",
        f"folder:{folder}",
        "--out",
        out,
        *FAST,
        "--steps",
        "10000",
        "--save-every",
        "0",
        "--workers",
        "1",
    ]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    while not (out / "log.jsonl").exists() or "total_loss" not in (out / "log.jsonl").read_text():
        assert process.poll() is None
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGTERM)  # as torchrun does: loader processes too
    stdout, _ = process.communicate(timeout=30)
    step = torch.load(out / "last.pt", weights_only=True)["step"]
    assert (
        process.returncode == 130
        and step > 0
        and f"stopped after step {step} as asked; the same command goes on" in stdout
    )


def test_compiled_steps_equal_eager_ones(folder, tmp_path, go, monkeypatch):
    """--compile, with passes that accumulate, a head that is recomputed and a resumed run. The
    model is traced as one graph, which runs as it is: generating C++ is slow (gpu.py does)."""
    compiled, module_compile = [], torch.nn.Module.compile

    def compile_(module):
        compiled.append(module)
        module_compile(module, backend="eager", fullgraph=True)

    monkeypatch.setattr(torch.nn.Module, "compile", compile_)
    monkeypatch.setenv("CXX", sys.executable)  # any program that is there
    flags = ("--accumulate", "2", "--recompute-head", "--tpa-steps", "0")
    go("compiled", *flags, "--compile", "--steps", "1")
    a, b = go("compiled", *flags, "--compile", "--steps", "2"), go("eager", *flags, "--steps", "2")
    assert len(compiled) == 2
    assert list(a["model"]) == list(b["model"])
    moved = 0
    for name, t in tensors(b).items():
        torch.testing.assert_close(tensors(a)[name], t, rtol=0, atol=1e-5, msg=name)
        moved += not torch.equal(t, b["original"].get(name, t))
    assert moved > 5


def test_compile_without_a_compiler_is_refused(go, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(
        UserError, match="--compile needs a C\\+\\+ compiler, and there is no no-su"
    ):
        go("a", "--compile")


def test_weights_to_start_from_keep_their_bias(tmp_path):
    """--prior is for a head that has learnt nothing yet."""
    args = train.parse(["--pretrained", "none", "--channels", "16", "--prior", "0.2"])
    model = train.build_model(args, 0)
    assert model.head.logit.bias.sigmoid().item() == pytest.approx(0.2)
    torch.nn.init.constant_(model.head.logit.bias, 7.0)
    path = tmp_path / "start.pt"
    torch.save(dict(config=model.config, model=model.state_dict()), path)
    args.init_cat_seg = str(path)
    assert train.build_model(args, 0).head.logit.bias.item() == 7.0
