"""Graphs in words: what a node, a value or an attribute is called, and where two lists of operators part."""

from __future__ import annotations

import difflib
from collections.abc import Iterator

import onnx_ir as ir

__all__ = ["attribute_text", "node_text", "nodes_of", "operator_diff", "origin_text", "shape_text", "value_text"]

#: Differences between operator lists that are told.
_SHOWN = 5


def nodes_of(model: ir.Model) -> Iterator[ir.Node]:
    yield from ir.traversal.RecursiveGraphIterator(model.graph)
    for function in model.functions.values():
        yield from ir.traversal.RecursiveGraphIterator(function)


def operator_diff(base: ir.Model, out: ir.Model) -> list[str]:
    """Where the sequences of operators part: what a person looks for first."""
    ours, theirs = list(nodes_of(base)), list(nodes_of(out))
    matcher = difflib.SequenceMatcher(
        None, [node.op_type for node in ours], [node.op_type for node in theirs], autojunk=False
    )
    found = []
    for tag, i, j, k, m in matcher.get_opcodes():
        if tag == "equal":
            continue
        after = f" after {node_text(ours[i - 1])}" if i else " at the start"
        gone, new = ", ".join(map(node_text, ours[i:j])), ", ".join(map(node_text, theirs[k:m]))
        if tag == "insert":
            found.append(f"the output has {new} more{after}")
        elif tag == "delete":
            found.append(f"the output lacks {gone}{after}")
        else:
            found.append(f"the output has {new} in place of {gone}{after}")
        if len(found) == _SHOWN:
            break
    return found


def shape_text(value: ir.Value) -> list[str] | None:
    return None if value.shape is None else [str(n) for n in value.shape]


def value_text(value: ir.Value) -> str:
    return f"{value.type}{shape_text(value) if value.shape is not None else ''}"


def node_text(node: ir.Node) -> str:
    return f"{node.op_type} {node.name!r}" if node.name else node.op_type


def origin_text(value: ir.Value) -> str:
    producer = value.producer()
    if value.is_initializer():
        return f"initializer {value.name}"
    return f"the result of {node_text(producer)}" if producer is not None else f"input {value.name}"


def attribute_text(attribute: ir.Attr | None) -> str:
    if attribute is None:
        return "absent"
    text = attribute.ref_attr_name if attribute.is_ref() else str(attribute.value)
    return text if text and len(text) <= 60 else f"{str(text)[:57]}..."
