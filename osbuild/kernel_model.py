"""A kernel tree's Kconfig model, from the cache when nothing has changed: read in 0.2 s instead of parsed in seconds.

<cache>/kconfig/model-<digest>.json     the model
                files-<digest>.json     size and time of each file it was read from
                answers-<digest>.json   what this compiler, linker and assembler said to the tree's questions

The questions are shell lines of the tree itself (`$(cc-option,…)`, scripts/cc-version.sh), asked of the compiler that
a build would use and remembered for as long as its version stays the same. Most are the same in every tree; one that
runs a script of a tree has that tree's path in it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from osbuild import command
from osbuild.arch import Arch
from osbuild.cache import Cache
from osbuild.errors import CommandError, HostError
from osbuild.garbage import uncollected
from osbuild.kbuild import source_arch
from osbuild.kconfig import ABSENT
from osbuild.kconfig_lang import FORMAT
from osbuild.output import write_whole

if TYPE_CHECKING:  # who only asks whether anything has changed needs no model
    from osbuild.kconfig_lang.model import Model

_TOOLS: Final = ("gcc", "ld", "as")


@dataclass(frozen=True, slots=True, kw_only=True)
class Asking:
    """Whom the tree's questions are asked: ARCH, the compiler's prefix, and what that compiler calls itself."""

    arch: Arch
    prefix: str  # CROSS_COMPILE
    versions: tuple[str, ...]


def load_model(tree: Path, arch: Arch, prefix: str, cache: Cache) -> Model:
    """The model of a tree for one architecture."""
    from osbuild.kconfig_lang.model import from_json

    asking = _asking(arch, prefix)
    home = cache.scratch("kconfig")
    name = _name(tree, asking)
    if _seen(home, name, tree):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, IndexError), uncollected():
            return from_json(json.loads((home / f"model-{name}.json").read_bytes()))
    from osbuild.kconfig_lang.parser import read_tree

    files: list[str] = []
    with (
        _answers(home / f"answers-{_digest(prefix, *asking.versions)}.json", asking, tree) as ask,
        uncollected(),
    ):
        model = read_tree(tree, environment(tree, asking), ask, seen=files.append, old=_is_old(tree))
    stamps = [_stamp(tree, file) for file in dict.fromkeys(files)]
    with contextlib.suppress(HostError):  # a cache that cannot be written to: parsed again next time
        write_whole(home / f"model-{name}.json", _packed(model.to_json()))
        write_whole(home / f"files-{name}.json", _packed(stamps))  # last: it says that the other one is good
    return model


def model_digest(tree: Path, arch: Arch, prefix: str, cache: Cache) -> str:
    """What a model that is in the cache was made from, so that what follows from it can be kept too; else empty."""
    home = cache.scratch("kconfig")
    name = _name(tree, _asking(arch, prefix))
    stamps = _seen(home, name, tree)
    return _digest(name, stamps.decode()) if stamps else ""


def _asking(arch: Arch, prefix: str) -> Asking:
    return Asking(arch=arch, prefix=prefix, versions=tuple(command.version(f"{prefix}{tool}") for tool in _TOOLS))


def _name(tree: Path, asking: Asking) -> str:
    return _digest(str(tree), asking.arch.name, asking.prefix, *asking.versions, str(FORMAT))


def _packed(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def environment(tree: Path, asking: Asking) -> dict[str, str]:
    """What the kernel's makefiles hand to Kconfig."""
    prefix = asking.prefix
    tools = {
        "CC": "gcc", "LD": "ld", "AR": "ar", "NM": "nm", "OBJCOPY": "objcopy", "OBJDUMP": "objdump",
        "READELF": "readelf", "STRIP": "strip",
    }  # fmt: skip
    return {
        "ARCH": asking.arch.kernel,
        "SRCARCH": source_arch(asking.arch.kernel),
        "srctree": str(tree),
        "KERNELVERSION": kernel_version(tree),
        "CROSS_COMPILE": prefix,
        "CC_VERSION_TEXT": asking.versions[0].replace("#", ""),
        "CONFIG_SHELL": "sh",
        "PYTHON3": "python3",
        "HOSTCC": "gcc",
        **{name: f"{prefix}{tool}" for name, tool in tools.items()},
        **ABSENT,
    }


