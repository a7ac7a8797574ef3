"""Every kind of PEFT's, from ``save_pretrained`` to the folded checkpoint, against PEFT's own unmerged forward.

``pytest -s`` prints the grid: rows are kinds, columns layers, cells the largest relative error in float32.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from peft.tuners.lora import BdLoraConfig, KasaConfig
from safetensors.torch import load_file, save_file
from torch import nn

from loracc.cli import run
from loracc.errors import InputError, LoraccError, UnsupportedError
from loracc.formats import load_adapter
from loracc.formats.peft_refused import NOT_FOLDABLE
from loracc.kinds.peft_table import PEFT_KINDS
from tests.formats.folding import relative_error
from tests.kinds.peft_cases import CASES, GAPS, TARGET
from tests.kinds.peft_layers import Bare, bare_layer, sample

LAYERS = ("linear", "conv1d_hf", "conv2d", "embedding", "layernorm")
TOLERANCE = 1e-5
#: Kinds of PEFT's LoRA that are no plain product.
LORA_CASES: dict[str, Callable[[], Any]] = {
    "KaSA": lambda: peft.LoraConfig(r=4, lora_alpha=6, kasa_config=KasaConfig(), **TARGET),
    "BD-LoRA A": lambda: peft.LoraConfig(
        r=4, lora_alpha=6, use_bdlora=BdLoraConfig(target_modules_bd_a=["layer"], nblocks=2), **TARGET
    ),
    "BD-LoRA B": lambda: peft.LoraConfig(
        r=4, lora_alpha=6, use_bdlora=BdLoraConfig(target_modules_bd_b=["layer"], nblocks=2), **TARGET
    ),
}
ROWS: dict[str, Callable[[], Any]] = {
    **CASES,
    **LORA_CASES,
    "trainable tokens": lambda: peft.TrainableTokensConfig(token_indices=[1, 7], **TARGET),
}
#: Layers of the rows that ``CASES`` does not have; on others PEFT fails in ways of its own, or drops the bias.
ONLY = {**dict.fromkeys(LORA_CASES, ("linear",)), "trainable tokens": ("embedding",)}
#: How PEFT's tuners say that they do not adapt a layer.
REFUSALS = (
    "not supported",
    "does not support",
    "No layers types compatible",
    "No layer types compatible",
    "No modules",
)

# PEFT warns of settings it mends by itself (fan_in_fan_out, block sizes) and of the seeds of shared matrices.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def grid() -> Iterator[dict[tuple[str, str], str]]:
    cells: dict[tuple[str, str], str] = {}
    yield cells
    width = max(len(row) for row in ROWS)
    print("\n" + " " * width, *(f"{column:>12}" for column in LAYERS))
    for row in ROWS:
        print(f"{row:{width}}", *(f"{cells.get((row, column), 'not run'):>12}" for column in LAYERS))


def trained(layer: nn.Module, config: Any) -> Any:
    """PEFT around a copy of the layer, every adapter parameter random; None where PEFT does not adapt such a layer."""
    torch.manual_seed(3)
    try:
        model: Any = peft.get_peft_model(Bare(copy.deepcopy(layer)), config)
    except KeyError:
        return None  # PEFT 0.21.2's TinyLoRA, where no layer can be adapted
    except (TypeError, ValueError, NotImplementedError) as error:
        assert any(word in str(error) for word in REFUSALS), str(error)
        return None
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "base_layer" not in name and parameter.dtype.is_floating_point:
            nn.init.normal_(parameter, mean=0.1, std=0.2)
    return model.eval() if peft.get_peft_model_state_dict(model) else None


def folding(layer: nn.Module, adapter: Path, folder: Path) -> int:
    """The exit code of ``loracc fold`` on the layer's checkpoint."""
    base, out = folder / "base.safetensors", folder / "out.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in Bare(layer).state_dict().items()}, base)
    return run(["fold", str(base), str(adapter), "-o", str(out), "--quiet"])


def folded(layer: nn.Module, adapter: Path, folder: Path) -> nn.Module:
    """The layer with the weights that ``loracc fold`` writes."""
    assert folding(layer, adapter, folder) == 0
    result = Bare(copy.deepcopy(layer))
    result.load_state_dict(load_file(folder / "out.safetensors"))
    return result.eval()


