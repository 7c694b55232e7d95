"""Something that is killed in the middle, and a place where doing that a thousand times costs little."""

from __future__ import annotations

import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest


@pytest.fixture
def memory() -> Iterator[Path]:
    """A directory in memory: what a kill leaves is the same there, and a thousand flushes cost nothing."""
    home = Path("/dev/shm")
    if not os.access(home, os.W_OK):
        pytest.skip(f"there is no {home}")
    with tempfile.TemporaryDirectory(prefix="osbuilder-test-", dir=home) as name:
        yield Path(name)


def killed(seconds: float, act: Callable[[], object]) -> bool:
    """Whether it was killed before its end, in a process of its own."""
    child = os.fork()
    if child == 0:
        try:
            act()
            os._exit(0)
        except BaseException:
            os._exit(1)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert status in (0, signal.SIGKILL), status
    return status != 0
