"""Kinds are told by the bytes, whatever the suffix."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from loracc.errors import InputError
from loracc.formats.tensors import read_tensors
from loracc.sources import FRONT_ENDS, sniff
from tests.sources.onnx_files import linear_model, save


@pytest.fixture(scope="module")
def torch_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One file of each kind that torch writes, under names that say nothing."""
    import torch

    folder = tmp_path_factory.mktemp("torch")
    module = torch.nn.Linear(3, 2)
    torch.export.save(torch.export.export(module, (torch.randn(1, 3),)), folder / "program.pt2")
    (folder / "program.pt2").rename(folder / "program")
    torch.save(module.state_dict(), folder / "state")
    torch.save(module, folder / "module")
    torch.save(module.state_dict(), folder / "legacy", _use_new_zipfile_serialization=False)
    return folder


@pytest.mark.parametrize(
    ("name", "kind"),
    [("program", "exported_program"), ("state", "pickle"), ("module", "pickle"), ("legacy", "pickle")],
)
def test_files_of_torch(torch_files: Path, name: str, kind: str) -> None:
    assert sniff(torch_files / name) == kind


# torch says that TorchScript is deprecated; files of it are still about.
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_torchscript(tmp_path: Path) -> None:
    import torch

    torch.jit.trace(torch.nn.Linear(3, 2), torch.randn(1, 3)).save(str(tmp_path / "x"))  # type: ignore[no-untyped-call]
    assert sniff(tmp_path / "x") == "torchscript"


def test_onnx_under_any_name(tmp_path: Path) -> None:
    assert sniff(save(tmp_path / "model.bin", linear_model())) == "onnx"


def test_onnx_whose_fields_come_in_another_order(tmp_path: Path) -> None:
    model = linear_model()
    head = model.SerializeToString()
    graph = model.graph.SerializeToString()
    model.ClearField("graph")
    rest = model.SerializeToString()
    assert 128 <= len(graph) < 1 << 14
    size = [len(graph) & 0x7F | 0x80, len(graph) >> 7]
    (tmp_path / "x").write_bytes(bytes([0x3A, *size]) + graph + rest)
    assert (tmp_path / "x").read_bytes() != head
    assert sniff(tmp_path / "x") == "onnx"


def test_checkpoints_and_folders(tmp_path: Path) -> None:
    weights = {"fc.weight": np.ones((2, 2), np.float32)}
    save_file(weights, tmp_path / "any.name")
    assert sniff(tmp_path / "any.name") == "checkpoint"
    folder = tmp_path / "folder"
    folder.mkdir()
    save_file(weights, folder / "model.safetensors")
    assert sniff(folder) == "checkpoint"
    (folder / "config.json").write_text("{}")
    assert sniff(folder) == "huggingface"
    (folder / "adapter_config.json").write_text("{}")  # a model folder that also keeps an adapter's configuration
    assert sniff(folder) == "huggingface"


def test_a_checkpoint_with_its_lora_modules_is_a_model(tmp_path: Path) -> None:
    one = np.ones((2, 2), np.float32)
    save_file({"fc.weight": one, "fc.lora_A": one, "fc.lora_B": one}, tmp_path / "loralib")
    save_file({"fc.base_layer.weight": one, "fc.lora_A.default.weight": one}, tmp_path / "peft")
    assert sniff(tmp_path / "loralib") == sniff(tmp_path / "peft") == "checkpoint"


@pytest.mark.parametrize(
    "keys",
    [
        ["base_model.model.fc.lora_A.weight", "base_model.model.fc.lora_B.weight"],
        ["fc.lora_A", "fc.lora_B", "fc.bias"],
        ["lora_unet_down.lora_down.weight", "lora_unet_down.lora_up.weight", "lora_unet_down.alpha"],
        ["unet.to_q.lora.down.weight", "unet.to_q.lora.up.weight"],
        ["fc.hada_w1_a", "fc.hada_w1_b"],
        ["emb.lora_embedding_A", "emb.lora_embedding_B"],
    ],
)
def test_adapters_are_sent_to_their_place(tmp_path: Path, keys: list[str]) -> None:
    save_file({key: np.ones((2, 2), np.float32) for key in keys}, tmp_path / "x.safetensors")
    with pytest.raises(InputError, match=r"x\.safetensors: this is an adapter") as caught:
        sniff(tmp_path / "x.safetensors")
    assert caught.value.hint is not None
    assert "fold MODEL ADAPTER" in caught.value.hint


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.bin"])
def test_files_of_an_adapter_folder_are_sent_to_their_place(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"{}")
    with pytest.raises(InputError, match="this is an adapter"):
        sniff(tmp_path / name)


def test_every_kind_has_a_front_end() -> None:
    kinds = {"onnx", "exported_program", "torchscript", "pickle", "huggingface", "checkpoint"}
    assert {kind for kind, _ in FRONT_ENDS} == kinds


@pytest.mark.parametrize("length", [0x0280, 0x0380, 0x4B50, 0x8B1F])
def test_a_header_length_that_reads_as_another_kinds_magic_is_still_safetensors(tmp_path: Path, length: int) -> None:
    header = b'{"a.weight":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    path = tmp_path / "model.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + header.ljust(length) + bytes(4))
    assert sniff(path) == "checkpoint"
    tensors, _ = read_tensors(path)
    assert list(tensors) == ["a.weight"]
