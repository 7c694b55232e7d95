"""The OCI distribution protocol: manifests and blobs of one repository, asked for until they come or cannot.

Source: OCI distribution-spec v1.1, "Pull"; what a push adds is in `uploads`. Nothing here is believed: what comes is
raw bytes, and the store that they go to holds them against their digests. Every request passes `Repository.send`, which
knows the registry's address and what to say in the Authorization header.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Final, TypeVar

from osbuild import oci
from osbuild.authorization import Authorizer
from osbuild.blobs import Fetch
from osbuild.errors import InputError, OsbuilderError
from osbuild.registry_spec import RegistrySpec
from osbuild.transport import Answer, TransientError, Tries, Web, origin, parse_url, resolve

_HUB_ADDRESS: Final = "registry-1.docker.io"  # where docker.io is
ACCEPT: Final = ", ".join(sorted(oci.MANIFEST_TYPES | oci.INDEX_TYPES))
_ERROR_MAX: Final = 64 << 10  # bytes of an error's body
_CONTENT_RANGE: Final = re.compile(r"bytes ([0-9]{1,18})-[0-9]{1,18}/([0-9]{1,18}|\*)\Z")
_CODES: Final = frozenset(  # the specification's: a registry's free text might repeat what we sent
    ("BLOB_UNKNOWN", "BLOB_UPLOAD_INVALID", "BLOB_UPLOAD_UNKNOWN", "DIGEST_INVALID", "MANIFEST_BLOB_UNKNOWN",
     "MANIFEST_INVALID", "MANIFEST_UNKNOWN", "NAME_INVALID", "NAME_UNKNOWN", "SIZE_INVALID", "UNAUTHORIZED", "DENIED",
     "UNSUPPORTED", "TOOMANYREQUESTS")
)  # fmt: skip

T = TypeVar("T")


class Repository:
    """One repository of one registry, in one run; threads may share it."""

    def __init__(
        self, web: Web, host: str, name: str, spec: RegistrySpec, *, actions: str = "pull", also: str = ""
    ) -> None:
        self.host = host
        self.name = name
        self._web = web
        self._authorizer = Authorizer(web, host, name, actions, spec.auth_file, also=also)
        self._lock = threading.Lock()
        self._address = ""

    def __str__(self) -> str:
        return f"{self.host}/{self.name}"

    def manifest(self, reference: str) -> tuple[bytes, str]:
        """What stands at a tag or digest, and the media type that the registry gives it."""

        def once() -> tuple[bytes, str]:
            with self.send("GET", f"manifests/{reference}", {"Accept": ACCEPT}) as answer:
                if answer.status != 200:
                    mark = "@" if ":" in reference else ":"
                    raise self.refused(answer, f"image {self.name}{mark}{reference}", missing=_missing(reference))
                data = answer.read(oci.JSON_MAX)
                check_whole(answer, data, str(self))
                return data, answer.headers.get("Content-Type", "").partition(";")[0].strip()

        return self.insist(once)

    def manifest_fetch(self, digest: str) -> Fetch:
        """For the store: a manifest whose digest is known."""
        return lambda _offset: (0, iter((self.manifest(digest)[0],)))

    def blob_fetch(self, descriptor: oci.Descriptor, seen: Callable[[int], None] = lambda _position: None) -> Fetch:
        """For the store: a blob, resumed where its connection breaks; `seen` hears how much of it is there."""

        def fetch(offset: int) -> tuple[int, Iterator[bytes]]:
            start, answer = self._blob_at(descriptor, offset)
            return start, self._resumed(descriptor, start, answer, seen)

        return fetch

    def send(self, method: str, path: str, headers: Mapping[str, str], body: bytes | None = None) -> Answer:
        """One request below /v2/NAME/, with the right to make it; TransientError when another try may help."""
        return self.send_to(method, self.url(path), headers, body)

    def url(self, path: str) -> str:
        """The address of that, below /v2/NAME/."""
        return f"{self._base()}/v2/{self.name}/{path}"

    def send_to(self, method: str, url: str, headers: Mapping[str, str], body: bytes | None = None) -> Answer:
        """The same to an address that the registry gave; another host is not told what opens this one."""
        shown = self._authorizer.header()
        if origin(parse_url(url, str(self))) != origin(parse_url(self._base(), str(self))):
            answer = self._web.send(method, url, headers, body)
            answer.check_passing()
            return answer
        answer = self._web.send(method, url, _with(headers, shown), body)
        if answer.status == 401 and answer.at_home:
            challenges = answer.headers.getlist("WWW-Authenticate")
            drain(answer)
            shown = self._authorizer.answer(challenges, shown, parse_url(url, str(self)))
            answer = self._web.send(method, url, _with(headers, shown), body)
        try:
            answer.check_passing()
        except TransientError:
            drain(answer)
            raise
        return answer

    def locate(self, location: str, does: str = "takes uploads") -> str:
        """The address in a Location or Link header, if it may be followed; `does`: what the registry does there."""
        home, what = parse_url(self._base(), str(self)), f"where {self.host} {does}"
        there = resolve(home, location, what)
        if there.netloc == home.netloc:  # what stands behind a proxy often does not know that it is https
            return there._replace(scheme=home.scheme).geturl()
        if home.scheme == "https" and there.scheme == "http":
            raise InputError(f"{what} is plain HTTP at {there.netloc}, and it is asked over https")
        self._web.check_destination(there, home, what)
        return there.geturl()

    def tries(self) -> Tries:
        """A count of failures in a row."""
        return Tries(self._web, str(self))

    def insist(self, once: Callable[[], T]) -> T:
        """Do it until it works, or has failed too often."""
        tries = Tries(self._web, str(self))
        while True:
            try:
                return once()
            except TransientError as problem:
                tries.failed(problem)

    def refused(self, answer: Answer, what: str, *, missing: str = "") -> OsbuilderError:
        """The error for a status that no other try will change; `missing` is the hint for what is not there."""
        status = " ".join([str(answer.status), *_error_codes(answer)])
        if not answer.at_home:
            return InputError(f"{self}: {answer.host}, where {self.host} keeps its {what}, answers {answer.status}")
        if answer.status == 404:
            return InputError(f"the registry {self.host} has no {what} ({status})", hint=missing)
        if answer.status in (401, 403):
            return self._authorizer.refusal(f"answers {status} for {what}")
        return InputError(f"{self}: {self.host} answers {status} for {what}")

    def _base(self) -> str:
        with self._lock:
            if not self._address:
                self._address = self._find_address()
            return self._address

    def _find_address(self) -> str:
        """https; where plain HTTP is allowed, that too if there is no https."""
        host = _HUB_ADDRESS if self.host == oci.DOCKER_HUB else self.host
        if not self._web.may_be_plain(host):
            return f"https://{host}"
        try:
            drain(self._web.send("GET", f"https://{host}/v2/", {}))
            return f"https://{host}"
        except TransientError as problem:
            drain(plain := self._web.send("GET", f"http://{host}/v2/", {}))
            if plain.status == 400:  # what a server says that expected TLS
                raise problem from None
            return f"http://{host}"

    def _blob_at(self, descriptor: oci.Descriptor, offset: int) -> tuple[int, Answer]:
        """A blob from `offset`, or from 0 when the registry will not."""

        def once() -> tuple[int, Answer]:
            path = f"blobs/{descriptor.digest}"
            answer = self.send("GET", path, {"Range": f"bytes={offset}-"} if offset else {})
            if answer.status in (206, 416) and not _is_range(answer, offset, descriptor.size):
                answer.close()
                answer = self.send("GET", path, {})
            if answer.status in (200, 206):
                return offset if answer.status == 206 else 0, answer
            with answer:
                raise self.refused(answer, f"blob {descriptor.digest}")

        return self.insist(once)

    def _resumed(
        self, descriptor: oci.Descriptor, start: int, answer: Answer, seen: Callable[[int], None]
    ) -> Iterator[bytes]:
        """A blob's bytes from `start`; where one connection breaks the next goes on."""
        tries = Tries(self._web, str(self))
        position, skip = start, 0
        while True:
            try:
                for data in answer.chunks():
                    fresh, skip = data[skip:], max(0, skip - len(data))
                    if fresh:
                        position += len(fresh)
                        tries.progress(len(fresh))
                        seen(position)
                        yield fresh
                problem = TransientError(
                    f"{descriptor.digest} ends after {position} of {descriptor.size} bytes",
                    wrong="Content-Length" in answer.headers,
                )
            except TransientError as caught:
                problem = caught
            finally:
                answer.close()
            if position >= descriptor.size:
                return  # also when the end of the last chunk is missing: the digest says whether all is here
            tries.failed(problem)
            begun, answer = self._blob_at(descriptor, position)
            skip = position - begun


