"""PyTorch on ``.pt2`` programs, on the CPU; the device's runners say what they lack."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from loracc.cli import run
from loracc.devices import gpu_name
from loracc.model import LoadOptions
from loracc.runners.cuda import provider_options
from loracc.runners.runner import RUNNERS, OnnxRunner, RunError, open_runner
from loracc.sources import load_model

RTOL = 1e-5  # of float32 products of 8 terms


class Net(torch.nn.Module):
    """Keywords in, a mapping out, one of its outputs also in bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = torch.nn.Linear(8, 4)

    def forward(self, x: torch.Tensor, *, extra: torch.Tensor, flag: bool = True) -> dict[str, torch.Tensor]:
        y = self.fc(x) + (extra if flag else 0)
        return {"logits": y, "short": y.bfloat16()}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(
        Net().eval(),
        (torch.zeros(2, 8),),
        {"extra": torch.zeros(2, 4), "flag": True},
        dynamic_shapes={"x": {0: batch}, "extra": {0: batch}, "flag": None},
    )
    torch.export.save(program, tmp_path / "net.pt2")
    return tmp_path / "net.pt2"


def inputs(rows: int = 3) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "x": rng.standard_normal((rows, 8)).astype(np.float32),
        "extra": rng.standard_normal((rows, 4)).astype(np.float32),
    }


def test_it_computes_what_the_onnx_export_computes(saved: Path) -> None:
    runner = open_runner(saved, "torch-cpu", threads=1)
    graph = load_model(saved, LoadOptions()).ir
    expected, found = OnnxRunner(graph).run(inputs()), runner.run(inputs())
    assert list(found) == list(expected) == ["logits", "short"]
    np.testing.assert_allclose(found["logits"], expected["logits"], rtol=RTOL, atol=RTOL)
    assert found["short"].dtype == expected["short"].dtype
    np.testing.assert_allclose(
        found["short"].astype(np.float32), expected["short"].astype(np.float32), rtol=2**-8, atol=2**-8
    )
    assert runner.timed(inputs())(3) > 0
    assert runner.name.startswith("torch ") and runner.name.endswith(" cpu")


def test_refusals(saved: Path) -> None:
    runner = open_runner(saved, "torch-cpu")
    with pytest.raises(RunError, match="extra"):
        runner.run({"x": inputs()["x"]})
    with pytest.raises(RunError, match="does not run"):
        runner.run({**inputs(), "x": np.zeros((3, 9), np.float32)})
    with pytest.raises(RunError, match="onnx_adapter"):
        open_runner(saved, "torch-cpu", adapter=Path("a.onnx_adapter"))
    with pytest.raises(RunError, match="PyTorch runs"):
        open_runner(saved.with_suffix(".onnx"), "torch-cpu")


def test_bench_with_torch(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["bench", str(saved), str(saved), "--provider", "torch-cpu", "--seconds", "0.1", "--processes", "1"]
    assert run([*arguments, "--threads", "1", "--json"]) in (0, 1)
    rows = json.loads(capsys.readouterr().out)
    assert [row["runner"].split()[0] for row in rows] == ["torch", "torch"]


@pytest.mark.parametrize("provider", sorted(RUNNERS))
@pytest.mark.skipif(gpu_name() is not None, reason="there is a GPU")
def test_devices_say_what_they_lack(saved: Path, provider: str, capsys: pytest.CaptureFixture[str]) -> None:
    if provider in ("cpu", "torch-cpu"):
        return
    code = run(["bench", str(saved), str(saved), "--provider", provider, "--seconds", "0.1", "--processes", "1"])
    said = capsys.readouterr().err
    assert code == 2 and "Traceback" not in said
    assert "GPU" in said or "no manifest" in said


def test_float32_on_a_device_is_float32() -> None:
    told = provider_options(stream=7, graph=True)
    assert told == {"use_tf32": "0", "enable_cuda_graph": "1", "user_compute_stream": "7"}


@pytest.mark.gpu
@pytest.mark.parametrize("provider", ["torch-cuda"])
def test_the_device_computes_what_the_cpu_computes(saved: Path, provider: str) -> None:
    expected, found = (open_runner(saved, name).run(inputs()) for name in ("torch-cpu", provider))
    np.testing.assert_allclose(found["logits"], expected["logits"], rtol=RTOL, atol=RTOL)
