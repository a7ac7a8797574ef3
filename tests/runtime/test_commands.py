"""``loracc attach --as variants`` on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from loracc.cli import run
from loracc.runtime import Deployment
from tests.runtime.deployments import adapter, base, feed, outputs


def test_attach_then_add(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, out = base(tmp_path), tmp_path / "out.onnx"
    a, b = (adapter(tmp_path / name, seed=seed) for seed, name in ((1, "a"), (2, "b")))
    call = ["attach", str(model), str(a), f"half={b}@0.5", "--as", "variants", "-o", str(out), "--json"]
    assert run([*call, "--dry-run"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert planned["dry_run"] and not out.exists()
    assert run(call) == 0
    result = json.loads(capsys.readouterr().out)
    assert sorted(result["files"]) == [
        "out.onnx",
        "out.onnx.data",
        "out.onnx.variants",
        "out.onnx.variants.json",
    ]
    assert sorted(planned["files"]) == sorted(result["files"])
    assert result["mode"] == "variants" and result["verification"]["verdict"] == "pass"
    assert [(row["name"], row["sites"]) for row in result["adapters"]] == [("a", 2), ("half", 2)]
    assert {row["adapter"] for row in result["sites"]} == {"a", "half"} and len(result["sites"]) == 4

    assert run(["attach", str(out), f"b={b}", "--as", "variants", "-o", str(out)]) == 0
    assert run(["attach", str(out), f"b={b}", "--as", "variants", "-o", str(out)]) == 2
    assert "a variant 'b' already" in capsys.readouterr().err
    assert run(["fold", str(model), f"{b}@0.5", "-o", str(tmp_path / "folded.onnx")]) == 0
    with Deployment(out) as deployment:
        assert deployment.names == ("a", "half", "b")
        expected = outputs(tmp_path / "folded.onnx", feed())[0]
        np.testing.assert_array_equal(deployment.run("half", feed())["y"], expected)


def test_replacing_a_deployment_takes_its_old_variants_away(tmp_path: Path) -> None:
    model, out = base(tmp_path), tmp_path / "out.onnx"
    call = ["attach", str(model), "--as", "variants", "-o", str(out), "--no-verify", "--quiet"]
    assert run([*call, str(adapter(tmp_path / "a")), str(adapter(tmp_path / "b", seed=2))]) == 0
    assert run([*call, str(tmp_path / "b")]) == 2
    assert run([*call, str(tmp_path / "b"), "--force"]) == 0
    with Deployment(out) as deployment:
        assert deployment.names == ("b",)
    (stored,) = (tmp_path / "out.onnx.variants").iterdir()
    assert stored.name == "b.safetensors" and stored.stat().st_mode == out.stat().st_mode
