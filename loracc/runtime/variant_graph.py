"""One variant as a graph: the base's graph with its weights where they lie, and the changed ones as folds of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx_ir as ir

from loracc.errors import InputError
from loracc.folded import Binding, annotate
from loracc.passes.fold import FoldPass
from loracc.passes.link_biases import LinkBiases
from loracc.passes.unshare import UnsharePass
from loracc.sites import SiteTable
from loracc.tensors import dims

__all__ = ["check_bindings", "variant_graph"]


def variant_graph(base: ir.Model, sites: SiteTable, bindings: Sequence[Binding]) -> ir.Model:
    """A copy of the base's graph whose changed initializers are :class:`FoldedTensor`; nothing is computed yet.

    What ``loracc fold`` does to a graph: the same passes, so the same bits when the tensors are computed.
    """
    graph = base.clone()
    annotate(graph, bindings)
    UnsharePass(sites)(graph)
    FoldPass()(graph)
    LinkBiases()(graph)
    return graph


def check_bindings(where: str, base: ir.Model, bindings: Sequence[Binding]) -> None:
    """Refuse stored deltas that cannot be this graph's.

    Raises:
        InputError: Lists every delta whose weight is missing or has another shape.
    """
    problems = [problem for binding in bindings if (problem := _problem(base.graph.initializers, binding))]
    if problems:
        shown = "\n  ".join(problems[:10])
        more = f"\n  and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise InputError(
            f"{where}: {len(problems)} of its {len(bindings)} deltas do not fit the graph:\n  {shown}{more}",
            hint="It is the variant of another base: attach the adapter to this one.",
        )


def _problem(initializers: Mapping[str, ir.Value], binding: Binding) -> str:
    site = binding.site
    value = initializers.get(site.initializer)
    if value is None or value.const_value is None:
        return f"{site.name}: the graph has no weight {site.initializer!r}"
    stored, layout = dims(value.const_value), site.layout
    if layout.perm and sorted(layout.perm) != list(range(len(stored))):
        return (
            f"{site.name}: {site.initializer} has the shape {list(stored)}, and the delta's has {len(layout.perm)} axes"
        )
    length = stored[layout.perm[0] if layout.perm else 0] if stored else 1
    stop = length if layout.stop is None else layout.stop
    if not 0 <= layout.start <= stop <= length:
        return f"{site.name}: rows {layout.start} to {stop} of {site.initializer}, which has {length}"
    shape, expected = layout.canonical_shape(stored), binding.delta.shape
    fits = len(shape) == len(expected) and all(n is None or n == m for n, m in zip(expected, shape, strict=True))
    return "" if fits else f"{site.name}: a delta for the shape {list(expected)}, the weight has {list(shape)}"
