"""The Python API: read, bind, fold, write, prove; in that order and with nothing moved into place before the proof.

``fold`` is one straight list of steps; each step lives in the module it is called from.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loracc.errors import BindingError, CheckFailed, InputError
from loracc.folded import Binding

if TYPE_CHECKING:
    from loracc.adapter import Adapter
    from loracc.model import BaseModel
    from loracc.passes.bind_adapter import BindResult
    from loracc.progress import Progress
    from loracc.verdict import Verification

__all__ = ["FoldResult", "bench", "fold", "verify"]


@dataclass
class FoldResult:
    """What a fold made.

    Attributes:
        output: The destination.
        files: Every file written, relative to the destination's folder, in order.
        sites: One row per delta folded: name, kind, rank, scale, relative_norm, survived, adapter, way.
        unmatched: Adapter keys that fit nowhere (only with ``allow_unmatched``).
        verification: The verdict on what was written; None with ``verify=False``.
        notes: What the user should know.
        dry_run: Nothing was written.
        bytes: Size of the output in bytes.
    """

    output: str
    files: list[str]
    sites: list[dict[str, Any]]
    unmatched: list[str]
    verification: Verification | None
    notes: list[str] = field(default_factory=list)
    dry_run: bool = False
    bytes: int = 0

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
        if self.dry_run:
            result["dry_run"] = True
        return result
