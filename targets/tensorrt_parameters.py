"""The inputs of a graph with switchable deltas, as TensorRT must see them.

``attach --as inputs`` makes the low-rank factors inputs with a default of rank 0. TensorRT takes an initializer for a
constant even where it is an input too, so an engine would have the base baked in, and nothing to switch. Without their
defaults the factors are inputs like any other: fed in each run, their rank within the range of a profile.

A factor that several sites share has their ranks side by side: its rank axis reaches from 0, no adapter, to the sites'
number times the largest rank.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from loracc.errors import InputError
from loracc.manifest import MANIFEST_KEY, Manifest

__all__ = ["factor_profiles", "make_inputs"]


def make_inputs(model: ir.Model) -> Manifest | None:
    """Take the defaults from the factors of a graph that ``attach --as inputs`` wrote; other graphs stay as they are.

    Args:
        model: Changed in place.

    Returns:
        The graph's record; None for a plain graph, or one whose factors are constants (``--as batched``).

    Raises:
        InputError: The record is malformed.
    """
    if MANIFEST_KEY not in model.metadata_props:
        return None
    manifest = Manifest.from_metadata(model.metadata_props, "the graph")
    if manifest.mode != "inputs":
        return None
    for value in model.graph.inputs:
        if value.name in manifest.parameters and value.name in model.graph.initializers:
            del model.graph.initializers[value.name]
            value.const_value = None
    return manifest


def factor_profiles(
    manifest: Manifest, inputs: Sequence[ir.Value], specs: Sequence[str], max_rank: int | None
) -> list[str]:
    """A range for each factor that ``specs`` has none for, in every profile.

    Args:
        manifest: From :func:`make_inputs`.
        inputs: The graph's inputs.
        specs: ``NAME:MIN:OPT:MAX`` as given on the command line.
        max_rank: The largest rank of an adapter at one site.

    Raises:
        InputError: A factor has no range and there is no ``max_rank``.
    """
    sites = {
        name: len(list(branch.sites()))
        for branch in manifest.branches
        for name in (branch.name, *(weight.name for weight in branch.weights))
    }
    given = [spec.rsplit(":", 3)[0] for spec in specs]
    left = [value for value in inputs if str(value.name) in sites and str(value.name) not in given]
    if not left:
        return []
    if max_rank is None:
        raise InputError(
            f"the graph has switchable factors ({left[0].name} and {len(left) - 1} more): they become inputs of the "
            "engine, and their rank has no range.",
            hint="Add --max-rank N, the largest rank of an adapter (profiles from rank 0 to N), or a --profile each.",
        )
    count = max((given.count(name) for name in given), default=1)
    return [_spec(value, max_rank * sites[str(value.name)]) for value in left for _ in range(count)]


def _spec(value: ir.Value, rank: int) -> str:
    shapes = (
        "x".join(str(dim if isinstance(dim, int) else size) for dim in value.shape or ()) for size in (0, rank, rank)
    )
    return f"{value.name}:{':'.join(shapes)}"
