"""``python -m loracc`` and the ``loracc`` script."""

from __future__ import annotations

import gc
import io
import os
import sys

from loracc.interrupts import catch_interrupts, ignore_interrupts

__all__ = ["main"]

_INTERRUPTED = 130


def main() -> None:
    """Run the command line and exit with its code."""
    # What the imports make stays until the end: looking through it again and again takes a tenth of a short run.
    gc.set_threshold(100_000)
    try:
        catch_interrupts()
        _three_streams()
        from loracc.cli import run

        code = run()
    except KeyboardInterrupt:  # before the command line was there to catch it
        code = _INTERRUPTED
    _undisturbed(interrupted=code == _INTERRUPTED)
    sys.exit(code)


def _undisturbed(*, interrupted: bool) -> None:
    """What is done is done: a signal from here on would end the process with another code than the work's."""
    ignore_interrupts()
    if interrupted:
        import ctypes

        # An interrupt that comes while a library runs Python code of its own leaves a mark in CPython, by which it ends
        # itself with SIGINT in place of our exit code. Running any code takes the mark away.
        ctypes.pythonapi.PyRun_SimpleString(b"")


def _three_streams() -> None:
    """Standard streams that are there and take every character.

    Where one is closed, the next file that is opened gets its number, and a library's log would be written into it.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free: this one
            setattr(sys, name, open(number, "w" if number else "r", encoding="utf-8", closefd=False))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


if __name__ == "__main__":
    main()
