"""A tiny CLIP, pre-trained on the spot from pictures and the names of what they hold, not where.

In the toy world 85 % of its pictures are close-ups, most of them of a single thing, which comes
near to labels for patches: kinder than the web was to CLIP.
"""
import functools
import hashlib
import os
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

from losses import IGNORE
from model import TINY, tokenize
from sources.registry import open_dataset
from sources.toy import NAMES, SIZE, draw
from support.errors import UserError, replacing, writing


# Views: functions of a random generator that draw a picture, uint8 [h,w,3], and labels in it.

def closeup(rng):
    """32 x 32: half of them of one object alone, a fifth of background alone, the rest of both."""
    kind, radii = rng.uniform(), [80]
    if kind >= 0.7:
        radii = [rng.uniform(12, 18)]
    elif kind >= 0.5:
        radii = []
    return draw(rng, rng.integers(4), rng.integers(48, size=len(radii)), radii, SIZE // 2)


def scene(rng):
    n = rng.integers(1, 4)
    return draw(rng, rng.integers(4), rng.integers(48, size=n), rng.uniform(14, 22, n))


def crop_views(dataset):
    """Views of 32 x 32 and of 64 x 64: square crops of pictures, and labels at 6 x 6 points."""
    @functools.lru_cache(256)
    def load(i):  # shrunk, so that all of it stays in memory
        image, pixel_labels, _ = dataset.load(i)
        size = [max(1, round(side * min(1, 430 / min(image.size)))) for side in image.size]
        x, y = ((np.arange(n) + 0.5) * old / n for n, old in zip(size, image.size))
        return image.resize(size), pixel_labels[y.astype(int)[:, None], x.astype(int)]

    def crop(rng, side, smallest):
        for _ in range(100):
            image, pixel_labels = load(int(rng.integers(len(dataset))))
            size = rng.uniform(smallest, 1) * min(image.size)
            left, top = rng.uniform(0, image.width - size), rng.uniform(0, image.height - size)
            points = (np.arange(6) + 0.5) * size / 6
            labels = pixel_labels[(top + points).astype(int)[:, None], (left + points).astype(int)]
            if (labels != IGNORE).any():
                box = left, top, left + size, top + size
                image = image.resize((side, side), Image.Resampling.BILINEAR, box)
                return np.asarray(image), labels
        raise UserError(f"--pretrained crops: a hundred crops of {dataset.source} show nothing "
                        "that has a label")

    return [functools.partial(crop, side=SIZE // 2, smallest=0.15),
            functools.partial(crop, side=SIZE, smallest=0.5)]


def pooled_features(visual, images, offset):
    """open_clip's image embedding [B,D] of views smaller than the model's: tokens take a window of
    the position grid."""
    x = visual.conv1(images)  # [B,width,h,w]
    (h, w), (top, left) = x.shape[2:], offset
    position = visual.positional_embedding[1:].unflatten(0, visual.grid_size)  # [rows,cols,width]
    x = x.flatten(2).transpose(1, 2) + position[top:top + h, left:left + w].flatten(0, 1)
    first = (visual.class_embedding + visual.positional_embedding[0]).expand(len(x), 1, -1)
    x = visual.ln_post(visual.transformer(visual.ln_pre(torch.cat([first, x], 1))))
    return F.normalize(x[:, 1:].mean(1) @ visual.proj, dim=-1)


def contrastive_loss(images, texts, present, scale):
    """InfoNCE both ways, several right answers. images [B,D], texts [K,D], present bool [B,K]."""
    logits, present = scale * images @ texts.T, present.float()
    to_text = -(logits.log_softmax(1) * present / present.sum(1, keepdim=True)).sum(1).mean()
    used = present.sum(0) > 0
    to_image = -(logits.log_softmax(0) * present / present.sum(0).clamp(min=1)).sum(0)[used].mean()
    return (to_text + to_image) / 2


def pretrain(seed, names=NAMES, views=(closeup, scene), steps=(220, 80), batches=(192, 96),
             progress=True):
    """The state dict of a tiny CLIP (open_clip's own names), pre-trained for world `seed`:
    deterministic. views, steps and batches: of its first and of its second phase."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        clip = open_clip.model.CLIP(**TINY)
    tokens = tokenize(names, clip.context_length)
    tokens = F.pad(tokens, (0, clip.context_length - tokens.shape[1]))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (
        open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD))
    optimiser = torch.optim.AdamW(clip.parameters(), 1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, sum(steps))
    rng = np.random.default_rng((seed, 3))
    bar = tqdm(range(sum(steps)), "pre-training the tiny CLIP", disable=not progress)
    for step in bar:
        phase = int(step >= steps[0])
        images, labels = zip(*(views[phase](rng) for _ in range(batches[phase])))
        present = torch.zeros(len(images), len(names), dtype=torch.bool)
        for row, found in zip(present, labels):
            row[found[found != IGNORE]] = True
        images = (torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 255 - mean) / std
        room = (SIZE - images.shape[-1]) // clip.visual.patch_size[0]
        offset = rng.integers(room + 1, size=2)
        with torch.autocast("cpu", torch.bfloat16):
            features = pooled_features(clip.visual, images, offset)
            texts = clip.encode_text(tokens, normalize=True)
        scale = clip.logit_scale.exp().clamp(max=100)
        loss = contrastive_loss(features.float(), texts.float(), present, scale)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.2f}")
    return clip.state_dict()


def clip_checkpoint(seed, dataset=None, progress=True):
    """Path of the tiny CLIP of world `seed`, or of crops of a dataset's pictures and the names of
    what they hold, in $RPMD_CACHE or rpmd/ in the user's cache folder; pre-trained first if need
    be, as it is when the recipe or pictures change. Raises UserError."""
    kind, names, views, about = "toy", NAMES, (closeup, scene), ""
    if dataset is not None:
        kind, names, views = "crops", dataset.names, crop_views(dataset)
        about = Path(dataset.load(0)[2]).resolve(), len(dataset)
    recipe = hashlib.sha256(Path(__file__).read_bytes() + repr((TINY, names, about)).encode())
    for view in views:
        rng = np.random.default_rng(0)
        for _ in range(50):  # pictures, for all that can be in one
            recipe.update(b"".join(array.tobytes() for array in view(rng)))
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"), "rpmd")
    folder = Path(os.environ.get("RPMD_CACHE", default))
    path = folder / f"{kind}-clip-{seed}-{recipe.hexdigest()[:12]}.pt"
    if not path.is_file():
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        state = pretrain(seed, names, views, progress=progress)
        with replacing(path) as file:
            torch.save(state, file)
    return path


def prepare(args, rank):
    """The file that --pretrained toy or crops stands for; process 0 pre-trains it if need be."""
    seed, dataset = 0, None
    if args.pretrained == "crops":
        seed = args.seed
        dataset = open_dataset(args.dataset, args.data_root, "train", args.classes)
    elif args.dataset.startswith("toy:"):
        seed = int(args.dataset.removeprefix("toy:"))
    if rank == 0:
        clip_checkpoint(seed, dataset)
    if dist.is_initialized():
        dist.barrier()
    return str(clip_checkpoint(seed, dataset))
