"""The built-in guest agent: compiled from agent/*.c once, found in the cache afterwards, recognised by a text in it:

osbuilder-agent version=0.1.0;
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

import osbuild
from osbuild.agent_compiler import Compiler, compile_program, find_compiler, program_inputs, program_key
from osbuild.arch import Arch
from osbuild.artifacts import File
from osbuild.cache import Cache
from osbuild.errors import BuildError, InputError
from osbuild.resources import resource
from osbuild.tree import Draft, regular, symlink

NAME: Final = "osbuilder-agent"
PROGRAM: Final = f"/usr/bin/{NAME}"  # where it lies when systemd starts it
INIT_WORDS: Final[tuple[str, ...]] = ()  # kernel words that it needs as the first process
INIT: Final = "/sbin/init"  # where Kata's images have an agent that is the first process

MARKER: Final = re.compile(rb"osbuilder-agent version=([0-9A-Za-z.+_-]{1,64});")


def build_agent(arch: Arch, cache: Cache) -> File:
    """The static agent for `arch`: compiled once for these sources, this compiler and these flags."""
    return _build(find_compiler(arch, cache), arch, cache)


def _build(compiler: Compiler, arch: Arch, cache: Cache) -> File:
    sources, flags = _sources(), _flags(compiler)

    def make(out: Path) -> None:
        _check(compile_program(compiler, flags, sources, out, NAME, arch), compiler)

    home, _ = cache.get("agent", program_key(arch, compiler, flags, sources), make)
    return File.of(home / NAME)


def _sources() -> list[Path]:
    return sorted(path for path in resource("agent").iterdir() if path.suffix in (".c", ".h"))


def _flags(compiler: Compiler) -> tuple[str, ...]:
    return (*compiler.flags, f'-DAGENT_VERSION="{osbuild.__version__}"')


def obtain(source: str, arch: Arch, cache: Cache) -> Agent:
    """Our own agent, compiled or found compiled."""
    del source
    compiler = find_compiler(arch, cache)
    inputs = program_inputs(arch, compiler, _flags(compiler), _sources())
    return replace(read_agent(_build(compiler, arch, cache)), inputs=inputs)


def agent_version(data: bytes) -> str:
    """The version that a built-in agent's bytes carry."""
    found = MARKER.search(data)
    if found is None:
        raise InputError("this is no agent of osbuilder's: its version is not in it")
    return found[1].decode()


def _check(data: bytes, compiler: Compiler) -> None:
    if len(data) > compiler.largest:
        raise BuildError(f"the agent came out at {len(data)} bytes; at most {compiler.largest} were expected")
    if agent_version(data) != osbuild.__version__:
        raise BuildError(f"the agent says it is {agent_version(data)}, not {osbuild.__version__}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Agent:
    """An agent's binary, read: what goes into the tree is what was looked at."""

    kind: str = "builtin"  # a row of AGENTS
    name: str
    version: str
    sha256: str  # of its bytes
    data: bytes
    wants_policy: bool = False  # it does not serve without a policy in the guest
    inputs: Mapping[str, object] = field(default_factory=dict)  # JSON: what it was compiled from, where we did that

    def __str__(self) -> str:
        return f"{self.name} {self.version}"


def read_agent(file: File) -> Agent:
    """The agent that a file holds; InputError when it is none of osbuilder's."""
    data = file.path.read_bytes()
    sha256 = hashlib.sha256(data).hexdigest()
    return Agent(name=NAME, version=agent_version(data), sha256=sha256, data=data)


def install_init(draft: Draft, agent: Agent, *, now: int) -> None:
    """The agent as the first process: a regular file at /sbin/init, and /init for an initramfs.

    Parents are resolved inside the tree, so an image whose /sbin is a link into /usr stays one; what was at those
    two paths is replaced. `now` is in nanoseconds.
    """
    draft.put(INIT, regular(agent.data, 0o755, mtime_ns=now))
    draft.put("/init", symlink(INIT, mtime_ns=now))
