"""Running a model: inputs by name to outputs by name, behind one small protocol.

Judging is elsewhere (``verify_*``): a runner neither compares nor has tolerances. A runner for another runtime or
device is a class with the three members of :class:`Runner` and a line in :data:`RUNNERS`.
"""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes
import numpy as np
import onnx_ir as ir

from loracc.dtypes import Array
from loracc.errors import InputError, require, unwrapped
from loracc.tensors import dims

__all__ = [
    "PROVIDERS",
    "RUNNERS",
    "OnnxRunner",
    "RunError",
    "Runner",
    "TimedCall",
    "first_line",
    "onnxruntime",
    "open_runner",
    "session_options",
    "wall_clock",
]

#: Weights up to this many bytes stay in the model's own bytes: shapes and axes must be readable when it is loaded.
_INLINE_BYTES = 1 << 10
#: What the runtime calls the devices.
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
_QUIET = 4  # fatal: an error is an exception, which says the same


class RunError(InputError):
    """The runtime refused the model or the inputs."""


#: ``call(repeats)`` runs the model so many times with inputs that were handed over before, and returns the seconds that
#: all of them took on the device: a wall clock stopped after the last result is there, or events on the device's own
#: stream. Copies between host and device are not in it.
TimedCall = Callable[[int], float]


class Runner(Protocol):
    """Something that computes a model's outputs."""

    #: What it is, for reports: "onnxruntime 1.32 cpu".
    name: str

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """All outputs, by name, for inputs by name.

        Raises:
            RunError: The runtime refused the inputs.
        """

    def timed(self, inputs: Mapping[str, Array]) -> TimedCall:
        """A call for the clock; inputs that the model has not are ignored.

        Raises:
            RunError: The runtime refused the inputs.
        """


#: What ``--provider`` may be -> "module:callable", called with (path, threads=..., adapter=...) and returning a
#: :class:`Runner`. ``adapter`` is an ``.onnx_adapter`` to have active, the file of a variant of the deployment at the
#: path, or None; a runner that cannot refuses.
RUNNERS = {
    "cpu": "loracc.runners.runner:timed_on_cpu",
    "cuda": "loracc.runners.cuda:onnxruntime_on_cuda",
    "torch-cpu": "loracc.runners.torch:torch_on_cpu",
    "torch-cuda": "loracc.runners.torch:torch_on_cuda",
    "tensorrt": "loracc.runners.tensorrt:tensorrt_on_cuda",
}


def open_runner(path: Path, provider: str = "cpu", *, threads: int = 0, adapter: Path | None = None) -> Runner:
    """The runner that a provider's name stands for, on a model's file.

    Raises:
        InputError: No such provider.
        RunError: Its runtime does not load the model.
        MissingExtraError: Its runtime is not installed.
    """
    if provider not in RUNNERS:
        raise InputError(f"no provider {provider!r}.", hint=f"Choose one of {', '.join(RUNNERS)}.")
    module, _, name = RUNNERS[provider].partition(":")
    runner: Runner = getattr(importlib.import_module(module), name)(path, threads=threads, adapter=adapter)
    return runner


def timed_on_cpu(path: Path, *, threads: int = 0, adapter: Path | None = None) -> OnnxRunner:
    """ONNX Runtime on the CPU, its idle threads asleep: several sessions are timed in turn."""
    if adapter is not None and adapter.suffix == ".safetensors":
        from loracc.runtime.deployment import variant_runner

        return variant_runner(path, adapter, threads=threads)
    return OnnxRunner(path, provider="cpu", threads=threads, spin=False, adapter=adapter)


def wall_clock(once: Callable[[], None]) -> TimedCall:
    """A timed call of something that returns when its result is there."""

    def timed(repeats: int) -> float:
        start = time.perf_counter()
        for _ in range(repeats):
            once()
        return time.perf_counter() - start

    return timed


