"""The house: seven files and three folders, and imports that all point one way."""
import ast

import pytest
from conftest import ROOT

SEVEN = {"train", "model", "losses", "data", "ema", "evaluate", "tpa"}
# A room imports only from rooms after its own; files of a folder also from each other.
ORDER = ("sources.check", "study", "train", "evaluate", "tpa", "data", "sources", "support",
         "model", "ema", "losses")
FILES = {str(path.relative_to(ROOT).with_suffix("")).replace("/", "."): path
         for path in (*ROOT.glob("*.py"), *ROOT.glob("s*/*.py"))}


def room(module):
    return module if module == "sources.check" else module.split(".")[0]  # check is a script


def imported(nodes):
    """The modules that these statements import, or other ones inside them."""
    modules = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return modules


def test_on_top_are_the_seven_and_three_folders():
    assert {path.stem for path in ROOT.glob("*.py")} == SEVEN
    folders = {path.parent.name for path in ROOT.glob("[!.]*/*.py")} - {"tests", "out", "venv"}
    assert folders == {"sources", "support", "study"}


@pytest.mark.parametrize("name", FILES)
def test_imports_point_one_way(name):
    own = room(name)
    for module in imported(ast.walk(ast.parse(FILES[name].read_text()))):
        if room(module) in ORDER:
            downwards = ORDER.index(room(module)) > ORDER.index(own)
            assert downwards or own == room(module) and own not in SEVEN, f"{name}: {module}"
            assert own not in {"model", "ema", "losses"} and room(module) != "train"


def test_training_imports_nothing_that_it_may_not_need():
    """Only what a function imports is read when the function is called."""
    modules, waiting = set(), {"train"}
    while waiting:
        modules |= waiting
        trees = [ast.parse(FILES[name].read_text()) for name in waiting & FILES.keys()]
        waiting = imported(node for tree in trees for node in tree.body) - modules
    assert {"evaluate", "support.accidents"} <= modules
    unneeded = ("matplotlib", "study", "sources", "support.pictures")
    assert not {module for module in modules if module.startswith(unneeded)}
