"""`osbuilder kernel check`: a .config held against what monitors, agents and images need, without compiling.

What is needed is data, kernel-configs/contract.toml: expressions in Kconfig's own language, each with its reason.
"""

from __future__ import annotations

import re
import tomllib
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from osbuild.errors import InputError, SpecError
from osbuild.kconfig import parse_config
from osbuild.kconfig_lang.expression import LETTERS, All, Expression, ExpressionError, M, N, Y, parse
from osbuild.resources import resource

KINDS: Final = ("vmm", "agent", "image")
_RELEASE: Final = re.compile(r"^# Linux/\S+ (\d+)\.(\d+)\S* Kernel Configuration", re.MULTILINE)
_MOST: Final = 64 << 20  # bytes of a kernel that are looked through for its configuration
_BEGINS: Final = b"IKCFG_ST"  # in front of the gzip that CONFIG_IKCONFIG puts into a kernel


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """One thing that has to be built in."""

    need: str
    when: str
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Unmet:
    """A need that a configuration does not meet."""

    wanted_by: tuple[str, ...]  # vmm qemu, image verity, …; empty: every guest
    need: str  # the part of it that is missing
    values: Mapping[str, str]  # of the symbols in it
    why: str

    def to_dict(self) -> dict[str, object]:
        """For --json."""
        return {"for": list(self.wanted_by), "need": self.need, "values": dict(self.values), "why": self.why}

    def __str__(self) -> str:
        values = ", ".join(f"CONFIG_{name}={value}" for name, value in self.values.items())
        return f"{', '.join(self.wanted_by) or 'every guest'}: {self.need} ({values}): {self.why}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """What a check came to."""

    config: str  # whose configuration
    release: str  # 6.12, as far as the configuration says
    count: int  # of needs that were looked at
    unmet: tuple[Unmet, ...]

    def to_dict(self) -> dict[str, object]:
        """For --json."""
        return {
            "config": self.config, "release": self.release, "checked": self.count,
            "unmet": [each.to_dict() for each in self.unmet],
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the kernel is for."""

    vmms: tuple[str, ...] = ()
    agents: tuple[str, ...] = ()
    images: tuple[str, ...] = ()


class Contract:
    """The needs, by whom."""

    def __init__(self, document: Mapping[str, Any], where: str) -> None:
        self._document = document
        self._where = where
        for kind in (*KINDS, "group"):
            for name in document.get(kind, {}):
                list(self._needs(document[kind][name], f"{kind}.{name}"))  # what is wrong in it is said at once
        self.every = tuple(self._needs(document.get("every", []), "every"))

    def names(self, kind: str) -> tuple[str, ...]:
        """What may be asked for."""
        return tuple(self._document.get(kind, {}))

    def needs(self, kind: str, name: str) -> tuple[Need, ...]:
        """All that one monitor, agent or image needs."""
        if name not in self._document.get(kind, {}):
            raise SpecError(f"--{kind} {name}: not in the contract", hint=f"one of {', '.join(self.names(kind))}")
        return tuple(self._needs(self._document[kind][name], f"{kind}.{name}"))

    def _needs(self, entries: Any, place: str) -> Iterator[Need]:
        for entry in entries:
            if "group" in entry:
                yield from self._needs(self._document["group"][entry["group"]], f"group.{entry['group']}")
                continue
            try:
                found = Need(need=entry["need"], when=entry.get("when", ""), why=entry["why"])
                parse(found.need)
                if found.when:
                    parse(found.when)
            except (KeyError, ExpressionError) as problem:
                raise InputError(f"{self._where}: {place}: {problem}") from None
            yield found


def read_contract(path: Path | None = None) -> Contract:
    """The contract that travels with the program, or another one."""
    path = path or resource("kernel-configs/contract.toml")
    try:
        return Contract(tomllib.loads(path.read_text(encoding="utf-8")), str(path))
    except (OSError, ValueError, KeyError, TypeError) as problem:
        raise InputError(f"{path} is no contract: {problem}") from problem


def check(config: str, text: str, wanted: Wanted, contract: Contract) -> Checked:
    """A configuration's text against all that is wanted of it."""
    values = parse_config(text)
    if not values:
        raise InputError(f"{config} is no kernel configuration: nothing is set in it")
    found: dict[tuple[str, str], list[str]] = {}  # (need, why) -> by whom
    count = 0
    for labels, need, context in _all_needs(wanted, contract):
        symbols = _Symbols(values, {**context, "KERNEL_VERSION": _version(text)})
        if need.when and parse(need.when).tri(symbols) == N:
            continue
        count += 1
        for part in _missing(parse(need.need), symbols):
            names = found.setdefault((str(part), need.why), [])
            names += [label for label in labels if label not in names]
    plain = _Symbols(values, {"KERNEL_VERSION": _version(text)})
    unmet = tuple(
        Unmet(wanted_by=tuple(labels), need=part, why=why, values={name: plain.text(name) for name in _names(part)})
        for (part, why), labels in found.items()
    )
    release = _RELEASE.search(text)
    return Checked(config=config, release=f"{release[1]}.{release[2]}" if release else "", count=count, unmet=unmet)


