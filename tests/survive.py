"""What training and reading survive: kills, broken files, long runs. By hand, a line of figures:

    python tests/survive.py kill --times 20      killed runs end bit for bit like one left alone
    python tests/survive.py signals --times 40   Ctrl-C, SIGTERM, SIGHUP at any moment: likewise
    python tests/survive.py twice --times 20     several runs into one folder: one of them wins
    python tests/survive.py fuzz --count 2000    broken files give a result or one sentence
    python tests/survive.py memory --steps 2000  memory and open files over a long run

`fuzz --seed S --first I --count 1` repeats the item I that a failure names. Exit status 1 on a
failure.
"""

import argparse
import collections
import contextlib
import copy
import io
import json
import os
import pickle
import re
import resource
import select
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import model  # noqa: E402
import train  # noqa: E402
from sources.registry import open_dataset, read_names  # noqa: E402
from support import checkpoints, runs, weights  # noqa: E402
from support.errors import UserError  # noqa: E402

TOY_SIZED = [
    "--clip",
    "tiny",
    "--pretrained",
    "none",
    "--batch-size",
    "4",
    "--channels",
    "16",
    "--tpa-steps",
    "2",
]


def pictures(root, train=6, val=3):
    """A dataset of one's own with 3 classes, and images of 80 x 60."""
    rng = np.random.default_rng(0)
    for split, n in (("train", train), ("val", val)):
        for kind in ("images", "masks"):
            (root / kind / split).mkdir(parents=True)
        for i in range(n):
            mask = np.repeat(np.repeat(rng.integers(0, 3, (6, 8), dtype=np.uint8), 10, 0), 10, 1)
            image = np.array([(200, 40, 40), (40, 200, 40), (40, 40, 200)], np.uint8)[mask]
            mask[0, 0] = 255
            image += rng.integers(0, 30, image.shape, np.uint8)
            Image.fromarray(image).save(root / "images" / split / f"{i}.jpg")
            Image.fromarray(mask).save(root / "masks" / split / f"{i}.png")
    (root / "classes.txt").write_text("red thing\ngreen thing\nblue thing")
    return root


def command(folder, out, *flags):
    return [
        sys.executable,
        "train.py",
        "--dataset",
        f"folder:{folder}",
        "--out",
        out,
        *TOY_SIZED,
        *flags,
    ]


