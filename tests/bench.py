"""What a training step and an evaluated image cost, per part. Run by hand:

    python tests/bench.py           a table: FLOPs, measured seconds and peak memory of a step
    python tests/bench.py --json    the same as one JSON object
    python tests/bench.py --flops   FLOPs only: deterministic, and a matter of seconds
    python tests/bench.py --loader  training crops a second on one core, and the same in plain PIL
    python tests/bench.py --against REF    seconds and memory of this tree and of a commit, in turns

ViT-B/16 (random weights), one 384 x 384 image, float32, K classes with names of COCO-Stuff's
lengths. Each K is measured in a process of its own, so that the peak of resident memory is its own.
FLOPs are PyTorch's count, forward and backward, on meta tensors.
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
import train  # noqa: E402
from ema import MomentumEncoder  # noqa: E402
from model import PROMPT_START, build  # noqa: E402
from sources.benchmarks import CLASSES  # noqa: E402
from sources.registry import open_dataset  # noqa: E402
from support import runs  # noqa: E402


def names(K):
    """K names: COCO-Stuff's, repeated as often as needed."""
    lines = (CLASSES / "coco-stuff.txt").read_text().splitlines()
    return [lines[i % len(lines)] for i in range(K)]


def step(model, momentum, images, pixel_labels, tokens, meter):
    """A training step of train.py, cut where its parts meet; each runs inside meter(its name)."""
    with meter("image encoder"):
        patches, middle = model.encode_image(images)
    with meter("text encoder"):
        text = model.encode_text(tokens, PROMPT_START)
    v, *m, t = (x.detach().requires_grad_() for x in (patches, *middle, text))
    with meter("head"):
        logits = model.compute_logits(v, m, t)
    z = logits.detach().requires_grad_()
    if momentum:
        with meter("momentum"):
            momentum_patches, _ = momentum(images)
    with meter("losses"):
        loss = losses.segmentation_loss(z, pixel_labels)
        if momentum:
            labels = losses.patch_labels(pixel_labels, model.grid)
            mask, correct = (losses.reference_mask(x, t, labels) for x in (momentum_patches, v))
            spd = losses.spd_loss(v, momentum_patches, mask)
            class_masks = losses.class_reference_masks(mask, labels, len(t))
            prototypes, valid = losses.class_prototypes(momentum_patches, class_masks)
            cpa = losses.cpa_loss(v, prototypes, valid, labels, correct, 0.1)
            loss = losses.total_loss(loss, spd, cpa, 1, 1)
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
    """A model, an image, its pixel labels and the tokens of K names, in a process like a run's."""
    runs.keep_memory()
    model = build("ViT-B-16-quickgelu").train()
    model.head.recompute = recompute
    tokens = model.tokenize(names(K)).to(device)
    g = torch.Generator().manual_seed(0)
    pixel_labels = torch.randint(0, min(K, 8), (1, 24, 24), generator=g)
    pixel_labels = pixel_labels.repeat_interleave(16, 1).repeat_interleave(16, 2).to(device)
    images = torch.randn(1, 3, 384, 384, generator=g).to(device)
    return model.to(device), images, pixel_labels, tokens


