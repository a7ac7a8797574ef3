"""``Transpose(weight)`` becomes the weight itself, stored transposed: the node goes, the name stays.

torch's exporter writes a linear layer as ``MatMul(x, Transpose(W))``. Its own optimizer folds that into a nameless
``val_7`` and reads the weight to do so; this pass leaves a lazy view under the weight's own name, so that the weight
stays addressable and is read once, when it is written.

Rules, per initializer (a graph input is never touched: its value is the caller's):

1. Every reader is a Transpose with one and the same permutation: the initializer itself turns, under its name.
2. Other readers want it as it is (a tied embedding): a second initializer is made for the Transposes, unless the
   tensor is larger than ``shared_limit``; then the Transpose stays, as torch's exporter leaves it, and the weight is
   stored once.
3. The second initializer is named by the alias whose module is the Transpose's scope ("lm_head.weight"), else by a
   suffix.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Iterable, Sequence

import onnx_ir as ir

from loracc.tensors import PermutedTensor, dims

__all__ = ["SCOPES_KEY", "SECOND", "HoistTransposes", "module_scopes", "reader_alias"]

#: Where torch's exporter keeps the module paths a node was traced in: "['', 'encoder', 'encoder.layer.0', 'linear']".
SCOPES_KEY = "pkg.torch.onnx.name_scopes"
#: Suffix of a weight's second, turned initializer when no alias names it.
SECOND = ".transposed"


def module_scopes(node: ir.Node) -> tuple[str, ...]:
    """The module paths a node was traced in, outermost first, without the node's own name; empty when not recorded.

    Where torch's newer exporter left no list, the node's name is a path (``/encoder/layer.0/query/MatMul``) and only
    the innermost is known.
    """
    text = node.metadata_props.get(SCOPES_KEY)
    if text is None:
        path, slash, _ = (node.name or "").rpartition("/")
        return (path.strip("/").replace("/", "."),) if slash else ()
    try:
        scopes = ast.literal_eval(text)
    except (ValueError, SyntaxError):  # written by another tool: it tells nothing
        return ()
    return tuple(str(scope) for scope in scopes[:-1])


def reader_alias(node: ir.Node, names: Sequence[str]) -> str | None:
    """Which of a tied parameter's names a reader means: that of the innermost module among the reader's scopes."""
    scopes = module_scopes(node)
    best = max(names, key=lambda name: _depth(scopes, name), default=None)
    return best if best is not None and _depth(scopes, best) >= 0 else None


def _depth(scopes: tuple[str, ...], name: str) -> int:
    module = name.rpartition(".")[0]
    return max((i for i, scope in enumerate(scopes) if scope == module), default=-1)


class HoistTransposes(ir.passes.InPlacePass):
    """See the module's docstring.

    Args:
        tied: Groups of names that belong to one parameter; the graph's initializer has any one of a group.
        shared_limit: Elements above which a weight with other readers keeps its Transpose; None for no limit.
    """

    def __init__(self, tied: Iterable[Sequence[str]] = (), shared_limit: int | None = None) -> None:
        super().__init__()
        self.names_of = {name: tuple(group) for group in tied for name in group}
        self.shared_limit = math.inf if shared_limit is None else shared_limit

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for value in tuple(model.graph.initializers.values()):
            if _is_weight(value):
                modified |= self._hoist(model.graph, value)
        return ir.passes.PassResult(model, modified)

    def _hoist(self, graph: ir.Graph, value: ir.Value) -> bool:
        by_perm: dict[tuple[int, ...], list[ir.Node]] = {}
        others = False
        for node in dict.fromkeys(use.node for use in value.uses()):
            perm = _permutation(node, value)
            if perm is None:
                others = True
            else:
                by_perm.setdefault(perm, []).append(node)
        if not by_perm:
            return False
        if not others and len(by_perm) == 1:
            [(perm, nodes)] = by_perm.items()
            _turn(value, perm)
            _bypass(nodes, value)  # rule 1
            return True
        assert value.const_value is not None
        if math.prod(dims(value.const_value)) > self.shared_limit:
            return False  # rule 2
        for perm, nodes in by_perm.items():
            _bypass(nodes, self._second(graph, value, perm, nodes[0]))
        return True

    def _second(self, graph: ir.Graph, value: ir.Value, perm: tuple[int, ...], reader: ir.Node) -> ir.Value:
        """Rule 3."""
        assert value.name is not None and value.const_value is not None
        alias = reader_alias(reader, self.names_of.get(value.name, ()))
        if alias is not None and alias == value.name:
            self._rename(graph, value, reader)
        name = _unique(graph, alias if alias is not None else f"{value.name}{SECOND}")
        second = ir.Value(name=name, type=value.type, shape=value.shape, const_value=value.const_value)
        second.metadata_props.update(value.metadata_props)
        _turn(second, perm)
        graph.initializers.add(second)
        return second

    def _rename(self, graph: ir.Graph, value: ir.Value, reader: ir.Node) -> None:
        """The initializer has the name that ``reader`` means: give it the one its other readers mean."""
        assert value.name is not None
        names = [name for name in self.names_of[value.name] if name != value.name]
        for use in value.uses():
            alias = reader_alias(use.node, names) if use.node is not reader else None
            if alias is not None and alias not in graph.initializers:
                value.name = alias
                return


def _is_weight(value: ir.Value) -> bool:
    """Constant, with whole bytes per element: packed ones have no lazy view."""
    free = not value.is_graph_input() and not value.is_graph_output()
    return free and value.const_value is not None and value.const_value.dtype.bitwidth >= 8


def _permutation(node: ir.Node, value: ir.Value) -> tuple[int, ...] | None:
    """The permutation of a Transpose that can be hoisted, in the value's own graph or below; else None."""
    if node.domain not in ("", "ai.onnx") or node.op_type != "Transpose" or node.outputs[0].is_graph_output():
        return None
    assert value.const_value is not None
    rank = len(dims(value.const_value))
    attribute = node.attributes.get("perm")
    return tuple(reversed(range(rank))) if attribute is None else tuple(attribute.as_ints())


def _turn(value: ir.Value, perm: tuple[int, ...]) -> None:
    base: ir.TensorProtocol | None = value.const_value
    through = perm
    assert base is not None
    if isinstance(base, PermutedTensor):
        through = tuple(base.perm[i] for i in perm)
        base = base.base
    identity = through == tuple(range(len(through)))
    value.const_value = base if identity else PermutedTensor(base, through, value.name)
    value.shape = ir.Shape(dims(value.const_value))


def _bypass(nodes: Iterable[ir.Node], value: ir.Value) -> None:
    for node in nodes:
        node.outputs[0].replace_all_uses_with(value)
        assert node.graph is not None
        node.graph.remove(node, safe=True)


def _unique(graph: ir.Graph, name: str) -> str:
    count, candidate = 0, name
    while candidate in graph.initializers:
        count += 1
        candidate = f"{name}.{count}"
    return candidate
