"""What boots need: the images of scripts/base-image as guest trees."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from osbuild.agent import build_agent
from osbuild.arch import X86_64
from osbuild.artifacts import Rootfs
from osbuild.cache import default_cache
from osbuild.oci import Platform
from osbuild.rootfs import assemble_rootfs
from osbuild.sources import open_image
from osbuild.sources.image import Want

WANT = Want(platform=Platform(os="linux", architecture=X86_64.oci), cache=default_cache())
ROOT = Path(__file__).parent.parent


def base_rootfs(name: str, work: Path) -> Rootfs:
    """The guest's tree of one of those images."""
    layout = work / name
    if not layout.exists():
        environment = os.environ | {"DOCKER_HOST": "unix:///nonexistent"}
        subprocess.run([str(ROOT / "scripts/base-image"), name, str(layout)], check=True, env=environment)
    return assemble_rootfs(open_image(f"oci:{layout}", WANT), build_agent(X86_64, default_cache()), epoch=0)


def busybox_rootfs(work: Path) -> Rootfs:
    """The smallest of them that has a shell."""
    return base_rootfs("busybox", work)
