"""TorchScript files as base models, through torch's older exporter while torch still has it.

The exporter runs without parameters, which then appear as graph inputs under their names in the state dict; they become
initializers that hold the module's own tensors. That keeps every name, and the protobuf limit of 2 GB out of it.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir

from loracc.dtypes import Array
from loracc.errors import InputError, UnsupportedError, require
from loracc.model import BaseModel, LoadOptions
from loracc.passes.hoist_transposes import HoistTransposes
from loracc.passes.optimize_graph import OptimizeGraph
from loracc.quiet import quiet
from loracc.sources.torch_export import SHARED_LIMIT, same_tensors
from loracc.sources.torch_sites import trace_sites
from loracc.sources.torch_trace import TORCH_LOGGERS, as_tensor, reason_of
from loracc.sources.user_inputs import given_inputs, parse_dynamic_spec

__all__ = ["load_torchscript"]

#: The newest opset that the exporter writes without being asked.
_OPSET = 18


def load_torchscript(path: Path, options: LoadOptions) -> BaseModel:
    """Read a TorchScript file. It does not know the shapes of its inputs: the user gives samples.

    Raises:
        InputError: Damaged, or the inputs are missing or others than ``forward`` takes.
        UnsupportedError: The exporter cannot write it.
        MissingExtraError: torch is not installed.
    """
    torch = require("torch", "read a TorchScript file")
    with quiet(*TORCH_LOGGERS):
        try:
            module: Any = torch.jit.load(str(path), map_location="cpu")
        except Exception as error:  # a parser's boundary: RuntimeError for anything, from C++
            raise InputError(
                f"{path}: torch cannot read it as TorchScript ({reason_of(error)}).",
                hint="It is damaged or written by another torch version: save it again.",
            ) from error
        inputs = _inputs(path, module, options)
        graph = _export(path, module, inputs, options)
    state = dict(module.state_dict())
    tied = same_tensors(state)
    _parameters_inside(graph, state)
    HoistTransposes(tied, SHARED_LIMIT)(graph)
    OptimizeGraph(frozenset(state))(graph)
    return BaseModel(
        path=path,
        format="torchscript",
        ir=graph,
        sites=trace_sites(graph, state, tied),
        sample_inputs=inputs,
        notes=() if state else ("the module is frozen: its weights have lost their names",),
    )


def _inputs(path: Path, module: Any, options: LoadOptions) -> dict[str, Array]:
    """The user's inputs in the order of ``forward``."""
    arguments = module.forward.schema.arguments[1:]
    names = [argument.name for argument in arguments]
    given = given_inputs(options)
    wanted = [a.name for a in arguments if not a.has_default_value()]
    missing, unknown = [n for n in wanted if n not in given], [n for n in given if n not in names]
    if missing or unknown:
        problem = f"needs samples of {', '.join(missing)}" if missing else f"has no input {unknown[0]!r}"
        raise InputError(
            f"{path}: the TorchScript module {problem}; forward takes {', '.join(names)}.",
            hint=f"For example: --input {(missing or names or ['x'])[0]}:float32[2,16]",
        )
    ordered = [name for name in names if name in given]
    if ordered != names[: len(ordered)]:
        raise InputError(f"{path}: samples are needed for all inputs up to the last one given: {', '.join(names)}.")
    return {name: given[name] for name in ordered}


def _export(path: Path, module: Any, inputs: Mapping[str, Array], options: LoadOptions) -> ir.Model:
    import onnx
    import torch

    dynamic: dict[str, dict[int, str]] = {}
    for spec in map(parse_dynamic_spec, options.dynamic):
        dynamic.setdefault(spec.name, {})[spec.axis] = spec.symbol
    buffer = io.BytesIO()
    try:
        with torch.no_grad():
            torch.onnx.export(
                module,
                tuple(as_tensor(array) for array in inputs.values()),
                buffer,  # type: ignore[arg-type]  # taken with dynamo=False, in spite of its annotation
                dynamo=False,
                export_params=False,
                do_constant_folding=False,
                input_names=list(inputs),
                dynamic_axes=dynamic,
                opset_version=options.opset or _OPSET,
            )
    except Exception as error:  # an exporter's boundary: it also runs the module on the samples
        raise UnsupportedError(
            f"{path}: torch {torch.__version__} cannot write this TorchScript module as ONNX: {reason_of(error)}",
            hint="Check the inputs, or export the original module: torch.export.save (.pt2) or torch.onnx.export.",
        ) from error
    model = ir.serde.deserialize_model(onnx.load_from_string(buffer.getvalue()))
    _name_outputs(model.graph.outputs)
    return model


def _name_outputs(outputs: Sequence[ir.Value]) -> None:
    """The exporter's are numbers."""
    for i, value in enumerate(outputs):
        value.name = f"output_{i}" if len(outputs) > 1 else "output"


def _parameters_inside(model: ir.Model, state: Mapping[str, Any]) -> None:
    """Graph inputs that are parameters become initializers.

    The exporter merges parameters of equal values and leaves the other names on Identity nodes: those come apart again.
    """
    from onnx_ir.tensor_adapters import TorchTensor

    graph = model.graph
    for value in [value for value in graph.inputs if value.name in state]:
        graph.inputs.remove(value)
        value.const_value = TorchTensor(state[str(value.name)].detach(), name=value.name)
        graph.initializers.add(value)
    for node in list(graph):
        name, source = node.outputs[0].name, node.inputs[0] if node.inputs else None
        if node.op_type != "Identity" or name not in state or source is None or not source.is_initializer():
            continue
        tensor = TorchTensor(state[str(name)].detach(), name=name)
        node.outputs[0].name = None
        apart = ir.Value(name=name, type=source.type, shape=source.shape, const_value=tensor)
        node.outputs[0].replace_all_uses_with(apart)
        graph.remove(node, safe=True)
        graph.initializers.add(apart)
