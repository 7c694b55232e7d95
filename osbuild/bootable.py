"""Could this boot? What would stop a guest, one sentence each, found before anything is written.

The rules are those of who would complain: the kernel's for a first process (execve(2), binfmt_script, binfmt_elf), the
dynamic loaders' (osbuild.loader), mount(2)'s for a read-only root, and systemd's (systemd.unit(5), machine-id(5)).
Only what stops a boot is a problem; what an image may do differently is not our business.
"""

from __future__ import annotations

import posixpath
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from osbuild.arch import Arch
from osbuild.elf import Elf, read_elf
from osbuild.errors import InputError
from osbuild.systemd import SERVICE, TARGET, UNITS
from osbuild.tree import Entry, Tree, quote
from osbuild.units import Unit, find_unit, is_masked, read_unit
from osbuild.view import View, read_at

if TYPE_CHECKING:  # what nothing but a dynamic program needs is imported for one
    from osbuild.loader import Missing, Resolution

MOUNT_POINTS: Final = ("/proc", "/sys", "/dev", "/run", "/tmp")  # noqa: S108  # the guest's

# Units that must start, and what is lost without them; what they require themselves is found in their files.
ESSENTIAL: Final[Mapping[str, str]] = {
    TARGET: "it is what Kata's runtimes boot into",
    SERVICE: "it starts the agent",
    "basic.target": f"{TARGET} requires it",
    "sysinit.target": "basic.target requires it",
    "local-fs.target": "it mounts the local file systems",
    "tmp.mount": f"{TARGET} requires it",
}

_SYSTEMD: Final = ("/usr/lib/systemd/systemd", "/lib/systemd/systemd")
_UNIT_HOME: Final = "/usr/lib/systemd/system"
_SCRIPTS_MAX: Final = 5  # scripts that the kernel lets interpret each other
_SHEBANG_MAX: Final = 256  # bytes of a script's first line that the kernel reads
_NAMES_MAX: Final = 8  # of libraries in one sentence
_UNITS_MAX: Final = 200  # that are looked at on behalf of the essential ones
_KERNEL_PATH: Final = "/usr/local/bin:/bin:/usr/bin"  # what env(1) searches without a PATH, in glibc and musl
_SYSTEMD_PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_FILES: Final = (".service", ".socket", ".target", ".path", ".timer")  # kinds of units that exist only as files

_ADD: Final = "install it in the image, or add it to the tree with --add"
_REMOVE: Final = "take it out of the tree with --remove"


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One thing that is wrong: a whole sentence that names the path, and what to do."""

    path: str
    text: str
    hint: str = ""


def problems(tree: Tree, init: str, arch: Arch, *, systemd: bool) -> tuple[Problem, ...]:
    """Everything that would keep a guest with this tree from starting `init`, and with `systemd` from our agent.

    InputError when a unit file or fstab is too large to be one.
    """
    view = View(tree)
    judge = _Judge(view, arch, path_env=_KERNEL_PATH)
    found = [*judge.program(init), *_mount_points(view)]
    if systemd:
        found += _systemd(view, init)
        if any(view.get(path) is not None for path in _SYSTEMD):
            found += [*_machine_id(view), *_units(view), *_drop_ins(view), *_service(view, judge)]
    return tuple(dict.fromkeys(found))


def workload_problems(tree: Tree, argv0: str, path_env: str, arch: Arch, *, workdir: str = "/") -> tuple[Problem, ...]:
    """Why the image's own program would not start; nothing for an image that names none."""
    if not argv0:
        return ()
    view = View(tree)
    path_env = path_env or _SYSTEMD_PATH  # also what Docker sets
    judge = _Judge(view, arch, path_env=path_env)
    if "/" in argv0:
        return tuple(judge.program(posixpath.join("/", workdir, argv0)))
    path = _search(view, argv0, path_env, workdir)
    if path is None:
        text = f"{quote(argv0)} is in no directory of the image's PATH, {quote(path_env)}"
        return (Problem(path=argv0, text=text, hint=_ADD),)
    return tuple(judge.program(path))


def _search(view: View, name: str, path_env: str, workdir: str = "/") -> str | None:
    """As execvp(3): the first that may be executed, else the first that may not."""
    paths = [posixpath.join("/", workdir, above, name) for above in path_env.split(":")]
    files = [path for path in paths if (entry := view.get(path)) and entry.is_file]
    return next((path for path in files if _executable(view.get(path))), files[0] if files else None)


