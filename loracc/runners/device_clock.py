"""Timing on a CUDA device: a captured graph where one can be captured, and events on the stream that it runs on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from loracc.runners.runner import TimedCall

__all__ = ["captured", "events"]

_WARM_RUNS = 3


def captured(torch: Any, once: Callable[[], object]) -> tuple[TimedCall, str]:
    """A timed call of ``once``, and how it runs: "CUDA graph", or without one and why.

    Args:
        torch: The module, with a CUDA device.
        once: Enqueues one run on torch's current stream, on fixed buffers.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(_WARM_RUNS):
            once()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=stream):
            once()
    except RuntimeError as error:  # a copy to the host, or a library that cannot be captured
        torch.cuda.synchronize()
        return events(torch, once, stream), f"no CUDA graph ({str(error).strip().splitlines()[0]})"
    return events(torch, graph.replay, stream), "CUDA graph"


def events(torch: Any, once: Callable[[], object], stream: Any) -> TimedCall:
    """Seconds between two events around so many runs, on the stream that they run on."""

    def timed(repeats: int) -> float:
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.stream(stream):
            first.record(stream)
            for _ in range(repeats):
                once()
            last.record(stream)
        last.synchronize()
        return float(first.elapsed_time(last)) / 1000

    return timed
