"""Files whole or absent."""

from __future__ import annotations

import hashlib
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from osbuild import output
from osbuild.errors import HostError, SpecError
from osbuild.output import Hashing, check_output, digest, flushing, nameless, write_whole, writing

MIB = 1 << 20
# Writes an image over what is there, as the command does; argv: the file.
WRITER = """
import sys
from pathlib import Path
from osbuild.errors import OsbuilderError
from osbuild.filesystem import erofs
from osbuild.nvdimm_image import FILESYSTEM_START, build_nvdimm_image
from osbuild.tree import Draft, regular
draft = Draft()
for number in range(8):
    draft.put(f"/{number}", regular(bytes([number]) * 5000))
plan = erofs.plan(draft.tree(), start=FILESYSTEM_START, epoch=0)
try:
    print(build_nvdimm_image(erofs, plan, Path(sys.argv[1]), name="erofs", hashed=True).file.sha256)
except (OsbuilderError, OSError) as problem:
    sys.exit(f"{type(problem).__name__}: {problem}")
"""
ROOT = Path(__file__).parent.parent
# What writes, and what makes a file appear.
CALLS = ("pwrite64", "ftruncate", "fsync", "linkat", "rename", "fchmod")


def write_image(path: Path, *inject: str) -> subprocess.CompletedProcess[str]:
    """The writer, with faults in its system calls."""
    before = [shutil.which("strace") or "strace", "-f", "-qqq", "-o", "/dev/null"] if inject else []
    for fault in inject:
        before += ["-e", f"inject={fault}"]
    argv = [*before, sys.executable, "-c", WRITER, str(path)]
    return subprocess.run(argv, capture_output=True, text=True, check=False, cwd=ROOT)


