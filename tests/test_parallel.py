"""Work on several cores: in order, and no further than the first failure."""

from __future__ import annotations

import threading

import pytest

from loracc.parallel import in_order


def test_the_results_are_in_order() -> None:
    first_waits = threading.Event()

    def work(item: int) -> int:
        first_waits.wait(0.05) if item == 0 else first_waits.set()
        return item * item

    assert in_order(work, range(50)) == [n * n for n in range(50)]
    assert in_order(work, []) == []


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt])
def test_the_first_failure_is_raised_and_the_rest_dropped(kind: type[BaseException]) -> None:
    done: list[int] = []

    def work(item: int) -> None:
        if item == 2:
            raise kind(f"item {item}")
        threading.Event().wait(0.01)
        done.append(item)

    with pytest.raises(kind, match="item 2"):
        in_order(work, range(1000))
    assert len(done) < 900
