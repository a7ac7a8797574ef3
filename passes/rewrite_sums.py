"""Taking terms out of a sum: the additions that they leave empty go, everything else stays as it was.

First a plan is made and proved to hurt nobody: whatever the change touches is read by nothing but the change itself.
Then the plan is carried out. A refusal leaves the graph as it is.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from loracc.passes.linear_forms import NotLinear
from loracc.passes.lora_groups import Group

__all__ = ["Plan", "Refused", "apply_plan", "drop_dead", "plan_rewrite", "replace_value"]


class Refused(Exception):
    """The rewrite would change something else; the message says what.

    Attributes:
        shared: Only a part of a delta is read elsewhere: it is fine if those readers go as well.
    """

    def __init__(self, reason: str, *, shared: bool = False) -> None:
        super().__init__(reason)
        self.shared = shared


@dataclass
class Plan:
    """A rewrite of one sum.

    Attributes:
        result: What takes the place of the sum's value.
        edits: ``(node, input, new value)``; None for an input that goes.
        made: ``(operator, inputs, output)`` of nodes to be inserted before the sum; none exists before the plan is
            carried out, since a node that exists reads its inputs.
        touched: Nodes of the terms and of the additions that held them.
    """

    result: ir.Value
    edits: list[tuple[ir.Node, int, ir.Value | None]]
    made: list[tuple[str, list[ir.Value], ir.Value]]
    touched: frozenset[ir.Node]


def plan_rewrite(group: Group, going: Collection[ir.Node] = ()) -> Plan:
    """The rewrite that leaves the base's term alone.

    Args:
        group: The terms.
        going: Nodes that are about to be removed anyway: they may read parts of the deltas.

    Raises:
        Refused: With the reason.
    """
    rewriter = _Rewriter(group)
    result, _ = rewriter.rebuild(group.root.outputs[0], keep=True)
    if result is None or rewriter.bases != 1:
        raise Refused("the base weight's product cannot be told apart from the deltas")
    for node in rewriter.edited & rewriter.dropped_side:
        raise Refused(f"{node.op_type} ({node.name!r}) holds both terms and another value, and is used twice")
    _check_uses(group, rewriter, going)
    return Plan(result, rewriter.edits, rewriter.made, frozenset(rewriter.touched))


@dataclass
class _Rewriter:
    """One walk over the tree, from the sum down."""

    group: Group
    edits: list[tuple[ir.Node, int, ir.Value | None]] = field(default_factory=list)
    made: list[tuple[str, list[ir.Value], ir.Value]] = field(default_factory=list)
    touched: set[ir.Node] = field(default_factory=set)
    base_nodes: set[ir.Node] = field(default_factory=set)
    edited: set[ir.Node] = field(default_factory=set)
    dropped_side: set[ir.Node] = field(default_factory=set)
    bases: int = 0
    _memo: dict[tuple[ir.Value, bool], tuple[ir.Value | None, bool]] = field(default_factory=dict)
    _depths: dict[ir.Value, float] = field(default_factory=dict)

    def rebuild(self, value: ir.Value, *, keep: bool) -> tuple[ir.Value | None, bool]:
        """What is left of a value (None: nothing), and whether that is more than a constant.

        Args:
            keep: Whether the base's term may stay here; it stays in one place only.
        """
        if any(value is opaque for opaque, _ in self.group.form.opaque):
            return value, True
        found = self._memo.get((value, keep))
        if found is None:
            node = value.producer()
            inner = node in self.group.tree
            found = self._inner(node, value, keep) if inner and node is not None else self._leaf(value, keep)
            self._memo[value, keep] = found
        return found

    def _leaf(self, value: ir.Value, keep: bool) -> tuple[ir.Value | None, bool]:
        if self.group.reader.constants.is_constant(value):
            return value, False
        try:
            form = self.group.reader.read(value)
        except NotLinear:
            return value, True
        keys = {product.key for product in form.products}
        if not keys & (self.group.deltas | {self.group.base.key}):
            return value, True
        self.touched |= form.nodes
        if self.group.base.key in keys:
            if keys & self.group.deltas:
                raise Refused("a value that is used elsewhere holds the base's product and a delta's")
            self.base_nodes |= form.nodes
            self.bases += keep
            return (value, True) if keep else (None, False)
        if keys - self.group.deltas:
            raise Refused("a value that is used elsewhere holds a delta and another term")
        return None, False

    def _inner(self, node: ir.Node, value: ir.Value, keep: bool) -> tuple[ir.Value | None, bool]:
        self.touched.add(node)
        if not keep:
            self.dropped_side.add(node)
        operands = [v for v in node.inputs if v is not None]
        if node.op_type in ("Mul", "Div"):
            return self._scaled(node, value, keep)
        if node.op_type == "Gemm":
            return self._gemm(node, value, keep)
        if node.op_type in ("Neg", "Cast", "Identity"):
            left, substance = self.rebuild(operands[0], keep=keep)
            return self._with_operand(node, value, 0, left), substance
        return self._sum(node, value, operands, keep)

    def _scaled(self, node: ir.Node, value: ir.Value, keep: bool) -> tuple[ir.Value | None, bool]:
        constants = self.group.reader.constants
        index = 1 if constants.is_constant(node.inputs[0]) else 0
        operand, factor = node.inputs[index], node.inputs[1 - index]
        assert operand is not None and factor is not None
        left, substance = self.rebuild(operand, keep=keep)
        if left is not None and np.prod(constants.shape(factor), dtype=int) != 1 and self._only_base(operand):
            return left, substance  # the weight takes the vector (DoRA's factor)
        if left is not None and keep and np.isfinite(self._depth(operand)) and not constants.evaluate(factor).all():
            raise Refused(f"{node.op_type} ({node.name!r}) multiplies the base's product by zero")
        return self._with_operand(node, value, index, left), substance

    def _gemm(self, node: ir.Node, value: ir.Value, keep: bool) -> tuple[ir.Value | None, bool]:
        """A Gemm whose third input is a runtime value: its product is one addend, that input the other."""
        third = node.inputs[2]
        assert third is not None
        product = self.group.reader.product_of(node)
        keys = {p.key for p in product.products}
        mine = keep and self.group.base.key in keys
        left, substance = self.rebuild(third, keep=keep and not mine)
        if not keys & (self.group.deltas | {self.group.base.key}):
            raise Refused(f"Gemm ({node.name!r}) adds to another product")
        self.touched |= product.nodes
        if mine and not keys & self.group.deltas:
            self.bases += 1
            if left is not third:
                self.edits.append((node, 2, left))
                self.edited.add(node)
            return value, True
        if mine or keys - self.group.deltas - {self.group.base.key} or node.attributes.get_float("beta", 1.0) != 1.0:
            raise Refused(f"Gemm ({node.name!r}) scales what it adds to")
        return left, substance

    def _only_base(self, value: ir.Value) -> bool:
        """Whether nothing opaque and no constant lies under a value."""
        try:
            form = self.group.reader.read(value)
        except NotLinear:
            return False
        return not form.opaque and form.bias is None

    def _with_operand(self, node: ir.Node, value: ir.Value, index: int, left: ir.Value | None) -> ir.Value | None:
        if left is None:
            return None
        if left is not node.inputs[index]:
            self.edits.append((node, index, left))
            self.edited.add(node)
        return value

    def _sum(
        self, node: ir.Node, value: ir.Value, operands: list[ir.Value], keep: bool
    ) -> tuple[ir.Value | None, bool]:
        holder = min(operands, key=self._depth) if keep else None
        first = next((i for i, v in enumerate(operands) if v is holder), -1)
        parts = [self.rebuild(v, keep=keep and i == first) for i, v in enumerate(operands)]
        constants = self.group.reader.constants
        substance = any(part[1] for part in parts)
        # A constant that a dropped branch has left over goes: the bias delta takes it. One that was added here stays.
        left = [
            p if s or (substance and constants.is_constant(v)) else None
            for v, (p, s) in zip(operands, parts, strict=True)
        ]
        if not substance:
            return None, False
        if all(new is old for new, old in zip(left, operands, strict=True)):
            return value, True
        remaining = [part for part in left if part is not None]
        if len(remaining) == 1:
            negated = node.op_type == "Sub" and left[0] is None
            return (self._negated(remaining[0]) if negated else remaining[0]), True
        if len(remaining) == len(operands):
            for index, (new, old) in enumerate(zip(remaining, operands, strict=True)):
                if new is not old:
                    self.edits.append((node, index, new))
                    self.edited.add(node)
            return value, True
        return self._made("Sum", remaining), True

    def _negated(self, value: ir.Value) -> ir.Value:
        return self._made("Neg", [value])

    def _made(self, op: str, inputs: list[ir.Value]) -> ir.Value:
        old = self.group.root.outputs[0]
        output = ir.Value(name=f"{old.name}.raised.{len(self.made)}", type=old.type)
        self.made.append((op, inputs, output))
        return output

    def _depth(self, value: ir.Value) -> float:
        """Steps down to the base's term, numbers that would have to be absorbed counting most; infinite without it."""
        if value in self._depths:
            return self._depths[value]
        node = value.producer()
        constants = self.group.reader.constants
        if constants.is_constant(value):
            depth = np.inf
        elif node in self.group.tree and node is not None and node.op_type == "Gemm":
            own = self.group.base.key in {p.key for p in self.group.reader.product_of(node).products}
            depth = 0.0 if own else 1.0 + (self._depth(node.inputs[2]) if node.inputs[2] is not None else np.inf)
        elif node in self.group.tree and node is not None:
            step = 100.0 if node.op_type in ("Mul", "Div") else 1.0
            depth = step + min((self._depth(v) for v in node.inputs if v is not None), default=np.inf)
        else:
            depth = 0.0 if self._holds_base(value) else np.inf
        self._depths[value] = depth
        return depth

    def _holds_base(self, value: ir.Value) -> bool:
        try:
            return self.group.base.key in {p.key for p in self.group.reader.read(value).products}
        except NotLinear:
            return False


def _check_uses(group: Group, rewriter: _Rewriter, going: Collection[ir.Node]) -> None:
    """Nothing but the change itself reads what it changes or removes."""
    root = group.root
    for node in sorted(rewriter.touched - {root}, key=lambda n: str(n.name)):
        in_base = node in rewriter.base_nodes or node in group.tree
        for output in node.outputs:
            what = f"the base's product {output.name!r}" if in_base else f"the intermediate {output.name!r}"
            if output.is_graph_output():
                raise Refused(f"{what} is an output of the graph")
            for use in output.uses():
                if use.node not in rewriter.touched and (in_base or use.node not in going):
                    reason = f"{what} is also read by {use.node.op_type} ({use.node.name!r})"
                    raise Refused(reason, shared=not in_base)


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
