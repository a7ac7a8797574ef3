"""Element types of values: filling in the ones a graph does not say, and asking an operator's schema about them.

ONNX files need not record the type of an intermediate value, and contrib operators have no schema that the checker
knows. A pass that changes types must know every one of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import onnx
import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from loracc.dtypes import is_float
from loracc.quiet import quiet

__all__ = ["allows", "fill_types", "schema_of", "type_string"]

_ONNX_DOMAINS = ("", "ai.onnx")
#: onnxruntime's operators with float inputs and, at these outputs, integers.
_INTEGERS = {"EmbedLayerNormalization": {1}, "BeamSearch": {0}, "GreedySearch": {0}, "Sampling": {0}}
#: Types that a schema may name outright.
_LITERALS = {"tensor(int64)": ir.DataType.INT64, "tensor(bool)": ir.DataType.BOOL, "tensor(float)": ir.DataType.FLOAT}


def fill_types(model: ir.Model) -> None:
    """Give every value of the main graph and its subgraphs an element type, in place.

    1. ONNX's own inference, where some type is missing.
    2. An operator that inference does not know gives its first float input's type to its outputs: true of every contrib
       operator's data output, and of the quantized ones (``QLinearAdd``) with their first input's.
    3. Behind such an operator inference has stopped: the schemas say which outputs are of which input's type.

    A value that stays without a type is not a float tensor.
    """
    if not _untyped(model):
        return
    with quiet("onnx_ir"):
        ShapeInferencePass(check_type=False, strict_mode=False, data_prop=False)(model)
    for value in _untyped(model):
        node = value.producer()
        schema = schema_of(node, model.graph.opset_imports)
        if node is not None:
            source = _contrib_type(node, value) if schema is None else _schema_type(schema, node, value)
            if source is not None:
                value.dtype = source


def _contrib_type(node: ir.Node, value: ir.Value) -> ir.DataType | None:
    """Rule 2."""
    if node.domain == "com.microsoft" and node.outputs.index(value) in _INTEGERS.get(node.op_type, ()):
        return ir.DataType.INT32
    first = node.inputs[0] if node.inputs else None
    if node.op_type.startswith("QLinear") and first is not None:
        return first.dtype
    return next((v.dtype for v in node.inputs if v is not None and _float(v)), None)


def _schema_type(schema: onnx.defs.OpSchema, node: ir.Node, value: ir.Value) -> ir.DataType | None:
    """Rule 3. A Cast's type is its attribute's."""
    if node.op_type == "Cast" and "to" in node.attributes:
        return ir.DataType(node.attributes["to"].as_int())
    typed = list(formal_types(schema, node))
    variable = next(variable for variable, _, other in typed if other is value)
    known = (v.dtype for other, _, v in typed if other == variable and v.dtype is not None)
    return next(known, _LITERALS.get(variable))


def schema_of(node: ir.Node | None, opset_imports: dict[str, int]) -> onnx.defs.OpSchema | None:
    """ONNX's schema of a node; None for other domains' operators."""
    if node is None or node.domain not in _ONNX_DOMAINS:
        return None
    version = node.version or opset_imports.get("", onnx.defs.onnx_opset_version())
    try:
        return onnx.defs.get_schema(node.op_type, min(version, onnx.defs.onnx_opset_version()))
    except onnx.defs.SchemaError:
        return None


def type_string(dtype: ir.DataType) -> str:
    """``tensor(float16)``, as schemas and kernels call it.

    >>> type_string(ir.DataType.DOUBLE), type_string(ir.DataType.BFLOAT16)
    ('tensor(double)', 'tensor(bfloat16)')
    """
    return f"tensor({dtype.name.lower()})"


def formal_types(schema: onnx.defs.OpSchema, node: ir.Node) -> Iterator[tuple[str, str, ir.Value]]:
    """(type variable or literal type, formal name, value) of each input and output that is there."""
    for formals, values in ((schema.inputs, node.inputs), (schema.outputs, node.outputs)):
        for index, value in enumerate(values):
            if value is not None and formals:
                formal = formals[min(index, len(formals) - 1)]  # the last one may be variadic
                yield formal.type_str, formal.name, value


def allows(schema: onnx.defs.OpSchema | None, node: ir.Node, values: Iterable[ir.Value], to: ir.DataType) -> bool:
    """Whether the schema lets those inputs and outputs of the node be of type ``to``; True where there is no schema."""
    if schema is None:
        return True
    wanted, chosen = type_string(to), set(values)
    constraints = {c.type_param_str: set(c.allowed_type_strs) for c in schema.type_constraints}
    return all(
        wanted in constraints.get(variable, {variable})
        for variable, _, value in formal_types(schema, node)
        if value in chosen
    )


def _float(value: ir.Value) -> bool:
    return value.dtype is not None and is_float(value.dtype)


def _untyped(model: ir.Model) -> list[ir.Value]:
    return [
        value
        for node in ir.traversal.RecursiveGraphIterator(model.graph)
        for value in node.outputs
        if value.type is None and value.name
    ]
