"""Any number of models against the first, over a grid of batch and sequence sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from loracc.dtypes import Array
from loracc.errors import InputError
from loracc.progress import Progress
from loracc.proof.latency import margin_of
from loracc.proof.ratio import Ratio, Ruling, estimate, rule
from loracc.sample_inputs import check_inputs, fed, random_inputs
from loracc.sources import load_model
from loracc.sources.onnx_model import read_graph
from loracc.sources.sniff import sniff
from loracc.sources.user_inputs import read_npz
from loracc.targets.tensorrt_manifest import PLANS, input_graph, read_engine
from loracc.timing.job import TimedModel, time_models

__all__ = ["BenchOptions", "bench_models"]

#: The input of ``attach --as batched``: which adapter each row of the batch uses.
ADAPTER_IDS = "adapter_ids"


@dataclass(frozen=True)
class BenchOptions:
    """How to measure.

    Attributes:
        inputs_file: ``.npz`` of inputs by name; seeded random ones when None.
        batches, sequences: Sizes of the dynamic axes; every pair of them is one setting.
        adapter_file: An ``.onnx_adapter`` to have active in the models that have switchable sites, or the file of a
            variant to run in its deployment.
        provider: A key of :data:`loracc.runners.RUNNERS`.
        threads: Threads inside one operator; 0 is the runtime's own choice.
        seconds: Time to spend on each model but the first, in each setting, all processes together.
        processes: In how many processes.
        margin: Ratios inside 1 ± this count as equal; the provider's when None.
        seed: Of random inputs and of the bootstrap.
    """

    inputs_file: str | Path | None = None
    batches: Sequence[int] = (1,)
    sequences: Sequence[int] = (128,)
    adapter_file: str | Path | None = None
    provider: str = "cpu"
    threads: int = 0
    seconds: float = 20.0
    processes: int = 4
    margin: float | None = None
    seed: int = 0


@dataclass(frozen=True)
class _Model:
    """One model of the comparison: its file, its graph, and the adapter that is active in it."""

    path: Path
    graph: ir.Model
    adapter: Path | None

    @property
    def label(self) -> str:
        return f"{self.path} + {self.adapter.name}" if self.adapter else str(self.path)


def bench_models(
    models: Sequence[str | Path], options: BenchOptions | None = None, progress: Progress | None = None
) -> list[dict[str, Any]]:
    """Every model against the first.

    Args:
        models: Files that take the same inputs. ``adapter_ids`` and inputs with a default may be there besides.
        options: See :class:`BenchOptions`.
        progress: Told of every process.

    Returns:
        A row for each setting and model: model, batch, sequence, median_ms, ratio, interval, interval_90, noise_floor,
        margin, verdict, comparison, reason, pairs, more_pairs, runner. The first model's row is a second copy of it
        against it: the noise.

    Raises:
        InputError: A model or the inputs cannot be read, or do not fit each other.
        MissingExtraError: A runtime is not installed.
    """
    options = options or BenchOptions()
    opened = [_opened(Path(path), options) for path in models]
    if options.adapter_file is not None and not any(model.adapter for model in opened):
        raise InputError(
            f"{options.adapter_file}: none of the models has switchable sites.",
            hint="loracc attach MODEL ADAPTER --as inputs -o OUT.onnx writes such a model; a variant's file lies in "
            "OUT.onnx.variants.",
        )
    rows: list[dict[str, Any]] = []
    settings = [(batch, sequence) for batch in options.batches for sequence in options.sequences]
    for batch, sequence in settings[: 1 if options.inputs_file else None]:
        feeds = _feeds(opened, options, batch, sequence)
        size = {} if options.inputs_file else {"batch": batch, "sequence": sequence}
        rows += [{**row, **size} for row in _setting(opened, feeds, options, progress)]
    return rows


def _opened(path: Path, options: BenchOptions) -> _Model:
    if not path.exists():
        raise InputError(f"{path}: no such file.")
    if path.suffix.lower() in PLANS:
        if options.provider != "tensorrt":
            raise InputError(f"{path}: a TensorRT engine, which is run with --provider tensorrt.")
        return _Model(path, input_graph(read_engine(path)[0]), None)
    graph = read_graph(path) if sniff(path) == "onnx" else load_model(path).ir
    switchable = any(value.name in graph.graph.initializers for value in graph.graph.inputs) or _holds(path, options)
    adapter = Path(options.adapter_file) if options.adapter_file is not None and switchable else None
    if adapter is not None and not adapter.is_file():
        raise InputError(f"{adapter}: no such file.")
    return _Model(path, graph, adapter)


def _holds(path: Path, options: BenchOptions) -> bool:
    """Whether the adapter's file is a variant of the deployment at this path."""
    folder = path.with_name(f"{path.name}.variants")
    return options.adapter_file is not None and Path(options.adapter_file).absolute().parent == folder.absolute()


