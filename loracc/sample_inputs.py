"""Inputs to compare models with: the model's own, the user's, else seeded random ones that the model can take.

Random inputs respect what the graph says: ids stay inside the embedding that they index, masks are ones with some
padding at the end, equal symbols have equal sizes, and a size given as a sum ("past + sequence") is that sum.
"""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Mapping

import numpy as np
import onnx_ir as ir

from loracc.decoder_inputs import counts_tokens, decoder_sizes, symbol_sums
from loracc.dtypes import Array, is_float
from loracc.errors import InputError
from loracc.model import BaseModel
from loracc.sources.user_inputs import misfits

__all__ = ["check_inputs", "draw_inputs", "fed", "random_inputs", "vocabulary_limits"]

BATCH, SEQUENCE = 2, 16
#: Elements of one made-up input: more is a model that its author runs with inputs of his own.
_LARGEST = 1 << 28
#: Operators that pass indices on.
_PASSING = ("Cast", "Identity", "Reshape", "Unsqueeze", "Squeeze", "Slice", "Flatten", "Transpose", "Expand")
_ARITHMETIC: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
}


def draw_inputs(
    model: BaseModel, *, seed: int = 0, draws: int = 3, given: Mapping[str, Array] | None = None
) -> tuple[list[dict[str, Array]], str]:
    """Several sets of inputs, and a word on where they come from.

    1. What the user gave, and only that.
    2. The model's own sample, and variations of it in the same shapes.
    3. Seeded random ones.

    Raises:
        InputError: The given inputs do not fit the model.
    """
    if given:
        check_inputs(model.ir, given)
        return [{str(v.name): np.asarray(given[str(v.name)]) for v in fed(model.ir)}], "the inputs that were given"
    limits = {**vocabulary_limits(model.ir), **{name: hi for name, (_, hi) in model.input_ranges.items()}}
    names = [str(value.name) for value in fed(model.ir)]
    sample = {name: np.asarray(model.sample_inputs[name]) for name in names if name in model.sample_inputs}
    whole = bool(sample) and len(sample) == len(names)
    shapes = {name: array.shape for name, array in sample.items()} if whole else {}
    found = [sample] if whole else []
    for index in range(draws - len(found)):
        sizes = decoder_sizes(model.ir, step=bool(index % 2))
        made = random_inputs(model.ir, seed=seed + index, limits=limits, shapes=shapes, sizes=sizes)
        if whole:  # values whose range nothing tells are the sample's own, in another order
            rng = np.random.default_rng(seed + index)
            unknown = [n for n in names if n not in limits and np.issubdtype(sample[n].dtype, np.integer)]
            made |= {name: rng.permutation(sample[name].ravel()).reshape(sample[name].shape) for name in unknown}
        found.append(made)
    origin = f"the model's sample and {draws - 1} variations" if whole else f"{draws} random draws"
    return found, f"{origin}, seed {seed}"


def fed(model: ir.Model) -> list[ir.Value]:
    """The inputs that need a value: not the ones that are initializers too."""
    return [value for value in model.graph.inputs if value.name not in model.graph.initializers]


def check_inputs(model: ir.Model, given: Mapping[str, Array]) -> None:
    """Names, types and shapes, all of them.

    Raises:
        InputError: With everything that is wrong.
    """
    problems = []
    values = fed(model)
    for value in values:
        array = given.get(str(value.name))
        if array is None:
            problems.append(f"{value.name}: missing")
            continue
        problems += misfits(value, array)
    unknown = sorted(set(given) - {str(value.name) for value in model.graph.inputs})
    problems += [f"{name}: the model has no such input" for name in unknown]
    if problems:
        names = ", ".join(str(value.name) for value in values)
        raise InputError("the inputs do not fit the model:\n  " + "\n  ".join(problems), hint=f"It takes: {names}.")


def random_inputs(
    model: ir.Model,
    *,
    seed: int = 0,
    limits: Mapping[str, int] | None = None,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    sizes: Mapping[str, int] | None = None,
) -> dict[str, Array]:
    """One random value for each input.

    Args:
        model: The graph.
        seed: Of the generator.
        limits: Exclusive upper limits of integer inputs; see :func:`vocabulary_limits`.
        shapes: Shapes to use in place of the declared ones.
        sizes: Sizes of symbols; and of "batch" and "sequence" for those that have no name of their own. A decoder's
            cache is empty unless they say otherwise.
    """
    rng = np.random.default_rng(seed)
    known = vocabulary_limits(model) if limits is None else limits
    symbols = _Symbols({**decoder_sizes(model), **(sizes or {})}, symbol_sums(model))
    padded = not counts_tokens(model)
    result = {}
    for value in fed(model):
        name = str(value.name)
        shape = (shapes or {}).get(name) or symbols.shape(value)
        result[name] = _values(rng, name, value.dtype or ir.DataType.FLOAT, shape, known.get(name), padded=padded)
    return result


