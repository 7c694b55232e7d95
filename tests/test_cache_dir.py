"""`--cache-dir DIR`: every command has it, and it wins over the environment."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from osbuild import cli, program
from osbuild.cache import SETTING, default_cache
from osbuild.errors import SpecError

ROOT = Path(__file__).parent.parent


def commands(command: Any, *words: str) -> Iterator[tuple[str, ...]]:
    yield words
    for name, inner in getattr(command, "commands", {}).items():
        yield from commands(inner, *words, name)


ALL = tuple(commands(typer.main.get_command(cli.app)))


@pytest.mark.parametrize("words", ALL, ids=" ".join)
def test_every_command_says_that_it_takes_a_cache_dir(
    words: tuple[str, ...], capfd: pytest.CaptureFixture[str]
) -> None:
    assert program._command(cli.app, [*words, "--help"]) == 0
    assert "--cache-dir DIR" in capfd.readouterr().out


@pytest.mark.parametrize(
    "words",
    [
        ["cache", "ls", "--cache-dir", "d"],
        ["cache", "ls", "--cache-dir=d"],
        ["cache", "--cache-dir", "d", "ls"],
        ["--cache-dir", "d", "cache", "ls"],
        ["--cache-dir", "other", "cache", "ls", "--cache-dir", "d"],
    ],
    ids=" ".join,
)
def test_it_wins_over_the_environment_wherever_it_stands(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OSBUILDER_CACHE", str(tmp_path / "environment"))
    assert program._command(cli.app, words) == 0
    assert default_cache().root == tmp_path / "d"
    assert os.environ["OSBUILDER_CACHE"] == str(tmp_path / "d")  # for the processes that a matrix starts


@pytest.mark.parametrize("value", ["", "--json"])
def test_no_directory_and_the_next_option_are_refused(value: str) -> None:
    with pytest.raises(SpecError, match="--cache-dir: no value"):
        program._command(cli.app, ["cache", "ls", "--cache-dir", value])


_NOBODY = "import os; os.getuid = lambda: 2**31 - 5; from osbuild.__main__ import main; main()"  # in no password file


def test_without_a_home_the_error_names_it_and_it_works(tmp_path: Path) -> None:
    env = {name: value for name, value in os.environ.items() if name not in ("HOME", "XDG_CACHE_HOME", SETTING)}

    def run(*words: str) -> tuple[int, list[str]]:
        argv = [sys.executable, "-c", _NOBODY, *words]
        done = subprocess.run(argv, env=env, cwd=ROOT, capture_output=True, text=True, check=False)
        return done.returncode, done.stderr.splitlines()

    assert run("cache", "ls") == (
        4,
        [
            "error: there is no home directory for the cache",
            "hint:  name a directory with --cache-dir DIR or OSBUILDER_CACHE",
        ],
    )
    assert run("cache", "ls", "--cache-dir", str(tmp_path)) == (0, [])
