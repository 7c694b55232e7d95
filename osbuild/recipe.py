"""Recipes: a distribution's packages become an image that a guest's tree can start from, by `docker build`.

`render` decides: a Dockerfile from templates/Dockerfile.NAME.j2 and the lists in templates/packages.toml. `build` acts:
Docker's own SDK sends the daemon a context that holds the Dockerfile and nothing else of this machine.
"""

from __future__ import annotations

import hashlib
import http.client
import io
import os
import re
import tarfile
import tomllib
import urllib.parse
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from osbuild import oci
from osbuild.console import Show, Step
from osbuild.errors import CommandError, HostError, SpecError
from osbuild.resources import render as render_template
from osbuild.resources import resource
from osbuild.sources.daemon import SECONDS, connect
from osbuild.tree import quote

if TYPE_CHECKING:
    import docker

REPOSITORY: Final = "osbuilder-recipe"  # of the images that we make
_TAIL_LINES: Final = 30  # of a build's output that go into an error
_LINE_MAX: Final = 500  # characters of one of them

# No pattern lets a space, a quote, a dollar or a line's end through: what matches is one word of one RUN line.
# A name's last character is no "-": apt reads `NAME-` as "remove NAME".
_PACKAGE: Final = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9+._-]*[A-Za-z0-9+])?(?:=[A-Za-z0-9][A-Za-z0-9+.:~_-]*)?\Z")
_RELEASE: Final = re.compile(r"[a-z0-9][a-z0-9.]*\Z")
_MIRROR: Final = re.compile(r"https?://[A-Za-z0-9][A-Za-z0-9.-]*(?::[0-9]+)?(?:/[A-Za-z0-9._~+-]+)*\Z")

