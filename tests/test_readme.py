"""The README: its map points at what it names, its commands parse, its Python runs."""
import re
import shlex

import pytest
import torch
from PIL import Image

import train
from conftest import ROOT

TEXT = (ROOT / "README.md").read_text()


def test_the_map_points_at_what_it_names():
    links = re.findall(r"\[`(\w+)`\]\(([\w/]+\.py)#L(\d+)\)", TEXT)
    assert len(links) >= 20
    for name, file, line in links:
        found = (ROOT / file).read_text().splitlines()[int(line) - 1]
        assert re.match(rf"(def|class) {name}\b", found), f"{file}:{line} is {found!r}, not {name}"


def test_every_file_that_is_named_exists():
    for file in re.findall(r"\b(?:tests/)?\w+\.py\b", TEXT):
        assert (ROOT / file).is_file(), file
    for picture in re.findall(r"!\[.*?\]\((\S+)\)", TEXT):
        assert (ROOT / picture).is_file(), picture


@pytest.mark.parametrize("command", sorted(set(re.findall(r"(?:python|torchrun \S+) train\.py([^`\n]*)", TEXT)) - {" --help"}))
def test_training_commands_parse(command, monkeypatch):
    monkeypatch.setattr("sys.argv", ["train.py", *shlex.split(command.replace("...", "").split("#")[0])])
    args = train.parse()
    assert args.clip == ("tiny" if args.dataset == "toy" else "ViT-B-16-quickgelu")
    if args.init_cat_seg:
        assert args.pretrained == "none"


def test_the_python_example_runs(tiny, tmp_path, monkeypatch):
    code = re.search(r"```python\n(.*?)```", TEXT, re.S)[1]
    (tmp_path / "coco").mkdir()
    torch.save(dict(config=tiny.config, model=tiny.state_dict()), tmp_path / "coco" / "last.pt")
    Image.new("RGB", (90, 70), "red").save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    scope = {}
    exec(code, scope)
    assert scope["labels"].shape == (70, 90) and scope["labels"].max() < 3


def test_the_main_job_from_start_to_end(tmp_path, monkeypatch, capsys):
    """`python train.py` on the toy world, with an untrained CLIP and few steps."""
    monkeypatch.setattr("sys.argv", ["train.py", "--out", str(tmp_path), "--pretrained", "none", "--steps", "3", "--tpa-steps", "1", "--channels", "16"])
    monkeypatch.setattr("toy.SPLIT_SIZES", {"train": 32, "val": 40})
    train.train(train.parse(), 0, 1, torch.device("cpu"))
    out = capsys.readouterr().out
    assert "| seen | unseen | harmonic |" in out and "CLIP, zero-shot" in out and "drift from the original CLIP" in out
    assert {p.name for p in tmp_path.iterdir()} == {"last.pt", "log.jsonl", "results.json", "curves.png", "examples.png"}
    with Image.open(tmp_path / "examples.png") as picture:
        assert picture.width == 6 * 200 + 8 and picture.height > 6 * 200
