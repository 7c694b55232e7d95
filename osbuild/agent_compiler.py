"""The compilers that can make the guest agent for an architecture, best first, and what each must be told.

All of them link it as a static PIE: ET_DYN without a loader, which moves itself and needs nothing in the guest.

| compiler | libc | the agent's size | for |
| --- | --- | --- | --- |
| musl-gcc | musl | tens of KiB | the machine it runs on |
| zig | musl | tens of KiB | any |
| gcc | glibc | most of a MiB | the machine it runs on, or another with Debian's cross compiler |
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import osbuild
from osbuild import command
from osbuild.arch import Arch, cross_prefix, host_arch
from osbuild.artifacts import File
from osbuild.cache import Cache
from osbuild.elf import SHARED, read_elf
from osbuild.errors import BuildError, HostError
from osbuild.tree import Bytes

SMALL: Final = 300 << 10  # bytes: what an agent may have with musl
# A static glibc brings locales, stdio and iconv along: 700 to 900 KiB before there is any agent.
LARGE: Final = 2 << 20

_COMMON: Final = (
    "-std=c11",
    "-Os",
    "-fPIE",
    "-fstack-protector-strong",
    "-fno-asynchronous-unwind-tables", "-fno-unwind-tables",  # a tenth of the agent, and nobody unwinds it
    "-ffunction-sections", "-fdata-sections", "-Wl,--gc-sections",
    "-U_FORTIFY_SOURCE", "-D_FORTIFY_SOURCE=2",  # glibc's; musl has none, and Debian no fortify-headers for it
    "-Wall", "-Wextra", "-Werror",
    "-Wl,--build-id=none", "-Wl,-z,noexecstack", "-Wl,-z,relro", "-Wl,-z,now",
    "-s",
)  # fmt: skip
# Nothing that would have to be moved lies in code (lld's own rule, and zig takes no such word); clang means more by
# -Wconversion.
_GCC: Final = ("-Wshadow", "-Wconversion", "-Wl,-z,text")


class NoCompilerError(HostError):
    """There is none here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Compiler:
    """One that is here: how it is called, and how long an agent it may give."""

    name: str
    argv: tuple[str, ...]
    flags: tuple[str, ...]
    before: tuple[str, ...] = ()  # object files in front of the agent's own
    behind: tuple[str, ...] = ()
    version: str
    libc: tuple[Path, ...] = ()  # files that become part of the agent
    env: tuple[tuple[str, str], ...] = ()
    largest: int


def find_compiler(arch: Arch, cache: Cache) -> Compiler:
    """The best that is here; NoCompilerError says how to get one."""
    for find in _FINDERS:
        found = find(arch, cache)
        if found is not None:
            return found
    if arch is host_arch():
        raise NoCompilerError("there is no C compiler for the agent", hint="apt-get install musl-tools gcc")
    raise NoCompilerError(
        f"there is no C compiler here that makes the agent for {arch.name}",
        hint=f"pip install 'CHECKOUT[cross]' (osbuilder's source), or apt-get install {cross_packages(arch)}",
    )


def program_inputs(
    arch: Arch, compiler: Compiler, flags: Sequence[str], sources: Sequence[Path]
) -> Mapping[str, object]:
    """Everything that decides a program's bytes."""
    return {
        "arch": arch.name,
        "compiler": [compiler.name, compiler.version],
        "libc": [File.of(path).sha256 for path in compiler.libc],
        "flags": tuple(flags),
        "osbuild": osbuild.__version__,
        "sources": {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sources},
    }


def program_key(arch: Arch, compiler: Compiler, flags: Sequence[str], sources: Sequence[Path]) -> str:
    """A name in the cache for what comes of these."""
    inputs = program_inputs(arch, compiler, flags, sources)
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()


def compile_program(
    compiler: Compiler, flags: Sequence[str], sources: Sequence[Path], out: Path, name: str, arch: Arch
) -> bytes:
    """Make `out`/`name` of them; its bytes, which are a static PIE for `arch`."""
    # Names without a directory, so that the directory cannot get into the bytes.
    work = out / "work"
    work.mkdir()
    for path in sources:
        shutil.copyfile(path, work / path.name)
    units = [path.name for path in sources if path.suffix == ".c"]
    command.run(
        *compiler.argv, *flags, f"-ffile-prefix-map={work}=.", *compiler.before, *units, *compiler.behind,
        "-o", f"../{name}", cwd=work, env=dict(compiler.env),
    )  # fmt: skip
    shutil.rmtree(work)
    data = (out / name).read_bytes()
    _check(data, arch, compiler)
    return data


