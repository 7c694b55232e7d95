"""Directories that a guest shares: what the host has for it, and that nothing of it stays."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from osbuild.artifacts import DiskImage, Initrd
from osbuild.errors import HostError
from osbuild.runtime import bounds, qemu, shares
from osbuild.runtime.shares import DAEMON, NINEP, VIRTIO_FS, Server, Share, arguments, find_program, opened
from tests.test_qemu import IMAGE, INITRD, machine

RUST = "Usage: virtiofsd [OPTIONS]\n  --shared-dir <DIR>\n  --readonly\n  --fd <FD>\n"
C = "usage: virtiofsd [options]\n  -o source=PATH  shared directory tree\n"

# A program in its place, which serves a socket that it is given and answers vhost-user's first question; or does not.
FAKE = """\
#!{python}
import os, socket, struct, sys
usage = {usage!r}
if "--help" in sys.argv:
    print(usage); sys.exit({help})
descriptor = int(next(word for word in sys.argv if word.startswith("--fd=")).removeprefix("--fd="))
listener = socket.socket(fileno=descriptor)
if any({refused!r} in word for word in sys.argv):
    sys.exit("Operation not permitted: no " + {refused!r})
while True:
    connection, _ = listener.accept()
    if connection.recv(12) == struct.pack("=III", 1, 1, 0):
        connection.sendall(struct.pack("=IIIQ", 1, 5, 8, 1 << 30))
"""


@pytest.fixture
def places(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The only directory where a virtiofsd is looked for."""
    home = tmp_path / "bin"
    home.mkdir()
    monkeypatch.setattr(shares, "_PLACES", ())
    monkeypatch.setenv("PATH", str(home))
    return home


def install(places: Path, *, usage: str = C, refused: str = "nothing", help: int = 0) -> None:  # noqa: A002
    program = places / DAEMON
    program.write_text(FAKE.format(python=sys.executable, usage=usage, refused=refused, help=help))
    program.chmod(0o755)


@pytest.mark.parametrize(
    ("usage", "read_only", "wanted"),
    [
        (C, False, ("-f", "-o", "source=/a\\,b", "-o", "sandbox=chroot", "-o", "cache=auto")),
        (C, True, ("-f", "-o", "source=/a\\,b", "-o", "sandbox=chroot", "-o", "cache=auto")),
        (RUST, False, ("--shared-dir=/a,b", "--sandbox=chroot", "--cache=auto")),
        (RUST, True, ("--shared-dir=/a,b", "--sandbox=chroot", "--cache=auto", "--readonly")),
    ],
    ids=["C", "C, read-only", "Rust", "Rust, read-only"],
)
def test_each_virtiofsd_is_told_in_its_own_words(usage: str, read_only: bool, wanted: tuple[str, ...]) -> None:
    server = Server(program="x", usage=usage, sandbox="chroot")
    assert arguments(server, Path("/a,b"), 7, read_only=read_only) == ("--fd=7", "--rlimit-nofile=0", *wanted)
    assert server.can_refuse is (usage is RUST)


