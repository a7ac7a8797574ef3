"""ONNX files of any exporter as base models; weights in external data stay there."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from pathlib import Path

import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError
from onnx_ir.passes.common import LiftConstantsToInitializersPass, RemoveInitializersFromInputsPass

from loracc.dtypes import is_float
from loracc.errors import InputError, UnsupportedError
from loracc.model import BaseModel, LoadOptions
from loracc.passes.decode_weights import DecodeWeights
from loracc.passes.find_sites import find_sites
from loracc.passes.lift_subgraph_weights import LiftSubgraphWeights
from loracc.random_nodes import random_nodes
from loracc.sites import SiteTable
from loracc.sources.onnx_tensors import check_tensors
from loracc.sources.onnx_wiring import check_wiring, forget_negative_sizes, put_in_order
from loracc.sources.user_inputs import given_inputs, misfits

__all__ = ["load_onnx", "read_graph"]

_INPUTS = "Give others with --inputs or --input."

#: Operators that read codes, scales and zero points.
_QUANTIZED = frozenset({"DequantizeLinear", "MatMulNBits", "GatherBlockQuantized", "DynamicQuantizeMatMul"})


def load_onnx(path: Path, options: LoadOptions) -> BaseModel:
    """Read an ONNX model. Its sample inputs are what the user gave, if anything.

    Raises:
        InputError: Damaged, unsafe external data, a graph that does not hang together, inputs it has not.
        UnsupportedError: Sparse initializers.
    """
    _refuse_unused(path, options)
    model = read_graph(path)
    inputs = given_inputs(options)
    names = [str(value.name) for value in model.graph.inputs]
    if unknown := [name for name in inputs if name not in names]:
        raise InputError(f"{path}: the model has no input {unknown[0]!r}.", hint=f"Its inputs: {', '.join(names)}.")
    odd = [text for v in model.graph.inputs if v.name in inputs for text in misfits(v, inputs[str(v.name)])]
    if odd:
        raise InputError(f"{path}: the inputs do not fit the model:\n  " + "\n  ".join(odd), hint=_INPUTS)
    try:
        sites = find_sites(model)
    except InputError as error:
        raise InputError(f"{path}: {error.message}", hint=error.hint) from error
    return BaseModel(
        path=path,
        format="onnx",
        ir=model,
        sites=sites,
        sample_inputs=inputs,
        notes=(*_notes(sites), *_random_notes(model)),
    )


def _refuse_unused(path: Path, options: LoadOptions) -> None:
    """An option that cannot do anything here is a misunderstanding."""
    told = {
        "--opset": options.opset,
        "--task": options.task,
        "--part": options.part,
        "--factory": options.factory,
        "--dynamic": options.dynamic,
    }
    if given := [name for name, value in told.items() if value]:
        raise InputError(
            f"{path}: {', '.join(given)} tells how to export a PyTorch model, and this is an .onnx file already.",
            hint="Leave it out: the graph is kept as it is.",
        )


def _notes(sites: SiteTable) -> tuple[str, ...]:
    folded = [site.initializer for site in sites if not site.source and site.kind in ("conv", "conv_transpose")]
    if not folded:
        return ()
    names = ", ".join(folded[:3]) + (", ..." if len(folded) > 3 else "")
    return (
        f"{len(folded)} convolution weight(s) cannot be named ({names}): the exporter seems to have folded a batch "
        "normalisation into them, and a delta for the original weight does not fit the folded one.",
    )


def _random_notes(model: ir.Model) -> list[str]:
    """A graph that computes something random can be folded into; its outputs cannot be compared."""
    random = random_nodes(model)
    if not random:
        return []
    count = f"{len(random)} node(s) ({random[0].op_type} {random[0].name!r}, ...)"
    training = any(node.op_type == "Dropout" for node in random)
    return [
        f"the graph was exported in training mode: {count} drop at random, and its outputs prove nothing. "
        "Call model.eval() before the export."
        if training
        else f"{count} draw at random and have no seed: the outputs prove nothing."
    ]


def read_graph(path: Path) -> ir.Model:
    """The checked graph of an ONNX file, every weight an initializer and every node with a name of its own.

    Quantized weights are decoded: :mod:`loracc.passes.decode_weights`.
    """
    proto = _parse(path)
    if proto.graph.sparse_initializer:  # onnx_ir drops them without a word (docs/upstream.md)
        name = proto.graph.sparse_initializer[0].values.name
        raise UnsupportedError(f"{path}: sparse initializer {name!r}; loracc reads dense weights only.")
    check_tensors(path, proto)
    check_wiring(path, proto)
    forget_negative_sizes(proto)
    try:
        model = ir.serde.deserialize_model(proto)
    except Exception as error:  # a parser's boundary: onnx_ir wraps whatever a malformed graph trips
        reason = str(error.__cause__ or error).strip().splitlines() or [type(error).__name__]
        raise InputError(
            f"{path}: an ONNX file whose graph cannot be read ({reason[0][:200]}).",
            hint="Check it with onnx.checker.check_model, and export it again.",
        ) from error
    put_in_order(path, model)
    _name_nodes(model)
    _lift_weights(model)
    LiftSubgraphWeights()(model)
    _separate_weights(model)
    DecodeWeights()(model)
    return model


def _parse(path: Path) -> onnx.ModelProto:
    try:
        proto = onnx.load(path, format="protobuf", load_external_data=False)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}.") from error
    except DecodeError as error:
        raise InputError(
            f"{path}: not a readable ONNX file ({error}).",
            hint="It is damaged or cut short: fetch or export it again.",
        ) from error
    if not proto.graph.node and not proto.graph.output:
        raise InputError(f"{path}: the ONNX graph is empty.", hint="Export the model again.")
    return proto


def _name_nodes(model: ir.Model) -> None:
    """Sites name the nodes that read them: a name must mean one node.

    ``onnx_ir``'s NameFixPass would name omitted optional outputs too, and so ask the runtime to compute them.
    """
    taken = {node.name for node in model.graph.all_nodes()}
    seen: set[str | None] = set()
    numbers: dict[str, Iterator[int]] = {}
    for node in model.graph.all_nodes():
        if not node.name or node.name in seen:
            base = node.name or f"node_{node.op_type}"
            rest = numbers.setdefault(base, count(2))
            node.name = next(name for i in rest if (name := f"{base}_{i}") not in taken)
            taken.add(node.name)
        seen.add(node.name)


def _lift_weights(model: ir.Model) -> None:
    """Weights that the exporter wrote as Constant nodes become initializers, under their value's name.

    A graph without such weights is left as it is.
    """
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        attribute = node.attributes.get("value")
        if node.op_type == "Constant" and attribute is not None and attribute.type == ir.AttributeType.TENSOR:
            tensor = attribute.as_tensor()
            weight = is_float(tensor.dtype) and len(tensor.shape) >= 2 and tensor.size >= 16
            if weight or any(user.op_type in _QUANTIZED for user, _ in node.outputs[0].uses()):
                LiftConstantsToInitializersPass()(model)
                return


def _separate_weights(model: ir.Model) -> None:
    """Before IR version 4 every initializer had to be listed as an input too, and was no less a constant for it."""
    if model.ir_version < 4:
        RemoveInitializersFromInputsPass()(model)
        model.ir_version = 4
