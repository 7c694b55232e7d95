"""ELF files and what their loaders would open: readelf, glibc's loader and musl's are asked the same."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import struct
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from osbuild.elf import Elf, read_elf
from osbuild.errors import InputError
from osbuild.loader import Resolution, libraries
from osbuild.tree import Bytes, Draft, Slice, Spool, regular
from osbuild.view import View
from tests.layer_tools import opened, spooled
from tests.program_tools import GLIBC, Lab, listed, make_elf, run, tree_of

DEBIAN: Final = Path("~/.cache/osbuilder/images/debian-1").expanduser()


def elf_of(data: bytes) -> Elf:
    found = read_elf(Bytes(data))
    assert found is not None
    return found


def said_by_readelf(path: Path) -> dict[str, object]:
    if shutil.which("readelf") is None:
        pytest.skip("readelf is not installed")
    text = subprocess.run(["readelf", "-hldVW", str(path)], capture_output=True, text=True, check=True).stdout
    wanted = re.search(r"Version needs section.*?(?=\n\n|\Z)", text, re.S)
    defined = re.search(r"Version definition section.*?(?=\n\n|\Z)", text, re.S)

    def one(pattern: str) -> str | None:
        found = re.search(pattern, text)
        return found[1] if found else None

    return {
        "bits": int(one(r"Class:\s+ELF(\d+)") or 0),
        "big_endian": "big endian" in text,
        "type": {"REL": 1, "EXEC": 2, "DYN": 3}[one(r"Type:\s+([A-Z]+)") or ""],
        "interpreter": one(r"program interpreter: (.*)\]") or "",
        "needed": tuple(re.findall(r"Shared library: \[(.*)\]", text)),
        "soname": one(r"Library soname: \[(.*)\]") or "",
        "rpath": one(r"Library rpath: \[(.*)\]"),
        "runpath": one(r"Library runpath: \[(.*)\]"),
        "wants": {
            name: set(re.findall(r"Name: (\S+)  Flags: none", block))
            for name, block in re.findall(r"File: (\S+)(.*?)(?=File: |\Z)", wanted[0], re.S)
        } if wanted else {},
        "defines": set(re.findall(r"Rev: .* Name: (\S+)", defined[0])) if defined else set(),
    }  # fmt: skip


REAL: Final = (
    "/bin/ls", "/bin/sh", "/usr/bin/readelf", "/usr/bin/busybox", "/lib/x86_64-linux-gnu/libc.so.6",
    "/lib64/ld-linux-x86-64.so.2", "/usr/lib/x86_64-linux-musl/libc.so", "/usr/lib/x86_64-linux-musl/crt1.o",
    "/usr/local/go/bin/go", "/lib/x86_64-linux-gnu/libstdc++.so.6", "/usr/lib/x86_64-linux-gnu/libcrypto.so.3",
)  # fmt: skip


@pytest.mark.parametrize("name", REAL)
def test_readelf_says_the_same(name: str) -> None:
    path = Path(name).resolve()
    if not path.exists():
        pytest.skip(f"{name} is not installed")
    elf = elf_of(path.read_bytes())
    ours = {
        "bits": elf.bits, "big_endian": elf.big_endian, "type": elf.type, "interpreter": elf.interpreter,
        "needed": elf.needed, "soname": elf.soname, "rpath": elf.rpath, "runpath": elf.runpath,
        "wants": {file: set(versions) for file, versions in elf.wants.items()}, "defines": set(elf.defines),
    }  # fmt: skip
    assert ours == said_by_readelf(path)


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("order", ["<", ">"])
def test_both_sizes_and_byte_orders_are_read(bits: int, order: str, tmp_path: Path) -> None:
    data = make_elf(bits=bits, order=order, machine=21, interpreter=b"/lib/ld.so", needed=(b"liba.so", b"libb.so"))
    (tmp_path / "elf").write_bytes(data)
    theirs = said_by_readelf(tmp_path / "elf")
    elf = elf_of(data)
    assert (elf.bits, elf.big_endian, elf.interpreter, elf.needed) == (
        bits,
        order == ">",
        "/lib/ld.so",
        ("liba.so", "libb.so"),
    )
    assert (elf.bits, elf.big_endian, elf.interpreter, elf.needed) == tuple(
        theirs[key] for key in ("bits", "big_endian", "interpreter", "needed")
    )


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"machine": 62}, "x86_64"), ({"machine": 62, "bits": 32}, "x32"), ({"machine": 3, "bits": 32}, "i386"),
        ({"machine": 183}, "aarch64"), ({"machine": 21}, "ppc64le"), ({"machine": 21, "order": ">"}, "ppc64"),
        ({"machine": 243}, "riscv64"), ({"machine": 9999}, "machine 9999"),
    ],
)  # fmt: skip
def test_machines_have_names(fields: dict[str, object], name: str) -> None:
    assert elf_of(make_elf(**fields)).machine_name == name  # type: ignore[arg-type]


@pytest.mark.parametrize("data", [b"", b"\x7fEL", b"#!/bin/sh\n", b"MZ" + bytes(100)])
def test_what_is_no_elf_is_none(data: bytes) -> None:
    assert read_elf(Bytes(data)) is None


WHOLE: Final = make_elf(interpreter=b"/lib/ld.so", needed=(b"liba.so",), tags=((15, 1), (29, 1), (14, 1)))


def changed(at: int, form: str, value: int) -> bytes:
    data = bytearray(WHOLE)
    struct.pack_into(form, data, at, value)
    return bytes(data)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (WHOLE[:40], "cut short"),
        (changed(4, "B", 9), "cut short or broken"),
        (changed(32, "<Q", 2**64 - 1), "program headers lie behind its end"),
        (changed(56, "<H", 65535), "65535 program headers"),
        (changed(54, "<H", 1), "1 bytes each, not 56"),
        (changed(64 + 56 + 8, "<Q", 2**63), "path of its dynamic loader lies behind its end"),
        (changed(64 + 56 + 32, "<Q", 2**62), "has 4611686018427387904 bytes"),
        (changed(64 + 56 + 32, "<Q", 3), "dynamic loader does not end"),
        (changed(64 + 112 + 32, "<Q", 2**40), "dynamic section has 1099511627776 bytes"),
        (changed(64 + 112 + 8, "<Q", 2**64 - 16), "dynamic section lies behind its end"),
        (changed(64 + 16, "<Q", 2**64 - 1), "not among the bytes that are loaded"),
        (make_elf(tags=((15, 2**60),)), "outside its table of names"),
        (make_elf(tags=((0x6FFFFFFE, 64), (0x6FFFFFFF, 2**40))), "lists of versions"),
        (make_elf(tags=((0x6FFFFFFE, 2**50), (0x6FFFFFFF, 1))), "not among the bytes that are loaded"),
    ],
)  # fmt: skip
def test_a_broken_file_is_refused_in_words(data: bytes, words: str) -> None:
    with pytest.raises(InputError, match=re.escape(words)):
        read_elf(Bytes(data))


def test_a_file_that_needs_too_much_is_refused() -> None:
    with pytest.raises(InputError, match="more than 1024 libraries"):
        read_elf(Bytes(make_elf(needed=(b"a",) * 1025)))


def test_a_list_of_versions_that_leads_back_to_itself_ends() -> None:
    # One record whose next is 2^32-16 bytes on, and whose auxiliary records step by nothing that helps.
    data = make_elf(needed=(b"liba.so",), tags=((0x6FFFFFFE, 0x100000), (0x6FFFFFFF, 8192)))
    at = len(data)
    record = struct.pack("<HHIII", 1, 65535, 1, 16, 16) + struct.pack("<IHHII", 0, 0, 2, 1, 1)
    body = bytearray(data + record * 4000)
    struct.pack_into("<QQ", body, 64 + 32, len(body), len(body))  # PT_LOAD: all of it
    where = bytes(body).index(struct.pack("<QQ", 0x6FFFFFFE, 0x100000))
    struct.pack_into("<Q", body, where + 8, at)
    began = time.process_time()
    with pytest.raises(InputError):
        read_elf(Bytes(bytes(body)))
    assert time.process_time() - began < 2


def test_every_beginning_of_a_file_is_read_or_refused(tmp_path: Path) -> None:
    data = Path("/bin/true").read_bytes()
    for end in range(0, len(data), 97):
        try:
            read_elf(Bytes(data[:end]))
        except InputError:
            continue


@settings(max_examples=400, deadline=1000, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.tuples(st.integers(0, 2999), st.integers(0, 255)), min_size=1, max_size=12), st.booleans())
def test_a_damaged_file_never_does_more_than_be_refused(damage: list[tuple[int, int]], early: bool) -> None:
    data = bytearray(Path("/bin/true").read_bytes())
    for at, value in damage:
        data[at % 400 if early else at] = value
    with contextlib.suppress(InputError):
        read_elf(Bytes(bytes(data)))


@settings(max_examples=300, deadline=1000)
@given(st.binary(max_size=600))
def test_noise_after_the_magic_never_does_more_than_be_refused(noise: bytes) -> None:
    with contextlib.suppress(InputError):
        read_elf(Bytes(b"\x7fELF" + noise))


class Counting(Spool):
    read_bytes = 0

    def read(self, offset: int, length: int) -> bytes:
        data = super().read(offset, length)
        self.read_bytes += len(data)
        return data


def test_a_large_file_is_not_read_whole() -> None:
    spool = Counting()
    spool.append(WHOLE)
    for _ in range(100):
        spool.append(bytes(1 << 20))
    elf = read_elf(Slice(spool, 0, spool.size))
    assert elf is not None
    assert elf.needed == ("liba.so",)
    assert spool.read_bytes < 64 << 10


def test_a_slice_ends_where_it_says(tmp_path: Path) -> None:
    spool = spooled(b"before" + WHOLE + b"after")
    assert read_elf(Slice(spool, 6, len(WHOLE))) == elf_of(WHOLE)
    with pytest.raises(InputError):
        read_elf(Slice(spool, 6, 70))


# What the loaders would open


@pytest.fixture(scope="module")
def debian(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cached Debian image as a directory, unpacked by tar."""
    if not DEBIAN.exists():
        pytest.skip(f"there is no image at {DEBIAN}")
    blobs = DEBIAN / "blobs" / "sha256"

    def blob(digest: str) -> Path:
        return blobs / digest.removeprefix("sha256:")

    index = json.loads((DEBIAN / "index.json").read_text())
    manifest = json.loads(blob(index["manifests"][0]["digest"]).read_text())
    root = tmp_path_factory.mktemp("debian")
    for layer in manifest["layers"]:
        argv = ["tar", "-xf", str(blob(layer["digest"])), "-C", str(root), "--exclude=./dev/*", "--exclude=dev/*"]
        subprocess.run(argv, check=True)
    return root


