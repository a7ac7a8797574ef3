"""What looks like LoRA and is not: untouched, each with its reason. And random graphs of both sorts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loracc.passes.find_sites import find_sites
from loracc.passes.fold import FoldPass
from loracc.passes.raise_lora import raise_lora
from loracc.passes.raised import Raised
from loracc.passes.unshare import UnsharePass
from tests.graphs import Builder, op_counts, relative_error, run

X = np.random.default_rng(7).standard_normal((5, 8)).astype(np.float32)
Graph = tuple[ir.Value, ...]


def base(b: Builder, x: ir.Value) -> ir.Value:
    return b("MatMul", x, b.weight((8, 6), "fc.weight"))


def down(b: Builder, x: ir.Value) -> ir.Value:
    return b("MatMul", x, b.weight((8, 3)))


def up(b: Builder, x: ir.Value) -> ir.Value:
    return b("MatMul", x, b.weight((3, 6)))


def lora(b: Builder, x: ir.Value) -> ir.Value:
    return up(b, down(b, x))


def used_twice(b: Builder, x: ir.Value, *, low: bool) -> Graph:
    inner = down(b, x)
    delta = up(b, inner)
    return b("Add", base(b, x), delta), b("Relu", inner if low else delta)


def base_used_twice(b: Builder, x: ir.Value) -> Graph:
    product = base(b, x)
    return b("Add", product, lora(b, x)), b("Relu", product)


def intermediate_output(b: Builder, x: ir.Value) -> Graph:
    delta = lora(b, x)
    return b("Add", base(b, x), delta), delta


def weight_input(b: Builder, x: ir.Value) -> Graph:
    return (b("Add", base(b, x), up(b, b("MatMul", x, b.input("a", [8, 3])))),)


def overridable(b: Builder, x: ir.Value) -> Graph:
    a = b.weight((8, 3), "a")
    b.inputs.append(a)
    return (b("Add", base(b, x), up(b, b("MatMul", x, a))),)


def base_weight_input(b: Builder, x: ir.Value) -> Graph:
    return (b("Add", b("MatMul", x, b.input("w", [8, 6])), lora(b, x)),)


def gated(b: Builder, x: ir.Value) -> Graph:
    gate = b("Sigmoid", b("MatMul", x, b.weight((8, 1))))
    return (b("Add", base(b, x), b("Mul", lora(b, x), gate)),)


def scale_input(b: Builder, x: ir.Value) -> Graph:
    return (b("Add", base(b, x), b("Mul", lora(b, x), b.input("s", []))),)


def training(b: Builder, x: ir.Value) -> Graph:
    dropped = b("Dropout", x, b.number(0.0), b.weight(np.asarray(True)))
    return (b("Add", base(b, x), lora(b, dropped)),)


def houlsby(b: Builder, x: ir.Value) -> Graph:
    h = base(b, x)
    inner = b("Gelu", b("MatMul", h, b.weight((6, 2))), approximate="none")
    return (b("Add", h, b("MatMul", inner, b.weight((2, 6)))),)


def convolution(b: Builder, x: ir.Value) -> Graph:
    image = b("Reshape", x, b.weight(np.array([5, 4, 2, 1])))
    low = b("Conv", image, b.weight((2, 4, 2, 1)))
    wide = b("Conv", image, b.weight((4, 4, 1, 1)), strides=[2, 1])
    return (b("Add", wide, b("Conv", low, b.weight((4, 2, 1, 1)))),)


def quantized(b: Builder, x: ir.Value) -> Graph:
    stored = b.weight(b.rng.integers(-9, 9, (8, 6)).astype(np.int8))
    w = b("DequantizeLinear", stored, b.number(0.1))
    return (b("Add", b("MatMul", x, w), lora(b, x)),)


def zero_sum(b: Builder, x: ir.Value) -> Graph:
    total = b("Add", base(b, x), b("Relu", x_to_six(b, x)))
    masked = b("Mul", total, b.weight(np.array([0, 1, 1, 1, 1, 1], np.float32)))
    return (b("Add", masked, lora(b, x)),)


def x_to_six(b: Builder, x: ir.Value) -> ir.Value:
    return b("Slice", x, b.weight(np.array([0])), b.weight(np.array([6])), b.weight(np.array([1])))


LOOKALIKES: dict[str, tuple[Callable[[Builder, ir.Value], Graph], str]] = {
    "bottleneck beside the weight": (lambda b, x: (b("Add", base(b, x), up(b, b("Relu", down(b, x)))),), "Relu"),
    "bottleneck after the weight": (houlsby, "Gelu"),
    "activation after B": (lambda b, x: (b("Add", base(b, x), b("Tanh", lora(b, x))),), "Tanh"),
    "norm between": (
        lambda b, x: (
            b("Add", base(b, x), up(b, b("LayerNormalization", down(b, x), b.weight((3,)), b.weight((3,))))),
        ),
        "LayerNormalization",
    ),
    "another input": (lambda b, x: (b("Add", base(b, x), lora(b, b("Relu", x))),), "reads 'relu_"),
    "gate computed from the input": (gated, "scale 'sigmoid_1_out' is computed at run time"),
    "scale is an input": (scale_input, "scale 's' is a graph input"),
    "A is an input": (weight_input, "weight 'a' is a graph input"),
    "A can be overridden": (overridable, "weight 'a' is a graph input"),
    "W is an input": (base_weight_input, "'w', which is a graph input"),
    "A's product is used elsewhere": (lambda b, x: used_twice(b, x, low=True), "also read by Relu"),
    "B's product is used elsewhere": (lambda b, x: used_twice(b, x, low=False), "also read by Relu"),
    "B's product is an output": (intermediate_output, "is an output of the graph"),
    "W's product is used elsewhere": (base_used_twice, "the base's product"),
    "dropout in training mode": (training, "training mode"),
    "no weight beside it": (lambda b, x: (b("Add", x, b("MatMul", down(b, x), b.weight((3, 8)))),), "no weight"),
    "quantized weight": (quantized, "is computed in the graph"),
    "zeros on the weight's product": (zero_sum, "by zero"),
    "another geometry": (convolution, "another operation than the base's"),
}


@pytest.mark.parametrize("name", LOOKALIKES)
def test_lookalikes_stay_byte_for_byte_and_say_why(name: str) -> None:
    make, reason = LOOKALIKES[name]
    b = Builder()
    model = b.model(*make(b, b.input("x", [5, 8])), opset=20)
    before = ir.serde.serialize_model(model).SerializeToString(deterministic=True)
    report = raise_lora(model)
    assert ir.serde.serialize_model(model).SerializeToString(deterministic=True) == before
    assert report.bindings == ()
    assert len(report.rejected) == 1 and reason in report.rejected[0].reason, report.rejected
    assert str(report.rejected[0]).endswith(".")
    print(f"{name:32} untouched: {report.rejected[0].where}: {report.rejected[0].reason}")  # run with -s for the table


NEITHER: dict[str, Callable[[Builder, ir.Value], Graph]] = {
    "two full weights": lambda b, x: (b("Add", base(b, x), b("MatMul", x, b.weight((8, 6)))),),
    "wide feed-forward": lambda b, x: (
        b("Add", x, b("MatMul", b("Relu", b("MatMul", x, b.weight((8, 32)))), b.weight((32, 8)))),
    ),
    "autoencoder": lambda b, x: (b("Add", up(b, b("Relu", down(b, x))), b.weight((6,))),),
    "factorized": lambda b, x: (b("Add", lora(b, x), b.weight((6,))),),
    "weight norm": lambda b, x: (
        b("MatMul", x, b("Div", w := b.weight((8, 6)), b("ReduceL2", w, b.weight(np.array([0])), keepdims=1))),
    ),
    "batched": lambda b, x: (b("Add", b("MatMul", x, b.weight((2, 8, 6))), b("MatMul", x, b.weight((2, 8, 6)))),),
}


@pytest.mark.parametrize("name", NEITHER)
def test_ordinary_graphs_are_neither_raised_nor_reported(name: str) -> None:
    b = Builder()
    model = b.model(*NEITHER[name](b, b.input("x", [5, 8])))
    before = ir.serde.serialize_model(model).SerializeToString(deterministic=True)
    assert raise_lora(model) == Raised()
    assert ir.serde.serialize_model(model).SerializeToString(deterministic=True) == before


# Random graphs.


@dataclass(frozen=True)
class Term:
    """A low-rank term: how it is written, how it is scaled, and what is wrong with it (None: nothing)."""

    rank: int
    writing: str
    scaling: str
    cast: bool
    negative: bool
    flaw: str | None = None


WRITINGS = ("rows", "gemm", "columns", "weights first", "turned")
SCALINGS = ("none", "mul", "div", "in A", "in B", "between", "per output")
FLAWS = ("relu", "other input", "gate", "softmax", "weight input", "scale input", "used elsewhere", "an output")

terms = st.builds(
    Term,
    st.integers(1, 5),
    st.sampled_from(WRITINGS),
    st.sampled_from(SCALINGS),
    st.booleans(),
    st.booleans(),
)
flawed = st.builds(
    Term,
    st.integers(1, 3),
    st.sampled_from(("rows", "gemm")),
    st.sampled_from(("none", "mul", "div")),
    st.booleans(),
    st.booleans(),
    st.sampled_from(FLAWS),
)


def write(b: Builder, x: ir.Value, other: ir.Value, term: Term, others: list[ir.Value]) -> ir.Value:
    """The term as a graph; ``others`` gets what of it is wanted elsewhere."""
    a, w = b.weight((8, term.rank)), b.weight((term.rank, 6))
    if term.flaw == "weight input":
        a = b.input(f"a{len(b.inputs)}", [8, term.rank])
    if term.scaling == "in A":
        a = b("Mul", a, b.number(1.5))
    if term.scaling == "in B":
        w = b("Div", w, b.number(1.5))
    source = other if term.flaw == "other input" else x
    first = term.writing == "weights first" and term.scaling != "between"
    low = source if first else _low(b, source, a, term)
    if term.flaw in ("used elsewhere", "an output"):
        others.append(b("Tanh", low) if term.flaw == "used elsewhere" else low)
    if term.flaw in ("relu", "softmax"):
        low = b("Relu" if term.flaw == "relu" else "Softmax", low)
    if term.scaling == "between":
        low = b("Mul", b.number(0.3), low)
    out = b("MatMul", x, b("MatMul", a, w)) if first else _high(b, low, w, term)
    out = {
        "mul": lambda: b("Mul", out, b.number(0.7)),
        "div": lambda: b("Div", out, b.number(-3.0)),
        "per output": lambda: b("Mul", out, b.weight((6,))),
    }.get(term.scaling, lambda: out)()
    if term.cast:
        out = b("Cast", b("Cast", out, to=ir.DataType.DOUBLE), to=ir.DataType.FLOAT)
    if term.negative:
        out = b("Neg", out)
    if term.flaw == "gate":
        return b("Mul", out, b("ReduceMax", x, keepdims=0))
    return b("Mul", out, b.input(f"s{len(b.inputs)}", [])) if term.flaw == "scale input" else out


def _low(b: Builder, x: ir.Value, a: ir.Value, term: Term) -> ir.Value:
    if term.writing == "gemm":
        return b("Gemm", x, b("Transpose", a, perm=[1, 0]), transB=1)
    if term.writing == "columns":
        return b("MatMul", b("Transpose", a, perm=[1, 0]), b("Transpose", x, perm=[1, 0]))
    return b("MatMul", x, a)


def _high(b: Builder, low: ir.Value, w: ir.Value, term: Term) -> ir.Value:
    if term.writing == "gemm":
        return b("Gemm", low, w, alpha=0.5)
    if term.writing == "columns":
        return b("Transpose", b("MatMul", b("Transpose", w, perm=[1, 0]), low), perm=[1, 0])
    if term.writing == "turned":
        return b("Transpose", b("Transpose", b("MatMul", low, w), perm=[1, 0]), perm=[1, 0])
    return b("MatMul", low, w)


def add_up(b: Builder, parts: list[ir.Value], how: list[int]) -> ir.Value:
    """The sum of all parts in the order and by the operators that the numbers say."""
    queue = list(parts)
    for number in how:
        if len(queue) == 1:
            break
        first = queue.pop(number % len(queue))
        second = queue.pop((number // 7) % len(queue))
        queue.append(b(("Add", "Sub", "Sum")[number % 3], first, second))
    return b("Sum", *queue) if len(queue) > 1 else queue[0]


def build(good: list[Term], bad: list[Term], how: list[int], bias: bool, residual: bool, seed: int) -> ir.Model:
    b = Builder(seed)
    x, other = b.input("x", ["n", 8]), b.input("other", ["n", 8])
    others: list[ir.Value] = []
    parts = [base(b, x), *(write(b, x, other, term, others) for term in (*good, *bad))]
    if bias:
        parts.append(b.weight((6,), "fc.bias"))
    if residual:
        parts.append(b("Relu", x_to_six(b, other)))
    return b.model(b("Sigmoid", add_up(b, parts, how)), b("Relu", other), *others)


def check(model: ir.Model) -> Raised:
    """Raise and fold; the outputs stay what they were."""
    rng = np.random.default_rng(3)
    shapes = {str(v.name): [d if isinstance(d, int) else 5 for d in v.shape or ()] for v in model.graph.inputs}
    feeds = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    want = run(model, feeds)
    report = raise_lora(model)
    UnsharePass(find_sites(model))(model)
    FoldPass()(model)
    assert relative_error(want, run(model, feeds)) < 2e-5
    return report


orders = st.lists(st.integers(0, 1000), min_size=8, max_size=8)


@settings(max_examples=80, deadline=None)
@given(st.lists(terms, min_size=1, max_size=3), orders, st.booleans(), st.booleans(), st.integers(0, 99))
def test_random_sums_of_low_rank_terms(good: list[Term], how: list[int], bias: bool, residual: bool, seed: int) -> None:
    model = build(good, [], how, bias, residual, seed)
    report = check(model)
    counts = op_counts(model)
    assert counts["MatMul"] + counts["Gemm"] == 1
    assert report.rejected == () and {b.site.name for b in report.bindings} <= {"fc.weight", "fc.bias"}
    assert len([b for b in report.bindings if b.site.kind == "linear"]) == len(good)


@settings(max_examples=80, deadline=None)
@given(
    st.lists(terms, max_size=2),
    st.lists(flawed, min_size=1, max_size=2),
    orders,
    st.booleans(),
    st.booleans(),
    st.integers(0, 99),
)
def test_random_sums_with_terms_that_are_not_linear(
    good: list[Term], bad: list[Term], how: list[int], bias: bool, residual: bool, seed: int
) -> None:
    model = build(good, bad, how, bias, residual, seed)
    report = check(model)
    counts = op_counts(model)
    assert counts["MatMul"] + counts["Gemm"] == 1 + 2 * len(bad)
    assert len(report.rejected) >= 1
    assert len([b for b in report.bindings if b.site.kind == "linear"]) == len(good)


STEPS = (
    "weight",
    "lora",
    "multiplied",
    "add",
    "sub",
    "sum",
    "scale",
    "vector",
    "column",
    "bias",
    "neg",
    "relu",
    "gemm",
)


def random_step(b: Builder, x: ir.Value, step: str, one: ir.Value, two: ir.Value) -> ir.Value:
    match step:
        case "weight":
            return b("MatMul", x, b.weight((8, 6)))
        case "lora":
            return lora(b, x)
        case "multiplied":
            return b("MatMul", x, b("MatMul", b.weight((8, 2)), b.weight((2, 6))))
        case "add" | "sub":
            return b(step.capitalize(), one, two)
        case "sum":
            return b("Sum", one, two, one)
        case "neg" | "relu":
            return b(step.capitalize(), one)
        case "gemm":
            return b("Gemm", b("Gemm", x, b.weight((8, 2))), b.weight((2, 6)), one, beta=2.0)
        case "gemm at one":
            return b("Gemm", b("Gemm", x, b.weight((8, 2))), b.weight((2, 6)), one)
        case "bias":
            return b("Add", one, b.weight((6,)))
    factors = {"scale": b.number(-0.5), "vector": b.weight((6,)), "column": b.weight((5, 1))}
    return b("Mul", one, factors[step])


def random_graph(steps: list[tuple[str, int, int]], outputs: list[int], seed: int) -> ir.Model:
    """Any steps on any earlier values: terms that are shared, come in twice, cancel, or lie under other operators."""
    b = Builder(seed)
    x = b.input("x", ["n", 8])
    b.input("other", ["n", 8])
    pool = [base(b, x)]
    for step, first, second in steps:
        one, two = pool[-1 - first % len(pool)], pool[second % len(pool)]
        made = random_step(b, x, step, one, two)
        pool.append(made)
    chosen = {pool[number % len(pool)]: None for number in outputs} | {pool[-1]: None}
    return b.model(*chosen)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(STEPS), st.integers(0, 3), st.integers(0, 30)),
        min_size=2,
        max_size=14,
    ),
    st.lists(st.integers(0, 20), max_size=2),
    st.integers(0, 99),
)
def test_any_graph_computes_what_it_did(steps: list[tuple[str, int, int]], outputs: list[int], seed: int) -> None:
    model = random_graph(steps, outputs, seed)
    feeds = {"x": X, "other": X}
    want = run(model, feeds)
    nodes = len(model.graph)
    report = raise_lora(model)
    UnsharePass(find_sites(model))(model)
    FoldPass()(model)
    largest = max(float(np.abs(array).max()) for array in want)
    for one, two in zip(want, run(model, feeds), strict=True):
        assert one.shape == two.shape
        assert np.abs(one - two).max() <= 1e-4 * max(largest, 1.0)
    assert len(model.graph) < nodes if report.bindings else len(model.graph) == nodes
