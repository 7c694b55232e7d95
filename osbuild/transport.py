"""HTTP as registries need it: bounded in time, https unless the user allows less, bodies as the raw bytes that came.

urllib3 moves the bytes; redirects, retries, speed and the total deadline are ours, because only we know which of them
may be repeated, and what must not be told to another host.
"""

from __future__ import annotations

import contextlib
import datetime
import email.utils
import ipaddress
import os
import re
import socket
import ssl
import threading
import time
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import SplitResult, unquote, urljoin, urlsplit

import urllib3
import urllib3.exceptions as trouble

import osbuild
from osbuild.errors import HostError, InputError
from osbuild.registry_spec import RegistrySpec
from osbuild.tree import quote

DOCKER_CERTIFICATES: Final = Path("/etc/docker/certs.d")  # HOST[:PORT]/*.crt: authorities for one registry
REDIRECTS_MAX: Final = 5
_REDIRECTS: Final = frozenset((301, 302, 303, 307, 308))
_PASSING: Final = frozenset((429, 500, 502, 503, 504))  # answers that another try may better
_CHUNK: Final = 256 << 10
_PROGRESS: Final = 1 << 20  # bytes after which a failure is the first again
_TRIES_UNMET: Final = 2  # of a host that nobody has met: waiting makes no name known, and starts no server here
_HOST: Final = re.compile(r"[A-Za-z0-9._-]+(?::[0-9]*)?|\[[0-9A-Fa-f:.%A-Za-z0-9_-]+\](?::[0-9]*)?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How much to bear with before giving up."""

    tries: int = 5  # in a row, without progress
    first: float = 0.5  # seconds before the second try; they double
    longest: float = 20.0  # ... up to this
    asked: float = 120.0  # seconds of Retry-After that we are ready to wait
    silence: float = 30.0  # seconds without a byte
    speed: int = 1024  # bytes in a second, at least
    window: float = 30.0  # seconds over which that is measured


class TransientError(Exception):
    """A failure that may pass; whoever counts the tries catches it."""

    def __init__(
        self, reason: str, *, wait: float = 0.0, wrong: bool = False, unmet: bool = False, hint: str = ""
    ) -> None:
        super().__init__(reason)
        self.wait = wait  # seconds that the other side asks for
        self.wrong = wrong  # an answer, but not what it should be: the input's fault when it does not pass
        self.unmet = unmet  # there may be no such host at all
        self.hint = hint  # what to do when it does not pass


class Web:
    """One run's connections: every socket is opened here, and all of them end with `stop`."""

    def __init__(self, spec: RegistrySpec, patience: Patience, *, else_: str = "") -> None:
        """else_: what else can be done, for hints, where nobody answers."""
        self.patience = patience
        self._else = else_
        self._spec = spec
        self._end = time.monotonic() + spec.seconds
        self._stopped = threading.Event()
        self._lock = threading.Lock()
        self._pools: dict[str, urllib3.PoolManager] = {}
        self._open: set[urllib3.BaseHTTPResponse] = set()
        self._met: set[str] = set()  # HOST[:PORT]s that have answered

    def left(self) -> float:
        """Seconds until the deadline; HostError when there are none."""
        left = self._end - time.monotonic()
        if left <= 0 or self._stopped.is_set():
            raise HostError(f"the registry took more than {self._spec.seconds:g} s")
        return left

    def pause(self, seconds: float) -> None:
        """Wait, if that leaves time for anything."""
        if seconds >= self.left():
            raise HostError(f"the registry took more than {self._spec.seconds:g} s")
        self._stopped.wait(seconds)

    def stop(self) -> None:
        """End what other threads are reading."""
        self._stopped.set()
        with self._lock:
            responses = tuple(self._open)
        for response in responses:
            with contextlib.suppress(OSError, ValueError, RuntimeError, TypeError):  # it may be ending just now
                response.shutdown()

    def close(self) -> None:
        """Close the connections that were kept for another request."""
        with self._lock:
            pools = tuple(self._pools.values())
        for pool in pools:
            pool.clear()

    def may_be_plain(self, netloc: str) -> bool:
        """Whether plain HTTP is good enough for that host: this machine's own, or one that the user named."""
        return is_loopback(_hostname(netloc)) or netloc.lower() in map(str.lower, self._spec.insecure)

    def send(self, method: str, url: str, headers: Mapping[str, str], body: bytes | None = None) -> Answer:
        """One request and the redirects it meets. TransientError if that may go better another time."""
        here = home = parse_url(url, "the registry's address")
        kept = {"User-Agent": f"osbuilder/{osbuild.__version__}", "Accept-Encoding": "identity"} | dict(headers)
        for _ in range(REDIRECTS_MAX + 1):
            response = self._exchange(method, here, kept, body)
            location = response.headers.get("Location")
            if response.status not in _REDIRECTS or not location or method not in ("GET", "HEAD"):
                return Answer(self, response, here, at_home=origin(here) == origin(home))
            self._forget(response)
            there = self._follow(here, location, home)
            if origin(there) != origin(home):
                kept = {name: value for name, value in kept.items() if name != "Authorization"}
            here = there
        raise InputError(f"{home.netloc} redirects more than {REDIRECTS_MAX} times")

    def check_destination(self, there: SplitResult, home: SplitResult, what: str) -> None:
        """Refuse an address, given by a registry, that only this machine's neighbours should be asked for."""
        if there.scheme == "http" and not self.may_be_plain(there.netloc):
            raise InputError(f"{what} is at {there.netloc} over plain HTTP", hint="https, or name it as insecure")
        host = there.hostname or ""
        if host == home.hostname:
            return
        for address in _addresses(host, resolve=not _proxy_for(there)):
            inside = address.is_loopback and not is_loopback(home.hostname or "")
            if inside or address.is_link_local or address.is_unspecified or address.is_multicast:
                raise InputError(f"{home.netloc} sends us to {quote(host)}, an address that is no business of its own")

    def _follow(self, here: SplitResult, location: str, home: SplitResult) -> SplitResult:
        there = resolve(here, location, f"where {here.netloc} redirects to")
        if here.scheme == "https" and there.scheme == "http":
            raise InputError(f"{here.netloc} redirects from https to plain HTTP at {there.netloc}")
        self.check_destination(there, home, f"where {here.netloc} redirects to")
        return there

    def _exchange(
        self, method: str, url: SplitResult, headers: Mapping[str, str], body: bytes | None
    ) -> urllib3.BaseHTTPResponse:
        seconds = min(self.patience.silence, self.left())
        try:
            response = self._pool(url).request(
                method, url._replace(fragment="").geturl(), headers=dict(headers), body=body, redirect=False,
                retries=False, preload_content=False, decode_content=False, timeout=urllib3.Timeout(seconds),
            )  # fmt: skip
        except trouble.HTTPError as problem:
            raise _explained(problem, url.netloc, met=url.netloc in self._met, else_=self._else) from None
        with self._lock:
            self._open.add(response)
            self._met.add(url.netloc)
        return response

    def _forget(self, response: urllib3.BaseHTTPResponse) -> None:
        with self._lock:
            self._open.discard(response)
        response.close()

    def _pool(self, url: SplitResult) -> urllib3.PoolManager:
        key = f"{url.scheme}://{url.netloc}"  # each host may have authorities of its own
        with self._lock:
            if key not in self._pools:
                self._pools[key] = _make_pool(url)
            return self._pools[key]


class Answer:
    """A response whose body is still to be read; it has to be closed."""

    def __init__(self, web: Web, response: urllib3.BaseHTTPResponse, url: SplitResult, *, at_home: bool) -> None:
        self.status = response.status
        self.headers = response.headers
        self.host = url.netloc
        self.at_home = at_home  # the host that was asked answers, not one that it redirected to
        self._web = web
        self._response = response

    def chunks(self) -> Iterator[bytes]:
        """The body as it came, whatever its Content-Encoding. TransientError when it is cut, silent or slow."""
        patience = self._web.patience
        waited, seen = 0.0, 0  # only time spent here counts: who takes the data may be slow himself
        while True:
            self._web.left()
            began = time.monotonic()
            try:
                data = self._response.read1(_CHUNK, decode_content=False)
            except trouble.HTTPError as problem:
                raise _explained(problem, self.host) from None
            if not data:
                return
            waited += time.monotonic() - began
            seen += len(data)
            if waited >= patience.window:
                if seen < patience.speed * waited:
                    raise TransientError(f"{self.host} sends less than {patience.speed} bytes a second")
                waited, seen = 0.0, 0
            yield data

    def read(self, limit: int) -> bytes:
        """The whole body; InputError when that is more than `limit` bytes."""
        kept = bytearray()
        for data in self.chunks():
            kept += data
            if len(kept) > limit:
                raise InputError(f"{self.host} answers with more than {limit} bytes")
        return bytes(kept)

    def check_passing(self) -> None:
        """TransientError when the status is one that may pass."""
        if self.status in _PASSING:
            raise TransientError(f"{self.host} answers {self.status}", wait=_retry_after(self.headers))

    def close(self) -> None:
        self._web._forget(self._response)

    def __enter__(self) -> Answer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Tries:
    """How often something failed in a row, and when that is enough."""

    def __init__(self, web: Web, what: str) -> None:
        self._web = web
        self._what = what
        self._failures = 0
        self._unmet = True  # all of the failures were such
        self._moved = 0
        self._since = time.monotonic()

    def progress(self, size: int) -> None:
        """So many bytes came: a failure after enough of them is the first again."""
        self._moved += size
        if self._moved >= _PROGRESS:
            self._failures = self._moved = 0
            self._since = time.monotonic()

    def failed(self, problem: TransientError) -> None:
        """Wait before the next try; HostError or InputError when there is none."""
        patience = self._web.patience
        self._failures += 1
        self._unmet = self._unmet and problem.unmet
        if self._failures >= min(patience.tries, _TRIES_UNMET if self._unmet else patience.tries):
            kind = InputError if problem.wrong else HostError
            seconds = time.monotonic() - self._since
            tries = f"({self._failures} tries in {seconds:.1f} s)"
            raise kind(f"{self._about(problem)} {tries}", hint=problem.hint) from None
        if problem.wait > patience.asked:
            raise HostError(f"{self._about(problem)} and asks to wait {problem.wait:.0f} s") from None
        backoff = min(patience.first * 2 ** (self._failures - 1), patience.longest)
        self._web.pause(max(backoff, problem.wait))

    def _about(self, problem: TransientError) -> str:
        said = str(problem)
        return said if said.startswith(self._what.partition("/")[0]) else f"{self._what}: {said}"


def parse_url(text: str, what: str) -> SplitResult:
    """An http(s) address with a host and no credentials in it; a refusal shows no more of it than that."""
    try:
        parts = urlsplit(text)
        _ = parts.port  # raises when it is none
    except ValueError:
        raise InputError(f"{what} is no address") from None
    if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc:
        place = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"
        raise InputError(f"{what} is {quote(place[:200])}: not http(s)://HOST")
    if not _HOST.fullmatch(parts.netloc):  # from here on it is looked up, and shown to people
        raise InputError(f"{what} is at {quote(parts.netloc[:200])}, and no host can be called that")
    return parts


def resolve(here: SplitResult, location: str, what: str) -> SplitResult:
    """The same for what a registry gives, which may be an address relative to where it was asked."""
    try:
        whole = urljoin(here.geturl(), location)
    except ValueError:  # it takes addresses apart, too
        raise InputError(f"{what} is no address") from None
    return parse_url(whole, what)


def origin(url: SplitResult) -> tuple[str, str, int]:
    """What must be the same for one host to be told another's secrets (RFC 6454)."""
    return url.scheme, url.hostname or "", url.port or (443 if url.scheme == "https" else 80)


def is_loopback(host: str) -> bool:
    """Whether that is this machine, as the user writes it."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _hostname(netloc: str) -> str:
    return urlsplit(f"//{netloc}").hostname or ""


def _addresses(host: str, *, resolve: bool) -> Iterator[ipaddress.IPv4Address | ipaddress.IPv6Address]:
    """What the name stands for: the resolver also knows 0xA9FEA9FE and 2852039166."""
    names = [host]
    if resolve:
        with contextlib.suppress(OSError, UnicodeError):  # connecting will say so
            names = [str(found[4][0]) for found in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)]
    for name in names:
        with contextlib.suppress(ValueError):
            address = ipaddress.ip_address(name.partition("%")[0])
            yield getattr(address, "ipv4_mapped", None) or address


def _proxy_for(url: SplitResult) -> str:
    host = url.hostname or ""
    if is_loopback(host) or urllib.request.proxy_bypass(url.netloc):
        return ""
    return urllib.request.getproxies().get(url.scheme, "")


def _make_pool(url: SplitResult) -> urllib3.PoolManager:
    trust = _trusted(url.netloc)
    proxy = _proxy_for(url)
    if not proxy:
        return urllib3.PoolManager(maxsize=4, ssl_context=trust)
    parts = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise HostError(
            f"the proxy for {url.scheme} is of a kind we cannot use", hint=f"{url.scheme}_proxy=http://HOST:PORT"
        )
    user = f"{unquote(parts.username or '')}:{unquote(parts.password or '')}"
    return urllib3.ProxyManager(
        f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}", maxsize=4, ssl_context=trust, proxy_ssl_context=trust,
        proxy_headers=urllib3.make_headers(proxy_basic_auth=user) if parts.username else None,
    )  # fmt: skip


def _trusted(netloc: str) -> ssl.SSLContext:
    """The machine's authorities, and Docker's for that one registry; OpenSSL itself reads SSL_CERT_FILE."""
    bundle = "" if "SSL_CERT_FILE" in os.environ else os.environ.get("REQUESTS_CA_BUNDLE", "")
    try:
        if bundle and Path(bundle).is_dir():
            context = ssl.create_default_context(capath=bundle)
        else:
            context = ssl.create_default_context(cafile=bundle or None)
        for path in sorted((DOCKER_CERTIFICATES / netloc).glob("*.crt")):
            context.load_verify_locations(path)
    except OSError as problem:  # ssl.SSLError is one
        raise HostError(f"cannot load the certificates for {netloc}: {problem.strerror or problem}") from None
    return context


def _explained(
    problem: trouble.HTTPError, host: str, *, met: bool = True, else_: str = ""
) -> TransientError | HostError:  # fmt: skip
    """What happened, without any of the address: what stands behind a `?` may be a secret.

    `met`: the host has answered before. `else_`: what can be done else.
    """
    cause = problem.__cause__
    if isinstance(problem, trouble.SSLError) and isinstance(problem.args[0], ssl.SSLCertVerificationError):
        return HostError(
            f"{host}: its certificate is not trusted: {problem.args[0].verify_message}",
            hint=f"SSL_CERT_FILE=FILE, or the authority as {DOCKER_CERTIFICATES / host}/ca.crt",
        )
    if isinstance(problem, trouble.NameResolutionError):
        unknown = isinstance(cause, socket.gaierror) and cause.errno in (socket.EAI_NONAME, socket.EAI_NODATA)
        hint = f"is it spelled right, and is there a network? {else_}".rstrip()
        return TransientError(f"{host}: {_reason(problem)}", unmet=unknown and not met, hint=hint)
    if isinstance(problem, trouble.NewConnectionError) and isinstance(cause, ConnectionRefusedError):
        here = is_loopback(_hostname(host))
        return TransientError(
            f"{host} refuses connections", unmet=here and not met, hint=f"is it running? {else_}".rstrip()
        )
    hint = f"is there a network? {else_}".rstrip() if isinstance(problem, trouble.NewConnectionError) else ""
    return TransientError(f"{host}: {_reason(problem)}", hint=hint)


def _reason(problem: BaseException) -> str:
    if isinstance(problem, trouble.ProxyError):
        return f"the proxy: {_reason(problem.original_error)}"
    if isinstance(problem, trouble.NameResolutionError):
        return "its name is not known"
    if isinstance(problem, trouble.TimeoutError) and not isinstance(problem, trouble.NewConnectionError):
        return "no answer in time"
    inner = [*problem.args, problem.__cause__]
    for cause in inner:
        if isinstance(cause, ssl.SSLError):
            return f"TLS: {cause.reason or 'failed'}"
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
    return "the connection was cut"


def _retry_after(headers: Mapping[str, str]) -> float:
    """Seconds, or a date (RFC 9110, 10.2.3); 0 when there is none or it is neither."""
    text = headers.get("Retry-After", "").strip()
    if re.fullmatch(r"[0-9]{1,9}", text):
        return float(text)
    try:
        then = email.utils.parsedate_to_datetime(text)
        return max(0.0, (then - datetime.datetime.now(datetime.UTC)).total_seconds())
    except (ValueError, TypeError, IndexError, OverflowError):
        return 0.0
