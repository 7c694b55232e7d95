"""What Kata's runtimes are to find of a build: file names, configurations, containerd's handlers; nothing is written.

    kata-containers.img -> kata-debian-12-909537e4d94b.image          and the other names, likewise
    vmlinux-6.12.117-d2b6e61969f0, config-6.12.117-d2b6e61969f0 …
    root_hash_osbuilder.txt                                           of an image with --verity
    go/qemu/configuration.toml                                        Kata's own, where --kata says where that is
    go/qemu/config.d/50-osbuilder.toml                                our part of it, which both runtimes merge into it
    go/containerd.toml                                                a handler for each hypervisor
    runtime-rs/                                                       the same for Kata's other runtime

A configuration names the files of its own version, not Kata's names: a runtime that has read it boots what belongs
together, whatever is installed a moment later.

Sources: kata-contract 5.1 to 5.5; how drop-ins are merged: katautils/config.go and kata-types' config/drop_in.rs. The
Go runtime fails on a key that it does not know, so what an older one may not know is written only where it is needed.
"""

from __future__ import annotations

import hashlib
import json
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from osbuild import manifest
from osbuild.artifacts import DiskImage, File, Initrd, Kernel
from osbuild.errors import InputError, SpecError
from osbuild.oci import Json, parse_json
from osbuild.resources import render
from osbuild.tree import quote

NAMES: Final = ("kata-containers.img", "kata-containers-initrd.img", "vmlinux.container", "vmlinuz.container")
ROOTS: Final = ("image", "initrd")
CURRENT: Final = "current"  # beside the versions: the one in use
DEFAULTS: Final = Path("share/defaults/kata-containers")  # of Kata's own configurations, below a prefix
FRAGMENT: Final = "config.d/50-osbuilder.toml"
DIGITS: Final = 12  # of a digest, in names

