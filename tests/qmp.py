"""A guest that things can be plugged into as Kata's runtime plugs them: behind a bridge, too."""

from __future__ import annotations

import contextlib
import json
import socket
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from osbuild import command, ttrpc
from osbuild.agent_client import AgentClient
from osbuild.arch import X86_64
from osbuild.artifacts import Initrd, Kernel
from osbuild.runtime import qemu
from osbuild.runtime.base import Machine
from osbuild.runtime.qmp import Qmp

_SECONDS: Final = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Pluggable:
    qmp: Qmp
    client: AgentClient
    console: Path

    def log(self) -> list[dict[str, Any]]:  # Any: what JSON may hold
        found = [line for line in self.console.read_text(errors="replace").splitlines() if line.startswith("{")]
        return [json.loads(line) for line in found if line.endswith("}")]


# Linux counts the empty sockets of a board only where it knows the hypervisor, which TCG's it does not: it is made to
# believe in VMware's, of which QEMU speaks enough.
_KNOWN_HYPERVISOR: Final = ("-smbios", "type=1,serial=VMware-")
_Q35: Final = {
    "-machine": "q35",
    "-cpu": "max,hypervisor=off",
    "-smp": "1,sockets=3,cores=1,threads=1,maxcpus=3",
    "-m": "256M,slots=2,maxmem=1G",
}
# As Kata's runtime has it; without what is reserved the devices behind it get no addresses.
_BRIDGE: Final = (
    "pci-bridge,bus=pcie.0,id=bridge,chassis_nr=1,shpc=off,addr=08,io-reserve=4k,mem-reserve=1m,pref64-reserve=1m"
)
_RENAMED: Final = {
    "virtio-serial-device": "virtio-serial-pci",
    "virtio-rng-device,rng=entropy": "virtio-rng-pci,rng=entropy",
}


def arguments(microvm: Sequence[str], monitor: Path) -> tuple[str, ...]:
    """A microvm's command line for q35: room for processors and memory, a bridge for devices, a monitor."""
    argv = [_RENAMED.get(word, word) for word in microvm]
    for option, value in _Q35.items():
        argv[argv.index(option) + 1] = value
    append = argv.index("-append") + 1
    # More than one processor needs the local timers.
    argv[append] = " ".join(word for word in argv[append].split() if word != "nolapic_timer")
    return (*argv, *_KNOWN_HYPERVISOR, "-device", _BRIDGE, "-qmp", f"unix:{monitor},server=on,wait=off")


@contextlib.contextmanager
def pluggable(kernel: Kernel, root: Initrd, work: Path, *words: str) -> Iterator[Pluggable]:
    machine = Machine(kernel=kernel, root=root, memory_mib=256, accel="tcg", words=words)
    work.mkdir(exist_ok=True)
    console = work / "console.log"
    program, chosen = qemu.ready(X86_64, "tcg")
    with tempfile.TemporaryDirectory(prefix="plug-") as directory:
        agent, monitor = Path(directory) / "agent", Path(directory) / "monitor"
        argv = arguments(qemu.arguments(machine, console=console, agent=agent, accel=chosen.name), monitor)
        with (
            command.start(str(program), *argv, log=work / "qemu.log"),
            contextlib.closing(_connected(monitor, work / "qemu.log")) as qmp,
            ttrpc.connect_unix(agent, _SECONDS) as connection,
        ):
            client = AgentClient(connection)
            client.wait(_SECONDS)
            yield Pluggable(qmp=qmp, client=client, console=console)


def _connected(monitor: Path, log: Path) -> Qmp:
    deadline = time.monotonic() + _SECONDS
    while True:
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.connect(str(monitor))
        except OSError:
            connection.close()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.01)
        else:
            return Qmp(connection)
