"""Credentials for registries, where Docker, podman and skopeo keep them: config.json, auth.json, credential helpers.

Sources: Docker's config.json (docs.docker.com, `docker login`), containers-auth.json(5), and the credential helper
protocol (docker/docker-credential-helpers): `docker-credential-NAME get`, the server on its input, JSON on its output.
"""

from __future__ import annotations

import base64
import binascii
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from osbuild import command, oci
from osbuild.errors import CommandError, HostError, InputError
from osbuild.tree import quote

_HUB_SERVER: Final = "https://index.docker.io/v1/"  # what Docker calls its own registry, in files and to helpers
_TOKEN_USER: Final = "<token>"  # noqa: S105 - a helper's user name when the secret is an identity token
_NOT_FOUND: Final = "credentials not found"  # docker-credential-helpers' words; they differ in the rest of the line
_HELPER_SECONDS: Final = 60.0  # some ask the user for a passphrase
_HELPER: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\Z")


@dataclass(frozen=True, slots=True, kw_only=True)
class Credentials:
    """What to show a registry. The secrets are kept out of repr(), and so out of every message and traceback."""

    source: str  # where they were found, for messages
    user: str = ""
    password: str = field(default="", repr=False)
    identity_token: str = field(default="", repr=False)  # an OAuth2 refresh token, instead of the other two

    def basic(self) -> str:
        """The value of an Authorization header (RFC 7617)."""
        return "Basic " + base64.b64encode(f"{self.user}:{self.password}".encode()).decode()


def find_credentials(host: str, repository: str, auth_file: Path | None = None) -> Credentials | None:
    """What the user has for a repository: the first file that knows it. HostError for a file or helper that fails."""
    for path in places(auth_file):
        document = _read(path, required=path == auth_file)
        found = _from_helper(document, host, path) or _from_auths(document, host, repository, str(path))
        if found is not None:
            return found
    return None


def places(auth_file: Path | None = None) -> Iterator[Path]:
    """The files in which credentials are looked for, in that order, whether they exist or not."""
    named = os.environ.get("REGISTRY_AUTH_FILE")
    if auth_file is not None or named:  # who names one file means that one
        yield auth_file or Path(named or "")
        return
    home = os.environ.get("HOME")
    docker = os.environ.get("DOCKER_CONFIG") or (f"{home}/.docker" if home else "")
    if docker:
        yield Path(docker) / "config.json"
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if runtime:
        yield Path(runtime) / "containers/auth.json"


def _read(path: Path, *, required: bool) -> oci.Json:
    try:
        with path.open("rb") as file:
            return oci.parse_json(file.read(oci.JSON_MAX + 1), quote(str(path)))
    except (FileNotFoundError, NotADirectoryError):
        if not required:
            return {}
        raise HostError(
            f"there is no file {quote(str(path))} with credentials",
            hint="docker login and skopeo login --authfile write one",
        ) from None
    except OSError as problem:
        raise HostError(
            f"cannot read the credentials in {quote(str(path))}: {problem.strerror}",
            hint="give its reader the right to, or name another with --authfile",
        ) from None
    except InputError as problem:
        raise HostError(str(problem), hint="docker login writes it anew") from None


def _from_auths(document: oci.Json, host: str, repository: str, path: str) -> Credentials | None:
    """The entry for the longest part of HOST/REPOSITORY that has one."""
    entries = _table(document, "auths")
    parts = repository.split("/")
    names = [f"{host}/{'/'.join(parts[:count])}" for count in range(len(parts), 0, -1)]
    for name in (*names, host):
        for key, entry in entries.items():
            if _name_of(key) == name and isinstance(entry, dict):
                found = _parse_entry(entry, f"{path}, entry {quote(key)}")
                if found is not None:
                    return found
    return None


def _name_of(key: str) -> str:
    """The registry, or registry and path, that a key means; Docker writes some as addresses."""
    text, scheme = re.subn(r"\Ahttps?://", "", key)
    text = text.partition("/")[0] if scheme else re.sub(r"/v[12]/?\Z", "", text).rstrip("/")
    host, slash, path = text.partition("/")
    return (oci.DOCKER_HUB if host in oci.HUB_NAMES else host) + slash + path


def _parse_entry(entry: Mapping[str, Any], source: str) -> Credentials | None:
    user, password = entry.get("username"), entry.get("password")
    token, packed = entry.get("identitytoken"), entry.get("auth")
    if isinstance(packed, str) and packed:
        try:
            user, _, password = base64.b64decode(packed, validate=True).decode().rstrip("\0").partition(":")
        except (binascii.Error, UnicodeDecodeError):
            raise HostError(
                f"{source}: auth is not base64 of USER:PASSWORD", hint="docker login writes it anew"
            ) from None
    if isinstance(token, str) and token:
        return Credentials(source=source, user=str(user or ""), identity_token=token)
    if isinstance(user, str) and isinstance(password, str) and user:
        return Credentials(source=source, user=user, password=password)
    return None  # `docker login` leaves {} behind when a helper holds the secret


def _from_helper(document: oci.Json, host: str, path: Path) -> Credentials | None:
    named = [name for key, name in _table(document, "credHelpers").items() if _name_of(key) == host]
    name = named[0] if named else document.get("credsStore")
    if not isinstance(name, str) or not name:
        return None
    wish = f"{quote(str(path))} asks for it as {'credHelpers' if named else 'credsStore'}"
    return _ask(name, _HUB_SERVER if host == oci.DOCKER_HUB else host, wish)


def _ask(name: str, server: str, wish: str) -> Credentials | None:
    """What a helper knows; `wish` says who wants that it is asked."""
    program = f"docker-credential-{name}"
    if not _HELPER.match(name):
        raise HostError(f"{quote(program)} cannot be the name of a credential helper, but {wish}")
    try:
        # A helper is the user's own and lives on his variables: AWS_PROFILE, DBUS_SESSION_BUS_ADDRESS, GNUPGHOME ...
        answer = command.run(
            program, "get", env=dict(os.environ), stdin=server.encode(), merge=False, seconds=_HELPER_SECONDS
        ).output
        document = oci.parse_json(answer.encode(), program)
    except CommandError as problem:
        if _NOT_FOUND in problem.tail.lower():
            return None
        raise HostError(
            f"{problem}; {wish}",
            hint=f"try it: echo {server} | {program} get",  # never what it printed
        ) from None
    except HostError as problem:
        raise HostError(f"{problem}; {wish}", hint="install it, or take it out of that file") from None
    except InputError:
        raise HostError(f"{program} does not answer in JSON; {wish}") from None
    user, secret = document.get("Username"), document.get("Secret")
    if not isinstance(user, str) or not isinstance(secret, str) or not secret:
        raise HostError(f"{program} answers without a user name and a secret; {wish}")
    if user == _TOKEN_USER:
        return Credentials(source=program, identity_token=secret)
    return Credentials(source=program, user=user, password=secret)


def _table(document: oci.Json, name: str) -> Mapping[str, Any]:
    value = document.get(name)
    return value if isinstance(value, dict) else {}
