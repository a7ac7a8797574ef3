"""LoRA branches of a traced graph become deltas on the weights beside them, and the graph the base model's.

By algebra on use-def chains and by no name (DESIGN.md 3): what depends on no input is a constant, a sum of linear terms
of one input is one linear map, its plain weight is the base and the rest are deltas. In this order:

1. every sum, operands before results, so that a term is taken out of the innermost sum that holds it and its base;
2. sums that were refused only because a part of a delta is read by another one: all of them at once; where one delta
   has to stay all the same, the others of its sum;
3. weights that are themselves sums of a stored weight and a low-rank product (:mod:`loracc.passes.raise_weights`);
4. names: what PEFT put around the base model's names goes;
5. what looks like LoRA and is left is reported (:mod:`loracc.passes.lookalikes`).

A graph in which nothing is found is not touched. Calls of model-local functions are not looked into: inline them first.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import onnx_ir as ir

from loracc.deltas import Addition
from loracc.dtypes import Array
from loracc.folded import annotate
from loracc.passes.additive_trees import SUMS, is_sum
from loracc.passes.constant_values import Constants, element_type, is_onnx, plain_tensor
from loracc.passes.linear_forms import Product
from loracc.passes.lookalikes import find_lookalikes, place
from loracc.passes.lora_groups import Group, find_group
from loracc.passes.peft_names import adapter_name, clean_names
from loracc.passes.plan_rewrite import Plan, Refused, plan_rewrite
from loracc.passes.raise_weights import raise_weight
from loracc.passes.raised import Raised, Rejected
from loracc.passes.raised_deltas import narrowed, weight_deltas
from loracc.passes.raised_sites import Found, bind_found
from loracc.passes.rewrite_sums import apply_plan, replace_value
from loracc.passes.value_dims import Dims
from loracc.tensors import dims as tensor_dims

__all__ = ["RaiseLoraPass", "raise_lora"]

_NEGLIGIBLE = 1e-11


def raise_lora(model: ir.Model) -> Raised:
    """Raise in place and say what was found."""
    raiser = RaiseLoraPass()
    raiser(model)
    return raiser.report


class RaiseLoraPass(ir.passes.InPlacePass):
    """See the module's docstring.

    Attributes:
        report: What was found, after the call.
    """

    def __init__(self) -> None:
        super().__init__()
        self.report = Raised()

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        work = _Work(model)
        work.raise_sums()
        work.raise_weights()
        if work.found:
            clean_names(model)
        bindings = bind_found(model, work.found)
        annotate(model, bindings)
        self.report = Raised(tuple(bindings), tuple(work.rejected()))
        return ir.passes.PassResult(model, modified=bool(work.found))


@dataclass
class _Work:
    """One run over one model."""

    model: ir.Model
    found: list[Found] = field(default_factory=list)
    refused: dict[ir.Node, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        opset = self.model.graph.opset_imports.get("", self.model.graph.opset_imports.get("ai.onnx", 18))
        self.constants = Constants(opset)
        self.dims = Dims(self.constants, self.model)

    def raise_sums(self) -> None:
        """Rules 1 and 2."""
        shared: list[ir.Node] = []
        some: list[ir.Node] = []
        for node in [node for node in self.model.graph.all_nodes() if is_sum(node, self.constants)]:
            # A sum may hold several weights with deltas, or be gone because a larger change took it along.
            while node.graph is not None and (group := self._group(node)) is not None:
                try:
                    self._apply(group, plan_rewrite(group))
                except Refused as reason:
                    self.refused[node] = str(reason)
                    if reason.shared:
                        shared.append(node)
                    if reason.node is not None:
                        some.append(node)
                    break
        self._raise_together(shared)
        for node in some:
            if node in self.refused and node.graph is not None:
                self._raise_others(node)

    def _group(self, node: ir.Node) -> Group | None:
        value = node.outputs[0]
        read = bool(value.uses()) or value.is_graph_output()
        return find_group(node, self.constants, self.dims) if read and not self.constants.is_constant(value) else None

    def _raise_together(self, nodes: list[ir.Node]) -> None:
        """Rule 2: the largest set of sums none of whose deltas is read outside of the set."""
        groups = {n: g for n in nodes if n.graph is not None and (g := self._group(n)) is not None}
        while True:
            going = {node for group in groups.values() for node in _nodes(group)}
            kept = {node: group for node, group in groups.items() if _possible(group, going)}
            if len(kept) == len(groups):
                break
            groups = kept
        for node in groups:
            group = self._group(node)
            if group is not None:
                self._apply(group, plan_rewrite(group, going))
                del self.refused[node]

    def _raise_others(self, node: ir.Node) -> None:
        """Rule 2, second half: without the deltas that have to stay."""
        group, reason = self._group(node), self.refused[node]
        while group is not None:
            try:
                plan = plan_rewrite(group)
            except Refused as refused:
                group = group.without(refused.node) if refused.node is not None else None
                continue
            self._apply(group, plan)
            left = plan.result.producer()
            if node.graph is None and left is not None:
                self.refused[left] = reason  # the sum is another node now, and what stays in it is told all the same
            return

    def _apply(self, group: Group, plan: Plan) -> None:
        """Rewrite one sum and write its deltas down."""
        plan = plan.held()
        graph, base = group.root.graph, group.base
        assert isinstance(graph, ir.Graph)
        earlier = [f for f in self.found if f.initializer is base.initializer and f.node is base.node]
        deltas = weight_deltas(plan.lost.products, plan.kept, base, [f.delta for f in earlier])
        everything = adapter_name(name for product in plan.lost.products for name in _names_of(product))
        apply_plan(graph, group, plan)
        result = _without_cast(graph, plan.result)
        for delta, term in deltas:
            if term is None:  # it multiplies what was found before, and stands for it
                self.found = [f for f in self.found if not any(f is one for one in earlier)]
            adapter = adapter_name(_names_of(term)) if term is not None else everything
            self.found.append(Found(base.initializer, base.layout, base.kind, delta, adapter, base.node))
        if plan.lost.bias is not None:
            self._raise_bias(graph, result, group, plan.lost.bias, everything)

    def _raise_bias(self, graph: ir.Graph, result: ir.Value, group: Group, lost: Array, adapter: str) -> None:
        """A constant that the deltas carried along goes into the layer's bias; without one the sum gets one."""
        change = np.broadcast_to(lost, (group.base.factor.shape[1],))
        if np.all(np.abs(change) <= _NEGLIGIBLE * _largest_bias(group)):
            return
        stored = _bias_of(group.base.node, result, self.constants)
        stored = stored or _new_bias(self.model.graph, graph, result, group)
        assert stored.value.const_value is not None
        shape = tensor_dims(stored.value.const_value)
        delta = Addition(narrowed((change / stored.coefficient).reshape(shape)))
        self.found.append(Found(stored.value, tuple(range(len(shape))), "bias", delta, adapter, stored.node))

    def raise_weights(self) -> None:
        """Rule 3."""
        for node in list(self.model.graph.all_nodes()):
            for raised in raise_weight(node, self.model.graph, self.constants):
                self.found.append(
                    Found(raised.initializer, raised.layout, raised.kind, raised.delta, raised.adapter, raised.node)
                )

    def rejected(self) -> list[Rejected]:
        """Rule 5."""
        first: dict[str, ir.Node] = {}
        for node, reason in self.refused.items():  # a sum of sums meets the same obstacle again
            if node.graph is not None:
                first.setdefault(reason, node)
        left = [Rejected(place(node), reason) for reason, node in first.items()]
        return left + find_lookalikes(self.model, self.constants, self.dims, skip=self.refused)