def _executable(entry: Entry | None) -> bool:
    return entry is not None and bool(entry.mode & 0o111)  # any of the three is enough for root


class _Judge:
    """What execve(2) would say to a program, by the rules of one guest's kernel."""

    def __init__(self, view: View, arch: Arch, *, path_env: str) -> None:
        self._view, self._arch, self._path_env = view, arch, path_env

    def program(self, path: str, role: str = "", *, scripts: int = 0) -> Iterator[Problem]:
        """What is wrong with a program; `role` says whose business it is."""
        subject = quote(path) + (f", {role}," if role else "")

        def problem(text: str, hint: str) -> Problem:
            return Problem(path=path, text=f"{subject} {text}", hint=hint)

        entry = self._view.get(path)
        if entry is None:
            yield problem(self._absence(path), self._absence_hint(path))
        elif entry.is_dir:
            yield problem("is a directory, no program", "name a program, or replace the directory by one")
        elif not entry.is_file:
            yield problem("is no regular file", "replace it by a program")
        elif not _executable(entry):
            yield problem(f"may not be executed: its mode is {entry.mode & 0o7777:04o}", "chmod +x it in the image")
        elif not entry.content.size:
            yield problem("is empty", "replace it by a program")
        elif read_at(entry.content, 0, 2) == b"#!":
            yield from self._script(path, entry, problem, scripts)
        else:
            yield from self._elf(path, entry, problem)

    def _absence(self, path: str) -> str:
        try:
            real = self._view.real(path)
        except InputError:
            return "is a symbolic link that leads in a circle"
        link = self._view.link(path)
        if link is not None:
            return f"is a symbolic link to {quote(link.target)}, and nothing is at {quote(real)}"
        return "is not in the tree" + (f": nothing is at {quote(real)}" if real != posixpath.normpath(path) else "")

    def _absence_hint(self, path: str) -> str:
        if "ld-musl" in path:
            return "the program was built for musl, as in Alpine: use one that is static, or one built for this image"
        if posixpath.basename(path).startswith("ld-linux"):
            return "the program was built for glibc: use one that is static, or one built for this image"
        return _ADD

    def _script(
        self, path: str, entry: Entry, problem: Callable[[str, str], Problem], scripts: int
    ) -> Iterator[Problem]:
        """binfmt_script: the first word after #! is started with the rest of the line as one argument."""
        head = read_at(entry.content, 2, _SHEBANG_MAX - 2)
        line, ended, _ = head.partition(b"\n")
        words = line.partition(b"\0")[0].strip(b" \t").replace(b"\t", b" ").split(b" ", 1)
        interpreter = words[0].decode(errors="surrogateescape")
        argument = words[1].strip().decode(errors="surrogateescape") if len(words) > 1 else ""
        if not interpreter:
            yield problem("is a script that names no interpreter after #!", "name one, for example #!/bin/sh")
            return
        if not ended and entry.content.size > _SHEBANG_MAX and len(words) == 1:
            yield problem(
                f"has a first line of which the kernel reads {_SHEBANG_MAX} bytes only",
                "give its interpreter a shorter path",
            )
            return
        if scripts == _SCRIPTS_MAX:
            yield problem(
                f"is a script below {_SCRIPTS_MAX} others; the kernel gives up there", "name a program as interpreter"
            )
            return
        interpreter = posixpath.join("/", interpreter)
        if interpreter.endswith("\r") and self._view.get(interpreter) is None:
            yield problem(
                f"ends its lines as Windows does: its interpreter would be {quote(interpreter)}",
                "convert it with dos2unix",
            )
            return
        found = list(self.program(interpreter, f"the interpreter of {quote(path)}", scripts=scripts + 1))
        yield from found
        if not found and posixpath.basename(interpreter) == "env":
            yield from self._by_env(path, argument.removeprefix("-S").split(), problem, scripts)

    def _by_env(
        self, path: str, words: list[str], problem: Callable[[str, str], Problem], scripts: int
    ) -> Iterator[Problem]:
        """#!/usr/bin/env NAME: env searches for it. With options or variables before the name, we do not look."""
        if not words or words[0].startswith("-") or "=" in words[0]:
            return
        found = words[0] if "/" in words[0] else _search(self._view, words[0], self._path_env)
        if found is None:
            yield problem(
                f"asks env for {quote(words[0])}, which is in none of {quote(self._path_env)}",
                "install it in the image, or name its path after #!",
            )
        else:
            role = f"the interpreter of {quote(path)}"
            yield from self.program(posixpath.join("/", found), role, scripts=scripts + 1)

    def _elf(self, path: str, entry: Entry, problem: Callable[[str, str], Problem]) -> Iterator[Problem]:
        try:
            elf = read_elf(entry.content)
        except InputError as broken:
            yield problem(f"is a broken ELF file: {broken}", "build or fetch it again")
            return
        if elf is None:
            yield problem(
                "is neither an ELF program nor a script", "a script starts with #! and the path of its interpreter"
            )
        elif (elf.machine, elf.bits, elf.big_endian) != (self._arch.elf_machine, 64, False):
            yield problem(
                f"is for {elf.machine_name}, the guest is {self._arch.name}",
                f"use an image for this architecture: --platform linux/{self._arch.oci}",
            )
        elif not elf.loadable:
            yield problem(f"is {elf.kind}, no program", "replace it by a program")
        elif elf.needed and not elf.interpreter:
            yield problem("is a library, no program", "replace it by a program")
        elif elf.interpreter:
            yield from self._loaded(path, elf, problem)

    def _loaded(self, path: str, elf: Elf, problem: Callable[[str, str], Problem]) -> Iterator[Problem]:
        """A program that a dynamic loader starts: the loader, and all that it would open."""
        from osbuild.loader import libraries

        loader = posixpath.join("/", elf.interpreter)
        found = list(self.program(loader, f"the dynamic loader of {quote(path)}"))
        yield from found
        if found:
            return
        try:
            resolution = libraries(self._view, path)
        except InputError as broken:
            yield problem(f"has libraries that cannot be looked up: {broken}", "build or fetch it again")
            return
        yield from _unlike(path, resolution, problem)


