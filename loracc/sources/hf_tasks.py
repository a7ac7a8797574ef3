"""``--task``: what a Hugging Face folder is exported for, by the names that the Hub and optimum use."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from loracc.errors import InputError
from loracc.tasks import TASKS

__all__ = ["Task", "class_for", "parse_task"]

_PAST = "-with-past"


@dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
        name: Without its ending.
        past: The graph takes and gives a key-value cache.
    """

    name: str
    past: bool = False


def parse_task(text: str | None) -> Task | None:
    """
    >>> parse_task("text-generation-with-past")
    Task(name='text-generation', past=True)

    Raises:
        InputError: loracc knows no such task.
    """
    if text is None:
        return None
    if text not in TASKS:
        raise InputError(f"--task {text!r} is not known.", hint=f"Known: {', '.join(TASKS)}.")
    return Task(text.removesuffix(_PAST), text.endswith(_PAST))


def class_for(task: Task, config: Any, own: Any) -> Any:
    """The model class that does a task: the folder's own where it does, else the one transformers has for it.

    Raises:
        InputError: transformers has none for this kind of model.
    """
    import transformers

    mapping = getattr(transformers, TASKS[task.name])._model_mapping
    if type(config) not in mapping:
        kinds = [name for name, auto in TASKS.items() if type(config) in getattr(transformers, auto)._model_mapping]
        raise InputError(
            f"--task {task.name}: transformers has no such model of the type {config.model_type!r}.",
            hint=f"Of this type there are: {', '.join(kinds)}.",
        )
    found = mapping[type(config)]
    classes = found if isinstance(found, (list, tuple)) else (found,)
    return own if own in classes else classes[0]
