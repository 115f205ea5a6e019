"""What only a GPU can show, by hand: one command, which says at its end what passed.

    python tests/gpu.py              every check, then the table of speed and memory
    python tests/gpu.py resume nccl  checks with one of these words in their name
    python tests/gpu.py --cpu        the same checks on a CPU, with the tiny model: tries this script

Checks: a run in each precision; one process under torchrun and, where there are two GPUs, two
against one; a run that is stopped and goes on; --compile against none; how often a step waits for
the GPU (at most twice). The table: images a second and peak memory of training ViT-B/16 and
ViT-L/14@336 at 384, 171 classes, with and without distillation; seconds to evaluate a picture in
five views with 150 and 847 classes; what the loader delivers beside it.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402

import data  # noqa: E402
import evaluate  # noqa: E402
import train  # noqa: E402
from bench import names, write_photos  # noqa: E402
from ema import MomentumEncoder  # noqa: E402
from model import build  # noqa: E402
from sources.registry import open_dataset  # noqa: E402
from support import runs  # noqa: E402

FAST = "--pretrained none --tpa-steps 2 --channels 16 --eval-every 0 --log-every 1"


def command(out, flags, processes=0):
    """Training on the toy world, alone or under torchrun."""
    start = [sys.executable]
    if processes:
        start += ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--standalone"]
    return [*start, str(ROOT / "train.py"), "--out", str(out), *FAST.split(), *flags.split()]


def run(out, flags, processes=0):
    """Train in a process of its own. Returns the weights."""
    done = subprocess.run(command(out, flags, processes), capture_output=True, text=True)
    if done.returncode:
        raise AssertionError(done.stderr.strip().splitlines()[-1])
    return torch.load(out / "last.pt", map_location="cpu", weights_only=True)["model"]


def assert_near(a, b, tolerance):
    """Weights of two runs differ by rounding only: GPUs sum in no fixed order."""
    for name in a:
        worst = (a[name].float() - b[name].float()).abs().max().item()
        assert worst <= tolerance, f"{name} differs by {worst:.1e}"


def precision(folder):
    for kind in ("fp32", "bf16", "fp16"):
        run(folder / kind, f"--steps 4 --precision {kind}")
        lines = runs.read_log(folder / kind / "log.jsonl")
        losses = [line["total_loss"] for line in lines if "total_loss" in line]
        assert len(losses) == 4 and np.isfinite(losses).all(), losses


def nccl(folder):
    one = run(folder / "alone", "--steps 3 --precision fp32")
    count = min(2, torch.cuda.device_count())
    for n in range(1, max(1, count) + 1):
        assert_near(one, run(folder / f"nccl-{n}", "--steps 3 --precision fp32", n), 1e-4)


def resume(folder):
    """Asked to stop in the middle, and the same command again."""
    flags = "--steps 40 --precision fp32"
    whole = run(folder / "whole", flags)
    child = subprocess.Popen(command(folder / "parts", flags), stderr=subprocess.DEVNULL)
    while child.poll() is None and len(runs.read_log(folder / "parts/log.jsonl")) < 4:
        time.sleep(0.05)
    child.terminate()
    assert child.wait() == 130, child.returncode
    assert_near(whole, run(folder / "parts", flags), 1e-4)


def compiled(folder):
    flags = "--steps 3 --precision fp32 --accumulate 2"
    eager = run(folder / "eager", flags)
    assert_near(eager, run(folder / "compiled", f"{flags} --compile"), 1e-4)
    assert_near(eager, run(folder / "both", f"{flags} --compile --recompute-head"), 1e-4)


def waits(folder):
    """Synchronisations of a step, by PyTorch's own warnings."""
    if not torch.cuda.is_available():
        return
    found, anyone = [], runs.anyone

    def count(asks):  # called once a step
        found.append(len(caught))
        return anyone(asks)

    runs.anyone = count
    args = train.parse(["--out", str(folder / "waits"), "--steps", "9", *FAST.split()])
    args.log_every = args.save_every = 0
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        train.train(args)
        torch.cuda.set_sync_debug_mode("default")
    runs.anyone = anyone
    steps = np.diff(found)[1:]
    assert steps.max() <= 2, f"{steps.max()} a step, such as {caught[found[2]].message}"


