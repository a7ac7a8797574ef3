"""LyCORIS kind × layer: the weights that loracc makes against LyCORIS' own forward. ``pytest -s`` prints the grid."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from loracc.adapter import Delta
from loracc.dtypes import Array
from loracc.errors import BindingError
from loracc.kinds.decomposed import Decomposed
from loracc.kinds.lycoris_table import lycoris_kind
from tests.kinds.peft_layers import bare_layer, check_tilings, relative_error, sample

# LyCORIS warns of options that do not go together and of deprecated torch calls while it is imported.
pytestmark = pytest.mark.filterwarnings("ignore")

CONVOLUTIONS = ("linear", "linear_tall", "linear_square", "conv1d", "conv2d", "conv2d_1x1", "conv2d_groups", "conv3d")
LAYERS = (*CONVOLUTIONS, "layernorm")

#: Row -> (algorithm, its arguments).
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "LoCon": ("LoConModule", {"lora_dim": 3, "alpha": 7}),
    "LoCon rs": ("LoConModule", {"lora_dim": 3, "alpha": 7, "rs_lora": True}),
    "LoCon Tucker": ("LoConModule", {"lora_dim": 3, "alpha": 7, "use_tucker": True}),
    "LoCon DoRA out": ("LoConModule", {"lora_dim": 3, "alpha": 7, "weight_decompose": True}),
    "LoCon DoRA in": ("LoConModule", {"lora_dim": 3, "alpha": 7, "weight_decompose": True, "wd_on_out": False}),
    "LoHa": ("LohaModule", {"lora_dim": 3, "alpha": 7}),
    "LoHa Tucker": ("LohaModule", {"lora_dim": 3, "alpha": 7, "use_tucker": True}),
    "LoHa DoRA in": ("LohaModule", {"lora_dim": 3, "alpha": 7, "weight_decompose": True, "wd_on_out": False}),
    "LoKr": ("LokrModule", {"lora_dim": 1, "alpha": 7}),
    "LoKr both sides": ("LokrModule", {"lora_dim": 1, "alpha": 7, "decompose_both": True}),
    "LoKr Tucker": ("LokrModule", {"lora_dim": 1, "alpha": 7, "use_tucker": True}),
    "LoKr full": ("LokrModule", {"lora_dim": 100, "alpha": 7}),
    "LoKr DoRA out": ("LokrModule", {"lora_dim": 1, "alpha": 7, "weight_decompose": True}),
    "full": ("FullModule", {}),
    "norm": ("NormModule", {}),
    "IA3 out": ("IA3Module", {}),
    "IA3 in": ("IA3Module", {"train_on_input": True}),
    "GLoRA": ("GLoRAModule", {"lora_dim": 3, "alpha": 7}),
    "Diag-OFT": ("DiagOFTModule", {"lora_dim": 4}),
    "Diag-OFT rescaled": ("DiagOFTModule", {"lora_dim": 4, "rescaled": True}),
    "Diag-OFT bounded": ("DiagOFTModule", {"lora_dim": 4, "constraint": 0.02}),
    "BOFT": ("ButterflyOFTModule", {"lora_dim": 6}),
    "BOFT rescaled": ("ButterflyOFTModule", {"lora_dim": 6, "rescaled": True, "constraint": 0.02}),
}

#: LyCORIS inverts I − Q in float32 whatever the dtype (``get_r``: ``.float().inverse()``), so it runs in float32 here;
#: with rs_lora it stores alpha·√r, rounded to float32.
LOOSE = {row: 2e-6 for row in CASES if "OFT" in row} | {"LoCon rs": 1e-7}

#: Where each algorithm stands in LyCORIS.
FILES = {
    "LoConModule": "locon",
    "LohaModule": "loha",
    "LokrModule": "lokr",
    "FullModule": "full",
    "NormModule": "norms",
    "IA3Module": "ia3",
    "GLoRAModule": "glora",
    "DiagOFTModule": "diag_oft",
    "ButterflyOFTModule": "boft",
}

#: (row, column) -> why there is no number.
GAPS: dict[tuple[str, str], str] = {
    **{(row, "layernorm"): "not in LyCORIS" for row in CASES if row != "norm"},
    ("IA3 in", "conv2d_groups"): "LyCORIS fails",
    ("GLoRA", "conv2d_groups"): "LyCORIS fails",
    **{("norm", column): "not in LyCORIS" for column in CONVOLUTIONS},
}


def module_of(row: str, layer: nn.Module) -> Any:
    """LyCORIS' module on a layer, float64, with random parameters."""
    import importlib

    algorithm, options = CASES[row]
    torch.manual_seed(4)
    cls = getattr(importlib.import_module(f"lycoris.modules.{FILES[algorithm]}"), algorithm)
    module = cls("layer", layer, **options)
    for name, parameter in module.named_parameters():
        if name.startswith("org_"):
            continue
        if "rescale" in name or "dora" in name:
            nn.init.uniform_(parameter, 0.5, 1.5)
        else:
            nn.init.normal_(parameter, mean=0.1, std=0.3)
    return module if "OFT" in row else module.double()


