"""rpm's databases in a tree: rpm is asked the same; ndb's files are made by their format."""

from __future__ import annotations

import base64
import contextlib
import random
import shutil
import sqlite3
import struct
import subprocess
import time
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from osbuild import rpmdb
from osbuild.errors import InputError
from osbuild.packages import Inventory
from tests.test_packages import inventory

SPEC: Final = """\
Name: {name}
{epoch}
Version: {version}
Release: {release}
Summary: a toy
License: MIT and GPLv2+
Packager: Me <me@example.com>
BuildArch: noarch
{sub}
%description
nothing
%files
"""
SUB: Final = "%package -n {name}-part\nSummary: a part\n%description -n {name}-part\nx\n%files -n {name}-part\n"
FORM: Final = "%{name}|%|epoch?{%{epoch}:}:{}||%{version}-%{release}|%{arch}|%{sourcerpm}|%{license}|%{packager}\n"


class Rpm:
    """rpm's own word, and its own databases."""

    def __init__(self, root: Path) -> None:
        if shutil.which("rpmbuild") is None or shutil.which("rpm") is None:
            pytest.skip("rpm and rpmbuild are not installed")
        self.root = root
        packages = [
            ("alpha", "Epoch: 2", "1.0", "3.el9", ""), ("beta", "", "20240101", "1", SUB.format(name="beta")),
            ("gamma-with-dashes", "", "1~rc1^git", "0.1", ""),
        ]  # fmt: skip
        for name, epoch, version, release, sub in packages:
            spec = root / f"{name}.spec"
            spec.write_text(SPEC.format(name=name, epoch=epoch, version=version, release=release, sub=sub))
            self.run("rpmbuild", "--quiet", "-bb", "--define", f"_topdir {root}/top", str(spec))
        files = sorted(map(str, root.glob("top/RPMS/*/*.rpm")))
        assert len(files) == 4
        self.dbpath = root / "db"
        self.dbpath.mkdir()
        self.rpm("--justdb", "--nodeps", "--ignorearch", "--nosignature", "-i", *files)
        self.said = sorted(self.rpm("-qa", "--qf", FORM).splitlines())

    def run(self, *argv: str) -> str:
        return subprocess.run(argv, check=True, text=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL).stdout

    def rpm(self, *words: str) -> str:
        return self.run("rpm", "--dbpath", str(self.dbpath), "--define", "_db_backend sqlite", *words)

    @property
    def sqlite(self) -> bytes:
        return (self.dbpath / "rpmdb.sqlite").read_bytes()

    def headers(self) -> list[bytes]:
        """The blobs, by SQLite's own reader."""
        with contextlib.closing(sqlite3.connect(f"file:{self.dbpath}/rpmdb.sqlite?mode=ro", uri=True)) as database:
            return [blob for (blob,) in database.execute("SELECT blob FROM Packages ORDER BY hnum")]


@pytest.fixture(scope="module")
def rpm(tmp_path_factory: pytest.TempPathFactory) -> Rpm:
    return Rpm(tmp_path_factory.mktemp("rpm"))


def as_rpm_says(found: Inventory) -> list[str]:
    lines = []
    for one in found.packages:
        epoch, _, version = one.version.rpartition(":")
        source = f"{one.source}-{one.source_version}.src.rpm"
        fields = (one.name, f"{epoch}:" if epoch else "", version, one.arch, source, one.license, one.maintainer)
        lines.append("|".join(fields))
    return sorted(lines)


@pytest.mark.parametrize("home", ["/var/lib/rpm", "/usr/lib/sysimage/rpm", "/usr/share/rpm"])
def test_rpms_sqlite_has_what_rpm_says(rpm: Rpm, home: str) -> None:
    found = inventory({f"{home}/rpmdb.sqlite": rpm.sqlite})
    assert as_rpm_says(found) == rpm.said
    assert (found.manager, found.notes) == ("rpm", ())
    assert found.packages[0].version == "2:1.0-3.el9"
    assert [one.source for one in found.packages] == ["alpha", "beta", "beta", "gamma-with-dashes"]


