"""What users and machines do to a run: kills, signals, lost processes, broken files, odd streams.
Most of it happens to processes of their own, which a server forks, so that none imports torch."""
import errno
import io
import json
import math
import multiprocessing
import os
import runpy
import signal
import socket
import sys
import time
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

import data
import model
import train
from conftest import FORKS, ROOT
from sources import readers
from support import accidents, checkpoint
from support.files import UserError
from test_checkpoint import TEXT, VISION

FAST = ("--clip=tiny --image-size=32 --batch-size=8 --steps=4 --tpa-steps=1 --eval-every=0 "
        "--save-every=0").split()
PRELUDE = """
import os, signal, sys, time
from datetime import timedelta
import data, ema, evaluate, losses, model
from support import accidents, checkpoint, files, pictures
pictures.curves = evaluate.examples = lambda *everything: None  # half the time of so small a run
views = evaluate.views  # one view is quicker than five
evaluate.views = lambda image, size, sliding: views(image, size, False)
model.TINY["vision_cfg"] |= dict(layers=3, width=64, head_width=16)
model.TINY["text_cfg"] |= dict(width=32, heads=2)

def third(place, name, fate, n=3):  # a function's third or nth call meets its fate first
    function, calls = getattr(place, name), []
    def counting(*arguments, **options):
        calls.append(0)
        if len(calls) == n:
            fate()
        return function(*arguments, **options)
    setattr(place, name, counting)
"""
RANK_1 = "if os.environ['RANK'] == '1': "


