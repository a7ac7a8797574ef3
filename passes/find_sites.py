"""Sites by use-def: every weight of a graph, what it is to its readers, and which module's parameter it is.

A weight's module path is known, in this order:

1. *recorded*: the model was made by loracc and says it (``loracc.sites.read_records``);
2. *name*: the initializer's own name is a parameter's (``encoder.layer.0.query.weight``);
3. *name*, by its partner: the bias that is added to the product has kept its name, or the weight of a bias has;
4. *scope*: the exporter left the module path on the node that reads it.

A weight that none of them names is listed without a module (``source`` ""): it can be bound by content or by map.

An initializer with several readers is several sites when they are of different modules: tied embeddings, and equal
tensors that an optimizer merged. Each then says which node it means: ``consumer`` is the first node on the way from the
initializer that no other site shares. A module that is called twice is one site.

A weight that is a graph input too is listed as any other: whoever binds refuses it (``value.is_graph_input()``).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import onnx_ir as ir

from loracc.dtypes import is_float
from loracc.errors import InputError
from loracc.passes.site_names import ParameterName, partner_parameter, related
from loracc.passes.site_roles import Reader, Role, readers_of, role_of
from loracc.sites import Layout, Site, SiteTable, read_records

__all__ = ["find_sites"]


@dataclass(frozen=True)
class _Claim:
    """A reader, what the weight is to it, and whose parameter it therefore is."""

    value: ir.Value
    reader: Reader
    role: Role
    name: ParameterName | None = None
    source: str = ""

    @property
    def identity(self) -> tuple[str, str, str, Layout]:
        """What makes two readers one site."""
        name = self.name or ParameterName("", self.role.parameter)
        return name.module, name.parameter, self.role.kind, self.role.layout


def find_sites(model: ir.Model) -> SiteTable:
    """The sites of the main graph, in the order of its initializers. No weight is read.

    Raises:
        InputError: The model's own record of its sites is malformed.
    """
    recorded = _recorded(model)
    values = [v for v in model.graph.initializers.values() if _may_hold_sites(v) and v.name not in recorded]
    claims = {str(value.name): _claims(value, model.functions) for value in values}
    elsewhere = _scopes(claims.values())
    named = {name: [_by_name(claim, group, elsewhere) for claim in group] for name, group in claims.items()}
    partners = _partners(named.values())
    table = SiteTable()
    for name, value in model.graph.initializers.items():
        for site in recorded.get(name, ()):
            table.add(site)
        resolved = [_by_partner_or_scope(claim, partners) for claim in named.get(name, ())]
        for site in _sites(value, resolved):
            table.add(site)
    return table


def _may_hold_sites(value: ir.Value) -> bool:
    return value.dtype is not None and is_float(value.dtype) and value.shape is not None and len(value.shape) > 0


def _recorded(model: ir.Model) -> dict[str, list[Site]]:
    """Records by initializer, without those that an optimizer has since made untrue."""
    try:
        records = read_records(model)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(
            f"the model's own record of its sites is malformed ({type(error).__name__}: {error}).",
            hint="Write the model again with loracc, or remove 'loracc.sites' from its metadata.",
        ) from error
    nodes = {node.name for node in model.graph}
    found: dict[str, list[Site]] = {}
    for site in records:
        value = model.graph.initializers.get(site.initializer)
        if value is not None and _holds(site, value, nodes):
            found.setdefault(site.initializer, []).append(site)
    return found


def _holds(site: Site, value: ir.Value, nodes: set[str | None]) -> bool:
    """Whether a recorded site still fits the initializer of its name."""
    shape = value.shape.numpy() if value.shape is not None else ()
    layout = site.layout
    if layout.perm and sorted(layout.perm) != list(range(len(shape))):
        return False
    rows = layout.canonical_shape(shape)
    stored_rows = (shape[layout.perm[0]] if layout.perm else shape[0]) if shape else 1
    inside = layout.start >= 0 and (layout.stop is None or layout.stop <= stored_rows)
    return inside and all(n > 0 for n in rows[:1]) and (not site.consumer or site.consumer in nodes)


def _claims(value: ir.Value, functions: Mapping[ir.OperatorIdentifier, ir.Function]) -> list[_Claim]:
    return [_Claim(value, reader, role_of(reader)) for reader in readers_of(value, functions)]


def _scopes(groups: Iterable[list[_Claim]]) -> dict[str, set[str]]:
    """Module paths that readers were traced in, each with the initializers read there as weights."""
    found: dict[str, set[str]] = {}
    for group in groups:
        for claim in group:
            if claim.reader.scope and claim.role.strong:
                found.setdefault(claim.reader.scope, set()).add(str(claim.value.name))
    return found


def _by_name(claim: _Claim, group: list[_Claim], elsewhere: Mapping[str, set[str]]) -> _Claim:
    """Rule 2. A name that the reader's scope contradicts is another module's: the reader's own is told by its scope.

    Without any reader that the name agrees with, it is believed (T5's ``shared`` is read as ``encoder.embed_tokens``),
    unless the module it names reads another weight (an optimizer gave the head its own copy and left the embedding
    under the head's name), or the op is one that a normalisation may have been folded into: such a weight is not the
    parameter that its name says, and gets none.
    """
    name, reader = claim.reader.name, claim.reader
    if name is None:
        return claim
    if related(name.module, reader.scope):
        return replace(claim, name=name, source="name")
    same_name = [other for other in group if other.reader.name == name]
    agreed = any(related(name.module, other.reader.scope) for other in same_name)
    if agreed or elsewhere.get(name.module, set()) - {claim.value.name}:
        return claim
    if _may_be_folded(claim):
        return replace(claim, role=replace(claim.role, strong=False), name=ParameterName("", claim.role.parameter))
    if claim.role.kind != same_name[0].role.kind:
        return claim
    return replace(claim, name=name, source="name")


def _may_be_folded(claim: _Claim) -> bool:
    """Whether exporters fold a batch normalisation into this operand."""
    return claim.reader.node.op_type in ("Conv", "ConvTranspose", "Gemm") and claim.role.partner is not None


def _partners(groups: Iterable[list[_Claim]]) -> dict[tuple[ir.Node, bool], ParameterName]:
    """(node, is it the bias) -> name, for the operands whose own name is known."""
    return {
        (claim.role.partner, claim.role.kind == "bias"): claim.name
        for group in groups
        for claim in group
        if claim.source == "name" and claim.name is not None and claim.role.partner is not None
    }


def _by_partner_or_scope(claim: _Claim, partners: Mapping[tuple[ir.Node, bool], ParameterName]) -> _Claim:
    """Rules 3 and 4."""
    if claim.name is not None:
        return claim
    bias, scope = claim.role.kind == "bias", claim.reader.scope
    partner = partners.get((claim.role.partner, not bias)) if claim.role.partner is not None else None
    derived = partner_parameter(partner, bias=bias) if partner is not None else None
    if derived is not None and related(derived.module, scope):
        return replace(claim, name=derived, source="name")
    if not scope or _lost_its_name(claim):
        return claim
    if claim.role.strong:
        return replace(claim, name=ParameterName(scope, claim.role.parameter), source="scope")
    if claim.reader.name is not None:
        return replace(claim, name=ParameterName(scope, claim.reader.name.parameter), source="scope")
    return claim


def _lost_its_name(claim: _Claim) -> bool:
    """A convolution's weight that has another name than its parameter's was recomputed: a norm was folded into it.

    Nothing else makes an exporter rename it: no layout change comes between it and its node, as for a matrix product.
    """
    return claim.reader.node.op_type in ("Conv", "ConvTranspose") and claim.reader.name is None


def _sites(value: ir.Value, claims: list[_Claim]) -> list[Site]:
    """The sites of one initializer: one for all readers, or one per reader where they disagree."""
    claims = [claim for claim in claims if claim.name is not None or claim.role.strong or claim.role.kind == "experts"]
    spoken = {claim.identity[:2] for claim in claims if claim.role.kind != "other"}
    claims = [claim for claim in claims if claim.role.kind != "other" or claim.identity[:2] not in spoken]
    if len({claim.identity for claim in claims}) <= 1:
        return [_site(claim, "") for claim in claims[:1]]
    return [_site(claim, _consumer(claim, claims)) for claim in claims]


def _site(claim: _Claim, consumer: str) -> Site:
    module, parameter, kind, layout = claim.identity
    return Site(module, parameter, kind, str(claim.value.name), layout, consumer, claim.source)


def _consumer(claim: _Claim, claims: list[_Claim]) -> str:
    """The first node on the way to this reader that no other reader's way goes through."""
    shared = {node for other in claims if other is not claim for node in other.reader.path}
    own = [node for node in claim.reader.path if node not in shared]
    return str((own or claim.reader.path[-1:])[0].name)
