"""osbuilder smoke leaves nothing behind: not after fifty runs, not when it is interrupted, not when it is killed."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from osbuild.artifacts import Kernel
from tests.boot_fixtures import boot_kernel, guests_alive

__all__ = ["boot_kernel"]  # a fixture

pytestmark = pytest.mark.boot

BUSYBOX = Path.home() / ".cache/osbuilder/images/busybox-1"
RUNS = int(os.environ.get("RUNS", "50"))
NETWORKS = ((), ("--network", "tap"), (), ("--network", "macvtap"))  # in turn
SHARED = (Path("/var/tmp"), Path("/dev/shm"))  # where programs put files, whatever TMPDIR says
PROGRAM = Path(sys.executable).with_name("osbuilder")


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A built guest, and directories of its own for what lasts as long as a run."""

    out: Path
    scratch: Path  # TMPDIR
    runs: Path  # XDG_RUNTIME_DIR

    def start(self, *prefix: str, words: tuple[str, ...] = ()) -> subprocess.Popen[bytes]:
        environment = {**os.environ, "TMPDIR": str(self.scratch), "XDG_RUNTIME_DIR": str(self.runs)}
        argv = [*prefix, str(PROGRAM), "smoke", str(self.out), "--accel", "tcg", "-q", *words]
        return subprocess.Popen(argv, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def left(self) -> list[str]:
        """Files in those directories, processes that know the guest's, and those that were given such a TMPDIR."""
        files = [str(path) for home in (self.scratch, self.runs) for path in home.rglob("*")]
        numbers = {*guests_alive(self.out), *(number for number in processes() if self.owns(number))}
        return files + [f"process {number}" for number in sorted(numbers)]

    def owns(self, number: int) -> bool:
        """Whether a process is of one of these runs. Every program that osbuilder starts gets TMPDIR."""
        try:
            return os.fsencode(f"TMPDIR={self.scratch}") in Path(f"/proc/{number}/environ").read_bytes().split(b"\0")
        except OSError:
            return False


@pytest.fixture
def place(boot_kernel: Kernel, tmp_path: Path) -> Iterator[Place]:
    if not BUSYBOX.is_dir():
        pytest.skip(f"there is no {BUSYBOX}: scripts/base-image busybox makes it")
    with contextlib.ExitStack() as stack:
        # Short enough for a socket, wherever the test's own directory is.
        scratch, runs = (Path(stack.enter_context(tempfile.TemporaryDirectory(dir="/tmp"))) for _ in range(2))
        made = Place(out=tmp_path / "out", scratch=scratch, runs=runs)
        argv = [str(PROGRAM), "build", f"oci:{BUSYBOX}", "-o", str(made.out), "--no-smoke", "--make", "image", "-q"]
        subprocess.run(argv, check=True)
        yield made


def processes() -> list[int]:
    return [int(path.name) for path in Path("/proc").glob("[0-9]*")]


def network_namespaces() -> set[int]:
    """The numbers of those in which a process is: they need have no name."""
    found = set()
    for number in processes():
        with contextlib.suppress(OSError):  # it has gone
            found.add(Path(f"/proc/{number}/ns/net").stat().st_ino)
    return found


def held_namespaces() -> set[str]:
    """Those that a mount keeps, such as a name below /run/netns."""
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return {line.split()[3] for line in lines if " - nsfs " in line and line.split()[3].startswith("net:")}


def strange_files() -> set[Path]:
    return {path for home in SHARED if home.is_dir() for path in home.iterdir()}


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_fifty_smoke_tests_leave_no_process_file_link_or_namespace(place: Place) -> None:
    if os.geteuid() != 0 or shutil.which("nsenter") is None:
        pytest.skip("a network of its own needs root and nsenter (util-linux)")
    with subprocess.Popen(["unshare", "--net", "sleep", "inf"]) as holder:
        try:
            inside = ("nsenter", f"--target={holder.pid}", "--net")
            own = Path("/proc/self/ns/net").stat().st_ino
            wait_for(lambda: Path(f"/proc/{holder.pid}/ns/net").stat().st_ino != own, 10)
            links = subprocess.run([*inside, "ip", "-o", "link"], check=True, capture_output=True).stdout
            spaces, held, files = network_namespaces(), held_namespaces(), strange_files()
            used: set[int] = set()
            codes = []
            for number in range(RUNS):
                run = place.start(*inside, words=NETWORKS[number % len(NETWORKS)])
                while run.poll() is None:
                    used |= spaces_of(place) - spaces
                    time.sleep(0.1)
                codes.append(run.returncode)
            assert codes == [0] * RUNS
            assert subprocess.run([*inside, "ip", "-o", "link"], check=True, capture_output=True).stdout == links
        finally:
            holder.kill()
    assert used  # else the rest would be true of a network that never was
    assert place.left() == []
    assert not used & network_namespaces()
    assert not spaces_of(place)
    assert held_namespaces() <= held
    assert strange_files() <= files


def spaces_of(place: Place) -> set[int]:
    """The network namespaces in which a process of these runs is, or which one of their threads has entered."""
    found = set()
    for number in processes():
        if place.owns(number):
            for path in [Path(f"/proc/{number}"), *Path(f"/proc/{number}/task").glob("*")]:
                with contextlib.suppress(OSError):
                    found.add((path / "ns/net").stat().st_ino)
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)],
    ids=["SIGINT", "SIGTERM", "SIGKILL"],
)
def test_a_smoke_test_that_is_ended_takes_its_vmm_with_it(number: signal.Signals, code: int, place: Place) -> None:
    console = place.out / "smoke" / "image" / "console.log"
    process = place.start()
    try:
        wait_for(lambda: console.exists() and console.stat().st_size > 0, 60)
        assert len(guests_alive(place.out)) == 1
        process.send_signal(number)
        assert process.wait(timeout=15) == code
        wait_for(lambda: not guests_alive(place.out), 5)
    finally:
        process.kill()
        process.wait()
    assert not (place.out / "smoke" / "report.json").exists()
    if number is signal.SIGKILL:  # nobody was there to tidy up: the next run does, when it is sure
        (left,) = place.runs.iterdir()
        long_ago = time.time() - 3600
        os.utime(left, (long_ago, long_ago))
        assert place.start().wait() == 0
    assert place.left() == []


def wait_for(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
