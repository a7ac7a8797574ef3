"""Sites by content: what exporters and optimizers do to a weight, one way at a time, and equal weights told apart."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest

from loracc.model import BaseModel
from loracc.passes.content_misses import explain_miss
from loracc.passes.content_sites import ContentMatch, match_content
from loracc.passes.find_sites import find_sites
from loracc.sites import Layout, Site
from tests.graphs import Array, Builder
from tests.passes.weights import checkpoint

T = (1, 0)


def random(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def product(weight: Array, *, bias: Array | None = None) -> BaseModel:
    """``y = x @ weight (+ bias)``, nothing named."""
    build = Builder()
    y = build("MatMul", build.input("x", ["n", weight.shape[0]]), build.weight(weight, "onnx::MatMul_12"))
    if bias is not None:
        y = build("Add", y, build.weight(bias, "val_3"))
    return traced(build.model(y))


def traced(model: ir.Model) -> BaseModel:
    return BaseModel(Path("graph.onnx"), "onnx", model, find_sites(model))


def found(match: ContentMatch) -> dict[str, tuple[str, str, Layout, str]]:
    """{name: (initializer, kind, layout, consumer)} of the sites found by content."""
    return {s.name: (s.initializer, s.kind, s.layout, s.consumer) for s in match.sites if s.source == "content"}


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("stored", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("kept", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_transposed_and_cast(turned: bool, stored: type, kept: type) -> None:
    """An ``nn.Linear``'s [out, in] and a ``Conv1D``'s [in, out], rounded on either side."""
    weight = random(6, 5)
    base = checkpoint(
        {"fc.weight": (weight.T if turned else weight).astype(kept), "other.weight": random(6, 5, seed=1)}
    )
    model = product(np.ascontiguousarray(weight.T).astype(stored))
    match = match_content(model, base)
    assert found(match) == {"fc.weight": ("onnx::MatMul_12", "linear", Layout(T), "")}
    assert all(match.differing(model.ir, site) is None for site in match.found)


@pytest.mark.parametrize("axis", [0, 1])
def test_blocks_along_either_stored_axis(axis: int) -> None:
    parts = {name: random(rows, 8, seed=ord(name)) for name, rows in (("q", 8), ("k", 4), ("v", 4))}
    build = Builder()
    x = build.input("x", ["n", 8])
    fused = np.concatenate(list(parts.values()))
    weight = build.weight(fused if axis == 0 else np.ascontiguousarray(fused.T), "w")
    y = build("Gemm", x, weight, transB=1) if axis == 0 else build("MatMul", x, weight)
    model = traced(build.model(y))
    match = match_content(model, checkpoint({f"{name}_proj.weight": part for name, part in parts.items()}))
    perm = () if axis == 0 else T
    assert found(match) == {
        "q_proj.weight": ("w", "linear", Layout(perm, 0, 8), ""),
        "k_proj.weight": ("w", "linear", Layout(perm, 8, 12), ""),
        "v_proj.weight": ("w", "linear", Layout(perm, 12, 16), ""),
    }
    assert all(match.differing(model.ir, site) is None for site in match.found)


def test_a_fused_bias_with_a_filled_gap() -> None:
    """Whisper's k_proj has no bias: an exporter that fuses fills in zeros."""
    weights = {f"{name}.weight": random(4, 8, seed=i) for i, name in enumerate("qkv")}
    biases = {"q.bias": random(4, seed=3), "v.bias": random(4, seed=4)}
    fused = np.concatenate([biases["q.bias"], np.zeros(4, np.float32), biases["v.bias"]])
    model = product(np.concatenate(list(weights.values())).T.copy(), bias=fused)
    here = found(match_content(model, checkpoint({**weights, **biases})))
    assert here["q.bias"] == ("val_3", "bias", Layout((), 0, 4), "")
    assert here["v.bias"] == ("val_3", "bias", Layout((), 8, 12), "")
    assert len(here) == 5


def test_equal_biases_belong_to_the_weights_they_are_added_after() -> None:
    build = Builder()
    x = build.input("x", ["n", 4])
    base: dict[str, Array] = {}
    for index, name in enumerate(("first", "second", "third")):
        base[f"{name}.weight"], base[f"{name}.bias"] = random(4, 4, seed=index), np.zeros(4, np.float32)
        x = build("MatMul", x, build.weight(base[f"{name}.weight"].T.copy(), f"val_{index}"))
        x = build("Add", x, build.weight(np.zeros(4, np.float32), f"val_{index}_b"))
    here = found(match_content(traced(build.model(x)), checkpoint(dict(sorted(base.items())))))
    assert [here[f"{name}.bias"][0] for name in ("first", "second", "third")] == ["val_0_b", "val_1_b", "val_2_b"]


