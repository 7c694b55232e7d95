"""kernel-configs/versions.toml: which kernel sources are pinned, and whose signatures count."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final

from osbuild.errors import InputError
from osbuild.resources import resource

VERSIONS: Final = "kernel-configs/versions.toml"
KEYS: Final = "kernel-configs/keys"
_SHA256: Final = re.compile(r"[0-9a-f]{64}")
_FINGERPRINT: Final = re.compile(r"[0-9A-F]{40}")
_SOURCES: Final = ("debian", "kernel.org")


@dataclass(frozen=True, slots=True, kw_only=True)
class Pin:
    """One source that is known by name."""

    series: str  # 6.12: which patches and tolerated losses belong to it
    version: str  # as its publisher writes it
    source: str  # of _SOURCES: who published it; a kernel.org tarball's signature is checked, too
    file: Path
    sha256: str
    package: str = ""  # Debian's, that has the file


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """Somebody whose signature on a tarball counts."""

    name: str
    fingerprint: str  # of the primary key, 40 hex digits


@dataclass(frozen=True, slots=True, kw_only=True)
class Pins:
    """All of the file."""

    default: str  # a name of `kernels`
    kernels: Mapping[str, Pin]
    keys: tuple[Key, ...]


def read_pins() -> Pins:
    """What this installation pins."""
    path = resource(VERSIONS)
    return parse_pins(path.read_text(encoding="utf-8"), str(path))


def default_file() -> Path:
    """The tarball that is built when nobody names a source."""
    pins = read_pins()
    return pins.kernels[pins.default].file


def parse_pins(text: str, where: str) -> Pins:
    """The pins of a versions.toml, every word checked."""
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as problem:
        raise InputError(f"{where} is not TOML: {problem}") from None
    kernels = {name: _pin(row, f"{where}: [kernel.{name}]") for name, row in document.get("kernel", {}).items()}
    default = document.get("default", "")
    if default not in kernels:
        raise InputError(f"{where}: default = {default!r} is no kernel of it", hint=f"one of {', '.join(kernels)}")
    keys = tuple(Key(**_texts(row, Key, f"{where}: [[key]]")) for row in document.get("key", ()))
    for key in keys:
        if not _FINGERPRINT.fullmatch(key.fingerprint):
            raise InputError(f"{where}: {key.fingerprint!r} is not a fingerprint: 40 hex digits, in capitals")
    return Pins(default=default, kernels=kernels, keys=keys)


def _pin(row: Any, where: str) -> Pin:
    texts = _texts(row, Pin, where)
    if not _SHA256.fullmatch(texts["sha256"]):
        raise InputError(f"{where}: {texts['sha256']!r} is not a sha256: 64 hex digits")
    if texts["source"] not in _SOURCES:
        raise InputError(f"{where}: no source {texts['source']!r}", hint=f"one of {', '.join(_SOURCES)}")
    file = Path(texts.pop("file"))
    return Pin(file=file, **texts)


def _texts(row: Any, kind: type, where: str) -> dict[str, str]:
    """A table with the fields of `kind`: all that have no default, no others, and texts only."""
    known = {field.name: field for field in fields(kind)}
    if not isinstance(row, dict):
        raise InputError(f"{where} is not a table")
    for name, value in row.items():
        if name not in known or not isinstance(value, str):
            raise InputError(f"{where}: {name} = {value!r} is no word of it", hint=f"texts: {', '.join(known)}")
    optional = {"package"}
    missing = [name for name in known if name not in row and name not in optional]
    if missing:
        raise InputError(f"{where} has no {', '.join(missing)}")
    return dict(row)
