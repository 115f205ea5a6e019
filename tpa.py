"""Text-to-patch pre-alignment: a short warm-up of the text encoder alone, so that more patches become reference patches."""
import torch
import torch.distributed as dist
import torch.nn.functional as F

from losses import IGNORE, patch_labels


def alignment_loss(patches, text, labels, scale):
    """Cross-entropy of scale * cos(V, T) against the patch labels, summed over the labelled patches.

    patches [B,L,D], text [K,D], labels [B,L]. Returns (sum, number of labelled patches). The paper gives no formula for
    this stage; this one is ours: what CLIP's own training does to images and captions, done to patches and names.
    """
    logits = scale * torch.einsum("bld,kd->blk", F.normalize(patches.detach(), dim=-1), F.normalize(text, dim=-1))
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="sum")
    return loss, (labels != IGNORE).sum()


def pre_align(model, tokens, batches, lr, device, progress=iter):
    """Adapt the text encoder's trained parameters, one optimiser step per batch; nothing else changes.

    batches: (images, target, paths), a share of each step's batch on each process; progress wraps them. The visual encoder
    is frozen and runs without a graph. AdamW without weight decay; lr falls linearly to 0. Returns the last loss.
    """
    params, loss = [p for p in model.text_encoder.parameters() if p.requires_grad], None
    if not params:
        raise ValueError("--tpa-steps adapts the text encoder, which --adapt keeps frozen: use --tpa-steps 0")
    optimiser, steps = torch.optim.AdamW(params, lr, weight_decay=0.0), len(batches)
    for step, (images, target, _) in enumerate(progress(batches)):
        with torch.no_grad():
            patches, _ = model.encode_image(images.to(device))
        labels = patch_labels(target.to(device), model.grid)
        loss, count = alignment_loss(patches, model.encode_text(tokens), labels, model.logit_scale.exp().clamp(max=100))
        optimiser.zero_grad()
        loss.backward()
        loss = loss.detach()
        for t in (loss, count, *(p.grad for p in params)) if dist.is_initialized() else ():
            dist.all_reduce(t)                                                      # sums over processes, then one mean
        for p in params:
            p.grad /= count.clamp(min=1)
        optimiser.param_groups[0]["lr"] = lr * (1 - step / steps)
        optimiser.step()
        loss = (loss / count.clamp(min=1)).item()
    optimiser.zero_grad()                                                      # joint training starts without leftovers
    return loss
