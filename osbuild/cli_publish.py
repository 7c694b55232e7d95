"""`osbuilder publish`, `pull` and `verify`: builds into a registry and out of it, and who vouches for them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Protocol

import typer

from osbuild import console
from osbuild.cache import default_cache
from osbuild.errors import SpecError
from osbuild.options import Json, Progress, Quiet, Words, registry_spec, takes

_REF = "REGISTRY/REPO:TAG"


def register(app: typer.Typer) -> None:
    """All of them, as commands of the program."""
    app.command("publish")(publish)
    app.command("pull")(pull)
    app.command("verify")(verify)


@takes("registry")
def publish(
    words: Words,
    names: Annotated[list[str], typer.Argument(metavar=f"OUT... {_REF}", help="builds, and where they are to be")],
    add: Annotated[bool, typer.Option("--add", help="to the builds for other architectures that are there")] = False,
    mount_from: Annotated[
        str, typer.Option("--mount-from", metavar="REPO", help="of the same registry: what it has need not be sent")
    ] = "",
    sign: Annotated[
        Path | None,
        typer.Option("--sign", metavar="KEY", help="with this private key, in PEM; COSIGN_PASSWORD opens it"),
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
    progress: Progress = console.AUTO,
) -> None:
    """Put a build into a registry: an OCI artifact; several, one for each architecture, as an index of them.

    What is there is not sent again; the tag is the last thing that changes, after the signatures. docs/publish.md says
    what a registry gets.

    JSON: {"reference", "digest", "changed", "platforms", "sent", "reused", "mounted", "files": {platform: {file:
    {"sent", "reused", "mounted"}}}, "signed": [{"digest", "changed"}]}: bytes of layers.
    """
    from osbuild import publish as publishing

    *builds, name = names
    if not builds:
        raise SpecError("a build and a reference are needed", hint=f"osbuilder publish OUT {_REF}")
    done = publishing.publish(
        [Path(build) for build in builds], name, registry_spec(words), console.Show(quiet=quiet, progress=progress),
        mount_from=mount_from, add=add, sign=sign,
    )  # fmt: skip
    _tell(done, as_json)


@takes("registry")
def pull(
    words: Words,
    name: Annotated[str, typer.Argument(metavar="REF", help=f"{_REF}, or @sha256:…")],
    out: Annotated[Path, typer.Option("--out", "-o", help="absent, empty, or with a build, which is replaced whole")],
    platform: Annotated[
        str, typer.Option("--platform", help="of several: linux/amd64 or linux/arm64; by default this machine's own")
    ] = "",
    key: Annotated[
        Path | None, typer.Option("--key", metavar="PUB", help="only what the owner of this public key signed")
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
    progress: Progress = console.AUTO,
) -> None:
    """Fetch a published build, and check all of it before DIR is changed.

    What DIR or the cache has of it already is not fetched. With --key it has to be signed, as `osbuilder verify` looks
    at it, before anything else of it is asked for.

    JSON: {"path", "reference", "digest", "platform", "fetched", "reused", "cached", "files": {file: {"fetched",
    "reused", "cached"}}, "signatures": as of verify}: bytes of layers; reused are those of the build that DIR held.
    """
    from osbuild import oci
    from osbuild import pull as pulling

    done = pulling.pull(
        name, out, registry_spec(words), default_cache(), console.Show(quiet=quiet, progress=progress),
        platform=oci.parse_platform(platform) if platform else None, key=key,
    )  # fmt: skip
    _tell(done, as_json)


@takes("registry")
def verify(
    words: Words,
    name: Annotated[str, typer.Argument(metavar="REF", help=f"{_REF}, or @sha256:…")],
    key: Annotated[Path, typer.Option("--key", metavar="PUB", help="a public key on P-256, in PEM")],
    as_json: Json = False,
    quiet: Quiet = False,
    progress: Progress = console.AUTO,
) -> None:
    """Whether the owner of a key signed what REF names: a build, an index of them, or any image.

    The registry's referrers, the tag that stands for them, and cosign's tag are searched. Another name in the
    signature than REF is told, and is no refusal.

    JSON: {"reference", "digest", "signatures": [{"road", "name", "other_name"}], "problems": [TEXT]}.

    Exit code: 0 there is a good signature; 3 there is none; 4 the registry, the network or this machine lacks
    something.
    """
    from osbuild import verification

    show = console.Show(quiet=quiet, progress=progress)
    done = verification.verify(name, key, registry_spec(words), default_cache(), show)
    _tell(done, as_json)


class _Done(Protocol):
    """What came of a command, for programs and for people."""

    def to_dict(self) -> dict[str, Any]: ...

    def lines(self) -> list[str]: ...


def _tell(done: _Done, as_json: bool) -> None:
    if as_json:
        console.print_json(done.to_dict())
    else:
        console.print_lines(done.lines())
