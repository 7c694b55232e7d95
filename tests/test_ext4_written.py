"""An ext4 to write to, in a guest whose kernel changes it for a while; then e2fsck, resize2fs and our reader see it."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from pathlib import Path
from typing import Final

import pytest

from osbuild import command
from osbuild.arch import X86_64
from osbuild.artifacts import DiskImage, File, Kernel
from osbuild.cache import default_cache
from osbuild.filesystem import Volume, ext4, ext4_reader
from osbuild.filesystem.base import Room
from osbuild.initrd import archive
from osbuild.runtime import accel, qemu
from osbuild.runtime.base import Machine
from osbuild.tree import Draft, Entry, Sparse, Spool, Tree, device, regular
from tests.boot_fixtures import boot_kernel

__all__ = ["boot_kernel"]  # a fixture

MIB: Final = 1 << 20
COUNT, ENTRIES, MORE = 6000, 100_000, 20_000  # as in changer.c
SOURCE: Final = Path(__file__).parent / "changer/changer.c"


def tree() -> Tree:
    spool = Spool()
    spool.append(b"s" * 5000)
    made = Draft()
    for number in range(COUNT):
        made.put(f"/many/name-{number}", regular(b"x" * (number % 50)))
    xattrs = {"user.inside": b"i", "user.outside": b"o" * 2000}
    made.put("/marked", Entry(mode=stat.S_IFREG | 0o644, mtime_ns=0, xattrs=xattrs))
    made.put("/plain", regular(b"plain"))
    halves = regular(b"even"), regular(b"odd")
    for number in range(ENTRIES):
        made.put(f"/deep/entry-{number}", halves[number % 2])
    made.put("/holes", regular(Sparse(spool, 9 * MIB, ((0, 0, 100), (3 * MIB, 0, 5000), (8 * MIB, 0, 5000)))))
    made.put("/large", regular(b"y" * (5 * MIB)))
    return made.tree()


def changed_names() -> set[str]:
    """What the program leaves."""
    names = {"/", "/deep", "/many", "/marked", "/plain", "/holes", "/larger", "/linked", "/pointer", "/made"}
    for number in range(COUNT):
        names.add(f"/many/new-{number}")
        if number % 3 == 1:
            names.add(f"/many/{number:0{20 + number % 100}}-renamed")
        if number % 3 == 2:
            names.add(f"/many/name-{number}")
    names |= {f"/deep/entry-{number}" for number in range(ENTRIES) if number % 7}
    names |= {f"/deep/more-{number}" for number in range(MORE)}
    for above in range(1, 100, 2):
        names |= {f"/made/{above}", *(f"/made/{above}/{number}" for number in range(20))}
    return names


def write(path: Path, room: Room) -> None:
    plan = ext4.plan(tree(), start=MIB, epoch=0, room=room)
    with path.open("wb") as file:
        file.truncate(plan.size)
        plan.write(file.fileno(), 0)


def read(path: Path) -> Volume:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return ext4_reader.read(descriptor, 0, path.stat().st_size)
    finally:
        os.close(descriptor)


def e2fsck(path: Path, *words: str) -> tuple[int, str]:
    done = subprocess.run([command.find("e2fsck"), *words, str(path)], capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def changer(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    if shutil.which("musl-gcc") is None:
        pytest.skip("musl-gcc is not installed")
    program = tmp_path_factory.mktemp("changer") / "changer"
    flags = ("-std=c11", "-O2", "-Wall", "-Wextra", "-Werror", "-static", "-s")
    subprocess.run(["musl-gcc", *flags, "-o", program, SOURCE], check=True)
    return program.read_bytes()


def change(kernel: Kernel, program: bytes, image: Path, ending: str, work: Path) -> str:
    """Boot the program with the image as a disk that it may write to; what its console said."""
    own = Draft()
    own.put("/init", regular(program, 0o755))
    own.put("/dev/console", device(stat.S_IFCHR, 0o600, 5, 1))
    initrd, console = work / "initrd", work / "console.log"
    initrd.write_bytes(b"".join(archive(own.tree())))
    root = DiskImage(file=File(path=image, size=image.stat().st_size, sha256=""), filesystem="", dax=False, words=())
    words = ("rdinit=/init", f"changer={ending}")
    machine = Machine(kernel=kernel, root=root, memory_mib=256, words=words)
    emulator = Path(command.find(X86_64.qemu))
    chosen = accel.choose("auto", X86_64, emulator, cache=default_cache())
    options = qemu.arguments(machine, console=console, agent=work / "agent", accel=chosen.name)
    drives = [option.endswith("readonly=on") and str(image) in option for option in options]
    assert sum(drives) == 1
    writable = [
        option.removesuffix("readonly=on") + "readonly=off" if drive else option
        for option, drive in zip(options, drives, strict=True)
    ]
    with (work / "qemu.log").open("wb") as log:
        subprocess.run(
            [emulator, *writable, "-initrd", str(initrd)], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            check=True, timeout=1200,
        )  # fmt: skip
    return console.read_text(errors="replace")


@pytest.mark.slow
@pytest.mark.boot
@pytest.mark.timeout(1300)  # an emulated guest among many other processes
@pytest.mark.parametrize("ending", ["unmount", "cut"])
def test_a_guest_changes_thousands_of_files_and_leaves_it_clean(
    ending: str, boot_kernel: Kernel, changer: bytes, tmp_path: Path
) -> None:
    image = tmp_path / "fs"
    write(image, Room(writable=True, size=256 * MIB))
    said = change(boot_kernel, changer, image, ending, tmp_path)
    assert "changer: done" in said, said[-2000:]
    assert "EXT4-fs error" not in said
    assert "EXT4-fs warning" not in said
    if ending == "cut":
        status, told = e2fsck(image, "-fp")  # replays the journal; finds no lost+found, and makes it
        assert status == 1, told
        assert "recovering journal" in told
    status, told = e2fsck(image, "-fn")
    assert status == 0, told
    found = read(image)
    assert found.problems == ()
    names = set(found.tree) - {"/lost+found", "/unfinished"}
    assert names == changed_names()
    assert found.tree["/many/new-4999"].content.size == 4999
    assert found.tree["/marked"].xattrs == {"user.inside": b"changed", "user.new": b"n"}
    assert found.tree["/plain"].xattrs == {"user.large": b"v" * 3000}
    assert found.tree["/linked"] is found.tree["/plain"]
    holes = b"".join(found.tree["/holes"].content.chunks())
    assert len(holes) == 5 * MIB
    assert holes[MIB : MIB + 7] == b"filled\0"
    assert holes[3 * MIB : 3 * MIB + 5001] == b"s" * 5000 + b"\0"
    assert b"".join(found.tree["/larger"].content.chunks()) == b"l" * (12 * MIB)


@pytest.mark.slow
@pytest.mark.parametrize(
    "size",
    [
        pytest.param(0, id="as small as can be"),
        pytest.param(1 << 30, id="1 GiB", marks=pytest.mark.slow),
        pytest.param(20 << 30, id="20 GiB", marks=pytest.mark.slow),
    ],
)
def test_resize2fs_shrinks_and_grows_it(size: int, tmp_path: Path) -> None:
    image = tmp_path / "fs"
    write(image, Room(writable=True, size=256 * MIB))
    before = {path: _told(entry) for path, entry in tree().items()}
    assert e2fsck(image, "-fp")[0] == 1, "it makes a lost+found"
    if size:
        os.truncate(image, size)
    words = [str(image)] if size else ["-M", str(image)]
    subprocess.run([command.find("resize2fs"), *words], check=True, capture_output=True)
    status, told = e2fsck(image, "-fn")
    assert status == 0, told
    found = read(image)
    assert found.size == size if size else found.size < 128 * MIB
    assert {path: _told(entry) for path, entry in found.tree.items() if path != "/lost+found"} == before


def _told(entry: Entry) -> tuple[object, ...]:
    return entry.mode, dict(entry.xattrs), entry.content.size, b"".join(entry.content.chunks())
