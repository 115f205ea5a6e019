"""README.md and docs/: what they name exists, their commands parse, their Python runs, and their
figures are those of the raw results."""

import ast
import json
import pkgutil
import re
import shlex

import pytest
import torch
from PIL import Image

import data
import sources.check
import study.__main__
import train
from conftest import ROOT, visible
from support.command_line import parse_evaluation

README = (ROOT / "README.md").read_text()
PAGES = {"README.md": README}
for page in sorted((ROOT / "docs").glob("*.md")):
    PAGES[f"docs/{page.name}"] = page.read_text()
MAP_LINK = re.compile(r"\[`(\w+)`\]\(([\w/]+\.py)#L(\d+)\)")
COMMAND = re.compile(
    r"(?:python|torchrun(?P<launcher>(?: --\S+)+)) "
    r"(?P<program>\w+\.py|tests/\w+\.py|-m [\w.]+)(?P<flags>[^`\n]*)"
)


def commands(program):
    """[(flags of torchrun, flags)] of every command in the pages that starts this program."""
    found = set()
    for text in PAGES.values():
        for match in COMMAND.finditer(text.replace("\\\n", " ")):
            if match["program"] == program and "--help" not in match["flags"]:
                flags = match["flags"].partition("#")[0].strip()
                found.add((match["launcher"] or "", flags))
    assert found, program
    return sorted(found)


def definitions(file):
    """{name: (first line, last line)} of the functions and classes of a Python file."""
    tree = ast.parse((ROOT / file).read_text())
    return {
        node.name: (node.lineno, node.end_lineno)
        for node in tree.body
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
    }


def test_the_readme_is_short():
    lines = README.splitlines()
    assert len(lines) <= 130
    prose = [line for line in lines if not line.startswith("|") and "](" not in line]
    assert max(map(len, prose)) <= 160


def test_the_map_points_at_what_it_names():
    links = MAP_LINK.findall(README)
    assert len(links) >= 20
    wrong = []
    for name, file, line in links:
        first, _ = definitions(file).get(name, ("no such function", None))
        if str(first) != line:
            wrong.append(f"{name}: {file}#L{line} should be #L{first}")
    assert not wrong, "\n".join(wrong)


def test_the_method_is_as_long_as_the_readme_says():
    count = 0
    for file in ("losses.py", "ema.py", "tpa.py"):
        count += len((ROOT / file).read_text().splitlines())
    for name in ("step_losses", "weigh_by_process", "joint_training"):
        first, last = definitions("train.py")[name]
        count += last - first + 1
    assert f"**The method is {count} lines**" in README, count


@pytest.mark.parametrize("page", PAGES)
def test_every_file_that_is_named_exists(page):
    for file in re.findall(r"(?<![\w/*.-])((?:\w+/)*\w+\.(?:py|md))\b", PAGES[page]):
        if file != "NAME.md":
            assert (ROOT / file).is_file() or (ROOT / page).with_name(file).is_file(), file
    for file in re.findall(r"sources/classes/[\w-]+\.txt", PAGES[page]):
        assert file.endswith("/NAME.txt") or (ROOT / file).is_file(), file


