"""``loracc convert``: one adapter, in another format.

Low-rank pairs are carried over as they are, tensor by tensor and in their own dtypes; what a format cannot hold is
refused by name, and what it loses is said.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loracc.errors import InputError, UnsupportedError

if TYPE_CHECKING:
    from loracc.adapter import Adapter
    from loracc.formats.factors import Factors

__all__ = ["WRITERS", "ConvertResult", "convert_adapter"]


@dataclass(frozen=True)
class Writer:
    """One line of ``WRITERS``.

    Attributes:
        name: The format.
        folder: Whether it is a folder or one file.
        suffix: The ending of its file; "" for a folder.
        function: "module:function" that takes factors and the path, and returns what was lost.
    """

    name: str
    folder: bool
    suffix: str
    function: str

    def load(self) -> Callable[[Sequence[Factors], Path], tuple[str, ...]]:
        """The function, imported when it is needed."""
        import importlib

        module, _, name = self.function.partition(":")
        function: Callable[[Sequence[Factors], Path], tuple[str, ...]] = getattr(importlib.import_module(module), name)
        return function


#: The formats that are written; the first whose kind of output fits is taken where ``--to`` does not say.
WRITERS: tuple[Writer, ...] = (
    Writer("peft", True, "", "loracc.formats.write_peft_folder:write_peft_folder"),
    Writer("mlx", True, "", "loracc.formats.write_mlx:write_mlx"),
    Writer("kohya", False, ".safetensors", "loracc.formats.write_kohya:write_kohya"),
    Writer("onnx_adapter", False, ".onnx_adapter", "loracc.formats.write_onnx_adapter:write_onnx_adapter"),
)


@dataclass
class ConvertResult:
    """What a conversion made.

    Attributes:
        output: The destination.
        source, format: From which format to which.
        files: Names of the files written.
        modules: How many modules were carried over.
        notes: What the target format does not keep, and what the reader had to say.
    """

    output: str
    source: str
    format: str
    files: list[str]
    modules: int
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """``convert --json``."""
        return dict(vars(self))


def convert_adapter(
    adapter: str | Path,
    output: str | Path,
    *,
    to: str | None = None,
    model: str | Path | None = None,
    maps: Sequence[str] = (),
    force: bool = False,
    **options: Any,
) -> ConvertResult:
    """Write an adapter in another format.

    Args:
        adapter: A file or a folder, optionally ``PATH@WEIGHT``.
        output: A folder (peft, mlx), ``.safetensors`` (kohya) or ``.onnx_adapter``.
        to: The format, where the output's name does not tell.
        model: The base model, for a format whose names or shapes are only known against it.
        maps: ``OLD=NEW`` renamings, used with ``model``.
        force: Replace the output if it exists.
        options: Fields of :class:`loracc.formats.AdapterOptions`.

    Raises:
        InputError: The call or a file is wrong.
        UnsupportedError: The format cannot hold the adapter; what it cannot hold is named.
    """
    from loracc.formats import load_adapter, parse_adapter_spec
    from loracc.formats.factors import factors_of
    from loracc.staging import Staging, check_destination

    writer = _writer(Path(output), to)
    spec = parse_adapter_spec(str(adapter))
    inputs = [Path(spec.path), *([Path(model)] if model is not None else [])]
    check_destination(Path(output), inputs=inputs, force=force, folder=writer.folder)
    read = load_adapter(spec.path, name=spec.name, **options).scaled(spec.weight)
    if model is not None:
        read = _resolved(read, Path(model), maps)
    if read.naming is not None:
        raise UnsupportedError(
            f"{spec.path}: the names in a {read.format} file can only be read against the model they are for.",
            hint="Give it: --model MODEL",
        )
    factors = factors_of(read)
    with Staging(output, inputs=inputs, force=force, folder=writer.folder) as stage:
        lost = writer.load()(factors, stage.path)
        files = sorted(path.name for path in stage.path.iterdir()) if writer.folder else [stage.path.name]
    return ConvertResult(str(output), read.format, writer.name, files, len(factors), [*read.notes, *lost])


def _writer(output: Path, to: str | None) -> Writer:
    if to is not None:
        found = next((writer for writer in WRITERS if writer.name == to), None)
        if found is None:
            raise InputError(f"--to {to}: expected one of {', '.join(writer.name for writer in WRITERS)}.")
        if not found.folder and output.suffix != found.suffix:
            raise InputError(
                f"{output}: a {to} adapter is a {found.suffix} file.", hint=f"Name it so: {output.stem}{found.suffix}"
            )
        return found
    return next((writer for writer in WRITERS if writer.suffix and writer.suffix == output.suffix), WRITERS[0])


def _resolved(adapter: Adapter, model: Path, maps: Sequence[str]) -> Adapter:
    """The adapter with the model's own names, and with its open shapes settled."""
    from loracc.adapter import Entry
    from loracc.model import LoadOptions
    from loracc.passes.bind_adapter import bind
    from loracc.sources import load_model

    bound = bind(load_model(model, LoadOptions(graph=False)), [adapter], maps=maps)
    before = {entry.name: entry for entry in adapter.entries}
    entries = []
    for binding in bound.bindings:
        old = before.get(binding.key)
        keys, turned = (old.keys, old.fan_in_fan_out) if old is not None else ((binding.key,), None)
        entries.append(Entry(binding.site.module, binding.site.parameter, binding.delta, keys, turned))
    return replace(adapter, entries=tuple(entries), naming=None)
