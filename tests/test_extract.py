"""``loracc extract``: what a rank holds, what it leaves, and that PEFT and loracc read what is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import loracc
from loracc.algebra.svd import truncated_svd
from loracc.cli import run
from loracc.extract import extract_adapter
from tests.models import adapted, build
from tests.models import save_base as save_model


class Net(nn.Module):
    """An embedding, two linear layers, a convolution and a normalisation."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.wte = nn.Embedding(40, 24)
        self.fc = nn.Linear(24, 32)
        self.conv = nn.Conv1d(32, 20, 3, padding=1)
        self.norm = nn.LayerNorm(20)
        self.out = nn.Linear(20, 12)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.fc(self.wte(ids))).transpose(1, 2)
        result: torch.Tensor = self.out(self.norm(self.conv(x).transpose(1, 2)))
        return result


IDS = torch.arange(40).reshape(4, 10)


def save(state: dict[str, torch.Tensor], path: Path) -> Path:
    save_file({name: tensor.detach().contiguous() for name, tensor in state.items()}, path)
    return path


def rank_eight(folder: Path) -> tuple[Path, Path, dict[str, np.ndarray]]:
    """(base, base with a rank-8 adapter folded in, the adapter's ΔW in float64 by weight)."""
    config = peft.LoraConfig(r=8, lora_alpha=12, target_modules=["wte", "fc", "conv", "out"])
    model: Any = peft.get_peft_model(Net(), config)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder / "adapter")
    base = save(Net().state_dict(), folder / "base.safetensors")
    loracc.fold(base, [folder / "adapter"], folder / "tuned.safetensors")
    deltas = {
        f"{entry.module}.weight": entry.delta.materialize(np.dtype(np.float64))
        for entry in loracc.load_adapter(folder / "adapter").entries
    }
    return base, folder / "tuned.safetensors", deltas


def test_rank_eight_recovers_a_folded_rank_eight_adapter_to_float32_noise(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, tuned, deltas = rank_eight(tmp_path)
    assert run(["extract", str(base), str(tuned), "--rank", "8", "-o", str(tmp_path / "out"), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["residual"] < 1e-6
    assert {site["name"]: site["rank"] for site in result["sites"]} == dict.fromkeys(deltas, 8)
    assert result["left_out"] == []
    assert all(site["relative_norm"] > 0.1 for site in result["sites"])
    extracted = loracc.load_adapter(tmp_path / "out")
    weights = load_file(base)
    for entry in extracted.entries:
        delta = deltas[entry.name]
        error = np.abs(entry.delta.materialize(np.dtype(np.float64)) - delta)
        # W' was rounded to float32: half an ulp of the largest weight, and the factors' own rounding.
        noise = 2.0**-24 * (float(weights[entry.name].abs().max()) + np.abs(delta).max())
        assert error.max() < 8 * noise, f"{entry.name}: {error.max():.1e}, noise {noise:.1e}"
        print(
            f"{entry.name:12} max |ΔW − BA| {error.max():.1e}   noise {noise:.1e}   max |ΔW| {np.abs(delta).max():.1f}"
        )


def test_peft_computes_the_tuned_model_from_what_is_written(tmp_path: Path) -> None:
    base, tuned, _ = rank_eight(tmp_path)
    extract_adapter(base, tuned, tmp_path / "out", rank=8)
    model: Any = peft.PeftModel.from_pretrained(Net(), str(tmp_path / "out")).eval()
    expected = Net().eval()
    expected.load_state_dict(load_file(tuned))
    with torch.no_grad():
        assert float((Net().eval()(IDS) - expected(IDS)).abs().max()) > 0.1
        torch.testing.assert_close(model(IDS), expected(IDS), rtol=1e-4, atol=1e-4)


def trained(folder: Path) -> tuple[Path, Path]:
    """A base, and a version of it in which every parameter changed."""
    torch.manual_seed(2)
    state = {name: tensor + 0.1 * torch.randn_like(tensor) for name, tensor in Net().state_dict().items()}
    return save(Net().state_dict(), folder / "base.safetensors"), save(state, folder / "tuned.safetensors")


def test_full_saves_biases_and_norms_and_the_whole_rank_is_the_tuned_model(tmp_path: Path) -> None:
    base, tuned = trained(tmp_path)
    result = extract_adapter(base, tuned, tmp_path / "out", energy=1.0, full=True)
    assert {left.name for left in result.left_out if left.saved} == {
        "fc.bias", "conv.bias", "out.bias", "norm.weight", "norm.bias"
    }  # fmt: skip
    assert result.residual < 1e-6
    loracc.fold(base, [tmp_path / "out"], tmp_path / "again.safetensors")
    again, wanted = load_file(tmp_path / "again.safetensors"), load_file(tuned)
    for name, tensor in wanted.items():
        torch.testing.assert_close(again[name], tensor, rtol=1e-6, atol=1e-6)
    model: Any = peft.PeftModel.from_pretrained(Net(), str(tmp_path / "out")).eval()
    expected = Net().eval()
    expected.load_state_dict(wanted)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS), expected(IDS), rtol=1e-4, atol=1e-4)


def test_what_is_left_out_is_listed_and_counted(tmp_path: Path) -> None:
    base, tuned = trained(tmp_path)
    result = extract_adapter(base, tuned, tmp_path / "out", rank=4)
    assert {left.name for left in result.left_out} == {"fc.bias", "conv.bias", "out.bias", "norm.weight", "norm.bias"}
    assert not any(left.saved for left in result.left_out)
    before, after, made = load_file(base), load_file(tuned), loracc.load_adapter(tmp_path / "out")
    deltas = {entry.name: entry.delta.materialize(np.dtype(np.float64)) for entry in made.entries}
    left = total = 0.0
    for name in before:
        delta = (after[name].double() - before[name].double()).numpy()
        left += float(np.sum((delta - deltas.get(name, 0.0)) ** 2))
        total += float(np.sum(delta**2))
    assert result.residual == pytest.approx((left / total) ** 0.5, rel=1e-6)
    assert 0.3 < result.residual < 1.0


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.99])
def test_energy_keeps_the_smallest_rank_that_holds_it(tmp_path: Path, energy: float) -> None:
    base, tuned = trained(tmp_path)
    result = extract_adapter(base, tuned, tmp_path / "out", energy=energy)
    before, after = load_file(base), load_file(tuned)
    for site in result.sites:
        delta = (after[site.name].double() - before[site.name].double()).numpy()
        s = np.linalg.svd(delta.reshape(delta.shape[0], -1), compute_uv=False)
        held = np.cumsum(s**2) / np.sum(s**2)
        assert held[site.rank - 1] >= energy > (held[site.rank - 2] if site.rank > 1 else 0.0)
        assert site.residual == pytest.approx((1 - held[site.rank - 1]) ** 0.5, abs=1e-6)


