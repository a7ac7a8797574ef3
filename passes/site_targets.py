"""Where a site's product ends up: the value that its weight can still set right.

A layer that writes to a residual stream, s = r + W·x + b, can take back errors that lie in r already, as far as they
are linear in x. So its weight is fitted to s and not to W·x:

1. From the product on, through Add, and through Reshape that leaves the features alone, as long as each value is read
   once, and no weight of a later stage is read before it.
2. Where all that is added is constant (a bias), there is no stream. Nor is one looked for behind a weight that several
   products read, or a fused operator.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from loracc.passes.site_inputs import SiteInput, readers
from loracc.passes.value_dims import Dims

__all__ = ["site_target"]


def site_target(model: ir.Model, name: str, known: Dims, places: Mapping[ir.Node, int], limit: int) -> SiteInput | None:
    """The value to fit, and the axis of its features; None under rule 2.

    Args:
        model: The graph.
        name: An initializer that :func:`loracc.passes.site_inputs.site_inputs` found.
        known: Its dimensions.
        places: Where each node of the graph stands.
        limit: No node at this place or behind it may be passed (rule 1).
    """
    reading = list(readers(model.graph.initializers[name]))
    node, index = reading[0]
    if len(reading) != 1 or node.domain != "" or places[node] >= limit:
        return None
    value, axis = node.outputs[0], -1 if index == 1 else -2
    stream = False
    while (following := _next(value, axis, known)) is not None and places.get(following, limit) < limit:
        stream |= following.op_type == "Add" and not any(known.constants.is_constant(v) for v in following.inputs)
        value = following.outputs[0]
    return SiteInput(str(value.name), axis) if stream else None


def _next(value: ir.Value, axis: int, known: Dims) -> ir.Node | None:
    uses = list(value.uses())
    if len(uses) != 1 or value.is_graph_output():
        return None
    node, after = uses[0].node, uses[0].node.outputs[0]
    dims = known.of(value), known.of(after)
    if node.domain != "" or not dims[0] or not dims[1]:
        return None
    if node.op_type == "Add":
        return node if dims[0] == dims[1] else None
    reshaped = node.op_type == "Reshape" and uses[0].idx == 0 and axis == -1
    return node if reshaped and isinstance(dims[1][-1], int) and dims[0][-1] == dims[1][-1] else None