def chain(count: int, weight: Array, *, shared: bool = False) -> BaseModel:
    """``count`` products with equal weights, or with one and the same."""
    build = Builder()
    x = build.input("x", ["n", 4])
    one = build.weight(weight, "val_0")
    for index in range(count):
        x = build("MatMul", x, one if shared or not index else build.weight(weight.copy(), f"val_{index}"))
    return traced(build.model(x))


def test_copied_layers_are_told_apart_by_position() -> None:
    weight = random(4, 4)
    base = checkpoint({f"layers.{n}.fc.weight": weight.T.copy() for n in (0, 1, 10, 2)})  # as safetensors sorts them
    here = found(match_content(chain(4, weight), base))
    assert {name: value[0] for name, value in here.items()} == {
        "layers.0.fc.weight": "val_0",
        "layers.1.fc.weight": "val_1",
        "layers.2.fc.weight": "val_2",
        "layers.10.fc.weight": "val_3",
    }


def test_deduplicated_copies_are_readers_of_one_initializer() -> None:
    weight = random(4, 4)
    base = checkpoint({f"layers.{n}.fc.weight": weight.T.copy() for n in range(3)})
    here = found(match_content(chain(3, weight, shared=True), base))
    assert [value[::3] for value in here.values()] == [
        ("val_0", "matmul_0"),
        ("val_0", "matmul_1"),
        ("val_0", "matmul_2"),
    ]


def test_a_module_that_is_called_twice_is_one_site() -> None:
    here = found(match_content(chain(3, random(4, 4), shared=True), checkpoint({"fc.weight": random(4, 4).T.copy()})))
    assert here == {"fc.weight": ("val_0", "linear", Layout(T), "")}


def test_what_cannot_be_told_apart_is_ambiguous_and_both_are_named() -> None:
    weight = random(4, 4)
    model = chain(2, weight)
    match = match_content(model, checkpoint({"up.weight": weight.T.copy(), "down.weight": weight.T.copy()}))
    assert not found(match)
    text = explain_miss(match, model.ir, "down.weight")
    assert "'val_0' and 'val_1'" in text and "up.weight" in text


def test_position_that_contradicts_what_is_known_is_not_believed() -> None:
    """The layers run in the reverse order of their numbers: the unique weights say it."""
    build = Builder()
    x = build.input("x", ["n", 4])
    same, base = random(4, 4), {}
    for n in (1, 0):
        base[f"layers.{n}.a.weight"], base[f"layers.{n}.b.weight"] = random(4, 4, seed=n + 5), same
        x = build("MatMul", x, build.weight(base[f"layers.{n}.a.weight"].T.copy(), f"val_{n}"))
        x = build("MatMul", x, build.weight(same.T.copy(), f"val_{n}b"))
    match = match_content(traced(build.model(x)), checkpoint(base))
    assert set(found(match)) == {"layers.0.a.weight", "layers.1.a.weight"}
    assert set(match.ambiguous) == {"layers.0.b.weight", "layers.1.b.weight"}


def tied(head: bool) -> tuple[BaseModel, BaseModel]:
    """A look-up and a product with one weight; the checkpoint tells of the head or does not."""
    build = Builder()
    weight = random(9, 4)
    ids = build.input("ids", ["n"], ir.DataType.INT64)
    one = build.weight(weight, "val_0")
    y = build("MatMul", build("Gather", one, ids), build("Transpose", one, perm=[1, 0]))
    sites = [Site("emb", "weight", "other", "emb.weight")]
    sites += [Site("head", "weight", "linear", "emb.weight", consumer="head.weight")] if head else []
    return traced(build.model(y)), checkpoint({"emb.weight": weight}, sites)


def test_tied_weights_are_told_apart_by_what_reads_them() -> None:
    assert found(match_content(*tied(head=True))) == {
        "emb.weight": ("val_0", "embedding", Layout(), "gather_0"),
        "head.weight": ("val_0", "linear", Layout(), "transpose_1"),
    }
    assert found(match_content(*tied(head=False))) == {"emb.weight": ("val_0", "embedding", Layout(), "gather_0")}


def test_a_name_that_the_values_contradict_gives_way() -> None:
    build = Builder()
    x = build.input("x", ["n", 4])
    right, wrong = random(4, 4, seed=1), random(4, 4, seed=2)
    y = build(
        "MatMul", build("MatMul", x, build.weight(wrong.T.copy(), "fc.weight")), build.weight(right.T.copy(), "w")
    )
    match = match_content(traced(build.model(y)), checkpoint({"fc.weight": right}))
    assert found(match) == {"fc.weight": ("w", "linear", Layout(T), "")}
    assert [site.initializer for site in match.sites if site.name == "fc.weight"] == ["w"]
    assert "'w'" in match.notes[0]


