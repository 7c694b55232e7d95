"""What osbuilder uses of this machine: here, or missing, and whether the rest works without it."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from osbuild import command
from osbuild.arch import AARCH64, host_arch
from osbuild.cache import MOVE_IT, default_cache
from osbuild.errors import HostError, OsbuilderError
from osbuild.kernel_pins import read_pins


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One tool: `state` is here, missing, missing (optional), or not used (optional): here, and of no use."""

    name: str
    state: str
    purpose: str
    detail: str

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclass(frozen=True, slots=True)
class _Want:
    name: str
    package: str  # Debian's; or a whole line that says how to get it
    purpose: str
    needed: bool = True

    @property
    def how(self) -> str:
        return self.package if " install " in self.package else f"apt-get install {self.package}"


_OPTIONAL: Final = "missing (optional)"
_WANTS: Final = (
    _Want("qemu-system-x86_64", "qemu-system-x86", "booting guests"),
    _Want("gcc", "gcc", "the kernel"),
    _Want("make", "make", "the kernel"),
    _Want("flex", "flex", "the kernel"),
    _Want("bison", "bison", "the kernel"),
    _Want("bc", "bc", "the kernel"),
    _Want("perl", "perl", "the kernel"),
    _Want("xz", "xz-utils", "the kernel"),
    _Want("zstd", "zstd", "the kernel"),
    _Want("tar", "tar", "the kernel"),
    _Want("/usr/include/gelf.h", "libelf-dev", "the kernel"),
    _Want("gzip", "gzip", "the kernel for aarch64", needed=False),
    _Want("git", "git", "kernel patches, and --source git:PATH", needed=False),
    _Want("gpgv", "gpgv", "signatures of kernel.org's tarballs", needed=False),
    _Want("ccache", "ccache", "faster kernel builds", needed=False),
    _Want("musl-gcc", "musl-tools", "a small agent; gcc alone gives a larger one", needed=False),
    _Want(
        "aarch64-linux-gnu-gcc",
        "gcc-aarch64-linux-gnu libc6-dev-arm64-cross",
        "kernel and agent for aarch64",
        needed=False,
    ),
    _Want("qemu-system-aarch64", "qemu-system-arm", "booting guests of aarch64", needed=False),
    _Want(AARCH64.firmware, AARCH64.firmware_package, "guests of aarch64 with an NVDIMM", needed=False),
    _Want("qemu-img", "qemu-utils", "images in qcow2: --format qcow2", needed=False),
    _Want("lz4", "lz4", "an initramfs in lz4: --compress lz4", needed=False),
    _Want("mkfs.xfs", "xfsprogs", "images in xfs: --fs xfs", needed=False),
    _Want(
        "vhost-device-vsock",
        "cargo install vhost-device-vsock",
        "--transport vhost-user-vsock, where the host has no /dev/vhost-vsock",
        needed=False,
    ),
    _Want("qemu-aarch64-static", "qemu-user-static", "the tests", needed=False),
    _Want("dockerd", "docker.io", "make demo", needed=False),
    _Want("mmdebstrap", "mmdebstrap", "make demo", needed=False),
    _Want("e2fsck", "e2fsprogs", "the tests", needed=False),
)


def examine() -> list[Finding]:
    """Every tool in turn, then the things that are no tools."""
    return [*(_look_for(want) for want in (*_WANTS, *_sources())), _virtiofsd(), _zig(), _cache(), _docker(), _kvm()]


def _sources() -> list[_Want]:
    """The kernel sources that are pinned; only the default one has to be here."""
    pins = read_pins()
    return [
        _Want(str(pin.file), pin.package, f"the kernel {name}", needed=name == pins.default)
        for name, pin in pins.kernels.items()
    ]


def _look_for(want: _Want) -> Finding:
    where = want.name if want.name.startswith("/") and Path(want.name).exists() else _find(want.name, command.find)
    state = "here" if where else "missing" if want.needed else _OPTIONAL
    return Finding(name=want.name, state=state, purpose=want.purpose, detail=where or want.how)


def _find(name: str, find: Callable[[str], str]) -> str:
    try:
        return "" if name.startswith("/") else find(name)
    except HostError:
        return ""


def _virtiofsd() -> Finding:
    """Not on PATH, as a rule: where packages have it, which is known to who starts it."""
    from osbuild.runtime import shares

    try:
        state, detail = "here", shares.find_program()
    except HostError as problem:
        state, detail = _OPTIONAL, problem.hint
    return Finding(name=shares.DAEMON, state=state, purpose="--check shares by virtio-fs", detail=detail)


def _zig() -> Finding:
    from osbuild.agent_compiler import zig

    found = " ".join(zig())
    return Finding(
        name="zig", state="here" if found else _OPTIONAL, purpose="a small agent for any architecture",
        detail=found or "pip install 'CHECKOUT[cross]' (osbuilder's source)",
    )  # fmt: skip


def _docker() -> Finding:
    from osbuild.sources import daemon

    purpose = "images of a Docker daemon"
    try:
        daemon.connect(5).close()
    except HostError as problem:
        return Finding(name="Docker daemon", state=_OPTIONAL, purpose=purpose, detail=f"{problem}; {problem.hint}")
    return Finding(name="Docker daemon", state="here", purpose=purpose, detail="answers")


def _kvm() -> Finding:
    from osbuild.runtime import accel

    arch = host_arch()
    try:
        chosen = accel.choose("auto", arch, Path(command.find(arch.qemu)), cache=default_cache())
    except OsbuilderError as problem:
        return Finding(name="KVM", state=_OPTIONAL, purpose="faster guests", detail=str(problem))
    unused = "not used (optional)" if accel.DEVICE.exists() else _OPTIONAL
    state = "here" if chosen.name == "kvm" else unused
    detail = chosen.reason if state == "here" else f"{chosen.reason}: guests are emulated"
    return Finding(name="KVM", state=state, purpose="faster guests", detail=detail)


def _cache() -> Finding:
    root = default_cache().root
    existing = next(path for path in (root, *root.parents) if path.exists())
    state = "here" if os.access(existing, os.W_OK) else "missing"
    detail = str(root) if state == "here" else f"{root} cannot be written to: {MOVE_IT}"
    return Finding(name="cache", state=state, purpose="kernel and agent, made once", detail=detail)
