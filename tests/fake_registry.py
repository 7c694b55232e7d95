"""A small registry on loopback that serves image layouts, and does wrong on request."""

from __future__ import annotations

import base64
import contextlib
import http.server
import itertools
import json
import ssl
import subprocess
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
INDEX = "application/vnd.oci.image.index.v1+json"
NAME = "some/image"  # what `serving` calls its repository

Fault = Callable[["Handler", bytes, str], None]  # the right body and its type, to be made something worse of


@dataclass
class Asked:
    """One request as it came in."""

    path: str
    headers: dict[str, str]
    method: str = "GET"
    body: bytes = b""


@dataclass
class Access:
    """Who may read; what a token service would say lives here too."""

    scheme: str = "Bearer"
    user: str = ""  # empty: anybody gets a token
    password: str = ""
    identity_token: str = ""
    realm: str = ""  # the registry's own, unless given
    answer: dict[str, object] = field(default_factory=dict)  # besides the token
    lives: int = 1 << 30  # requests that one token is good for
    issued: int = 0
    used: dict[str, int] = field(default_factory=dict)


class Registry(http.server.ThreadingHTTPServer):
    """`faults`: a part of a path -> what the next requests for it meet, one after the other."""

    daemon_threads = True

    def __init__(self, context: ssl.SSLContext | None = None) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.documents: dict[str, tuple[bytes, str]] = {}  # path below /v2/ -> body, media type
        self.faults: dict[str, list[Fault]] = {}
        self.asked: list[Asked] = []
        self.access: Access | None = None
        self.address = f"127.0.0.1:{self.server_port}"
        self.scheme = "http"
        if context is not None:
            self.scheme = "https"
            self.socket = context.wrap_socket(self.socket, server_side=True, do_handshake_on_connect=False)

    @property
    def url(self) -> str:
        return f"{self.scheme}://{self.address}"

    def add_layout(self, layout: Path, name: str = NAME) -> None:
        """Every image of a layout under its tag, all of them together under the tag `index`."""
        for path in (layout / "blobs/sha256").iterdir():
            self.documents[f"{name}/blobs/sha256:{path.name}"] = (path.read_bytes(), "application/octet-stream")
        index = json.loads((layout / "index.json").read_text())
        for item in index["manifests"]:
            data = (layout / "blobs" / item["digest"].replace(":", "/")).read_bytes()
            for reference in (item["annotations"]["org.opencontainers.image.ref.name"], item["digest"]):
                self.documents[f"{name}/manifests/{reference}"] = (data, item["mediaType"])
        self.add_manifest("index", json.dumps(index).encode(), INDEX, name)

    def add_manifest(self, reference: str, data: bytes, kind: str = MANIFEST, name: str = NAME) -> None:
        self.documents[f"{name}/manifests/{reference}"] = (data, kind)

    def paths(self, part: str = "") -> list[str]:
        return [asked.path for asked in self.asked if part in asked.path]

    def handle_error(self, request: object, address: object) -> None:
        """Clients hang up: that is what the tests are about."""


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Registry

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass

    def do_GET(self) -> None:
        self._note()
        body, kind = self._document()
        for part, queue in self.server.faults.items():
            if part in self.path and queue:
                queue.pop(0)(self, body, kind)
                return
        if self._allowed():
            self.answer_well(body, kind)

    def do_POST(self) -> None:
        self._note()
        access = self.server.access
        form = urllib.parse.parse_qs(self.server.asked[-1].body.decode())
        right = access is not None and form.get("refresh_token") == [access.identity_token]
        self._token() if right else self.answer(401)

    def _note(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.asked.append(Asked(self.path, dict(self.headers), self.command, body))

    def _document(self) -> tuple[bytes, str]:
        return self.server.documents.get(self.path.partition("?")[0].removeprefix("/v2/"), (b"", ""))

    def _allowed(self) -> bool:
        access = self.server.access
        given = self.headers.get("Authorization", "")
        if access is None:
            return True
        pair = "Basic " + base64.b64encode(f"{access.user}:{access.password}".encode()).decode()
        if self.path.startswith("/token"):
            self._token() if not access.user or given == pair else self.answer(401)
            return False
        if access.scheme == "Basic":
            if given == pair:
                return True
            self.answer(401, {"WWW-Authenticate": 'Basic realm="here"'})
            return False
        if access.used.get(given, access.lives) < access.lives:
            access.used[given] += 1
            return True
        realm = access.realm or f"{self.server.url}/token"
        challenge = f'Bearer realm="{realm}",service="fake",scope="repository:other/thing:pull,push"'
        self.answer(401, {"WWW-Authenticate": challenge})
        return False

    def _token(self) -> None:
        access = self.server.access
        assert access is not None
        access.issued += 1
        token = f"token-{access.issued}"
        access.used[f"Bearer {token}"] = 0
        self.answer(200, body=json.dumps({"token": token} | access.answer).encode())

    def answer_well(self, body: bytes, kind: str, extra: dict[str, str] | None = None) -> None:
        if self.path.startswith("/v2/") and len(self.path) > 4 and not kind:
            self.answer(404, body=b'{"errors":[{"code":"MANIFEST_UNKNOWN","message":"no such thing"}]}')
            return
        wanted = self.headers.get("Range")
        headers = {"Content-Type": kind} | (extra or {})
        if wanted and "/blobs/" in self.path:
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
            headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
            self.answer(206, headers, body[start:])
        else:
            self.answer(200, headers, body)

    def answer(self, status: int, headers: dict[str, str] | None = None, body: bytes = b"", length: int = -1) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body) if length < 0 else length))
        self.end_headers()
        self.wfile.write(body)

    def answer_unframed(self, chunked: bool = False) -> None:
        """Headers that do not say how much will come; the connection's end is the body's."""
        self.close_connection = True
        self.send_response(200)
        self.send_header(*(("Transfer-Encoding", "chunked") if chunked else ("Connection", "close")))
        self.end_headers()