def _feeds(models: Sequence[_Model], options: BenchOptions, batch: int, sequence: int) -> list[dict[str, Array]]:
    """Inputs of every model: the same arrays where the names are the same."""
    first = models[0]
    common = _own_inputs(first.graph)
    for model in models[1:]:
        if _own_inputs(model.graph) != common:
            mine, theirs = (", ".join(sorted(_own_inputs(m.graph))) for m in (model, first))
            raise InputError(f"{model.path}: takes {mine}, and {first.path} takes {theirs}.")
    if options.inputs_file is not None:
        shared = read_npz(options.inputs_file)
        for model in models:
            if _own_inputs(model.graph) == {str(value.name) for value in fed(model.graph)}:
                check_inputs(model.graph, shared)
    else:
        shared = random_inputs(first.graph, seed=options.seed, sizes={"batch": batch, "sequence": sequence})
    rows = next((len(array) for name, array in shared.items() if name in common and array.ndim), batch)
    ids = shared.get(ADAPTER_IDS, np.zeros(rows, np.int64))
    return [{**shared, ADAPTER_IDS: ids} if _has_ids(model.graph) else dict(shared) for model in models]


def _has_ids(graph: ir.Model) -> bool:
    return any(value.name == ADAPTER_IDS for value in fed(graph))


def _own_inputs(graph: ir.Model) -> set[str]:
    """What must be fed, the choice of adapters aside."""
    return {str(value.name) for value in fed(graph)} - {ADAPTER_IDS}


def _setting(
    models: Sequence[_Model],
    feeds: Sequence[Mapping[str, Array]],
    options: BenchOptions,
    progress: Progress | None,
) -> list[dict[str, Any]]:
    """All models in one setting; the last one timed is a second copy of the first."""
    timed = [TimedModel(str(m.path.absolute()), options.provider, _absolute(m.adapter)) for m in (*models, models[0])]
    found, names = time_models(
        timed,
        [*feeds, feeds[0]],
        seconds=options.seconds * max(len(models) - 1, 1),
        processes=options.processes,
        threads=options.threads,
        progress=progress,
    )
    columns = list(zip(*found, strict=True))  # per model its processes
    margin = margin_of(options.margin, options.provider)
    noise = estimate(columns[-1], seed=options.seed)
    rows = []
    for index, (model, processes) in enumerate(zip(models, (columns[-1], *columns[:-1]), strict=True)):
        ratio = estimate(processes, seed=options.seed)
        ruling = rule(ratio, noise, margin) if index else rule(noise, noise, margin)
        median = 1000 * float(np.median(np.concatenate(processes)[:, 1 if index else 0]))
        rows.append(_row(model, median, ratio, noise, margin, ruling) | {"runner": names[index]})
    return rows


def _absolute(path: Path | None) -> str | None:
    return str(path.absolute()) if path else None


def _row(model: _Model, median: float, ratio: Ratio, noise: Ratio, margin: float, ruling: Ruling) -> dict[str, Any]:
    return {
        "model": model.label,
        "median_ms": median,
        "ratio": ratio.value,
        "interval": [ratio.low, ratio.high],
        "interval_90": [ratio.low90, ratio.high90],
        "noise_floor": noise.distance,
        "margin": margin,
        "verdict": ruling.verdict,
        "comparison": ruling.comparison,
        "reason": ruling.reason,
        "pairs": ratio.pairs,
        "more_pairs": ruling.more_pairs,
    }
