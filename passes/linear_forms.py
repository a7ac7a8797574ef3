"""The algebra of linear maps that raising works in: sums of products of constant matrices, all of one input.

A :class:`Form` says that a value is ``y = Σ sᵢ · (x·M₁·M₂·…·Mₙ) ⊙ uᵢ + bias`` of a source x, where each M is a
constant ``[in, out]`` matrix, sᵢ a number and uᵢ a vector over the outputs (DoRA's factor) or nothing. What ``x·M₁``
means is the product's :class:`Head`: rows times a matrix, rows looked up, or a convolution, whose M₁ is the flattened
kernel ``[in/groups·k, out]``. The matrices stay unread until somebody asks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace

import numpy as np
import onnx_ir as ir

from loracc.dtypes import Array

__all__ = ["Factor", "Form", "Head", "NotLinear", "Product"]


class NotLinear(Exception):
    """A value is no linear map of the source; the message says why, as the end of "left as it is: ..."."""


@dataclass(frozen=True)
class Head:
    """How a product's first matrix meets the source.

    Attributes:
        kind: "linear", "embedding" or "conv".
        axis: For "linear", the contracted axis of the source counted from the end: -1, or -2 in ``W @ x``.
        kernel: For "conv", the kernel's spatial shape.
        group, strides, pads, dilations: For "conv".
    """

    kind: str
    axis: int = -1
    kernel: tuple[int, ...] = ()
    group: int = 1
    strides: tuple[int, ...] = ()
    pads: Hashable = ()
    dilations: tuple[int, ...] = ()

    @property
    def pointwise(self) -> bool:
        """A 1x1 convolution that leaves every position where it is: a matrix on the channels."""
        ones = {*self.kernel, *self.strides} <= {1} and self.group == 1
        return self.kind == "conv" and ones and isinstance(self.pads, tuple) and not any(self.pads)


@dataclass(frozen=True, eq=False)
class Factor:
    """A constant matrix ``[in, out]``, not yet read.

    Attributes:
        value: The graph's value that it is, in the orientation that its node wants.
        node: The node that multiplies by it, and ``index`` the input.
        shape: ``(in, out)``.
        read: Gives the matrix in float64.
        turned: The graph has it as ``[out, in]``.
    """

    value: ir.Value
    node: ir.Node
    index: int
    shape: tuple[int, int]
    read: Callable[[], Array]
    turned: bool = False


@dataclass(frozen=True, eq=False)
class Product:
    """One term: the source through the factors, times ``scale``, times ``out`` per output."""

    head: Head | None = None
    factors: tuple[Factor, ...] = ()
    scale: float = 1.0
    out: Array | None = None

    def scaled(self, by: float) -> Product:
        """This term times a number."""
        return replace(self, scale=self.scale * by)

    def stretched(self, by: Array) -> Product:
        """This term times a vector over the outputs."""
        return replace(self, out=by if self.out is None else self.out * by)

    def then(self, factor: Factor) -> Product:
        """This term through one more matrix; a vector over the outputs goes into the matrix before it."""
        if self.out is None:
            return replace(self, factors=(*self.factors, factor))
        out, matrix = self.out, factor.read
        absorbed = replace(factor, read=lambda: np.broadcast_to(out, (factor.shape[0],))[:, None] * matrix())
        return replace(self, factors=(*self.factors, absorbed), out=None)

    @property
    def key(self) -> tuple[ir.Node, ...]:
        """The nodes that multiply: two terms with the same ones differ in their coefficients only."""
        return tuple(factor.node for factor in self.factors)

    @property
    def width(self) -> int | None:
        """The number of outputs, None for the source itself."""
        return self.factors[-1].shape[1] if self.factors else None

    def held(self) -> Product:
        """The same term with its matrices read now: the graph may lose them."""
        matrices = [factor.read() for factor in self.factors]
        held = [replace(f, read=lambda m=m: m) for f, m in zip(self.factors, matrices, strict=True)]  # type: ignore[misc]
        return replace(self, factors=tuple(held))

    def halves(self) -> tuple[Array, Array]:
        """``(left [in, r], right [r, out])`` with the scale and the vector left out, split where it is narrowest."""
        widths = [factor.shape[1] for factor in self.factors[:-1]]
        cut = 1 + int(np.argmin(widths))
        return _chain(self.factors[:cut]), _chain(self.factors[cut:])

    def dense(self) -> Array:
        """The whole map ``[in, out]``, scale and vector included."""
        result = _chain(self.factors) * self.scale
        return result if self.out is None else result * self.out

    @property
    def inner(self) -> int:
        """The narrowest width between two factors: no larger rank is possible."""
        return min(factor.shape[1] for factor in self.factors[:-1])

    @property
    def coefficient(self) -> Array:
        """Scale and vector as one number or vector."""
        return np.asarray(self.scale) if self.out is None else self.out * self.scale


def _chain(factors: tuple[Factor, ...]) -> Array:
    result = factors[0].read()
    for factor in factors[1:]:
        result = result @ factor.read()
    return result


@dataclass(frozen=True, eq=False)
class Form:
    """A value as an affine map of one source.

    Attributes:
        products: The terms; none for a constant.
        bias: Constant part: a number or a vector over the outputs.
        axis: Where the outputs lie, counted from the end; None while nothing has decided it.
        flipped: For the source itself: its last two axes are exchanged.
        rows: None when every other axis is the source's own, else what a Reshape has made of them.
        nodes: The nodes read, without those that only pass the source on.
        opaque: Addends that are no linear map of the source and stay as they are, with the reason.
    """

    products: tuple[Product, ...] = ()
    bias: Array | None = None
    axis: int | None = None
    flipped: bool = False
    rows: Hashable = None
    nodes: frozenset[ir.Node] = frozenset()
    opaque: tuple[tuple[ir.Value, str], ...] = field(default=())

    @property
    def is_source(self) -> bool:
        """The source itself, at most turned or reshaped: no matrix has been met, no number multiplied."""
        return len(self.products) == 1 and self.bias is None and self._untouched(self.products[0])

    @staticmethod
    def _untouched(product: Product) -> bool:
        return not product.factors and product.scale == 1.0 and product.out is None

    @property
    def constant(self) -> bool:
        """No term of the source is in it."""
        return not self.products and not self.opaque

    @property
    def width(self) -> int | None:
        """The number of outputs, None where nothing says."""
        widths = {product.width for product in self.products} - {None}
        return widths.pop() if len(widths) == 1 else None

    def via(self, node: ir.Node) -> Form:
        """The same, with one more node read."""
        return replace(self, nodes=self.nodes | {node})

    def scaled(self, by: float) -> Form:
        """Times a number."""
        if not math.isfinite(by):
            raise NotLinear(f"the scale is {by}")
        bias = None if self.bias is None else self.bias * by
        return replace(self, products=tuple(p.scaled(by) for p in self.products), bias=bias)

    def stretched(self, by: Array) -> Form:
        """Times a vector over the outputs."""
        bias = None if self.bias is None else self.bias * by
        return replace(self, products=tuple(p.stretched(by) for p in self.products), bias=bias)

    def then(self, factor: Factor, axis: int) -> Form:
        """Through a matrix on the outputs' axis."""
        bias = self.bias
        if bias is not None:
            bias = np.broadcast_to(bias, (factor.shape[0],)) @ factor.read()
        return replace(self, products=tuple(p.then(factor) for p in self.products), bias=bias, axis=axis)

    def plus(self, other: Form) -> Form:
        """The sum of two forms of the same source.

        Raises:
            NotLinear: Their outputs lie on different axes, or their rows are not provably the same.
        """
        if self.products and other.products:
            if self.axis != other.axis or self.flipped != other.flipped:
                raise NotLinear("the terms have their outputs on different axes")
            if self.rows != other.rows:
                raise NotLinear("the terms are reshaped differently")
            if self.width is not None and other.width is not None and self.width != other.width:
                raise NotLinear(f"a term with {self.width} outputs is broadcast over {other.width}")
        lead = self if self.products else other
        bias = other.bias if self.bias is None else self.bias if other.bias is None else self.bias + other.bias
        return replace(
            lead,
            products=self.products + other.products,
            bias=bias,
            nodes=self.nodes | other.nodes,
            opaque=self.opaque + other.opaque,
        )