def peak_gb():
    """The most memory this process has held, resident."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def count_flops(K, distill=True, recompute=False):
    """{part: FLOPs} of a training step, on meta tensors."""
    model, images, pixel_labels, tokens = setup("meta", K, recompute)
    flops = {}

    @contextlib.contextmanager
    def meter(part):
        with FlopCounterMode(display=False) as counter:
            yield
        flops[part] = flops.get(part, 0) + counter.get_total_flops()

    momentum = MomentumEncoder(model.image_encoder, 0.99) if distill else None
    step(model, momentum, images, pixel_labels, tokens, meter)
    return flops


def measure(K, recompute):
    """Seconds per part of a step, after two to warm up, and the peak of resident memory in GB."""
    model, images, pixel_labels, tokens = setup("cpu", K, recompute)
    momentum = MomentumEncoder(model.image_encoder, 0.99)
    seconds = {}

    @contextlib.contextmanager
    def meter(part):
        begin = time.perf_counter()
        yield
        seconds[part] = seconds.get(part, 0) + time.perf_counter() - begin

    for _ in range(3):
        seconds.clear()
        model.zero_grad()
        step(model, momentum, images, pixel_labels, tokens, meter)
    return {"seconds": sum(seconds.values()), "parts": seconds, "peak_rss_gb": peak_gb()}


def measure_compiled(K):
    """The same of whole steps of `train.step_losses` under --compile; also of the first one."""
    model, images, pixel_labels, tokens = setup("cpu", K, False)
    momentum = MomentumEncoder(model.image_encoder, 0.99)
    args = train.parse(["--dataset", "coco-stuff", "--precision", "fp32"])
    runs.compile_forward(model)
    seconds = []
    for _ in range(4):
        begin = time.perf_counter()
        model.zero_grad()
        loss, _ = train.step_losses(model, momentum, images, pixel_labels, tokens, args)
        loss.backward()
        momentum.update()
        seconds.append(time.perf_counter() - begin)
    return {"seconds": min(seconds[1:]), "first": seconds[0], "peak_rss_gb": peak_gb()}


def measure_evaluation(K, compiled=False, width=500, height=375):
    """Seconds to segment a picture in CAT-Seg's five views, texts encoded before, and the peak of
    resident memory."""
    runs.keep_memory()
    model = build("ViT-B-16-quickgelu").eval()
    if compiled:
        evaluate.compile_parts(model)
        evaluate.label_map(model, Image.new("RGB", (width, height)), torch.randn(K, 512))
    with torch.inference_mode():
        text = model.encode_text(model.tokenize(names(K)))
    image = Image.effect_noise((width, height), 60).convert("RGB")
    before, begin = peak_gb(), time.perf_counter()
    evaluate.label_map(model, image, text)
    seconds = time.perf_counter() - begin
    return {"seconds": seconds, "peak_rss_gb": peak_gb(), "rss_before_gb": before}


def plain_samples(dataset, draws, rng, size=384):
    """What data.TrainingCrops does, written with nothing but PIL's and torch's everyday calls."""
    for i in draws:
        image, mask = (Image.open(path) for path in dataset.pairs[i % len(dataset)])
        side = tuple(int(n * size / min(image.size) + 0.5) for n in image.size)
        image = image.convert("RGB").resize(side, Image.Resampling.BILINEAR)
        mask = mask.resize(side, Image.Resampling.NEAREST)
        left, top = (int(rng.integers(n - size + 1)) for n in side)
        image, mask = (im.crop((left, top, left + size, top + size)) for im in (image, mask))
        flags = rng.uniform(size=5) < 0.5
        b, c, s, h = rng.uniform(-1, 1, 4)
        if flags[0]:
            image = image.point([min(max(v + int(32 * b), 0), 255) for v in range(256)] * 3)
        if flags[1]:
            image = ImageEnhance.Contrast(image).enhance(1 + 0.5 * c)
        if flags[2]:
            image = ImageEnhance.Color(image).enhance(1 + 0.5 * s)
        if flags[3]:
            hue, *rest = image.convert("HSV").split()
            hue = hue.point([(v + int(25 * h)) % 256 for v in range(256)])
            image = Image.merge("HSV", (hue, *rest)).convert("RGB")
        if flags[4]:
            image, mask = ImageOps.mirror(image), ImageOps.mirror(mask)
        labels = torch.from_numpy(np.array(mask)).long()
        labels[labels == 255] = losses.IGNORE
        x = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
        yield (x - data.MEAN) / data.STD, labels


def write_photos(folder, rng, count=32):
    """A folder dataset of 640 x 480 jpgs with 20 classes."""
    for kind in ("images", "masks"):
        Path(folder, kind, "train").mkdir(parents=True)
    for i in range(count):
        colours = Image.fromarray(rng.integers(0, 255, (30, 40, 3), np.uint8))
        noise = rng.normal(0, 6, (480, 640, 3))
        image = np.asarray(colours.resize((640, 480), Image.Resampling.BICUBIC)) + noise
        image = Image.fromarray(image.clip(0, 255).astype(np.uint8))
        image.save(f"{folder}/images/train/{i}.jpg", quality=90)
        mask = Image.fromarray(rng.integers(0, 20, (15, 20), np.uint8))
        mask.resize((640, 480), Image.Resampling.NEAREST).save(f"{folder}/masks/train/{i}.png")
    Path(folder, "classes.txt").write_text("\n".join(f"class {i}" for i in range(20)))


def measure_loader(count=96, repeats=5):
    """Samples a second of CPU time on one core: data.batches, plain PIL, and the median of their
    ratios."""
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    rates = []
    with tempfile.TemporaryDirectory() as folder:
        write_photos(folder, rng)
        dataset = open_dataset(f"folder:{folder}", None, "train")
        for _ in range(repeats):
            marks = [time.process_time()]
            for _ in data.batches(data.TrainingCrops(dataset, 384, 0), 4, 0, count // 4):
                pass
            marks.append(time.process_time())
            samples = list(plain_samples(dataset, range(count), rng))
            for _ in torch.utils.data.DataLoader(samples, 4):
                pass
            marks.append(time.process_time())
            rates.append([count / (b - a) for a, b in zip(marks, marks[1:])])
    ours, plain = np.median(rates, 0)
    slower = float(np.median([p / o for o, p in rates]))
    return {"crops_per_second": ours, "plain_pil": plain, "times_slower": slower}


def alone(expression, here=Path(__file__).parent):
    """Evaluate a call of this file's, or of that in another tree, in a process of its own."""
    here = str(here)
    code = (
        f"import sys, json; sys.path.insert(0, {here!r}); import bench; "
        f"print(json.dumps(bench.{expression}))"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def compare(ref, classes, turns=2):
    """Print what a step and an evaluation cost here and at a commit, taking turns."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["git", "clone", "--quiet", ROOT, folder], check=True)
        subprocess.run(["git", "-C", folder, "checkout", "--quiet", ref], check=True)
        trees = {ref: Path(folder, "tests"), "here": Path(__file__).parent}
        for K in classes:
            for what in (f"measure({K}, False)", f"measure_evaluation({K})"):
                found = {name: [] for name in trees}
                for _ in range(turns):
                    for name, tree in trees.items():
                        found[name].append(alone(what, tree))
                tell(what, found)
            for what in (f"measure_compiled({K})", f"measure_evaluation({K}, True)"):
                tell(f"--compile, {what}", {"here": [alone(what)]})


def tell(what, found):
    """Print measurements {where: [result]}."""
    for name, results in found.items():
        seconds = ", ".join(f"{result['seconds']:.2f}" for result in results)
        peak = max(result["peak_rss_gb"] for result in results)
        print(f"{what} {name}: {seconds} s, peak {peak:.2f} GB", flush=True)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--classes", type=int, nargs="+", default=[20, 171, 847])
    add("--json", action="store_true", help="print one JSON object and nothing else")
    add("--flops", action="store_true", help="count, but don't measure")
    add("--recompute-head", action="store_true", help="with train.py's flag of this name")
    add("--loader", action="store_true", help="measure the data pipeline instead")
    add("--against", metavar="REF", help="a commit to compare this tree with, by its own bench.py")
    args = parser.parse_args()
    if args.against:
        return compare(args.against, args.classes)
    if args.loader:
        return print(json.dumps(measure_loader()))
    results = {}
    for K in args.classes:
        flops = count_flops(K, recompute=args.recompute_head)
        plain = sum(count_flops(K, distill=False, recompute=args.recompute_head).values())
        results[str(K)] = result = {"flops": flops, "surcharge": sum(flops.values()) / plain - 1}
        if not args.flops:
            result |= alone(f"measure({K}, {args.recompute_head})")
            result["evaluation"] = alone(f"measure_evaluation({K})")
        if not args.json:
            describe(K, result)
    if args.json:
        print(json.dumps(results))


def describe(K, result):
    """Print what was counted and measured for K classes."""
    total = sum(result["flops"].values())
    print(
        f"\nK = {K}: a step is {total / 1e12:.2f} TFLOP, {100 * result['surcharge']:.1f} % more "
        "than without distillation"
    )
    for part, n in result["flops"].items():
        seconds = f" {result['parts'][part]:8.2f} s" if "parts" in result else ""
        print(f"  {part:14} {n / 1e12:6.3f} TFLOP{seconds}")
    if "seconds" in result:
        for name, measured in (("step", result), ("evaluation", result["evaluation"])):
            peak = measured["peak_rss_gb"]
            print(f"  {name:14} {measured['seconds']:8.2f} s, peak {peak:.1f} GB")


if __name__ == "__main__":
    main()
