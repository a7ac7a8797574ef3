"""Quantized weights and what they were before: with ``--base`` a delta is added to the original, not to its codes."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from loracc.concatenated import ConcatenatedTensor
from loracc.encodings.decoded import DecodedTensor
from loracc.passes.content_places import Place
from loracc.passes.content_sites import ContentMatch
from loracc.tensors import PermutedTensor, dims

__all__ = ["give_originals"]


def give_originals(model: ir.Model, match: ContentMatch, initializers: Sequence[str]) -> list[str]:
    """Give these initializers their original values, where they are quantized and the checkpoint has all of them.

    Args:
        model: The graph; the initializers' tensors are replaced.
        match: What of the checkpoint lies where.
        initializers: Those that deltas are bound to.

    Returns:
        The quantized ones that the checkpoint does not have whole; they keep the values that their codes mean.
    """
    without = []
    for name in initializers:
        value = model.graph.initializers[name]
        tensor = value.const_value
        if isinstance(tensor, DecodedTensor):
            original = _original(tensor, [place for place in match.places if place.initializer == name], match)
            if original is None:
                without.append(name)
            else:
                value.const_value = tensor.with_original(original)
    return without


def _original(stored: DecodedTensor, places: Sequence[Place], match: ContentMatch) -> ir.TensorProtocol | None:
    """The checkpoint's tensors that make up a whole initializer; None where a stretch is missing."""
    if not places:
        return None
    axis, name = places[0].axis, str(stored.name)
    parts = [_as_stored(place, match) for place in places]
    ends = [place.start for place in places[1:]] + [dims(stored)[axis]]
    covered = places[0].start == 0 and all(
        place.stop is None or place.stop == end for place, end in zip(places, ends, strict=True)
    )
    if not covered or len({part.dtype for part in parts}) > 1:
        return None
    return parts[0] if len(parts) == 1 else ConcatenatedTensor(parts, axis, name)


def _as_stored(place: Place, match: ContentMatch) -> ir.TensorProtocol:
    candidate = place.candidates[0]  # any: they are equal
    tensor = match.tensors[candidate.name]
    return PermutedTensor(tensor, (1, 0)) if candidate.turned else tensor
