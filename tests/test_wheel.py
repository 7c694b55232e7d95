"""The wheel: built as a user's pip would, then looked into and used from somewhere else."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    # The build backend is in the development extra, so nothing has to be fetched.
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)],
        check=True, capture_output=True,
    )  # fmt: skip
    (found,) = out.glob("osbuilder-*.whl")
    return found


@pytest.mark.parametrize(
    ("here", "there"),
    [
        ("kernel-configs", "osbuild/data/kernel-configs"),
        ("patches", "osbuild/data/patches"),
        ("templates", "osbuild/data/templates"),
        ("agent", "osbuild/data/agent"),
    ],
)
def test_every_file_that_the_program_reads_is_in_the_wheel(here: str, there: str, wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    wanted = [path.relative_to(ROOT / here) for path in (ROOT / here).rglob("*") if path.is_file()]
    assert wanted
    missing = [str(path) for path in wanted if f"{there}/{path}" not in names]
    assert missing == []


def test_nothing_of_the_tests_is_in_the_wheel(wheel: Path) -> None:
    assert not [name for name in zipfile.ZipFile(wheel).namelist() if "test" in name.partition("/")[0]]


def test_unpacked_elsewhere_it_finds_its_own_resources(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    script = (
        "from osbuild.resources import resource\n"
        "for name in ('kernel-configs/common', 'agent/main.c', 'agent/proto/agent.proto'):\n"
        "    print(resource(name))\n"
    )
    told = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, check=True, capture_output=True, text=True,
        env={"PYTHONPATH": str(tmp_path), "PATH": "/usr/bin:/bin"},
    ).stdout  # fmt: skip
    assert all(line.startswith(str(tmp_path)) for line in told.splitlines())
