"""Hugging Face folders as base models: the class that ``config.json`` names, traced; weights stay in their files."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from loracc.errors import InputError, UnsupportedError, require
from loracc.model import BaseModel, LoadOptions
from loracc.quiet import quiet
from loracc.sites import ExpertStack
from loracc.sources.checkpoint_files import read_config
from loracc.sources.hf_cache import cache_layers, past_inputs, with_cache
from loracc.sources.hf_inputs import TracedInput, decoder_inputs
from loracc.sources.hf_loading import empty_model, loading_of
from loracc.sources.hf_parts import becomes_part, check_part, part_inputs
from loracc.sources.hf_tasks import Task, class_for, parse_task
from loracc.sources.hf_weights import MappedWeights, read_weights
from loracc.sources.module_model import choose_inputs, without_cache
from loracc.sources.torch_export import name_dimensions, tied_groups, to_ir
from loracc.sources.torch_sites import trace_sites
from loracc.sources.torch_trace import TORCH_LOGGERS, reason_of, trace
from loracc.tensors import PermutedTensor

__all__ = ["load_huggingface", "parameter_sources"]

#: Bytes of weights in memory worth telling of.
_LARGE = 1 << 28


def load_huggingface(path: Path, options: LoadOptions) -> BaseModel:
    """Trace the folder's model with dynamic batch and sequence. Nothing is written into the folder, nothing fetched.

    Raises:
        InputError: No or an unknown class in ``config.json``, weights that do not fit it, weights that are missing.
        UnsupportedError: Quantized weights, code of the folder's own, or a model that torch cannot trace.
        MissingExtraError: torch or transformers is not installed.
    """
    require("torch", "trace a Hugging Face model")
    require("transformers", "build a Hugging Face model")
    with _transformers_quiet():
        task = parse_task(options.task)
        model_class, config = _model_class(path)
        model_class = class_for(task, config, model_class) if task else model_class
        weights = read_weights(path)
        built = _build(path, model_class, config, weights)
        inputs = _inputs(built.model, path, options, task)
        try:
            graph, program = _export(built.model, weights, inputs, options)
        except UnsupportedError as error:  # some attention kernels cannot be traced; the plain one can
            plain = _build(path, model_class, config, weights, "eager")
            _inputs(plain.model, path, options, task)
            try:
                graph, program = _export(plain.model, weights, inputs, options)
            except UnsupportedError:
                raise UnsupportedError(f"{path}: {error.message}", hint=error.hint) from error
    _refuse_missing(path, graph, built.missing)
    fixed = name_dimensions(graph, {traced.name: traced.symbols for traced in inputs})
    sites = trace_sites(graph, program.state_dict, tied_groups(program))
    loading = loading_of(built.model, {name: tuple(tensor.shape) for name, tensor in weights.state.items()})
    return BaseModel(
        path=path,
        format="huggingface",
        ir=graph,
        sites=sites,
        elsewhere=frozenset(program.state_dict) - {site.name for site in sites} if options.part else frozenset(),
        origin=program,
        notes=tuple(_notes(graph, built.unused, fixed)),
        sample_inputs={t.name: t.array for t in inputs} if options.inputs or options.inputs_file else {},
        stacks=loading.stacks,
        spelled=loading.spelled,
        input_ranges={traced.name: traced.range for traced in inputs if traced.range is not None},
    )


def parameter_sources(path: Path) -> tuple[dict[str, str | None], tuple[ExpertStack, ...]]:
    """For each parameter of the folder's model, by module path, the checkpoint's tensor that it is, bit for bit.

    None where transformers computes it from several; those that it stacks are told too. A tied parameter appears under
    each of its names.

    Raises:
        InputError, UnsupportedError: The model cannot be built.
    """
    with _transformers_quiet():
        model_class, config = _model_class(path)
        weights = read_weights(path)
        shapes = {name: tuple(tensor.shape) for name, tensor in weights.state.items()}
        loading = loading_of(empty_model(model_class, config), shapes)
        if loading.stacks:  # then the model is not built: it would stack all experts in memory
            return loading.sources, loading.stacks
        built = _build(path, model_class, config, weights)
        named = built.model.named_parameters(remove_duplicate=False)
        found = {name: weights.lazy(parameter) for name, parameter in named if name not in built.missing}
    return {name: tensor.name if tensor is not None else None for name, tensor in found.items()}, ()


def _model_class(path: Path) -> tuple[Any, Any]:
    import transformers

    raw = read_config(path)
    names = raw.get("architectures")
    if raw.get("auto_map") and not hasattr(transformers, str((names or [None])[0])):
        raise UnsupportedError(
            f"{path}: the model is defined by code in its own folder, which loracc does not run.",
            hint="Load it yourself, torch.export it, and give the .pt2 file.",
        )
    if not isinstance(names, list) or not names:
        raise InputError(
            f'{path / "config.json"}: no "architectures", so the model\'s class is not known.',
            hint='Add it, for example "architectures": ["BertModel"].',
        )
    if "quantization_config" in raw:
        raise UnsupportedError(
            f"{path}: the weights are quantized; a delta cannot be folded into them.",
            hint="Use the original checkpoint.",
        )
    model_class = getattr(transformers, str(names[0]), None)
    if model_class is None:
        raise InputError(
            f"{path / 'config.json'}: transformers {transformers.__version__} has no class {names[0]!r}.",
            hint="Install the transformers version that the model was made with.",
        )
    try:
        config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # a library's boundary: any malformed value ends up here
        raise InputError(f"{path / 'config.json'}: transformers refuses it ({reason_of(error)}).") from error
    return model_class, config


@dataclass(frozen=True)
class _Built:
    """A model in eval mode, the names of it that found no weight, and the checkpoint's tensors that found no place."""

    model: Any
    missing: set[str]
    unused: set[str]


