"""``loracc convert``: around all formats and back to the bit, read by the other libraries, refusals by name."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import loracc.convert
from loracc.cli import run
from loracc.convert import convert_adapter
from loracc.dtypes import Array
from loracc.errors import InputError, LoraccError, UnsupportedError
from loracc.formats import load_adapter

RANK = 4
SIZES = {"self_attn.q_proj": (6, 10), "self_attn.o_proj": (10, 10), "mlp.down_proj": (12, 6)}


def tensors(dtype: Any = np.float32) -> dict[str, Array]:
    rng = np.random.default_rng(0)
    found: dict[str, Array] = {}
    for layer in range(2):
        for name, (n_in, n_out) in SIZES.items():
            stem = f"base_model.model.model.layers.{layer}.{name}"
            found[f"{stem}.lora_A.weight"] = rng.standard_normal((RANK, n_in)).astype(dtype)
            found[f"{stem}.lora_B.weight"] = rng.standard_normal((n_out, RANK)).astype(dtype)
    return found


def peft(folder: Path, state: dict[str, Array], **config: Any) -> Path:
    folder.mkdir()
    settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": 8, "target_modules": ["q_proj"]} | config
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    save_file({key: np.ascontiguousarray(array) for key, array in state.items()}, folder / "adapter_model.safetensors")
    return folder


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_around_all_formats_and_back_to_the_bit(tmp_path: Path, dtype: Any) -> None:
    start = peft(tmp_path / "peft", tensors(dtype))
    steps = [
        ("kohya.safetensors", []),
        ("mlx", ["--to", "mlx"]),
        ("ort.onnx_adapter", []),
        ("back", ["--alpha", "8"]),  # the format keeps no scale: alpha is said again
    ]
    source = start
    for name, told in steps:
        assert run(["convert", str(source), "-o", str(tmp_path / name), "--quiet", *told]) == 0
        source = tmp_path / name
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (start, source))
    assert before.keys() == after.keys()
    for key, array in before.items():
        assert after[key].dtype == array.dtype
        assert after[key].tobytes() == array.tobytes(), key
    config = json.loads((source / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["rank_pattern"]) == (RANK, 8, {})


@pytest.mark.parametrize("target", ["kohya.safetensors", "mlx", "ort.onnx_adapter", "again"])
def test_the_same_delta_whatever_the_format_and_always_the_same_bytes(tmp_path: Path, target: str) -> None:
    start = peft(tmp_path / "peft", tensors(), lora_alpha=7)
    contents = []
    for attempt in ("1", "2"):
        (tmp_path / attempt).mkdir()
        out = tmp_path / attempt / target
        convert_adapter(start, out, to="mlx" if target == "mlx" else None)
        files = sorted(out.iterdir()) if out.is_dir() else [out]
        contents.append([path.read_bytes() for path in files])
    assert contents[0] == contents[1]
    one, two = load_adapter(start), load_adapter(out)
    assert two.naming is None
    deltas = {entry.module: entry.delta for entry in two.entries}
    for entry in one.entries:
        delta = deltas[entry.module].resolve(tuple(int(n or 0) for n in entry.delta.shape))
        got, expected = (d.materialize(np.dtype(np.float64)) for d in (delta, entry.delta))
        # 7/4 times B is no float32 number: .onnx_adapter rounds it once
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-6 if target.endswith("adapter") else 0)


def test_peft_loads_what_was_written(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from peft import LoraConfig, PeftModel, get_peft_model

    class Net(torch.nn.Module):  # type: ignore[misc,name-defined,unused-ignore]
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.embed = torch.nn.Embedding(9, 6)
            self.fc = torch.nn.Linear(6, 10)
            self.conv = torch.nn.Conv2d(1, 3, 3)

        def forward(self, ids: Any) -> Any:
            return self.conv(torch.tanh(self.fc(self.embed(ids)))[:, None])

    config = LoraConfig(
        r=4, lora_alpha=6, target_modules=["embed", "fc", "conv"], rank_pattern={"fc": 2}, use_rslora=True
    )
    model = get_peft_model(Net(), config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(str(tmp_path / "start"))
    result = convert_adapter(tmp_path / "start", tmp_path / "out")
    assert (result.source, result.format, result.modules) == ("peft", "peft", 3)
    again = PeftModel.from_pretrained(Net(), tmp_path / "out")
    ids = torch.arange(8).reshape(2, 4)
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(ids), model.eval()(ids), rtol=1e-6, atol=1e-6)


def test_dora_goes_to_mlx_and_back(tmp_path: Path) -> None:
    stem = "base_model.model.fc"
    state = {
        f"{stem}.lora_A.weight": np.ones((RANK, 6), np.float32),
        f"{stem}.lora_B.weight": np.ones((10, RANK), np.float32),
        f"{stem}.lora_magnitude_vector": np.linspace(1, 2, 10, dtype=np.float32),
    }
    start = peft(tmp_path / "peft", state, use_dora=True)
    convert_adapter(start, tmp_path / "mlx", to="mlx")
    convert_adapter(tmp_path / "mlx", tmp_path / "back")
    back = load_file(tmp_path / "back" / "adapter_model.safetensors")
    assert {key: array.tobytes() for key, array in back.items()} == {k: a.tobytes() for k, a in state.items()}
    for target in ("a.safetensors", "a.onnx_adapter"):
        with pytest.raises(UnsupportedError, match=r"DoRA: fc"):
            convert_adapter(start, tmp_path / target)


def test_names_and_shapes_come_from_the_model_where_the_file_lacks_them(tmp_path: Path) -> None:
    base = {"block.to_q.weight": np.zeros((10, 6), np.float32), "block.fc.weight": np.zeros((18, 6), np.float32)}
    save_file(base, tmp_path / "base.safetensors")
    kohya = {
        "lora_unet_block_to_q.lora_down.weight": np.ones((2, 6), np.float32),
        "lora_unet_block_to_q.lora_up.weight": np.ones((10, 2), np.float32),
        "lora_unet_block_to_q.alpha": np.array(3.0, np.float32),
    }
    save_file(kohya, tmp_path / "k.safetensors")
    with pytest.raises(UnsupportedError, match="--model"):
        convert_adapter(tmp_path / "k.safetensors", tmp_path / "out")
    convert_adapter(tmp_path / "k.safetensors", tmp_path / "out", model=tmp_path / "base.safetensors")
    assert [entry.module for entry in load_adapter(tmp_path / "out").entries] == ["block.to_q"]
    merged = {"block.fc.lora_A": np.ones((4, 6), np.float32), "block.fc.lora_B": np.ones((12, 2), np.float32)}
    save_file(merged, tmp_path / "l.safetensors")
    told: dict[str, Any] = {"alpha": 4.0, "enable_lora": (True, False, True)}
    with pytest.raises(UnsupportedError, match=r"block\.fc\.weight \(LoralibPair\)"):
        convert_adapter(tmp_path / "l.safetensors", tmp_path / "out2", **told)
    convert_adapter(tmp_path / "l.safetensors", tmp_path / "out2", model=tmp_path / "base.safetensors", **told)
    delta = load_adapter(tmp_path / "out2").entries[0].delta
    assert (delta.shape, delta.rank, delta.scale) == ((18, 6), 4, 2.0)


@pytest.mark.parametrize(
    ("target", "to", "state", "config", "message"),
    [
        (
            "a.safetensors",
            None,
            {"embed.lora_embedding_A": (4, 9), "embed.lora_embedding_B": (6, 4)},
            {},
            "embeddings: e",
        ),
        ("a.onnx_adapter", None, {"c.lora_A.weight": (4, 2, 3), "c.lora_B.weight": (5, 4, 1)}, {}, "convolutions: c"),
        ("mlx", "mlx", {"c.lora_A.weight": (4, 2, 3), "c.lora_B.weight": (5, 4, 1)}, {}, "convolutions: c"),
        (
            "mlx",
            "mlx",
            {f"{m}.lora_{x}.weight": s for m in "ab" for x, s in (("A", (4, 2)), ("B", (5, 4)))},
            {"alpha_pattern": {"a": 1}},
            "one scale for all modules, and this adapter has 0.25, 2",
        ),
        (
            "a.safetensors",
            None,
            {f"{m}.lora_{x}.weight": s for m in ("a.b", "a_b") for x, s in (("A", (4, 2)), ("B", (5, 4)))},
            {},
            "cannot tell",
        ),
        (
            "out",
            None,
            {"fc.bias": (5,), "fc.lora_A.weight": (4, 2), "fc.lora_B.weight": (5, 4)},
            {"bias": "all"},
            "fc.bias",
        ),
    ],
)
def test_what_a_format_cannot_hold_is_named(
    tmp_path: Path,
    target: str,
    to: str | None,
    state: dict[str, tuple[int, ...]],
    config: dict[str, Any],
    message: str,
) -> None:
    arrays = {f"base_model.model.{key}": np.ones(shape, np.float32) for key, shape in state.items()}
    start = peft(tmp_path / "peft", arrays, **config)
    with pytest.raises(LoraccError, match=message):
        convert_adapter(start, tmp_path / target, to=to)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["peft"], "nothing is left behind"


def test_wrong_calls(tmp_path: Path) -> None:
    start = peft(tmp_path / "peft", tensors())
    with pytest.raises(InputError, match=r"a \.onnx_adapter is|is a \.onnx_adapter file"):
        convert_adapter(start, tmp_path / "x.safetensors", to="onnx_adapter")
    with pytest.raises(InputError, match="expected one of"):
        convert_adapter(start, tmp_path / "x", to="gguf")
    (tmp_path / "x.safetensors").write_bytes(b"mine")
    with pytest.raises(InputError, match="exists already"):
        convert_adapter(start, tmp_path / "x.safetensors")
    assert (tmp_path / "x.safetensors").read_bytes() == b"mine"
    assert run(["convert", str(start), "-o", str(tmp_path / "y"), "--allow-unmatched"]) == 2


def test_a_weight_is_multiplied_into_the_scale(tmp_path: Path) -> None:
    start = peft(tmp_path / "peft", tensors())
    convert_adapter(f"{start}@0.5", tmp_path / "out")
    assert {entry.delta.scale for entry in load_adapter(tmp_path / "out").entries} == {1.0}


def test_every_writer_is_there() -> None:
    assert [callable(writer.load()) for writer in loracc.convert.WRITERS] == [True] * 4


@pytest.mark.parametrize("name", ["peft", "lora.safetensors", "mlx"])
def test_others_may_read_what_is_written(name: str, tmp_path: Path) -> None:
    mask = os.umask(0o022)
    try:
        out, told = tmp_path / f"to-{name}", ["--to", "mlx"] if name == "mlx" else []
        assert run(["convert", str(peft(tmp_path / "from", tensors())), "-o", str(out), "--quiet", *told]) == 0
    finally:
        os.umask(mask)
    files = [out] if out.is_file() else list(out.iterdir())
    assert files and all(file.stat().st_mode & 0o044 == 0o044 for file in files)
