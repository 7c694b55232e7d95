"""The walk over every call: against the built-in agent under sanitizers, and against agents that are wrong."""

from __future__ import annotations

from pathlib import Path

from tests.agent_guest import contained
from tests.walking import bad, place, walk


def test_the_built_in_agent_passes_every_step_under_sanitizers(sanitized_agent: Path, tmp_path: Path) -> None:
    with contained(sanitized_agent, tmp_path / "agent.log") as (client, process):
        rows = walk(client, place(process))
    assert bad(rows) == []
