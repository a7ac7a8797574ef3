"""``refit-trt``: another adapter into a refittable engine, without building it again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loracc.engines.build import check_engine_name
from loracc.errors import LoraccError
from loracc.runtime.trt_deployment import COMPARISONS, TrtDeployment

__all__ = ["RefitResult", "refit_trt"]

Path_ = str | Path
_NO_PLAIN = "no plain engine of the base was given: --plain"


@dataclass(frozen=True)
class RefitResult:
    """What was made.

    Attributes:
        output: The refitted engine.
        files: Names of the files written: the manifest, the engine.
        bytes: Size of the plan.
        weights: Names of the weights sent.
        comparisons: A row for the refittable base and a row for the plain base: against, verdict, reason, what the
            latency comparison found, and ``numbers`` (see :mod:`loracc.engines.refit_numbers`).
    """

    output: str
    files: list[str]
    bytes: int
    weights: list[str]
    comparisons: list[dict[str, Any]]

    def to_json(self) -> dict[str, Any]:
        """For ``--json``."""
        return dict(vars(self))


def refit_trt(
    engine: Path_,
    adapters: Sequence[Path_],
    output: Path_,
    *,
    base: Path_ | None = None,
    plain: Path_ | None = None,
    maps: Sequence[str] = (),
    seconds: float = 10.0,
    force: bool = False,
    **told: Any,
) -> RefitResult:
    """Refit an engine with adapters and write it.

    Args:
        engine: A refittable engine that loracc built.
        adapters: As for :func:`loracc.fold`.
        output: The engine to write; a manifest goes beside it.
        base: The ``.onnx`` that ``engine`` was built from; the file of that name beside it when None.
        plain: A plain engine of the base, to compare with: numbers and latency.
        maps, told: As for :func:`loracc.fold`.
        seconds: Time to spend on each latency comparison.
        force: Replace the output.

    Raises:
        LoraccError: The call is wrong, the engine is not refittable, a weight of the adapter's cannot be refitted, or
            there is no GPU.
    """
    from loracc.formats import parse_adapter_spec
    from loracc.staging import Staging
    from loracc.targets.tensorrt_manifest import manifest_name, read_engine

    path = check_engine_name(output)
    specs = [parse_adapter_spec(str(adapter)) for adapter in adapters]
    inputs = [Path(engine), *(Path(spec.path) for spec in specs)]
    if plain is not None:
        inputs.append(Path(plain))
        read_engine(Path(plain))  # before anything is sent
    against = {"refittable base": Path(engine), "plain base": Path(plain) if plain is not None else None}
    with Staging(path, inputs=inputs, force=force, companions=(manifest_name(path),)) as stage:
        deployment = TrtDeployment(engine, base)
        sent = deployment.switch(*adapters, maps=maps, **told)
        manifest = stage.path.with_name(manifest_name(path))
        size = deployment.save(stage.path, manifest, adapters=[str(adapter) for adapter in adapters])
        numbers = _numbers(deployment, against)
    rows = [{**_compared(path, name, other, seconds), "numbers": numbers[name]} for name, other in against.items()]
    return RefitResult(str(path), stage.files, size, list(sent), rows)


def _numbers(deployment: TrtDeployment, against: Mapping[str, Path | None]) -> dict[str, dict[str, Any]]:
    """By base; the adapters are out of the deployment then. What was not compared says why."""
    from loracc.engines.refit_numbers import RefitNumbers

    rows: dict[str, dict[str, Any]] = {}
    found: RefitNumbers | None = None
    for name, other in against.items():
        try:
            found = found or RefitNumbers(deployment)
            rows[name] = (
                found.beside(other, exactly=name == "refittable base")
                if other is not None
                else {"verdict": "skipped", "reason": _NO_PLAIN}
            )
        except LoraccError as error:  # the engine is written and right; only the comparison is missing
            rows[name] = {"verdict": "skipped", "reason": error.message}
    return rows


def _compared(path: Path, name: str, other: Path | None, seconds: float) -> dict[str, Any]:
    """Latency of the refitted engine against one of the two bases; what was not measured says why."""
    row: dict[str, Any] = {"against": name, "shows": COMPARISONS[name], "verdict": "skipped"}
    if other is None:
        return {**row, "reason": _NO_PLAIN}
    try:
        found = _latency(path, other, seconds)
    except LoraccError as error:  # the engine is written and right; only the comparison is missing
        return {**row, "reason": error.message}
    return {**row, **found}


def _latency(path: Path, other: Path, seconds: float) -> Mapping[str, Any]:
    from loracc.bench_grid import BenchOptions, bench_models

    rows = bench_models([other, path], BenchOptions(provider="tensorrt", seconds=seconds))
    return {key: rows[1][key] for key in ("verdict", "reason", "ratio", "interval", "noise_floor", "margin")}
