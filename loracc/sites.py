"""Sites: the places a delta can act, and how each one's weight lies inside an initializer.

A *canonical* weight has PyTorch's orientation (``[out, in]``, ``[out, in/groups, *k]``, ``[num, dim]``, ``[E, rows,
cols]``). A graph may store it transposed, or as one block of a concatenated initializer; a :class:`Layout` says how to
get from the stored tensor to the canonical one. Several sites may share one initializer.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field

import onnx_ir as ir

from loracc.dtypes import Array

__all__ = ["SITES_KEY", "ExpertStack", "Layout", "Site", "SiteTable", "read_records", "write_records"]

#: Where exports made by loracc keep their site records (``model.metadata_props``).
SITES_KEY = "loracc.sites"


@dataclass(frozen=True)
class Layout:
    """How the canonical weight lies in the stored tensor: ``canonical = stored.transpose(perm)[start:stop]``.

    Attributes:
        perm: Stored axis of each canonical axis; empty for the identity.
        start, stop: The rows (canonical axis 0) of the permuted tensor that are this site's; ``stop`` None is the end.
    """

    perm: tuple[int, ...] = ()
    start: int = 0
    stop: int | None = None

    def canonical_shape(self, stored: Sequence[int]) -> tuple[int, ...]:
        """The site's shape, from the stored tensor's."""
        shape = [stored[i] for i in self.perm] if self.perm else list(stored)
        if shape:
            shape[0] = (shape[0] if self.stop is None else self.stop) - self.start
        return tuple(shape)

    def view(self, stored: Array) -> Array:
        """The canonical weight as a view of the stored array."""
        permuted = stored.transpose(self.perm) if self.perm else stored
        return permuted[self.start : self.stop] if permuted.ndim else permuted

    @property
    def whole(self) -> bool:
        """Whether the site is the whole initializer and not one block of it."""
        return self.start == 0 and self.stop is None

    @property
    def tiled_axis(self) -> int:
        """The canonical axis that is stored first: a row tile of the stored tensor is a slab along it."""
        return self.perm.index(0) if self.perm else 0


#: A linear weight stored as ``[in, out]``.
TRANSPOSED = Layout(perm=(1, 0))


@dataclass(frozen=True)
class Site:
    """A place a delta can act.

    Attributes:
        module: Module path, e.g. "encoder.layer.0.attention.self.query"; "" when nothing tells.
        parameter: Parameter of that module: "weight", "bias", "in_proj_weight", ...
        kind: What the weight is to the graph: "linear", "embedding", "conv", "conv_transpose", "experts", "bias",
            "norm" or "other".
        initializer: Name of the initializer (or of the checkpoint's tensor) that holds it.
        layout: How it lies in there.
        consumer: Name of the node that reads the weight as this site, when the initializer has several readers that are
            different sites (a tied embedding); "" when every reader belongs to this site.
        source: How the module path is known: "recorded", "name", "scope", "content" or "map".
    """

    module: str
    parameter: str
    kind: str
    initializer: str
    layout: Layout = field(default_factory=Layout)
    consumer: str = ""
    source: str = "name"

    @property
    def name(self) -> str:
        """``module.parameter``, as in a state dict."""
        return f"{self.module}.{self.parameter}" if self.module else self.parameter


@dataclass(frozen=True)
class ExpertStack:
    """One parameter of a model that its checkpoint keeps in pieces: experts along axis 0, and of each its parts' rows.

    Attributes:
        name: The parameter, e.g. "layers.0.mlp.experts.gate_up_proj"; its weight is ``[E, Σ rows, columns]``.
        parts: The tensors of each expert, from the first row on: (("....0.w1.weight", "....0.w3.weight"), ...).
        rows: How many rows each part of an expert has.
        columns: How many columns all of them have.
    """

    name: str
    parts: tuple[tuple[str, ...], ...]
    rows: tuple[int, ...]
    columns: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of the parameter."""
        return len(self.parts), sum(self.rows), self.columns

    def places(self) -> Iterator[tuple[str, int, int, int]]:
        """(tensor, its expert, its first row, the row after its last)."""
        for expert, tensors in enumerate(self.parts):
            start = 0
            for tensor, rows in zip(tensors, self.rows, strict=True):
                yield tensor, expert, start, start + rows
                start += rows


class SiteTable:
    """The sites of one model, by name and by initializer, in the model's order."""

    def __init__(self, sites: Iterable[Site] = ()) -> None:
        self._sites: list[Site] = list(sites)

    def __iter__(self) -> Iterator[Site]:
        return iter(self._sites)

    def __len__(self) -> int:
        return len(self._sites)

    def __repr__(self) -> str:
        return f"SiteTable({len(self)} sites)"

    def add(self, site: Site) -> None:
        """Append a site."""
        self._sites.append(site)

    def by_name(self) -> dict[str, list[Site]]:
        """Sites by ``module.parameter``; a list, since two initializers may claim one name."""
        table: dict[str, list[Site]] = {}
        for site in self._sites:
            table.setdefault(site.name, []).append(site)
        return table

    def of_initializer(self, name: str) -> list[Site]:
        """The sites that lie in one initializer."""
        return [site for site in self._sites if site.initializer == name]


def write_records(model: ir.Model, sites: Iterable[Site]) -> None:
    """Keep the sites in the model's metadata, so that any later tool finds every weight by its module path."""
    records = [asdict(site) for site in sites]
    for record in records:
        del record["source"]
    model.metadata_props[SITES_KEY] = json.dumps(records, separators=(",", ":"))


def read_records(model: ir.Model) -> list[Site]:
    """The sites recorded in the model's metadata; empty when it was not made by loracc.

    Raises:
        ValueError, KeyError, TypeError: The record is there and malformed.
    """
    text = model.metadata_props.get(SITES_KEY)
    if text is None:
        return []
    sites = []
    for record in json.loads(text):
        layout = record["layout"]
        sites.append(
            Site(
                module=str(record["module"]),
                parameter=str(record["parameter"]),
                kind=str(record["kind"]),
                initializer=str(record["initializer"]),
                layout=Layout(tuple(layout["perm"]), int(layout["start"]), layout["stop"]),
                consumer=str(record.get("consumer", "")),
                source="recorded",
            )
        )
    return sites
