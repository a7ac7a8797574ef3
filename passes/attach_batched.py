"""``attach --as batched``: every row of a batch uses the adapter that ``adapter_ids`` names for it, -1 for none.

The factors of all adapters are stacked in slots (:mod:`loracc.slot_layout`), and each branch is computed in the cheaper
of two ways, for plain ONNX operators have no third:

1. *columns*: t = x·A for all slots at once, every slot but the row's own zeroed, then t·B. Plain products with constant
   weights; it costs as much as S·R columns more, whatever the batch.
2. *stacked*: A and B of each row's slot are gathered, then batched products. It costs a copy of both a row, whatever
   the number of slots.

The first is chosen where its product is at most ``_DEAR`` of the weight's own. Rows of the base have t = 0, whatever x
holds, and so the base's bits (:mod:`loracc.passes.delta_nodes`). An id below -1 or of no slot fails the run: it becomes
an index that a Gather must refuse.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import onnx_ir as ir

from loracc.errors import UnsupportedError
from loracc.manifest import MANIFEST_KEY, Branch, BranchWeight, Manifest, parameter_name
from loracc.passes.attach_inputs import places_of, refuse_attached
from loracc.passes.batch_rows import BatchRows, Rows
from loracc.passes.branch_groups import Group, branch_groups
from loracc.passes.delta_nodes import BranchNodes, join, subtract
from loracc.passes.delta_points import delta_points
from loracc.passes.slot_numbers import SlotNumbers
from loracc.sites import Site
from loracc.slot_layout import empty_stack, room, stack_shapes

__all__ = ["AttachBatchedPass"]

#: Share of a weight's own product that the product with all slots may cost.
_DEAR = 0.35


class AttachBatchedPass(ir.passes.InPlacePass):
    """See the module's docstring. The stacks are left without values: whoever writes the graph fills them.

    Args:
        sites: Where branches are wanted, in the model's order.
        base: Digest of the model's weights.
        slots: Names of the adapters in the slots, "" for a free one.
        rank: Room of each slot.

    Attributes:
        manifest: What was added; the graph's metadata hold it too.
        source: The input whose axis 0 is the batch.
    """

    def __init__(self, sites: Sequence[Site], base: str, slots: Sequence[str], rank: int) -> None:
        super().__init__()
        self.sites, self.rank = tuple(sites), rank
        self.manifest = Manifest("batched", base, "FLOAT", (), tuple(slots), rank)
        self.source = ""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Raises UnsupportedError where a site has no branch, or the batch cannot be followed to it."""
        refuse_attached(model)
        groups = branch_groups(delta_points(model, self.sites))
        following = BatchRows(model)
        rows = [[following.of(x, group.name) for x in group.xs] for group in groups]
        sources = {one.source for each in rows for one in each}
        dtypes = {group.dtype.name for group in groups}
        if len(sources) > 1 or len(dtypes) > 1:
            names = ", ".join(sorted(str(source.name) for source in sources))
            raise UnsupportedError(
                f"the sites follow several batches ({names}) or multiply in several types ({', '.join(sorted(dtypes))})"
                ": one adapter_ids cannot tell their rows."
            )
        numbers = SlotNumbers(model.graph, sources.pop(), len(self.manifest.slots))
        branches = [
            _Branch(model.graph, group, each, numbers, self.rank).insert()
            for group, each in zip(groups, rows, strict=True)
        ]
        numbers.insert()
        self.source = str(numbers.source.name)
        self.manifest = replace(self.manifest, dtype=dtypes.pop(), branches=tuple(branches))
        model.metadata_props[MANIFEST_KEY] = self.manifest.to_text()
        return ir.passes.PassResult(model, modified=True)


