"""Packages in a tree: dpkg-query is asked the same; apk's files are made by their format."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import pytest

from osbuild.packages import Inventory, Package, installed_packages
from osbuild.tree import Bytes, Draft, Tree, directory, regular, symlink
from tests.layer_tools import opened

DEBIAN: Final = Path("~/.cache/osbuilder/images/debian-1").expanduser()


def tree(files: Mapping[str, bytes | str]) -> Tree:
    """Files by path; "-> there" makes a link."""
    draft = Draft()
    for path, data in files.items():
        if isinstance(data, str) and data.startswith("-> "):
            draft.put(path, symlink(data[3:]))
        else:
            draft.put(path, regular(data if isinstance(data, bytes) else data.encode()))
    return draft.tree()


def inventory(files: Mapping[str, bytes | str]) -> Inventory:
    return installed_packages(tree(files))


# os-release


@pytest.mark.parametrize(
    "files",
    [
        {"/etc/os-release": "ID=toy\nVERSION_ID=1.2\n"},
        {"/etc/os-release": "# x\nNAME='A B'\nID='toy'\nVERSION_ID=\"1.2\"\n"},
        {"/usr/lib/os-release": "ID=toy\nVERSION_ID=1.2"},
        {"/etc/os-release": "-> ../usr/lib/os-release", "/usr/lib/os-release": "ID=toy\nVERSION_ID=1.2\n"},
        {"/etc/os-release": "-> /nowhere", "/usr/lib/os-release": "ID=toy\nVERSION_ID=1.2\n"},
    ],
    ids=["plain", "quoted", "in usr", "linked", "dangling"],
)
def test_the_distribution_is_read(files: Mapping[str, str]) -> None:
    found = inventory(files)
    assert (found.distro, found.distro_version, found.manager, found.packages, found.notes) == (
        "toy",
        "1.2",
        "",
        (),
        (),
    )


def test_a_link_out_of_the_tree_stays_in_it() -> None:
    assert inventory({"/etc/os-release": "-> ../../../../etc/os-release"}).distro == ""
    assert inventory({"/etc/os-release": "-> ../../../x", "/x": "ID=inside\n"}).distro == "inside"


def test_an_identity_with_escape_codes_is_none() -> None:
    assert inventory({"/etc/os-release": "ID=\x1b[2J\n"}).distro == ""


# dpkg


def test_debian_has_what_dpkg_query_says(tmp_path: Path) -> None:
    if not DEBIAN.exists() or shutil.which("dpkg-query") is None:
        pytest.skip(f"needs dpkg-query, and an image at {DEBIAN}")
    image = opened(f"oci:{DEBIAN}").tree
    for path, entry in image.items():
        if path.startswith("/var/lib/dpkg/") and (entry.is_file or entry.is_dir):
            place = tmp_path / path.removeprefix("/var/lib/dpkg/")
            place.parent.mkdir(parents=True, exist_ok=True)
            if entry.is_file:
                place.write_bytes(b"".join(entry.content.chunks()))
            else:
                place.mkdir(exist_ok=True)
    form = "${Package}|${Version}|${Architecture}|${source:Package}|${source:Version}|${Maintainer}\n"
    argv = ["dpkg-query", f"--admindir={tmp_path}", "-W", "-f", form]
    theirs = subprocess.run(argv, capture_output=True, text=True, check=True).stdout.splitlines()
    found = installed_packages(image)
    ours = [
        f"{one.name}|{one.version}|{one.arch}|{one.source}|{one.source_version}|{one.maintainer}"
        for one in found.packages
    ]
    assert sorted(ours) == sorted(theirs)
    assert list(found.packages) == sorted(found.packages)
    assert len(ours) > 50
    assert (found.distro, found.distro_version, found.manager, found.notes) == ("debian", "12", "dpkg", ())


STATUS: Final = """\
Package: one
Status: install ok installed
Maintainer: A <a@example.com>
Architecture: amd64
Source: first (1:2-3)
Version: 1:2-3+b1
Description: short
 Package: nothing
 .
 more

Package: gone
Status: deinstall ok config-files
Architecture: amd64
Version: 1