def test_a_database_that_moved_is_read_through_its_link(rpm: Rpm) -> None:
    files: dict[str, bytes | str] = {
        "/usr/lib/sysimage/rpm/rpmdb.sqlite": rpm.sqlite,
        "/var/lib/rpm": "-> ../../usr/lib/sysimage/rpm",
    }
    assert as_rpm_says(inventory(files)) == rpm.said


def test_a_log_of_sqlites_is_a_note(rpm: Rpm) -> None:
    files = {"/var/lib/rpm/rpmdb.sqlite": rpm.sqlite, "/var/lib/rpm/rpmdb.sqlite-wal": b"x"}
    assert inventory(files).notes == (
        "'/var/lib/rpm/rpmdb.sqlite-wal' holds changes to the database that are not in this list",
    )
    assert inventory(files | {"/var/lib/rpm/rpmdb.sqlite-wal": b""}).notes == ()


def berkeley(rpm: Rpm, place: Path, *options: str, page: int = 4096) -> bytes:
    """A hash with rpm's headers, by Berkeley DB's own tool: key 0 holds the number of the next package."""
    load = shutil.which("db5.3_load") or shutil.which("db_load")
    if load is None:
        pytest.skip("db5.3_load is not installed (Debian: db5.3-util)")
    lines = ["VERSION=3", "format=bytevalue", "type=hash", f"db_pagesize={page}", *options, "HEADER=END"]
    for number, blob in enumerate([struct.pack("<I", 9), *rpm.headers()]):
        lines += [f" {struct.pack('<I', number).hex()}", f" {blob.hex()}"]
    path = place / "Packages"
    subprocess.run([load, str(path)], input="\n".join([*lines, "DATA=END", ""]).encode(), check=True)
    return path.read_bytes()


@pytest.mark.parametrize("page", [512, 4096, 65536])
@pytest.mark.parametrize("order", ["1234", "4321"])
def test_berkeley_db_has_what_rpm_says(rpm: Rpm, tmp_path: Path, page: int, order: str) -> None:
    data = berkeley(rpm, tmp_path, f"db_lorder={order}", page=page)
    found = inventory({"/var/lib/rpm/Packages": data})
    assert found.notes == ()
    assert as_rpm_says(found) == rpm.said


