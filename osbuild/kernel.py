"""The guest kernel: from a source tarball, fragments and patches to a vmlinux, once for everything that goes in.

Same inputs, same bytes, wherever it is built: who, where and when are fixed, and nothing of this machine but its
compiler, linker and compressor, which are part of the key.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from osbuild import command, kconfig
from osbuild.arch import Arch, host_arch
from osbuild.artifacts import File, Kernel
from osbuild.cache import Cache
from osbuild.errors import BuildError, CommandError, HostError, InputError, SpecError
from osbuild.kernel_source import KernelSource, find_patches, fresh_directory, open_source, patch_source
from osbuild.resources import resource

RECIPE: Final = 2  # of this file: a change that changes the bytes takes the next number

Progress = Callable[[int, int], None]  # files made so far, and about how many there will be

# What make would otherwise take from this machine and this moment.
_IDENTITY: Final = {
    "KBUILD_BUILD_TIMESTAMP": "Thu Jan  1 00:00:00 UTC 1970",
    "KBUILD_BUILD_USER": "osbuilder",
    "KBUILD_BUILD_HOST": "osbuilder",
    "KBUILD_BUILD_VERSION": "1",
    "SOURCE_DATE_EPOCH": "0",
}

# Tools that Kconfig looks for and writes the version of into the configuration, though nothing of ours needs them.
_ABSENT: Final = ("RUSTC=none", "BINDGEN=none", "PAHOLE=none")

_PACKAGES: Final = {
    "make": "make", "gcc": "gcc", "ld": "binutils", "strip": "binutils", "flex": "flex", "bison": "bison", "bc": "bc",
    "perl": "perl", "tar": "tar", "xz": "xz-utils", "git": "git", "lz4": "lz4", "zstd": "zstd",
}  # fmt: skip
_ALWAYS: Final = ("make", "flex", "bison", "bc", "perl", "tar")
_COMPRESSORS: Final = {"CONFIG_KERNEL_LZ4": "lz4", "CONFIG_KERNEL_ZSTD": "zstd", "CONFIG_KERNEL_XZ": "xz"}

_STEP: Final = re.compile(r"  [A-Z][A-Z0-9]+ +(?:\[M\] )?\S")  # "  CC      init/main.o"
_STEPS_AT_FIRST: Final = 2300  # what the fragments of this repository take on x86_64


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelSpec:
    """Which kernel to build."""

    arch: Arch
    source: Path | None = None  # a tarball; None: Debian's
    fragments: tuple[Path, ...]  # files, and directories of *.conf
    patches: Path | None = None  # a directory of <series>/NNNN-*.patch
    jobs: int = 0  # 0: one for each processor we may use


@dataclass(frozen=True, slots=True, kw_only=True)
class _Toolchain:
    prefix: str  # CROSS_COMPILE
    versions: Mapping[str, str]  # of all that decides bytes
    ccache: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class _Build:
    """One run of make: what, with what, where."""

    arch: Arch
    tools: _Toolchain
    tree: Path
    out: Path
    log: Path


def default_spec(arch: Arch, *, features: Iterable[str] = (), source: Path | None = None, jobs: int = 0) -> KernelSpec:
    """The kernel of this repository's fragments and patches, with some of `kernel-configs/feature/`."""
    configs = resource("kernel-configs")
    if not (configs / arch.name).is_dir():
        raise SpecError(f"there is no kernel configuration for {arch.name} yet")
    known = {path.stem: path for path in sorted((configs / "feature").glob("*.conf"))}
    chosen = []
    for feature in features:
        if feature not in known:
            raise SpecError(f"no kernel feature {feature!r}", hint=f"one of {', '.join(known)}")
        chosen.append(known[feature])
    fragments = (configs / "common", configs / arch.name, *dict.fromkeys(chosen))
    return KernelSpec(arch=arch, source=source, fragments=fragments, patches=resource("patches"), jobs=jobs)


