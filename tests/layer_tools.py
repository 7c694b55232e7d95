"""Layers for tests: archives made by CPython's tarfile, which is somebody else's writer, or byte by byte."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from osbuild.arch import X86_64, Arch
from osbuild.cache import Cache
from osbuild.layers import Layer
from osbuild.oci import Platform
from osbuild.sources import open_image
from osbuild.sources.image import SourceImage, Want
from osbuild.tree import Spool

NO_CACHE = Cache(root=Path("/dev/null/no-cache"))  # tests that want one bring their own


def member(name: str, data: bytes = b"", **fields: Any) -> tuple[tarfile.TarInfo, bytes]:
    """A regular file, or whatever `type` says."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    info.mtime = 1_000_000_000
    for key, value in fields.items():
        setattr(info, key, value)
    return info, data


def folder(name: str, **fields: Any) -> tuple[tarfile.TarInfo, bytes]:
    return member(name, type=tarfile.DIRTYPE, mode=fields.pop("mode", 0o755), **fields)


def link(name: str, target: str, **fields: Any) -> tuple[tarfile.TarInfo, bytes]:
    return member(name, type=tarfile.SYMTYPE, linkname=target, **fields)


def hardlink(name: str, target: str, **fields: Any) -> tuple[tarfile.TarInfo, bytes]:
    return member(name, type=tarfile.LNKTYPE, linkname=target, **fields)


def archive(*members: tuple[tarfile.TarInfo, bytes], form: int = tarfile.PAX_FORMAT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as tar:
        for info, data in members:
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def opened(text: str, arch: Arch = X86_64, **wishes: Any) -> SourceImage:
    """The image that the words name, for an architecture."""
    platform = Platform(os="linux", architecture=arch.oci)
    return open_image(text, Want(platform=platform, cache=wishes.pop("cache", NO_CACHE), **wishes))


def spooled(data: bytes) -> Spool:
    spool = Spool()
    spool.append(data)
    return spool


def layer(data: bytes) -> Layer:
    digest = hashlib.sha256(data).hexdigest()
    return Layer(spool=spooled(data), offset=0, size=len(data), diff_id=f"sha256:{digest}")


def header(**fields: bytes) -> bytes:
    """One ustar header, its checksum right unless given."""
    values = {
        "name": b"file", "mode": b"0000644\0", "uid": b"0000000\0", "gid": b"0000000\0", "size": b"00000000000\0",
        "mtime": b"00000000000\0", "kind": b"0", "link": b"", "magic": b"ustar\0", "version": b"00", "uname": b"",
        "gname": b"", "major": b"0000000\0", "minor": b"0000000\0", "prefix": b"",
    } | fields  # fmt: skip
    sizes = {
        "name": 100, "mode": 8, "uid": 8, "gid": 8, "size": 12, "mtime": 12, "checksum": 8, "kind": 1, "link": 100,
        "magic": 6, "version": 2, "uname": 32, "gname": 32, "major": 8, "minor": 8, "prefix": 155,
    }  # fmt: skip
    blank = values | {"checksum": b" " * 8}
    block = b"".join(blank[name].ljust(size, b"\0") for name, size in sizes.items()).ljust(512, b"\0")
    checksum = fields.get("checksum", b"%06o\0 " % sum(block))
    return block[:148] + checksum + block[156:]


def write_layout(
    root: Path, layers: Iterable[bytes], *, tag: str = "latest", compress: bool = False, **config: Any
) -> dict[str, Any]:
    """An OCI image layout; returns its manifest."""
    blobs = root / "blobs" / "sha256"
    blobs.mkdir(parents=True, exist_ok=True)

    def add(data: bytes, media_type: str) -> dict[str, Any]:
        digest = hashlib.sha256(data).hexdigest()
        (blobs / digest).write_bytes(data)
        return {"mediaType": media_type, "digest": f"sha256:{digest}", "size": len(data)}

    stack = list(layers)
    suffix = "+gzip" if compress else ""
    described = [
        add(gzip.compress(data, mtime=0) if compress else data, f"application/vnd.oci.image.layer.v1.tar{suffix}")
        for data in stack
    ]
    document = {
        "os": "linux", "architecture": "amd64",
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(data).hexdigest()}" for data in stack]},
    } | config  # fmt: skip
    kind = "application/vnd.oci.image.manifest.v1+json"
    manifest = {
        "schemaVersion": 2, "mediaType": kind, "layers": described,
        "config": add(json.dumps(document).encode(), "application/vnd.oci.image.config.v1+json"),
    }  # fmt: skip
    top = add(json.dumps(manifest).encode(), kind)
    top["annotations"] = {"org.opencontainers.image.ref.name": tag}
    top["platform"] = {"os": "linux", "architecture": document["architecture"]}
    index_path = root / "index.json"
    index: dict[str, Any] = (
        json.loads(index_path.read_text()) if index_path.exists() else {"schemaVersion": 2, "manifests": []}
    )
    index["manifests"].append(top)
    index_path.write_text(json.dumps(index))
    (root / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    return manifest


def pax(records: dict[str, bytes], kind: bytes = b"x") -> bytes:
    """An extended header, for the member that is put after it."""
    body = b"".join(pax_record(key, value) for key, value in records.items())
    return header(name=b"pax", kind=kind, size=b"%011o\0" % len(body)) + body + bytes(-len(body) % 512)


def pax_record(key: str, value: bytes) -> bytes:
    record = b" " + key.encode() + b"=" + value + b"\n"
    size = len(record) + len(str(len(record)))
    size = len(record) + len(str(size))
    return str(size).encode() + record


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 512)