# db5.3_load's word, kept for machines that do not have it: page size 512, the packages above, deflated.
RECORDED: Final = (
    "c-rll|BswS9mnUn+qT!zmeLklK+8cIaus%+=b3q)nFkK76k0)$CLn?~$jmb{x0~+XExSv57z6yE$)(h!1T{_6#2EMkO!@=As6QACm}r7&)C7b}"
    "ELfmGn+QTkfqC}%?CtJ{YEx1|FX<%D&GVk`&-0miy`Mco2nk4$)Wu85^89ARUt>ktYVyf6xAh<)9}=?W)pvFr+FO(b1LNdriNBuzarHi2em<Rh"
    "3CCzDIUJBx9|Z3PCxTak`QY&R04}OD+B~{@rO&_M4`EP(f~EPH&I|Ix9V{OVc>qVgmrCTNZv5X4UJqUhKHd2z=g<E+vJ>)9m-4`mLP4HCnim8E"
    "@gH4?eXd^($TEMk#qW!wKL4t}ydJsP=WG0B`u>o29zEKHMzM)<{Tk@?pkD{Q3G^|a=gYbZ^qZh3K)(eGp`hP}{v7lPsF$GMh5AX*{{{UG(C@+c"
    "-vfOT>UV?w5cC6uF0BVW3wi@Q@2@~_g!vB@MpwEN>YoLDS)qd+peKs)f*I(4PtiZ<jejq+{{d(X?e~E;pdSZqLH`W21O0Q*b<n>o^tvZtzC)n@"
    "2=!0*<6nY3u%sXVyyX#C+3%p|D@D^0=(g^)qJE^<HpQ08>+b=*1a{7@V&?>_ikV01P=68VpF$*#L;ruklUxG&MbJ~A=RsFN=j#l%ktx+^sPf)g"
    "r&>0uUA1izKHSQ}`=)9gLMtIr<DHp@$n;F7TAQ9CyGwt&ZBL_k2e;pH*SMNC<2!cVwkNuV+-}Dw8+NOmRgGrdR<fDKSID=f+fAF*T+JF%uT4KV"
    ">jzS;toq4W%L}uX{j8OCE334cjZ>_y`w%Pe<=fV4dSaVu+0HG~ciUFGHZ$GcLVD#hjb_WX+tzHa)$KP`!}ja)lACH%w%zHM?NkrdXH>Uw`|E0t"
    "-Py9PHVf6g_%DGyQ0PNG{(9oBTHV;e1@KB3S7<pTtU@c?=e&}1HHW_;?cK-<Ee0DKdKaX8M>JlZB3ZLGL#Do8YmyY+V%b<-Q`6<*%|hP?JFYB="
    "axArB7N*K^A(eGPQKoGwty8H<wNg<eolafKER#Gki4i*FD&$G5c$^kvMa)nhMVdRSd~+c}D@7!Ds5KK*q*Sxa(3nZ9oaRXwF=k~%wd6V$D$37X"
    "0m6?yI(ZyG=-=5>Kf1U4odY+ldGglXPk*rY&KG`5vm{OgOZ^}!N>ZnUkuHlEH6b;|QKfVu9F2*UF-wfHCebwGPJ}Yfq9l`wNy$~hWlVMKTqG!?"
    "JdI;1c*MgjF;*#+*(e8?-@!i1xiJd&pYr=}Dcmo^{BQR8AN=_Y`M(nJ|6;`d4T%4n5dX&!|2HH4PaytZi}-&%;{P3p|KCOYSBU>r#Q#ST|MwTr"
    "T;Tsf(7=E4Z_vPhauV^sg!n&(_`eSE|1!k?D-i!TBmQ5F_&<sGzqKF#Ww6AtQ}ciOF#m(OVg3jEhxs4O5A#1bGR*(rKZyTdMEt)W@!uf+R}uf~"
    "1^>0}sB%-aIwYbIry&hV4*hP)>{;V|cb47+<v!p0vk!CqEOYyR!WWo3)?eD`aodak80>*UPx|-|fOs)*xO{_t;hlX4*Z%&gD^G0rYxBmx%Y;W+"
    "!l{XkO<9y`YBY<fi2XB&#2V&goMtZdVT+yh$YrsAC>>KJWTKr^NybB?jT9`DQdrKY4AamrDRE(%3hFuSS7ws4#^KNN_y2OZUxE2wAK?FUXUP9$"
    "i2rL4|JNe^Z(L;jpF{lr3F8015dYst{3nS2CB**=5&thi{J$LWe;o1uD#U+@_&?c?{|b0T7o3{^HzNN35b=Kw@&84{|9Qm!<B0#4BL43}{J$UZ"
    "-yr^1`}`k9|7Y>N|Nr<;77_dNhw8=u0@wqEmOlQAi2YlhJov~nFaP1ooA%xP*vo6LZ~P|9bZi*Ugic~DA|(>#KcguVR#C?Ur`{Q2#WEsvmRciX"
    "M_FbQ>A$os4JCEl@ysZe#G!U^9ET>&sB?a;sS1s>5fh=NE{zsF`+M<U3HPf8`Tr$<vN{9&fBp>lKZf|<`#tam@N+%#gN>*8Jurd%;9BGd6!`&1"
    "ey|Ps!MBkgWXKO{$Pb#x59W{`96)~X3*-lH4EsS4AU_yGey|ex!A9f<S0F#wjQn5=@`G!T9}Il|uY&Nb9_D|~DQ<$EJwLb=`N4kV2M3TJ96^3?"
    "6#2n>$PcbWeqfLvRFNOlksmY*KT!2%RguuMkyUKHfDjoOb_H_Qe4#s=_XAq)&bHtS#VS5$U$|~zT|>sui~nla1BKq{<A0j}&YZKpFyHruul@5+"
    "cRusj;a~4MHnLs(W&YR^Df|ejM|+YmF10W+NirQWml$WGOr<GLX{0srXwPD+r2mn?lwv;lmO3^5qu<JuO8+z_6)N+-5gI?5uM=6ws8d=iD%hg&"
    "g^vLO=Ap^"
)


