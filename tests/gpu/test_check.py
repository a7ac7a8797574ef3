"""The GPU check runs anywhere, and skips nothing in silence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from loracc.devices import gpu_name
from tests.gpu.check import RUNNERS, main


@pytest.mark.filterwarnings("ignore")  # torch's exporter
def test_the_check_on_this_machine(tmp_path: Path) -> None:
    code = main(["--out", str(tmp_path), "--fast", "--processes", "0"])
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    numbers = {row["runner"]: row["verdict"] for row in rows if row.get("check") == "numbers" and "error" in row}
    assert numbers["cpu"] == numbers["torch-cpu"] == "pass"
    verified = [row["verdict"] for row in rows if "runner" not in row]
    assert verified and set(verified) == {"pass"}
    for runner in RUNNERS:
        own = [row for row in rows if row.get("runner") == runner]
        assert own and all(row["status"] == "run" or row["reason"] for row in own)
    if gpu_name() is None:
        absent = {row["runner"] for row in rows if row["status"] == "not run" and "CUDA" in row["reason"]}
        assert absent == {"cuda", "torch-cuda", "tensorrt"}
    assert code == 0
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("loracc-check-")]
