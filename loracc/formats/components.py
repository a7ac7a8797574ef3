"""Files with deltas for several models of one pipeline (a denoiser and its text encoders): which one is meant."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from loracc.errors import InputError
from loracc.formats.adapter_options import AdapterOptions
from loracc.formats.tensors import some

__all__ = ["Chosen", "choose_component"]


@dataclass(frozen=True)
class Chosen:
    """What of the file is read.

    Attributes:
        keep: Whether a component's modules are read.
        prefix: What stands before a component's module paths: nothing, but its name where all are only looked at.
        notes: What the user should know.
    """

    keep: Callable[[str], bool]
    prefix: Callable[[str], str]
    notes: tuple[str, ...] = ()


def choose_component(path: Path, found: Collection[str], options: AdapterOptions) -> Chosen:
    """Settle which component's deltas are read.

    Args:
        path: For messages.
        found: Components that the file's names tell, "" where they tell none.
        options: ``component`` is the user's answer.

    Raises:
        InputError: The file has several and nobody said which, or has not the one that was said.
    """
    names = sorted(set(found))
    if options.component is not None:
        if options.component not in names:
            raise InputError(
                f"{path}: --component {options.component}: the file has {some(name or '(none)' for name in names)}."
            )
        others = [name or "(none)" for name in names if name != options.component]
        notes = (f"deltas for {some(others)} were left out (--component {options.component}).",) if others else ()
        return Chosen(lambda name: name == options.component, lambda _: "", notes)
    if len(names) > 1 and options.describe:
        return Chosen(lambda _: True, lambda name: f"{name}." if name else "")
    if len(names) > 1:
        raise InputError(
            f"{path}: the file has deltas for {len(names)} models of a pipeline: "
            f"{some(name or '(none)' for name in names)}.",
            hint=f"Fold them one by one, each into its model: --component {names[-1]}",
        )
    return Chosen(lambda _: True, lambda _: "")