@pytest.mark.slow
def test_every_program_of_debian_loads_what_its_loader_says(debian: Path) -> None:
    tree = opened(f"oci:{DEBIAN}").tree
    view = View(tree)
    compared = 0
    for path, entry in tree.items():
        if (
            not entry.is_file
            or not entry.mode & 0o111
            or not path.startswith(("/usr/bin", "/usr/sbin", "/usr/lib/systemd"))
        ):
            continue
        elf = read_elf(entry.content)
        if elf is None or not elf.interpreter:
            continue
        found = libraries(view, path)
        assert {one.name: one.path for one in found.libraries} == listed(debian, elf.interpreter, path), path
        assert (found.missing, found.outdated) == ((), ())
        compared += 1
    assert compared > 200


def resolved(lab: Lab, program: str = "/bin/x") -> Resolution:
    found = libraries(View(tree_of(lab.root)), program)
    ours: dict[str, str | None] = {one.name: one.path for one in found.libraries}
    ours |= {one.name: None for one in found.missing}
    assert ours == lab.asked(program)
    return found


@pytest.fixture
def glibc(tmp_path: Path) -> Lab:
    return Lab(tmp_path / "root")


@pytest.fixture
def musl(tmp_path: Path) -> Lab:
    return Lab(tmp_path / "root", musl=True)


