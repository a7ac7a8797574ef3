"""What raising finds: the bindings that it annotated, and what looked like LoRA and is not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from loracc.deltas import Addition
from loracc.folded import Binding

__all__ = ["Raised", "RaisedAddition", "Rejected"]


@dataclass(frozen=True)
class Rejected:
    """A place of the graph that looks like LoRA and was left as it is.

    Attributes:
        where: The node, by operator and name, and the module where known.
        reason: Why, as a clause: "Relu ('act') is not linear".
    """

    where: str
    reason: str

    def __str__(self) -> str:
        return f"{self.where}: left as it is, {self.reason}."


@dataclass(frozen=True)
class Raised:
    """The result of raising one model."""

    bindings: tuple[Binding, ...] = ()
    rejected: tuple[Rejected, ...] = ()


@dataclass(frozen=True, eq=False)
class RaisedAddition(Addition):
    """A change that the graph computes from its weights in a way that has no narrower name: W' = W + D."""

    kind: ClassVar[str] = "raised"
