"""Timing in processes of their own, started one after the other with the load order swapped in every second one.

Where a model's weights land in memory depends on what was loaded before, and moves its latency by more than the margin
on some machines. One process cannot see that; several with swapped order can, and their spread is in the interval.

A process is told what to do by a small JSON file and answers with one; it is ``python -m loracc.timing.worker``, not a
fork, so that neither the caller's threads nor its memory are in the measurement, and scripts need no main guard.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

import loracc
from loracc.dtypes import Array
from loracc.errors import InputError, LoraccError, MissingExtraError
from loracc.progress import NoProgress, Progress
from loracc.runners.runner import RunError
from loracc.timing.paired import Blocks

__all__ = ["TimedModel", "read_feeds", "time_models"]

_ERRORS = {cls.__name__: cls for cls in (RunError, MissingExtraError, InputError)}


@dataclass(frozen=True)
class TimedModel:
    """What to run and with what.

    Attributes:
        path: The model's file.
        provider: A key of :data:`loracc.runners.runner.RUNNERS`.
        adapter: An ``.onnx_adapter`` to have active.
    """

    path: str
    provider: str = "cpu"
    adapter: str | None = None


def time_models(
    models: Sequence[TimedModel],
    feeds: Sequence[Mapping[str, Array]],
    *,
    seconds: float,
    processes: int,
    threads: int = 0,
    progress: Progress | None = None,
) -> tuple[list[Blocks], list[str]]:
    """Time every model against the first.

    Args:
        models: The reference, and the others.
        feeds: Inputs by name of each model.
        seconds: Time to spend on measuring, all processes together; loading comes on top.
        processes: How many, at least one.
        threads: Threads inside one operator; 0 is the runtime's own choice.
        progress: Told of every process.

    Returns:
        For each process a ``[rounds, 2]`` array for each of ``models[1:]``, and the names of the runners.

    Raises:
        RunError: A model is refused.
        MissingExtraError: A runtime is not installed.
    """
    progress = progress or NoProgress()
    progress.begin("timing", processes)
    found: list[Blocks] = []
    names: list[str] = []
    with tempfile.TemporaryDirectory(prefix="loracc-timing-") as folder:
        written = [_write_feeds(feed, Path(folder) / f"{index}.npz") for index, feed in enumerate(feeds)]
        for process in range(processes):
            job = {
                "models": [asdict(model) for model in models],
                "feeds": written,
                "seconds": seconds / processes,
                "threads": threads,
                "swapped": process % 2 == 1,
            }
            answer = _run(job, Path(folder) / f"job{process}.json")
            found.append([np.asarray(block, np.float64) for block in answer["blocks"]])
            names = answer["runners"]
            progress.advance(1, f"process {process + 1}")
    progress.end()
    return found, names


def _write_feeds(feeds: Mapping[str, Array], path: Path) -> dict[str, Any]:
    """numpy's files know neither bfloat16 nor every name: arrays by number, their names and types beside."""
    arrays = {f"a{index}": np.asarray(array) for index, array in enumerate(feeds.values())}
    halves = {key: array.view(np.uint16) for key, array in arrays.items() if array.dtype == ml_dtypes.bfloat16}
    members: dict[str, Any] = {**arrays, **halves}
    np.savez(path, **members)
    return {"file": str(path), "names": dict(zip(arrays, feeds, strict=True)), "bfloat16": list(halves)}


def read_feeds(written: Mapping[str, Any]) -> dict[str, Array]:
    """What :func:`time_models` wrote for one model."""
    with np.load(written["file"], allow_pickle=False) as archive:
        arrays = {key: archive[key] for key in written["names"]}
    for key in written["bfloat16"]:
        arrays[key] = arrays[key].view(ml_dtypes.bfloat16)
    return {written["names"][key]: array for key, array in arrays.items()}


def _run(job: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """One process; its own bug keeps its traceback."""
    path.write_text(json.dumps(job), encoding="utf-8")
    root = str(Path(loracc.__file__).parent.parent)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))}
    answer = path.with_suffix(".answer")
    command = [sys.executable, "-P", "-m", "loracc.timing.worker", str(path), str(answer)]
    done = subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, check=False)
    if done.returncode or not answer.is_file():
        raise RuntimeError(f"a timing process ended with {done.returncode}:\n{done.stderr.decode(errors='replace')}")
    body: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
    if "error" in body:
        error = body["error"]
        kind: type[LoraccError] = _ERRORS.get(error["kind"], InputError)
        raise kind(error["message"], hint=error["hint"])
    return body
