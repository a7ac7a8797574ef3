"""``attach --as variants``: one base graph, one data file, and per adapter a file of its deltas.

:func:`attach_variants` makes a deployment and :func:`add_variants` adds to one. Both prove every variant before
anything is moved into place, from the stored file on: its deltas are read back, folded into the written base, and
judged against the original base and the adapter as ``loracc fold`` judges its output.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loracc.errors import InputError
from loracc.folded import clear_bindings
from loracc.model import LoadOptions
from loracc.runtime.digests import digest_of_bytes
from loracc.runtime.manifest import BASE, Manifest, Variant, contained, manifest_path, read_manifest, variants_folder

if TYPE_CHECKING:
    from loracc.adapter import Adapter
    from loracc.folded import Binding
    from loracc.formats import AdapterSpec
    from loracc.model import BaseModel
    from loracc.pipeline import FoldResult
    from loracc.progress import Progress
    from loracc.verdict import Verification

__all__ = ["add_variants", "attach_variants"]

Path_ = str | Path


def attach_variants(
    model: Path_,
    adapters: Sequence[Path_],
    output: Path_,
    *,
    maps: Sequence[str] = (),
    allow_unmatched: bool = False,
    external: str = "auto",
    verify: bool = True,
    force: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> FoldResult:
    """Make a deployment of a base and its adapters, each of them one variant.

    Args:
        model: As for :func:`loracc.fold`.
        adapters: ``NAME=PATH@WEIGHT``; a variant's name is its adapter's.
        output: The ``.onnx``; its data file, manifest and folder of variants go beside it.
        maps, allow_unmatched, options: As for :func:`loracc.fold`.
        external: "auto" and "data" write ``OUT.onnx.data``; "link" leaves the weights in the base's own data file.
        verify: Prove every variant before anything is moved into place.
        force: Replace the output if it exists.
        progress: Told of the bytes written.

    Returns:
        As :func:`loracc.fold`; the verification is the first variant's that is not "pass", else the last one's.

    Raises:
        LoraccError: The input or the call is wrong.
        CheckFailed: A variant is not the base with its adapter folded in; nothing was moved into place.
    """
    from loracc.job import Job
    from loracc.pipeline import FoldResult
    from loracc.staging import Staging, check_destination

    job = Job.of(output, None, "data" if external == "auto" else external, progress)
    specs = _specs(adapters)
    _check_call(job.output, job.target.name, external)
    inputs = [Path(model), *(Path(spec.path) for spec in specs)]
    home = Path(os.path.abspath(output))
    companions = (*job.companions, manifest_path(home).name, variants_folder(home).name)
    check_destination(job.output, inputs=inputs, force=force, companions=companions)
    work = VariantWork.read(model, specs, maps, allow_unmatched, options)
    with Staging(job.output, inputs=inputs, force=force, companions=companions) as stage:
        plan = job.plan(work.written(), stage.path)
        stage.expected_bytes = plan.nbytes
        plan.write(job.progress)
        variants_folder(stage.path).mkdir()
        variants = work.store(variants_folder(stage.path), variants_folder(home).name)
        verification = work.prove(stage.path, variants_folder(stage.path)) if verify else None
        manifest = replace(_describe(stage.path), variants=variants)
        manifest_path(stage.path).write_bytes(manifest.to_bytes())
        size = stage.size()
    return FoldResult(str(output), stage.files, work.rows, work.unmatched, verification, work.notes, bytes=size)


def add_variants(
    deployment: Path_,
    adapters: Sequence[Path_],
    *,
    maps: Sequence[str] = (),
    allow_unmatched: bool = False,
    verify: bool = True,
    force: bool = False,
    **options: Any,
) -> FoldResult:
    """Add variants to a deployment; those that are there and whoever serves them are left alone.

    Args:
        deployment: The ``.onnx`` of :func:`attach_variants`.
        adapters, maps, allow_unmatched, verify, options: See there.
        force: Replace variants of the same names.

    Raises:
        LoraccError: As there; or a variant of that name is there.
        CheckFailed: As there.
    """
    from loracc.pipeline import FoldResult

    graph = Path(os.path.abspath(deployment))
    path, home = manifest_path(graph), variants_folder(graph)
    before = read_manifest(path)
    for file in (before.graph, *before.weights):
        file.check(contained(path, file.path))
    work = VariantWork.read(graph, _specs(adapters), maps, allow_unmatched, options)
    if (taken := [name for name in work.names if name in before.variants]) and not force:
        raise InputError(
            f"{path}: there is a variant {taken[0]!r} already.",
            hint="Choose another NAME=PATH, or replace it with --force.",
        )
    home.mkdir(exist_ok=True)
    staged = Path(tempfile.mkdtemp(prefix=".new.", dir=home))
    try:
        variants = work.store(staged, home.name)
        verification = work.prove(graph, staged) if verify else None
        manifest = replace(before, variants={**before.variants, **variants})
        for one in variants.values():
            os.replace(staged / Path(one.file.path).name, path.parent / one.file.path)
        (staged / path.name).write_bytes(manifest.to_bytes())
        os.replace(staged / path.name, path)
    finally:
        shutil.rmtree(staged, ignore_errors=True)  # a leftover must not hide the error that led here
    files = [*(one.file.path for one in variants.values()), path.name]
    return FoldResult(str(deployment), files, work.rows, work.unmatched, verification, work.notes)


def _specs(adapters: Sequence[Path_]) -> list[AdapterSpec]:
    from loracc.formats import parse_adapter_spec

    if not adapters:
        raise InputError("no adapter was given.", hint="loracc attach MODEL ADAPTER... --as variants -o OUT.onnx")
    return [parse_adapter_spec(str(adapter)) for adapter in adapters]


def _check_call(output: Path, target: str, external: str) -> None:
    if target != "onnx":
        raise InputError(f"{output}: variants are served from an ONNX graph.", hint="Name the output OUT.onnx.")
    if external == "inline":
        raise InputError(
            "--data-layout inline: variants share the base's weights, and those inside the graph cannot be shared.",
            hint="Leave it out, or use data or link.",
        )


def _describe(graph: Path) -> Manifest:
    """The manifest of what was written, without its variants."""
    from loracc.runtime.digests import digest_file
    from loracc.sources.onnx_model import read_graph
    from loracc.targets.linked_data import files_of
    from loracc.targets.onnx_file import initializers

    tensors = [value.const_value for value in initializers(read_graph(graph))]
    files = dict.fromkeys(file for tensor in tensors if tensor is not None for file in files_of(tensor))
    folder = Path(os.path.realpath(graph.parent))
    weights = [digest_file(Path(file), Path(file).relative_to(folder).as_posix()) for file in files]
    return Manifest(digest_file(graph, graph.name), tuple(weights))


@dataclass
class VariantWork:
    """Adapters on their way from their files to stored variants.

    Attributes:
        base: The original model.
        adapters: Each becomes one variant.
        weights: Their strengths, as the user gave them.
        bindings: By variant: its deltas at the base's sites.
        rows: What ``--json`` tells of every delta.
        unmatched: Keys that fit nowhere.
        notes: What the user should know.
    """

    base: BaseModel
    adapters: list[Adapter]
    weights: list[float]
    bindings: dict[str, list[Binding]]
    rows: list[dict[str, Any]] = field(default_factory=list)
    unmatched: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @classmethod
    def read(
        cls,
        model: Path_,
        specs: Sequence[AdapterSpec],
        maps: Sequence[str],
        allow_unmatched: bool,
        options: dict[str, Any],
    ) -> VariantWork:
        """Read the model and the adapters, and bind each adapter by itself."""
        from loracc.binding import bind_adapters, read_adapters
        from loracc.pipeline import _load, split_options

        load, told = split_options(options)
        adapters = read_adapters(specs, told, combine=None, density=None, rank=None, seed=0)
        if any(adapter.name == BASE for adapter in adapters):
            raise InputError(
                f"an adapter is named {BASE!r}, which is what the base is called.", hint="Name it: NAME=PATH"
            )
        base = _load(model, load, graph=True)
        work = cls(base, adapters, [spec.weight for spec in specs], {}, notes=list(base.notes))
        for adapter in adapters:
            _, bound = bind_adapters(base, [adapter], maps, allow_unmatched)
            work.bindings[adapter.name] = list(bound.bindings)
            work.unmatched += bound.unmatched
            work.notes += [note for note in bound.notes if note not in work.notes]
        for value in base.ir.graph.initializers.values():
            clear_bindings(value)
        return work

    @property
    def names(self) -> list[str]:
        """The variants."""
        return list(self.bindings)

    def written(self) -> BaseModel:
        """The base as it is to be written: its sites recorded."""
        from loracc.lower import lower

        return lower(self.base)

    def store(self, folder: Path, home: str) -> dict[str, Variant]:
        """Write every variant's file into ``folder``; ``home`` is the name the folder will have."""
        from loracc.facts import site_facts
        from loracc.formats.bound_deltas import write_bindings
        from loracc.lower import folded_tensors
        from loracc.runtime.digests import digest_file
        from loracc.runtime.variant_graph import variant_graph

        found = {}
        for adapter, weight in zip(self.adapters, self.weights, strict=True):
            bindings = self.bindings[adapter.name]
            file = folder / _file_name(adapter.name)
            write_bindings(file, bindings)
            folded = folded_tensors(variant_graph(self.base.ir, self.base.sites, bindings))
            self.rows += [facts.to_json() for facts in site_facts(folded)]
            source = {"format": adapter.format, "digest": adapter.digest, "weight": weight}
            found[adapter.name] = Variant(
                adapter.name, digest_file(file, f"{home}/{file.name}"), source, tuple(map(_row, bindings))
            )
        return found

    def prove(self, graph: Path, folder: Path) -> Verification:
        """Judge the written base, and every variant from its stored file on.

        Raises:
            CheckFailed: A check said no.
        """
        from loracc.formats.bound_deltas import read_bindings
        from loracc.runtime.prove_variants import prove_base, prove_variant
        from loracc.sources import load_model

        made = load_model(graph, LoadOptions())
        prove_base(self.base, made)
        verdicts = []
        for name, bindings in self.bindings.items():
            stored = read_bindings(folder / _file_name(name))
            verdicts.append(prove_variant(name, self.base, made, bindings, stored))
        return next((verdict for verdict in verdicts if verdict.verdict != "pass"), verdicts[-1])


def _row(binding: Binding) -> dict[str, Any]:
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
