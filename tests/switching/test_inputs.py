"""``attach --as inputs``: against PEFT's unmerged forward, the base's own bits, and the graph that was asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

import loracc
from loracc.errors import BindingError, InputError, UnsupportedError
from tests import models
from tests.graphs import op_counts
from tests.switching.peft_adapters import adapter, forward, session

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
FAMILIES = ("gpt2", "llama", "bert", "vit")


def activated(path: Path, name: str) -> tuple[Any, Any]:
    """(run options with the adapter on, the adapter: it must stay alive)."""
    import onnxruntime

    lora, options = onnxruntime.LoraAdapter(), onnxruntime.RunOptions()
    lora.Load(str(path.with_name(f"{name}.onnx_adapter")))
    options.add_active_adapter(lora)
    return options, lora


def inputs_of(family: str, running: Any) -> dict[str, Any]:
    given = models.image_inputs(family) if models.FAMILIES[family].vision else models.text_inputs()
    return {value.name: given[value.name] for value in running.get_inputs()}


@pytest.mark.parametrize("family", FAMILIES)
def test_each_adapter_and_none(family: str, tmp_path: Path) -> None:
    base = models.save_base(models.build(family), tmp_path / "base")
    more: dict[str, Any] = {"target_modules": ["q_proj", "v_proj"]} if family == "vit" else {}
    other = {**more, "r": 2, "lora_alpha": 3}
    paths = {"a": adapter(family, tmp_path / "one", **more), "b": adapter(family, tmp_path / "two", seed=2, **other)}
    out = tmp_path / "out.onnx"
    given = [f"{name}={path}" for name, path in paths.items()]
    result = loracc.attach(base, given, out, sums=["both=a@2+b@0.5"])
    assert result.verification is not None and result.verification.verdict == "pass"
    assert set(result.files) == {"a.onnx_adapter", "b.onnx_adapter", "both.onnx_adapter", "out.onnx"}
    running = session(out)
    inputs = inputs_of(family, running)
    plain = running.run(None, inputs)[0]
    np.testing.assert_allclose(plain, forward(family, inputs, None), atol=3e-6)
    for name, path in paths.items():
        options, _alive = activated(out, name)
        expected = forward(family, inputs, path)
        assert np.abs(expected - plain).max() > 0.02
        np.testing.assert_allclose(running.run(None, inputs, options)[0], expected, atol=3e-6)


def test_fewest_nodes(tmp_path: Path) -> None:
    """q, k and v share one product with A, and so do gate and up; o and down have one each: 4 A's and 7 B's a layer."""
    base = models.save_base(models.build("llama"), tmp_path / "base")
    out = tmp_path / "out.onnx"
    loracc.fold(base, [adapter("llama", tmp_path / "one")], tmp_path / "folded.onnx", verify=False)
    loracc.attach(base, [tmp_path / "one"], out)
    more = op_counts(ir.load(out)) - op_counts(ir.load(tmp_path / "folded.onnx"))
    assert more == {"MatMul": 2 * (4 + 7), "Neg": 2 * 4, "Sub": 2 * 7}


def test_gemms_take_the_branch_as_their_c(tmp_path: Path) -> None:
    """GPT-2's Conv1D are Gemms: two nodes a site, and nothing between the product and what follows."""
    base = models.save_base(models.build("gpt2"), tmp_path / "base")
    given = adapter("gpt2", tmp_path / "one", target_modules=["c_attn", "c_fc"])
    loracc.fold(base, [given], tmp_path / "folded.onnx", verify=False)
    loracc.attach(base, [given], tmp_path / "out.onnx")
    more = op_counts(ir.load(tmp_path / "out.onnx")) - op_counts(ir.load(tmp_path / "folded.onnx"))
    assert more == {"Gemm": 2 * 2 * 2}


def test_other_kinds_are_pointed_elsewhere(tmp_path: Path) -> None:
    base = models.save_base(models.build("bert"), tmp_path / "base")
    given = adapter("bert", tmp_path / "dora", use_dora=True)
    with pytest.raises(UnsupportedError, match="dora at 11 site") as caught:
        loracc.attach(base, [given], tmp_path / "out.onnx")
    assert "--as variants" in str(caught.value)
    assert not list(tmp_path.glob("out*"))


def test_an_adapter_of_another_model(tmp_path: Path) -> None:
    base = models.save_base(models.build("bert"), tmp_path / "base")
    with pytest.raises(BindingError, match="fit no weight"):
        loracc.attach(base, [adapter("llama", tmp_path / "one")], tmp_path / "out.onnx")


def test_attached_twice_is_refused(tmp_path: Path) -> None:
    base = models.save_base(models.build("gpt2"), tmp_path / "base")
    given = adapter("gpt2", tmp_path / "one")
    loracc.attach(base, [given], tmp_path / "out.onnx", verify=False)
    with pytest.raises(UnsupportedError, match="already"):
        loracc.attach(tmp_path / "out.onnx", [given], tmp_path / "again.onnx")


@pytest.mark.parametrize("text", ["x", "x=", "x=c", "a=a", "x=a@0", "x=a@nan", "x=a+c@2"])
def test_sums_that_are_not(text: str, tmp_path: Path) -> None:
    base = models.save_base(models.build("gpt2"), tmp_path / "base")
    with pytest.raises(InputError, match="--sum"):
        loracc.attach(base, [f"a={adapter('gpt2', tmp_path / 'one')}"], tmp_path / "out.onnx", sums=[text])


def test_the_json_contract(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from loracc.cli import run

    base = models.save_base(models.build("gpt2"), tmp_path / "base")
    given = adapter("gpt2", tmp_path / "one")
    out = tmp_path / "out.onnx"
    assert run(["attach", str(base), str(given), "-o", str(out), "--json", "--dry-run"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert planned["dry_run"] and not out.exists()
    assert run(["attach", str(base), str(given), "-o", str(out), "--json"]) == 0
    body = json.loads(capsys.readouterr().out)
    assert set(body["files"]) == {"one.onnx_adapter", "out.onnx"} == set(planned["files"])
    assert body["unmatched"] == [] and body["verification"]["verdict"] == "pass"
    assert body["verification"]["off"]["verdict"] == "pass"
    row = body["sites"][0]
    assert (row["kind"], row["rank"], row["scale"], row["survived"]) == ("lora", 4, 2.0, 1.0)
    assert run(["attach", str(base), str(given), "-o", str(out)]) == 2  # it exists


def test_same_bytes(tmp_path: Path) -> None:
    base = models.save_base(models.build("gpt2"), tmp_path / "base")
    given = adapter("gpt2", tmp_path / "one")
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
        loracc.attach(base, [given], tmp_path / name / "out.onnx", verify=False)
    for file in ("out.onnx", "one.onnx_adapter"):
        assert (tmp_path / "x" / file).read_bytes() == (tmp_path / "y" / file).read_bytes()
