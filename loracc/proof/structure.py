"""Is the output's graph the base's graph? Isomorphism, independent of the names of nodes and inner values.

The walk starts at the outputs, which carry the same names in both graphs, and pairs values: two values match when their
types agree and their producers are the same operator with the same attributes and matching inputs. What no output
needs is paired afterwards, from the end: a dead node more or less is a difference too. An initializer of the base may
match several of the output (un-sharing a weight that only some of its readers change); never the other way round.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from loracc.encodings.decoded import DecodedTensor
from loracc.proof.describe import (
    attribute_text,
    node_text,
    nodes_of,
    operator_diff,
    origin_text,
    shape_text,
    value_text,
)
from loracc.tensors import dims

__all__ = ["Match", "Pair", "compare_checkpoints", "compare_graphs"]

_SHOWN = 10


@dataclass(frozen=True)
class Pair:
    """An initializer of the output and the one of the base it stands for.

    Attributes:
        base, out: Their names.
        readers: Names of the base graph's nodes that read it here.
    """

    base: str
    out: str
    readers: tuple[str, ...] = ()


@dataclass
class Match:
    """What the walk found.

    Attributes:
        differences: Readable, in the base's order; empty when the graphs are isomorphic.
        pairs: Initializers, in the output's order.
        values: Output value's name by base value's name, for taps.
        nodes: Nodes of the base graph, subgraphs included.
    """

    differences: list[str] = field(default_factory=list)
    pairs: list[Pair] = field(default_factory=list)
    values: dict[str, str] = field(default_factory=dict)
    nodes: int = 0

    @property
    def clones(self) -> dict[str, str]:
        """Un-shared copies: names in the output by a second or later appearance of one base initializer."""
        seen: dict[str, list[str]] = {}
        for pair in self.pairs:
            seen.setdefault(pair.base, []).append(pair.out)
        return {name: base for base, names in seen.items() if len(names) > 1 for name in names if name != base}


def compare_graphs(base: ir.Model, out: ir.Model) -> Match:
    """Walk both graphs; differences say what is where."""
    walk = _Walk(base, out)
    walk.go()
    match = Match(walk.differences, walk.pairs(), walk.names(), sum(1 for _ in nodes_of(base)))
    if match.differences and (diff := operator_diff(base, out)):
        match.differences = [*diff, *match.differences]
    match.differences = list(dict.fromkeys(match.differences))[:_SHOWN]
    return match


def compare_checkpoints(base: ir.Model, out: ir.Model, tied: Mapping[str, str]) -> Match:
    """Two graphs without nodes: the same tensors in the same order. The output may hold un-tied ones besides.

    Args:
        tied: Tensors that the output may have on top, and the base's tensor each one was tied to.
    """
    match = Match()
    ours, theirs = base.graph.initializers, out.graph.initializers
    for name in ours:
        if name not in theirs:
            match.differences.append(f"tensor {name} is missing in the output")
    for name, value in theirs.items():
        origin = name if name in ours else tied.get(name, "")
        if origin not in ours:
            match.differences.append(f"tensor {name} is only in the output")
            continue
        # Modules that are still tied to the tensor read it here.
        sharing = (other for other, of in tied.items() if of == name and other not in theirs)
        match.pairs.append(Pair(origin, name, (name, *sharing)))
        if (difference := _tensor_difference(ours[origin], value)) is not None:
            match.differences.append(f"tensor {name}: {difference}")
    if not match.differences and [name for name in theirs if name in ours] != list(ours):
        match.differences.append("the tensors are in another order")
    match.differences = match.differences[:_SHOWN]
    return match


class _Walk:
    """Pairs the values and nodes of two models."""

    def __init__(self, base: ir.Model, out: ir.Model) -> None:
        self.base, self.out = base, out
        self.differences: list[str] = []
        self._values: dict[ir.Value, ir.Value] = {}
        self._back: dict[ir.Value, ir.Value] = {}
        self._nodes: dict[ir.Node, ir.Node] = {}
        self._nodes_back: dict[ir.Node, ir.Node] = {}
        self._readers: dict[ir.Value, dict[str, None]] = {}
        self._initializer: dict[ir.Value, ir.Value] = {}  # output -> base
        self._pending: list[tuple[ir.Value | None, ir.Value | None, str]] = []

    def go(self) -> None:
        self._opsets()
        self._interface()
        self._walk()
        functions, others = self.base.functions, self.out.functions
        if set(functions) != set(others):
            names = sorted(str(key) for key in set(functions) ^ set(others))
            self._differ(f"functions differ: {', '.join(names)}")
        for key in functions:
            if key in others:
                self._bodies(functions[key], others[key], f"function {key[1]}")
        self._walk()
        self._unread()
        for side, model, seen in (("base", self.base, self._nodes), ("output", self.out, self._nodes_back)):
            for node in nodes_of(model):
                if node not in seen:
                    self._differ(f"node only in the {side}: {node_text(node)}")
        self._ballast()

    def pairs(self) -> list[Pair]:
        found = {value: Pair(str(base.name), str(value.name), tuple(self._readers.get(value, ())))
                 for value, base in self._initializer.items()}  # fmt: skip
        ordered = [found[value] for value in self.out.graph.initializers.values() if value in found]
        # What the walk did not reach is still paired by name, so that its bytes are compared.
        named = {pair.out for pair in ordered}
        rest = [
            name for name in self.out.graph.initializers if name not in named and name in self.base.graph.initializers
        ]
        return ordered + [Pair(name, name) for name in rest]

    def names(self) -> dict[str, str]:
        return {str(base.name): str(out.name) for base, out in self._values.items()}

    def _differ(self, text: str) -> None:
        self.differences.append(text)

    def _opsets(self) -> None:
        one, other = self.base.graph.opset_imports, self.out.graph.opset_imports
        used = {node.domain for node in nodes_of(self.base)} | {""}
        for domain in sorted(used):
            if one.get(domain) != other.get(domain):
                label = domain or "ai.onnx"
                self._differ(f"opset of {label}: {one.get(domain)} in the base, {other.get(domain)} in the output")

    def _interface(self) -> None:
        """Inputs and outputs: same names, same order, same types."""
        for what, ours, theirs in (
            ("input", self.base.graph.inputs, self.out.graph.inputs),
            ("output", self.base.graph.outputs, self.out.graph.outputs),
        ):
            names, others = [v.name for v in ours], [v.name for v in theirs]
            if names != others:
                self._differ(f"{what}s differ: base has {names}, output has {others}")
            for one, other in zip(ours, theirs, strict=False):
                if what == "input":
                    self._pair(one, other, f"input {one.name}")
                else:
                    self._pending.append((one, other, f"output {one.name}"))
                if one.type != other.type or (one.shape is None) != (other.shape is None):
                    self._differ(f"{what} {one.name}: {value_text(one)} in the base, {value_text(other)} in the output")

    def _walk(self) -> None:
        while self._pending:
            one, other, where = self._pending.pop()
            if one is None or other is None:
                if one is not other:
                    self._differ(f"{where}: an optional input is there in only one of the graphs")
                continue
            self._match(one, other, where)

    def _unread(self) -> None:
        """Nodes that no output needs, and what only they need: the last of each graph, then the last that is left."""
        ours, theirs = list(nodes_of(self.base)), list(nodes_of(self.out))
        while True:
            while ours and ours[-1] in self._nodes:
                ours.pop()
            while theirs and theirs[-1] in self._nodes_back:
                theirs.pop()
            if not ours or not theirs or ours[-1].op_identifier() != theirs[-1].op_identifier():
                return  # what has no partner is told as a difference
            self._node(ours.pop(), theirs.pop())
            self._walk()

    def _ballast(self) -> None:
        """Tensors that nothing reads change no number and are shipped all the same: the output has none of its own."""
        unread = [_unread_tensors(model.graph) for model in (self.base, self.out)]
        new = [name for name in unread[1] if name not in self.base.graph.initializers]
        if len(unread[1]) > len(unread[0]) and new:
            self._differ(f"initializer only in the output: {new[0]}, which nothing reads")

    def _match(self, one: ir.Value, other: ir.Value, where: str) -> None:
        if self._values.get(one) is other:
            return
        if one.is_initializer() or other.is_initializer():
            self._initializers(one, other, where)
            return
        if one in self._values or other in self._back:
            self._differ(f"{where}: reads {origin_text(other)} in the output, {origin_text(one)} in the base")
            return
        node, match = one.producer(), other.producer()
        if node is None or match is None:
            if node is not match or one.name != other.name:
                self._differ(f"{where}: reads {origin_text(other)} in the output, {origin_text(one)} in the base")
            return
        if one.index() != other.index():
            self._differ(f"{where}: reads output {other.index()} of {node_text(match)}, not {one.index()}")
            return
        self._node(node, match)

    def _node(self, node: ir.Node, match: ir.Node) -> None:
        if node in self._nodes or match in self._nodes_back:
            if self._nodes.get(node) is not match:
                self._differ(f"{node_text(node)}: matches two nodes of the output")
            return
        if node.op_identifier() != match.op_identifier() or len(node.inputs) != len(match.inputs):
            self._differ(f"{node_text(node)} in the base is {node_text(match)} in the output")
            return
        self._nodes[node], self._nodes_back[match] = match, node
        if len(node.outputs) != len(match.outputs):
            self._differ(f"{node_text(node)}: {len(match.outputs)} outputs instead of {len(node.outputs)}")
        self._attributes(node, match)
        for one, other in zip(node.outputs, match.outputs, strict=False):
            self._pair(one, other, f"result of {node_text(node)}")
        for index, (one_in, other_in) in enumerate(zip(node.inputs, match.inputs, strict=True)):
            if other_in is not None and other_in.is_initializer():
                self._readers.setdefault(other_in, {})[str(node.name)] = None
            self._pending.append((one_in, other_in, f"input {index} of {node_text(node)}"))

    def _pair(self, one: ir.Value, other: ir.Value, where: str) -> None:
        self._values[one], self._back[other] = other, one
        if one.type is not None and other.type is not None and one.type != other.type:
            self._differ(f"{where}: {value_text(other)} in the output, {value_text(one)} in the base")
        elif one.shape is not None and other.shape is not None and not _same_shape(one.shape, other.shape):
            self._differ(f"{where}: shape {shape_text(other)} in the output, {shape_text(one)} in the base")

    def _initializers(self, one: ir.Value, other: ir.Value, where: str) -> None:
        if not (one.is_initializer() and other.is_initializer()):
            self._differ(f"{where}: reads {origin_text(other)} in the output, {origin_text(one)} in the base")
            return
        known = self._initializer.setdefault(other, one)
        if known is not one:
            self._differ(f"{where}: initializer {other.name} stands for both {known.name} and {one.name}")
        if (difference := _tensor_difference(one, other)) is not None:
            self._differ(f"initializer {one.name}: {difference}")

    def _attributes(self, node: ir.Node, match: ir.Node) -> None:
        for name in sorted({*node.attributes, *match.attributes}):
            one, other = node.attributes.get(name), match.attributes.get(name)
            kind = one.type if one is not None and other is not None and one.type == other.type else None
            if one is None or other is None or kind is None or not (_is_body(kind) or _same_attribute(one, other)):
                here, there = attribute_text(one), attribute_text(other)
                self._differ(f"{node_text(node)}: attribute {name} is {there} in the output, {here} in the base")
            elif kind == ir.AttributeType.GRAPH:
                self._bodies(one.as_graph(), other.as_graph(), f"{node_text(node)}.{name}")
            elif kind == ir.AttributeType.GRAPHS:
                if len(one.as_graphs()) != len(other.as_graphs()):
                    self._differ(f"{node_text(node)}: attribute {name} has another number of bodies")
                for body, other_body in zip(one.as_graphs(), other.as_graphs(), strict=False):
                    self._bodies(body, other_body, f"{node_text(node)}.{name}")

    def _bodies(self, one: ir.Graph | ir.Function, other: ir.Graph | ir.Function, where: str) -> None:
        if len(one.inputs) != len(other.inputs) or len(one.outputs) != len(other.outputs):
            self._differ(f"{where}: another number of inputs or outputs")
            return
        for mine, theirs in zip(one.inputs, other.inputs, strict=True):
            self._pair(mine, theirs, where)
        for mine, theirs in zip(one.outputs, other.outputs, strict=True):
            self._pending.append((mine, theirs, f"output of {where}"))


def _unread_tensors(graph: ir.Graph) -> list[str]:
    return [n for n, value in graph.initializers.items() if not value.uses() and not value.is_graph_output()]


def _tensor_difference(one: ir.Value, other: ir.Value) -> str | None:
    mine, theirs = one.const_value, other.const_value
    if mine is None or theirs is None:
        return None if mine is theirs else "has a value in only one of the models"
    if mine.dtype != theirs.dtype:
        return f"{theirs.dtype.name} in the output, {mine.dtype.name} in the base"
    if isinstance(mine, DecodedTensor) and isinstance(theirs, DecodedTensor):
        return mine.weight.same_scheme(theirs.weight) or None
    if isinstance(mine, DecodedTensor) or isinstance(theirs, DecodedTensor):
        return "is quantized in only one of the models"
    if dims(mine) != dims(theirs):
        return f"shape {list(dims(theirs))} in the output, {list(dims(mine))} in the base"
    return None


def _is_body(kind: ir.AttributeType) -> bool:
    return kind in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)


def _same_shape(one: ir.Shape, other: ir.Shape) -> bool:
    """Equal lengths; a symbol equals any symbol, since what it is called is the exporter's choice."""
    return len(one) == len(other) and all(
        a == b if isinstance(a, int) or isinstance(b, int) else True for a, b in zip(one, other, strict=True)
    )


def _same_attribute(one: ir.Attr, other: ir.Attr) -> bool:
    if one.is_ref() or other.is_ref():
        return one.ref_attr_name == other.ref_attr_name
    if one.type == ir.AttributeType.TENSOR:
        mine, theirs = one.as_tensor(), other.as_tensor()
        same_kind = mine.dtype == theirs.dtype and dims(mine) == dims(theirs)
        return same_kind and mine.tobytes() == theirs.tobytes()
    if one.type in (ir.AttributeType.FLOAT, ir.AttributeType.FLOATS):
        # A graph that was never in a file may hold more digits than the format's float32.
        ours, others = (np.asarray(attribute.value, np.float32) for attribute in (one, other))
        return bool(np.array_equal(ours, others, equal_nan=True))
    if one.type in (ir.AttributeType.INTS, ir.AttributeType.STRINGS):
        return list(one.value) == list(other.value)
    return bool(one.value == other.value)
