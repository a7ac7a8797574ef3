"""The bias of an integer operator follows its weight's scale.

ONNX Runtime runs ``Gemm(DQ(x), DQ(W), DQ(b))`` on the codes: b's are added to sums of products of x's and W's, whatever
scale the graph gives them. Quantizers write them with scale(x) · scale(W), and a fold that changes scale(W) must change
the bias's scale and codes with it (measured: 8 to 14 % off otherwise).

1. A bias of one operator alone, in the integers of a DequantizeLinear, gets its codes anew.
2. Where it has other readers too, the weight keeps its scales.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from loracc.encodings.decoded import DecodedTensor
from loracc.requantized import RequantizedTensor

__all__ = ["LinkBiases", "follow_weights", "linked_biases"]

#: Operators whose bias is their third input and their weight the second.
_OPERATORS = frozenset({"Gemm", "Conv", "ConvTranspose"})


def linked_biases(model: ir.Model) -> Iterator[tuple[ir.Value, ir.Value]]:
    """(weight, bias): both decoded, the bias from 32-bit integers."""
    for node in model.graph:
        if node.op_type not in _OPERATORS or node.domain not in ("", "ai.onnx") or len(node.inputs) < 3:
            continue
        weight, bias = node.inputs[1], node.inputs[2]
        if weight is None or bias is None:
            continue
        ours, theirs = _decoded(weight), _decoded(bias)
        if ours is not None and theirs is not None and theirs.weight.bits == 32:
            yield weight, bias


def _decoded(value: ir.Value) -> DecodedTensor | None:
    tensor = value.const_value if value.is_initializer() else None
    decoded = tensor.decoded if isinstance(tensor, RequantizedTensor) else tensor
    return decoded if isinstance(decoded, DecodedTensor) else None


class LinkBiases(ir.passes.InPlacePass):
    """See the module's docstring; to run after the folds are in place."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for weight, bias in list(linked_biases(model)):
            leader, follower = weight.const_value, bias.const_value
            if not isinstance(leader, RequantizedTensor):
                continue
            modified = True
            if len(bias.uses()) > 1:
                weight.const_value = leader.pinned("its bias has other readers")
                continue
            bindings = follower.bindings if isinstance(follower, RequantizedTensor) else ()
            decoded = _decoded(bias)
            assert decoded is not None
            bias.const_value = RequantizedTensor(decoded, bindings, leader.dither, leader=leader)
        return ir.passes.PassResult(model, modified)


def follow_weights(model: ir.Model) -> None:
    """Biases that follow a weight follow what has taken its place since, in place."""
    for weight, bias in list(linked_biases(model)):
        leader, follower = weight.const_value, bias.const_value
        if isinstance(leader, RequantizedTensor) and isinstance(follower, RequantizedTensor) and follower.leader:
            bias.const_value = RequantizedTensor(follower.decoded, follower.bindings, follower.dither, leader)
