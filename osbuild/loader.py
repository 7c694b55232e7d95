"""Which files a dynamic loader would open for a program: glibc's and musl's own searches, done over a tree.

glibc   DT_RPATH of the file, of what loaded it …, of the program (none where the file has a DT_RUNPATH); the file's
        DT_RUNPATH; /etc/ld.so.cache; the directories it was built with. Files for another machine are passed over.
musl    DT_RUNPATH or DT_RPATH of the file, of what loaded it …; the directories in /etc/ld-musl-ARCH.path, or
        /lib:/usr/local/lib:/usr/lib where that file is missing. The first file of the name is taken.

Both take $ORIGIN as the directory of the file that says it. Sources: ld.so(8), ldconfig(8), musl's manual, and the two
loaders' own behaviour (tests/test_elf.py asks them). /etc/ld.so.cache, as ldconfig of glibc 2.2 and later writes it:

    glibc-ld.so.cache1.1   count:u32  size of the strings:u32  …      48 bytes; may follow an older table
    flags:u32 key:u32 value:u32 …                                     24 bytes each; offsets from the "g" of glibc
"""

from __future__ import annotations

import posixpath
import re
import struct
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final, Protocol

from osbuild.elf import Elf, read_elf
from osbuild.errors import InputError
from osbuild.tree import quote
from osbuild.view import View, read_at

_NAMES_MAX: Final = 4096  # of libraries that one program asks for; LibreOffice has some 200
_TRIES_MAX: Final = 200_000  # paths that are looked at for one program
_CACHE: Final = "/etc/ld.so.cache"
_CACHE_MAX: Final = 16 << 20  # bytes; 10,000 libraries take one MiB
_CONF: Final = "/etc/ld.so.conf"
_CONF_FILES_MAX: Final = 64  # configuration files, and patterns for them
_MULTIARCH: Final[Mapping[str, str]] = {  # Debian's names, which its glibc has among its directories
    "x86_64": "x86_64-linux-gnu", "aarch64": "aarch64-linux-gnu", "i386": "i386-linux-gnu",
    "arm": "arm-linux-gnueabihf", "riscv64": "riscv64-linux-gnu", "ppc64le": "powerpc64le-linux-gnu",
    "s390": "s390x-linux-gnu",
}  # fmt: skip
_MUSL_DEFAULT: Final = "/lib:/usr/local/lib:/usr/lib"
_TOKEN: Final = re.compile(r"\$(?:\{(ORIGIN|LIB|PLATFORM)\}|(ORIGIN|LIB|PLATFORM)(?![A-Za-z0-9_]))")


@dataclass(frozen=True, slots=True, kw_only=True)
class Library:
    """A file that the loader opens."""

    name: str  # as in DT_NEEDED
    path: str  # as the loader spells it
    needed_by: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Missing:
    """A library for which the loader finds nothing that it could use."""

    name: str
    needed_by: str
    reason: str = ""  # what is wrong with the file that has the name
    uncached: str = ""  # where it is, in a directory of ld.so.conf, but unknown to the cache


