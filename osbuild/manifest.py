"""manifest.json, what came out: written last, and read back before anything is booted. lock.json is what went in."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import osbuild
from osbuild.artifacts import DiskImage, File, Initrd, Kernel, Rootfs, Verity
from osbuild.errors import InputError
from osbuild.output import write_whole
from osbuild.tree import quote

if TYPE_CHECKING:  # slow to import: with it comes all that speaks to registries
    from osbuild.oci import Json
    from osbuild.sources.image import SourceImage

MANIFEST: Final = "manifest.json"  # without it a build counts as not done
LOCK: Final = "lock.json"
SBOM: Final = "sbom.cdx.json"
PROVENANCE: Final = "provenance.json"
RECORDS: Final = (MANIFEST, LOCK, SBOM, PROVENANCE)  # what a build says of itself; all else is an output
NAMES: Final[Mapping[str, str]] = {"image": "rootfs.img", "initrd": "initrd.img"}


def describe(rootfs: Rootfs, kernel: Kernel, roots: Mapping[str, DiskImage | Initrd], image: SourceImage) -> Json:
    """Every output by size and digest, and the kernel words that boot it; nothing of this run or this machine."""
    from osbuild.packages import distribution  # only who writes a manifest asks a tree for it

    outputs: dict[str, Json] = {
        "vmlinux": _measures(kernel.vmlinux),
        "vmlinuz": _measures(kernel.vmlinuz),
        "config": _measures(kernel.config),
    }
    outputs |= {NAMES[name]: about_root(root) for name, root in roots.items()}
    return {
        "schema": "osbuilder.manifest", "version": 1, "osbuilder": osbuild.__version__,
        "image": image.digest, "distribution": distribution(image.tree), "agent": rootfs.agent, "init": rootfs.init,
        "epoch": rootfs.epoch,
        "kernel": {"release": kernel.release, "arch": kernel.arch, "key": kernel.key}, "outputs": outputs,
    }  # fmt: skip


def about_root(root: DiskImage | Initrd) -> Json:
    """A root by size and digest, and what it is."""
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
    from osbuild.oci import parse_json

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
    document: Json, lock: Json, rootfs: Rootfs, roots: Mapping[str, DiskImage | Initrd], given: str
) -> tuple[Json, Json]:
    """Both of them after another agent was put in; `given` is how it was named."""
    outputs = dict(document["outputs"]) | {NAMES[name]: about_root(root) for name, root in roots.items()}
    changed = {"agent": about_agent(rootfs), "given": dict(lock.get("given", {})) | {"agent": given}}
    return document | {"agent": rootfs.agent, "outputs": outputs}, lock | changed


def about_agent(rootfs: Rootfs) -> Json:
    """The agent: what its binary is, and what it was compiled from where that was done here."""
    return {"name": rootfs.agent, "sha256": rootfs.agent_sha256, "inputs": dict(rootfs.agent_inputs)}


def save(out: Path, document: Json, lock: Json) -> None:
    """Write them: the manifest last."""
    write_whole(out / LOCK, encode(lock))
    write_whole(out / MANIFEST, encode(document))


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


def read(out: Path) -> tuple[Kernel, dict[str, DiskImage | Initrd], str]:
    """A build as it lies in a directory: kernel, roots, and which agent is in them.

    InputError when it is not finished, or a file is not what it was.
    """
    from osbuild.oci import parse_json

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
            name: root_from(_checked(out, file, outputs[file]), outputs[file])
            for name, file in NAMES.items()
            if file in outputs
        }
    except (KeyError, TypeError, ValueError) as problem:
        raise InputError(f"{where}/{MANIFEST} is not one of ours: {quote(str(problem))}") from None
    return kernel, roots, agent


def remember(out: Path, found: Mapping[str, Json]) -> None:
    """Add to what a finished build's manifest says of its roots."""
    from osbuild.oci import parse_json

    document = parse_json((out / MANIFEST).read_bytes(), f"{quote(str(out))}/{MANIFEST}")
    for name, facts in found.items():
        document["outputs"][NAMES[name]].update(facts)
    write_whole(out / MANIFEST, encode(document))


def root_from(file: File, about: Json) -> DiskImage | Initrd:
    """What `about_root` described."""
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


def encode(document: Mapping[str, Any]) -> bytes:
    """As it lies in a build's directory."""
    return (json.dumps(document, indent=2) + "\n").encode()
