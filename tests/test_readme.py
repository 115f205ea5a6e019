"""README and docs against the code: links, the map from paper to code, and every command."""
import re
import shlex

import torch
from PIL import Image

import evaluate
import train
from conftest import ROOT
from study.__main__ import parse as parse_study
from support import checkpoint

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
README = PAGES[0].read_text()


def commands():
    """(program, arguments) of every command in the pages' bash blocks."""
    text = "\n".join(page.read_text() for page in PAGES)
    for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL):
        for line in block.splitlines():
            line = re.sub(r"^torchrun (?:--\S+ )+|^python (-m )?", "run ", line)
            if line.startswith("run "):
                program, *arguments = shlex.split(line, comments=True)[1:]
                yield program, arguments


def test_commands_are_understood():
    parsers = {"train.py": train.parse, "evaluate.py": evaluate.parse, "study": parse_study}
    found = list(commands())
    assert parsers.keys() <= {program for program, _ in found}
    for program, arguments in found:
        if program in parsers:
            parsers[program](arguments)
        else:  # tests/gpu.py, sources.check, torch.utils.collect_env
            path = ROOT / (program.removesuffix(".py").replace(".", "/") + ".py")
            assert path.is_file() or program.startswith("torch."), program


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


def test_every_equation_is_in_the_map():
    for function in ("patch_labels", "correctly_classified", "spd_loss", "class_reference_masks",
                     "class_prototypes", "contrast_mask", "cpa_loss", "total_loss",
                     "segmentation_loss", "MomentumEncoder", "pre_align", "step_losses"):
        assert re.search(rf"\| \[`{function}`\]\(\w+\.py#L\d+\)", README), function


def test_the_python_example_runs(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out/coco-stuff").mkdir(parents=True)
    torch.save(dict(config=tiny.config, model=tiny.state_dict()), "out/coco-stuff/last.pt")
    Image.new("RGB", (40, 30), "red").save("photo.jpg")
    scope = {}
    exec(re.search(r"```python\n(.*?)```", README, re.DOTALL)[1], scope)
    assert scope["labels"].shape == (30, 40) and scope["checkpoint"] is checkpoint


def test_the_help_says_what_a_run_writes():
    for name in ("last.pt", "log.jsonl", "results.json", "curves.png", "examples.png"):
        assert name in train.__doc__
