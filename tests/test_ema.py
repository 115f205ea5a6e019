"""The momentum encoder: its formula, what it shares, and that it equals a full second encoder."""
import copy

import pytest
import torch

from ema import MomentumEncoder


def train_a_little(model):
    """Move every trained tensor of the visual encoder."""
    with torch.no_grad():
        for p in model.image_encoder.parameters():
            if p.requires_grad:
                p.add_(0.05 * torch.randn_like(p))


def test_starts_as_a_copy_and_follows_the_formula(tiny):
    momentum = MomentumEncoder(tiny, alpha=0.9)
    start = {n: p.detach().clone() for n, p in tiny.image_encoder.named_parameters()}
    assert all(torch.equal(t, start[n]) for n, t in momentum.tensors.items())
    train_a_little(tiny)
    moved = dict(tiny.image_encoder.named_parameters())
    momentum.update()
    momentum.update()
    for name, t in momentum.tensors.items():
        torch.testing.assert_close(t, 0.81 * start[name] + 0.19 * moved[name].detach())


def test_equals_a_whole_second_encoder(tiny):
    images, momentum = torch.randn(2, 3, 64, 64), MomentumEncoder(tiny, alpha=0.7)
    first = copy.deepcopy(tiny.image_encoder)
    train_a_little(tiny)
    momentum.update()
    with torch.no_grad():
        for p, new in zip(first.parameters(), tiny.image_encoder.parameters()):
            p.mul_(0.7).add_(new, alpha=0.3)
        expected, target = first(images)[0], tiny.encode_image(images)[0]
    torch.testing.assert_close(momentum.encode_image(images), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(target, expected, atol=1e-2)


def test_owns_only_the_trained_visual_tensors(tiny):
    momentum = MomentumEncoder(tiny, alpha=0.9)
    assert {n for n, p in tiny.image_encoder.named_parameters() if p.requires_grad} == set(momentum.state_dict()["tensors"])
    assert all(n.endswith(("q_proj_weight", "v_proj_weight")) for n in momentum.tensors)
    params = {p.data_ptr() for p in tiny.parameters()}
    assert not params & {t.data_ptr() for t in momentum.tensors.values()}
    assert sum(t.numel() for t in momentum.tensors.values()) < 0.3 * sum(p.numel() for p in tiny.image_encoder.parameters())


def test_no_graph_and_no_gradient(tiny):
    momentum = MomentumEncoder(tiny, alpha=0.9)
    assert not momentum.encode_image(torch.randn(1, 3, 64, 64)).requires_grad
    assert not any(t.requires_grad for t in momentum.tensors.values())


def test_alpha_one_is_frozen(tiny):
    momentum, images = MomentumEncoder(tiny, alpha=1.0), torch.randn(1, 3, 64, 64)
    before = momentum.encode_image(images)
    train_a_little(tiny)
    momentum.update()
    assert torch.equal(momentum.encode_image(images), before)


def test_state_survives_and_a_wrong_one_is_refused(tiny):
    a, b = MomentumEncoder(tiny, alpha=0.9), MomentumEncoder(tiny, alpha=0.5)
    train_a_little(tiny)
    a.update()
    b.load_state_dict(a.state_dict())
    assert b.alpha == 0.9 and all(torch.equal(b.tensors[n], t) for n, t in a.tensors.items())
    tiny.set_trained("text")
    with pytest.raises(ValueError, match="7 tensors differ"):
        MomentumEncoder(tiny, alpha=0.9).load_state_dict(a.state_dict())
    with pytest.raises(ValueError, match="alpha"):
        MomentumEncoder(tiny, alpha=1.5)
