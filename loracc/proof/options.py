"""What a verification may be told, with the documented defaults."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import onnx_ir as ir

from loracc.dtypes import Array
from loracc.proof.coverage import Coverage
from loracc.task_data import TaskData

__all__ = ["VerifyOptions"]


@dataclass(frozen=True)
class VerifyOptions:
    """Settings of :func:`loracc.proof.verification.verify`.

    Attributes:
        inputs: Inputs by name, in place of the model's own and of random ones.
        seed: Of the random inputs and of the bootstrap.
        draws: How many sets of inputs.
        dtype: The output was written in this dtype on purpose (``fold --dtype``); found out when None.
        multiple: The folded model may be this many times as wrong as the unfused model in the output's own type. Both
            errors are maxima over the same outputs and inputs; maxima of equally distributed errors were within a
            factor of 2.5 of each other in the trials of tests/proof/test_trials.py.
        floor: In unit roundoffs of the output's type: an error below this is never a failure.
        raised_from: The graph with LoRA inside that the base and its deltas were raised from; it is the unfused model
            then, so that a mistake in the raising shows too.
        truth: "fp32": the unfused model in higher precision than the output; "as-trained": the unfused model in the
            base's own type, with that type's roundings, which is what the trainer saw.
        taps: Measure the error after every bound site, and not only when the check fails.
        task: Inputs with answers; scored, and compared in place of all other inputs.
        coverage: What became of the adapters' tensors, from where they were bound.
        calibrated: The rounding was chosen (``fold --calibrate``): no element need be the nearest one.
        beside_nearest: Then also fold with rounding to nearest, in memory, and run that on the same inputs.
        end_to_end: Run the models; the weights are checked in any case.
        memory_share: Share of the free memory that the reference may take; above it, end to end is skipped.
        optimized_bytes: Largest model whose graph is also compared after the runtime's optimizer.
        provider, threads: Of the runtime.
        latency: Compare latency too.
        margin: Latency ratios inside 1 ± this are equal; the provider's when None (2 % on a CPU, 1 % on a device).
        seconds: Time to spend on latency, all processes together.
        processes: In how many processes latency is measured, one after the other.
    """

    inputs: Mapping[str, Array] = field(default_factory=dict)
    seed: int = 0
    draws: int = 3
    dtype: ir.DataType | None = None
    multiple: float = 4.0
    floor: float = 8.0
    raised_from: ir.Model | None = None
    truth: str = "fp32"
    taps: bool = False
    task: TaskData | None = None
    coverage: Coverage | None = None
    calibrated: bool = False
    beside_nearest: bool = False
    end_to_end: bool = True
    memory_share: float = 0.4
    optimized_bytes: int = 1 << 30
    provider: str = "cpu"
    threads: int = 0
    latency: bool = False
    margin: float | None = None
    seconds: float = 30.0
    processes: int = 4