_STEP: Final = re.compile(r"Step (\d+)/(\d+) : ")
_BUILT: Final = re.compile(r"Successfully built [0-9a-f]+")
_NOISE: Final = re.compile(r"--->|Removing intermediate container ")
_ESCAPES: Final = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_UNREACHABLE: Final = re.compile(
    r"Temporary failure resolving|Could not resolve|Could not connect|temporary error|Unable to connect"
    r"|Network (?:is )?unreachable"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """A distribution, as templates/packages.toml describes it."""

    name: str
    base: str  # {release} is filled in
    release: str
    packages: Mapping[str, tuple[str, ...]]  # guest: for every one; systemd: on top with --init systemd
    untested: str  # why nobody has built it; empty when somebody has

    @property
    def inits(self) -> tuple[str, ...]:
        """What can be the first process of a guest made by this recipe."""
        return ("agent", "systemd") if "systemd" in self.packages else ("agent",)


@dataclass(frozen=True, slots=True, kw_only=True)
class Dockerfile:
    """A recipe filled in: all that the image depends on, besides the base and the archive's packages of that day."""

    recipe: Recipe
    text: str
    base: str
    packages: tuple[str, ...]
    mirror: str
    image: str  # what the image will be called: the same for the same text


def _load() -> Mapping[str, Recipe]:
    table = tomllib.loads(resource("templates/packages.toml").read_text(encoding="utf-8"))
    return {
        name: Recipe(
            name=name,
            base=row["base"],
            release=row["release"],
            packages={kind: tuple(packages) for kind, packages in row["packages"].items()},
            untested=row.get("untested", ""),
        )
        for name, row in table.items()
    }


RECIPES: Final[Mapping[str, Recipe]] = _load()


def render(
    name: str, *, init: str = "agent", base: str = "", packages: Sequence[str] = (), release: str = "", mirror: str = ""
) -> Dockerfile:
    """The Dockerfile of a recipe, decided without touching Docker.

    `base` takes the place of the recipe's own image, `packages` come on top of its own, `release` chooses another
    tag of its own image, and `mirror` is the archive that packages come from, instead of those that the base names.
    """
    recipe = _recipe(name, init)
    if base and release:
        raise SpecError(f"the base {quote(base)} has its own release, so {quote(release)} has no meaning")
    mirror = mirror.rstrip("/")
    if release:
        _check(_RELEASE, release, "release", "bookworm or 24.04")
    if mirror:
        _check(_MIRROR, mirror, "archive", "http://HOST/PATH, without a user or a password")
    for package in packages:
        _check(_PACKAGE, package, "package", "NAME or NAME=VERSION")
    release = release or ("" if base else recipe.release)
    image = _base(base or recipe.base.format(release=release))
    wanted = {*recipe.packages["guest"], *(recipe.packages["systemd"] if init == "systemd" else ()), *packages}
    chosen = tuple(sorted(wanted))
    text = render_template(f"Dockerfile.{name}.j2", recipe=name, init=init, base=image, packages=chosen, mirror=mirror)
    tag = "-".join(part for part in (release, init, hashlib.sha256(text.encode()).hexdigest()[:12]) if part)
    return Dockerfile(
        recipe=recipe, text=text, base=image, packages=chosen, mirror=mirror, image=f"{REPOSITORY}/{name}:{tag}"
    )


def build(dockerfile: Dockerfile, *, show: Show, fresh: bool = False) -> str:
    """Build the image; what `open_image` takes. Docker's cache answers what it was asked before, unless `fresh`."""
    name = dockerfile.recipe.name
    with show.step(f"building the recipe {name}", name="recipe") as step:
        client = connect(SECONDS)
        try:
            _follow(_messages(client, dockerfile, fresh=fresh), dockerfile, step)
        finally:
            client.close()
        untested = dockerfile.recipe.untested
        step.note = dockerfile.image + (f"; this recipe is untested: {untested}" if untested else "")
    return f"docker-daemon:{dockerfile.image}"


def _recipe(name: str, init: str) -> Recipe:
    recipe = RECIPES.get(name)
    if recipe is None:
        raise SpecError(f"no recipe {quote(name)}", hint=f"one of {', '.join(RECIPES)}")
    if init not in recipe.inits:
        raise SpecError(f"{name} has no init {quote(init)}", hint=f"--init {' or '.join(recipe.inits)}")
    return recipe


def _check(rule: re.Pattern[str], value: str, what: str, hint: str) -> None:
    if not rule.match(value):
        raise SpecError(f"no {what} is called {quote(value)}", hint=hint)


def _base(text: str) -> str:
    """What FROM takes; the daemon's image names are all that it may be."""
    reference = oci.parse_reference(text, frozenset(("docker-daemon",)))
    tag = f":{reference.tag}" if reference.tag else ""
    return reference.name + tag + (f"@{reference.digest}" if reference.digest else "")


def _messages(client: docker.DockerClient, dockerfile: Dockerfile, *, fresh: bool) -> Iterator[Any]:
    """What the daemon says while it builds; Any, because it is JSON from outside."""
    import docker.errors
    import requests.exceptions
    import urllib3.exceptions

    proxies = _proxies()
    servers = (proxies.get("http_proxy", ""), proxies.get("https_proxy", ""), dockerfile.mirror)
    try:
        yield from client.api.build(
            fileobj=_context(dockerfile.text),
            custom_context=True,
            tag=dockerfile.image,
            rm=True,
            forcerm=True,
            nocache=fresh,
            # Docker knows these names: they are no part of the image, nor of what its cache compares.
            buildargs=proxies,
            network_mode=_network(client, servers),
            decode=True,
        )
    except (docker.errors.DockerException, requests.exceptions.RequestException) as problem:
        raise HostError(f"the Docker daemon cannot build: {_plain(str(problem))}") from None
    except (
        docker.errors.StreamParseError,
        urllib3.exceptions.HTTPError,
        http.client.HTTPException,
        OSError,
    ) as problem:
        raise HostError(f"the Docker daemon broke off: {_plain(str(problem))}") from None


def _context(text: str) -> io.BytesIO:
    data = text.encode()
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        member = tarfile.TarInfo("Dockerfile")
        member.size = len(data)
        archive.addfile(member, io.BytesIO(data))
    out.seek(0)
    return out


def _proxies() -> dict[str, str]:
    """The caller's proxies, in the spelling that apt, apk and dnf read."""
    found = {name: os.environ.get(name) or os.environ.get(name.upper()) for name in ("http_proxy", "https_proxy")}
    found["no_proxy"] = os.environ.get("no_proxy") or os.environ.get("NO_PROXY")
    return {name: value for name, value in found.items() if value}


def _network(client: docker.DockerClient, servers: Iterable[str]) -> str:
    """The host's network where the daemon has no other, and where a server that is asked is this machine itself."""
    if any(map(_is_loopback, servers)):
        return "host"
    return "bridge" if client.api.networks(names=["bridge"]) else "host"


def _is_loopback(server: str) -> bool:
    try:
        host = urllib.parse.urlsplit(server if "://" in server else f"//{server}").hostname or ""
    except ValueError:  # brackets that do not match: not ours to judge
        return False
    return host in ("localhost", "::1") or host.startswith("127.")


class _Output:
    """What a build has said: whole lines, the last of them kept, and how far it is."""

    def __init__(self, step: Step) -> None:
        self.lines: deque[str] = deque(maxlen=_TAIL_LINES)
        self.instruction = 0
        self.built = False
        self._step = step
        self._open = ""  # a line whose end has not come: what a program writes to standard error comes in pieces

    def add(self, message: Mapping[str, Any]) -> None:
        """Take one message of the daemon."""
        self.built = self.built or "ID" in (message.get("aux") or ())
        text = f"{message['status']}\n" if "status" in message else str(message.get("stream") or "")
        *whole, self._open = (self._open + text).split("\n")
        for line in map(_plain, whole):
            if line and not _NOISE.match(line):
                self._line(line)

    def _line(self, line: str) -> None:
        self.lines.append(line)
        self._step.note = line
        self.built = self.built or _BUILT.match(line) is not None
        if found := _STEP.match(line):
            self.instruction = int(found[1])
            self._step.advance(self.instruction, int(found[2]))


def _follow(messages: Iterable[Any], dockerfile: Dockerfile, step: Step) -> None:
    """Read a build to its end; CommandError with the last lines when that is not an image."""
    output = _Output(step)
    for message in messages:
        if not isinstance(message, dict):
            raise HostError(f"the Docker daemon said {quote(str(message)[:100])}, and that is no progress of a build")
        if "error" in message or "message" in message:
            raise _failed(message, dockerfile, output)
        output.add(message)
    if not output.built:
        raise CommandError("the Docker daemon ended without an image", tail="\n".join(output.lines))


def _failed(message: Mapping[str, Any], dockerfile: Dockerfile, output: _Output) -> CommandError:
    text = _plain(str(message.get("error") or message.get("message")))
    tail = "\n".join(output.lines)
    if output.instruction < 2:
        hint = "give an image that Docker has, or can pull, with --base"
        return CommandError(f"cannot have the base {dockerfile.base}: {text}", tail=tail, hint=hint)
    detail = message.get("errorDetail")
    code = detail.get("code") if isinstance(detail, dict) else None
    said = f"installing packages ended with {code}" if isinstance(code, int) else text
    hint = "the build cannot reach the package archive: set http_proxy, or give --package-mirror"
    return CommandError(
        f"the recipe {dockerfile.recipe.name} failed: {said}", tail=tail, hint=hint if _UNREACHABLE.search(tail) else ""
    )


def _plain(text: str) -> str:
    """A line of a build's output: without colours, harmless in a terminal, and not endless."""
    line = _ESCAPES.sub("", text).strip()[:_LINE_MAX]
    return "".join(sign if sign.isprintable() else " " for sign in line)