@dataclass(frozen=True, slots=True, kw_only=True)
class Outdated:
    """A library that is there, but does not define a version that somebody needs."""

    path: str
    version: str
    needed_by: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolution:
    """What starting a program would load; empty for a static one."""

    interpreter: str = ""
    libraries: tuple[Library, ...] = ()
    missing: tuple[Missing, ...] = ()
    outdated: tuple[Outdated, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Object:
    path: str
    elf: Elf
    above: _Object | None  # what asked for it first

    def chain(self) -> Iterator[_Object]:
        here: _Object | None = self
        while here is not None:
            yield here
            here = here.above


class _Search(Protocol):
    versions: bool  # refuses a library that lacks a version
    choosy: bool  # passes over files for another machine
    own: re.Pattern[str]  # names that the loader itself answers

    def candidates(self, name: str, asking: _Object) -> Iterable[str]:
        """Where it looks, in its order."""


def libraries(view: View, path: str) -> Resolution:
    """What the loader that a program names would open; InputError when the program cannot be read as ELF."""
    elf = _elf(view, path)
    if elf is None or not elf.interpreter:
        return Resolution()
    program = _Object(path=view.real(path), elf=elf, above=None)
    search: _Search = _Musl(view, program) if "ld-musl" in elf.interpreter else _Glibc(view, program)
    return _Walk(view, program, search).run()


def _elf(view: View, path: str) -> Elf | None:
    found = view.get(path)
    return read_elf(found.content) if found is not None and found.is_file else None


class _Walk:
    """Everything that is needed, in breadth, as both loaders do it."""

    def __init__(self, view: View, program: _Object, search: _Search) -> None:
        self._view, self._program, self._search = view, program, search
        self._by_name: dict[str, _Object] = {}
        self._by_file: dict[str, _Object] = {}
        self._found: list[Library] = []
        self._missing: list[Missing] = []
        self._tries = 0
        interpreter = program.elf.interpreter
        loader = _readable(view, interpreter)
        if loader is not None:
            self._remember(_Object(path=interpreter, elf=loader, above=None), posixpath.basename(interpreter))

    def run(self) -> Resolution:
        todo = deque([self._program])
        objects = [self._program]
        seen = {self._program}
        lost: set[str] = set()
        while todo:
            asking = todo.popleft()
            for name in asking.elf.needed:
                if name in self._by_name or name in lost or self._search.own.match(name):
                    continue
                loaded = self._load(name, asking)
                if loaded is None:
                    lost.add(name)
                elif loaded not in seen:
                    seen.add(loaded)
                    objects.append(loaded)
                    todo.append(loaded)
                if len(lost) + len(self._by_name) > _NAMES_MAX:
                    raise InputError(f"it needs more than {_NAMES_MAX} libraries")
        return Resolution(
            interpreter=self._program.elf.interpreter, libraries=tuple(self._found), missing=tuple(self._missing),
            outdated=tuple(self._outdated(objects)) if self._search.versions else (),
        )  # fmt: skip

    def _load(self, name: str, asking: _Object) -> _Object | None:
        reason = ""
        for path in self._search.candidates(name, asking):
            self._tries += 1
            if self._tries > _TRIES_MAX:
                raise InputError(f"its libraries are not found among {_TRIES_MAX} paths")
            entry = self._view.get(path)
            if entry is None or not entry.is_file:
                continue
            known = self._by_file.get(self._view.real(path))
            if known is not None:
                self._by_name[name] = known
                return known
            elf, problem, other = self._judge(path)
            if elf is not None:
                loaded = _Object(path=path, elf=elf, above=asking)
                self._remember(loaded, name)
                self._found.append(Library(name=name, path=path, needed_by=asking.path))
                return loaded
            reason = reason or problem
            if not (other and self._search.choosy):
                break
        uncached = self._search.uncached(name) if isinstance(self._search, _Glibc) and not reason else ""
        self._missing.append(Missing(name=name, needed_by=asking.path, reason=reason, uncached=uncached))
        return None

    def _judge(self, path: str) -> tuple[Elf | None, str, bool]:
        """The library, or what is wrong with it, and whether that is only that it is for another machine."""
        try:
            elf = _elf(self._view, path)
        except InputError as problem:
            return None, f"{quote(path)} is broken: {problem}", False
        if elf is None:
            return None, f"{quote(path)} is no ELF file", False
        wanted = self._program.elf
        if (elf.machine, elf.bits, elf.big_endian) != (wanted.machine, wanted.bits, wanted.big_endian):
            return None, f"{quote(path)} is for {elf.machine_name}", True
        if not elf.loadable:
            return None, f"{quote(path)} is {elf.kind}", False
        return elf, "", False

    def _remember(self, loaded: _Object, name: str) -> None:
        for known in (name, loaded.path, loaded.elf.soname):
            if known:
                self._by_name.setdefault(known, loaded)
        self._by_file[self._view.real(loaded.path)] = loaded

    def _outdated(self, objects: list[_Object]) -> Iterator[Outdated]:
        for asking in objects:
            for name, versions in asking.elf.wants.items():
                loaded = self._by_name.get(name)
                if loaded is None or not loaded.elf.defines:  # without any, glibc only warns
                    continue
                for version in versions:
                    if version not in loaded.elf.defines:
                        yield Outdated(path=loaded.path, version=version, needed_by=asking.path)


def _readable(view: View, path: str) -> Elf | None:
    try:
        return _elf(view, path)
    except InputError:
        return None


class _Glibc:
    versions = True
    choosy = True
    own = re.compile("(?!)")

    def __init__(self, view: View, program: _Object) -> None:
        self._view, self._program = view, program
        machine = program.elf.machine_name
        triple = _MULTIARCH.get(machine)
        # Which of them it was built with differs between distributions: those of all.
        self._libs = ([f"lib/{triple}"] if triple else []) + (["lib64"] if program.elf.bits == 64 else []) + ["lib"]
        home = posixpath.dirname(_real(view, program.elf.interpreter))  # Nix: the only one
        self._defaults = [f"{above}/{lib}" for lib in self._libs for above in ("", "/usr")] + [home]
        self._platform = {"i386": "i686"}.get(machine, machine)
        self._cache = _read_cache(view, big_endian=program.elf.big_endian)
        self._configured: list[str] | None = None

    def candidates(self, name: str, asking: _Object) -> Iterator[str]:
        if "/" in name:
            yield from self._expand(name, asking)
            return
        for above in self._said(asking):
            yield f"{above.rstrip('/')}/{name}"
        yield from self._cache.get(name, ())
        for above in self._defaults:
            yield f"{above.rstrip('/')}/{name}"

    def uncached(self, name: str) -> str:
        """Where ldconfig would find it, had it been run."""
        if self._configured is None:
            self._configured = _configured(self._view)
        paths = (f"{above}/{name}" for above in self._configured[:_CONF_FILES_MAX])
        return next((path for path in paths if self._usable(path)), "")

    def _usable(self, path: str) -> bool:
        elf, wanted = _readable(self._view, path), self._program.elf
        return elf is not None and (elf.machine, elf.bits) == (wanted.machine, wanted.bits)

    def _said(self, asking: _Object) -> Iterator[str]:
        if asking.elf.runpath is None:
            chain = list(asking.chain())
            for here in chain if chain[-1] is self._program else [*chain, self._program]:
                if here.elf.rpath is not None and here.elf.runpath is None:
                    yield from self._directories(here.elf.rpath, here)
        else:
            yield from self._directories(asking.elf.runpath, asking)

    def _directories(self, text: str, saying: _Object) -> Iterator[str]:
        for part in text.split(":"):
            yield from self._expand(part, saying)

    def _expand(self, text: str, saying: _Object) -> Iterator[str]:
        for lib in self._libs if "LIB" in text else self._libs[:1]:
            values = {"ORIGIN": posixpath.dirname(saying.path), "LIB": lib, "PLATFORM": self._platform}
            yield posixpath.join("/", _replace(text, values))  # an init's working directory is the root


class _Musl:
    versions = False
    choosy = False
    own = re.compile(r"lib(c|pthread|rt|m|dl|util|xnet)\.")

    def __init__(self, view: View, program: _Object) -> None:
        interpreter = program.elf.interpreter
        prefix = posixpath.dirname(posixpath.dirname(interpreter)).rstrip("/")
        name = posixpath.basename(interpreter)
        found = re.fullmatch(r"ld-musl-(.+)\.so\.1", name)
        self._path = _MUSL_DEFAULT
        if found is not None:
            text = view.text(f"{prefix}/etc/ld-musl-{found[1]}.path")
            self._path = _MUSL_DEFAULT if text is None else text

    def candidates(self, name: str, asking: _Object) -> Iterator[str]:
        if "/" in name:
            yield posixpath.join("/", name)
            return
        for here in asking.chain():
            text = here.elf.rpath if here.elf.runpath is None else here.elf.runpath
            for above in self._directories(text or "", posixpath.dirname(here.path)):
                yield f"{above}/{name}"
        for above in self._directories(self._path, "/"):
            yield f"{above}/{name}"

    def _directories(self, text: str, origin: str) -> Iterator[str]:
        text = text.replace("${ORIGIN}", origin).replace("$ORIGIN", origin)
        if "$" not in text:  # with any other token, musl forgets the whole
            yield from (posixpath.join("/", part).rstrip("/") for part in re.split("[:\n]", text) if part)


def _replace(text: str, values: Mapping[str, str]) -> str:
    return _TOKEN.sub(lambda found: values[found[1] or found[2]], text)


def _real(view: View, path: str) -> str:
    try:
        return view.real(path)
    except InputError:
        return path


def _read_cache(view: View, *, big_endian: bool) -> dict[str, list[str]]:
    """Name -> paths. A cache that is missing or broken has none, as for glibc."""
    found = view.get(_CACHE)
    if found is None or not found.is_file or found.content.size > _CACHE_MAX:
        return {}
    data = read_at(found.content, 0, found.content.size)
    start = data.find(b"glibc-ld.so.cache1.1")
    if start < 0 or len(data) < start + 48:
        return {}
    order = ">" if big_endian else "<"
    (count,) = struct.unpack_from(f"{order}I", data, start + 20)
    names: dict[str, list[str]] = {}
    for index in range(min(count, (len(data) - start - 48) // 24)):
        key, value = struct.unpack_from(f"{order}II", data, start + 52 + index * 24)
        name, path = (_string(data, start + at) for at in (key, value))
        names.setdefault(name, []).append(path)
    return names


def _string(data: bytes, at: int) -> str:
    end = data.find(0, at, at + 4096)
    return data[at:end].decode(errors="surrogateescape") if end >= 0 else ""


def _configured(view: View) -> list[str]:
    """The directories that /etc/ld.so.conf names, in order, through its includes."""
    found: list[str] = []
    todo, files, patterns = [_CONF], 0, 0
    while todo and files < _CONF_FILES_MAX:
        path = todo.pop()
        files += 1
        included = []
        for line in (view.text(path) or "").splitlines():
            words = line.partition("#")[0].split()
            if words[:1] == ["include"]:
                patterns += len(words) - 1
                if patterns > _CONF_FILES_MAX:
                    break
                above = posixpath.dirname(path)
                included += [one for word in words[1:] for one in view.matches(posixpath.join(above, word))]
            elif words[:1] != ["hwcap"]:
                found += [one.partition("=")[0].rstrip("/") for word in words for one in re.split("[:,]", word) if one]
        todo += reversed(included)
    return found
