"""Threads for what only waits: results in order, nothing left open, nobody left waiting."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator

import pytest

from osbuild.errands import Errands, Job
from osbuild.errors import HostError


@pytest.fixture
def errands() -> Iterator[Errands]:
    with Errands(3, left=lambda: 10.0, stop=lambda: None) as running:
        yield running


def late(number: int) -> Job[int]:
    """The first take longest."""

    def job(_stack: contextlib.ExitStack) -> int:
        time.sleep(0.02 * (5 - number % 5))
        return number

    return job


def test_results_come_in_order_whoever_is_first(errands: Errands) -> None:
    assert list(errands.in_order(map(late, range(12)), ahead=5)) == list(range(12))


def test_no_more_are_open_than_were_asked_for(errands: Errands) -> None:
    lock = threading.Lock()
    held: set[int] = set()
    most = 0

    def job(number: int) -> Job[int]:
        def run(stack: contextlib.ExitStack) -> int:
            nonlocal most
            with lock:
                held.add(number)
                most = max(most, len(held))
            stack.callback(held.discard, number)
            return number

        return run

    for number in errands.in_order(map(job, range(20)), ahead=4):
        assert number in held
        time.sleep(0.005)
    assert held == set()
    assert 1 < most <= 5  # the one in hand, and four ahead


def test_an_error_comes_where_its_result_would_and_the_others_are_closed(errands: Errands) -> None:
    closed: list[int] = []

    def job(number: int) -> Job[int]:
        def run(stack: contextlib.ExitStack) -> int:
            stack.callback(closed.append, number)
            if number == 1:
                raise HostError("no")
            return number

        return run

    seen: list[int] = []
    with pytest.raises(HostError, match="no"):
        seen.extend(errands.in_order(map(job, range(4)), ahead=4))
    assert seen == [0]
    deadline = time.monotonic() + 5
    while sorted(closed) != [0, 1, 2, 3]:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_result_that_takes_too_long_is_not_waited_for() -> None:
    ended = threading.Event()
    times = iter([0.05])

    def left() -> float:
        with contextlib.suppress(StopIteration):
            return next(times)
        raise HostError("too long")

    began = time.monotonic()
    with pytest.raises(HostError, match="too long"), Errands(1, left=left, stop=ended.set) as errands:
        errands.do(lambda _stack: ended.wait(20))
    assert time.monotonic() - began < 5
    assert ended.is_set()


def test_the_block_ends_its_threads() -> None:
    before = threading.active_count()
    with Errands(3, left=lambda: 10.0, stop=lambda: None) as errands:
        assert errands.do(lambda _stack: threading.active_count()) == before + 3
    assert threading.active_count() == before
