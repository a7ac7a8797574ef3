"""Made once, dropped in order, failures not kept."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from loracc.runtime.once_cache import OnceCache


def test_a_value_is_made_once_however_many_ask() -> None:
    cache: OnceCache[object] = OnceCache(2)
    made: list[int] = []
    going, may_end = threading.Event(), threading.Event()

    def make() -> object:
        made.append(1)
        going.set()
        may_end.wait(10)
        return object()

    with ThreadPoolExecutor(8) as pool:
        first = pool.submit(cache.get, "a", make)
        going.wait(10)
        others = [pool.submit(cache.get, "a", make) for _ in range(7)]
        assert cache.get("b", lambda: "other") == "other"  # another key does not wait
        may_end.set()
        assert {id(future.result(10)) for future in (first, *others)} == {id(first.result())}
    assert made == [1]


def test_the_oldest_is_dropped() -> None:
    cache: OnceCache[str] = OnceCache(2)
    for key in ("a", "b", "a", "c"):
        cache.get(key, lambda key=key: key)  # type: ignore[misc]
    assert cache.keys() == ["a", "c"]


def test_an_error_reaches_all_who_wait_and_is_not_kept() -> None:
    cache: OnceCache[int] = OnceCache(2)
    going, may_end = threading.Event(), threading.Event()

    def fail() -> int:
        going.set()
        may_end.wait(10)
        raise ValueError("once")

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(cache.get, "a", fail)
        going.wait(10)
        second = pool.submit(cache.get, "a", lambda: 2)
        may_end.set()
        with pytest.raises(ValueError, match="once"):
            first.result(10)
        second.exception(10)  # it waited and heard the same, or came later and made its own
    assert cache.get("a", lambda: 3) in (2, 3)


def test_a_value_dropped_while_it_is_made_reaches_who_asked() -> None:
    cache: OnceCache[int] = OnceCache(2)

    def make() -> int:
        cache.drop("a")
        return 1

    assert cache.get("a", make) == 1
    assert cache.keys() == []
