"""The initramfs reader on archives of GNU cpio, on our own, on several in a row, and on damaged ones."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import random
import re
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from osbuild import command, cpio_reader, initrd, zstd
from osbuild.borrowed import Borrowed
from osbuild.cpio_reader import Archive
from osbuild.errors import InputError
from osbuild.limits import Limits
from osbuild.tree import Draft, Entry, Slice, Tree, device, directory, regular, symlink
from tests.random_trees import random_tree
from tests.test_ext4_reader import everything


def read(path: Path, limits: Limits | None = None) -> Archive:
    return cpio_reader.read(Borrowed(path), limits)


def read_bytes(data: bytes, tmp_path: Path) -> Archive:
    (tmp_path / "archive").write_bytes(data)
    return read(tmp_path / "archive")


def archive(**files: Entry) -> bytes:
    return b"".join(initrd.archive(tree(**files)))


def tree(**files: Entry) -> Tree:
    draft = Draft()
    draft.put("/", directory(mtime_ns=0))
    for name, entry in files.items():
        draft.put("/" + name.replace("__", "/"), entry)
    return draft.tree()


def as_archived(source: Tree) -> dict[str, tuple[object, ...]]:
    """What newc holds of a tree: no attributes, no sockets, whole seconds from 1970 to 2106."""
    found = {}
    for path, row in everything(source).items():
        if not stat.S_ISSOCK(source[path].mode):
            seconds = min(max((source[path].mtime_ns or 0) // 10**9, 0), 2**32 - 1)
            found[path] = (*row[:4], seconds * 10**9, {}, *row[6:])
    return found


@pytest.mark.parametrize("seed", range(60))
def test_reading_what_we_wrote_gives_the_tree(seed: int, tmp_path: Path) -> None:
    draft = random_tree(seed).edit()
    draft.remove("/TRAILER!!!")
    source = draft.tree()
    found = read_bytes(b"".join(initrd.archive(source)), tmp_path)
    assert found.problems == ()
    assert everything(found.tree) == as_archived(source)


def test_what_gnu_cpio_wrote_is_what_lay_in_the_directory(tmp_path: Path) -> None:
    root = tmp_path / "source"
    (root / "sub/deep").mkdir(parents=True)
    (root / "sub/file").write_bytes(b"hello")
    (root / "sub/deep/link").symlink_to("../file")
    os.link(root / "sub/file", root / "sub/other")
    os.mkfifo(root / "pipe", 0o600)
    os.utime(root / "sub/file", (5, 1_000_000_000))
    names = "".join(f"{path.relative_to(root)}\n" for path in [root, *sorted(root.rglob("*"))])
    for kind in ("newc", "crc"):
        made = subprocess.run(
            [command.find("cpio"), "-o", "-H", kind, "--quiet"],
            cwd=root,
            input=names.encode(),
            capture_output=True,
            check=True,
        ).stdout
        found = read_bytes(made, tmp_path)
        assert found.problems == ()
        assert list(found.tree) == [
            "/", "/pipe", "/sub", "/sub/deep", "/sub/deep/link", "/sub/file", "/sub/other",
        ]  # fmt: skip
        assert found.tree["/sub/file"] is found.tree["/sub/other"]
        assert b"".join(found.tree["/sub/file"].content.chunks()) == b"hello"
        assert found.tree["/sub/file"].mtime_ns == 10**18
        assert found.tree["/sub/deep/link"].target == "../file"
        assert found.tree["/pipe"].mode == stat.S_IFIFO | 0o600


def _zstd(data: bytes) -> bytes:
    compressor = zstd.compressor(3)
    return bytes(compressor.compress(data) + compressor.flush())


@pytest.mark.parametrize(
    ("kind", "compress"),
    [
        ("gzip", gzip.compress),
        ("zstd", lambda data: _zstd(data)),
        ("xz", lambda data: lzma.compress(data, check=lzma.CHECK_CRC32)),
        ("bzip2", bz2.compress),
        ("lz4", lambda data: subprocess.run(["lz4", "-l", "-c"], input=data, capture_output=True, check=True).stdout),
    ],
    ids=["gzip", "zstd", "xz", "bzip2", "lz4"],
)  # fmt: skip
def test_every_compression_is_read(kind: str, compress: Callable[[bytes], bytes], tmp_path: Path) -> None:
    plain = archive(init=regular(b"#!/bin/sh\n", 0o755), big=regular(bytes(range(256)) * 40_000))
    packed = compress(plain)
    found = read_bytes(packed, tmp_path)
    assert found.problems == ()
    assert [part.compression for part in found.parts] == [kind]
    assert found.unpacked == len(plain)
    assert found.parts[0].size == len(packed)
    assert found.tree["/big"].content.size == 256 * 40_000


def test_archives_in_a_row_lie_over_each_other(tmp_path: Path) -> None:
    early = archive(kernel__x86__microcode=regular(b"code"), init=regular(b"old"))
    main = archive(init=regular(b"new", 0o755))
    late = archive(etc=directory(mtime_ns=0), etc__added=regular(b"x"))
    packed = subprocess.run(["lz4", "-l", "-c"], input=late, capture_output=True, check=True).stdout
    row = early + bytes(512) + gzip.compress(main) + bytes(7) + packed
    found = read_bytes(row, tmp_path)
    assert found.problems == ()
    assert [part.compression for part in found.parts] == ["none", "gzip", "lz4"]
    assert b"".join(found.tree["/init"].content.chunks()) == b"new"
    assert {"/kernel/x86/microcode", "/etc/added"} <= set(found.tree)


def test_a_plain_archive_stays_where_it_is(tmp_path: Path) -> None:
    content = read_bytes(archive(init=regular(b"bytes")), tmp_path).tree["/init"].content
    assert isinstance(content, Slice)
    assert isinstance(content.spool, Borrowed)


def test_devices_and_owners_come_back(tmp_path: Path) -> None:
    owned = Entry(mode=stat.S_IFREG | 0o4711, uid=2**32 - 2, gid=100_000, mtime_ns=0)
    found = read_bytes(archive(null=device(stat.S_IFCHR, 0o666, 1, 3), owned=owned), tmp_path).tree
    assert (found["/null"].major, found["/null"].minor) == (1, 3)
    assert (found["/owned"].uid, found["/owned"].gid, found["/owned"].mode) == (owned.uid, owned.gid, owned.mode)


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"", "no cpio archive"),
        (bytes(1000), "no cpio archive"),
        (b"\x7fELF whatever", "begins neither"),
        (b"070707" + b"0" * 200, "begins neither"),
        (gzip.compress(b"a text"), "where an archive should begin"),
        (b"\x1f\x8b" + b"x" * 100, "damaged gzip data"),
        (b"070701zz", "no header"),
    ],
    ids=["nothing", "zeros", "a program", "an old cpio", "a compressed text", "no gzip", "half a header"],
)  # fmt: skip
def test_what_is_no_initramfs_is_refused_with_a_reason(data: bytes, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=sentence):
        read_bytes(data, tmp_path)


def member(name: bytes, mode: int = 0o100644, body: bytes = b"", links: int = 1) -> bytes:
    head = b"070701" + b"%08x" * 13 % (1, mode, 0, 0, links, 0, len(body), 0, 0, 0, 0, len(name) + 1, 0) + name + b"\0"
    return head + bytes(-len(head) % 4) + body + bytes(-len(body) % 4)


@pytest.mark.parametrize(
    ("odd", "sentence"),
    [
        (member(b"../up"), r"a path with \.\."),
        (member(b"no/parent"), "does not come before it"),
        (member(b"n" * 256), "more than 255 bytes"),
        (member(b"odd", 0o170644), "no type of file"),
        (member(b"link", 0o120777), "a target of 0 bytes"),
        (member(b"link", 0o120777, b"a\0b"), "zeros in it"),
        (member(b"pipe", 0o010644, b"data"), "no regular file"),
        (member(b"z\0z"), "zero byte"),
        (member(b"init/below"), "does not come before it"),
    ],
    ids=[
        "up", "no parent", "long", "no type", "empty link", "zero in a link", "a fifo with bytes", "zero in a name",
        "under a file",
    ],
)  # fmt: skip
def test_what_the_kernel_would_leave_out_is_said(odd: bytes, sentence: str, tmp_path: Path) -> None:
    found = read_bytes(member(b"init", body=b"x") + odd + member(b"TRAILER!!!", 0), tmp_path)
    assert list(found.tree) == ["/", "/init"]
    assert len(found.problems) == 1
    assert re.search(sentence, found.problems[0]), found.problems


def test_an_archive_without_a_trailer_is_said(tmp_path: Path) -> None:
    assert "without its trailer" in read_bytes(member(b"init"), tmp_path).problems[0]


def test_a_bomb_is_refused(tmp_path: Path) -> None:
    (tmp_path / "archive").write_bytes(gzip.compress(archive(big=regular(bytes(3 << 20)))))
    with pytest.raises(InputError, match="more than 1048576 bytes"):
        read(tmp_path / "archive", Limits(image_bytes=1 << 20))


def test_more_entries_than_allowed_are_refused(tmp_path: Path) -> None:
    (tmp_path / "archive").write_bytes(b"".join(member(b"%d" % number) for number in range(20)))
    with pytest.raises(InputError, match="more than 10 entries"):
        read(tmp_path / "archive", Limits(entries=10))


SAMPLE = archive(
    init=regular(b"#!/bin/sh\n", 0o755), sub=directory(0o700), sub__link=symlink("x"),
    null=device(stat.S_IFCHR, 0o666, 1, 3),
)  # fmt: skip
SAMPLES = [SAMPLE, gzip.compress(SAMPLE), SAMPLE + bytes(512) + gzip.compress(SAMPLE)]


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(which=st.sampled_from(SAMPLES), seed=st.integers(0, 2**32), flips=st.integers(0, 6), cut=st.booleans())
def test_no_damage_makes_it_crash(which: bytes, seed: int, flips: int, cut: bool, tmp_path: Path) -> None:
    chance = random.Random(seed)
    data = bytearray(which)
    for _ in range(flips):
        data[chance.randrange(len(data))] ^= chance.randrange(1, 256)
    if cut:
        del data[chance.randrange(len(data)) :]
    try:
        found = read_bytes(bytes(data), tmp_path)
    except InputError:
        return
    for entry in found.tree.values():
        assert sum(map(len, entry.content.chunks())) == entry.content.size


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    data=st.binary(max_size=300),
    magic=st.sampled_from([b"", b"070701", b"\x1f\x8b\x08", b"\x28\xb5\x2f\xfd", b"\x02\x21\x4c\x18"]),
)
def test_no_bytes_make_it_crash(data: bytes, magic: bytes, tmp_path: Path) -> None:
    try:
        read_bytes(magic + data, tmp_path)
    except InputError as problem:
        assert "\n" not in str(problem)  # noqa: PT017