def build_kernel(spec: KernelSpec, cache: Cache, *, show: Progress | None = None) -> Kernel:
    """Build it, or find it built; `show` hears how far the build is."""
    requests = read_fragments(spec.fragments)
    tools = _find_tools(spec, requests)
    source = open_source(spec.source, cache)
    patches = find_patches(spec.patches, source.series)
    inputs = _inputs(spec, requests, tools, source, patches)
    key = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()

    def make(home: Path) -> None:
        tree = patch_source(source, patches, cache)
        log = _new_log(cache, key)
        with _build_directory(cache, key) as out:
            build = _Build(arch=spec.arch, tools=tools, tree=tree, out=out, log=log)
            _configure(build, requests)
            _compile(build, spec.jobs, cache, show)
            _check_kept(build, requests)  # make reads the configuration once more, and may change it
            _collect(build, home, {"arch": spec.arch.name, "key": key, "inputs": inputs})

    home, cached = cache.get("kernel", key, make)
    return _kernel_in(home, cached=cached)


def configure(spec: KernelSpec, cache: Cache) -> str:
    """The text of the whole .config that the fragments give; BuildError naming what did not stick."""
    requests = read_fragments(spec.fragments)
    tools = _find_tools(spec, requests)
    source = open_source(spec.source, cache)
    tree = patch_source(source, find_patches(spec.patches, source.series), cache)
    with _build_directory(cache, f"config-{os.getpid()}") as out:
        build = _Build(arch=spec.arch, tools=tools, tree=tree, out=out, log=_new_log(cache, "config"))
        _configure(build, requests)
        return (out / ".config").read_text()


def read_fragments(places: Iterable[Path]) -> tuple[kconfig.Request, ...]:
    """All that the fragments in these files and directories ask for."""
    return kconfig.combine(kconfig.parse_fragment(_read(path), str(path)) for path in _fragment_files(places))


def _fragment_files(places: Iterable[Path]) -> list[Path]:
    files = []
    for place in places:
        if place.is_dir():
            files += sorted(place.glob("*.conf"))
        elif place.is_file():
            files.append(place)
        else:
            raise InputError(f"no kernel configuration fragment at {place}")
    return files


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as problem:
        raise InputError(f"cannot read {path}: {problem}") from problem


def _find_tools(spec: KernelSpec, requests: Iterable[kconfig.Request]) -> _Toolchain:
    """The programs that a build takes; one HostError naming every one that is missing."""
    prefix = "" if spec.arch == host_arch() else spec.arch.cross_compile
    compressors = [_COMPRESSORS[r.symbol] for r in requests if r.value == "y" and r.symbol in _COMPRESSORS]
    patched = spec.patches is not None and any(spec.patches.glob("*/*.patch"))
    wanted = [*_ALWAYS, "gcc", *compressors, *(f"{prefix}{name}" for name in ("gcc", "ld", "strip"))]
    wanted += ["git"] if patched else []
    missing = {name: _package(name, prefix) for name in wanted if not _have(name)}
    # objtool, which checks and rewrites the code of an x86 kernel, reads ELF with libelf.
    if "gcc" not in missing and spec.arch.kernel == "x86_64" and not _have_header("gelf.h"):
        missing["gelf.h"] = "libelf-dev"
    if missing:
        raise HostError(
            f"a kernel build needs {', '.join(missing)}",
            hint=f"apt-get install {' '.join(sorted(set(missing.values())))}",
        )
    deciding = (f"{prefix}gcc", f"{prefix}ld", *compressors)
    return _Toolchain(prefix=prefix, versions={name: _version(name) for name in deciding}, ccache=_have("ccache"))


def _package(program: str, prefix: str) -> str:
    if prefix and program.startswith(prefix):
        kind = "gcc" if program.endswith("gcc") else "binutils"
        return f"{kind}-{prefix.rstrip('-').replace('_', '-')}"
    return _PACKAGES[program]


def _have(program: str) -> bool:
    try:
        command.find(program)
    except HostError:
        return False
    return True


