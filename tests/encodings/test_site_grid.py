"""A site's view of a grid says the same as the grid of the whole weight."""

from __future__ import annotations

import numpy as np
import pytest

from loracc.encodings.grid import Blocks, Grid
from loracc.encodings.site_grid import SiteGrid
from loracc.sites import Layout


@pytest.mark.parametrize("layout", [Layout(), Layout((1, 0)), Layout((), 2, 5), Layout((1, 0), 1, 4)])
@pytest.mark.parametrize("blocks", [(None, 0), (0, 0), (1, 0), (0, 3), (1, 3)])
def test_as_the_whole_grid(layout: Layout, blocks: tuple[int | None, int]) -> None:
    rng = np.random.default_rng(0)
    where = Blocks((7, 8), *blocks)
    grid = Grid(where, rng.uniform(0.1, 1, where.grid), rng.integers(-2, 3, where.grid).astype(float), -8, 7)
    codes, values = rng.integers(-8, 8, (7, 8)), 3 * rng.standard_normal((7, 8))
    site = SiteGrid.of(grid, layout)
    np.testing.assert_array_equal(site.decode(layout.view(codes)), layout.view(grid.decode(codes)))
    np.testing.assert_array_equal(np.rint(site.ideal(layout.view(values))), layout.view(grid.nearest(values)))
    scales, zeros = site.expanded()
    for k in range(scales.shape[1]):
        one, other = site.column(k, 1, 2)
        np.testing.assert_array_equal(one, scales[1:3, k])
        np.testing.assert_array_equal(other, zeros[1:3, k])
    np.testing.assert_array_equal(site.part(1, 3).expanded()[0], scales[1:3])


def test_a_scale_of_zero_has_no_codes() -> None:
    blocks = Blocks((1, 4), 1, 2)
    grid = Grid(blocks, np.array([[0.0, 1.0]]), np.zeros((1, 2)), -8, 7)
    assert np.isnan(SiteGrid.of(grid, Layout()).ideal(np.ones((1, 4)))).tolist() == [[True, True, False, False]]
