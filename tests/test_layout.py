"""The house: seven files and three folders, imports that all point one way, lines that fit."""

import ast

import pytest
from conftest import ROOT

SEVEN = ("train", "model", "losses", "data", "ema", "evaluate", "tpa")
FOLDERS = ("sources", "support", "study")
# A file imports only from rooms to the right of its own, or from its own; the ground knows nothing.
ORDER = ("train", "study", "evaluate", "data", "sources", "support", "tpa", "ground")
GROUND = ("model", "losses", "ema")
CODE = [ROOT / f"{name}.py" for name in SEVEN]
CODE += [path for folder in FOLDERS for path in sorted((ROOT / folder).glob("*.py"))]


def room(module):
    """The room in which `support.runs` or `losses` lives; None for what is not ours."""
    first = module.split(".")[0]
    if first in GROUND:
        return "ground"
    return first if first in ORDER else None


def imported(path):
    """The modules of this project that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path} has a relative import"
            found |= {node.module, *(f"{node.module}.{name.name}" for name in node.names)}
    return {module for module in found if room(module)}


def modules():
    names = {path: path.relative_to(ROOT).with_suffix("").as_posix() for path in CODE}
    return {name.replace("/", "."): path for path, name in names.items()}


def test_on_top_are_the_seven_and_three_folders():
    assert {path.stem for path in ROOT.glob("*.py")} == set(SEVEN)
    ours = {path.parent.name for path in ROOT.glob("[!.]*/*.py")}
    assert ours - {"tests", "out", "venv"} == set(FOLDERS)


@pytest.mark.parametrize("name", sorted(modules()))
def test_imports_point_one_way(name):
    own = room(name)
    for module in imported(modules()[name]):
        if own == "ground":
            raise AssertionError(f"{name} imports {module}")
        allowed = ORDER[ORDER.index(own) + 1 :] if own in SEVEN else ORDER[ORDER.index(own) :]
        assert room(module) in allowed, f"{name} imports {module}"


def test_there_are_no_circles():
    files = modules()
    graph = {name: imported(path) & files.keys() for name, path in files.items()}
    while graph:
        free = [name for name, needs in graph.items() if not needs & graph.keys()]
        assert free, f"a circle among {sorted(graph)}"
        for name in free:
            del graph[name]


def test_every_line_fits():
    files = [*ROOT.glob("*.py"), *ROOT.glob("[!.v]*/*.py")]
    assert len(files) > 40
    for path in files:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            assert len(line) <= 100, f"{path}:{number} has {len(line)} columns"


def test_the_method_reads_at_one_sitting():
    count = {path: len(path.read_text().splitlines()) for path in CODE}
    assert sum(count[ROOT / f"{name}.py"] for name in SEVEN) <= 1516
    assert sum(count.values()) <= 4220
    for name in SEVEN:
        for node in ast.walk(ast.parse((ROOT / f"{name}.py").read_text())):
            if isinstance(node, ast.FunctionDef):
                length = node.end_lineno - node.lineno + 1
                assert length <= 60, f"{name}.{node.name} has {length} lines"
