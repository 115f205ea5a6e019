"""A tiny CLIP for the toy world, pre-trained from pictures and the names of what they show.

It is told which names a picture shows, but not where. 85 % of its pictures are close-ups, most of
one thing alone. These come close to patch labels, so the task is easier than CLIP's on web images.
"""
import hashlib
import os
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

from model import TINY, tokenize
from sources import toy
from support.files import replacing


def closeup(rng):
    """32 x 32: half of them of one object alone, a fifth of background alone, the rest of both."""
    kind, radii = rng.uniform(), [80]
    if kind >= 0.7:
        radii = [rng.uniform(12, 18)]
    elif kind >= 0.5:
        radii = []
    return toy.draw(rng, rng.integers(4), rng.integers(48, size=len(radii)), radii, toy.SIZE // 2)


def scene(rng):
    """64 x 64, with one to three objects."""
    n = rng.integers(1, 4)
    return toy.draw(rng, rng.integers(4), rng.integers(48, size=n), rng.uniform(14, 22, n))


def pooled_features(visual, images, offset):
    """open_clip's image embedding [B,D] of images that are smaller than the model's: tokens take a
    window of the position grid, from offset (row, column) on."""
    x = visual.conv1(images)  # [B,width,h,w]
    (h, w), (top, left) = x.shape[2:], offset
    position = visual.positional_embedding[1:].unflatten(0, visual.grid_size)  # [rows,cols,width]
    x = x.flatten(2).transpose(1, 2) + position[top:top + h, left:left + w].flatten(0, 1)
    first = (visual.class_embedding + visual.positional_embedding[0]).expand(len(x), 1, -1)
    x = visual.ln_post(visual.transformer(visual.ln_pre(torch.cat([first, x], 1))))
    return F.normalize(x[:, 1:].mean(1) @ visual.proj, dim=-1)


def contrastive_loss(images, texts, present, scale):
    """Symmetric InfoNCE with several positives. images [B,D], texts [K,D], present bool [B,K]."""
    logits, present = scale * images @ texts.T, present.float()
    to_text = -(logits.log_softmax(1) * present / present.sum(1, keepdim=True)).sum(1).mean()
    used = present.sum(0) > 0
    to_image = -(logits.log_softmax(0) * present / present.sum(0).clamp(min=1)).sum(0)[used].mean()
    return (to_text + to_image) / 2


def pretrain(seed, steps=(220, 80), batches=(192, 96)):
    """The state dict of world `seed`'s tiny CLIP (open_clip's own names), pre-trained on close-ups,
    then on scenes, with so many steps and pictures a step. Deterministic."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        clip = open_clip.model.CLIP(**TINY)
    tokens = tokenize(toy.NAMES, clip.context_length)
    tokens = F.pad(tokens, (0, clip.context_length - tokens.shape[1]))
    mean = torch.tensor(open_clip.OPENAI_DATASET_MEAN).view(3, 1, 1)
    std = torch.tensor(open_clip.OPENAI_DATASET_STD).view(3, 1, 1)
    optimiser = torch.optim.AdamW(clip.parameters(), 1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, sum(steps))
    rng = np.random.default_rng((seed, 3))
    for step in tqdm(range(sum(steps)), "pre-training the tiny CLIP"):
        phase = int(step >= steps[0])
        draws = [(closeup, scene)[phase](rng) for _ in range(batches[phase])]
        pixels, labels = (torch.from_numpy(np.stack(arrays)) for arrays in zip(*draws))
        images = (pixels.permute(0, 3, 1, 2) / 255 - mean) / std  # [B,3,h,w]
        present = torch.zeros(len(images), len(toy.NAMES), dtype=torch.bool)
        present.scatter_(1, labels.flatten(1), True)  # [B,K]
        room = (toy.SIZE - images.shape[-1]) // clip.visual.patch_size[0]
        features = pooled_features(clip.visual, images, rng.integers(room + 1, size=2))
        texts = clip.encode_text(tokens, normalize=True)
        loss = contrastive_loss(features, texts, present, clip.logit_scale.exp().clamp(max=100))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    return clip.state_dict()


def prepare(dataset, rank):
    """Path of the tiny CLIP of the world that --dataset names, else of world 0. If need be, the
    first process pre-trains it, which takes minutes. Raises UserError."""
    seed = int(dataset.removeprefix("toy:")) if dataset.startswith("toy:") else 0
    recipe = Path(__file__).read_bytes() + Path(toy.__file__).read_bytes()
    folder = os.environ.get("RPMD_CACHE") or os.path.expanduser("~/.cache/rpmd")
    path = Path(folder) / f"toy-clip-{seed}-{hashlib.sha256(recipe).hexdigest()[:12]}.pt"
    if rank == 0 and not path.is_file():
        state = pretrain(seed)
        with replacing(path) as file:
            torch.save(state, file)
    if dist.is_initialized():
        dist.barrier()
    return path