def with_runpath_origin(lab: Lab) -> None:
    lab.build("/opt/lib/libone.so.1")
    lab.build("/bin/x", "-Wl,-rpath,$ORIGIN/../opt/lib", needs=("/opt/lib/libone.so.1",))


def with_runpath_of_the_program_only(lab: Lab) -> None:
    lab.build("/opt/lib/libtwo.so")
    lab.build("/opt/lib/libone.so", needs=("/opt/lib/libtwo.so",))
    lab.build("/bin/x", "-Wl,--enable-new-dtags", "-Wl,-rpath,/opt/lib", needs=("/opt/lib/libone.so",))


def with_rpath_of_the_program_for_all(lab: Lab) -> None:
    lab.build("/opt/lib/libtwo.so")
    lab.build("/opt/lib/libone.so", needs=("/opt/lib/libtwo.so",))
    lab.build("/bin/x", "-Wl,--disable-new-dtags", "-Wl,-rpath,/opt/lib", needs=("/opt/lib/libone.so",))


def with_runpath_that_voids_rpath(lab: Lab) -> None:
    lab.build("/opt/lib/libtwo.so")
    lab.build("/opt/lib/libone.so", "-Wl,--enable-new-dtags", "-Wl,-rpath,/elsewhere", needs=("/opt/lib/libtwo.so",))
    lab.build("/bin/x", "-Wl,--disable-new-dtags", "-Wl,-rpath,/opt/lib", needs=("/opt/lib/libone.so",))