def ndb(headers: list[bytes], *, gap: bool = False) -> bytes:
    """Packages.db by its published layout: a page of slots, then the blobs, in blocks of 16 bytes."""
    slots, body = [], b""
    for index, header in enumerate(headers, 1):
        blob = struct.pack("<4sIII", b"BlbS", index, 7, len(header)) + header
        blob += bytes(-(len(blob) + 12) % 16)
        blob += struct.pack("<II4s", zlib.adler32(blob), len(header), b"BlbE")
        if gap:
            slots.append(struct.pack("<4sIII", b"Slot", 0, 0, 0))
        slots.append(struct.pack("<4sIII", b"Slot", index, (4096 + len(body)) // 16, len(blob) // 16))
        body += blob
    head = struct.pack("<4sIIII12x", b"RpmP", 0, 1, 1, len(headers) + 1)
    empty = struct.pack("<4sIII", b"Slot", 0, 0, 0)
    slots += [empty] * (254 - len(slots))  # 256 to a page; the header takes the place of two
    return head + b"".join(slots) + body


@pytest.mark.parametrize("gap", [False, True])
def test_ndb_has_what_rpm_says(rpm: Rpm, gap: bool) -> None:
    found = inventory({"/usr/lib/sysimage/rpm/Packages.db": ndb(rpm.headers(), gap=gap)})
    assert as_rpm_says(found) == rpm.said
    assert found.notes == ()


def test_a_key_is_no_package() -> None:
    key = header({1000: "gpg-pubkey", 1001: "1", 1002: "2"})
    assert inventory({"/var/lib/rpm/Packages.db": ndb([key])}) == Inventory()


def header(strings: Mapping[int, str], numbers: Mapping[int, int] | None = None) -> bytes:
    entries, data = b"", b""
    for tag, text in strings.items():
        entries += struct.pack(">IIII", tag, 6, len(data), 1)
        data += text.encode() + b"\0"
    for tag, number in (numbers or {}).items():
        entries += struct.pack(">IIII", tag, 4, len(data), 1)
        data += struct.pack(">I", number)
    return struct.pack(">II", len(entries) // 16, len(data)) + entries + data


def test_what_follows_overrides() -> None:
    tags = rpmdb.read_header(header({1000: "a", 1001: "1"}, {1003: 7}))
    assert tags == {1000: "a", 1001: "1", 1003: "7"}


@pytest.mark.parametrize(
    ("blob", "words"),
    [
        (b"", "cut short"),
        (struct.pack(">II", 2**32 - 1, 0), "cut short"),
        (struct.pack(">II", 1, 100) + bytes(16), "cut short"),
        (struct.pack(">IIIIII", 1, 4, 1000, 6, 2**32 - 1, 1) + b"abc\0", "does not end"),
        (struct.pack(">IIIIII", 1, 4, 1000, 6, 0, 1) + b"abcd", "does not end"),
        (struct.pack(">IIIIII", 1, 4, 1003, 4, 1, 1) + bytes(4), "number outside"),
    ],
    ids=["empty", "countless", "short", "outside", "endless", "number"],
)
def test_a_broken_header_is_refused_in_words(blob: bytes, words: str) -> None:
    with pytest.raises(InputError, match=words):
        rpmdb.read_header(blob)


def read(form: str, data: bytes) -> str:
    """The note about a broken database."""
    found = inventory({f"/var/lib/rpm/{form}": data})
    assert found.packages == ()
    (note,) = found.notes
    return note


def database(*statements: str, journal: str = "DELETE") -> bytes:
    with contextlib.closing(sqlite3.connect(":memory:")) as made:
        made.execute(f"PRAGMA journal_mode={journal}")
        for statement in statements:
            made.execute(statement)
        made.commit()
        return bytes(made.serialize())


TABLE: Final = "CREATE TABLE Packages (hnum INTEGER PRIMARY KEY, blob BLOB)"


@pytest.mark.parametrize(
    "data",
    [
        b"nonsense",
        b"SQLite format 3\0",
        b"SQLite format 3\0" + bytes(4096),
        database("CREATE TABLE other (x)"),
        database("CREATE TABLE t (blob)", "INSERT INTO t VALUES (x'00')", "CREATE VIEW Packages AS SELECT blob FROM t"),
        database(
            "CREATE TABLE Packages (x, blob AS (zeroblob(100000000)))", "INSERT INTO Packages VALUES (1)"
        ),
        database("CREATE VIRTUAL TABLE Packages USING fts5(blob)", "INSERT INTO Packages VALUES ('x')"),
        database(TABLE, "INSERT INTO Packages VALUES (1, 'text')"),
        database(TABLE, "INSERT INTO Packages VALUES (1, NULL)"),
        database(TABLE, "INSERT INTO Packages VALUES (1, zeroblob(10))"),
    ],
    ids=["nonsense", "head", "zeros", "no table", "view", "calculated", "virtual", "text", "null", "no header"],
)  # fmt: skip
def test_an_sqlite_file_that_is_no_database_of_packages_is_a_note(data: bytes) -> None:
    assert read("rpmdb.sqlite", data).startswith("'/var/lib/rpm/rpmdb.sqlite' ")


def test_a_trigger_or_function_of_the_images_is_never_run(rpm: Rpm, tmp_path: Path) -> None:
    path = tmp_path / "rpmdb.sqlite"
    path.write_bytes(rpm.sqlite)
    with contextlib.closing(sqlite3.connect(path)) as made:
        made.execute("CREATE TABLE told (x)")
        made.execute("CREATE INDEX odd ON Packages (length(blob), abs(hnum))")
        made.execute(
            "CREATE TRIGGER t AFTER INSERT ON Packages BEGIN INSERT INTO told VALUES (load_extension('x')); END"
        )
        made.execute("CREATE VIEW v AS WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x FROM c) SELECT x FROM c")
        made.commit()
        made.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    assert as_rpm_says(inventory({"/var/lib/rpm/rpmdb.sqlite": path.read_bytes()})) == rpm.said


def test_packages_before_the_break_are_kept(rpm: Rpm) -> None:
    broken = [*rpm.headers()[:2], b"broken"]
    found = inventory({"/var/lib/rpm/Packages.db": ndb(broken)})
    assert len(found.packages) == 2
    assert found.notes == (
        "'/var/lib/rpm/Packages.db' has a package whose header is cut short; 2 packages were read before",
    )


def test_a_broken_database_does_not_hide_the_next(rpm: Rpm) -> None:
    files = {"/var/lib/rpm/rpmdb.sqlite": b"x", "/usr/lib/sysimage/rpm/Packages.db": ndb(rpm.headers())}
    found = inventory(files)
    assert as_rpm_says(found) == rpm.said
    assert len(found.notes) == 1


@pytest.mark.parametrize(
    "data",
    [
        b"x" * 100,
        struct.pack("<4sIII", b"RpmP", 0, 1, 2**32 - 1) + bytes(100),
        struct.pack("<4sIII", b"RpmP", 9, 1, 1) + bytes(5000),
        struct.pack("<4sIII", b"RpmP", 0, 1, 1) + bytes(5000),
        ndb([bytes(8)]).replace(b"BlbS", b"Blob"),
        ndb([bytes(8)])[:-30],
    ],
    ids=["nonsense", "endless", "version", "no slots", "no blob", "short"],
)
def test_a_broken_ndb_file_is_a_note(data: bytes) -> None:
    assert read("Packages.db", data).startswith("'/var/lib/rpm/Packages.db' ")


def test_slots_that_share_a_blob_do_not_multiply_it() -> None:
    blob = header({1000: "a", 1001: "1", 1002: "1", 1022: "noarch"}) + bytes(8 << 20)
    data = bytearray(ndb([blob]))
    slot = data[32:48]
    for at in range(48, 4096, 16):
        data[at : at + 16] = slot
    began = time.process_time()
    (note,) = inventory({"/var/lib/rpm/Packages.db": bytes(data)}).notes
    assert "more headers than fit" in note
    assert time.process_time() - began < 2


def hash_page(
    number: int, kind: int, items: tuple[bytes, ...] = (), *, following: int = 0, used: int = 0, entries: int = 0
) -> bytes:
    offsets, body, end = b"", b"", 512
    for item in items:
        end -= len(item)
        offsets += struct.pack("<H", end)
        body = item + body
    head = struct.pack("<8xIIIHHBB", number, 0, following, entries or len(items), used, 0, kind)
    return (head + offsets).ljust(512 - len(body), b"\0") + body


def hash_file(*pages: bytes) -> bytes:
    meta = struct.pack("<8xIIIIBBBBIII", 0, 0x061561, 9, 512, 0, 8, 0, 0, 0, len(pages), 0)
    return meta.ljust(512, b"\0") + b"".join(pages)


def far(page: int, size: int) -> bytes:
    return b"\3\0\0\0" + struct.pack("<II", page, size)


KEY: Final = b"\1" + struct.pack("<I", 1)
BLOB: Final = header({1000: "a", 1001: "1", 1002: "1", 1022: "noarch"})


def test_a_hash_by_hand_is_read() -> None:
    pages = (hash_page(1, 13, (KEY, far(2, len(BLOB)))), hash_page(2, 7, used=len(BLOB))[:26] + BLOB.ljust(486, b"\0"))
    for data in (hash_file(*pages), hash_file(hash_page(1, 2, (KEY, b"\1" + BLOB)))):
        assert [one.name for one in inventory({"/var/lib/rpm/Packages": data}).packages] == ["a"]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"x" * 600,
        hash_file()[:20],
        hash_file(hash_page(1, 13, (KEY, far(99, 10)))),
        hash_file(hash_page(1, 13, (KEY, far(1, 10)))),
        hash_file(hash_page(1, 13, (KEY, far(2, 2**32 - 1)), ), hash_page(2, 7, following=2, used=9)),
        hash_file(hash_page(1, 13, (KEY, b"\4" + bytes(11)))),
        hash_file(hash_page(1, 13, (KEY, b"\1"))),
        hash_file(hash_page(1, 13, entries=65535)),
        hash_file(hash_page(1, 13, entries=2)),
    ],
    ids=["empty", "nonsense", "short", "far", "wrong page", "circle", "kind", "no header", "countless", "overlap"],
)  # fmt: skip
def test_a_broken_hash_is_a_note(data: bytes) -> None:
    if data:
        assert read("Packages", data).startswith("'/var/lib/rpm/Packages' ")
    else:
        assert inventory({"/var/lib/rpm/Packages": data}).notes == ()


@pytest.mark.parametrize("form", rpmdb.FORMATS)
def test_damage_never_does_more_than_cost_packages(rpm: Rpm, form: str, tmp_path: Path) -> None:
    data = {
        "rpmdb.sqlite": rpm.sqlite, "Packages.db": ndb(rpm.headers()),
        "Packages": hash_file(hash_page(1, 2, (KEY, b"\1" + BLOB))),
    }[form]  # fmt: skip
    chance = random.Random(form)
    began = time.process_time()
    for _ in range(300):
        broken = bytearray(data)
        for _ in range(chance.randint(1, 20)):
            broken[chance.randrange(len(broken)) if chance.random() < 0.5 else chance.randrange(600)] = (
                chance.randrange(256)
            )
        inventory(
            {f"/var/lib/rpm/{form}": bytes(broken[: chance.randint(1, len(broken)) if chance.random() < 0.2 else None])}
        )
    assert time.process_time() - began < 30


@settings(max_examples=200, deadline=1000)
@given(st.binary(max_size=400))
def test_any_header_is_read_or_refused(blob: bytes) -> None:
    with contextlib.suppress(InputError):
        rpmdb.read_header(blob)


def test_the_recorded_hash_is_read() -> None:
    data = zlib.decompress(base64.b85decode(RECORDED))
    found = inventory({"/var/lib/rpm/Packages": data})
    assert [(one.name, one.version) for one in found.packages] == [
        ("alpha", "2:1.0-3.el9"), ("beta", "20240101-1"), ("beta-part", "20240101-1"),
        ("gamma-with-dashes", "1~rc1^git-0.1"),
    ]  # fmt: skip
