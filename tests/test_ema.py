"""The momentum encoder: its formula, what it shares, and that it equals a full second encoder."""
import copy

import pytest
import timm
import torch
import torch.nn as nn

from ema import MomentumEncoder, frozen_copy
from model import build


@torch.no_grad()
def train_a_little(encoder):
    """Move every tensor that trains."""
    for p in encoder.parameters():
        if p.requires_grad:
            p.add_(0.05 * torch.randn_like(p))


def test_owns_only_what_trains_and_takes_no_gradient(tiny):
    momentum = MomentumEncoder(tiny.image_encoder, alpha=0.9)
    trained = {name for name, p in tiny.image_encoder.named_parameters() if p.requires_grad}
    assert momentum.state_dict().keys() == trained and len(trained) == 7
    own = {t.data_ptr() for t in momentum.state_dict().values()}
    assert not own & {p.data_ptr() for p in tiny.parameters()}
    assert not momentum(torch.randn(1, 3, 64, 64))[0].requires_grad
    assert not any(p.requires_grad for p in momentum.average.parameters() if p.data_ptr() in own)


def test_alpha_one_is_frozen_and_a_frozen_copy_stays(tiny):
    images, momentum = torch.randn(1, 3, 64, 64), MomentumEncoder(tiny.image_encoder, alpha=1.0)
    copied = frozen_copy(tiny)
    before = momentum(images)[0]
    train_a_little(tiny)
    momentum.update()
    assert torch.equal(momentum(images)[0], before)
    assert torch.equal(copied.encode_image(images)[0], before)
    assert not copied(images, tiny.tokenize(["red"]))[0].requires_grad and not copied.training
    assert not torch.allclose(tiny.encode_image(images)[0], before, atol=1e-2)


def test_another_encoders_state_and_a_wrong_alpha_are_refused(tiny):
    state = MomentumEncoder(tiny.image_encoder, alpha=0.9).state_dict()
    tiny.set_trained("text")
    with pytest.raises(ValueError, match="belongs to another encoder"):
        MomentumEncoder(tiny.image_encoder, alpha=0.9).load_state_dict(state)
    for alpha in (1.5, -0.1, float("nan")):
        with pytest.raises(ValueError, match="alpha"):
            MomentumEncoder(tiny.image_encoder, alpha)


ENCODERS = {  # any module, whatever it returns
    "ours": lambda: build("tiny", 64, 32).image_encoder,
    "convolutions": lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5)),
    "torch's own": lambda: nn.TransformerEncoderLayer(64, 2, 16, dropout=0.5, batch_first=True),
    "timm's": lambda: timm.create_model("vit_tiny_patch16_224", img_size=64, num_classes=5)}


@pytest.mark.parametrize("name", ENCODERS)
@torch.no_grad()
def test_equals_a_whole_second_encoder_that_follows_the_formula(name):
    """It starts as a copy. Its pass changes nothing of the target, neither the mode nor running
    statistics. Its state restores it."""
    torch.manual_seed(0)
    encoder = ENCODERS[name]().train()
    inputs = torch.randn(2, 64, 64) if name == "torch's own" else torch.randn(2, 3, 64, 64)
    first = next(encoder.parameters()).requires_grad_(False)
    momentum, whole = MomentumEncoder(encoder, 0.75), copy.deepcopy(encoder).eval()
    for _ in range(2):
        torch.testing.assert_close(momentum(inputs), whole(inputs))
        encoder(inputs)  # moves running statistics
        train_a_little(encoder)
        momentum.update()
        for p, new in zip(whole.parameters(), encoder.parameters()):
            p.mul_(0.75).add_(new, alpha=0.25)
        for buffer, new in zip(whole.buffers(), encoder.buffers()):
            buffer.copy_(new)
    before = copy.deepcopy(encoder.state_dict())
    torch.testing.assert_close(momentum(inputs), whole(inputs))
    torch.testing.assert_close(encoder.state_dict(), before, rtol=0, atol=0)
    assert encoder.training and next(momentum.average.parameters()) is first  # shared
    other = MomentumEncoder(encoder, 0.5)
    other.load_state_dict(copy.deepcopy(momentum.state_dict()))
    torch.testing.assert_close(other(inputs), momentum(inputs), rtol=0, atol=0)
    assert other.alpha == 0.5
