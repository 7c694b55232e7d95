"""`docker-daemon:NAME`: an image of the local Docker daemon, as `docker save` streams it, through Docker's own SDK."""

from __future__ import annotations

import os
import urllib.parse
from typing import TYPE_CHECKING, Final

from osbuild import oci
from osbuild.errors import HostError, InputError
from osbuild.sources.archive import read_archive
from osbuild.sources.image import SourceImage, Want
from osbuild.tree import Spool, quote

_SCHEMES: Final = frozenset(("unix", "http+unix", "tcp", "http", "https"))  # ssh:// would need another package

if TYPE_CHECKING:
    import docker
    import requests

CHUNK: Final = 2 << 20
SECONDS: Final = 600  # without a byte; the SDK's own 60 s is too short for a daemon that packs a large image first
_ERROR_MAX: Final = 1000  # bytes of a refusal that are shown


def open_image(reference: oci.Reference, want: Want) -> SourceImage:
    """Ask the daemon for the image; HostError when there is no daemon, InputError when it has no such image."""
    import requests.exceptions

    name = reference.name + (f"@{reference.digest}" if reference.digest else f":{reference.tag}")
    spool = Spool()
    client = connect(offline=want.registry.offline)
    api = client.api
    try:
        # Not api.get_image(): that turns timeouts off, and waits for ever for a daemon that falls silent.
        address = f"{api.base_url}/v{api.api_version}/images/{urllib.parse.quote(name, safe='/:')}/get"
        with api.get(address, stream=True, timeout=SECONDS) as answer:
            _check_status(answer, name)
            for chunk in answer.iter_content(CHUNK):
                spool.append(chunk)
    except requests.exceptions.RequestException as problem:
        raise HostError(f"the Docker daemon could not give {quote(name)}: {_first_line(problem)}") from None
    finally:
        client.close()
    return read_archive(spool, str(reference), want)


def _check_status(answer: requests.Response, name: str) -> None:
    if answer.status_code == 404:
        raise InputError(
            f"the Docker daemon has no image {quote(name)}", hint=f"docker pull {name}, or use docker://{name}"
        )
    if answer.status_code != 200:
        said = answer.raw.read(_ERROR_MAX, decode_content=True).decode(errors="replace").strip()
        raise HostError(f"the Docker daemon could not give {quote(name)}: {answer.status_code} {quote(said)}")


def connect(seconds: int = 10, *, offline: bool = False) -> docker.DockerClient:
    """A client of the daemon that DOCKER_HOST names, or the local one; HostError when none answers.

    offline: only one at a socket of this machine is asked.
    """
    import docker
    import docker.errors
    import docker.utils
    import requests.exceptions

    host = os.environ.get("DOCKER_HOST", "")
    _check_host(host)
    if offline and host and not str(docker.utils.parse_host(host)).startswith(("unix:", "http+unix:")):
        raise HostError(
            f"DOCKER_HOST is {quote(host)}, and --offline asks nobody over a network", hint="unix://PATH is no network"
        )
    try:
        return docker.from_env(timeout=seconds)
    except (docker.errors.DockerException, requests.exceptions.RequestException):
        where = os.environ.get("DOCKER_HOST") or "unix:///var/run/docker.sock"
        raise HostError(
            f"no Docker daemon answers at {quote(where)}",
            hint="start it, join the group docker, or give the image as oci:DIR or docker-archive:FILE",
        ) from None


def _check_host(text: str) -> None:
    import docker.errors
    import docker.utils

    try:
        scheme = str(docker.utils.parse_host(text)).partition("://")[0] if text else "unix"
    except (docker.errors.DockerException, ValueError):
        scheme = ""
    if scheme not in _SCHEMES:
        raise HostError(
            f"DOCKER_HOST is {quote(text)}, neither unix://PATH nor tcp://HOST:PORT",
            hint="without it, unix:///var/run/docker.sock is asked",
        )


def _first_line(problem: BaseException) -> str:
    return (str(problem).splitlines() or [type(problem).__name__])[0]