def anchors(text):
    """GitHub's anchors of the headings in a page."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_every_link_and_picture_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", PAGES[page]):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.is_file(), target
        if anchor and file.suffix == ".md":
            assert anchor in anchors(file.read_text()), target


def test_every_page_and_picture_is_linked():
    rows = "\n".join(line for line in README.splitlines() if line.startswith("|"))
    for page in PAGES:
        assert page == "README.md" or f"({page}" in rows, page
    everything = "\n".join(PAGES.values())
    for folder, pattern in (("docs", "*.png"), ("docs/results", "*.jsonl")):
        for file in (ROOT / folder).glob(pattern):
            assert f"{file.name})" in everything, file


@pytest.mark.parametrize("page", PAGES)
def test_every_name_that_is_given_with_its_module_exists(page):
    modules = r"train|model|losses|data|ema|evaluate|tpa|sources|support|study"
    for dotted in re.findall(rf"`((?:{modules})(?:\.\w+)+)(?:\(.*?\))?`", PAGES[page]):
        if not dotted.endswith(".py"):
            pkgutil.resolve_name(dotted)


@pytest.mark.parametrize("launcher, flags", commands("train.py"))
def test_training_commands_parse(launcher, flags, monkeypatch):
    processes = re.search(r"--nproc_per_node=(\d+)", launcher)
    if processes:
        monkeypatch.setenv("WORLD_SIZE", processes[1])
    args = train.parse(shlex.split(flags))
    tiny = args.dataset == "toy" or "--clip tiny" in flags
    assert args.clip == ("tiny" if tiny else "ViT-B-16-quickgelu")
    if "--out" not in flags:
        name = args.dataset.removeprefix("folder:")
        assert args.out == f"out/{name}"
    if args.init_cat_seg:
        assert args.pretrained == "none"


def test_the_main_command_is_the_one_in_the_readme():
    assert "`torchrun --nproc_per_node=8 train.py --dataset coco-stuff`" in README


@pytest.mark.parametrize("_, flags", commands("evaluate.py"))
def test_evaluation_commands_parse(_, flags):
    args = parse_evaluation("", data.NAMES, data.REPORTED, shlex.split(flags))
    assert args.checkpoint and (args.image is None or args.classes)


@pytest.mark.parametrize("_, flags", commands("-m study"))
def test_study_commands_parse(_, flags):
    args = study.__main__.parse(shlex.split(flags))
    for name, value in zip(args.further[::2], args.further[1::2]):
        train.parse([name, value])


@pytest.mark.parametrize("_, flags", commands("-m sources.check"))
def test_check_commands_parse(_, flags, monkeypatch):
    checked = []
    monkeypatch.setattr(sources.check, "check", lambda name, *_: checked.append(name) or True)
    monkeypatch.setattr("sys.argv", ["check", *shlex.split(flags)])
    with pytest.raises(SystemExit) as end:
        sources.check.main()
    assert not end.value.code and set(checked) <= {*data.NAMES, "NAME"}


@pytest.mark.parametrize("program", ["tests/bench.py", "tests/gpu.py", "tests/survive.py"])
def test_flags_of_scripts_exist(program):
    source = (ROOT / program).read_text()
    for _, flags in commands(program):
        for word in shlex.split(flags):
            assert word.isdecimal() or f'"{word}"' in source, f"{program} {flags}"


@pytest.mark.parametrize("page", PAGES)
def test_flags_exist(page, capsys):
    """Every --flag in backticks, with or without a value, is one of some program's."""
    known = (ROOT / "tests/bench.py").read_text()
    for parse in (train.parse, lambda argv: parse_evaluation("", (), (), argv)):
        with pytest.raises(SystemExit):
            parse(["--help"])
        known += capsys.readouterr().out
    known += (ROOT / "study/__main__.py").read_text() + (ROOT / "sources/check.py").read_text()
    for flag in re.findall(r"`(--[a-z][a-z-]*)", PAGES[page]):
        assert re.search(rf"{flag}\b", known), flag


def test_the_python_example_runs(tiny, tmp_path, monkeypatch):
    [code] = re.findall(r"```python\n(.*?)```", "\n".join(PAGES.values()), re.DOTALL)
    checkpoint = tmp_path / "out" / "coco-stuff" / "last.pt"
    checkpoint.parent.mkdir(parents=True)
    torch.save(dict(config=tiny.config, model=tiny.state_dict()), checkpoint)
    Image.new("RGB", (90, 70), "red").save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    scope = {}
    exec(code, scope)
    assert scope["labels"].shape == (70, 90) and scope["labels"].max() < 3


