"""What kernel.org publishes: linux-N.tar.xz with linux-N.tar.sign beside it, a signature of the tar inside."""

from __future__ import annotations

from osbuild.kernel_source import KernelSource
from osbuild.kernel_sources import signature, tarball
from osbuild.kernel_sources.base import Wish


def fetch(wish: Wish) -> KernelSource:
    """The tarball, when somebody whom versions.toml names has signed it."""
    path = tarball.find(wish.text)
    signer = signature.check(path, wish.pins.keys, wish.keyring)
    return tarball.unpacked(path, wish.cache, origin=f"{path.name}, signed by {signer.name}")
