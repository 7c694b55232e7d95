"""Where kernel-configs/, patches/, templates/ and agent/ are: beside the package, or inside it in a wheel."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from osbuild.errors import BuildError

_PACKAGE: Final = Path(__file__).resolve().parent


def resource(name: str) -> Path:
    """The path of a file or directory that travels with the program, e.g. `kernel-configs/common`."""
    for root in (_PACKAGE / "data", _PACKAGE.parent):
        path = root / name
        if path.exists():
            return path
    raise BuildError(f"this installation has no {name}", hint="install osbuilder again")
