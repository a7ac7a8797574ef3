"""Latency verdicts on slowdowns of a known size: how often is 0 % called slower, and 5 % equal?

    python -m tests.benchmarks.latency_verdicts [--runs 30] [--seconds 0.8] [--no-real]

Simulated: a machine whose runs take log-normal times, drift, and are interrupted now and then, read through the same
blocks and the same test as a real one. Real: stacks of 100, 101, 102, 103 and 105 equal matrix products in ONNX Runtime
on the CPU, against 100 of them, and a copy of that as the noise floor. The margin is 2 %: at 0 and 1 % a pass is right
and a failure wrong, at 3 and 5 % the other way round; 2 % lies on the border: there a pass may come in one of forty.
"""

from __future__ import annotations

import argparse
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir

from loracc.proof.ratio import estimate, rule
from loracc.timing.job import TimedModel, time_models
from loracc.timing.paired import Blocks, measure

SLOWDOWNS = (0, 1, 2, 3, 5)
MARGIN = 0.02
WIDTH, ROWS, PRODUCTS = 128, 16, 100
#: (what, noise of a unit, drift of a unit, share of interrupted units, spread between processes)
MACHINES = {
    "quiet": (0.01, 0.0005, 0.01, 0.0005),
    "drifting": (0.01, 0.005, 0.02, 0.001),
    "busy": (0.05, 0.005, 0.10, 0.003),
}


def simulated(machine: str, seed: int, seconds: float, processes: int = 4) -> list[Blocks]:
    """What the processes of one run measure: the slowed models, and the copy."""
    noise, drift, interrupted, spread = MACHINES[machine]
    rng = np.random.default_rng(seed)
    found = []
    for process in range(processes):
        level = [0.0]

        def model(factor: float, level: list[float] = level) -> Callable[[int], float]:
            offset = float(np.exp(rng.normal(0.0, spread)))

            def call(repeats: int) -> float:
                level[0] += rng.normal(0.0, drift)
                spike = rng.exponential(0.5) if rng.random() < interrupted else 0.0
                usual = 0.003 * factor * offset * np.exp(level[0] + rng.normal(0.0, noise))
                return float(repeats * usual * (1 + spike))

            return call

        calls = [model(1.0), *(model(1 + percent / 100) for percent in SLOWDOWNS), model(1.0)]
        found.append(measure(calls, seconds / processes, reverse=process % 2 == 1))
    return found


def stack(path: Path, count: int) -> Path:
    """``count`` products of a [batch, 128] input with one weight."""
    x = ir.Value(name="x", shape=ir.Shape([ROWS, WIDTH]), type=ir.TensorType(ir.DataType.FLOAT))
    array = (np.random.default_rng(0).standard_normal((WIDTH, WIDTH)) / np.sqrt(WIDTH)).astype(np.float32)
    weight = ir.Value(name="w", shape=ir.Shape(array.shape), type=ir.TensorType(ir.DataType.FLOAT))
    weight.const_value = ir.tensor(array, name="w")
    nodes: list[ir.Node] = []
    for _ in range(count):
        nodes.append(ir.node("MatMul", [nodes[-1].outputs[0] if nodes else x, weight]))
    last = nodes[-1].outputs[0]
    last.name, last.dtype, last.shape = "y", ir.DataType.FLOAT, ir.Shape([ROWS, WIDTH])
    graph = ir.Graph([x], [last], nodes=nodes, initializers=[weight], opset_imports={"": 18}, name="stack")
    ir.save(ir.Model(graph, ir_version=10), path)
    return path


def real(models: list[TimedModel], seconds: float) -> list[Blocks]:
    """One run on this machine, two processes."""
    feeds = {"x": np.random.default_rng(1).standard_normal((ROWS, WIDTH)).astype(np.float32)}
    found, _ = time_models(models, [feeds] * len(models), seconds=seconds * len(SLOWDOWNS), processes=2, threads=1)
    return found


def table(what: str, runs: list[list[Blocks]]) -> None:
    """Verdicts by slowdown, over all runs."""
    for index, percent in enumerate(SLOWDOWNS):
        verdicts: Counter[str] = Counter()
        ratios = []
        for seed, processes in enumerate(runs):
            columns = list(zip(*processes, strict=True))
            ratio, noise = estimate(columns[index], seed=seed), estimate(columns[-1], seed=seed)
            verdicts[rule(ratio, noise, MARGIN).verdict] += 1
            ratios.append(ratio.value)
        wrong = {0: "fail", 1: "fail", 3: "pass", 5: "pass"}.get(percent)
        told = f"wrong: {verdicts[wrong]}" if wrong else "on the border"
        shown = ", ".join(f"{verdicts[verdict]} {verdict}" for verdict in ("pass", "fail", "inconclusive"))
        print(f"{what:20} +{percent} %   {shown:42} {told:14} median ratio {np.median(ratios):.4f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--seconds", type=float, default=0.8, help="Of each real run and slowdown.")
    parser.add_argument("--no-real", action="store_true")
    arguments = parser.parse_args()
    for machine in MACHINES:
        table(f"simulated, {machine}", [simulated(machine, seed, 30.0) for seed in range(arguments.runs)])
    if arguments.no_real:
        return
    with tempfile.TemporaryDirectory() as folder:
        paths = [stack(Path(folder) / f"{percent}.onnx", PRODUCTS + percent) for percent in SLOWDOWNS]
        models = [TimedModel(str(path)) for path in (paths[0], *paths, paths[0])]
        table("real", [real(models, arguments.seconds) for _ in range(arguments.runs)])


if __name__ == "__main__":
    main()
