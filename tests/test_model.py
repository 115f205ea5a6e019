"""The segmenter: against a literal transcription of CAT-Seg, against CAT-Seg's own numbers, and its loading."""
import json
import os
import pickle
import sys
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import torch.nn as nn

import cat_seg_reference as reference
import evaluate
import losses
import model as segmenter

GOLDEN = Path(os.environ.get("RPMD_GOLDEN", Path(__file__).parents[2] / "shared" / "golden"))
SMALL = dict(embed_dim=24, quick_gelu=True, vision_cfg=dict(image_size=32, patch_size=8, width=32, layers=6, head_width=16),
             text_cfg=dict(context_length=77, width=32, heads=2, layers=2))


def to_cat_seg(state):
    """Our state dict under CAT-Seg's names, written independently of model.py's table."""
    out = {}
    for name, t in state.items():
        part = name.split(".")
        if name.startswith("image_encoder."):
            new = reference.CLIP + name.removeprefix("image_encoder.")
        elif name.startswith("text_encoder."):
            new = reference.CLIP + name.removeprefix("text_encoder.")
        elif name == "logit_scale":
            new = reference.CLIP + name
        elif part[1] == "spatial" and part[3] == "blocks":
            inner = {"mlp.0": "mlp.fc1", "mlp.2": "mlp.fc2"}.get(".".join(part[5:7]), part[5] if part[5].startswith("norm") else f"attn.{part[5]}")
            new = f"{reference.HEAD}layers.{part[2]}.swin_block.block_{int(part[4]) + 1}.{inner}.{part[-1]}"
        elif part[1] == "spatial":
            new = f"{reference.HEAD}layers.{part[2]}.swin_block." + ".".join(part[3:])
        elif part[1] == "classes":
            rest = ".".join(part[3:])
            rest = {"padding_token": "padding_tokens"}.get(rest, rest.replace("mlp", "MLP"))
            new = f"{reference.HEAD}layers.{part[2]}.attention." + (f"attention.{rest}" if part[3] in "qkv" else rest)
            t = t[None, None] if "padding" in rest else t
        elif part[1] == "middle_up":
            new = f"upsample{int(part[2]) + 1}.{part[3]}"
        elif part[1] == "middle_guidance":
            new = f"{reference.HEAD}decoder_guidance_projection.{part[2]}.0.{part[3]}"
        elif part[1] == "decoder":
            inner = {"up": "up", "conv1": "conv.double_conv.0", "norm1": "conv.double_conv.1", "conv2": "conv.double_conv.3", "norm2": "conv.double_conv.4"}
            new = f"{reference.HEAD}decoder{int(part[2]) + 1}.{inner[part[3]]}.{part[4]}"
        else:
            new = reference.HEAD + {"embed": "conv1", "image_guidance": "guidance_projection.0", "text_guidance": "text_guidance_projection.0",
                                    "logit": "head"}[part[1]] + "." + part[2]
        out[new] = t
    return out


@pytest.fixture
def small():
    """A class-token CLIP with QuickGELU whose positional embedding must be resized: 4x4 -> 6x6; every weight random."""
    torch.manual_seed(0)
    net = segmenter.Segmenter(open_clip.model.CLIP(**SMALL), 48, 32, {})
    with torch.no_grad():
        for name, p in net.named_parameters():
            p.add_(0.1 * torch.randn_like(p)) if p.dim() < 2 else p.copy_(torch.randn_like(p) * p[0].numel() ** -0.5)
    return net


NAMES = ["cat", "dining table", "building, edifice", "sky-other", "red"]


