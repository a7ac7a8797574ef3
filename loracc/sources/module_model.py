"""A module in memory as a base model: which inputs it is traced with, and the graph that comes out."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from loracc.errors import InputError, UnsupportedError
from loracc.model import BaseModel, LoadOptions
from loracc.sources.hf_inputs import TracedInput, plan_inputs
from loracc.sources.torch_export import name_dimensions, tied_groups, to_ir
from loracc.sources.torch_sites import trace_sites
from loracc.sources.torch_trace import trace
from loracc.sources.training_mode import refuse_training_mode
from loracc.sources.user_inputs import given_inputs, parse_dynamic_spec

__all__ = ["choose_inputs", "trace_module", "without_cache"]


def trace_module(path: Path, module: Any, options: LoadOptions, *, format: str) -> BaseModel:
    """Trace a module in eval mode. A transformers model is called as its folder would be; others need samples.

    Raises:
        InputError: No samples, or others than ``forward`` takes.
        UnsupportedError: torch cannot trace or export it.
    """
    library = _is_transformers(module)
    if library:
        without_cache(module)
    inputs = choose_inputs(module, path, options) if library else _given(module, path, options)
    program = trace(module, {t.name: t.array for t in inputs}, {t.name: t.symbols for t in inputs})
    refuse_training_mode(program, path)
    graph = to_ir(program, options.opset)
    fixed = name_dimensions(graph, {traced.name: traced.symbols for traced in inputs})
    given = bool(options.inputs or options.inputs_file)
    return BaseModel(
        path=path,
        format=format,
        ir=graph,
        sites=trace_sites(graph, program.state_dict, tied_groups(program)),
        sample_inputs={traced.name: traced.array for traced in inputs} if given else {},
        origin=program,
        notes=(f"torch fixed the length of {', '.join(fixed)}",) if fixed else (),
        input_ranges={traced.name: traced.range for traced in inputs if traced.range is not None},
    )


def without_cache(model: Any) -> None:
    """No key-value cache among a decoder's outputs; the parts of a model may have configurations of their own."""
    for part in model.modules():
        if hasattr(getattr(part, "config", None), "use_cache"):
            part.config.use_cache = False


def choose_inputs(
    model: Any,
    path: Path,
    options: LoadOptions,
    plan: Callable[[Any, Path], list[TracedInput]] = plan_inputs,
) -> list[TracedInput]:
    """A transformers model's own inputs, or the user's samples; an input that loracc knows keeps its dynamic axes."""
    if not options.inputs and not options.inputs_file:
        return plan(model, path)
    try:
        known = {traced.name: traced for traced in plan(model, path)}
    except UnsupportedError:
        known = {}
    return _with_samples(options, known)


def _with_samples(options: LoadOptions, known: dict[str, TracedInput]) -> list[TracedInput]:
    given = given_inputs(options, {name: traced.range for name, traced in known.items() if traced.range is not None})
    dynamic = {(spec.name, spec.axis): spec.symbol for spec in map(parse_dynamic_spec, options.dynamic)}
    if unknown := [f"{name}:{axis}" for name, axis in dynamic if name not in given or axis >= given[name].ndim]:
        raise InputError(f"--dynamic {unknown[0]}: there is no such axis.", hint=f"The inputs: {', '.join(given)}.")
    inputs = []
    # An input that loracc does not know (token_type_ids) has the axes of those that it knows: same place, same length.
    alike = {
        (axis, given[name].shape[axis]): symbol
        for name, own in known.items()
        if name in given and len(own.symbols) == given[name].ndim
        for axis, symbol in enumerate(own.symbols)
    }
    for name, array in given.items():
        own = known.get(name)
        symbols: Sequence[str | None] = [alike.get((axis, length)) for axis, length in enumerate(array.shape)]
        if own and len(own.symbols) == array.ndim:
            symbols = own.symbols
        chosen = tuple(dynamic.get((name, axis), symbol) for axis, symbol in enumerate(symbols))
        inputs.append(TracedInput(name, chosen, array, own.range if own else None))
    return inputs


def _given(module: Any, path: Path, options: LoadOptions) -> list[TracedInput]:
    parameters = inspect.signature(module.forward).parameters.values()
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    needed = [p.name for p in parameters if p.name in names and p.default is p.empty]
    inputs = _with_samples(options, {})
    given = [traced.name for traced in inputs]
    missing = [name for name in needed if name not in given]
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    unknown = [name for name in given if name not in names and not takes_any]
    if missing or unknown or not given:
        problem = f"has no input {unknown[0]!r}" if unknown else f"needs samples of {', '.join(missing or names)}"
        raise InputError(
            f"{path}: {type(module).__name__} {problem} to be traced; forward takes {', '.join(names)}.",
            hint=f"For example: --input {(missing or names or ['x'])[0]}:float32[2,16]",
        )
    return inputs


def _is_transformers(module: Any) -> bool:
    """Whether it is a transformers model, without importing the library for one that is not."""
    classes = type(module).__mro__
    return any(c.__name__ == "PreTrainedModel" and c.__module__.startswith("transformers.") for c in classes)
