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

from osbuild import command, kbuild, kconfig, kernel_objects, kernel_place
from osbuild.arch import Arch, cross_prefix
from osbuild.artifacts import File, Kernel
from osbuild.cache import Cache
from osbuild.errors import CommandError, HostError, InputError, SpecError
from osbuild.kernel_patches import Patch, find_patches, patch_source
from osbuild.kernel_source import KernelSource
from osbuild.kernel_sources import open_source
from osbuild.resources import resource
from osbuild.tree import quote

RECIPE: Final = 4  # of this file: a change that changes the bytes takes the next number

Progress = Callable[[int, int], None]  # files made so far, and about how many there will be

# What make would otherwise take from this machine and this moment.
_IDENTITY: Final = {
    "KBUILD_BUILD_TIMESTAMP": "Thu Jan  1 00:00:00 UTC 1970",
    "KBUILD_BUILD_USER": "osbuilder",
    "KBUILD_BUILD_HOST": "osbuilder",
    "KBUILD_BUILD_VERSION": "1",
    "SOURCE_DATE_EPOCH": "0",
}

_PACKAGES: Final = {
    "make": "make", "gcc": "gcc", "ld": "binutils", "strip": "binutils", "flex": "flex", "bison": "bison", "bc": "bc",
    "perl": "perl", "tar": "tar", "xz": "xz-utils", "git": "git", "lz4": "lz4", "zstd": "zstd", "gzip": "gzip",
}  # fmt: skip
_ALWAYS: Final = ("make", "flex", "bison", "bc", "perl", "tar")
_COMPRESSORS: Final = {"CONFIG_KERNEL_LZ4": "lz4", "CONFIG_KERNEL_ZSTD": "zstd", "CONFIG_KERNEL_XZ": "xz"}

_STEP: Final = re.compile(r"  [A-Z][A-Z0-9]+ +(?:\[M\] )?\S")  # "  CC      init/main.o"
_OTHER_STEPS: Final = 400  # of a first build: what its programs for this machine, its headers and its images take


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelSpec:
    """Which kernel to build."""

    arch: Arch
    source: str | Path | None = None  # as kernel_sources has it; None: the default of versions.toml
    keyring: Path | None = None  # public keys for a source whose signature is checked
    fragments: tuple[Path, ...]  # files, and directories of *.conf
    by_series: Path | None = None  # a directory of <series>/common.conf and <series>/<arch>.conf
    patches: Path | None = None  # a directory of <series>/NNNN-*.patch
    jobs: int = 0  # 0: one for each processor we may use


@dataclass(frozen=True, slots=True, kw_only=True)
class _Toolchain:
    prefix: str  # CROSS_COMPILE
    versions: Mapping[str, str]  # of all that decides bytes
    ccache: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    """What goes into one kernel."""

    requests: tuple[kconfig.Request, ...]
    tools: _Toolchain
    source: KernelSource
    patches: tuple[Patch, ...]
    inputs: Mapping[str, object]
    key: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Build:
    """One run of make: what, with what, where."""

    arch: Arch
    tools: _Toolchain
    tree: Path  # to read
    makefiles: Path  # where make starts: the same tree, or hard links to it around `out`
    out: Path
    log: Path


def default_spec(
    arch: Arch, *, features: Iterable[str] = (), source: str | Path | None = None, keyring: Path | None = None,
    jobs: int = 0,
) -> KernelSpec:  # fmt: skip
    """The kernel of this repository's fragments and patches, with some of `kernel-configs/feature/`."""
    configs = resource("kernel-configs")
    if not (configs / arch.name).is_dir():
        raise SpecError(f"there is no kernel configuration for {arch.name} yet")
    known = feature_files(arch)
    chosen = tuple(dict.fromkeys(features))
    check_features(arch, chosen)
    replaced = {f"without-{feature}.conf" for feature in chosen}
    defaults = [path for home in ("common", arch.name) for path in sorted((configs / home).glob("*.conf"))]
    fragments = [path for path in defaults if path.name not in replaced]
    fragments += [path for feature in chosen for path in known[feature]]
    return KernelSpec(
        arch=arch, source=source, keyring=keyring, fragments=tuple(fragments), by_series=configs / "series",
        patches=resource("patches"), jobs=jobs,
    )  # fmt: skip


