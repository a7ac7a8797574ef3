"""Freed memory goes back to the system.

glibc keeps what was freed for later: after a few variants have come and gone, that was 0.4 to 1.5 GB for a 124M model,
measured (docs/switching.md). Asking for it back takes 10 to 200 ms, only when a variant is dropped.
"""

from __future__ import annotations

import ctypes
import sys
from functools import cache
from typing import Any

__all__ = ["give_memory_back"]


def give_memory_back() -> None:
    """``malloc_trim(0)``; nothing where the C library has none."""
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@cache
def _malloc_trim() -> Any:
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
