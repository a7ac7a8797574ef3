"""What transformers calls a checkpoint's tensors once it has loaded them.

A checkpoint's own names are not always module paths: transformers 5 renames on loading (a ViT's
``encoder.layer.0.attention.attention.query`` is the module ``layers.0.attention.q_proj``), and an adapter knows the
module paths. The model is built around the mapped weights, so this costs an import of torch and no weight is read.
With a graph it is the other way round: it has the module paths, and an adapter of older days the checkpoint's names.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from loracc.errors import InputError, UnsupportedError
from loracc.model import BaseModel
from loracc.sites import Site, SiteTable
from loracc.sources.checkpoint_files import CheckpointFiles, read_config
from loracc.sources.huggingface import parameter_sources

__all__ = ["with_checkpoint_names", "with_module_names", "with_other_names"]


def with_other_names(model: BaseModel) -> BaseModel | None:
    """The model under the other names that transformers knows for its weights: a graph's are the checkpoint's."""
    return with_checkpoint_names(model) if model.traced else with_module_names(model)


def with_module_names(model: BaseModel) -> BaseModel | None:
    """A bare checkpoint with its sites under module paths: those that transformers gives its tensors on loading.

    Returns:
        The model; None where its folder does not say its class, where torch or transformers is not installed, or where
        nothing is renamed: then nothing more can be known.
    """
    folder = model.origin.folder if isinstance(model.origin, CheckpointFiles) else Path(model.path)
    if model.traced or not _buildable(folder):
        return None
    try:
        sources, stacks = parameter_sources(folder)
    except (InputError, UnsupportedError):  # then its names are the only ones it has
        return None
    known = {site.name for site in model.sites if site.consumer}
    names: dict[str, list[str]] = {}
    for name, tensor in sources.items():
        if tensor is not None and name not in known:
            names.setdefault(tensor, []).append(name)
    stacked = {stack.name for stack in stacks}
    merged = [name for name, tensor in sources.items() if tensor is None and name not in stacked]
    if all(found == [tensor] for tensor, found in names.items()) and not merged and not stacks:
        return None
    sites = [renamed for site in model.sites for renamed in _renamed(site, names.get(site.initializer, []))]
    notes = list(model.notes)
    if merged:
        notes.append(
            f"transformers computes {len(merged)} parameters from several tensors of the file, such as {merged[0]}: "
            "a delta on them can be folded into .onnx, not into the checkpoint"
        )
    return replace(model, sites=SiteTable(sites), notes=tuple(notes), stacks=stacks)


def with_checkpoint_names(model: BaseModel) -> BaseModel | None:
    """A Hugging Face folder's graph with its sites under the names of the checkpoint's tensors, where those are others.

    They are the module paths of the transformers that wrote the checkpoint, and of the adapters that were trained with
    it. None where nothing was renamed on loading.
    """
    sites = [
        replace(site, module=module, parameter=parameter)
        for site in model.sites
        for module, _, parameter in [model.spelled.get(site.name, site.name).rpartition(".")]
    ]
    return replace(model, sites=SiteTable(sites)) if sites != list(model.sites) else None


def _buildable(folder: Path) -> bool:
    from importlib.util import find_spec

    installed = find_spec("torch") is not None and find_spec("transformers") is not None
    return installed and folder.is_dir() and bool(read_config(folder).get("architectures"))


def _renamed(site: Site, names: Sequence[str]) -> list[Site]:
    """The site under its module's name; a tied tensor has several, and each but the first is a reader of its own.

    A tensor that the model does not use keeps its name, and so does a tied head that the checkpoint's reader knows.
    """
    if site.consumer or not names:
        return [site]
    parts = [name.rpartition(".") for name in names]
    return [
        replace(site, module=module, parameter=parameter, consumer="" if index == 0 else names[index])
        for index, (module, _, parameter) in enumerate(parts)
    ]
