"""TorchScript files through torch's older exporter: names survive, equal and tied parameters come apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from loracc.errors import InputError, UnsupportedError
from loracc.model import LoadOptions
from loracc.sources.torchscript import load_torchscript

pytestmark = [
    # Said by torch itself when these files are made here.
    pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning"),
]
OPTIONS = LoadOptions(
    inputs=("x:float32[2,5,4]", "ids:int64[2,5]"), dynamic=("x:0=batch", "x:1=n", "ids:0=batch", "ids:1=n")
)


class Net(torch.nn.Module):
    """Two equal biases (zeros), a tied pair, a convolution with its norm."""

    def __init__(self) -> None:
        super().__init__()
        self.body = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.ReLU(), torch.nn.Linear(6, 3))
        self.embed = torch.nn.Embedding(9, 3)
        self.head = torch.nn.Linear(3, 9, bias=False)
        self.head.weight = self.embed.weight
        self.conv = torch.nn.Conv1d(3, 3, 1)
        self.norm = torch.nn.BatchNorm1d(3)
        torch.nn.init.zeros_(self.body[2].bias)  # type: ignore[arg-type]
        torch.nn.init.zeros_(self.conv.bias)  # type: ignore[arg-type]

    def forward(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        y = self.body(x) + self.embed(ids)
        return self.head(self.norm(self.conv(y.transpose(1, 2))).transpose(1, 2))


@pytest.fixture(scope="module")
def net() -> torch.nn.Module:
    torch.manual_seed(0)
    module = Net()
    module.train(False)
    return module


def samples() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(2, 5, 4), torch.randint(0, 9, (2, 5))


def saved(net: torch.nn.Module, how: str, path: Path) -> Path:
    trace: Any = torch.jit.trace
    script = trace(net, samples()) if how == "trace" else torch.jit.script(net)
    torch.jit.save(torch.jit.freeze(script) if how == "frozen" else script, path)
    return path


def run(model: ir.Model, inputs: dict[str, np.ndarray], folder: Path) -> np.ndarray:
    ir.save(model, folder / "model.onnx")
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    [output] = session.run(None, inputs)
    return output


@pytest.mark.parametrize("how", ["trace", "script"])
def test_every_parameter_keeps_its_name(net: torch.nn.Module, how: str, tmp_path: Path) -> None:
    base = load_torchscript(saved(net, how, tmp_path / "m.pt"), OPTIONS)
    assert base.format == "torchscript" and list(base.sample_inputs) == ["x", "ids"]
    sites = base.sites.by_name()
    parameters = dict(net.named_parameters(remove_duplicate=False))
    assert parameters.keys() <= sites.keys()
    for name, parameter in parameters.items():
        [site] = sites[name]
        tensor = base.ir.graph.initializers[site.initializer].const_value
        assert tensor is not None
        assert np.array_equal(site.layout.view(tensor.numpy()), parameter.detach().numpy()), name
    assert "Identity" not in {node.op_type for node in base.ir.graph}
    inputs = {"x": np.ones((3, 7, 4), np.float32), "ids": np.full((3, 7), 4)}
    with torch.no_grad():
        expected = net(*map(torch.from_numpy, inputs.values())).numpy()
    np.testing.assert_allclose(run(base.ir, inputs, tmp_path), expected, rtol=1e-5, atol=1e-6)


def test_a_frozen_module_is_noted(net: torch.nn.Module, tmp_path: Path) -> None:
    base = load_torchscript(saved(net, "frozen", tmp_path / "m.pt"), OPTIONS)
    assert "lost their names" in base.notes[0]


@pytest.mark.parametrize(
    ("inputs", "error", "text"),
    [
        ((), InputError, "needs samples of x, ids; forward takes x, ids"),
        (("x:float32[2,5,4]",), InputError, "needs samples of ids"),
        (("x:float32[2,5,4]", "ids:int64[2,5]", "y:int64[2]"), InputError, "has no input 'y'"),
        (("x:float32[2,5,9]", "ids:int64[2,5]"), UnsupportedError, "cannot write this TorchScript module"),
    ],
)
def test_inputs_that_do_not_fit(
    net: torch.nn.Module, tmp_path: Path, inputs: tuple[str, ...], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        load_torchscript(saved(net, "script", tmp_path / "m.pt"), LoadOptions(inputs=inputs))


def test_a_truncated_file_is_refused(net: torch.nn.Module, tmp_path: Path) -> None:
    path = saved(net, "script", tmp_path / "m.pt")
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(InputError, match="cannot read it as TorchScript"):
        load_torchscript(path, OPTIONS)


def test_nothing_is_printed(net: torch.nn.Module, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = saved(net, "trace", tmp_path / "m.pt")
    capfd.readouterr()
    load_torchscript(path, OPTIONS)
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")