def _build(path: Path, model_class: Any, config: Any, weights: MappedWeights, attention: str | None = None) -> _Built:
    """The model around the mapped weights, with transformers' default attention unless another is named."""
    arguments: dict[str, Any] = {"attn_implementation": attention} if attention else {}
    try:
        model, info = model_class.from_pretrained(
            None, config=copy.deepcopy(config), state_dict=dict(weights.state), output_loading_info=True, **arguments
        )
    except Exception as error:  # a library's boundary
        raise InputError(
            f"{path}: {model_class.__name__} cannot be built with these weights ({reason_of(error)}).",
            hint="Check that config.json and the weights belong together.",
        ) from error
    if info["mismatched_keys"]:
        listed = "; ".join(f"{name}: file {list(a)}, model {list(b)}" for name, a, b in sorted(info["mismatched_keys"]))
        raise InputError(
            f"{path}: weights of other shapes than config.json says: {listed}.",
            hint="Check that config.json and the weights belong together.",
        )
    if hasattr(model, "get_experts_implementation") and _has_experts(model):
        model.set_experts_implementation("batched_mm")
    without_cache(model)
    model.config.return_dict = True
    return _Built(model.eval(), set(info["missing_keys"]), set(info["unexpected_keys"]))


def _has_experts(model: Any) -> bool:
    return any(p.ndim == 3 and ".experts." in name for name, p in model.named_parameters())


def _inputs(model: Any, path: Path, options: LoadOptions, task: Task | None) -> list[TracedInput]:
    """What the model is traced with; it is made to take a cache, or to be one part, where that is asked for."""
    check_part(model, task, options.part)
    past = task is not None and task.past
    if options.part is not None:
        part = options.part
        plan = choose_inputs(model, path, options, lambda model, _: part_inputs(model, part, past=past))
        becomes_part(model, part, past=past)
        return plan
    if not past:
        return choose_inputs(model, path, options)
    layers = cache_layers(model)
    plan = choose_inputs(model, path, options, lambda model, _: [*decoder_inputs(model), *past_inputs(layers)])
    with_cache(model)
    return plan


def _export(
    model: Any, weights: MappedWeights, inputs: Sequence[TracedInput], options: LoadOptions
) -> tuple[ir.Model, Any]:
    """(graph with the weights in their files, the program it is made from)."""
    arrays = {traced.name: traced.array for traced in inputs}
    program = trace(model, arrays, {traced.name: traced.symbols for traced in inputs})
    lazy = {name: found for name, tensor in program.state_dict.items() if (found := weights.lazy(tensor)) is not None}
    return to_ir(program, options.opset, lazy), program


def _refuse_missing(path: Path, graph: ir.Model, missing: set[str]) -> None:
    used = sorted(missing & set(graph.graph.initializers))
    if used:
        raise InputError(
            f"{path}: the checkpoint lacks {len(used)} weights that the model computes with: {', '.join(used[:20])}"
            + (", ..." if len(used) > 20 else "."),
            hint='"architectures" in config.json may name another class than the one that was saved.',
        )


def _notes(graph: ir.Model, unused: set[str], fixed: Sequence[str]) -> Iterator[str]:
    if unused:
        some = ", ".join(sorted(unused)[:3]) + (", ..." if len(unused) > 3 else "")
        yield f"{len(unused)} tensors of the checkpoint belong to no part of the model: {some}"
    if fixed:
        yield f"torch fixed the length of {', '.join(fixed)}"
    held = [value for value in graph.graph.initializers.values() if _in_memory(value.const_value)]
    size = sum(value.const_value.nbytes for value in held if value.const_value is not None)
    if size > _LARGE:
        yield f"{len(held)} weights were converted by transformers and are held in memory ({size / 1e9:.1f} GB)"


def _in_memory(tensor: ir.TensorProtocol | None) -> bool:
    while isinstance(tensor, PermutedTensor):
        tensor = tensor.base
    return tensor is not None and not isinstance(tensor, ir.ExternalTensor)


@contextmanager
def _transformers_quiet() -> Iterator[None]:
    """No advice about the configuration and no progress bar of transformers' own."""
    from transformers.utils import logging

    bar = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        with quiet("transformers", *TORCH_LOGGERS):
            yield
    finally:
        if bar:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]