def onnxruntime() -> Any:
    """The onnxruntime module, told to be silent.

    Raises:
        MissingExtraError: It is not installed.
    """
    module: Any = require("onnxruntime", "run ONNX models")
    module.set_default_logger_severity(_QUIET)
    return module


class OnnxRunner:
    """ONNX Runtime on a file, or on a graph whose weights stay lazy until they are handed over.

    Args:
        model: A path, or a graph. A graph is not changed. Its large weights are computed one by one and given to the
            session as they are, so that nothing is written to disk and nothing lies in memory twice.
        provider: "cpu" or "cuda".
        threads: Threads inside one operator; 0 is the runtime's own choice.
        optimize: Whether the runtime may rewrite the graph.
        save_optimized: Where to write the graph that the optimizer made, as far as it does not depend on this machine.
        spin: Idle threads wait busily. Off when several sessions are timed in turn: one's threads would slow the other.
        adapter: An ``.onnx_adapter`` that is active in every run.
        profile: Start of the name of a file in which the runtime records every kernel it runs.

    Raises:
        MissingExtraError: onnxruntime is not installed.
        RunError: The runtime does not load the model.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | ir.Model,
        *,
        provider: str = "cpu",
        threads: int = 0,
        optimize: bool = True,
        save_optimized: Path | None = None,
        spin: bool = True,
        adapter: Path | None = None,
        profile: Path | None = None,
    ) -> None:
        ort = onnxruntime()
        self.name = f"onnxruntime {ort.__version__} {provider}"
        if PROVIDERS[provider] not in ort.get_available_providers():
            raise RunError(
                f"onnxruntime {ort.__version__} here has no {provider} provider.",
                hint="Run: pip install 'loracc[gpu]' in place of loracc[cpu]" if provider == "cuda" else None,
            )
        options = session_options(threads=threads, optimize=optimize)
        options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spin)))
        if save_optimized is not None:
            options.optimized_model_filepath = str(save_optimized)
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
            options.add_session_config_entry(
                "session.optimized_model_external_initializers_file_name", f"{save_optimized.name}.data"
            )
        if profile is not None:
            options.enable_profiling = True
            options.profile_file_prefix = str(profile)
        self._held: list[Any] = []  # the session does not own what it was given
        source: Any = str(model)
        if isinstance(model, ir.Model):
            source = self._hand_over(model, options)
        try:
            self._session = ort.InferenceSession(source, options, providers=[PROVIDERS[provider]])
        except Exception as error:  # onnxruntime's exceptions have no common base of their own
            raise RunError(f"onnxruntime {ort.__version__} does not load the model: {first_line(error)}") from error
        self._name_values()
        self._adapter, self._run_options = _activated(ort, adapter)

    @classmethod
    def of(cls, session: Any, provider: str = "cpu") -> OnnxRunner:
        """A runner on an ``onnxruntime.InferenceSession`` that is open already."""
        runner = cls.__new__(cls)
        runner.name = f"onnxruntime {onnxruntime().__version__} {provider}"
        runner._session, runner._held = session, []
        runner._adapter, runner._run_options = None, None
        runner._name_values()
        return runner

    @property
    def session(self) -> Any:
        """The ``onnxruntime.InferenceSession``."""
        return self._session

    def _name_values(self) -> None:
        self.inputs: list[str] = [value.name for value in self._session.get_inputs()]
        self.outputs: list[str] = [value.name for value in self._session.get_outputs()]

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        ort = onnxruntime()
        missing = [name for name in self.inputs if name not in inputs]
        if missing:
            raise RunError(f"no value for the model's inputs {', '.join(missing)}.", hint="Give them with --inputs.")
        feeds = {name: ort_value(ort, inputs[name]) for name in self.inputs}
        try:
            results = self._session.run_with_ort_values(self.outputs, feeds, self._run_options)
        except Exception as error:  # as above
            raise RunError(f"onnxruntime {ort.__version__} does not run the model: {first_line(error)}") from error
        return {name: _array(value) for name, value in zip(self.outputs, results, strict=True)}

    def prepared(self, inputs: Mapping[str, Array]) -> Callable[[], None]:
        """A call that only runs: inputs handed over before, outputs left to the runtime. For timing."""
        ort = onnxruntime()
        feeds = {name: ort_value(ort, inputs[name]) for name in self.inputs}
        session, outputs, options = self._session, self.outputs, self._run_options

        def once() -> None:
            session.run_with_ort_values(outputs, feeds, options)

        return once

    def timed(self, inputs: Mapping[str, Array]) -> TimedCall:
        self.run(inputs)  # what the runtime refuses is said before the clock runs
        return wall_clock(self.prepared(inputs))

    def _hand_over(self, model: ir.Model, options: Any) -> bytes:
        """The graph's bytes without its large weights, which go into the options."""
        ort = onnxruntime()
        names: list[str] = []
        kept: list[tuple[ir.Value, ir.TensorProtocol]] = []
        try:
            for name, value in model.graph.initializers.items():
                tensor = value.const_value
                if tensor is None:
                    continue
                if tensor.nbytes <= _INLINE_BYTES or tensor.dtype.bitwidth < 8:
                    if isinstance(tensor, ir.ExternalTensor):  # the runtime would look for its file
                        kept.append((value, tensor))
                        value.const_value = ir.Tensor(tensor.numpy().copy(), dtype=tensor.dtype, name=name)
                    continue
                array = np.ascontiguousarray(tensor.numpy())
                self._held.append(ort_value(ort, array))
                names.append(name)
                kept.append((value, tensor))
                value.const_value = ir.ExternalTensor(
                    "given", 0, int(tensor.nbytes), tensor.dtype, shape=ir.Shape(dims(tensor)), name=name
                )
            with unwrapped():
                data = ir.to_proto(model).SerializeToString()
        finally:
            for value, tensor in kept:
                value.const_value = tensor
        if names:
            options.add_external_initializers(names, self._held)
        return bytes(data)