def with_two_of_a_name(lab: Lab) -> None:
    lab.build("/opt/lib/libone.so")
    lab.build("/lib/libone.so")
    lab.build("/bin/x", "-Wl,-rpath,/none:/opt/lib", needs=("/lib/libone.so",))


def with_nothing_there(lab: Lab) -> None:
    lab.build("/lib/libone.so")
    lab.build("/lib/libtwo.so")
    lab.build("/bin/x", needs=("/lib/libone.so", "/lib/libtwo.so"))
    (lab.root / "lib/libone.so").unlink()


def with_names_that_are_links(lab: Lab) -> None:
    lab.build("/opt/v1/libone.so.1")
    lab.link("/lib/libone.so.1", "/opt/current/libone.so.1")
    lab.link("/opt/current", "v1")
    lab.build("/bin/x", needs=("/opt/v1/libone.so.1",))


def with_a_path_for_a_name(lab: Lab) -> None:
    path = lab.build("/opt/libone.so")
    lab.build("/opt/libone.so", f"-Wl,-soname,{'/opt/libone.so'}")
    assert path.exists()
    lab.build("/bin/x", needs=("/opt/libone.so",))


def with_a_library_twice(lab: Lab) -> None:
    lab.build("/lib/libone.so")
    lab.link("/lib/libalias.so", "libone.so")
    lab.build("/lib/libtwo.so", needs=("/lib/libone.so",))
    lab.build("/bin/x", needs=("/lib/libone.so", "/lib/libtwo.so"))


SCENES: Final = (
    with_runpath_origin, with_runpath_of_the_program_only, with_rpath_of_the_program_for_all,
    with_runpath_that_voids_rpath, with_two_of_a_name, with_nothing_there, with_names_that_are_links,
    with_a_path_for_a_name, with_a_library_twice,
)  # fmt: skip


@pytest.mark.parametrize("scene", SCENES)
@pytest.mark.parametrize("libc", ["glibc", "musl"])
def test_the_real_loader_opens_the_same(scene: Callable[[Lab], None], libc: str, tmp_path: Path) -> None:
    lab = Lab(tmp_path / "root", musl=libc == "musl")
    scene(lab)
    resolved(lab)


