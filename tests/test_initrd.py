"""The initramfs writer, read by GNU cpio and zstd."""

from __future__ import annotations

import os
import resource
import stat
import subprocess
from pathlib import Path

import pytest

from osbuild import command, initrd
from osbuild.artifacts import Rootfs
from osbuild.errors import HostError, InputError, SpecError
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


def test_an_init_is_found_through_links(tmp_path: Path) -> None:
    entries = {
        "/": directory(), "/init": symlink("a/../b/./init"), "/a": directory(), "/b": symlink("/c"), "/c": directory(),
        "/c/init": symlink("../../../real"), "/real": regular(b"#!", 0o755),
    }  # fmt: skip
    initrd.check(Tree(entries))
    for change in ({"/a": regular(b"")}, {"/b": symlink("b")}, {"/c/init": symlink("/real/x")}):
        with pytest.raises(InputError, match=r"^/init"):
            initrd.check(Tree(entries | change))


NODE = stat.S_IFCHR | 0o600


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        (symlink(""), "symbolic link to nothing"),
        (symlink("t" * 4096), "more than 4095 bytes"),
        (symlink("a\0b"), "NUL"),
        (Entry(mode=NODE, major=4096), "device 4096:0"),
        (Entry(mode=NODE, minor=1 << 20), "device 0:1048576"),
        (Entry(mode=stat.S_IFREG, uid=(1 << 32) - 1), "owner 4294967295:0"),
        (Entry(mode=stat.S_IFREG, gid=-1), "owner 0:-1"),
        (Entry(mode=0o644), "mode 644"),
        (Entry(mode=stat.S_IFREG | 0o644 | 1 << 16), "mode 300644"),
    ],
)  # fmt: skip
def test_what_the_kernel_would_leave_out_or_change_is_refused_by_name(entry: Entry, said: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"^'/odd': .*{said}"):
        build_initrd(rootfs(odd=entry), tmp_path / "i")
    assert not (tmp_path / "i").exists()


def test_a_name_that_the_kernel_would_skip_is_refused(tmp_path: Path) -> None:
    build_initrd(rootfs(**{"n" * 255: regular(b"")}), tmp_path / "i")
    with pytest.raises(InputError, match="255 bytes"):
        build_initrd(rootfs(**{"n" * 256: regular(b"")}), tmp_path / "i")


def test_the_largest_numbers_are_held(tmp_path: Path) -> None:
    most = (1 << 32) - 2
    node = Entry(mode=NODE, uid=most, gid=most, major=4095, minor=(1 << 20) - 1, mtime_ns=(1 << 40) * 10**9)
    made = build_initrd(rootfs(node=node), tmp_path / "i", compress="none")
    assert b"%08x" % most * 2 + b"%08x" % 1 + b"ffffffff" in made.file.path.read_bytes()


def test_what_is_left_out_is_counted(tmp_path: Path) -> None:
    sock = Entry(mode=stat.S_IFSOCK | 0o600, xattrs={"user.a": b"1"})
    odd = Entry(mode=stat.S_IFREG, xattrs={"user.a": b"1"})
    made = build_initrd(rootfs(sock=sock, odd=odd, same=odd), tmp_path / "i", compress="none")
    assert (made.skipped, made.lost_xattrs, made.entries) == (1, 1, 4)
    assert b"sock" not in made.file.path.read_bytes()


@pytest.mark.parametrize("kind", initrd.COMPRESSIONS)
def test_a_full_disk_leaves_nothing_and_says_so(kind: str, tmp_path: Path) -> None:
    noise = regular(os.urandom(20 << 20))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
    try:
        with pytest.raises(HostError, match=r"cannot write.*File too large"):
            build_initrd(rootfs(noise=noise), tmp_path / "i", compress=kind)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.iterdir())


def test_without_lz4_the_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "find", _missing)
    with pytest.raises(HostError, match="lz4 is not installed"):
        build_initrd(rootfs(), tmp_path / "i", compress="lz4")
    assert not list(tmp_path.iterdir())


def _missing(program: str, *, package: str = "") -> str:
    raise HostError(f"{program} is not installed", hint=f"apt-get install {package}")


def test_an_lz4_that_fails_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "lz4").write_text("#!/bin/sh\nexit 3\n")
    (programs / "lz4").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    (tmp_path / "out").mkdir()
    for content in (b"", os.urandom(4 << 20)):
        with pytest.raises(HostError, match="lz4 ended with 3"):
            build_initrd(rootfs(a=regular(content)), tmp_path / "out/i", compress="lz4")
        assert not list((tmp_path / "out").iterdir())
