"""``fold --save-adapter DIR``: the LoRA found in a graph, written as a PEFT adapter of the model without it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from loracc.errors import InputError

if TYPE_CHECKING:
    from loracc.folded import Binding
    from loracc.model import BaseModel

__all__ = ["check_saving", "saved_adapter"]


def check_saving(folder: str | Path | None, adapters: Sequence[object], others: Sequence[Path], *, force: bool) -> None:
    """Refuse what could not be saved before any work is done.

    Raises:
        InputError: Adapters were given, or the folder is an input, the output, or exists without ``force``.
    """
    if folder is None:
        return
    if adapters:
        raise InputError(
            "--save-adapter writes the LoRA that is found inside the model's graph, and adapters were given.",
            hint="To write a given adapter in another format: loracc convert ADAPTER -o OUT.",
        )
    from loracc.staging import check_destination

    here = Path(folder).resolve()
    for other in (path.resolve() for path in others):
        if here == other or here in other.parents or other in here.parents:
            raise InputError(
                f"{folder}: --save-adapter would replace a part of {other}.", hint="Choose another folder."
            )
    check_destination(Path(folder), inputs=others, force=force, folder=True)


@contextmanager
def saved_adapter(
    folder: str | Path | None,
    base: BaseModel,
    bindings: Sequence[Binding],
    inputs: Sequence[Path],
    *,
    force: bool,
    dry_run: bool,
) -> Iterator[None]:
    """Write the adapter at once, and move it into place when the block has ended well.

    Raises:
        UnsupportedError: A weight without a module's name, or a delta that no LoRA adapter can hold.
    """
    if folder is None:
        yield
        return
    from loracc.formats.write_peft import peft_files, write_peft
    from loracc.passes.raised_adapter import raised_entries
    from loracc.staging import Staging

    entries = raised_entries(base.ir, bindings)
    if dry_run:
        peft_files(entries)
        yield
        return
    with Staging(folder, inputs=inputs, force=force, folder=True) as stage:
        stage.path.mkdir(parents=True, exist_ok=True)
        stage.expected_bytes = write_peft(entries, stage.path)
        yield