def _missing(reference: str) -> str:
    part = "digest" if ":" in reference else "tag"
    without = "; without a tag, latest is asked for" if reference == "latest" else ""
    return f"check the name and the {part}{without}; a private image may look absent without docker login"


def _with(headers: Mapping[str, str], authorization: str) -> dict[str, str]:
    return dict(headers) | ({"Authorization": authorization} if authorization else {})


def drain(answer: Answer) -> None:
    """Read a short body to its end, so that the connection can be used again."""
    with answer:
        try:
            answer.read(_ERROR_MAX)
        except (TransientError, InputError):
            return


def _error_codes(answer: Answer) -> list[str]:
    try:
        document = oci.parse_json(answer.read(_ERROR_MAX), answer.host)
    except (TransientError, InputError):
        return []
    errors = document.get("errors")
    found = [item.get("code") for item in errors if isinstance(item, dict)] if isinstance(errors, list) else []
    return [code for code in found[:3] if isinstance(code, str) and code in _CODES]


def _is_range(answer: Answer, offset: int, size: int) -> bool:
    found = _CONTENT_RANGE.match(answer.headers.get("Content-Range", ""))
    return bool(answer.status == 206 and offset and found and int(found[1]) == offset and found[2] in ("*", str(size)))


def check_whole(answer: Answer, data: bytes, where: str) -> None:
    """TransientError for a manifest that was cut: a connection without a promised length may end anywhere."""
    if "Content-Length" in answer.headers:
        return
    try:
        oci.parse_json(data, where)
    except InputError as problem:
        raise TransientError(str(problem), wrong=True) from None
