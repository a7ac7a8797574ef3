"""Reads a runtime value as an affine map of one source, node by node along use-def chains.

Every handler proves its step or raises :class:`NotLinear` with the reason. What is not in the table is not linear.
Casts among floats count as linear (their rounding is what folding does once), and Dropout in inference as nothing.

A reader is *tolerant* inside one tree of additions: there an operand that is no map of the source is an opaque addend.
Anywhere else such an operand makes the whole value unreadable.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial

import numpy as np
import onnx_ir as ir

from loracc.dtypes import Array, is_float
from loracc.passes.constant_values import Constants, element_type, is_onnx
from loracc.passes.linear_convs import after_convolution, conv_head, kernel_factor
from loracc.passes.linear_forms import Factor, Form, Head, NotLinear, Product
from loracc.passes.value_dims import Dims

__all__ = ["Reader", "runs_in_training", "swaps_last_two"]

#: No LoRA module is longer than this from its output to its input.
_MOST_NODES = 200


class Reader:
    """Forms of values with respect to one source.

    Args:
        constants, dims: What is known of the graph.
        source: The value x.
        tree: Nodes whose operands may be opaque.
    """

    def __init__(self, constants: Constants, dims: Dims, source: ir.Value, tree: Iterable[ir.Node] = ()) -> None:
        self.constants = constants
        self.dims = dims
        self.source = source
        self.tree = frozenset(tree)
        self._memo: dict[ir.Value, Form | NotLinear] = {}

    def read(self, value: ir.Value) -> Form:
        """The value as a form.

        Raises:
            NotLinear: With the reason.
        """
        if value is self.source:
            return Form(products=(Product(),))
        found = self._memo.get(value)
        if found is None:
            if len(self._memo) > _MOST_NODES:
                raise NotLinear("it is computed from too far away")
            self._memo[value] = NotLinear("it depends on itself")
            found = self._memo[value] = self._attempt(value)
        if isinstance(found, NotLinear):
            raise NotLinear(str(found))
        return found

    def _attempt(self, value: ir.Value) -> Form | NotLinear:
        try:
            return self._read(value)
        except NotLinear as reason:
            return reason

    def _read(self, value: ir.Value) -> Form:
        node = value.producer()
        if node is None:
            raise NotLinear(f"it reads {value.name!r}, which is another input than the base weight's")
        handler = _HANDLERS.get(node.op_type) if is_onnx(node) and value is node.outputs[0] else None
        if handler is None:
            raise NotLinear(f"{node.op_type} ({node.name!r}) is not linear")
        form = handler(self, node)
        return form if form.is_source else form.via(node)

    # Sums. Constants are read last: which axis they lie along is told by the other addends.

    def _add(self, node: ir.Node) -> Form:
        return self._sum(node, [(1.0, v) for v in node.inputs])

    def _sub(self, node: ir.Node) -> Form:
        return self._sum(node, list(zip((1.0, -1.0), node.inputs, strict=True)))

    def _sum(self, node: ir.Node, addends: list[tuple[float, ir.Value | None]]) -> Form:
        total = Form()
        for sign, value in addends:
            if value is not None and not self.constants.is_constant(value):
                total = self._with(total, node, value, partial(self._signed, value, sign))
        if not total.products:
            raise NotLinear(total.opaque[0][1] if total.opaque else "it is a constant")
        for sign, value in addends:
            if value is not None and self.constants.is_constant(value):
                total = self._with(total, node, value, partial(self._added_constant, value, sign, total, node))
        return total

    def _signed(self, value: ir.Value, sign: float) -> Form:
        return self.read(value).scaled(sign)

    def _added_constant(self, value: ir.Value, sign: float, total: Form, node: ir.Node) -> Form:
        return Form(bias=sign * self.vector(value, total, node))

    def _with(self, total: Form, node: ir.Node, value: ir.Value, read: Callable[[], Form]) -> Form:
        try:
            return total.plus(read())
        except NotLinear as reason:
            if node not in self.tree:
                raise
            return replace(total, opaque=(*total.opaque, (value, str(reason))), nodes=total.nodes)

    def _neg(self, node: ir.Node) -> Form:
        return self.read(_input(node, 0)).scaled(-1.0)

    # Multiplication by numbers and by one number per output.

    def _mul(self, node: ir.Node) -> Form:
        first, second = _input(node, 0), _input(node, 1)
        if self.constants.is_constant(first):
            first, second = second, first
        if not self.constants.is_constant(second):
            raise NotLinear(self._both_at_run_time(first, second, "scale"))
        form = self.read(first)
        return self._times(form, self.vector(second, form, node))

    def _div(self, node: ir.Node) -> Form:
        if not self.constants.is_constant(node.inputs[1]):
            raise NotLinear(self._both_at_run_time(_input(node, 0), _input(node, 1), "scale"))
        form = self.read(_input(node, 0))
        divisor = self.vector(_input(node, 1), form, node)
        if not divisor.all():
            raise NotLinear("it is divided by zero")
        return self._times(form, 1.0 / divisor)

    @staticmethod
    def _times(form: Form, by: Array) -> Form:
        return form.stretched(by) if by.ndim else form.scaled(float(by))

    def vector(self, value: ir.Value, form: Form, node: ir.Node) -> Array:
        """A constant as a number or as a vector over the form's outputs."""
        shape = self.constants.shape(value)
        if len(shape) > 1:
            others = [self.dims.rank(v) for v in node.inputs if v is not None and v is not value]
            if not all(other is not None and other >= len(shape) for other in others):
                raise NotLinear(f"a constant of shape {list(shape)} may add axes to the result")
        if int(np.prod(shape, dtype=int)) == 1:
            return self.constants.evaluate(value).reshape(())
        axis = form.axis
        if axis is None or len(shape) < -axis or int(np.prod(shape, dtype=int)) != shape[axis]:
            raise NotLinear(f"a constant of shape {list(shape)} is not one number per output")
        if form.width not in (None, shape[axis]):
            raise NotLinear(f"{form.width} outputs are broadcast over {shape[axis]}")
        return self.constants.evaluate(value).reshape(-1)

    # Products.

    def _matmul(self, node: ir.Node) -> Form:
        left, right = _input(node, 0), _input(node, 1)
        if self.constants.is_constant(right):
            return self._right(self.read(left), self._matrix(node, 1, transposed=False))
        if self.constants.is_constant(left):
            return self._left(self.read(right), self._matrix(node, 0, transposed=True), right)
        raise NotLinear(self._both_at_run_time(left, right, "weight"))

    def _gemm(self, node: ir.Node) -> Form:
        return self._plus_third(self.product_of(node), node)

    def product_of(self, node: ir.Node) -> Form:
        """A Gemm without its third input."""
        left, right = _input(node, 0), _input(node, 1)
        trans_a, trans_b = (bool(node.attributes.get_int(name, 0)) for name in ("transA", "transB"))
        if self.constants.is_constant(right):
            form = self.read(left)
            form = self._right(_flip(form) if trans_a else form, self._matrix(node, 1, transposed=trans_b))
        elif self.constants.is_constant(left):
            form = self.read(right)
            factor = self._matrix(node, 0, transposed=not trans_a)
            form = self._left(_flip(form) if trans_b else form, factor, right)
        else:
            raise NotLinear(self._both_at_run_time(left, right, "weight"))
        return form.scaled(node.attributes.get_float("alpha", 1.0))

    def _plus_third(self, form: Form, node: ir.Node) -> Form:
        third = node.inputs[2] if len(node.inputs) > 2 else None
        beta = node.attributes.get_float("beta", 1.0)
        if third is None or beta == 0.0:
            return form
        if self.constants.is_constant(third):
            shape = self.constants.shape(third)
            wide = [n for n in shape if n != 1]
            if wide and (form.axis is None or len(shape) < -form.axis or wide != [shape[form.axis]]):
                raise NotLinear(f"Gemm adds a constant of shape {list(shape)}")
            return form.plus(Form(bias=beta * self.constants.evaluate(third).reshape(-1 if wide else ())))
        return self._with(form, node, third, partial(self._signed, third, beta))

    def _matrix(self, node: ir.Node, index: int, *, transposed: bool) -> Factor:
        value = _input(node, index)
        shape = self.constants.shape(value)
        if len(shape) != 2:
            raise NotLinear(f"{value.name!r} of shape {list(shape)} is not one matrix")
        if transposed:
            return Factor(
                value, node, index, (shape[1], shape[0]), lambda: self.constants.evaluate(value).T, turned=True
            )
        return Factor(value, node, index, (shape[0], shape[1]), lambda: self.constants.evaluate(value))

    def _right(self, form: Form, factor: Factor) -> Form:
        if form.axis not in (None, -1):
            raise NotLinear("two factors in a row act on different axes")
        return _started(form, Head("linear", -2 if form.flipped else -1)).then(factor, -1)

    def _left(self, form: Form, factor: Factor, operand: ir.Value) -> Form:
        if form.axis not in (None, -2) or form.rows is not None:
            raise NotLinear("two factors in a row act on different axes")
        if (self.dims.rank(operand) or 0) < 2:
            raise NotLinear(f"it is not known that {operand.name!r} is a matrix")
        return _started(form, Head("linear", -1 if form.flipped else -2)).then(factor, -2)

    def _gather(self, node: ir.Node) -> Form:
        table, ids = _input(node, 0), _input(node, 1)
        if not self.constants.is_constant(table):
            raise NotLinear(f"Gather ({node.name!r}) is not linear")
        form = self.read(ids)
        if not form.is_source or form.flipped or form.rows is not None or node.attributes.get_int("axis", 0) != 0:
            raise NotLinear("its rows are looked up by other ids than the base's")
        return _started(form, Head("embedding")).then(self._matrix(node, 0, transposed=False), -1)

    def _conv(self, node: ir.Node) -> Form:
        if not self.constants.is_constant(node.inputs[1]):
            raise NotLinear(self._both_at_run_time(_input(node, 0), _input(node, 1), "weight"))
        shape = self.constants.shape(_input(node, 1))
        head = conv_head(node, shape)
        form = self.read(_input(node, 0))
        if form.flipped or form.rows is not None:
            raise NotLinear("a convolution of a transposed or reshaped input")
        if form.axis is None:
            form = _started(form, head).then(kernel_factor(self.constants, node, shape), 1 - len(shape))
        else:
            form = after_convolution(form, head, self.constants, node, shape)
        if len(node.inputs) > 2 and node.inputs[2] is not None:
            if not self.constants.is_constant(node.inputs[2]):
                raise NotLinear("a convolution's bias is computed at run time")
            form = form.plus(Form(bias=self.constants.evaluate(node.inputs[2])))
        return form

    def _both_at_run_time(self, first: ir.Value, second: ir.Value, what: str) -> str:
        """The reason why a product of two runtime values is refused: which of them is at fault."""
        culprit = second
        if what == "scale":
            readable = isinstance(self._attempt_value(second), Form)
            culprit = first if readable else second
        if culprit.is_graph_input():
            return f"its {what} {culprit.name!r} is a graph input"
        return f"its {what} {culprit.name!r} is computed at run time"

    def _attempt_value(self, value: ir.Value) -> Form | NotLinear:
        try:
            return self.read(value)
        except NotLinear as reason:
            return reason

    # What only moves or retypes.

    def _same(self, node: ir.Node) -> Form:
        return self.read(_input(node, 0))

    def _dropout(self, node: ir.Node) -> Form:
        if runs_in_training(node, self.constants):
            raise NotLinear(f"Dropout ({node.name!r}) runs in training mode")
        return self.read(_input(node, 0))

    def _cast(self, node: ir.Node) -> Form:
        value = _input(node, 0)
        form = self.read(value)
        to = ir.DataType(node.attributes["to"].as_int())
        products = any(p.factors for p in form.products)
        before = element_type(value)
        came_as_float = products or (before is not None and is_float(before))
        integers = not came_as_float and before in _INTEGERS and to in _INTEGERS
        if (came_as_float and is_float(to)) or integers:
            return form
        raise NotLinear(f"Cast ({node.name!r}) from {before} to {to}")

    def _transpose(self, node: ir.Node) -> Form:
        if not swaps_last_two(node, self.dims):
            raise NotLinear(f"Transpose ({node.name!r}) moves other axes than the last two")
        return _flip(self.read(_input(node, 0)))

    def _reshape(self, node: ir.Node) -> Form:
        """Rows may be arranged anew; the outputs' axis stays last."""
        form = self.read(_input(node, 0))
        before, after = self.dims.of(_input(node, 0)), self.dims.of(node.outputs[0])
        last = form.width if form.width is not None else before[-1] if before else None
        if form.axis not in (None, -1) or form.flipped or not after or last is None or after[-1] != last:
            raise NotLinear(f"Reshape ({node.name!r}) may change the axis of the outputs")
        whole = self.dims.of(self.source)
        looked_up = any(p.head is not None and p.head.kind == "embedding" for p in form.products)
        own = None if whole is None else whole if looked_up else whole[:-1]
        return replace(form, rows=None if after[:-1] == own else after[:-1])


