"""Whether a graph's record of its branches is true of the graph: before anything is allocated or written by it.

A record is text in a file that anybody may have edited. Sizes are compared with the tensors that are there, so that
none of them can ask for more memory than the graph itself takes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import onnx_ir as ir

from loracc.deltas import LowRank
from loracc.errors import InputError
from loracc.folded import Binding
from loracc.manifest import Branch, Manifest
from loracc.slot_layout import LAYOUTS, stack_shapes
from loracc.tensors import dims

__all__ = ["check_manifest", "check_places"]


def check_manifest(manifest: Manifest, model: ir.Model, path: object) -> None:
    """Compare a record with its graph.

    Args:
        manifest: From the graph's metadata.
        model: The graph.
        path: Its file, for the message.

    Raises:
        InputError: A parameter is missing or has another shape or type than the record says, or a site lies outside
            its weight's product.
    """
    for problem in _problems(manifest, model):
        raise InputError(
            f"{path}: its record of switchable deltas is not true of the graph: {problem}.",
            hint="The file was changed since: attach the adapters again.",
        )


def check_places(manifest: Manifest, bindings: Sequence[Binding], path: object) -> None:
    """Compare low-rank deltas with the places that a graph's record has for them.

    Raises:
        InputError: A delta is of another shape than its place.
    """
    places = {
        place.site: (branch, place.stop - place.start) for branch in manifest.branches for _, place in branch.sites()
    }
    for binding in bindings:
        delta, site = binding.delta, binding.site.name
        if not isinstance(delta, LowRank) or site not in places:
            continue
        branch, width = places[site]
        out, features = delta.b.shape[0], delta.a.reshape(delta.rank, -1).shape[1]
        expected = (branch.features, width) if branch.kind == "embedding" else (width, branch.features)
        if (out, features) != expected:
            raise InputError(
                f"{path}: its record has {list(expected)} for {site}, and the delta is {[out, features]}.",
                hint="The file was changed since: attach the adapters again.",
            )


def _problems(manifest: Manifest, model: ir.Model) -> Iterator[str]:
    names = [name for branch in manifest.branches for name in (branch.name, *(one.name for one in branch.weights))]
    if not names or len(set(names)) < len(names):
        yield "it has no branches, or two of one name"
    if manifest.mode == "batched" and (manifest.rank < 1 or not manifest.slots):
        yield f"{len(manifest.slots)} slots of rank {manifest.rank}"
    for branch in manifest.branches:
        yield from _of_branch(manifest, branch, model)


def _of_branch(manifest: Manifest, branch: Branch, model: ir.Model) -> Iterator[str]:
    if branch.kind not in ("linear", "embedding") or not branch.weights:
        yield f"{branch.name} is of kind {branch.kind!r:.40} with {len(branch.weights)} weights"
        return
    if manifest.mode == "batched" and branch.layout not in LAYOUTS:
        yield f"{branch.name} has the layout {branch.layout!r:.40}"
        return
    for weight in branch.weights:
        if not weight.places or not all(0 <= place.start < place.stop <= weight.out for place in weight.places):
            yield f"{weight.name} has sites outside its {weight.out} columns"
            return
    for name, expected in _shapes(manifest, branch).items():
        value = model.graph.initializers.get(name)
        tensor = value.const_value if value is not None else None
        if tensor is None:
            yield f"there is no {name!r:.120}"
        elif dims(tensor) != expected or tensor.dtype.name != manifest.dtype:
            yield f"{name} is {tensor.dtype.name} {list(dims(tensor))}, not {manifest.dtype} {list(expected)}"


def _shapes(manifest: Manifest, branch: Branch) -> dict[str, tuple[int, ...]]:
    if manifest.mode == "batched":
        return stack_shapes(branch, len(manifest.slots), manifest.rank)
    return {branch.name: (branch.features, 0), **{weight.name: (0, weight.out) for weight in branch.weights}}
