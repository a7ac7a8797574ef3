"""One BLAS thread while weights are computed: the same bits on any machine load, and cores left to the workers."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from threadpoolctl import ThreadpoolController

__all__ = ["one_blas_thread"]

_lock = threading.Lock()
_depth = 0
_limit: Any = None


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """BLAS runs on one thread inside the block.

    The setting is the process's own, not a thread's: the first to enter makes it and the last to leave undoes it, so
    that one worker's end does not change another's arithmetic.
    """
    global _depth, _limit
    with _lock:
        _depth += 1
        if _depth == 1:
            _limit = _controller().limit(limits=1, user_api="blas")
    try:
        yield
    finally:
        with _lock:
            _depth -= 1
            if _depth == 0:
                _limit.restore_original_limits()


@cache
def _controller() -> ThreadpoolController:
    """Found once: looking the libraries up costs milliseconds."""
    return ThreadpoolController()
