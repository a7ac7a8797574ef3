"""The sites of a traced model: what use-def tells of each weight, under the name that torch knows the parameter by."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import onnx_ir as ir

from loracc.dtypes import is_float
from loracc.passes.find_sites import find_sites
from loracc.passes.hoist_transposes import SECOND
from loracc.sites import Layout, Site, SiteTable, write_records

__all__ = ["trace_sites"]


def trace_sites(model: ir.Model, parameters: Iterable[str], tied: Sequence[Sequence[str]] = ()) -> SiteTable:
    """Find the sites and record them in the model's metadata.

    Args:
        model: The graph; its initializers have the names of the parameters.
        parameters: The names in the module's state dict.
        tied: Groups of names that are one parameter: of those, each reader's scope tells which one it means.
    """
    known = set(parameters)
    aliases = {name for group in tied for name in group}
    found: dict[str, list[Site]] = {}
    for site in find_sites(model):
        parameter = site.initializer.removesuffix(SECOND)
        if parameter in known:  # what is not, is a constant: a rotary table
            found.setdefault(site.initializer, []).append(site if parameter in aliases else _renamed(site))
    table = SiteTable()
    for name, value in model.graph.initializers.items():
        if name in known and name not in found and value.dtype is not None and is_float(value.dtype) and value.shape:
            found[name] = [_renamed(Site("", "", "other", name, Layout()))]
        for site in dict.fromkeys(found.get(name, ())):
            table.add(site)
    write_records(model, table)
    return table


def _renamed(site: Site) -> Site:
    """The parameter's own name, whatever the graph suggests: torch wrote it."""
    module, _, parameter = site.initializer.removesuffix(SECOND).rpartition(".")
    return replace(site, module=module, parameter=parameter, source="name")