def layer_input(kind: str) -> torch.Tensor:
    """``sample`` in float32."""
    x = sample("linear" if kind == "layernorm" else kind)
    return x.float() if x.is_floating_point() else x


def cell(row: str, column: str, folder: Path) -> str:
    """One cell of the grid: an error, or why there is none."""
    if row in ONLY and column not in ONLY[row]:
        return "not in PEFT"
    layer = bare_layer(column)
    model = trained(layer, ROWS[row]())
    if model is None:
        return "not in PEFT"
    if GAPS.get((row, column)) == "refused":
        model.save_pretrained(folder / "adapter")
        assert folding(layer, folder / "adapter", folder) == 2
    if (row, column) in GAPS:
        return GAPS[row, column]
    x = layer_input(column)
    with torch.no_grad():
        expected, before = model(x), layer(x)
        model.save_pretrained(folder / "adapter")
        got = folded(layer, folder / "adapter", folder)(x)
    assert relative_error(before, expected) > 1e-3, "the adapter does nothing, the comparison shows nothing"
    error = relative_error(got, expected)
    assert error < TOLERANCE, f"{row} on {column}: {error:.1e}"
    return f"{error:.1e}"


def test_no_kind_is_left_out() -> None:
    kinds = {str(make().peft_type.value) for make in ROWS.values()}
    assert kinds - {"LORA", "TRAINABLE_TOKENS"} == set(PEFT_KINDS)
    assert {kind.value for kind in peft.PeftType} == kinds | set(NOT_FOLDABLE)


@pytest.mark.parametrize("row", ROWS)
def test_a_saved_adapter_folds_into_what_peft_computes(
    row: str, grid: dict[tuple[str, str], str], tmp_path: Path
) -> None:
    for column in LAYERS:
        folder = tmp_path / column
        folder.mkdir()
        grid[row, column] = cell(row, column, folder)
    assert any("e-" in grid[row, column] or grid[row, column] == "0.0e+00" for column in LAYERS)


