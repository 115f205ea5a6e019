"""The equations of reference patch momentum distillation, as functions of tensors.

Each function computes one equation of the paper (Liu et al., "Reference patch momentum distillation for
open-vocabulary semantic segmentation", Sci China Inf Sci 69(6):169101, 2026) literally on the tensors it is given.
They know no module, no optimiser and no process group, and they detach their own teacher: copy them one by one.

    B  images            L = H*W  patches of an image       K  classes        D  width of CLIP's joint embedding
    patches (V) [B,L,D], momentum_patches (V^M) [B,L,D], text (T) [K,D], labels (G) [B,L] with IGNORE where unknown
"""
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

IGNORE = -1  # the one label that means "no class here"; negative, because datasets with more than 255 classes use 255


@torch.no_grad()
def patch_labels(target, grid):
    """G: the label of each patch is the most frequent label of its pixels (our choice; the paper does not say).

    target: integer [B,H,W]. grid: (rows, columns) of patches, which must divide H and W. Returns [B,L], L = rows*columns.
    Ties go to the lowest label. Where IGNORE is the most frequent one (or ties for it), so is the patch's label.
    """
    (B, H, W), (rows, cols) = target.shape, grid
    if H % rows or W % cols:
        raise ValueError(f"a {H} x {W} label map does not divide into {rows} x {cols} patches")
    cells = target.reshape(B, rows, H // rows, cols, W // cols).transpose(2, 3)            # [B,rows,cols,h,w]
    cells = cells.reshape(B, rows * cols, -1).sort(-1).values                              # [B,L,h*w]
    counts = torch.searchsorted(cells, cells, right=True) - torch.searchsorted(cells, cells)
    return cells.gather(-1, counts.argmax(-1, keepdim=True)).squeeze(-1)                   # [B,L]


@torch.no_grad()
def reference_mask(patches, text, labels):
    """Eq. (1): M_s = 1{argmax(V T^T) = G}, the patches whose feature already names the right class.

    patches [B,L,D], text [K,D], labels [B,L]. The argmax is over cosines. Returns bool [B,L], False where labels are
    IGNORE. On momentum patches it finds the reference patches; on target patches, the correctly predicted ones.
    """
    cosine = torch.einsum("bld,kd->blk", F.normalize(patches, dim=-1), F.normalize(text, dim=-1))
    return (labels != IGNORE) & (cosine.argmax(-1) == labels)


def spd_loss(patches, momentum_patches, mask):
    """Eq. (2), selective patch distillation: mean of ||V_p - V^M_p||^2 over the reference patches of an image.

    patches, momentum_patches [B,L,D]; mask bool [B,L] from `reference_mask`. Returns a scalar: the mean over the
    images that have a reference patch, 0 (with zero gradient) when none has. No gradient reaches momentum_patches.
    """
    distance = (patches - momentum_patches.detach()).square().sum(-1)                      # [B,L]
    return _mean_of_image_means(distance, mask)


@torch.no_grad()
def class_reference_masks(mask, labels, num_classes):
    """Eq. (3): M_c = M_s restricted to the patches of class c. mask, labels [B,L]. Returns bool [B,K,L]."""
    classes = torch.arange(num_classes, device=labels.device)
    return mask[:, None] & (labels[:, None] == classes[:, None])


@torch.no_grad()
def class_prototypes(momentum_patches, class_masks):
    """Eq. (4): the prototype of a class is the mean momentum feature of its reference patches in the image.

    momentum_patches [B,L,D], class_masks [B,K,L] from `class_reference_masks`. Returns prototypes [B,K,D], zero
    where a class has no reference patch, and bool [B,K] that says which classes have one.
    """
    weights = class_masks.to(momentum_patches.dtype)
    count = weights.sum(-1, keepdim=True)                                                  # [B,K,1]
    prototypes = torch.einsum("bkl,bld->bkd", weights, momentum_patches) / count.clamp(min=1)
    return prototypes, class_masks.any(-1)


@torch.no_grad()
def contrast_mask(valid, labels, correct):
    """Q of Eq. (5): the correctly predicted target patches whose class has a prototype in their image.

    valid [B,K] from `class_prototypes`; labels [B,L]; correct bool [B,L] (`reference_mask` of the target patches).
    Returns bool [B,L].
    """
    return correct & (labels != IGNORE) & valid.gather(1, labels.clamp(min=0))


def cpa_loss(patches, prototypes, valid, labels, correct, tau):
    """Eq. (5), class-prototype alignment: pull each patch of Q to its class's prototype, away from the others.

    patches [B,L,D]; prototypes [B,K,D] and valid [B,K] from `class_prototypes`; labels [B,L]; correct bool [B,L]
    (`reference_mask` of the target patches); tau: the temperature. The denominator runs over the classes of the image
    that have a prototype. Returns a scalar: the mean over Q in each image, then over the images whose Q is not empty,
    0 (with zero gradient) when all are. No gradient reaches the prototypes.
    """
    similarity = torch.einsum("bld,bkd->blk", F.normalize(patches, dim=-1), F.normalize(prototypes.detach(), dim=-1))
    lowest = torch.finfo(similarity.dtype).min       # not -inf, whose softmax is NaN in an image without any prototype
    logits = (similarity / tau).masked_fill(~valid[:, None], lowest)                       # [B,L,K]
    log_p = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1)  # [B,L]
    return _mean_of_image_means(-log_p, contrast_mask(valid, labels, correct))