def _largest_bias(group: Group) -> float:
    """How large the constants in a sum are, before they cancel: what the rounding of their sum is measured by."""
    scale = max((float(np.abs(p.coefficient).max()) for p in group.form.products), default=1.0)
    bias = group.form.bias
    return 0.0 if bias is None else float(np.abs(bias).max()) * max(scale, 1.0)


def _nodes(group: Group) -> frozenset[ir.Node]:
    return frozenset(group.form.nodes)


def _possible(group: Group, going: set[ir.Node]) -> bool:
    try:
        plan_rewrite(group, going)
    except Refused:
        return False
    return True


def _names_of(product: Product) -> list[str]:
    return [str(factor.value.name) for factor in product.factors]


def _without_cast(graph: ir.Graph, result: ir.Value) -> ir.Value:
    """PEFT casts the sum back to the dtype that the base's product had: a Cast to what is there anyway goes."""
    while True:
        source = result.producer()
        inner = source.inputs[0] if source is not None and source.op_type == "Cast" else None
        for use in list(result.uses()):
            node = use.node
            if node.op_type != "Cast" or not is_onnx(node) or node.graph is not graph:
                continue
            to = ir.DataType(node.attributes["to"].as_int())
            origin = next((v for v in (result, inner) if v is not None and element_type(v) == to), None)
            if origin is inner and inner is not None and not _widens(inner, result):
                continue  # the Cast below rounds
            if origin is not None:
                replace_value(graph, node.outputs[0], origin)
                graph.remove(node, safe=True)
        if inner is not None and not result.uses() and not result.is_graph_output() and source is not None:
            graph.remove(source, safe=True)
            result = inner
            continue
        return result


