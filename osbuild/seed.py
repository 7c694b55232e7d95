"""A NoCloud seed: an ISO of three small files by which cloud-init sets a guest up on its first boot.

    volume id cidata     what cloud-init looks for among a guest's disks
    user-data            who may log in, what to run …
    meta-data            instance-id: another one than last time makes cloud-init do everything again
    network-config       may be missing

Rock Ridge and Joliet hold the names as they are; plain ISO 9660 knows no small letters and no hyphens. pycdlib asks
the clock for every date and the time zone for every hour: here it is given a clock that stands still, in UTC.

Source: cloud-init's documentation of the NoCloud data source and of user-data formats.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import io
import re
import time
import types
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from osbuild import console
from osbuild.artifacts import File
from osbuild.borrowed import Borrowed
from osbuild.errors import InputError, SpecError
from osbuild.output import check_output, write_whole
from osbuild.spec import source_date_epoch
from osbuild.tree import quote

VOLUME: Final = "cidata"
USER_DATA: Final = "user-data"
META_DATA: Final = "meta-data"
NETWORK_CONFIG: Final = "network-config"
# What the first line may begin with, the longer of two that begin alike first; upper case is as good.
HEADERS: Final = (
    "#cloud-config-archive", "#cloud-config-jsonp", "#cloud-config", "#cloud-boothook", "#include-once", "#include",
    "#part-handler", "## template: jinja", "#!",
)  # fmt: skip
SIZE_MAX: Final = 16 << 20  # of one file, unpacked: cloud-init holds several copies of it in the guest's memory

_GZIP: Final = b"\x1f\x8b"
_BOM: Final = "\ufeff"
_MIME: Final = re.compile(rb"mime-version:", re.IGNORECASE)  # in the first 4096 bytes, as cloud-init looks for it
# Where nobody parses YAML.
_INSTANCE_ID: Final = re.compile(r"""^[{\s]*["']?instance-id["']?\s*:\s*["']?([^"',}\s#]+)""", re.MULTILINE)
_ISO_NAMES: Final = {USER_DATA: "/USERDATA.;1", META_DATA: "/METADATA.;1", NETWORK_CONFIG: "/NETWORK.;1"}
_CLOCKS: Final = ("pycdlib", "headervd", "dates", "utils", "dr", "rockridge")  # modules of pycdlib


@dataclass(frozen=True, slots=True, kw_only=True)
class Seed:
    """A seed that was written."""

    file: File
    instance_id: str  # what cloud-init will take it for
    made: bool  # from the content: nobody gave one
    contents: Mapping[str, bytes]
    yaml: bool  # what is YAML was parsed, not only looked at

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "path": str(self.file.path), "size": self.file.size, "sha256": self.file.sha256, "volume": VOLUME,
            "instance_id": self.instance_id, "instance_id_made": self.made, "yaml_checked": self.yaml,
            "files": {
                name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
                for name, data in self.contents.items()
            },
        }  # fmt: skip

    def lines(self) -> list[str]:
        """For people."""
        lines = [
            f"{self.file.path}  {console.size_text(self.file.size)}  sha256:{self.file.sha256}",
            f"instance-id: {self.instance_id}",
        ]
        if not self.yaml:
            lines.append("PyYAML is not installed: only the first lines were looked at")
        return lines


def write_seed(
    out: Path, user_data: Path, *, meta_data: Path | None = None, network_config: Path | None = None
) -> Seed:
    """Check what a seed is made of, and write it: the same bytes from the same files and SOURCE_DATE_EPOCH."""
    check_output(out)
    epoch = source_date_epoch() or 0
    given = {USER_DATA: user_data, META_DATA: meta_data, NETWORK_CONFIG: network_config}
    contents = {name: _read(path, out) for name, path in given.items() if path is not None}
    yaml = _yaml()
    _check_user_data(contents[USER_DATA], user_data, yaml)
    if network_config is not None:
        _check_network(contents[NETWORK_CONFIG], network_config, yaml)
    if meta_data is not None:
        instance_id = _find_instance_id(contents[META_DATA], meta_data, yaml)
    else:
        instance_id = make_instance_id(contents)
        contents[META_DATA] = f"instance-id: {instance_id}\n".encode()
    contents = {name: contents[name] for name in _ISO_NAMES if name in contents}
    write_whole(out, make_iso(contents, epoch))
    return Seed(
        file=File.of(out), instance_id=instance_id, made=meta_data is None, contents=contents, yaml=yaml is not None
    )


def make_instance_id(contents: Mapping[str, bytes]) -> str:
    """Another one whenever a byte is another."""
    total = hashlib.sha256()
    for name, data in sorted(contents.items()):
        total.update(f"{name} {len(data)}\n".encode() + data)
    return f"iid-{total.hexdigest()[:16]}"


def make_iso(contents: Mapping[str, bytes], epoch: int) -> bytes:
    """The image, whose every date is `epoch`."""
    import pycdlib  # slow to import, and one command needs it

    made = io.BytesIO()
    with _standing_clock(epoch):
        iso = pycdlib.PyCdlib()
        iso.new(interchange_level=3, vol_ident=VOLUME, joliet=3, rock_ridge="1.09")
        for name, data in contents.items():
            iso.add_fp(
                io.BytesIO(data), len(data), _ISO_NAMES[name], rr_name=name, joliet_path=f"/{name}",
                file_mode=0o100444,
            )  # fmt: skip
        iso.write_fp(made)
        iso.close()
    return made.getvalue()


@contextlib.contextmanager
def _standing_clock(epoch: int) -> Iterator[None]:
    """For pycdlib it is `epoch`, and its local time is UTC."""
    clock = types.SimpleNamespace(
        time=lambda: float(epoch), localtime=time.gmtime, gmtime=time.gmtime, strftime=time.strftime,
        strptime=time.strptime, struct_time=time.struct_time,
    )  # fmt: skip
    modules: list[Any] = [importlib.import_module(f"pycdlib.{name}") for name in _CLOCKS]
    modules = [module for module in modules if getattr(module, "time", None) is time]
    for module in modules:
        module.time = clock
    try:
        yield
    finally:
        for module in modules:
            module.time = time


# --- what cloud-init would not take ---------------------------------------------------------------------------------


def _read(path: Path, out: Path) -> bytes:
    try:
        if out.exists() and out.samefile(path):
            raise SpecError(f"{quote(str(out))} would replace what it is made from", hint="name another file with -o")
        source = Borrowed(path)
    except OSError as problem:
        raise InputError(f"cannot read {quote(str(path))}: {problem.strerror}") from None
    if source.size > SIZE_MAX:
        raise InputError(
            f"{quote(str(path))} has {source.size} bytes, more than {SIZE_MAX}",
            hint="have the guest fetch what is large",
        )
    return source.read(0, source.size)


def _check_user_data(data: bytes, path: Path, yaml: Any) -> None:
    if data.startswith(_GZIP):
        data = _unpack(data, path)
    if _MIME.search(data[:4096]):
        return  # parts with types of their own
    text = _text(data, path)
    if not text.strip():
        return  # nothing to do, and cloud-init does that
    header = next((one for one in HEADERS if text.lstrip().lower().startswith(one)), None)
    first = text.lstrip().split("\n", 1)[0]
    if header is None:
        hint = "the first line of a configuration is #cloud-config, of a script #!/bin/sh"
        if text.startswith(_BOM):
            hint = "it begins with a byte order mark: save it as UTF-8 without one"
        raise InputError(f"{quote(str(path))} begins with {quote(first[:40])}, which cloud-init ignores", hint=hint)
    if header == "#!" and first.endswith("\r"):
        message = f"{quote(str(path))} is a script with the line ends of Windows: the guest would not find its program"
        raise InputError(message, hint="sed -i 's/\\r$//' FILE")
    if header == "#cloud-config":
        _check_mapping(data, path, yaml, empty=True)


def _unpack(data: bytes, path: Path) -> bytes:
    unpacker = zlib.decompressobj(wbits=31)
    try:
        found = unpacker.decompress(data, SIZE_MAX + 1)
    except zlib.error as problem:
        raise InputError(f"{quote(str(path))} is damaged gzip: {problem}") from None
    if len(found) > SIZE_MAX:
        raise InputError(f"{quote(str(path))} unpacks to more than {SIZE_MAX} bytes")
    if not unpacker.eof:
        raise InputError(f"{quote(str(path))} is gzip that was cut off")
    return found


def _find_instance_id(data: bytes, path: Path, yaml: Any) -> str:
    document = _check_mapping(data, path, yaml)
    if document is not None:
        found = str(document.get("instance-id") or "")
    else:
        match = _INSTANCE_ID.search(_text(data, path))
        found = match[1] if match else ""
    if not found:
        raise InputError(
            f"{quote(str(path))} has no instance-id: cloud-init would never notice another seed",
            hint="add one, or leave --meta-data out and one is made from the content",
        )
    return found


def _check_network(data: bytes, path: Path, yaml: Any) -> None:
    """Versions 1 and 2, also below a key `network`; or that there is to be none."""
    document = _check_mapping(data, path, yaml)
    if document is None:
        return
    inner = document.get("network", document)
    if not isinstance(inner, dict) or (inner.get("version") not in (1, 2) and inner.get("config") != "disabled"):
        raise InputError(
            f"{quote(str(path))} is no network configuration of version 1 or 2", hint="it needs a line version: 2"
        )


def _check_mapping(data: bytes, path: Path, yaml: Any, *, empty: bool = False) -> dict[Any, Any] | None:
    """What YAML that has to be a mapping says; None when nobody can parse it, or it is empty and may be."""
    text = _text(data, path)
    if yaml is None:
        return None
    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError as problem:
        mark = getattr(problem, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        what = getattr(problem, "problem", None) or str(problem).splitlines()[0]
        raise InputError(f"{quote(str(path))}{where} is no YAML: {quote(str(what))}") from None
    except (RecursionError, ValueError, TypeError) as problem:  # nested too deep, or a date that is none
        raise InputError(f"{quote(str(path))} is no YAML: {type(problem).__name__}") from None
    if found is None and empty:
        return None
    if not isinstance(found, dict):
        kind = "empty" if found is None else f"a {type(found).__name__}"
        raise InputError(f"{quote(str(path))} has to be a mapping, and is {kind}", hint="lines of the kind key: value")
    return found


def _text(data: bytes, path: Path) -> str:
    try:
        text = data.decode()
    except UnicodeDecodeError as problem:
        raise InputError(f"{quote(str(path))} is not UTF-8: byte {problem.start}") from None
    if "\0" in text:
        raise InputError(f"{quote(str(path))} is no text: it has a zero byte at {text.index(chr(0))}")
    return text


def _yaml() -> Any:
    """PyYAML, which may be missing."""
    try:
        return importlib.import_module("yaml")
    except ImportError:
        return None