def test_a_block_that_ends_badly_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "f"
    write_whole(path, b"old")

    def half() -> None:
        with writing(path) as descriptor:
            os.write(descriptor, b"half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        half()
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["f"]


@pytest.mark.parametrize("kind", ["directory", "link", "fifo"])
def test_what_is_no_regular_file_is_never_replaced(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "f"
    if kind == "directory":
        path.mkdir()
    elif kind == "link":
        path.symlink_to(tmp_path / "elsewhere")
    else:
        os.mkfifo(path)
    with pytest.raises(SpecError, match="not a regular file"):
        write_whole(path, b"x")
    assert not (tmp_path / "elsewhere").exists()


def test_a_missing_directory_is_the_hosts_lack(tmp_path: Path) -> None:
    with pytest.raises(HostError, match="No such file"):
        write_whole(tmp_path / "no" / "f", b"x")


def test_a_full_disk_is_said_and_leaves_nothing(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(HostError, match="cannot write"):
            write_whole(tmp_path / "f", b"x" * 5000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("problem", ["EIO", "ENOSPC", "EDQUOT"])
def test_a_disk_that_refuses_a_call_leaves_the_old_file_and_nothing_else(
    call: str, problem: str, tmp_path: Path
) -> None:
    path = tmp_path / "x.img"
    path.write_bytes(b"old")
    done = write_image(path, f"{call}:error={problem}:when=1")
    assert done.returncode == 1, done.stdout
    assert done.stderr.startswith("HostError: cannot write"), done.stderr
    assert done.stderr.count("\n") == 1
    assert os.listdir(tmp_path) == ["x.img"]
    assert path.read_bytes() == b"old"


def test_the_directory_that_cannot_be_synced_is_said_and_the_file_is_whole(tmp_path: Path) -> None:
    good = write_image(tmp_path / "good.img").stdout.strip()
    done = write_image(tmp_path / "x.img", "fsync:error=EIO:when=2")  # strace counts in each thread
    assert done.stderr.startswith("HostError: cannot write"), done.stderr
    assert hashlib.sha256((tmp_path / "x.img").read_bytes()).hexdigest() == good


@pytest.mark.slow
def test_a_killed_run_leaves_the_old_file_or_the_new_one(tmp_path: Path) -> None:
    new = write_image(tmp_path / "x.img").stdout.strip()
    seen = set()
    for call in CALLS:
        for number in (1, 2, 3, 4, 8):
            home = tmp_path / f"{call}-{number}"
            home.mkdir()
            (home / "x.img").write_bytes(b"old")
            done = write_image(home / "x.img", f"{call}:signal=KILL:when={number}")
            if done.returncode == 0:  # there are not so many of it
                continue
            assert done.returncode == -signal.SIGKILL, done.stderr
            found = hashlib.sha256((home / "x.img").read_bytes()).hexdigest()
            assert found in (new, hashlib.sha256(b"old").hexdigest()), (call, number)
            seen.add(found)
            assert write_image(home / "x.img").returncode == 0
            assert os.listdir(home) == ["x.img"], (call, number)  # the next run has taken away what there was
    assert len(seen) == 2


def test_a_killed_run_leaves_nothing_where_nothing_was(tmp_path: Path) -> None:
    for call, number in (("pwrite64", 3), ("fsync", 1), ("fchmod", 1), ("linkat", 1)):
        done = write_image(tmp_path / "x.img", f"{call}:signal=KILL:when={number}")
        assert done.returncode == -signal.SIGKILL
        assert os.listdir(tmp_path) == []


def test_a_small_disk_is_filled_and_left_empty(small_disk: Path) -> None:
    def fill(*, needs: int) -> None:
        with writing(small_disk / "x.img", needs=needs) as descriptor:
            for _ in range(20):
                os.write(descriptor, bytes(MIB))

    with pytest.raises(HostError, match=r"cannot write .*: No space left on device"):
        fill(needs=0)
    assert os.listdir(small_disk) == []
    with pytest.raises(HostError, match=r"need 20 MiB, have [78] MiB"):
        fill(needs=20 * MIB)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    home = tmp_path / "small"
    home.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(home)], capture_output=True)
    if done.returncode:
        pytest.skip("may not mount a tmpfs")
    try:
        yield home
    finally:
        subprocess.run(["umount", str(home)], check=True)


def test_what_cannot_fit_is_refused_before_a_byte_is_written(tmp_path: Path) -> None:
    with (
        pytest.raises(HostError, match=r"no space left on .*: need 1099511627776 MiB, have \d+ MiB"),
        writing(tmp_path / "x", needs=1 << 60),
    ):
        pytest.fail("it began")


def test_a_directory_that_cannot_be_written_to_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(HostError, match="Not a directory"):
        check_output(tmp_path / "file" / "x")


def test_a_digest_is_that_of_sha256sum_whatever_is_a_hole(tmp_path: Path) -> None:
    path = tmp_path / "f"
    with path.open("w+b") as file:
        file.truncate(9 * MIB + 5)
        for offset in (0, 3 * MIB - 7, 8 * MIB + 4096):
            os.pwrite(file.fileno(), os.urandom(70_000), offset)
        found = digest(file.fileno())
    assert found == subprocess.run(["sha256sum", path], capture_output=True, text=True, check=True).stdout.split()[0]


def test_the_digest_of_a_file_is_made_while_it_grows(tmp_path: Path) -> None:
    with nameless(tmp_path) as descriptor, Hashing(descriptor) as hashing:
        for at in range(0, 3 * MIB, 100_000):
            os.pwrite(descriptor, os.urandom(70_000), at)  # and holes
            hashing.upto(at)
        os.pwrite(descriptor, b"end", 7 * MIB)
        found, wanted = hashing.finish(), digest(descriptor)
    assert found == wanted


def test_a_digest_that_nobody_asks_for_keeps_nobody_waiting(tmp_path: Path) -> None:
    with nameless(tmp_path) as descriptor, Hashing(descriptor) as hashing:
        os.pwrite(descriptor, b"x", 0)
        hashing.upto(1)
    assert not hashing._thread.is_alive()


def test_a_digest_of_what_cannot_be_read_says_so(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"x")
    descriptor = os.open(tmp_path / "f", os.O_WRONLY)
    with Hashing(descriptor) as hashing, pytest.raises(OSError, match="Bad file descriptor"):
        hashing.finish()
    os.close(descriptor)


def test_what_was_written_is_on_the_disk_after_flushing_or_it_says_so(tmp_path: Path) -> None:
    read, write = os.pipe()
    os.close(write)
    with pytest.raises(OSError, match="Invalid argument"), flushing(read):  # fsync(2) of a pipe
        pass
    os.close(read)


def test_the_disk_does_not_wait_for_the_last_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed = threading.Event()
    monkeypatch.setattr(os, "fdatasync", lambda descriptor: flushed.set())
    with nameless(tmp_path) as descriptor, flushing(descriptor) as written:
        assert flushed.wait(10)
        written.set()


def test_a_nameless_file_is_never_seen(tmp_path: Path) -> None:
    with nameless(tmp_path) as descriptor:
        os.write(descriptor, b"x")
        assert os.listdir(tmp_path) == []


def test_without_nameless_files_the_result_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some file systems have no O_TMPFILE: then O_DIRECTORY alone is what is left of it."""
    monkeypatch.setattr(os, "O_TMPFILE", os.O_DIRECTORY)
    stale = tmp_path / f".f.1-1{output._SUFFIX}"
    stale.write_bytes(b"")
    write_whole(tmp_path / "f", b"new")
    assert (tmp_path / "f").read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["f"]
    with nameless(tmp_path) as descriptor:
        os.write(descriptor, b"x")
        assert os.listdir(tmp_path) == ["f"]
