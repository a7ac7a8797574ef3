"""Output that appears whole or not at all.

Everything is written into a hidden folder beside the destination, under the names the files will finally have (so that
a staged ``.onnx`` finds its staged ``.onnx.data`` and can be verified where it is). Leaving the ``with`` block moves
the files into place, the destination itself last; leaving it by an exception, Ctrl-C or SIGTERM removes the folder and
the destination is as it was. What ``force`` replaces is moved into the same folder first, and moved back if anything
fails.

Nothing is flushed to the disk on purpose, as ``cp`` does not: a power cut may cost the new file, an interrupt never
does.
"""

from __future__ import annotations

import errno
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from loracc.errors import InputError

__all__ = ["WRITTEN", "Staging", "check_destination", "deferred_signals"]

_FULL = {errno.ENOSPC, errno.EDQUOT}
#: Signals that end a process and whose default action would leave the staging folder behind.
_ENDING = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))
#: An alarm is a signal that waited for an import to end (loracc/interrupts.py).
_DEFERRED = (signal.SIGINT, *_ENDING, *((signal.SIGALRM,) if hasattr(signal, "SIGALRM") else ()))
#: Destinations that this process has moved into place, in order: what an interrupt after that can no longer undo.
WRITTEN: list[Path] = []


def check_destination(
    destination: Path,
    *,
    inputs: Iterable[Path] = (),
    force: bool = False,
    folder: bool = False,
    companions: Iterable[str] = (),
) -> None:
    """Refuse a destination that cannot or must not be written, before any work is done.

    1. The parent is a folder, and writable.
    2. Where a file is to be written there is no folder, and the other way round.
    3. Nothing but an empty folder is there already, unless ``force``; ``companions`` are names of further files beside
       the destination.
    4. The destination is no input, does not lie inside an input folder and does not hold an input.
    5. A folder that ``force`` replaces is empty or holds a model: never somebody's home.

    Raises:
        InputError: One of these does not hold.
    """
    _check_parent(destination)
    _check_kind(destination, folder=folder)
    for path in inputs:
        _check_input(destination, path, folder=folder)
    for path in (destination, *(destination.with_name(name) for name in companions)):
        if os.path.lexists(path) and not force and not (folder and _is_empty(path)):
            raise InputError(f"{path}: exists already.", hint="Choose another output, or replace it with --force.")
    if folder and force and destination.is_dir():
        _check_model_folder(destination)


def _check_parent(destination: Path) -> None:
    parent = destination.parent
    if not destination.name or destination.name == "..":
        raise InputError(f"{destination}: not a name for an output.", hint="Name a new file or folder.")
    if not parent.is_dir():
        what = "is not a folder" if parent.exists() else "does not exist"
        raise InputError(f"{destination}: the folder {parent} {what}.", hint=f"Make it first: mkdir -p {parent}")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise InputError(f"{destination}: the folder {parent} is not writable.", hint="Choose another output.")


def _check_kind(destination: Path, *, folder: bool) -> None:
    if folder and os.path.lexists(destination) and not destination.is_dir():
        raise InputError(
            f"{destination}: a file, and the output is a folder.",
            hint="Outputs end in .onnx, .pt2 or .safetensors; anything else is a folder to write a checkpoint into.",
        )
    if not folder and destination.is_dir():
        raise InputError(f"{destination}: a folder, and the output is a file.", hint="Name a file in it.")


def _check_input(destination: Path, path: Path, *, folder: bool) -> None:
    here, there = Path(os.path.realpath(destination)), Path(os.path.realpath(path))
    if here == there or _same_file(destination, path):
        raise InputError(f"{destination}: the output is the input {path}.", hint="Choose another output.")
    if there.is_dir() and there in here.parents:
        raise InputError(
            f"{destination}: the output lies inside the input folder {path}.", hint="Choose another output."
        )
    if folder and here in there.parents:
        raise InputError(f"{destination}: the output folder holds the input {path}.", hint="Choose another output.")


def _same_file(one: Path, other: Path) -> bool:
    try:
        return os.path.samefile(one, other)
    except OSError:  # one of them is not there
        return False


