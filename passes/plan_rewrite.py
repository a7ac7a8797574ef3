"""Which additions go when terms are taken out of a sum, and what exactly is lost by it.

The plan is proved before anything is changed: nothing but the change itself reads what it changes or removes
(:class:`Refused` otherwise). And it keeps its own books: for every value it rebuilds it says which linear map of the
source is missing from it afterwards (``lost``). The deltas are made of that, so that new sum + lost = old sum by
construction, however often and through whichever factors a term came in.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import onnx_ir as ir

from loracc.dtypes import Array
from loracc.passes.linear_forms import Form, NotLinear
from loracc.passes.lora_groups import Group

__all__ = ["Plan", "Refused", "plan_rewrite"]

Made = tuple[str, list[ir.Value], ir.Value]
Edit = tuple[ir.Node, int, ir.Value | None]


class Refused(Exception):
    """The rewrite would change something else; the message says what.

    Attributes:
        shared: Only a part of a delta is read elsewhere: it is fine if those readers go as well.
        node: The node of one delta that has to stay; the other deltas may go.
    """

    def __init__(self, reason: str, *, shared: bool = False, node: ir.Node | None = None) -> None:
        super().__init__(reason)
        self.shared = shared
        self.node = node


@dataclass(frozen=True)
class Plan:
    """A rewrite of one sum.

    Attributes:
        result: What takes the place of the sum's value.
        edits: ``(node, input, new value)``; None for an input that goes.
        made: ``(operator, inputs, output)`` of nodes to be inserted before the sum; none exists before the plan is
            carried out, since a node that exists reads its inputs.
        touched: Nodes of the terms and of the additions that held them.
        lost: Old value minus new value, as a form of the source.
        kept: What the base's product is multiplied with in the new value: a number, or a vector over the outputs.
    """

    result: ir.Value
    edits: list[Edit]
    made: list[Made]
    touched: frozenset[ir.Node]
    lost: Form
    kept: Array

    def held(self) -> Plan:
        """The same with its matrices read now: the rewrite removes them from the graph."""
        return replace(self, lost=replace(self.lost, products=tuple(p.held() for p in self.lost.products)))


def plan_rewrite(group: Group, going: Collection[ir.Node] = ()) -> Plan:
    """The rewrite that leaves only the base's term.

    Args:
        group: The terms.
        going: Nodes that are about to be removed anyway: they may read parts of the deltas.

    Raises:
        Refused: With the reason.
    """
    planner = _Planner(group)
    try:
        part = planner.rebuild(group.root.outputs[0], keep=True)
    except NotLinear as reason:
        raise Refused(str(reason)) from reason
    if part.value is None or part.kept is None:
        raise Refused("the base weight's product cannot be told apart from the deltas")
    for node in planner.edited & planner.kept_side & planner.dropped_side:
        raise Refused(f"{node.op_type} ({node.name!r}) holds both terms and another value, and is used twice")
    if not np.all(part.kept):
        raise Refused("the base's product is multiplied by zero")
    _check_uses(group, planner, going)
    return Plan(part.value, planner.edits, planner.made, frozenset(planner.touched), part.lost, part.kept)


@dataclass(frozen=True)
class _Part:
    """What is left of a value.

    Attributes:
        value: None: nothing.
        substance: It is more than a constant.
        lost: What is missing from it.
        kept: The base's coefficient in it, None where it is not in it.
    """

    value: ir.Value | None
    substance: bool
    lost: Form = field(default_factory=Form)
    kept: Array | None = None

    def times(self, by: Array) -> _Part:
        """The part multiplied by a number or a vector."""
        lost = self.lost.stretched(by) if by.ndim else self.lost.scaled(float(by))
        return replace(self, lost=lost, kept=None if self.kept is None else self.kept * by)


@dataclass
class _Planner:
    """One walk over the tree, from the sum down."""

    group: Group
    edits: list[Edit] = field(default_factory=list)
    made: list[Made] = field(default_factory=list)
    touched: set[ir.Node] = field(default_factory=set)
    base_nodes: set[ir.Node] = field(default_factory=set)
    edited: set[ir.Node] = field(default_factory=set)
    kept_side: set[ir.Node] = field(default_factory=set)
    dropped_side: set[ir.Node] = field(default_factory=set)
    _memo: dict[tuple[ir.Value, bool], _Part] = field(default_factory=dict)
    _depths: dict[ir.Value, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.reader = self.group.reader
        self.constants = self.group.reader.constants
        self.opaque = {value for value, _ in self.group.form.opaque}

    def rebuild(self, value: ir.Value, *, keep: bool) -> _Part:
        """What is left of a value.

        Args:
            keep: Whether the base's term may stay here; it stays in one place only.
        """
        if value in self.opaque:
            return _Part(value, True)
        if (value, keep) not in self._memo:
            node = value.producer()
            inner = node is not None and node in self.group.tree
            part = self._inner(node, value, keep) if inner and node is not None else self._leaf(value, keep)
            self._memo[value, keep] = part
        return self._memo[value, keep]

    def _leaf(self, value: ir.Value, keep: bool) -> _Part:
        if self.constants.is_constant(value):
            return _Part(value, False)
        try:
            form = self.reader.read(value)
        except NotLinear:
            return _Part(value, True)
        keys = {product.key for product in form.products}
        ours = self.group.deltas | {self.group.base.key}
        if not keys & ours:
            return _Part(value, True)
        self.touched |= form.nodes
        if keys - ours or (self.group.base.key in keys and keys & self.group.deltas):
            raise Refused("a value that is used elsewhere holds a delta and another term")
        if self.group.base.key not in keys:
            return _Part(None, False, form)
        self.base_nodes |= form.nodes
        return _Part(value, True, kept=_coefficient(form)) if keep else _Part(None, False, form)

    def _inner(self, node: ir.Node, value: ir.Value, keep: bool) -> _Part:
        self.touched.add(node)
        (self.kept_side if keep else self.dropped_side).add(node)
        if node.op_type in ("Mul", "Div"):
            return self._scaled(node, value, keep)
        if node.op_type == "Gemm":
            return self._gemm(node, value, keep)
        operands = [v for v in node.inputs if v is not None]
        if node.op_type in ("Neg", "Cast", "Identity"):
            part = self._with_operand(node, value, 0, self.rebuild(operands[0], keep=keep))
            return part.times(np.asarray(-1.0)) if node.op_type == "Neg" else part
        return self._sum(node, value, operands, keep)

    def _scaled(self, node: ir.Node, value: ir.Value, keep: bool) -> _Part:
        index = 1 if self.constants.is_constant(node.inputs[0]) else 0
        operand, factor = node.inputs[index], node.inputs[1 - index]
        assert operand is not None and factor is not None
        form = self.reader.read(operand)
        by = self.reader.vector(factor, form, node)
        by = 1.0 / by if node.op_type == "Div" else by
        part = self.rebuild(operand, keep=keep)
        if part.kept is not None and by.ndim and not form.opaque and form.bias is None:
            # The weight takes the vector (DoRA's factor): what is left is the product itself, the rest is lost.
            term = self._base_term(part, form)
            lost = part.times(by).lost.plus(term.stretched(by)).plus(term.scaled(-1.0))
            return replace(part, lost=lost)
        return self._with_operand(node, value, index, part).times(by)

    def _base_term(self, part: _Part, form: Form) -> Form:
        """The base's product as it stands in a part."""
        [product, *_] = [p for p in form.products if p.key == self.group.base.key]
        assert part.kept is not None
        plain = replace(product, scale=1.0, out=None)
        kept = plain.stretched(part.kept) if part.kept.ndim else plain.scaled(float(part.kept))
        return replace(form, products=(kept,), bias=None, opaque=())

    def _gemm(self, node: ir.Node, value: ir.Value, keep: bool) -> _Part:
        """A Gemm whose third input is a runtime value: its product is one addend, that input the other."""
        third = node.inputs[2]
        assert third is not None
        product = self.reader.product_of(node)
        keys = {p.key for p in product.products}
        beta = np.asarray(node.attributes.get_float("beta", 1.0))
        mine = keep and keys == {self.group.base.key}
        part = self.rebuild(third, keep=keep and not mine)
        if keys - self.group.deltas - {self.group.base.key}:
            raise Refused(f"Gemm ({node.name!r}) adds to another product")
        self.touched |= product.nodes
        if mine:
            if part.value is not third:
                self._edit(node, 2, part.value)
            return _Part(value, True, part.times(beta).lost, _coefficient(product))
        if beta != 1.0:
            raise Refused(f"Gemm ({node.name!r}) scales what it adds to")
        return replace(part, lost=part.lost.plus(product))

    def _with_operand(self, node: ir.Node, value: ir.Value, index: int, part: _Part) -> _Part:
        if part.value is None:
            return part
        if part.value is not node.inputs[index]:
            self._edit(node, index, part.value)
        return replace(part, value=value)

    def _edit(self, node: ir.Node, index: int, value: ir.Value | None) -> None:
        self.edits.append((node, index, value))
        self.edited.add(node)

    def _sum(self, node: ir.Node, value: ir.Value, operands: Sequence[ir.Value], keep: bool) -> _Part:
        holder = min(range(len(operands)), key=lambda i: self._depth(operands[i]))
        signs = [-1.0 if node.op_type == "Sub" and i else 1.0 for i in range(len(operands))]
        parts = [self.rebuild(v, keep=keep and i == holder) for i, v in enumerate(operands)]
        substance = any(part.substance for part in parts)
        total = self.reader.read(value)
        left: list[ir.Value | None] = []
        lost, kept = Form(), None
        for operand, part, sign in zip(operands, parts, signs, strict=True):
            signed = part.times(np.asarray(sign))
            lost = lost.plus(signed.lost)
            kept = signed.kept if signed.kept is not None else kept
            # A constant that was added here stays with what else stays; one that a dropped branch left over goes.
            stays = part.substance or (substance and self.constants.is_constant(operand))
            left.append(part.value if stays else None)
            if not stays and part.value is not None:
                lost = lost.plus(self._constant(operand, part.value, total, node).scaled(sign))
        return _Part(self._remaining(node, value, operands, left), substance, lost, kept)

    def _constant(self, operand: ir.Value, value: ir.Value, total: Form, node: ir.Node) -> Form:
        """What goes when a constant does."""
        if value is not operand:
            raise Refused(f"{node.op_type} ({node.name!r}) adds a computed constant")
        return Form(bias=self.reader.vector(value, total, node))

    def _remaining(
        self, node: ir.Node, value: ir.Value, operands: Sequence[ir.Value], left: Sequence[ir.Value | None]
    ) -> ir.Value | None:
        """The node's value without what went from its operands."""
        remaining = [part for part in left if part is not None]
        if not remaining or all(new is old for new, old in zip(left, operands, strict=True)):
            return value if remaining else None
        if len(remaining) == len(operands):
            for index, (new, old) in enumerate(zip(remaining, operands, strict=True)):
                if new is not old:
                    self._edit(node, index, new)
            return value
        if len(remaining) == 1:
            return self._new("Neg", remaining) if node.op_type == "Sub" and left[0] is None else remaining[0]
        return self._new("Sum", remaining)

    def _new(self, op: str, inputs: list[ir.Value]) -> ir.Value:
        old = self.group.root.outputs[0]
        output = ir.Value(name=f"{old.name}.raised.{len(self.made)}", type=old.type)
        self.made.append((op, inputs, output))
        return output

    def _depth(self, value: ir.Value) -> float:
        """Steps down to the base's term, numbers that would have to be absorbed counting most; infinite without it."""
        if value not in self._depths:
            self._depths[value] = self._find_depth(value)
        return self._depths[value]

    def _find_depth(self, value: ir.Value) -> float:
        node = value.producer()
        if self.constants.is_constant(value) or value in self.opaque:
            return np.inf
        if node is None or node not in self.group.tree:
            return 0.0 if self._holds_base(value) else np.inf
        if node.op_type == "Gemm":
            own = {p.key for p in self.reader.product_of(node).products} == {self.group.base.key}
            below = self._depth(node.inputs[2]) if node.inputs[2] is not None else np.inf
            return 0.0 if own else 1.0 + below
        step = 100.0 if node.op_type in ("Mul", "Div") else 1.0
        return step + min((self._depth(v) for v in node.inputs if v is not None), default=np.inf)

    def _holds_base(self, value: ir.Value) -> bool:
        try:
            return self.group.base.key in {p.key for p in self.reader.read(value).products}
        except NotLinear:
            return False


