"""Names: by map, exactly, behind one prefix; and never by a guess."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loracc.errors import BindingError, InputError
from loracc.passes.match_names import Rewriting, apply_maps, match_names, nearest, parse_maps

BERT = ["bert.layer.0.query.weight", "bert.layer.1.query.weight", "classifier.weight"]


def test_exact() -> None:
    matching = match_names(BERT, BERT)
    assert matching.found == {name: name for name in BERT} and matching.rewriting is None


@pytest.mark.parametrize(
    ("names", "rewriting"),
    [
        (["layer.0.query.weight", "layer.1.query.weight"], Rewriting("", "bert")),
        (["wrapped.bert.layer.0.query.weight", "classifier.weight"], Rewriting("wrapped", "")),
        (["model.bert.layer.1.query.weight"], Rewriting("model", "")),
    ],
)
def test_a_wrapper_is_not_the_users_problem(names: list[str], rewriting: Rewriting) -> None:
    matching = match_names(names, BERT)
    assert matching.rewriting == rewriting and not matching.unmatched
    assert set(matching.found.values()) <= set(BERT)


def test_wrappers_names_may_change() -> None:
    matching = match_names(["model.language_model.layers.0.q.weight"], ["language_model.model.layers.0.q.weight"])
    assert not matching.unmatched


def test_two_ways_are_an_error_that_names_both() -> None:
    sites = ["encoder.layers.0.q.weight", "decoder.layers.0.q.weight"]
    with pytest.raises(BindingError, match="2 ways") as caught:
        match_names(["layers.0.q.weight"], sites)
    assert "encoder.layers.0.q.weight" in str(caught.value) and "decoder.layers.0.q.weight" in str(caught.value)


def test_a_decoder_is_not_an_encoder() -> None:
    """It is suggested, and never done."""
    matching = match_names(["decoder.layers.0.q.weight"], ["encoder.layers.0.q.weight"])
    assert matching.unmatched == ("decoder.layers.0.q.weight",)
    assert matching.suggestion == Rewriting("decoder", "encoder")


def test_a_layer_is_not_another_layer() -> None:
    matching = match_names(["model.layers.5.q.weight"], ["layers.0.q.weight"])
    assert matching.unmatched == ("model.layers.5.q.weight",)


def test_one_rewriting_for_all() -> None:
    matching = match_names(["a.x.fc.weight", "b.y.fc.weight"], ["x.fc.weight", "y.fc.weight"][:1])
    assert matching.unmatched == ("b.y.fc.weight",)


def test_maps() -> None:
    maps = parse_maps(["old.layers=new.layers", "head.weight=lm_head.weight", "gone.="])
    assert apply_maps("old.layers.0.weight", maps) == "new.layers.0.weight"
    assert apply_maps("old.layers2.0.weight", maps) is None
    assert apply_maps("head.weight", maps) == "lm_head.weight"
    assert apply_maps("gone.x.weight", maps) == "x.weight"
    for text in ("x", "=", "."):
        with pytest.raises(InputError):
            parse_maps([text])


def test_nearest_have_the_same_end() -> None:
    assert nearest("layer.1.query.weight", BERT)[0] == "bert.layer.1.query.weight"
    assert nearest("something.else", BERT) == []


PART = st.sampled_from(["a", "b", "layers", "0", "1", "q"])
NAME = st.lists(PART, min_size=2, max_size=4).map(".".join)


@given(st.sets(NAME, min_size=1, max_size=6), st.sampled_from(["", "model", "x.y"]))
def test_a_prefix_on_every_name_is_found_or_refused(sites: set[str], prefix: str) -> None:
    """Whatever the names, a wrapper's prefix never leads to a wrong site."""
    names = {f"{prefix}.{site}" if prefix else site: site for site in sorted(sites)}
    try:
        matching = match_names(list(names), sites)
    except BindingError as error:
        assert "ways" in str(error)
        return
    if not set(names) & sites:  # else a name that happens to be another site's is that site's
        assert {name: names[name] for name in matching.found} == matching.found or matching.rewriting is not None
    assert len(set(matching.found.values())) == len(matching.found)
