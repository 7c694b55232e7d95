"""The other half of the OCI distribution protocol: blobs and manifests into one repository.

Source: OCI distribution-spec v1.1, "Push". A blob that is there is not sent; one that another repository of the
registry has is mounted; a large one goes in pieces, and goes on where the registry says that it has got to.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol
from urllib.parse import quote as escape

from osbuild.distribution import ACCEPT, Repository, drain
from osbuild.errors import InputError
from osbuild.oci import JSON_MAX, Descriptor
from osbuild.transport import Answer, TransientError

THERE: Final = "there"
MOUNTED: Final = "mounted"
SENT: Final = "sent"

PIECE: Final = 4 << 20  # bytes in one request
_RANGE: Final = re.compile(r"(?:bytes=)?0-([0-9]{1,18})")
_BYTES: Final = {"Content-Type": "application/octet-stream"}


class Source(Protocol):
    """The bytes of a blob, from wherever the registry wants them."""

    def read(self, offset: int, length: int) -> bytes:
        """`length` bytes at `offset`, fewer only at the end."""


@dataclass(frozen=True, slots=True)
class InMemory:
    """A small blob."""

    data: bytes

    def read(self, offset: int, length: int) -> bytes:
        return self.data[offset : offset + length]


@dataclass(slots=True)
class _Session:
    """An upload that has begun: where it goes on, and from which byte."""

    location: str
    position: int = 0
    lost: bool = False  # nobody knows it any more


class Uploads:
    """What is put into one repository; threads may share it."""

    def __init__(self, repository: Repository, *, mount_from: str = "") -> None:
        self.repository = repository
        self._mount_from = mount_from  # a repository of the same registry

    def put(self, blob: Descriptor, source: Source) -> str:
        """See that the registry has a blob: THERE, MOUNTED or SENT. InputError when it keeps a damaged one instead."""
        there = self._size(blob)
        if there == blob.size:
            return THERE
        how = self._upload(blob, source)
        # Some say 0 to HEAD whatever they have.
        if there is not None and (still := self._size(blob)) not in (blob.size, 0):
            raise InputError(
                f"{self.repository} has {still} bytes under {blob.digest}, which has {blob.size}, and took the right "
                "ones without replacing them",
                hint="its owner removes that blob from the storage; then publish again",
            )
        return how

    def _upload(self, blob: Descriptor, source: Source) -> str:
        tries = self.repository.tries()
        session: _Session | None = None
        reached = 0

        def moved(position: int) -> None:
            nonlocal reached
            if position > reached:  # what is sent once more is no progress
                tries.progress(position - reached)
                reached = position

        while True:
            try:
                if session is None or session.lost or not self._ask(session):
                    session = self._begin(blob)
                if session is None:
                    return MOUNTED
                self._send(session, blob, source, moved)
                return SENT
            except TransientError as problem:
                tries.failed(problem)
                if self._size(blob) == blob.size:  # all of it had come, only the answer was lost
                    return SENT

    def manifest(self, reference: str) -> tuple[bytes, str] | None:
        """What stands at a tag or digest, and its media type; None when there is nothing."""

        def once() -> tuple[bytes, str] | None:
            with self.repository.send("HEAD", f"manifests/{reference}", {"Accept": ACCEPT}) as answer:
                if answer.status == 404:
                    return None
            return self.repository.manifest(reference)

        return self.repository.insist(once)

    def document(self, blob: Descriptor) -> bytes:
        """A small blob that is there."""
        if blob.size > JSON_MAX:
            raise InputError(f"{self.repository}: {blob.digest} has {blob.size} bytes, more than {JSON_MAX}")
        data = b""
        for piece in self.repository.blob_fetch(blob)(0)[1]:
            data += piece
            if len(data) > blob.size:
                raise InputError(f"{self.repository}: more than the {blob.size} bytes of {blob.digest} came")
        if f"sha256:{hashlib.sha256(data).hexdigest()}" != blob.digest:
            raise InputError(f"{self.repository}: the bytes that came for {blob.digest} have another digest")
        return data

    def put_manifest(self, reference: str, data: bytes, media_type: str) -> bool:
        """Let a tag or digest be this manifest; False when it was already."""
        if (now := self.manifest(reference)) is not None and now[0] == data:
            return False
        if len(data) > JSON_MAX:
            raise InputError(f"{self.repository}: a manifest of {len(data)} bytes, more than {JSON_MAX}")
        self.put_referrer(reference, data, media_type)
        return True

    def put_referrer(self, reference: str, data: bytes, media_type: str) -> bool:
        """Put a manifest; True when the registry says that it keeps account of its subject."""

        def once() -> bool:
            headers = {"Content-Type": media_type}
            with self.repository.send("PUT", f"manifests/{reference}", headers, data) as answer:
                if answer.status != 201:
                    raise self.repository.refused(answer, f"the manifest {reference}", missing="run it again")
                return bool(answer.headers.get("OCI-Subject"))

        return self.repository.insist(once)

    def _size(self, blob: Descriptor) -> int | None:
        """How many bytes the registry has under a digest: as many as there should be, if it does not say."""

        def once() -> int | None:
            with self.repository.send("HEAD", f"blobs/{blob.digest}", {}) as answer:
                if answer.status not in (200, 404):
                    raise self.repository.refused(answer, f"blob {blob.digest}")
                said = answer.headers.get("Content-Length", "")
                plain = said.isascii() and said.isdecimal() and not answer.headers.get("Content-Encoding")
                return None if answer.status == 404 else int(said) if plain else blob.size

        return self.repository.insist(once)

    def _begin(self, blob: Descriptor) -> _Session | None:
        """A new upload; None when the blob could be had from the other repository."""
        wish = f"?mount={escape(blob.digest, safe='')}&from={escape(self._mount_from, safe='')}"
        answer = self.repository.send("POST", f"blobs/uploads/{wish if self._mount_from else ''}", {}, b"")
        with answer:
            if answer.status == 201 and self._mount_from:
                return None
            if answer.status != 202:
                raise self.repository.refused(answer, f"an upload to {self.repository.name}")
            location = self._location(answer)
        return _Session(location=location)

    def _send(self, session: _Session, blob: Descriptor, source: Source, moved: Callable[[int], None]) -> None:
        while blob.size - session.position > PIECE:
            start = session.position
            data = _read(source, start, PIECE)
            headers = _BYTES | {"Content-Range": f"{start}-{start + len(data) - 1}"}
            with self.repository.send_to("PATCH", session.location, headers, data) as answer:
                self._check(session, answer, blob, 202)
                session.location = self._location(answer)
                session.position = _taken(answer, start + len(data))
            if not start < session.position <= start + len(data):
                session.lost = True
                raise TransientError(f"{self.repository.host} lost count of an upload", wrong=True)
            moved(session.position)
        data = _read(source, session.position, blob.size - session.position)
        mark = "&" if "?" in session.location else "?"
        url = f"{session.location}{mark}digest={escape(blob.digest, safe='')}"
        with self.repository.send_to("PUT", url, _BYTES, data) as answer:
            self._check(session, answer, blob, 201)
            moved(blob.size)
            drain(answer)

    def _check(self, session: _Session, answer: Answer, blob: Descriptor, wanted: int) -> None:
        """TransientError for what a new beginning may better: a session that is gone, bytes that went wrong."""
        if answer.status == wanted:
            return
        problem = self.repository.refused(answer, f"an upload of {blob.digest}")
        if answer.status == 416:  # it may know better than we do where it has got to
            raise TransientError(str(problem), wrong=True)
        if answer.status in (400, 404):
            session.lost = True
            raise TransientError(str(problem), wrong=True)
        raise problem

    def _ask(self, session: _Session) -> bool:
        """How far an interrupted upload has come; False when it has to begin again."""
        with self.repository.send_to("GET", session.location, {}) as answer:
            if answer.status != 204:
                return False
            if answer.headers.get("Location"):
                session.location = self._location(answer)
            session.position = _taken(answer, 0)
            return True

    def _location(self, answer: Answer) -> str:
        location = answer.headers.get("Location")
        if not location:
            raise InputError(f"{self.repository.host} takes an upload, but does not say where")
        return self.repository.locate(location)


def _taken(answer: Answer, otherwise: int) -> int:
    """How many bytes the registry has; 0-0 is what some say for none."""
    found = _RANGE.fullmatch(answer.headers.get("Range", "").strip())
    if not found:
        return otherwise
    return int(found[1]) + 1 if int(found[1]) else 0


def _read(source: Source, offset: int, length: int) -> bytes:
    data = source.read(offset, length)
    if len(data) != length:
        raise InputError("a file became shorter while it was sent", hint="wait until nothing writes to it, run again")
    return data