def start(command, words):
    """The command in a process group of its own; what it prints goes to the file `words`."""
    env = dict(os.environ, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
    with words.open("w") as file:
        return subprocess.Popen(
            list(map(str, command)),
            cwd=ROOT,
            env=env,
            stdout=file,
            stderr=file,
            start_new_session=True,
        )


# Kills


def killed(process, out, moment, rng, longest):
    """SIGKILL for a process and its children: after up to `longest` seconds, or while or just
    after the n-th checkpoint from now on is written. Returns what that hit, None if the process
    ended before."""
    last = out / "last.pt"

    def writing():
        return any(out.glob("last.*.tmp"))

    waiting = lambda condition: condition() and process.poll() is None and not time.sleep(0.0005)
    if moment == "any":
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(rng.uniform(0, longest))
    else:
        for _ in range(rng.integers(1, 6)):
            while waiting(writing):
                pass
            while waiting(lambda: not writing()):
                pass
        while moment == "written" and waiting(writing):
            pass
        time.sleep(rng.uniform(0, {"writing": 0.04, "written": 0.002}[moment]))
    if process.poll() is not None:
        return None
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return (
        "while writing"
        if writing()
        else "in between"
        if last.exists()
        else "before the first checkpoint"
    )


def leaves(x, name=""):
    """Nested dicts and lists -> (name, leaf), ..."""
    if isinstance(x, (dict, list, tuple)):
        for key, value in x.items() if isinstance(x, dict) else enumerate(x):
            yield from leaves(value, f"{name}/{key}")
    else:
        yield name, x


def differences(a, b):
    """The names of all that differs between two runs' output folders, but for times, memory and
    the folders' names."""

    def content(folder):
        found = dict(leaves(torch.load(folder / "last.pt", weights_only=True), "last.pt"))
        results = json.loads((folder / "results.json").read_text())
        found |= dict(leaves(results, "results.json")) | dict(
            leaves(runs.read_log(folder / "log.jsonl"), "log.jsonl")
        )
        found["files"] = sorted(p.name for p in folder.glob("*.*") if p.name != ".lock")
        return {
            k: v for k, v in found.items() if not k.endswith(("args/out", "/seconds", "/memory_gb"))
        }

    x, y = content(a), content(b)
    equal = lambda p, q: (
        torch.equal(p, q) and p.dtype == q.dtype if isinstance(p, torch.Tensor) else p == q
    )
    return sorted(
        k
        for k in x | y
        if k not in x or k not in y or type(x[k]) is not type(y[k]) or not equal(x[k], y[k])
    )


def kill(times=20, seed=0, steps=30, every=5, moments=("any", "writing", "written", "writing")):
    """Kills a run again and again. Returns (kills by what they hit, runs that ended, what was
    wrong)."""
    rng, hits, wrong, ended = np.random.default_rng(seed), collections.Counter(), [], 0
    with tempfile.TemporaryDirectory() as root:
        root = Path(root)
        folder, whole = pictures(root / "data"), root / "whole"
        flags = ["--log-every", "1", "--eval-every", every, "--save-every", "1", "--steps", steps]
        begin = time.time()
        process = start(command(folder, whole, *flags), root / "words")
        if process.wait():
            raise SystemExit((root / "words").read_text())
        longest = time.time() - begin
        while True:
            out = root / f"killed-{ended}"
            process = start(command(folder, out, *flags), root / "words")
            moment = moments[sum(hits.values()) % len(moments)]
            hit = killed(process, out, moment, rng, longest) if sum(hits.values()) < times else None
            if hit:
                hits[hit] += 1
                if (out / "last.pt").exists():
                    try:
                        weights.read_checkpoint(out / "last.pt")
                    except UserError as e:
                        wrong.append(f"after kill {sum(hits.values())}: {e}")
                continue
            if process.wait():
                wrong.append((root / "words").read_text()[-2000:])
            else:
                wrong += [f"run {ended + 1}: {name} differs" for name in differences(whole, out)]
            ended += 1
            if sum(hits.values()) >= times or process.returncode:
                return hits, ended, wrong


# Signals, and several runs in one folder


def uninterrupted(root, *flags):
    """(folder of pictures, folder of a run that was left alone, its seconds)."""
    folder, whole = pictures(root / "data"), root / "whole"
    begin = time.time()
    if start(command(folder, whole, *flags), root / "words").wait():
        raise SystemExit((root / "words").read_text())
    return folder, whole, time.time() - begin


KINDS = {
    "SIGINT": [signal.SIGINT],
    "SIGTERM": [signal.SIGTERM],
    "SIGHUP": [signal.SIGHUP],
    "SIGINT twice": [signal.SIGINT, signal.SIGINT],
}


def signals(times=40, seed=0, steps=30, processes=(1, 2)):
    """Signals at random moments from the first import to the last line, to a run alone and to one
    under torchrun. Returns ({(kind, exit status): number}, what was wrong)."""
    rng, ends, wrong = np.random.default_rng(seed), collections.Counter(), []
    flags = ["--log-every", "1", "--eval-every", "5", "--save-every", "1", "--steps", steps]
    with tempfile.TemporaryDirectory() as root:
        root = Path(root)
        folder, whole, longest = uninterrupted(root, *flags)
        for i in range(times):
            out, words = root / f"run-{i}", root / "words"
            kind = list(KINDS)[i % len(KINDS)]
            n = processes[i // len(KINDS) % len(processes)]
            line = command(folder, out, *flags)
            if n > 1:
                line[1:1] = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}"]
            process = start(line, words)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(rng.uniform(0.02, n * longest))
            for number in KINDS[kind]:
                if process.poll() is None:
                    (os.kill if n > 1 else os.killpg)(process.pid, number)
                    time.sleep(rng.uniform(0, 0.2))
            try:
                status = process.wait(120)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                status = "hangs"
            said = words.read_text()
            name = kind if n == 1 else f"{kind}, {n} processes"
            ends[name, status] += 1
            ours = said.split("torch/distributed")[0]  # torchrun's own traceback is torchrun's
            # before Python has begun and after it has ended, the signal itself ends the process
            known = status in (0, 130) or status in [-number for number in KINDS[kind]]
            if status == "hangs" or n == 1 and not known or 'train.py", line' in ours:
                wrong.append(f"{name}, item {i}: exit status {status}: {said[-600:]}")
            again = start(command(folder, out, *flags), words)
            if again.wait():
                wrong.append(f"{name}, item {i}, continued: {words.read_text()[-600:]}")
            elif n == 1:  # two processes add up in another order
                wrong += [f"{name}, item {i}: {d} differs" for d in differences(whole, out)]
    return ends, wrong


def twice(times=20, seed=0, steps=8):
    """Two or four runs into one folder at once. Returns (how many were refused, what was wrong)."""
    rng, refused, wrong = np.random.default_rng(seed), 0, []
    flags = ["--log-every", "1", "--eval-every", "5", "--save-every", "1", "--steps", steps]
    with tempfile.TemporaryDirectory() as root:
        root = Path(root)
        folder, whole, _ = uninterrupted(root, *flags)
        for i in range(times):
            out = root / f"run-{i}"
            runs_at_once = []
            for k in range((2, 4)[i % 2]):
                words = root / f"words-{k}"
                runs_at_once.append((start(command(folder, out, *flags), words), words))
                time.sleep(rng.uniform(0, 0.3))
            won = 0
            for process, words in runs_at_once:
                status, said = process.wait(), words.read_text().strip().splitlines()[-1]
                won += status == 0
                if status:
                    refused += 1
                    if not re.search("is in use by process \\d+ on ", said):
                        wrong.append(f"item {i}: exit status {status}: {said}")
            if won != 1:
                wrong.append(f"item {i}: {won} of {len(runs_at_once)} runs ended well")
            wrong += [f"item {i}: {name} differs" for name in differences(whole, out)]
    return refused, wrong


# Broken files

PLAIN = (
    None,
    0,
    -1,
    10**12,
    1.5,
    float("nan"),
    True,
    "",
    "x",
    "two\nlines",
    "ö" * 5000,
    "../../x",
    [],
    {},
    [1, 2],
    {"a": 1},
)
BREAKS = (
    "bits",
    "cut",
    "zeros",
    "noise",
    "all noise",
    "empty",
    "swapped",
    "spliced",
    "huge",
    "inserted",
    "removed",
)
HUGE = (
    b"\xff\xff\xff\xff",
    b"\x7f\xff\xff\xff",
    b"\xff\xff\xff\x7f",
    b"\0\0\xff\xff",
    b"\0\x10\0\0",
)
SIDES = (
    (30_000, 30_000),
    (13_000, 13_000),
    (2**31 - 1, 1),
    (1, 2**31 - 1),
    (0, 0),
    (65_535, 65_535),
    (100_000, 1),
)
RUNS = (
    [0, 10**9],
    [2**32 - 1] * 9,
    [0, -5, 10],
    [],
    [5] * 10**5,
    "o" * 10**5,
    "\x7f~~~0",
    "",
    "ö",
    [10, 10],
    [1e300],
    ["x"],
    [[0]],
)
CONFIGS = {
    "clip": ("ViT-B-32", "RN50", "no-such", 7, None, "tiny\nx", "coca_ViT-B-32"),
    "channels": (0, -1, 7, 10**5, 10**9, 1.5, "16", None),
    "image_size": (0, -8, 63, 65, 8, 10**4, 10**9, 64.0, "64", None),
    "pretrained": ("/nowhere/weights.pt", "openai", 7),
    "other": (1,),
}


def replaced(rng, content, values):
    """A copy of nested containers in which one random node is another value, missing or doubled
    under another key."""
    content = copy.deepcopy(content)
    node, key = content, None
    while True:
        keys = list(node) if isinstance(node, dict) else range(len(node))
        key = keys[rng.integers(len(keys))]
        if not isinstance(node[key], (dict, list)) or not node[key] or rng.random() < 0.3:
            break
        node = node[key]
    how = rng.integers(5)
    if how == 0:
        del node[key]
    elif how == 1 and isinstance(node, dict):
        node[(7, "new\nkey", "k" * 5000)[rng.integers(3)]] = node.pop(key)
    else:
        node[key] = values(node[key])
    return content


def broken(rng, content, pool):
    """Bytes -> (what was done to them, other bytes)."""
    content, n = bytearray(content), len(content)
    near = lambda: int(rng.integers(min(n, 512) if rng.random() < 0.5 else n)) if n else 0
    at, size = near(), int(2 ** rng.uniform(0, 10))
    other = pool[rng.integers(len(pool))]
    how = BREAKS[rng.integers(len(BREAKS))]
    if how == "bits":
        for _ in range(rng.integers(1, 30)):
            content[near()] ^= 1 << rng.integers(8)
    elif how == "cut":
        del content[at:]
    elif how == "zeros":
        content[at : at + size] = bytes(len(content[at : at + size]))
    elif how == "noise":
        content[at : at + size] = rng.bytes(len(content[at : at + size]))
    elif how in ("all noise", "empty"):
        content = rng.bytes(size) if how == "all noise" else b""
    elif how == "swapped":
        content = other
    elif how == "spliced":
        content = other[:at] + content[at:]
    elif how == "huge":
        content[at // 4 * 4 : at // 4 * 4 + 4] = HUGE[rng.integers(len(HUGE))]
    elif how == "inserted":
        content[at:at] = rng.bytes(size)
    else:
        del content[at : at + size]
    return how, bytes(content)


def declared(png, width, height):
    """A png that says it has other sides."""
    return png[:8] + chunk(b"IHDR", struct.pack(">II", width, height) + png[24:29]) + png[33:]


def chunk(name, content):
    """A chunk of a png."""
    return (
        struct.pack(">I", len(content))
        + name
        + content
        + struct.pack(">I", zlib.crc32(name + content))
    )


def broken_picture(rng, content, pool):
    """As `broken`, sometimes with knowledge of the format: other sides in the header, a text that
    unpacks to 100 MB."""
    width, height = SIDES[rng.integers(len(SIDES))]
    if content[:4] == b"\x89PNG" and rng.random() < 0.4:
        if rng.random() < 0.3:
            return "bomb", content[:33] + chunk(
                b"zTXt", b"comment\0\0" + zlib.compress(bytes(10**8))
            ) + content[33:]
        return "sides", declared(content, width, height)
    frame = content.find(b"\xff\xc0")
    if content[:2] == b"\xff\xd8" and frame > 0 and rng.random() < 0.3:
        return "sides", content[: frame + 5] + struct.pack(
            ">HH", height % 65536, width % 65536
        ) + content[frame + 9 :]
    return broken(rng, content, pool)


def broken_json(rng, content, pool):
    found = json.loads(content)
    how = rng.integers(5)
    if how == 0:
        return broken(rng, content, pool)
    if how == 1:
        sizes = [
            (30_000, 30_000),
            (10**6, 10**6),
            (0, 0),
            (-5, 7),
            (2**31, 2),
            (60.0, 80),
            (1, 4800),
        ]
        size = sizes[rng.integers(len(sizes))]
        found["images"][0] |= dict(zip(("height", "width"), size))
        for mask in found["annos_segmentation"]:
            mask["segmentation"]["size"] = list(size)
        return "sides", json.dumps(found).encode()
    if how == 2:
        lengths = found["annos_segmentation"][rng.integers(2)]["segmentation"]
        lengths["counts"] = RUNS[rng.integers(len(RUNS))]
        return "runs", json.dumps(found).encode()
    return "structure", json.dumps(
        replaced(rng, found, lambda old: PLAIN[rng.integers(len(PLAIN))])
    ).encode()


def broken_text(rng, content, pool):
    how = rng.integers(6)
    lines = [
        b"x" * 10**5,
        b"name\x00name",
        b"\xff\xfe\xfa",
        "日本語 🙂".encode(),
        b"../../x",
        b"*",
        b"a\tb",
        b" ",
        b"\t",
        content.split(b"\n")[0],
    ]
    if how < 2:
        return broken(rng, content, pool)
    if how == 2:
        return "many lines", b"\n".join(b"%d" % i for i in range(10 ** int(rng.integers(1, 6))))
    if how == 3:
        return "large", b"a line\n" * 2_000_000
    parts = content.split(b"\n")
    parts[rng.integers(len(parts))] = lines[rng.integers(len(lines))]
    return "line", (b"\n", b"\r\n", b"\r")[rng.integers(3)].join(parts)


class Code:
    """Pickled, it runs code on loading."""

    def __init__(self, *reduced):
        self.reduced = reduced

    def __reduce__(self):
        return self.reduced


def saved(content, **options):
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


def broken_checkpoint(rng, content, pool, marker):
    """content: that of the file, and what was saved in it."""
    content, state = content
    how = ("bytes", "records", "structure", "structure", "structure", "config", "code")[
        rng.integers(7)
    ]
    if how == "bytes" or how == "records" and not zipfile.is_zipfile(io.BytesIO(content)):
        what, content = broken(rng, content, pool)
        return f"bytes, {what}", content
    if how == "records":
        ways = ("changed", "missing", "renamed", "doubled", "packed", "bomb", "large")
        file, done = io.BytesIO(), ways[rng.integers(len(ways))]
        with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(file, "w") as new:
            names = old.namelist()
            pickled = next(n for n in names if n.endswith("data.pkl"))
            chosen = names[rng.integers(len(names))] if rng.random() < 0.5 else pickled
            for name in names:
                record, packing = old.read(name), zipfile.ZIP_STORED
                if name == chosen:
                    if done == "missing":
                        continue
                    record = broken(rng, record, pool)[1] if done == "changed" else record
                    record = bytes(10**8) if done in ("bomb", "large") else record
                    packing = zipfile.ZIP_DEFLATED if done in ("packed", "bomb") else packing
                new.writestr(name + "x" * (done == "renamed" and name == chosen), record, packing)
                if done == "doubled" and name == chosen:
                    with warnings.catch_warnings():
                        warnings.simplefilter("ignore")
                        new.writestr(name, record[::-1])
        return f"records, {done}", file.getvalue()
    if how == "code":
        calls = [
            (os.system, (f"touch '{marker}'",)),
            (open, (str(marker), "w")),
            (exec, (f"open({str(marker)!r}, 'w')",)),
            (getattr, (Code(__import__, ("os",)), "mkdir")),
            (Path.touch, (marker,)),
        ]
        code = Code(*calls[rng.integers(len(calls))])
        content = [
            code,
            {**state, "model": code},
            {**state, "args": {"seed": code}},
            {**state, "step": code},
        ]
        content = content[rng.integers(4)]
        kinds = [
            lambda c: pickle.dumps(c),
            saved,
            lambda c: saved(c, _use_new_zipfile_serialization=False),
        ]
        return "code", kinds[rng.integers(3)](content)
    if how == "config":
        key = list(CONFIGS)[rng.integers(len(CONFIGS))]
        value = CONFIGS[key][rng.integers(len(CONFIGS[key]))]
        return f"config, {key} {value!r}", saved(
            {**state, "config": {**state["config"], key: value}}
        )

    def value(old):
        tensors = [
            torch.zeros(3),
            torch.tensor(1),
            torch.zeros(1).expand(10**9),
            torch.zeros(2, 2).to_sparse(),
            torch.zeros(0),
            torch.zeros(2, 2, dtype=torch.complex64),
        ]
        if isinstance(old, torch.Tensor):
            tensors += [
                old.long(),
                old * float("nan"),
                old.to(torch.complex64),
                old[None],
                old.half(),
                torch.empty_like(old, device="meta"),
                old.to_sparse(),
            ]
        values = (*PLAIN, *tensors)
        return (
            values[rng.integers(len(values))]
            if rng.random() < 0.5
            else tensors[rng.integers(len(tensors))]
        )

    keys = [
        k for k in state if k not in ("config", "names", "scaler")
    ]  # scaler: empty without fp16
    key = keys[rng.integers(len(keys))]
    if rng.random() < 0.2 or not isinstance(state[key], dict):
        others = {k: v for k, v in state.items() if k != key}
        return f"structure, {key}", saved(replaced(rng, {key: state[key]}, value) | others)
    return f"structure in {key}", saved({**state, key: replaced(rng, state[key], value)})


class Reached(Exception):
    """A checkpoint was read to its end."""


class Slow(BaseException):
    """Something took too long."""


def kinds(root, marker):
    """{kind: (file to break, its healthy contents, how to break it, what reads it, [paths that an
    error may name])}."""
    from pycocotools.mask import encode
    from scipy.io import savemat

    rng, found = np.random.default_rng(0), {}
    folder, good = pictures(root / "folder"), pictures(root / "good")

    def encoded(picture, **options):
        file = io.BytesIO()
        picture.save(file, **options)
        return file.getvalue()

    noise = Image.fromarray(rng.integers(0, 256, (60, 80, 3), np.uint8))
    tones = Image.fromarray(rng.integers(0, 65536, (60, 80), np.uint16))
    indices = Image.fromarray(rng.integers(0, 3, (60, 80), np.uint8))
    exif = Image.Exif()
    exif[274] = 6
    photos = [
        encoded(noise, format="jpeg"),
        encoded(noise, format="jpeg", progressive=True, exif=exif),
        encoded(noise.convert("CMYK"), format="jpeg"),
        encoded(noise, format="png"),
        encoded(noise.convert("RGBA"), format="png"),
        encoded(tones, format="png"),
        encoded(noise.quantize(), format="png", transparency=3),
        encoded(noise.convert("1"), format="png"),
        encoded(noise, format="webp"),
        encoded(noise, format="bmp"),
    ]
    others = [
        encoded(noise, format=f) for f in ("gif", "tiff", "eps", "ico", "ppm", "tga", "pdf", "icns")
    ]
    palette = indices.copy()
    palette.putpalette(bytes(range(256)) * 3)
    deep = Image.fromarray(np.asarray(indices).astype(np.uint16))
    masks = [encoded(i, format="png") for i in (indices, palette, deep)]
    masks += [
        encoded(indices, format="tiff"),
        encoded(indices, format="tiff", compression="tiff_lzw"),
    ]
    load = lambda name, root, split="train", where=None: (
        lambda: open_dataset(name, where or root, split).load(0)
    )
    found["image"] = (
        folder / "images/train/0.jpg",
        photos,
        broken_picture,
        load(f"folder:{folder}", folder),
    )
    found["mask"] = (
        folder / "masks/train/0.png",
        masks,
        broken_picture,
        load(f"folder:{folder}", folder),
    )
    names = (folder / "classes.txt").read_bytes()
    found["classes"] = (
        folder / "classes.txt",
        [names, b"1\tone\n2\ttwo\n3\tthree"],
        broken_text,
        load(f"folder:{folder}", folder),
    )
    found["names"] = (
        root / "names.txt",
        [names, b"1\tone\n2\ttwo"],
        broken_text,
        lambda: read_names(root / "names.txt"),
    )

    place = root / "ade/ADE20K_2021_17_01/images/ADE/validation/home/attic"
    place.mkdir(parents=True)
    noise.save(place / "ADE_val_00000001.jpg")
    ids = [
        int(line.split("\t")[0])
        for line in (ROOT / "sources/classes/ade20k-847.txt").read_text().splitlines()
    ]
    raw = rng.choice(ids, (60, 80))
    colours = Image.fromarray(np.stack([raw // 256 * 10, raw % 256, raw % 7], -1).astype(np.uint8))
    found["ade"] = (
        place / "ADE_val_00000001_seg.png",
        [encoded(colours, format="png")],
        broken_picture,
        load("ade20k-847", root / "ade", "val"),
    )

    for number in ("2010", "2012"):
        (root / f"voc/VOCdevkit/VOC{number}/JPEGImages").mkdir(parents=True)
        noise.save(root / f"voc/VOCdevkit/VOC{number}/JPEGImages/2008_000001.jpg")
    voc = root / "voc/VOCdevkit/VOC2010"
    (voc / "trainval").mkdir()
    (voc / "pascalcontext_val.txt").write_text("2008_000001\n")
    maps = []
    for packed in (False, True):
        file = io.BytesIO()
        savemat(
            file,
            {"LabelMap": rng.integers(1, 460, (60, 80)).astype(np.uint16)},
            do_compression=packed,
        )
        maps.append(file.getvalue())
    found["mat"] = (
        voc / "trainval/2008_000001.mat",
        maps,
        broken,
        load("pc-459", root / "voc", "val"),
    )
    lengths = encode(np.asfortranarray(np.asarray(indices)))
    lengths = {"size": [60, 80], "counts": lengths["counts"].decode()}
    plain = {"size": [60, 80], "counts": [100, 50, 4650]}
    detail = {
        "images": [
            {
                "file_name": "2008_000001.jpg",
                "image_id": 1,
                "height": 60,
                "width": 80,
                "phase": "val",
            }
        ],
        "annos_segmentation": [
            {"image_id": 1, "category_id": 2, "segmentation": lengths},
            {"image_id": 1, "category_id": 9, "segmentation": plain},
        ],
    }
    found["json"] = (
        voc / "trainval_merged.json",
        [json.dumps(detail).encode()],
        broken_json,
        load("pc-59", root / "voc", "val"),
    )
    voc = root / "voc/VOCdevkit/VOC2012"
    (voc / "SegmentationClass").mkdir()
    (voc / "ImageSets/Segmentation").mkdir(parents=True)
    Image.fromarray(np.asarray(indices)).save(voc / "SegmentationClass/2008_000001.png")
    found["list"] = (
        voc / "ImageSets/Segmentation/val.txt",
        [b"2008_000001\n", b"2008_000001 1\r\n"],
        broken_text,
        load("voc-20", root / "voc", "val"),
    )

    # a checkpoint of the smallest model, read as evaluate.py and as train.py do
    vision = dict(image_size=64, patch_size=8, width=16, layers=3, head_width=8, pool_type="avg")
    text = dict(context_length=20, width=16, layers=2, heads=2)
    model.TINY = dict(embed_dim=16, vision_cfg=vision, text_cfg=text)
    out = root / "out"
    sys.argv = [
        *map(str, command(good, out)[1:]),
        "--tpa-steps",
        "0",
        "--steps",
        "1",
        "--workers",
        "0",
    ]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        train.train(train.parse())
    last = out / "last.pt"
    state = torch.load(last, weights_only=True)

    def stop(run):  # what follows the loading
        raise Reached

    def resume():
        weights.from_checkpoint(weights.read_checkpoint(last), last)
        train.train(train.parse())

    checkpoints.check_space = stop
    healthy = [
        (last.read_bytes(), state),
        (saved(state, _use_new_zipfile_serialization=False), state),
    ]
    found["checkpoint"] = last, healthy, lambda *args: broken_checkpoint(*args, marker), resume
    pool = (
        photos
        + others
        + masks
        + maps
        + [
            names,
            json.dumps(detail).encode(),
            healthy[0][0],
            healthy[1][0],
            b"\x80\x04",
            b"PK\x05\x06" + bytes(18),
        ]
    )
    return found, pool


def memory(key):
    """Of this process, in MB."""
    return (
        int(next(line for line in open("/proc/self/status") if line.startswith(key)).split()[1])
        / 1024
    )


def broken_item(found, pool, seed, i):
    """Item i of a seed: (kind, what was done, its bytes)."""
    rng = np.random.default_rng((seed, i))
    kind = list(found)[rng.integers(len(found))]
    _, contents, breaking, _ = found[kind]
    content = contents[rng.integers(len(contents))]
    if kind == "checkpoint" and rng.random() < 0.7:
        content = contents[0]
    return kind, *breaking(rng, content, pool)


def read_broken(found, pool, seed, i, marker, limit):
    """Reads item i of a seed. Returns its kind, what was done to it, what came of it and whether
    that is wrong."""
    kind, how, other = broken_item(found, pool, seed, i)
    path, contents, _, read = found[kind]
    path.write_bytes(other)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before, begin = memory("VmRSS"), time.time()
    signal.setitimer(signal.ITIMER_REAL, limit)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            read()
        said, wrong = "read", None
    except Reached:
        said, wrong = "read", None
    except UserError as e:
        said = str(e)
        wrong = (
            "several lines"
            if "\n" in said
            else "too long"
            if len(said) >= 600
            else "no path"
            if str(path if kind == "checkpoint" else marker.parent) not in said
            else None
        )
        wrong = wrong and f"{wrong}: {type(e).__name__}"
    except (Exception, Slow) as e:
        said = str(e)
        ours = [f for f in traceback.extract_tb(e.__traceback__) if Path(f.filename).parent == ROOT]
        wrong = f"{type(e).__name__} from {Path(ours[-1].filename).name}, {ours[-1].name}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        contents = contents[0]
        path.write_bytes(contents[0] if isinstance(contents, tuple) else contents)
    grown, seconds = memory("VmHWM") - before, time.time() - begin
    if marker.exists():
        marker.unlink()
        wrong = "code was executed"
    wrong = wrong or (
        f"{grown:.0f} MB" if grown > 1000 else f"{seconds:.0f} s" if seconds > limit else None
    )
    return dict(
        kind=kind,
        how=how,
        said=said[:300],
        wrong=wrong,
        read=said == "read",
        seconds=seconds,
        grown=grown,
    )


def fuzz(count=2000, seed=0, first=0, limit=10):
    """Reads broken files. Each process reads until one kills it; the next goes on. Returns what
    came of each item."""
    torch.set_num_threads(1)
    outcomes = []
    with tempfile.TemporaryDirectory() as root:
        marker = Path(root) / "executed"
        found, pool = kinds(Path(root), marker)
        while len(outcomes) < count:
            out, into = os.pipe()
            child = os.fork()
            if not child:
                os.close(out)
                resource.setrlimit(resource.RLIMIT_AS, (12 * 2**30,) * 2)  # for the machine's sake
                resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

                def slow(*_):
                    raise Slow

                signal.signal(signal.SIGALRM, slow)
                warnings.simplefilter("ignore")
                try:
                    with os.fdopen(into, "w") as file:
                        for i in range(first + len(outcomes), first + count):
                            print(
                                json.dumps(read_broken(found, pool, seed, i, marker, limit)),
                                file=file,
                                flush=True,
                            )
                except BaseException:  # this file is wrong
                    traceback.print_exc()
                    os.kill(os.getppid(), signal.SIGINT)
                os._exit(0)
            os.close(into)
            with os.fdopen(out) as file:
                while select.select([file], [], [], 6 * limit)[0]:
                    line = file.readline()
                    if not line:
                        break
                    outcomes.append(json.loads(line))
                else:
                    os.kill(child, signal.SIGKILL)
            status = os.waitpid(child, 0)[1]
            if len(outcomes) < count:
                kind, how, _ = broken_item(found, pool, seed, first + len(outcomes))
                wrong = f"ended the process: status {status}"
                outcomes.append(
                    dict(kind=kind, how=how, said="", wrong=wrong, read=False, seconds=0, grown=0)
                )
    return outcomes


# Long runs


def long_run(steps=2000, every=200):
    """Trains and looks at the process from outside. Returns (samples [n,3]: step, MB, open files;
    seconds)."""
    samples, begin = [], time.time()
    with tempfile.TemporaryDirectory() as root:
        root = Path(root)
        out, folder = root / "out", pictures(root / "data")
        flags = [
            "--batch-size",
            "2",
            "--log-every",
            "5",
            "--eval-every",
            every,
            "--save-every",
            every,
            "--steps",
            steps,
        ]
        process = start(command(folder, out, *flags), root / "words")
        while process.poll() is None:
            time.sleep(0.25)
            with contextlib.suppress(
                OSError, StopIteration, IndexError, KeyError, json.JSONDecodeError
            ):
                step = json.loads((out / "log.jsonl").read_text().splitlines()[-1])["step"]
                status = Path(f"/proc/{process.pid}/status").read_text().splitlines()
                resident = (
                    int(next(line for line in status if line.startswith("VmRSS")).split()[1]) / 1024
                )
                if step < steps:
                    samples.append((step, resident, len(os.listdir(f"/proc/{process.pid}/fd"))))
        if process.returncode:
            raise SystemExit((root / "words").read_text())
    return np.array(samples), time.time() - begin


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = p.add_subparsers(dest="verb", required=True)
    for verb, option, value in (
        ("kill", "--times", 20),
        ("signals", "--times", 40),
        ("twice", "--times", 20),
        ("fuzz", "--count", 2000),
        ("memory", "--steps", 2000),
    ):
        v = verbs.add_parser(verb)
        v.add_argument(option, type=int, default=value)
        v.add_argument("--seed", type=int, default=0)
        v.add_argument("--first", type=int, default=0)
    args, wrong = p.parse_args(), []
    if args.verb == "kill":
        hits, ended, wrong = kill(args.times, args.seed)
        where = ", ".join(
            f"{hits[k]} {k}" for k in ("before the first checkpoint", "while writing", "in between")
        )
        [print(line) for line in wrong[:20]]
        print(
            f"kill --seed {args.seed}: {sum(hits.values())} kills ({where}), {ended} runs ended, "
            f"{len(wrong)} differences from the uninterrupted run"
        )
    elif args.verb == "signals":
        ends, wrong = signals(args.times, args.seed)
        print("\n".join(wrong[:20]))
        for (kind, status), n in sorted(ends.items(), key=str):
            print(f"  {n} x {kind}: exit status {status}")
        print(f"signals --seed {args.seed}: {args.times} runs, {len(wrong)} failures")
    elif args.verb == "twice":
        refused, wrong = twice(args.times, args.seed)
        print("\n".join(wrong[:20]))
        print(
            f"twice --seed {args.seed}: {args.times} folders, {refused} runs refused, "
            f"{len(wrong)} failures"
        )
    elif args.verb == "fuzz":
        outcomes = fuzz(args.count, args.seed, args.first)
        groups = collections.defaultdict(list)
        for i, o in enumerate(outcomes):
            if o["wrong"]:
                groups[o["kind"], o["how"], o["wrong"]].append(args.first + i)
        wrong = [i for group in groups.values() for i in group]
        for (kind, how, what), found in sorted(groups.items()):
            said = outcomes[found[0] - args.first]["said"]
            print(f"{kind} ({how}): {what}, {len(found)} items, such as {found[:5]}: {said!r}")
        counts = ", ".join(
            f"{n} {k}" for k, n in collections.Counter(o["kind"] for o in outcomes).items()
        )
        read = sum(o["read"] and not o["wrong"] for o in outcomes)
        seconds, grown = (max(o[key] for o in outcomes) for key in ("seconds", "grown"))
        print(
            f"fuzz --seed {args.seed}: {len(outcomes)} files ({counts}), {read} read, "
            f"{len(outcomes) - len(wrong) - read} refused in one sentence, {len(wrong)} failures; "
            f"at most {seconds:.1f} s and {grown:.0f} MB each"
        )
    else:
        samples, seconds = long_run(args.steps)
        half = samples[samples[:, 0] >= args.steps / 2]
        slope, files = np.polyfit(half[:, 0], half[:, 1], 1)[0] * 1000, half[:, 2]
        print(
            f"memory: {args.steps} steps in {seconds:.0f} s, {len(samples)} samples, "
            f"{slope:+.2f} MB per 1000 steps over the second half ({half[:, 1].min():.0f} to "
            f"{half[:, 1].max():.0f} MB resident), open files {samples[0, 2]:.0f} at the start, "
            f"{files.min():.0f} to {files.max():.0f} in the second half, {samples[-1, 2]:.0f} at "
            "the end"
        )
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
