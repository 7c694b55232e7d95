"""A place where a program may try to do anything: root of nothing, in a root of its own, of limited size.

    python -m tests.fuzz.agent_jail DIRECTORY PROGRAM [ARGUMENT]...      (as root)

The kernel sees to it: the program is root in a user namespace whose root is nobody on this machine, so it can neither
set the clock, nor load modules, nor mount disks, nor write anything but DIRECTORY, which is /work in there. It has
namespaces of its own of every kind, and a cgroup with limits on memory and processes.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Final

_LIBC: Final = ctypes.CDLL(None, use_errno=True)
_NEWNS, _NEWCGROUP, _NEWUTS, _NEWIPC = 0x00020000, 0x02000000, 0x04000000, 0x08000000
_NEWUSER, _NEWPID, _NEWNET = 0x10000000, 0x20000000, 0x40000000
_EVERYTHING: Final = _NEWUSER | _NEWNS | _NEWCGROUP | _NEWUTS | _NEWIPC | _NEWPID | _NEWNET
_NOBODY: Final = 1_000_000  # of this machine; that many ids from here on are the jail's
_IDS: Final = 65536
_UNIFIED: Final = (Path("/sys/fs/cgroup/unified"), Path("/sys/fs/cgroup"))
_READ_ONLY: Final = ("usr", "bin", "sbin", "lib", "lib64")
_DEVICES: Final = ("null", "zero", "full", "random", "urandom", "tty")
_PROCESSES: Final = 300
_LIMITS: Final = {"memory.max": str(3 << 30), "memory.swap.max": "0", "pids.max": str(_PROCESSES)}
# Mounted by the jail's own root, so that they are its own.
_WITHIN: Final = """
set -e
mount -t proc proc /proc
mount -t tmpfs -o size=256m tmpfs /run
mount -t tmpfs -o size=256m tmpfs /tmp
mount -t tmpfs -o size=64m tmpfs /var/tmp
mount -t devpts -o newinstance,ptmxmode=0666 devpts /dev/pts
mount -t cgroup2 cgroup2 /sys/fs/cgroup
ip link set lo up
ip link add eth0 address 02:00:5e:10:00:01 type veth peer name far0
ip link set far0 up
ulimit -c 0
cd /work
"$@" &
child=$!
trap 'kill -INT $child' INT TERM
while kill -0 $child 2>/dev/null; do wait $child && status=0 || status=$?; done
exit $status
"""


def main() -> int:
    if len(sys.argv) < 3 or os.geteuid() != 0:
        sys.exit(__doc__)
    work = Path(sys.argv[1]).resolve()
    cgroup = next(path for path in _UNIFIED if (path / "cgroup.procs").exists()) / f"osbuilder-jail-{os.getpid()}"
    _give_away(work)
    _make_cgroup(cgroup)
    mapped, ready = os.pipe(), os.pipe()
    root = Path(tempfile.mkdtemp(prefix="jail-"))
    child = os.fork()
    if child == 0:
        _within(work, root, cgroup, sys.argv[2:], mapped=mapped[0], ready=ready[1])
    try:
        os.read(ready[0], 1)  # its user namespace is there
        for kind in ("uid", "gid"):
            Path(f"/proc/{child}/{kind}_map").write_text(f"0 {_NOBODY} {_IDS}\n")
        os.write(mapped[1], b"!")
        signal.signal(signal.SIGTERM, lambda *_: os.kill(child, signal.SIGTERM))
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    finally:
        _end(cgroup)
        root.rmdir()


def _give_away(work: Path) -> None:
    for path in (work, *work.rglob("*")):
        os.lchown(path, _NOBODY, _NOBODY)


def _make_cgroup(path: Path) -> None:
    path.mkdir()
    for name, value in _LIMITS.items():
        with contextlib.suppress(OSError):  # a controller that the parent does not pass on
            (path / name).write_text(value)
    for name in (".", "cgroup.procs", "cgroup.subtree_control", "cgroup.threads"):
        os.chown(path / name, _NOBODY, _NOBODY)


def _within(work: Path, root: Path, cgroup: Path, argv: list[str], *, mapped: int, ready: int) -> None:
    try:
        (cgroup / "cgroup.procs").write_text("0")
        _unshare(_NEWNS)
        _build_root(work, root)
        _unshare(_EVERYTHING)
        os.write(ready, b"!")
        os.read(mapped, 1)
        resource.setrlimit(resource.RLIMIT_NPROC, (_PROCESSES, _PROCESSES))  # where the cgroup has no such limit
        os.setgroups([])
        os.setresgid(0, 0, 0)
        os.setresuid(0, 0, 0)
        first = subprocess.Popen(["/bin/sh", "-c", _WITHIN, "sh", *argv])
        signal.signal(signal.SIGTERM, lambda *_: first.terminate())
        signal.signal(signal.SIGINT, lambda *_: first.send_signal(signal.SIGINT))
        os._exit(first.wait() & 0xFF)
    except BaseException as problem:  # whatever it is, this process must not go on as its parent
        sys.stderr.write(f"jail: {problem}\n")
        sys.stderr.flush()
        os._exit(99)


def _unshare(flags: int) -> None:
    if _LIBC.unshare(flags) != 0:
        raise OSError(ctypes.get_errno(), f"unshare {flags:#x}")


def _mount(*argv: str) -> None:
    subprocess.run(["mount", *argv], check=True)


def _build_root(work: Path, root: Path) -> None:
    """A tmpfs with this machine's programs, read-only, in place of the root."""
    _mount("--make-rprivate", "/")
    _mount("-t", "tmpfs", "-o", "size=64m,mode=755", "tmpfs", str(root))
    for name in ("proc", "sys", "run", "tmp", "var/tmp", "dev/pts", "etc", "work", "jail", "old", "rootfs"):
        (root / name).mkdir(parents=True)
    (root / "var/run").symlink_to("/run")
    for name in _READ_ONLY:
        _bring(Path("/") / name, root / name)
    for name in _DEVICES:
        (root / "dev" / name).touch()
        _mount("--bind", f"/dev/{name}", str(root / "dev" / name))
    (root / "dev/ptmx").symlink_to("pts/ptmx")
    for name in ("passwd", "group"):
        shutil.copy(f"/etc/{name}", root / "etc")
    (root / "etc/resolv.conf").touch()
    _mount("--rbind", "/proc", str(root / "proc"))
    _mount("--rbind", "/sys", str(root / "sys"))
    _mount("-o", "remount,bind,ro", str(root / "sys"))
    _mount("--bind", str(work), str(root / "work"))
    _mount("--bind", str(work / "rootfs"), str(root / "rootfs"))
    os.chdir(root)
    subprocess.run(["pivot_root", ".", "old"], check=True)
    os.chdir("/")
    subprocess.run(["umount", "-l", "/old"], check=True)
    _mount("-o", "remount,ro", "/")


def _bring(source: Path, target: Path) -> None:
    if source.is_symlink():
        target.symlink_to(source.readlink())
        return
    target.mkdir()
    _mount("--bind", str(source), str(target))
    _mount("-o", "remount,bind,ro", str(target))


def _end(cgroup: Path) -> None:
    """Whoever is left in there is nobody's."""
    with contextlib.suppress(OSError):
        (cgroup / "cgroup.kill").write_text("1")
    for _ in range(100):
        for child, _, _ in os.walk(cgroup, topdown=False):
            with contextlib.suppress(OSError):
                Path(child).rmdir()
        if not cgroup.exists():
            return
        time.sleep(0.05)


if __name__ == "__main__":
    sys.exit(main())
