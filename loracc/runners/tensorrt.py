"""TensorRT on an engine that loracc built: fixed device buffers, a CUDA graph where it captures, CUDA events.

torch holds the buffers: the libraries of TensorRT allocate none from Python.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loracc.dtypes import Array
from loracc.errors import require
from loracc.runners.device_clock import captured
from loracc.runners.runner import RunError, TimedCall
from loracc.runners.torch import to_numpy, to_torch
from loracc.targets.tensorrt_load import LoadedEngine, load_engine

__all__ = ["EngineRunner", "tensorrt_on_cuda"]


def tensorrt_on_cuda(path: Path, *, threads: int = 0, adapter: Path | None = None) -> EngineRunner:
    """``--provider tensorrt``."""
    if adapter is not None:
        raise RunError(f"{adapter}: TensorRT activates no .onnx_adapter.", hint="Refit the engine: loracc refit-trt.")
    return EngineRunner(load_engine(path, "run a TensorRT engine"))


class EngineRunner:
    """One engine and one execution context.

    Args:
        loaded: The engine; refitted weights are seen by the next run.

    Raises:
        MissingExtraError: torch is not installed.
    """

    def __init__(self, loaded: LoadedEngine) -> None:
        self._torch: Any = require("torch", "hold the device buffers of a TensorRT engine")
        if not self._torch.cuda.is_available():
            raise RunError(
                f"torch {self._torch.__version__} here uses no GPU, and it holds the device buffers of an engine.",
                hint="Install a torch that was built with CUDA.",
            )
        self._loaded, engine, trt = loaded, loaded.engine, loaded.trt
        self.name = f"{trt.flavor} {trt.version}"
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        mode = trt.module.TensorIOMode
        self.inputs = [name for name in names if engine.get_tensor_mode(name) == mode.INPUT]
        self.outputs = [name for name in names if engine.get_tensor_mode(name) == mode.OUTPUT]
        self._context = engine.create_execution_context()
        if self._context is None:
            raise RunError(trt.complaint("TensorRT makes no execution context."))

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        buffers = self._bound(inputs)
        self._enqueue()
        self._torch.cuda.synchronize()
        return {name: to_numpy(self._torch, buffers[name]) for name in self.outputs}

    def timed(self, inputs: Mapping[str, Array]) -> TimedCall:
        buffers = self._bound(inputs)
        self._enqueue()
        timed, how = captured(self._torch, self._enqueue)
        self.name = f"{self.name.partition(', ')[0]}, {how}"

        def holding(repeats: int) -> float:
            assert buffers  # the device reads them
            return timed(repeats)

        return holding

    def _enqueue(self) -> None:
        if not self._context.execute_async_v3(self._torch.cuda.current_stream().cuda_stream):
            raise RunError(self._loaded.trt.complaint("TensorRT does not run the engine."))

    def _bound(self, inputs: Mapping[str, Array]) -> dict[str, Any]:
        """Buffers for every input and output, their addresses and shapes told to the context."""
        torch, trt = self._torch, self._loaded.trt
        buffers: dict[str, Any] = {}
        for name in self.inputs:
            if name not in inputs:
                raise RunError(f"no value for the engine's input {name}.", hint="Give it with --inputs.")
            buffers[name] = to_torch(torch, inputs[name]).cuda()
            if buffers[name].dtype != self._dtype(name):
                raise RunError(f"input {name!r} is {buffers[name].dtype}, and the engine takes {self._dtype(name)}.")
            if not self._context.set_input_shape(name, tuple(inputs[name].shape)):
                raise RunError(trt.complaint(f"input {name!r} of shape {inputs[name].shape} is in no profile."))
        for name in self.outputs:
            shape = tuple(self._context.get_tensor_shape(name))
            if any(size < 0 for size in shape):
                raise RunError(f"output {name!r} has the shape {shape}: its size depends on values, and is not known.")
            buffers[name] = torch.empty(shape, dtype=self._dtype(name), device="cuda")
        # A tensor without elements (factors of rank 0) has no address of its own, and TensorRT wants one.
        somewhere = torch.empty(1, dtype=torch.int64, device="cuda")
        for name, buffer in buffers.items():
            address = buffer.data_ptr() or somewhere.data_ptr()
            if not self._context.set_tensor_address(name, address):
                raise RunError(trt.complaint(f"TensorRT takes no buffer for {name!r}."))
        return {**buffers, "": somewhere}

    def _dtype(self, name: str) -> Any:
        """torch's type of an input or output."""
        own = self._loaded.engine.get_tensor_dtype(name).name
        if own not in _TORCH_NAMES:
            raise RunError(f"the engine's {name!r} is of type {own}, of which torch has no buffers.")
        return getattr(self._torch, _TORCH_NAMES[own])


#: TensorRT's types -> torch's.
_TORCH_NAMES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "BF16": "bfloat16",
    "INT8": "int8",
    "INT32": "int32",
    "INT64": "int64",
    "UINT8": "uint8",
    "BOOL": "bool",
}
