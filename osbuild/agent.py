"""The built-in guest agent: compiled from agent/*.c once, found in the cache afterwards, recognised by a text in it:

osbuilder-agent version=0.1.0;
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import osbuild
from osbuild import command
from osbuild.agent_compiler import Compiler, find_compiler
from osbuild.arch import Arch
from osbuild.artifacts import File
from osbuild.cache import Cache
from osbuild.elf import SHARED, read_elf
from osbuild.errors import BuildError, InputError
from osbuild.resources import resource
from osbuild.tree import Bytes, Draft, regular, symlink

NAME: Final = "osbuilder-agent"
PROGRAM: Final = f"/usr/bin/{NAME}"  # where it lies when systemd starts it
INIT_WORDS: Final[tuple[str, ...]] = ()  # kernel words that it needs as the first process
INIT: Final = "/sbin/init"  # where Kata's images have an agent that is the first process

MARKER: Final = re.compile(rb"osbuilder-agent version=([0-9A-Za-z.+_-]{1,64});")


def build_agent(arch: Arch, cache: Cache) -> File:
    """The static agent for `arch`: compiled once for these sources, this compiler and these flags."""
    compiler = find_compiler(arch, cache)
    sources = sorted(path for path in resource("agent").iterdir() if path.suffix in (".c", ".h"))
    flags = (*compiler.flags, f'-DAGENT_VERSION="{osbuild.__version__}"')

    def make(out: Path) -> None:
        _compile(compiler, flags, sources, out)
        _check((out / NAME).read_bytes(), arch, compiler)

    home, _ = cache.get("agent", _key(arch, compiler, flags, sources), make)
    return File.of(home / NAME)


def obtain(source: str, arch: Arch, cache: Cache) -> Agent:
    """Our own agent, compiled or found compiled."""
    del source
    return read_agent(build_agent(arch, cache))


def agent_version(data: bytes) -> str:
    """The version that a built-in agent's bytes carry."""
    found = MARKER.search(data)
    if found is None:
        raise InputError("this is no agent of osbuilder's: its version is not in it")
    return found[1].decode()


def _key(arch: Arch, compiler: Compiler, flags: tuple[str, ...], sources: list[Path]) -> str:
    inputs = {
        "arch": arch.name,
        "compiler": [compiler.name, compiler.version],
        "libc": [File.of(path).sha256 for path in compiler.libc],
        "flags": flags,
        "osbuild": osbuild.__version__,
        "sources": {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sources},
    }
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()


def _compile(compiler: Compiler, flags: tuple[str, ...], sources: list[Path], out: Path) -> None:
    # Names without a directory, so that the directory cannot get into the bytes.
    work = out / "work"
    work.mkdir()
    for path in sources:
        shutil.copyfile(path, work / path.name)
    units = [path.name for path in sources if path.suffix == ".c"]
    command.run(
        *compiler.argv, *flags, f"-ffile-prefix-map={work}=.", *compiler.before, *units, *compiler.behind,
        "-o", f"../{NAME}", cwd=work, env=dict(compiler.env),
    )  # fmt: skip
    shutil.rmtree(work)


def _check(data: bytes, arch: Arch, compiler: Compiler) -> None:
    elf = read_elf(Bytes(data))
    if elf is None or (elf.machine, elf.bits, elf.big_endian) != (arch.elf_machine, 64, False):
        raise BuildError(f"{compiler.name} gave something that is no ELF program for {arch.name}")
    if elf.interpreter or elf.needed or elf.type != SHARED:
        raise BuildError(
            f"{compiler.name} gave an agent that is no static PIE: it would need {elf.interpreter or 'its address'}"
        )
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
