"""Tables of modules: complete before anything is imported, and each row is what the table promises."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import pytest

from osbuild.agents import AGENTS, AgentKind
from osbuild.checks import CHECKS, PREPARING
from osbuild.checks.base import CheckModule, Preparing
from osbuild.filesystem import FILESYSTEMS, READERS, Filesystem, Reader
from osbuild.sources import SOURCES, Source


@pytest.mark.parametrize(
    ("table", "kind"),
    [
        (SOURCES, Source),
        (FILESYSTEMS, Filesystem),
        (READERS, Reader),
        (AGENTS, AgentKind),
        (CHECKS, CheckModule),
        (PREPARING, Preparing),
    ],
)
def test_every_row_has_what_its_table_asks_for(table: Mapping[str, Any], kind: type) -> None:
    wanted = {name for name in vars(kind) if not name.startswith("_")}
    assert wanted
    assert len(table) == len(list(table))
    for name, module in table.items():
        assert name in table
        assert wanted <= set(vars(module)), name


def test_there_are_no_other_rows() -> None:
    assert "btrfs" not in FILESYSTEMS
    assert FILESYSTEMS.get("btrfs") is None
    with pytest.raises(KeyError):
        FILESYSTEMS["btrfs"]


def test_the_command_line_starts_without_what_only_some_commands_need() -> None:
    """Start-up is a part of every run, and of each make step that calls us: these once were half of it."""
    slow = ("pydantic", "rich", "urllib3", "docker", "requests", "crc32c", "jinja2", "google.protobuf", "asyncio")
    code = f"import sys, osbuild.cli; print([name for name in {slow!r} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
