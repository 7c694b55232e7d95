"""The tar reader: what is right is read exactly, what is odd is refused by name."""

from __future__ import annotations

import random
import shutil
import stat
import subprocess
import tarfile
from pathlib import Path

import pytest

from osbuild import tar
from osbuild.errors import InputError
from osbuild.tree import Sparse
from tests.layer_tools import (
    archive,
    folder,
    hardlink,
    header,
    link,
    member,
    old_sparse,
    padded,
    pax,
    pax_record,
    sparse_archive,
    spooled,
)

END = bytes(1024)


def read(data: bytes, limits: tar.Limits | None = None) -> list[tar.Member]:
    return list(tar.read(spooled(data), 0, len(data), limits))


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_format_that_tarfile_writes_is_read_back(form: int) -> None:
    name = "a/" + "b" * 90 + "/file"
    found = read(
        archive(
            folder("a", mode=0o1777, uid=7, gid=8),
            member(name, b"hello" * 300, mode=0o4755, uid=1000, gid=100),
            link("a/link", "b" * 99),
            hardlink("a/hard", name),
            member("a/dev", type=tarfile.CHRTYPE, devmajor=1, devminor=3),
            member("a/fifo", type=tarfile.FIFOTYPE),
            form=form,
        )
    )
    assert [(m.name, m.kind, m.mode, m.uid, m.gid) for m in found] == [
        ("/a", stat.S_IFDIR, 0o1777, 7, 8),
        ("/" + name, stat.S_IFREG, 0o4755, 1000, 100),
        ("/a/link", stat.S_IFLNK, 0o644, 0, 0),
        ("/a/hard", 0, 0o644, 0, 0),
        ("/a/dev", stat.S_IFCHR, 0o644, 0, 0),
        ("/a/fifo", stat.S_IFIFO, 0o644, 0, 0),
    ]
    assert found[1].size == 1500
    assert found[2].link == "b" * 99
    assert found[3].link == "/" + name
    assert (found[4].major, found[4].minor) == (1, 3)
    assert all(m.mtime_ns == 1_000_000_000 * 10**9 for m in found)


def test_the_bytes_of_a_file_are_where_the_member_says() -> None:
    data = archive(member("one", b"1" * 700), member("two", b"2" * 5))
    one, two = read(data)
    assert data[one.offset : one.offset + one.size] == b"1" * 700
    assert data[two.offset : two.offset + two.size] == b"2" * 5


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_names_longer_than_the_header_are_read(form: int) -> None:
    name, target = "/".join(["d" * 200] * 5), "t" * 3000
    found = read(archive(member(name), link("l", target), form=form))
    assert found[0].name == "/" + name
    assert found[1].link == target


def test_extended_headers_carry_times_ids_and_attributes() -> None:
    records = {"mtime": "1234567890.123456789", "uid": "4294967294", "SCHILY.xattr.user.k": "v\0w"}
    (found,) = read(archive(member("f", pax_headers=records)))
    assert found.mtime_ns == 1234567890_123456789
    assert found.uid == 4294967294
    assert found.xattrs == {"user.k": b"v\0w"}


def test_a_negative_time_in_base_256_is_before_1970() -> None:
    (found,) = read(archive(member("f", mtime=-5), form=tarfile.GNU_FORMAT))
    assert found.mtime_ns == -5 * 10**9


@pytest.mark.parametrize("name", [b"./a//b/./c", b"/a/b/c", b"a/b/c"])
def test_names_are_made_absolute_and_plain(name: bytes) -> None:
    (found,) = read(header(name=name) + END)
    assert found.name == "/a/b/c"


def test_the_root_has_a_name() -> None:
    (found,) = read(header(name=b"./", kind=b"5") + END)
    assert found.name == "/"


def test_names_that_are_no_utf8_survive() -> None:
    (found,) = read(header(name=b"\xff\xfe") + END)
    assert found.name.encode(errors="surrogateescape") == b"/\xff\xfe"


def test_an_archive_may_end_without_zero_blocks() -> None:
    assert len(read(header())) == 1


def test_padding_after_the_end_is_ignored() -> None:
    assert len(read(header() + END + b"junk".ljust(512, b"\0"))) == 1


def star(prefix: bytes) -> bytes:
    """A header of star's kind: 131 bytes of prefix, two times, and a mark of its own at the end."""
    block = header(prefix=prefix.ljust(131, b"\0") + b"00000000000 " * 2)[:508] + b"tar\0"
    return block[:148] + b"%06o\0 " % (sum(block[:148]) + sum(block[156:]) + 256) + block[156:]


