"""Serving what ``loracc attach`` made."""

from __future__ import annotations

from loracc.runtime.adapter_loader import load_adapter, run_options
from loracc.runtime.deployment import Deployment
from loracc.runtime.trt_deployment import TrtDeployment

__all__ = ["Deployment", "TrtDeployment", "load_adapter", "run_options"]
