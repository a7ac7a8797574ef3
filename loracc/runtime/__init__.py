"""Serving what ``loracc attach`` made."""

from __future__ import annotations

from loracc.runtime.attaching import add_variants, attach_variants
from loracc.runtime.deployment import Deployment

__all__ = ["Deployment", "add_variants", "attach_variants"]
