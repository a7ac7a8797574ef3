"""What is to be folded: adapters read and bound to a model, or LoRA found in the model's own graph."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from loracc.errors import BindingError, InputError, LoraccError

if TYPE_CHECKING:
    from loracc.adapter import Adapter
    from loracc.formats import AdapterSpec
    from loracc.model import BaseModel
    from loracc.passes.bind_adapter import BindResult

Bound = TypeVar("Bound")

__all__ = ["bind_adapters", "bind_each", "bind_each_by_content", "raise_adapters", "read_adapters"]


def read_adapters(
    specs: Sequence[AdapterSpec],
    told: dict[str, Any],
    *,
    combine: str | None,
    density: float | None,
    rank: int | None,
    seed: int,
) -> list[Adapter]:
    """The adapters at their weights, or the one that ``combine`` makes of them."""
    from loracc.formats import load_adapter

    if combine is None:
        if density is not None or rank is not None:
            raise InputError("--density and --rank mean nothing without --combine.")
        return _named_apart(
            [load_adapter(spec.path, name=spec.name, **told).scaled(spec.weight) for spec in specs], specs
        )
    from loracc.combine import CombineOptions, combine_adapters

    options = CombineOptions(combine, density, rank, seed)
    read = [load_adapter(spec.path, name=spec.name, **told) for spec in specs]
    return [combine_adapters(read, [spec.weight for spec in specs], options)]


def _named_apart(adapters: list[Adapter], specs: Sequence[AdapterSpec]) -> list[Adapter]:
    """Two runs' ``checkpoint-500`` are two adapters: names that nobody chose are numbered."""
    taken: set[str] = set()
    for index, adapter in enumerate(adapters):
        if adapter.name in taken and specs[index].name is not None:
            raise InputError(
                f"two adapters are named {adapter.name!r}.", hint="Choose another NAME=PATH for one of them."
            )
        name, number = adapter.name, 1
        while name in taken:
            number += 1
            name = f"{adapter.name}#{number}"
        taken.add(name)
        adapters[index] = replace(adapter, name=name)
    return adapters


def bind_adapters(
    model: BaseModel,
    adapters: Sequence[Adapter],
    maps: Sequence[str],
    allow_unmatched: bool,
    original: str | os.PathLike[str] | None = None,
) -> tuple[BaseModel, BindResult]:
    """Bind, by a model's own names or, where those do not fit, by the other ones that transformers knows for them.

    Args:
        original: The checkpoint that the graph was made of (``--base``): weights that lost their names are found by
            their values.
    """
    from loracc.passes.bind_adapter import bind

    if original is not None:
        from loracc.content import bind_by_content

        return bind_by_content(model, adapters, maps, allow_unmatched, original)
    try:
        return model, bind(model, adapters, maps=maps)
    except BindingError:
        return _by_other_names(
            model, lambda named, allow: bind(named, adapters, maps=maps, allow_unmatched=allow), allow_unmatched
        )


def _by_other_names(
    model: BaseModel, binder: Callable[[BaseModel, bool], Bound], allow_unmatched: bool
) -> tuple[BaseModel, Bound]:
    """What does not bind by a model's own names, by the other ones that transformers knows for its weights.

    Where neither fits, the error speaks of a graph's own names, and of a checkpoint's other ones: of module paths.
    """
    from loracc.sources.hf_names import with_other_names

    other = with_other_names(model)
    if other is None:
        return model, binder(model, allow_unmatched)
    if not model.traced:
        return other, binder(other, allow_unmatched)
    try:
        return other, binder(other, False)
    except BindingError:
        return model, binder(model, allow_unmatched)


def bind_each_by_content(
    model: BaseModel,
    adapters: Sequence[Adapter],
    maps: Sequence[str],
    allow_unmatched: bool,
    original: str | os.PathLike[str] | None,
) -> tuple[BaseModel, list[BindResult]]:
    """:func:`bind_each`, with the names that the original checkpoint has for the graph's weights, where it is given."""
    if original is None:
        try:
            return model, bind_each(model, adapters, maps, False)
        except BindingError:
            return _by_other_names(model, lambda named, allow: bind_each(named, adapters, maps, allow), allow_unmatched)
    from loracc.content import with_base

    def once(named: BaseModel, explain: Callable[[str], str], allow: bool) -> list[BindResult]:
        return bind_each(named, adapters, maps, allow, explain=explain)

    named, found, _ = with_base(model, original, once, allow_unmatched)
    return named, found


def bind_each(
    model: BaseModel,
    adapters: Sequence[Adapter],
    maps: Sequence[str],
    allow_unmatched: bool,
    explain: Callable[[str], str] | None = None,
) -> list[BindResult]:
    """Bind each adapter by itself, as if it were the only one; the problems of all are raised together.

    The bindings annotated on the model's initializers are the last adapter's.
    """
    from loracc.errors import combined
    from loracc.passes.bind_adapter import bind, maps_of, refuse_unused_maps

    refuse_unused_maps(adapters, maps)
    found: list[BindResult] = []
    errors: list[LoraccError] = []
    for adapter in adapters:
        try:
            found.append(
                bind(model, [adapter], maps=maps_of(adapter, maps), allow_unmatched=allow_unmatched, explain=explain)
            )
        except LoraccError as error:
            errors.append(error)
    if errors:
        raise combined(errors)
    return found


def raise_adapters(model: BaseModel) -> tuple[BaseModel, BindResult]:
    """The LoRA branches in the model's own graph as deltas on the base graph; the model itself stays as it is."""
    from loracc.passes.bind_adapter import BindResult
    from loracc.passes.find_sites import find_sites
    from loracc.passes.optimize_graph import OptimizeGraph
    from loracc.passes.raise_lora import raise_lora

    if not model.traced:
        raise InputError(
            "no adapter was given.", hint="Name one or more after the model: loracc fold MODEL ADAPTER -o OUT"
        )
    graph = model.ir.clone()
    raised = raise_lora(graph)
    left = [f"looks like LoRA and is not: {rejected}" for rejected in raised.rejected]
    if not raised.bindings:
        raise InputError(
            "\n".join([f"{model.path}: no adapter was given, and the graph has no LoRA branches.", *left]),
            hint="Name adapters after the model: loracc fold MODEL ADAPTER -o OUT",
        )
    if model.format != "onnx":  # what the branches kept apart comes together, as in the export of the base alone
        OptimizeGraph(set(graph.graph.initializers))(graph)
    found = replace(model, ir=graph, sites=find_sites(graph))
    return found, BindResult(list(raised.bindings), notes=left)
