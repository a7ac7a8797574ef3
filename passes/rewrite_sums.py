"""Carrying a plan out: terms leave a sum, the additions that they leave empty go, everything else stays as it was."""

from __future__ import annotations

from collections.abc import Collection

import onnx_ir as ir

from loracc.passes.lora_groups import Group
from loracc.passes.plan_rewrite import Plan

__all__ = ["apply_plan", "drop_dead", "replace_value"]


def apply_plan(graph: ir.Graph, group: Group, plan: Plan) -> None:
    """Carry a plan out; the sum's value is replaced everywhere, and what became unused is removed."""
    for op, inputs, output in plan.made:
        graph.insert_before(group.root, ir.Node("", op, inputs, outputs=[output], name=str(output.name)))
    for node, index, value in plan.edits:
        node.replace_input_with(index, value)
    old = group.root.outputs[0]
    if plan.result is not old:
        replace_value(graph, old, plan.result)
    drop_dead(graph, [group.root, *plan.touched])


def replace_value(graph: ir.Graph, old: ir.Value, new: ir.Value) -> None:
    """``new`` in the place of ``old`` everywhere; as a graph output it takes the name."""
    if not old.is_graph_output():
        old.replace_all_uses_with(new)
        return
    if new.is_graph_output() or new.is_graph_input() or new.producer() is None:
        node = old.producer()
        copy = ir.node("Identity", [new])
        assert node is not None
        graph.insert_before(node, copy)
        new = copy.outputs[0]
    name = old.name
    if new.shape is None:
        new.shape = old.shape
    if new.type is None:
        new.type = old.type
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    old.name = f"{name}.raised"
    new.name = name


def drop_dead(graph: ir.Graph, nodes: Collection[ir.Node]) -> None:
    """Remove those of the nodes that nothing reads, and what only they read: weight expressions and initializers."""
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node.graph is None or any(out.uses() or out.is_graph_output() for out in node.outputs):
            continue
        operands = [value for value in node.inputs if value is not None]
        node.graph.remove(node, safe=True)
        for value in operands:
            producer = value.producer()
            if producer is not None:
                stack.append(producer)
            elif value.is_initializer() and not (value.uses() or value.is_graph_input() or value.is_graph_output()):
                del graph.initializers[str(value.name)]
