"""A TensorRT runtime whose engines are their weights: enough to refit, and strict about how it is called."""

from __future__ import annotations

import ctypes
import json
from types import SimpleNamespace
from typing import Any

import tensorrt_rtx as real

from tests.strict_fake import Strict

__all__ = ["FakeModule", "plan_of", "real", "weights_of"]


def plan_of(weights: dict[str, tuple[str, bytes]]) -> bytes:
    """A fake plan: name -> (type, bytes)."""
    return json.dumps({name: [dtype, data.hex()] for name, (dtype, data) in weights.items()}).encode()


def weights_of(plan: bytes) -> dict[str, bytes]:
    """What lies in it."""
    return {name: bytes.fromhex(data) for name, (_, data) in json.loads(plan).items()}


class Weights(Strict, real=real.Weights):
    def __init__(self, dtype: Any, pointer: int, count: int) -> None:
        self._dtype, self._pointer, self._count = dtype, pointer, count

    @property
    def dtype(self) -> Any:
        return self._dtype

    @property
    def size(self) -> int:
        return self._count

    def _read(self) -> bytes:
        return ctypes.string_at(self._pointer, self._count * self._dtype.itemsize)


class SerializationConfig(Strict, real=real.ISerializationConfig):
    _flags: set[Any]

    def clear_flag(self, flag: Any) -> bool:
        self._flags.discard(flag)
        return True

    def set_flag(self, flag: Any) -> bool:
        self._flags.add(flag)
        return True


class Engine(Strict, real=real.ICudaEngine):
    _weights: dict[str, tuple[str, bytes]]

    @property
    def refittable(self) -> bool:
        return True

    def create_serialization_config(self) -> SerializationConfig:
        config = SerializationConfig()
        config._flags = {real.SerializationFlag.EXCLUDE_WEIGHTS}  # what the library begins with
        return config

    def serialize_with_config(self, config: Any) -> bytes:
        assert config._flags == {real.SerializationFlag.INCLUDE_REFIT}, "the weights would be left out"
        return plan_of(self._weights)


class Runtime(Strict, real=real.Runtime):
    def __init__(self, logger: Any) -> None:
        self._module = logger.module

    @property
    def engine_host_code_allowed(self) -> bool:
        return self._host_code

    @engine_host_code_allowed.setter
    def engine_host_code_allowed(self, value: bool) -> None:
        self._host_code = value

    def deserialize_cuda_engine(self, plan: bytes) -> Any:
        engine = Engine()
        engine._weights = {name: (dtype, bytes.fromhex(data)) for name, (dtype, data) in json.loads(plan).items()}
        self._module.engines.append(engine)
        return engine


class Refitter(Strict, real=real.Refitter):
    def __init__(self, engine: Any, logger: Any) -> None:
        self._engine, self._module = engine, logger.module
        self._set: dict[str, Weights] = {}

    def get_all_weights(self) -> list[str]:
        return list(self._engine._weights)

    def get_weights_prototype(self, weights_name: str) -> Any:
        if weights_name not in self._engine._weights:
            return SimpleNamespace(size=-1, dtype=real.DataType.FLOAT)
        dtype, data = self._engine._weights[weights_name]
        kind = getattr(real.DataType, dtype)
        return SimpleNamespace(size=len(data) // kind.itemsize, dtype=kind)

    def set_named_weights(self, name: str, weights: Any) -> bool:
        self._set[name] = weights
        return True

    def unset_named_weights(self, weights_name: str) -> bool:
        return self._set.pop(weights_name, None) is not None

    def get_missing_weights(self) -> list[str]:
        groups = [group for group in self._module.combined if group & self._set.keys()]
        return sorted({name for group in groups for name in group if name not in self._set})

    def refit_cuda_engine(self) -> bool:
        if self._module.fail_next:
            self._module.fail_next = False
            return False
        assert not self.get_missing_weights()
        for name, weights in self._set.items():
            self._engine._weights[name] = (weights.dtype.name, weights._read())
        self._module.sent.append(list(self._set))
        return True


class FakeModule:
    """Stands where ``tensorrt_rtx`` would.

    Attributes:
        combined: Sets of weights that the engine stores together.
        fail_next: The next refit fails.
        sent: Names sent by each refit.
        engines: Engines made.
    """

    __version__ = "fake"
    Runtime, Refitter, Weights = Runtime, Refitter, Weights
    DataType, SerializationFlag = real.DataType, real.SerializationFlag

    def __init__(self) -> None:
        self.combined: list[set[str]] = []
        self.fail_next = False
        self.sent: list[list[str]] = []
        self.engines: list[Any] = []
