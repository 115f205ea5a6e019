"""What only a GPU can show, by hand: one command, whose last lines are a table to send back.

    python tests/gpu.py              every check, then time, memory, waits and launches of a step
    python tests/gpu.py resume nccl  rows with one of these words in their names
    python tests/gpu.py --cpu        what makes sense on a CPU, with the tiny model
"""
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch
from PIL import Image
from torch.profiler import profile

import bench  # puts the project on the path
import evaluate
import train

ROOT = Path(__file__).parents[1]
FAST = "--pretrained none --tpa-steps 2 --eval-every 0 --steps 4 --precision fp32"
WORK = tempfile.TemporaryDirectory()
CPU = torch.device("cpu")
DEVICE = CPU if "--cpu" in sys.argv or not torch.cuda.is_available() else torch.device("cuda")


def setup(device, precision, clip="tiny", size=64, K=20, batch=1):
    """What a training step needs, on a device."""
    args = train.parse(["--clip", clip, "--precision", precision])
    names = [f"thing number {i}" for i in range(K)]
    return args, *bench.setup(device, names, clip, size, args.channels, batch)


def step_and_map(device, precision, K):
    """Losses and gradient of a training step and the label map of an evaluation, on the CPU."""
    args, model, momentum, images, labels, tokens = setup(device, precision, K=K)
    loss, figures = train.step_losses(model, momentum, images, labels, tokens, args)
    loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    losses = torch.stack([figures[name].detach() for name in figures if name.endswith("_loss")])
    picture = Image.linear_gradient("L").resize((100, 75)).convert("RGB")
    with train.autocast(device, precision), torch.inference_mode():
        prediction = evaluate.label_map(model.eval(), picture, model.encode_text(tokens))
    return losses.cpu(), gradient.cpu(), prediction.cpu()


def compare(device, precision, K=20, limit=1e-3):
    """A step on DEVICE in a precision against float32 on a device. Returns the errors as text."""
    one, other = step_and_map(device, "fp32", K), step_and_map(DEVICE, precision, K)
    of_losses, of_gradient = [((a - b).norm() / a.norm()).item() for a, b in zip(one[:2], other)]
    pixels = (one[2] != other[2]).double().mean().item()
    said = (f"{precision}: losses differ by {of_losses:.1e}, gradients by {of_gradient:.1e}, "
            f"{pixels:.1%} of the label map")
    assert of_losses < limit, said  # gradients and ties of a random model are fragile in bf16
    assert precision != "fp32" or of_gradient < limit and pixels < limit, said
    return said


def run(name, flags="", processes=1, stop=False):
    """Train on the toy world, or run what flags say, without TF32; stop: ask it to after a step.
    Returns the losses of its steps."""
    out = Path(WORK.name, name)
    command = flags if ".py" in flags else f"train.py --out {out} {FAST} {flags}"
    launcher = f"-m torch.distributed.run --standalone --nproc_per_node={processes} "
    words = (launcher * (processes > 1) + command).split()
    environment = {**os.environ, "NVIDIA_TF32_OVERRIDE": "0"}
    out.mkdir(exist_ok=True)
    log = out / "log.jsonl"
    log.touch()
    with open(out / "said.txt", "w+") as said:
        child = subprocess.Popen([sys.executable, *words], stdout=said, stderr=said, cwd=ROOT,
                                 env=environment)
        while stop and child.poll() is None and "total_loss" not in log.read_text():
            time.sleep(0.05)
        if stop:
            child.terminate()
        status = child.wait()
        said.seek(0)
        assert stop or not status, f"{command}: {said.read()[-400:]}"
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    return torch.tensor([line["total_loss"] for line in lines if "total_loss" in line])


def assert_near(a, b):
    torch.testing.assert_close(a, b, rtol=1e-2, atol=0)  # CUDA's upsampling adds in any order


def resume(processes=1):
    name = f"parts-{processes}"
    whole = run(f"whole-{processes}", "--steps 80", processes)
    stopped = run(name, "--steps 80", processes, stop=True)
    assert 0 < len(stopped) < len(whole), "it did not stop in the middle"
    assert_near(whole, run(name, "--steps 80", processes))


def nccl_and_sigterm():
    if torch.cuda.device_count() < 2:
        return "not tried: fewer than two GPUs"
    one = run("one")
    for name, flags in (("two", ""), ("two-compiled", "--compile")):
        assert_near(one, run(name, flags, 2))
    run("map", f"evaluate.py --checkpoint {WORK.name}/one/last.pt", 2)
    resume(2)


def cost(clip, size, batch, precision):
    """What a training step takes, with clipping and both waits, without a loader."""
    args, model, momentum, *inputs = setup(DEVICE, precision, clip, size, 171, batch)
    optimiser = train.build_optimiser(model, args)
    scaler = torch.amp.GradScaler(DEVICE.type, enabled=False)
    trained = [p for p in model.parameters() if p.requires_grad]

    def step():
        loss, figures = train.step_losses(model, momentum, *inputs, args)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, args.clip_grad).item()
        train.refuse_non_finite(figures, norm, scaler, "a step of tests/gpu.py")
        optimiser.step()
        optimiser.zero_grad()
        momentum.update()

    step()
    begin = time.perf_counter()
    for _ in range(5):
        step()
    took = f"{(time.perf_counter() - begin) * 200:.0f} ms"
    torch.cuda.reset_peak_memory_stats()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        step()
        torch.cuda.set_sync_debug_mode("default")
    waits = sum("called a sync" in str(warning.message) for warning in said)
    with profile() as events:
        step()
    launches = sum(event.count for event in events.key_averages() if "LaunchKernel" in event.key)
    peak = torch.cuda.max_memory_allocated() / 1e9
    return f"{took}, peak {peak:.1f} GB, {waits} waits, {launches} launches"


def main():
    words = [word for word in sys.argv[1:] if word != "--cpu"] or [""]
    if DEVICE == CPU and "--cpu" not in sys.argv:
        sys.exit("there is no GPU here; --cpu tries this script without one")
    torch.backends.cudnn.allow_tf32 = False
    checks = [("float32 equals the CPU's", compare, CPU, "fp32"),
              ("300 classes", compare, CPU, "fp32", 300, 1e-2),  # the 256th may be another
              ("bf16", compare, DEVICE, "bf16", 20, 0.1)]
    if DEVICE != CPU:
        B, L = "ViT-B-16-quickgelu", "ViT-L-14-336-quickgelu"
        checks += [("fp16", compare, DEVICE, "fp16", 20, 0.1), ("resume", resume),
                   ("nccl sigterm", nccl_and_sigterm),
                   ("compiled", lambda: assert_near(run("eager"), run("compiled", "--compile"))),
                   ("a step, float32", cost, B, 384, 1, "fp32"),
                   ("a step", cost, B, 384, 1, "bf16"),
                   ("a step, batch 4", cost, B, 384, 4, "bf16"),
                   ("a step, ViT-L", cost, L, 384, 1, "bf16")]
    rows = [[torch.cuda.get_device_name() if DEVICE != CPU else "CPU", torch.__version__]]
    for name, check, *arguments in checks:
        if any(word in name for word in words):
            print(f"{name} ...", flush=True)
            try:
                said = check(*arguments) or "passed"
            except Exception as e:
                said = f"failed: {type(e).__name__}: {' '.join(str(e).split())[-300:]}"
            rows.append([name, said])
    print(f"\n{evaluate.format_table(rows)}")
    sys.exit(any(result.startswith("failed") for _, result in rows))


if __name__ == "__main__":
    main()
