"""``loracc.runtime.load_adapter``: what fits runs, what does not is refused before the runtime sees it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import loracc
from loracc.errors import BindingError, InputError
from loracc.formats.onnx_adapter_file import read_parameters, read_versions, write_parameters
from loracc.runtime import load_adapter, run_options
from tests import models
from tests.switching.peft_adapters import adapter, forward, session

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("attached")
    for name, seed in (("base", 0), ("other", 7)):
        models.save_base(models.build("gpt2", seed=seed), made / name)
        (made / f"on_{name}").mkdir()
        given = [f"a={adapter('gpt2', made / 'a')}", f"b={adapter('gpt2', made / 'b', seed=2)}"]
        loracc.attach(made / name, given, made / f"on_{name}" / "out.onnx", verify=False)
    return made / "on_base"


def test_a_loaded_adapter_runs(folder: Path) -> None:
    running = session(folder / "out.onnx")
    inputs = models.text_inputs()
    plain = running.run(None, inputs)[0]
    for name in ("a", "b", "a"):
        loaded = load_adapter(running, folder / f"{name}.onnx_adapter")
        assert loaded.name == name
        found = running.run(None, inputs, run_options(loaded))[0]
        np.testing.assert_allclose(found, forward("gpt2", inputs, folder.parent / name), atol=3e-6)
        assert running.run(None, inputs)[0].tobytes() == plain.tobytes()


def test_an_adapter_of_another_base(folder: Path) -> None:
    running = session(folder / "out.onnx")
    with pytest.raises(InputError, match="made for another graph"):
        load_adapter(running, folder.parent / "on_other" / "a.onnx_adapter")


def test_an_adapter_for_no_graph(folder: Path, tmp_path: Path) -> None:
    write_parameters(tmp_path / "again.onnx_adapter", read_parameters(folder / "a.onnx_adapter"))
    with pytest.raises(InputError, match="no particular graph"):
        load_adapter(session(folder / "out.onnx"), tmp_path / "again.onnx_adapter")


def test_a_changed_file(folder: Path, tmp_path: Path) -> None:
    parameters = read_parameters(folder / "a.onnx_adapter")
    name = next(iter(parameters))
    changed = {**parameters, name: parameters[name] * np.float32(2)}
    write_parameters(tmp_path / "a.onnx_adapter", changed, versions=read_versions(folder / "a.onnx_adapter"))
    running = session(folder / "out.onnx")
    with pytest.raises(InputError, match="not those it was written with"):
        load_adapter(running, tmp_path / "a.onnx_adapter")
    (tmp_path / "b.onnx_adapter").write_bytes((folder / "b.onnx_adapter").read_bytes()[:200])
    with pytest.raises(InputError, match="cannot read"):
        load_adapter(running, tmp_path / "b.onnx_adapter")
    with pytest.raises(InputError, match="no such file"):
        load_adapter(running, tmp_path / "c.onnx_adapter")


def test_two_active_adapters_are_refused(folder: Path) -> None:
    running = session(folder / "out.onnx")
    a, b = (load_adapter(running, folder / f"{name}.onnx_adapter") for name in "ab")
    with pytest.raises(InputError, match="set the same parameters"):
        run_options(a, b)


def test_a_session_without_inputs(folder: Path, tmp_path: Path) -> None:
    base = folder.parent / "base"
    loracc.fold(base, [folder.parent / "a"], tmp_path / "folded.onnx", verify=False)
    with pytest.raises(InputError, match="no graph with switchable deltas"):
        load_adapter(session(tmp_path / "folded.onnx"), folder / "a.onnx_adapter")


def test_one_more_adapter_for_the_graph(folder: Path, tmp_path: Path) -> None:
    third = adapter("gpt2", tmp_path / "third", seed=3, r=7, target_modules=["c_attn"])
    result = loracc.attach(folder / "out.onnx", [third], tmp_path / "third.onnx_adapter")
    assert result.verification is not None and result.verification.verdict == "pass"
    running, inputs = session(folder / "out.onnx"), models.text_inputs()
    loaded = load_adapter(running, tmp_path / "third.onnx_adapter")
    found = running.run(None, inputs, run_options(loaded))[0]
    np.testing.assert_allclose(found, forward("gpt2", inputs, third), atol=3e-6)
    with pytest.raises(BindingError, match="no branch in the graph"):
        wpe = adapter("gpt2", tmp_path / "wpe", target_modules=["wpe"])
        loracc.attach(folder / "out.onnx", [wpe], tmp_path / "wpe.onnx_adapter")
