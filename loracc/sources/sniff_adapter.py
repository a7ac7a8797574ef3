"""Whether a path is an adapter that was given in a model's place."""

from __future__ import annotations

import re
from collections.abc import Iterable, Set
from pathlib import Path

from loracc.sources.safetensors_file import read_header

__all__ = ["are_adapter_names", "is_adapter_file", "is_adapter_folder"]

#: The part of a key that only an adapter's tensors have (FORMATS.md 1 to 7), and what stands before it.
_MARK = re.compile(
    r"^(?P<module>.*?)\.?(lora_[aA]|lora_[bB]|lora_embedding_[AB]|lora_up|lora_down|lora_mid|lora_magnitude_vector"
    r"|lora\.(up|down)|lora_linear_layer|hada_w[12]_[ab]|lokr_w[12](_[ab])?|lokr_t2|ia3_l|oft_R|boft_R|hra_u"
    r"|vera_lambda_[bd]|fourierft_spectrum|miss_block|dora_scale)(\.|$)"
)


def is_adapter_folder(names: Iterable[str]) -> bool:
    """Whether a folder with files of these names is an adapter's."""
    return bool({"adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"} & set(names))


def is_adapter_file(path: Path) -> bool:
    """Whether a safetensors file holds deltas without the weights they are for.

    A checkpoint of a model *with* its LoRA modules has both, and is a model.

    Raises:
        InputError: The file is not sound.
    """
    return are_adapter_names({info.name for info in read_header(path).tensors})


def are_adapter_names(names: Set[str]) -> bool:
    """Whether tensors of these names are deltas without the weights they are for."""
    modules = {match["module"] for match in map(_MARK.match, names) if match}
    bases = {f"{module}.{leaf}" for module in modules for leaf in ("weight", "base_layer.weight")}
    return bool(modules) and not bases & names
