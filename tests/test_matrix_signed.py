"""A matrix whose cells and indexes are signed, and what a registry has without a signature: it is made again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests import test_fleet
from tests.keys import make_key
from tests.layer_tools import archive, folder, member, write_layout
from tests.test_distribution import _surroundings as _surroundings  # a fixture
from tests.test_fleet import CACHE, command, raw
from tests.test_publish import skopeo
from tests.test_registry import debian as debian  # a fixture

MATRIX = """no-smoke = true
make = "initrd"
compress = "gzip"
[axes]
image = { one = "oci:one", two = "oci:two" }
arch = ["x86_64"]
"""
CELLS = {"one-x86_64", "two-x86_64"}


@pytest.fixture
def home(kernel: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with two images, a matrix, and two keys."""
    monkeypatch.setenv("OSBUILDER_CACHE", str(CACHE))  # which has the kernel
    for name in ("one", "two"):
        write_layout(tmp_path / name, [archive(folder("etc"), member("etc/hello", name.encode()))])
    (tmp_path / "matrix.toml").write_text(MATRIX)
    make_key(tmp_path / "mine.pem")
    make_key(tmp_path / "other.pem")
    return tmp_path


def matrix(home: Path, *words: str, anew: bool = False) -> dict[str, Any]:
    """Carry it out; `anew`, as on a machine that has only the registry."""
    if anew:
        shutil.rmtree(home / "out")
    return test_fleet.matrix(home, *words)


def verdicts(found: dict[str, Any]) -> dict[str, str]:
    return {cell["name"]: cell["verdict"] for cell in found["cells"]}


def is_signed(home: Path, reference: str, key: str = "mine.pub") -> bool:
    """… under that very name."""
    done = command("verify", reference, "--key", key, "--json", cwd=home)
    assert done.returncode in (0, 3), done.stderr
    return done.returncode == 0 and any(not each["other_name"] for each in json.loads(done.stdout)["signatures"])


@pytest.mark.slow
def test_cells_variants_and_the_whole_are_signed_under_their_own_names(home: Path, debian: str) -> None:
    target = f"{debian}/guests/signed:1"
    found = matrix(home, "--publish", target, "--sign", "mine.pem")
    assert verdicts(found) == dict.fromkeys(CELLS, "built")
    named = [f"{target}{end}" for end in ("-one-x86_64", "-two-x86_64", "-one", "-two", "")]
    assert [each["reference"] for each in found["indexes"]] == [f"{target}{end}" for end in ("-one", "-two", "")]
    assert len(found["signed"]) == len(named)
    assert all(each["changed"] for each in found["signed"])
    for reference in named:
        assert is_signed(home, reference), reference
        assert not is_signed(home, reference, "other.pub")
    done = command("pull", f"{target}-two", "-o", "pulled", "--key", "mine.pub", cwd=home)
    assert done.returncode == 0, done.stderr

    again = matrix(home, "--publish", target, "--sign", "mine.pem", anew=True)
    assert verdicts(again) == dict.fromkeys(CELLS, "unchanged")
    assert not any(each["changed"] for each in again["signed"])
    assert again["indexes"] == found["indexes"]


@pytest.mark.slow
def test_what_nobody_signed_or_under_another_name_is_not_taken_from_a_registry(home: Path, debian: str) -> None:
    target = f"{debian}/guests/unsigned:1"
    whole = matrix(home, "--publish", target)
    assert whole["signed"] == []
    assert not is_signed(home, f"{target}-one-x86_64")
    assert verdicts(matrix(home, "--publish", target, anew=True)) == dict.fromkeys(CELLS, "unchanged")

    first = matrix(home, "--publish", target, "--sign", "mine.pem", anew=True)
    assert verdicts(first) == dict.fromkeys(CELLS, "built")
    assert is_signed(home, f"{target}-one-x86_64")
    other = matrix(home, "--publish", target, "--sign", "other.pem", anew=True)
    assert verdicts(other) == dict.fromkeys(CELLS, "built"), "signed, by another"

    elsewhere = f"{debian}/guests/unsigned:2"  # somebody moves what was signed to other names
    for end in ("-one-x86_64", "-two-x86_64"):
        copy = ("docker://" + target + end, "docker://" + elsewhere + end)
        skopeo("copy", "--src-tls-verify=false", "--dest-tls-verify=false", *copy)
    assert raw(f"{elsewhere}-one-x86_64") == raw(f"{target}-one-x86_64")
    moved = matrix(home, "--publish", elsewhere, "--sign", "mine.pem", anew=True)
    assert verdicts(moved) == dict.fromkeys(CELLS, "built"), "signed under other names"


def test_sign_without_publish_is_refused_and_so_is_a_key_that_cannot_sign(home: Path) -> None:
    done = command("matrix", "matrix.toml", "--sign", "mine.pem", cwd=home)
    assert (done.returncode, "--publish REGISTRY/REPO:TAG" in done.stderr) == (2, True)
    done = command("matrix", "matrix.toml", "-o", "out", "--publish", "localhost:1/a:1", "--sign", "mine.pub", cwd=home)
    assert (done.returncode, "is a public key, which cannot sign" in done.stderr) == (3, True), done.stderr
    assert not (home / "out").exists()