def test_the_diagram_names_every_equation():
    diagram = re.search(r"```mermaid\n(flowchart .*?)```", README, re.DOTALL)[1]
    for name in ("L_SEG", "Eq. (1)", "Eq. (2)", "Eq. (3), (4)", "Eq. (5)", "Eq. (6)"):
        assert name in diagram, name
    for line in diagram.splitlines()[1:]:
        labels = re.sub(r'"[^"]*"', "", line)  # outside quotes, parentheses are syntax
        assert "^" not in labels and labels.count("[") == labels.count("]"), line


def mean_scores(name):
    """{row: its mean seen, unseen and harmonic mIoU, "a / b / c"} of docs/results/NAME.jsonl."""
    runs = {}
    for line in (ROOT / f"docs/results/{name}.jsonl").read_text().splitlines():
        run = json.loads(line)
        runs.setdefault(run["row"], []).append(run)
    means = {}
    for row, some in runs.items():
        scores = [sum(r[key] for r in some) / len(some) for key in ("seen", "unseen", "harmonic")]
        means[row] = " / ".join(f"{score:.1f}" for score in scores)
    return means


def table_row(text, first):
    """The cells behind the first one of the table row that begins so."""
    [line] = re.findall(rf"^\| {re.escape(first)} +\|(.*)\|$", text, re.MULTILINE)
    return [cell.strip() for cell in line.split("|")]


def test_tables_of_results_are_those_of_the_raw_runs():
    first, results = PAGES["docs/first-world.md"], PAGES["docs/results.md"]
    worlds, _, rest = first.partition("## Each method over")
    rates_of_clip, _, recipe = rest.partition("## How the recipe was chosen")
    tuned, _, fresh = results.partition("## The comparison")
    fresh, _, others = fresh.partition("Against RPMD")
    sections = {s.partition("\n")[0]: s for s in others.split("\n## ")}
    parts = {"first-ablate": worlds, "first-sweep": recipe, "tune": tuned, "ablate": fresh}
    parts["parts"] = sections["Each part left out"]
    parts["momentum"] = sections["What momentum does over time"]
    rates_now = sections["Each method over learning rates"]
    for name, part in parts.items():
        for row, scores in mean_scores(name).items():
            means = [cell.partition(" ± ")[0] for cell in table_row(part, row)[:3]]
            assert " / ".join(means) == scores, row
    old = ("plain fine-tuning", "RPMD, frozen teacher", "RPMD: + SPD + CPA + TPA")
    new = ("plain fine-tuning", "pooled distillation", "RPMD with a frozen teacher", "RPMD")
    for name, table, methods, rates in (
        ("first-curve", rates_of_clip, old, ("0.03", "0.1", "0.2", "0.5", "1")),
        ("curve", rates_now, new, ("0.03", "0.1", "0.3", "0.6", "1")),
    ):
        curve = mean_scores(name)
        for method in methods:
            expected = [curve[f"{method}, {rate}"] for rate in rates]
            assert table_row(table, method) == expected, method


def test_the_table_in_the_readme_is_that_of_the_raw_runs():
    found = mean_scores("ablate")
    results = README.partition("## Results")[2]
    rows = re.findall(r"^\| ([^|]+) \| ([\d.]+ / [\d.]+ / [\d.]+) ", results, re.MULTILINE)
    assert len(rows) > 5
    for row, scores in rows:
        assert found[row] == scores, row


def test_the_main_job_from_start_to_end(tmp_path, monkeypatch, capsys):
    """`python train.py` on the toy world, with an untrained CLIP and few steps."""
    monkeypatch.setattr("sources.toy.SPLIT_SIZES", {"train": 32, "val": 40})
    flags = "--pretrained none --steps 3 --tpa-steps 1 --channels 16"
    train.train(train.parse(["--out", str(tmp_path), *flags.split()]))
    out = capsys.readouterr().out
    assert "| seen | unseen | harmonic |" in out and "CLIP, zero-shot" in out
    assert "drift from the original CLIP" in out
    files = {"last.pt", "log.jsonl", "results.json", "curves.png", "examples.png"}
    assert visible(tmp_path) == files
    with Image.open(tmp_path / "examples.png") as picture:
        assert picture.width == 6 * 200 + 8 and picture.height > 6 * 200
