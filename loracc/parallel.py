"""The same work on many things, on the cores that there are, with the results in order."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from loracc.streaming import default_workers

__all__ = ["in_order"]

T = TypeVar("T")
R = TypeVar("R")


def in_order(work: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """``[work(item) for item in items]`` by a few threads: for work that leaves Python's lock alone most of the time.

    Raises:
        BaseException: What the first item that failed raised; what was not begun by then, or at a Ctrl-C, is dropped.
    """
    with ThreadPoolExecutor(default_workers(), thread_name_prefix="loracc") as pool:
        try:
            return list(pool.map(work, items))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
