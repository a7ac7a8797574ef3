"""``attach --as inputs``: each site keeps y += (x·A)·B, with A and B as initializers that a caller may override.

Their rank axis is dynamic and their own value has rank 0: a product without terms, which is zero, so that without an
adapter the base's bits come out (how the ends join is in :mod:`loracc.passes.delta_nodes`). An adapter gives the A and
B of the branches it has, scale and all; ONNX Runtime takes them from an ``.onnx_adapter`` or as plain inputs.

    linear      t = -(x·A)             A [in, rank], B [rank, out]
    embedding   t = -Gather(A, ids)    A [num, rank], B [rank, dim]
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from loracc.errors import UnsupportedError
from loracc.manifest import MANIFEST_KEY, Branch, BranchWeight, Manifest, Place, parameter_name
from loracc.passes.branch_groups import Group, Up, branch_groups
from loracc.passes.delta_nodes import BranchNodes, join
from loracc.passes.delta_points import delta_points
from loracc.sites import Site

__all__ = ["AttachInputsPass", "places_of", "refuse_attached"]


class AttachInputsPass(ir.passes.InPlacePass):
    """See the module's docstring.

    Args:
        sites: Where branches are wanted, in the model's order.
        base: Digest of the model's weights (:func:`loracc.manifest.weights_digest`).

    Attributes:
        manifest: What was added; the graph's metadata hold it too.
    """

    def __init__(self, sites: Sequence[Site], base: str) -> None:
        super().__init__()
        self.sites, self.base = tuple(sites), base
        self.manifest = Manifest("inputs", base, "FLOAT", ())

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Raises UnsupportedError where a site has no branch, or the graph has branches already."""
        refuse_attached(model)
        groups = branch_groups(delta_points(model, self.sites))
        branches = [_Branch(model.graph, group).insert() for group in groups]
        dtypes = {group.dtype.name for group in groups}
        if len(dtypes) > 1:
            raise UnsupportedError(
                f"the sites multiply in several types ({', '.join(sorted(dtypes))}); an adapter's parameters have one."
            )
        self.manifest = Manifest("inputs", self.base, dtypes.pop(), tuple(branches))
        model.metadata_props[MANIFEST_KEY] = self.manifest.to_text()
        return ir.passes.PassResult(model, modified=bool(groups))


def refuse_attached(model: ir.Model) -> None:
    """Raise where the model has branches of loracc's already."""
    if MANIFEST_KEY in model.metadata_props:
        raise UnsupportedError(
            "the model has switchable deltas already.",
            hint="Attach to the base that it was made of. For one more adapter of the same sites, name an output that "
            "ends in .onnx_adapter.",
        )


class _Branch:
    """One group's branch."""

    def __init__(self, graph: ir.Graph, group: Group) -> None:
        self.graph, self.group = graph, group
        self.rank = f"{group.name}.rank"

    def insert(self) -> Branch:
        group = self.group
        a = self._parameter(parameter_name(group.name, "A"), (group.features, self.rank))
        bs = [self._parameter(parameter_name(up.name, "B"), (self.rank, up.out)) for up in group.ups]
        order = {node: index for index, node in enumerate(self.graph)}
        for call, x in enumerate(group.xs):
            suffix = f".{call}" if call else ""
            nodes = [up.nodes[call] for up in group.ups]
            down = BranchNodes(group.dtype, group.name + suffix)
            t = self._down(x, a, nodes, down)
            min(nodes, key=order.__getitem__).prepend(down.made)
            for up, node, b in zip(group.ups, nodes, bs, strict=True):
                join(node, t, b, BranchNodes(group.dtype, up.name + suffix))
        weights = tuple(BranchWeight(str(b.name), up.out, places_of(up)) for up, b in zip(group.ups, bs, strict=True))
        return Branch(str(a.name), "embedding" if group.gathers else "linear", group.features, weights)

    def _down(self, x: ir.Value, a: ir.Value, readers: Sequence[ir.Node], nodes: BranchNodes) -> ir.Value:
        """t = -x·A. Where a Gemm reads x it has two axes, and one node does it; a transposed x is a Gemm's too."""
        if self.group.gathers:
            return nodes("Neg", [nodes("Gather", [a, x], "down", axis=0)], "minus")
        gemms = [node for node in readers if node.op_type == "Gemm"]
        turned = {bool(node.attributes.get_int("transA", 0)) for node in readers}
        if len(turned) > 1:
            raise UnsupportedError(f"{self.group.name}: one value is read both ways round.")
        if gemms:
            return nodes("Gemm", [x, a], "down", alpha=-1.0, transA=int(turned == {True}))
        return nodes("Neg", [nodes("MatMul", [x, a], "down")], "minus")

    def _parameter(self, name: str, shape: tuple[int | str, ...]) -> ir.Value:
        if name in self.graph.initializers or any(value.name == name for value in self.graph.inputs):
            raise UnsupportedError(f"the graph has a value named {name!r} already.")
        sizes = tuple(size if isinstance(size, int) else 0 for size in shape)
        tensor = ir.Tensor(np.zeros(sizes, self.group.dtype.numpy()), dtype=self.group.dtype, name=name)
        value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(self.group.dtype), const_value=tensor)
        self.graph.register_initializer(value)
        self.graph.inputs.append(value)
        return value


def places_of(up: Up) -> tuple[Place, ...]:
    """Where the sites of one weight lie in its product."""
    return tuple(
        Place(site.name, site.layout.start, up.out if site.layout.stop is None else site.layout.stop)
        for site in up.sites
    )
