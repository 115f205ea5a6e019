"""Text-to-patch pre-alignment (TPA): a short warm-up of the text encoder alone, so that more
patches become reference patches."""
import torch
import torch.distributed as dist
import torch.nn.functional as F

from losses import IGNORE, patch_labels


def alignment_loss(patches, text, labels, scale):
    """Cross-entropy of scale * cos(V, T) against G, summed over the labelled patches.

    patches [B,L,D], text [K,D], labels [B,L]. Returns (sum, number of labelled patches). The paper
    gives no formula for this stage; this one is ours: CLIP's classification loss, with patches in
    place of images and class names in place of captions."""
    V = F.normalize(patches.detach(), dim=-1)
    T = F.normalize(text, dim=-1)
    logits = scale * torch.einsum("bld,kd->blk", V, T)
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE,
                           reduction="sum")
    return loss, (labels != IGNORE).sum()


def pre_align(model, tokens, batches, steps, lr):
    """Train the text encoder's q and v projections alone, one optimiser step per batch.

    tokens [K,n] of the training names. batches: `steps` (at least 1) times (images [B,3,S,S],
    pixel_labels int64 [B,S,S], paths) on the model's device, this process's share of a batch. The
    visual encoder is frozen and runs without a graph. AdamW in float32, without weight decay or
    clipping; the learning rate falls linearly to 0. Returns the last step's mean loss."""
    params = [p for p in model.text_encoder.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(params, lr, weight_decay=0.0)
    for step, (images, pixel_labels, _) in enumerate(batches):
        with torch.no_grad():
            patches, _ = model.encode_image(images)
        labels = patch_labels(pixel_labels, model.grid)
        text = model.encode_text(tokens)
        loss, count = alignment_loss(patches, text, labels, model.logit_scale.exp().clamp(max=100))
        loss.backward()
        loss = loss.detach()
        if dist.is_initialized():  # sums over processes, then one mean
            for tensor in (loss, count, *(p.grad for p in params)):
                dist.all_reduce(tensor)
        for p in params:
            p.grad /= count.clamp(min=1)
        optimiser.param_groups[0]["lr"] = lr * (1 - step / steps)
        optimiser.step()
        optimiser.zero_grad()
    return (loss / count.clamp(min=1)).item()