Package: waits
Status: install ok triggers-pending
Architecture: all
Version: 4
"""


def test_dpkg_counts_what_is_installed() -> None:
    found = inventory({"/var/lib/dpkg/status": STATUS})
    assert found.packages == (
        Package(
            name="one", version="1:2-3+b1", arch="amd64", source="first", source_version="1:2-3",
            maintainer="A <a@example.com>",
        ),
        Package(name="waits", version="4", arch="all", source="waits", source_version="4"),
    )  # fmt: skip
    assert (found.manager, found.notes) == ("dpkg", ())


def test_distroless_images_have_their_packages_in_pieces() -> None:
    piece = "Package: {0}\nVersion: 1\nArchitecture: amd64\n"
    found = inventory({
        "/var/lib/dpkg/status.d/b": piece.format("b"), "/var/lib/dpkg/status.d/a": piece.format("a"),
        "/var/lib/dpkg/status.d/a.md5sums": piece.format("no"),
    })  # fmt: skip
    assert [one.name for one in found.packages] == ["a", "b"]


def test_a_package_that_is_half_there_is_a_note() -> None:
    text = "Package: half\nStatus: install ok unpacked\nVersion: 1\nArchitecture: all\n"
    found = inventory({"/var/lib/dpkg/status": text})
    assert found.packages == ()
    assert found.notes == ("dpkg has not finished installing 1 packages, which are left out: 'half'",)


def test_a_journal_of_dpkg_is_a_note() -> None:
    assert "'/var/lib/dpkg/updates' holds changes" in inventory({"/var/lib/dpkg/updates/0001": "x"}).notes[0]


@pytest.mark.parametrize(
    "name", ["a b", "a\x1b[31m", "", "x" * 2000, "a\u202eb", b"\xff".decode(errors="surrogateescape")]
)
def test_a_name_that_is_none_is_a_note(name: str) -> None:
    text = f"Package: {name}\nVersion: 1\nArchitecture: all\n".encode(errors="surrogateescape")
    found = inventory({"/var/lib/dpkg/status": text})
    assert found.packages == ()
    assert "impossible name or version" in found.notes[0]
    assert found.notes[0].isascii()
    assert found.notes[0].isprintable()


def test_thousands_of_broken_packages_are_a_few_notes() -> None:
    text = "".join(f"Package: {number} x\nVersion: 1\nArchitecture: all\n\n" for number in range(5000))
    notes = inventory({"/var/lib/dpkg/status": text}).notes
    assert len(notes) == 21
    assert notes[-1] == "and 4980 more things of this kind"


def test_too_large_a_database_is_a_note() -> None:
    class Huge(Bytes):
        @property
        def size(self) -> int:
            return 1 << 40

    draft = Draft()
    for path in ("/var/lib/dpkg/status", "/lib/apk/db/installed", "/var/lib/rpm/rpmdb.sqlite", "/etc/os-release"):
        draft.put(path, regular(Huge(b"")))
    assert len(installed_packages(draft.tree()).notes) == 4


# apk


APK: Final = """\
C:Q1p78yvTLG094tHE1+dToJGbmYzQE=
P:musl
V:1.2.5-r0
A:x86_64
S:407278
I:667648
T:the musl c library (libc) implementation
U:https://musl.libc.org/
L:MIT
o:musl
m:Timo Teräs <timo.teras@iki.fi>
t:1710261153
c:46ffad1d
p:so:libc.musl-x86_64.so.1=1
F:lib
R:ld-musl-x86_64.so.1
a:0:0:755
Z:Q1+qr

P:musl-utils
V:1.2.5-r0
A:x86_64
L:MIT AND BSD-2-Clause AND GPL-2.0-or-later
o:musl
"""


@pytest.mark.parametrize("path", ["/lib/apk/db/installed", "/usr/lib/apk/db/installed"])
def test_alpines_packages_are_read(path: str) -> None:
    found = inventory({path: APK, "/etc/os-release": "ID=alpine\nVERSION_ID=3.20.0\n"})
    assert [(one.name, one.version, one.arch, one.source, one.license) for one in found.packages] == [
        ("musl", "1.2.5-r0", "x86_64", "musl", "MIT"),
        ("musl-utils", "1.2.5-r0", "x86_64", "musl", "MIT AND BSD-2-Clause AND GPL-2.0-or-later"),
    ]
    assert (found.manager, found.distro, found.notes) == ("apk", "alpine", ())
    assert found.packages[0].maintainer == "Timo Teräs <timo.teras@iki.fi>"


def test_an_alpine_with_its_lib_in_usr_is_read_once() -> None:
    draft = Draft()
    draft.put("/usr/lib", directory())
    draft.put("/lib", symlink("usr/lib"))
    draft.put("/usr/lib/apk/db/installed", regular(APK.encode()))
    assert len(installed_packages(draft.tree()).packages) == 2


def test_a_second_package_manager_is_a_note() -> None:
    found = inventory(
        {"/lib/apk/db/installed": APK, "/var/lib/dpkg/status": STATUS + "\n" + STATUS.replace("one", "two")}
    )
    assert (found.manager, len(found.packages)) == ("dpkg", 3)
    assert found.notes == ("apk has 2 packages, too; these are left out, for dpkg has more",)
