"""Which GPU there is, asked of the driver itself: no library has to be imported to know that there is none."""

from __future__ import annotations

import ctypes
import sys
from functools import cache

from loracc.errors import UnsupportedError

__all__ = ["gpu_name", "require_gpu"]

_NAME_BYTES = 256


@cache
def gpu_name() -> str | None:
    """Name of the first CUDA device; None without a driver or without a device."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:  # no driver
        return None
    count = ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)) or not count.value:
        return None
    name = ctypes.create_string_buffer(_NAME_BYTES)
    return name.value.decode() if driver.cuDeviceGetName(name, _NAME_BYTES, 0) == 0 else "unnamed CUDA device"


def require_gpu(purpose: str, *, hint: str | None = None) -> str:
    """The GPU's name.

    Args:
        purpose: What it is needed for, as the end of "a GPU is needed to".
        hint: What to do without one.

    Raises:
        UnsupportedError: There is none.
    """
    name = gpu_name()
    if name is None:
        raise UnsupportedError(f"a GPU is needed to {purpose}, and this machine has none (no CUDA device).", hint=hint)
    return name
