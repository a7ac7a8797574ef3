"""LyCORIS: LoCon, LoHa, LoKr, full, norm, OFT, BOFT, IA3, GLoRA, any of them with DoRA, under kohya's names.

The kinds, their keys and their formulas are in :mod:`loracc.kinds.lycoris_table`; LyCORIS' *forward* is the oracle
(FORMATS.md 4). A file may mix kinds, one per module.
"""

from __future__ import annotations

from loracc.adapter import Adapter
from loracc.formats.adapter_options import AdapterOptions
from loracc.formats.adapter_source import AdapterSource
from loracc.formats.network_modules import is_network, read_network

__all__ = ["is_lycoris", "read_lycoris"]


def is_lycoris(source: AdapterSource) -> bool:
    """Whether any module's keys are those of one of LyCORIS' kinds."""
    return is_network(source)


def read_lycoris(source: AdapterSource, name: str, options: AdapterOptions) -> Adapter:
    """Read a LyCORIS network (see :func:`loracc.formats.network_modules.read_network`)."""
    return read_network(source, name, options, "lycoris")
