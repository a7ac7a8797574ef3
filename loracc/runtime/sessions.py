"""ONNX Runtime sessions whose unchanged weights are one mapped file.

What was measured (docs/switching.md): ``add_external_initializers`` takes more memory per session than a plain file;
``add_initializer`` shares weights, but what the optimizer derives from one is computed from the file on the disk; data
files given from memory and used directly are shared and need no file. Packing (MatMul and Gemm weights in the
kernels' own layout) is a copy per session in any case, unless it is switched off.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from loracc.errors import InputError
from loracc.runners.runner import PROVIDERS, RunError, first_line, onnxruntime, session_options
from loracc.runtime.shared_base import SessionSource

__all__ = ["SessionSettings", "open_session"]

#: Without packing, what the optimizer computes from weights beforehand (a transposed embedding) stays below this.
_FOLDED_BYTES = 1 << 20


@dataclass(frozen=True)
class SessionSettings:
    """How sessions are opened.

    Attributes:
        provider: "cpu" or "cuda".
        threads: Threads inside one operator; 0 is the runtime's own choice.
        prepack: Let the CPU kernels pack weights into their own layout: fast, and a copy of the packed weights in every
            session. Off, a session takes little more than the changed weights, and matrix products are slower.
        configure: Called with each session's ``onnxruntime.SessionOptions`` last.
    """

    provider: str = "cpu"
    threads: int = 0
    prepack: bool = True
    configure: Callable[[Any], None] | None = None


def open_session(source: SessionSource, settings: SessionSettings) -> Any:
    """An ``onnxruntime.InferenceSession`` that keeps what it shares alive.

    Raises:
        MissingExtraError: onnxruntime is not installed.
        RunError: The provider is not there, or the runtime does not load the model.
    """
    ort = onnxruntime()
    if settings.provider not in PROVIDERS or PROVIDERS[settings.provider] not in ort.get_available_providers():
        raise RunError(
            f"onnxruntime {ort.__version__} here has no {settings.provider} provider.",
            hint="Run: pip install 'loracc[gpu]' in place of loracc[cpu]" if settings.provider == "cuda" else None,
        )
    options = session_options(threads=settings.threads)
    if not hasattr(options, "add_external_initializers_from_files_in_memory"):
        raise InputError(
            f"onnxruntime {ort.__version__} cannot take data files from memory, and so cannot share them.",
            hint="Run: pip install -U onnxruntime",
        )
    if source.files:
        data = list(source.files.values())
        options.add_external_initializers_from_files_in_memory(list(source.files), data, [len(one) for one in data])
        options.add_session_config_entry("session.use_external_initializer_file_buffers_directly", "1")
    if not settings.prepack:
        options.add_session_config_entry("session.disable_prepacking", "1")
        options.add_session_config_entry("optimization.constant_folding_max_output_size_in_bytes", str(_FOLDED_BYTES))
    if settings.configure is not None:
        settings.configure(options)
    try:
        session = ort.InferenceSession(source.graph, options, providers=[PROVIDERS[settings.provider]])
    except Exception as error:  # onnxruntime's exceptions have no common base of their own
        raise RunError(f"onnxruntime {ort.__version__} does not load the model: {first_line(error)}") from error
    session.loracc_shared = source.files  # the session does not own them
    return session
