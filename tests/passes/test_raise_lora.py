"""LoRA inside a traced graph becomes deltas, and the graph that of the model without it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest

from loracc.deltas import DoRA, LowRank
from loracc.folded import bindings_of
from loracc.passes.find_sites import find_sites
from loracc.passes.fold import FoldPass
from loracc.passes.optimize_graph import OptimizeGraph
from loracc.passes.raise_lora import RaiseLoraPass, raise_lora
from loracc.passes.raised import Raised, RaisedAddition
from loracc.passes.unshare import UnsharePass
from tests.graphs import Builder, op_counts, relative_error, run
from tests.lora_modules import CASES, EXPORTERS, export, legacy_text_model, plain_export
from tests.models import FAMILIES, adapted, build, text_inputs, torch_inputs

pytestmark = pytest.mark.filterwarnings(  # transformers 5.23 warns about an attribute that PEFT 0.21 asks for
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)

X = np.random.default_rng(7).standard_normal((5, 8)).astype(np.float32)


def fold(model: ir.Model) -> Raised:
    """Raise and fold, as the pipeline does."""
    report = raise_lora(model)
    UnsharePass(find_sites(model))(model)
    FoldPass()(model)
    return report


@pytest.mark.parametrize("exporter", ["dynamo", "legacy"])
def test_what_peft_trained_is_what_is_found(exporter: str) -> None:
    import torch

    module = CASES["peft dora"].adapted()
    model = export(module, CASES["peft dora"].inputs(), exporter)
    layer = module.base_model.model[0]
    [binding] = [b for b in raise_lora(model).bindings if b.site.module == "0"]
    delta = binding.delta
    assert isinstance(delta, DoRA) and delta.scale == 3.0
    with torch.no_grad():
        want = {
            "a": layer.lora_A["default"].weight.numpy(),
            "b": layer.lora_B["default"].weight.numpy(),
            "magnitude": layer.lora_magnitude_vector["default"].weight.numpy(),
        }
    got = delta.arrays()
    assert np.array_equal(got["a"], want["a"]) and np.allclose(got["b"], want["b"], rtol=1e-6)
    assert np.allclose(got["magnitude"], want["magnitude"], rtol=1e-6)


def test_two_adapters_keep_their_names_and_scales() -> None:
    case = CASES["peft two adapters"]
    report = raise_lora(export(case.adapted(), case.inputs(), "dynamo"))
    assert [(b.site.name, b.adapter, b.delta.rank, round(b.delta.scale, 6)) for b in report.bindings] == [
        ("0.weight", "default", 2, 3.0),
        ("0.weight", "second", 3, 1.333333),
        ("2.weight", "default", 2, 3.0),
        ("2.weight", "second", 3, 1.333333),
    ]


@pytest.mark.parametrize("exporter", EXPORTERS)
@pytest.mark.parametrize("name", ["peft linear", "peft conv1d", "peft embedding", "peft conv2d", "loralib merged"])
def test_a_graph_without_lora_stays_byte_for_byte(name: str, exporter: str) -> None:
    model = plain_export(name, exporter)
    before = ir.serde.serialize_model(model).SerializeToString(deterministic=True)
    raiser = RaiseLoraPass()
    assert not raiser(model).modified
    assert raiser.report == Raised()
    assert ir.serde.serialize_model(model).SerializeToString(deterministic=True) == before


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_whole_models_with_dynamic_axes(name: str) -> None:
    import torch

    from loracc.sources.torch_export import to_ir

    def program(model: torch.nn.Module) -> ir.Model:
        model.config.use_cache = False  # type: ignore[union-attr]
        axes = dict.fromkeys(range(2), torch.export.Dim.AUTO)
        feeds = torch_inputs(text_inputs())
        with torch.no_grad():
            return to_ir(torch.export.export(model, (), feeds, dynamic_shapes=dict.fromkeys(feeds, axes), strict=False))

    model = program(adapted(build(name), **FAMILIES[name].lora).base_model.model)
    feeds = text_inputs()
    want = run(model, feeds)
    report = fold(model)
    assert relative_error(want, run(model, feeds)) < 2e-6
    OptimizeGraph(set(model.graph.initializers))(model)  # two Reshapes in a row, now that no branch is between them
    assert op_counts(model) == op_counts(program(build(name)))
    assert relative_error(want, run(model, feeds)) < 2e-6
    assert report.rejected == () and len(report.bindings) > 4
    assert all(binding.site.module and isinstance(binding.delta, LowRank) for binding in report.bindings)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_whole_models_from_the_legacy_exporter(name: str) -> None:
    """Dynamic axes: GPT-2's Reshapes take their shapes from the input; names of weights are lost in part."""

    def program(model: object) -> ir.Model:
        return legacy_text_model(model, text_inputs())

    model = program(adapted(build(name), **FAMILIES[name].lora))
    feeds = text_inputs(3, 5)
    want = run(model, feeds)
    report = fold(model)
    assert op_counts(model) == op_counts(program(build(name)))
    assert relative_error(want, run(model, feeds)) < 2e-6
    parameters = {f"inner.{key}" for key, _ in build(name).named_parameters()}
    assert report.rejected == () and {binding.site.name for binding in report.bindings} <= parameters


