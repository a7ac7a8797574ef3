"""What the grid does not show: patterns, files of other versions, tensors that do not fit, refusals."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import peft
import pytest
import torch
from torch import nn

from loracc.adapter import Entry, PendingDelta
from loracc.algebra.products import block_diagonal
from loracc.deltas import LowRank
from loracc.errors import BindingError, InputError, UnsupportedError
from loracc.folded import Binding, FoldedTensor
from loracc.kinds.base import read_whole
from loracc.kinds.peft_table import PEFT_KINDS
from loracc.kinds.subspace import KaSA
from loracc.passes.fit_delta import Weight, fit
from loracc.sites import TRANSPOSED, Layout, Site
from tests.kinds.peft_cases import CASES, TARGET
from tests.kinds.peft_layers import Bare, bare_layer, by_role, check_tilings, compare, wrap

# PEFT warns of settings it mends by itself and of the CUDA extension that BOFT cannot load.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("row", ["LoHa", "LoKr"])
def test_rank_and_alpha_patterns(row: str) -> None:
    config = CASES[row]()
    config.rank_pattern, config.alpha_pattern = {"layer": 1}, {"layer": 5}
    error, change = compare(wrap(bare_layer("linear"), config), "linear")
    assert change > 1e-3
    assert error < 1e-10


def test_adalora_keeps_dividing_by_the_initial_rank_after_its_budget_shrank() -> None:
    """PEFT loads a file of 2 of 4 ranks: the factors shrink, ranknum stays 4."""
    pattern = {"base_model.model.layer.lora_E": [True, False, True, False]}

    def config() -> Any:
        return peft.AdaLoraConfig(init_r=4, total_step=10, lora_alpha=8, **TARGET)

    trained = wrap(bare_layer("linear"), config())
    kept = {key: value[:, [0, 2]] if "lora_B" in key else value[[0, 2]] for key, value in trained.tensors.items()}
    loading = config()
    loading.rank_pattern = {key.removeprefix("base_model.model."): ranks for key, ranks in pattern.items()}
    model: Any = peft.get_peft_model(Bare(bare_layer("linear")), loading).double()
    peft.set_peft_model_state_dict(model, kept)
    x = torch.randn(3, 16, dtype=torch.float64)
    with torch.no_grad():
        delta = model(x) - trained.base(x)
    spec = PEFT_KINDS["ADALORA"]
    built = spec.build(by_role(kept, spec), loading.to_dict(), "layer")["weight"].resolve((24, 16))
    got = x.numpy() @ built.materialize(np.dtype(np.float64)).T
    np.testing.assert_allclose(got, delta.numpy(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("factors", [2, 3])
def test_boft_with_several_butterfly_factors(factors: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT's CUDA extension, which spreads blocks on a diagonal, replaced: without it PEFT has one factor."""
    from peft.tuners.boft import layer as boft_layer

    class OnCpu:
        @staticmethod
        def forward(blocks: Any) -> list[Any]:
            diagonal: Any = torch.block_diag
            return [torch.stack([diagonal(*factor) for factor in blocks])]

    monkeypatch.setattr(boft_layer, "get_fbd_cuda", lambda: OnCpu)
    for column in ("linear", "conv2d"):
        config = peft.BOFTConfig(boft_block_size=2, boft_n_butterfly_factor=factors, **TARGET)
        error, change = compare(wrap(bare_layer(column), config), column)
        assert change > 1e-3
        assert error < 1e-10


def test_peft_itself_folds_oft_on_a_kernel_to_something_else_than_its_forward() -> None:
    """Why such a layer is refused (docs/upstream.md)."""
    wrapped = wrap(bare_layer("conv2d"), CASES["OFT"]())
    x = torch.randn(1, 16, 6, 6, dtype=torch.float64)
    with torch.no_grad():
        forward = wrapped.model(x)
        merged = wrapped.model.merge_and_unload()(x)
    assert float((forward - merged).abs().max()) > 0.1 * float(forward.abs().max())


def test_oft_of_an_older_neumann_series_is_refused() -> None:
    spec = PEFT_KINDS["OFT"]
    with pytest.raises(UnsupportedError, match=r"before 0\.18"):
        spec.build({"R": np.zeros((4, 6))}, {"use_cayley_neumann": True, "peft_version": "0.17.1"}, "m")


def test_vera_without_its_projections_is_refused_with_the_way_out() -> None:
    spec = PEFT_KINDS["VERA"]
    with pytest.raises(UnsupportedError, match="save_projection=True"):
        spec.build({"lambda_b": np.zeros(4), "lambda_d": np.zeros(2)}, {}, "m")