@pytest.mark.parametrize(("rank", "energy"), [(8, None), (20, None), (None, 0.9)])
def test_a_large_matrix_is_approximated_as_well_as_its_decomposition_does(
    rank: int | None, energy: float | None
) -> None:
    rng = np.random.default_rng(0)
    m, n = 700, 600
    matrix = rng.standard_normal((m, 30)) * 0.8 ** np.arange(30) @ rng.standard_normal((30, n))
    matrix += 1e-3 * rng.standard_normal((m, n))
    u, s, v = truncated_svd(matrix, rank, energy)
    exact = np.linalg.svd(matrix, compute_uv=False)
    np.testing.assert_allclose(s, exact[: len(s)], rtol=1e-9)
    left = np.linalg.norm(matrix - (u * s) @ v)
    assert left <= np.linalg.norm(exact[len(s) :]) * (1 + 1e-9)
    held = np.cumsum(exact**2) / np.sum(exact**2)
    assert len(s) == (rank or int(np.argmax(held >= 0.9)) + 1)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set:UserWarning")  # PEFT, on Linear layers beside Conv1D
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # PEFT asks for it
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_folder_of_transformers_and_an_adapter_that_peft_loads(tmp_path: Path, family: str) -> None:
    model = build(family)
    save_model(model, tmp_path / "base")
    targets = ["attn.c_attn", "attn.c_proj"] if family == "gpt2" else ["q_proj", "down_proj"]
    lora = adapted(build(family), r=4, target_modules=targets, fan_in_fan_out=family == "gpt2")
    lora.save_pretrained(tmp_path / "adapter")
    loracc.fold(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "tuned")
    result = extract_adapter(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", rank=4)
    assert result.residual < 1e-5
    assert len(result.sites) == 4
    assert not result.left_out
    again: Any = peft.PeftModel.from_pretrained(model, str(tmp_path / "out")).eval()
    with torch.no_grad():
        ids = torch.arange(12).reshape(2, 6)
        torch.testing.assert_close(again(ids).logits, lora.eval()(ids).logits, rtol=1e-4, atol=1e-5)


def test_same_inputs_same_bytes(tmp_path: Path) -> None:
    base, tuned = trained(tmp_path)
    for name in ("one", "two"):
        extract_adapter(base, tuned, tmp_path / name, rank=3)
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


@pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*:FutureWarning")  # torch's own exporter
def test_onnx_models_too(tmp_path: Path) -> None:
    base, tuned, _ = rank_eight(tmp_path)
    net = Net().eval()
    for name, state in (("base", load_file(base)), ("tuned", load_file(tuned))):
        net.load_state_dict(state)
        program = torch.onnx.export(net, (IDS,), dynamo=True, optimize=False, verbose=False)
        assert program is not None
        program.save(str(tmp_path / f"{name}.onnx"))
    result = extract_adapter(tmp_path / "base.onnx", tmp_path / "tuned.onnx", tmp_path / "out", rank=8)
    assert result.residual < 1e-6
    assert {site.name for site in result.sites} == {"wte.weight", "fc.weight", "conv.weight", "out.weight"}


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({}, ["--rank", "8"], "nothing to extract"),
        ({"fc.weight": torch.zeros(32, 23)}, ["--rank", "8"], "not two versions of one model"),
        ({"extra": torch.zeros(3)}, ["--rank", "8"], "extra: only in"),
        ({"fc.bias": torch.zeros(32)}, ["--rank", "8"], "no low-rank delta: fc.bias"),
        ({"fc.weight": torch.full((32, 24), float("inf"))}, ["--rank", "8"], "inf or NaN"),
        ({"fc.weight": torch.zeros(32, 24)}, [], "either --rank or --energy"),
        ({"fc.weight": torch.zeros(32, 24)}, ["--rank", "2", "--energy", "0.5"], "not both"),
        ({"fc.weight": torch.zeros(32, 24)}, ["--energy", "99"], "above 0 and up to 1"),
    ],
)
def test_what_is_wrong_is_said(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: dict[str, torch.Tensor],
    options: list[str],
    message: str,
) -> None:
    base = save(Net().state_dict(), tmp_path / "base.safetensors")
    tuned = save(Net().state_dict() | change, tmp_path / "tuned.safetensors")
    assert run(["extract", str(base), str(tuned), "-o", str(tmp_path / "out"), *options]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