def check_features(arch: Arch, features: Iterable[str]) -> None:
    """SpecError for one that no fragment is for."""
    known = feature_files(arch)
    for feature in features:
        if feature not in known:
            raise SpecError(f"no kernel feature {quote(feature)}", hint=f"one of {', '.join(known)}")


def feature_files(arch: Arch) -> dict[str, tuple[Path, ...]]:
    """What can be asked for besides the default, by name: fragments for all architectures, and for this one."""
    found: dict[str, tuple[Path, ...]] = {}
    for home in ("feature", f"feature/{arch.name}"):
        for path in sorted((resource("kernel-configs") / home).glob("*.conf")):
            found[path.stem] = (*found.get(path.stem, ()), path)
    return dict(sorted(found.items()))


def build_kernel(spec: KernelSpec, cache: Cache, *, show: Progress | None = None) -> Kernel:
    """Build it, or find it built; `show` hears how far the build is."""
    plan = _plan(spec, cache)

    def make(home: Path) -> None:
        tree = patch_source(plan.source, plan.patches, cache)
        log = _new_log(cache, plan.key)
        compilers = json.dumps([RECIPE, dict(plan.tools.versions), plan.tools.ccache], sort_keys=True)
        with kernel_place.place(cache, plan.key, spec.arch.name, tree, compilers) as out:
            build = _Build(arch=spec.arch, tools=plan.tools, tree=tree, makefiles=out.parent, out=out, log=log)
            _configure(build, plan.requests, cache)
            _compile(build, spec.jobs, cache, show)
            kernel_objects.remember_seconds(out, seconds_memory(cache, spec.arch), cache)
            _check_kept(build, plan.requests, cache)  # make reads the configuration once more, and may change it
            _collect(build, home, {"arch": spec.arch.name, "key": plan.key, "inputs": plan.inputs})

    home, cached = cache.get("kernel", plan.key, make)
    return _kernel_in(home, cached=cached)


def find_kernel(spec: KernelSpec, cache: Cache) -> Kernel | None:
    """The kernel, if it was built before; nothing is compiled."""
    home = cache.have("kernel", _plan(spec, cache).key)
    return _kernel_in(home, cached=True) if home is not None else None


def _plan(spec: KernelSpec, cache: Cache) -> _Plan:
    """Everything that goes in, and the digest of it."""
    source = open_source(spec.source, cache, keyring=spec.keyring)
    requests = read_fragments(fragments_for(spec, source.series))
    tools = _find_tools(spec, requests)
    patches = find_patches(spec.patches, source.series)
    inputs = _inputs(spec, requests, tools, source, patches)
    key = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()
    return _Plan(requests=requests, tools=tools, source=source, patches=patches, inputs=inputs, key=key)


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelInputs:
    """What goes into a kernel, known before anything is compiled."""

    key: str
    inputs: Mapping[str, object]  # JSON: what the key is made from
    fragments: Mapping[str, str]  # each file of settings -> its sha256
    patches: tuple[Patch, ...] = ()


