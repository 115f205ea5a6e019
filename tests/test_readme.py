"""README and docs against the code: links, the map from paper to code, and every command."""
import re
import shlex
from pathlib import Path

import torch
from PIL import Image

import evaluate
import train
from conftest import ROOT
from study.__main__ import parse as parse_study
from support import checkpoint

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_commands_are_understood():
    """Those of the bash blocks that run Python."""
    parsers = {"train.py": train.parse, "evaluate.py": evaluate.parse, "study": parse_study}
    blocks = re.findall(r"```bash\n(.*?)```", "\n".join(map(Path.read_text, PAGES)), re.DOTALL)
    start, found = re.compile(r"^(?:torchrun (?:--\S+ )+|python (?:-m )?)(.+)", re.MULTILINE), set()
    for command in start.findall("\n".join(blocks)):
        program, *arguments = shlex.split(command, comments=True)
        found.add(program)
        if program in parsers:
            parsers[program](arguments)
        else:  # tests/gpu.py, sources.check, torch.utils.collect_env
            path = ROOT / (program.removesuffix(".py").replace(".", "/") + ".py")
            assert path.is_file() or program.startswith("torch."), program
    assert parsers.keys() <= found


def test_links_lead_somewhere():
    for page in PAGES:
        for text, link in re.findall(r"\[([^\]]*)\]\(([^)\s]+)\)", page.read_text()):
            path, _, place = link.partition("#")
            if "://" in link or link.startswith("#"):
                continue
            target = page.parent / path
            assert target.exists(), f"{page.name}: {link}"
            if re.fullmatch(r"L\d+", place):  # the definition of what the text names
                line = target.read_text().splitlines()[int(place[1:]) - 1]
                name = text.strip("`").rpartition(".")[2]
                assert re.match(rf"\s*(def|class) {name}\b|{name} = ", line), f"{link}: {line}"


def test_the_python_example_runs(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out/coco-stuff").mkdir(parents=True)
    torch.save(dict(config=tiny.config, model=tiny.state_dict()), "out/coco-stuff/last.pt")
    Image.new("RGB", (40, 30), "red").save("photo.jpg")
    scope = {}
    exec(re.search(r"```python\n(.*?)```", PAGES[0].read_text(), re.DOTALL)[1], scope)
    assert scope["labels"].shape == (30, 40) and scope["checkpoint"] is checkpoint
