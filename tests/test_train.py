"""Training: what a step computes, what each flag does, and that processes, micro-batches, precision
and compilation change nothing but how it is computed."""
import itertools
import json
import math
import os
import re
import subprocess
import sys

import pytest
import torch
from PIL import Image

import train
from conftest import ROOT
from ema import MomentumEncoder
from model import build
from support.files import UserError
from test_accidents import ends, read_log, start  # noqa: F401: a fixture
from test_checkpoint import TEXT, VISION
from test_losses import by_loops

SMALL = ("--image-size=32", "--steps=2", "--tpa-steps=1")
VALUES = "image_encoder.visual.transformer.resblocks.3.attn.v_proj_weight"


@pytest.fixture
def go(training, monkeypatch):
    """Train in this process, looking at few reference patches: go(name, *flags) -> (the
    checkpoint, the lines of the log that tell of steps)."""
    share = train.reference_share
    monkeypatch.setattr(train, "reference_share", lambda *arguments: share(
        *arguments[:-1], itertools.islice(arguments[-1], 1)))
    monkeypatch.setattr("evaluate.examples", lambda *everything: None)

    def go(name, *flags):
        out = training(name, *SMALL, *flags)
        lines = [line for line in read_log(out) if "total_loss" in line]
        return torch.load(out / "last.pt", weights_only=True), lines

    return go


def assert_near(a, b):
    """Two checkpoints' models and momentum encoders are equal to rounding."""
    for part in ("step", "model", "momentum"):
        torch.testing.assert_close(a[part], b[part], rtol=0, atol=1e-5)


def start_of(seed=0):
    """The state of the model that `go` begins with."""
    torch.manual_seed(seed)
    return build("tiny", 32, 16, prior=train.TOY["prior"]).state_dict()


def test_a_step_is_figure_1(tiny, monkeypatch):
    """Reference patches and prototypes are the momentum encoder's, Q and the losses the model's. In
    the second image no patch is correct. Each loss is weighed by the images it is a mean over."""
    torch.manual_seed(1)
    momentum = MomentumEncoder(tiny.image_encoder, 0.0)
    with torch.no_grad():
        for p in tiny.image_encoder.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    tokens = tiny.tokenize(["red", "green", "blue"])
    images, G = torch.randn(2, 3, 64, 64), torch.randint(-1, 3, (2, 64))
    with torch.no_grad():
        V, V_M, text = tiny.encode_image(images)[0], momentum(images)[0], tiny.encode_text(tokens)
    G[1, (V[1] @ text.T).argmax(-1) == G[1]] = -1
    pixel_labels = G.reshape(2, 8, 8).repeat_interleave(8, 1).repeat_interleave(8, 2)
    counts = []
    monkeypatch.setattr(train, "weigh_by_process", lambda losses, n: counts.extend(n) or losses)
    args = train.parse("--lambda-spd 2 --lambda-cpa 3 --spd-features raw".split())
    loss, figures = train.step_losses(tiny, momentum, images, pixel_labels, tokens, args)
    reference, q, _, spd, cpa = by_loops(V, V_M, text, G)
    assert (q & ~reference).any() and (reference & ~q).any() and counts == [2, 1]
    figures = {name: value.item() for name, value in figures.items()}
    assert (figures["spd_loss"], figures["cpa_loss"]) == pytest.approx((spd, cpa), rel=1e-4)
    assert figures["reference_patches"] == reference.sum()
    assert figures["contrast_patches"] == q.sum()
    assert figures["labelled_patches"] == (G >= 0).sum()
    expected = figures["segmentation_loss"] + 2 * figures["spd_loss"] + 3 * figures["cpa_loss"]
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_a_run_its_log_and_what_comes_after(go, tmp_path, monkeypatch):
    """A finished run is evaluated again; --restart begins anew."""
    out = tmp_path / "a"
    a, steps = go("a", "--snapshot-every=1")
    assert [line["step"] for line in steps] == [1, 2] and a["step"] == 2
    for line in steps:
        weighed = line["segmentation_loss"] + 0.3 * line["spd_loss"] + 0.1 * line["cpa_loss"]
        assert line["total_loss"] == pytest.approx(weighed, rel=1e-5)
        cosine = 0.5 * (1 + math.cos(math.pi * (line["step"] - 1) / 2))
        assert (line["lr"], line["lr_clip"]) == pytest.approx((2.5e-3 * cosine, 7.5e-4 * cosine))
        assert 0 <= line["reference_share"] <= 1 and line["grad_norm"] > 0 and "seconds" in line
    assert steps[-1]["segmentation_loss"] < steps[0]["segmentation_loss"]
    first, aligned, *_, last = log = read_log(out)
    assert first["step"] == aligned["step"] == 0 and aligned["tpa_loss"] > 0
    text = (out / "results.json").read_text()
    assert (json.loads(text)["start"], json.loads(text)["trained"]) == (first, last)
    momentum = a["momentum"][VALUES.removeprefix("image_encoder.")]
    assert not torch.equal(momentum, a["original"][VALUES]), "it has not followed"
    b, _ = go("a", "--snapshot-every=1")
    torch.testing.assert_close(b["model"], a["model"], rtol=0, atol=0)
    assert read_log(out) == log and (out / "results.json").read_text() == text
    with pytest.raises(ZeroDivisionError), monkeypatch.context() as patch:
        patch.setattr(train, "pre_align", lambda *everything: 1 / 0)
        go("a", "--restart", "--steps=1")
    left = {path.name for path in out.glob("*.*") if path.suffix in (".pt", ".json")}
    assert not left, "the same command would resume the run before, or report its results"
    c, steps = go("a", "--restart", "--steps=1")
    assert c["step"] == 1 and [line["step"] for line in steps] == [1]