# Hand-written: x[5, 8] -> [5, 6] by W, with A [8, 3] and B [3, 6].


def base(b: Builder, x: ir.Value) -> ir.Value:
    return b("MatMul", x, b.weight((8, 6), "W"))


def lora(b: Builder, x: ir.Value) -> ir.Value:
    return b("MatMul", b("MatMul", x, b.weight((8, 3))), b.weight((3, 6)))


def transposed(b: Builder, value: ir.Value) -> ir.Value:
    return b("Transpose", value, perm=[1, 0])


HAND: dict[str, Callable[[Builder, ir.Value], ir.Value]] = {
    "scale after": lambda b, x: b("Add", base(b, x), b("Mul", lora(b, x), b.number(0.5))),
    "scale first": lambda b, x: b("Add", b("Mul", b.number(0.5), lora(b, x)), base(b, x)),
    "scale by Div": lambda b, x: b("Add", base(b, x), b("Div", lora(b, x), b.number(4.0))),
    "scale on x": lambda b, x: b("Add", base(b, x), lora(b, b("Mul", x, b.number(2.0)))),
    "scale in A": lambda b, x: b(
        "Add",
        base(b, x),
        b("MatMul", b("MatMul", x, b("Mul", b.weight((8, 3)), b.number(3.0))), b.weight((3, 6))),
    ),
    "scale in B": lambda b, x: b(
        "Add",
        base(b, x),
        b("MatMul", b("MatMul", x, b.weight((8, 3))), b("Div", b.weight((3, 6)), b.number(3.0))),
    ),
    "scale between": lambda b, x: b(
        "Add", base(b, x), b("MatMul", b("Mul", b("MatMul", x, b.weight((8, 3))), b.number(3.0)), b.weight((3, 6)))
    ),
    "one number per rank": lambda b, x: b(
        "Add", base(b, x), b("MatMul", b("Mul", b("MatMul", x, b.weight((8, 3))), b.weight((3,))), b.weight((3, 6)))
    ),
    "one number per output": lambda b, x: b("Add", base(b, x), b("Mul", lora(b, x), b.weight((6,)))),
    "B·A first": lambda b, x: b(
        "Add",
        base(b, x),
        b("MatMul", x, transposed(b, b("MatMul", b.weight((6, 3)), b.weight((3, 8))))),
    ),
    "transposed weights": lambda b, x: b(
        "Add",
        base(b, x),
        b("MatMul", b("MatMul", x, transposed(b, b.weight((3, 8)))), transposed(b, b.weight((6, 3)))),
    ),
    "Gemm": lambda b, x: b(
        "Gemm",
        b("Gemm", x, b.weight((3, 8)), transB=1),
        b.weight((6, 3)),
        b("Gemm", x, b.weight((6, 8), "W"), b.weight((6,)), transB=1),
        transB=1,
        alpha=0.25,
    ),
    "columns": lambda b, x: b(
        "Add",
        base(b, x),
        transposed(b, b("MatMul", b.weight((6, 3)), b("MatMul", b.weight((3, 8)), transposed(b, x)))),
    ),
    "all in columns": lambda b, x: b(
        "Add",
        b("MatMul", b.weight((6, 8), "W"), transposed(b, x)),
        b("MatMul", b.weight((6, 3)), b("MatMul", b.weight((3, 8)), transposed(b, x))),
    ),
    "subtracted": lambda b, x: b("Sub", base(b, x), lora(b, x)),
    "base subtracted": lambda b, x: b("Neg", b("Sub", lora(b, x), base(b, x))),
    "Sum": lambda b, x: b("Sum", lora(b, x), base(b, x), lora(b, x)),
    "adapters first": lambda b, x: b("Add", b("Add", lora(b, x), lora(b, x)), base(b, x)),
    "casts": lambda b, x: b(
        "Add", base(b, x), b("Cast", b("Cast", lora(b, x), to=ir.DataType.DOUBLE), to=ir.DataType.FLOAT)
    ),
    "dropout in inference": lambda b, x: b("Add", base(b, x), lora(b, b("Dropout", x))),
    "identity": lambda b, x: b("Add", base(b, x), b("Identity", lora(b, b("Identity", x)))),
    "biases everywhere": lambda b, x: b(
        "Add",
        b("Add", base(b, x), b.weight((6,), "bias")),
        b(
            "Add",
            b("MatMul", b("Add", b("MatMul", x, b.weight((8, 3))), b.weight((3,))), b.weight((3, 6))),
            b.weight((6,)),
        ),
    ),
    "bias without a place": lambda b, x: b("Add", base(b, x), b("Add", lora(b, x), b.weight((6,)))),
    "residual inside": lambda b, x: b("Add", b("Add", b("Relu", base(b, x)), base2(b, x)), lora(b, x)),
    "residual with the delta": lambda b, x: b("Add", b("Add", b("Relu", lora(b, x)), lora(b, x)), base(b, x)),
    "reshaped": lambda b, x: b(
        "Add",
        b(
            "Reshape",
            b("MatMul", b("Reshape", x, b.weight(np.array([1, 5, 8]))), b.weight((8, 6), "W")),
            b.weight(np.array([5, 6])),
        ),
        lora(b, x),
    ),
    "DoRA on weights": lambda b, x: dora_on_weights(b, x),
    "sum of weights": lambda b, x: b(
        "MatMul",
        x,
        b("Add", b.weight((8, 6), "W"), b("Mul", b("MatMul", b.weight((8, 3)), b.weight((3, 6))), b.number(2.0))),
    ),
    "sum of weights, turned": lambda b, x: b(
        "MatMul",
        x,
        transposed(b, b("Add", b.weight((6, 8), "W"), b("MatMul", b.weight((6, 3)), b.weight((3, 8))))),
    ),
    "sum of weights in a Gemm": lambda b, x: b(
        "Gemm", x, b("Add", b.weight((6, 8), "W"), b("MatMul", b.weight((6, 3)), b.weight((3, 8)))), transB=1
    ),
    "three factors": lambda b, x: b(
        "Add",
        base(b, x),
        b("MatMul", b("MatMul", b("MatMul", x, b.weight((8, 4))), b.weight((4, 2))), b.weight((2, 6))),
    ),
    "multiplied out": lambda b, x: b(
        "Add", base(b, x), b("MatMul", x, b.weight((b.random(8, 2) @ b.random(2, 6)).astype(np.float32)))
    ),
    "the whole scaled": lambda b, x: b("Mul", b("Add", base(b, x), lora(b, x)), b.number(0.125)),
    "base scaled": lambda b, x: b("Add", b("Mul", base(b, x), b.number(0.5)), lora(b, x)),
}


