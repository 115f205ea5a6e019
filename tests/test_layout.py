"""The house: seven files and three folders, and imports that all point one way."""
import ast
import subprocess
import sys

import pytest
from conftest import ROOT

SEVEN = {"train", "model", "losses", "data", "ema", "evaluate", "tpa"}
# A room imports only from rooms after its own; files of a folder also from each other.
ORDER = ("sources.check", "study", "train", "evaluate", "tpa", "data", "sources", "support",
         "model", "ema", "losses")
GROUND = {"model", "ema", "losses"}
FILES = {str(path.relative_to(ROOT).with_suffix("")).replace("/", "."): path
         for path in (*ROOT.glob("*.py"), *ROOT.glob("s*/*.py"))}


def room(module):
    return module if module == "sources.check" else module.split(".")[0]  # check is a script


def imported(name):
    """The modules of this project that a file imports, anywhere in it."""
    modules = set()
    for node in ast.walk(ast.parse(FILES[name].read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name} has a relative import"
            modules |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {module for module in modules if room(module) in ORDER}


def test_on_top_are_the_seven_and_three_folders():
    assert {path.stem for path in ROOT.glob("*.py")} == SEVEN
    folders = {path.parent.name for path in ROOT.glob("[!.]*/*.py")} - {"tests", "out", "venv"}
    assert folders == {"sources", "support", "study"}


@pytest.mark.parametrize("name", FILES)
def test_imports_point_one_way(name):
    own = room(name)
    for module in imported(name):
        assert own not in GROUND, f"{name} imports {module}"
        downwards = ORDER.index(room(module)) > ORDER.index(own)
        assert downwards or own == room(module) and own not in SEVEN, f"{name} imports {module}"
        assert room(module) != "train"


def test_there_are_no_circles():
    graph = {name: imported(name) & FILES.keys() for name in FILES}
    while graph:
        free = [name for name, needs in graph.items() if not needs & graph.keys()]
        assert free, f"a circle among {sorted(graph)}"
        for name in free:
            del graph[name]


def test_training_imports_nothing_that_it_may_not_need():
    code = "import sys, train; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    modules = set(done.stdout.split())
    assert "evaluate" in modules, done.stderr
    unneeded = {"matplotlib", "study", "support.pictures", "sources.toy", "sources.tiny_clip"}
    assert not modules & unneeded


def test_every_line_fits():
    for path in (*FILES.values(), *ROOT.glob("tests/*.py")):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            assert len(line) <= 100, f"{path}:{number} has {len(line)} columns"
