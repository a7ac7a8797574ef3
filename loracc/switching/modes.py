"""The registry of ``attach --as``: what each way of switching is, and the module that makes it.

A mode's module has ``make(request: AttachRequest) -> AttachResult``; it is imported when the mode is asked for, so that
help and parsing load nothing.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loracc.switching.request import AttachRequest, AttachResult

__all__ = ["MODES", "Mode", "maker"]


@dataclass(frozen=True)
class Mode:
    """One way of switching.

    Attributes:
        summary: For the help.
        module: Where its ``make`` is.
        options: Options of ``attach`` that only some modes take and this one does ("sums", "slots", "rank").
        folder: The output is a folder, and no ``.onnx``.
    """

    summary: str
    module: str
    options: frozenset[str] = frozenset()
    folder: bool = False


MODES: dict[str, Mode] = {
    "inputs": Mode(
        "A and B are inputs of the graph; each adapter is an .onnx_adapter file, switched per call",
        "loracc.switching.inputs",
        frozenset({"sums"}),
    ),
    "batched": Mode(
        "all adapters are stacked in the graph; the input adapter_ids chooses one for each row of a batch",
        "loracc.switching.batched",
        frozenset({"slots", "rank"}),
    ),
    "variants": Mode(
        "the base's own graph; weights are folded when an adapter is loaded: any kind, no cost per call",
        "loracc.switching.variants",
    ),
    "triton": Mode(
        "a folder for NVIDIA Triton Inference Server: an entry for the base and one, folded, for each adapter",
        "loracc.switching.triton",
        frozenset({"backend", "max_batch", "profiles"}),
        folder=True,
    ),
}


def maker(name: str) -> Callable[[AttachRequest], AttachResult]:
    """``make`` of a mode."""
    module: Any = importlib.import_module(MODES[name].module)
    made: Callable[[AttachRequest], AttachResult] = module.make
    return made