def base2(b: Builder, x: ir.Value) -> ir.Value:
    return b("MatMul", x, b.weight((8, 6), "W2"))


def dora_on_weights(b: Builder, x: ir.Value) -> ir.Value:
    v = b("Add", b.weight((6, 8), "W"), b("MatMul", b.weight((6, 3)), b.weight((3, 8))))
    norm = b("ReduceL2", v, b.weight(np.array([1])), keepdims=1)
    return b("Gemm", x, b("Div", b("Mul", b.weight((6, 1)), v), norm), transB=1)


@pytest.mark.parametrize("name", HAND)
def test_hand_written(name: str) -> None:
    b = Builder()
    x = b.input("x", ["n", 8] if name != "reshaped" else [5, 8])
    model = b.model(b("Relu", HAND[name](b, x)))
    want = run(model, {"x": X})
    report = fold(model)
    assert relative_error(want, run(model, {"x": X})) < 1e-6
    products = op_counts(model)["MatMul"] + op_counts(model)["Gemm"]
    left = {"residual inside": 2, "residual with the delta": 3}.get(name, 1)
    assert products == left, [node.op_type for node in model.graph]
    assert report.bindings and len(report.rejected) == (name == "residual with the delta")
    annotated = [b for value in model.graph.initializers.values() for b in bindings_of(value)]
    assert set(annotated) == set(report.bindings)
    assert all(binding.way == "graph" for binding in annotated)


