"""Every kind of module with LoRA inside, through every exporter (run with -s, without xdist, for the table).

Raised and folded: the operators of the unadapted module's own export, and the outputs of the graph that came in.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir
import pytest

from loracc.passes.find_sites import find_sites
from loracc.passes.fold import FoldPass
from loracc.passes.raise_lora import raise_lora
from loracc.passes.unshare import UnsharePass
from tests.graphs import op_counts, relative_error, run
from tests.lora_modules import CASES, EXPORTERS, export, plain_export

Rows = dict[tuple[str, str], str]


@pytest.fixture(scope="module")
def rows() -> Iterator[Rows]:
    """Collects a cell from each test; the table is printed when all have run."""
    cells: Rows = {}
    yield cells
    print("\n" + f"{'raised and folded':28}" + "".join(f"{exporter:>26}" for exporter in EXPORTERS))
    for name in CASES:
        print(f"{name:28}" + "".join(f"{cells.get((name, exporter), '-'):>26}" for exporter in EXPORTERS))


@pytest.mark.parametrize("exporter", EXPORTERS)
@pytest.mark.parametrize("name", CASES)
def test_modules(name: str, exporter: str, rows: Rows) -> None:
    case = CASES[name]
    inputs = case.inputs()
    model: ir.Model = export(case.adapted(), inputs, exporter)
    plain = plain_export(name, exporter)
    before = op_counts(model).total()
    feeds = [tensor.numpy() for tensor in inputs]
    want = run(model, feeds)
    report = raise_lora(model)
    UnsharePass(find_sites(model))(model)
    FoldPass()(model)
    error = relative_error(want, run(model, feeds))
    rows[name, exporter] = f"{before} -> {op_counts(model).total()} ops  {error:.1e}"
    assert op_counts(model) == op_counts(plain)
    assert error < 1e-6
    assert report.rejected == ()
    sites = {binding.site.name for binding in report.bindings if binding.site.kind != "bias"}
    # A sum of weights torch's optimizer has folded itself: there is nothing left to raise, and nothing to lose.
    folded_by_exporter = {"loralib conv2d": 1, "hand-written": 1}.get(name, 0) if exporter == "optimized" else 0
    assert len(sites) == case.deltas - folded_by_exporter
    names = set(model.graph.initializers)
    assert not any("base_layer" in n or "lora" in n or n.startswith("base_model") for n in names if report.bindings)
    if report.bindings:
        parameters = {key for key, _ in case.plain().named_parameters()}
        assert sites <= parameters | {"0.conv.weight"}
