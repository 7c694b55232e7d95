"""The tar reader: what is right is read exactly, what is odd is refused by name."""

from __future__ import annotations

import stat
import tarfile

import pytest

from osbuild import tar
from osbuild.errors import InputError
from tests.layer_tools import archive, folder, hardlink, header, link, member, spooled

END = bytes(1024)


def read(data: bytes, limits: tar.Limits | None = None) -> list[tar.Member]:
    return list(tar.read(spooled(data), 0, len(data), limits))


def pax(records: dict[str, bytes], kind: bytes = b"x") -> bytes:
    body = b""
    for key, value in records.items():
        record = b" " + key.encode() + b"=" + value + b"\n"
        size = len(record) + len(str(len(record)))
        size = len(record) + len(str(size))
        body += str(size).encode() + record
    return header(name=b"pax", kind=kind, size=b"%011o\0" % len(body)) + body + bytes(-len(body) % 512)


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


GOOD = header()
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
    "a sparse member": (header(kind=b"S"), "sparse"),
    "a sparse member of PAX": (pax({"GNU.sparse.major": b"1"}) + GOOD, "sparse"),
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
