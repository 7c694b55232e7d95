"""A finished build as a container image that KubeVirt takes its disk, or its kernel and initramfs, from.

    DIR/virtual-machine.yaml     a VirtualMachine that boots it; it names the image by the reference that was given
    DIR/image/                   an OCI layout with one layer, not compressed, for `skopeo copy oci:DIR/image …`
      /boot/vmlinuz
      /boot/initrd.img           kernelboot
      /disk/rootfs.img           containerdisk; or rootfs.qcow2

Our images have no boot loader: what KubeVirt calls kernel boot starts them, from the same container image. Its launcher
reads them as user 107, qemu. The same build gives the same bytes.

Sources: OCI image-spec v1.1 (image-layout.md, config.md); KubeVirt's user guide, "containerDisk" and "Kernel Boot".
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from osbuild import kata, manifest, tar_writer
from osbuild.arch import find_arch
from osbuild.artifacts import DiskImage, File, Initrd, Kernel
from osbuild.borrowed import Borrowed
from osbuild.content import write_all
from osbuild.errors import HostError, InputError, SpecError
from osbuild.oci import Json, Reference, parse_json, parse_reference
from osbuild.output import sync, write_whole, writing
from osbuild.resources import render
from osbuild.tree import Draft, Slice, Tree, directory, quote, regular

KINDS: Final[Mapping[str, str]] = {"containerdisk": "image", "kernelboot": "initrd"}  # -> the root that it has
OWNER: Final = 107  # qemu, user and group, in KubeVirt's launcher
KERNEL: Final = "/boot/vmlinuz"
INITRD: Final = "/boot/initrd.img"
IMAGE: Final = "image"
MACHINE: Final = "virtual-machine.yaml"
MEMORY_MIB: Final = 512
MIB: Final = 1 << 20

_LAYER: Final = "application/vnd.oci.image.layer.v1.tar"
_CONFIG: Final = "application/vnd.oci.image.config.v1+json"
_MANIFEST: Final = "application/vnd.oci.image.manifest.v1+json"
_INDEX: Final = "application/vnd.oci.image.index.v1+json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """A container image that was written."""

    path: Path
    kind: str
    reference: str
    digest: str  # of the image's manifest
    size: int  # of its layer
    files: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "path": str(self.path), "kind": self.kind, "reference": self.reference, "digest": self.digest,
            "size": self.size, "image": str(self.path / IMAGE), "manifest": str(self.path / MACHINE),
            "files": list(self.files),
        }  # fmt: skip

    def lines(self) -> list[str]:
        """For people."""
        return [
            f"{self.path / IMAGE}  {self.digest}  {' '.join(self.files)}",
            f"skopeo copy oci:{self.path / IMAGE} docker://{self.reference}",
            f"kubectl apply -f {self.path / MACHINE}",
        ]


def export(build: Path, out: Path, *, kind: str, name: str, memory_mib: int = 0) -> Exported:
    """Write a build as a container image, and the virtual machine that boots it; `out` must not exist yet.

    name: the reference under which the cluster will find the image.
    memory_mib: of the virtual machine; 0: enough for what it boots.
    """
    if kind not in KINDS:
        raise SpecError(f"no kind {quote(kind)}", hint=f"one of {', '.join(KINDS)}")
    reference = _reference(name)
    kernel, roots, _ = manifest.read(build)
    root = roots.get(KINDS[kind])
    if root is None:
        raise InputError(f"{quote(str(build))} holds no {KINDS[kind]}", hint="osbuilder build makes both")
    needs = -(-root.memory // MIB) if isinstance(root, Initrd) else 0
    if 0 < memory_mib < needs:
        raise SpecError(f"{memory_mib} MiB are too little: its initramfs needs {needs}", hint="leave --memory out")
    epoch = _epoch(build)
    files = {KERNEL: kernel.vmlinuz, _path(root): root.file}
    with _fresh(out) as new:
        layer = _write_layer(new / IMAGE, files, epoch)
        digest = _write_image(new / IMAGE, layer, find_arch(kernel.arch).oci, epoch, reference.tag)
        write_whole(new / MACHINE, virtual_machine(reference, kernel, root, memory_mib).encode())
    return Exported(
        path=out, kind=kind, reference=str(reference), digest=digest, size=layer.size, files=tuple(sorted(files))
    )


def virtual_machine(reference: Reference, kernel: Kernel, root: DiskImage | Initrd, memory_mib: int = 0) -> str:
    """KubeVirt's object, in YAML."""
    arch = find_arch(kernel.arch)
    disk = isinstance(root, DiskImage)
    return render(
        "virtual-machine.yaml.j2",
        title=reference.name.rpartition("/")[2].replace("_", "-").replace(".", "-")[:63].strip("-"),
        image=str(reference), architecture=arch.oci, memory_mib=memory_mib or _memory(root),
        kernel=KERNEL, initrd="" if disk else INITRD, disk=_path(root) if disk else "",
        words=" ".join((f"console={arch.console}", *boot_words(root))),
    )  # fmt: skip