def _check(data: bytes, arch: Arch, compiler: Compiler) -> None:
    elf = read_elf(Bytes(data))
    if elf is None or (elf.machine, elf.bits, elf.big_endian) != (arch.elf_machine, 64, False):
        raise BuildError(f"{compiler.name} gave something that is no ELF program for {arch.name}")
    if elf.interpreter or elf.needed or elf.type != SHARED:
        raise BuildError(
            f"{compiler.name} gave an agent that is no static PIE: it would need {elf.interpreter or 'its address'}"
        )


def cross_packages(arch: Arch) -> str:
    """Debian's packages of a cross compiler with a static libc."""
    return f"gcc-{arch.cross_compile.removesuffix('-').replace('_', '-')} libc6-dev-{arch.oci}-cross"


def zig() -> tuple[str, ...]:
    """How zig is called: the module of the [cross] extra, or a program; empty when there is neither."""
    if importlib.util.find_spec("ziglang") is not None:
        return (sys.executable, "-m", "ziglang")
    program = shutil.which("zig")
    return (program,) if program else ()


def _musl(arch: Arch, cache: Cache) -> Compiler | None:
    del cache
    home = Path(f"/usr/lib/{arch.name}-linux-musl")  # Debian's; -print-file-name would name glibc's files
    parts = tuple(home / name for name in ("rcrt1.o", "crti.o", "libc.a", "crtn.o"))
    if arch is not host_arch() or shutil.which("musl-gcc") is None or not all(part.is_file() for part in parts):
        return None
    program = command.find("musl-gcc")
    # Its specs know no static PIE: they would add the start files and the loader of a dynamic one.
    link = ("-nostartfiles", "-Wl,-static,-pie,--no-dynamic-linker")
    # musl brings no kernel headers; after its own, those of the system do.
    headers = ("-idirafter", "/usr/include", "-idirafter", f"/usr/include/{arch.name}-linux-gnu")
    return Compiler(
        name="musl-gcc", argv=(program,), flags=(*_COMMON, *_GCC, *headers, *link),
        before=(str(parts[0]), str(parts[1])), behind=(str(parts[3]),),
        version=command.run(program, "--version").output, libc=parts, largest=SMALL,
    )  # fmt: skip


def _zig(arch: Arch, cache: Cache) -> Compiler | None:
    argv = zig()
    if not argv:
        return None
    scratch = str(cache.scratch("zig"))  # its libc is compiled once, and that takes a while
    flags = (
        "-target", f"{arch.name}-linux-musl", *_COMMON, "-static", "-pie",
        "-fno-sanitize=undefined",  # zig adds that without a level of optimisation; this keeps it out
    )  # fmt: skip
    env = (("ZIG_GLOBAL_CACHE_DIR", scratch), ("ZIG_LOCAL_CACHE_DIR", scratch))
    version = command.run(*argv, "version", env=dict(env)).output
    return Compiler(name="zig", argv=(*argv, "cc"), flags=flags, version=version, env=env, largest=SMALL)


def _gcc(arch: Arch, cache: Cache) -> Compiler | None:
    del cache
    name = f"{cross_prefix(arch)}gcc"
    if shutil.which(name) is None:
        return None
    program = command.find(name)
    libc = Path(command.run(program, "-print-file-name=libc.a").output.strip())
    if not libc.is_absolute():  # its own name again: there is none
        raise HostError(f"{name} has no static libc", hint=f"apt-get install {cross_packages(arch)}")
    return Compiler(
        name=name, argv=(program,), flags=(*_COMMON, *_GCC, "-static-pie"),
        version=command.run(program, "--version").output, libc=(libc,), largest=LARGE,
    )  # fmt: skip


_FINDERS: Final[tuple[Callable[[Arch, Cache], Compiler | None], ...]] = (_musl, _zig, _gcc)
