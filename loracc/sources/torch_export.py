"""A ``torch.export.ExportedProgram`` becomes an ``ir.Model`` in which every parameter keeps its module path.

Shared by every torch front end. torch's exporter runs unoptimized, then the same optimization follows here with the
parameters opaque (``passes/optimize_graph.py``), so that the result has the nodes of ``torch.onnx.export(model,
dynamo=True)`` and the names of the module. Nothing is read: the parameters may be on the meta device.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import onnx_ir as ir
from onnx_ir.passes.common import InlinePass

from loracc.errors import UnsupportedError, require
from loracc.passes.hoist_transposes import SCOPES_KEY, HoistTransposes, reader_alias
from loracc.passes.optimize_graph import OptimizeGraph
from loracc.quiet import quiet
from loracc.sources.torch_trace import TORCH_LOGGERS, leaf_names, reason_of
from loracc.tensors import dims

if TYPE_CHECKING:
    import torch

__all__ = ["SHARED_LIMIT", "name_dimensions", "parameter_names", "same_tensors", "tied_groups", "to_ir"]

#: torch's exporter leaves the Transpose of a shared weight above this many elements (onnxscript's folding limit).
SHARED_LIMIT = 8192
#: Node metadata worth keeping: how later tools find the module of a node. The rest holds this machine's paths.
_KEPT_METADATA = (SCOPES_KEY, "namespace")


def to_ir(
    program: torch.export.ExportedProgram,
    opset: int | None = None,
    lazy: Mapping[str, ir.TensorProtocol] | None = None,
) -> ir.Model:
    """The program as a graph: parameters are initializers named by their module path, ``Transpose(weight)`` is hoisted.

    Outputs are named by the fields of what ``forward`` returns, where it has fields.

    Args:
        program: Any exported program; its tensors may be real, fake or on the meta device.
        opset: ONNX opset; torch's default when None.
        lazy: Tensors to hold in the place of the program's, by name in its state dict: the same values, in their file.

    Raises:
        UnsupportedError: torch has no translation for some operator.
    """
    torch = require("torch", "export a PyTorch model")
    groups = tied_groups(program)
    protected = parameter_names(program)
    with quiet(*TORCH_LOGGERS):
        try:
            exported = torch.onnx.export(program, dynamo=True, optimize=False, verbose=False, opset_version=opset)
        except torch.onnx.errors.OnnxExporterError as error:
            raise UnsupportedError(
                f"torch {torch.__version__} cannot write this model as ONNX: {reason_of(error)}",
                hint="Try another --opset, or export the model to ONNX yourself and give that file.",
            ) from error
        model: ir.Model = exported.model
        _attach(model.graph, lazy or {})
        InlinePass()(model)
        name_tied(model.graph, groups)
        HoistTransposes(groups, SHARED_LIMIT)(model)
        OptimizeGraph(protected)(model)
    strip_metadata(model)
    _name_inputs(model.graph, program)
    _name_outputs(model.graph, program)
    return model


def _attach(graph: ir.Graph, lazy: Mapping[str, ir.TensorProtocol]) -> None:
    for name, tensor in lazy.items():
        if name in graph.initializers:
            value = graph.initializers[name]
            assert value.const_value is not None
            if tensor.dtype != value.const_value.dtype or dims(tensor) != dims(value.const_value):
                raise AssertionError(f"{name}: {tensor} attached in the place of {value.const_value}")
            value.const_value = tensor


def _name_inputs(graph: ir.Graph, program: torch.export.ExportedProgram) -> None:
    """Tensors inside of mappings are named by their path (torch joins it with underscores); others have their name."""
    from torch.utils import _pytree

    spec = program.call_spec.in_spec
    _, keywords = _pytree.tree_unflatten(list(range(spec.num_leaves)), spec)
    names = leaf_names(keywords)
    if len(names) == len(graph.inputs):
        for value, name in zip(graph.inputs, names, strict=True):
            if "." in name and value.name == name.replace(".", "_"):
                value.name = name


def _name_outputs(graph: ir.Graph, program: torch.export.ExportedProgram) -> None:
    """Constants among the outputs (a None) are no outputs of the graph."""
    from torch.export.graph_signature import ConstantArgument, OutputKind
    from torch.utils import _pytree

    spec = program.call_spec.out_spec
    if spec is None:
        return
    names = leaf_names(_pytree.tree_unflatten(list(range(spec.num_leaves)), spec))
    specs = [s for s in program.graph_signature.output_specs if s.kind == OutputKind.USER_OUTPUT]
    kept = [name for name, s in zip(names, specs, strict=True) if not isinstance(s.arg, ConstantArgument)]
    if len(kept) == len(graph.outputs):
        for value, name in zip(graph.outputs, kept, strict=True):
            _name_output(graph, value, name)


def _name_output(graph: ir.Graph, value: ir.Value, name: str) -> None:
    taken = {v.name for v in (*graph.inputs, *graph.initializers.values())}
    if not name or name in taken or value.is_graph_input() or value.is_initializer():
        return
    for node in graph.all_nodes():
        for output in node.outputs:
            if output.name == name and output is not value:
                output.name = f"{name}.inner"
    value.name = name


def parameter_names(program: torch.export.ExportedProgram) -> frozenset[str]:
    """What a state dict holds: parameters and persistent buffers. The rest (rotary tables) are constants."""
    signature = program.graph_signature
    volatile = set(signature.non_persistent_buffers)
    return frozenset(name for name in (*signature.parameters, *signature.buffers) if name not in volatile)


def tied_groups(program: torch.export.ExportedProgram) -> list[tuple[str, ...]]:
    """Names of parameters that are one tensor (a tied embedding), in the program's order."""
    return same_tensors(program.state_dict)


