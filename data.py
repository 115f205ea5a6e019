"""Training samples that depend on nothing but a seed and a draw number.

`open_dataset` opens a dataset by name (sources/benchmarks.py says how each lies on disk). It has
`len()`, `names` and `load(i) -> (PIL RGB image, int64 pixel labels [H,W] with IGNORE, path)`. Here
its images become augmented crops, and crops become batches.
"""
import numpy as np
import torch

from sources.augment import augment
from sources.registry import NAMES, REPORTED, open_dataset, read_names  # noqa: F401, offered here
from support import runs

MEAN = torch.tensor((0.48145466, 0.4578275, 0.40821073)).view(3, 1, 1)  # CLIP's
STD = torch.tensor((0.26862954, 0.26130258, 0.27577711)).view(3, 1, 1)


def normalise(image):
    """PIL RGB image -> float [3,H,W] with CLIP's mean and standard deviation."""
    return (torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255).sub_(MEAN).div_(STD)


class TrainingCrops(torch.utils.data.Dataset):
    """Augmented training samples. Item d (a draw number) is a pure function of (seed, d), so that
    neither the number of workers nor of processes nor an interruption changes what is trained on.

    Draws 0..N-1 visit each of the N images once in a random order, the next N again in another one.
    An item is (image float [3,size,size] normalised, pixel labels int64 [size,size], path).
    """

    def __init__(self, dataset, size, seed, jitter=1.0):
        self.dataset = dataset
        self.size = size
        self.seed = seed
        self.jitter = jitter
        self.orders = {}  # of the running epoch alone

    def __getitem__(self, draw):
        epoch, place = divmod(draw, len(self.dataset))
        if epoch not in self.orders:
            rng = np.random.default_rng((self.seed, 0, epoch))
            self.orders = {epoch: rng.permutation(len(self.dataset))}
        image, pixel_labels, path = self.dataset.load(int(self.orders[epoch][place]))
        rng = np.random.default_rng((self.seed, 1, draw))
        image, pixel_labels = augment(image, pixel_labels, self.size, self.jitter, rng)
        return normalise(image), torch.from_numpy(pixel_labels), path


def batches(crops, batch_size, start, stop, rank=0, world=1, workers=0):
    """Batches of draws for steps start..stop-1: each step takes the next batch_size * world draws,
    of which this rank takes its share. Returns an iterable over (images [b,3,S,S], pixel labels
    [b,S,S], paths)."""
    firsts = [(step * world + rank) * batch_size for step in range(start, stop)]
    mine = [range(first, first + batch_size) for first in firsts]
    return torch.utils.data.DataLoader(crops, batch_sampler=mine, num_workers=workers,
                                       worker_init_fn=runs.leave_process_group,
                                       pin_memory=torch.cuda.is_available())