@pytest.mark.parametrize("training", [True, False])
def test_equals_cat_seg_written_literally(small, training):
    """Patches, text, logits, loss and every gradient, in training (2x2 pooling) and evaluation (none)."""
    small.train(training)
    state = {n: t.clone().requires_grad_() if t.dtype.is_floating_point else t for n, t in to_cat_seg(small.state_dict()).items()}
    images, target = torch.randn(2, 3, 48, 48), torch.randint(-1, 5, (2, 48, 48))
    full = open_clip.tokenizer.SimpleTokenizer()(["A photo of a {} in the scene".format(n.split(",")[0]) for n in NAMES])
    patches, middle = reference.encode_image(state, images, layers=6, heads=2, patch=8, side=6)
    text = reference.encode_text(state, full, layers=2, heads=2)
    logits = reference.head(state, patches, middle, text.expand(2, -1, -1), 6, 2 if training else 1, window=3)
    loss = reference.loss(logits, target)
    loss.backward()

    tokens = small.tokenize(NAMES)
    assert tokens.shape == (5, 12) and torch.equal(full[:, :12], tokens) and (full[:, 12:] == 0).all()
    got, got_patches, got_text = small(images, tokens)
    got_loss = losses.segmentation_loss(got, target)
    got_loss.backward()
    for a, b in ((got_patches, patches), (got_text, text), (got, logits), (got_loss, loss)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    grads = {n: p.grad for n, p in small.named_parameters() if p.requires_grad}
    expected = {n: t.grad for n, t in state.items() if t.dtype.is_floating_point}
    for name, grad in to_cat_seg(grads).items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-3, atol=1e-6, msg=name)


def test_more_than_256_classes(small):
    small.eval()
    state = to_cat_seg(small.state_dict())
    images, text = torch.randn(2, 3, 48, 48), nn.functional.normalize(torch.randn(260, 24), dim=-1)
    with torch.no_grad():
        patches, middle = small.encode_image(images)
        got = small.segment(patches, middle, text)
        expected = reference.top_256(state, patches, middle, text, 6, 1, window=3)
    assert (got == -100).flatten(2).all(-1).sum(1).tolist() == [4, 4]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_training_on_more_than_256_classes_reaches_every_parameter(small):
    """DDP waits for the gradient of every trained parameter, padding included."""
    logits, _, _ = small(torch.randn(1, 3, 48, 48), small.tokenize([f"thing {i}" for i in range(257)]))
    losses.segmentation_loss(logits, torch.randint(0, 257, (1, 48, 48))).backward()
    assert [n for n, p in small.named_parameters() if p.requires_grad and p.grad is None] == []


def test_recomputing_the_head_changes_nothing(small):
    images, target, tokens = torch.randn(2, 3, 48, 48), torch.randint(-1, 5, (2, 48, 48)), small.tokenize(NAMES)
    grads = []
    for small.head.recompute in (False, True):
        small.zero_grad()
        losses.segmentation_loss(small(images, tokens)[0], target).backward()
        grads.append([p.grad.clone() for p in small.parameters() if p.requires_grad])
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b)


def test_gradients_under_functional_call(tiny):
    """Weights put in place by functional_call are those that the backward pass uses, recomputed activations included."""
    images, weight = torch.randn(1, 3, 64, 64), "visual.transformer.resblocks.2.mlp.c_proj.weight"
    other = {weight: 2 * dict(tiny.image_encoder.named_parameters())[weight].detach()}
    images.requires_grad_()
    got, = torch.autograd.grad(torch.func.functional_call(tiny.image_encoder, other, (images,))[0].square().sum(), images)
    with torch.no_grad():
        dict(tiny.image_encoder.named_parameters())[weight].mul_(2)
    expected, = torch.autograd.grad(tiny.encode_image(images)[0].square().sum(), images)
    torch.testing.assert_close(got, expected)


def test_split_attention_equals_multihead_attention():
    torch.manual_seed(0)
    packed, x = nn.MultiheadAttention(24, 3, batch_first=True), torch.randn(2, 5, 24)
    nn.init.normal_(packed.in_proj_bias)
    mask = torch.full((5, 5), float("-inf")).triu(1)
    for causal in (False, True):
        expected = packed(x, x, x, need_weights=False, attn_mask=mask if causal else None)[0]
        torch.testing.assert_close(segmenter.Attention(packed)(x, causal), expected)


def test_text_features_are_open_clips():
    torch.manual_seed(0)
    clip = open_clip.model.CLIP(**SMALL)
    tokens = open_clip.tokenizer.SimpleTokenizer()(["A photo of a cat in the scene", "A photo of a very old dining table in the scene"])
    with torch.no_grad():
        expected = clip.encode_text(tokens, normalize=True)
        net = segmenter.Segmenter(clip, 48, 32, {})
        torch.testing.assert_close(net.encode_text(net.tokenize(["cat", "very old dining table"])), expected, rtol=1e-4, atol=1e-6)


