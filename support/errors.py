"""A user's mistake as a sentence that names the path or the flag. It is shown without a traceback
(`runs.one_sentence_for_errors`); every other exception is the project's mistake, and keeps its."""
import contextlib
import os


class UserError(ValueError):
    """What the user can mend: data, a checkpoint, a flag, a disk. Its text is one sentence."""


def first_line(error):
    """The first line of an exception's text, cut to 300 characters, or the exception's name."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


@contextlib.contextmanager
def reading(path, kind, why=None):
    """Whatever a broken or foreign file makes a library raise becomes a UserError that names it.
    why: said in place of the library's words, unless they tell which tensors do not fit."""
    try:
        yield
    except ImportError as e:
        raise UserError(f"{path} needs a package to be read: pip install {e.name}") from e
    except Exception as e:
        if isinstance(e, UserError) and str(path) in str(e):
            raise
        said = " ".join(str(e).split()) or type(e).__name__
        unfit = said.startswith("Error(s) in loading state_dict")
        if why and not unfit and not isinstance(e, PermissionError):
            said = why
        elif isinstance(e, KeyError):
            said = f"there is no {e} in it"
        raise UserError(f"{path} can't be read as {kind} ({said[:200]})") from e


@contextlib.contextmanager
def writing(path, errors=OSError):
    """Gives the path; what goes wrong while it is written becomes a UserError that names it."""
    try:
        yield path
    except errors as e:
        raise UserError(f"{path} can't be written to ({first_line(e)})") from e


@contextlib.contextmanager
def replacing(path):
    """Gives a binary file that becomes `path` whole or not at all: written under another name, down
    to the disk, then renamed. Raises UserError."""
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        with writing(path, (OSError, RuntimeError)):  # torch.save raises either
            with temporary.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
    finally:
        with contextlib.suppress(OSError):  # it is gone, or the disk has become read-only
            temporary.unlink()
