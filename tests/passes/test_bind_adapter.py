"""Binding: complete, or an error that says everything that is wrong."""

from __future__ import annotations

import numpy as np
import pytest

from loracc.adapter import Entry
from loracc.deltas import Addition, DoRA, LowRank, Replacement, RowReplacement
from loracc.errors import BindingError, UnsupportedError
from loracc.folded import bindings_of
from loracc.kinds.packed_experts import PackedExperts
from loracc.passes.bind_adapter import bind
from loracc.sites import TRANSPOSED, Layout, Site
from tests.passes.weights import adapter_of, checkpoint, entry, low_rank


def zeros(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.float32)


def test_binds_and_annotates() -> None:
    model = checkpoint({"fc.weight": zeros(6, 5), "fc.bias": zeros(6)})
    adapter = adapter_of(entry("fc.weight", low_rank(6, 5)), entry("fc.bias", Addition(zeros(6))))
    result = bind(model, [adapter])
    assert [(b.key, b.way, b.adapter) for b in result.bindings] == [
        ("fc.weight", "name", "mine"),
        ("fc.bias", "name", "mine"),
    ]
    assert bindings_of(model.ir.graph.initializers["fc.weight"]) == (result.bindings[0],)


def test_every_unmatched_key_is_named_with_its_nearest() -> None:
    model = checkpoint({"layers.0.q.weight": zeros(6, 5), "layers.1.q.weight": zeros(6, 5)})
    adapter = adapter_of(
        entry("layers.0.q.weight", low_rank(6, 5)), *(entry(f"x.{n}.weight", low_rank(6, 5)) for n in "ab")
    )
    with pytest.raises(BindingError) as caught:
        bind(model, [adapter])
    text = str(caught.value)
    assert all(word in text for word in ("2 of 3", "file.x.a.weight", "file.x.b.weight", "nearest: layers", "--map"))
    result = bind(model, [adapter], allow_unmatched=True)
    assert result.unmatched == ["file.x.a.weight", "file.x.b.weight"]
    assert len(result.bindings) == 1 and "left out" in result.notes[0]
    assert len(bindings_of(model.ir.graph.initializers["layers.0.q.weight"])) == 1


def test_nothing_that_fits_is_an_error_even_when_unmatched_is_allowed() -> None:
    with pytest.raises(BindingError, match="nothing of it fits"):
        bind(
            checkpoint({"a.weight": zeros(6, 5)}), [adapter_of(entry("b.weight", low_rank(6, 5)))], allow_unmatched=True
        )


def test_map() -> None:
    model = checkpoint({"new.fc.weight": zeros(6, 5), "new.fc2.weight": zeros(6, 5)})
    result = bind(model, [adapter_of(entry("encoder.fc2.weight", low_rank(6, 5)))], maps=["encoder=new"])
    assert [(b.site.name, b.key, b.way) for b in result.bindings] == [("new.fc2.weight", "encoder.fc2.weight", "map")]


def test_all_shapes_that_disagree_are_reported() -> None:
    model = checkpoint({"a.weight": zeros(6, 5), "b.weight": zeros(7, 7), "c.weight": zeros(6, 5)})
    adapter = adapter_of(*(entry(f"{n}.weight", low_rank(5, 6)) for n in "ab"), entry("c.weight", low_rank(6, 5)))
    with pytest.raises(BindingError) as caught:
        bind(model, [adapter], allow_unmatched=True)
    assert "a.weight: " in str(caught.value) and "b.weight: " in str(caught.value)
    assert "fan_in_fan_out" in str(caught.value)
    assert not bindings_of(model.ir.graph.initializers["c.weight"])


@pytest.mark.parametrize(
    ("stored", "says", "layout"),
    [
        ((6, 5), False, Layout()),
        ((6, 5), True, Layout()),
        ((5, 6), True, TRANSPOSED),
        ((5, 6), None, TRANSPOSED),
    ],
)
def test_orientation_of_oblong_weights(stored: tuple[int, int], says: bool | None, layout: Layout) -> None:
    (binding,) = bind(
        checkpoint({"fc.weight": zeros(*stored)}), [adapter_of(entry("fc.weight", low_rank(6, 5), says))]
    ).bindings
    assert binding.site.layout == layout


