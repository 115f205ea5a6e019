"""What a training step and an evaluated image cost, per part. Run by hand:

    python tests/bench.py                        a table: FLOPs on meta tensors, measured seconds and peak memory of a step
    python tests/bench.py --json                 the same as one JSON object
    python tests/bench.py --classes 171 --flops  FLOPs only: deterministic, and a matter of seconds
    python tests/bench.py --loader               training crops a second on one core, against the same in plain PIL calls

ViT-B/16 (random weights), one 384 x 384 image, float32, K classes with names of COCO-Stuff's lengths. Each K is measured in
a process of its own, so that the peak of resident memory is its own. FLOPs are PyTorch's count, forward and backward.
"""
import argparse
import contextlib
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image, ImageEnhance, ImageOps  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

import data  # noqa: E402
import evaluate  # noqa: E402
import losses  # noqa: E402
import model as segmenter  # noqa: E402
from ema import MomentumEncoder  # noqa: E402


def names(K):
    """K names: COCO-Stuff's, repeated as often as needed."""
    lines = (ROOT / "classes" / "coco-stuff.txt").read_text().splitlines()
    return [lines[i % len(lines)] for i in range(K)]


def step(net, momentum, images, target, tokens, meter):
    """A training step of train.py, cut where its parts meet; meter(part) is entered around each piece."""
    with meter("image encoder"):
        patches, middle = net.encode_image(images)
    with meter("text encoder"):
        text = net.encode_text(tokens)
    v, *m, t = (x.detach().requires_grad_() for x in (patches, *middle, text))
    with meter("head"):
        logits = net.segment(v, m, t)
    z = logits.detach().requires_grad_()
    if momentum:
        with meter("momentum"):
            momentum_patches = momentum.encode_image(images)
    with meter("losses"):
        loss = losses.segmentation_loss(z, target)
        if momentum:
            labels = losses.patch_labels(target, net.grid)
            mask, correct = (losses.reference_mask(x, t, labels) for x in (momentum_patches, v))
            spd = losses.spd_loss(v, momentum_patches, mask)
            prototypes, valid = losses.class_prototypes(momentum_patches, losses.class_reference_masks(mask, labels, len(t)))
            loss = losses.total_loss(loss, spd, losses.cpa_loss(v, prototypes, valid, labels, correct, 0.1), 1, 1)
        loss.backward()
    with meter("head"):
        logits.backward(z.grad)
    with meter("text encoder"):
        text.backward(t.grad)
    with meter("image encoder"):
        torch.autograd.backward([patches, *middle], [v.grad, *(x.grad for x in m)])
    if momentum:
        with meter("momentum"):
            momentum.update()


def setup(device, K, recompute):
    net = segmenter.build("ViT-B-16-quickgelu").train()
    net.head.recompute = recompute
    tokens = net.tokenize(names(K))
    net, tokens = net.to(device), tokens.to(device)
    g = torch.Generator().manual_seed(0)
    target = torch.randint(0, min(K, 8), (1, 24, 24), generator=g).repeat_interleave(16, 1).repeat_interleave(16, 2)
    return net, torch.randn(1, 3, 384, 384, generator=g).to(device), target.to(device), tokens


def count_flops(K, distill=True, recompute=False):
    """{part: FLOPs} of a training step, on meta tensors."""
    net, images, target, tokens = setup("meta", K, recompute)
    flops = {}

    @contextlib.contextmanager
    def meter(part):
        with FlopCounterMode(display=False) as counter:
            yield
        flops[part] = flops.get(part, 0) + counter.get_total_flops()

    step(net, MomentumEncoder(net, 0.99) if distill else None, images, target, tokens, meter)
    return flops


