"""The program in other surroundings: a copy of it in a directory of its own, for another user, clock or interpreter."""

from __future__ import annotations

import compileall
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NOBODY = (
    "setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups", "--no-new-privs", "--inh-caps=-all",
    "--bounding-set=-all",
)  # fmt: skip
_MAIN = "from osbuild.cli import main; main()"


@dataclass(frozen=True)
class Elsewhere:
    """Everything that the program needs, below one directory that anybody may read and nobody may write."""

    home: Path

    @classmethod
    def at(cls, home: Path) -> Elsewhere:
        """Copy the program and the packages that it imports."""
        # All of it compiled, since nobody can write there: else every run would do that again.
        for name in ("osbuild", "agent", "probe", "kernel-configs", "patches", "templates"):
            shutil.copytree(ROOT / name, home / "code" / name, ignore=shutil.ignore_patterns("__pycache__"))
        compileall.compile_dir(home / "code", quiet=1)
        packages = Path(pytest.__file__).parent.parent
        unused = shutil.ignore_patterns("*.pth", "atheris*", "*hadolint*", "mypy*", "pip")
        shutil.copytree(packages, home / "site", ignore=unused)
        home.chmod(0o755)
        return cls(home)

    def command(
        self,
        *words: str,
        work: Path,
        env: dict[str, str] | None = None,
        before: Sequence[str] = NOBODY,
        python: Path | None = None,
    ) -> list[str]:
        """A command line that runs the program with `work` as its home and cache, after the words in `before`."""
        path = f"{self.home}/code" if python else f"{self.home}/code:{self.home}/site"
        settings = {
            "PATH": "/usr/bin:/bin", "HOME": str(work), "OSBUILDER_CACHE": f"{work}/cache", "PYTHONPATH": path,
            "DOCKER_HOST": "unix:///nonexistent", "TMPDIR": str(work), "PYTHONDONTWRITEBYTECODE": "1",
        }  # fmt: skip
        pairs = [f"{name}={value}" for name, value in (settings | (env or {})).items()]
        return [*before, "env", "-i", *pairs, str(python or python_for_nobody()), "-c", _MAIN, *words]


def python_for_nobody() -> Path:
    """An interpreter of our version that an unprivileged user may execute: ours may be in root's home."""
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    for candidate in (Path(sys.executable).resolve(), Path("/usr/bin") / version, Path("/usr/local/bin") / version):
        tried = subprocess.run([*NOBODY, "env", "-i", str(candidate), "-c", "pass"], capture_output=True, check=False)
        if tried.returncode == 0:
            return candidate
    pytest.skip(f"no {version} that an unprivileged user may run")


def need_root() -> None:
    if os.getuid() != 0:
        pytest.skip("only root can become nobody; everybody else has just shown it")


def give_to_nobody(path: Path) -> None:
    subprocess.run(["chown", "-R", "nobody:nogroup", str(path)], check=True)