_INTEGERS = frozenset({ir.DataType.INT32, ir.DataType.INT64})


def _input(node: ir.Node, index: int) -> ir.Value:
    value = node.inputs[index] if index < len(node.inputs) else None
    if value is None:
        raise NotLinear(f"{node.op_type} ({node.name!r}) lacks an input")
    return value


def _started(form: Form, head: Head) -> Form:
    """Terms that are still the source itself meet their first matrix."""
    products = tuple(p if p.factors else replace(p, head=head) for p in form.products)
    return replace(form, products=products, flipped=False)


def _flip(form: Form) -> Form:
    if form.rows is not None:
        raise NotLinear("a reshaped input is transposed")
    if form.axis is None:
        return replace(form, flipped=not form.flipped)
    if form.axis not in (-1, -2) or any(p.head is not None and p.head.kind == "conv" for p in form.products):
        raise NotLinear("the channels of a convolution are transposed")
    return replace(form, axis=-3 - form.axis)


def swaps_last_two(node: ir.Node, dims: Dims) -> bool:
    """Whether a Transpose exchanges the last two axes and nothing else."""
    perm = node.attributes.get("perm")
    if perm is None:
        return node.inputs[0] is not None and dims.rank(node.inputs[0]) == 2
    order = list(perm.as_ints())
    n = len(order)
    return n >= 2 and order == [*range(n - 2), n - 1, n - 2]


def runs_in_training(node: ir.Node, constants: Constants) -> bool:
    """Whether a Dropout drops anything."""
    mode = node.inputs[2] if len(node.inputs) > 2 else None
    if mode is None:
        return constants.opset < 7 and not node.attributes.get_int("is_test", 0)
    return not constants.is_constant(mode) or bool(constants.evaluate(mode).any())


_HANDLERS: dict[str, Callable[[Reader, ir.Node], Form]] = {
    "Add": Reader._add,
    "Cast": Reader._cast,
    "Conv": Reader._conv,
    "Div": Reader._div,
    "Dropout": Reader._dropout,
    "Gather": Reader._gather,
    "Gemm": Reader._gemm,
    "Identity": Reader._same,
    "MatMul": Reader._matmul,
    "Mul": Reader._mul,
    "Neg": Reader._neg,
    "Reshape": Reader._reshape,
    "Sub": Reader._sub,
    "Sum": Reader._add,
    "Transpose": Reader._transpose,
}
