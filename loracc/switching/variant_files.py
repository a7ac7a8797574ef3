"""The files of a deployment's variants: named, written, described and proved."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loracc.facts import site_facts
from loracc.folded import Binding
from loracc.formats.bound_deltas import read_bindings, write_bindings
from loracc.lower import folded_tensors
from loracc.model import BaseModel, LoadOptions
from loracc.proof.verdict import Verification
from loracc.runtime.digests import digest_file, digest_of_bytes
from loracc.runtime.manifest import Variant
from loracc.runtime.prove_variants import prove_base, prove_variant
from loracc.runtime.variant_graph import variant_graph
from loracc.sources import load_model
from loracc.switching.request import Bound

__all__ = ["VariantFiles"]


class VariantFiles:
    """Adapters bound to a base, on their way to one file each.

    Args:
        base: The original model.
        bound: Each adapter at its sites.
        home: Name of the folder that the files will lie in, beside the graph.

    Attributes:
        paths: The files by variant, relative to the graph's folder.
    """

    def __init__(self, base: BaseModel, bound: Sequence[Bound], home: str) -> None:
        self._base, self._bound = base, tuple(bound)
        self.paths = {one.name: f"{home}/{_file_name(one.name)}" for one in bound}

    def write(self, folder: Path) -> dict[str, Variant]:
        """Write every file into ``folder``; what the manifest says of them."""
        found = {}
        for one in self._bound:
            path = self.paths[one.name]
            file = folder / Path(path).name
            write_bindings(file, one.bindings)
            source = {"format": one.adapter.format, "digest": one.adapter.digest}
            sites = tuple(_site_row(binding) for binding in one.bindings)
            found[one.name] = Variant(one.name, digest_file(file, path), source, sites)
        return found

    def prove(self, graph: Path, folder: Path) -> Verification:
        """Judge the written base, and every variant from its stored file on.

        Returns:
            The first verdict that is not "pass", else the last one.

        Raises:
            CheckFailed: A check said no.
        """
        made = load_model(graph, LoadOptions())
        prove_base(self._base, made)
        verdicts = []
        for one in self._bound:
            stored = read_bindings(folder / Path(self.paths[one.name]).name)
            verdicts.append(prove_variant(one.name, self._base, made, one.bindings, stored))
        return next((verdict for verdict in verdicts if verdict.verdict != "pass"), verdicts[-1])

    def facts(self) -> list[dict[str, Any]]:
        """A row a delta, as for a fold."""
        rows: list[dict[str, Any]] = []
        for one in self._bound:
            graph = variant_graph(self._base.ir, self._base.sites, one.bindings)
            rows += [facts.to_json() for facts in site_facts(folded_tensors(graph))]
        return rows

    def rows(self) -> list[dict[str, Any]]:
        """A row a variant."""
        return [
            {
                "name": one.name,
                "file": self.paths[one.name],
                "kinds": ", ".join(sorted({binding.delta.kind for binding in one.bindings})),
                "sites": len(one.bindings),
            }
            for one in self._bound
        ]


def _site_row(binding: Binding) -> dict[str, Any]:
    delta, site = binding.delta, binding.site
    return {
        "name": site.name,
        "initializer": site.initializer,
        "kind": delta.kind,
        "rank": delta.rank,
        "scale": delta.scale,
    }


def _file_name(name: str) -> str:
    """A file's name for a variant's: itself where every file system takes it, else with its digest."""
    safe = re.sub(r"[^\w.+-]", "_", name, flags=re.ASCII)[:100].lstrip(".")
    if safe == name and safe == safe.lower():
        return f"{name}.safetensors"
    return f"{safe or 'variant'}-{digest_of_bytes(name.encode())[:8]}.safetensors"
