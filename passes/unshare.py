"""One tensor, several sites, and not the same deltas for all of them: it is cloned for those that differ.

A tied embedding is read by a Gather and by the head's MatMul; an adapter may change one of them, or both differently.
Each group of sites with equal deltas gets one initializer:

1. Sites that a delta *ties* (``Delta.follows_tying``: trained token rows, copies of the base) get it with its site.
2. Sites whose deltas are equal tensor for tensor stay together, and the deltas are folded once.
3. The group of the site whose parameter the initializer is named after keeps it, else the unchanged group does, else
   the first; every other group gets a clone under its first site's own name.

Sites with one ``consumer`` are one reader: other names of one parameter, or blocks of a fused one. No node is added:
the readers of a clone take it in place of the original. In a graph without nodes (a bare checkpoint) ``consumer`` is a
tied module's own name, and a clone is a new tensor that whoever writes the checkpoint adds.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from loracc.adapter import Delta
from loracc.encodings.decoded import DecodedTensor
from loracc.errors import UnsupportedError
from loracc.folded import Binding, annotate, bindings_of, clear_bindings
from loracc.sites import Layout, Site
from loracc.tensors import PermutedTensor, dims, file_tensor

__all__ = ["Clone", "UnsharePass", "delta_digest"]


#: Nodes between a weight and its reader that only pass it on.
_STEPS = ("Identity", "Transpose")


@dataclass(frozen=True)
class Clone:
    """What was un-shared: ``name`` is a new initializer with ``original``'s value, for these sites."""

    original: str
    name: str
    sites: tuple[Site, ...]


class UnsharePass(ir.passes.InPlacePass):
    """See the module's docstring.

    Args:
        sites: The model's sites, as they were before; without them only bound sites are known.

    Attributes:
        clones: What was un-shared, in the graph's order.
        sites: The sites as they are now.
    """

    def __init__(self, sites: Iterable[Site] = ()) -> None:
        super().__init__()
        self.sites = list(sites)
        self._table: dict[str, list[Site]] = {}
        self.clones: list[Clone] = []

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        before = len(self.clones)
        self._table.clear()
        for site in self.sites:
            self._table.setdefault(site.initializer, []).append(site)
        for value in list(model.graph.initializers.values()):
            bindings = bindings_of(value)
            if bindings:
                self._unshare(model, value, bindings)
        return ir.passes.PassResult(model, modified=len(self.clones) > before)

    def _unshare(self, model: ir.Model, value: ir.Value, bindings: Sequence[Binding]) -> None:
        readers = self._readers_of(model, value, bindings)
        sites = [site for group in readers.values() for site in group]
        if len(readers) < 2 or not _overlap(sites):
            return
        leading = _leading(readers)
        deltas = {reader: _deltas_of(reader, readers, bindings, leading) for reader in readers}
        groups: dict[tuple[str, ...], list[str]] = {}
        for reader in readers:
            groups.setdefault(tuple(delta_digest(b.delta) for b in deltas[reader]), []).append(reader)
        keeper = _keeper(groups, readers, str(value.name))
        clear_bindings(value)
        annotate(model, deltas[groups[keeper][0]])
        for key, group in groups.items():
            if key != keeper:
                self._clone(model, value, [site for reader in group for site in readers[reader]], deltas[group[0]])

    def _readers_of(self, model: ir.Model, value: ir.Value, bindings: Sequence[Binding]) -> dict[str, list[Site]]:
        """The initializer's sites by the node that reads them; sites of one reader are names or parts of one thing.

        A bound site's settled layout stands for the table's.
        """
        bound = {(b.site.name, b.site.consumer): b.site for b in bindings}
        table = self._table.get(str(value.name), [])
        sites = [bound.pop((site.name, site.consumer), site) for site in table] + list(bound.values())
        readers: dict[str, list[Site]] = {}
        for site in sites:
            readers.setdefault(site.consumer, []).append(site)
        if len(model.graph) and not _all_listed(value, readers):
            # Readers that no site tells of: they keep the original.
            readers.setdefault("", [Site("", "", "other", str(value.name))])
        return readers

    def _clone(self, model: ir.Model, value: ir.Value, sites: Sequence[Site], bindings: Sequence[Binding]) -> None:
        base, name = value.const_value, _free_name(model, value, sites)
        if base is None:
            raise AssertionError(f"initializer {value.name!r} has deltas and no value")
        views = {_taken_over(model, value, site) for site in sites}
        if len(views) > 1:
            raise UnsupportedError(f"{sites[0].name}: the shared weight {value.name!r} is read in several layouts.")
        (perm,) = views
        tensor = _renamed(base, perm, name)
        clone = ir.Value(name=name, shape=ir.Shape(dims(tensor)), type=ir.TensorType(tensor.dtype), const_value=tensor)
        clone.metadata_props.update(value.metadata_props)
        model.graph.register_initializer(clone)
        for site in sites:
            self._rewire(model, value, site, clone)

        def moved(site: Site) -> Site:
            return replace(site, initializer=name, layout=_layout_in(site.layout, perm), consumer="")

        annotate(model, [_at(binding, moved(binding.site)) for binding in bindings])
        gone = {(site.name, site.consumer, site.initializer) for site in sites}
        self.sites = [moved(s) if (s.name, s.consumer, s.initializer) in gone else s for s in self.sites]
        self.clones.append(Clone(str(value.name), name, tuple(moved(site) for site in sites)))

    def _rewire(self, model: ir.Model, value: ir.Value, site: Site, clone: ir.Value) -> None:
        """The site's reader takes the clone."""
        node = _reader(model, site)
        if node is not None:
            index = _input_index(node, value)
            node.replace_input_with(index, clone)


