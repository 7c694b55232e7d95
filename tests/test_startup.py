"""What a command pays before it begins: for itself, and for nothing else."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import typer

from osbuild import cli, program
from osbuild.crc import crc32c

# Slow to import, and of no use to an agent swap.
IDLE = (
    "importlib.metadata", "sqlite3", "tomllib", "rich", "ctypes", "osbuild.oci", "osbuild.tar", "osbuild.cpio_reader",
    "osbuild.packages", "osbuild.initrd", "osbuild.kernel", "osbuild.filesystem.erofs_reader", "osbuild.network",
    "socket", "logging", "concurrent.futures",
)  # fmt: skip


def test_a_swap_imports_nothing_that_it_does_not_use() -> None:
    modules = "osbuild.cli, osbuild.swap, osbuild.kata_agent, osbuild.filesystem.ext4, osbuild.filesystem.ext4_reader"
    script = f"import sys, {modules}; print(*(name for name in {IDLE} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_the_checksum_is_crc32c() -> None:
    assert crc32c(b"123456789", 0) == 0xE3069283  # the check value of CRC-32C
    assert crc32c(b"6789", crc32c(b"12345", 0)) == 0xE3069283


@pytest.mark.parametrize("words", [["agent", "swap"], ["kernel", "check"], ["build"], ["cache", "prune"]])
def test_a_command_made_alone_is_the_one_that_is_made_among_all(words: list[str]) -> None:
    both: list[Any] = [typer.main.get_command(app) for app in (program._narrowed(cli.app, words), cli.app)]
    alone, among = both
    for word in words:
        assert list(alone.commands) == [word]
        alone, among = alone.commands[word], among.commands[word]
    fields = ("name", "opts", "secondary_opts", "required", "multiple", "nargs", "default", "help", "metavar")
    said = [[[getattr(each, name, None) for name in fields] for each in command.params] for command in (alone, among)]
    assert said[0] == said[1]
    assert (alone.name, alone.help) == (among.name, among.help)


@pytest.mark.parametrize("words", [[], ["--version"], ["nonsense"], ["-h"]])
def test_without_a_command_there_are_all(words: list[str]) -> None:
    assert program._narrowed(cli.app, words) is cli.app