GOOD = header()
LONG_NAME = header(kind=b"L", size=b"%011o\0" % 2) + padded(b"n\0")
BAD = {
    "a wrong checksum": (header(checksum=b"000000\0 "), "checksum"),
    "a wrong checksum after a good member": (GOOD + header(name=b"x", checksum=b"000000\0 "), "checksum"),
    "half a header": (GOOD + GOOD[:300], "cut off"),
    "a size that is not octal": (header(size=b"0000000009 \0"), "octal"),
    "a size with a sign": (header(size=b"-0000000001\0"), "octal"),
    "a negative size in base 256": (header(size=b"\xff" * 12), "out of range"),
    "a size past 2^63": (header(size=b"\x80\0\0\0\xff" + b"\xff" * 7), "out of range"),
    "more bytes than there are": (header(size=b"00000001000\0"), "end after the archive"),
    "dot dot": (header(name=b"a/../b"), "'..'"),
    "a hard link to dot dot": (header(kind=b"1", link=b"../x"), "'..'"),
    "no name": (header(name=b""), "without a name"),
    "a NUL in an extended name": (pax({"path": b"a\0b"}) + GOOD, "NUL"),
    "a directory with bytes": (header(kind=b"5", size=b"00000000001\0") + bytes(512), "only regular files"),
    "a link with bytes": (header(kind=b"2", link=b"x", size=b"00000000001\0") + bytes(512), "only regular files"),
    "a link to nothing": (header(kind=b"2"), "target of 0 bytes"),
    "an unknown type": (header(kind=b"Z"), "unknown tar member type"),
    "a regular file that ends in a slash": (header(name=b"a/"), "ends in '/'"),
    "a checksum that is no number": (header(checksum=b"zzzzzz\0 "), "octal"),
    "an empty long name": (header(kind=b"L") + GOOD, "without a name"),
    "a long name of 5000 bytes": (header(kind=b"L", size=b"%011o\0" % 5000) + bytes(5120) + GOOD, "more than 4097"),
    "two long names": ((header(kind=b"L", size=b"%011o\0" % 2) + padded(b"n\0")) * 2 + GOOD, "two long names"),
    "a long name and a path": (LONG_NAME + pax({"path": b"p"}) + GOOD, "of GNU's kind and another"),
    "a path and a long name": (pax({"path": b"p"}) + LONG_NAME + GOOD, "of GNU's kind and another"),
    "a long target and a linkpath": (
        header(kind=b"K", size=b"%011o\0" % 2) + padded(b"t\0") + pax({"linkpath": b"p"}) + header(kind=b"2"),
        "of GNU's kind and another"),
    "a prefix in a header of GNU's": (
        header(magic=b"ustar ", version=b" \0", prefix=b"etc/cron.d"), "access time 'etc/cron.d' is not octal"),
    "a prefix in the second time of GNU's": (
        header(magic=b"ustar ", version=b" \0", prefix=b"14000000000\0etc/cron.d"), "change time 'etc/cron.d'"),
    "a prefix that runs into star's times": (star(b"p" * 131), "runs into the times of a star header"),
    "a number with more behind its end": (header(mode=b"644\0junk"), "not octal"),
    "a size with a sign in a record": (pax({"size": b"-1"}) + GOOD, "size '-1'"),
    "a number in other digits": (pax({"uid": "\u0661".encode()}) + GOOD, "uid"),
    "a record of length zero": (header(kind=b"x", size=b"%011o\0" % 4) + padded(b"0 a=") + GOOD, "wrong length"),
    "a volume's name": (header(kind=b"V", name=b"vol"), "unknown tar member type"),
    "a NUL in a long name": (header(kind=b"L", size=b"%011o\0" % 4) + padded(b"a\0b\0") + GOOD, "NUL"),
    "two extended headers, the first one empty": (header(kind=b"x") + pax({"uid": b"1"}) + GOOD, "two extended"),
    "a record without a name": (header(kind=b"x", size=b"%011o\0" % 5) + padded(b"5 =v\n") + GOOD, "without a name"),
    "a time with an exponent": (pax({"mtime": b"1e9"}) + GOOD, "mtime"),
    "a time with an underscore": (pax({"mtime": b"1_0"}) + GOOD, "mtime"),
    "a link target of 4096 bytes": (pax({"linkpath": b"t" * 4096}) + header(kind=b"2"), "target of 4096"),
    "a minor number of 2^20": (header(kind=b"4", minor=b"4000000\0"), "device"),
    "an owner of 2^40 in base 256": (header(uid=(1 << 40 | 1 << 63).to_bytes(8, "big")), "owner 1099511627776:0"),
    "a negative owner in base 256": (header(uid=b"\xff" * 8), "uid out of range"),
    "an attribute with an empty name": (pax({"SCHILY.xattr.user.": b"1"}) + GOOD, "attribute"),
    "an attribute of 64 KiB and a byte": (pax({"SCHILY.xattr.user.a": bytes((1 << 16) + 1)}) + GOOD, "65537 bytes"),
    "a hard link with bytes": (header(kind=b"1", link=b"x", size=b"00000000001\0") + bytes(512), "only regular files"),
    "a hard link to nothing": (header(kind=b"1"), "without a name"),
    "junk after one zero block": (GOOD + bytes(512) + b"junk", "single zero block"),
    "sparse pieces out of order": (old_sparse([(512, 1), (0, 1)], 1024) + padded(b"xy"), "not in order"),
    "sparse pieces that overlap": (old_sparse([(0, 4), (2, 4)], 1024) + padded(b"x" * 8), "overlap"),
    "a sparse piece past the end": (old_sparse([(1020, 8)], 1024) + padded(b"x" * 8), "reaches past"),
    "a sparse map of fewer bytes": (old_sparse([(0, 4)], 1024, stored=8) + padded(b"x" * 8), "speaks of 4 bytes"),
    "a sparse file cut off": (old_sparse([(0, 1 << 20)], 1 << 21), "stored bytes end after"),
    "a sparse map cut off": (old_sparse([(n, 1) for n in range(99)], 1024)[:1024], "sparse map is cut off"),
    "a sparse file of 2^62 bytes": (
        pax({"GNU.sparse.map": b"0,0", "GNU.sparse.size": b"%d" % (1 << 62)}) + GOOD, "a file may have"),
    "a sparse directory": (pax({"GNU.sparse.map": b"", "GNU.sparse.size": b"0"}) + header(kind=b"5"), "none can be"),
    "a sparse map of version 2": (pax({"GNU.sparse.major": b"2"}) + GOOD, "unknown version"),
    "a sparse map of odd length": (pax({"GNU.sparse.map": b"1", "GNU.sparse.size": b"9"}) + GOOD, "number of pieces"),
    "a sparse map without pieces": (pax({"GNU.sparse.map": b"", "GNU.sparse.size": b"9"}) + GOOD, "without pieces"),
    "a sparse map of half a version": (
        pax({"GNU.sparse.major": b"1", "GNU.sparse.realsize": b"9"}) + header(size=b"%011o\0" % 512) + padded(b"0\n"),
        "unknown version"),
    "a sparse map with two sizes": (
        pax({"GNU.sparse.map": b"0,0", "GNU.sparse.size": b"0", "GNU.sparse.realsize": b"9"}) + GOOD, "two sizes"),
    "a sparse file that ends in a slash": (
        pax({"GNU.sparse.map": b"0,0", "GNU.sparse.size": b"9", "GNU.sparse.name": b"s/"}) + GOOD, "ends in '/'"),
    "a sparse file that climbs out": (
        pax({"GNU.sparse.map": b"0,0", "GNU.sparse.size": b"9", "GNU.sparse.name": b"../s"}) + GOOD, "'..'"),
    "a sparse map of words": (pax({"GNU.sparse.map": b"a,b", "GNU.sparse.size": b"9"}) + GOOD, "no number"),
    "a sparse map that never ends": (
        pax({"GNU.sparse.major": b"1", "GNU.sparse.minor": b"0", "GNU.sparse.realsize": b"9"})
        + header(size=b"%011o\0" % 512) + b"9" * 512, "sparse map is cut off"),
    "a sparse map of a billion pieces": (
        pax({"GNU.sparse.major": b"1", "GNU.sparse.minor": b"0", "GNU.sparse.realsize": b"9"})
        + header(size=b"%011o\0" % 512) + padded(b"1000000000\n"), "more than 65536 pieces"),
    "a component of 256 bytes": (pax({"path": b"c" * 256}) + GOOD, "component"),
    "a path of 4096 bytes": (pax({"path": b"/".join([b"c" * 200] * 21)}) + GOOD, "path of more"),
    "an owner of 2^32 - 1": (pax({"uid": b"4294967295"}) + GOOD, "out of range"),
    "a negative owner": (pax({"uid": b"-1"}) + GOOD, "uid"),
    "a major number of 4096": (header(kind=b"3", major=b"0010000\0"), "device"),
    "a time that is none": (pax({"mtime": b"inf"}) + GOOD, "mtime"),
    "a time of a million digits": (pax({"mtime": b"1" * 1_000_000}) + GOOD, "mtime"),
    "an extended header of 2 MiB": (header(kind=b"x", size=b"00010000000\0") + bytes(2 << 20), "extended header of"),
    "an extended header longer than the archive": (header(kind=b"x", size=b"00000001000\0"), "longer than"),
    "65 records": (pax({f"k{n}": b"v" for n in range(65)}) + GOOD, "more than 64"),
    "a record twice": (
        header(kind=b"x", size=b"%011o\0" % 14) + b"7 a=b\n7 a=b\n"[:14].ljust(512, b"\0"), "extended header record"),
    "a record with a wrong length": (header(kind=b"x", size=b"%011o\0" % 6) + b"9 a=b\n".ljust(512, b"\0"), "length"),
    "a record without a length": (header(kind=b"x", size=b"%011o\0" % 4) + b"a=b\n".ljust(512, b"\0"), "no length"),
    "two extended headers in a row": (pax({"uid": b"1"}) + pax({"uid": b"2"}) + GOOD, "two extended headers"),
    "an extended header at the end": (pax({"uid": b"1"}) + END, "ends after an extended header"),
    "a global header that sets a path": (pax({"path": b"x"}, b"g") + GOOD, "global header"),
    "data after one zero block": (GOOD + bytes(512) + GOOD, "single zero block"),
    "an attribute without a namespace": (pax({"SCHILY.xattr.plain": b"1"}) + GOOD, "attribute"),
}  # fmt: skip


