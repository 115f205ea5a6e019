"""The segmenter: against a literal transcription of CAT-Seg, and against CAT-Seg's own numbers."""
import json
import os
import sys
from pathlib import Path

import cat_seg_reference as reference
import numpy as np
import open_clip
import pytest
import torch
import torch.nn as nn
from cat_seg_reference import SMALL, to_cat_seg
from conftest import ROOT
from PIL import Image

import data
import evaluate
import losses
from model import Segmenter, build, tokenize
from support import checkpoint

GOLDEN = Path(os.environ.get("RPMD_GOLDEN") or ROOT.parent / "shared" / "golden")
NAMES = ["cat", "dining table", "building, edifice", "sky-other", "red"]


@pytest.fixture
def small():
    """A class-token CLIP with QuickGELU, all weights random, whose positional embedding must be
    resized: 4x4 -> 6x6."""
    torch.manual_seed(0)
    model = Segmenter("tiny", 48, 32, open_clip.model.CLIP(**SMALL))
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() < 2:
                p.add_(0.1 * torch.randn_like(p))
            else:
                p.copy_(torch.randn_like(p) * p[0].numel() ** -0.5)
    return model


@pytest.mark.parametrize("training", [True, False])
def test_equals_cat_seg_written_literally(small, training):
    """Patches, text, logits, loss, every gradient: in training (2x2 pooling) and evaluation."""
    small.train(training)
    state = {name: t.clone() for name, t in to_cat_seg(small.state_dict()).items()}
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
    assert tokens.shape == (5, 12)
    assert torch.equal(full[:, :12], tokens) and (full[:, 12:] == 0).all()
    our_logits, our_patches, our_text = small(images, tokens)
    our_loss = losses.segmentation_loss(our_logits, pixel_labels)
    our_loss.backward()
    for ours, theirs in ((our_patches, patches), (our_text, text), (our_logits, logits),
                         (our_loss, loss)):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    gradients = {name: p.grad for name, p in small.named_parameters() if p.requires_grad}
    for name, gradient in to_cat_seg(gradients).items():
        torch.testing.assert_close(gradient, state[name].grad, rtol=1e-3, atol=1e-6, msg=name)


def test_more_than_256_classes(small):
    small.eval()
    state = to_cat_seg(small.state_dict())
    images, text = torch.randn(2, 3, 48, 48), nn.functional.normalize(torch.randn(260, 24), dim=-1)
    with torch.no_grad():
        patches, middle = small.encode_image(images)
        logits = small.compute_logits(patches, middle, text)
        expected = reference.top_256(state, patches, middle, text, 6, 1, window=3)
    assert (logits == -100).flatten(2).all(-1).sum(1).tolist() == [4, 4]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_training_on_more_than_256_classes_reaches_every_parameter(small):
    """DDP waits for the gradient of every trained parameter, padding included."""
    tokens = small.tokenize([f"thing {i}" for i in range(257)])
    logits, _, _ = small(torch.randn(1, 3, 48, 48), tokens)
    losses.segmentation_loss(logits, torch.randint(0, 257, (1, 48, 48))).backward()
    assert [n for n, p in small.named_parameters() if p.requires_grad and p.grad is None] == []


def test_the_prior_is_the_first_probability_of_each_class():
    torch.manual_seed(0)
    model = build("tiny", 64, 32, prior=0.08)
    logits, _, _ = model(torch.randn(1, 3, 64, 64), model.tokenize(["red", "blue"]))
    assert 0.04 < logits.sigmoid().mean().item() < 0.16


def test_names_are_read_by_their_first_synonym(tiny):
    assert torch.equal(tokenize(["cat, puss", "dog"]), tokenize([" cat ", "dog,cat"]))
    assert tiny.tokenize(["cat"]).shape == (1, 10)  # 8 words between a start and an end


def test_a_clip_that_pools_by_averaging_keeps_each_positions_residual(tiny, small):
    assert small.image_encoder.class_token_residual and not tiny.image_encoder.class_token_residual
    images = torch.randn(1, 3, 64, 64)
    own, _ = tiny.encode_image(images)
    tiny.image_encoder.class_token_residual = True
    assert not torch.allclose(own, tiny.encode_image(images)[0], atol=1e-2)


