"""What users and machines do to a run: kills, full disks, lost processes, broken checkpoints, odd
names and pictures.

survive.py does the same for longer, by hand.
"""

import contextlib
import json
import pickle
import resource
import signal
import struct
import sys
import time
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
import survive
import train
from conftest import ROOT, run
from sources.registry import open_dataset
from support import checkpoints, runs, signals
from support.errors import UserError

FAST = [
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
    "--steps",
    "4",
    "--log-every",
    "1",
    "--eval-every",
    "2",
    "--save-every",
    "1",
]


@pytest.fixture(autouse=True)
def one_thread():
    """More of them wait for each other where a processor is shared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def go(folder, tmp_path, monkeypatch, capsys, no_plots):
    """Train in this process as from a shell: go(*flags) -> (exit status, what stderr says but for
    progress bars)."""

    def go(*flags, out="o"):
        words = [
            "train.py",
            "--dataset",
            f"folder:{folder}",
            "--out",
            tmp_path / out,
            *FAST,
            *flags,
        ]
        monkeypatch.setattr(sys, "argv", list(map(str, words)))
        capsys.readouterr()
        with pytest.raises(SystemExit) as e:
            train.main()
        status, said = e.value.code, capsys.readouterr().err
        return (1, f"{said}\n{status}") if isinstance(status, str) else (status, said)

    return go


def one_sentence(result, *words):
    """Exit status 1, one error of one line with these words. Returns it."""
    status, said = result
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert (
        status == 1
        and len(errors) == 1
        and "Traceback" not in said
        and said.splitlines()[-1] == errors[0]
    ), said
    assert all(str(w) in errors[0] for w in words) and len(errors[0]) < 600, errors[0]
    return errors[0]


def step_of(path):
    return torch.load(path, weights_only=True)["step"]


# Kills


def test_killed_runs_end_bit_for_bit_like_an_uninterrupted_one():
    hits, ended, wrong = survive.kill(times=2, seed=2, steps=3, every=2, moments=("writing", "any"))
    assert not wrong and sum(hits.values()) == 2 and hits["while writing"], (hits, ended, wrong)


def after_the_first_checkpoint(monkeypatch):
    write = checkpoints.write_checkpoint

    def cut(*args):
        write(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints, "write_checkpoint", cut)


def while_the_log_is_rewritten(monkeypatch):
    def cut(line):
        raise KeyboardInterrupt

    broken = SimpleNamespace(dumps=cut, loads=json.loads, JSONDecodeError=json.JSONDecodeError)
    monkeypatch.setattr(runs, "json", broken)


@pytest.mark.parametrize("moment", [after_the_first_checkpoint, while_the_log_is_rewritten])
def test_the_log_survives_a_cut(go, tmp_path, moment):
    assert go(out="whole")[0] == 0
    if moment == while_the_log_is_rewritten:
        assert go("--steps", "3")[0] == 0
    with pytest.MonkeyPatch.context() as monkeypatch:
        moment(monkeypatch)
        assert go()[0] == 130
    assert go()[0] == 0
    steps = lambda out: [
        (line["step"], sorted(line)) for line in runs.read_log(tmp_path / out / "log.jsonl")
    ]
    assert [l for l in steps("whole") if l not in steps("o")] == []


# Disks and folders


@pytest.mark.parametrize("full", ["last.pt", "log.jsonl"])
def test_a_full_disk_ends_the_run_and_keeps_the_checkpoint(go, tmp_path, monkeypatch, full):
    write, before = checkpoints.write_checkpoint, resource.getrlimit(resource.RLIMIT_FSIZE)
    limit = lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))

    def filling(contents, path):
        if contents["step"] == 2 and full == "last.pt":
            limit(10**6)
        write(contents, path)
        if contents["step"] == 1 and full == "log.jsonl":
            limit((tmp_path / "o/log.jsonl").stat().st_size + 20)

    with monkeypatch.context() as m:
        m.setattr(checkpoints, "write_checkpoint", filling)
        try:
            result = go()
        finally:
            limit(before[0])
    one_sentence(result, tmp_path / "o" / full)
    assert step_of(tmp_path / "o/last.pt") == 1 and not list((tmp_path / "o").glob("*.tmp"))
    assert go()[0] == 0 and go(out="whole")[0] == 0
    assert survive.differences(tmp_path / "whole", tmp_path / "o") == []


@pytest.mark.parametrize("name", ["results.json", "curves.png", "examples.png"])
def test_a_disk_full_at_the_end_names_the_file(go, tmp_path, monkeypatch, name):
    finish = train.progress.finish

    def on_a_full_disk(run):
        (run.out / name).symlink_to("/dev/full")
        finish(run)

    monkeypatch.setattr(train.progress, "finish", on_a_full_disk)
    one_sentence(go("--eval-every", "0", "--steps", "1"), tmp_path / "o" / name)
    assert step_of(tmp_path / "o/last.pt") == 1


def test_two_runs_in_one_folder(go, folder, tmp_path):
    """The second is told who is there; the lock dies with its holder, not with its loaders."""
    out = tmp_path / "o"
    log = out / "log.jsonl"
    flags = [*FAST, "--steps", "100000", "--eval-every", "0", "--workers", "1"]
    words = tmp_path / "words"
    first = survive.start([*survive.command(folder, out), *flags], words)
    try:
        while not log.exists() or "segmentation_loss" not in log.read_text():
            assert first.poll() is None, words.read_text()
            time.sleep(0.05)
        one_sentence(go(), f"--out {out} is in use by process {first.pid} on ")
    finally:
        first.kill()
        first.wait()
    assert go("--restart", "--steps", "1")[0] == 0


def test_what_the_beginning_found_is_not_looked_for_again(go, tmp_path, monkeypatch):
    """SIGTERM in the pre-alignment: the zero-shot scores are kept, for the same flags only."""
    align, score, scored = train.pre_align, train.progress.score, []

    def cut(*args):
        signal.raise_signal(signal.SIGTERM)

    def count(run, zero_shot=False):
        scored.append(zero_shot)
        return score(run, zero_shot)

    monkeypatch.setattr(train.progress, "score", count)
    monkeypatch.setattr(train, "pre_align", cut)
    assert go()[0] == 130 and scored == [True]
    assert go("--seed", "1", "--restart")[0] == 130 and scored == [True, True]
    monkeypatch.setattr(train, "pre_align", align)
    (tmp_path / "o/log.jsonl").write_text('{"step": 0, "tpa_loss": 1.0}\n')  # cut after this line
    assert go("--seed", "1", "--eval-every", "0")[0] == 0 and scored == [True, True, False]
    assert go("--eval-every", "0", "--seed", "1", out="whole")[0] == 0
    assert survive.differences(tmp_path / "whole", tmp_path / "o") == []


def test_a_signal_while_a_checkpoint_is_written_stops_before_the_evaluation(go, monkeypatch):
    """It was asked for between steps; the evaluation that is due would take minutes."""
    save, scored = train.checkpoints.save, []

    def asked(run):
        save(run)
        if run.step == 2:
            signal.raise_signal(signal.SIGTERM)

    def score(run, zero_shot=False):
        scored.append(run.step)
        return {"mIoU_union": 0.0, "mIoU_ground_truth": 0.0}, {}

    monkeypatch.setattr(train.checkpoints, "save", asked)
    monkeypatch.setattr(train.progress, "score", score)
    assert go()[0] == 130 and scored == [0]


def test_a_signal_while_the_first_checkpoint_is_written(go, tmp_path, monkeypatch):
    """It waits until the file is whole, and no longer."""
    write, aligned = torch.save, []

    def asked(contents, file):
        signal.raise_signal(signal.SIGTERM)
        write(contents, file)

    monkeypatch.setattr(torch, "save", asked)
    monkeypatch.setattr(train, "pre_align", lambda *a: aligned.append(1))
    assert go()[0] == 130 and not aligned
    assert torch.load(tmp_path / "o/last.pt", weights_only=True)["facts"]["zero_shot"]


def test_ignored_signals_stay_ignored(monkeypatch):
    """nohup ignores SIGHUP, and so does a run below it."""
    before = [signal.getsignal(number) for number in signals.SIGNALS]
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        stop = signals.Interruption()
        signal.raise_signal(signal.SIGHUP)
        assert not stop.asked
        signal.raise_signal(signal.SIGTERM)
        assert stop.asked
        with pytest.raises(KeyboardInterrupt), stop.immediate(True):
            pass
    finally:
        for number, handler in zip(signals.SIGNALS, before):
            signal.signal(number, handler)


def test_restart_moves_the_old_run_aside(go, tmp_path, monkeypatch):
    assert go("--steps", "1")[0] == 0
    before = {name: (tmp_path / "o" / name).read_bytes() for name in ("last.pt", "results.json")}
    with monkeypatch.context() as m:
        m.setattr(train.progress, "score", lambda *a, **k: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            go("--restart")
        with pytest.raises(ZeroDivisionError):
            go("--restart")  # which has nothing to move
        (tmp_path / "o/previous-1").rename(tmp_path / "o/previous-7")
        (tmp_path / "o/last.pt").write_bytes(before["last.pt"])
        with pytest.raises(ZeroDivisionError):
            go("--restart")
    assert {p.name for p in (tmp_path / "o").glob("*.*")} == {".lock"}
    kept = {name: (tmp_path / "o/previous-7" / name).read_bytes() for name in before}
    assert kept == before and {p.name for p in (tmp_path / "o/previous-8").iterdir()} == {"last.pt"}
    assert not (tmp_path / "o/previous-2").exists()


def test_errors_are_repeated_by_torchrun(tmp_path):
    done = run(
        "train.py",
        "--dataset",
        "folder:nowhere",
        "--out",
        tmp_path / "o",
        processes=2,
        fork=False,
        check=False,
    )
    summary = done.stderr.partition("Root Cause")[2]
    assert "error: nowhere/classes.txt can't be read as class names" in summary, done.stderr


def test_out_that_is_no_folder(go, tmp_path):
    (tmp_path / "file").write_text("kept")
    for out in ("file", "file/below", "file/below/it"):
        one_sentence(go(out=out), tmp_path / out)
    assert (tmp_path / "file").read_text() == "kept"


def test_out_where_nothing_can_be(go):
    one_sentence(go("--out", "/proc/run"), "--out /proc/run can't be written to")


def test_a_disk_that_is_too_small_is_told_before_training(go, tmp_path, monkeypatch):
    free = SimpleNamespace(free=1_234_567)
    monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda path: free)
    said = one_sentence(go(), f"--out {tmp_path / 'o'} has 1 MB left, and needs ")
    assert int(said.split()[-1].replace(",", "")) > 5


def test_ctrl_c_twice_ends_at_once(folder, tmp_path):
    """130, no crash and no traceback, and the checkpoint whole, whatever the second one hits."""
    out, words = tmp_path / "o", tmp_path / "words"
    flags = [*FAST, "--batch-size", "32", "--steps", "100000", "--eval-every", "0"]
    process = survive.start([*survive.command(folder, out), *flags], words)
    while "training:" not in words.read_text():
        assert process.poll() is None, words.read_text()
        time.sleep(0.02)
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        time.sleep(0.02)
    status, said = process.wait(60), words.read_text()
    assert status == 130, said
    assert "Traceback" not in said and "stopped" in said, said
    assert step_of(out / "last.pt") >= 0


def test_a_read_only_dataset(go, folder, tmp_path):
    inside = [folder, *folder.rglob("*")]
    try:
        for path in inside:
            path.chmod(0o555 if path.is_dir() else 0o444)
        before = {path: path.stat().st_mtime_ns for path in inside}
        assert go("--steps", "1")[0] == 0
        assert before == {path: path.stat().st_mtime_ns for path in [folder, *folder.rglob("*")]}
    finally:
        for path in inside:
            path.chmod(0o755)


# Several processes

LAUNCHED = """import os, signal, sys, time
from pathlib import Path
sys.path.insert(0, {root!r})
import train
from sources import benchmarks
from sources.readers import read_image
rank, calls, labels, happened = int(os.environ["RANK"]), [], train.patch_labels, Path({happened!r})

