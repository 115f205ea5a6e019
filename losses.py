"""The equations of reference patch momentum distillation, as functions of tensors.

The paper is Liu et al., "Reference patch momentum distillation for open-vocabulary semantic
segmentation", Sci China Inf Sci 69(6):169101, 2026. These functions use no module, no optimiser and
no process group, stop gradients into the teacher themselves, and do not call each other, so that
any one of them can be copied alone.

    B  images      L = H*W  patches of an image      K  classes      D  width of the joint embedding
    patches (V) [B,L,D], momentum_patches (V^M) [B,L,D], text (T) [K,D],
    labels (G) int64 [B,L]: the class of each patch, 0..K-1, or `ignore` where there is none
"""
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

IGNORE = -1  # not 255, a class in ADE20K-847 and PC-459. To be copyable, functions write out -1


@torch.no_grad()
def patch_labels(pixel_labels, grid):
    """G: the label of a patch is the most frequent label of its pixels (our choice; the paper does
    not say). Ties go to the lowest label; `torch.mode` does not promise which one it takes.

    pixel_labels: int64 [B,H,W]. grid: (rows, columns) of patches; ValueError unless they divide H
    and W. Returns [B,L] in the same dtype. IGNORE counts as a label and, being -1, wins ties."""
    B, H, W = pixel_labels.shape
    rows, columns = grid
    if H % rows or W % columns:
        raise ValueError(f"a {H} x {W} label map does not divide into {rows} x {columns} patches")
    cells = pixel_labels.reshape(B, rows, H // rows, columns, W // columns).transpose(2, 3)
    cells = cells.reshape(B, rows * columns, -1).sort(-1).values  # [B,L,pixels], sorted
    # in sorted pixels, a label's count is the length of its run
    count = torch.searchsorted(cells, cells, right=True) - torch.searchsorted(cells, cells)
    return cells.gather(-1, count.argmax(-1, keepdim=True)).squeeze(-1)  # the first of the largest


@torch.no_grad()
def correctly_classified(patches, text, labels, ignore=-1):
    """Eq. (1): 1{argmax(V T^T) = G}, the patches whose feature names the right class.

    patches [B,L,D], text [K,D], labels [B,L]. The argmax is over cosines. Returns bool [B,L], False
    where labels are `ignore`. Momentum patches give M_s, the reference patches; the student's own
    patches give those that it predicts correctly, for Q of Eq. (5)."""
    V = F.normalize(patches, dim=-1)
    T = F.normalize(text, dim=-1)
    predicted = torch.einsum("bld,kd->blk", V, T).argmax(-1)  # [B,L]
    return (predicted == labels) & (labels != ignore)


reference_mask = correctly_classified  # alias for momentum patches


def spd_loss(patches, momentum_patches, mask, normalise=False):
    """Eq. (2), selective patch distillation: mean of ||V_p - V^M_p||^2 over the reference patches.

    patches, momentum_patches [B,L,D]; mask bool [B,L]: the reference patches. normalise: compare
    unit vectors, as train.py does by default; Eq. (2) compares raw features. Returns a scalar: the
    mean over the reference patches of an image, then over the images that have one; 0 (with zero
    gradient) when none has. momentum_patches get no gradient. ValueError if shapes do not fit."""
    if not patches.shape == momentum_patches.shape == (*mask.shape, patches.shape[-1]):
        raise ValueError(f"momentum_patches {list(momentum_patches.shape)} and mask "
                         f"{list(mask.shape)} do not fit patches {list(patches.shape)}")
    if normalise:
        patches = F.normalize(patches, dim=-1)
        momentum_patches = F.normalize(momentum_patches, dim=-1)
    distance = (patches - momentum_patches.detach()).square().sum(-1)  # [B,L]
    per_image = (distance * mask).sum(-1) / mask.sum(-1).clamp(min=1)  # [B], 0 where there is none
    return per_image.sum() / mask.any(-1).sum().clamp(min=1)


@torch.no_grad()
def class_reference_masks(mask, labels, num_classes):
    """Eq. (3): M_c, the reference patches of each class. mask, labels [B,L] -> bool [B,K,L]."""
    classes = torch.arange(num_classes, device=labels.device)
    return mask[:, None, :] & (labels[:, None, :] == classes[None, :, None])


@torch.no_grad()
def class_prototypes(momentum_patches, class_masks):
    """Eq. (4): the prototype of a class is the mean momentum feature of its reference patches.

    momentum_patches [B,L,D], class_masks [B,K,L] from `class_reference_masks`. Returns prototypes
    [B,K,D], zero where a class has no reference patch in the image, and valid, bool [B,K]: which
    classes have one."""
    M = class_masks.to(momentum_patches.dtype)
    count = M.sum(-1, keepdim=True)  # [B,K,1]
    prototypes = torch.einsum("bkl,bld->bkd", M, momentum_patches) / count.clamp(min=1)
    return prototypes, class_masks.any(-1)


@torch.no_grad()
def contrast_mask(valid, labels, correct, ignore=-1):
    """Q of Eq. (5): the correctly predicted patches whose class has a prototype in their image.

    valid [B,K] from `class_prototypes`; labels [B,L]; correct bool [B,L]: `correctly_classified` of
    the student's patches. Returns bool [B,L]."""
    own_class = labels.masked_fill(labels == ignore, 0)  # [B,L]
    return correct & (labels != ignore) & valid.gather(1, own_class)


def cpa_loss(patches, prototypes, valid, labels, q, tau):
    """Eq. (5), class-prototype alignment: pull each patch of Q to the prototype of its class, away
    from the other prototypes.

    patches [B,L,D]; prototypes [B,K,D] and valid bool [B,K] from `class_prototypes`; labels [B,L];
    q bool [B,L] from `contrast_mask`; tau: the temperature. The denominator runs over the classes
    that have a prototype in the image. Returns a scalar: the mean over Q in each image, then over
    the images whose Q is not empty; 0 (with zero gradient) when every Q is empty. No gradient
    reaches the prototypes."""
    V = F.normalize(patches, dim=-1)
    P = F.normalize(prototypes.detach(), dim=-1)
    logits = torch.einsum("bld,bkd->bkl", V, P) / tau  # [B,K,L]
    lowest = torch.finfo(logits.dtype).min  # not -inf: its softmax is NaN where no class is valid
    logits = logits.masked_fill(~valid[:, :, None], lowest)
    target = labels.masked_fill(~q, -1)
    loss = F.cross_entropy(logits, target, ignore_index=-1, reduction="none")  # [B,L], 0 outside Q
    per_image = loss.sum(-1) / q.sum(-1).clamp(min=1)  # [B]
    return per_image.sum() / q.any(-1).sum().clamp(min=1)


def total_loss(seg, spd, cpa, lambda_spd, lambda_cpa):
    """Eq. (6): L_total = L_SEG + lambda_SPD * L_SPD + lambda_CPA * L_CPA."""
    return seg + lambda_spd * spd + lambda_cpa * cpa


def segmentation_loss(logits, pixel_labels, ignored="negative", chunk=64, ignore=-1):
    """L_SEG of CAT-Seg: sigmoid cross-entropy against one-hot labels, at their resolution:

        z = F.interpolate(logits, (H, W), mode="bilinear")
        F.binary_cross_entropy_with_logits(z, one_hot(pixel_labels))

    logits [B,K,h,w], pixel_labels int64 [B,H,W]. A pixel whose label is outside 0..K-1 counts as a
    negative of every class. So does one labelled `ignore` if ignored="negative", as in CAT-Seg; if
    "skip", it is left out (0 when all are). Returns a scalar, the mean over pixels and classes.
    Raises ValueError for another `ignored`.

    The loss of a class is softplus(z), minus z at the labelled class, so one-hot labels are never
    built. Classes are upsampled `chunk` at a time, and again in the backward pass, so [B,K,H,W]
    never exists. (test_segmentation_loss_equals_bce_against_one_hot_labels)"""
    if ignored not in ("negative", "skip"):
        raise ValueError(f"ignored is 'negative' or 'skip', not {ignored!r}")
    known = pixel_labels != ignore
    labels = pixel_labels.masked_fill(~known, -1)

    def sum_over_classes(z, first):
        """z [B,c,h,w], logits of classes from `first` on -> their summed loss per pixel [B,H,W]."""
        z = F.interpolate(z, labels.shape[-2:], mode="bilinear", align_corners=False)
        index = labels - first
        index = index.masked_fill(index >= z.shape[1], -1).clamp(min=-1)
        minus_at_label = F.nll_loss(z, index, ignore_index=-1, reduction="none")
        return minus_at_label + F.softplus(z).sum(1)

    total = 0
    for i, z in enumerate(logits.split(chunk, 1)):
        total = total + checkpoint(sum_over_classes, z, i * chunk,
                                   use_reentrant=False, preserve_rng_state=False)
    if ignored == "skip":
        return (total * known).sum() / (known.sum().clamp(min=1) * logits.shape[1])
    return total.sum() / (known.numel() * logits.shape[1])


def pooled_loss(patches, frozen_patches, grid):
    """Not part of RPMD: the distillation of MAFT+ (Jiao et al., ECCV 2024), a baseline.

    patches, frozen_patches [B,L,D]; grid: (rows, columns) of patches. After ReLU, both are average-
    pooled to 1x1, 2x2 and 4x4, and each map is summed over its rows and over its columns. The loss
    is the sum of the six smooth-L1 distances between student and frozen CLIP, each a mean over all
    elements. Returns a scalar. No gradient reaches frozen_patches."""
    student = patches.relu().transpose(1, 2).unflatten(2, grid)  # [B,D,H,W]
    frozen = frozen_patches.detach().relu().transpose(1, 2).unflatten(2, grid)
    loss = 0
    for size in (1, 2, 4):
        a = F.adaptive_avg_pool2d(student, size)  # [B,D,size,size]
        b = F.adaptive_avg_pool2d(frozen, size)
        loss = loss + F.smooth_l1_loss(a.sum(2), b.sum(2)) + F.smooth_l1_loss(a.sum(3), b.sum(3))
    return loss
