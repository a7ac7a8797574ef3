"""What refitting did to the numbers, seen from both bases.

The engine is run with the adapter in it, and once more with the base's bytes sent back. Beside an engine of the base:

* ``restored_error`` = max|y_restored − y_base| / max|y_base|: how far the engine that was refitted to and fro is from
  it. From the engine that it was made of, not at all; from a plain engine, whose tactics are others, by roundoff.
* ``effect`` = max|y_adapter − y_base| / max|y_base|: what the adapter does.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from loracc.dtypes import Array
from loracc.errors import UnsupportedError
from loracc.runtime.trt_deployment import TrtDeployment
from loracc.sample_inputs import random_inputs
from loracc.targets.tensorrt_load import load_engine
from loracc.targets.tensorrt_manifest import Manifest, input_graph

__all__ = ["RefitNumbers", "inputs_of"]


def inputs_of(manifest: Manifest, seed: int = 0) -> dict[str, Array]:
    """Random inputs of an engine, of the best shapes of its first profile."""
    best = {name: tuple(ranges[1]) for name, ranges in (manifest.profiles[0] if manifest.profiles else {}).items()}
    return random_inputs(input_graph(manifest), seed=seed, shapes=best)


class RefitNumbers:
    """Outputs of a refitted engine, with its adapters and without; they are taken out by this.

    Args:
        deployment: With the adapters in it; without them after.

    Raises:
        LoraccError: The engine cannot be run.
    """

    def __init__(self, deployment: TrtDeployment) -> None:
        self.inputs = inputs_of(deployment.source.manifest)
        self._adapted = deployment.run(self.inputs)
        deployment.restore()
        self._restored = deployment.run(self.inputs)

    def beside(self, base: Path, *, exactly: bool) -> dict[str, Any]:
        """The two figures beside an engine of the base, and a verdict.

        Args:
            base: The engine.
            exactly: It is the engine that was refitted: every bit must come back. Otherwise the two must be nearer to
                one another than the adapter takes them.

        Raises:
            LoraccError: The engine cannot be run, or has other inputs or outputs.
        """
        from loracc.runners.tensorrt import EngineRunner

        outputs = EngineRunner(load_engine(base, "compare with the engine of the base")).run(self.inputs)
        if shapes(outputs) != shapes(self._restored):
            raise UnsupportedError(f"{base}: its outputs are {shapes(outputs)}, and not {shapes(self._restored)}.")
        error, effect = _distance(self._restored, outputs), _distance(self._adapted, outputs)
        reason = "" if error == 0 or not exactly else "the base's numbers did not come back"
        reason = reason if effect > error else "the adapter changes no more than going to and fro does"
        return {"verdict": "fail" if reason else "pass", "reason": reason, "restored_error": error, "effect": effect}


def shapes(outputs: Mapping[str, Array]) -> dict[str, tuple[int, ...]]:
    """By name."""
    return {name: array.shape for name, array in outputs.items()}


def _distance(found: Mapping[str, Array], reference: Mapping[str, Array]) -> float:
    """The largest of max|found − reference| / max|reference| over all outputs; infinite where one is not finite."""
    largest = 0.0
    for name, array in reference.items():
        one, other = found[name].astype(np.float64), array.astype(np.float64)
        scale = float(np.max(np.abs(other), initial=0.0)) or 1.0
        distance = float(np.max(np.abs(one - other), initial=0.0)) / scale
        largest = max(largest, distance if np.isfinite(distance) else float("inf"))
    return largest
