"""``--base``: an adapter's weights found in a graph by the values that the original checkpoint has for them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from loracc.errors import BindingError, InputError

if TYPE_CHECKING:
    from loracc.adapter import Adapter
    from loracc.folded import Binding
    from loracc.model import BaseModel
    from loracc.passes.bind_adapter import BindResult
    from loracc.passes.content_sites import ContentMatch

__all__ = ["bind_by_content"]

_WORKERS = 2


def bind_by_content(
    model: BaseModel,
    adapters: Sequence[Adapter],
    maps: Sequence[str],
    allow_unmatched: bool,
    original: str | os.PathLike[str],
) -> tuple[BaseModel, BindResult]:
    """Bind adapters to a graph whose weights have lost their names, or some of them.

    Args:
        model: The graph.
        original: The checkpoint that it was made of: anything that :func:`loracc.sources.load_model` reads.

    Raises:
        InputError: The model is a checkpoint itself, or the graph holds nothing of the base.
        BindingError: As :func:`loracc.passes.bind_adapter.bind`; or a weight is the base's in its sampled elements and
            not in all.
    """
    from loracc.model import LoadOptions
    from loracc.sources import load_model
    from loracc.sources.hf_names import with_module_names

    if not model.traced:
        raise InputError(
            f"{model.path}: --base finds weights that lost their names in a graph, and this is a checkpoint.",
            hint="Leave --base out, or give the graph as MODEL.",
        )
    base = load_model(original, LoadOptions(graph=False))
    try:
        return _bind(model, base, adapters, maps, allow_unmatched=False)
    except BindingError:
        base = (None if base.traced else with_module_names(base)) or base
        return _bind(model, base, adapters, maps, allow_unmatched=allow_unmatched)


def _bind(
    model: BaseModel, base: BaseModel, adapters: Sequence[Adapter], maps: Sequence[str], *, allow_unmatched: bool
) -> tuple[BaseModel, BindResult]:
    from loracc.passes.bind_adapter import bind
    from loracc.passes.content_misses import explain_miss
    from loracc.passes.content_originals import give_originals
    from loracc.passes.content_sites import match_content

    match = match_content(model, base)
    if not match.places:
        raise InputError(
            f"--base {base.path}: none of its {len(match.tensors)} tensors is in {model.path}, in any orientation and "
            "as any block.",
            hint="Give the checkpoint that the graph was exported from: another model, another size or another "
            "fine-tune of it has other values.",
        )
    named = replace(model, sites=match.sites, notes=(*model.notes, *match.notes))
    bound = bind(
        named,
        adapters,
        maps=maps,
        allow_unmatched=allow_unmatched,
        explain=lambda name: explain_miss(match, model.ir, name),
    )
    _confirm(named, base.path, match, bound.bindings)
    bound_to = list(dict.fromkeys(binding.site.initializer for binding in bound.bindings))
    bound.notes += [
        f"{name} is quantized, and the base does not have all of it: the delta is added to what its codes mean."
        for name in give_originals(named.ir, match, bound_to)
    ]
    return named, bound


def _confirm(model: BaseModel, base: Path, match: ContentMatch, bindings: Sequence[Binding]) -> None:
    """Compare all elements of what was bound by its sampled ones."""
    sites = list(dict.fromkeys(binding.site for binding in bindings))
    with ThreadPoolExecutor(_WORKERS) as pool:
        differing = list(pool.map(lambda site: match.differing(model.ir, site), sites))
    problems = [
        f"  {site.name}: {found.tensor!r} of the base is {site.initializer!r} in its sampled elements, and differs at "
        f"{list(at)}"
        for site, difference in zip(sites, differing, strict=True)
        if difference is not None
        for found, at in [difference]
    ]
    if problems:
        raise BindingError(
            f"--base {base}: {len(problems)} weights are not those of the graph:\n" + "\n".join(problems),
            hint="Is the base another version of the checkpoint that the graph was exported from?",
        )
