"""Un-sharing and folding: the right readers get the right weights, and no node is added."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from loracc.adapter import Delta
from loracc.deltas import LowRank, Replacement, RowReplacement
from loracc.dtypes import Array
from loracc.folded import Binding, FoldedTensor, annotate
from loracc.passes.fold import FoldPass
from loracc.passes.unshare import UnsharePass
from loracc.sites import Layout, Site
from tests.passes.weights import checkpoint, low_rank, tied_graph

NUM, DIM = 7, 4
IDS = np.array([0, 3, 6], np.int64)


@pytest.fixture
def weight() -> Array:
    return np.random.default_rng(9).standard_normal((NUM, DIM)).astype(np.float32)


def at(site: Site, delta: Delta) -> Binding:
    return Binding(site, delta, "mine", site.name, "name")


def folded(model: ir.Model, sites: list[Site], bindings: list[Binding]) -> tuple[ir.Model, UnsharePass]:
    annotate(model, bindings)
    unshare = UnsharePass(sites)
    unshare(model)
    FoldPass()(model)
    return model, unshare


def run(model: ir.Model) -> Array:
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"ids": IDS})[0])


EMB, HEAD = low_rank(NUM, DIM, seed=1), low_rank(NUM, DIM, seed=2)
ROWS = RowReplacement(np.array([3, 6]), np.full((2, DIM), 2.0, np.float32))
COPY = Replacement(np.full((NUM, DIM), 0.5, np.float32), of_base=True)


@pytest.mark.parametrize(
    ("emb", "head", "clones"),
    [
        ([EMB], [], 1),
        ([], [HEAD], 1),
        ([EMB], [HEAD], 1),
        ([EMB], [LowRank(EMB.a.copy(), EMB.b.copy(), EMB.s)], 0),
        ([Replacement(np.ones((NUM, DIM), np.float32))], [], 1),
    ],
    ids=["embedding", "head", "both", "equal", "saved"],
)
@pytest.mark.parametrize("known", [True, False])
def test_tied_graph(weight: Array, emb: list[Delta], head: list[Delta], clones: int, known: bool) -> None:
    model, sites = tied_graph(weight)
    nodes = len(model.graph)
    bindings = [at(sites[0], delta) for delta in emb] + [at(sites[1], delta) for delta in head]
    model, unshare = folded(model, sites if known else [], bindings)
    assert len(unshare.clones) == clones and len(model.graph) == nodes

    expected_emb = emb[0].apply(weight.astype(np.float64)) if emb else weight
    expected_head = head[0].apply(weight.astype(np.float64)) if head else weight
    np.testing.assert_allclose(run(model), expected_emb[IDS] @ expected_head.T, rtol=1e-5, atol=1e-5)
    if known:
        assert {site.name: site.initializer for site in unshare.sites}["emb.weight"] == "emb.weight"
        assert [site.consumer == "" for site in unshare.sites] == [False, bool(clones)]


@pytest.mark.parametrize("delta", [ROWS, COPY])
def test_what_follows_the_tie_goes_to_both(weight: Array, delta: Delta) -> None:
    model, sites = tied_graph(weight)
    model, unshare = folded(model, sites, [at(sites[0], delta)])
    assert not unshare.clones
    new = delta.apply(weight)
    np.testing.assert_allclose(run(model), new[IDS] @ new.T, rtol=1e-5)


def test_token_rows_with_a_change_of_the_head(weight: Array) -> None:
    model, sites = tied_graph(weight)
    model, unshare = folded(model, sites, [at(sites[0], ROWS), at(sites[1], HEAD)])
    assert [clone.name for clone in unshare.clones] == ["head.weight"]
    rows = ROWS.apply(weight)
    np.testing.assert_allclose(run(model), rows[IDS] @ HEAD.apply(rows).T, rtol=1e-5, atol=1e-5)


def test_token_rows_of_the_head_alone_do_not_reach_the_embedding(weight: Array) -> None:
    model, sites = tied_graph(weight)
    model, _ = folded(model, sites, [at(sites[1], ROWS)])
    np.testing.assert_allclose(run(model), weight[IDS] @ ROWS.apply(weight).T, rtol=1e-5)


def test_a_shared_transpose_is_taken_over(weight: Array) -> None:
    """Two heads behind one Transpose: the clone is stored as they read it."""
    model, _ = tied_graph(weight)
    turn = next(node for node in model.graph if node.op_type == "Transpose")
    product = next(node for node in model.graph if node.op_type == "MatMul")
    second = ir.Node("", "MatMul", [product.inputs[0], turn.outputs[0]], name="/head2/MatMul")
    second.outputs[0].name = "y2"
    model.graph.append(second)
    model.graph.outputs.append(second.outputs[0])
    sites = [
        Site("emb", "weight", "embedding", "emb.weight", consumer="/emb/Gather"),
        Site("head", "weight", "linear", "emb.weight", consumer="/head/MatMul"),
        Site("head2", "weight", "linear", "emb.weight", consumer="/head2/MatMul"),
    ]
    model, unshare = folded(model, sites, [at(sites[2], HEAD)])
    (clone,) = unshare.clones
    assert clone.name == "head2.weight" and clone.sites[0].layout == Layout((1, 0))
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    first, other = session.run(None, {"ids": IDS})
    np.testing.assert_allclose(first, weight[IDS] @ weight.T, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(other, weight[IDS] @ HEAD.apply(weight.astype(np.float64)).T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("changed", "clone_is_folded"), [("emb", False), ("head", True)])
def test_a_checkpoints_tied_head_becomes_a_tensor(weight: Array, changed: str, clone_is_folded: bool) -> None:
    sites = [
        Site("emb", "weight", "other", "emb.weight"),
        Site("head", "weight", "linear", "emb.weight", consumer="head.weight"),
    ]
    base = checkpoint({"emb.weight": weight}, sites)
    bound = next(site for site in sites if site.module == changed)
    model, unshare = folded(base.ir, sites, [at(bound, EMB)])
    values = model.graph.initializers
    assert list(values) == ["emb.weight", "head.weight"] and [c.name for c in unshare.clones] == ["head.weight"]
    assert isinstance(values["head.weight"].const_value, FoldedTensor) == clone_is_folded
    new = EMB.apply(weight.astype(np.float64)).astype(np.float32)
    for name in ("emb", "head"):
        tensor = values[f"{name}.weight"].const_value
        assert tensor is not None and tensor.name == f"{name}.weight"
        np.testing.assert_array_equal(tensor.numpy(), new if name == changed else weight)


def test_other_names_and_blocks_are_no_sharing(weight: Array) -> None:
    names = [Site("file.name", "weight", "other", "w"), Site("module.name", "weight", "other", "w")]
    base = checkpoint({"w": weight}, names)
    _, unshare = folded(base.ir, names, [at(names[1], EMB)])
    assert not unshare.clones

    blocks = [
        Site(name, "weight", "linear", "w", Layout((), start, stop), consumer=name)
        for name, start, stop in (("q", 0, 3), ("k", 3, None))
    ]
    fused = checkpoint({"w": weight}, blocks)
    model, unshare = folded(fused.ir, blocks, [at(blocks[1], low_rank(4, DIM))])
    assert not unshare.clones
    tensor = model.graph.initializers["w"].const_value
    assert tensor is not None
    np.testing.assert_array_equal(tensor.numpy()[:3], weight[:3])
    assert (tensor.numpy()[3:] != weight[3:]).any()


def test_folding_twice_changes_nothing(weight: Array) -> None:
    base = checkpoint({"w.weight": weight})
    annotate(base.ir, [at(next(iter(base.sites)), EMB)])
    assert FoldPass()(base.ir).modified
    assert not FoldPass()(base.ir).modified
    assert not UnsharePass(base.sites)(base.ir).modified