def test_pre_alignment_changes_the_text_encoder_alone_and_its_teacher_is_clip(go):
    """Nothing moves at a learning rate of 0 but in TPA."""
    a, _ = go("a", "--lr=0", "--tpa-lr=1e-3", "--steps=1")
    start = start_of()
    changed = {k for k, t in a["model"].items() if not torch.equal(t, start[k])}
    assert changed and all(re.fullmatch(r"text_encoder.*\.[qv]_proj_weight", k) for k in changed)
    assert all(torch.equal(t, start[k]) for k, t in a["original"].items())
    assert a["original"].keys() > changed


def test_the_optimiser_decays_all_but_norms(tiny):
    names = {id(p): name for name, p in tiny.named_parameters() if p.requires_grad}
    optimiser = train.build_optimiser(tiny, train.parse([]))
    train.set_learning_rate(optimiser, 1, 3)
    for group in optimiser.param_groups:
        kind, decay, factor = group["name"], group["weight_decay"], group["lr"] / (0.75 * 2.5e-3)
        assert decay == (0 if kind == "norms" else 1e-4)
        assert factor == pytest.approx(0.3 if kind == "clip" else 1)
        for name in [names.pop(id(p)) for p in group["params"]]:
            expected = "norms" if "norm" in name else "head"
            assert kind == (expected if name.startswith("head.") else "clip"), name
    assert not names, "some parameters are in no group"


def test_an_infinite_gradient_is_the_scalers_and_an_infinite_loss_nobodys():
    finite, nan = {"cpa_loss": torch.tensor(1.0)}, {"spd_loss": torch.tensor(math.nan)}
    fp16, other = (torch.amp.GradScaler("cpu", enabled=enabled) for enabled in (True, False))
    train.refuse_non_finite(finite, math.inf, fp16, "step 1")
    with pytest.raises(UserError, match="the gradient, "):
        train.refuse_non_finite(finite, math.inf, other, "step 1")
    with pytest.raises(UserError, match="^spd_loss became"):
        train.refuse_non_finite(finite | nan, 1.0, fp16, "step 1")


@pytest.mark.parametrize("distill", ["frozen", "pooled", "none"])
def test_distill(go, distill):
    """The teacher of frozen and pooled stays the CLIP that training began with. What is not RPMD
    has neither pre-alignment nor SPD."""
    a, steps = go("a", f"--distill={distill}", "--seed=3")
    terms = {name for name in steps[-1] if name.endswith("_loss")}
    own = {"frozen": {"spd_loss", "cpa_loss"}, "pooled": {"pooled_loss"}, "none": set()}[distill]
    assert terms == own | {"segmentation_loss", "total_loss"}
    if distill == "pooled":
        first, last = steps[0], steps[-1]
        assert last["total_loss"] == pytest.approx(
            last["segmentation_loss"] + 0.03 * last["pooled_loss"], rel=1e-5)
        assert abs(first["pooled_loss"]) < 1e-5 < last["pooled_loss"]
    start = start_of(seed=3)
    assert (a["momentum"] is None) == (distill == "none")
    for name, tensor in (a["momentum"] or {}).items():
        assert torch.equal(tensor, start[f"image_encoder.{name}"])
    assert not torch.equal(a["model"][VALUES], start[VALUES])


