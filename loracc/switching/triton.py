"""``attach --as triton``: a model repository, see :mod:`loracc.switching.triton_repository`."""

from __future__ import annotations

from loracc.errors import InputError
from loracc.switching.request import AttachRequest, AttachResult
from loracc.switching.triton_config import TritonSettings
from loracc.switching.triton_repository import repository_files, write_repository

__all__ = ["make"]


def make(request: AttachRequest) -> AttachResult:
    """Write the repository.

    Raises:
        InputError: A call that has no meaning here.
        CheckFailed: A variant is not the base with its adapter folded in; nothing was moved into place.
    """
    job = request.job
    if job.external not in ("auto", "data"):
        raise InputError(
            f"--data-layout {job.external}: every entry of a repository is whole, its weights in a data file.",
            hint="Leave it out.",
        )
    backend = request.backend or "onnxruntime"
    if request.profiles and backend != "tensorrt":
        raise InputError("--profile is for the engines of --backend tensorrt.", hint="Leave it out.")
    settings = TritonSettings(backend, request.max_batch or 8, profiles=request.profiles)
    adapters = [
        {"name": one.name, "folder": one.name, "sites": len(one.bindings), "sha256": one.adapter.digest}
        for one in request.bound
    ]
    variants = {one.name: one.bindings for one in request.bound}
    if request.dry_run:
        files = repository_files(variants, settings)
        return AttachResult(str(job.output), files, [], request.unmatched, None, request.notes, dry_run=True,
                            mode="triton", adapters=adapters)  # fmt: skip
    made = write_repository(
        request.base,
        variants,
        job.output,
        settings,
        described={one.name: f"{one.adapter.format} sha256:{one.adapter.digest}" for one in request.bound},
        inputs=request.inputs,
        dtype=job.dtype,
        verify=request.verify,
        force=request.force,
    )
    notes = [*request.notes, *(note for note in made.notes if note not in request.notes)]
    return AttachResult(
        made.output,
        made.files,
        made.sites,
        request.unmatched,
        made.verification,
        notes,
        bytes=made.bytes,
        mode="triton",
        adapters=adapters,
    )
