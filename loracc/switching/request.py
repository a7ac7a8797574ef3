"""What ``attach`` was asked for, with everything read and bound, and what it made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loracc.adapter import Adapter
from loracc.fold_result import FoldResult
from loracc.folded import Binding
from loracc.job import Job
from loracc.model import BaseModel
from loracc.passes.bind_adapter import BindResult
from loracc.sites import Site

__all__ = ["AttachRequest", "AttachResult", "Bound", "union_of_sites"]


@dataclass(frozen=True)
class Bound:
    """One adapter at the model's sites, bound by itself."""

    adapter: Adapter
    result: BindResult

    @property
    def name(self) -> str:
        """The adapter's name."""
        return self.adapter.name

    @property
    def bindings(self) -> list[Binding]:
        """Its deltas at their sites."""
        return self.result.bindings


@dataclass(frozen=True)
class AttachRequest:
    """Everything that a mode needs.

    Attributes:
        base: The model; its initializers hold no bindings that count (each adapter's are in ``bound``).
        bound: The adapters, in the order given.
        job: Where the output goes, and in which dtype.
        inputs: The files that were read, which no output may replace.
        sums: ``NAME=a+b@0.5`` as given.
        slots: Places for adapters ("batched"); None for as many as there are adapters.
        rank: Room in each place ("batched"); None for what the adapters need.
        backend, max_batch, profiles: Of "triton": :class:`loracc.switching.triton_config.TritonSettings`.
        verify, force, dry_run: As for :func:`loracc.attach`.
    """

    base: BaseModel
    bound: tuple[Bound, ...]
    job: Job
    inputs: tuple[Path, ...]
    sums: tuple[str, ...] = ()
    slots: int | None = None
    rank: int | None = None
    backend: str | None = None
    max_batch: int | None = None
    profiles: tuple[str, ...] = ()
    verify: bool = True
    force: bool = False
    dry_run: bool = False

    @property
    def unmatched(self) -> list[str]:
        """Keys of the adapters that fit nowhere."""
        return [key for one in self.bound for key in one.result.unmatched]

    @property
    def notes(self) -> list[str]:
        """What reading and binding had to say."""
        return [*self.base.notes, *(note for one in self.bound for note in one.result.notes)]


@dataclass
class AttachResult(FoldResult):
    """What ``attach`` made; the contract of ``fold --json`` and more.

    Attributes:
        mode: "inputs", "batched", ...
        adapters: One row an adapter (or sum): name, file or slot, rank, sites.
    """

    mode: str = "inputs"
    adapters: list[dict[str, Any]] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """As a fold's, with "mode" and "adapters"."""
        return {**super().to_json(), "mode": self.mode, "adapters": self.adapters}


def union_of_sites(base: BaseModel, bound: Sequence[Bound]) -> list[Site]:
    """Every site that some adapter changes, in the model's order."""
    order = {str(name): index for index, name in enumerate(base.ir.graph.initializers)}
    sites = dict.fromkeys(binding.site for one in bound for binding in one.bindings)
    return sorted(sites, key=lambda site: (order[site.initializer], site.layout.start))
