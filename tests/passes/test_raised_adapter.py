"""A raised adapter, written as PEFT writes them, does in PEFT what the graph did."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from loracc.deltas import Addition, LowRank
from loracc.errors import UnsupportedError
from loracc.folded import Binding
from loracc.formats.write_peft import write_peft
from loracc.passes.raise_lora import raise_lora
from loracc.passes.raised_adapter import raised_entries
from loracc.sites import Site
from tests.graphs import Builder
from tests.lora_modules import CASES, export

ROUND_TRIPS = ("peft linear", "peft linear bias", "peft dora", "peft embedding", "peft conv2d", "loralib merged")


@pytest.mark.parametrize("name", [*ROUND_TRIPS, "peft two adapters"])
def test_peft_reads_it_back(name: str, tmp_path: Path) -> None:
    import torch
    from peft import PeftModel

    case = CASES[name]
    model = export(case.adapted(), case.inputs(), "dynamo")
    entries = raised_entries(model, raise_lora(model).bindings)
    write_peft(entries, tmp_path)
    again = PeftModel.from_pretrained(case.plain(), str(tmp_path)).eval()
    with torch.no_grad():
        want, got = (module(*case.inputs()).numpy() for module in (case.adapted(), again))
    assert np.abs(want - got).max() <= 2e-6 * np.abs(want).max()


def test_what_no_adapter_can_hold_is_refused() -> None:
    model = Builder().model()
    site = Site("fc", "weight", "linear", "fc.weight")
    full = Binding(site, Addition(np.eye(4)), "graph", "fc.weight", "graph")
    nameless = Binding(
        Site("", "weight", "linear", "val_3"),
        LowRank(np.ones((1, 4)), np.ones((4, 1)), 1.0),
        "graph",
        "weight",
        "graph",
    )
    with pytest.raises(UnsupportedError, match=r"(?s)full rank.*'val_3'"):
        raised_entries(model, [full, nameless])
