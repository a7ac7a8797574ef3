"""Telling the user how far a long write is: a small protocol, silence, and a bar on a terminal."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import rich.progress

__all__ = ["NoProgress", "Progress", "TerminalProgress", "progress_for"]

#: Seconds between two redraws: the bar must cost nothing that can be measured.
_INTERVAL = 0.1


class Progress(Protocol):
    """What a long step tells. All methods may be called from several threads."""

    def begin(self, what: str, total: int) -> None:
        """A step of ``total`` bytes begins; ``what`` is a word or two for the user ("writing")."""

    def advance(self, nbytes: int, name: str = "") -> None:
        """``nbytes`` more are done, of the tensor ``name``."""

    def end(self) -> None:
        """The step is over."""


class NoProgress:
    """Silence."""

    def begin(self, what: str, total: int) -> None:
        pass

    def advance(self, nbytes: int, name: str = "") -> None:
        pass

    def end(self) -> None:
        pass


class TerminalProgress:
    """A bar with bytes, current tensor and remaining time, on standard error."""

    def __init__(self, display: rich.progress.Progress) -> None:
        self._display = display
        self._lock = threading.Lock()
        self._task: rich.progress.TaskID | None = None
        self._pending = 0
        self._drawn = 0.0

    def begin(self, what: str, total: int) -> None:
        self.end()
        self._task = self._display.add_task(what, total=total, tensor="")

    def advance(self, nbytes: int, name: str = "") -> None:
        with self._lock:
            self._pending += nbytes
            now = time.monotonic()
            if self._task is None or now - self._drawn < _INTERVAL:
                return
            pending, self._pending, self._drawn = self._pending, 0, now
            self._display.update(self._task, advance=pending, tensor=name)

    def end(self) -> None:
        with self._lock:
            if self._task is not None:
                self._display.update(self._task, advance=self._pending, tensor="")
                self._display.remove_task(self._task)
            self._task, self._pending = None, 0


@contextmanager
def progress_for(*, quiet: bool = False) -> Iterator[Progress]:
    """A bar when standard error is a terminal, silence in a pipe or when ``quiet``."""
    if quiet or not sys.stderr.isatty():
        yield NoProgress()
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Display

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TimeRemainingColumn(),
        TextColumn("{task.fields[tensor]}", style="dim", markup=False),  # a tensor's name may have brackets
    )
    with Display(*columns, console=Console(stderr=True), transient=True) as display:
        bar = TerminalProgress(display)
        try:
            yield bar
        finally:
            bar.end()