def test_adapt_and_mixed_precision(go):
    """Near float32's losses, which are computed outside of it. (test_model.py: what adapts.)"""
    losses = {}
    for precision in ("bf16", "fp16", "fp32"):
        flags = ("--steps=1", "--adapt=visual", f"--precision={precision}")
        a, [losses[precision]] = go(precision, *flags)
    start = start_of()
    changed = {k.split(".")[0] for k, t in a["model"].items() if not torch.equal(t, start[k])}
    assert changed == {"head", "image_encoder"} and a["args"]["tpa_steps"] == 0
    full = losses.pop("fp32")
    for mixed in losses.values():
        assert mixed["segmentation_loss"] != full["segmentation_loss"]
        for name in ("segmentation_loss", "cpa_loss"):
            assert mixed[name] == pytest.approx(full[name], rel=0.02, abs=1e-3)


def test_accumulation_equals_the_whole_batch(go):
    """AdamW and clipping forgive a gradient of another length: its norm is looked at as well."""
    (a, whole), (b, parts) = go("a", "--distill=none"), go("b", "--distill=none", "--accumulate=2")
    assert_near(a, b)
    for x, y in zip(whole, parts, strict=True):
        for name in ("grad_norm", "total_loss"):
            assert y[name] == pytest.approx(x[name], rel=1e-3)


def test_compiled_steps_equal_plain_ones(go, monkeypatch):
    """Also with micro-batches. The model is traced as one graph. It runs as it is, unless
    $RPMD_COMPILE asks for inductor, which takes minutes (.ci/run and gpu.py do)."""
    compiled, module_compile = [], torch.nn.Module.compile
    backend = os.environ.get("RPMD_COMPILE", "eager")
    monkeypatch.setattr("torch._inductor.config.cpp.simdlen", 1)  # takes less time to compile

    def compile_(module):
        compiled.append(module)
        module_compile(module, backend=backend, fullgraph=True)

    monkeypatch.setattr(torch.nn.Module, "compile", compile_)
    monkeypatch.setattr("model.TINY", dict(embed_dim=16, vision_cfg=VISION,
                                           text_cfg=TEXT | {"vocab_size": 49408}))
    flags = ("--accumulate=2", "--tpa-steps=0", "--steps=1")
    a, _ = go("a", *flags)
    b, _ = go("b", *flags, "--compile")
    assert len(compiled) == 1 and a["model"].keys() == b["model"].keys()
    assert_near(a, b)


def test_init_cat_seg_brings_every_weight(tmp_path):
    """The prior is for a head that has learnt nothing yet."""
    args = train.parse(["--pretrained=none"])
    model = train.build_model(args, 0)
    assert model.head.logit.bias.sigmoid().item() == pytest.approx(args.prior)
    torch.nn.init.constant_(model.head.logit.bias, 7.0)
    torch.save(dict(config=model.config, model=model.state_dict()), tmp_path / "start.pt")
    again = train.build_model(train.parse([f"--init-cat-seg={tmp_path}/start.pt", "--seed=5"]), 0)
    torch.testing.assert_close(again.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_names_that_read_alike_are_refused_although_one_is_held_out(go, folder):
    (folder / "classes.txt").write_text("red thing\nRed thing\nblue thing")
    with pytest.raises(UserError, match="'red thing' and 'Red thing' alike"):
        go("a", "--unseen=Red thing")


def test_two_processes_equal_one_on_the_joined_batch(folder, start):
    """With images that have no label, and so no reference patch: each process has another number
    of those that count. SPD and CPA weigh much, and are not lost in L_SEG."""
    for i in (1, 4):
        Image.new("L", (80, 60), 255).save(folder / f"masks/train/{i}.png")
    flags = ("--lambda-spd=10", "--lambda-cpa=10", "--tpa-lr=1e-5", "--steps=2")
    [one], [two, other] = start("one", *flags), start("two", *flags, processes=2)
    for process in (one, two, other):
        ends(process, 0)
    assert_near(*(torch.load(p.out / "last.pt", weights_only=True) for p in (one, two)))
    for x, y in zip(read_log(one.out), read_log(two.out), strict=True):
        for name in x.keys() - {"seconds", "gpu_memory_gb", "grad_norm", "classes"}:
            assert x[name] == pytest.approx(y[name], rel=1e-3, abs=1e-4), name


@pytest.fixture(scope="module", autouse=True)
def command(tmp_path_factory):
    """torchrun train.py --dataset coco-stuff as it stands, with data where CAT-Seg's users have
    them. It runs beside the other tests. Gives the process and its folder."""
    home = tmp_path_factory.mktemp("home")
    for split, (i, colour) in itertools.product(("train", "val"), enumerate(("red", "blue"))):
        for place in (f"images/{split}2017", f"annotations/{split}2017"):
            (home / "coco-stuff" / place).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (70, 66), colour).save(home / f"coco-stuff/images/{split}2017/{i:012}.jpg")
        Image.new("L", (70, 66), i).save(home / f"coco-stuff/annotations/{split}2017/{i:012}.png")
    words = (f"{sys.executable} -m torch.distributed.run --standalone --nproc_per_node=2 "
             f"{ROOT}/train.py --dataset coco-stuff --clip tiny --image-size 32 --steps 1 "
             "--batch-size 4 --tpa-steps 1").split()
    env = dict(os.environ, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="", DETECTRON2_DATASETS=home)
    with open(home / "said.txt", "w") as said:
        process = subprocess.Popen(words, cwd=home, env=env, stdout=said, stderr=said)
    yield process, home
    process.terminate()
    process.wait()


