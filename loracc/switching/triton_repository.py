"""A model repository for NVIDIA Triton Inference Server: an entry for the base and one for each variant.

::

    repository/
      base/config.pbtxt    base/1/model.onnx    base/1/model.onnx.data
      style/config.pbtxt   style/1/model.onnx   style/1/model.onnx.data

Every entry is whole. ONNX Runtime reads external data only from the folder of the model or below it, and a version's
folder holds one model; symbolic links that lead out are refused, and a file with a second hard link is refused by
onnx's own reader. What can be shared is blocks on the disk: weights lie at multiples of a page in every data file and
are copied by the kernel, so that a file system with shared extents (Btrfs, XFS) keeps the base's unchanged ones once.
Whole entries can be pushed to an object store one by one, too.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from loracc.errors import CheckFailed, InputError
from loracc.fold_result import FoldResult
from loracc.switching.triton_config import TritonSettings, batch_symbol, fed, model_config

if TYPE_CHECKING:
    from loracc.folded import Binding
    from loracc.model import BaseModel
    from loracc.proof.verdict import Verification

__all__ = ["repository_files", "rows_are_independent", "write_repository"]

BASE = "base"
VERSION = "1"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
#: Largest difference between a row alone and among others, in units of the largest output: kernels round differently.
_ROW_TOLERANCE = 1e-2


def write_repository(
    base: BaseModel,
    variants: Mapping[str, Sequence[Binding]],
    output: Path,
    settings: TritonSettings,
    *,
    described: Mapping[str, str],
    inputs: Sequence[Path] = (),
    dtype: ir.DataType | None = None,
    verify: bool = True,
    force: bool = False,
) -> FoldResult:
    """Write the repository; every variant is judged as ``loracc fold`` judges its output.

    Args:
        base: The model, its initializers without bindings.
        variants: Name -> its deltas at sites of ``base``.
        output: The repository's folder.
        settings: See there.
        described: Name -> what it was made of.
        inputs: Files that were read, which the output may not replace.
        dtype: What weights are written in; the base's own when None.
        verify: Prove every variant before anything is moved into place: an ONNX file's numbers and graph. (Engines are
            built until their bytes outside the weights are the base's.)
        force: Replace a repository that is there.

    Raises:
        LoraccError: The call is wrong, or TensorRT builds nothing.
        CheckFailed: A variant is not the base with its adapter folded in; nothing was moved into place.
    """
    from loracc.facts import site_facts
    from loracc.lower import folded_tensors
    from loracc.model import LoadOptions
    from loracc.runtime.prove_variants import prove_base
    from loracc.sources import load_model
    from loracc.staging import Staging

    _check_names(variants)
    batched = batch_symbol(base.ir) is not None and rows_are_independent(base.ir)
    notes = [*base.notes] + ([] if batched else [_NOT_BATCHED])
    rows: list[dict[str, Any]] = []
    verdicts: list[Verification] = []
    with Staging(output, inputs=inputs, force=force, folder=True) as stage:
        for name, bindings in {BASE: [], **variants}.items():
            lowered = _lowered(base, bindings, dtype)
            rows += [facts.to_json() for facts in site_facts(folded_tensors(lowered.ir))]
            folder = stage.path / name / VERSION
            folder.mkdir(parents=True)
            _write_model(lowered, folder / settings.file, settings)
            config = model_config(
                name, lowered.ir, settings, batched=batched, made_of=described.get(name, "the base model")
            )
            (folder.parent / "config.pbtxt").write_text(config, encoding="utf-8")
            if verify and settings.backend == "onnxruntime":
                made = folder / settings.file
                if bindings:
                    verdicts.append(_judged(name, base, made, bindings))
                else:
                    prove_base(lowered, load_model(made, LoadOptions()))
        files = sorted(path.relative_to(stage.path).as_posix() for path in stage.path.rglob("*") if path.is_file())
        size = stage.size()
    verification = next((v for v in verdicts if v.verdict != "pass"), verdicts[-1] if verdicts else None)
    return FoldResult(str(output), files, rows, [], verification, notes, bytes=size)


def repository_files(variants: Mapping[str, object], settings: TritonSettings) -> list[str]:
    """What would be written, data files aside."""
    _check_names(variants)
    return [f"{name}/{file}" for name in (BASE, *variants) for file in ("config.pbtxt", f"{VERSION}/{settings.file}")]


_NOT_BATCHED = "the first axes are not one batch axis whose rows are independent: the server batches nothing"


def rows_are_independent(model: ir.Model) -> bool:
    """Whether each row of a batch comes out as it does alone, tried on random inputs in ONNX Runtime.

    Raises:
        MissingExtraError: onnxruntime is not installed.
    """
    from loracc.runners.runner import OnnxRunner
    from loracc.sample_inputs import random_inputs

    symbol = batch_symbol(model)
    if symbol is None:
        return False
    runner = OnnxRunner(model)
    names = [str(value.name) for value in fed(model)]
    together = random_inputs(model, sizes={symbol: 3, "batch": 3, "sequence": 5})
    if any(len(together[name]) != 3 for name in names):
        return False
    whole = runner.run(together)
    for row in range(3):
        alone = runner.run({name: together[name][row : row + 1] for name in names})
        if not all(_close(whole[name], alone[name], row) for name in whole):
            return False
    return True


def _close(whole: Any, alone: Any, row: int) -> bool:
    if len(whole) != 3 or len(alone) != 1 or whole[row].shape != alone[0].shape:
        return False
    one, other = whole[row].astype(np.float64), alone[0].astype(np.float64)
    largest = np.max(np.abs(other), initial=0.0)
    return bool(np.max(np.abs(one - other), initial=0.0) <= _ROW_TOLERANCE * largest)


def _check_names(variants: Mapping[str, object]) -> None:
    for name in variants:
        if not _NAME.fullmatch(name) or name == BASE:
            raise InputError(
                f"{name!r} is no name for a model of the server's: letters, digits, _ . and -, and not {BASE!r}.",
                hint="Choose one: NAME=PATH",
            )


def _lowered(base: BaseModel, bindings: Sequence[Binding], dtype: ir.DataType | None) -> BaseModel:
    from loracc.folded import annotate, clear_bindings
    from loracc.lower import lower

    for value in base.ir.graph.initializers.values():
        clear_bindings(value)  # of another variant
    annotate(base.ir, bindings)
    return lower(base, dtype)


def _write_model(model: BaseModel, path: Path, settings: TritonSettings) -> None:
    from loracc.targets.onnx_file import write_onnx

    if settings.backend == "onnxruntime":
        write_onnx(model.ir, path)
        return
    from loracc.engines.build import build_trt

    first = path.parents[2] / BASE / VERSION / settings.file
    with tempfile.TemporaryDirectory(prefix="loracc-") as folder:
        graph = Path(folder, "model.onnx")
        write_onnx(model.ir, graph)
        like = first if first.is_file() else None
        build_trt(graph, (), path, flavor=settings.flavor, profiles=settings.profiles, like=like)


def _judged(name: str, base: BaseModel, path: Path, bindings: Sequence[Binding]) -> Verification:
    from loracc.proof.verification import verify

    result = verify(base, path, bindings)
    if result.verdict == "fail":
        raise CheckFailed(
            f"{name}: the result did not pass its verification, and nothing was written.\n{result.summary()}",
            verification=result.to_json(),
        )
    return result
