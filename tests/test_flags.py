"""Flags that are numbers: what they take, and what they say to anything else."""

import argparse

import pytest

from support import flags


@pytest.mark.parametrize(
    "kind, texts, values",
    [
        (flags.positive_int, ("1", "2147483647"), (1, 2**31 - 1)),
        (flags.non_negative_int, ("0", "7"), (0, 7)),
        (flags.positive, ("1e-6", "5e-324", "1e12"), (1e-6, 5e-324, 1e12)),
        (flags.non_negative, ("0", "-0.0", "2.5"), (0, 0, 2.5)),
        (flags.probability, ("0", "0.5", "1"), (0, 0.5, 1)),
        (flags.below_one, ("0", "0.999"), (0, 0.999)),
    ],
)
def test_numbers_in_range_are_taken(kind, texts, values):
    assert tuple(map(kind, texts)) == values
    assert {type(kind(text)) for text in texts} == {type(kind(texts[0]))}


@pytest.mark.parametrize(
    "kind, words, texts",
    [
        (flags.positive_int, "a whole number of at least 1", ("0", "-1", "1.5", "1e3", "one", "")),
        (flags.non_negative_int, "a whole number of at least 0", ("-1", "0.0")),
        (flags.positive, "a number above 0", ("0", "-0.0", "-1", "1e-400", "x")),
        (flags.non_negative, "a number of at least 0", ("-1e-9", "-inf")),
        (flags.probability, "a number from 0 to 1", ("-0.1", "1.0001")),
        (flags.below_one, "a number of at least 0 and below 1", ("-0.1", "1", "1.5")),
    ],
)
def test_others_are_refused_with_value_and_range(kind, words, texts):
    for text in (*texts, "nan"):
        with pytest.raises(argparse.ArgumentTypeError) as e:
            kind(text)
        assert str(e.value) == f"{text} should be {words}"


@pytest.mark.parametrize("kind", [flags.positive_int, flags.non_negative_int])
@pytest.mark.parametrize("text", [str(2**31), "9" * 400])
def test_whole_numbers_have_an_end(kind, text):
    with pytest.raises(argparse.ArgumentTypeError, match=r", and at most 2147483647$"):
        kind(text)


@pytest.mark.parametrize("kind", [flags.positive, flags.non_negative])
@pytest.mark.parametrize("text", ["1.1e12", "1e999", "inf"])
def test_numbers_have_an_end(kind, text):
    with pytest.raises(argparse.ArgumentTypeError, match=r", and at most 1000000000000$"):
        kind(text)


def test_what_a_user_sees(capsys):
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=flags.positive_int)
    with pytest.raises(SystemExit):
        parser.parse_args(["--steps", "-1"])
    expected = "argument --steps: -1 should be a whole number of at least 1\n"
    assert capsys.readouterr().err.endswith(expected)