@pytest.mark.parametrize("libc", ["glibc", "musl"])
def test_a_linked_programs_origin_is_where_it_really_is(libc: str, tmp_path: Path) -> None:
    lab = Lab(tmp_path / "root", musl=libc == "musl")
    lab.build("/opt/lib/libone.so")
    lab.build("/opt/bin/x", "-Wl,-rpath,$ORIGIN/../lib", needs=("/opt/lib/libone.so",))
    lab.link("/bin/x", "../opt/bin/x")
    assert libraries(View(tree_of(lab.root)), "/bin/x").missing == ()
    assert run(lab.root, "/bin/x") == 0
    (lab.root / "bin/x").unlink()
    (lab.root / "opt/bin/x").rename(lab.root / "bin/x")
    assert [one.name for one in libraries(View(tree_of(lab.root)), "/bin/x").missing] == ["libone.so"]
    assert run(lab.root, "/bin/x") == 127


def ldconfig(lab: Lab) -> None:
    program = shutil.which("ldconfig", path="/usr/sbin:/sbin")
    if program is None:
        pytest.skip("ldconfig is not installed")
    subprocess.run([program, "-r", str(lab.root)], check=True)


def test_glibc_finds_by_its_cache_what_ld_so_conf_named(glibc: Lab) -> None:
    glibc.put("/etc/ld.so.conf", "# mine\ninclude ld.so.conf.d/*.conf\n")
    glibc.put("/etc/ld.so.conf.d/local.conf", "/usr/local/lib\n")
    glibc.build("/usr/local/lib/libone.so")
    glibc.build("/bin/x", needs=("/usr/local/lib/libone.so",))
    before = resolved(glibc)
    assert [(one.name, one.uncached) for one in before.missing] == [("libone.so", "/usr/local/lib/libone.so")]
    ldconfig(glibc)
    after = resolved(glibc)
    assert (after.missing, after.libraries[0].path) == ((), "/usr/local/lib/libone.so")


def test_glibc_passes_over_files_for_another_machine(glibc: Lab) -> None:
    wrong = bytearray(glibc.build("/lib/libone.so").read_bytes())
    glibc.build("/usr/lib/libone.so")
    glibc.build("/bin/x", "-Wl,-rpath,/opt", needs=("/usr/lib/libone.so",))
    struct.pack_into("<H", wrong, 18, 183)
    glibc.put("/opt/libone.so", bytes(wrong))
    glibc.put("/lib/libone.so", make_elf(bits=32, machine=3))
    assert {one.path for one in resolved(glibc).libraries if one.name == "libone.so"} == {"/usr/lib/libone.so"}


def test_a_library_for_another_machine_only_is_named(glibc: Lab) -> None:
    wrong = bytearray(glibc.build("/lib/libone.so").read_bytes())
    glibc.build("/bin/x", needs=("/lib/libone.so",))
    struct.pack_into("<H", wrong, 18, 183)
    glibc.put("/lib/libone.so", bytes(wrong))
    assert [one.reason for one in resolved(glibc).missing] == ["'/lib/libone.so' is for aarch64"]


@pytest.mark.parametrize(("data", "reason"), [(b"GROUP ( libx.so )\n", "is no ELF file"), (b"", "is no ELF file")])
def test_a_text_in_a_librarys_place_is_named(glibc: Lab, data: bytes, reason: str) -> None:
    glibc.build("/lib/libone.so")
    glibc.build("/bin/x", needs=("/lib/libone.so",))
    glibc.put("/lib/libone.so", data)
    assert subprocess.run(["chroot", str(glibc.root), "/bin/x"], capture_output=True, check=False).returncode == 127
    (missing,) = libraries(View(tree_of(glibc.root)), "/bin/x").missing
    assert missing.reason == f"'/lib/libone.so' {reason}"


def test_a_version_that_a_library_lacks_is_named(glibc: Lab) -> None:
    script = glibc.root / "map"
    script.write_text("OLD_1 { global: one; };\nNEW_2 { global: two; } OLD_1;\n")
    code = "int one(void) { return 0; } int two(void) { return 0; }"
    glibc.build("/lib/libone.so", f"-Wl,--version-script={script}", code=code)
    glibc.build("/bin/x", needs=("/lib/libone.so",), code="int two(void); int main(void) { return two(); }")
    assert libraries(View(tree_of(glibc.root)), "/bin/x").outdated == ()
    script.write_text("OLD_1 { global: one; two; };\n")
    glibc.build("/lib/libone.so", f"-Wl,--version-script={script}", code=code)
    (old,) = libraries(View(tree_of(glibc.root)), "/bin/x").outdated
    assert (old.path, old.version, old.needed_by) == ("/lib/libone.so", "NEW_2", "/bin/x")
    done = subprocess.run(["chroot", str(glibc.root), "/bin/x"], capture_output=True, text=True, check=False)
    assert "version `NEW_2' not found" in done.stderr


