"""Which operators ONNX Runtime's CPU provider computes in which type: asked of its own registry."""

from __future__ import annotations

from collections.abc import Collection
from functools import cache
from typing import Any

import onnx_ir as ir

from loracc.passes.value_types import schema_of, type_string
from loracc.runners.runner import onnxruntime

__all__ = ["has_kernel"]

_CPU = "CPUExecutionProvider"


def has_kernel(node: ir.Node, values: Collection[ir.Value], dtype: ir.DataType, opsets: dict[str, int]) -> bool:
    """Whether the CPU provider has a kernel for the node with those of its inputs and outputs of type ``dtype``.

    An operator that the runtime expands into others counts as having none: its parts may lack one. Kernels may be
    registered for types that the operator's own schema refuses (SkipSimplifiedLayerNormalization in float64): those
    are never reached.
    """
    formals, since = _formals(node, opsets)
    wanted = type_string(dtype)
    typed = [
        formal[min(index, len(formal) - 1)]
        for formal, actual in zip(formals, (node.inputs, node.outputs), strict=True)
        for index, value in enumerate(actual)
        if formal and value is not None and value in values
    ]
    return all(_allowed(node, name, wanted) for _, name in typed) and any(
        lo <= since <= hi
        and all(wanted in constraints.get(variable, constraints.get(name, {wanted})) for variable, name in typed)
        for lo, hi, constraints in _kernels().get((node.domain.replace("ai.onnx", ""), node.op_type), ())
    )


def _formals(node: ir.Node, opsets: dict[str, int]) -> tuple[list[list[tuple[str, str]]], int]:
    """((type variable, formal name) of inputs, of outputs) and the schema's version."""
    schema = schema_of(node, opsets)
    if schema is not None:
        return [[(f.type_str, f.name) for f in part] for part in (schema.inputs, schema.outputs)], schema.since_version
    own = _contrib_schemas().get((node.domain, node.op_type))
    if own is None:
        return [[], []], 1
    return [[(f.typeStr, f.name) for f in part] for part in (own.inputs, own.outputs)], int(own.since_version)


def _allowed(node: ir.Node, formal: str, wanted: str) -> bool:
    """What the runtime's own schema of the operator says; ONNX's operators have been asked before."""
    own = _contrib_schemas().get((node.domain, node.op_type))
    if own is None:
        return True
    return all(wanted in f.types for f in (*own.inputs, *own.outputs) if f.name == formal)


@cache
def _kernels() -> dict[tuple[str, str], list[tuple[int, int, dict[str, frozenset[str]]]]]:
    """(domain, operator) -> (first version, last version, allowed types by type variable) of each kernel."""
    table: dict[tuple[str, str], list[tuple[int, int, dict[str, frozenset[str]]]]] = {}
    for kernel in _state().get_all_opkernel_def():
        if kernel.provider == _CPU:
            lo, hi = kernel.version_range
            types = {name: frozenset(allowed) for name, allowed in kernel.type_constraints.items()}
            table.setdefault((kernel.domain, kernel.op_name), []).append((lo, hi, types))
    return table


@cache
def _contrib_schemas() -> dict[tuple[str, str], Any]:
    return {(schema.domain, schema.name): schema for schema in _state().get_all_operator_schema() if schema.domain}


def _state() -> Any:
    onnxruntime()
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    return state
