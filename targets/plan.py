"""What a target is about to write: known before the first byte, so that it can be shown, weighed and refused."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import onnx_ir as ir

from loracc.progress import Progress
from loracc.streaming import OutputFile, write_files

__all__ = ["WritePlan", "aligned"]


@dataclass(frozen=True)
class WritePlan:
    """The files of one output.

    Attributes:
        weights: Files whose weights are streamed into place.
        small: Files made whole in memory, by path; they are made when they are written.
        copies: Files taken over as they are: source by destination.
        links: Files that the output refers to and that must be seen beside it while it is not in place yet: hard links,
            source by name; :class:`loracc.staging.Staging` does not move them.
        nbytes: Bytes of everything but the small files' bookkeeping.
        folded: Bytes of tensors that are computed and not copied.
    """

    weights: tuple[OutputFile, ...] = ()
    small: Mapping[Path, Callable[[], bytes]] = field(default_factory=dict)
    copies: Mapping[Path, Path] = field(default_factory=dict)
    links: Mapping[Path, Path] = field(default_factory=dict)
    nbytes: int = 0
    folded: int = 0

    def write(
        self,
        progress: Progress | None = None,
        *,
        workers: int | None = None,
        also: Sequence[Callable[[], None]] = (),
    ) -> None:
        """Write all of it; ``also`` as :func:`loracc.streaming.write_files`.

        Raises:
            InputError, NumericsError, OSError: As :func:`loracc.streaming.write_files`.
        """
        for path in (*self.small, *self.copies, *self.links, *(file.path for file in self.weights)):
            path.parent.mkdir(parents=True, exist_ok=True)
        for target, source in self.copies.items():
            shutil.copyfile(source, target)
        for target, source in self.links.items():
            os.link(source, target)
        write_files(self.weights, progress=progress, workers=workers, also=also)
        for path, make in self.small.items():
            path.write_bytes(make())


def aligned(offset: int, alignment: int) -> int:
    """The next multiple of ``alignment``.

    >>> aligned(0, 64), aligned(1, 64), aligned(64, 64)
    (0, 64, 64)
    """
    return -(-offset // alignment) * alignment


def computed_bytes(tensors: list[ir.TensorProtocol]) -> int:
    """Bytes of the tensors that no file holds as they are."""
    return sum(tensor.nbytes for tensor in tensors if not isinstance(tensor, ir.ExternalTensor))
