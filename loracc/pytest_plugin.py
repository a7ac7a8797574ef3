"""A pytest fixture: an export is its base with these adapters folded in.

.. code-block:: python

    def test_release(assert_equivalent):
        assert_equivalent("base.onnx", "adapter/", "out.onnx")

It is there wherever loracc is installed (entry point ``pytest11``), and loads nothing before it is called.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import pytest

__all__ = ["assert_equivalent"]

_Path = str | os.PathLike[str]


@pytest.fixture(scope="session")
def assert_equivalent() -> Callable[..., Any]:
    """Fail unless ``out`` is ``base`` with ``adapter`` folded in.

    The fixture's value is a function of ``base``, ``adapter`` (one or a sequence, as given to ``loracc fold``), ``out``
    and the further arguments of :func:`loracc.verify`; it returns the verification.
    """
    return _assert_equivalent


def _assert_equivalent(base: _Path, adapter: _Path | Sequence[_Path], out: _Path, **options: Any) -> Any:
    __tracebackhide__ = True
    import loracc

    adapters = [adapter] if isinstance(adapter, str | os.PathLike) else list(adapter)
    found = loracc.verify(os.fspath(base), os.fspath(out), [os.fspath(one) for one in adapters], **options)
    if found.verdict != "pass":
        pytest.fail(f"{out} is not {base} with {', '.join(map(str, adapters))}\n{found.summary()}", pytrace=False)
    return found