def boot_words(root: DiskImage | Initrd) -> tuple[str, ...]:
    """Kernel arguments for a machine that is nobody's sandbox: those of Kata's runtimes are left out.

    A disk that can be checked is checked: unlike with an NVDIMM, nothing is lost by it.
    """
    if isinstance(root, DiskImage):
        root = root.as_disk() if root.verity is None else root.through_verity()
    return kata.without_katas_own(root.words)


def _memory(root: DiskImage | Initrd) -> int:
    """An initramfs says what it needs to be unpacked; what runs in it gets as much again as anybody does."""
    return MEMORY_MIB + (-(-root.memory // MIB) if isinstance(root, Initrd) else 0)


def _path(root: DiskImage | Initrd) -> str:
    if isinstance(root, Initrd):
        return INITRD
    return "/disk/rootfs.qcow2" if root.format == "qcow2" else "/disk/rootfs.img"


def _reference(name: str) -> Reference:
    found = parse_reference(name, frozenset(("docker",)))
    if found.digest:
        raise SpecError(f"{quote(name)} names an image by its digest, which is not known yet", hint="give it a tag")
    return dataclasses.replace(found, transport="", tag=found.tag or "latest")


def _epoch(build: Path) -> int:
    where = quote(str(build / manifest.MANIFEST))
    epoch = parse_json((build / manifest.MANIFEST).read_bytes(), where).get("epoch")
    if not isinstance(epoch, int) or not 0 <= epoch < 1 << 33:
        raise InputError(f"{where} has no epoch", hint="build it again")
    return epoch


# --- the layout -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _fresh(out: Path) -> Iterator[Path]:
    """A directory that becomes `out` when the block ends well, and is gone otherwise."""
    if os.path.lexists(out):
        raise SpecError(f"{quote(str(out))} is there already", hint="name another with -o")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        new = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    except OSError as problem:
        raise HostError(f"cannot write in {quote(str(out.parent))}: {problem.strerror}", hint="name another") from None
    try:
        yield new
        for place in (new, *new.rglob("*/")):  # files have 0644, whatever the umask
            place.chmod(0o755)
        sync(new)
        new.rename(out)
        sync(out.parent)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _write_layer(layout: Path, files: Mapping[str, File], epoch: int) -> File:
    blobs = layout / "blobs/sha256"
    blobs.mkdir(parents=True)
    total = hashlib.sha256()
    size = 0
    with writing(blobs / "layer", needs=sum(file.size for file in files.values())) as descriptor:
        for data in tar_writer.archive(_tree(files, epoch)):
            total.update(data)
            write_all(descriptor, data, size)
            size += len(data)
    (blobs / "layer").rename(blobs / total.hexdigest())
    return File(path=blobs / total.hexdigest(), size=size, sha256=total.hexdigest())


def _tree(files: Mapping[str, File], epoch: int) -> Tree:
    now = epoch * 1_000_000_000
    draft = Draft()
    draft.put("/", directory(mtime_ns=now))
    for path, file in sorted(files.items()):
        draft.put(path.rpartition("/")[0], directory(0o555, mtime_ns=now, uid=OWNER, gid=OWNER))
        borrowed = Borrowed(file.path)
        entry = regular(Slice(borrowed, 0, borrowed.size), 0o440, mtime_ns=now)
        draft.put(path, dataclasses.replace(entry, uid=OWNER, gid=OWNER))
    return draft.tree()


def _write_image(layout: Path, layer: File, architecture: str, epoch: int, tag: str) -> str:
    """Config, manifest and index; the digest of the manifest."""
    diff = f"sha256:{layer.sha256}"
    created = f"{datetime.datetime.fromtimestamp(epoch, tz=datetime.UTC):%Y-%m-%dT%H:%M:%SZ}"
    config = _add(layout, _CONFIG, {
        "created": created, "architecture": architecture, "os": "linux", "config": {},
        "rootfs": {"type": "layers", "diff_ids": [diff]},
        "history": [{"created": created, "created_by": "osbuilder export"}],
    })  # fmt: skip
    layers = [{"mediaType": _LAYER, "digest": diff, "size": layer.size}]
    document = {"schemaVersion": 2, "mediaType": _MANIFEST, "config": config, "layers": layers}
    top = _add(layout, _MANIFEST, document)
    described = top | {
        "platform": {"os": "linux", "architecture": architecture},
        "annotations": {"org.opencontainers.image.ref.name": tag},
    }
    write_whole(layout / "index.json", _encode({"schemaVersion": 2, "mediaType": _INDEX, "manifests": [described]}))
    write_whole(layout / "oci-layout", _encode({"imageLayoutVersion": "1.0.0"}))
    return str(top["digest"])


def _add(layout: Path, media_type: str, document: Json) -> dict[str, Any]:
    data = _encode(document)
    digest = hashlib.sha256(data).hexdigest()
    write_whole(layout / "blobs/sha256" / digest, data)
    return {"mediaType": media_type, "digest": f"sha256:{digest}", "size": len(data)}


def _encode(document: Json) -> bytes:
    return json.dumps(document, separators=(",", ":")).encode()