def test_convolutions_in_either_order() -> None:
    image = np.random.default_rng(0).standard_normal((2, 3, 6, 6)).astype(np.float32)
    for first, second in (((3, 3), (1, 1)), ((1, 1), (3, 3))):
        b = Builder()
        x = b.input("x", [2, 3, 6, 6])
        pads = {(3, 3): {"pads": [1, 1, 1, 1]}, (1, 1): {}}
        down = b("Conv", x, b.weight((2, 3, *first)), **pads[first])
        up = b("Conv", down, b.weight((5, 2, *second)), **pads[second])
        out = b("Add", b("Conv", x, b.weight((5, 3, 3, 3)), b.weight((5,)), pads=[1, 1, 1, 1]), up)
        model = b.model(out)
        want = run(model, {"x": image})
        report = fold(model)
        assert op_counts(model) == {"Conv": 1}
        assert isinstance(report.bindings[0].delta, LowRank)
        assert relative_error(want, run(model, {"x": image})) < 1e-6


def test_a_delta_may_take_its_shape_from_the_base() -> None:
    """`delta.view(base(x).shape)`: the base's product is read for its shape only, which no delta changes."""
    b = Builder()
    x = b.input("x", [5, 8])
    product = b("MatMul", x, b.weight((8, 6), "W"))
    delta = b("Reshape", b("MatMul", b("MatMul", x, b.weight((8, 2))), b.weight((2, 6))), b("Shape", product))
    model = b.model(b("Relu", b("Add", product, delta)))
    want = run(model, {"x": X})
    assert fold(model).bindings
    assert op_counts(model) == {"MatMul": 1, "Relu": 1}
    assert relative_error(want, run(model, {"x": X})) < 1e-6


def test_nodes_that_lead_nowhere_keep_no_delta() -> None:
    b = Builder()
    x = b.input("x", [5, 8])
    product, delta = (
        b("MatMul", x, b.weight((8, 6), "W")),
        b("MatMul", b("MatMul", x, b.weight((8, 2))), b.weight((2, 6))),
    )
    b("Tanh", b("Relu", delta))
    model = b.model(b("Relu", b("Add", product, delta)))
    want = run(model, {"x": X})
    assert fold(model).bindings
    assert op_counts(model) == {"MatMul": 1, "Relu": 1}
    assert relative_error(want, run(model, {"x": X})) < 1e-6


def test_half_precision_base_with_a_float_adapter() -> None:
    """PEFT's autocast: the base in float16, A and B in float32, the sum cast back. One rounding instead of many."""
    b = Builder()
    x = b.input("x", ["n", 8], ir.DataType.FLOAT16)
    product = b("MatMul", x, b.weight(b.random(8, 6).astype(np.float16)))
    delta = b("Mul", lora(b, b("Cast", x, to=ir.DataType.FLOAT)), b.number(2.0))
    total = b("Add", b("Cast", product, to=ir.DataType.FLOAT), delta)
    out = b("Cast", total, to=ir.DataType.FLOAT16)
    out.type = ir.TensorType(ir.DataType.FLOAT16)
    model = b.model(out)
    x16 = X.astype(np.float16)
    [want] = run(model, {"x": x16})
    report = fold(model)
    assert op_counts(model) == {"MatMul": 1} and len(report.bindings) == 1
    assert relative_error([want.astype(np.float32)], [run(model, {"x": x16})[0].astype(np.float32)]) < 4e-3


