"""The built-in guest agent: compiled from agent/*.c once, found in the cache afterwards, recognised by a text in it.

ELF header    e_machine at 18, program headers at e_phoff: one of type PT_INTERP would mean "not static"
… anywhere    osbuilder-agent version=0.1.0;
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import osbuild
from osbuild import command
from osbuild.arch import X86_64, Arch, host_arch
from osbuild.artifacts import File
from osbuild.cache import Cache
from osbuild.errors import BuildError, HostError, InputError
from osbuild.resources import resource
from osbuild.tree import Draft, regular, symlink

NAME: Final = "osbuilder-agent"
INIT: Final = "/sbin/init"  # where Kata's images have an agent that is the first process
LARGEST: Final = 2 << 20  # bytes; musl gives some 80 KiB, glibc some 850: more means that something went in by mistake

_MARKER: Final = re.compile(rb"osbuilder-agent version=([0-9A-Za-z.+_-]{1,64});")
_PT_INTERP: Final = 3  # elf.h
_FLAGS: Final = (
    "-std=c11",
    "-Os",
    "-static",
    "-fno-pie", "-no-pie",  # the musl-gcc of Debian 12 links -static-pie against ld-musl
    "-fstack-protector-strong",
    "-U_FORTIFY_SOURCE", "-D_FORTIFY_SOURCE=2",
    "-Wall", "-Wextra", "-Werror", "-Wshadow", "-Wconversion",
    "-Wl,--build-id=none", "-Wl,-z,noexecstack",
    "-s",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class _Compiler:
    program: str
    flags: tuple[str, ...]
    version: str
    libc: Path  # becomes part of the agent; need not be there


def build_agent(arch: Arch, cache: Cache) -> File:
    """The static agent for `arch`: compiled once for these sources, this compiler and these flags."""
    compiler = _find_compiler(arch)
    sources = sorted(path for path in resource("agent").iterdir() if path.suffix in (".c", ".h"))
    flags = (*_FLAGS, *compiler.flags, f'-DAGENT_VERSION="{osbuild.__version__}"')

    def make(out: Path) -> None:
        _compile(compiler, flags, sources, out)
        _check(out / NAME, arch)

    home, _ = cache.get("agent", _key(arch, compiler, flags, sources), make)
    return File.of(home / NAME)


def agent_version(data: bytes) -> str:
    """The version that a built-in agent's bytes carry."""
    found = _MARKER.search(data)
    if found is None:
        raise InputError("this is no agent of osbuilder's: its version is not in it")
    return found[1].decode()


def _find_compiler(arch: Arch) -> _Compiler:
    if arch is not X86_64 or host_arch() is not X86_64:
        raise HostError(
            f"the built-in agent cannot be compiled for {arch.name} on {host_arch().name} yet",
            hint="build it on an x86_64 machine, for x86_64",
        )
    flags: tuple[str, ...] = ()
    if shutil.which("musl-gcc") is not None:
        program = command.find("musl-gcc")
        libc = Path("/usr/lib/x86_64-linux-musl/libc.a")  # Debian's; -print-file-name would name glibc's
        # musl brings no kernel headers; after its own, those of the system do.
        flags = ("-idirafter", "/usr/include", "-idirafter", "/usr/include/x86_64-linux-gnu")
    elif shutil.which("gcc") is not None:
        program = command.find("gcc")
        libc = Path(command.run(program, "-print-file-name=libc.a").output.strip())
    else:
        raise HostError("there is no C compiler for the agent", hint="apt-get install musl-tools gcc")
    version = command.run(program, "--version").output
    return _Compiler(program=program, flags=flags, version=version, libc=libc)


def _key(arch: Arch, compiler: _Compiler, flags: tuple[str, ...], sources: list[Path]) -> str:
    inputs = {
        "arch": arch.name,
        "compiler": [Path(compiler.program).name, compiler.version],
        "libc": File.of(compiler.libc).sha256 if compiler.libc.is_file() else "",
        "flags": flags,
        "osbuild": osbuild.__version__,
        "sources": {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sources},
    }
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()


def _compile(compiler: _Compiler, flags: tuple[str, ...], sources: list[Path], out: Path) -> None:
    # Names without a directory, so that the directory cannot get into the bytes.
    work = out / "work"
    work.mkdir()
    for path in sources:
        shutil.copyfile(path, work / path.name)
    units = [path.name for path in sources if path.suffix == ".c"]
    command.run(compiler.program, *flags, f"-ffile-prefix-map={work}=.", *units, "-o", f"../{NAME}", cwd=work)
    shutil.rmtree(work)


def _check(path: Path, arch: Arch) -> None:
    data = path.read_bytes()
    if data[:6] != b"\x7fELF\x02\x01" or struct.unpack_from("<H", data, 18)[0] != arch.elf_machine:
        raise BuildError(f"the compiler gave something that is no ELF program for {arch.name}")
    if _PT_INTERP in _segment_types(data):
        raise BuildError("the agent came out dynamically linked", hint="apt-get install musl-tools")
    if len(data) > LARGEST:
        raise BuildError(f"the agent came out at {len(data)} bytes; at most {LARGEST} were expected")
    if agent_version(data) != osbuild.__version__:
        raise BuildError(f"the agent says it is {agent_version(data)}, not {osbuild.__version__}")


def _segment_types(data: bytes) -> list[int]:
    (offset,) = struct.unpack_from("<Q", data, 32)
    size, count = struct.unpack_from("<HH", data, 54)
    return [struct.unpack_from("<I", data, offset + size * index)[0] for index in range(count)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Agent:
    """An agent's binary, read: what goes into the tree is what was looked at."""

    name: str
    version: str
    sha256: str  # of its bytes
    data: bytes

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