def script(words, prelude, env, command):
    """Run a script as from a shell, in a process group of its own. Its output goes to a file."""
    with open(words, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.setpgrp()
    os.environ.update(env, CUDA_VISIBLE_DEVICES="")
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # loaders, as from a shell
    sys.argv = command
    exec(PRELUDE + prelude, {})
    runpy.run_path(command[0], run_name="__main__")


@pytest.fixture
def start(folder, tmp_path):
    """start(name, *flags, processes=1, prelude=Python to run first) -> processes that train into
    tmp_path/name. Each has the attributes out and words, the file of its output."""
    started = []

    def go(name, *flags, processes=1, prelude=""):
        with socket.create_server(("localhost", 0)) as free:
            env = dict(MASTER_ADDR="localhost", MASTER_PORT=str(free.getsockname()[1]))
        command = [str(ROOT / "train.py"), f"--dataset=folder:{folder}", *FAST, *flags]
        for rank in range(processes):
            words = tmp_path / f"{len(started)}.txt"
            words.touch()
            env |= dict(WORLD_SIZE=str(processes), RANK=str(rank))
            process = FORKS.Process(target=script, args=(
                words, prelude, env, [*command, f"--out={tmp_path / name}"]))
            process.start()
            process.words, process.out = words, tmp_path / name
            started.append(process)
        return started[-processes:]

    yield go
    for process in started:
        process.kill()
        process.join()


def ends(process, status):
    """Waits for its end, with this status. Returns its output."""
    process.join(100)
    said = process.words.read_text()
    assert process.exitcode == status, f"exit status {process.exitcode}: {said[-3000:]}"
    return said


def one_sentence(said, *words):
    """The last line is the only error, with these words in it, and there is no traceback."""
    last = said.strip().splitlines()[-1]
    assert last.startswith("error: ") and said.count("error: ") == 1 and "Traceback" not in said
    assert all(word in last for word in words), last


def read_log(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def step_of(out):
    return torch.load(out / "last.pt", weights_only=True)["step"]


def assert_same_end(a, b):
    """Two runs' weights, momentum, optimiser, log and results are equal bit for bit."""
    x, y = (torch.load(out / "last.pt", weights_only=True) for out in (a, b))
    assert x["optimiser"].pop("param_groups") == y["optimiser"].pop("param_groups")
    for name in ("step", "model", "original", "momentum", "optimiser", "scaler"):
        torch.testing.assert_close(x[name], y[name], rtol=0, atol=0, msg=name)
    x, y = ([{**line, "seconds": 0} for line in read_log(out)] for out in (a, b))
    assert x == y
    x, y = (json.loads((out / "results.json").read_text()) for out in (a, b))
    assert (x["start"], x["trained"]) == (y["start"], y["trained"])


def test_killed_at_any_moment_a_run_ends_bit_for_bit_like_an_undisturbed_one(start):
    """Weights, momentum, optimiser, log and results, also with other loaders."""
    often = ("--eval-every=2", "--save-every=1")
    fate = "lambda: os.kill(os.getpid(), signal.SIGKILL)"
    killed = [*start("writing", *often, prelude=f"third(os, 'fsync', {fate}, 5)"),
              *start("in a step", *often, prelude=f"third(ema.MomentumEncoder, 'update', {fate})")]
    [whole] = start("whole", *often)
    for process in killed:
        ends(process, -signal.SIGKILL)
        assert step_of(process.out) in (1, 2)  # and last.pt can be read
    again = [*start("writing", *often), *start("in a step", *often, "--workers=1")]
    ends(whole, 0)
    for process in again:
        ends(process, 0)
        assert_same_end(whole.out, process.out)


BREAK = "r, w = os.pipe(); os.close(r); os.dup2(w, 1); os.dup2(w, 2)"  # the reader has ended


def test_a_signal_finishes_the_step_and_saves(start):
    """To a whole process group, with its loader, or to one process of two, which agree. Before
    training it ends the run at once."""
    begin = "third(data, 'batches', lambda: signal.raise_signal(signal.SIGTERM))"
    [early], runs = start("early", prelude=begin), []
    for fate, processes in (("(os.kill(0, signal.SIGTERM), os.kill(0, signal.SIGTERM))", 1),
                            (f"(exec({BREAK!r}), os.kill(0, signal.SIGINT))", 1),  # 2>&1 | tee log
                            ("signal.raise_signal(signal.SIGUSR1)", 2)):
        which = RANK_1 if processes == 2 else ""
        prelude = f"{which}third(ema.MomentumEncoder, 'update', lambda: {fate})"
        runs.append(start(f"{len(runs)}", "--steps=99", f"--workers={2 - processes}",
                          processes=processes, prelude=prelude))
    for run in runs:
        said = [ends(process, 130) for process in run]
        assert step_of(run[0].out) == 3 and not (run[0].out / "results.json").exists()
        assert "Traceback" not in "".join(said)
    assert "Traceback" not in ends(early, 130) and not (early.out / "results.json").exists()


def test_a_signal_that_nohup_ignores_stays_ignored(monkeypatch):
    ignored, answered = {signal.SIGTERM: signal.SIG_IGN}, []
    monkeypatch.setattr(signal, "getsignal", ignored.get)
    monkeypatch.setattr(signal, "signal", lambda number, handler: answered.append(number))
    accidents.answer_signals(None)
    assert answered == [signal.SIGINT, signal.SIGUSR1, signal.SIGHUP]


def test_nan_stops_before_the_step_and_names_its_origin(training, tmp_path, monkeypatch):
    steps, loss, step = [], train.cpa_loss, torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: steps.append(0) or step(self))
    monkeypatch.setattr(train, "cpa_loss",
                        lambda *args: loss(*args) * (math.nan if len(steps) == 2 else 1))
    with pytest.raises(UserError, match="^cpa_loss .*infinite at step 3; images .*jpg, .*jpg$"):
        training("a", "--tpa-steps=0", "--image-size=32", "--save-every=0")
    assert len(steps) == 2 and step_of(tmp_path / "a") == 2


def test_an_error_in_a_step_keeps_the_steps_before(training, tmp_path, monkeypatch):
    calls = [mock.DEFAULT, mock.DEFAULT, UserError("x.jpg can't be read"), *[mock.DEFAULT] * 4]
    monkeypatch.setattr(train, "cpa_loss", mock.Mock(wraps=train.cpa_loss, side_effect=calls))
    flags = ("--tpa-steps=0", "--image-size=32", "--save-every=0", "--eval-every=2")
    with pytest.raises(UserError, match="x.jpg"):
        training("a", *flags)
    saved = torch.load(tmp_path / "a/last.pt", weights_only=True)
    assert saved["step"] == 2 and saved["log"] == read_log(tmp_path / "a")
    log = read_log(training("a", *flags))  # and what was evaluated before is not done again
    assert [line["step"] for line in log if "mIoU_union" in line] == [0, 2, 4, 6]


def test_one_of_two_processes_is_lost(start):
    pairs = []
    for name, fate in (("hangs", "signal.signal(signal.SIGTERM, signal.SIG_IGN), time.sleep(1000)"),
                       ("killed", "os.kill(os.getpid(), signal.SIGKILL)"),
                       ("fails", "data.open_dataset('none')")):
        prelude = f"{RANK_1}third(losses, 'patch_labels', lambda: ({fate}))"
        if name == "hangs":
            prelude = f"accidents.TIMEOUT = timedelta(seconds=5)\n{prelude}"
        pairs.append(start(name, "--tpa-steps=0", processes=2, prelude=prelude))
    for first, _ in pairs:
        one_sentence(ends(first, 1), "rank 0 lost contact")
    one_sentence(ends(pairs[-1][1], 1), "--dataset none: should be one of")


def test_processes_that_differ_do_not_train(start):
    preludes = ("sys.argv.append('--lr=0.07')", "data.read_names = lambda *_: ['a', 'b', 'c']",
                "files.digest = str", "checkpoint.digest = str")
    for pair in [start(p[:4], processes=2, prelude=RANK_1 + p) for p in preludes]:
        for process in pair:
            one_sentence(ends(process, 1), "differs between process ")


def test_a_second_run_in_a_folder_is_refused(start):
    [first] = start("o", prelude="data.open_dataset = lambda *a, **k: (print('here', flush=True), "
                                 "time.sleep(1000))")
    while "here" not in first.words.read_text():
        assert first.is_alive(), first.words.read_text()
        time.sleep(0.1)
    one_sentence(ends(start("o")[0], 1), "/o is in use by another run")
    first.kill()
    first.join()
    accidents.lock_folder(first.out)  # the lock ended with its holder


def test_what_lies_in_the_folder_is_left_alone(tmp_path):
    """But for what a killed run has left half written; and a link is not followed."""
    for name in ("thesis.tmp", ".thesis.partial", ".0123456789abcdef.partial"):
        (tmp_path / name).write_text("kept")
    accidents.lock_folder(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"thesis.tmp", ".thesis.partial", ".lock"}
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked/.lock").symlink_to(tmp_path / "thesis.tmp")
    for out in ("linked", "thesis.tmp", "thesis.tmp/below"):
        with pytest.raises(UserError, match=f"--out .*{out} can't be written"):
            accidents.lock_folder(tmp_path / out)
    assert (tmp_path / "thesis.tmp").read_text() == "kept"


def test_a_file_system_without_locks_will_do(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("fcntl.lockf", mock.Mock(side_effect=OSError(errno.ENOLCK, "no locks")))
    accidents.lock_folder(tmp_path)
    assert "without locks" in capsys.readouterr().out


@pytest.mark.parametrize("elastic, slurm", ["00", "10", "01"])
def test_restart_is_not_repeated_by_a_scheduler(monkeypatch, elastic, slurm):
    """Neither by torchrun nor by SLURM, nor by SLURM that starts torchrun anew."""
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", elastic)
    monkeypatch.setenv("SLURM_RESTART_COUNT", slurm)
    assert train.parse(["--restart"]).restart == (elastic + slurm == "00")


def test_half_an_environment_is_one_process(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "1")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert accidents.torchrun() == (0, 1, 0)
    monkeypatch.delenv("MASTER_PORT")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert accidents.start_processes()[:2] == (0, 1)
    assert train.parse(["--batch-size=2"]).batch_size == 2
    accidents.lock_folder(tmp_path)
    assert (tmp_path / ".lock").exists()


def test_a_run_without_streams_and_one_without_home_or_name(start):
    surroundings = (f"{BREAK}; sys.stdout, sys.stderr = open(1, 'w'), open(2, 'w')",
                    "os.close(1); os.close(2); sys.stdout = sys.stderr = None",  # >&- 2>&-
                    "import pwd; pwd.getpwuid = {}.pop; os.environ.pop('HOME')")
    runs = [start(str(i), "--steps=1", prelude=p) for i, p in enumerate(surroundings)]
    for [process] in runs:
        ends(process, 0)
        assert (process.out / "results.json").is_file()


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("can't allocate memory: 9 bytes")])
def test_too_little_memory_is_one_sentence(error, capsys, monkeypatch):
    monkeypatch.setattr(accidents, "answer_signals", lambda handler: None)
    with pytest.raises(SystemExit), accidents.door():
        raise error
    one_sentence(capsys.readouterr().err, "--accumulate 2")
    with pytest.raises(RuntimeError), accidents.door():  # a bug keeps its traceback
        raise RuntimeError