def test_shared_factor_is_raised_when_all_its_readers_are() -> None:
    b = Builder()
    x = b.input("x", ["n", 8])
    low = b("MatMul", x, b.weight((8, 3)))
    outs = [b("Add", base_of(b, x, name), b("MatMul", low, b.weight((3, 6)))) for name in ("q", "k", "v")]
    model = b.model(*outs)
    want = run(model, {"x": X})
    report = fold(model)
    assert op_counts(model) == {"MatMul": 3} and len(report.bindings) == 3 and report.rejected == ()
    assert relative_error(want, run(model, {"x": X})) < 1e-6


def base_of(b: Builder, x: ir.Value, name: str) -> ir.Value:
    return b("MatMul", x, b.weight((8, 6), f"{name}.weight"))


@pytest.mark.parametrize("both", [True, False])
def test_a_weight_that_is_read_twice(both: bool) -> None:
    """One module called twice has its LoRA in both calls: one delta. In one call only: a weight of its own for that."""
    b = Builder()
    x, y = b.input("x", ["n", 8]), b.input("y", ["n", 8])
    w, a, up = b.weight((8, 6), "fc.weight"), b.weight((8, 3)), b.weight((3, 6))

    def call(value: ir.Value, with_lora: bool) -> ir.Value:
        out = b("MatMul", value, w)
        return b("Add", out, b("MatMul", b("MatMul", value, a), up)) if with_lora else out

    model = b.model(b("Relu", call(x, True)), b("Relu", call(y, both)))
    feeds = {"x": X, "y": X[::-1].copy()}
    want = run(model, feeds)
    report = fold(model)
    assert len(report.bindings) == 1
    assert op_counts(model) == {"MatMul": 2, "Relu": 2} and len(model.graph.initializers) == (1 if both else 2)
    assert relative_error(want, run(model, feeds)) < 1e-6


def test_learned_prefix_stays_and_lora_goes() -> None:
    """LoRA+PL: a soft prompt before the input; its weight is the model's own."""
    b = Builder()
    x = b.input("x", [2, 5, 8])
    prompt = b("Expand", b.weight((1, 3, 8), "prompt"), b.weight(np.array([2, 3, 8])))
    h = b("Concat", prompt, x, axis=1)
    model = b.model(b("Add", b("Add", base(b, h), b.weight((6,))), lora(b, h)))
    feeds = {"x": np.stack([X, -X])}
    want = run(model, feeds)
    report = fold(model)
    assert op_counts(model) == {"Expand": 1, "Concat": 1, "MatMul": 1, "Add": 1} and len(report.bindings) == 1
    assert "prompt" in model.graph.initializers
    assert relative_error(want, run(model, feeds)) < 1e-6


def test_the_outputs_keep_their_names() -> None:
    b = Builder()
    x = b.input("x", ["n", 8])
    out = b("Add", base(b, x), lora(b, x))
    out.name = "logits"
    model = b.model(out)
    fold(model)
    assert [value.name for value in model.graph.outputs] == ["logits"]
    assert run(model, {"x": X})[0].shape == (5, 6)


def test_merged_delta_is_exact() -> None:
    """loralib's MergedLinear: rows of the block that is not enabled do not change."""
    case = CASES["loralib merged"]
    report = raise_lora(export(case.adapted(), case.inputs(), "dynamo"))
    [binding] = report.bindings
    assert isinstance(binding.delta, RaisedAddition) and binding.delta.kind == "raised"
    assert not binding.delta.d[8:16].any() and binding.delta.d[:8].any() and binding.delta.d[16:].any()
