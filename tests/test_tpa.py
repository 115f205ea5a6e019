"""Text-to-patch pre-alignment: its loss, what it may change, and that it does what it is for."""
import math

import pytest
import torch

import tpa
from losses import IGNORE, correctly_classified, patch_labels


def test_alignment_loss_by_hand():
    patches, text = torch.tensor([[[2.0, 0.0], [0.0, 1.0], [5.0, 5.0]]]), torch.eye(2)
    patches.requires_grad_()
    text.requires_grad_()
    scale = torch.tensor(3.0)
    loss, count = tpa.alignment_loss(patches, text, torch.tensor([[0, 0, IGNORE]]), scale)
    expected = math.log(1 + math.exp(-3)) + math.log(1 + math.exp(3))
    assert count == 2 and loss.item() == pytest.approx(expected)
    assert torch.autograd.grad(loss, (patches, text), allow_unused=True)[0] is None
    loss, count = tpa.alignment_loss(patches, text, torch.full((1, 3), IGNORE), scale)
    assert loss == 0 and count == 0


def test_only_the_text_encoder_changes_and_more_patches_qualify(tiny):
    torch.manual_seed(1)
    pixel_labels = torch.randint(0, 3, (4, 1, 1)).expand(4, 64, 64).contiguous()
    images = torch.eye(3)[pixel_labels].permute(0, 3, 1, 2) + 0.1 * torch.randn(4, 3, 64, 64)
    tokens = tiny.tokenize(["red", "green", "blue"])
    labels = patch_labels(pixel_labels, tiny.grid)
    before = {name: p.detach().clone() for name, p in tiny.named_parameters()}

    def share_and_loss():
        with torch.no_grad():
            patches, text = tiny.encode_image(images)[0], tiny.encode_text(tokens)
            scale = tiny.logit_scale.exp().clamp(max=100)
            loss, count = tpa.alignment_loss(patches, text, labels, scale)
            share = correctly_classified(patches, text, labels).float().mean()
            return share.item(), (loss / count).item()

    first_share, first_loss = share_and_loss()
    batches = [(images, pixel_labels, [])] * 30
    assert tpa.pre_align(tiny, tokens, batches[:1], 1, 0.0) == pytest.approx(first_loss)
    last_loss = tpa.pre_align(tiny, tokens, batches, 30, 1e-3)
    share, loss = share_and_loss()
    assert share > first_share + 0.2 and loss < last_loss < first_loss
    changed = {name for name, p in tiny.named_parameters() if not torch.equal(p, before[name])}
    trained = {name for name, p in tiny.named_parameters() if p.requires_grad}
    assert changed == {name for name in trained if name.startswith("text_encoder")}
    assert all(p.grad is None for p in tiny.parameters())  # nothing left for joint training


def test_the_learning_rate_falls_linearly(tiny, monkeypatch):
    """AdamW without weight decay, its step divided by the labelled patches of all processes."""
    rates, step = [], torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: rates.append(
        (self.param_groups[0]["lr"], self.param_groups[0]["weight_decay"])) or step(self))
    batch = torch.randn(1, 3, 64, 64), torch.zeros(1, 64, 64, dtype=torch.long), []
    tpa.pre_align(tiny, tiny.tokenize(["red", "blue"]), [batch] * 4, 4, 1.0)
    assert rates == [(1.0, 0), (0.75, 0), (0.5, 0), (0.25, 0)]