def _have_header(name: str) -> bool:
    try:
        command.run("gcc", "-E", "-include", name, "-x", "c", "/dev/null")
    except CommandError:
        return False
    return True


def _version(program: str) -> str:
    return command.run(program, "--version").output.strip().splitlines()[0]


def _inputs(
    spec: KernelSpec,
    requests: Iterable[kconfig.Request],
    tools: _Toolchain,
    source: KernelSource,
    patches: Iterable[Path],
) -> dict[str, object]:
    """Everything that decides the bytes. Of fragments that is what they set, not how they are worded or cut up."""
    settings = "".join(sorted(f"{request.symbol}={request.value}\n" for request in requests))
    return {
        "recipe": RECIPE,
        "arch": spec.arch.name,
        "source": source.sha256,
        "settings": hashlib.sha256(settings.encode()).hexdigest(),
        "patches": [[path.name, File.of(path).sha256] for path in patches],
        "tools": dict(tools.versions),
    }


@contextmanager
def _build_directory(cache: Cache, name: str) -> Iterator[Path]:
    """Where make works; nobody else builds under this name (the cache's lock, our pid)."""
    out = cache.scratch("kernel-build") / name
    if re.search(r"[\s:]", str(out)):
        raise HostError(
            f"the kernel's makefiles cannot build in {out}: no blanks or colons in paths",
            hint="set OSBUILDER_CACHE to another directory",
        )
    with fresh_directory(out):
        yield out


def _new_log(cache: Cache, name: str) -> Path:
    log = cache.scratch("logs") / f"kernel-{name[:16]}.log"
    log.write_bytes(b"")
    return log


def _configure(build: _Build, requests: tuple[kconfig.Request, ...]) -> None:
    """Leave a complete out/.config: everything off but what is asked for and what that brings along."""
    pieces = _write_pieces(requests, build.out / "fragments")
    # merge_config.sh puts its temporary files where it runs, and splits file names at blanks.
    merge = ("sh", str(build.tree / "scripts/kconfig/merge_config.sh"), "-m", "-n", "-O", str(build.out), *pieces)
    try:
        command.run(*merge, cwd=build.out, log=build.log)
        merged = (build.out / ".config").rename(build.out / "merged.config")
        command.run(
            *_make(build, "allnoconfig"),
            env=_IDENTITY | {"KCONFIG_ALLCONFIG": str(merged), "CCACHE_DISABLE": "1"},
            log=build.log,
        )
    except CommandError as problem:
        raise _failure("the kernel cannot be configured", problem, build.log) from problem
    _check_kept(build, requests)


def _write_pieces(requests: Iterable[kconfig.Request], directory: Path) -> list[str]:
    """The requests of each fragment in a file with a name that is safe, relative to the directory's parent."""
    files: dict[str, list[str]] = {}
    for request in requests:
        files.setdefault(request.file, []).append(f"{request.symbol}={request.value}\n")
    directory.mkdir()
    for number, lines in enumerate(files.values()):
        (directory / f"{number:03}.conf").write_text("".join(lines))
    return [f"{directory.name}/{number:03}.conf" for number in range(len(files))]


def _check_kept(build: _Build, requests: Iterable[kconfig.Request]) -> None:
    lost = kconfig.dropped(requests, (build.out / ".config").read_text())
    if not lost:
        return
    reasons = kconfig.explain([entry.request.symbol for entry in lost], _kconfigs(build.tree, build.arch))
    raise BuildError(
        "settings that did not stick:\n" + "\n".join(f"  {entry}" for entry in lost),
        hint="\n".join(f"{symbol}: {reason}" for symbol, reason in reasons.items()),
    )


