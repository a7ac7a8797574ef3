"""``attach --as variants``: one base graph, one data file, and per adapter a file of its deltas, folded on load.

:func:`make` writes a deployment for :class:`loracc.runtime.Deployment`; :func:`add_variants` adds to one. Both prove
every variant before anything is moved into place, and from its stored file on: the deltas are read back, folded into
the written base, and judged against the original base and the adapter as ``loracc fold`` judges its output.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loracc.errors import InputError
from loracc.passes.encode_weights import encoded
from loracc.runtime.digests import digest_file
from loracc.runtime.manifest import BASE, Manifest, contained, manifest_path, read_manifest, variants_folder
from loracc.sources.onnx_model import read_graph
from loracc.switching.request import AttachRequest, AttachResult, Bound
from loracc.switching.variant_files import VariantFiles
from loracc.targets.linked_data import files_of
from loracc.targets.onnx_file import initializers

if TYPE_CHECKING:
    from loracc.model import BaseModel

__all__ = ["add_variants", "adds_to", "make"]

Path_ = str | Path


def make(request: AttachRequest) -> AttachResult:
    """Write the base, its variants and the manifest, prove them, and move them into place.

    Raises:
        InputError: A call that has no meaning here.
        CheckFailed: A variant is not the base with its adapter folded in; nothing was moved into place.
    """
    _check_names(request.bound)
    job = _job(request)
    job.check(request.inputs, force=request.force or request.dry_run)
    files = VariantFiles(request.base, request.bound, variants_folder(job.output).name)
    base = _written(request)
    if request.dry_run:
        plan = job.plan(base, job.output)
        names = [path.name for path in (*plan.small, *(file.path for file in plan.weights))]
        result = _result(request, str(job.output), [*job.beside, *names], files)
        return replace(result, bytes=plan.nbytes, dry_run=True)
    with job.staging(request.inputs, force=request.force) as stage:
        plan = job.plan(base, stage.path)
        stage.expected_bytes = plan.nbytes
        plan.write(job.progress)
        folder = variants_folder(stage.path)
        folder.mkdir()
        variants = files.write(folder)
        verification = files.prove(stage.path, folder) if request.verify else None
        manifest_path(stage.path).write_bytes(replace(_described(stage.path), variants=variants).to_bytes())
        size = stage.size()
    return replace(_result(request, str(job.output), stage.files, files), verification=verification, bytes=size)


def adds_to(mode: str, model: Path_, output: Path_) -> bool:
    """Whether ``attach`` was asked to add to a deployment: model and output are its graph."""
    graph = Path(output)
    if mode != "variants" or not (manifest_path(graph).is_file() and graph.is_file() and os.path.exists(model)):
        return False
    return os.path.samefile(model, graph)


def add_variants(
    deployment: Path_,
    adapters: Sequence[Path_],
    *,
    maps: Sequence[str] = (),
    allow_unmatched: bool = False,
    verify: bool = True,
    force: bool = False,
    dry_run: bool = False,
    **options: Any,
) -> AttachResult:
    """Add variants to a deployment; those that are there, and whoever serves them, are left alone.

    A running :class:`loracc.runtime.Deployment` sees them after ``reload()``.

    Args:
        deployment: The ``.onnx`` that ``attach --as variants`` wrote.
        adapters, maps, allow_unmatched, verify, dry_run, options: As for :func:`loracc.attach`.
        force: Replace variants of the same names.

    Raises:
        LoraccError: As there; or a variant of that name is there.
        CheckFailed: As there.
    """
    graph = Path(os.path.abspath(deployment))
    path, home = manifest_path(graph), variants_folder(graph)
    before = read_manifest(path)
    contained(path, home.name)  # what is written next must not leave the folder either
    for file in (before.graph, *before.weights):
        file.check(contained(path, file.path))
    base, bound = _bound(graph, adapters, maps, allow_unmatched, options)
    _check_names(bound)
    if (taken := [one.name for one in bound if one.name in before.variants]) and not force:
        raise InputError(
            f"{path}: there is a variant {taken[0]!r} already.",
            hint="Choose another NAME=PATH, or replace it with --force.",
        )
    files = VariantFiles(base, bound, home.name)
    notes = [note for one in bound for note in one.result.notes]
    names = [*(file for file in files.paths.values()), path.name]
    unmatched = [key for one in bound for key in one.result.unmatched]
    result = AttachResult(
        str(deployment), names, files.facts(), unmatched, None, notes, mode="variants", adapters=files.rows()
    )
    if dry_run:
        return replace(result, dry_run=True)
    try:
        home.mkdir(exist_ok=True)
        staged = Path(tempfile.mkdtemp(prefix=".new.", dir=home))
    except OSError as error:
        raise _unwritable(home, error) from error
    try:
        variants = files.write(staged)
        verification = files.prove(graph, staged) if verify else None
        content = replace(before, variants={**before.variants, **variants}).to_bytes()
        (staged / path.name).write_bytes(content)
        for name in files.paths.values():
            os.replace(staged / Path(name).name, path.parent / name)
        os.replace(staged / path.name, path)
    except OSError as error:
        raise _unwritable(home, error) from error
    finally:
        shutil.rmtree(staged, ignore_errors=True)  # a leftover must not hide the error that led here
    return replace(result, verification=verification, bytes=sum(one.file.nbytes for one in variants.values()))


def _unwritable(home: Path, error: OSError) -> InputError:
    return InputError(f"{error.filename or home}: cannot be read or written: {error.strerror or error}.")


def _bound(
    graph: Path, adapters: Sequence[Path_], maps: Sequence[str], allow_unmatched: bool, options: dict[str, Any]
) -> tuple[BaseModel, tuple[Bound, ...]]:
    from loracc.binding import bind_each, read_adapters
    from loracc.formats import parse_adapter_spec
    from loracc.loading import load_traced, split_options

    load, told = split_options(options)
    specs = [parse_adapter_spec(str(adapter)) for adapter in adapters]
    read = read_adapters(specs, told, combine=None, density=None, rank=None, seed=0)
    base = load_traced(graph, load)
    found = bind_each(base, read, maps, allow_unmatched)
    return base, tuple(Bound(*pair) for pair in zip(read, found, strict=True))


def _check_names(bound: Sequence[Bound]) -> None:
    if any(one.name == BASE for one in bound):
        raise InputError(
            f"an adapter is named {BASE!r}, which is what the base itself is called.", hint="Name it: NAME=PATH"
        )


def _job(request: AttachRequest) -> Any:
    """The job with everything that lies beside the graph."""
    job = request.job
    if job.external == "inline":
        raise InputError(
            "--data-layout inline: variants share the base's weights, and those inside the graph cannot be shared.",
            hint="Leave it out, or use data or link.",
        )
    if job.dtype is not None:
        raise InputError(
            "--dtype: variants are folded from the base's own bits, and those would be rounded twice.",
            hint="Write the base in that dtype first, and attach to it.",
        )
    output = Path(os.path.abspath(job.output))
    beside = (manifest_path(output).name, variants_folder(output).name)
    return replace(job, beside=beside, external="data" if job.external == "auto" else job.external)


def _written(request: AttachRequest) -> BaseModel:
    """The base as it is written: its sites recorded."""
    from loracc.folded import clear_bindings
    from loracc.lower import lower

    for value in request.base.ir.graph.initializers.values():
        clear_bindings(value)
    return lower(request.base)


def _described(graph: Path) -> Manifest:
    """The manifest of what was written, without its variants."""
    tensors = [value.const_value for value in initializers(encoded(read_graph(graph)))]
    data = dict.fromkeys(file for tensor in tensors if tensor is not None for file in files_of(tensor))
    folder = Path(os.path.realpath(graph.parent))
    weights = [digest_file(Path(file), Path(file).relative_to(folder).as_posix()) for file in data]
    return Manifest(digest_file(graph, graph.name), tuple(weights))


def _result(request: AttachRequest, output: str, names: list[str], files: VariantFiles) -> AttachResult:
    return AttachResult(
        output,
        names,
        files.facts(),
        request.unmatched,
        None,
        request.notes,
        mode="variants",
        adapters=files.rows(),
    )
