"""ONNX Runtime on a CUDA device: bound buffers, no TF32, no node left on the CPU, and a CUDA graph where it captures.

Nothing is copied in the timed part: inputs and outputs lie in fixed buffers on the device. With torch beside it the
session runs on a stream of torch's and is timed by events on it; without, by a clock that waits for the outputs.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from loracc.devices import require_gpu
from loracc.dtypes import Array
from loracc.runners.device_clock import events
from loracc.runners.runner import RunError, TimedCall, onnxruntime, wall_clock

__all__ = ["CudaRunner", "onnxruntime_on_cuda", "provider_options"]

_PROVIDER = "CUDAExecutionProvider"
_HINT = "Run: pip install 'loracc[gpu]' in place of loracc[cpu] (onnxruntime and onnxruntime-gpu exclude each other)"


def onnxruntime_on_cuda(path: Path, *, threads: int = 0, adapter: Path | None = None) -> CudaRunner:
    """``--provider cuda``."""
    return CudaRunner(path, adapter=adapter)


def provider_options(*, stream: int | None, graph: bool) -> dict[str, str]:
    """What the CUDA provider is told: float32 products without TF32, on the caller's stream, as a CUDA graph."""
    told = {"use_tf32": "0", "enable_cuda_graph": str(int(graph))}
    return told if stream is None else {**told, "user_compute_stream": str(stream)}


class CudaRunner:
    """One model on the device.

    Args:
        path: An ``.onnx`` file.
        adapter: An ``.onnx_adapter`` that is active in every run; such a model is not captured.

    Raises:
        UnsupportedError: No GPU.
        RunError: The runtime has no CUDA provider, or does not run every node of the model on it.
        MissingExtraError: onnxruntime is not installed.
    """

    def __init__(self, path: Path, *, adapter: Path | None = None) -> None:
        require_gpu("run a model with --provider cuda", hint="Use --provider cpu.")
        ort = onnxruntime()
        if _PROVIDER not in ort.get_available_providers():
            raise RunError(f"onnxruntime {ort.__version__} here has no cuda provider.", hint=_HINT)
        self._torch = _torch()
        self._stream = self._torch.cuda.Stream() if self._torch else None
        self._session, how = _session(ort, path, self._stream, graph=adapter is None)
        self.name = f"onnxruntime {ort.__version__} cuda, {how}"
        self.inputs = [value.name for value in self._session.get_inputs()]
        self.outputs = [value.name for value in self._session.get_outputs()]
        self._adapter, self._options = _activated(ort, adapter)  # the options do not keep the adapter alive

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        bound = self._bound(inputs)
        self._once(bound)
        bound.synchronize_outputs()
        return dict(zip(self.outputs, bound.copy_outputs_to_cpu(), strict=True))

    def timed(self, inputs: Mapping[str, Array]) -> TimedCall:
        bound = self._bound(inputs)
        self._once(bound)  # captures
        bound.synchronize_outputs()
        if self._torch:
            return events(self._torch, lambda: self._once(bound), self._stream)

        def once() -> None:
            self._once(bound)
            bound.synchronize_outputs()

        return wall_clock(once)

    def _once(self, bound: Any) -> None:
        try:
            self._session.run_with_iobinding(bound, self._options)
        except Exception as error:  # onnxruntime's exceptions have no common base of their own
            raise RunError(f"{self.name} does not run the model: {str(error).strip().splitlines()[0]}") from error

    def _bound(self, inputs: Mapping[str, Array]) -> Any:
        """Inputs copied to the device, outputs allocated there by the first run."""
        ort = onnxruntime()
        missing = [name for name in self.inputs if name not in inputs]
        if missing:
            raise RunError(f"no value for the model's inputs {', '.join(missing)}.", hint="Give them with --inputs.")
        bound = self._session.io_binding()
        for name in self.inputs:
            value = ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(inputs[name]), "cuda", 0)
            bound.bind_ortvalue_input(name, value)
        for name in self.outputs:
            bound.bind_output(name, "cuda")
        bound.synchronize_inputs()
        return bound


def _session(ort: Any, path: Path, stream: Any, *, graph: bool) -> tuple[Any, str]:
    """A session with a CUDA graph, or without one and why."""
    why = "an adapter is active"
    for captured in (True, False) if graph else (False,):
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        told = provider_options(stream=stream.cuda_stream if stream else None, graph=captured)
        try:
            session = ort.InferenceSession(str(path), options, providers=[(_PROVIDER, told)])
        except Exception as error:  # as above
            why = str(error).strip().splitlines()[0]
            continue
        if session.get_providers()[0] != _PROVIDER:
            raise RunError(f"onnxruntime {ort.__version__} did not start its CUDA provider.", hint=_HINT)
        return session, "CUDA graph" if captured else f"no CUDA graph ({why})"
    raise RunError(f"onnxruntime {ort.__version__} does not run all of {path.name} on the GPU: {why}")


def _activated(ort: Any, path: Path | None) -> tuple[Any, Any]:
    if path is None:
        return None, None
    adapter, options = ort.LoraAdapter(), ort.RunOptions()
    try:
        adapter.Load(str(path))
    except Exception as error:  # as above
        raise RunError(f"{path}: onnxruntime does not load the adapter: {error}") from error
    options.add_active_adapter(adapter)
    return adapter, options


def _torch() -> Any:
    """torch with a CUDA device; importing it also finds the CUDA libraries that onnxruntime links."""
    if importlib.util.find_spec("torch") is None:
        return None
    import torch

    return torch if torch.cuda.is_available() else None
