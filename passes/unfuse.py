"""Insert each delta as the branch it was trained as: y = W·x + s·B·(A·x), W untouched (Hu et al. 2021, equation 3).

The factors are kept as two matrices (left, right) whose product is the delta of the *stored* weight, so one rule per
operator serves every layout:

    stored ΔW = s · left · right            left [m, r], right [r, n]
    MatMul(x, W):   y + s·(x · left) · right
    MatMul(W, x):   y + s·left · (right · x)
    Gemm:           the same with op(x) and α; W transposed by the operator swaps and transposes the factors
    Gather(W, i):   y + s·Gather(left, i) · right                                  (an embedding)
    Conv(x, W):     y + s·Conv1x1(Conv(x, A), B); with g groups A is repeated g times and B has g groups

A delta on one block of a fused weight has zero rows in the others. What has no such branch (DoRA, replaced parameters,
experts, an operator not named here) gets the folded weight, and is listed; a later ``RetypePass`` takes it unrounded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from loracc.deltas import LowRank
from loracc.dtypes import Array
from loracc.folded import Binding, FoldedTensor
from loracc.sites import Site
from loracc.tensors import dims

__all__ = ["Tap", "UnfusePass"]

#: Operators a weight may pass on its way to the one that multiplies with it.
_STEPS = ("Transpose", "Identity", "Cast")


@dataclass(frozen=True)
class Tap:
    """Where a site's result can be seen.

    Attributes:
        site: The site's name.
        before: Name of the value that the site's operator gives in the graph without deltas.
        after: Name of the value with the delta in, in the unfused graph.
    """

    site: str
    before: str
    after: str


@dataclass(frozen=True)
class _Factors:
    """ΔW of a matrix (or of a convolution's kernel) as a reader sees it: s·left·right, in float64."""

    left: Array
    right: Array
    scale: float

    def transposed(self) -> _Factors:
        return _Factors(self.right.T, self.left.T, self.scale)


@dataclass(frozen=True)
class _Plan:
    """One branch to insert: ``factors`` at input ``index`` of ``node``."""

    node: ir.Node
    index: int
    factors: _Factors
    binding: Binding


class UnfusePass(ir.passes.InPlacePass):
    """Add the deltas beside their weights.

    Args:
        bindings: The deltas, on initializers of the main graph.

    Attributes:
        branches: How many branches were inserted.
        replaced: Initializers that got the folded weight instead, with the reason; filled by ``call``.
        taps: Where each bound site's result is seen; filled by ``call``.
    """

    def __init__(self, bindings: Sequence[Binding]) -> None:
        super().__init__()
        self.bindings = tuple(bindings)
        self.branches = 0
        self.replaced: dict[str, str] = {}
        self.taps: list[Tap] = []

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        self.branches, self.replaced, self.taps = 0, {}, []
        by_initializer: dict[str, list[Binding]] = {}
        for binding in self.bindings:
            by_initializer.setdefault(binding.site.initializer, []).append(binding)
        for name, bindings in by_initializer.items():
            value = model.graph.initializers[name]
            for consumer in dict.fromkeys(binding.site.consumer for binding in bindings):
                self._lower(model.graph, value, consumer, [b for b in bindings if b.site.consumer == consumer])
        return ir.passes.PassResult(model, bool(self.bindings))

    def _lower(self, graph: ir.Graph, value: ir.Value, consumer: str, bindings: list[Binding]) -> None:
        """The bindings of one initializer and one consumer: all as branches, or all folded."""
        plans, reason = _plan(value, consumer, bindings)
        if reason:
            self._replace(graph, value, consumer, bindings, reason)
            return
        names = {plan.node: str(plan.node.outputs[0].name) for plan in plans}
        ends: dict[ir.Node, ir.Value] = {}  # several deltas of one operator add up one after the other
        for number, plan in enumerate(plans):
            before = plan.node.outputs[0]
            end = ends.get(plan.node, before)
            after = _Branch(graph, plan, f"{value.name}.delta{number}{'.' + consumer if consumer else ''}").insert(end)
            ends[plan.node] = after
            self.branches += 1
        for plan in plans:
            tap = Tap(plan.binding.site.name, names[plan.node], str(ends[plan.node].name))
            if tap not in self.taps:
                self.taps.append(tap)

    def _replace(self, graph: ir.Graph, value: ir.Value, consumer: str, bindings: list[Binding], reason: str) -> None:
        assert value.const_value is not None and value.name is not None
        self.replaced[value.name] = reason
        folded = FoldedTensor(value.const_value, bindings)
        readers = [(node, i) for node, i in value.uses() if not consumer or consumer in _reader_names(node)]
        for node, _ in readers:
            output = node.outputs[0].name
            if output:
                self.taps.append(Tap(bindings[0].site.name, output, output))
        if not consumer:
            value.const_value = folded
            return
        clone = ir.Value(name=f"{value.name}.folded.{consumer}", shape=value.shape, type=value.type, const_value=folded)
        graph.register_initializer(clone)
        for node, index in readers:
            node.replace_input_with(index, clone)


def _reader_names(node: ir.Node) -> set[str]:
    """A node's name, and those of the nodes that read it when it only passes the weight on."""
    names = {str(node.name)}
    if node.op_type in _STEPS:
        names |= {name for user, _ in node.outputs[0].uses() for name in _reader_names(user)}
    return names


def _plan(value: ir.Value, consumer: str, bindings: list[Binding]) -> tuple[list[_Plan], str]:
    """The branches to insert, or why there are none."""
    assert value.const_value is not None
    if value.is_graph_output():
        return [], "the weight is an output of the graph"
    shape = dims(value.const_value)
    plans: list[_Plan] = []
    for binding in bindings:
        if not isinstance(binding.delta, LowRank):
            return [], f"a {binding.delta.kind} delta has no branch"
        factors = _stored_factors(binding.delta, binding.site, shape)
        if factors is None:
            return [], f"the layout of {binding.site.name} has no branch"
        found, reason = _readers(value, factors, len(shape))
        if reason:
            return [], reason
        if len({node for node, _, _ in found}) < len(found):
            return [], "an operator multiplies the weight with itself"
        plans += [
            _Plan(node, index, seen, binding)
            for node, index, seen in found
            if not consumer or node.name == consumer or consumer in _path_names(value, node)
        ]
    return (plans, "") if plans else ([], "nothing reads the weight")


def _path_names(value: ir.Value, node: ir.Node) -> set[str]:
    """Names of the direct readers of ``value`` that lead to ``node``."""
    return {str(user.name) for user, _ in value.uses() if str(node.name) in _reader_names(user)}


def _stored_factors(delta: LowRank, site: Site, shape: tuple[int, ...]) -> _Factors | None:
    """B and A as the factors of the whole stored weight; None where its axes are mixed."""
    b, a = delta.b.astype(np.float64), delta.a.astype(np.float64)
    perm = site.layout.perm or tuple(range(len(shape)))
    if not site.layout.whole:
        rows = shape[perm[0]]
        full = np.zeros((rows, b.shape[1]))
        full[site.layout.start : site.layout.stop] = b
        b = full
    if perm == tuple(range(len(shape))):
        return _Factors(b, a, delta.s)
    return _Factors(b, a, delta.s).transposed() if perm == (1, 0) else None


def _readers(value: ir.Value, factors: _Factors, rank: int) -> tuple[list[tuple[ir.Node, int, _Factors]], str]:
    """(node, input index, factors as that node sees them) for everything that reads the weight."""
    found: list[tuple[ir.Node, int, _Factors]] = []
    for node, index in value.uses():
        if node.op_type in _STEPS and node.domain == "":
            swapped = node.op_type == "Transpose"
            if swapped and rank != 2:
                return [], f"{node.name}: a Transpose of {rank} axes stands before the operator"
            perm = node.attributes.get_ints("perm", (1, 0)) if swapped else (0, 1)
            inner, reason = _readers(node.outputs[0], factors.transposed() if tuple(perm) == (1, 0) else factors, rank)
            if reason:
                return [], reason
            found += inner
        elif reason := _refusal(node, index, rank):
            return [], reason
        else:
            found.append((node, index, factors))
    return found, ""


def _refusal(node: ir.Node, index: int, rank: int) -> str:
    """Why there is no branch rule for this reader; empty when there is one."""
    known = node.domain == "" and (
        (node.op_type in ("MatMul", "Gemm") and index in (0, 1) and rank == 2)
        or (node.op_type == "Gather" and index == 0 and node.attributes.get_int("axis", 0) == 0 and rank == 2)
        or (node.op_type == "Conv" and index == 1)
    )
    return "" if known else f"{node.op_type} {node.name!r} has no branch rule"


class _Branch:
    """Builds one branch and puts it behind its operator."""

    def __init__(self, graph: ir.Graph, plan: _Plan, name: str) -> None:
        self.graph, self.plan, self.name = graph, plan, name
        result = plan.node.outputs[0]
        weight = plan.node.inputs[plan.index]
        dtype = result.dtype or (weight.dtype if weight is not None else None)
        self.dtype = dtype or ir.DataType.FLOAT
        self.nodes: list[ir.Node] = []

    def insert(self, end: ir.Value) -> ir.Value:
        """``end + s·branch`` becomes what the readers of ``end`` read; returned."""
        rule = {"MatMul": self._matmul, "Gemm": self._gemm, "Gather": self._gather, "Conv": self._conv}
        change = rule[self.plan.node.op_type]()
        scaled = self._node("Mul", [change, self._constant("scale", np.float64(self.plan.factors.scale))], "scaled")
        total = self._node("Add", [end, scaled], "sum")
        total.shape = end.shape
        users = [(user, i) for user, i in end.uses() if user not in self.nodes]
        for user, index in users:
            user.replace_input_with(index, total)
        anchor = end.producer()
        assert anchor is not None
        anchor.append(self.nodes)
        graph = anchor.graph
        assert graph is not None
        for index, output in enumerate(list(graph.outputs)):
            if output is end:
                graph.outputs[index] = total
                end.name, total.name = f"{self.name}.before", end.name
        return total

    def _node(self, op: str, inputs: Sequence[ir.Value | None], part: str, **attributes: object) -> ir.Value:
        node = ir.node(op, inputs, attributes=attributes, name=f"{self.name}.{part}")  # type: ignore[arg-type]
        out = node.outputs[0]
        out.name, out.type = f"{self.name}.{part}.out", ir.TensorType(self.dtype)
        self.nodes.append(node)
        return out

    def _constant(self, part: str, exact: Array | np.float64) -> ir.Value:
        """An initializer of the graph's type that remembers its float64 source (see ``recast``)."""
        name = f"{self.name}.{part}"
        array = np.ascontiguousarray(exact) if np.ndim(exact) else np.asarray(exact)
        tensor = FoldedTensor(ir.tensor(array, name=name), (), self.dtype)
        value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(self.dtype), const_value=tensor)
        self.graph.register_initializer(value)
        return value

    def _through(self, x: ir.Value, factors: _Factors, *, on_right: bool) -> ir.Value:
        left, right = self._constant("left", factors.left), self._constant("right", factors.right)
        if on_right:
            return self._node("MatMul", [self._node("MatMul", [x, left], "down"), right], "up")
        return self._node("MatMul", [left, self._node("MatMul", [right, x], "down")], "up")

    def _other(self) -> ir.Value:
        other = self.plan.node.inputs[1 - self.plan.index]
        assert other is not None
        return other

    def _matmul(self) -> ir.Value:
        return self._through(self._other(), self.plan.factors, on_right=self.plan.index == 1)

    def _gemm(self) -> ir.Value:
        node, index, factors = self.plan.node, self.plan.index, self.plan.factors
        if node.attributes.get_int(("transA", "transB")[index], 0):
            factors = factors.transposed()
        x = self._other()
        if node.attributes.get_int(("transB", "transA")[index], 0):
            x = self._node("Transpose", [x], "x", perm=[1, 0])
        alpha = node.attributes.get_float("alpha", 1.0)
        return self._through(
            x, _Factors(factors.left * alpha if alpha != 1.0 else factors.left, factors.right, 1.0), on_right=index == 1
        )

    def _gather(self) -> ir.Value:
        rows = self._node("Gather", [self._constant("left", self.plan.factors.left), self._other()], "down", axis=0)
        return self._node("MatMul", [rows, self._constant("right", self.plan.factors.right)], "up")

    def _conv(self) -> ir.Value:
        node, factors = self.plan.node, self.plan.factors
        groups = node.attributes.get_int("group", 1)
        kept = {k: v.value for k, v in node.attributes.items() if k in ("auto_pad", "dilations", "pads", "strides")}
        spatial = factors.right.ndim - 2
        kernel = np.tile(factors.right, (groups, *([1] * (factors.right.ndim - 1))))
        point = factors.left.reshape(*factors.left.shape, *([1] * spatial))
        x = node.inputs[0]
        down = self._node("Conv", [x, self._constant("left", kernel)], "down", group=groups, **kept)
        return self._node("Conv", [down, self._constant("right", point)], "up", group=groups)
