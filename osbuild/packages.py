"""Which packages are in a tree: read from the databases of dpkg, apk and rpm, which lie in it, and from os-release.

dpkg   /var/lib/dpkg/status, and /var/lib/dpkg/status.d/* where there is no dpkg    paragraphs of `Field: value`
apk    /lib/apk/db/installed                                                        paragraphs of `P:value`
rpm    /var/lib/rpm, /usr/lib/sysimage/rpm, /usr/share/rpm                          osbuild.rpmdb

Sources: deb-control(5), dpkg-query(1); apk's "APK spec"; os-release(5). Nothing here stops a build: what cannot be read
becomes a note.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from osbuild import rpmdb
from osbuild.errors import InputError
from osbuild.tree import Entry, Tree, quote
from osbuild.view import View

_OS_RELEASE: Final = ("/etc/os-release", "/usr/lib/os-release")
_DPKG: Final = "/var/lib/dpkg"
_APK: Final = ("/lib/apk/db/installed", "/usr/lib/apk/db/installed")
_RPM: Final = ("/var/lib/rpm", "/usr/lib/sysimage/rpm", "/usr/share/rpm")

_TEXT_MAX: Final = 32 << 20  # bytes of a database in text; dpkg's takes about 1 KiB for a package
_PACKAGES_MAX: Final = 50_000
_WORD_MAX: Final = 512  # characters of a name or version
_LINE_MAX: Final = 1024  # characters of a licence or maintainer
# dpkg has unpacked and configured these; the last two have still to tell, or to be told by, another package.
_INSTALLED: Final = ("installed", "triggers-awaited", "triggers-pending")
_DPKG_FIELDS: Final = frozenset(("Package", "Version", "Architecture", "Status", "Source", "Maintainer"))
_APK_FIELDS: Final = frozenset("PVALom")
_PARTLY: Final = ("half-installed", "unpacked", "half-configured")


@dataclass(frozen=True, slots=True, order=True, kw_only=True)
class Package:
    """One installed package. `source` is what it was built from: itself, where the database names nothing else."""

    name: str
    version: str  # as its package manager writes it: with epoch and release
    arch: str
    source: str
    source_version: str
    license: str = ""
    maintainer: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Inventory:
    """What a tree says is in it."""

    distro: str = ""  # ID of os-release
    distro_version: str = ""  # VERSION_ID
    manager: str = ""  # "dpkg", "apk", "rpm"; empty when there is none
    packages: tuple[Package, ...] = ()  # sorted
    notes: tuple[str, ...] = ()  # a sentence for each thing that could not be read


def installed_packages(tree: Tree) -> Inventory:
    """What is installed, by the word of the databases in the tree."""
    view, notes = View(tree), _Notes()
    release = _os_release(view, notes)
    found = {
        manager: sorted(set(packages))
        for manager, packages in (("dpkg", _dpkg(view, notes)), ("apk", _apk(view, notes)), ("rpm", _rpm(view, notes)))
    }
    manager = max(found, key=lambda name: len(found[name]))
    for other, packages in found.items():
        if other != manager and packages:
            notes.add(f"{other} has {len(packages)} packages, too; these are left out, for {manager} has more")
    return Inventory(
        distro=release.get("ID", ""), distro_version=release.get("VERSION_ID", ""),
        manager=manager if found[manager] else "", packages=tuple(found[manager]), notes=notes.all(),
    )  # fmt: skip


def distribution(tree: Tree) -> dict[str, str]:
    """Name and version by os-release, as far as it tells them."""
    release = _os_release(View(tree), _Notes())
    return {name: release[key] for name, key in (("name", "ID"), ("version", "VERSION_ID")) if release.get(key)}


class _Notes:
    """Sentences, each said once; a hostile database does not get to say thousands."""

    _MAX: Final = 20

    def __init__(self) -> None:
        self._said: list[str] = []
        self._unsaid = 0

    def add(self, sentence: str) -> None:
        if len(self._said) == self._MAX:
            self._unsaid += 1
        elif sentence not in self._said:
            self._said.append(sentence)

    def all(self) -> tuple[str, ...]:
        more = [f"and {self._unsaid} more things of this kind"] if self._unsaid else []
        return (*self._said, *more)


def _os_release(view: View, notes: _Notes) -> Mapping[str, str]:
    for path in _OS_RELEASE:
        try:
            text = view.text(path)
        except InputError as problem:
            notes.add(str(problem))
            continue
        if text is not None:
            pairs = (line.strip().partition("=") for line in text.splitlines())
            return {key: value for key, _, raw in pairs if _plain(value := _unquote(raw), _WORD_MAX)}
    return {}


def _unquote(value: str) -> str:
    """A value as a shell would read it: quotes around it, backslashes within."""
    value = value.strip()
    if len(value) > 1 and value[0] == value[-1] == "'":
        return value[1:-1]
    if len(value) > 1 and value[0] == value[-1] == '"':
        return re.sub(r'\\([\\"$`])', r"\1", value[1:-1])
    return value


def _dpkg(view: View, notes: _Notes) -> list[Package]:
    parts = (f"{_DPKG}/status.d/{name}" for name in view.names(f"{_DPKG}/status.d") if not name.endswith(".md5sums"))
    paragraphs = (
        fields for path in (f"{_DPKG}/status", *parts) for fields in _paragraphs(view, path, _DPKG_FIELDS, notes)
    )
    if view.names(f"{_DPKG}/updates"):
        notes.add(f"{quote(f'{_DPKG}/updates')} holds changes that dpkg has not yet written to its status file")
    packages, partly = [], []
    for fields in itertools.islice(paragraphs, _PACKAGES_MAX):
        state = fields.get("Status", "install ok installed").split()[-1:]
        if state and state[0] in _PARTLY:
            partly.append(fields.get("Package", ""))
        elif state and state[0] in _INSTALLED:
            packages += _checked(_from_dpkg(fields), "dpkg", notes)
    if partly:
        some = ", ".join(map(quote, partly[:5])) + (" …" if len(partly) > 5 else "")
        notes.add(f"dpkg has not finished installing {len(partly)} packages, which are left out: {some}")
    return packages


def _from_dpkg(fields: Mapping[str, str]) -> Package:
    name, version = fields.get("Package", ""), fields.get("Version", "")
    source, _, theirs = fields.get("Source", name).partition(" ")
    return Package(
        name=name, version=version, arch=fields.get("Architecture", ""),
        source=source, source_version=theirs.strip("() ") or version, maintainer=fields.get("Maintainer", ""),
    )  # fmt: skip


def _apk(view: View, notes: _Notes) -> list[Package]:
    path = next((path for path in _APK if view.get(path) is not None), _APK[0])
    packages = []
    for fields in _paragraphs(view, path, _APK_FIELDS, notes):
        version = fields.get("V", "")
        package = Package(
            name=fields.get("P", ""), version=version, arch=fields.get("A", ""),
            source=fields.get("o", "") or fields.get("P", ""), source_version=version,
            license=fields.get("L", ""), maintainer=fields.get("m", ""),
        )  # fmt: skip
        packages += _checked(package, "apk", notes)
    return packages


def _paragraphs(view: View, path: str, wanted: frozenset[str], notes: _Notes) -> Iterator[dict[str, str]]:
    """The wanted fields of each paragraph; continued lines belong to none."""
    entry = view.get(path)
    if entry is None or not entry.is_file:
        return
    if entry.content.size > _TEXT_MAX:
        notes.add(f"{quote(path)}: {entry.content.size} bytes; at most {_TEXT_MAX} are read")
        return
    fields: dict[str, str] = {}
    count = 0
    for line in _lines(entry):
        if line.strip():
            key, _, value = line.partition(":")
            if key in wanted:
                fields.setdefault(key, value.strip())
        elif fields:
            yield fields
            fields, count = {}, count + 1
            if count == _PACKAGES_MAX:
                notes.add(f"{quote(path)}: only the first {_PACKAGES_MAX} packages are read")
                return
    if fields:
        yield fields


def _lines(entry: Entry) -> Iterator[str]:
    rest = b""
    for chunk in entry.content.chunks():
        *whole, rest = (rest + chunk).split(b"\n")
        for line in whole:
            yield line.decode(errors="surrogateescape")
    yield rest.decode(errors="surrogateescape")


def _rpm(view: View, notes: _Notes) -> list[Package]:
    """The packages of the first database that has any; an image whose database moved has the same one twice."""
    seen = set()
    for home in _RPM:
        for form in rpmdb.FORMATS:
            path = f"{home}/{form}"
            entry = view.get(path)
            if entry is None or not entry.is_file or not entry.content.size or entry in seen:
                continue
            seen.add(entry)
            log = view.get(f"{path}-wal")
            if log is not None and log.content.size:
                notes.add(f"{quote(f'{path}-wal')} holds changes to the database that are not in this list")
            packages = _read_rpm(entry, form, quote(path), notes)
            if packages:
                return packages
    return []


def _read_rpm(entry: Entry, form: str, where: str, notes: _Notes) -> list[Package]:
    packages: list[Package] = []
    try:
        for header in rpmdb.headers(entry.content, form):
            tags = rpmdb.read_header(header)
            if tags.get(rpmdb.NAME) != "gpg-pubkey":  # a key that packages are checked with, kept as if it were one
                packages += _checked(_from_rpm(tags), where, notes)
    except InputError as problem:
        notes.add(f"{where} {problem}; {len(packages)} packages were read before")
    return packages


def _from_rpm(tags: Mapping[int, str]) -> Package:
    version = f"{tags.get(rpmdb.VERSION, '')}-{tags.get(rpmdb.RELEASE, '')}"
    name, epoch = tags.get(rpmdb.NAME, ""), tags.get(rpmdb.EPOCH, "")
    source = re.fullmatch(r"(.+)-([^-]+-[^-]+)\.(?:no)?src\.rpm", tags.get(rpmdb.SOURCERPM, ""))
    return Package(
        name=name, version=f"{epoch}:{version}" if epoch else version, arch=tags.get(rpmdb.ARCH, ""),
        source=source[1] if source else name, source_version=source[2] if source else version,
        license=tags.get(rpmdb.LICENSE, ""), maintainer=tags.get(rpmdb.PACKAGER, "") or tags.get(rpmdb.VENDOR, ""),
    )  # fmt: skip


def _checked(package: Package, where: str, notes: _Notes) -> list[Package]:
    """The package, if its words are words: they end in documents that others read."""
    words = (package.name, package.version, package.source, package.source_version)
    if all(_plain(word, _WORD_MAX) and " " not in word and word for word in (*words, package.arch or "-")):
        return [
            Package(
                name=package.name, version=package.version, arch=package.arch,
                source=package.source, source_version=package.source_version,
                license=package.license if _plain(package.license, _LINE_MAX) else "",
                maintainer=package.maintainer if _plain(package.maintainer, _LINE_MAX) else "",
            )
        ]  # fmt: skip
    notes.add(f"{where} has a package with an impossible name or version: {quote(' '.join(words)[:100])}")
    return []


def _plain(text: str, longest: int) -> bool:
    return len(text) <= longest and text.isprintable()
