"""Annotated deltas become the initializers' values: lazily, and never by a node."""

from __future__ import annotations

import onnx_ir as ir

from loracc.encodings.decoded import DecodedTensor
from loracc.folded import FoldedTensor, bindings_of
from loracc.requantized import RequantizedTensor

__all__ = ["FoldPass"]


class FoldPass(ir.passes.InPlacePass):
    """Replace each annotated initializer's value by a :class:`loracc.folded.FoldedTensor`, of a quantized weight by a
    :class:`loracc.requantized.RequantizedTensor`.

    The graph's nodes, names, shapes and dtypes stay as they are: the folded graph is the base graph. Nothing is read
    or computed before a target writes the tensor. Run again, it changes nothing.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for value in model.graph.initializers.values():
            bindings = bindings_of(value)
            base = value.const_value
            if not bindings or base is None:
                continue
            if isinstance(base, FoldedTensor):
                if base.bindings and set(map(id, base.bindings)) == set(map(id, bindings)):
                    continue
                raise AssertionError(f"initializer {value.name!r} was folded with other deltas before")
            if isinstance(base, DecodedTensor):
                requantized = RequantizedTensor(base, bindings)
                requantized.check_base()
                value.const_value = requantized
            else:
                value.const_value = FoldedTensor(base, bindings)
            modified = True
        return ir.passes.PassResult(model, modified)
