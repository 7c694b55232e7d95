"""Builds to install, and what an installation holds."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from osbuild import manifest
from osbuild.artifacts import DiskImage, File, Initrd, Kernel, Verity
from osbuild.install import HOME, SHARE
from osbuild.kata import CURRENT, NAMES
from osbuild.oci import Json

SYSTEMD = (
    "systemd.unit=kata-containers.target", "systemd.mask=systemd-networkd.service",
    "systemd.mask=systemd-networkd.socket",
)  # fmt: skip
VERITY = Verity(
    root_hash="ab" * 32, salt="cd" * 32, blocks=2,
    words=('dm-mod.create="dm-verity,,,ro,0 16 verity"', "root=/dev/dm-0"), pmem_words=("root=/dev/dm-0",),
)  # fmt: skip


def make_build(
    out: Path,
    mark: str = "a",
    *,
    image: bool = True,
    initrd: bool = True,
    words: tuple[str, ...] = (),
    verity: Verity | None = None,
    dax: bool = True,
    file_format: str = "raw",
    arch: str = "x86_64",
    epoch: int = 0,
    distribution: Json = {"name": "debian", "version": "12"},  # noqa: B006 - nobody changes it
    files: Mapping[str, Path] = {},
    disk_words: tuple[str, ...] = (),
) -> Path:
    """A build's directory with small files, or those of `files`, and a manifest.json as build writes it."""
    out.mkdir()

    def file(name: str) -> File:
        if name in files:
            shutil.copyfile(files[name], out / name)
        else:
            (out / name).write_bytes(f"{name} {mark}\n".encode() * 3000 + bytes(1 << 20))
        return File.of(out / name)

    kernel = Kernel(
        vmlinux=file("vmlinux"), vmlinuz=file("vmlinuz"), config=file("config"), release="6.12.117", arch=arch,
        key=hashlib.sha256(mark.encode()).hexdigest(), cached=True,
    )  # fmt: skip
    outputs: dict[str, Json] = {
        name: manifest._measures(getattr(kernel, name)) for name in ("vmlinux", "vmlinuz", "config")
    }
    if image:
        root = ("root=/dev/pmem0p1" if dax else "root=/dev/vda1", "rootflags=data=ordered", "ro", "rootfstype=ext4")
        disk = DiskImage(
            file=file("rootfs.img"), filesystem="ext4", dax=dax, words=(*root, *words),
            disk_words=disk_words or (*root, *words),
            verity=verity, format=file_format,
        )  # fmt: skip
        outputs["rootfs.img"] = manifest.about_root(disk)
    if initrd:
        archive = Initrd(file=file("initrd.img"), compression="zstd", unpacked=1, words=words)
        outputs["initrd.img"] = manifest.about_root(archive)
    document = {
        "schema": "osbuilder.manifest", "version": 1, "image": "sha256:0", "agent": "agent 1", "init": "/sbin/init",
        "distribution": distribution, "epoch": epoch,
        "kernel": {"release": kernel.release, "arch": kernel.arch, "key": kernel.key}, "outputs": outputs,
    }  # fmt: skip
    (out / "manifest.json").write_text(json.dumps(document))
    return out


def configurations(prefix: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """(runtime, VMM) -> the one hypervisor section of every configuration that is in use."""
    found = {}
    for path in sorted((prefix / SHARE / HOME / CURRENT).glob("*/*/configuration.toml")):
        document = merged(path)
        ((name, section),) = document["hypervisor"].items()
        found[path.parent.parent.name, name] = section
    return found


def merged(path: Path) -> dict[str, Any]:
    """A configuration as Kata's runtimes read it: the files of config.d beside it, in order, have the last word."""
    document = tomllib.loads(path.read_text())
    for drop_in in sorted((path.parent / "config.d").iterdir()):
        assert drop_in.is_file()
        assert not drop_in.is_symlink(), "runtime-rs takes regular files only"
        merge(document, tomllib.loads(drop_in.read_text()))
    return document


def merge(base: dict[str, Any], other: dict[str, Any]) -> None:
    for key, value in other.items():
        if isinstance(value, dict) and isinstance(base.get(key), dict):
            merge(base[key], value)
        else:
            base[key] = value


def check_whole(prefix: Path) -> str:
    """Which mark's build is installed: every link, file and configuration is of it. Empty when nothing is."""
    share = prefix / SHARE
    current = share / HOME / CURRENT
    if not os.path.lexists(current):
        assert not any((share / name).exists() for name in NAMES)
        return ""
    document = json.loads((current / "manifest.json").read_text())
    outputs = document["outputs"]
    for name, link in zip(("rootfs.img", "initrd.img", "vmlinux", "vmlinuz"), NAMES, strict=True):
        found = File.of(share / link)
        assert (found.size, found.sha256) == (outputs[name]["size"], outputs[name]["sha256"])
    version = current.resolve()
    assert len(configurations(prefix)) == 6
    for section in configurations(prefix).values():
        for key in ("kernel", "image"):
            path = Path(section[key])
            assert path.is_file()
            assert path.parent == version, "a configuration names another version's files"
    assert json.loads((version / "installed.json").read_text())["root"] == "image"
    return (share / "vmlinux.container").read_text().split()[1]