def folded(tensors: dict[str, Array], layer: nn.Module, strength: float = 1.0) -> nn.Module:
    """The bare layer with loracc's weights."""
    spec = lycoris_kind(tensors)
    assert spec is not None, sorted(tensors)
    changes = spec.build({spec.roles[tail]: array for tail, array in tensors.items()}, {"dora_axis": "out"}, "layer")
    result = copy.deepcopy(layer)
    for parameter, change in changes.items():
        old = getattr(result, parameter).detach().numpy()
        delta: Delta = change.scaled(strength).resolve(old.shape)
        new = check_tilings(delta, old) if old.ndim > 1 else delta.apply(old)
        getattr(result, parameter).data = torch.from_numpy(new.copy())
    return result


def measure(row: str, column: str, strength: float = 1.0) -> tuple[float, float]:
    layer = bare_layer(column)
    original = copy.deepcopy(layer).double()
    if "OFT" not in row:
        layer.double()
    module = module_of(row, layer)
    module.multiplier = strength
    tensors = {name: tensor.detach().numpy().copy() for name, tensor in saved(module).items()}
    x = sample(column)
    with torch.no_grad():
        expected = module(x.to(next(layer.parameters()).dtype)).double()
        got = folded(tensors, original, strength)(x)
        before = original(x)
    return relative_error(got, expected), relative_error(before, expected)


def saved(module: Any) -> dict[str, Any]:
    """What the module writes to a file. Before ``apply_to`` a full module's weight is the difference itself."""
    if type(module).__name__ == "FullModule":
        tensors = {"diff": module.weight}
        return tensors if module.bias is None else {**tensors, "diff_b": module.bias}
    return dict(module.state_dict())


@pytest.fixture(scope="module")
def grid() -> Iterator[dict[tuple[str, str], str]]:
    cells: dict[tuple[str, str], str] = {}
    yield cells
    width = max(len(row) for row in CASES)
    print("\n" + " " * width, *(f"{column:>14}" for column in LAYERS))
    for row in CASES:
        print(f"{row:{width}}", *(f"{cells.get((row, column), 'not run'):>14}" for column in LAYERS))


@pytest.mark.parametrize("row", CASES)
def test_a_layer_folded_by_loracc_computes_what_lycoris_computes(row: str, grid: dict[tuple[str, str], str]) -> None:
    pytest.importorskip("lycoris", reason="lycoris-lora is installed without its dependencies, by hand")
    for column in LAYERS:
        if (row, column) in GAPS:
            if GAPS[row, column] == "LyCORIS fails":
                with pytest.raises(RuntimeError):
                    measure(row, column)
            grid[row, column] = GAPS[row, column]
            continue
        error, change = measure(row, column)
        assert change > 1e-3, f"{row} on {column}: the adapter does nothing, the comparison shows nothing"
        assert error < LOOSE.get(row, 1e-10), f"{row} on {column}: {error:.1e}"
        grid[row, column] = f"{error:.1e}"


@pytest.mark.parametrize(
    "row", ["LoCon", "LoCon DoRA in", "LoHa", "LoKr", "full", "IA3 out", "GLoRA", "Diag-OFT", "BOFT"]
)
def test_a_strength_means_what_lycoris_multiplier_means(row: str) -> None:
    pytest.importorskip("lycoris", reason="lycoris-lora is installed without its dependencies, by hand")
    error, change = measure(row, "linear", strength=0.7)
    assert change > 1e-3
    assert error < LOOSE.get(row, 1e-10)


def test_the_axis_of_a_flat_dora_scale_on_a_square_weight_is_asked_for() -> None:
    tensors = {"up": np.ones((4, 1)), "down": np.ones((1, 4)), "dora_scale": np.ones(4)}
    spec = lycoris_kind(["lora_up.weight"])
    assert spec is not None
    with pytest.raises(BindingError, match="outputs or to inputs"):
        spec.build(tensors, {}, "m")["weight"].resolve((4, 4))
    delta = spec.build(tensors, {"dora_axis": "in"}, "m")["weight"].resolve((4, 4))
    assert isinstance(delta, Decomposed)
    assert delta.axis == 1