def _values(
    rng: np.random.Generator,
    name: str,
    dtype: ir.DataType,
    shape: tuple[int, ...],
    limit: int | None,
    *,
    padded: bool = True,
) -> Array:
    """Random values of one input. A mask has padding at the end of its last row; positions count up."""
    if math.prod(shape) > _LARGEST:
        raise InputError(
            f"input {name!r} {list(shape)} is too large to be made up ({math.prod(shape):,} elements).",
            hint="Give --inputs FILE.npz.",
        )
    kind = dtype.numpy()
    leaf = name.lower()
    if "mask" in leaf and not is_float(dtype):
        mask = np.ones(shape, kind)
        if padded and mask.ndim and len(mask) > 1 and mask.shape[-1] > 2:
            mask[-1, ..., -(mask.shape[-1] // 4 + 1) :] = 0
        return mask
    if "mask" in leaf:
        return np.ones(shape, kind)
    if is_float(dtype):
        return rng.standard_normal(shape).astype(kind)
    if dtype == ir.DataType.BOOL:
        return rng.integers(0, 2, shape).astype(kind)
    if dtype == ir.DataType.STRING:
        raise InputError(f"input {name!r} takes strings, which cannot be made up.", hint="Give --inputs FILE.npz.")
    if "position" in leaf and shape:
        return np.broadcast_to(np.arange(shape[-1]) % (limit or shape[-1]), shape).astype(kind)
    return rng.integers(0, max(limit or 2, 1), shape).astype(kind)


class _Symbols:
    """Sizes of symbolic dimensions, the same for the same symbol."""

    def __init__(self, sizes: Mapping[str, int], sums: Mapping[str, tuple[str, str]]) -> None:
        """``sums`` are symbols that are the sum of two others."""
        self._sizes, self._sums = dict(sizes), sums
        self._batch, self._sequence = self._sizes.get("batch", BATCH), self._sizes.get("sequence", SEQUENCE)

    def shape(self, value: ir.Value) -> tuple[int, ...]:
        if value.shape is None:
            raise InputError(
                f"input {value.name!r}: the model does not say its shape, so none can be made up.",
                hint="Give --inputs FILE.npz.",
            )
        return tuple(
            dim if isinstance(dim, int) else self._size(str(dim.value) if dim.value else "", axis)
            for axis, dim in enumerate(value.shape)
        )

    def _size(self, symbol: str, axis: int) -> int:
        if not symbol:
            return self._batch if axis == 0 else self._sequence
        if symbol not in self._sizes:
            self._sizes[symbol] = self._evaluate(symbol, axis)
        return self._sizes[symbol]

    def _evaluate(self, symbol: str, axis: int) -> int:
        if symbol in self._sums:
            return sum(self._size(part, axis) for part in self._sums[symbol])
        try:
            tree = ast.parse(symbol, mode="eval").body
        except SyntaxError:
            return self._named(symbol, axis)
        size = self._compute(tree, axis)
        return max(size, 0) if size is not None else self._named(symbol, axis)

    def _compute(self, tree: ast.expr, axis: int) -> int | None:
        """The value of an expression of symbols; None for what is not one."""
        if isinstance(tree, ast.Constant) and isinstance(tree.value, int):
            return tree.value
        if isinstance(tree, ast.Name):
            return self._sizes.setdefault(tree.id, self._named(tree.id, axis))
        if isinstance(tree, ast.BinOp) and type(tree.op) in _ARITHMETIC:
            left, right = self._compute(tree.left, axis), self._compute(tree.right, axis)
            if left is not None and right is not None:
                return _ARITHMETIC[type(tree.op)](left, right)
        return None

    def _named(self, symbol: str, axis: int) -> int:
        """By what exporters call their symbols."""
        leaf = symbol.lower()
        if "batch" in leaf:
            return self._batch
        if "height" in leaf or "width" in leaf:
            return 32
        if any(word in leaf for word in ("seq", "len", "time", "token")):
            return self._sequence
        return self._batch if axis == 0 else self._sequence


def vocabulary_limits(model: ir.Model) -> dict[str, int]:
    """Exclusive upper limits of integer inputs: the rows of the smallest table that each one indexes."""
    limits = {}
    for value in model.graph.inputs:
        if value.dtype in (ir.DataType.INT64, ir.DataType.INT32) and (rows := _tables(value)):
            limits[str(value.name)] = min(rows)
    return limits


def _tables(value: ir.Value, depth: int = 0) -> list[int]:
    found: list[int] = []
    for node, index in value.uses():
        if node.op_type == "Gather" and index == 1:
            rows = _rows(node.inputs[0], node.attributes.get_int("axis", 0))
            found += [rows] if rows else []
        elif node.op_type in _PASSING and index == 0 and depth < 8:
            found += _tables(node.outputs[0], depth + 1)
    return found


def _rows(table: ir.Value | None, axis: int) -> int | None:
    """Length of a table's axis, where it is known."""
    if table is None or table.shape is None or not -len(table.shape) <= axis < len(table.shape):
        return None
    size = table.shape[axis]
    return size if isinstance(size, int) else None
