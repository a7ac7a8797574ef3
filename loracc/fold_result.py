"""What a fold made: the result of ``loracc.fold`` and of ``fold --json``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from loracc.errors import CheckFailed
    from loracc.estimate import Estimate
    from loracc.proof.verdict import Verification

__all__ = ["FoldResult"]


@dataclass
class FoldResult:
    """What a fold made.

    Attributes:
        output: The destination.
        files: Names of the files written, beside the destination, in the order in which they were moved into place.
        sites: One row per delta folded: name, kind, rank, scale, relative_norm, survived, adapter, way.
        unmatched: Adapter keys that fit nowhere (only with ``allow_unmatched``).
        verification: The verdict on what was written; None with ``verify=False``.
        notes: What the user should know.
        dry_run: Nothing was written.
        folded_bytes: Of ``bytes``, those that are computed and not copied; only of a dry run.
        estimate: Seconds and memory that the writing would take; only of a dry run.
        bytes: Size of the output in bytes.
        saved_adapter: Where the LoRA found in the graph was written as an adapter.
        calibration: Errors of the outputs on held-out inputs, with both roundings; only with calibrated rounding.
    """

    output: str
    files: list[str]
    sites: list[dict[str, Any]]
    unmatched: list[str]
    verification: Verification | None
    notes: list[str] = field(default_factory=list)
    dry_run: bool = False
    bytes: int = 0
    saved_adapter: str | None = None
    folded_bytes: int = 0
    estimate: Estimate | None = None
    calibration: dict[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """The contract of ``fold --json`` (DESIGN.md 2)."""
        result: dict[str, Any] = {
            "output": self.output,
            "files": self.files,
            "sites": self.sites,
            "unmatched": self.unmatched,
            "verification": self.verification.to_json() if self.verification else {"verdict": "skipped"},
            "notes": self.notes,
            "bytes": self.bytes,
        }
        if self.calibration is not None:
            result["calibration"] = self.calibration
        if self.saved_adapter is not None:
            result["saved_adapter"] = self.saved_adapter
        if self.dry_run:
            result["dry_run"] = True
            result["folded_bytes"] = self.folded_bytes
        if self.estimate is not None:
            result["estimate"] = {
                "seconds": float(f"{self.estimate.seconds:.3g}"),
                "memory_bytes": self.estimate.memory,
            }
        return result

    @staticmethod
    def refused(output: Path, unmatched: Sequence[str], error: CheckFailed) -> dict[str, Any]:
        """``to_json`` of a result that did not pass, and was not written."""
        result = FoldResult(str(output), [], [], list(unmatched), None, [error.message]).to_json()
        return {**result, "verification": error.verification}