def test_a_clip_that_pools_by_averaging_keeps_each_positions_residual(tiny, small):
    assert small.image_encoder.class_token_residual and not tiny.image_encoder.class_token_residual
    images = torch.randn(1, 3, 64, 64)
    own = tiny.encode_image(images)[0]
    tiny.image_encoder.class_token_residual = True
    assert not torch.allclose(own, tiny.encode_image(images)[0], atol=1e-2)


@pytest.mark.parametrize("adapt", ["both", "visual", "text", "none"])
def test_what_trains(tiny, adapt):
    tiny.set_trained(adapt)
    trained = {n for n, p in tiny.named_parameters() if p.requires_grad}
    clip = {n for n in trained if not n.startswith("head.")}
    visual = {f"image_encoder.visual.transformer.resblocks.{i}.attn.{c}_proj_weight" for i in range(4) for c in "qv"}
    visual -= {"image_encoder.visual.transformer.resblocks.3.attn.q_proj_weight"}          # the dense last block has no q
    text = {f"text_encoder.transformer.resblocks.{i}.attn.{c}_proj_weight" for i in range(2) for c in "qv"}
    assert clip == {"both": visual | text, "visual": visual, "text": text, "none": set()}[adapt]
    assert {n for n, _ in tiny.named_parameters() if n.startswith("head.")} == trained - clip
    tiny(torch.randn(1, 3, 64, 64), tiny.tokenize(["a", "b"]))[0].sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in tiny.parameters())


def test_forward_is_its_steps(tiny):
    images, tokens = torch.randn(2, 3, 64, 64), tiny.tokenize(["red", "blue thing"])
    logits, patches, text = tiny(images, tokens)
    v, middle = tiny.encode_image(images)
    t = tiny.encode_text(tokens)
    cost = tiny.cost(v, t)
    assert patches.shape == (2, 64, 128) and text.shape == (2, 128) and cost.shape == (2, 2, 8, 8) and logits.shape == (2, 2, 32, 32)
    x = tiny.head.aggregate(cost, v, t.expand(2, -1, -1))
    assert torch.equal(tiny.head.decode(x, middle), logits) and torch.equal(v, patches) and torch.equal(t, text)


# loading

def test_own_checkpoint(tiny, tmp_path):
    torch.save(dict(config=tiny.config, model=tiny.state_dict(), step=3), tmp_path / "last.pt")
    again = segmenter.load(tmp_path / "last.pt")
    assert all(torch.equal(a, b) for a, b in zip(tiny.state_dict().values(), again.state_dict().values()))


class Bomb:
    def __reduce__(self):
        return (os.system, ("touch exploded",))