class _Branch:
    """One group's branch."""

    def __init__(self, graph: ir.Graph, group: Group, rows: Sequence[Rows], numbers: SlotNumbers, rank: int) -> None:
        self.graph, self.group, self.rows, self.numbers = graph, group, rows, numbers
        weights = tuple(BranchWeight(parameter_name(up.name, "B"), up.out, places_of(up)) for up in group.ups)
        kind = "embedding" if group.gathers else "linear"
        self.branch = Branch(parameter_name(group.name, "A"), kind, group.features, weights)
        self.branch = replace(self.branch, layout=self._layout(rank))
        self.rooms = room(self.branch, rank)

    def _layout(self, rank: int) -> str:
        if self.group.gathers:
            return "rows"
        slots, features = self.numbers.slots, self.group.features
        more = sum(
            slots * r * (features + up.out) for r, up in zip(room(self.branch, rank), self.group.ups, strict=True)
        )
        own = sum(features * up.out for up in self.group.ups)
        return "columns" if more <= _DEAR * own else "stacked"

    def insert(self) -> Branch:
        rank = self.rooms[0] // len(self.branch.weights[0].places)
        shapes = stack_shapes(self.branch, self.numbers.slots, rank)
        stacks = {name: self._stack(name, shape) for name, shape in shapes.items()}
        a, bs = stacks[self.branch.name], [stacks[weight.name] for weight in self.branch.weights]
        order = {node: index for index, node in enumerate(self.graph)}
        for call, (x, rows) in enumerate(zip(self.group.xs, self.rows, strict=True)):
            suffix = f".{call}" if call else ""
            ends = [up.nodes[call] for up in self.group.ups]
            if any(node.op_type == "Gemm" and node.attributes.get_int("transA", 0) == 1 for node in ends):
                raise UnsupportedError(f"{self.group.name}: the rows of a transposed input cannot be followed.")
            down = BranchNodes(self.group.dtype, self.group.name + suffix)
            t = self._down(x, a, rows, down)
            parts = self._split(t, down)
            min(ends, key=order.__getitem__).prepend(down.made)
            for up, node, part, b in zip(self.group.ups, ends, parts, bs, strict=True):
                self._up(node, part, b, rows, BranchNodes(self.group.dtype, up.name + suffix))
        return self.branch

    def _down(self, x: ir.Value, a: ir.Value, rows: Rows, nodes: BranchNodes) -> ir.Value:
        """x·A of each row's own slot, zero for the base's rows: ``[batch, ..., r]``, flat again in columns."""
        numbers, every, flat = self.numbers, sum(self.rooms), rows.axes == 2
        if self.branch.layout == "rows":
            if rows.flattened or rows.axes != 2:
                raise UnsupportedError(f"{self.group.name}: ids of {rows.axes} axes cannot be told apart by row.")
            found = nodes("Gather", [a, numbers.flat_ids(x, self.group.features, nodes)], "down", axis=0)
            return self._zeroed(found, numbers.chosen(3), nodes)
        if self.branch.layout == "columns":
            t = nodes("Gemm" if flat else "MatMul", [x, a], "down")
            mask = numbers.columns(tuple(self.rooms), 3 if flat else rows.axes)
            if not flat:
                return self._zeroed(t, mask, nodes)
            width = numbers.slots * every
            t = self._zeroed(nodes("Reshape", [t, numbers.by_batch(width)], "by_batch"), mask, nodes)
            return nodes("Reshape", [t, numbers.constant([-1, width])], "flat")
        if flat:
            x = nodes("Reshape", [x, numbers.by_batch(self.group.features)], "by_batch")
        axes = 3 if flat else rows.axes
        own = nodes("Gather", [a, numbers.index(axes)], "slot_A", axis=0)
        return self._zeroed(nodes("MatMul", [x, own], "down"), numbers.chosen(axes), nodes)

    def _zeroed(self, t: ir.Value, mask: ir.Value, nodes: BranchNodes) -> ir.Value:
        return nodes("Where", [mask, t, self.numbers.scalar(0.0, self.group.dtype)], "own")

    def _split(self, t: ir.Value, nodes: BranchNodes) -> list[ir.Value]:
        """Each weight's part of t."""
        if len(self.rooms) == 1:
            return [t]
        slots = self.numbers.slots if self.branch.layout == "columns" else 1
        sizes = self.numbers.constant([slots * own for own in self.rooms])
        first = nodes("Split", [t, sizes], "split", axis=-1, outputs=len(self.rooms))
        node = first.producer()
        assert node is not None
        return list(node.outputs)

    def _up(self, node: ir.Node, t: ir.Value, b: ir.Value, rows: Rows, nodes: BranchNodes) -> None:
        if self.branch.layout == "columns":
            join(node, t, b, nodes)
            return
        axes = 3 if rows.axes == 2 else rows.axes
        delta = nodes("MatMul", [t, nodes("Gather", [b, self.numbers.index(axes)], "slot_B", axis=0)], "up")
        if rows.axes == 2 and not self.group.gathers:
            delta = nodes("Reshape", [delta, self.numbers.constant([-1, int(b.shape[-1])])], "flat")  # type: ignore[index,arg-type]
        subtract(node, self._scaled(node, delta, nodes), nodes)

    def _scaled(self, node: ir.Node, delta: ir.Value, nodes: BranchNodes) -> ir.Value:
        """At the α of a Gemm, which the weight's own product has too. A zero stays +0 also where α is negative."""
        alpha = node.attributes.get_float("alpha", 1.0)
        if node.op_type != "Gemm" or alpha == 1.0:
            return delta
        size = nodes("Mul", [delta, self.numbers.scalar(abs(alpha), self.group.dtype)], "alpha")
        return size if alpha > 0 else nodes("Sub", [self.numbers.scalar(0.0, self.group.dtype), size], "minus")

    def _stack(self, name: str, shape: tuple[int, ...]) -> ir.Value:
        if name in self.graph.initializers:
            raise UnsupportedError(f"the graph has a value named {name!r} already.")
        tensor = ir.Tensor(empty_stack(name, shape, self.group.dtype), dtype=self.group.dtype, name=name)
        value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(self.group.dtype), const_value=tensor)
        self.graph.register_initializer(value)
        return value
