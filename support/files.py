"""Files and flags: one-sentence errors for bad ones, and atomic writes."""
import argparse
import contextlib
import hashlib
import json
import math
import os
import pickle
import secrets


class UserError(ValueError):
    """An error that the user can fix: a bad file or flag, a full disk. Its message is one sentence
    that names the cause, printed without a traceback (`accidents.door`)."""


@contextlib.contextmanager
def reading(path, kind):
    """Turn any exception raised while reading `path` into a UserError that says it is no `kind`."""
    try:
        if os.path.exists(path) and not os.path.isfile(path):
            raise ValueError("it is not a regular file")  # a pipe would block for ever
        yield
    except Exception as e:
        if isinstance(e, UserError) and str(path) in str(e):
            raise
        message = " ".join(str(e).split()) or type(e).__name__
        if isinstance(e, KeyError):
            message = f"there is no {message} in it"
        if isinstance(e, pickle.UnpicklingError):  # torch's message advises weights_only=False
            message = "it is damaged, or holds more than tensors, numbers and text"
        raise UserError(f"{path} can't be read as {kind} ({message[:300]})") from e


@contextlib.contextmanager
def replacing(path):
    """Yields a binary file that replaces `path` atomically: it is written under another name,
    flushed to the disk and renamed. Makes the folder if need be. Raises UserError."""
    temporary = path.with_name(f".{secrets.token_hex(8)}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, RuntimeError) as e:
        cause = e
        if isinstance(e, RuntimeError) and isinstance(e.__context__, OSError):  # from torch.save
            cause = e.__context__
        raise UserError(f"{path} can't be written ({' '.join(str(cause).split())[:300]})") from e
    finally:
        with contextlib.suppress(OSError):  # it has been renamed, or the disk is read-only
            temporary.unlink()


def digest(path):
    """The SHA-256 of a file, None where there is none. Raises UserError."""
    if path is None or not os.path.isfile(path):
        return None
    with reading(path, "a file"), open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(contents, path):
    """Write a JSON file. Returns the path. Raises UserError."""
    with replacing(path) as file:
        file.write(json.dumps(contents, indent=1).encode())
    return path


def number(kind, low, high=math.inf):
    """A `type` for argparse: an int or a float (kind) from low to high."""
    def parse(text):
        value = kind(text)
        if not low <= value <= high or math.isinf(value):  # NaN is in no range
            limits = f"from {low} to {high}" if math.isfinite(high) else f"of at least {low}"
            raise argparse.ArgumentTypeError(f"{text} should be a number {limits}")
        return value

    parse.__name__ = "whole number" if kind is int else "number"  # argparse: invalid number value
    return parse