def test_files_that_are_no_checkpoint_are_refused_and_not_executed(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    good = dict(config=tiny.config, model=tiny.state_dict())
    files = {"random": os.urandom(2000), "empty": b"", "pickle": pickle.dumps(Bomb())}
    for name, content in files.items():
        Path(name).write_bytes(content)
    torch.save({"model": {"a": Bomb()}}, "bomb", pickle_protocol=4)
    torch.save([1, 2], "list")
    torch.save({"model": {"some.weight": torch.zeros(3)}}, "other")
    torch.save({**good, "model": {k: v for k, v in good["model"].items() if k != "logit_scale"}}, "missing")
    torch.save({**good, "config": {**tiny.config, "channels": 64}}, "shapes")
    Path("cut").write_bytes(b"") or torch.save(good, "whole") or Path("cut").write_bytes(Path("whole").read_bytes()[:5000])
    for name in (*files, "bomb", "list", "other", "missing", "shapes", "cut", "nowhere"):
        with pytest.raises(ValueError, match=f"^{name}") as e:
            segmenter.load(name)
        assert "\n" not in str(e.value), name
    assert not Path("exploded").exists()


def test_clip_weights_from_published_formats(tmp_path, monkeypatch):
    """A state dict, open_clip's training checkpoint, safetensors, and OpenAI's half-precision TorchScript archive."""
    from safetensors.torch import save_file
    monkeypatch.setattr(open_clip, "get_model_config", lambda name: SMALL | dict(quick_gelu="quick" in name))
    torch.manual_seed(1)
    clip = open_clip.model.CLIP(**SMALL)
    torch.save(clip.state_dict(), tmp_path / "plain.pt")
    torch.save({"epoch": 1, "state_dict": {"module." + k: v for k, v in clip.state_dict().items()}}, tmp_path / "training.pt")
    save_file(clip.state_dict(), tmp_path / "model.safetensors")

    class Archive(nn.Module):
        def __init__(self):
            super().__init__()
            for name, child in clip.named_children():
                setattr(self, name, nn.Module())
            for name, t in clip.state_dict().items():
                at = self
                for part in name.split(".")[:-1]:
                    at._modules.setdefault(part, nn.Module())
                    at = at._modules[part]
                at.register_parameter(name.split(".")[-1], nn.Parameter(t.half().clone()))
            self.register_buffer("input_resolution", torch.tensor(32))

        def forward(self, x):
            return x

    torch.jit.script(Archive()).save(tmp_path / "archive.pt")
    for name in ("plain.pt", "training.pt", "model.safetensors", "archive.pt"):
        net = segmenter.build("ViT-quickgelu", str(tmp_path / name), 48, 32)
        tolerance = dict(rtol=1e-3, atol=1e-3) if name == "archive.pt" else dict(rtol=0, atol=0)
        torch.testing.assert_close(net.text_encoder.token_embedding.weight, clip.token_embedding.weight, **tolerance)
        torch.testing.assert_close(net.image_encoder.visual.transformer.resblocks[5].attn.k_proj_weight,
                                   clip.visual.transformer.resblocks[5].attn.in_proj_weight.chunk(3)[1], **tolerance)
    with pytest.raises(ValueError, match="was trained with QuickGELU and --clip ViT computes GELU: use --clip ViT-quickgelu"):
        segmenter.build("ViT", str(tmp_path / "archive.pt"), 48, 32)
    other = open_clip.model.CLIP(**{**SMALL, "embed_dim": 16})
    torch.save(other.state_dict(), tmp_path / "other.pt")
    with pytest.raises(ValueError, match="other.pt: could not be loaded into ViT-quickgelu") as e:
        segmenter.build("ViT-quickgelu", str(tmp_path / "other.pt"), 48, 32)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("clip, pretrained, words", [
    ("ViT-B-16", "openai", "trained with QuickGELU and --clip ViT-B-16 computes GELU: use --clip ViT-B-16-quickgelu"),
    ("ViT-B-16-quickgelu", "laion2b_s34b_b88k", "neither a file nor one of open_clip's tags"),
    ("ViT-H-14-378-quickgelu", None, "27 x 27 patches; the head needs an even number"), ("ViT-B-17", None, "no model of this name"), ("RN50", None, "only CLIP models with a plain ViT"),
    ("ViT-B-16-SigLIP", None, "only CLIP models with a plain ViT"), ("ViT-L-14-CLIPA", None, "only CLIP models with a plain ViT"), ("tiny", "/nowhere.pt", "neither a file")])
def test_clips_that_do_not_fit_are_refused(clip, pretrained, words):
    with pytest.raises(ValueError, match=words):
        segmenter.build(clip, pretrained)


def test_vit_l_336():
    """CAT-Seg's second size: the model resizes 384 crops to 336; a checkpoint of it is told by its content. Shapes only."""
    with torch.device("meta"):
        net = segmenter.build("ViT-L-14-336-quickgelu")
        logits, patches, text = net(torch.zeros(1, 3, 384, 384), torch.zeros(3, 12, dtype=torch.long))
    assert net.image_encoder.input_size == 336 and net.grid == (24, 24)
    assert patches.shape == (1, 576, 768) and text.shape == (3, 768) and logits.shape == (1, 3, 96, 96)
    assert len(net.image_encoder(torch.zeros(1, 3, 384, 384, device="meta"))[1]) == 2


def test_a_cat_seg_checkpoint_is_told_by_its_content_and_every_name_counts(tmp_path):
    with torch.device("meta"):
        shapes = to_cat_seg(segmenter.build("ViT-B-16-quickgelu").state_dict())
    state = {name: torch.zeros(()).expand(t.shape) for name, t in shapes.items()}
    state["sem_seg_head.predictor.transformer.layers.0.swin_block.block_2.attn_mask"] = torch.zeros(4, 144, 144)
    path = tmp_path / "cat_seg.pth"
    torch.save({"model": state, "iteration": 79999}, path)
    found = segmenter.read_checkpoint(path)
    assert found["config"] == dict(clip="ViT-B-16-quickgelu", image_size=384, channels=128)
    with torch.device("meta"):
        net = segmenter.build(**found["config"])
    assert found["model"].keys() == net.state_dict().keys()
    for spoil, words in ((lambda s: s.pop("upsample1.bias"), "1 tensors differ, head.middle_up.0.bias first"),
                         (lambda s: s.update({"upsample3.weight": torch.zeros(1)}), "1 tensors differ, head.middle_up.2.weight first"),
                         (lambda s: s.update({"upsample1.bias": torch.zeros(3)}), r"expected \(256,\), found \(3,\)")):
        spoiled = dict(state)
        spoil(spoiled)
        with pytest.raises(ValueError, match=words):
            segmenter.load_state(net, segmenter.from_cat_seg(spoiled), path)


# CAT-Seg's own numbers, on weights that anyone can draw

needs_golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason="the golden files are not here")


