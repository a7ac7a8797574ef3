"""Convolutions as products: the flattened kernel is a matrix on the patches that the head's geometry takes.

A k×k convolution followed by a pointwise one is the matrix product of the two (PEFT's LoRA). A pointwise one followed
by a k×k one is M⊗I on the k×k patches and then the flattened kernel: also a product.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir

from loracc.dtypes import Array
from loracc.passes.constant_values import Constants
from loracc.passes.linear_forms import Factor, Form, Head, NotLinear, Product

__all__ = ["after_convolution", "conv_head", "kernel_factor"]


def conv_head(node: ir.Node, shape: tuple[int, ...]) -> Head:
    """The geometry of a Conv whose weight is ``[out, in/group, *kernel]``."""
    if len(shape) < 3:
        raise NotLinear(f"Conv ({node.name!r}) has a weight of shape {list(shape)}")
    spatial = len(shape) - 2
    auto = node.attributes.get_string("auto_pad", "NOTSET")
    pads = node.attributes.get_ints("pads", (0,) * (2 * spatial))
    return Head(
        "conv",
        kernel=shape[2:],
        group=node.attributes.get_int("group", 1),
        strides=tuple(node.attributes.get_ints("strides", (1,) * spatial)),
        pads=tuple(pads) if auto in ("NOTSET", "VALID") else auto,
        dilations=tuple(node.attributes.get_ints("dilations", (1,) * spatial)),
    )


def kernel_factor(constants: Constants, node: ir.Node, shape: tuple[int, ...]) -> Factor:
    """The kernel as a matrix ``[in/group·k, out]``."""
    value = node.inputs[1]
    assert value is not None
    return Factor(
        value,
        node,
        1,
        (int(np.prod(shape[1:])), shape[0]),
        lambda: constants.evaluate(value).reshape(shape[0], -1).T,
    )


def after_convolution(form: Form, head: Head, constants: Constants, node: ir.Node, shape: tuple[int, ...]) -> Form:
    """A convolution of a convolution's result.

    Raises:
        NotLinear: The two are not one convolution with a single kernel.
    """
    heads = {p.head for p in form.products}
    if form.axis != 1 - len(shape) or any(h is None or h.kind != "conv" or h.group != 1 for h in heads):
        raise NotLinear("a convolution after something else than an ungrouped convolution of its rank")
    factor = kernel_factor(constants, node, shape)
    if head.pointwise:
        return form.then(factor, form.axis)
    if head.group != 1 or any(h is None or not h.pointwise for h in heads):
        raise NotLinear("two convolutions in a row, neither of which is 1x1")
    padded = not isinstance(head.pads, tuple) or any(head.pads)
    if form.bias is not None and padded and form.bias.any():
        raise NotLinear("the first convolution's bias meets the padding of the second")
    kernel = int(np.prod(shape[2:]))
    products = tuple(_spread(p, head, kernel, factor) for p in form.products)
    bias = None
    if form.bias is not None:
        inputs = shape[1]
        bias = np.repeat(np.broadcast_to(form.bias, (inputs,)), kernel) @ factor.read()
    return replace(form, products=products, bias=bias)


def _spread(product: Product, head: Head, kernel: int, factor: Factor) -> Product:
    """A pointwise product followed by a kernel: the first acts at each of the kernel's positions."""
    rows, columns = product.factors[0].shape[0], product.factors[-1].shape[1]

    def spread() -> Array:
        return np.kron(replace(product, scale=1.0).dense(), np.eye(kernel))

    first = replace(product.factors[0], shape=(rows * kernel, columns * kernel), read=spread)
    return Product(head, (first, factor), product.scale)