def _kconfigs(tree: Path, arch: Arch) -> dict[str, str]:
    """The Kconfig files that this architecture may read."""
    texts = {}
    ours = "x86" if arch.kernel == "x86_64" else arch.kernel
    for path in sorted(tree.rglob("Kconfig*")):
        name = path.relative_to(tree)
        foreign = name.parts[0] == "arch" and len(name.parts) > 2 and name.parts[1] != ours
        if path.is_file() and not foreign and name.parts[0] not in ("scripts", "Documentation", "tools"):
            texts[str(name)] = path.read_text(errors="replace")
    return texts


def _make(build: _Build, *words: str) -> list[str]:
    prefix, wrapper = build.tools.prefix, "ccache " if build.tools.ccache else ""
    return [
        "make", "--no-print-directory", "-C", str(build.tree), f"O={build.out}", f"ARCH={build.arch.kernel}",
        f"CROSS_COMPILE={prefix}", f"CC={wrapper}{prefix}gcc", f"HOSTCC={wrapper}gcc", "LOCALVERSION=",
        *_ABSENT, *words,
    ]  # fmt: skip


def _compile(build: _Build, jobs: int, cache: Cache, show: Progress | None) -> None:
    # No CCACHE_BASEDIR: it makes paths relative, where make's -fmacro-prefix-map no longer finds them in __FILE__.
    ccache = {"CCACHE_DIR": str(cache.scratch("ccache")), "CCACHE_MAXSIZE": "2G"}
    images = ("vmlinux", Path(build.arch.kernel_image).name)
    argv = _make(build, f"-j{jobs or len(os.sched_getaffinity(0))}", *images)
    try:
        with _counted(cache.scratch("kernel-build") / f"steps-{build.arch.name}", show) as watch:
            command.run(*argv, env=_IDENTITY | ccache, log=build.log, watch=watch)
    except CommandError as problem:
        raise _failure("the kernel does not build", problem, build.log) from problem


@contextmanager
def _counted(memory: Path, show: Progress | None) -> Iterator[Callable[[str], None]]:
    """Count make's steps; how many there were is how many are expected next time."""
    expected, done = _STEPS_AT_FIRST, 0
    with suppress(OSError, ValueError):
        expected = int(memory.read_text())

    def watch(line: str) -> None:
        nonlocal done
        if _STEP.match(line):
            done += 1
            if show is not None:
                show(done, max(done, expected))

    yield watch
    memory.write_text(f"{done}\n")


def _failure(what: str, problem: CommandError, log: Path) -> CommandError:
    return CommandError(f"{what}: {_reason(log) or problem}", log=log, tail=problem.tail)


def _reason(log: Path) -> str:
    """The last line of a log that says what is wrong, rather than that something is."""
    lines = log.read_text(errors="replace").splitlines()
    for mark in (r"\berror: ", r"undefined reference", r"\*\*\* (?!\[)", r"\bError\b"):
        for line in reversed(lines):
            if re.search(mark, line):
                return line.strip()
    return ""


def _collect(build: _Build, home: Path, record: Mapping[str, object]) -> None:
    """Put what is kept into the cache entry."""
    out = build.out
    # What loaders read, the PVH note among it, is in segments; only debugging information goes.
    command.run(f"{build.tools.prefix}strip", "--strip-debug", "-o", str(home / "vmlinux"), str(out / "vmlinux"))
    shutil.copyfile(out / build.arch.kernel_image, home / "vmlinuz")
    shutil.copyfile(out / ".config", home / "config")
    shutil.copyfile(out / "System.map", home / "System.map")
    release = (out / "include/config/kernel.release").read_text().strip()
    text = json.dumps({"release": release, **record}, indent=1, sort_keys=True)
    (home / "kernel.json").write_text(text + "\n")


def _kernel_in(home: Path, *, cached: bool) -> Kernel:
    record = json.loads((home / "kernel.json").read_text())
    return Kernel(
        vmlinux=File.of(home / "vmlinux"),
        vmlinuz=File.of(home / "vmlinuz"),
        config=File.of(home / "config"),
        release=record["release"],
        arch=record["arch"],
        key=record["key"],
        cached=cached,
        inputs=record["inputs"],
    )
