"""Timing verdicts: on simulated times with known ratios, and on real models."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from click.testing import CliRunner

from loracc.bench_grid import BenchOptions, bench_models
from loracc.cli import main
from loracc.errors import InputError
from loracc.proof.ratio import Ratio, estimate, rule
from loracc.proof.verification import VerifyOptions, verify
from tests.verifying import bind, build, folded, write


def simulated(slowdown: float, noise: float, pairs: int, seed: int, *, processes: int = 4) -> tuple[Ratio, Ratio]:
    """(output/base, base/base) of log-normal times that share a slow drift, in several processes."""
    rng = np.random.default_rng(seed)
    output, again = [], []
    for _ in range(processes):
        drift = np.exp(np.cumsum(rng.standard_normal(pairs // processes)) * 0.01)
        a, b, c, d = (drift * np.exp(noise * rng.standard_normal(pairs // processes)) for _ in range(4))
        output.append(np.stack([a, b * (1 + slowdown)], axis=1))
        again.append(np.stack([c, d], axis=1))
    return estimate(output, seed=seed), estimate(again, seed=seed)


@pytest.mark.parametrize(
    ("slowdown", "verdict"), [(0.0, "pass"), (0.01, "pass"), (0.05, "fail"), (0.1, "fail"), (-0.1, "inconclusive")]
)
def test_simulated_slowdowns(slowdown: float, verdict: str) -> None:
    rulings = [rule(*simulated(slowdown, 0.02, 600, seed), 0.02) for seed in range(20)]
    assert sum(ruling.verdict == verdict for ruling in rulings) >= 18
    wrong = "fail" if verdict == "pass" else "pass"
    assert not any(ruling.verdict == wrong for ruling in rulings)


def test_a_slowdown_of_the_margin_never_passes_often() -> None:
    """At 1 + margin the test may pass in one of forty runs (95 %, one side)."""
    passed = sum(rule(*simulated(0.02, 0.02, 600, seed), 0.02).verdict == "pass" for seed in range(40))
    assert passed <= 4


def test_too_noisy_says_how_much_longer() -> None:
    ruling = rule(*simulated(0.0, 0.1, 30, 1), 0.02)
    assert ruling.verdict == "inconclusive"
    assert ruling.more_pairs is not None and ruling.more_pairs > 30
    assert f"{ruling.more_pairs:,} more pairs" in ruling.reason
    assert rule(*simulated(0.0, 0.1, 40 + 4 * ruling.more_pairs, 1), 0.02).verdict == "pass"


def test_a_spread_between_processes_is_in_the_interval() -> None:
    """Four processes that disagree by a percent: many pairs in each do not make that certain."""
    apart = [np.stack([np.ones(500), np.full(500, ratio)], axis=1) for ratio in (0.99, 1.0, 1.0, 1.01)]
    alike = [np.stack([np.ones(500), np.full(500, 1.0)], axis=1)] * 4
    assert estimate(apart).distance > 0.004 and estimate(alike).distance == 0.0
    found = estimate(apart)
    assert found.low <= found.low90 <= found.value <= found.high90 <= found.high


def test_noise_between_two_copies_of_the_base_is_never_a_pass() -> None:
    quiet, noisy = Ratio(1.0, 0.999, 1.001, 100), Ratio(1.0, 0.95, 1.05, 100)
    assert rule(quiet, noisy, 0.02).verdict == "inconclusive"
    assert rule(quiet, quiet, 0.02).verdict == "pass"
    assert rule(Ratio(1.04, 1.03, 1.05, 100), noisy, 0.02).verdict == "inconclusive"
    assert rule(quiet, quiet, 0.0005).would_pass_at == pytest.approx(0.001)


def heavier(tmp_path: Path) -> tuple[Path, Path]:
    """A stack of products, and one with twice as many."""
    paths = []
    rng = np.random.default_rng(0)
    for count in (4, 8):
        x = ir.Value(name="x", shape=ir.Shape(["batch", 256]), type=ir.TensorType(ir.DataType.FLOAT))
        array = (rng.standard_normal((256, 256)) / 16).astype(np.float32)
        kind = ir.TensorType(ir.DataType.FLOAT)
        w = ir.Value(name="w", shape=ir.Shape([256, 256]), type=kind, const_value=ir.tensor(array, name="w"))
        nodes: list[ir.Node] = []
        for _ in range(count):
            nodes.append(ir.node("MatMul", [nodes[-1].outputs[0] if nodes else x, w]))
        nodes[-1].outputs[0].name, nodes[-1].outputs[0].dtype = "y", ir.DataType.FLOAT
        nodes[-1].outputs[0].shape = ir.Shape(["batch", 256])
        graph = ir.Graph([x], nodes[-1].outputs, nodes=nodes, initializers=[w], opset_imports={"": 18}, name="g")
        paths.append(tmp_path / f"{count}.onnx")
        ir.save(ir.Model(graph, ir_version=10), paths[-1])
    return paths[0], paths[1]


def test_a_model_that_does_twice_the_work_is_slower(tmp_path: Path) -> None:
    light, heavy = heavier(tmp_path)
    options = BenchOptions(batches=(64,), threads=1, seconds=1.0, processes=2, margin=0.1)
    rows = bench_models([light, heavy, light], options)
    assert [row["model"] for row in rows] == [str(light), str(heavy), str(light)]
    # On a busy machine the verdict may be "too noisy"; it is never the wrong one.
    assert rows[1]["verdict"] in ("fail", "inconclusive") and rows[1]["ratio"] > 1.2 and rows[1]["reason"]
    assert rows[2]["verdict"] in ("pass", "inconclusive")
    assert {"model", "median_ms", "ratio", "interval", "noise_floor", "margin", "verdict"} <= set(rows[0])


def test_a_grid_as_table_csv_and_plot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    light, heavy = heavier(tmp_path)
    arguments = ["bench", str(light), str(heavy), "--batch", "1,4", "--sequence", "1", "--threads", "1", "--json"]
    more = ["--seconds", "0.2", "--processes", "1", "--csv", "g.csv", "--plot", "g.svg"]
    runner = CliRunner()
    monkeypatch.chdir(tmp_path)
    done = runner.invoke(main, [*arguments, *more])
    assert done.exit_code == 0, done.output
    rows = json.loads(done.stdout)
    assert [(row["batch"], row["sequence"]) for row in rows] == [(1, 1), (1, 1), (4, 1), (4, 1)]
    table = list(csv.DictReader(Path("g.csv").read_text().splitlines()))
    assert [float(line["ratio"]) for line in table] == [row["ratio"] for row in rows]
    assert "<svg" in Path("g.svg").read_text() and "latency relative" not in done.stderr
    refused = runner.invoke(main, [*arguments, "--plot", "g.pdf"])
    assert isinstance(refused.exception, InputError) and ".svg or .png" in str(refused.exception)
    refused = runner.invoke(main, ["bench", str(light), str(heavy), "--batch", "0"])
    assert refused.exit_code == 2 and "expected sizes" in refused.output


def test_models_with_other_inputs_are_refused(tmp_path: Path) -> None:
    light, _ = heavier(tmp_path)
    base = build("attention")
    other = write(base, base.ir, tmp_path / "other.onnx").path
    with pytest.raises(InputError, match="input_ids"):
        bench_models([light, other])
    with pytest.raises(InputError, match=r"no such file"):
        bench_models([light, tmp_path / "absent.onnx"])
    with pytest.raises(InputError, match="none of the models has switchable sites"):
        bench_models([light, light], BenchOptions(adapter_file=tmp_path / "a.onnx_adapter"))


def test_verify_times_only_when_asked(tmp_path: Path) -> None:
    base = build("mlp")
    base = write(base, base.ir, tmp_path / "base.onnx")
    bindings = bind(base)
    out = write(base, folded(base, bindings), tmp_path / "out.onnx")
    options = VerifyOptions(threads=1, end_to_end=False)
    assert verify(base, out, bindings, options).latency.verdict == "skipped"
    found = verify(base, out, bindings, replace(options, latency=True, seconds=0.5, processes=2)).latency
    assert found.verdict in ("pass", "inconclusive", "fail")
    body = found.to_json()
    assert body["ratio"] is not None and len(body["interval"]) == 2 and body["margin"] == 0.02
    assert body["interval"][0] <= body["ratio"] <= body["interval"][1]
    assert found.pairs >= 10 and found.processes == 2 and "onnxruntime" in found.runner
