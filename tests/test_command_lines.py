"""Every number on every command line has a range, which is said before anything is loaded."""

import argparse
import sys

import pytest

import data
import train
from sources import check
from study import compare
from study.__main__ import parse as parse_study
from support import flags
from support.command_line import parse_evaluation

KINDS = [kind for kind in vars(flags).values() if callable(kind)]
BAD = ("-1", "0", "nan", "inf", "-inf", "1e300", "9" * 40, "", "x", "1,5")


def parse_check(argv):
    sys.argv = ["check", *argv]
    check.main()


COMMANDS = {
    "train": (train.parse, []),
    "evaluate": (
        lambda v: parse_evaluation("", data.NAMES, data.REPORTED, v),
        ["--checkpoint", "x"],
    ),
    "check": (parse_check, ["toy"]),
    "study pictures": (parse_study, ["pictures", "--checkpoint", "x"]),
    "study shift": (parse_study, ["shift", "--checkpoints", "x"]),
    **{f"study {table}": (parse_study, [table]) for table in compare.TABLES},
}


class Parsed(Exception):
    """The command line was taken; what follows would load."""


def numeric(monkeypatch, parse, required):
    """The actions of the (sub)parser that reads the command line and have a type."""
    seen, known = [], argparse.ArgumentParser.parse_known_args

    def watch(self, args=None, namespace=None):
        seen.append(self)
        return known(self, args, namespace)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", watch)
    with pytest.raises(SystemExit):
        parse([*required, "--help"])
    return [action for action in seen[-1]._actions if action.type is not None]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_number_has_a_range(name, monkeypatch, capsys):
    parse, required = COMMANDS[name]
    actions = numeric(monkeypatch, parse, required)
    assert actions and all(action.type in KINDS for action in actions)
    for action in actions:
        flag = action.option_strings[0]
        for text in BAD:
            try:
                action.type(text)
                continue  # a value that may be: 0 where that means none
            except argparse.ArgumentTypeError:
                pass
            capsys.readouterr()
            with pytest.raises(SystemExit) as e:
                parse([*required, f"{flag}={text}"])
            said = capsys.readouterr().err.strip().splitlines()[-1]
            assert e.value.code == 2 and f"argument {flag}: {text} should be" in said, said


def test_a_folder_is_called_by_its_own_name(monkeypatch, tmp_path):
    (tmp_path / "cars/train").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "cars/train")
    for path, name in ((".", "train"), ("..", "cars"), (tmp_path / "cars/", "cars")):
        assert train.parse(["--dataset", f"folder:{path}"]).out == f"out/{name}"
    assert train.parse(["--dataset", "toy:3"]).out == "out/toy-3"


@pytest.mark.parametrize(
    "words",
    ["--tau -1", "--tau inf", "--tau 0", "--lambda-spd -1", "--clip-grad 0", "--save-every -1"]
    + ["--steps -5", "--steps 0", "--lr -1", "--alpha 2", "--seed -1", "--accumulate 0"],
)
def test_what_was_accepted_once(words, capsys):
    flag, value = words.split()
    with pytest.raises(SystemExit):
        train.parse([flag, value])
    assert f"argument {flag}: {value} should be" in capsys.readouterr().err