def test_orientation_of_square_weights() -> None:
    tensors = {"oblong.weight": zeros(5, 6), "square.weight": zeros(6, 6)}
    entries = [entry("oblong.weight", low_rank(6, 5), True), entry("square.weight", low_rank(6, 6), True)]
    assert [b.site.layout for b in bind(checkpoint(tensors), [adapter_of(*entries)]).bindings] == [TRANSPOSED] * 2
    straight = {"oblong.weight": zeros(6, 5), "square.weight": zeros(6, 6)}
    with pytest.raises(BindingError, match=r"is square.*fan_in_fan_out=True"):
        bind(checkpoint(straight), [adapter_of(*entries)])
    told = [Site("square", "weight", "linear", "square.weight", TRANSPOSED)]
    (binding,) = bind(
        checkpoint({"square.weight": zeros(6, 6)}, told), [adapter_of(entry("square.weight", low_rank(6, 6)))]
    ).bindings
    assert binding.site.layout == TRANSPOSED


def test_convolutions_of_one_and_linear_layers_are_one_product() -> None:
    flat = low_rank(6, 5)
    spatial = LowRank(flat.a.reshape(2, 5, 1, 1), flat.b, 1.0)
    for delta, shape in ((spatial, (6, 5)), (flat, (6, 5, 1, 1)), (DoRA(spatial, zeros(6) + 1), (6, 5))):
        (binding,) = bind(checkpoint({"c.weight": zeros(*shape)}), [adapter_of(entry("c.weight", delta))]).bindings
        assert binding.delta.shape == shape
    wide = LowRank(np.zeros((2, 5, 3, 3), np.float32), flat.b, 1.0)
    for delta, shape in ((wide, (6, 5)), (flat, (6, 5, 3, 3)), (wide, (6, 45))):
        with pytest.raises(BindingError, match="fit a weight of shape"):
            bind(checkpoint({"c.weight": zeros(*shape)}), [adapter_of(entry("c.weight", delta))])


def test_in_proj_is_an_attentions_weight() -> None:
    model = checkpoint({"attn.in_proj_weight": zeros(18, 6)})
    (binding,) = bind(model, [adapter_of(entry("attn.weight", low_rank(18, 6)))]).bindings
    assert binding.site.parameter == "in_proj_weight"


def test_refused_weights() -> None:
    adapter = adapter_of(entry("fc.weight", low_rank(6, 5)))
    integers = checkpoint({"fc.weight": np.zeros((6, 5), np.int8)})
    with pytest.raises(UnsupportedError, match="quantised"):
        bind(integers, [adapter])
    listed = checkpoint({"fc.weight_quantized": np.zeros((6, 5), np.int8)}, [])
    with pytest.raises(UnsupportedError, match="quantised"):
        bind(listed, [adapter])
    overridable = checkpoint({"fc.weight": zeros(6, 5)})
    overridable.ir.graph.inputs.append(overridable.ir.graph.initializers["fc.weight"])
    with pytest.raises(BindingError, match="input of the graph"):
        bind(overridable, [adapter])


def test_conflicts() -> None:
    model = checkpoint({"fc.weight": zeros(6, 5)})
    new = Replacement(zeros(6, 5))
    one, two = adapter_of(entry("fc.weight", new), name="one"), adapter_of(entry("fc.weight", new), name="two")
    with pytest.raises(BindingError, match="both replace"):
        bind(model, [one, two])
    twice = adapter_of(entry("a.weight", low_rank(6, 5)), entry("b.weight", low_rank(6, 5)))
    with pytest.raises(BindingError, match="both change"):
        bind(model, [twice], maps=["a=fc", "b=fc"])
    added = [adapter_of(entry("fc.weight", low_rank(6, 5, seed=i)), name=str(i)) for i in range(3)]
    assert len(bind(model, [one, *added]).bindings) == 4


def test_token_rows_of_two_adapters() -> None:
    model = checkpoint({"emb.weight": zeros(9, 4)})

    def rows(name: str, *tokens: int) -> object:
        return adapter_of(entry("emb.weight", RowReplacement(np.array(tokens), zeros(len(tokens), 4))), name=name)

    assert len(bind(model, [rows("a", 1, 2), rows("b", 3)]).bindings) == 2  # type: ignore[list-item]
    with pytest.raises(BindingError, match="both replace"):
        bind(model, [rows("a", 1, 2), rows("b", 2)])  # type: ignore[list-item]


def test_the_better_known_site_wins_and_doubt_is_an_error() -> None:
    sites = [
        Site("fc", "weight", "linear", "val_1", source="scope"),
        Site("fc", "weight", "linear", "val_2", source="name"),
    ]
    model = checkpoint({"val_1": zeros(6, 5), "val_2": zeros(6, 5)}, sites)
    (binding,) = bind(model, [adapter_of(entry("fc.weight", low_rank(6, 5)))]).bindings
    assert binding.site.initializer == "val_2"
    doubt = [Site("fc", "weight", "linear", name) for name in ("val_1", "val_2")]
    with pytest.raises(BindingError, match="2 weights of the model go by this name"):
        bind(
            checkpoint({"val_1": zeros(6, 5), "val_2": zeros(6, 5)}, doubt),
            [adapter_of(entry("fc.weight", low_rank(6, 5)))],
        )


