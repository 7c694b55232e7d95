"""QEMU's own protocol, as much of it as plugging takes; and a guest that things can be plugged into.

What osbuilder boots has nothing to plug (microvm) or asks nobody (q35 with an image): Kata's runtime does the plugging.
"""

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

_SECONDS: Final = 30.0


class Qmp:
    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(_SECONDS)
        try:
            self._socket.connect(str(path))
        except OSError:
            self._socket.close()
            raise
        self._lines = self._socket.makefile("r")
        assert "QMP" in json.loads(self._lines.readline())
        self.execute("qmp_capabilities")

    def execute(self, what: str, **arguments: Any) -> Any:  # Any: what JSON may hold
        self._socket.sendall(json.dumps({"execute": what, "arguments": arguments}).encode() + b"\n")
        while True:
            answer = json.loads(self._lines.readline())
            if "event" in answer:
                continue
            assert "error" not in answer, answer["error"]
            return answer["return"]

    def close(self) -> None:
        self._lines.close()
        self._socket.close()


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
        try:
            return Qmp(monitor)
        except OSError:
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.01)
