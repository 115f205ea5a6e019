"""How a program ends when it is asked to. Import this first: the rest takes seconds to import."""
import contextlib
import os
import signal
import sys
from pathlib import Path

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interruption:
    """Ctrl-C, SIGTERM and SIGHUP ask for a stop after the running step, and a second Ctrl-C ends
    the process; where nothing is lost (at_once), they raise KeyboardInterrupt."""

    def __init__(self, at_once=False):
        self.asked = False
        self.at_once = at_once
        answer(self.ask)

    def ask(self, number, frame):
        if self.at_once:
            raise KeyboardInterrupt
        if self.asked and number == signal.SIGINT:
            end_here(number, frame)
        self.asked = True

    @contextlib.contextmanager
    def immediate(self, at_once):
        """Around what can be repeated, and so cut short anywhere (True), or between steps only."""
        before, self.at_once = self.at_once, at_once
        if at_once and self.asked:
            raise KeyboardInterrupt
        yield
        self.at_once = before


def end_here(number, frame):
    """No exception: it would tear a backward pass apart, and the interpreter with it."""
    os.write(2, b"stopped\n")
    os._exit(130)


def answer(handler):
    """Have the signals answered, but for those that nohup or a shell's & has had ignored."""
    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)


def ignore():
    """At the end of a program, lest one more of them changes its exit status."""
    if IN_CHARGE:
        answer(signal.SIG_IGN)


program = Path(getattr(sys.modules["__main__"], "__file__", "")).name
IN_CHARGE = program in ("train.py", "evaluate.py")
if IN_CHARGE:
    answer(end_here)