@pytest.fixture(scope="module")
def golden(tmp_path_factory):
    """The segmenter loaded the way a user loads CAT-Seg's published checkpoint."""
    sys.path.insert(0, str(GOLDEN))
    from seeded import seeded_state
    path = tmp_path_factory.mktemp("golden") / "cat_seg.pth"
    torch.save({"model": seeded_state(json.loads((GOLDEN / "keys_vitb16.json").read_text()))}, path)
    return segmenter.load(path)


def relative(a, b):
    b = torch.as_tensor(b)
    return ((a - b).norm() / b.norm()).item()


@needs_golden
def test_golden_training_step(golden):
    z = np.load(GOLDEN / "vitb16.npz")
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD))
    image = (torch.from_numpy(z["image"]) / 255 - mean) / std
    target = torch.from_numpy(z["target"]).long()
    golden.train()
    logits, patches, text = golden(image[None], golden.tokenize([str(n) for n in z["classes"]]))
    loss = losses.segmentation_loss(logits, target.where(target != 255, losses.IGNORE)[None])
    loss.backward()
    assert relative(patches[0, :, :64], z["patches_first_64_dims"]) < 1e-4 and relative(text, z["text"]) < 1e-4
    assert relative(logits[0], z["logits"]) < 1e-4 and loss.item() == pytest.approx(float(z["loss"]), rel=1e-4)
    norms = to_cat_seg({n: p.grad for n, p in golden.named_parameters() if p.requires_grad})
    expected = json.loads(str(z["grad_norms"]))
    assert expected.keys() - norms.keys() == {reference.CLIP + "visual.transformer.resblocks.11.attn.q_proj_weight"}
    for name, grad in norms.items():                                                       # softmax leaves k.bias no gradient
        assert grad.norm().item() == pytest.approx(expected[name], rel=1e-4, abs=1e-10), name


@needs_golden
def test_golden_sliding_window(golden):
    from PIL import Image
    z = np.load(GOLDEN / "vitb16_sliding.npz")
    image, names, size = Image.fromarray(z["image"].transpose(1, 2, 0)), [str(n) for n in z["classes"]], z["argmax"].shape
    labels = evaluate.segment(golden, image, names, size=size)
    assert (labels.numpy() == z["argmax"]).mean() > 0.999
    with torch.inference_mode():
        text = golden.encode_text(golden.tokenize(names))
    scores = torch.cat([s[0] for _, s in evaluate.class_scores(golden, image, text, size=size)])
    assert relative(scores[:, ::8, ::8], z["probs_every_8px"]) < 1e-4