def _unlike(path: str, resolution: Resolution, problem: Callable[[str, str], Problem]) -> Iterator[Problem]:
    absent = [one for one in resolution.missing if not one.reason and not one.uncached]
    if absent:
        names = ", ".join(_name(one, path) for one in absent[:_NAMES_MAX])
        more = f" and {len(absent) - _NAMES_MAX} more" if len(absent) > _NAMES_MAX else ""
        verb = "is" if len(absent) == 1 else "are"
        yield problem(f"needs {names}{more}, which {verb} not in the tree", "install the packages that have them")
    for one in [one for one in resolution.missing if one.reason][:_NAMES_MAX]:
        yield problem(f"needs {_name(one, path)}, but {one.reason}", "install the library for this architecture")
    for one in [one for one in resolution.missing if one.uncached][:_NAMES_MAX]:
        text = f"needs {_name(one, path)}, which is at {quote(one.uncached)}, but not in /etc/ld.so.cache"
        yield problem(text, "run ldconfig in the image")
    for old in resolution.outdated[:_NAMES_MAX]:
        whom = "" if old.needed_by == path else f" (for {quote(old.needed_by)})"
        yield problem(
            f"needs version {quote(old.version)} of {quote(old.path)}, which has no such version{whom}",
            "build it on a system as old as the image, or statically; or use a newer image",
        )


def _name(missing: Missing, path: str) -> str:
    return quote(missing.name) + ("" if missing.needed_by == path else f" (for {quote(missing.needed_by)})")


def _mount_points(view: View) -> Iterator[Problem]:
    """Directories that a read-only root must have, and that do not lie on one another."""
    for path in MOUNT_POINTS:
        entry = view.get(path)
        if entry is None or not entry.is_dir:
            link = view.link(path)
            what = (
                "is not there" if link is None
                else f"is a symbolic link to {quote(link.target)}, where no directory is" if link.is_symlink
                else "is no directory"
            )  # fmt: skip
            text = f"{quote(path)} {what}: on a read-only root nobody can make the mount point"
            yield Problem(path=path, text=text, hint="make it an empty directory in the image")
            continue
        real = view.real(path)
        for other in MOUNT_POINTS:
            if other != path and f"{real}/".startswith(f"{other}/"):
                text = f"{quote(path)} leads to {quote(real)}, which disappears when {quote(other)} is mounted"
                yield Problem(path=path, text=text, hint="make it an empty directory in the image")


