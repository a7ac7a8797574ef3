"""A module in memory becomes an exported program: traced with named inputs, chosen axes dynamic, nothing computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from loracc.dtypes import Array
from loracc.errors import UnsupportedError
from loracc.quiet import quiet

if TYPE_CHECKING:
    import torch

__all__ = ["TORCH_LOGGERS", "as_tensor", "leaf_names", "nested", "reason_of", "trace"]

#: Loggers that report progress and missing optional packages during an export.
TORCH_LOGGERS = ("torch", "onnxscript", "onnx_ir")


def trace(
    module: torch.nn.Module, inputs: Mapping[str, Array], symbols: Mapping[str, Sequence[str | None]]
) -> torch.export.ExportedProgram:
    """Trace a module called with keyword arguments.

    Args:
        module: In eval mode.
        inputs: Samples, by parameter of ``forward``; a dot goes into a mapping, as in "past_key_values.0.key".
        symbols: Per input, a symbol for each axis that is to be dynamic and None for the others. torch decides for
            itself which of them it can keep dynamic, and which are one and the same.

    Raises:
        UnsupportedError: torch cannot trace it.
    """
    import torch

    dynamic = {
        name: {axis: torch.export.Dim.AUTO for axis, symbol in enumerate(symbols.get(name, ())) if symbol}
        for name in inputs
    }
    arguments = {name: as_tensor(array) for name, array in inputs.items()}
    with torch.no_grad(), quiet(*TORCH_LOGGERS):
        try:
            return torch.export.export(module, (), nested(arguments), dynamic_shapes=nested(dynamic), strict=False)
        except Exception as error:  # a tracer's boundary: it fails with whatever the model's code raises
            raise UnsupportedError(
                f"torch.export cannot trace {type(module).__name__}: {reason_of(error)}",
                hint="Check the inputs (--input NAME:DTYPE[SHAPE], --dynamic), or export the model yourself and give "
                "the .pt2 or .onnx file.",
            ) from error


def as_tensor(array: Array) -> torch.Tensor:
    """numpy to torch, bfloat16 included."""
    import torch

    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(np.array(array))


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Mappings in the place of dots.

    >>> nested({"x": 1, "past.0.key": 2, "past.0.value": 3})
    {'x': 1, 'past': {'0': {'key': 2, 'value': 3}}}
    """
    result: dict[str, Any] = {}
    for name, value in flat.items():
        *path, leaf = name.split(".")
        place = result
        for part in path:
            place = place.setdefault(part, {})
        place[leaf] = value
    return result


def leaf_names(structure: Any, prefix: str = "") -> list[str]:
    """Names for the leaves of an output, in ``torch.utils._pytree``'s order; "" where nothing names a leaf.

    A mapping (transformers' ModelOutput is one) names its fields, a sequence inside it counts.

    >>> leaf_names({"logits": 0, "hidden_states": (1, 2)})
    ['logits', 'hidden_states.0', 'hidden_states.1']
    >>> leaf_names((0, 1))
    ['', '']
    """
    if isinstance(structure, Mapping):
        return [
            name
            for key, part in structure.items()
            for name in leaf_names(part, f"{prefix}.{key}" if prefix else str(key))
        ]
    if isinstance(structure, (list, tuple)):
        return [
            name for i, part in enumerate(structure) for name in leaf_names(part, f"{prefix}.{i}" if prefix else "")
        ]
    return [prefix]


def reason_of(error: BaseException) -> str:
    """One line that says why: torch and transformers wrap the one useful sentence in a page of advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:300]
