"""The segmenter: against a literal transcription of CAT-Seg, and against CAT-Seg's own numbers."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import torch.nn as nn
from PIL import Image

import cat_seg_reference as reference
import evaluate
import losses
from cat_seg_reference import SMALL, to_cat_seg
from model import PROMPT_START, Attention, Segmenter, build
from support import weights

GOLDEN = Path(os.environ.get("RPMD_GOLDEN", Path(__file__).parents[2] / "shared" / "golden"))


@pytest.fixture
def small():
    """A class-token CLIP with QuickGELU, all weights random, whose positional embedding must be
    resized: 4x4 -> 6x6."""
    torch.manual_seed(0)
    model = Segmenter(open_clip.model.CLIP(**SMALL), 48, 32, {})
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() < 2:
                p.add_(0.1 * torch.randn_like(p))
            else:
                p.copy_(torch.randn_like(p) * p[0].numel() ** -0.5)
    return model


NAMES = ["cat", "dining table", "building, edifice", "sky-other", "red"]


@pytest.mark.parametrize("training", [True, False])
def test_equals_cat_seg_written_literally(small, training):
    """Patches, text, logits, loss, every gradient: in training (2x2 pooling) and evaluation."""
    small.train(training)
    state = {n: t.clone() for n, t in to_cat_seg(small.state_dict()).items()}
    for t in state.values():
        t.requires_grad_(t.dtype.is_floating_point)
    images, pixel_labels = torch.randn(2, 3, 48, 48), torch.randint(-1, 5, (2, 48, 48))
    prompts = [f"A photo of a {name.split(',')[0]} in the scene" for name in NAMES]
    full = open_clip.tokenizer.SimpleTokenizer()(prompts)
    pool = 2 if training else 1
    patches, middle = reference.encode_image(state, images, layers=6, heads=2, patch=8, side=6)
    text = reference.encode_text(state, full, layers=2, heads=2)
    logits = reference.head(state, patches, middle, text.expand(2, -1, -1), 6, pool, window=3)
    loss = reference.loss(logits, pixel_labels)
    loss.backward()

    tokens = small.tokenize(NAMES)
    assert (
        tokens.shape == (5, 12) and torch.equal(full[:, :12], tokens) and (full[:, 12:] == 0).all()
    )
    got, got_patches, got_text = small(images, tokens)
    got_loss = losses.segmentation_loss(got, pixel_labels)
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
        got = small.compute_logits(patches, middle, text)
        expected = reference.top_256(state, patches, middle, text, 6, 1, window=3)
    assert (got == -100).flatten(2).all(-1).sum(1).tolist() == [4, 4]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_training_on_more_than_256_classes_reaches_every_parameter(small):
    """DDP waits for the gradient of every trained parameter, padding included."""
    logits, _, _ = small(
        torch.randn(1, 3, 48, 48), small.tokenize([f"thing {i}" for i in range(257)])
    )
    losses.segmentation_loss(logits, torch.randint(0, 257, (1, 48, 48))).backward()
    assert [n for n, p in small.named_parameters() if p.requires_grad and p.grad is None] == []


def test_recomputing_the_head_changes_nothing(small):
    images, pixel_labels = torch.randn(2, 3, 48, 48), torch.randint(-1, 5, (2, 48, 48))
    tokens = small.tokenize(NAMES)
    grads = []
    for small.head.recompute in (False, True):
        small.zero_grad()
        losses.segmentation_loss(small(images, tokens)[0], pixel_labels).backward()
        grads.append([p.grad.clone() for p in small.parameters() if p.requires_grad])
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b)


def test_gradients_under_functional_call(tiny):
    """The backward pass uses the weights that functional_call put in place, recomputing or not."""
    images = torch.randn(1, 3, 64, 64, requires_grad=True)
    name = "visual.transformer.resblocks.2.mlp.c_proj.weight"
    weight = dict(tiny.image_encoder.named_parameters())[name]
    other = {name: 2 * weight.detach()}
    patches, _ = torch.func.functional_call(tiny.image_encoder, other, (images,))
    (got,) = torch.autograd.grad(patches.square().sum(), images)
    with torch.no_grad():
        weight.mul_(2)
    (expected,) = torch.autograd.grad(tiny.encode_image(images)[0].square().sum(), images)
    torch.testing.assert_close(got, expected)


def test_split_attention_equals_multihead_attention():
    torch.manual_seed(0)
    packed, x = nn.MultiheadAttention(24, 3, batch_first=True), torch.randn(2, 5, 24)
    nn.init.normal_(packed.in_proj_bias)
    mask = torch.full((5, 5), float("-inf")).triu(1)
    for causal in (False, True):
        expected = packed(x, x, x, need_weights=False, attn_mask=mask if causal else None)[0]
        torch.testing.assert_close(Attention(packed)(x, causal=causal), expected)


def test_a_common_start_changes_nothing(tiny):
    """Texts and gradients with the tokens that all prompts begin with computed once, or only the
    start token; also of a single class, and of names that begin alike."""
    assert tiny.tokenize(["a", "b"])[:, :PROMPT_START].unique(dim=0).shape[0] == 1
    assert tiny.tokenize(["red", "blue"])[:, PROMPT_START:].unique(dim=0).shape[0] == 2
    trained = [p for p in tiny.double().text_encoder.parameters() if p.requires_grad]
    for names in (["red", "very old dining table", "a"], ["of a"], ["old cat", "old dog", "old"]):
        found = []
        for start in (1, 3, PROMPT_START):
            text = tiny.encode_text(tiny.tokenize(names), start)
            gradients = torch.autograd.grad((text * torch.arange(128)).sum(), trained)
            found.append((text, gradients))
        for got in found[1:]:
            torch.testing.assert_close(got, found[0], rtol=1e-9, atol=1e-9)


def test_text_features_are_open_clips():
    torch.manual_seed(0)
    clip = open_clip.model.CLIP(**SMALL)
    names = ["cat", "very old dining table"]
    tokens = open_clip.tokenizer.SimpleTokenizer()(
        [f"A photo of a {n} in the scene" for n in names]
    )
    with torch.no_grad():
        expected = clip.encode_text(tokens, normalize=True)
        model = Segmenter(clip, 48, 32, {})
        got = model.encode_text(model.tokenize(names))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


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
    blocks = "image_encoder.visual.transformer.resblocks"
    visual = {f"{blocks}.{i}.attn.{c}_proj_weight" for i in range(4) for c in "qv"}
    visual -= {f"{blocks}.3.attn.q_proj_weight"}  # the dense last block has no q
    blocks = "text_encoder.transformer.resblocks"
    text = {f"{blocks}.{i}.attn.{c}_proj_weight" for i in range(2) for c in "qv"}
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
    assert patches.shape == (2, 64, 128) and text.shape == (2, 128)
    assert cost.shape == (2, 2, 8, 8) and logits.shape == (2, 2, 32, 32)
    x = tiny.head.aggregate(cost, v, t.expand(2, -1, -1))
    assert torch.equal(tiny.head.decode(x, middle), logits)
    assert torch.equal(tiny.compute_logits(v, middle, t), logits)
    assert torch.equal(v, patches) and torch.equal(t, text)


def test_a_step_costs_what_the_readme_says():
    """FLOPs of a whole training step with ViT-B/16 and 20 classes, by PyTorch's counter, on meta
    tensors: 0.50 T (CAT-Seg's, without distillation, takes 0.77 T)."""
    import bench

    total = sum(bench.count_flops(20).values())
    assert total == pytest.approx(0.504e12, rel=0.005)


def test_vit_l_336():
    """CAT-Seg's second size: the model resizes 384 crops to 336. Shapes only."""
    with torch.device("meta"):
        model = build("ViT-L-14-336-quickgelu")
        images, tokens = torch.zeros(1, 3, 384, 384), torch.zeros(3, 12, dtype=torch.long)
        logits, patches, text = model(images, tokens)
    assert model.image_encoder.input_size == 336 and model.grid == (24, 24)
    assert (
        patches.shape == (1, 576, 768) and text.shape == (3, 768) and logits.shape == (1, 3, 96, 96)
    )
    assert len(model.image_encoder(images)[1]) == 2


# CAT-Seg's own numbers, on weights that anyone can draw

needs_golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason="the golden files are not here")


