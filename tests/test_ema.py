"""The momentum encoder: its formula, what it shares, and that it equals a full second encoder."""

import copy

import pytest
import torch
import torch.nn as nn

from ema import MomentumEncoder, frozen_copy


def train_a_little(model):
    """Move every trained tensor of the visual encoder."""
    with torch.no_grad():
        for p in model.image_encoder.parameters():
            if p.requires_grad:
                p.add_(0.05 * torch.randn_like(p))


def test_starts_as_a_copy_and_follows_the_formula(tiny):
    momentum = MomentumEncoder(tiny.image_encoder, alpha=0.9)
    start = {n: p.detach().clone() for n, p in tiny.image_encoder.named_parameters()}
    assert all(torch.equal(t, start[n]) for n, t in momentum.own_tensors().items())
    train_a_little(tiny)
    moved = dict(tiny.image_encoder.named_parameters())
    momentum.update()
    momentum.update()
    for name, t in momentum.own_tensors().items():
        torch.testing.assert_close(t, 0.81 * start[name] + 0.19 * moved[name].detach())


def test_equals_a_whole_second_encoder(tiny):
    images, momentum = torch.randn(2, 3, 64, 64), MomentumEncoder(tiny.image_encoder, alpha=0.7)
    first = copy.deepcopy(tiny.image_encoder)
    train_a_little(tiny)
    momentum.update()
    with torch.no_grad():
        for p, new in zip(first.parameters(), tiny.image_encoder.parameters()):
            p.mul_(0.7).add_(new, alpha=0.3)
        expected, target = first(images)[0], tiny.encode_image(images)[0]
    torch.testing.assert_close(momentum(images)[0], expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(target, expected, atol=1e-2)


def test_owns_only_the_trained_visual_tensors(tiny):
    momentum = MomentumEncoder(tiny.image_encoder, alpha=0.9)
    assert {n for n, p in tiny.image_encoder.named_parameters() if p.requires_grad} == set(
        momentum.state_dict()["tensors"]
    )
    assert all(n.endswith(("q_proj_weight", "v_proj_weight")) for n in momentum.own_tensors())
    params = {p.data_ptr() for p in tiny.parameters()}
    assert not params & {t.data_ptr() for t in momentum.own_tensors().values()}
    assert sum(t.numel() for t in momentum.own_tensors().values()) < 0.3 * sum(
        p.numel() for p in tiny.image_encoder.parameters()
    )


def test_no_graph_and_no_gradient(tiny):
    momentum = MomentumEncoder(tiny.image_encoder, alpha=0.9)
    assert not momentum(torch.randn(1, 3, 64, 64))[0].requires_grad
    assert not any(t.requires_grad for t in momentum.own_tensors().values())


def test_alpha_one_is_frozen(tiny):
    momentum, images = MomentumEncoder(tiny.image_encoder, alpha=1.0), torch.randn(1, 3, 64, 64)
    before = momentum(images)[0]
    train_a_little(tiny)
    momentum.update()
    assert torch.equal(momentum(images)[0], before)


def test_state_survives_and_a_wrong_one_is_refused(tiny):
    a, b = (
        MomentumEncoder(tiny.image_encoder, alpha=0.9),
        MomentumEncoder(tiny.image_encoder, alpha=0.5),
    )
    train_a_little(tiny)
    a.update()
    b.load_state_dict(a.state_dict())
    assert b.alpha == 0.9 and all(
        torch.equal(b.own_tensors()[n], t) for n, t in a.own_tensors().items()
    )
    tiny.set_trained("text")
    with pytest.raises(ValueError, match="7 tensors differ"):
        MomentumEncoder(tiny.image_encoder, alpha=0.9).load_state_dict(a.state_dict())
    with pytest.raises(ValueError, match="alpha"):
        MomentumEncoder(tiny.image_encoder, alpha=1.5)


def any_modules():
    import timm

    convolutions = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5))
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.5, batch_first=True)
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=5)
    return {
        "batch norm": (convolutions, torch.randn(4, 3, 8, 8)),
        "torch's own": (layer, torch.randn(2, 5, 8)),
        "timm's vit": (vit, torch.randn(2, 3, 32, 32)),
    }


@pytest.mark.parametrize("name", ["batch norm", "torch's own", "timm's vit"])
def test_works_around_any_module(name):
    """Whatever it returns, in eval mode, equal to a whole copy; its pass changes nothing of the
    target, neither its mode nor its running statistics."""
    torch.manual_seed(0)
    encoder, inputs = any_modules()[name]
    first = next(encoder.parameters())
    first.requires_grad = False  # shared
    momentum, whole = MomentumEncoder(encoder.train(), 0.75), copy.deepcopy(encoder).eval()
    optimiser = torch.optim.SGD([p for p in encoder.parameters() if p.requires_grad], 0.1)
    encoder(inputs).square().mean().backward()
    optimiser.step()
    momentum.update()
    with torch.no_grad():
        for p, new in zip(whole.parameters(), encoder.parameters()):
            p.mul_(0.75).add_(new, alpha=0.25)
        for b, new in zip(whole.buffers(), encoder.buffers()):
            b.copy_(new)
        before = copy.deepcopy(encoder.state_dict())
        torch.testing.assert_close(momentum(inputs), whole(inputs))
    assert momentum(inputs).shape == whole(inputs).shape and not momentum(inputs).requires_grad
    assert encoder.training and all(
        torch.equal(before[k], v) for k, v in encoder.state_dict().items()
    )
    assert first.data_ptr() == next(momentum.average.parameters()).data_ptr()
    other = MomentumEncoder(encoder, 0.5)
    other.load_state_dict(momentum.state_dict())
    torch.testing.assert_close(other(inputs), momentum(inputs), rtol=0, atol=0)


def test_a_frozen_copy_stays(tiny):
    images, copied = torch.randn(1, 3, 64, 64), frozen_copy(tiny.image_encoder)
    before = copied(images)[0]
    train_a_little(tiny)
    assert torch.equal(copied(images)[0], before) and not before.requires_grad
    assert not torch.equal(tiny.encode_image(images)[0], before)
