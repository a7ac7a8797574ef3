"""How much memory there is, and how much a model needs to be run in another precision."""

from __future__ import annotations

import math
from pathlib import Path

import onnx_ir as ir

from loracc.dtypes import is_float
from loracc.tensors import dims

__all__ = ["available_memory", "weights_in"]

_CGROUP = Path("/sys/fs/cgroup")


def available_memory() -> int | None:
    """Bytes that can be had without swapping: the system's, or what a container has left; None where nothing tells."""
    found = [size for size in (_system(), _container()) if size is not None]
    return min(found, default=None)


def weights_in(model: ir.Model, dtype: ir.DataType) -> int:
    """Bytes of the initializers with every float one in ``dtype``."""
    total = 0
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if tensor is not None:
            wide = math.prod(dims(tensor)) * int(dtype.itemsize)
            total += max(wide, tensor.nbytes) if is_float(tensor.dtype) else tensor.nbytes
    return total


def _system() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:  # not Linux
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def _container() -> int | None:
    """cgroup v2: the limit, less what is in use and could not be dropped."""
    try:
        limit = (_CGROUP / "memory.max").read_text(encoding="ascii").strip()
        used = int((_CGROUP / "memory.current").read_text(encoding="ascii"))
        stat = dict(line.split() for line in (_CGROUP / "memory.stat").read_text(encoding="ascii").splitlines())
    except (OSError, ValueError):  # no such cgroup, or one without a limit's files
        return None
    if limit == "max":
        return None
    return max(int(limit) - used + int(stat.get("inactive_file", 0)), 0)
