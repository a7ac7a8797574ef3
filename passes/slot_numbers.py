"""What ``adapter_ids`` becomes once for the whole graph: checked numbers, and the masks and indices made of them.

    n = ids + 1                        0 is the base, k + 1 is slot k
    n = Gather([0, 1, ..., S], n < 0 ? S + 1 : n)      fails for an id below -1 or above S - 1

An id that wraps (a Gather counts negative indices from the end) is turned into one that cannot. A provider whose Gather
does not fail reads zero there, which is the base.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from loracc.dtypes import Array
from loracc.errors import UnsupportedError
from loracc.manifest import ADAPTER_IDS
from loracc.passes.delta_nodes import PREFIX, BranchNodes

__all__ = ["SlotNumbers"]

_INT64, _BOOL = ir.DataType.INT64, ir.DataType.BOOL


class SlotNumbers:
    """Makes each of these values once; :meth:`insert` puts their nodes at the graph's beginning.

    Args:
        graph: Gets the input and the constants.
        source: The input whose axis 0 is the batch.
        slots: S.
    """

    def __init__(self, graph: ir.Graph, source: ir.Value, slots: int) -> None:
        if any(value.name == ADAPTER_IDS for value in graph.inputs):
            raise UnsupportedError(f"the model has an input {ADAPTER_IDS!r} already.")
        self.graph, self.source, self.slots = graph, source, slots
        self.nodes = BranchNodes(_INT64, ADAPTER_IDS)
        batch = source.shape[0] if source.shape is not None else None
        self.ids = ir.Value(name=ADAPTER_IDS, shape=ir.Shape([batch]), type=ir.TensorType(_INT64))
        graph.inputs.append(self.ids)
        self._made: dict[tuple[object, ...], ir.Value] = {}
        self.number = self._checked()

    def _checked(self) -> ir.Value:
        shifted = self.nodes("Add", [self.ids, self.constant([1])], "number")
        negative = self.nodes("Less", [shifted, self.constant([0])], "negative", _BOOL)
        refused = self.nodes("Where", [negative, self.constant([self.slots + 1]), shifted], "refused")
        known = self.constant(range(self.slots + 1))
        label = f"each id must be -1 (the base) or a slot from 0 to {self.slots - 1}"
        return self.nodes("Gather", [known, refused], label, axis=0)

    def insert(self) -> None:
        """Put the nodes before all others."""
        next(iter(self.graph)).prepend(self.nodes.made)

    def constant(self, numbers: Sequence[int]) -> ir.Value:
        """A vector of int64."""
        values = tuple(numbers)
        return self._initializer(("constant", *values), np.asarray(values, np.int64))

    def scalar(self, number: float, dtype: ir.DataType) -> ir.Value:
        """A number of a type."""
        return self._initializer(("scalar", number, dtype), np.asarray(number).astype(dtype.numpy()))

    def by_batch(self, width: int) -> ir.Value:
        """The shape ``[batch, -1, width]``."""
        batch = self._once(
            ("batch",), lambda: self.nodes("Gather", [self._shape(), self.constant([0])], "batch", axis=0)
        )
        label = f"by_batch_{width}"
        return self._once((label,), lambda: self.nodes("Concat", [batch, self.constant([-1, width])], label, axis=0))

    def _shape(self) -> ir.Value:
        return self.nodes("Shape", [self.source], "shape")

    def chosen(self, axes: int) -> ir.Value:
        """bool ``[batch, 1, ...]`` of that many axes: the row has an adapter."""
        label = f"chosen_{axes}"
        return self._once(
            (label,), lambda: self.nodes("Greater", [self._spread(axes), self.constant([0])], label, _BOOL)
        )

    def columns(self, rooms: tuple[int, ...], axes: int) -> ir.Value:
        """bool ``[batch, 1, ..., S·Σr]``: the column is of the row's own slot (layout "columns")."""
        owners = np.concatenate([np.repeat(np.arange(1, self.slots + 1), own) for own in rooms]).astype(np.int64)
        label = f"columns_{'_'.join(map(str, rooms))}_{axes}"

        def make() -> ir.Value:
            of_columns = self._initializer((label, "owners"), owners)
            return self.nodes("Equal", [self._spread(axes), of_columns], label, _BOOL)

        return self._once((label,), make)

    def index(self, axes: int) -> ir.Value:
        """int64 ``[batch]``, with ones for what ``axes`` has between the batch and a matrix: the slot to gather."""
        base = self._once(
            ("index",),
            lambda: self.nodes(
                "Max", [self.nodes("Sub", [self.number, self.constant([1])], "slot"), self.constant([0])], "index"
            ),
        )
        if axes == 3:
            return base
        label = f"index_{axes}"
        shape = self.constant([-1, *[1] * (axes - 3)])
        return self._once((label,), lambda: self.nodes("Reshape", [base, shape], label))

    def flat_ids(self, ids: ir.Value, features: int, nodes: BranchNodes) -> ir.Value:
        """Rows of a table ``[S·features, r]`` for ids ``[batch, sequence]`` of each row's slot."""
        index = self.index(3)
        first = self._once(
            ("first", features),
            lambda: self.nodes(
                "Mul",
                [self.nodes("Reshape", [index, self.constant([-1, 1])], f"of_{features}"), self.constant([features])],
                f"first_of_{features}",
            ),
        )
        wide = nodes("Cast", [ids], "ids", _INT64, to=int(_INT64))
        inside = nodes("Mod", [wide, self.constant([features])], "inside", _INT64)  # a negative id counts from the end
        return nodes("Add", [inside, first], "rows", _INT64)

    def _spread(self, axes: int) -> ir.Value:
        label = f"number_{axes}"
        shape = self.constant([-1, *[1] * (axes - 1)])
        return self._once((label,), lambda: self.nodes("Reshape", [self.number, shape], label))

    def _once(self, key: tuple[object, ...], make: Callable[[], ir.Value]) -> ir.Value:
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def _initializer(self, key: tuple[object, ...], array: Array) -> ir.Value:
        def make() -> ir.Value:
            name = f"{PREFIX}{ADAPTER_IDS}/constant_{len(self._made)}"
            tensor = ir.Tensor(array, name=name)
            value = ir.Value(
                name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor
            )
            self.graph.register_initializer(value)
            return value

        return self._once(key, make)
