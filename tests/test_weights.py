"""Loading: CLIP as it is published, CAT-Seg's checkpoints, our own; and what is refused, how."""

import os
import pickle
import time
import zipfile

import huggingface_hub
import open_clip
import pytest
import torch
import torch.nn as nn

from cat_seg_reference import SMALL, to_cat_seg
from model import build
from support import weights
from support.errors import UserError


class Bomb:
    def __reduce__(self):
        return (os.system, ("touch exploded",))


def refusal(function, *arguments):
    """The text of the UserError that a call raises: one line that never advises to run code."""
    with pytest.raises(UserError) as e:
        function(*arguments)
    text = str(e.value)
    assert "\n" not in text and "weights_only" not in text and "\x1b" not in text
    return text


# Checkpoints


def test_own_checkpoint(tiny, tmp_path):
    path = tmp_path / "last.pt"
    torch.save(dict(config=tiny.config, model=tiny.state_dict(), step=3), path)
    again = weights.load(path)
    assert again.config == tiny.config and weights.read_checkpoint(path)["step"] == 3
    for a, b in zip(tiny.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    other = build("tiny", 64, 32)
    weights.load_state(other, weights.read_checkpoint(path)["model"], path)
    for a, b in zip(tiny.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b)


@pytest.fixture
def no_checkpoints(tiny, tmp_path, monkeypatch):
    """{name: what its refusal should say} of files in the current folder."""
    monkeypatch.chdir(tmp_path)
    good = dict(config=tiny.config, model=tiny.state_dict())
    state = good["model"]
    torch.save(good, "whole")
    content = (tmp_path / "whole").read_bytes()
    for name, data in {
        "random": os.urandom(2000),
        "empty": b"",
        "pickle": pickle.dumps(Bomb()),
        "cut": content[:5000],
        "cut late": content[:-100],
        "scribbled": content[:-3000] + bytes(3000),
        "half a zip": content[: len(content) // 2] + content[-500:],
    }.items():
        (tmp_path / name).write_bytes(data)
    torch.save({"model": {"a": Bomb()}}, "bomb")
    torch.save({"config": Bomb(), "model": state}, "code beside weights")
    with zipfile.ZipFile("unpacking", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", bytes(10**6))
    sparse = torch.zeros(()).to_sparse()
    neither = {
        "list": [1, 2],
        "other": {"model": {"some.weight": torch.zeros(3)}},
        "numbers for names": {"model": {1: torch.zeros(3)}},
    }
    unfit = {
        "nothing": {**good, "model": {}},
        "sparse": {**good, "model": {**state, "logit_scale": sparse}},
        "numbers for weights": {**good, "model": {"logit_scale": 3}},
        "missing": {**good, "model": {k: v for k, v in state.items() if k != "logit_scale"}},
        "shapes": {**good, "config": {**tiny.config, "channels": 64}},
        "no channels": {**good, "config": {"clip": "tiny", "image_size": 64}},
        "no config": {**good, "config": 3},
        "clip of the net": {**good, "config": {**tiny.config, "clip": "hf-hub:someone/model"}},
        "clip of no name": {**good, "config": {**tiny.config, "clip": None}},
        "no size": {**good, "config": {**tiny.config, "image_size": 10**9}},
    }
    for name, contents in {**neither, **unfit}.items():
        torch.save(contents, name)
    damaged = ("random", "empty", "pickle", "cut", "cut late", "scribbled", "half a zip", "bomb")
    code = "can't be read as a checkpoint of tensors and plain containers (it is cut short, damaged"
    other = "can't be read as a checkpoint of train.py, or of CAT-Seg with ViT-B/16 or ViT-L/14@336"
    unfit_words = "can't be read as weights of tiny (Error(s) in loading state_dict for Segmenter:"
    return {
        **dict.fromkeys((*damaged, "code beside weights"), code),
        **dict.fromkeys(neither, other),
        "unpacking": "unpacks to more than twice its size: it is no checkpoint",
        "missing": f'{unfit_words} Missing key(s) in state_dict: "logit_scale"',
        "shapes": f"{unfit_words} size mismatch for ",
        "numbers for weights": f"{unfit_words} Missing key(s)",
        "sparse": unfit_words,
        "nothing": f"{unfit_words} Missing key(s)",
        "no channels": "can't be read as a checkpoint (there is no 'channels' in it)",
        "no config": "can't be read as a checkpoint ('int' object",
        "clip of the net": "(--clip hf-hub:someone/model: open_clip has no model of this name",
        "clip of no name": "can't be read as a checkpoint (argument of type 'NoneType'",
        "no size": "can't be read as a checkpoint (--image-size 1000000000 should lie within 16.",
        "nowhere": ": no such checkpoint file",
        ".": ": no such checkpoint file",
    }


@pytest.mark.filterwarnings("ignore:Detected pickle protocol", "ignore:Validating sparse")
def test_files_that_are_no_checkpoint_are_refused_and_not_executed(no_checkpoints, tmp_path):
    for name, words in no_checkpoints.items():
        text = refusal(weights.load, name)
        assert text.startswith(name) and words in text, text
    assert not (tmp_path / "exploded").exists()


@pytest.mark.filterwarnings("ignore:for .* copying from a non-meta parameter")
def test_a_cat_seg_checkpoint_is_told_by_its_content_and_every_name_counts(tmp_path):
    with torch.device("meta"):
        shapes = to_cat_seg(build("ViT-B-16-quickgelu").state_dict())
    state = {name: torch.zeros(()).expand(t.shape) for name, t in shapes.items()}
    mask = "sem_seg_head.predictor.transformer.layers.0.swin_block.block_2.attn_mask"
    state[mask] = torch.zeros(4, 144, 144)
    path = tmp_path / "cat_seg.pth"
    torch.save({"model": state, "iteration": 79999}, path)
    found = weights.read_checkpoint(path)
    assert found["config"] == dict(clip="ViT-B-16-quickgelu", image_size=384, channels=128)
    with torch.device("meta"):
        model = build(**found["config"])
    assert found["model"].keys() == model.state_dict().keys()
    missing = {name: t for name, t in state.items() if name != "upsample1.bias"}
    for spoiled, words in (
        (missing, 'Missing key(s) in state_dict: "head.middle_up.0.bias"'),
        ({**state, "upsample3.bias": torch.zeros(3)}, 'Unexpected key(s) in state_dict: "'),
        ({**state, "upsample1.bias": torch.zeros(3)}, "size mismatch for head.middle_up.0.bias: "),
    ):
        text = refusal(weights.load_state, model, weights.from_cat_seg(spoiled), path)
        assert words in text and str(path) in text


def test_cat_segs_larger_checkpoint_is_told_by_its_content(tmp_path):
    kernel = torch.zeros(()).expand(1024, 3, 14, 14)
    path = tmp_path / "model_large.pth"
    torch.save({"model": {"sem_seg_head.predictor.clip_model.visual.conv1.weight": kernel}}, path)
    found = weights.read_checkpoint(path)
    assert found["config"]["clip"] == "ViT-L-14-336-quickgelu"
    assert [*found["model"]] == ["image_encoder.visual.conv1.weight"]


# Published weights of CLIP


@pytest.fixture
def small_clip(monkeypatch):
    """open_clip knows it as ViT, with GELU, and as ViT-quickgelu."""

    def sizes(name):
        return {**SMALL, "quick_gelu": "quick" in name}

    monkeypatch.setattr(open_clip, "get_model_config", sizes)
    torch.manual_seed(1)
    return open_clip.model.CLIP(**SMALL)


class Archive(nn.Module):
    """What OpenAI published: half precision, and constants among the weights."""

    def __init__(self, clip):
        super().__init__()
        for name, t in clip.state_dict().items():
            *path, last = name.split(".")
            at = self
            for word in path:
                if word not in at._modules:
                    at.add_module(word, nn.Module())
                at = at._modules[word]
            at.register_parameter(last, nn.Parameter(t.half().clone()))
        self.register_buffer("input_resolution", torch.tensor(32))

    def forward(self, x):
        return x


@pytest.mark.filterwarnings("ignore:.torch.jit")
def test_clip_weights_from_published_formats(small_clip, tmp_path):
    """A state dict, open_clip's training checkpoint, safetensors, OpenAI's TorchScript archive."""
    from safetensors.torch import save_file

    state = small_clip.state_dict()
    torch.save(state, tmp_path / "plain.pt")
    trained = {"module." + name: t for name, t in state.items()}
    torch.save({"epoch": 1, "state_dict": trained}, tmp_path / "training.pt")
    save_file(state, tmp_path / "model.safetensors")
    torch.jit.script(Archive(small_clip)).save(tmp_path / "archive.pt")
    for name in ("plain.pt", "training.pt", "model.safetensors", "archive.pt"):
        model = weights.build("ViT-quickgelu", str(tmp_path / name), 48, 32)
        tolerance = 1e-3 if name == "archive.pt" else 0
        for got, expected in (
            (model.text_encoder.token_embedding.weight, small_clip.token_embedding.weight),
            (
                model.image_encoder.visual.transformer.resblocks[5].attn.k_proj_weight,
                small_clip.visual.transformer.resblocks[5].attn.in_proj_weight.chunk(3)[1],
            ),
        ):
            torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)
    text = refusal(weights.build, "ViT", str(tmp_path / "archive.pt"), 48, 32)
    words = "was trained with QuickGELU and --clip ViT computes GELU: use --clip ViT-quickgelu"
    assert words in text


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_clip_files_that_do_not_fit(small_clip, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    other = open_clip.model.CLIP(**{**SMALL, "embed_dim": 16})
    torch.save(other.state_dict(), "other.pt")
    torch.save(Bomb(), "bomb.pt")
    torch.save([1], "list.pt")
    content = (tmp_path / "other.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(content[:5000])
    (tmp_path / "cut.safetensors").write_bytes(content[:5000])
    (tmp_path / "empty.pt").write_bytes(b"")
    with zipfile.ZipFile("archive.pt", "w") as archive:
        archive.writestr("x/constants.pkl", b"")
    broken = "can't be read as weights of ViT-quickgelu (it is cut short, damaged or holds code)"
    for name, words in {
        "other.pt": "size mismatch for",
        "bomb.pt": broken,
        "cut.pt": broken,
        "empty.pt": broken,
        "list.pt": broken,
        "cut.safetensors": broken,
        "archive.pt": broken,
    }.items():
        text = refusal(weights.build, "ViT-quickgelu", name, 48, 32)
        assert text.startswith(f"--pretrained {name} ") and words in text, text
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    "clip, pretrained, words",
    [
        (
            "ViT-B-16",
            "openai",
            "with QuickGELU and --clip ViT-B-16 computes GELU: use --clip ViT-B-16-quickgelu",
        ),
        ("ViT-B-16-quickgelu", "laion2b_s34b_b88k", "neither a file nor one of open_clip's tags"),
        ("ViT-H-14-378-quickgelu", None, "27 x 27 patches; the head needs an even number"),
        ("ViT-B-17", None, "no model of this name"),
        ("hf-hub:laion/CLIP-ViT-B-16", None, "no model of this name"),
        ("RN50", None, "only CLIP models with a plain ViT"),
        ("ViT-B-16-SigLIP", None, "only CLIP models with a plain ViT"),
        ("ViT-L-14-CLIPA", None, "only CLIP models with a plain ViT"),
        ("tiny", "/nowhere.pt", "neither a file nor one of open_clip's tags for tiny: none"),
    ],
)
def test_clips_that_do_not_fit_are_refused_before_they_are_built(
    clip, pretrained, words, monkeypatch
):
    monkeypatch.setattr(weights, "build_segmenter", None)
    assert words in refusal(weights.build, clip, pretrained)


@pytest.mark.parametrize("image_size, channels", [(8, 32), (4096, 32), (64, 8), (64, 4096)])
def test_sizes_out_of_range_are_refused(image_size, channels):
    assert "should lie within 16..2048" in refusal(
        weights.build, "tiny", None, image_size, channels
    )


# The network


@pytest.fixture
def no_network(tmp_path, monkeypatch):
    """An empty cache, and a hub at a port where nobody answers."""
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    template = "http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.mark.parametrize(
    "clip, tag, source",
    [
        ("ViT-B-16-quickgelu", "openai", "/ViT-B-16.pt elsewhere"),
        ("ViT-B-16", "laion2b_s34b_b88k", "laion/CLIP-ViT-B-16-laion2B-s34B-b88K"),
    ],
)
def test_without_a_network_one_sentence_names_the_remedy_at_once(no_network, clip, tag, source):
    """huggingface_hub alone goes on asking for 48 seconds."""
    begin = time.monotonic()
    text = refusal(weights.build, clip, tag)
    assert time.monotonic() - begin < 5
    assert text.startswith(f"--pretrained {tag} could not be downloaded (") and source in text
    assert text.endswith("use --pretrained FILE")


@pytest.mark.parametrize("name", ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"])
def test_without_a_network_the_cache_will_do(no_network, tmp_path, name):
    folder = tmp_path / "hub" / "models--someone--model"
    for path, content in (("refs/main", "abc"), (f"snapshots/abc/{name}", "weights")):
        (folder / path).parent.mkdir(parents=True)
        (folder / path).write_text(content)
    path = weights.download({"hf_hub": "someone/model/", "url": ""}, "tag")
    assert path == str(folder / "snapshots" / "abc" / name)


def test_without_a_network_the_cache_of_openais_package_will_do(no_network, tmp_path):
    path = tmp_path / ".cache" / "clip" / "ViT.pt"
    path.parent.mkdir(parents=True)
    path.write_text("weights")
    tag = {"hf_hub": "someone/model/", "url": "http://127.0.0.1:9/ViT.pt"}
    assert weights.download(tag, "openai") == str(path)