def _overlap(sites: Sequence[Site]) -> bool:
    """Whether any two sites have a part of the stored tensor in common; blocks of a fused one do not."""
    for i, one in enumerate(sites):
        for other in sites[i + 1 :]:
            apart = one.layout.perm == other.layout.perm and (_ends_before(one, other) or _ends_before(other, one))
            if not apart:
                return True
    return False


def _ends_before(one: Site, other: Site) -> bool:
    return one.layout.stop is not None and one.layout.stop <= other.layout.start


def _deltas_of(
    reader: str, readers: Mapping[str, Sequence[Site]], bindings: Sequence[Binding], leading: Collection[str]
) -> list[Binding]:
    """A reader's own bindings, and those that a leading one passes on to it (rule 1)."""
    own = [binding for binding in bindings if binding.site in readers[reader]]
    kinds = {(binding.adapter, binding.delta.kind) for binding in own}
    leaders = [site for name in leading for site in readers[name]]
    tied = [b for b in bindings if b.delta.follows_tying and b.site in leaders and b not in own]
    return [*(_at(b, readers[reader][0]) for b in tied if (b.adapter, b.delta.kind) not in kinds), *own]


def _leading(readers: Mapping[str, Sequence[Site]]) -> list[str]:
    """The readers that others are tied to: the embedding, or what the tensor is named after."""
    return [
        reader
        for reader, sites in readers.items()
        if (not reader and sites[0].name)
        or any(site.kind == "embedding" or site.name == site.initializer for site in sites)
    ]


def delta_digest(delta: Delta) -> str:
    """Equal for deltas that change a weight equally."""
    digest = hashlib.sha256(f"{type(delta).__name__} {delta.scale!r} {getattr(delta, 'axis', 0)}".encode())
    for role, array in sorted(delta.arrays().items()):
        digest.update(f"{role} {array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _keeper(
    groups: Mapping[tuple[str, ...], Sequence[str]], readers: Mapping[str, Sequence[Site]], name: str
) -> tuple[str, ...]:
    """Rule 3; readers that have no name of their own cannot be given another initializer."""
    unnamed = [key for key, group in groups.items() if "" in group]
    named = [key for key, group in groups.items() if any(site.name == name for r in group for site in readers[r])]
    return next(iter([*unnamed, *named, *(key for key in groups if not key), *groups]))