@pytest.mark.parametrize("adapt", ["both", "visual", "text", "none"])
def test_what_trains(tiny, adapt):
    tiny.set_trained(adapt)
    trained = {name for name, p in tiny.named_parameters() if p.requires_grad}
    clip = {name for name in trained if not name.startswith("head.")}
    blocks = "image_encoder.visual.transformer.resblocks"
    visual = {f"{blocks}.{i}.attn.{c}_proj_weight" for i in range(4) for c in "qv"}
    visual -= {f"{blocks}.3.attn.q_proj_weight"}  # the dense last block has no q
    blocks = "text_encoder.transformer.resblocks"
    text = {f"{blocks}.{i}.attn.{c}_proj_weight" for i in range(2) for c in "qv"}
    assert clip == {"both": visual | text, "visual": visual, "text": text, "none": set()}[adapt]
    head = {name for name, _ in tiny.named_parameters() if name.startswith("head.")}
    assert head == trained - clip
    tiny(torch.randn(1, 3, 64, 64), tiny.tokenize(["a", "b"]))[0].sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in tiny.parameters())


def test_a_step_costs_two_thirds_of_cat_segs():
    """FLOPs of a whole training step with ViT-B/16 and 20 classes, by PyTorch's counter, on meta
    tensors: 0.53 T (CAT-Seg's, without distillation, takes 0.77 T)."""
    import bench
    assert 0.4e12 < sum(bench.count_flops(20).values()) < 0.54e12


def test_vit_l_336():
    """CAT-Seg's second size: the model resizes 384 crops to 336. Shapes only."""
    with torch.device("meta"):
        model = build("ViT-L-14-336-quickgelu")
        images, tokens = torch.zeros(1, 3, 384, 384), torch.zeros(3, 12, dtype=torch.long)
        logits, patches, text = model(images, tokens)
    assert model.image_encoder.input_size == 336 and model.grid == (24, 24)
    assert patches.shape == (1, 576, 768) and text.shape == (3, 768)
    assert logits.shape == (1, 3, 96, 96) and len(model.encode_image(images)[1]) == 2


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
    return checkpoint.load(path)


def relative(a, b):
    b = torch.as_tensor(b)
    return ((a - b).norm() / b.norm()).item()


@needs_golden
def test_golden_training_step(golden):
    z = np.load(GOLDEN / "vitb16.npz")
    images = data.normalise(torch.from_numpy(z["image"]))[None]
    pixel_labels = torch.from_numpy(z["target"]).long()[None]
    pixel_labels[pixel_labels == 255] = losses.IGNORE
    golden.train()
    logits, patches, text = golden(images, golden.tokenize(z["classes"].tolist()))
    loss = losses.segmentation_loss(logits, pixel_labels)
    loss.backward()
    assert relative(patches[0, :, :64], z["patches_first_64_dims"]) < 1e-4
    assert relative(text, z["text"]) < 1e-4 and relative(logits[0], z["logits"]) < 1e-4
    assert loss.item() == pytest.approx(float(z["loss"]), rel=1e-4)
    gradients = to_cat_seg({n: p.grad for n, p in golden.named_parameters() if p.requires_grad})
    expected = json.loads(str(z["grad_norms"]))
    last_q = reference.CLIP + "visual.transformer.resblocks.11.attn.q_proj_weight"
    assert expected.keys() - gradients.keys() == {last_q}
    for name, gradient in gradients.items():  # softmax leaves k.bias no gradient
        assert gradient.norm().item() == pytest.approx(expected[name], rel=1e-4, abs=1e-10), name


@needs_golden
def test_golden_sliding_window(golden, monkeypatch):
    """CAT-Seg was given a picture that detectron2 had enlarged, to be labelled at its own size."""
    z = np.load(GOLDEN / "vitb16_sliding.npz")
    enlarged, own, resize = z["image"].shape[1:], z["argmax"].shape, evaluate.resize
    monkeypatch.setattr(evaluate, "resize",
                        lambda x, size: resize(x, own if size == enlarged else size))
    image = Image.fromarray(z["image"].transpose(1, 2, 0))
    text = evaluate.encode_names(golden.eval(), z["classes"].tolist())
    (_, scores), = evaluate.class_scores(golden, image, text)
    assert (scores[0].argmax(0).numpy() == z["argmax"]).mean() > 0.999
    assert relative(scores[0, :, ::8, ::8], z["probs_every_8px"]) < 1e-4
