"""Pickled modules only when vouched for; state dicts with a factory, and without one as weights."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from loracc.errors import InputError, UnsupportedError
from loracc.model import LoadOptions
from loracc.sources.pickled import load_pickled
from tests.models import build, text_inputs, torch_inputs

INPUTS = LoadOptions(inputs=("x:float32[2,3,4]",), dynamic=("x:0=batch",))
TRUSTED = LoadOptions(allow_pickle=True, inputs=INPUTS.inputs, dynamic=INPUTS.dynamic)


class Net(torch.nn.Module):
    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.first = torch.nn.Linear(4, width)
        self.drop = torch.nn.Dropout(0.5)
        self.second = torch.nn.Linear(width, 3, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.drop(torch.relu(self.first(x))))


def wide() -> torch.nn.Module:
    """A factory for another module than the one that was saved."""
    return Net(8)


def nothing() -> None:
    """A factory that makes no module."""


@pytest.fixture(scope="module")
def net() -> torch.nn.Module:
    torch.manual_seed(0)
    return Net()  # in training mode, as people save them


@pytest.fixture
def module_file(net: torch.nn.Module, tmp_path: Path) -> Path:
    torch.save(net, tmp_path / "net.pt")
    return tmp_path / "net.pt"


@pytest.fixture
def state_file(net: torch.nn.Module, tmp_path: Path) -> Path:
    torch.save(net.state_dict(), tmp_path / "state.pt")
    return tmp_path / "state.pt"


def run(model: ir.Model, inputs: dict[str, np.ndarray], folder: Path) -> list[np.ndarray]:
    ir.save(model, folder / "model.onnx")
    return onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"]).run(None, inputs)


def assert_is_net(model: ir.Model, net: torch.nn.Module, folder: Path) -> None:
    x = np.random.default_rng(0).standard_normal((5, 3, 4)).astype(np.float32)
    copy = Net()
    copy.load_state_dict(net.state_dict())
    copy.train(False)
    with torch.no_grad():
        expected = copy(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(run(model, {"x": x}, folder)[0], expected, rtol=1e-5, atol=1e-6)


def test_a_module_is_refused_without_the_flag(module_file: Path) -> None:
    with pytest.raises(
        InputError, match=r"pickled module; reading it runs(.|\n)*--allow-pickle(.|\n)*torch\.export\.save"
    ):
        load_pickled(module_file, INPUTS)


class Bomb:
    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.proof),)


def test_nothing_runs_without_the_flag(tmp_path: Path) -> None:
    for zipped in (True, False):
        torch.save({"a": Bomb(tmp_path / "ran")}, tmp_path / "bomb.pt", _use_new_zipfile_serialization=zipped)
        with pytest.raises(InputError, match="pickled module"):
            load_pickled(tmp_path / "bomb.pt", INPUTS)
    assert not (tmp_path / "ran").exists()


def test_a_module_with_the_flag_is_put_into_eval_mode(module_file: Path, net: torch.nn.Module, tmp_path: Path) -> None:
    base = load_pickled(module_file, TRUSTED)
    assert base.format == "module" and list(base.sites.by_name()) == ["first.weight", "first.bias", "second.weight"]
    assert str(base.ir.graph.inputs[0].shape) == "[batch,3,4]"
    assert_is_net(base.ir, net, tmp_path)


def test_a_transformers_module_knows_its_inputs(tmp_path: Path) -> None:
    model = build("bert")
    torch.save(model, tmp_path / "bert.pt")
    base = load_pickled(tmp_path / "bert.pt", LoadOptions(allow_pickle=True))
    inputs = text_inputs(3, 5)
    with torch.no_grad():
        expected = model(**torch_inputs(inputs)).last_hidden_state.numpy()
    np.testing.assert_allclose(run(base.ir, inputs, tmp_path)[0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("inputs", "error", "text"),
    [
        ((), InputError, r"Net needs samples of x to be traced; forward takes x\.\nFor example: --input x:"),
        (("y:float32[2,4]",), InputError, "has no input 'y'"),
        (("x:float32[2,5]",), UnsupportedError, "cannot trace Net"),
    ],
)
def test_inputs_that_do_not_fit(module_file: Path, inputs: tuple[str, ...], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        load_pickled(module_file, LoadOptions(allow_pickle=True, inputs=inputs))


def test_a_dynamic_axis_that_is_not_there(module_file: Path) -> None:
    options = LoadOptions(allow_pickle=True, inputs=INPUTS.inputs, dynamic=("x:7=batch",))
    with pytest.raises(InputError, match="--dynamic x:7"):
        load_pickled(module_file, options)


def test_a_class_that_is_not_here(module_file: Path) -> None:
    data = module_file.read_bytes()
    assert b"tests.sources.test_pickled" in data
    module_file.write_bytes(data.replace(b"tests.sources.test_pickled", b"tests.sources.test_pickles"))
    with pytest.raises(InputError, match=r"needs code that is not here.*test_pickles"):
        load_pickled(module_file, TRUSTED)


def test_a_state_dict_in_its_factorys_module(state_file: Path, net: torch.nn.Module, tmp_path: Path) -> None:
    options = LoadOptions(factory=f"{__name__}:Net", inputs=INPUTS.inputs, dynamic=INPUTS.dynamic)
    base = load_pickled(state_file, options)
    assert base.format == "state_dict" and base.traced
    assert_is_net(base.ir, net, tmp_path)


def test_a_state_dict_without_a_factory_is_its_weights(state_file: Path, net: torch.nn.Module, tmp_path: Path) -> None:
    base = load_pickled(state_file, LoadOptions())
    assert not base.traced and "--factory" in base.notes[0]
    assert list(base.ir.graph.initializers) == list(net.state_dict())
    torch.save({"epoch": 3, "state_dict": net.state_dict()}, tmp_path / "training.pt")
    nested = load_pickled(tmp_path / "training.pt", LoadOptions(graph=False))
    assert list(nested.ir.graph.initializers) == list(net.state_dict()) and nested.notes == ()


@pytest.mark.parametrize(
    ("factory", "text"),
    [
        ("wide", r"does not fit the module of.*size mismatch for first\.weight"),
        ("nothing", "returned a NoneType"),
        ("absent", "cannot be imported"),
    ],
)
def test_factories_that_do_not_fit(state_file: Path, factory: str, text: str) -> None:
    with pytest.raises(InputError, match=f"(?s){text}"):
        load_pickled(state_file, LoadOptions(factory=f"{__name__}:{factory}", inputs=INPUTS.inputs))


def test_missing_and_unexpected_names_are_listed(net: torch.nn.Module, tmp_path: Path) -> None:
    state = dict(net.state_dict())
    state["third.weight"] = state.pop("second.weight")
    torch.save(state, tmp_path / "s.pt")
    options = LoadOptions(factory=f"{__name__}:Net", inputs=INPUTS.inputs)
    with pytest.raises(InputError, match=r"missing second\.weight, unexpected third\.weight"):
        load_pickled(tmp_path / "s.pt", options)
    with pytest.raises(InputError, match=r"expected package\.module:function"):
        load_pickled(tmp_path / "s.pt", LoadOptions(factory="nowhere"))


@pytest.mark.parametrize("zipped", [True, False])
def test_damaged_files_and_other_things(tmp_path: Path, zipped: bool, net: torch.nn.Module) -> None:
    path = tmp_path / "m.pt"
    torch.save(net.state_dict(), path, _use_new_zipfile_serialization=zipped)
    path.write_bytes(path.read_bytes()[:-400])
    with pytest.raises(InputError, match="cannot read it"):
        load_pickled(path, LoadOptions())
    torch.save([1, 2], path)
    with pytest.raises(InputError, match="holds a list"):
        load_pickled(path, LoadOptions())
