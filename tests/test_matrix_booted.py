"""A cell is unchanged only when it booted with what its matrix wishes now: here, and where a registry has it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from osbuild import publication
from osbuild.console import Show
from osbuild.publish import publish
from osbuild.registry_spec import RegistrySpec
from tests.keys import make_key
from tests.layer_tools import archive, folder, member, write_layout
from tests.published import get, make, put
from tests.test_distribution import _surroundings as _surroundings  # a fixture
from tests.test_fleet import CACHE, command, raw
from tests.test_registry import debian as debian  # a fixture

MATRIX = 'make = "initrd"\ncompress = "gzip"\n[axes]\nimage = { one = "oci:one" }\n'
WISHES = "0" * 64


@pytest.fixture
def home(kernel: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with an image; its matrix is to be written."""
    monkeypatch.setenv("OSBUILDER_CACHE", str(CACHE))  # which has the kernel
    write_layout(tmp_path / "one", [archive(folder("etc"), member("etc/hello", b"one"))])
    return tmp_path


def only_cell(home: Path, text: str, *words: str) -> tuple[str, str]:
    """Carry out a matrix of one cell: its verdict and its note."""
    (home / "matrix.toml").write_text(text)
    done = command("matrix", "matrix.toml", "-o", "out", "--json", "--quiet", *words, cwd=home)
    assert done.returncode == 0, done.stderr + done.stdout
    found: dict[str, Any] = json.loads(done.stdout)
    (cell,) = found["cells"]
    return cell["verdict"], cell["note"]


@pytest.mark.slow
def test_another_wish_for_the_guest_boots_again_what_lies_there(home: Path) -> None:
    report = home / "out/cells/one/build/smoke/report.json"
    assert only_cell(home, f"no-smoke = true\n{MATRIX}") == ("built", "")
    assert not report.exists()
    assert only_cell(home, MATRIX) == ("unchanged", "booted again")
    assert only_cell(home, MATRIX) == ("unchanged", "")
    before = report.stat().st_mtime_ns
    assert only_cell(home, f"{MATRIX}[guest]\nmemory = 300\n") == ("unchanged", "booted again")
    assert report.stat().st_mtime_ns > before
    assert only_cell(home, f"{MATRIX}[guest]\nmemory = 300\n") == ("unchanged", "")
    assert only_cell(home, f"no-smoke = true\n{MATRIX}") == ("unchanged", ""), "nobody asks"


@pytest.mark.slow
def test_a_cell_that_a_registry_has_is_taken_only_when_it_booted_as_is_wished_now(home: Path, debian: str) -> None:
    target = f"{debian}/guests/booted:1"

    def elsewhere(text: str) -> tuple[str, str]:
        shutil.rmtree(home / "out", ignore_errors=True)
        return only_cell(home, text, "--publish", target)

    def word() -> str | None:
        said: str | None = raw(f"{target}-one")["annotations"].get("vnd.osbuilder.booted")
        return said

    taken = ("unchanged", "the registry has it")
    assert elsewhere(f"no-smoke = true\n{MATRIX}") == ("built", "")
    assert word() is None
    assert elsewhere(f"no-smoke = true\n{MATRIX}") == taken
    assert elsewhere(MATRIX) == ("built", "")
    first = word()
    assert first == (home / "out/cells/one/booted").read_text()
    assert elsewhere(MATRIX) == taken
    assert elsewhere(f"no-smoke = true\n{MATRIX}") == taken
    assert elsewhere(f"{MATRIX}[guest]\nmemory = 300\n") == ("built", "")
    assert word() not in (None, first)


def test_the_same_build_published_again_keeps_word_of_its_boot_and_another_does_not(
    debian: str, tmp_path: Path
) -> None:
    name = f"{debian}/guests/word:1"
    build = make(tmp_path / "a")
    told = publish([build], name, RegistrySpec(), Show(quiet=True), booted=WISHES)
    assert raw(name)["annotations"]["vnd.osbuilder.booted"] == WISHES
    again = put(debian, build, name="guests/word:1")
    assert (again.digest, again.changed) == (told.digest, False)
    assert put(debian, build, name="guests/word:2").digest != told.digest, "a tag without that word gets none"
    assert get(debian, tmp_path / "out", tmp_path / "cache", name="guests/word:1").digest == told.digest
    put(debian, make(tmp_path / "b", "b"), name="guests/word:1")
    assert "vnd.osbuilder.booted" not in raw(name)["annotations"]


def test_a_word_that_nobody_signed_is_not_signed_with_the_build(debian: str, tmp_path: Path) -> None:
    """Who may write to a registry can put it there, beside the very same build."""
    mine, other = (make_key(tmp_path / f"{name}.pem") for name in ("mine", "other"))
    name, build = f"{debian}/guests/forged:1", make(tmp_path / "a")

    def put_again(sign: Path | None, **more: Any) -> str | None:
        publish([build], name, RegistrySpec(), Show(quiet=True), sign=sign, **more)
        word: str | None = raw(name)["annotations"].get("vnd.osbuilder.booted")
        return word

    assert put_again(None, booted=WISHES) == WISHES
    assert put_again(None, signed_by=mine.with_suffix(".pub").read_text()) is None, "it will be signed"
    assert put_again(None, booted=WISHES) == WISHES
    assert put_again(mine) is None
    assert put_again(other, booted=WISHES) == WISHES
    assert put_again(other) == WISHES, "this key's owner said so before"
    assert put_again(mine) is None


@pytest.mark.parametrize("said", ["", "x", WISHES[1:], f"{WISHES}\n", 7, None, [WISHES]])
def test_what_is_no_digest_is_no_word_of_a_boot(said: object) -> None:
    data = json.dumps({"annotations": {"vnd.osbuilder.booted": said}}).encode()
    assert publication.booted(data) == ""
    assert publication.booted(b"[]") == publication.booted(b"no") == publication.booted(b'{"annotations": []}') == ""
    assert publication.booted(publication.with_booted(data, WISHES)) == WISHES
