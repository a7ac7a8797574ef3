"""A cache for values that are expensive to make and used by many threads: each is made once, the oldest are dropped."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from typing import Generic, TypeVar

__all__ = ["OnceCache"]

T = TypeVar("T")


class OnceCache(Generic[T]):
    """The ``capacity`` values used last, by key.

    A thread that asks for a value that another is making waits for it; threads that ask for different ones do not wait
    for each other. A value that could not be made is not kept: the error goes to all who waited, and the next call
    tries again. A dropped value lives on where it is still in use.
    """

    def __init__(self, capacity: int, dropped: Callable[[], object] = lambda: None) -> None:
        """``dropped`` is called after values have been dropped, without any lock."""
        self._capacity = capacity
        self._dropped = dropped
        self._entries: OrderedDict[str, Future[T]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: str, make: Callable[[], T]) -> T:
        """The value, made by ``make`` if it is not there."""
        with self._lock:
            entry = self._entries.get(key)
            mine = entry is None
            if entry is None:
                entry = self._entries[key] = Future()
            else:
                self._entries.move_to_end(key)
        if mine:
            self._fill(key, entry, make)
        return entry.result()

    def _fill(self, key: str, entry: Future[T], make: Callable[[], T]) -> None:
        try:
            entry.set_result(make())
        except BaseException as error:  # whoever waits must hear of it, an interrupt included
            self._forget(key, entry)
            entry.set_exception(error)
            return
        self._shrink()

    def _forget(self, key: str, entry: Future[T]) -> None:
        with self._lock:
            if self._entries.get(key) is entry:
                del self._entries[key]

    def _shrink(self) -> None:
        """Drop what was used longest ago; what is still being made stays."""
        with self._lock:
            done = [key for key, entry in self._entries.items() if entry.done()]
            old = [self._entries.pop(key) for key in done[: max(len(done) - self._capacity, 0)]]
        self._let_go(old)

    def drop(self, key: str) -> None:
        """Forget one value."""
        with self._lock:
            old = [self._entries.pop(key)] if key in self._entries else []
        self._let_go(old)

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            old = list(self._entries.values())
            self._entries.clear()
        self._let_go(old)

    def _let_go(self, old: list[Future[T]]) -> None:
        """Freeing a value takes its time: outside the lock."""
        if old:
            old.clear()
            self._dropped()

    def keys(self) -> list[str]:
        """What is held, the value used longest ago first."""
        with self._lock:
            return [key for key, entry in self._entries.items() if entry.done()]
