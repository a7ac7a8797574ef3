"""Wrong adapter files, and what the command line says of each: exit code 2, a message that names it, no output.

``pytest -s`` prints the table.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from loracc.cli import run

Tensors = dict[str, torch.Tensor]
FC, OUT = "base_model.model.fc", "base_model.model.out"


def base_state() -> Tensors:
    torch.manual_seed(0)
    net = nn.ModuleDict({"fc": nn.Linear(8, 12), "out": nn.Linear(12, 6)})
    return {name: tensor.detach() for name, tensor in net.state_dict().items()}


def good_tensors() -> Tensors:
    torch.manual_seed(1)
    return {
        f"{FC}.lora_A.weight": torch.randn(2, 8),
        f"{FC}.lora_B.weight": torch.randn(12, 2),
        f"{OUT}.lora_A.weight": torch.randn(2, 12),
        f"{OUT}.lora_B.weight": torch.randn(6, 2),
    }


CONFIG: dict[str, Any] = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["fc", "out"]}


def with_tensors(change: dict[str, torch.Tensor | None], **config: Any) -> Callable[[Path], None]:
    """The good adapter with some tensors put in, or taken out (None), and other settings."""

    def spoil(folder: Path) -> None:
        state = load_file(folder / "adapter_model.safetensors") | change
        save_file({k: v for k, v in state.items() if v is not None}, folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text(json.dumps(CONFIG | config))

    return spoil


def with_bytes(change: Callable[[bytes], bytes], name: str = "adapter_model.safetensors") -> Callable[[Path], None]:
    """The good adapter with other bytes in one of its files."""

    def spoil(folder: Path) -> None:
        (folder / name).write_bytes(change((folder / name).read_bytes()))

    return spoil


def renamed(names: dict[str, str]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        state = load_file(folder / "adapter_model.safetensors")
        for old, new in names.items():
            state = {key.replace(old, new): tensor for key, tensor in state.items()}
        save_file(state, folder / "adapter_model.safetensors")

    return spoil


class Bomb:
    """Unpickled, it makes a file."""

    def __init__(self, target: str) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return open, (self.target, "w")


def pickled(folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Bomb(str(folder / "exploded")), protocol=2))


def without_config(folder: Path) -> None:
    (folder / "adapter_config.json").unlink()


def a_model(folder: Path) -> None:
    save_file(base_state(), folder / "adapter_model.safetensors")
    without_config(folder)


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 12345\n"

#: What is wrong -> (how the good adapter becomes it, words that the message must have).
CASES: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    "two formats in one file": (
        with_tensors({"lora_unet_fc.lora_down.weight": torch.ones(2, 8), "lora_unet_fc.alpha": torch.tensor(1.0)}),
        ("lora_unet_fc.lora_down.weight",),
    ),
    "two adapters in one file": (
        with_tensors({f"{FC}.lora_A.other.weight": torch.ones(2, 8), f"{FC}.lora_B.other.weight": torch.ones(12, 2)}),
        (f"{FC}.lora_A",),
    ),
    "one module under two names": (
        with_tensors({"fc.lora_A.weight": torch.ones(2, 8), "fc.lora_B.weight": torch.ones(12, 2)}),
        ("fc.lora_A.weight", "same"),
    ),
    "rank 0": (
        with_tensors({f"{FC}.lora_A.weight": torch.ones(0, 8), f"{FC}.lora_B.weight": torch.ones(12, 0)}),
        ("empty", "lora_A.weight [0, 8]"),
    ),
    "r = 0 in the configuration": (with_tensors({}, r=0), ("r in adapter_config.json is 0", "positive")),
    "alpha too long for a float": (with_tensors({}, lora_alpha=10**400), ("lora_alpha", "a finite number")),
    "alpha 0": (with_tensors({}, lora_alpha=0), ("lora_alpha", "is 0", "other than 0")),
    "a scalar": (with_tensors({f"{FC}.lora_A.weight": torch.tensor(3.0)}), ("lora_A.weight", "shape []")),
    "an empty tensor": (with_tensors({f"{FC}.lora_B.weight": torch.ones(12, 0)}), ("empty", "lora_B.weight [12, 0]")),
    "integers": (
        with_tensors({f"{FC}.lora_A.weight": torch.ones(2, 8, dtype=torch.int8)}),
        ("not of a float dtype", "int8"),
    ),
    "float8": (
        with_tensors({f"{FC}.lora_A.weight": torch.ones(2, 8).to(torch.float8_e4m3fn)}),
        ("float dtype", "float8_e4m3fn"),
    ),
    "inf": (with_tensors({f"{FC}.lora_A.weight": torch.full((2, 8), torch.inf)}), ("inf or NaN", "fc.lora_A")),
    "lora_A without lora_B": (with_tensors({f"{FC}.lora_B.weight": None}), ("fc", "pairs")),
    "ranks that disagree": (
        with_tensors({f"{FC}.lora_A.weight": torch.ones(3, 8)}), ("ranks 3 and 2",),
    ),
    "another rank than the configuration's": (with_tensors({}, r=4), ("rank 2", "says 4")),
    "a key that nobody knows": (with_tensors({f"{FC}.lora_C.weight": torch.ones(2)}), ("fc.lora_C.weight",)),
    "keys of another model": (
        renamed({"model.fc.": "model.layers.0.q_proj.", "model.out.": "model.layers.0.v_proj."}),
        ("2 of 2 deltas fit no weight", "layers.0.q_proj.weight", "layers.0.v_proj.weight", "--map"),
    ),
    "another size of the model": (
        with_tensors({f"{FC}.lora_A.weight": torch.ones(2, 16)}),
        ("fc.weight", "[12, 16]", "[12, 8]"),
    ),
    "truncated": (with_bytes(lambda data: data[:-100]), ("adapter_model.safetensors", "truncated")),
    "a header that is longer than the file": (
        with_bytes(lambda data: (1 << 40).to_bytes(8, "little") + data[8:]), ("adapter_model.safetensors", "header"),
    ),
    "a Git LFS pointer": (with_bytes(lambda _data: LFS), ("adapter_model.safetensors", "LFS")),
    "a pickle that runs code": (pickled, ("adapter_model.bin", "more than tensors", "runs code", "open")),
    "a configuration that is no JSON": (with_bytes(lambda _d: b"{r: 8}", "adapter_config.json"), ("not a JSON file",)),
    "no configuration": (without_config, ("--alpha",)),
    "the model in the adapter's place": (a_model, ("fc.weight", "model")),
}  # fmt: skip


@pytest.fixture(scope="module")
def table() -> Iterator[dict[str, str]]:
    rows: dict[str, str] = {}
    yield rows
    width = max(map(len, rows), default=0)
    print()
    for case, message in rows.items():
        print(f"{case:{width}}  {message}")


def write_good(folder: Path) -> Path:
    folder.mkdir()
    save_file(good_tensors(), folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG))
    return folder


def fold(tmp_path: Path, adapter: Path) -> int:
    save_file(base_state(), tmp_path / "base.safetensors")
    return run(
        ["fold", str(tmp_path / "base.safetensors"), str(adapter), "-o", str(tmp_path / "out.safetensors"), "-q"]
    )


def test_the_good_adapter_folds(tmp_path: Path) -> None:
    assert fold(tmp_path, write_good(tmp_path / "adapter")) == 0


@pytest.mark.parametrize("case", CASES)
def test_a_wrong_file_is_refused_and_named(
    case: str, table: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = write_good(tmp_path / "adapter")
    spoil, words = CASES[case]
    spoil(adapter)
    code = fold(tmp_path, adapter)
    message = capsys.readouterr().err.replace(f"{tmp_path}/", "").removeprefix("loracc: error: ")
    table[case] = " ".join(message.split())
    assert code == 2, message
    for word in words:
        assert any(choice in message for choice in word.split("|")), f"{word!r} is not in: {message}"
    assert not (tmp_path / "out.safetensors").exists()
    assert not (adapter / "exploded").exists()


def test_two_adapters_that_replace_one_parameter_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_file(base_state(), tmp_path / "base.safetensors")
    adapters = []
    for name in ("one", "two"):
        adapter = write_good(tmp_path / name)
        with_tensors({f"{FC}.base_layer.bias": torch.ones(12)}, bias="lora_only")(adapter)
        adapters.append(str(adapter))
    assert run(["fold", str(tmp_path / "base.safetensors"), *adapters, "-o", str(tmp_path / "o.safetensors")]) == 2
    message = capsys.readouterr().err
    assert "fc.bias" in message
    assert "both replace the same weight" in message
    assert "'one'" in message
    assert "'two'" in message
