"""The right to one repository: a registry's challenge answered with a token, a password, or nothing but the question.

Sources: docs.docker.com "Registry token authentication" and "OAuth2 token authentication", RFC 7235, RFC 6750.
"""

from __future__ import annotations

import re
import threading
import time
import urllib.parse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import SplitResult

from osbuild import oci
from osbuild.credentials import Credentials, find_credentials, places
from osbuild.errors import HostError, InputError
from osbuild.transport import Answer, Web, parse_url
from osbuild.tree import quote

_HEADER_MAX: Final = 4096  # bytes of challenges that we read
_TOKEN_MAX: Final = 1 << 20  # bytes of a token service's answer
_SECONDS: Final = 60.0  # a token lives when its service does not say (the specification's own words)
_SECONDS_MAX: Final = 3600.0
_PARAMETER: Final = re.compile(r'(?:([A-Za-z][A-Za-z0-9_-]*)[ \t]+)?([A-Za-z_]+)[ \t]*=[ \t]*(?:"([^"]*)"|([^\s,"]+))')
_BARE_BASIC: Final = re.compile(r"(?:\A|,)\s*Basic\s*(?:,|\Z)", re.IGNORECASE)
_TOKEN: Final = re.compile(r"[\x21-\x7e]+\Z")  # what a header can carry


@dataclass(frozen=True, slots=True, kw_only=True)
class Challenge:
    """One way in that a WWW-Authenticate header offers."""

    scheme: str  # lower case
    parameters: Mapping[str, str]


def parse_challenges(lines: Sequence[str]) -> tuple[Challenge, ...]:
    """All that the headers offer, in their order."""
    found: list[tuple[str, dict[str, str]]] = []
    for line in lines:
        text = line[:_HEADER_MAX]
        if _BARE_BASIC.search(text):
            found.append(("basic", {}))
        for scheme, name, quoted, plain in _PARAMETER.findall(text):
            if scheme:
                found.append((scheme.lower(), {}))
            if found:
                found[-1][1][name.lower()] = quoted or plain
    return tuple(Challenge(scheme=scheme, parameters=parameters) for scheme, parameters in found)


class Authorizer:
    """What to say in the Authorization header to do `actions` in one repository; kept for the run, and renewed."""

    def __init__(
        self, web: Web, host: str, repository: str, actions: str, auth_file: Path | None, *, also: str = ""
    ) -> None:
        """`also`: another repository that is read in the same requests, as a mount does it."""
        self.tried = ", asked without a login"  # for messages
        self._web = web
        self._host = host
        self._repository = repository
        self._scopes = [f"repository:{repository}:{actions}", *([f"repository:{also}:pull"] if also else [])]
        self._auth_file = auth_file
        self._lock = threading.Lock()
        self._value = ""
        self._until = 0.0

    def header(self) -> str:
        """What is known to work, or nothing."""
        with self._lock:
            return self._value if time.monotonic() < self._until else ""

    def answer(self, challenges: Sequence[str], refused: str, home: SplitResult) -> str:
        """A new value, after the registry would not have `refused`. HostError when there is no way in."""
        with self._lock:
            if self._value != refused and time.monotonic() < self._until:
                return self._value  # another thread was here while we waited
            offered = {challenge.scheme: challenge for challenge in reversed(parse_challenges(challenges))}
            if not offered.keys() & {"bearer", "basic"}:
                raise HostError(f"{self._host} wants a login of a kind we do not know")
            found = find_credentials(self._host, self._repository, self._auth_file)
            self.tried = _describe(found, self._auth_file)
            if "bearer" in offered:
                token, seconds = self._token(offered["bearer"], found, home)
                self._value, self._until = f"Bearer {token}", time.monotonic() + seconds
            elif found is None or not found.user or found.identity_token:
                raise self.refusal(f"wants a login for {self._repository}")
            elif refused == found.basic():
                raise self.refusal(f"answers 401 for {self._repository}")
            else:
                self._value, self._until = found.basic(), float("inf")
            return self._value

    def refusal(self, what: str) -> HostError:
        """An error that says what was tried, without any of it."""
        return HostError(
            f"{self._host} {what}{self.tried}", hint=f"docker login {self._host}, and check the image's name"
        )

    def _token(self, challenge: Challenge, found: Credentials | None, home: SplitResult) -> tuple[str, float]:
        what = f"the token service of {self._host}"
        realm = parse_url(challenge.parameters.get("realm", ""), what)
        self._web.check_destination(realm, home, what)
        with self._ask(realm, challenge.parameters.get("service", ""), found) as answer:
            answer.check_passing()
            if answer.status in (400, 401, 403):
                raise self.refusal(f"gives no token ({answer.status}) for {self._repository}")
            if answer.status != 200:
                raise InputError(f"{what} answers {answer.status}")
            return _parse_token(answer.read(_TOKEN_MAX), what)

    def _ask(self, realm: SplitResult, service: str, found: Credentials | None) -> Answer:
        wishes = [("service", service)] if service else []
        if found is not None and found.identity_token:
            form = [
                *wishes, ("scope", " ".join(self._scopes)), ("grant_type", "refresh_token"),
                ("client_id", "osbuilder"), ("refresh_token", found.identity_token),
            ]  # fmt: skip
            headers = {"Content-Type": "application/x-www-form-urlencoded"}
            return self._web.send("POST", realm.geturl(), headers, urllib.parse.urlencode(form).encode())
        wishes += [("scope", scope) for scope in self._scopes]
        query = "&".join(part for part in (realm.query, urllib.parse.urlencode(wishes)) if part)
        headers = {"Authorization": found.basic()} if found is not None else {}
        return self._web.send("GET", realm._replace(query=query).geturl(), headers)


def _describe(found: Credentials | None, auth_file: Path | None) -> str:
    if found is None:
        files = " or ".join(quote(str(path)) for path in places(auth_file))
        return f", and no login for it is in {files}" if files else ", and without HOME there is no file to look in"
    kind = "an identity token" if found.identity_token else "a user name and password"
    return f", with {kind} from {found.source}"


def _parse_token(data: bytes, what: str) -> tuple[str, float]:
    document = oci.parse_json(data, what)
    token = document.get("token") or document.get("access_token")
    if not isinstance(token, str) or not _TOKEN.match(token):
        raise InputError(f"{what} answers without a token")
    seconds = document.get("expires_in")
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not seconds > 0:
        seconds = _SECONDS
    return token, min(float(seconds), _SECONDS_MAX)