def _coefficient(form: Form) -> Array:
    """What the only product of a form is multiplied with."""
    parts = [product.coefficient for product in form.products]
    return np.asarray(sum(parts[1:], parts[0]))


#: What tells a shape and no number.
_SHAPES = frozenset({"Shape", "Size"})


def _unread(node: ir.Node) -> set[ir.Node]:
    """A node whose results lead to no output, with all that reads them; empty where one does."""
    found, stack = {node}, [node]
    while stack:
        for output in stack.pop().outputs:
            if output.is_graph_output():
                return set()
            new = {use.node for use in output.uses()} - found
            found |= new
            stack.extend(new)
    return found


def _check_uses(group: Group, planner: _Planner, going: Collection[ir.Node]) -> None:
    """Nothing but the change itself reads what it changes or removes."""
    for node in sorted(planner.touched - {group.root}, key=lambda n: str(n.name)):
        in_base = node in planner.base_nodes or node in group.tree
        for output in node.outputs:
            what = f"the base's product {output.name!r}" if in_base else f"the intermediate {output.name!r}"
            stays = None if in_base else node
            if output.is_graph_output():
                raise Refused(f"{what} is an output of the graph", node=stays)
            for use in output.uses():
                if use.node in planner.touched or (use.node.op_type in _SHAPES and node in planner.base_nodes):
                    continue  # the base's product stays, and a delta changes no shape
                if unread := _unread(use.node):
                    planner.touched |= unread  # it goes with what it reads
                    continue
                if in_base or use.node not in going:
                    reason = f"{what} is also read by {use.node.op_type} ({use.node.name!r})"
                    raise Refused(reason, shared=not in_base, node=stays)
