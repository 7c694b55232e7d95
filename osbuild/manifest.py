"""manifest.json, what came out, and lock.json, what went in: written last, and read back before anything is booted."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import osbuild
from osbuild.artifacts import DiskImage, File, Initrd, Kernel, Rootfs, Verity
from osbuild.errors import InputError
from osbuild.oci import Json, parse_json
from osbuild.output import write_whole
from osbuild.spec import BuildSpec
from osbuild.tree import quote

if TYPE_CHECKING:  # slow to import: with it comes all that speaks to registries
    from osbuild.sources.image import SourceImage

MANIFEST: Final = "manifest.json"  # without it a build counts as not done
LOCK: Final = "lock.json"
NAMES: Final[Mapping[str, str]] = {"image": "rootfs.img", "initrd": "initrd.img"}


def write(
    out: Path, rootfs: Rootfs, kernel: Kernel, roots: Mapping[str, DiskImage | Initrd], image: SourceImage
) -> Json:
    """Every output by size and digest, and the kernel words that boot it; nothing of this run or this machine."""
    outputs: dict[str, Json] = {
        "vmlinux": _measures(kernel.vmlinux),
        "vmlinuz": _measures(kernel.vmlinuz),
        "config": _measures(kernel.config),
    }
    outputs |= {NAMES[name]: _about_root(root) for name, root in roots.items()}
    document = {
        "schema": "osbuilder.manifest", "version": 1, "osbuilder": osbuild.__version__,
        "image": image.digest, "agent": rootfs.agent, "init": rootfs.init, "epoch": rootfs.epoch,
        "kernel": {"release": kernel.release, "arch": kernel.arch, "key": kernel.key}, "outputs": outputs,
    }  # fmt: skip
    write_whole(out / MANIFEST, _encode(document))
    return document


def _about_root(root: DiskImage | Initrd) -> Json:
    if isinstance(root, Initrd):
        about: Json = {
            "compression": root.compression, "unpacked": root.unpacked, "entries": root.entries,
            "resident": root.resident, "memory": root.memory, "skipped": root.skipped,
            "lost_xattrs": root.lost_xattrs,
        }  # fmt: skip
    else:
        about = about_disk(root)
    return _measures(root.file) | about | {"words": list(root.words)}


def load(out: Path) -> tuple[Json, Json]:
    """manifest.json and lock.json as they are, for who changes a part of them; InputError when they are not ours."""
    found = []
    for name, keys in ((MANIFEST, ("outputs", "agent")), (LOCK, ("agent", "options"))):
        where = quote(str(out / name))
        try:
            document = parse_json((out / name).read_bytes(), where)
        except OSError as problem:
            raise InputError(f"cannot read {where}: {problem.strerror}") from None
        if not isinstance(document, dict) or any(key not in document for key in keys):
            raise InputError(f"{where} is not one of ours")
        found.append(document)
    return found[0], found[1]


def with_agent(
    document: Json, lock: Json, rootfs: Rootfs, roots: Mapping[str, DiskImage | Initrd]
) -> tuple[Json, Json]:
    """Both of them after another agent was put in."""
    outputs = dict(document["outputs"]) | {NAMES[name]: _about_root(root) for name, root in roots.items()}
    agent = {"name": rootfs.agent, "sha256": rootfs.agent_sha256}
    return document | {"agent": rootfs.agent, "outputs": outputs}, lock | {"agent": agent}


def save(out: Path, document: Json, lock: Json) -> None:
    """Write them: the manifest last."""
    write_whole(out / LOCK, _encode(lock))
    write_whole(out / MANIFEST, _encode(document))


def about_disk(disk: DiskImage) -> Json:
    """What a disk image is, besides its bytes and the words that boot it."""
    verity = None
    if disk.verity is not None:
        verity = {
            "root_hash": disk.verity.root_hash, "salt": disk.verity.salt, "data_blocks": disk.verity.blocks,
            "params": disk.verity.params, "words": list(disk.verity.words), "pmem_words": list(disk.verity.pmem_words),
        }  # fmt: skip
    return {
        "filesystem": disk.filesystem, "dax": disk.dax, "format": disk.format, "writable": disk.writable,
        "skipped": disk.skipped, "disk_words": list(disk.disk_words), "verity": verity,
    }  # fmt: skip


def write_lock(out: Path, spec: BuildSpec, rootfs: Rootfs, kernel: Kernel, image: SourceImage) -> None:
    """Every input, by digest where it has one."""
    document = {
        "schema": "osbuilder.lock", "version": 1, "osbuilder": osbuild.__version__,
        "image": {
            "reference": image.reference,
            "digest": image.digest,
            "layers": list(image.config.diff_ids),
        },
        "agent": {"name": rootfs.agent, "sha256": rootfs.agent_sha256},
        "rootfs": {
            "init": spec.rootfs.init, "slim": spec.rootfs.slim, "remove": list(spec.rootfs.remove),
            "inputs": dict(rootfs.inputs),
        },
        "kernel": {"key": kernel.key, "inputs": kernel.inputs},
        "options": {
            "arch": spec.arch.name, "kinds": list(spec.kinds), "compress": spec.compress,
            "disk": asdict(spec.disk) | {"salt": spec.disk.salt.hex()}, "features": list(spec.features),
            "epoch": rootfs.epoch, "clamp": spec.epoch is not None,
        },
    }  # fmt: skip
    write_whole(out / LOCK, _encode(document))


def read(out: Path) -> tuple[Kernel, dict[str, DiskImage | Initrd], str]:
    """A build as it lies in a directory: kernel, roots, and which agent is in them.

    InputError when it is not finished, or a file is not what it was.
    """
    where = quote(str(out))
    try:
        document = parse_json((out / MANIFEST).read_bytes(), f"{where}/{MANIFEST}")
    except OSError as problem:
        raise InputError(
            f"{where} holds no finished build: {MANIFEST}: {problem.strerror}", hint="osbuilder build IMAGE -o DIR"
        ) from None
    try:
        outputs, agent = document["outputs"], str(document["agent"])
        about = document["kernel"]
        kernel = Kernel(
            vmlinux=_checked(out, "vmlinux", outputs["vmlinux"]),
            vmlinuz=_checked(out, "vmlinuz", outputs["vmlinuz"]),
            config=_checked(out, "config", outputs["config"]),
            release=str(about["release"]), arch=str(about["arch"]), key=str(about["key"]), cached=True,
        )  # fmt: skip
        roots = {
            name: _root(_checked(out, file, outputs[file]), outputs[file])
            for name, file in NAMES.items()
            if file in outputs
        }
    except (KeyError, TypeError, ValueError) as problem:
        raise InputError(f"{where}/{MANIFEST} is not one of ours: {quote(str(problem))}") from None
    return kernel, roots, agent


def _root(file: File, about: Json) -> DiskImage | Initrd:
    words = tuple(str(word) for word in about["words"])
    if "compression" in about:
        wanted = ("unpacked", "entries", "resident", "memory", "skipped", "lost_xattrs")
        numbers = {name: int(about[name]) for name in wanted}
        return Initrd(file=file, compression=str(about["compression"]), words=words, **numbers)
    return DiskImage(
        file=file, filesystem=str(about["filesystem"]), dax=bool(about["dax"]), words=words,
        disk_words=tuple(map(str, about["disk_words"])), format=str(about["format"]), writable=bool(about["writable"]),
        skipped=int(about["skipped"]), verity=_verity(about["verity"]) if about["verity"] else None,
    )  # fmt: skip


def _verity(about: Json) -> Verity:
    return Verity(
        root_hash=str(about["root_hash"]), salt=str(about["salt"]), blocks=int(about["data_blocks"]),
        words=tuple(map(str, about["words"])), pmem_words=tuple(map(str, about["pmem_words"])),
    )  # fmt: skip


def _checked(out: Path, name: str, said: Json) -> File:
    path = out.absolute() / name
    try:
        found = File.of(path)
    except OSError as problem:
        raise InputError(f"cannot read {quote(str(out / name))}: {problem.strerror}") from None
    if (found.size, found.sha256) != (said["size"], said["sha256"]):
        raise InputError(
            f"{quote(str(out / name))} is not what {MANIFEST} says: sha256 {found.sha256}", hint="build it again"
        )
    return found


def _measures(file: File) -> Json:
    return {"size": file.size, "sha256": file.sha256}


def _encode(document: Mapping[str, Any]) -> bytes:
    return (json.dumps(document, indent=2) + "\n").encode()
