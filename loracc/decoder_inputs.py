"""Sizes of a decoder's inputs that its symbols do not say: what its cache and its mask must fit.

Exporters name the axes of a cache as they like (onnxruntime-genai: ``past_sequence_length``, ``total_sequence_length``,
``kv_cache_dim``). The mask is as long as past and new tokens together, and the cache's other axes are those of the keys
and values that the graph joins to it.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable

import onnx_ir as ir

__all__ = ["counts_tokens", "decoder_sizes", "symbol_sums"]

#: Attention operators: index of the first cache input, and of the query, key and value before them.
_CACHED = {"GroupQueryAttention": (3, 0, 1), "MultiHeadAttention": (6, 0, 1), "Attention": (4, 0, 1)}
#: Tokens in the cache at a later call.
_PAST = 7
#: What exporters call a decoder's new tokens.
_TOKENS = ("input_ids", "inputs_embeds", "decoder_input_ids")


def decoder_sizes(model: ir.Model, *, step: bool = False) -> dict[str, int]:
    """Sizes of symbols for a first call, with nothing in the cache yet; empty for a graph that takes no cache.

    Args:
        step: For a later call: one new token after some.
    """
    past, new = _past_and_new(model)
    if not past:
        return {}
    counts = {**dict.fromkeys(past, _PAST), **dict.fromkeys(new, 1)} if step else dict.fromkeys(past, 0)
    return {**_widths(model), **counts}


def counts_tokens(model: ir.Model) -> bool:
    """Whether the mask is only summed up: padding at its end would leave rows that no kernel computes."""
    return any(node.op_type == "GroupQueryAttention" for node in model.graph)


def symbol_sums(model: ir.Model) -> dict[str, tuple[str, str]]:
    """{a mask's length: (the past's, the new tokens')} for symbols that do not say it themselves."""
    past, new = _past_and_new(model)
    total = {symbol for value in model.graph.inputs for symbol in _symbols(value) if symbol.lower().startswith("total")}
    return {symbol: (min(past), min(new)) for symbol in total} if past and new else {}


def _past_and_new(model: ir.Model) -> tuple[set[str], set[str]]:
    """Symbols of how many tokens are in the cache, and of how many come now."""
    inputs = model.graph.inputs
    past = {symbol for value in inputs if _is_past(value) for symbol in _symbols(value) if "past" in symbol}
    new = {symbol for value in inputs if str(value.name) in _TOKENS for symbol in _symbols(value)[1:2]}
    return past, new


def _widths(model: ir.Model) -> dict[str, int]:
    """Sizes of a cache's own axes, from the operators that read it."""
    found: dict[str, int] = {}
    for value in model.graph.inputs:
        if _is_past(value) and value.shape is not None and len(value.shape) == 4:
            for node, index in value.uses():
                for axis, size in _sizes(node, index):
                    symbol = value.shape[axis]
                    if not isinstance(symbol, int) and symbol.value:
                        found.setdefault(str(symbol.value), size)
    return found


def _is_past(value: ir.Value) -> bool:
    return "past" in str(value.name) and value.shape is not None and len(value.shape) > 2


def _symbols(value: ir.Value) -> list[str]:
    dims: Iterable[int | ir.SymbolicDim] = value.shape if value.shape is not None else ()
    return [str(dim.value) for dim in dims if not isinstance(dim, int) and dim.value and _is_name(str(dim.value))]


def _is_name(symbol: str) -> bool:
    try:
        return isinstance(ast.parse(symbol, mode="eval").body, ast.Name)
    except SyntaxError:
        return False


def _sizes(node: ir.Node, index: int) -> list[tuple[int, int]]:
    """(axis of the cache, its size) as far as one reader tells."""
    if node.op_type == "Concat" and node.attributes.get_int("axis", 0) in (2, -2):
        others = [v for i, v in enumerate(node.inputs) if i != index and v is not None and v.shape is not None]
        return [
            (axis, size)
            for other in others
            if other.shape is not None and len(other.shape) == 4
            for axis in (1, 3)
            if isinstance(size := other.shape[axis], int)
        ]
    if node.op_type in _CACHED and node.domain == "com.microsoft":
        first, query, key = _CACHED[node.op_type]
        heads, joint = node.attributes.get_int("num_heads", 0), node.attributes.get_int("kv_num_heads", 0)
        width = _width(node.inputs[query])
        if index not in (first, first + 1) or not heads or width is None:
            return []
        packed = key >= len(node.inputs) or node.inputs[key] is None
        return [(3, width // (heads + 2 * (joint or heads) if packed else heads))]
    return []


def _width(value: ir.Value | None) -> int | None:
    """Length of a value's last axis; of a product's result, that of its weight."""
    if value is None:
        return None
    if value.shape is not None and len(value.shape) and isinstance(value.shape[-1], int):
        return value.shape[-1]
    node = value.producer()
    weight = node.inputs[1] if node is not None and node.op_type == "MatMul" else None
    return _width(weight) if weight is not None and weight.is_initializer() else None
