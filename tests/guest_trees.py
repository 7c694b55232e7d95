"""Trees of guests for tests: an image of a few members, and what assemble_rootfs makes of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from osbuild.arch import X86_64
from osbuild.artifacts import File, Rootfs
from osbuild.rootfs import Explained, assemble_rootfs, explain
from osbuild.sources.image import SourceImage
from osbuild.spec import Addition, RootfsSpec
from osbuild.tree import Tree
from tests.layer_tools import archive, folder, link, member, opened, write_layout

# A usrmerged image with as much of systemd as the rules look for.
SYSTEMD = (
    folder("usr/lib/systemd/system"),
    folder("usr/sbin"),
    folder("usr/bin"),
    link("lib", "usr/lib"),
    link("sbin", "usr/sbin"),
    link("bin", "usr/bin"),
    member("usr/lib/systemd/systemd", b"\x7fELF", mode=0o755),
    member("usr/lib/systemd/system/basic.target", b"[Unit]\n"),
)


def fake_agent(work: Path) -> File:
    """A file with a version that can be read, and nothing to run."""
    path = work / "agent"
    path.write_bytes(b"\x7fELF osbuilder-agent version=9.9;")
    return File.of(path)


def make_image(work: Path, *members: object, **config: Any) -> SourceImage:
    work.mkdir(exist_ok=True)
    write_layout(work / "layout", [archive(*members)], **config)  # type: ignore[arg-type]
    return opened(f"oci:{work}/layout", X86_64)


def assemble(
    work: Path, *members: object, epoch: int = 1000, clamp: bool = False, config: Any = None, **wishes: Any
) -> Rootfs:
    """The guest's tree of an image; `wishes` are fields of RootfsSpec."""
    image = make_image(work, *members, **({} if config is None else {"config": config}))
    return assemble_rootfs(image, fake_agent(work), epoch=epoch, clamp=clamp, wishes=RootfsSpec(**wishes))


def explained(work: Path, *members: object, **wishes: Any) -> dict[str, Explained]:
    """What each rule did, by name."""
    image = make_image(work, *members)
    rows = explain(image, fake_agent(work), epoch=1000, wishes=RootfsSpec(**wishes))
    return {row.name: row for row in rows}


def text(tree: Tree, path: str) -> str:
    return b"".join(tree[path].content.chunks()).decode()


def parsed(tree: Tree, path: str) -> Any:
    return json.loads(text(tree, path))


def add(source: Path, target: str) -> Addition:
    return Addition(source=source, target=target)
