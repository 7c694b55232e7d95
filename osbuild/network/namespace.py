"""A network namespace without a name: a thread lives in it, open files keep it, and the kernel ends it.

Nothing of it has a place in the filesystem, so nothing of it can be left behind: when the thread has ended and the last
file is closed, by us or by whatever killed us, the kernel takes away every link, address and filter in it.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import socket
import stat
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Final, ParamSpec, TypeVar

from osbuild.errors import HostError

P = ParamSpec("P")
T = TypeVar("T")

CAP_NET_ADMIN: Final = 12  # linux/capability.h
CAP_NET_RAW: Final = 13
CAP_SYS_ADMIN: Final = 21
CAP_MKNOD: Final = 27
_NAMES: Final = {
    CAP_NET_ADMIN: "CAP_NET_ADMIN", CAP_NET_RAW: "CAP_NET_RAW", CAP_SYS_ADMIN: "CAP_SYS_ADMIN", CAP_MKNOD: "CAP_MKNOD",
}  # fmt: skip

_CLONE_NEWNET: Final = 0x40000000  # linux/sched.h
# linux/mount.h and asm-generic/unistd.h; the numbers are the same on x86_64 and aarch64, and glibc knows them late.
_FSOPEN, _FSCONFIG, _FSMOUNT = 430, 431, 432
_FSOPEN_CLOEXEC: Final = 1
_FSMOUNT_CLOEXEC: Final = 1
_FSCONFIG_CMD_CREATE: Final = 6


class Namespace:
    """One that begins here. Sockets made in it stay in it, whoever uses them."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="network")
        try:
            self.descriptor = self._pool.submit(_enter).result()
        except BaseException:
            self._pool.shutdown()
            raise

    def do(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call something in there."""
        return self._pool.submit(work, *args, **kwargs).result()

    def socket(self, family: int, kind: int, protocol: int = 0) -> socket.socket:
        return self.do(socket.socket, family, kind, protocol)

    @property
    def number(self) -> int:
        """What the kernel calls it: the inode of every /proc/PID/ns/net that leads here."""
        return os.fstat(self.descriptor).st_ino

    def close(self) -> None:
        os.close(self.descriptor)
        self._pool.shutdown()


class Here:
    """The namespace of whoever asks, where a `Namespace` is another."""

    def do(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        return work(*args, **kwargs)


@contextlib.contextmanager
def namespace() -> Iterator[Namespace]:
    """A new one for the length of the block."""
    made = Namespace()
    try:
        yield made
    finally:
        made.close()


def is_alive(number: int) -> bool:
    """Whether any thread lives in the namespace of that number, or holds it open, as far as this user may see."""
    for path in glob.iglob("/proc/[0-9]*/task/[0-9]*/ns/net"):  # noqa: PTH207 - hundreds of them
        with contextlib.suppress(OSError):
            if os.stat(path).st_ino == number:  # noqa: PTH116
                return True
    for path in glob.iglob("/proc/[0-9]*/fd/*"):  # noqa: PTH207
        with contextlib.suppress(OSError):
            if os.readlink(path) == f"net:[{number}]":  # noqa: PTH115
                return True
    return False


def missing_capabilities(*wanted: int) -> tuple[str, ...]:
    """Those of these that this process does not have, by name."""
    with open("/proc/self/status", encoding="ascii") as status:  # noqa: PTH123
        line = next(line for line in status if line.startswith("CapEff:"))
    held = int(line.split()[1], 16)
    return tuple(_NAMES[number] for number in wanted if not held >> number & 1)


def open_by_number(device: str) -> int:
    """A character device `MAJOR:MINOR`, opened through a node in a filesystem that only this call can see."""
    major, minor = map(int, device.split(":"))
    home = mount_privately("tmpfs")
    try:
        os.mknod("device", stat.S_IFCHR | 0o600, os.makedev(major, minor), dir_fd=home)
        return os.open("device", os.O_RDWR | os.O_CLOEXEC, dir_fd=home)
    except OSError as problem:
        raise HostError(
            f"the device {device} cannot be opened: {problem.strerror}",
            hint="a container's device cgroup may forbid it; --network tcfilter needs no such device",
        ) from problem
    finally:
        os.close(home)


def mount_privately(kind: str) -> int:
    """A new filesystem that is attached nowhere, by an open directory: a sysfs shows the caller's network."""
    try:
        context = _call(_FSOPEN, kind.encode(), _FSOPEN_CLOEXEC)
        try:
            _call(_FSCONFIG, context, _FSCONFIG_CMD_CREATE, None, None, 0)
            return _call(_FSMOUNT, context, _FSMOUNT_CLOEXEC, 0)
        finally:
            os.close(context)
    except OSError as problem:
        raise HostError(
            f"a private {kind} cannot be mounted: {problem.strerror}", hint="--network tcfilter needs none"
        ) from problem


def _enter() -> int:
    import ctypes  # only by who makes a network

    if ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWNET) != 0:
        number = ctypes.get_errno()
        raise HostError(
            f"a network namespace cannot be made: {os.strerror(number)}",
            hint="--network user needs none" if number in (errno.EPERM, errno.ENOSPC) else "",
        )
    return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)


def _call(number: int, *args: object) -> int:
    import ctypes

    result = int(ctypes.CDLL(None, use_errno=True).syscall(ctypes.c_long(number), *args))
    if result < 0:
        problem = ctypes.get_errno()
        raise OSError(problem, os.strerror(problem))
    return result