def _is_empty(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def _check_model_folder(folder: Path) -> None:
    names = os.listdir(folder)
    if any((folder / name / "config.pbtxt").is_file() for name in names):  # a model repository
        return
    if names and not any(
        name == "config.json" or name.endswith((".safetensors", ".safetensors.index.json")) for name in names
    ):
        raise InputError(
            f"{folder}: holds no model, so --force does not replace it.",
            hint="Remove it yourself, or choose another output.",
        )


class Staging:
    """The place where one output is made.

    ::

        with Staging(Path("out.onnx"), inputs=[base], force=False) as stage:
            write_onnx(model, stage.path)      # also writes out.onnx.data beside stage.path
            verify(stage.path)
        # out.onnx.data and out.onnx are in place

    Attributes:
        destination: Where the output goes.
        path: Where to write it: a file, or a folder that exists.
        expected_bytes: Size of the output once it is known, for the message when the disk is full.
        files: What was moved into place, by final name, in the order of moving; filled on leaving.
    """

    def __init__(
        self,
        destination: str | os.PathLike[str],
        *,
        inputs: Iterable[Path] = (),
        force: bool = False,
        folder: bool = False,
        companions: Iterable[str] = (),
    ) -> None:
        self.destination = Path(os.path.abspath(destination))
        self.expected_bytes = 0
        self.files: list[str] = []
        self._force = force
        self._folder = folder
        self._companions = tuple(companions)
        check_destination(self.destination, inputs=inputs, force=force, folder=folder, companions=self._companions)
        self._root: Path | None = None
        self._handlers: dict[int, Any] = {}

    @property
    def path(self) -> Path:
        """Where to write; only inside the ``with`` block."""
        if self._root is None:
            raise RuntimeError("Staging is used outside its with block")
        return self._root / "new" / self.destination.name

    def size(self) -> int:
        """Bytes of what has been written so far, links to what is in place aside; only inside the ``with`` block."""
        new, home = self.path.parent, self.destination.parent
        files = (file for file in new.rglob("*") if file.is_file())
        return sum(file.stat().st_size for file in files if not _same_file(file, home / file.relative_to(new)))

    def __enter__(self) -> Staging:
        self._catch_signals()
        try:
            with deferred_signals():
                self._root = _hidden_folder(self.destination)
            (self._root / "new").mkdir()
            (self._root / "old").mkdir()
            if self._folder:
                self.path.mkdir()
        except BaseException:
            self._clean_up()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            # Neither what is half moved nor what is half removed may be left: a signal waits for the end of both.
            with deferred_signals():
                try:
                    if error is None:
                        self._commit()
                    elif isinstance(error, OSError) and error.errno in _FULL:
                        raise self._full() from error
                finally:
                    self._remove()
        finally:
            self._clean_up()

    def _commit(self) -> None:
        """Move old files aside and new ones into place, the destination last; undo all of it on failure."""
        new = self.path.parent
        if not self._folder:
            self._drop_links(new)
        names = sorted(name for name in os.listdir(new) if name != self.destination.name)
        names.append(self.destination.name)
        undo: list[Callable[[], object]] = []
        try:
            for name in dict.fromkeys((self.destination.name, *self._companions, *names)):
                self._move_aside(name, undo)
            for name in names:
                os.rename(new / name, self._beside(name))
                undo.append(lambda name=name: os.rename(self._beside(name), new / name))  # type: ignore[misc]
        except BaseException as error:
            for step in reversed(undo):
                step()
            if isinstance(error, OSError):
                reason = error.strerror or str(error)
                raise InputError(f"{self.destination}: could not be moved into place: {reason}.") from error
            raise
        self.files = names
        WRITTEN.append(self.destination)

    def _drop_links(self, new: Path) -> None:
        """Links to what is in place already were there to be read while the output was being made."""
        for folder, _, files in os.walk(new, topdown=False):
            for name in files:
                path = Path(folder, name)
                if _same_file(path, self.destination.parent / path.relative_to(new)):
                    path.unlink()
            if Path(folder) != new and not os.listdir(folder):
                os.rmdir(folder)

    def _move_aside(self, name: str, undo: list[Callable[[], object]]) -> None:
        final = self._beside(name)
        if not os.path.lexists(final):
            return
        if not self._force and not (self._folder and _is_empty(final)):  # it appeared while the output was being made
            raise InputError(f"{final}: exists already.", hint="Choose another output, or replace it with --force.")
        aside = self.path.parent.parent / "old" / name
        os.rename(final, aside)
        undo.append(lambda: os.rename(aside, final))

    def _beside(self, name: str) -> Path:
        return self.destination.with_name(name)

    def _full(self) -> InputError:
        free = shutil.disk_usage(self.destination.parent).free
        needed = f"{self.expected_bytes:,} bytes are needed" if self.expected_bytes else "the output does not fit"
        return InputError(
            f"{self.destination}: the disk is full: {needed}, {free:,} are free.",
            hint="Make room, or choose another disk.",
        )

    def _remove(self) -> None:
        if self._root is not None:
            # A leftover that cannot be removed must not hide the error that led here.
            shutil.rmtree(self._root, ignore_errors=True)
            self._root = None

    def _clean_up(self) -> None:
        with deferred_signals():
            self._remove()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers.clear()

    def _catch_signals(self) -> None:
        """Turn ending signals into SystemExit where nobody handles them; only the main thread may."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in _ENDING:
            if signal.getsignal(number) is signal.SIG_DFL:
                self._handlers[number] = signal.signal(number, _exit_by_signal)


def _exit_by_signal(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def _hidden_folder(destination: Path) -> Path:
    try:
        return Path(tempfile.mkdtemp(prefix=f".{destination.name[:100]}.", suffix=".tmp", dir=destination.parent))
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(f"{destination}: cannot be written: {reason}.", hint="Choose another output.") from error


@contextmanager
def deferred_signals() -> Iterator[None]:
    """Ctrl-C and ending signals wait until the block is over: a few renames.

    Blocking them with a mask would not do: another thread would take the signal, and Python would run the handler
    in the main thread all the same.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    before = {number: signal.signal(number, lambda number, frame: came.append(number)) for number in _DEFERRED}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for number in came:
            signal.raise_signal(number)