def test_it_is_found_beside_path_and_on_path_first(
    tmp_path: Path, places: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(HostError, match="virtiofsd is not installed"):
        find_program()
    beside = tmp_path / "libexec"
    beside.mkdir()
    install(beside)
    monkeypatch.setattr(shares, "_PLACES", (str(beside),))
    assert find_program() == str(beside / DAEMON)
    install(places)
    assert find_program() == str(places / DAEMON)


def test_nobody_who_did_not_ask_shares_anything(tmp_path: Path) -> None:
    with opened(False, tmp_path, tmp_path / "log") as found:
        assert found is None
    assert list(tmp_path.iterdir()) == []


def test_each_way_has_two_directories_and_a_server_for_each(tmp_path: Path, places: Path) -> None:
    install(places, usage=RUST)
    with opened(True, tmp_path, tmp_path / "virtiofsd.log") as found:
        assert found is not None
        assert (found.ways, found.missing) == ((NINEP, VIRTIO_FS), {})
        writable, read_only = found.of(VIRTIO_FS)
        assert (writable.read_only, read_only.read_only, read_only.refuses) == (False, True, True)
        assert len({share.home for share in found.shares}) == 4
        assert all(share.home.is_dir() for share in found.shares)
        served = running(places)
    assert sorted("--readonly" in line for line in served) == [False, True]
    assert all("--sandbox=namespace" in line for line in served)
    assert running(places) == []


def test_a_server_that_may_not_shut_itself_in_one_way_does_it_in_another(tmp_path: Path, places: Path) -> None:
    install(places, refused="sandbox=namespace")
    with opened(True, tmp_path, tmp_path / "virtiofsd.log") as found:
        assert found is not None
        assert not found.missing
        assert ["sandbox=chroot" in line for line in running(places)] == [True, True]


@pytest.mark.parametrize(
    ("more", "said"),
    [({"refused": "sandbox="}, "Operation not permitted: no sandbox="), ({"help": 3}, "does not work here: usage")],
    ids=["it cannot shut itself in", "it cannot even say what it takes"],
)
def test_a_server_that_does_not_work_here_is_missing_in_its_own_words(
    more: dict[str, object], said: str, tmp_path: Path, places: Path
) -> None:
    install(places, usage="usage", **more)  # type: ignore[arg-type]
    with opened(True, tmp_path, tmp_path / "virtiofsd.log") as found:
        assert found is not None
        assert found.ways == (NINEP,)
        assert said in found.missing[VIRTIO_FS]
    assert running(places) == []


def options(root: DiskImage | Initrd, *found: Share) -> list[str]:
    made = qemu.arguments(
        machine(root), console=Path("/c"), agent=Path("/a"), accel="tcg", shares=found
    )  # fmt: skip
    return [" ".join(pair) for pair in itertools.pairwise(made)]


@pytest.mark.parametrize(("root", "bus"), [(IMAGE, "pci"), (INITRD, "device")], ids=["q35", "microvm"])
def test_qemu_serves_9p_itself_and_takes_the_rest_from_a_socket(root: DiskImage | Initrd, bus: str) -> None:
    plain = Share(way=NINEP, tag="p", home=Path("/r/a,b"), read_only=True, refuses=True)
    served = Share(
        way=VIRTIO_FS, tag="v", home=Path("/r"), read_only=False, refuses=False, socket=Path("/r/v,s")
    )  # fmt: skip
    pairs = options(root, plain, served)
    assert "-fsdev local,id=share0,path=/r/a,,b,security_model=none,multidevs=remap,readonly=on" in pairs
    assert f"-device virtio-9p-{bus},fsdev=share0,mount_tag=p" in pairs
    assert "-chardev socket,id=share1,path=/r/v,,s" in pairs
    assert f"-device vhost-user-fs-{bus},chardev=share1,tag=v,queue-size=1024" in pairs
    assert "-object memory-backend-memfd,id=memory,size=256M,share=on" in pairs
    assert ("-global virtio-mmio.force-legacy=false" in pairs) is (bus == "device")


def test_what_qemu_serves_itself_needs_no_shared_memory() -> None:
    plain = Share(way=NINEP, tag="p", home=Path("/r"), read_only=False, refuses=False)
    said = " ".join(options(INITRD, plain))
    assert not any(word in said for word in ("readonly", "memory-backend", "force-legacy"))
    assert "fsdev" not in " ".join(options(INITRD))


KEEP = """\
import sys
from pathlib import Path
from osbuild.runtime.shares import opened
with opened(True, Path(sys.argv[1]), Path(sys.argv[1]) / "log") as found:
    print(found.ways, flush=True)
    sys.stdin.read()
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="virtiofsd shuts itself in as root")
def test_this_hosts_virtiofsd_works_and_ends_with_us_even_when_we_are_killed(tmp_path: Path) -> None:
    try:
        find_program()
    except HostError as problem:
        pytest.skip(str(problem))
    process = subprocess.Popen(
        [sys.executable, "-c", KEEP, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"('9p', 'virtio-fs')\n", (tmp_path / "log").read_text()
        assert len(running(tmp_path)) >= 2
        for limits in limits_of(tmp_path):
            assert limits["core file size"] == "0"
            assert limits["file size"] == str(bounds.LONGEST)
        process.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 10
    while running(tmp_path):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def limits_of(home: Path) -> list[dict[str, str]]:
    """Of the same processes."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (path / "cmdline").read_bytes().decode(errors="replace").split("\0")
            if any(DAEMON in word for word in words[:2]) and any(str(home) in word for word in words):
                found.append(dict(re.findall(r"^Max (.+?)  +(\S+) ", (path / "limits").read_text(), re.MULTILINE)))
    assert found
    return found


def running(home: Path) -> list[str]:
    """The processes of which the command line names this directory, but for those of tests."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().decode(errors="replace").split("\0")
            state = (path.parent / "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        if state != "Z" and any(DAEMON in word for word in words[:2]) and any(str(home) in word for word in words):
            found.append(" ".join(words))
    return found
