"""Small builds with a disk image of several parts, a registry that takes uploads and does wrong, and what both give."""

from __future__ import annotations

import hashlib
import json
import random
import re
import secrets
import urllib.parse
from pathlib import Path
from typing import Any

from osbuild import manifest, provenance
from osbuild.artifacts import File
from osbuild.cache import Cache
from osbuild.console import Show
from osbuild.manifest import RECORDS
from osbuild.publish import Published, publish
from osbuild.pull import Pulled, pull
from osbuild.registry_spec import RegistrySpec
from tests.fake_registry import INDEX, Handler, Registry
from tests.installable import make_build

MIB = 1 << 20
NAMES = ("rootfs.img", "initrd.img", "vmlinux", "vmlinuz", "config", *RECORDS)


def make(
    out: Path, mark: str = "a", *, arch: str = "x86_64", data: int = 3, kernel: int = 3000, image: Path | None = None
) -> Path:
    """A build whose image has `data` MiB that all marks share, one of its own, and holes; its kernel is the same."""
    image = image or _image(out.with_name(f"{out.name}.image"), mark, data)
    vmlinux = out.with_name(f"{out.name}.vmlinux")
    vmlinux.write_bytes(random.Random(8).randbytes(kernel))
    make_build(out, mark, arch=arch, files={"rootfs.img": image, "vmlinux": vmlinux, "vmlinuz": vmlinux})
    document = json.loads((out / "manifest.json").read_text()) | {"agent": f"agent {mark}"}
    (out / "manifest.json").write_text(json.dumps(document))
    add_records(out)
    (out / ".osbuilder").write_text("")
    return out


def add_records(out: Path) -> None:
    """The lock, the bill of materials and the statement that belong to a build's manifest.json."""
    document = json.loads((out / "manifest.json").read_text())
    lock = {
        "osbuilder": {"version": "0", "code": "c" * 64, "tools": {}},
        "agent": {"name": document["agent"], "sha256": "a" * 64, "inputs": {"compiler": ["cc", "cc 1\n"]}},
        "image": {"digest": "sha256:0", "config": "sha256:1", "layers": [{"diff_id": "sha256:2"}]},
        "rootfs": {"init": "", "slim": False, "remove": [], "inputs": {}},
        "kernel": document["kernel"] | {"inputs": {"patches": [["p", "d" * 64]]}, "fragments": {"base": "e" * 64}},
        "options": {"compress": "zstd"}, "given": {"image": "oci:/x"},
    }  # fmt: skip
    bill = json.dumps({"serialNumber": document["agent"]}).encode()
    (out / "lock.json").write_text(json.dumps(lock))
    (out / "sbom.cdx.json").write_bytes(bill)
    statement = provenance.describe(document, lock, {"sbom.cdx.json": bill})
    (out / "provenance.json").write_text(json.dumps(statement))


def _image(path: Path, mark: str, data: int) -> Path:
    shared = random.Random(7)
    with path.open("wb") as file:
        for number in range(data):
            file.seek((2 + 2 * number) * MIB)
            file.write(shared.randbytes(MIB))
        file.seek(5 * MIB)
        file.write(f"the agent {mark}\n".encode() * 1000)
        file.truncate((4 + 2 * data) * MIB + 4096)
    return path


def put(address: str, *builds: Path, **more: Any) -> Published:
    name = more.pop("name", "guests/debian:1")
    return publish(builds, f"{address}/{name}", more.pop("registry", RegistrySpec()), Show(quiet=True), **more)


def get(address: str, out: Path, cache: Path, name: str = "guests/debian:1", **more: Any) -> Pulled:
    registry = more.pop("registry", RegistrySpec())
    return pull(f"{address}/{name}", out, registry, Cache(root=cache), Show(quiet=True), **more)


def check_same(first: Path, second: Path) -> None:
    """Every file of a build, and that the second is one."""
    for name in NAMES:
        assert (first / name).exists() == (second / name).exists(), name
        if (first / name).exists():
            assert File.of(first / name).sha256 == File.of(second / name).sha256, name
    manifest.read(second)