def test_the_command_as_it_stands(command):
    process, home = command
    status, said = process.wait(200), (home / "said.txt").read_text()
    assert status == 0, said[-4000:]
    assert {path.name for path in (home / "out/coco-stuff").iterdir()} == {
        ".lock", "last.pt", "log.jsonl", "results.json", "curves.png", "examples.png"}
    assert "171" in said and "zero-shot" in said
    assert "5000" in said  # in a complete download


def test_what_a_resumed_run_may_change(go, folder, tmp_path, capsys, monkeypatch):
    """Its data may have moved; it keeps the CLIP it began with."""
    monkeypatch.setitem(train.TOY, "log_every", 10)
    own = ("--eval-every=1", "--tpa-steps=0")
    a, _ = go("a", "--snapshot-every=1", *own)
    for flag, before, now in (("steps", "2", "3"), ("tau", "0.1", "0.5")):
        with pytest.raises(UserError, match=f"trained with {flag} {before}, not {now}: use"):
            go("a", f"--{flag}={now}", *own)
    (tmp_path / "a/step-000001.pt").rename(tmp_path / "a/last.pt")
    moved = folder.rename(tmp_path / "moved")
    own = (f"--dataset=folder:{moved}", *own)
    b, _ = go("a", *own)
    assert [line["step"] for line in b["log"] if "mIoU_union" in line] == [0, 1]
    assert "after step 1" in capsys.readouterr().out
    for part in ("step", "original", "model"):
        torch.testing.assert_close(a[part], b[part], rtol=0, atol=0)
    for path in (moved / "masks/train/4.png", moved / "images/train/4.jpg"):
        path.rename(path.with_stem("7"))
    with pytest.raises(UserError, match="last.pt was trained with images"):
        go("a", *own)
    (moved / "classes.txt").write_text("red thing\ngreen thing\npink thing")
    with pytest.raises(UserError, match="last.pt was trained with .*blue thing.*, not .*pink"):
        go("a", *own)


@pytest.mark.parametrize("flag", (
    "--lambda-spd=-1 --lambda-cpa=nan --tau=0 --tau=inf --alpha=2 --steps=1.5 --batch-size=0 "
    "--accumulate=0 --save-every=-1 --image-size=8 --seed=-1 --lr=x --adapt=head --step=3").split())
def test_flags_out_of_range_are_refused(flag, capsys):
    with pytest.raises(SystemExit) as e:
        train.parse([flag])
    assert e.value.code == 2
    assert flag.partition("=")[0] in capsys.readouterr().err.splitlines()[-1]


def test_defaults_follow_the_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    real, toy = ("ViT-B-16-quickgelu", "openai", 80_000), ("tiny", "toy", 320)
    for dataset, folder, own in (("coco-stuff", "coco-stuff", real), ("folder:a/b/", "b", real),
                                 ("folder:.", tmp_path.name, real), ("toy:3", "toy-3", toy)):
        args = train.parse([f"--dataset={dataset}"])
        assert (args.clip, args.pretrained, args.steps) == own and args.out == f"out/{folder}"
    assert train.parse(["--dataset=folder:x", "--clip=tiny"]).pretrained == "none"
    assert train.parse(["--dataset=coco-stuff", "--steps=300"]).alpha == 0.99  # a third of the run
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "1")
    assert train.parse([]).batch_size == train.parse(["--accumulate=2"]).batch_size == 6
    with pytest.raises(UserError, match="--batch-size 8 does not divide among"):
        train.parse(["--accumulate=2", "--batch-size=8"])


@pytest.mark.parametrize("flags, words", [
    ("--unseen pink", "--unseen pink"), ("--pretrained /x.pt", "--pretrained /x.pt"),
    ("--pretrained none --image-size 100", "--clip tiny with --image-size 100: "),
    ("--init-cat-seg /nowhere.pt", "/nowhere.pt: no such checkpoint")])
def test_what_cannot_be_is_named(tmp_path, flags, words):
    with pytest.raises(UserError, match=words):
        train.main(train.parse([*flags.split(), f"--out={tmp_path}"]))