def measure(clip, batch, K, distill, device, steps):
    """(Images a second, peak memory in GB) of training steps without a loader."""
    flags = ["--dataset", "coco-stuff", "--clip", clip, "--batch-size", str(batch)]
    args = train.parse([*flags, "--distill", "rpmd" if distill else "none"])
    model = build(clip, args.image_size, args.channels).train().to(device)
    optimiser = train.build_optimiser(model, args)
    tokens = model.tokenize(names(K))
    momentum = MomentumEncoder(model.image_encoder, args.alpha) if distill else None
    losses_of = train.step_losses if distill else train.rival_losses
    images = torch.randn(batch, 3, args.image_size, args.image_size, device=device)
    pixel_labels = torch.randint(0, K, (batch, 8, 8), device=device)
    for axis in (1, 2):
        pixel_labels = pixel_labels.repeat_interleave(args.image_size // 8, axis)
    for step in range(steps + 2):
        if step == 2:
            wait(device)
            begin = time.perf_counter()
        loss, _ = losses_of(model, momentum, images, pixel_labels, tokens, args)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        if momentum:
            momentum.update()
    wait(device)
    return batch * steps / (time.perf_counter() - begin), runs.peak_memory(device)


def wait(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def table(device, cpu):
    """Speed and memory, a line each; what does not fit in memory is said so."""
    clips = ["tiny"] if cpu else ["ViT-B-16-quickgelu", "ViT-L-14-336-quickgelu"]
    for clip in clips:
        for batch in (1, 2) if cpu else (1, 2, 4):
            for distill in (False, True):
                what = f"{clip}, batch {batch}, {'RPMD' if distill else 'plain'}"
                if not cpu:
                    torch.cuda.reset_peak_memory_stats()
                try:
                    speed, peak = measure(clip, batch, 171, distill, device, 2 if cpu else 10)
                    print(f"{what}: {speed:.2f} images a second, {peak:.1f} GB", flush=True)
                except torch.OutOfMemoryError:
                    print(f"{what}: out of memory", flush=True)
        model = build(clip, 64 if cpu else 384).eval().to(device)
        for K in (150, 847):
            with torch.inference_mode():
                text = model.encode_text(model.tokenize(names(K)))
            image = Image.effect_noise((500, 375), 60).convert("RGB")
            for _ in range(2):
                begin = time.perf_counter()
                evaluate.label_map(model, image, text)
                wait(device)
                seconds = time.perf_counter() - begin
            print(f"{clip}, evaluation, {K} classes: {seconds:.2f} s a picture", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        write_photos(folder, np.random.default_rng(0))
        crops = data.TrainingCrops(open_dataset(f"folder:{folder}", None, "train"), 384, 0)
        begin = time.perf_counter()
        for _ in data.batches(crops, 4, 0, 24, workers=4):
            pass
        print(f"loader, 4 workers: {96 / (time.perf_counter() - begin):.0f} crops a second")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("words", nargs="*", help="only checks with one of these in their name")
    parser.add_argument("--cpu", action="store_true", help="try this script without a GPU")
    args = parser.parse_args()
    if not args.cpu and not torch.cuda.is_available():
        sys.exit("there is no GPU here; --cpu tries this script without one")
    device = torch.device("cpu" if args.cpu else "cuda")
    if device.type == "cuda":
        print(json.dumps({"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}))
    outcome = {}
    for check in (precision, nccl, resume, compiled, waits):
        name = check.__name__
        if args.words and not any(word in name for word in args.words):
            continue
        print(f"{name} ...", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            try:
                check(Path(folder))
                outcome[name] = "passed"
            except AssertionError as e:
                outcome[name] = f"FAILED: {e}"
    if not args.words:
        table(device, args.cpu)
    print(*(f"{name}: {result}" for name, result in outcome.items()), sep="\n")
    sys.exit(any(result != "passed" for result in outcome.values()))


if __name__ == "__main__":
    main()
