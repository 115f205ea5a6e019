"""Numbers in flags: types for argparse that take a range and say it when a value lies outside."""
import argparse
import math


def number(text, kind, words, low, high=math.inf):
    """The int or float (kind) in a text, low and high included, never NaN or absurdly large."""
    largest = 2**31 - 1 if kind is int else 10**12
    try:
        value = kind(text)
    except ValueError:
        value = math.nan
    if low <= value <= min(high, largest):
        return value
    if value > largest:
        words = f"{words}, and at most {largest}"
    raise argparse.ArgumentTypeError(f"{text} should be {words}")


def positive_int(text):
    return number(text, int, "a whole number of at least 1", 1)


def non_negative_int(text):
    return number(text, int, "a whole number of at least 0", 0)


def positive(text):
    return number(text, float, "a number above 0", math.ulp(0.0))


def non_negative(text):
    return number(text, float, "a number of at least 0", 0)


def probability(text):
    return number(text, float, "a number from 0 to 1", 0, 1)


def below_one(text):
    return number(text, float, "a number of at least 0 and below 1", 0, math.nextafter(1, 0))