@pytest.mark.parametrize(("data", "rule"), BAD.values(), ids=BAD.keys())
def test_what_is_odd_is_refused_by_name(data: bytes, rule: str) -> None:
    with pytest.raises(InputError, match=rule) as caught:
        read(data)
    assert "\n" not in str(caught.value)


def test_times_in_the_place_of_a_prefix_are_no_part_of_the_name() -> None:
    (found,) = read(header(magic=b"ustar ", version=b" \0", prefix=b"14000000000\0" * 2))
    assert found.name == "/file"
    (found,) = read(star(b"p" * 130))
    assert found.name == "/" + "p" * 130 + "/file"


def test_a_size_in_a_record_counts_more_than_the_headers() -> None:
    inner = header(name=b"inner")
    assert [m.size for m in read(pax({"size": b"5"}) + header() + padded(b"hello"))] == [5]
    assert [m.name for m in read(pax({"size": b"0"}) + header(size=b"00000001000\0") + inner)] == ["/file", "/inner"]


def test_a_global_comment_is_harmless() -> None:
    assert [m.name for m in read(pax({"comment": b"by git"}, b"g") + GOOD)] == ["/file"]


def test_limits_are_kept() -> None:
    data = archive(member("a"), member("b"), member("c", b"123"))
    with pytest.raises(InputError, match="more than 2 members"):
        read(data, tar.Limits(entries=2))
    with pytest.raises(InputError, match="more than the 2"):
        read(data, tar.Limits(file_bytes=2))
    with pytest.raises(InputError, match="after the end of the archive"):
        read(header() + bytes(1 << 16), tar.Limits(trailing_bytes=1 << 12))