def packed(out: int, inner: int, *, r: int = 2, experts: int = 3, first: bool | None = None) -> PackedExperts:
    delta = low_rank(out, inner, r=r * experts)
    return PackedExperts(delta.a, delta.b, 1.0, r, first)


def experts_entry(parameter: str, delta: PackedExperts, others: tuple[str, ...]) -> Entry:
    alternatives = tuple(Entry("experts", other, delta, ("k",)) for other in others)
    return Entry("experts", parameter, delta, (f"file.{parameter}",), alternatives=alternatives)


def test_shapes_tell_expert_parameters_apart() -> None:
    """The file's order is the model's, which need not be that of target_parameters."""
    model = checkpoint({"experts.up": zeros(3, 8, 5), "experts.down": zeros(3, 5, 4)})
    entries = [experts_entry("down", packed(8, 5), ("up",)), experts_entry("up", packed(5, 4), ("down",))]
    found = {b.site.name: b.delta.shape for b in bind(model, [adapter_of(*entries)]).bindings}
    assert found == {"experts.up": (3, 8, 5), "experts.down": (3, 5, 4)}


def test_square_experts_follow_their_oblong_sibling() -> None:
    model = checkpoint({"experts.up": zeros(3, 5, 8), "experts.down": zeros(3, 5, 5)})
    entries = [experts_entry("up", packed(8, 5), ("down",)), experts_entry("down", packed(5, 5), ("up",))]
    bindings = {b.site.parameter: b.delta for b in bind(model, [adapter_of(*entries)]).bindings}
    delta = packed(5, 5)
    first = np.einsum("ore,eri->eio", delta.b.reshape(5, 2, 3), delta.a.reshape(3, 2, 5))
    np.testing.assert_allclose(bindings["down"].materialize(np.dtype(np.float32)), first, rtol=1e-5, atol=1e-6)


#: (usual parameter, the other, (out, in)) from the innermost wrapper out; the other way round the shapes fit too.
UNGATED = (("down_proj", "up_proj", (8, 5)), ("up_proj", "down_proj", (5, 8)))


def test_experts_that_nothing_tells_apart_are_refused() -> None:
    square = checkpoint({"experts.down": zeros(3, 5, 5)})
    with pytest.raises(BindingError, match="are square"):
        bind(square, [adapter_of(experts_entry("down", packed(5, 5), ()))])
    assert bind(square, [adapter_of(experts_entry("down", packed(5, 5, first=True), ()))]).bindings
    ungated = checkpoint({"experts.up_proj": zeros(3, 5, 8), "experts.down_proj": zeros(3, 8, 5)})
    pairs = [experts_entry(name, packed(*size), (other,)) for name, other, size in UNGATED]
    found = {b.key: b.delta.shape for b in bind(ungated, [adapter_of(*pairs)]).bindings}
    assert found == {"experts.up_proj": (3, 5, 8), "experts.down_proj": (3, 8, 5)}
    twins = checkpoint({"experts.w1": zeros(3, 8, 5), "experts.w3": zeros(3, 8, 5)})
    entries = [experts_entry("w1", packed(8, 5), ("w3",)), experts_entry("w3", packed(8, 5), ("w1",))]
    with pytest.raises(BindingError, match="in 2 ways"):
        bind(twins, [adapter_of(*entries)])
    few = checkpoint({"experts.down": zeros(4, 5, 6)})
    with pytest.raises(BindingError, match="fit a weight of shape"):
        bind(few, [adapter_of(experts_entry("down", packed(5, 6), ()))])


def test_a_saved_module_in_the_other_orientation() -> None:
    """modules_to_save of a Conv1D comes as [in, out]; canonical is [out, in]."""
    site = Site("fc", "weight", "linear", "fc.weight", TRANSPOSED)
    new = np.arange(30, dtype=np.float32).reshape(5, 6)
    (binding,) = bind(
        checkpoint({"fc.weight": zeros(5, 6)}, [site]), [adapter_of(entry("fc.weight", Replacement(new)))]
    ).bindings
    assert isinstance(binding.delta, Replacement)
    np.testing.assert_array_equal(binding.delta.new, new.T)
