"""``--base``: an adapter's weights found in a graph by the values that the original checkpoint has for them."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
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

__all__ = ["bind_by_content", "with_base"]

_WORKERS = 2
#: Binds to a model: (the model, what is known of names that no site has, whether what fits nowhere is reported only).
_Binder = Callable[["BaseModel", Callable[[str], str], bool], "list[BindResult]"]


def bind_by_content(
    model: BaseModel,
    adapters: Sequence[Adapter],
    maps: Sequence[str],
    allow_unmatched: bool,
    original: str | os.PathLike[str],
) -> tuple[BaseModel, BindResult]:
    """Bind adapters to a graph whose weights have lost their names, or some of them; to be folded.

    Quantized weights that deltas are bound to get their original values (``DecodedTensor.original``).

    Raises:
        InputError, BindingError: As :func:`with_base`.
    """
    from loracc.passes.bind_adapter import bind
    from loracc.passes.content_originals import give_originals

    def once(named: BaseModel, explain: Callable[[str], str], allow: bool) -> list[BindResult]:
        return [bind(named, adapters, maps=maps, allow_unmatched=allow, explain=explain)]

    named, (bound,), match = with_base(model, original, once, allow_unmatched)
    bound_to = list(dict.fromkeys(binding.site.initializer for binding in bound.bindings))
    bound.notes += [
        f"{name} is quantized, and the base does not have all of it: the delta is added to what its codes mean."
        for name in give_originals(named.ir, match, bound_to)
    ]
    return named, bound


def with_base(
    model: BaseModel, original: str | os.PathLike[str], binder: _Binder, allow_unmatched: bool
) -> tuple[BaseModel, list[BindResult], ContentMatch]:
    """Bind with the names that the original checkpoint has for a graph's weights.

    Args:
        model: The graph.
        original: The checkpoint that it was made of: anything that :func:`loracc.sources.load_model` reads.
        binder: Binds; called again with the names that transformers gives the checkpoint's tensors, where the tensors'
            own do not do.
        allow_unmatched: Report what fits nowhere instead of refusing; only the last attempt does.

    Raises:
        InputError: The model is a checkpoint itself, or the graph holds nothing of the base.
        BindingError: What ``binder`` raises; or a weight is the base's in its sampled elements and not in all.
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
        return _once(model, base, binder, allow=False)
    except BindingError:
        base = (None if base.traced else with_module_names(base)) or base
        return _once(model, base, binder, allow=allow_unmatched)


def _once(
    model: BaseModel, base: BaseModel, binder: _Binder, *, allow: bool
) -> tuple[BaseModel, list[BindResult], ContentMatch]:
    from loracc.passes.content_misses import explain_miss
    from loracc.passes.content_sites import match_content

    match = match_content(model, base)
    if not match.tensors:
        raise InputError(f"--base {base.path}: it holds no float weights.", hint="Give the original checkpoint.")
    if not match.places:
        raise InputError(
            f"--base {base.path}: none of its {len(match.tensors)} tensors is in {model.path}, in any orientation and "
            "as any block.",
            hint="Give the checkpoint that the graph was exported from: another model, another size or another "
            "fine-tune of it has other values.",
        )
    named = replace(model, sites=match.sites, notes=(*model.notes, *match.notes))
    results = binder(named, lambda name: explain_miss(match, model.ir, name), allow)
    _confirm(named, base.path, match, [binding for result in results for binding in result.bindings])
    return named, results, match


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
