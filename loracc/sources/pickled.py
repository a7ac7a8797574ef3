"""Pickled ``.pt`` files: whole modules, only when the user vouches for them, and state dicts, which need a factory.

A state dict is read with ``weights_only=True``, which builds tensors and plain containers and refuses everything else.
"""

from __future__ import annotations

import importlib
import pickle
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loracc.errors import InputError, require
from loracc.model import BaseModel, LoadOptions
from loracc.quiet import quiet
from loracc.sources.checkpoint import checkpoint_model
from loracc.sources.checkpoint_files import CheckpointFiles
from loracc.sources.module_model import trace_module
from loracc.sources.torch_tensors import check_stored, plain_tensors
from loracc.sources.torch_trace import TORCH_LOGGERS, reason_of

if TYPE_CHECKING:
    import torch

__all__ = ["load_pickled"]

#: Keys under which training scripts keep the state dict among other things.
_NESTED = ("state_dict", "model_state_dict", "model")


def load_pickled(path: Path, options: LoadOptions) -> BaseModel:
    """Read a pickled module or a state dict.

    Raises:
        InputError: Damaged, a module without ``allow_pickle``, a class that cannot be imported, a factory whose module
            the state dict does not fit, no inputs to trace with.
        UnsupportedError: torch cannot trace or export it.
        MissingExtraError: torch is not installed.
    """
    require("torch", "read a .pt file")
    loaded = _load(path, options)
    state = _state_dict(loaded)
    if state is not None:
        return _from_state(path, state, options)
    if not hasattr(loaded, "forward") or not hasattr(loaded, "state_dict"):
        raise InputError(f"{path}: holds a {type(loaded).__name__}, expected a module or a state dict.")
    return trace_module(path, loaded.eval(), options, format="module")


def _load(path: Path, options: LoadOptions) -> Any:
    """Tensors and plain containers; anything else only when the user vouches for it."""
    try:
        return _unpickled(path, weights_only=True)
    except pickle.UnpicklingError as error:
        if "weights_only" not in str(error):
            raise _unreadable(path, error) from error
        if not options.allow_pickle:
            raise InputError(
                f"{path}: a pickled module; reading it runs whatever code its author put into it.",
                hint="Pass --allow-pickle if you trust where it comes from, or make a .pt2 file where the model lives: "
                "torch.export.save(torch.export.export(model.eval(), inputs), 'model.pt2').",
            ) from error
    except InputError:
        raise
    except Exception as error:  # a parser's boundary: damaged files fail in any way
        raise _unreadable(path, error) from error
    try:
        return _unpickled(path, weights_only=False)
    except (AttributeError, ImportError) as error:
        raise InputError(
            f"{path}: the pickled module needs code that is not here ({reason_of(error)}).",
            hint="Run where its classes can be imported (PYTHONPATH), or give a .pt2 file, which needs none.",
        ) from error
    except Exception as error:
        raise _unreadable(path, error) from error


def _unpickled(path: Path, *, weights_only: bool) -> Any:
    import torch

    with open(path, "rb") as file:
        mapped = file.read(2) == b"PK"
    if mapped:
        check_stored(path)
    with quiet(*TORCH_LOGGERS), _importable():
        return torch.load(path, map_location="cpu", weights_only=weights_only, mmap=mapped)


def _unreadable(path: Path, error: Exception) -> InputError:
    return InputError(
        f"{path}: torch cannot read it ({reason_of(error)}).", hint="The file is damaged: fetch or save it again."
    )


def _state_dict(loaded: Any) -> dict[str, torch.Tensor] | None:
    """The state dict that an object is or holds; None when it is none."""
    import torch

    if not isinstance(loaded, Mapping):
        return None
    for key in _NESTED:
        if isinstance(loaded.get(key), Mapping):
            return _state_dict(loaded[key])
    tensors = {str(key): value.detach() for key, value in loaded.items() if isinstance(value, torch.Tensor)}
    return tensors if len(tensors) == len(loaded) and tensors else None


def _from_state(path: Path, state: dict[str, torch.Tensor], options: LoadOptions) -> BaseModel:
    """Traced in the factory's module, or else the weights alone."""
    if options.factory and options.graph:
        return trace_module(path, _built(path, state, options.factory), options, format="state_dict")
    tensors = list(plain_tensors(path, state).values())
    base = checkpoint_model(path, CheckpointFiles(path, ()), tensors, {})
    base.format = "state_dict"
    if options.graph:
        base.notes = ("a state dict has no graph: give --factory package.module:function to build the module",)
    return base


def _built(path: Path, state: dict[str, torch.Tensor], factory: str) -> Any:
    """The factory's module with the state dict in it, its tensors still in the file."""
    module = _call(factory)
    if not hasattr(module, "load_state_dict"):
        raise InputError(f"--factory {factory}: returned a {type(module).__name__}, expected a torch module.")
    try:
        result = module.load_state_dict(state, strict=False, assign=True)
    except RuntimeError as error:  # shapes; torch lists all of them
        raise InputError(f"{path}: does not fit the module of {factory}: {str(error).strip()}") from error
    problems = [f"missing {name}" for name in result.missing_keys]
    problems += [f"unexpected {name}" for name in result.unexpected_keys]
    if problems:
        more = f" and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise InputError(
            f"{path}: does not fit the module of {factory}: {', '.join(problems[:20])}{more}.",
            hint="The factory must build the module that the state dict was saved from.",
        )
    return module.eval()


def _call(factory: str) -> Any:
    module_name, colon, function = factory.partition(":")
    if not colon or not module_name or not function.isidentifier():
        raise InputError(f"--factory {factory!r}: expected package.module:function.")
    with _importable():
        try:
            made = getattr(importlib.import_module(module_name), function)
        except (ImportError, AttributeError) as error:
            raise InputError(
                f"--factory {factory}: cannot be imported ({error}).", hint="Run where it can be (PYTHONPATH)."
            ) from error
        return made()


@contextmanager
def _importable() -> Iterator[None]:
    """The working directory counts when the user's own code is imported, as it does for ``python -m``."""
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        yield
    finally:
        sys.path.remove(here)
