"""From a loaded model with bound deltas to the model that a target writes; the loaded one stays as it is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import onnx_ir as ir

from loracc.folded import FoldedTensor
from loracc.model import BaseModel
from loracc.passes.fold import FoldPass
from loracc.passes.link_biases import LinkBiases
from loracc.passes.unshare import Clone, UnsharePass
from loracc.sites import SiteTable, write_records

__all__ = ["folded_tensors", "lower"]

_FLOATS = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.FLOAT, ir.DataType.DOUBLE)


def lower(model: BaseModel, dtype: ir.DataType | None = None) -> BaseModel:
    """Fold the annotated deltas: un-share, fold, change the dtype when asked, record the sites.

    Args:
        model: Its graph is annotated with bindings (:func:`loracc.folded.annotate`).
        dtype: What floating-point weights are written in; None keeps each as it is.

    Returns:
        A copy whose bound initializers are :class:`FoldedTensor`; nothing has been computed yet.
    """
    graph = model.ir.clone()
    unshare = UnsharePass(model.sites)
    unshare(graph)
    FoldPass()(graph)
    LinkBiases()(graph)
    if dtype is not None:
        _change_dtype(graph, dtype, traced=model.traced)
    if model.traced:
        write_records(graph, [site for site in unshare.sites if site.module])
    return replace(
        model, ir=graph, sites=SiteTable(unshare.sites), notes=(*model.notes, *_unshared(graph, unshare.clones))
    )


def _unshared(graph: ir.Model, clones: Sequence[Clone]) -> Iterator[str]:
    for clone in clones:
        tensor = graph.graph.initializers[clone.name].const_value
        assert tensor is not None
        yield (
            f"{clone.original!r} is shared, and not all that share it change alike: {clone.name!r} is a tensor of its "
            f"own in the output ({tensor.nbytes:,} bytes more, no more nodes)"
        )


def _change_dtype(graph: ir.Model, dtype: ir.DataType, *, traced: bool) -> None:
    from loracc.passes.retype import RetypePass, recast  # with ONNX's schemas, which no checkpoint needs

    if traced:
        RetypePass(dtype, sources=_FLOATS)(graph)
        return
    for value in graph.graph.initializers.values():
        tensor = value.const_value
        if tensor is not None and tensor.dtype in _FLOATS and tensor.dtype != dtype:
            value.const_value = recast(tensor, dtype)


def folded_tensors(model: ir.Model) -> list[FoldedTensor]:
    """The initializers that deltas were folded into, in order."""
    found = (value.const_value for value in model.graph.initializers.values())
    return [tensor for tensor in found if isinstance(tensor, FoldedTensor) and tensor.bindings]
