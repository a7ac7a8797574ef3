"""Ctrl-C and SIGTERM as ``KeyboardInterrupt``, but never in the middle of an import.

An exception that Python raises inside an import may be swallowed there (in the callback of a module's lock), or meet an
extension module that is half initialized and ends the process with a segmentation fault, before anything of ours could
clean up. So a signal that comes during an import comes again a little later.
"""

from __future__ import annotations

import signal
from types import FrameType

__all__ = ["catch_interrupts", "ignore_interrupts", "interrupt"]

_AGAIN_AFTER = 0.02  # seconds
_IMPORTING = "<frozen importlib."


def catch_interrupts() -> None:
    """Install :func:`interrupt` for SIGINT and SIGTERM, where they are not ignored; in the main thread only."""
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:  # a shell's background job, nohup
            signal.signal(number, interrupt)


def ignore_interrupts() -> None:
    """From here on nothing interrupts, and what waited for an import is forgotten; in the main thread only."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_REAL, 0)


def interrupt(_number: int, frame: FrameType | None) -> None:
    """The handler: raises ``KeyboardInterrupt``, now or when the import that is going on is over."""
    if hasattr(signal, "setitimer") and _in_import(frame):
        signal.signal(signal.SIGALRM, interrupt)
        signal.setitimer(signal.ITIMER_REAL, _AGAIN_AFTER)
        return
    raise KeyboardInterrupt


def _in_import(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith(_IMPORTING):
            return True
        frame = frame.f_back
    return False
