"""Whether a delta fits the weight it was matched to, and which way round the weight lies.

A graph tells how a weight is read, so its layout is known. A checkpoint does not, and a linear weight in it may be
``[out, in]`` (``nn.Linear``) or ``[in, out]`` (transformers' ``Conv1D``): an oblong weight's shape tells, and a square
one's only what the adapter's configuration says, if its oblong weights agree with that.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

import onnx_ir as ir

from loracc.adapter import Delta, Entry, PendingDelta
from loracc.deltas import Replacement
from loracc.dtypes import is_float
from loracc.errors import BindingError, UnsupportedError
from loracc.sites import TRANSPOSED, Layout, Site
from loracc.tensors import dims

__all__ = ["Weight", "check_weight", "fit", "fits", "is_transposed"]

Shape = tuple[int | None, ...]


@dataclass(frozen=True)
class Weight:
    """A site with what is known of the tensor that holds it.

    Attributes:
        stored: Shape of the initializer.
        settled: The layout is known; False for a linear weight of a checkpoint.
    """

    site: Site
    stored: tuple[int, ...]
    settled: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """Canonical shape."""
        return self.site.layout.canonical_shape(self.stored)


def check_weight(site: Site, value: ir.Value, *, traced: bool) -> Weight:
    """The weight of a site, if a delta can be folded into it.

    Raises:
        BindingError: It is a graph input, or has no value.
        UnsupportedError: It is not of a float dtype.
    """
    if value.is_graph_input():
        raise BindingError(
            f"{site.name}: its weight {value.name!r} is an input of the graph: whoever runs the model gives it, and a "
            "folded value would be overridden.",
            hint="Export the model with its weights as initializers only (keep_initializers_as_inputs=False).",
        )
    tensor = value.const_value
    if tensor is None:
        raise BindingError(f"{site.name}: its initializer {value.name!r} has no value.")
    if not is_float(tensor.dtype):
        raise UnsupportedError(
            f"{site.name}: its weight {value.name!r} is {tensor.dtype.name}: a delta cannot be added to "
            "a quantised weight.",
            hint="Fold into the float model and quantise the result.",
        )
    stored = dims(tensor)
    open_ended = not traced and site.layout == Layout() and len(stored) == 2
    return Weight(site, stored, settled=not open_ended)


def fits(wanted: Shape, shape: tuple[int, ...]) -> bool:
    """Whether a weight of ``shape`` is what the delta wants; None fits any length."""
    return len(wanted) == len(shape) and all(w in (None, n) for w, n in zip(wanted, shape, strict=True))


def is_transposed(entry: Entry, weight: Weight) -> bool | None:
    """Whether an oblong weight of a checkpoint is stored as ``[in, out]``; None where its shape does not tell."""
    if weight.settled or entry.delta.replaces or entry.fan_in_fan_out is False:
        return None
    if isinstance(entry.delta, PendingDelta):
        if len(weight.shape) != 2:
            return None
        straight, turned = (_resolves(entry.delta, shape) for shape in (weight.shape, weight.shape[::-1]))
        if straight == turned and weight.shape[0] != weight.shape[1]:
            return bool(entry.fan_in_fan_out)  # a kind that would fit any shape
        return None if straight == turned else turned
    wanted = entry.delta.shape
    if len(wanted) != 2:
        return None
    straight, turned = fits(wanted, weight.shape), fits(wanted, weight.shape[::-1])
    return None if straight == turned else turned


def _resolves(delta: PendingDelta, shape: tuple[int, ...]) -> bool:
    """Whether a delta that waits for its weight's shape can be made for this one."""
    try:
        return fits(delta.resolve(shape).shape, shape)
    except (BindingError, UnsupportedError):
        return False


def fit(entry: Entry, weight: Weight, evidence: Collection[bool] = ()) -> tuple[Site, Delta]:
    """The site with its layout settled, and the delta for its shape.

    Args:
        entry: What to bind.
        weight: Where.
        evidence: ``is_transposed`` of the adapter's oblong linear weights.

    Raises:
        BindingError: The shapes disagree, or a square weight may lie either way.
        LoraccError: Whatever the delta refuses.
    """
    site = weight.site
    if not weight.settled and not entry.delta.replaces and entry.fan_in_fan_out is not False:
        turned = is_transposed(entry, weight)
        if turned is None and len(weight.shape) == 2 and weight.shape[0] == weight.shape[1]:
            turned = _square(entry, weight, evidence)
        site = replace(site, layout=TRANSPOSED) if turned else site
    shape = site.layout.canonical_shape(weight.stored)
    delta = _replacement(entry, entry.delta, weight) if isinstance(entry.delta, Replacement) else entry.delta
    delta = delta.resolve(shape)
    if not fits(delta.shape, shape):
        raise _mismatch(entry, delta, weight, shape)
    return site, delta


def _square(entry: Entry, weight: Weight, evidence: Collection[bool]) -> bool:
    says = bool(entry.fan_in_fan_out)
    if any(seen != says for seen in evidence):
        raise BindingError(
            f"{entry.name}: the weight {weight.site.initializer!r} {list(weight.stored)} is square, and what tells "
            f"which axis is its input disagrees: the adapter says fan_in_fan_out={entry.fan_in_fan_out}, and its "
            f"oblong weights are stored as {'[in, out]' if True in evidence else '[out, in]'}.",
            hint="Give the model with its config.json (it names the Conv1D layers), or a graph.",
        )
    return says


def _replacement(entry: Entry, delta: Replacement, weight: Weight) -> Delta:
    """A whole parameter comes as the module stored it: turn it where that is not the canonical way."""
    shape, new = weight.shape, delta.new
    if new.ndim != 2 or len(shape) != 2 or weight.site.kind == "embedding":
        return delta
    if new.shape == shape[::-1] != shape:
        return replace(delta, new=new.T)
    if shape[0] == shape[1] and weight.site.kind == "linear" and entry.fan_in_fan_out:
        raise BindingError(
            f"{entry.name}: the new weight {list(new.shape)} is square, and the adapter (fan_in_fan_out) leaves open "
            "which axis is its input.",
            hint="If the module is an nn.Linear, set fan_in_fan_out to false in adapter_config.json.",
        )
    return delta


def _mismatch(entry: Entry, delta: Delta, weight: Weight, shape: tuple[int, ...]) -> BindingError:
    wanted = ["?" if n is None else n for n in delta.shape]
    turned = weight.site.kind != "embedding" and fits(delta.shape, shape[::-1])
    return BindingError(
        f"{entry.name}: the adapter's tensors ({', '.join(entry.keys)}) fit a weight of shape "
        f"[{', '.join(map(str, wanted))}], and {weight.site.initializer!r} has {list(shape)}.",
        hint="The other way round it would fit: if the layer is a transformers Conv1D, the adapter's fan_in_fan_out "
        "must be true."
        if turned
        else "Is it the adapter of another model, or of another size of this one?",
    )