def old_sparse(pieces: list[tuple[int, int]], real: int, *, stored: int | None = None, name: bytes = b"s") -> bytes:
    """A header of GNU's old sparse format and its extensions; the stored bytes come after it."""
    table = [b"%011o\0%011o\0" % piece for piece in pieces]
    more = [table[at : at + 21] for at in range(4, len(table), 21)]
    size = sum(length for _, length in pieces) if stored is None else stored
    tail = b"".join(table[:4]).ljust(96, b"\0") + bytes([bool(more)]) + b"%011o\0" % real
    block = header(name=name, kind=b"S", magic=b"ustar ", version=b" \0", size=b"%011o\0" % size)
    block = block[:386] + tail + block[386 + len(tail) :]
    block = block[:148] + b"%06o\0 " % (sum(block[:148]) + sum(block[156:]) + 256) + block[156:]
    for index, part in enumerate(more):
        block += (b"".join(part).ljust(504, b"\0") + bytes([index + 1 < len(more)])).ljust(512, b"\0")
    return block


def sparse_archive() -> bytes:
    """A file of every kind of sparse member: 512 bytes at 1024, 100 at 4096, 8192 in all."""
    data = padded(b"a" * 512 + b"b" * 100)
    stored = header(name=b"made/up", size=b"%011o\0" % 612)
    lines = padded(b"2\n1024\n512\n4096\n100\n")
    repeated = b"".join(
        pax_record(f"GNU.sparse.{key}", value)
        for key, value in (
            ("size", b"8192"), ("numblocks", b"2"), ("offset", b"1024"), ("numbytes", b"512"), ("offset", b"4096"),
            ("numbytes", b"100"),
        )
    )  # fmt: skip
    return b"".join(
        [
            old_sparse([(1024, 512), (4096, 100)], 8192), data,
            header(name=b"pax", kind=b"x", size=b"%011o\0" % len(repeated)) + padded(repeated),
            header(name=b"s00", size=b"%011o\0" % 612), data,
            pax({"GNU.sparse.size": b"8192", "GNU.sparse.map": b"1024,512,4096,100", "GNU.sparse.name": b"s01"}),
            stored, data,
            pax({"GNU.sparse.major": b"1", "GNU.sparse.minor": b"0", "GNU.sparse.realsize": b"8192",
                 "GNU.sparse.name": b"s10"}),
            header(name=b"made/up", size=b"%011o\0" % (612 + len(lines))), lines + data,
            bytes(1024),
        ]
    )  # fmt: skip
