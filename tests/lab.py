"""What guests that are wrong for real are made of: other bytes, kernel words, programs, and a QEMU of one's own."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import shutil
import signal
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import pytest

from osbuild import autopsy, smoke, ttrpc
from osbuild.agent_client import AgentClient
from osbuild.arch import X86_64
from osbuild.artifacts import DiskImage, File, Initrd, Kernel, Rootfs
from osbuild.autopsy import Evidence
from osbuild.checks import base as checks_base
from osbuild.nvdimm_image import FILESYSTEM_START
from osbuild.report import Cause, Event, SmokeReport
from osbuild.runtime import channel
from osbuild.runtime.base import Machine
from osbuild.tree import Draft, Tree, directory, regular, symlink
from tests.agent_program import BUSYBOX
from tests.boot_fixtures import guests_alive, image_of, initrd_of, tree_with_init

SECONDS: Final = 240.0  # the deadline: what is measured is that nobody waits for it
MIB: Final = 1 << 20
START: Final = 2 * MIB + FILESYSTEM_START  # of the filesystem, behind a DAX header


@dataclass(kw_only=True)
class Lab:
    """What injections are made of, and where they are carried out."""

    kernel: Kernel
    rootfs: Rootfs  # nothing but the agent
    image: DiskImage  # of it, for an NVDIMM
    initrd: Initrd
    agent: File
    compile_init: Callable[[str], bytes]
    debian: Callable[..., Rootfs]
    debian_kernel: Callable[[], Kernel]
    home: Path
    monkeypatch: pytest.MonkeyPatch
    cleanup: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    evidence: list[Evidence] = field(default_factory=list)  # that causes were found in

    def boot(
        self, root: DiskImage | Initrd | None = None, *, kernel: Kernel | None = None, seconds: float = SECONDS,
        memory_mib: int = 256, words: tuple[str, ...] = (), on_event: Callable[[Event], None] | None = None,
        agent: str = "", transport: str = "auto", work: Path | None = None, accel: str = "tcg",
    ) -> SmokeReport:  # fmt: skip
        machine = Machine(
            kernel=kernel or self.kernel, root=root or self.image, memory_mib=memory_mib, accel=accel, words=words,
            agent=agent, transport=transport,
        )  # fmt: skip
        for name in ("explain", "unseen"):
            self.monkeypatch.setattr(autopsy, name, self._noting(getattr(autopsy, name)))
        report = smoke.run(machine, work or self.home / "work", seconds=seconds, on_event=on_event)
        assert guests_alive(self.home) == []
        return report

    def _noting(self, look: Callable[[Evidence], Cause | None]) -> Callable[[Evidence], Cause | None]:
        def noting(evidence: Evidence) -> Cause | None:
            if not self.evidence:
                self.evidence.append(evidence)
            return look(evidence)

        return noting

    def boot_and_wait(self, root: DiskImage | Initrd, event: str, seconds: float = 3.0, **more: Any) -> SmokeReport:
        """Where nothing happens after an event: a deadline that passes soon after it, however slow the machine."""
        deadline = [math.inf]

        class Impatient(AgentClient):
            def wait(self, seconds: float) -> None:
                end = time.monotonic() + seconds
                while True:
                    try:
                        return super().wait(1.0)
                    except ttrpc.CallTimeout:
                        if time.monotonic() > min(end, deadline[0]):
                            raise

        def hurry(seen: Event) -> None:
            if seen.name == event:
                deadline[0] = time.monotonic() + seconds

        self.monkeypatch.setattr(checks_base, "AgentClient", Impatient)
        return self.boot(root, on_event=hurry, **more)

    def draft(self) -> Draft:
        return self.rootfs.tree.edit()

    def image_with(self, change: Callable[[bytearray], bytes | bytearray | None]) -> DiskImage:
        """The good image, with other bytes."""
        data = bytearray(self.image.file.path.read_bytes())
        data = bytearray(change(data) or data)
        path = self.home / "changed.img"
        path.write_bytes(data)
        return dataclasses.replace(self.image, file=File.of(path))

    def disk(self, tree: Tree | None = None) -> DiskImage:
        return image_of(tree or self.rootfs.tree, self.home / "disk.img", header=False)

    def initrd_of(self, tree: Tree) -> Initrd:
        return initrd_of(tree, self.home / "initrd")

    def init(self, program: bytes, permissions: int = 0o755) -> Initrd:
        return self.initrd_of(tree_with_init(program, permissions))

    def script(self, text: str, **files: bytes) -> Initrd:
        """An initramfs whose init is a script of busybox's, with the agent beside it."""
        return self.initrd_of(self.script_tree(text))

    def script_tree(self, text: str) -> Tree:
        draft = tree_with_init(f"#!/bin/sh\n{text}\n".encode()).edit()
        draft.put("/bin", directory())
        draft.put("/bin/busybox", regular(BUSYBOX.read_bytes(), 0o755))
        for name in ("sh", "mount", "mkdir", "poweroff", "sleep", "dd"):
            draft.put(f"/bin/{name}", symlink("busybox"))
        draft.put("/bin/agent", regular(self.agent.path.read_bytes(), 0o755))
        return draft.tree()

    def patched(self, symbol: str, code: bytes) -> Kernel:
        """The kernel, with these instructions where one of its functions begins."""
        data = bytearray(self.kernel.vmlinux.path.read_bytes())
        offset, _ = place(data, self.kernel.vmlinux.path, symbol)
        data[offset : offset + len(code)] = code
        path = self.home / "vmlinux"
        path.write_bytes(data)
        return dataclasses.replace(self.kernel, vmlinux=File.of(path))

    def qemu(self, script: str) -> None:
        """Every QEMU from now on starts with these lines of shell; "$real" is the program."""
        programs = self.home / "bin"
        programs.mkdir()
        real = shutil.which(X86_64.qemu)
        wrapper = programs / X86_64.qemu
        wrapper.write_text(
            f'#!/bin/sh\nreal={real}\ncase " $* " in *" -version "*) exec "$real" "$@";; esac\n{script}\n'
        )
        wrapper.chmod(0o755)
        self.monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")

    def ask_by_vsock(self, root: Initrd, *words: str) -> SmokeReport:
        """The host asks a number that no guest has; this machine need have no vsock itself."""

        class Nobody(channel.Vsock):
            def connect(self, seconds: float) -> ttrpc.Connection:
                time.sleep(min(seconds, 0.2))
                raise ttrpc.CallTimeout("nobody is there")

        @contextlib.contextmanager
        def opened(*_: object) -> Iterator[tuple[channel.Channel, channel.Device]]:
            yield Nobody(cid=3), None

        self.monkeypatch.setattr(channel, "opened", opened)
        return self.boot(root, words=words)

    def kill(self, number: signal.Signals) -> SmokeReport:
        """Somebody ends QEMU when the kernel has begun."""

        def strike(event: Event) -> None:
            if event.name == "kernel":
                (pid,) = guests_alive(self.home)
                os.kill(pid, number)

        return self.boot(self.initrd, on_event=strike)