def _activated(ort: Any, adapter: Path | None) -> tuple[Any, Any]:
    """The adapter, which must outlive the runs, and run options that have it active."""
    if adapter is None:
        return None, None
    loaded = ort.LoraAdapter()
    try:
        loaded.Load(str(adapter))
    except Exception as error:  # onnxruntime's exceptions have no common base of their own
        raise RunError(f"{adapter}: onnxruntime does not load the adapter: {first_line(error)}") from error
    options = ort.RunOptions()
    options.add_active_adapter(loaded)
    return loaded, options


def session_options(*, threads: int = 0, optimize: bool = True) -> Any:
    """Silent, deterministic in the number of threads, with or without the runtime's own optimizer."""
    ort = onnxruntime()
    options = ort.SessionOptions()
    options.log_severity_level = _QUIET
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    if not optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return options


def ort_value(ort: Any, array: Array) -> Any:
    """An ``OrtValue`` on the array. numpy has no bfloat16: its bits travel as uint16 under their own type."""
    array = np.ascontiguousarray(array) if array.ndim else array
    if array.dtype == ml_dtypes.bfloat16:
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array.view(np.uint16), int(ir.DataType.BFLOAT16))
    return ort.OrtValue.ortvalue_from_numpy(array)


def _array(value: Any) -> Array:
    if value.element_type() == int(ir.DataType.BFLOAT16):
        import ctypes

        shape = tuple(value.shape())
        count = int(np.prod(shape, dtype=np.int64))
        buffer = (ctypes.c_uint16 * count).from_address(value.data_ptr())
        return np.ctypeslib.as_array(buffer).view(ml_dtypes.bfloat16).reshape(shape).copy()
    return np.asarray(value.numpy())


def first_line(error: Exception) -> str:
    """What an exception says, without the runtime's own stack."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