def _at(binding: Binding, site: Site) -> Binding:
    return replace(binding, site=site)


def _free_name(model: ir.Model, value: ir.Value, group: Sequence[Site]) -> str:
    taken = {str(v.name) for v in model.graph.initializers.values()} | {str(v.name) for v in model.graph.inputs}
    taken |= {str(out.name) for node in model.graph.all_nodes() for out in node.outputs}
    wanted = next((site.name for site in group if site.module), f"{value.name}.unshared")
    name, number = wanted, 1
    while name in taken:
        number += 1
        name = f"{wanted}.{number}"
    return name


def _renamed(base: ir.TensorProtocol, perm: tuple[int, ...], name: str) -> ir.TensorProtocol:
    """The tensor, permuted, under another name; it is read from where it lies."""
    if isinstance(base, DecodedTensor):
        if perm and perm != tuple(range(len(perm))):
            raise UnsupportedError(
                f"{name}: the quantized weight {base.name!r} is shared, and read transposed by one of its readers.",
                hint="Quantize the model with a weight for each, or fold into the float model.",
            )
        return base.renamed(name)
    if isinstance(base, ir.ExternalTensor) and not perm and base.length is not None:
        return file_tensor(base.path, base.offset or 0, base.length, base.dtype, dims(base), name)
    return PermutedTensor(base, perm or range(len(dims(base))), name)


def _reader(model: ir.Model, site: Site) -> ir.Node | None:
    """The node that reads the weight as this site; None in a graph without nodes."""
    if not site.consumer or not len(model.graph):
        return None
    return next(node for node in model.graph.all_nodes() if node.name == site.consumer)


def _input_index(node: ir.Node, value: ir.Value) -> int:
    """Which input of the site's node the weight arrives at, itself or through Identity and Transpose."""
    for index, given in enumerate(node.inputs):
        if given is not None and _source(given)[0] is value:
            return index
    raise AssertionError(f"node {node.name!r} does not read {value.name!r}")


def _source(given: ir.Value) -> tuple[ir.Value, tuple[int, ...]]:
    """The value that ``given`` is a view of, and the permutation between them (empty for none)."""
    perm: tuple[int, ...] = ()
    node = given.producer()
    while node is not None and node.op_type in _STEPS and node.inputs[0] is not None:
        if node.op_type == "Transpose":
            rank = len(given.shape) if given.shape is not None else 2
            attribute = node.attributes.get("perm")
            step = tuple(attribute.as_ints()) if attribute is not None else tuple(reversed(range(rank)))
            perm = tuple(step[axis] for axis in perm) if perm else step
        given = node.inputs[0]
        node = given.producer()
    return given, perm


def _taken_over(model: ir.Model, value: ir.Value, site: Site) -> tuple[int, ...]:
    """The permutation in which the site's reader gets the weight from nodes that it shares with other sites."""
    node = _reader(model, site)
    if node is None:
        return ()
    given = node.inputs[_input_index(node, value)]
    if given is None:
        raise AssertionError("an input that was found is not there")
    return _source(given)[1]


def _layout_in(layout: Layout, perm: tuple[int, ...]) -> Layout:
    """The layout in the clone, which is stored as ``original.transpose(perm)``."""
    if not perm:
        return layout
    canonical = layout.perm or tuple(range(len(perm)))
    turned = tuple(perm.index(axis) for axis in canonical)
    return replace(layout, perm=() if turned == tuple(range(len(turned))) else turned)


def _all_listed(value: ir.Value, consumers: Collection[str]) -> bool:
    """Whether every reader is one of these, or steps to them only; "" stands for all of them."""
    if "" in consumers:
        return True
    return not value.is_graph_output() and all(
        node.name in consumers or (node.op_type in _STEPS and _all_listed(node.outputs[0], consumers))
        for node, _ in value.uses()
    )