def _all_needs(wanted: Wanted, contract: Contract) -> Iterator[tuple[tuple[str, ...], Need, dict[str, str]]]:
    """Each need, who has it, and what VMM, AGENT and IMAGE are meanwhile: every combination that is wanted."""
    vmms, agents, images = (list(names) or [""] for names in (wanted.vmms, wanted.agents, wanted.images))
    for need in contract.every:
        yield (), need, {"VMM": "", "AGENT": "", "IMAGE": ""}
    for vmm in vmms:
        for agent in agents:
            for need in contract.needs("vmm", vmm) if vmm else ():
                yield (f"vmm {vmm}",), need, {"VMM": vmm, "AGENT": agent, "IMAGE": ""}
        for image in images:
            for need in contract.needs("image", image) if image else ():
                labels = (f"image {image}", *([f"vmm {vmm}"] if "VMM" in need.when else []))
                yield labels, need, {"VMM": vmm, "AGENT": "", "IMAGE": image}
    for agent in agents:
        for need in contract.needs("agent", agent) if agent else ():
            yield (f"agent {agent}",), need, {"VMM": "", "AGENT": agent, "IMAGE": ""}


def _missing(node: Expression, symbols: _Symbols) -> Iterator[Expression]:
    """The parts of an `&&` that are not y."""
    if isinstance(node, All):
        for part in node.parts:
            yield from _missing(part, symbols)
    elif node.tri(symbols) < Y:
        yield node


def _names(text: str) -> list[str]:
    return [name for name in dict.fromkeys(parse(text).names()) if name not in _CONTEXT and not name.isdigit()]


_CONTEXT: Final = frozenset(("VMM", "AGENT", "IMAGE", "KERNEL_VERSION"))


class _Symbols:
    """A finished configuration, as expressions ask for it."""

    def __init__(self, values: Mapping[str, str], context: Mapping[str, str]) -> None:
        self._values, self._context = values, context

    def tri(self, name: str) -> int:
        value = self._values.get(f"CONFIG_{name}", "n")
        return LETTERS.index(value) if value in ("n", "m", "y") else N

    def text(self, name: str) -> str:
        if name in self._context or name.isdigit():
            return self._context.get(name, name)
        return self._values.get(f"CONFIG_{name}", "n").strip('"')

    def number_base(self, name: str) -> int | None:
        return 0 if name in self._context or name.isdigit() else None

    def modules(self) -> int:
        return M


def _version(text: str) -> str:
    """6.12 as 6012; of a configuration that does not say, the newest there could be."""
    found = _RELEASE.search(text)
    return str(int(found[1]) * 1000 + int(found[2])) if found else "999999"


def read_config(path: Path) -> str:
    """The text of a .config: a file, a directory that has one, or a kernel that carries one (CONFIG_IKCONFIG)."""
    if path.is_dir():
        for name in ("config", ".config"):
            if (path / name).is_file():
                path = path / name
                break
        else:
            raise InputError(f"{path} has neither a config nor a .config")
    try:
        with path.open("rb") as file:
            data = file.read(_MOST)
    except OSError as problem:
        raise InputError(f"cannot read {path}: {problem.strerror}") from None
    if data[:2] == b"\x1f\x8b":  # /proc/config.gz, saved
        return _unpacked(data, path)
    at = data.find(_BEGINS + b"\x1f\x8b")
    if at >= 0:
        return _unpacked(data[at + len(_BEGINS) :], path)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        raise InputError(
            f"{path} is no configuration, and no kernel that carries one",
            hint="a .config, a directory of ours, or an uncompressed vmlinux with CONFIG_IKCONFIG",
        ) from None


def _unpacked(data: bytes, path: Path) -> str:
    try:
        unpacker = zlib.decompressobj(zlib.MAX_WBITS | 16)
        unpacked = unpacker.decompress(data, _MOST)
        if not unpacker.eof:
            what = f"it has more than {_MOST} bytes" if len(unpacked) == _MOST else "it is cut off"
            raise InputError(f"{path}: its configuration is damaged: {what}")
        return unpacked.decode("utf-8")
    except (zlib.error, UnicodeDecodeError) as problem:
        raise InputError(f"{path}: its configuration is damaged: {problem}") from None


def lines(found: Checked) -> list[str]:
    """A check for people: a line for each need that is not met, and how many there were."""
    text = [f"not met: {each}" for each in found.unmet]
    kernel = f"Linux {found.release}, " if found.release else ""
    return [*text, f"{kernel}{found.config}: {found.count} needs checked, {len(found.unmet)} not met"]


def split(words: Sequence[str]) -> tuple[str, ...]:
    """`--vmm qemu,firecracker --vmm microvm` as names."""
    return tuple(dict.fromkeys(name for word in words for name in word.split(",") if name))
