"""AGENTS: who may answer in a guest, and how one gets there. A module and a row each."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol

from osbuild.modules import Modules

if TYPE_CHECKING:
    from osbuild.agent import Agent
    from osbuild.arch import Arch
    from osbuild.cache import Cache

BUILTIN: Final = "builtin"


class AgentKind(Protocol):
    """What a module must have to be a row of AGENTS."""

    @property
    def PROGRAM(self) -> str:  # noqa: N802 - a module's constant
        """Where it lies in a guest whose systemd starts it."""

    @property
    def INIT_WORDS(self) -> tuple[str, ...]:  # noqa: N802
        """Kernel words that it needs as the first process."""

    def obtain(self, source: str, arch: Arch, cache: Cache) -> Agent:
        """The agent itself; `source` is a path, or the name of the row."""


AGENTS: Final[Mapping[str, AgentKind]] = Modules({BUILTIN: "osbuild.agent", "kata": "osbuild.kata_agent"})


def find_agent(source: str, arch: Arch, cache: Cache) -> Agent:
    """What `--agent` names: our own, or what a file is or holds."""
    return AGENTS[BUILTIN if source == BUILTIN else "kata"].obtain(source, arch, cache)


def check_agent(source: str) -> None:
    """InputError for a file that is not there: known before anything slow begins."""
    if source != BUILTIN:
        from osbuild import kata_agent  # which builtin's users need not wait for

        kata_agent.check(source)


def absolute(source: str, home: Path) -> str:
    """The same with a path relative to `home`."""
    return source if source in AGENTS else str(home / source)


def init_words(found: Agent, *, service: bool) -> tuple[str, ...]:
    """What the kernel must be told for this agent."""
    return () if service else AGENTS[found.kind].INIT_WORDS