def total_loss(seg, spd, cpa, lambda_spd, lambda_cpa):
    """Eq. (6): L_total = L_SEG + lambda_SPD * L_SPD + lambda_CPA * L_CPA."""
    return seg + lambda_spd * spd + lambda_cpa * cpa


def pooled_loss(patches, frozen_patches, grid):
    """MAFT+'s distillation, to compare with: regions of the image instead of reference patches.

    Features [B,L,D] after ReLU, average-pooled on 1x1, 2x2 and 4x4 grids, each summed over its rows and over its columns;
    smooth-L1 between the target's and the frozen CLIP's sums, averaged over B, D and places, added up over the six.
    grid: (rows, columns) of patches. Returns a scalar. No gradient reaches frozen_patches.
    """
    target, frozen = (v.relu().transpose(1, 2).unflatten(2, grid) for v in (patches, frozen_patches.detach()))
    loss = 0
    for size in (1, 2, 4):
        a, b = F.adaptive_avg_pool2d(target, size), F.adaptive_avg_pool2d(frozen, size)    # [B,D,size,size]
        loss = loss + F.smooth_l1_loss(a.sum(2), b.sum(2)) + F.smooth_l1_loss(a.sum(3), b.sum(3))
    return loss


def segmentation_loss(logits, target, ignored="negative", chunk=32):
    """L_SEG of CAT-Seg: sigmoid cross-entropy against one-hot labels, logits resized to the size of the labels.

    logits [B,K,h,w], target [B,H,W]. ignored="negative" is what CAT-Seg computes: a pixel labelled IGNORE has an all-zero
    target, so it counts as a negative of every class, and the mean is over all pixels and classes. ignored="skip"
    leaves such pixels out of sum and mean (0 when every pixel is ignored). Returns a scalar.

    With one-hot targets the cross-entropy of z is softplus(z), minus z at the labelled class, so no one-hot tensor is
    needed; `chunk` classes are resized at a time and again in the backward pass, so [B,K,H,W] never exists.
    """
    if ignored not in ("negative", "skip"):
        raise ValueError(f"ignored is 'negative' or 'skip', not {ignored!r}")
    counted = target != IGNORE if ignored == "skip" else torch.ones_like(target, dtype=torch.bool)

    def chunk_sum(z, first):
        z = F.interpolate(z, target.shape[-2:], mode="bilinear", align_corners=False)      # [B,chunk,H,W]
        index = (target - first)[:, None]                                                  # [B,1,H,W]
        here = (target[:, None] != IGNORE) & (index >= 0) & (index < z.shape[1])
        at_label = z.gather(1, index.clamp(0, z.shape[1] - 1)) * here
        return (F.softplus(z) * counted[:, None]).sum() - at_label.sum()

    parts = [checkpoint(chunk_sum, z, i * chunk, use_reentrant=False, preserve_rng_state=False)
             for i, z in enumerate(logits.split(chunk, 1))]
    return sum(parts) / (counted.sum().clamp(min=1) * logits.shape[1])


def _mean_of_image_means(values, mask):
    """Mean of values [B,L] over mask [B,L] in each image, then over the images in which mask is not empty."""
    per_image = values.masked_fill(~mask, 0).sum(-1) / mask.sum(-1).clamp(min=1)           # [B]
    return per_image.sum() / mask.any(-1).sum().clamp(min=1)