def find_inputs(spec: KernelSpec, cache: Cache) -> KernelInputs:
    """Everything that a build would take."""
    plan = _plan(spec, cache)
    files = sorted(fragments_for(spec, plan.source.series))
    fragments = {_fragment_name(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    return KernelInputs(key=plan.key, inputs=plan.inputs, fragments=fragments, patches=plan.patches)


def _fragment_name(path: Path) -> str:
    home = resource("kernel-configs")
    return str(path.relative_to(home)) if path.is_relative_to(home) else path.name


def configure(spec: KernelSpec, cache: Cache) -> str:
    """The text of the whole .config that the fragments give; BuildError naming what did not stick."""
    requests = requests_for(spec, cache)
    tools = _find_tools(spec, requests)
    tree = prepared_tree(spec, cache)
    log = _new_log(cache, f"config-{os.getpid()}")
    with kernel_place.directory(cache, f"config-{os.getpid()}") as out:
        build = _Build(arch=spec.arch, tools=tools, tree=tree, makefiles=tree, out=out, log=log)
        _configure(build, requests, cache)
        log.unlink(missing_ok=True)  # it is of use when it says why not
        return (out / ".config").read_text()


def prepared_tree(spec: KernelSpec, cache: Cache) -> Path:
    """The source that a spec names, unpacked and patched."""
    source = open_source(spec.source, cache, keyring=spec.keyring)
    return patch_source(source, find_patches(spec.patches, source.series), cache)


def requests_for(spec: KernelSpec, cache: Cache) -> tuple[kconfig.Request, ...]:
    """All that is asked for: by the spec's fragments, and by those of the source's series."""
    return read_fragments(fragments_for(spec, open_source(spec.source, cache, keyring=spec.keyring).series))


def fragments_for(spec: KernelSpec, series: str) -> list[Path]:
    """The spec's fragments, and what this series has under other names or wants besides: <series>/common, <arch>."""
    files = fragment_files(spec.fragments)
    if spec.by_series is not None:
        more = (spec.by_series / series / f"{name}.conf" for name in ("common", spec.arch.name))
        files += [path for path in more if path.is_file()]
    return files


def read_fragments(places: Iterable[Path]) -> tuple[kconfig.Request, ...]:
    """All that the fragments in these files and directories ask for."""
    return kconfig.combine(kconfig.parse_fragment(_read(path), str(path)) for path in fragment_files(places))


def fragment_files(places: Iterable[Path]) -> list[Path]:
    """The fragments in these files and directories, in order."""
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
    prefix = cross_prefix(spec.arch)
    if spec.arch.kernel_image.endswith(".gz"):
        compressors = ["gzip"]
    else:
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
    return _Toolchain(
        prefix=prefix, versions={name: command.version(name) for name in deciding}, ccache=_have("ccache")
    )


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


def _inputs(
    spec: KernelSpec,
    requests: Iterable[kconfig.Request],
    tools: _Toolchain,
    source: KernelSource,
    patches: Iterable[Patch],
) -> dict[str, object]:
    """Everything that decides the bytes. Of fragments that is what they set, not how they are worded or cut up."""
    settings = "".join(sorted(f"{request.symbol}={request.value}\n" for request in requests))
    return {
        "recipe": RECIPE,
        "arch": spec.arch.name,
        "source": source.sha256,
        "settings": hashlib.sha256(settings.encode()).hexdigest(),
        "patches": [[patch.path.name, patch.sha256] for patch in patches],
        "tools": dict(tools.versions),
    }


def _new_log(cache: Cache, name: str) -> Path:
    log = cache.scratch("logs") / f"kernel-{name[:16]}.log"
    log.write_bytes(b"")
    return log


def _configure(build: _Build, requests: tuple[kconfig.Request, ...], cache: Cache) -> None:
    """Leave a complete out/.config: everything off but what is asked for and what that brings along."""
    try:
        _merge(build, requests)
    except CommandError as problem:
        raise _failure("the kernel cannot be configured", problem, build.log) from problem
    _check_kept(build, requests, cache)


def _merge(build: _Build, requests: tuple[kconfig.Request, ...]) -> None:
    shutil.rmtree(build.out / "fragments", ignore_errors=True)
    pieces = _write_pieces(requests, build.out / "fragments")
    # merge_config.sh puts its temporary files where it runs, and splits file names at blanks.
    merge = ("sh", str(build.makefiles / "scripts/kconfig/merge_config.sh"), "-m", "-n", "-O", str(build.out), *pieces)
    command.run(*merge, cwd=build.out, log=build.log)
    merged = (build.out / ".config").rename(build.out / "merged.config")
    command.run(
        *_make(build, "allnoconfig"),
        env=_IDENTITY | {"KCONFIG_ALLCONFIG": str(merged), "CCACHE_DISABLE": "1"},
        log=build.log,
    )


def _write_pieces(requests: Iterable[kconfig.Request], directory: Path) -> list[str]:
    """The requests of each fragment in a file with a name that is safe, relative to the directory's parent."""
    files: dict[str, list[str]] = {}
    for request in requests:
        files.setdefault(request.file, []).append(f"{request.symbol}={request.value}\n")
    directory.mkdir()
    for number, lines in enumerate(files.values()):
        (directory / f"{number:03}.conf").write_text("".join(lines))
    return [f"{directory.name}/{number:03}.conf" for number in range(len(files))]


def _check_kept(build: _Build, requests: tuple[kconfig.Request, ...], cache: Cache) -> None:
    from osbuild import kernel_config  # reads and explains the tree's Kconfig files; few builds need that

    final = (build.out / ".config").read_text()
    kernel_config.check_kept(requests, final, tree=build.tree, arch=build.arch, cache=cache)


def _make(build: _Build, *words: str) -> list[str]:
    prefix, wrapper = build.tools.prefix, "ccache " if build.tools.ccache else ""
    timed = "" if build.tools.ccache else f"{kernel_objects.write_timed(build.out)} "  # ccache has a word for it
    return [
        "make", "--no-print-directory", "-C", str(build.makefiles), f"O={build.out}", f"ARCH={build.arch.kernel}",
        f"CROSS_COMPILE={prefix}", f"CC={timed}{wrapper}{prefix}gcc", f"HOSTCC={wrapper}gcc", "LOCALVERSION=",
        *(f"{name}={value}" for name, value in kconfig.ABSENT.items()), *words,
    ]  # fmt: skip


def _compile(build: _Build, jobs: int, cache: Cache, show: Progress | None) -> None:
    # All paths are relative already, and no object keeps debugging information, which would name the directory.
    ccache = {
        "CCACHE_DIR": str(cache.scratch("ccache")), "CCACHE_MAXSIZE": "4G", "CCACHE_NOHASHDIR": "1",
        "CCACHE_PREFIX": str(kernel_objects.write_timed(build.out)),
    }  # fmt: skip
    images = ("vmlinux", Path(build.arch.kernel_image).name)
    argv = _make(build, f"-j{jobs or len(os.sched_getaffinity(0))}", *images)
    try:
        with _counted(cache.scratch("kernel-build") / f"others-{build.arch.name}", _foretell(build), show) as watch:
            command.run(*argv, env=_IDENTITY | ccache, log=build.log, watch=watch)
    except CommandError as problem:
        raise _failure("the kernel does not build", problem, build.log) from problem


def _foretell(build: _Build) -> int:
    """How many objects this configuration compiles."""
    config = kconfig.parse_config((build.out / ".config").read_text())
    return len(kbuild.objects(build.tree, build.arch.kernel, config))


@contextmanager
def _counted(memory: Path, objects: int, show: Progress | None) -> Iterator[Callable[[str], None]]:
    """Count make's steps. Besides the objects that are foretold there are others: as many as the last time."""
    others, done = _OTHER_STEPS, 0
    with suppress(OSError, ValueError):
        others = int(memory.read_text())

    def watch(line: str) -> None:
        nonlocal done
        if _STEP.match(line):
            done += 1
            if show is not None:
                show(done, max(done, objects + others))

    yield watch
    if done >= objects:  # less, where only what changed was compiled
        memory.write_text(f"{done - objects}\n")


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
    out, arch = build.out, build.arch
    if arch.kernel_plain == "vmlinux":
        # What loaders read, the PVH note among it, is in segments; only debugging information goes.
        command.run(f"{build.tools.prefix}strip", "--strip-debug", "-o", str(home / "vmlinux"), str(out / "vmlinux"))
    else:
        shutil.copyfile(out / arch.kernel_plain, home / "vmlinux")
    shutil.copyfile(out / arch.kernel_image, home / "vmlinuz")
    shutil.copyfile(out / ".config", home / "config")
    shutil.copyfile(out / "System.map", home / "System.map")
    kernel_objects.write_sizes(kernel_objects.measure(out, build.tools.prefix), home)
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
        extras=tuple(File.of(home / name) for name in ("System.map", "kernel.json")),
    )


def seconds_memory(cache: Cache, arch: Arch) -> Path:
    """Where it is kept how long each object's compiler took."""
    return cache.scratch("kernel-build") / f"seconds-{arch.name}"