def test_streams_of_a_notebook_and_of_an_ascii_terminal():
    notebook, terminal = io.StringIO(), io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    for stream in (notebook, terminal):
        print("café", file=accidents.Stream(stream), flush=True)
    assert (notebook.getvalue(), terminal.buffer.getvalue()) == ("café\n", b"caf\\xe9\n")


def test_a_killed_loader_and_a_broken_picture_end_the_run(start, folder):
    kill = "os.kill(multiprocessing.active_children()[0].pid, 9) or time.sleep(5)"
    prelude = f"import multiprocessing; third(losses, 'patch_labels', lambda: {kill}, 5)"
    [process] = start("killed", "--workers=1", "--tpa-steps=0", prelude=prelude)
    one_sentence(ends(process, 1), "DataLoader worker", "killed", "--workers 0")
    (folder / "images/train/3.jpg").write_bytes(b"\xff\xd8 no more")
    for [process] in [start(f"{n}", f"--workers={n}") for n in (0, 2)]:
        one_sentence(ends(process, 1), "3.jpg can't be read as an image")


@pytest.mark.filterwarnings("ignore")
def test_broken_files_give_a_result_or_one_sentence(folder, tmp_path, monkeypatch):
    """Ten kinds of harm to five kinds of files."""
    monkeypatch.setattr(model, "TINY", dict(embed_dim=16, vision_cfg=VISION, text_cfg=TEXT))
    tiny = model.build("tiny", 32, 16)
    torch.save(dict(config=tiny.config, model=tiny.state_dict()), tmp_path / "last.pt")
    Image.fromarray(np.zeros((9, 9), np.uint8)).convert("P").save(tmp_path / "mask.tif")
    read = {folder / "images/val/0.jpg": readers.read_image, tmp_path / "last.pt": checkpoint.load,
            folder / "masks/val/0.png": readers.read_mask, folder / "classes.txt": data.read_names,
            tmp_path / "mask.tif": readers.read_mask}
    rng, other, outcomes = np.random.default_rng(0), b"of another kind", []
    for path in read:
        assert read[path](path) is not None
        content, flipped = path.read_bytes(), bytearray(path.read_bytes())
        for place in (*rng.integers(0, len(content), 20), *rng.integers(0, len(content[:60]), 3)):
            flipped[place] ^= 1 << rng.integers(8)
        for harmed in (content[:len(content) // 2], content[:9], content[:-5], flipped, b"", other,
                       flipped[:60] + content[60:], bytes(2000), rng.bytes(500), content * 2):
            path.write_bytes(harmed)
            said = ""
            try:
                read[path](path)
            except UserError as e:
                said = str(e)
            assert said.startswith(str(path) if said else "") and "\n" not in said, harmed[:60]
            outcomes.append(said != "")
        other = content
    assert len(outcomes) == 50 and sum(outcomes) > 30