_WORD: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+]{0,63}")  # what may be a part of a file's name
_CLEARED: Final = ("image", "initrd", "kernel_verity_params")  # a base's must not outlive ours
_KATAS_OWN: Final = re.compile(r"systemd\.(unit=kata-containers\.target|mask=systemd-networkd\.(service|socket))")
_ROOT_WORD: Final = re.compile(r"(root|rootflags|rootfstype|dm-mod\.create)=.*|ro|rw", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Vmm:
    """A hypervisor, as one of Kata's runtimes calls it."""

    name: str  # of its directory, and of the runtime handler
    sections: tuple[str, ...]  # of configuration.toml: the first, unless Kata's own configuration has another
    bases: tuple[str, ...]  # Kata's own configurations, below DEFAULTS; the first that is there
    pmem: bool = False  # it can map an image into the guest
    driver: str = ""  # vm_rootfs_driver for an image that is not mapped; empty: there is no such key
    switch: bool = False  # it knows disable_image_nvdimm


# Kata's two runtimes spell it differently, and its releases name files differently (kata-contract 5.4, 8.3, 8.4).
RUNTIMES: Final[Mapping[str, tuple[Vmm, ...]]] = {
    "go": (
        Vmm("qemu", ("qemu",), ("configuration-qemu.toml",), pmem=True, switch=True),
        Vmm("clh", ("clh",), ("configuration-clh.toml",), switch=True),
        Vmm("firecracker", ("firecracker",), ("configuration-fc.toml",)),
    ),
    "runtime-rs": (
        Vmm(
            "qemu", ("qemu",), ("runtime-rs/configuration-qemu-runtime-rs.toml",), pmem=True, driver="virtio-blk-pci",
        ),
        Vmm(
            "clh", ("cloud-hypervisor", "clh"),
            ("runtime-rs/configuration-clh-runtime-rs.toml", "runtime-rs/configuration-cloud-hypervisor.toml"),
            driver="virtio-blk-pci",
        ),
        Vmm(
            "firecracker", ("firecracker",),
            ("runtime-rs/configuration-fc-rs.toml", "runtime-rs/configuration-rs-fc.toml"), driver="virtio-blk-mmio",
        ),
    ),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Link:
    """A symbolic link."""

    target: str


Part = File | bytes | Link


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    """A configuration of Kata's own, for one hypervisor."""

    data: bytes
    section: str
    keys: frozenset[str]  # of its section


@dataclass(frozen=True, slots=True, kw_only=True)
class Installable:
    """A build that Kata's runtimes can boot."""

    manifest: bytes
    kernel: Kernel
    roots: Mapping[str, DiskImage | Initrd]
    booted: str  # which of the roots the configurations name
    distribution: tuple[str, ...]  # name and version of what is in it, as far as they are known


def read_build(out: Path, root: str) -> Installable:
    """A build, checked file by file; root: what is to be booted, or empty for the image unless there is none."""
    kernel, roots, _ = manifest.read(out)
    document = (out / manifest.MANIFEST).read_bytes()
    return Installable(
        manifest=document, kernel=kernel, roots=roots, booted=_choose(roots, root, out),
        distribution=_distribution(parse_json(document, quote(str(out / manifest.MANIFEST)))),
    )  # fmt: skip


def read_bases(kata: Path) -> dict[tuple[str, str], Base]:
    """Kata's own configurations below its prefix, by runtime and hypervisor; InputError when there is none."""
    home = kata / DEFAULTS
    found = {
        (runtime, vmm.name): _read_base(home / name, vmm)
        for runtime, vmms in RUNTIMES.items()
        for vmm in vmms
        if (name := next((name for name in vmm.bases if (home / name).is_file()), ""))
    }
    if not found:
        raise InputError(
            f"no configuration of Kata's is in {quote(str(home))}", hint="--kata is what its release was unpacked to"
        )
    return found


def contents(build: Installable, bases: Mapping[tuple[str, str], Base], final: Path) -> dict[str, Part]:
    """Every file and link of a version; the configurations speak of `final`, where it will lie."""
    parts = _artefacts(build)
    for runtime, vmms in RUNTIMES.items():
        used = [vmm for vmm in vmms if not bases or (runtime, vmm.name) in bases]
        for vmm in used:
            base = bases.get((runtime, vmm.name))
            home = f"{runtime}/{vmm.name}"
            parts[f"{home}/configuration.toml"] = base.data if base else render("kata-base.toml.j2").encode()
            parts[f"{home}/{FRAGMENT}"] = fragment(runtime, vmm, build, final, base).encode()
        handlers = [
            {
                "name": f"osbuilder-{vmm.name}",
                "configuration": _toml(final.parent / CURRENT / runtime / vmm.name / "configuration.toml"),
            }
            for vmm in used
        ]
        parts[f"{runtime}/containerd.toml"] = render("kata-containerd.toml.j2", handlers=handlers).encode()
    return parts


def digest(parts: Mapping[str, Part]) -> str:
    """Another one whenever something in a version is another."""
    total = hashlib.sha256()
    for name, part in sorted(parts.items()):
        total.update(f"{name}\0{part.target if isinstance(part, Link) else sha256(part)}\0".encode())
    return total.hexdigest()[:DIGITS]


def sha256(part: File | bytes) -> str:
    """Of a file's content, in hex."""
    return part.sha256 if isinstance(part, File) else hashlib.sha256(part).hexdigest()


def fragment(runtime: str, vmm: Vmm, build: Installable, home: Path, base: Base | None = None) -> str:
    """The part of a configuration.toml that belongs to a build."""
    root = build.roots[build.booted]
    image = root if isinstance(root, DiskImage) else None
    mapped = image is not None and image.dax and vmm.pmem
    driver = "virtio-pmem" if mapped and build.kernel.arch == "x86_64" else vmm.driver
    values = {
        "kernel": home / NAMES[2],
        "image": home / NAMES[0] if image else "",
        "initrd": "" if image else home / NAMES[1],
        "kernel_verity_params": image.verity.params if image and image.verity else "",
    }
    return render(
        "kata-configuration.toml.j2",
        runtime=runtime, section=base.section if base else vmm.sections[0],
        filesystem=_toml(image.filesystem) if image else "", params=_toml(" ".join(kernel_params(root))),
        nvdimm=mapped if image and vmm.switch else None, driver=_toml(driver) if image and vmm.driver else "",
        **{name: _toml(value) if value else "" for name, value in values.items()},
        cleared=[name for name in _CLEARED if base and name in base.keys and not values[name]],
    )  # fmt: skip


def kernel_params(root: DiskImage | Initrd) -> tuple[str, ...]:
    """The kernel words that the tree needs and no runtime of Kata's adds by itself (kata-contract 5.1 to 5.3)."""
    if isinstance(root, Initrd):
        return root.words  # with an initramfs the Go runtime adds neither root nor systemd words
    return tuple(word for word in without_katas_own(root.words) if not _ROOT_WORD.fullmatch(word))


def without_katas_own(words: tuple[str, ...]) -> tuple[str, ...]:
    """Kernel words without those by which Kata's runtimes make systemd start nothing but the agent and its needs."""
    return tuple(word for word in words if not _KATAS_OWN.fullmatch(word))


def _artefacts(build: Installable) -> dict[str, Part]:
    kernel, image = build.kernel, build.roots.get("image")
    about = f"{kernel.release}-{kernel.key[:DIGITS]}"
    parts: dict[str, Part] = {manifest.MANIFEST: build.manifest, f"config-{about}": kernel.config}
    files = [(f"vmlinux-{about}", kernel.vmlinux, NAMES[2]), (f"vmlinuz-{about}", kernel.vmlinuz, NAMES[3])]
    for kind, link in zip(ROOTS, NAMES[:2], strict=True):
        if kind in build.roots:
            file = build.roots[kind].file
            words = (*(build.distribution or ("osbuilder",)), file.sha256[:DIGITS])
            files.append((f"kata-{'-'.join(words)}.{kind}", file, link))
    for name, file, link in files:
        parts[name] = file
        parts[link] = Link(name)
    if isinstance(image, DiskImage) and image.verity is not None:
        parts["root_hash_osbuilder.txt"] = f"{image.verity.params}\n".encode()
    return parts


def _distribution(document: Json) -> tuple[str, ...]:
    """What builds of earlier versions do not say, and what no file's name should have, is left out."""
    about = document.get("distribution")
    words = (about.get("name"), about.get("version")) if isinstance(about, dict) else ()
    return tuple(word for word in words if isinstance(word, str) and _WORD.fullmatch(word))


def _choose(roots: Mapping[str, DiskImage | Initrd], wanted: str, out: Path) -> str:
    if wanted and wanted not in ROOTS:
        raise SpecError(f"no root {quote(wanted)}", hint=f"one of {', '.join(ROOTS)}")
    found = wanted or next((name for name in ROOTS if name in roots), "")
    if found not in roots:
        what = f"no {found}" if found else "neither an image nor an initrd"
        raise InputError(f"{quote(str(out))} holds {what}", hint="osbuilder build makes both unless told otherwise")
    image = roots.get("image")
    if isinstance(image, DiskImage) and image.format != "raw":
        raise InputError(
            f"{quote(str(image.file.path))} is {image.format}, and Kata's runtimes open images as raw",
            hint="build it without --format",
        )
    return found


def _read_base(path: Path, vmm: Vmm) -> Base:
    where = quote(str(path))
    try:
        data = path.read_bytes()
        document = tomllib.loads(data.decode())
    except OSError as problem:
        raise InputError(f"cannot read {where}: {problem.strerror}") from None
    except ValueError as problem:  # neither UTF-8 nor TOML
        raise InputError(f"{where} is no TOML: {quote(str(problem))}") from None
    sections = document.get("hypervisor")
    tables = sections if isinstance(sections, dict) else {}
    section = next((name for name in vmm.sections if isinstance(tables.get(name), dict)), None)
    if section is None:
        raise InputError(f"{where} has no section [hypervisor.{vmm.sections[0]}]", hint="is it Kata's own?")
    return Base(data=data, section=section, keys=frozenset(tables[section]))


def _toml(value: object) -> str:
    """A basic string: JSON's escapes are TOML's, where nothing is unprintable."""
    return json.dumps(str(value), ensure_ascii=False)
