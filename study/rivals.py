"""What RPMD is compared with, where it is no part of RPMD."""
import torch.nn.functional as F


def pooled_loss(patches, frozen_patches, grid):
    """MAFT+'s distillation, of regions of the image: features [B,L,D] after ReLU, average-pooled on
    1x1, 2x2 and 4x4 grids, each summed over its rows and over its columns; smooth-L1 between the
    target's and the frozen CLIP's sums, averaged over B, D and places, added up over the six. grid:
    (rows, columns) of patches. Returns a scalar. No gradient reaches frozen_patches."""
    target = patches.relu().transpose(1, 2).unflatten(2, grid)  # [B,D,H,W]
    frozen = frozen_patches.detach().relu().transpose(1, 2).unflatten(2, grid)
    loss = 0
    for size in (1, 2, 4):
        a = F.adaptive_avg_pool2d(target, size)  # [B,D,size,size]
        b = F.adaptive_avg_pool2d(frozen, size)
        loss = loss + F.smooth_l1_loss(a.sum(2), b.sum(2)) + F.smooth_l1_loss(a.sum(3), b.sum(3))
    return loss
