"""What many tests share: the real kernel and the real agent, from the cache."""

from __future__ import annotations

import pytest

from osbuild.arch import X86_64
from osbuild.artifacts import File, Kernel
from osbuild.cache import default_cache
from osbuild.errors import HostError


@pytest.fixture(scope="session")
def kernel() -> Kernel:
    """The guest kernel; `make test` has built it before, or the first test that wants it does."""
    from osbuild.kernel import build_kernel, default_spec

    try:
        return build_kernel(default_spec(X86_64), default_cache())
    except HostError as problem:
        pytest.skip(f"{problem}: {problem.hint}")


@pytest.fixture(scope="session")
def agent() -> File:
    """The guest agent."""
    from osbuild.agent import build_agent

    try:
        return build_agent(X86_64, default_cache())
    except HostError as problem:
        pytest.skip(f"{problem}: {problem.hint}")
