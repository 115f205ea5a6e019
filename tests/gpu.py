"""What only a GPU can show, by hand: one command, which says at its end what passed.

    python tests/gpu.py              every check, then the table of speed and memory
    python tests/gpu.py resume nccl  checks with one of these words in their name
    python tests/gpu.py --cpu        the same checks on a CPU, with the tiny model: tries the script

Checks: a run in each precision; where there are two GPUs, two processes against one, also with
--compile; a run that is stopped and goes on; --compile against none; how often a step waits for
the GPU (at most twice). Runs are equal when their losses are, to a thousandth. The table: images a
second and peak memory of training ViT-B/16 and ViT-L/14@336 at 384, 171 classes, with and without
distillation; seconds to evaluate a picture in five views with 150 and 847 classes; what the loader
delivers beside it.
"""

import argparse
import json
import os
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
    """Train in a process of its own, without TF32. Returns (the losses of its steps, output)."""
    environment = {**os.environ, "NVIDIA_TF32_OVERRIDE": "0"}
    words = command(out, flags, processes)
    done = subprocess.run(words, capture_output=True, text=True, env=environment)
    errors = [line for line in done.stderr.splitlines() if "rror" in line]
    assert not done.returncode, f"{' '.join(words)}: {errors[-1:] or done.stderr[-300:]}"
    lines = runs.read_log(out / "log.jsonl")
    return [line["total_loss"] for line in lines if "total_loss" in line], done.stdout


def assert_near(a, b):
    """Losses of two runs differ by rounding only: GPUs sum in no fixed order."""
    np.testing.assert_allclose(a, b, rtol=1e-3)


def precision(folder):
    for kind in ("fp32", "bf16", "fp16"):
        losses, _ = run(folder / kind, f"--steps 4 --precision {kind}")
        assert len(losses) == 4 and np.isfinite(losses).all(), losses


def nccl(folder):
    if torch.cuda.device_count() == 1:
        return "not tried: one GPU"
    one, _ = run(folder / "alone", "--steps 3 --precision fp32")
    for more in ("", " --compile --recompute-head"):
        two, _ = run(folder / f"two{more}", f"--steps 3 --precision fp32{more}", processes=2)
        assert_near(one, two)


def resume(folder):
    """Asked to stop in the middle, and the same command again."""
    flags = "--steps 40 --precision fp32"
    whole, _ = run(folder / "whole", flags)
    words = command(folder / "parts", flags)
    child = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while child.poll() is None and len(runs.read_log(folder / "parts/log.jsonl")) < 4:
        time.sleep(0.05)
    child.terminate()
    assert child.wait() == 130, f"exit status {child.returncode}"
    parts, said = run(folder / "parts", flags)
    assert "going on from" in said, said
    assert_near(whole, parts)


def compiled(folder):
    flags = "--steps 3 --precision fp32 --accumulate 2"
    eager, _ = run(folder / "eager", flags)
    for more in ("", " --recompute-head"):
        losses, _ = run(folder / f"compiled{more}", f"{flags} --compile{more}")
        assert_near(eager, losses)


def waits(folder):
    """Synchronisations of a step, by PyTorch's own warnings."""
    if not torch.cuda.is_available():
        return "not tried: no GPU"
    found, anyone = [], runs.anyone

    def count(asks):  # called once a step
        found.append(len(caught))
        return anyone(asks)

    args = train.parse(["--out", str(folder / "waits"), "--steps", "9", *FAST.split()])
    args.log_every = args.save_every = 0
    runs.anyone = count
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            train.train(args)
    finally:
        torch.cuda.set_sync_debug_mode("default")
        runs.anyone = anyone
    steps = np.diff(found)[1:-1]  # the last one logs, which waits too
    where = sorted({f"{w.filename}:{w.lineno}" for w in caught[found[1] : found[-2]]})
    assert steps.max() <= 2, f"{steps.max()} a step, at {', '.join(where)}"


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
        del model
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
    if args.cpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif not torch.cuda.is_available():
        sys.exit("there is no GPU here; --cpu tries this script without one")
    device = torch.device("cpu" if args.cpu else "cuda")
    if device.type == "cuda":
        print(json.dumps({"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}))
    checks = [precision, nccl, resume, compiled, waits]
    if args.words:
        checks = [check for check in checks if any(word in check.__name__ for word in args.words)]
    outcome = {}
    for check in checks:
        print(f"{check.__name__} ...", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            try:
                outcome[check.__name__] = check(Path(folder)) or "passed"
            except Exception as e:
                outcome[check.__name__] = f"FAILED: {e}"
    if not args.words:
        table(device, args.cpu)
    print(*(f"{name}: {result}" for name, result in outcome.items()), sep="\n")
    failed = any(result.startswith("FAILED") for result in outcome.values())
    sys.exit(failed or not outcome)


if __name__ == "__main__":
    main()