def place(data: bytearray, path: Path, symbol: str) -> tuple[int, int]:
    """Where a symbol of an ELF file lies in the file, and in memory."""
    table = subprocess.run(["nm", path], check=True, capture_output=True, text=True).stdout
    (address,) = {int(line.split()[0], 16) for line in table.splitlines() if line.split()[-1] == symbol}
    start, size, count = struct.unpack_from("<32xQ14xHH", data)
    for number in range(count):
        kind, _, offset, virtual, physical, length = struct.unpack_from("<IIQQQQ", data, start + number * size)
        for base in (virtual, physical):
            if kind == 1 and base <= address < base + length:
                return offset + address - base, address
    raise AssertionError(f"{symbol} lies in no segment")


def crashing(agent: File) -> bytes:
    """The agent, whose first instruction is none."""
    data = bytearray(agent.path.read_bytes())
    entry, start, size, count = struct.unpack_from("<24xQQ14xHH", data)
    for number in range(count):
        kind, _, offset, virtual, _, length = struct.unpack_from("<IIQQQQ", data, start + number * size)
        if kind == 1 and virtual <= entry < virtual + length:
            place = offset + entry - virtual
            data[place : place + 2] = b"\x0f\x0b"
            return bytes(data)
    raise AssertionError("it begins in no segment")


def replaced(tree: Tree, old: bytes, new: bytes) -> Tree:
    """Another program wherever this one lies."""
    draft = tree.edit()
    for path, entry in list(tree.items()):
        if entry.is_file and entry.content.size == len(old) and b"".join(entry.content.chunks()) == old:
            draft.put(path, regular(new, 0o755))
    return draft.tree()


def with_word(image: DiskImage, word: str) -> DiskImage:
    """The image, with another value for one of its words."""
    name = word.partition("=")[0]
    words = tuple(word if old.partition("=")[0] == name else old for old in image.words)
    return dataclasses.replace(image, words=words)
