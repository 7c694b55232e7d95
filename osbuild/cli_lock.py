"""`osbuilder rebuild`: a build made again from its lock."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from osbuild import console
from osbuild.cache import default_cache
from osbuild.errors import InputError, SpecError
from osbuild.options import Json, Progress, Quiet, Words, registry_spec, takes
from osbuild.tree import quote

if TYPE_CHECKING:
    from osbuild.spec import RegistrySpec


@takes("registry")
def rebuild(
    words: Words,
    name: Annotated[
        str, typer.Argument(metavar="DIR|REF", help="a build with its lock.json: a directory, or one in a registry")
    ],
    image: Annotated[str, typer.Option("--image", help="where the image is now, when not where it was")] = "",
    out: Annotated[Path | None, typer.Option("--out", "-o", help="make it there, and leave it")] = None,
    most: Annotated[int, typer.Option("--most", min=1, metavar="N", help="differences to name of each file")] = 20,
    platform: Annotated[str, typer.Option("--platform", help="of several in a registry: as pull's")] = "",
    key: Annotated[Path | None, typer.Option("--key", metavar="PUB", help="of one in a registry: as pull's")] = None,
    as_json: Json = False,
    quiet: Quiet = False,
    progress: Progress = console.AUTO,
) -> None:
    """Make a build again from its lock.json, and say whether it is the same.

    Nothing is booted. It is made in TMPDIR and goes afterwards, unless --out names a place. What is no directory here
    and names a registry is pulled for it, as by `osbuilder pull`. What differs is named: inputs that are not what the
    lock has, and of each file the partition, inode and field, the kernel's section, or the setting. The kernel comes
    from the cache when that has one of the same inputs; with --cache-dir and an empty directory it is compiled.

    JSON: {"directory", "identical", "inputs", "files": [{"name", "same", "differences", "more", "because",
    "changed"}], "kernel_compiled"}.

    Exit code: 0 identical; 3 not.
    """
    from osbuild import rebuild as rebuilding

    show, registry = console.Show(quiet=quiet, progress=progress), registry_spec(words)
    with _build(name, platform, registry, show, image, key) as directory:
        found = rebuilding.rebuild(directory, default_cache(), show, registry=registry, image=image, out=out, most=most)
    found = dataclasses.replace(found, directory=Path(name))
    if as_json:
        console.print_json(found.to_dict())
    else:
        console.print_lines(rebuilding.lines(found))
    raise typer.Exit(0 if found.identical else 3)


@contextlib.contextmanager
def _build(
    name: str, platform: str, registry: RegistrySpec, show: console.Show, image: str, key: Path | None
) -> Iterator[Path]:
    """The directory of that name; else what a registry has under it, for as long as it is needed."""
    from osbuild import lock, manifest, oci

    if Path(name).exists():
        if key:
            raise SpecError(f"{quote(name)} is a directory, which has no signature", hint="leave --key out")
        yield Path(name)
        return
    if not oci.names_host(name):
        raise InputError(
            f"there is no {quote(name)} here",
            hint="a build's directory, or REGISTRY/REPO:TAG, as in docker.io/me/guest:1",
        )
    from osbuild import pull as pulling

    with tempfile.TemporaryDirectory(prefix="osbuilder-pulled-") as home:
        directory = Path(home) / "build"
        wanted = oci.parse_platform(platform) if platform else None
        pulling.pull(name, directory, registry, default_cache(), show, platform=wanted, key=key)
        lock.refuse_local_things(lock.read(directory / manifest.LOCK), image, name)
        yield directory
