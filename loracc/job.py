"""One output: where it goes, as what, and how it is planned and staged."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from loracc.dtypes import dtype_from_name
from loracc.model import BaseModel
from loracc.progress import NoProgress, Progress
from loracc.staging import Staging, check_destination
from loracc.targets import Target, target_for
from loracc.targets.onnx_file import data_name
from loracc.targets.plan import WritePlan

__all__ = ["Job"]


@dataclass(frozen=True)
class Job:
    """What the user asked to have written.

    Attributes:
        output: The destination.
        target: What its name asks for.
        dtype: What weights are written in; None keeps the base's.
        external: Where an ``.onnx`` keeps its weights.
        progress: Told how far the writing is.
        beside: Names of further files that are written beside the destination.
    """

    output: Path
    target: Target
    dtype: ir.DataType | None
    external: str
    progress: Progress
    beside: tuple[str, ...] = ()

    @classmethod
    def of(cls, output: str | Path, dtype: str | None, external: str, progress: Progress | None) -> Job:
        """From the arguments of :func:`loracc.fold`."""
        target = target_for(output)
        return cls(Path(output), target, dtype_from_name(dtype) if dtype else None, external, progress or NoProgress())

    @property
    def companions(self) -> tuple[str, ...]:
        """Names of files that may be written beside the destination."""
        return (*((data_name(self.output),) if self.target.name == "onnx" else ()), *self.beside)

    def check(self, inputs: Sequence[Path], *, force: bool) -> None:
        """Refuse a destination that cannot be written, before any work is done."""
        check_destination(
            self.output, inputs=inputs, force=force, folder=self.target.folder, companions=self.companions
        )

    def staging(self, inputs: Sequence[Path], *, force: bool) -> Staging:
        """Where the output is made before it is moved into place."""
        return Staging(self.output, inputs=inputs, force=force, folder=self.target.folder, companions=self.companions)

    @contextmanager
    def base(self, model: BaseModel) -> Iterator[BaseModel]:
        """The model as the target's base; inside the block only."""
        if self.target.name != "exported_program":
            yield model
            return
        from loracc.targets.exported_program import saved_program

        with saved_program(model, self.output.absolute()) as saved:
            yield saved

    def plan(self, model: BaseModel, path: Path) -> WritePlan:
        """What is to be written, at ``path``."""
        if self.target.name == "onnx":
            from loracc.targets.onnx_file import plan_onnx

            return plan_onnx(model.ir, path, external=self.external, home=Path(os.path.abspath(self.output)).parent)
        if self.target.name == "exported_program":
            from loracc.targets.exported_program import plan_exported_program

            return plan_exported_program(model, path)
        from loracc.targets.checkpoint import plan_checkpoint

        return plan_checkpoint(model, path, folder=self.target.folder)
