"""The optimization torch's exporter does by default, with the parameters opaque.

The exporter's ``optimize=True`` is ``onnxscript.optimizer.optimize_ir`` and then
``onnxscript.rewriter.onnx_fusions.fuse`` (onnxscript 0.7, ``_framework_apis/torch_2_8.py``). Left to themselves they

* fold expressions of weights into nameless ``val_7``, so that no adapter finds them again,
* drop a bias that happens to be zero, though an adapter may be about to train it,
* merge initializers with equal bytes (all the biases of a fresh model),
* fuse BatchNormalization into a convolution's weight, which the adapter's delta would then miss,

and read every weight to find out. Here the protected initializers have no value while those passes run: the graph is
optimized as far as it does not depend on them. What is left unfused by that (Conv + BatchNormalization) is fused by the
runtimes when they load the model.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import onnx_ir as ir

from loracc.quiet import quiet

__all__ = ["OptimizeGraph"]


class OptimizeGraph(ir.passes.InPlacePass):
    """Constant folding, the default rewrite rules, common subexpressions, fusions; never of protected initializers.

    Args:
        protected: Names of the initializers that keep their name and value. Those that become unused go.
    """

    def __init__(self, protected: Collection[str]) -> None:
        super().__init__()
        self.protected = protected

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        # Imported here: onnxscript costs a second that `loracc --help` does not have.
        from onnxscript import optimizer
        from onnxscript.rewriter import onnx_fusions

        values = [value for name, value in model.graph.initializers.items() if name in self.protected]
        # They report each weight that they cannot see.
        with _opaque(values), _first_nodes_first(), quiet("onnx_ir", "onnxscript"):
            optimizer.optimize_ir(model)
            onnx_fusions.fuse(model)
        return ir.passes.PassResult(model, True)


@contextmanager
def _first_nodes_first() -> Iterator[None]:
    """Inside the block a rule with several outputs is tried on nodes that can be its first one, and on no others.

    onnxscript 0.7 goes through the whole graph for such a rule at every node of it, before it looks at the node: four
    fifths of the time of its optimizer for a 1.1B Llama, of which none is of use (docs/upstream.md).
    """
    from onnxscript.rewriter._basics import MatchResult
    from onnxscript.rewriter._matcher import SimplePatternMatcher

    matcher: Any = SimplePatternMatcher
    match = matcher.match

    def checked(self: Any, model: Any, graph: Any, node: ir.Node, **options: Any) -> Any:
        if not self.pattern.has_single_output_node:
            first = self.pattern.output_nodes[0].op_identifier()
            if first is not None and first != node.op_identifier():
                return MatchResult().fail("another operator")
        return match(self, model, graph, node, **options)

    matcher.match = checked
    try:
        yield
    finally:
        matcher.match = match


@contextmanager
def _opaque(values: list[ir.Value]) -> Iterator[None]:
    """Take the values' tensors away for a while."""
    kept = [(value, value.name, value.const_value) for value in values]
    for value in values:
        value.const_value = None
    try:
        yield
    finally:
        for value, name, tensor in kept:
            value.const_value = tensor
            if value.is_initializer() and value.name != name:
                raise AssertionError(f"the optimizer renamed parameter {name!r} to {value.name!r}")
