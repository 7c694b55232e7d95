"""Threads for what only waits: the main one stays free for signals, and no other keeps the process alive.

Python joins the threads of concurrent.futures before it ends; one that waits for a silent server would hold a Ctrl-C
up for as long. These are daemons, told to stop and waited for briefly.
"""

from __future__ import annotations

import contextlib
import itertools
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future
from typing import Final, TypeVar

T = TypeVar("T")
Job = Callable[[contextlib.ExitStack], T]  # what it opens on the stack stays open until its result has been used

_GRACE_SECONDS: Final = 1.0  # one that waits for a server's first word cannot be told to stop


class Errands:
    """A few threads, for the length of a block. `left` says how long a result may take, `stop` ends what blocks."""

    def __init__(self, threads: int, *, left: Callable[[], float], stop: Callable[[], None]) -> None:
        self._left = left
        self._stop = stop
        self._stopped = threading.Event()
        self._queue: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._threads = [threading.Thread(target=self._serve, name="errand", daemon=True) for _ in range(threads)]

    def __enter__(self) -> Errands:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._stop()
        for _thread in self._threads:
            self._queue.put(None)
        end = time.monotonic() + _GRACE_SECONDS
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))

    def do(self, job: Job[T]) -> T:
        """The result of one job that leaves nothing open."""
        (result,) = self.in_order([job])
        return result

    def in_order(self, jobs: Iterable[Job[T]], *, ahead: int = 1) -> Generator[T]:
        """Their results, each open until the next is asked for; up to `ahead` of them are begun before their turn."""
        rest = iter(jobs)
        begun: deque[Future[tuple[T, contextlib.ExitStack]]] = deque()
        try:
            begun.extend(self._begin(job) for job in itertools.islice(rest, ahead))
            while begun:
                future = begun[0]
                value, stack = future.result(None if future.done() else self._left())
                begun.popleft()
                with stack:
                    begun.extend(self._begin(job) for job in itertools.islice(rest, 1))
                    yield value
        except TimeoutError:
            self._left()  # says so
            raise
        finally:
            for future in begun:
                future.add_done_callback(_abandon)

    def _begin(self, job: Job[T]) -> Future[tuple[T, contextlib.ExitStack]]:
        future: Future[tuple[T, contextlib.ExitStack]] = Future()

        def run() -> None:
            with contextlib.ExitStack() as stack:
                try:
                    value = job(stack)
                except BaseException as problem:
                    future.set_exception(problem)
                else:
                    future.set_result((value, stack.pop_all()))

        self._queue.put(run)
        return future

    def _serve(self) -> None:
        while (run := self._queue.get()) is not None:
            if not self._stopped.is_set():
                run()


def _abandon(future: Future[tuple[T, contextlib.ExitStack]]) -> None:
    if future.exception() is None:
        future.result()[1].close()
