"""A loaded base model: one graph whose weights stay in their files, plus what the model's origin tells about it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx_ir as ir

from loracc.dtypes import Array
from loracc.sites import ExpertStack, SiteTable

__all__ = ["BaseModel", "LoadOptions"]


@dataclass(frozen=True)
class LoadOptions:
    """What a front end may need to be told (the options of the same names on the command line)."""

    allow_pickle: bool = False
    inputs: tuple[str, ...] = ()
    inputs_file: str | None = None
    dynamic: tuple[str, ...] = ()
    opset: int | None = None
    task: str | None = None
    part: str | None = None
    factory: str | None = None
    #: False when only the weights matter (the output is a checkpoint): nothing is traced.
    graph: bool = True


@dataclass
class BaseModel:
    """What a front end returns.

    Attributes:
        path: What the user named.
        format: "onnx", "exported_program", "huggingface", "checkpoint", "torchscript", "module", "state_dict".
        ir: The graph. A bare checkpoint (or a folder read for its weights only) is a graph without nodes whose
            initializers are the checkpoint's tensors, in file order and under their own names.
        sites: Where a delta can act.
        traced: Whether ``ir`` has the computation, and not only the weights.
        sample_inputs: Inputs by name that the model came with, or that the user gave; empty when there are none.
        dynamic_shapes: Symbols the front end made, for messages.
        origin: The front end's own object, for the target of the same kind: a ``Pt2Archive`` for "exported_program",
            the ``ExportedProgram`` for "huggingface", "module" and a traced "state_dict", ``CheckpointFiles`` for
            "checkpoint".
        notes: What a user should know.
        elsewhere: Parameters of the model that this graph does not compute with: those of its other part.
        stacks, spelled: See below.
    """

    path: Path
    format: str
    ir: ir.Model
    sites: SiteTable
    traced: bool = True
    sample_inputs: Mapping[str, Array] = field(default_factory=dict)
    origin: Any = None
    notes: tuple[str, ...] = ()
    elsewhere: frozenset[str] = frozenset()
    #: Parameters of a graph that its checkpoint keeps in pieces, or of which a bare checkpoint has the pieces.
    stacks: tuple[ExpertStack, ...] = ()
    #: What the checkpoint calls a parameter of the graph, where that is another name.
    spelled: Mapping[str, str] = field(default_factory=dict)
    #: Ranges that sampled integer inputs must respect, by input name: {"input_ids": (0, 30522)}.
    input_ranges: Mapping[str, tuple[int, int]] = field(default_factory=dict)
