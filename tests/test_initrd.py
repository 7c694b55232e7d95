"""The initramfs writer, read by GNU cpio and zstd."""

from __future__ import annotations

import stat
import subprocess
from pathlib import Path

import pytest

from osbuild import initrd
from osbuild.artifacts import Rootfs
from osbuild.errors import InputError, SpecError
from osbuild.initrd import build_initrd
from osbuild.tree import Draft, Entry, Tree, device, directory, regular, symlink
from tests.test_ext4 import _Zeros


def rootfs(**more: Entry) -> Rootfs:
    draft = Draft()
    draft.put("/", directory(mtime_ns=0))
    draft.put("/init", regular(b"#!/bin/sh\n", 0o755))
    for name, entry in more.items():
        draft.put("/" + name, entry)
    return Rootfs(tree=draft.tree(), init="/init", epoch=0)


def unpack(path: Path, out: Path) -> None:
    out.mkdir()
    with path.open("rb") as file:
        subprocess.run(
            ["cpio", "--extract", "--make-directories", "--preserve-modification-time", "--quiet"],
            stdin=file, cwd=out, check=True,
        )  # fmt: skip


def test_cpio_unpacks_what_the_tree_holds(tmp_path: Path) -> None:
    root = rootfs(
        file=regular(b"hello", 0o640, mtime_ns=1_000_000_000 * 10**9), link=symlink("file"), dir=directory(0o700)
    )
    build_initrd(root, tmp_path / "i", compress="none")
    unpack(tmp_path / "i", tmp_path / "out")
    assert (tmp_path / "out/file").read_bytes() == b"hello"
    assert stat.S_IMODE((tmp_path / "out/file").stat().st_mode) == 0o640
    assert (tmp_path / "out/file").stat().st_mtime == 1_000_000_000
    assert (tmp_path / "out/link").readlink() == Path("file")
    assert stat.S_IMODE((tmp_path / "out/dir").stat().st_mode) == 0o700


def test_hard_links_stay_hard_links(tmp_path: Path) -> None:
    draft = rootfs(a=regular(b"shared")).tree.edit()
    draft.link("/b", "/a")
    draft.link("/c", "/a")
    build_initrd(Rootfs(tree=draft.tree(), init="/init", epoch=0), tmp_path / "i", compress="none")
    unpack(tmp_path / "i", tmp_path / "out")
    assert (tmp_path / "out/c").read_bytes() == b"shared"
    assert len({(tmp_path / "out" / name).stat().st_ino for name in "abc"}) == 1


def test_owners_and_devices_are_in_the_listing(tmp_path: Path) -> None:
    root = rootfs(
        null=device(stat.S_IFCHR, 0o666, 1, 3),
        owned=Entry(mode=stat.S_IFREG | 0o600, uid=1234, gid=4321, mtime_ns=0),
    )
    build_initrd(root, tmp_path / "i", compress="none")
    with (tmp_path / "i").open("rb") as file:
        listing = subprocess.run(
            ["cpio", "-tv", "--numeric-uid-gid", "--quiet"], stdin=file, capture_output=True, text=True, check=True
        ).stdout
    assert "crw-rw-rw-" in next(line for line in listing.splitlines() if line.endswith("null"))
    assert "1234     4321" in next(line for line in listing.splitlines() if line.endswith("owned"))


@pytest.mark.parametrize(("kind", "reader"), [("zstd", ["zstd", "-dc"]), ("gzip", ["gzip", "-dc"])])
def test_compressed_it_is_the_same_archive(kind: str, reader: list[str], tmp_path: Path) -> None:
    root = rootfs(big=regular(bytes(range(256)) * 40_000))
    plain = build_initrd(root, tmp_path / "plain", compress="none")
    packed = build_initrd(root, tmp_path / "packed", compress=kind)
    unpacked = subprocess.run([*reader, str(packed.file.path)], capture_output=True, check=True).stdout
    assert unpacked == plain.file.path.read_bytes()
    assert packed.unpacked == plain.file.size == len(unpacked)


def test_the_same_tree_gives_the_same_bytes(tmp_path: Path) -> None:
    first = build_initrd(rootfs(a=regular(b"x" * 9_000_000)), tmp_path / "a")
    second = build_initrd(rootfs(a=regular(b"x" * 9_000_000)), tmp_path / "b")
    assert first.file.sha256 == second.file.sha256


def test_a_root_file_called_like_the_trailer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"TRAILER!!!"):
        build_initrd(rootfs(**{"TRAILER!!!": regular(b"")}), tmp_path / "i")
    assert not (tmp_path / "i").exists()


def test_a_path_that_the_kernel_would_skip_is_refused(tmp_path: Path) -> None:
    draft = rootfs().tree.edit()
    draft.put("/" + "/".join(["d" * 200] * 19), directory())
    draft.put("/l", symlink("/".join(["d" * 200] * 19)))
    draft.put("/l/" + "e" * 200 + "/" + "f" * 200, regular(b""))
    with pytest.raises(InputError, match="4095 bytes"):
        build_initrd(Rootfs(tree=draft.tree(), init="/init", epoch=0), tmp_path / "i")


def test_a_file_of_4_gib_is_refused(tmp_path: Path) -> None:
    huge = Entry(mode=stat.S_IFREG, mtime_ns=0, content=_Zeros(4 << 30))
    with pytest.raises(InputError, match=r"'/huge'.*4 GiB"):
        build_initrd(rootfs(huge=huge), tmp_path / "i")


@pytest.mark.parametrize(
    "init", [None, regular(b"", 0o644), symlink("/nowhere"), directory()],
    ids=["none", "not executable", "a link to nothing", "a directory"],
)  # fmt: skip
def test_without_an_executable_init_it_is_refused(init: Entry | None, tmp_path: Path) -> None:
    entries = {"/": directory()} | ({"/init": init} if init else {})
    with pytest.raises(InputError, match="/init"):
        build_initrd(Rootfs(tree=Tree(entries), init="/init", epoch=0), tmp_path / "i")


def test_an_unknown_compression_names_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(SpecError) as caught:
        build_initrd(rootfs(), tmp_path / "i", compress="rar")
    assert "zstd" in caught.value.hint


def test_every_row_of_compressions_is_written(tmp_path: Path) -> None:
    for kind in initrd.COMPRESSIONS:
        assert build_initrd(rootfs(), tmp_path / kind, compress=kind).file.size > 0