def test_a_kernel_under_peft_glora_c_path_is_refused() -> None:
    wrapped = wrap(bare_layer("linear"), peft.GloraConfig(r=4, **TARGET))
    spec = PEFT_KINDS["GLORA"]
    with pytest.raises(UnsupportedError, match="C path"):
        spec.build(by_role(wrapped.tensors, spec), wrapped.config, "layer")


@pytest.mark.parametrize(
    ("row", "shape"),
    [
        ("LoHa", (24, 15)),
        ("LoKr", (24, 15)),
        ("IA3", (23, 16)),
        ("VeRA", (23, 16)),
        ("OFT", (24, 12)),
        ("BOFT", (24, 12)),
        ("HRA", (24, 12)),
        ("MiSS", (23, 16)),
        ("MiSS bat", (16, 16)),
        ("RandLoRA", (24, 20)),
        ("AdaLoRA", (24, 15)),
    ],
)
def test_tensors_of_another_size_are_an_error_that_names_them(row: str, shape: tuple[int, ...]) -> None:
    wrapped = wrap(bare_layer("linear"), CASES[row]())
    spec = PEFT_KINDS[str(wrapped.config["peft_type"])]
    change = spec.build(by_role(wrapped.tensors, spec), wrapped.config, "layer")["weight"]
    with pytest.raises(BindingError, match=r"layer: .*do not fit a weight of"):
        change.resolve(shape)


def test_a_missing_tensor_is_an_error_that_names_it() -> None:
    with pytest.raises(InputError, match="no tensor 'w2_b'"):
        one = np.ones((2, 2))
        PEFT_KINDS["LOHA"].build({"w1_a": one, "w1_b": one, "w2_a": one}, {"r": 2, "alpha": 1}, "m")


@pytest.mark.parametrize("row", ["OFT", "BOFT", "HRA", "IA3", "MiSS bat", "RoAd 1"])
def test_a_strength_is_refused_where_peft_has_none(row: str) -> None:
    wrapped = wrap(bare_layer("linear"), CASES[row]())
    spec = PEFT_KINDS[str(wrapped.config["peft_type"])]
    change = spec.build(by_role(wrapped.tensors, spec), wrapped.config, "layer")["weight"]
    with pytest.raises(UnsupportedError, match=r"0\.5 on a"):
        change.scaled(0.5).resolve((24, 16))


def test_a_pending_delta_passes_its_strength_on() -> None:
    wrapped = wrap(bare_layer("linear"), CASES["LoHa"]())
    spec = PEFT_KINDS["LOHA"]
    change = spec.build(by_role(wrapped.tensors, spec), wrapped.config, "layer")["weight"]
    assert isinstance(change, PendingDelta)
    whole, half = change.resolve((24, 16)), change.scaled(0.5).resolve((24, 16))
    dtype = np.dtype(np.float64)
    np.testing.assert_allclose(half.materialize(dtype), 0.5 * whole.materialize(dtype), rtol=1e-14)
    assert half.scale == 0.5 * whole.scale


def test_adapters_of_half_precision_are_computed_in_the_dtype_of_the_fold() -> None:
    """float16 factors, float32 fold: nothing is computed in float16."""
    wrapped = wrap(bare_layer("linear"), CASES["LoKr"]())
    spec = PEFT_KINDS["LOKR"]
    arrays = {role: array.astype(np.float16) for role, array in by_role(wrapped.tensors, spec).items()}
    exact = spec.build({r: a.astype(np.float64) for r, a in arrays.items()}, wrapped.config, "layer")["weight"]
    change = spec.build(arrays, wrapped.config, "layer")["weight"].resolve((24, 16))
    got = change.materialize(np.dtype(np.float32))
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, exact.resolve((24, 16)).materialize(np.dtype(np.float64)), rtol=1e-5, atol=1e-7)


def test_a_whole_weight_is_read_in_order() -> None:
    weight = np.arange(24.0).reshape(4, 6)
    np.testing.assert_array_equal(read_whole(lambda lo, hi: weight[:, lo:hi], 1, 6, 4), weight)
    np.testing.assert_array_equal(read_whole(lambda lo, hi: weight[lo:hi], 0, 4, 4), weight)


