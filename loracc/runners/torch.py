"""PyTorch on a ``.pt2`` program, on the CPU or on a CUDA device (as a CUDA graph where it can be captured)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from loracc.devices import require_gpu
from loracc.dtypes import Array
from loracc.errors import require
from loracc.runners.device_clock import captured
from loracc.runners.runner import RunError, TimedCall, wall_clock

__all__ = ["TorchRunner", "to_numpy", "to_torch", "torch_on_cpu", "torch_on_cuda"]


def torch_on_cpu(path: Path, *, threads: int = 0, adapter: Path | None = None) -> TorchRunner:
    """``--provider torch-cpu``."""
    return TorchRunner(_only_model(path, adapter), "cpu", threads=threads)


def torch_on_cuda(path: Path, *, threads: int = 0, adapter: Path | None = None) -> TorchRunner:
    """``--provider torch-cuda``."""
    require_gpu("run a .pt2 program with torch-cuda", hint="Use --provider torch-cpu.")
    return TorchRunner(_only_model(path, adapter), "cuda", threads=threads)


def _only_model(path: Path, adapter: Path | None) -> Path:
    if adapter is not None:
        raise RunError(f"{adapter}: PyTorch activates no .onnx_adapter.", hint="Use --provider cpu or cuda.")
    if path.suffix.lower() != ".pt2":
        raise RunError(f"{path}: PyTorch runs .pt2 programs.", hint="Use --provider cpu or cuda for an .onnx file.")
    return path


class TorchRunner:
    """An exported program on a device; float32 products without TF32.

    Args:
        path: A ``.pt2`` file that runs no code when it is loaded.
        device: "cpu" or "cuda".
        threads: Threads inside one operator; 0 is torch's own choice.

    Raises:
        InputError: The file cannot be read.
        MissingExtraError: torch is not installed.
    """

    def __init__(self, path: Path, device: str = "cpu", *, threads: int = 0) -> None:
        torch: Any = require("torch", "run .pt2 programs")
        from loracc.sources.exported_program import load_program
        from loracc.sources.pt2_archive import read_archive

        self.name = f"torch {torch.__version__} {device}"
        self._torch, self._device = torch, device
        if threads:
            torch.set_num_threads(threads)
        program = load_program(read_archive(path))
        if device != "cpu":
            torch.backends.cuda.matmul.allow_tf32 = False
            torch.backends.cudnn.allow_tf32 = False
            from torch.export.passes import move_to_device_pass

            program = move_to_device_pass(program, device)
        self._module = program.module()
        self._arguments = _arguments(program)
        self._spec = program.call_spec.in_spec
        self.inputs = [name for name, _ in self._arguments if name]
        self.outputs = _output_names(program)

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        results = self._call(self._placed(inputs))()
        return {name: to_numpy(self._torch, value) for name, value in zip(self.outputs, results, strict=True)}

    def timed(self, inputs: Mapping[str, Array]) -> TimedCall:
        call = self._call(self._placed(inputs))
        call()  # what is refused is said before the clock runs
        if self._device == "cpu":
            return wall_clock(call)
        timed, how = captured(self._torch, call)
        self.name = f"{self.name}, {how}"
        return timed

    def _placed(self, inputs: Mapping[str, Array]) -> list[Any]:
        missing = [name for name in self.inputs if name not in inputs]
        if missing:
            raise RunError(f"no value for the program's inputs {', '.join(missing)}.", hint="Give them with --inputs.")
        return [
            to_torch(self._torch, inputs[name]).to(self._device) if name else constant
            for name, constant in self._arguments
        ]

    def _call(self, values: list[Any]) -> Any:
        """A call of the program; returns its tensors in order."""
        from torch.utils import _pytree

        torch, module = self._torch, self._module
        arguments, keywords = _pytree.tree_unflatten(values, self._spec)

        def once() -> list[Any]:
            with torch.inference_mode():
                result = module(*arguments, **keywords)
            return [leaf for leaf in _pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor)]

        return self._refusals(once)

    def _refusals(self, once: Any) -> Any:
        """``once``, whose first failure is the user's: shapes and types that the program was not exported for."""

        def call() -> list[Any]:
            try:
                return list(once())
            except (RuntimeError, ValueError, TypeError, AssertionError) as error:  # torch's guards raise any of these
                first = str(error).strip().splitlines() or [type(error).__name__]
                raise RunError(f"{self.name} does not run the program: {first[0]}") from error

        return call


def _arguments(program: Any) -> list[tuple[str, Any]]:
    """The program's flat inputs: (name, None) of a tensor, ("", value) of a constant."""
    from torch.export.graph_signature import ConstantArgument, InputKind
    from torch.utils import _pytree

    from loracc.sources.torch_trace import leaf_names

    spec = program.call_spec.in_spec
    flat = [s.arg for s in program.graph_signature.input_specs if s.kind == InputKind.USER_INPUT]
    _, keywords = _pytree.tree_unflatten(list(range(spec.num_leaves)), spec)
    dotted = {name.replace(".", "_"): name for name in leaf_names(keywords) if "." in name}
    return [
        ("", arg.value) if isinstance(arg, ConstantArgument) else (dotted.get(arg.name, arg.name), None) for arg in flat
    ]


def _output_names(program: Any) -> list[str]:
    """As the ONNX export of the program names them."""
    from torch.export.graph_signature import OutputKind, TensorArgument
    from torch.utils import _pytree

    from loracc.sources.torch_trace import leaf_names

    specs = [s.arg for s in program.graph_signature.output_specs if s.kind == OutputKind.USER_OUTPUT]
    spec = program.call_spec.out_spec
    names = leaf_names(_pytree.tree_unflatten(list(range(spec.num_leaves)), spec)) if spec is not None else []
    if len(names) != len(specs):
        names = [""] * len(specs)
    taken = {name for name, _ in _arguments(program)}
    return [
        name if name and name not in taken else arg.name
        for name, arg in zip(names, specs, strict=True)
        if isinstance(arg, TensorArgument)
    ]


def to_torch(torch: Any, array: Array) -> Any:
    """A copy as a tensor. numpy has no bfloat16: its bits travel as int16."""
    array = np.array(array, order="C")  # torch wants to own what it writes to
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def to_numpy(torch: Any, tensor: Any) -> Array:
    """A tensor's values on the host."""
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        return np.asarray(tensor.view(torch.int16).numpy()).view(ml_dtypes.bfloat16)
    return np.asarray(tensor.numpy())
