"""What a user can get wrong: exit code 2, one paragraph that names it, no traceback, nothing left behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from loracc.cli import run

SITE = "encoder.query"
PREFIX = f"base_model.model.{SITE}"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a base checkpoint, an adapter for it and an output that exists."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    Path("base").mkdir()
    save_file({f"{SITE}.weight": rng.standard_normal((8, 6)).astype(np.float32)}, "base/model.safetensors")
    Path("base/config.json").write_text("{}")
    write_adapter(Path("adapter"))
    Path("exists.safetensors").write_bytes(b"precious")
    return tmp_path


def write_adapter(folder: Path, *, out: int = 8, site: str = PREFIX, fill: float = 1.0, **config: object) -> None:
    folder.mkdir()
    tensors = {
        f"{site}.lora_A.weight": np.full((2, 6), fill, np.float32),
        f"{site}.lora_B.weight": np.ones((out, 2), np.float32),
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["query"], **config}
    (folder / "adapter_config.json").write_text(json.dumps(settings))


def cut_weights() -> None:
    path = Path("adapter/adapter_model.safetensors")
    path.write_bytes(path.read_bytes()[:-40])


def garbage() -> None:
    Path("garbage.onnx").write_bytes(np.random.default_rng(1).bytes(4000))


def pickled() -> None:
    import torch

    torch.save(torch.nn.Linear(2, 2), "module.pt")


def without_config() -> None:
    Path("adapter/adapter_config.json").unlink()


#: what is wrong: (how it is made, arguments, words that the message must have)
CASES: dict[str, tuple[Callable[[], object] | None, str, tuple[str, ...]]] = {
    "no such model": (None, "nowhere adapter -o out", ("nowhere", "no such")),
    "no such adapter": (None, "base nowhere -o out", ("nowhere", "no such")),
    "adapter first": (None, "adapter base -o out", ("adapter", "MODEL ADAPTER")),
    "no adapter": (None, "base -o out", ("no adapter",)),
    "garbage": (garbage, "garbage.onnx adapter -o out.onnx", ("garbage.onnx", "not a model")),
    "an empty file": (lambda: Path("e.onnx").touch(), "e.onnx adapter -o out.onnx", ("e.onnx", "empty")),
    "truncated": (cut_weights, "base adapter -o out", ("adapter_model.safetensors", "truncated")),
    "broken config": (
        lambda: Path("adapter/adapter_config.json").write_text("{"),
        "base adapter -o out",
        ("adapter_config.json", "JSON"),
    ),
    "missing config": (without_config, "base adapter -o out", ("--alpha", "--scale")),
    "another shape": (lambda: write_adapter(Path("a"), out=9), "base a -o out", (SITE, "[9, 6]", "[8, 6]")),
    "unmatched key": (
        lambda: write_adapter(Path("a"), site="base_model.model.encoder.quarry"),
        "base a -o out",
        ("encoder.quarry", f"nearest: {SITE}", "--map"),
    ),
    "not finite": (lambda: write_adapter(Path("a"), fill=float("nan")), "base a -o out", ("lora_A", "NaN")),
    "overflow": (lambda: write_adapter(Path("a"), fill=3e38), "base a -o out", (SITE, "inf or NaN")),
    "another kind": (
        lambda: write_adapter(Path("a"), peft_type="PREFIX_TUNING"),
        "base a -o out",
        ("PREFIX_TUNING", "cannot be folded"),
    ),
    "pickle": (pickled, "module.pt adapter -o out.onnx", ("module.pt", "--allow-pickle", "torch.export.save")),
    "output exists": (None, "base adapter -o exists.safetensors", ("exists.safetensors", "--force")),
    "output is the input": (None, "base adapter -o base", ("base", "is the input")),
    "output in the input": (None, "base adapter -o base/x.safetensors", ("inside the input",)),
    "no folder": (None, "base adapter -o nowhere/out.safetensors", ("nowhere", "mkdir")),
    "a file as folder": (None, "base adapter -o exists.safetensors/x", ("is not a folder",)),
    "another ending": (None, "base adapter -o out.gguf", (".gguf",)),
    "a weight of zero": (None, "base adapter@0 -o out", ("adapter@0",)),
    "a map that renames nothing": (None, "base adapter -o out --map nobody=x", ("--map nobody=x", SITE)),
    "weights without a graph": (None, "base/model.safetensors adapter -o out.onnx", ("only weights", "config.json")),
    "a report over an input": (None, "base adapter -o out --report adapter/adapter_config.json", ("replace a part",)),
    "a report of another kind": (None, "base adapter -o out --report r.pdf", ("r.pdf", ".html")),
    "two adapters of one name": (None, "base a=adapter a=adapter -o out", ("named 'a'",)),
    "both scales": (without_config, "base adapter -o out --alpha 1 --scale 1", ("--alpha", "--scale")),
}


@pytest.mark.parametrize("what", CASES)
def test_a_wrong_call_says_what_and_leaves_nothing(what: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make, arguments, words = CASES[what]
    if make is not None:
        make()
    before = sorted(str(path.relative_to(here)) for path in here.rglob("*"))
    assert run(["fold", *arguments.split()]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and "Traceback" not in captured.err
    for word in words:
        assert word in captured.err
    assert sorted(str(path.relative_to(here)) for path in here.rglob("*")) == before
    assert Path("exists.safetensors").read_bytes() == b"precious"


def test_adapters_that_nobody_named_are_told_apart(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("out").mkdir()  # an empty folder is as good as none
    assert run(["fold", "base", "adapter", "adapter@0.5", "-o", "out", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [row["adapter"] for row in result["sites"]] == ["adapter", "adapter#2"]
    assert result["bytes"] == sum(path.stat().st_size for path in Path("out").iterdir())
    change = (
        load_file("out/model.safetensors")[f"{SITE}.weight"] - load_file("base/model.safetensors")[f"{SITE}.weight"]
    )
    np.testing.assert_allclose(change, 6.0, rtol=1e-6)


def test_force_replaces(here: Path) -> None:
    assert run(["fold", "base", "adapter", "-o", "exists.safetensors", "--force", "--quiet"]) == 0
    merged = load_file("exists.safetensors")[f"{SITE}.weight"]
    np.testing.assert_allclose(merged - load_file("base/model.safetensors")[f"{SITE}.weight"], 4.0, rtol=1e-6)


def test_an_error_is_json_too(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["fold", "nowhere", "adapter", "-o", "out", "--json"]) == 2
    assert "nowhere" in json.loads(capsys.readouterr().out)["error"]["message"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_leaves_nothing(number: signal.Signals, here: Path) -> None:
    # Large enough that the write is under way when the signal comes.
    rng = np.random.default_rng(0)
    save_file({f"{SITE}.weight": rng.random((200_000, 6)).astype(np.float32)}, "base/model.safetensors")
    shutil.rmtree("adapter")
    write_adapter(Path("adapter"), out=200_000)
    # A shell's background job begins with SIGINT ignored.
    start = "import signal as s; s.signal(s.SIGINT, s.default_int_handler); from loracc.__main__ import main; main()"
    command = [sys.executable, "-c", start, "fold", "base", "adapter", "-o", "out.safetensors"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.monotonic() + 60
    while process.poll() is None and not any(name.startswith(".out") for name in os.listdir(here)):
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    left = [name for name in os.listdir(here) if "out" in name]
    assert (process.returncode, left) in ((130, []), (0, ["out.safetensors"])), said
    assert "Traceback" not in said