@pytest.fixture(scope="module")
def golden(tmp_path_factory):
    """The segmenter loaded the way a user loads CAT-Seg's published checkpoint."""
    sys.path.insert(0, str(GOLDEN))
    from seeded import seeded_state

    path = tmp_path_factory.mktemp("golden") / "cat_seg.pth"
    keys = json.loads((GOLDEN / "keys_vitb16.json").read_text())
    torch.save({"model": seeded_state(keys)}, path)
    return weights.load(path)


def relative(a, b):
    b = torch.as_tensor(b)
    return ((a - b).norm() / b.norm()).item()


@needs_golden
def test_golden_training_step(golden):
    z = np.load(GOLDEN / "vitb16.npz")
    constants = (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in constants)
    image = (torch.from_numpy(z["image"]) / 255 - mean) / std
    pixel_labels = torch.from_numpy(z["target"]).long()
    pixel_labels[pixel_labels == 255] = losses.IGNORE
    golden.train()
    logits, patches, text = golden(image[None], golden.tokenize([str(n) for n in z["classes"]]))
    loss = losses.segmentation_loss(logits, pixel_labels[None])
    loss.backward()
    assert relative(patches[0, :, :64], z["patches_first_64_dims"]) < 1e-4
    assert relative(text, z["text"]) < 1e-4 and relative(logits[0], z["logits"]) < 1e-4
    assert loss.item() == pytest.approx(float(z["loss"]), rel=1e-4)
    norms = to_cat_seg({n: p.grad for n, p in golden.named_parameters() if p.requires_grad})
    expected = json.loads(str(z["grad_norms"]))
    last_q = reference.CLIP + "visual.transformer.resblocks.11.attn.q_proj_weight"
    assert expected.keys() - norms.keys() == {last_q}
    for name, grad in norms.items():  # softmax leaves k.bias no gradient
        assert grad.norm().item() == pytest.approx(expected[name], rel=1e-4, abs=1e-10), name


@needs_golden
def test_golden_sliding_window(golden):
    z = np.load(GOLDEN / "vitb16_sliding.npz")
    image = Image.fromarray(z["image"].transpose(1, 2, 0))
    names = [str(n) for n in z["classes"]]
    size = z["argmax"].shape
    labels = evaluate.segment(golden, image, names, size=size)
    assert (labels.numpy() == z["argmax"]).mean() > 0.999
    with torch.inference_mode():
        text = golden.encode_text(golden.tokenize(names))
    chunks = [chunk[0] for _, chunk in evaluate.class_scores(golden, image, text, size=size)]
    scores = torch.cat(chunks)
    assert relative(scores[:, ::8, ::8], z["probs_every_8px"]) < 1e-4