def status(code: int, **headers: str) -> Fault:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda handler, _body, _kind: handler.answer(code, named)


def redirect(url: str, code: int = 307) -> Fault:
    return status(code, Location=url)


def header(name: str, value: str) -> Fault:
    """The right body with a header that is not."""
    return lambda handler, body, kind: handler.answer_well(body, kind, {name: value})


def wrong_bytes(handler: Handler, body: bytes, kind: str) -> None:
    handler.answer(200, {"Content-Type": kind}, bytes(byte ^ 1 for byte in body))


def no_range(handler: Handler, body: bytes, kind: str) -> None:
    handler.answer(200, {"Content-Type": kind}, body)


def wrong_range(handler: Handler, body: bytes, kind: str) -> None:
    handler.answer(206, {"Content-Type": kind, "Content-Range": f"bytes 1-{len(body) - 1}/{len(body)}"}, body[1:])


def short(count: int) -> Fault:
    """Fewer bytes than Content-Length says."""

    def fault(handler: Handler, body: bytes, kind: str) -> None:
        handler.close_connection = True
        handler.answer(200, {"Content-Type": kind}, body[:count], len(body))

    return fault


def short_and_sure(count: int) -> Fault:
    """Fewer bytes than there are, with a Content-Length that fits them."""
    return lambda handler, body, kind: handler.answer(200, {"Content-Type": kind}, body[:count])


def chunked_cut(count: int) -> Fault:
    def fault(handler: Handler, body: bytes, kind: str) -> None:
        handler.answer_unframed(chunked=True)
        handler.wfile.write(b"%x\r\n" % len(body) + body[:count])

    return fault


def no_length(count: int) -> Fault:
    def fault(handler: Handler, body: bytes, kind: str) -> None:
        handler.answer_unframed()
        handler.wfile.write(body[:count])

    return fault


def endless(handler: Handler, body: bytes, kind: str) -> None:
    handler.answer_unframed()
    handler.wfile.write(body)
    while True:
        handler.wfile.write(bytes(1 << 16))


def trickle(handler: Handler, body: bytes, kind: str) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    for byte in body:
        handler.wfile.write(bytes([byte]))
        time.sleep(0.02)


def silence(seconds: float) -> Fault:
    """Headers, and then nothing."""

    def fault(handler: Handler, body: bytes, kind: str) -> None:
        handler.close_connection = True
        handler.answer(200, {"Content-Type": kind}, b"", len(body))
        handler.wfile.flush()
        time.sleep(seconds)

    return fault


def hang_up(handler: Handler, body: bytes, kind: str) -> None:
    handler.close_connection = True


R = TypeVar("R", bound=Registry)


@contextlib.contextmanager
def running(context: ssl.SSLContext | None = None) -> Iterator[Registry]:
    with answering(Registry(context)) as server:
        yield server


@contextlib.contextmanager
def answering(server: R) -> Iterator[R]:
    """A registry that answers for the length of the block."""
    with server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@contextlib.contextmanager
def serving(layout: Path, context: ssl.SSLContext | None = None) -> Iterator[Registry]:
    """The images of a layout (tests.layer_tools.write_layout) as docker://ADDRESS/some/image:TAG."""
    with running(context) as server:
        server.add_layout(layout)
        yield server


def make_authority(directory: Path) -> tuple[Path, ssl.SSLContext]:
    """A throwaway authority's certificate, and what a server on 127.0.0.1 with a certificate of its needs."""
    directory.mkdir(parents=True, exist_ok=True)
    key, certificate = directory / "key.pem", directory / "ca.crt"
    subprocess.run(
        [
            "openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
            "-days", "2", "-subj", "/CN=osbuilder test", "-addext", "subjectAltName=IP:127.0.0.1",
            "-addext", "keyUsage=critical,digitalSignature,keyCertSign",
            "-keyout", str(key), "-out", str(certificate),
        ],
        check=True, capture_output=True,
    )  # fmt: skip
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    return certificate, context


def always(fault: Fault) -> list[Fault]:
    """For `faults`: as often as anybody asks."""
    return list(itertools.repeat(fault, 1000))
