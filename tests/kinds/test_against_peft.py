"""Kind × layer: the weights that loracc makes against PEFT's own unmerged forward, in float64.

``pytest -s`` prints the grid. A cell without a number has a reason: PEFT does not adapt that layer with that kind (its
own exception), or :data:`tests.kinds.peft_cases.GAPS` says why.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from loracc.errors import UnsupportedError
from tests.kinds.peft_cases import CASES, GAPS, LOOSE
from tests.kinds.peft_layers import Wrapped, bare_layer, compare, wrap

LAYERS = (
    "linear",
    "linear_tall",
    "linear_square",
    "conv1d_hf",
    "conv1d",
    "conv2d",
    "conv2d_1x1",
    "conv2d_groups",
    "conv3d",
    "embedding",
)
TOLERANCE = 1e-10
#: How PEFT's tuners say that they do not adapt a layer.
REFUSALS = ("not supported", "does not support", "No layers types compatible", "No layer types compatible")

# PEFT warns of settings it mends by itself (fan_in_fan_out, block sizes) and of the seeds of shared matrices.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def grid() -> Iterator[dict[tuple[str, str], str]]:
    cells: dict[tuple[str, str], str] = {}
    yield cells
    width = max(len(row) for row in CASES)
    print("\n" + " " * width, *(f"{column:>13}" for column in LAYERS))
    for row in CASES:
        print(f"{row:{width}}", *(f"{cells.get((row, column), 'not run'):>13}" for column in LAYERS))


def wrapped(row: str, column: str) -> Wrapped | None:
    """The layer under PEFT, or None where PEFT refuses it by name, or adapts nothing without a word (OSF)."""
    try:
        layer = wrap(bare_layer(column), CASES[row]())
        return layer if layer.tensors else None
    except KeyError:
        assert row == "TinyLoRA", "PEFT 0.21.2's TinyLoRA fails so where no layer can be adapted"
        return None
    except (TypeError, ValueError, NotImplementedError) as error:
        text = str(error)
        assert any(word in text for word in REFUSALS), text
        return None


@pytest.mark.parametrize("row", CASES)
def test_a_layer_folded_by_loracc_computes_what_peft_computes(row: str, grid: dict[tuple[str, str], str]) -> None:
    measured = 0
    for column in LAYERS:
        under_peft = wrapped(row, column)
        if under_peft is None:
            grid[row, column] = "not in PEFT"
            continue
        if (row, column) in GAPS:
            with pytest.raises((UnsupportedError, RuntimeError, AssertionError)):
                compare(under_peft, column)
            grid[row, column] = GAPS[row, column]
            continue
        error, change = compare(under_peft, column)
        assert change > 1e-3, f"{row} on {column}: the adapter does nothing, the comparison shows nothing"
        assert error < LOOSE.get(row, TOLERANCE), f"{row} on {column}: {error:.1e}"
        grid[row, column] = f"{error:.1e}"
        measured += 1
    assert measured >= 1