def test_names_that_the_values_confirm_stay() -> None:
    build = Builder()
    weight = random(4, 3)
    y = build("Gemm", build.input("x", ["n", 3]), build.weight(weight, "fc.weight"), transB=1)
    match = match_content(traced(build.model(y)), checkpoint({"fc.weight": weight}))
    assert [(site.name, site.source) for site in match.sites] == [("fc.weight", "name")]


def test_one_element_that_differs_is_found() -> None:
    weight = random(40, 50)
    model = product(weight)
    kept = weight.T.copy()
    kept[17, 3] += 1
    match = match_content(model, checkpoint({"fc.weight": kept}))
    (site,) = match.found
    difference = match.differing(model.ir, site)
    assert difference is not None and difference[1] == (3, 17)


def test_nearly_equal_tensors_are_compared_in_full() -> None:
    one = random(40, 50)
    other = one.copy()
    other[17, 3] += 1
    here = found(match_content(product(other.T.copy()), checkpoint({"one.weight": one, "other.weight": other})))
    assert list(here) == ["other.weight"]


def test_what_is_missing_is_compared_with_what_is_nearest() -> None:
    weight = random(6, 5)
    model = product(weight.T.copy())
    match = match_content(model, checkpoint({"fc.weight": weight * np.float32(1.25), "gone.weight": random(7, 7)}))
    assert not match.places
    text = explain_miss(match, model.ir, "fc.weight")
    assert "[6, 5]" in text and "'onnx::MatMul_12'" in text and "differ by 0.2 of" in text
    assert "no float initializer has its shape" in explain_miss(match, model.ir, "gone.weight")
    assert "no such parameter" in explain_miss(match, model.ir, "else.weight")


def test_a_quantized_weight_is_found_within_its_step() -> None:
    from loracc.concatenated import ConcatenatedTensor
    from loracc.encodings.decoded import DecodedTensor
    from loracc.passes.content_originals import give_originals
    from loracc.sources.onnx_model import read_graph

    parts = [random(32, 64, seed=seed) for seed in (1, 2)]
    fused = np.concatenate(parts)
    scale = np.float32(np.abs(fused).max() / 127)
    codes = np.round(fused.T / scale).astype(np.int8)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "q.onnx"
        onnx.save(quantized(codes, scale), path)
        model = traced(read_graph(path))
    base = checkpoint({"q.weight": parts[0], "k.weight": parts[1], "other.weight": random(32, 64, seed=3)})
    match = match_content(model, base)
    layouts = {name: layout for name, (_, _, layout, _) in found(match).items()}
    assert layouts == {"q.weight": Layout(T, 0, 32), "k.weight": Layout(T, 32, 64)}
    (name,) = {site.initializer for site in match.found}
    assert not give_originals(model.ir, match, [name])
    tensor = model.ir.graph.initializers[name].const_value
    assert isinstance(tensor, DecodedTensor) and isinstance(tensor.original, ConcatenatedTensor)
    assert np.array_equal(tensor.original.numpy(), fused.T)
    less = match_content(model, checkpoint({"q.weight": parts[0]}))  # the other half is not known
    assert give_originals(model.ir, less, [name]) == [name]


def quantized(codes: Array, scale: np.float32) -> onnx.ModelProto:
    """``y = x @ dequantized(codes)``."""
    helper = onnx.helper
    graph = helper.make_graph(
        [
            helper.make_node("DequantizeLinear", ["w_quantized", "w_scale"], ["w"], "dequantize"),
            helper.make_node("MatMul", ["x", "w"], ["y"], "product"),
        ],
        "g",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["n", codes.shape[0]])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["n", codes.shape[1]])],
        [onnx.numpy_helper.from_array(codes, "w_quantized"), onnx.numpy_helper.from_array(np.array(scale), "w_scale")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def test_a_weight_in_another_shape_is_said_to_be_there() -> None:
    weight = random(6, 4)
    build = Builder()
    flat = build.weight(weight.T.reshape(24).copy(), "flat")
    shape = build.weight(np.array([4, 6]), "shape")
    model = traced(build.model(build("MatMul", build.input("x", ["n", 4]), build("Reshape", flat, shape))))
    match = match_content(model, checkpoint({"fc.weight": weight}))
    assert "is in 'flat', as [24]" in explain_miss(match, model.ir, "fc.weight")