def test_an_attention_sized_hra_is_tiled_across_its_rows_without_the_whole_weight() -> None:
    layer = nn.Linear(64, 48)
    wrapped = wrap(layer, CASES["HRA"]())
    spec = PEFT_KINDS["HRA"]
    change = spec.build(by_role(wrapped.tensors, spec), wrapped.config, "layer")["weight"].resolve((48, 64))
    weight = wrapped.base.weight.detach().numpy() if isinstance(wrapped.base, nn.Linear) else np.zeros(0)
    check_tilings(change, weight)
    statistic = change.prepare(lambda lo, hi: weight[:, lo:hi], 1, 64, 10)
    assert statistic is not None
    assert statistic.shape == (48, 4)


@pytest.mark.parametrize("column", ["linear", "linear_tall"])
def test_kasa_takes_the_smallest_singular_triplets_out(column: str) -> None:
    config = peft.LoraConfig(r=3, lora_alpha=5, kasa_config=peft.KasaConfig(), **TARGET)
    wrapped = wrap(bare_layer(column), config)
    a, b, diagonal = (
        wrapped.tensors[f"base_model.model.layer.{tail}"].numpy()
        for tail in ("lora_A.weight", "lora_B.weight", "lora_diag")
    )
    layer: Any = wrapped.base
    weight = layer.weight.detach().numpy()
    new = check_tilings(KaSA(a, b, diagonal, 5 / 3), weight)
    x = torch.randn(4, weight.shape[1], dtype=torch.float64)
    with torch.no_grad():
        expected = wrapped.model(x) - layer.bias
    # PEFT decomposes the weight in float32.
    np.testing.assert_allclose(x.numpy() @ new.T, expected.numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("side", ["a", "b"])
def test_bdlora_is_a_low_rank_product_of_block_diagonal_factors(side: str) -> None:
    targets: dict[str, Any] = {f"target_modules_bd_{side}": ["layer"]}
    blocks = peft.BdLoraConfig(nblocks=2, **targets)
    wrapped = wrap(bare_layer("linear"), peft.LoraConfig(r=4, lora_alpha=6, use_bdlora=blocks, **TARGET))
    a, b = (wrapped.tensors[f"base_model.model.layer.lora_{s}.weight"].numpy() for s in "AB")
    a, b = (block_diagonal(a, 2), b) if side == "a" else (a, block_diagonal(b, 2))
    layer: Any = wrapped.base
    new = check_tilings(LowRank(a, b, 6 / 4), layer.weight.detach().numpy())
    x = torch.randn(4, 16, dtype=torch.float64)
    with torch.no_grad():
        expected = wrapped.model(x) - layer.bias
    np.testing.assert_allclose(x.numpy() @ new.T, expected.numpy(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("row", ["LoHa", "FourierFT"])
def test_a_checkpoint_weight_that_lies_the_other_way_round_is_turned(row: str) -> None:
    """By the tensors' shapes (LoHa), or, for a kind that fits any shape, by the configuration (FourierFT)."""
    wrapped = wrap(bare_layer("linear"), CASES[row]())
    spec = PEFT_KINDS[str(wrapped.config["peft_type"])]
    change = spec.build(by_role(wrapped.tensors, spec), wrapped.config, "layer")["weight"]
    entry = Entry("layer", "weight", change, ("key",), fan_in_fan_out=None if row == "LoHa" else True)
    site = Site("layer", "weight", "linear", "layer.weight", Layout())
    settled, delta = fit(entry, Weight(site, (16, 24), settled=False))
    assert settled.layout == TRANSPOSED
    assert delta.shape == (24, 16)


@pytest.mark.parametrize(
    "row", ["LoHa", "LoKr", "OFT", "BOFT", "HRA", "MiSS", "MiSS bat", "IA3", "RoAd 1", "DEFT", "OSF"]
)
@pytest.mark.parametrize("layout", [Layout(), TRANSPOSED], ids=["out-in", "in-out"])
def test_a_kind_folds_as_a_lazy_tensor_in_either_layout(row: str, layout: Layout) -> None:
    wrapped = wrap(bare_layer("linear"), CASES[row]())
    spec = PEFT_KINDS[str(wrapped.config["peft_type"])]
    delta = spec.build(by_role(wrapped.tensors, spec), wrapped.config, "layer")["weight"].resolve((24, 16))
    layer: Any = wrapped.base
    canonical = layer.weight.detach().numpy().astype(np.float32)
    stored = np.ascontiguousarray(canonical.T if layout == TRANSPOSED else canonical)
    binding = Binding(Site("layer", "weight", "linear", "w", layout), delta, "a", "layer.weight", "name")
    folded = FoldedTensor(ir.Tensor(stored, name="w"), [binding]).numpy()
    expected = delta.apply(canonical.astype(np.float64)).astype(np.float32)
    np.testing.assert_array_equal(layout.view(folded), expected)