def same_tensors(state: Mapping[str, torch.Tensor]) -> list[tuple[str, ...]]:
    """Names of a state dict that are one and the same view of one storage."""
    groups: dict[tuple[Any, ...], list[str]] = {}
    for name, tensor in state.items():
        storage = tensor.untyped_storage()._cdata  # identity of the storage; data_ptr() is 0 on the meta device
        if tensor.numel():
            view = (storage, tensor.storage_offset(), *tensor.shape, *tensor.stride())
            groups.setdefault(view, []).append(name)
    return [tuple(names) for names in groups.values() if len(names) > 1]


def name_tied(graph: ir.Graph, groups: Sequence[Sequence[str]]) -> None:
    """torch keeps any one name of a tied parameter: give it the name that its readers mean, when they agree."""
    for names in groups:
        held = [graph.initializers[name] for name in names if name in graph.initializers]
        for value in held:
            meant = {reader_alias(use.node, names) for use in value.uses()}
            if len(meant) == 1 and None not in meant:
                name = str(meant.pop())
                if name not in graph.initializers:
                    value.name = name


def strip_metadata(model: ir.Model) -> None:
    """Drop what names this machine or this process (stack traces, addresses); keep the module scopes."""
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.graph.meta.clear()
    for value in (*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    for node in model.graph.all_nodes():
        kept = {key: node.metadata_props[key] for key in _KEPT_METADATA if key in node.metadata_props}
        node.metadata_props.clear()
        node.metadata_props.update(kept)
        for output in node.outputs:
            output.metadata_props.clear()


def name_dimensions(model: ir.Model, names: Mapping[str, Sequence[str | None]]) -> list[str]:
    """Give the dynamic axes of the inputs readable symbols, everywhere in the graph.

    Args:
        names: Per input, a symbol for each axis that should be dynamic: ``{"input_ids": ("batch", "sequence")}``.

    Returns:
        The axes that torch made constant all the same, as "input_ids[1] = 7".
    """
    renamed: dict[str, str] = {}
    fixed: list[str] = []
    for value in model.graph.inputs:
        for axis, symbol in enumerate(names.get(value.name or "", ())):
            if symbol is None or value.shape is None:
                continue
            dim = value.shape[axis]
            if isinstance(dim, int):
                fixed.append(f"{value.name}[{axis}] = {dim}")
            elif isinstance(dim, ir.SymbolicDim) and dim.value is not None:
                renamed.setdefault(dim.value, symbol)
    if renamed:
        _rename_symbols(model, renamed)
    return fixed


def _rename_symbols(model: ir.Model, renamed: Mapping[str, str]) -> None:
    pattern = re.compile(r"\b(" + "|".join(map(re.escape, renamed)) + r")\b")
    values = [*model.graph.inputs, *model.graph.outputs]
    for node in model.graph.all_nodes():
        values.extend(node.outputs)
    spelt: dict[tuple[str, ...], str] = {}
    for value in dict.fromkeys(values):
        if value.shape is None or value.shape.is_static():
            continue
        renewed = [
            pattern.sub(lambda m: renamed[m[1]], d.value) if isinstance(d, ir.SymbolicDim) and d.value else d
            for d in value.shape.dims
        ]
        spelt |= {_terms(d): d for d in renewed if isinstance(d, str) and value.is_graph_input()}
        value.shape = ir.Shape([spelt.get(_terms(d), d) if isinstance(d, str) else d for d in renewed])


def _terms(symbol: str) -> tuple[str, ...]:
    """torch writes the terms of one sum in any order; an input's spelling is everybody's.

    >>> _terms("b + a") == _terms("a + b")
    True
    """
    return tuple(sorted(symbol.split(" + ")))
