"""What a training step costs, per part. Run by hand:

    python tests/bench.py           JSON: FLOPs, measured seconds and peak memory of a step
    python tests/bench.py --json    the same in one line

ViT-B/16 (random weights), one 384 x 384 image, float32, K classes with names of COCO-Stuff's
lengths. Each K is measured in a process of its own, so that the peak of resident memory is its own.
FLOPs are PyTorch's count, forward and backward, on meta tensors.
"""
import argparse
import contextlib
import json
import multiprocessing
import os
import resource
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

import losses  # noqa: E402
from ema import MomentumEncoder  # noqa: E402
from model import build  # noqa: E402
from sources.benchmarks import CLASSES  # noqa: E402
from support import accidents  # noqa: E402


def setup(device, names, clip="ViT-B-16-quickgelu", size=384, channels=128, batch=1):
    """A model, its momentum encoder, images, their pixel labels and the names' tokens; the same for
    the same arguments."""
    torch.manual_seed(0)
    with torch.device("meta" if device == "meta" else "cpu"):
        model = build(clip, size, channels).train().to(device)
    images = torch.randn(batch, 3, size, size).to(device)
    labels = torch.randint(0, len(names), (batch, 8, 8))
    labels = labels.repeat_interleave(size // 8, 1).repeat_interleave(size // 8, 2).to(device)
    return model, MomentumEncoder(model.image_encoder, 0.9), images, labels, model.tokenize(names)


def class_names(K):
    lines = (CLASSES / "coco-stuff.txt").read_text().splitlines()
    return [lines[i % len(lines)] for i in range(K)]


def step(model, momentum, images, pixel_labels, tokens, meter):
    """A training step of train.py, cut where its parts meet; each runs inside meter(its name)."""
    with meter("image encoder"):
        patches, middle = model.encode_image(images)
    with meter("text encoder"):
        text = model.encode_text(tokens)
    v, *m, t = (x.detach().requires_grad_() for x in (patches, *middle, text))
    with meter("head"):
        logits = model.compute_logits(v, m, t)
    z = logits.detach().requires_grad_()
    with meter("momentum"):
        momentum_patches, _ = momentum(images)
    with meter("losses"):
        labels = losses.patch_labels(pixel_labels, model.grid)
        reference = losses.correctly_classified(momentum_patches, t, labels)
        spd = losses.spd_loss(v, momentum_patches, reference)
        class_masks = losses.class_reference_masks(reference, labels, len(t))
        prototypes, valid = losses.class_prototypes(momentum_patches, class_masks)
        q = losses.contrast_mask(valid, labels, losses.correctly_classified(v, t, labels))
        cpa = losses.cpa_loss(v, prototypes, valid, labels, q, 0.1)
        seg = losses.segmentation_loss(z, pixel_labels)
        losses.total_loss(seg, spd, cpa, 1, 1).backward()
    with meter("head"):
        logits.backward(z.grad)
    with meter("text encoder"):
        text.backward(t.grad)
    with meter("image encoder"):
        torch.autograd.backward([patches, *middle], [v.grad, *(x.grad for x in m)])
    with meter("momentum"):
        momentum.update()


def count_flops(K):
    """{part: FLOPs} of a training step, on meta tensors. Those of "momentum" and of SPD and CPA in
    "losses" are what RPMD adds to CAT-Seg."""
    flops = {}

    @contextlib.contextmanager
    def meter(part):
        with FlopCounterMode(display=False) as counter:
            yield
        flops[part] = flops.get(part, 0) + counter.get_total_flops()

    step(*setup("meta", class_names(K)), meter)
    return flops


def measure(K):
    """Seconds of a step, the third, and the peak of resident memory in GB."""
    accidents.start_processes()  # memory is kept as in a run
    inputs = setup("cpu", class_names(K))
    for _ in range(3):
        inputs[0].zero_grad()
        begin = time.perf_counter()
        step(*inputs, lambda part: contextlib.nullcontext())
        seconds = time.perf_counter() - begin
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    return {"seconds": seconds, "peak_rss_gb": peak}


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--classes", type=int, nargs="+", default=[20, 171, 847])
    add("--json", action="store_true", help="print it in one line")
    args = parser.parse_args()
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the CPU is measured
    results = {}
    for K in args.classes:
        with multiprocessing.get_context("spawn").Pool(1) as alone:
            results[str(K)] = {"flops": count_flops(K), **alone.apply(measure, (K,))}
    print(json.dumps(results, indent=None if args.json else 1))


if __name__ == "__main__":
    main()
