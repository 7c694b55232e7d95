"""Disks for guests of tests: images, buses and shared directories, seen from the agent and from outside."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import stat
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
from prometheus_client.parser import text_string_to_metric_families

from osbuild import ttrpc
from osbuild.agent_client import AGENT, AgentClient
from osbuild.arch import X86_64

SHARED: Final = "/run/kata-containers/shared/containers"
MIB: Final = 1 << 20
PROGRAMS: Final = ("mke2fs", "debugfs", "mkswap")
_VIRTIOFSD: Final = ("/usr/lib/qemu/virtiofsd", "/usr/libexec/virtiofsd", "/usr/bin/virtiofsd")
_PATH: Final = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"

Storage = dict[str, Any]  # Any: a grpc.Storage


def run(*argv: str) -> bytes:
    return subprocess.run(argv, check=True, capture_output=True, env={**os.environ, "PATH": _PATH}).stdout


class Disks:
    """What the guest of these tests has besides its root: QEMU's arguments for it, and where it is seen from here."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.arguments: list[str] = []
        self.qmp = home / "qmp"

    def path(self, name: str) -> Path:
        return self.home / name

    def add(self, *arguments: str) -> None:
        self.arguments += arguments

    def image(self, name: str, *, size: int = 16 * MIB, content: Path | None = None) -> Path:
        """An ext4 of mke2fs's."""
        path = self.path(name)
        with path.open("wb") as file:
            file.truncate(size)
        run("mke2fs", "-q", "-F", "-t", "ext4", "-L", name, *(("-d", str(content)) if content else ()), str(path))
        return path

    def disk(self, name: str, device: str, *, content: Path | None = None) -> None:
        path = self.image(name, content=content)
        self.add(
            "-drive", f"if=none,id={name},file={path},format=raw,cache=unsafe", "-device", f"{device},drive={name}"
        )

    def read(self, name: str, file: str) -> bytes:
        """A file in an image, by e2fsprogs."""
        return run("debugfs", "-R", f"cat {file}", str(self.path(name)))


class Guest:
    def __init__(self, client: AgentClient, disks: Disks) -> None:
        self.client, self.disks = client, disks

    def call(self, method: str, /, **fields: Any) -> Any:
        return self.client.call(AGENT, method, **fields)

    def refuses(self, *storages: Storage) -> ttrpc.StatusError:
        with pytest.raises(ttrpc.StatusError) as refused:
            self.mount(*storages)
        return refused.value

    def mount(self, *storages: Storage) -> None:
        self.call("CreateSandbox", storages=storages)

    def copy(self, path: str, data: bytes) -> None:
        self.call("CopyFile", path=path, data=data, file_size=len(data), file_mode=stat.S_IFREG | 0o644)

    def metric(self, family: str, **labels: str) -> float | None:
        for found in text_string_to_metric_families(self.call("GetMetrics").metrics):
            for sample in found.samples:
                if sample.name == family and sample.labels == labels:
                    return sample.value
        return None

    def disk_of(self, place: str) -> str | None:
        """The device whose filesystem is mounted there and can be written to."""
        for found in text_string_to_metric_families(self.call("GetMetrics").metrics):
            for sample in found.samples:
                if found.name == "kata_guest_filesystem_bytes" and sample.labels["mountpoint"] == place:
                    return str(sample.labels["disk"])
        return None

    def plug(self, *commands: dict[str, Any]) -> None:
        """Commands to QEMU itself."""
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(self.disks.qmp))
            file = connection.makefile("rwb")
            file.readline()
            for command in ({"execute": "qmp_capabilities"}, *commands):
                file.write(json.dumps(command).encode() + b"\n")
                file.flush()
                while "return" not in (answer := json.loads(file.readline())):
                    assert "error" not in answer, answer


@contextlib.contextmanager
def virtiofsd(socket_path: Path, source: Path) -> Iterator[bool]:
    program = next((path for path in _VIRTIOFSD if Path(path).exists()), None)
    if program is None or os.geteuid() != 0:
        yield False
        return
    command = (program, f"--socket-path={socket_path}", "-o", f"source={source}", "-o", "sandbox=chroot")
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 10
        while not socket_path.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        try:
            yield process.poll() is None
        finally:
            process.kill()


def put_wrapper(home: Path, arguments: list[str]) -> None:
    """A QEMU that is given some arguments more."""
    real = shutil.which(X86_64.qemu)
    quoted = " ".join(f"'{argument}'" for argument in arguments)
    wrapper = home / "bin" / X86_64.qemu
    wrapper.parent.mkdir()
    wrapper.write_text(
        f'#!/bin/sh\ncase "$*" in *virtserialport*) exec {real} "$@" {quoted} ;; esac\nexec {real} "$@"\n'
    )
    wrapper.chmod(0o755)


def plug_in(disks: Disks, root: Path, *, shared: bool) -> None:
    """Everything that the tests speak of; `root`: what is on the disk for containers."""
    disks.disk("root", "virtio-blk-pci,addr=0x17", content=root)
    disks.disk("plain", "virtio-blk-pci,addr=0x10")
    disks.add("-device", "pci-bridge,id=bridge,chassis_nr=9,addr=0x11")
    disks.disk("bridged", "virtio-blk-pci,bus=bridge,addr=0x03")
    disks.disk("function", "virtio-blk-pci,addr=0x14.0x1")
    disks.add("-device", "virtio-rng-pci,addr=0x14.0x0,multifunction=on,rng=entropy")
    disks.add("-device", "pcie-root-port,id=late-port,chassis=7,addr=0x12")
    disks.add("-device", "virtio-scsi-pci,id=scsi,addr=0x13")
    disks.disk("scsi", "scsi-hd,bus=scsi.0,channel=0,scsi-id=3,lun=2")
    disks.image("late")
    pmem = disks.image("pmem", size=128 * MIB)
    disks.add(
        "-m", "256M,slots=4,maxmem=4G",
        "-object", f"memory-backend-file,id=pmem,mem-path={pmem},size=128M,share=on",
        "-device", "nvdimm,memdev=pmem",
    )  # fmt: skip
    swap = disks.path("swap")
    swap.write_bytes(bytes(4 * MIB))
    run("mkswap", "-q", str(swap))
    disks.add("-drive", f"if=none,id=swap,file={swap},format=raw", "-device", "virtio-blk-pci,drive=swap,addr=0x15")
    disks.path("nine").mkdir()
    disks.add(
        "-fsdev", f"local,id=nine,path={disks.path('nine')},security_model=none",
        "-device", "virtio-9p-pci,fsdev=nine,mount_tag=nine",
        "-qmp", f"unix:{disks.qmp},server=on,wait=off",
    )  # fmt: skip
    if shared:
        disks.add(
            "-object", "memory-backend-memfd,id=memory,size=256M,share=on",
            "-numa", "node,memdev=memory",
            "-chardev", f"socket,id=fs,path={disks.path('fs.sock')}",
            "-device", "vhost-user-fs-pci,chardev=fs,tag=kataShared",
        )  # fmt: skip
    # At the end: devices behind it that name no bus would be put on it.
    disks.add("-device", "pxb-pcie,id=numa,bus_nr=32,addr=0x16", "-device", "pcie-root-port,bus=numa,id=np,chassis=8")
    disks.disk("numa", "virtio-blk-pci,bus=np")