def kernel_version(tree: Path) -> str:
    """6.12.95, from the tree's makefile."""
    values = {}
    with (tree / "Makefile").open(errors="replace") as lines:
        for line, _ in zip(lines, range(10), strict=False):
            name, equals, value = line.partition("=")
            if equals:
                values[name.strip()] = value.strip()
    numbers = [values.get(name, "") for name in ("VERSION", "PATCHLEVEL", "SUBLEVEL")]
    return ".".join(number for number in numbers if number) + values.get("EXTRAVERSION", "")


def _is_old(tree: Path) -> bool:
    numbers = kernel_version(tree).split(".")[:2]
    return all(number.isdigit() for number in numbers) and [int(number) for number in numbers] < [6, 11]


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _stamp(tree: Path, name: str) -> list[str | int]:
    status = os.stat(f"{tree}/{name}")  # noqa: PTH116  # of 1,600 files: a Path for each takes longer than to ask
    return [name, status.st_size, status.st_mtime_ns]


def _seen(home: Path, name: str, tree: Path) -> bytes:
    """The list of files that a model in the cache came from, if each looks as it did; else nothing."""
    with contextlib.suppress(OSError, ValueError, TypeError, IndexError):
        data = (home / f"files-{name}.json").read_bytes()
        if all(_stamp(tree, stamp[0]) == stamp for stamp in json.loads(data)):
            return data
    return b""


@contextlib.contextmanager
def _answers(record: Path, asking: Asking, tree: Path) -> Iterator[Callable[[str], str]]:
    """How shell lines are answered: from what is remembered, else by running them in an empty directory."""
    from osbuild.kconfig_lang.questions import questions

    known: dict[str, str] = {}
    with contextlib.suppress(OSError, ValueError):
        loaded = json.loads(record.read_bytes())
        known = {str(script): str(answer) for script, answer in loaded.items()}
    before = len(known)
    with tempfile.TemporaryDirectory(prefix="osbuilder-kconfig-") as directory:
        work, variables = Path(directory), environment(tree, asking)

        def ask(script: str) -> str:
            if script not in known:
                known.update(_run([script], work, variables))
            return known[script]

        ahead = [script for script in questions(tree, variables, ask) if script not in known]
        known.update(_run(ahead, work, variables))
        yield ask
    if len(known) != before:
        with contextlib.suppress(HostError):
            write_whole(record, json.dumps(known, sort_keys=True).encode())


def _run(scripts: Sequence[str], work: Path, variables: Mapping[str, str]) -> dict[str, str]:
    """What shell lines print; that one fails is an answer too. Most ask the compiler, so as many run as there are
    processors.
    """
    if not scripts:
        return {}
    with tempfile.TemporaryDirectory(dir=work) as directory:
        home = Path(directory)
        for number, script in enumerate(scripts):
            (home / f"{number}.ask").write_text(script)
        one = f'eval "$(cat {home}/$1.ask)" > {home}/$1.said 2> /dev/null'
        argv = ("xargs", f"-P{len(os.sched_getaffinity(0))}", "-n1", "sh", "-c", f"{one}; exit 0", "sh")
        numbers = "\n".join(str(number) for number in range(len(scripts)))
        # `exit 1` in a line of its own accord makes xargs exit with 123: the answers are there all the same.
        with contextlib.suppress(CommandError):
            command.run(*argv, cwd=work, env=variables, stdin=numbers.encode())
        return {script: _said(home / f"{number}.said") for number, script in enumerate(scripts)}


def _said(path: Path) -> str:
    return path.read_text(errors="replace") if path.is_file() else ""