def test_musl_searches_where_its_path_file_says(musl: Lab) -> None:
    musl.build("/opt/a/libone.so")
    musl.build("/lib/libtwo.so")
    musl.build("/bin/x", needs=("/opt/a/libone.so", "/lib/libtwo.so"))
    musl.put("/etc/ld-musl-x86_64.path", "/opt/a\n/opt/b")
    assert [one.name for one in resolved(musl).missing] == ["libtwo.so"]
    musl.put("/etc/ld-musl-x86_64.path", "/opt/b:/opt/a:/lib")
    assert resolved(musl).missing == ()


def test_a_static_program_needs_nothing(glibc: Lab) -> None:
    glibc.build("/bin/x", "-static")
    assert libraries(View(tree_of(glibc.root)), "/bin/x") == Resolution()


def test_lib_stands_for_the_directory_that_has_the_library(glibc: Lab) -> None:
    glibc.build("/opt/lib/x86_64-linux-gnu/libone.so")
    glibc.build("/bin/x", "-Wl,-rpath,/opt/$LIB", needs=("/opt/lib/x86_64-linux-gnu/libone.so",))
    assert resolved(glibc).missing == ()


def test_platform_stands_for_the_machine() -> None:
    draft = Draft()
    draft.put(
        "/bin/x", regular(make_elf(interpreter=b"/lib64/ld-linux-x86-64.so.2", needed=(b"/p/${PLATFORM}/l.so",)), 0o755)
    )
    draft.put("/p/x86_64/l.so", regular(make_elf()))
    assert [one.path for one in libraries(View(draft.tree()), "/bin/x").libraries] == ["/p/x86_64/l.so"]


def test_libraries_that_need_each_other_end() -> None:
    draft = Draft()
    draft.put("/bin/x", regular(make_elf(interpreter=b"/lib64/ld-linux-x86-64.so.2", needed=(b"a.so",)), 0o755))
    draft.put("/lib/a.so", regular(make_elf(needed=(b"b.so",))))
    draft.put("/lib/b.so", regular(make_elf(needed=(b"a.so", b"b.so"))))
    assert [one.name for one in libraries(View(draft.tree()), "/bin/x").libraries] == ["a.so", "b.so"]


def test_a_program_made_to_keep_us_busy_is_refused_soon() -> None:
    names = tuple(f"{number}.so".encode() for number in range(1000))
    draft = Draft()
    where = ":".join(f"/{number}" for number in range(600)).encode()
    table = make_elf(
        interpreter=b"/lib64/ld-linux-x86-64.so.2",
        needed=(*names, where),
        tags=((29, 1 + sum(len(n) + 1 for n in names)),),
    )
    draft.put("/bin/x", regular(table, 0o755))
    began = time.process_time()
    with pytest.raises(InputError, match="200000 paths"):
        libraries(View(draft.tree()), "/bin/x")
    assert time.process_time() - began < 5


def test_a_broken_cache_is_no_cache(glibc: Lab) -> None:
    glibc.build("/lib/libone.so")
    glibc.build("/bin/x", needs=("/lib/libone.so",))
    for data in (b"glibc-ld.so.cache1.1" + b"\xff" * 60, b"glibc-ld.so.cache1.1", b"x" * 100):
        glibc.put("/etc/ld.so.cache", data)
        assert libraries(View(tree_of(glibc.root)), "/bin/x").missing == ()


def test_the_loaders_of_the_lab_are_those_of_this_machine() -> None:
    for path in GLIBC.values():
        if path.exists():
            assert elf_of(path.read_bytes()).machine_name == "x86_64"