def third(*args):
    calls.append(0)
    if len(calls) == 3 and rank == 1:
        happened.touch()
        {fate}
    return labels(*args)

train.patch_labels = third
train.main()
"""


@pytest.mark.parametrize(
    "fate, seconds, words",
    [
        (
            "benchmarks.read_image = lambda path: read_image(happened)",
            20,
            "happened can't be read as an image",
        ),
        (
            "signal.signal(signal.SIGTERM, signal.SIG_DFL), time.sleep(1000)",
            60,
            "error: rank 0 lost contact with rank 1, which hangs",
        ),
        (
            "os.kill(os.getpid(), signal.SIGKILL)",
            60,
            "error: rank 0 lost contact with another, which has ended: see its error, or "
            "torchrun's summary; where memory ran out, --accumulate 2 and --recompute-head need "
            "less",
        ),
    ],
    ids=["broken", "hangs", "killed"],
)
def test_one_of_two_processes_fails(folder, tmp_path, fate, seconds, words):
    script, happened = tmp_path / "script.py", tmp_path / "happened"
    script.write_text(LAUNCHED.format(root=str(ROOT), happened=str(happened), fate=fate))
    done = run(
        script,
        "--dataset",
        f"folder:{folder}",
        "--out",
        tmp_path / "o",
        *FAST,
        "--eval-every",
        "0",
        "--steps",
        "9",
        "--timeout",
        "0.1",
        processes=2,
        check=False,
        timeout=150,
        fork="read_image" in fate,  # the others need torchrun
    )
    assert time.time() - happened.stat().st_mtime < seconds
    said = done.stderr.partition(
        "torch.distributed.elastic.multiprocessing.errors.ChildFailedError"
    )[0]
    assert done.returncode and words in done.stderr, done.stderr
    assert 'train.py", line' not in said and 'evaluate.py", line' not in said, said
    assert step_of(tmp_path / "o/last.pt") >= 2


def test_processes_that_find_different_checkpoints_are_told_to_share_a_folder(go, folder, tmp_path):
    """Two nodes, each with a disk of its own: one would go on, the other begin."""
    assert go("--steps", "1", out="o0")[0] == 0
    script = tmp_path / "script.py"
    script.write_text(
        f"import os, sys; sys.path.insert(0, {str(ROOT)!r}); import train\n"
        "sys.argv[sys.argv.index('--out') + 1] += os.environ['RANK']\ntrain.main()"
    )
    done = run(
        script,
        "--dataset",
        f"folder:{folder}",
        "--out",
        tmp_path / "o",
        *FAST,
        "--timeout",
        "0.1",
        processes=2,
        check=False,
        timeout=150,
    )
    assert done.returncode and "should be one folder for all nodes" in done.stderr, done.stderr


def test_a_run_of_one_process_goes_on_with_two(go, folder, tmp_path, monkeypatch):
    update, calls = train.MomentumEncoder.update, []

    def cut(self):
        calls.append(0)
        if len(calls) == 3:
            raise KeyboardInterrupt
        update(self)

    assert go(out="whole")[0] == 0
    with monkeypatch.context() as m:
        m.setattr(train.MomentumEncoder, "update", cut)
        assert go()[0] == 130 and step_of(tmp_path / "o/last.pt") == 2
    run(
        "train.py",
        "--dataset",
        f"folder:{folder}",
        "--out",
        tmp_path / "o",
        *FAST,
        processes=2,
        timeout=150,
    )
    whole, parts = (
        torch.load(tmp_path / name / "last.pt", weights_only=True) for name in ("whole", "o")
    )
    assert parts["step"] == 4
    for part in (lambda c: c["model"], lambda c: c["momentum"]["tensors"]):
        for name, t in part(whole).items():
            torch.testing.assert_close(part(parts)[name], t, rtol=0, atol=1e-5, msg=name)


# Checkpoints that are none


def test_another_vocabulary_does_not_go_on(go, folder, tmp_path):
    assert go("--steps", "1")[0] == 0
    last = tmp_path / "o/last.pt"
    before = last.read_bytes()
    for names in (
        "red thing\ngreen thing\npink thing",
        "red thing\ngreen thing\nblue thing\npink thing",
    ):
        (folder / "classes.txt").write_text(names)
        one_sentence(go("--steps", "2"), last, "--dataset")
        assert last.read_bytes() == before


def test_another_number_of_images_does_not_go_on(go, folder):
    """It would be another order."""
    assert go("--steps", "1")[0] == 0
    for kind in ("images", "masks"):
        next((folder / kind / "train").glob("4.*")).unlink()
    one_sentence(go("--steps", "2"), "was trained on 6 images", "has 5 now")


@pytest.mark.parametrize(
    "flags, words",
    [
        (("--image-size", "100"), "--image-size 100 with --clip tiny gives 8 x 8 patches"),
        (("--channels", "100"), "--channels 100 can't be divided"),
        (("--channels", "30"), "--channels 30 can't be divided"),
        (("--dataset", "toy:99999999999999999999"), "at most nine digits"),
    ],
)
def test_sizes_that_cannot_be(go, flags, words):
    one_sentence(go(*flags), words)


def test_a_cache_that_cannot_be_written(go, monkeypatch):
    monkeypatch.setenv("RPMD_CACHE", "/proc/nowhere")
    one_sentence(go("--dataset", "toy", "--pretrained", "toy"), "/proc/nowhere can't be written")


class Code:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("kind", ["noise", "empty", "code", "saved code", "snapshot"])
def test_what_is_no_checkpoint_is_refused_and_kept(go, tmp_path, kind):
    last, marker = tmp_path / "o/last.pt", tmp_path / "executed"
    last.parent.mkdir()
    if kind == "snapshot":
        assert go("--steps", "1", "--snapshot-every", "1")[0] == 0
        (tmp_path / "o/step-000001.pt").replace(last)
    elif kind == "saved code":
        torch.save({"config": {}, "model": {}, "args": Code(marker)}, last)
    else:
        noise, code = np.random.default_rng(0).bytes(10_000), pickle.dumps(Code(marker))
        last.write_bytes({"noise": noise, "empty": b"", "code": code}[kind])
    before = last.read_bytes()
    one_sentence(go(), last)
    assert last.read_bytes() == before and not marker.exists()


# Broken files, odd names


def test_files_broken_in_any_way_give_a_result_or_one_sentence():
    done = run("tests/survive.py", "fuzz", "--count", "60", check=False, fork=False)
    assert done.returncode == 0 and "60 files" in done.stdout, done.stdout + done.stderr[-2000:]


def test_a_picture_of_900_million_pixels_is_refused(folder):
    path = folder / "images/train/0.png"
    (folder / "images/train/0.jpg").unlink()
    header = survive.chunk(b"IHDR", struct.pack(">IIBBBBB", 30_000, 30_000, 1, 0, 0, 0, 0))
    pixels = survive.chunk(b"IDAT", zlib.compress(bytes(30_000 * 3751)))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + pixels + survive.chunk(b"IEND", b""))
    with pytest.raises(UserError, match=r"0\.png can't be read as an image \(.*\)$") as e:
        open_dataset(f"folder:{folder}", None, "train").load(0)
    assert "\n" not in str(e.value)


def evaluated(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, words)])
    handler = signal.getsignal(signal.SIGTERM)
    with contextlib.suppress(SystemExit):
        evaluate.main()
    signal.signal(signal.SIGTERM, handler)


def test_masks_without_a_single_label_are_refused(go, folder):
    for path in folder.glob("masks/train/*.png"):
        Image.new("L", (80, 60), 255).save(path)
    one_sentence(go(), "nothing to learn from, no label in 32 training crops of ", folder)


def test_one_class(go, folder, tmp_path, monkeypatch, capsys):
    (folder / "classes.txt").write_text("thing")
    for path in folder.glob("masks/*/*.png"):
        mask = np.array(Image.open(path))
        Image.fromarray(np.where(mask == 1, mask * 0, mask * 0 + 255)).save(path)
    status, said = go()
    assert status == 0, said
    evaluated(
        monkeypatch,
        "--checkpoint",
        tmp_path / "o/last.pt",
        "--datasets",
        f"folder:{folder}",
        "--out",
        tmp_path / "e",
    )
    said = capsys.readouterr().out
    assert "thing" in said and "100.0" in said


def test_five_thousand_names(tiny):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8))
    labels = evaluate.segment(tiny, image, [f"thing {i}" for i in range(5000)])
    assert (
        labels.shape == (50, 70)
        and labels.dtype == torch.int64
        and 0 <= labels.min()
        and labels.max() < 5000
    )


@pytest.mark.parametrize("from_file", [True, False])
def test_odd_names(tiny, folder, tmp_path, monkeypatch, capsys, from_file):
    names = [
        "🙂",
        "../../outside",
        "/root/outside",
        "a\x00b",
        "c:\\d",
        "{}",
        "%s",
        "日本",
        "-" * 500,
    ]
    names += ["two\nlines"] * (not from_file)
    (tmp_path / "names.txt").write_text("\n".join(names), encoding="utf-8")
    torch.save({"config": tiny.config, "model": tiny.state_dict()}, tmp_path / "c.pt")
    before = {path for path in tmp_path.parent.rglob("*")}
    evaluated(
        monkeypatch,
        "--checkpoint",
        tmp_path / "c.pt",
        "--image",
        folder / "images/val/0.jpg",
        "--out",
        tmp_path / "e",
        "--classes",
        tmp_path / "names.txt" if from_file else ", ".join(names),
    )
    assert "0.seg.png: " in capsys.readouterr().out
    assert {path for path in tmp_path.parent.rglob("*")} - before == {
        tmp_path / "e",
        tmp_path / "e/0.seg.png",
    }