def test_names_from_outside_cannot_speak_to_a_terminal() -> None:
    with pytest.raises(InputError) as caught:
        read(header(name=b"\x1b[31mred\n/../x"))
    assert "\x1b" not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "nanoseconds"),
    [
        (b"1.5", 1_500_000_000),
        (b"-1.5", -1_500_000_000),
        (b"0.1234567899", 123_456_789),
        (b"-0.0000000001", -1),
        (b"9223372036854775807", 9223372036854775807 * 10**9),
        (b"1234567890.99999999999999999999", 1234567890_999999999),
    ],
)
def test_times_are_rounded_down_to_nanoseconds(text: bytes, nanoseconds: int) -> None:
    (found,) = read(pax({"mtime": text}) + GOOD)
    assert found.mtime_ns == nanoseconds


def test_a_time_in_base_256_may_be_as_far_away_as_a_size() -> None:
    (found,) = read(header(mtime=b"\x80\0\0\0\x7f" + b"\xff" * 7))
    assert found.mtime_ns == ((1 << 63) - 1) * 10**9


def test_names_at_the_limit_are_read() -> None:
    name = b"/".join([b"c" * 255] * 15 + [b"d" * 254])
    assert len(name) == 4094  # and the root's slash
    (found,) = read(pax({"path": name}) + GOOD)
    assert found.name.encode() == b"/" + name