def _systemd(view: View, init: str) -> Iterator[Problem]:
    systemd = next((path for path in _SYSTEMD if (entry := view.get(path)) and entry.is_file), None)
    if systemd is None:
        text = f"{quote(_SYSTEMD[0])} is not in the tree, nor is {quote(_SYSTEMD[1])}: there is no systemd"
        yield Problem(path=_SYSTEMD[0], text=text, hint="install systemd in the image, or use --init agent")
    elif view.get(init) is not None and view.real(init) != view.real(systemd):
        text = f"{quote(init)} leads to {quote(view.real(init))}, not to systemd at {quote(systemd)}"
        yield Problem(path=init, text=text, hint="make it a link to systemd, or use --init agent")


def _machine_id(view: View) -> Iterator[Problem]:
    """systemd mounts an identity over the file where the root is read-only, and gives up where there is none."""
    entry = view.get("/etc/machine-id")
    if entry is None or not entry.is_file:
        what = "is not there" if entry is None else "is no regular file"
        text = f"'/etc/machine-id' {what}: on a read-only root systemd needs a file to mount the guest's identity on"
        yield Problem(path="/etc/machine-id", text=text, hint="make it an empty file in the image")


def _units(view: View) -> Iterator[Problem]:
    """The essential units, and all that they require, in turn: there, and not masked."""
    todo = list(ESSENTIAL.items())
    seen = set(ESSENTIAL)
    while todo:
        name, why = todo.pop(0)
        path = find_unit(view, name)
        if path is None:
            if _must_be_a_file(view, name):
                path = f"{_UNIT_HOME}/{name}"
                text = f"{quote(path)} is not there, nor is the unit anywhere else: {why}"
                yield Problem(path=path, text=text, hint="install the package that has the unit")
        elif is_masked(view, path):
            yield Problem(path=path, text=f"{quote(path)} masks the unit {quote(name)}: {why}", hint=_REMOVE)
        elif len(seen) < _UNITS_MAX:
            required = [one for one in read_unit(view, path).required(view, name) if one not in seen]
            todo += [(one, f"{name} requires it") for one in required]
            seen.update(required)


def _must_be_a_file(view: View, name: str) -> bool:
    """Devices, slices and mounts may be there without one; and /etc/init.d and fstab become units at boot."""
    if name == "tmp.mount":
        lines = (view.text("/etc/fstab") or "").splitlines()
        return not any(line.split()[1:2] == ["/tmp"] for line in lines if not line.lstrip().startswith("#"))  # noqa: S108
    script = f"/etc/init.d/{name.rpartition('.')[0]}"
    return name.endswith(_FILES) and view.get(script) is None


def _drop_ins(view: View) -> Iterator[Problem]:
    """The image's word on units that are ours. What it says for all services is its own business."""
    seen = set()
    for name in (SERVICE, TARGET):
        for above in (f"{home}/{one}" for home in UNITS for one in (f"{name}.d", _family(name))):
            for path in (f"{above}/{one}" for one in view.names(above) if one.endswith(".conf")):
                if view.real(path) not in seen and not is_masked(view, path):
                    text = f"{quote(path)} changes {quote(name)}, which is osbuilder's own"
                    yield Problem(path=path, text=text, hint=_REMOVE)
                seen.add(view.real(path))


def _family(name: str) -> str:
    """Where drop-ins are for all units whose names start alike: kata-.service.d for kata-agent.service."""
    return f"{name.partition('-')[0]}-.{name.rpartition('.')[2]}.d"


def _service(view: View, judge: _Judge) -> Iterator[Problem]:
    """What the agent's unit starts."""
    path = find_unit(view, SERVICE)
    if path is None or is_masked(view, path):
        return
    unit: Unit = read_unit(view, path)
    commands = unit.programs()
    if not commands:
        yield Problem(path=path, text=f"{quote(path)} has no ExecStart=", hint="say there what starts the agent")
    for command in commands:
        found = command if "/" in command else _search(view, command, _SYSTEMD_PATH)
        if found is None:
            text = f"{quote(path)} starts {quote(command)}, which is in none of {quote(_SYSTEMD_PATH)}"
            yield Problem(path=path, text=text, hint=_ADD)
        else:
            yield from judge.program(found, f"which {SERVICE} starts")
