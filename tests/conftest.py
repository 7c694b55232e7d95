"""What many tests share: the real kernel and the real agent, from the cache."""

from __future__ import annotations

import shutil
from pathlib import Path

import hypothesis
import pytest

from osbuild import command
from osbuild.arch import X86_64
from osbuild.artifacts import File, Initrd, Kernel
from osbuild.cache import Cache, default_cache
from osbuild.errors import CommandError, HostError

hypothesis.settings.register_profile("osbuilder", deadline=None)  # no test depends on how fast a machine is
hypothesis.settings.load_profile("osbuilder")


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    """An empty one."""
    return Cache(root=tmp_path / "cache")


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


@pytest.fixture(scope="session")
def sanitized_agent() -> Path:
    """The agent's program under ASan and UBSan, or without where there is no libasan."""
    from tests.agent_program import SANITIZERS, compile_agent

    try:
        path = compile_agent(*SANITIZERS)
        command.run(str(path), "--version")
    except CommandError:
        path = compile_agent()
    return path


@pytest.fixture(scope="session")
def busybox_initrd(agent: File, kernel: Kernel, tmp_path_factory: pytest.TempPathFactory) -> Initrd:
    """An initramfs with the agent as init and a busybox, for guests that run containers."""
    from osbuild.initrd import build_initrd
    from tests.agent_program import BUSYBOX, busybox_root

    if shutil.which(X86_64.qemu) is None or not BUSYBOX.exists():
        pytest.skip(f"{X86_64.qemu} or a static busybox is not installed")
    return build_initrd(busybox_root(agent), tmp_path_factory.mktemp("busybox") / "initrd.img")
