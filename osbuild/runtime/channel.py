"""Ways to the agent in a guest of QEMU: the serial port that ours listens on, or vsock, as Kata's runtimes use it.

serial            a virtio-serial port; needs nothing of the host, and an agent that looks for it
vsock             AF_VSOCK; the host's kernel does the work: /dev/vhost-vsock
vhost-user-vsock  the program vhost-device-vsock does it instead, and shows each guest as a unix socket (hybrid vsock)

Seen with vhost-device-vsock 0.3.0, QEMU 7.2 and an emulated guest: calls with short answers work, one after the other;
answers of some 30 KiB stop in the middle until the next call, whatever its tx-buffer-size, and with event_idx=off bytes
were lost. The program's makers know of transfers that hang like that (rust-vmm/vhost-device, issue 494), and with the
kernel's own device nobody saw it; so what reads much should be asked over the serial port there.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import shutil
import struct
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Final, Protocol

from osbuild import command, ttrpc
from osbuild.agent import NAME
from osbuild.errors import HostError
from osbuild.runtime import bounds

DAEMON: Final = "vhost-device-vsock"
VHOST: Final = Path("/dev/vhost-vsock")
SET_GUEST_CID: Final = 0x4008AF60  # VHOST_VSOCK_SET_GUEST_CID, linux/vhost.h; takes a pointer to a u64
CIDS: Final = range(3, (1 << 32) - 1)  # 0 to 2 and the last have meanings: vsock(7)

_CLAIMS: Final = 50  # random numbers of 32 bits: two that are taken in a row would be odd already
_NO_VHOST: Final = f"modprobe vhost_vsock; or --transport serial, or vhost-user-vsock, which needs {DAEMON}"
_USER_CID: Final = 3  # each vhost-device-vsock of ours has one guest, which nobody else sees
_DAEMON_SECONDS: Final = 10.0


class Channel(Protocol):
    """How to connect to the agent, once there is a VMM."""

    def connect(self, seconds: float) -> ttrpc.Connection:
        """CallTimeout while nobody is there."""
        ...

    @property
    def ready(self) -> bool:
        """Whether it is worth trying."""
        ...

    @property
    def name(self) -> str:
        """Of spec.TRANSPORTS."""
        ...


@dataclass(frozen=True, slots=True)
class Serial:
    """The host's end of a virtio-serial port."""

    name: ClassVar[str] = "serial"
    path: Path

    @property
    def ready(self) -> bool:
        return self.path.exists()

    def connect(self, seconds: float) -> ttrpc.Connection:
        return ttrpc.connect_unix(self.path, seconds)


@dataclass(frozen=True, slots=True)
class Vsock:
    """A guest with a number of its own."""

    name: ClassVar[str] = "vsock"
    cid: int
    port: int = ttrpc.AGENT_PORT

    @property
    def ready(self) -> bool:
        return True

    def connect(self, seconds: float) -> ttrpc.Connection:
        return ttrpc.connect_vsock(self.cid, self.port, seconds)


@dataclass(frozen=True, slots=True)
class Hybrid:
    """A guest whose vsock is a unix socket on the host."""

    name: ClassVar[str] = "vhost-user-vsock"
    path: Path
    port: int = ttrpc.AGENT_PORT

    @property
    def ready(self) -> bool:
        return self.path.exists()

    def connect(self, seconds: float) -> ttrpc.Connection:
        return ttrpc.connect_hybrid(self.path, self.port, seconds)


# --- Which one ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Abilities:
    """What of it this host has."""

    vhost: bool  # /dev/vhost-vsock can be opened
    daemon: bool  # vhost-device-vsock is on PATH


def look() -> Abilities:
    """At this host."""
    return Abilities(vhost=os.access(VHOST, os.R_OK | os.W_OK), daemon=shutil.which(DAEMON) is not None)


def choose(wish: str, agent: str, host: Abilities) -> str:
    """serial, vsock or vhost-user-vsock, for a wish of spec.TRANSPORTS and an agent's name; HostError if it cannot be.

    Ours is asked over its serial port unless something else is wished: that works everywhere, and in the same way.
    Others listen on vsock only.
    """
    if wish == "auto":
        if not agent or agent.split()[0] == NAME:
            return "serial"
        if host.vhost:
            return "vsock"
        if host.daemon:
            return "vhost-user-vsock"
        raise HostError(
            f"{agent} listens on vsock only, and this host has none: neither {VHOST} nor {DAEMON}",
            hint=f"modprobe vhost_vsock, or cargo install {DAEMON}; --transport serial tries the serial port",
        )
    if wish == "vsock" and not host.vhost:
        raise HostError(f"{VHOST} cannot be opened", hint=_NO_VHOST)
    if wish == "vhost-user-vsock" and not host.daemon:
        raise HostError(f"{DAEMON} is not installed", hint=f"cargo install {DAEMON}, or --transport serial")
    return wish


# --- What QEMU is given ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Vhost:
    """The host kernel's device: a number that was claimed, and the open file that claims it."""

    cid: int
    descriptor: int


@dataclass(frozen=True, slots=True, kw_only=True)
class VhostUser:
    """A program's device: the socket where it takes a VMM."""

    socket: Path


Device = Vhost | VhostUser | None


@contextlib.contextmanager
def opened(kind: str, serial: Path, run: Path, log: Path) -> Iterator[tuple[Channel, Device]]:
    """What a transport needs beside QEMU, for the length of the block: how to connect, and what QEMU is to have."""
    if kind == "vsock":
        with claimed() as vhost:
            yield Vsock(vhost.cid), vhost
    elif kind == "vhost-user-vsock":
        uds, control = run / "vsock.sock", run / "vhost.sock"
        argv = (DAEMON, "--vm", f"guest-cid={_USER_CID},uds-path={uds},socket={control}")
        # It warns of every byte that a guest does not take yet, which while one boots is all of them.
        env = {"RUST_LOG": "error"}
        with command.start(*argv, cwd=run, log=log, env=env, limits=bounds.limits()) as process:
            deadline = time.monotonic() + _DAEMON_SECONDS
            while not (control.exists() and uds.exists()):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise HostError(f"{DAEMON} gives no socket", hint=f"its output is in {log}")
                time.sleep(0.005)
            yield Hybrid(uds), VhostUser(socket=control)
    else:
        yield Serial(serial), None


@contextlib.contextmanager
def claimed(
    device: Path = VHOST,
    *,
    pick: Callable[[], int] = lambda: secrets.choice(CIDS),
    ioctl: Callable[[int, int, bytes], object] = fcntl.ioctl,
) -> Iterator[Vhost]:
    """A guest number that nobody else has, for the length of the block."""
    try:
        descriptor = os.open(device, os.O_RDWR | os.O_CLOEXEC)
    except OSError as problem:
        raise HostError(f"{device} cannot be opened: {problem.strerror}", hint="modprobe vhost_vsock") from problem
    try:
        yield Vhost(cid=_claim(descriptor, device, pick, ioctl), descriptor=descriptor)
    finally:
        os.close(descriptor)


def _claim(
    descriptor: int, device: Path, pick: Callable[[], int], ioctl: Callable[[int, int, bytes], object]
) -> int:  # fmt: skip
    for _ in range(_CLAIMS):
        cid = pick()
        try:
            ioctl(descriptor, SET_GUEST_CID, struct.pack("=Q", cid))
        except OSError as problem:
            if problem.errno != errno.EADDRINUSE:
                raise HostError(f"{device} takes no guest number: {problem.strerror}") from problem
        else:
            return cid
    raise HostError(f"{device}: {_CLAIMS} random guest numbers, and every one is taken")
