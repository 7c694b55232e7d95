"""The agent by every compiler that is here, for every architecture: static, anywhere, small, the same bytes twice."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import osbuild
import osbuild.agent as agent_module
from osbuild import agent_compiler, command, ttrpc
from osbuild.agent import build_agent
from osbuild.agent_client import AgentClient
from osbuild.agent_compiler import LARGE, SMALL, Compiler, find_compiler
from osbuild.arch import AARCH64, ARCHES, X86_64, Arch, host_arch
from osbuild.cache import Cache, default_cache
from osbuild.errors import BuildError, HostError
from osbuild.resources import resource
from tests.agent_program import toy_agent

NAMES = ("musl-gcc", "zig", "gcc")
pytestmark = pytest.mark.skipif(host_arch() is not X86_64, reason="what is native here is x86_64")


@pytest.fixture(params=list(ARCHES))
def arch(request: pytest.FixtureRequest) -> Arch:
    return ARCHES[request.param]


@pytest.fixture(params=NAMES)
def compiler(request: pytest.FixtureRequest, arch: Arch, monkeypatch: pytest.MonkeyPatch) -> Compiler:
    """Only this one, for this architecture."""
    finder = dict(zip(NAMES, agent_compiler._FINDERS, strict=True))[request.param]
    if request.param == "zig" and arch is X86_64:
        pytest.skip("zig's libc for x86_64 takes minutes to compile, and musl-gcc's is here")
    if request.param == "zig" and agent_compiler.zig() and not list(_zig_cache().glob("o/*/libc.a")):
        pytest.skip("zig has not compiled its libc yet, which takes minutes: osbuilder agent build --arch aarch64")
    found = finder(arch, default_cache())
    if found is None:
        pytest.skip(f"{request.param} for {arch.name} is not here")
    monkeypatch.setattr(agent_compiler, "_FINDERS", (finder,))
    return found


def _zig_cache() -> Path:
    return default_cache().scratch("zig")


@pytest.fixture
def built(arch: Arch, compiler: Compiler) -> Path:
    """Compiled when a test wanted it first; each of these compilers has its own key in the cache."""
    del compiler  # it has seen to it that there is no other
    return build_agent(arch, default_cache()).path


def test_it_is_a_static_pie_within_its_limit(built: Path, compiler: Compiler) -> None:
    headers = command.run("readelf", "--file-header", "--program-headers", "--dynamic", "--wide", str(built)).output
    assert "DYN (" in headers
    assert not {"INTERP", "RWE", "NEEDED", "TEXTREL"} & set(headers.replace("(", " ").replace(")", " ").split())
    assert built.stat().st_size <= (SMALL if compiler.name in ("musl-gcc", "zig") else LARGE)


@pytest.mark.slow
def test_another_directory_gives_the_same_bytes(
    arch: Arch, built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "a directory of another length" / "agent"
    shutil.copytree(resource("agent"), elsewhere)
    monkeypatch.setattr(agent_module, "resource", lambda name: elsewhere)
    monkeypatch.setattr(Cache, "scratch", lambda self, name: default_cache().root / "v1" / name)  # zig's libc
    again = build_agent(arch, Cache(root=tmp_path / "second")).path
    assert again != built
    assert again.read_bytes() == built.read_bytes()
    assert os.fsencode(tmp_path) not in built.read_bytes()


@pytest.fixture
def running(arch: Arch, built: Path, tmp_path: Path) -> Iterator[Path]:
    """The agent as an ordinary process, on a socket."""
    argv = [str(built)]
    if arch is not host_arch():
        emulator = shutil.which(f"qemu-{arch.name}-static") or shutil.which(f"qemu-{arch.name}")
        if emulator is None:
            pytest.skip(f"qemu-{arch.name}-static is not installed")
        argv.insert(0, emulator)
    path = tmp_path / "s"
    with subprocess.Popen([*argv, "--listen", f"unix:{path}"], stdout=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 20
        while not path.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        yield path
        process.terminate()


def test_it_runs_and_answers(running: Path) -> None:
    with ttrpc.connect_unix(running, 10) as connection:
        client = AgentClient(connection)
        client.wait(10)
        assert client.version(seconds=10).agent == osbuild.__version__


# --- which one is taken ---


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without compilers."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(agent_compiler, "zig", lambda: ())


@pytest.mark.usefixtures("bare")
@pytest.mark.parametrize(
    ("arch", "hint"),
    [(X86_64, "musl-tools"), (AARCH64, "gcc-aarch64-linux-gnu libc6-dev-arm64-cross"), (AARCH64, "CHECKOUT[cross]")],
)
def test_a_machine_without_a_compiler_is_told_what_has_one(arch: Arch, hint: str, tmp_path: Path) -> None:
    with pytest.raises(HostError) as caught:
        build_agent(arch, Cache(root=tmp_path))
    assert hint in caught.value.hint


@pytest.mark.usefixtures("bare")
def test_a_cross_compiler_without_a_static_libc_is_said_to_have_none(tmp_path: Path) -> None:
    program = tmp_path / "aarch64-linux-gnu-gcc"
    program.write_text("#!/bin/sh\necho libc.a\n")
    program.chmod(0o755)
    with pytest.raises(HostError, match="no static libc") as caught:
        find_compiler(AARCH64, Cache(root=tmp_path))
    assert "libc6-dev-arm64-cross" in caught.value.hint


def test_musl_is_preferred_to_a_larger_libc(tmp_path: Path) -> None:
    if shutil.which("musl-gcc") is None:
        pytest.skip("musl-gcc is not installed")
    assert find_compiler(X86_64, Cache(root=tmp_path)).name == "musl-gcc"


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [(("-no-pie", "-static"), "no static PIE"), (("-pie",), "no static PIE"), (("-static-pie",), "bytes; at most")],
    ids=["at a fixed address", "dynamic", "too large"],
)
def test_an_agent_that_came_out_wrong_is_no_agent(
    flags: tuple[str, ...], complaint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if shutil.which("gcc") is None:
        pytest.skip("gcc is not installed")
    toy_agent(tmp_path / "agent", monkeypatch)
    kind = Compiler(name="gcc", argv=("gcc",), flags=("-Os", *flags), version="", largest=100)
    monkeypatch.setattr(agent_module, "find_compiler", lambda arch, cache: kind)
    with pytest.raises(BuildError, match=complaint):
        build_agent(X86_64, Cache(root=tmp_path / "cache"))