def test_inspect_names_the_kind_though_its_shape_is_open(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for row, kind in (("LoKr", "lokr"), ("VB-LoRA", "vblora"), ("OFT", "oft")):
        adapter = saved(tmp_path / row, CASES[row]())
        assert run(["inspect", str(adapter), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["kinds"] == {kind: 1}


class Two(nn.Module):
    """Two linear layers and a normalisation."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.ModuleDict({"first": nn.Linear(8, 12), "second": nn.Linear(12, 6), "norm": nn.LayerNorm(6)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.model["norm"](self.model["second"](torch.tanh(self.model["first"](x))))
        return result


def test_shared_tensors_biases_and_saved_modules_around_two_layers(tmp_path: Path) -> None:
    config = peft.VeraConfig(r=4, target_modules=["first", "second"], modules_to_save=["norm"], bias="vera_only")
    model: Any = peft.get_peft_model(Two(), config)
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, mean=0.3, std=0.3)
    model.eval().save_pretrained(tmp_path / "adapter")
    base, out = tmp_path / "base.safetensors", tmp_path / "out.safetensors"
    save_file(Two().state_dict(), base)
    assert run(["fold", str(base), str(tmp_path / "adapter"), "-o", str(out), "--quiet"]) == 0
    merged = Two().eval()
    merged.load_state_dict(load_file(out))
    x = torch.randn(3, 8)
    with torch.no_grad():
        assert relative_error(merged(x), model(x)) < TOLERANCE
    changed = {
        name for name, tensor in merged.state_dict().items() if not torch.equal(tensor, Two().state_dict()[name])
    }
    assert changed == set(Two().state_dict())


def saved(tmp_path: Path, config: Any) -> Path:
    model: Any = trained(bare_layer("linear"), config)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def edited(folder: Path, *, config: dict[str, Any] | None = None, tensors: dict[str, Any] | None = None) -> Path:
    """The adapter with other settings or tensors (None takes one out)."""
    if config:
        file = folder / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | config))
    if tensors:
        state = load_file(folder / "adapter_model.safetensors") | tensors
        save_file({k: v for k, v in state.items() if v is not None}, folder / "adapter_model.safetensors")
    return folder


LAYER = "base_model.model.layer"


@pytest.mark.parametrize(
    ("make", "config", "tensors", "error", "message"),
    [
        (CASES["LoHa"], {"new_field": 3}, None, UnsupportedError, "LoHa adapter sets fields .*new_field=3"),
        (CASES["LoHa"], {"bias": 7}, None, InputError, "bias is 7"),
        (CASES["LoHa"], {"r": 0}, None, InputError, "rank 0"),
        (CASES["LoHa"], None, {f"{LAYER}.hada_w1_a": None}, InputError, "no tensor 'w1_a'"),
        (CASES["LoHa"], None, {f"{LAYER}.hada_w3_a": torch.ones(2, 2)}, InputError, "hada_w3_a"),
        (CASES["LoHa"], None, {f"{LAYER}.hada_w1_a": torch.full((24, 4), np.nan)}, LoraccError, "inf or NaN"),
        (CASES["LoHa"], None, {f"{LAYER}.hada_w1_a": torch.ones(24, 4).int()}, InputError, "not of a float dtype"),
        (CASES["LoHa"], {"peft_type": "NEWEST"}, None, UnsupportedError, "NEWEST is not known"),
        (CASES["SHiRA"], None, {f"{LAYER}.shira_indices": torch.ones(2, 3)}, InputError, "integer dtype"),
        (CASES["VeRA"], None, {"base_model.vera_A": None}, UnsupportedError, "save_projection"),
        (CASES["VeRA"], None, {"base_model.model.vera_A": torch.ones(4, 16)}, InputError, "the same tensor"),
        (CASES["GraLoRA"], None, {f"{LAYER}.gralora_A": torch.ones(2, 8, 3)}, InputError, "make no GraLoRA layer"),
        (CASES["OFT Neumann 5"], {"peft_version": "0.17.1"}, None, UnsupportedError, "PEFT before 0.18"),
        (LORA_CASES["KaSA"], {"kasa_config": None}, None, InputError, "no kasa_config is set"),
        (LORA_CASES["KaSA"], None, {f"{LAYER}.lora_diag": None}, InputError, "no lora_diag"),
        (
            LORA_CASES["BD-LoRA A"],
            {"use_bdlora": {"target_modules_bd_a": ["layer"], "nblocks": 3}},
            None,
            InputError,
            "3 blocks",
        ),
    ],
)
def test_what_is_wrong_is_named(
    tmp_path: Path,
    make: Callable[[], Any],
    config: dict[str, Any] | None,
    tensors: dict[str, Any] | None,
    error: type[LoraccError],
    message: str,
) -> None:
    adapter = edited(saved(tmp_path, make()), config=config, tensors=tensors)
    with pytest.raises(error, match=message):
        loaded = load_adapter(adapter)
        for entry in loaded.entries:
            entry.delta.resolve((24, 16))


@pytest.mark.parametrize("kind", NOT_FOLDABLE)
def test_a_kind_that_no_weight_can_hold_is_refused_by_name(tmp_path: Path, kind: str) -> None:
    adapter = edited(saved(tmp_path, CASES["LoHa"]()), config={"peft_type": kind})
    name, reason = NOT_FOLDABLE[kind]
    with pytest.raises(UnsupportedError) as caught:
        load_adapter(adapter)
    assert name in str(caught.value)
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value", "name"),
    [
        ("alora_invocation_tokens", [1, 2], "aLoRA"),
        ("arrow_config", {"top_k": 2}, "Arrow"),
        ("layer_replication", [[0, 1]], "layer_replication"),
        ("monteclora_config", {"x": 1}, "MonteCLoRA"),
    ],
)
def test_a_lora_that_no_weight_can_hold_is_refused_by_name(tmp_path: Path, field: str, value: Any, name: str) -> None:
    adapter = edited(saved(tmp_path, peft.LoraConfig(r=2, **TARGET)), config={field: value})
    with pytest.raises(UnsupportedError, match=f"a {name} adapter .* cannot be folded"):
        load_adapter(adapter)
