"""Text-to-patch pre-alignment: its loss, what it may change, and that it does what it is for."""

import math

import pytest
import torch

import tpa
from losses import IGNORE, patch_labels, reference_mask


def test_alignment_loss_by_hand():
    patches, text = torch.tensor([[[2.0, 0.0], [0.0, 1.0], [5.0, 5.0]]]), torch.eye(2)
    loss, count = tpa.alignment_loss(
        patches, text, torch.tensor([[0, 0, IGNORE]]), torch.tensor(3.0)
    )
    assert count == 2
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-3)) + math.log(1 + math.exp(3)))


def test_an_image_without_labels_gives_zero():
    loss, count = tpa.alignment_loss(
        torch.randn(1, 4, 8), torch.randn(3, 8), torch.full((1, 4), IGNORE), torch.tensor(3.0)
    )
    assert loss == 0 and count == 0


def test_only_the_text_encoder_changes_and_more_patches_qualify(tiny):
    torch.manual_seed(1)
    pixel_labels = torch.randint(0, 3, (4, 1, 1)).expand(4, 64, 64).contiguous()
    images = torch.eye(3)[pixel_labels].permute(0, 3, 1, 2) + 0.1 * torch.randn(4, 3, 64, 64)
    tokens, before = (
        tiny.tokenize(["red", "green", "blue"]),
        {n: p.detach().clone() for n, p in tiny.named_parameters()},
    )

    def share():
        with torch.no_grad():
            return (
                reference_mask(
                    tiny.encode_image(images)[0],
                    tiny.encode_text(tokens),
                    patch_labels(pixel_labels, tiny.grid),
                )
                .float()
                .mean()
            )

    start = share()
    tpa.pre_align(tiny, tokens, [(images, pixel_labels, [])] * 30, 1e-3, "cpu")
    changed = {n for n, p in tiny.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {
        n for n, p in tiny.named_parameters() if n.startswith("text_encoder") and p.requires_grad
    }
    assert share() > start + 0.2
    assert all(
        p.grad is None for p in tiny.parameters()
    )  # nothing left for joint training's first step


def test_refuses_a_frozen_text_encoder(tiny):
    tiny.set_trained("visual")
    with pytest.raises(ValueError, match="none of its parameters trains"):
        tpa.pre_align(tiny, tiny.tokenize(["a"]), [], 1e-3, "cpu")