class Uploading(Handler):
    """The same registry, taking uploads; faults are asked for by METHOD and part of the path."""

    def do_HEAD(self) -> None:  # noqa: N802 - http.server's names
        self._note()
        if self._wrong() or not self._allowed():
            return
        body, kind = self._document()
        self.send_response(200 if kind else 404)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()

    def do_GET(self) -> None:  # noqa: N802 - http.server's names
        if self._session() is None:
            super().do_GET()
            return
        self._note()
        if not self._wrong() and self._allowed():
            self._progress(204)

    def answer_well(self, body: bytes, kind: str, extra: dict[str, str] | None = None) -> None:
        if "/referrers/" in self.path and self.registry.referrers and not kind:
            body, kind = json.dumps({"schemaVersion": 2, "mediaType": INDEX, "manifests": []}).encode(), INDEX
        super().answer_well(body, kind, extra)

    def do_POST(self) -> None:  # noqa: N802 - http.server's names
        self._note()
        if self._wrong() or not self._allowed():
            return
        name = re.fullmatch(r"/v2/(.+)/blobs/uploads/(?:\?.*)?", self.path)
        assert name is not None, self.path
        query = urllib.parse.parse_qs(urllib.parse.urlsplit(self.path).query)
        source = f"{query['from'][0]}/blobs/{query['mount'][0]}" if "mount" in query else ""
        if source in self.server.documents:
            self.server.documents[f"{name[1]}/blobs/{query['mount'][0]}"] = self.server.documents[source]
            self.answer(201)
            return
        session = f"{name[1]}/blobs/uploads/{secrets.token_hex(8)}"
        self.sessions[session] = b""
        self.path = f"/v2/{session}"
        self._progress(202)

    def do_PATCH(self) -> None:  # noqa: N802 - http.server's names
        self._note()
        session = self._session()
        if self._wrong() or not self._allowed():
            return
        if session is None:
            self.answer(404)
            return
        start = int(self.headers["Content-Range"].partition("-")[0])
        if start != len(self.sessions[session]):
            self.answer(416)
            return
        self.sessions[session] += self.server.asked[-1].body
        self._progress(202)

    def do_PUT(self) -> None:  # noqa: N802 - http.server's names
        self._note()
        if self._wrong() or not self._allowed():
            return
        self.store()
        if not self.stored:
            self.answer(400, body=b'{"errors":[{"code":"DIGEST_INVALID"}]}')
        else:
            self.answer(201, {"OCI-Subject": self.subject} if self.subject else {})

    def store(self) -> None:
        """What a PUT asks for, and no answer yet."""
        body = self.server.asked[-1].body
        path, _, query = self.path.removeprefix("/v2/").partition("?")
        self.stored, self.subject = True, ""
        if "/manifests/" in path:
            name = path.rpartition("/manifests/")[0]
            digest = f"sha256:{hashlib.sha256(body).hexdigest()}"
            document = json.loads(body)
            for each in [*document.get("layers", []), *([document["config"]] if "config" in document else [])]:
                assert f"{name}/blobs/{each['digest']}" in self.server.documents, "the manifest came before a blob"
            for each in document.get("manifests", []):
                assert f"{name}/manifests/{each['digest']}" in self.server.documents, "the index came before a manifest"
            if "subject" in document and self.registry.referrers:
                self._refer(name, document, digest)
            for reference in (path.rpartition("/")[2], digest):
                self.server.documents[f"{name}/manifests/{reference}"] = (body, self.headers["Content-Type"])
            return
        data = self.sessions.pop(path) + body
        digest = urllib.parse.parse_qs(query)["digest"][0]
        self.stored = f"sha256:{hashlib.sha256(data).hexdigest()}" == digest
        if self.stored:
            home = path.rpartition("/uploads/")[0]
            self.server.documents[f"{home}/{digest}"] = (data, "application/octet-stream")

    def _refer(self, name: str, document: Any, digest: str) -> None:
        """Keep account of what refers to what."""
        self.subject = document["subject"]["digest"]
        where = f"{name}/referrers/{self.subject}"
        rows = json.loads(self.server.documents[where][0])["manifests"] if where in self.server.documents else []
        row = {key: document[key] for key in ("mediaType", "artifactType", "annotations")}
        rows = [
            *(each for each in rows if each["digest"] != digest),
            row | {"digest": digest, "size": len(self.server.asked[-1].body)},
        ]
        index = {"schemaVersion": 2, "mediaType": INDEX, "manifests": rows}
        self.server.documents[where] = (json.dumps(index).encode(), INDEX)

    @property
    def registry(self) -> UploadRegistry:
        assert isinstance(self.server, UploadRegistry)
        return self.server

    @property
    def sessions(self) -> dict[str, bytes]:
        found: dict[str, bytes] = self.server.__dict__.setdefault("sessions", {})
        return found

    def _session(self) -> str | None:
        path = self.path.removeprefix("/v2/").partition("?")[0]
        return path if path in self.sessions else None

    def _progress(self, status: int) -> None:
        path = self.path.partition("?")[0]
        end = max(len(self.sessions[path.removeprefix("/v2/")]) - 1, 0)
        self.answer(status, {"Location": path, "Range": f"0-{end}"})

    def _wrong(self) -> bool:
        for part, queue in self.server.faults.items():
            method, _, rest = part.partition(" ")
            if method == self.command and rest in self.path and queue:
                queue.pop(0)(self, *self._document())
                return True
        return False


class UploadRegistry(Registry):
    """`faults`: "PATCH /uploads/" -> what the next of these requests meet; `referrers`: it keeps account of them."""

    def __init__(self, *, referrers: bool = False) -> None:
        super().__init__()
        self.referrers = referrers
        self.RequestHandlerClass = Uploading

    def bodies(self, method: str, part: str = "") -> list[bytes]:
        return [asked.body for asked in self.asked if asked.method == method and part in asked.path]
