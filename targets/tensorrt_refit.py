"""Sending weights into a refittable engine.

``set_named_weights`` and ``refit_cuda_engine`` return False where another library would raise, and an engine that
combined two weights wants both even if one changed (``get_missing_weights``). A failed refit leaves a mixture: the
caller must send everything again or throw the engine away, and the error says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from loracc.dtypes import Array
from loracc.errors import InputError, UnsupportedError
from loracc.targets.tensorrt_module import TensorRT

__all__ = ["EngineRefitter", "serialized"]

#: ONNX types -> TensorRT's names.
_TYPES = {
    ir.DataType.FLOAT: "FLOAT",
    ir.DataType.FLOAT16: "HALF",
    ir.DataType.BFLOAT16: "BF16",
    ir.DataType.INT8: "INT8",
    ir.DataType.INT32: "INT32",
    ir.DataType.INT64: "INT64",
    ir.DataType.UINT8: "UINT8",
    ir.DataType.BOOL: "BOOL",
}


class EngineRefitter:
    """One engine's weights.

    Args:
        trt: The flavour.
        engine: An ``ICudaEngine`` that was built refittable.

    Raises:
        UnsupportedError: It was not.
    """

    def __init__(self, trt: TensorRT, engine: Any) -> None:
        if not engine.refittable:
            raise UnsupportedError(
                "the engine was not built refittable.", hint="Build it with --refittable adapter or --refittable all."
            )
        self._trt = trt
        self._refitter = trt.module.Refitter(engine, trt.logger)

    def names(self) -> set[str]:
        """Weights that can be sent."""
        return set(self._refitter.get_all_weights())

    def send(self, weights: Mapping[str, ir.TensorProtocol], others: Callable[[str], ir.TensorProtocol]) -> list[str]:
        """Replace weights.

        Args:
            weights: By name.
            others: The present value of a weight that the engine wants besides, because it stores it together with one
                of ``weights``.

        Returns:
            The names that were sent, in order.

        Raises:
            InputError: A weight's name, type or size is not what the engine has.
            UnsupportedError: TensorRT refuses; the engine holds a mixture of old and new weights then.
        """
        held: list[Array] = []  # read until refit_cuda_engine returns
        sent: list[str] = []
        for name, tensor in weights.items():
            held.append(self._set(name, tensor))
            sent.append(name)
        while missing := [name for name in self._refitter.get_missing_weights() if name not in sent]:
            for name in missing:
                held.append(self._set(name, others(name)))
                sent.append(name)
        done = self._refitter.refit_cuda_engine()
        for name in sent:
            self._refitter.unset_named_weights(name)
        del held
        if not done:
            raise UnsupportedError(
                self._trt.complaint("TensorRT did not refit the engine, which may hold a mixture of weights now."),
                hint="Load it again.",
            )
        return sent

    def _set(self, name: str, tensor: ir.TensorProtocol) -> Array:
        module = self._trt.module
        if tensor.dtype not in _TYPES:
            raise InputError(f"weight {name!r} is {tensor.dtype.name}, which cannot be refitted.")
        array = np.ascontiguousarray(tensor.numpy())
        dtype = getattr(module.DataType, _TYPES[tensor.dtype])
        self._check(name, dtype, int(array.size))
        # Not trt.Weights(array): that refuses bfloat16.
        if not self._refitter.set_named_weights(name, module.Weights(dtype, array.ctypes.data, int(array.size))):
            raise InputError(self._trt.complaint(f"TensorRT refuses the weight {name!r}."))
        return array

    def _check(self, name: str, dtype: Any, size: int) -> None:
        prototype = self._refitter.get_weights_prototype(name)
        if prototype.size < 0:
            raise InputError(
                f"weight {name!r} of the engine cannot be refitted.",
                hint="Build the engine with this adapter and --refittable adapter, or with --refittable all.",
            )
        if (prototype.dtype, prototype.size) != (dtype, size):
            raise InputError(
                f"weight {name!r}: the engine has {prototype.size} elements of {prototype.dtype.name}, "
                f"and {size} of {dtype.name} were to be sent."
            )


def serialized(trt: TensorRT, engine: Any) -> bytes:
    """The engine as it is now, weights included and still refittable.

    Raises:
        UnsupportedError: TensorRT does not serialize it.
    """
    flags = trt.module.SerializationFlag
    config = engine.create_serialization_config()
    # Both return bool: a refused flag would write a plan without the new weights, or one that cannot be refitted.
    if not config.clear_flag(flags.EXCLUDE_WEIGHTS) or not config.set_flag(flags.INCLUDE_REFIT):
        raise UnsupportedError(trt.complaint("TensorRT does not write this engine with its weights."))
    plan = engine.serialize_with_config(config)
    if plan is None:
        raise UnsupportedError(trt.complaint("TensorRT does not serialize the refitted engine."))
    return bytes(plan)
