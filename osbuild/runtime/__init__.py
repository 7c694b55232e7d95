"""The VMMs that can boot a guest: a module with `start`, and a row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from osbuild.runtime import qemu
from osbuild.runtime.base import Guest, Machine, Runtime

RUNTIMES: Final[Mapping[str, Runtime]] = {"qemu": qemu}

__all__ = ["RUNTIMES", "Guest", "Machine", "Runtime"]
