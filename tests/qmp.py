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
        self._socket.connect(str(path))
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


def arguments(plain: Sequence[str], monitor: Path) -> tuple[str, ...]:
    """A microvm's command line for q35: three processors, room for two modules of memory, a bridge, a monitor."""
    argv = [word.replace("-device,", "-pci,") for word in plain]
    argv = [f"{word}-pci" if word == "virtio-serial-device" else word for word in argv]
    argv = [word.replace("virtio-serial-device-pci", "virtio-serial-pci") for word in argv]
    argv = [word.replace("virtio-rng-device", "virtio-rng-pci") for word in argv]
    for option, value in (("-machine", "q35"), ("-smp", "1,maxcpus=3"), ("-m", "256M,slots=2,maxmem=1G")):
        argv[argv.index(option) + 1] = value
    append = argv.index("-append") + 1
    argv[append] = " ".join(word for word in argv[append].split() if word != "nolapic_timer")
    return (
        *argv,
        "-device", "pcie-pci-bridge,id=bridge,addr=02",
        "-qmp", f"unix:{monitor},server=on,wait=off",
    )  # fmt: skip


@contextlib.contextmanager
def pluggable(kernel: Kernel, root: Initrd, work: Path) -> Iterator[Pluggable]:
    machine = Machine(kernel=kernel, root=root, memory_mib=256, accel="tcg")
    work.mkdir(exist_ok=True)
    console = work / "console.log"
    program, chosen = qemu.ready(X86_64, "tcg")
    with tempfile.TemporaryDirectory(prefix="plug-") as directory:
        agent, monitor = Path(directory) / "agent", Path(directory) / "monitor"
        argv = arguments(qemu.arguments(machine, console=console, agent=agent, accel=chosen.name), monitor)
        with command.start(str(program), *argv, log=work / "qemu.log"):
            _wait_for(agent, monitor, log=work / "qemu.log")
            qmp = Qmp(monitor)
            with contextlib.closing(qmp), ttrpc.connect_unix(agent, _SECONDS) as connection:
                client = AgentClient(connection)
                client.wait(_SECONDS)
                yield Pluggable(qmp=qmp, client=client, console=console)


def _wait_for(*paths: Path, log: Path) -> None:
    deadline = time.monotonic() + _SECONDS
    while not all(path.exists() for path in paths):
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.01)
