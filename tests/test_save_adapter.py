"""``fold --save-adapter`` and what ``inspect`` says of LoRA inside a graph."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import peft
import pytest
import torch

from loracc.cli import run
from tests.graphs import Builder
from tests.lora_modules import CASES, export
from tests.models import FAMILIES, adapted, build, text_inputs, torch_inputs

# PEFT and transformers about each other.
pytestmark = pytest.mark.filterwarnings("ignore")


def save_program(module: torch.nn.Module, inputs: tuple[Any, ...], path: Path) -> Path:
    with torch.no_grad():
        torch.export.save(torch.export.export(module, inputs, strict=False), path)
    return path


def test_peft_loads_what_was_saved_and_computes_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """GPT-2: Conv1D layers and the tied embedding; the base has no adapter to be told by."""
    feeds = torch_inputs(text_inputs())
    wrapped = adapted(build("gpt2"), **FAMILIES["gpt2"].lora)
    module = wrapped.base_model.model
    module.config.use_cache = False
    traced = save_program(module, (feeds["input_ids"],), tmp_path / "lora.pt2")
    out, saved = tmp_path / "out.onnx", tmp_path / "saved"
    capsys.readouterr()
    assert run(["fold", str(traced), "-o", str(out), "--save-adapter", str(saved), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["saved_adapter"] == str(saved)
    again = peft.PeftModel.from_pretrained(build("gpt2"), str(saved)).eval()
    with torch.no_grad():
        want = wrapped(feeds["input_ids"]).logits.numpy()
        got = again(feeds["input_ids"]).logits.numpy()
        plain = build("gpt2")(feeds["input_ids"]).logits.numpy()
    scale = np.abs(want).max()
    assert np.abs(got - want).max() < 2e-6 * scale < 1e-3 * np.abs(plain - want).max()
    assert run(["inspect", str(saved), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["entries"]


def test_the_saved_adapter_folds_into_the_base_like_the_graph(tmp_path: Path) -> None:
    case = CASES["peft dora"]
    traced = save_program(case.adapted(), case.inputs(), tmp_path / "lora.pt2")
    base = save_program(case.plain(), case.inputs(), tmp_path / "base.pt2")
    saved, one, two = (tmp_path / name for name in ("saved", "one.onnx", "two.onnx"))
    assert run(["fold", str(traced), "-o", str(one), "--save-adapter", str(saved), "--quiet"]) == 0
    assert run(["fold", str(base), str(saved), "-o", str(two), "--quiet"]) == 0
    feeds = [tensor.numpy() for tensor in case.inputs()]
    sessions = [onnxruntime.InferenceSession(path) for path in (one, two)]
    a, b = (s.run(None, dict(zip([i.name for i in s.get_inputs()], feeds, strict=True)))[0] for s in sessions)
    assert np.abs(a - b).max() < 1e-6 * np.abs(a).max()


def test_what_cannot_be_saved_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    b = Builder()
    x = b.input("x", ["n", 8])
    low = b("MatMul", b("MatMul", x, b.weight((8, 2))), b.weight((2, 6)))
    ir.save(b.model(b("Add", b("MatMul", x, b.weight((8, 6), "val_3")), low)), tmp_path / "m.onnx")
    out, saved, peft_folder = tmp_path / "out.onnx", tmp_path / "saved", tmp_path / "adapter"
    assert run(["fold", f"{tmp_path}/m.onnx", "-o", str(out), "--save-adapter", str(saved)]) == 2
    assert "'val_3'" in capsys.readouterr().err
    peft_folder.mkdir()
    assert run(["fold", f"{tmp_path}/m.onnx", str(peft_folder), "-o", str(out), "--save-adapter", str(saved)]) == 2
    assert "adapters were given" in capsys.readouterr().err
    assert run(["fold", f"{tmp_path}/m.onnx", "-o", str(out), "--save-adapter", str(tmp_path)]) == 2
    assert "would replace a part of" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "m.onnx"]
    assert run(["fold", f"{tmp_path}/m.onnx", "-o", str(out), "--quiet"]) == 0  # the fold itself needs no name


def test_inspect_lists_what_is_found_and_what_only_looks_like_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    b = Builder()
    x = b.input("x", ["n", 8])

    def low(value: ir.Value, act: str = "") -> ir.Value:
        inner = b("MatMul", value, b.weight((8, 2)))
        return b("MatMul", b(act, inner) if act else inner, b.weight((2, 6)))

    q = b("Add", b("MatMul", x, b.weight((8, 6), "q.weight")), b("Mul", low(x), b.number(0.5)))
    k = b("Add", b("MatMul", x, b.weight((8, 6), "k.weight")), low(x, "Relu"))
    ir.save(b.model(q, k), tmp_path / "m.onnx")
    before = (tmp_path / "m.onnx").read_bytes()
    assert run(["inspect", str(tmp_path / "m.onnx"), "--json"]) == 0
    lora = json.loads(capsys.readouterr().out)["lora"]
    [found], [like] = lora["found"], lora["lookalikes"]
    assert (found["name"], found["kind"], found["rank"], found["scale"]) == ("q.weight", "lora", 2, 0.5)
    assert like["where"].startswith("Add ") and "Relu" in like["reason"]
    assert run(["inspect", str(tmp_path / "m.onnx")]) == 0
    printed = capsys.readouterr().out
    assert "1 delta at 1 weight" in printed and "looks like LoRA and is not: Add" in printed
    assert (tmp_path / "m.onnx").read_bytes() == before


@pytest.mark.parametrize("exporter", ["dynamo", "legacy"])
def test_conv1d_round_trip_by_entries(exporter: str, tmp_path: Path) -> None:
    """Linear layers that store [in, out]: the factors are written as PEFT writes them."""
    case = CASES["peft conv1d"]
    ir.save(export(case.adapted(), case.inputs(), exporter), tmp_path / "m.onnx")
    assert run(["fold", f"{tmp_path}/m.onnx", "-o", f"{tmp_path}/o.onnx", "--save-adapter", f"{tmp_path}/s", "-q"]) == 0
    again = peft.PeftModel.from_pretrained(case.plain(), str(tmp_path / "s")).eval()
    with torch.no_grad():
        want, got = (module(*case.inputs()).numpy() for module in (case.adapted(), again))
    assert np.abs(want - got).max() <= 2e-6 * np.abs(want).max()
