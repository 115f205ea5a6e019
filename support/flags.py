"""Numbers in flags: types for argparse that take a range and say it when a value lies outside."""
import argparse
import math
from functools import partial


def number(text, kind, low, words, high=math.inf):
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


positive_int = partial(number, kind=int, low=1, words="a whole number of at least 1")
non_negative_int = partial(number, kind=int, low=0, words="a whole number of at least 0")
positive = partial(number, kind=float, low=math.ulp(0.0), words="a number above 0")
non_negative = partial(number, kind=float, low=0, words="a number of at least 0")
probability = partial(number, kind=float, low=0, high=1, words="a number from 0 to 1")
below_one = partial(number, kind=float, low=0, high=math.nextafter(1, 0),
                    words="a number of at least 0 and below 1")