def measure(K, recompute):
    """Seconds per part of a step, after a warm-up step, and the process's peak of resident memory in GB."""
    net, images, target, tokens = setup("cpu", K, recompute)
    momentum, seconds = MomentumEncoder(net, 0.99), {}

    @contextlib.contextmanager
    def meter(part):
        begin = time.perf_counter()
        yield
        seconds[part] = seconds.get(part, 0) + time.perf_counter() - begin

    for _ in range(2):
        seconds.clear()
        net.zero_grad()
        step(net, momentum, images, target, tokens, meter)
    return {"seconds": sum(seconds.values()), "parts": seconds, "peak_rss_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6}


def measure_evaluation(K, width=500, height=375):
    """Seconds to segment one picture with CAT-Seg's five views, texts encoded before, and the peak of resident memory."""
    net = segmenter.build("ViT-B-16-quickgelu").eval()
    with torch.inference_mode():
        text = net.encode_text(net.tokenize(names(K)))
    before, begin = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    evaluate.label_map(net, Image.effect_noise((width, height), 60).convert("RGB"), text)
    return {"seconds": time.perf_counter() - begin, "peak_rss_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
            "rss_before_gb": before / 1e6}


def plain_samples(dataset, draws, rng, size=384):
    """What data.TrainingCrops does, as one would write it with nothing but PIL's and torch's everyday calls."""
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (data.MEAN, data.STD))
    for i in draws:
        image, mask = (Image.open(path) for path in dataset.pairs[i % len(dataset)])
        side = tuple(int(n * size / min(image.size) + 0.5) for n in image.size)
        image, mask = image.convert("RGB").resize(side, Image.Resampling.BILINEAR), mask.resize(side, Image.Resampling.NEAREST)
        left, top = (int(rng.integers(n - size + 1)) for n in side)
        image, mask = (im.crop((left, top, left + size, top + size)) for im in (image, mask))
        flags, (b, c, s, h) = rng.uniform(size=5) < 0.5, rng.uniform(-1, 1, 4)
        image = image.point([min(max(v + int(32 * b), 0), 255) for v in range(256)] * 3) if flags[0] else image
        image = ImageEnhance.Contrast(image).enhance(1 + 0.5 * c) if flags[1] else image
        image = ImageEnhance.Color(image).enhance(1 + 0.5 * s) if flags[2] else image
        if flags[3]:
            hue, *rest = image.convert("HSV").split()
            image = Image.merge("HSV", (hue.point([(v + int(25 * h)) % 256 for v in range(256)]), *rest)).convert("RGB")
        image, mask = (ImageOps.mirror(image), ImageOps.mirror(mask)) if flags[4] else (image, mask)
        labels = torch.from_numpy(np.array(mask)).long()
        labels[labels == 255] = losses.IGNORE
        yield (torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255 - mean) / std, labels


def measure_loader(count=96, repeats=5):
    """Samples a second of CPU time on one core, from 640 x 480 jpgs: data.batches, plain PIL, and the median of their ratios."""
    torch.set_num_threads(1)
    rng, rates = np.random.default_rng(0), []
    with tempfile.TemporaryDirectory() as folder:
        for kind in ("images", "masks"):
            Path(folder, kind, "train").mkdir(parents=True)
        for i in range(32):
            colours, noise = rng.integers(0, 255, (30, 40, 3), np.uint8), rng.normal(0, 6, (480, 640, 3))
            image = np.asarray(Image.fromarray(colours).resize((640, 480), Image.Resampling.BICUBIC)) + noise
            Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(f"{folder}/images/train/{i}.jpg", quality=90)
            mask = Image.fromarray(rng.integers(0, 20, (15, 20), np.uint8)).resize((640, 480), Image.Resampling.NEAREST)
            mask.save(f"{folder}/masks/train/{i}.png")
        Path(folder, "classes.txt").write_text("\n".join(f"class {i}" for i in range(20)))
        dataset = data.open_dataset(f"folder:{folder}", None, "train")
        for _ in range(repeats):
            marks = [time.process_time()]
            for batch in data.batches(data.TrainingCrops(dataset, 384, 0), 4, 0, count // 4):
                pass
            marks.append(time.process_time())
            for batch in torch.utils.data.DataLoader(list(plain_samples(dataset, range(count), rng)), 4):
                pass
            marks.append(time.process_time())
            rates.append([count / (b - a) for a, b in zip(marks, marks[1:])])
    ours, plain = np.median(rates, 0)
    return {"crops_per_second": ours, "plain_pil": plain, "times_slower": float(np.median([p / o for o, p in rates]))}


def alone(expression):
    """Evaluate a call of this file's in a process of its own."""
    code = f"import sys, json; sys.path.insert(0, {str(Path(__file__).parent)!r}); import bench; print(json.dumps(bench.{expression}))"
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=int, nargs="+", default=[20, 171, 847])
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--flops", action="store_true", help="count, but don't measure")
    parser.add_argument("--recompute-head", action="store_true", help="with train.py's flag of this name")
    parser.add_argument("--loader", action="store_true", help="measure the data pipeline instead")
    args = parser.parse_args()
    if args.loader:
        return print(json.dumps(measure_loader()))
    results = {}
    for K in args.classes:
        results[str(K)] = r = {"flops": count_flops(K, recompute=args.recompute_head)}
        plain = sum(count_flops(K, distill=False, recompute=args.recompute_head).values())
        r["surcharge"] = sum(r["flops"].values()) / plain - 1
        if not args.flops:
            r |= alone(f"measure({K}, {args.recompute_head})")
            r["evaluation"] = alone(f"measure_evaluation({K})")
        if args.json:
            continue
        total = sum(r["flops"].values())
        print(f"\nK = {K}: a step is {total / 1e12:.2f} TFLOP, {100 * r['surcharge']:.1f} % more than without distillation")
        for part, n in r["flops"].items():
            print(f"  {part:14} {n / 1e12:6.3f} TFLOP" + (f" {r['parts'][part]:8.2f} s" if "parts" in r else ""))
        if "seconds" in r:
            print(f"  {'step':14} {r['seconds']:8.2f} s, peak {r['peak_rss_gb']:.1f} GB\n"
                  f"  {'evaluation':14} {r['evaluation']['seconds']:8.2f} s, peak {r['evaluation']['peak_rss_gb']:.1f} GB")
    if args.json:
        print(json.dumps(results))


if __name__ == "__main__":
    main()