def test_a_directory_before_posix_is_a_file_with_a_slash() -> None:
    (found,) = read(header(name=b"old/", kind=b"\0"))
    assert (found.name, found.kind) == ("/old", stat.S_IFDIR)


def test_an_empty_record_is_as_good_as_none() -> None:
    (found,) = read(pax({"path": b"", "mtime": b"", "uid": b""}) + header(mtime=b"00000000007\0"))
    assert (found.name, found.mtime_ns, found.uid) == ("/file", 7 * 10**9, 0)


def test_a_refusal_names_the_entry_by_its_long_name() -> None:
    name = "d/" * 100 + "f"
    data = archive(member(name, b"x" * 600))
    with pytest.raises(InputError, match=f"'{name}': its 600 bytes end after the archive"):
        read(data[: data.index(b"x" * 600) + 512])


def test_an_archive_is_not_read_beyond_its_end() -> None:
    one = header() + bytes(512)
    spool = spooled(one + header(name=b"next"))
    assert [m.name for m in tar.read(spool, 0, len(one))] == ["/file"]


def test_every_kind_of_sparse_member_is_read() -> None:
    data = sparse_archive()
    spool = spooled(data)
    found = {m.name: b"".join(tar.content(m, spool).chunks()) for m in tar.read(spool, 0, len(data))}
    expected = (bytes(1024) + b"a" * 512).ljust(4096, b"\0") + b"b" * 100
    assert found == dict.fromkeys(("/s", "/s00", "/s01", "/s10"), expected.ljust(8192, b"\0"))


def test_two_kinds_of_sparse_maps_are_refused() -> None:
    twice = pax_record("GNU.sparse.offset", b"0") + pax_record("GNU.sparse.size", b"1")
    with pytest.raises(InputError, match="number of pieces"):
        read(header(kind=b"x", size=b"%011o\0" % len(twice)) + padded(twice) + GOOD)
    with pytest.raises(InputError, match="none can be"):
        read(pax({"GNU.sparse.map": b"", "GNU.sparse.size": b"0"}) + old_sparse([], 0))


@pytest.mark.parametrize("words", ["gnu", "posix 0.0", "posix 0.1", "posix 1.0"])
def test_sparse_files_that_gnu_tar_packed_are_read_with_their_holes(words: str, tmp_path: Path) -> None:
    if shutil.which("tar") is None:
        pytest.skip("tar is not installed")
    source = random.Random(3)
    for name, pieces in {"few": 3, "many": 150, "none": 0}.items():
        with (tmp_path / name).open("wb") as file:
            file.truncate(8 << 20)
            for _ in range(pieces):
                file.seek(source.randrange(2000) * 4096)
                file.write(source.randbytes(source.randrange(1, 4000)))
    form, _, version = words.partition(" ")
    options = [f"--sparse-version={version}"] if version else []
    made = ["tar", "--sparse", f"--format={form}", *options, "-cf", "a.tar", "few", "many", "none"]
    subprocess.run(made, cwd=tmp_path, check=True)
    data = (tmp_path / "a.tar").read_bytes()
    assert len(data) < 2 << 20, "tar found no holes here"
    spool = spooled(data)
    for found in tar.read(spool, 0, len(data)):
        content = tar.content(found, spool)
        assert isinstance(content, Sparse)
        original = tmp_path / found.name[1:]
        assert b"".join(content.chunks()) == original.read_bytes()
        with (tmp_path / "copy").open("w+b") as copy:
            copy.truncate(content.size)
            content.copy_to(copy.fileno(), 0)
        assert (tmp_path / "copy").read_bytes() == original.read_bytes()
        assert (tmp_path / "copy").stat().st_blocks <= original.stat().st_blocks + 16, "holes stay holes"


def test_a_message_about_a_long_name_is_short_and_plain() -> None:
    with pytest.raises(InputError) as caught:  # found by fuzzing: an ellipsis that was no ASCII
        read(pax({"path": b"n" * 3000 + b"/../x"}) + GOOD)
    assert str(caught.value).isascii()
    assert len(str(caught.value)) < 400
