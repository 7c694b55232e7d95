"""How QEMU's options are spelled."""

from __future__ import annotations

from pathlib import Path


def value(path: Path) -> str:
    """A path inside an option with commas: QEMU takes two of them for one."""
    return str(path).replace(",", ",,")
