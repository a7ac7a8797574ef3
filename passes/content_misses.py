"""What to say of a parameter that an adapter changes and that was not found in the graph by its values."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from loracc.dtypes import is_float
from loracc.passes.content_samples import Elements, Matrix, agree, sample_positions, step_of
from loracc.passes.content_sites import ContentMatch
from loracc.tensors import dims

__all__ = ["explain_miss"]

#: Names that are listed of many.
_SHOWN = 3


def explain_miss(match: ContentMatch, model: ir.Model, name: str) -> str:
    """Why there is no site of this name; "" where the checkpoint says nothing about it.

    Args:
        match: What was found.
        model: The graph.
        name: ``module.parameter`` as the adapter has it; the checkpoint may have a wrapper's prefix more or less.
    """
    full = name if name in match.names else next((other for other in match.names if _same(other, name)), None)
    if full is None:
        return "the base has no such parameter"
    if full in match.ambiguous:
        where = " and ".join(repr(initializer) for initializer in match.ambiguous[full])
        rivals = _equals(match, full)
        more = f" and {len(rivals) - _SHOWN} others" if len(rivals) > _SHOWN else ""
        equal = f", which are those of {', '.join(rivals[:_SHOWN])}{more} too," if rivals else ""
        return f"its values{equal} are in {where}, and nothing tells which of them it is"
    if full in match.cut:
        return f"its values are in {match.cut[full]!r}, side by side with others along the input axis"
    tensor = match.tensors.get(match.names[full])
    if tensor is None:
        return ""
    shape = ", ".join(map(str, dims(tensor)))
    if (other := _reshaped(model, tensor)) is not None:
        return f"the base's {full} [{shape}] is in {other}: a delta cannot be added through a change of its shape"
    nearest = _nearest(model, tensor)
    return f"the base's {full} [{shape}] is in no initializer, in no orientation and as no block; {nearest}"


def _same(one: str, other: str) -> bool:
    return one.endswith(f".{other}") or other.endswith(f".{one}")


def _equals(match: ContentMatch, name: str) -> list[str]:
    """Other parameters that are ambiguous with this one."""
    return [other for other, where in match.ambiguous.items() if other != name and where == match.ambiguous[name]]


def _reshaped(model: ir.Model, tensor: ir.TensorProtocol) -> str | None:
    """The initializer that holds the same numbers in another shape."""
    for name, value in model.graph.initializers.items():
        other = value.const_value
        if other is None or not is_float(other.dtype) or other.size != tensor.size or dims(other) == dims(tensor):
            continue
        flat, _ = sample_positions(int(tensor.size), 1)
        views = [Matrix.of(dims(tensor), turned=turned) for turned in (False, True)[: len(tensor.shape)]]
        with Elements(tensor) as one, Elements(other) as two:
            theirs = two.at(flat)
            mine = [one.at(view.flat(flat // view.shape[1], flat % view.shape[1])) for view in views]
        if any(agree(own, theirs, tensor.dtype, other.dtype, step_of(other)).all() for own in mine):
            return f"{name!r}, as [{', '.join(map(str, dims(other)))}]"
    return None


def _nearest(model: ir.Model, tensor: ir.TensorProtocol) -> str:
    """The initializer of its shape whose values are least unlike."""
    shape = dims(tensor)
    best: tuple[float, str] | None = None
    for name, value in model.graph.initializers.items():
        other = value.const_value
        if other is None or not is_float(other.dtype):
            continue
        ways = ((False, shape), (True, shape[::-1] if len(shape) == 2 else ()))
        for turned in (turned for turned, seen in ways if dims(other) == seen):
            distance = _distance(tensor, other, turned=turned)
            if best is None or distance < best[0]:
                best = (distance, str(name))
    if best is None:
        return "no float initializer has its shape"
    return f"nearest of its shape: {best[1]!r}, whose sampled values differ by {best[0]:.2g} of the largest"


def _distance(tensor: ir.TensorProtocol, other: ir.TensorProtocol, *, turned: bool) -> float:
    """Largest difference of the sampled elements over the largest of them."""
    shape = dims(tensor)
    rows, columns = sample_positions(shape[0], Matrix.of(shape).shape[1])
    with Elements(tensor) as one, Elements(other) as two:
        mine = one.at(Matrix.of(shape).flat(rows, columns))
        theirs = two.at(Matrix.of(dims(other), turned=turned).flat(rows, columns))
    largest = float(np.abs(mine).max())
    return float(np.abs(mine - theirs).max()) / (largest or 1.0)
