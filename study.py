"""The paper's analysis: what becomes of reference patches while CLIP is fine-tuned."""
import torch
import torch.distributed as dist
import torch.nn.functional as F

import data
import evaluate
import viz
from losses import IGNORE, patch_labels, reference_mask


@torch.no_grad()
def reference_statistics(model, original, original_text, tokens, batches, device, momentum=None):
    """How the reference patches fare, over batches of (images, target, paths) and over all processes.

    Returns (share, drift). share: reference patches of the momentum encoder (of the model itself without one) among the
    labelled patches, Eq. (1). drift: 1 - cos of the model's features to the original CLIP's, on the patches that are
    reference patches of the original CLIP. original, momentum: MomentumEncoder objects. original_text: T of the original CLIP.
    """
    sums, text = torch.zeros(4, dtype=torch.float64, device=device), model.encode_text(tokens)
    for images, target, _ in batches:
        labels = patch_labels(target.to(device), model.grid)
        patches, first = model.encode_image(images.to(device))[0], original.encode_image(images.to(device))
        teacher = momentum.encode_image(images.to(device)) if momentum else patches
        anchors = reference_mask(first, original_text, labels)
        sums += torch.stack([reference_mask(teacher, text, labels).sum(), (labels != IGNORE).sum(),
                             (1 - F.cosine_similarity(patches, first, dim=-1))[anchors].double().sum(), anchors.sum()])
    if dist.is_initialized():
        dist.all_reduce(sums)
    share, drift = sums[0] / sums[1].clamp(min=1), sums[2] / sums[3].clamp(min=1)
    return share.item(), drift.item()


@torch.no_grad()
def example_sheet(model, original, original_text, momentum, dataset, sliding, count=6):
    """A row per image, the paper's Figure 1 made of one's own data. Returns a PIL image.

    Columns: picture, ground truth, the model's labels, and the reference patches of the original CLIP and of the momentum
    encoder (of the model itself without one). For the patches, the picture is squeezed to one view.
    """
    text, rows, maps = model.encode_text(model.tokenize(dataset.names)), [], []
    for i in range(min(count, len(dataset))):
        image, labels, _ = dataset.load(i)
        prediction = evaluate.label_map(model, image, text, sliding=sliding).cpu().numpy()
        view = data.normalise(image.resize((model.image_size, model.image_size)))[None].to(text.device)
        target = torch.from_numpy(labels).float()[None, None]
        target = F.interpolate(target, view.shape[2:], mode="nearest").long()[0]
        grid = patch_labels(target.to(text.device), model.grid)
        later = momentum.encode_image(view) if momentum else model.encode_image(view)[0]
        masks = [reference_mask(v, t, grid).reshape(model.grid).cpu().numpy()
                 for v, t in ((original.encode_image(view), original_text), (later, text))]
        rows.append([image, viz.paint(labels, dataset.names), viz.paint(prediction, dataset.names),
                     *(viz.highlight(image, mask) for mask in masks)])
        maps += [labels, prediction]
    titles = ["picture", "ground truth", "prediction", "reference patches\nof the original CLIP",
              "reference patches\nof the momentum encoder" if momentum else "reference patches\nof this model"]
    return viz.grid(titles, rows, legend=viz.present(dataset.names, *maps))