def _widens(before: ir.Value, after: ir.Value) -> bool:
    one, other = element_type(before), element_type(after)
    return one is not None and other is not None and one.bitwidth < other.bitwidth


@dataclass(frozen=True)
class _Bias:
    """A stored bias, the node that adds it, and the number it is multiplied with on its way to the sum."""

    value: ir.Value
    node: ir.Node
    coefficient: float = 1.0


def _bias_of(node: ir.Node, result: ir.Value, constants: Constants) -> _Bias | None:
    """A layer's bias: its node's own third input, or what the nearest addition above brings."""
    found: _Bias | None = None
    third = node.inputs[2] if node.op_type in ("Gemm", "Conv") and len(node.inputs) > 2 else None
    if third is not None and _is_stored(third):
        found = _Bias(third, node, node.attributes.get_float("beta", 1.0) if node.op_type == "Gemm" else 1.0)
    value = node.outputs[0]
    while value is not result:
        if len(value.uses()) != 1:
            return None
        user, index = next(iter(value.uses()))
        others = [v for i, v in enumerate(user.inputs) if i != index and v is not None]
        if found is None:
            added = next((v for v in others if user.op_type in SUMS and _is_stored(v)), None)
            found = None if added is None else _Bias(added, user, -1.0 if user.op_type == "Sub" and index == 0 else 1.0)
        else:
            number = _number(user, index, others, constants)
            if not number:
                return None
            found = replace(found, coefficient=found.coefficient * number)
        value = user.outputs[0]
    return found if found is None or found.coefficient else None


def _number(user: ir.Node, index: int, others: list[ir.Value], constants: Constants) -> float | None:
    """What a node on the way multiplies with; None when that is no number."""
    if user.op_type in ("Mul", "Div"):
        number = constants.scalar(others[0]) if constants.is_constant(others[0]) else None
        return number if number is None or user.op_type == "Mul" else 1.0 / number
    return -1.0 if user.op_type == "Neg" or (user.op_type == "Sub" and index == 1) else 1.0


def _is_stored(value: ir.Value | None) -> bool:
    """Whether a bias can take a delta: a stored vector of its own, or with a single entry along every other axis."""
    if value is None or not value.is_initializer() or value.is_graph_output():
        return False
    tensor = plain_tensor(value)
    return tensor is not None and max(tensor_dims(tensor), default=1) == tensor.size and tensor.size > 1


def _new_bias(main: ir.Graph, graph: ir.Graph, result: ir.Value, group: Group) -> _Bias:
    """A bias of zeros, added to the sum; the delta is all of it."""
    axis = group.form.axis or -1
    shape = (group.base.factor.shape[1], *([1] * (-1 - axis)))
    dtype = element_type(result) or group.base.initializer.dtype or ir.DataType.FLOAT
    stem = str(group.base.initializer.name).removesuffix(".weight")
    names = {*main.initializers, *(str(out.name) for node in main.all_nodes() for out in node.outputs)}
    name = next(n for i in range(len(names) + 1) if (n := f"{stem}.bias" + f".{i}" * bool(i)) not in names)
    tensor = ir.Tensor(np.zeros(shape, dtype.numpy()), dtype=dtype, name=name)
    bias = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype), const_value=tensor)
    main.initializers.add(bias)
    producer = result.producer()
    assert producer is not None
    node = ir.node("Add", [result, bias], name=f"{name}.Add")
    users = [use for use in result.uses() if use.node is not node]
    graph.insert_after(producer, node)
    out = node.outputs[0]
    out.name, out.type, out.shape = f"{name}.sum", result.type, result.shape
    for use in users:
        use.node.replace_input_with(use.idx, out)
    if result.is_graph_output():
        for index, output in enumerate(graph.outputs):
            if output is result:
                graph.outputs[index] = out
        out.name, result.name = result.name, out.name
    return _Bias(bias, node)
