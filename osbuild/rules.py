"""What every rule of the guest's tree is made of: what it is told, what it says, and a few ways to look at a draft."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from osbuild.agent import Agent
from osbuild.tree import Bytes, Draft

if TYPE_CHECKING:  # slow to import: with it comes all that speaks to registries
    from osbuild.sources.image import SourceImage
    from osbuild.spec import RootfsSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What a rule knows besides the tree."""

    image: SourceImage
    agent: Agent
    wishes: RootfsSpec
    epoch: int  # seconds since 1970: the time of everything that we add
    dropped_xattrs: Mapping[str, int] = field(default_factory=dict)  # name -> inodes that had it

    @property
    def now(self) -> int:
        """The epoch as inodes keep it: in nanoseconds."""
        return self.epoch * 1_000_000_000

    @property
    def service(self) -> bool:
        """The agent is to be one of systemd's services, not the first process."""
        return self.wishes.init == "systemd"


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a rule says about itself; which paths it changed is seen from outside."""

    applied: bool
    note: str = ""  # why not, or what the paths do not show
    inputs: Mapping[str, str] = field(default_factory=dict)  # what it read on this machine, by digest


# A function from draft to draft: it edits the one it is given.
Rule = Callable[[Draft, Setting], Outcome]


def applied(note: str = "", inputs: Mapping[str, str] | None = None) -> Outcome:
    """The rule had something to see to, whether or not it had to change anything for that."""
    return Outcome(applied=True, note=note, inputs=inputs or {})


def idle(why: str) -> Outcome:
    """The rule is not for this image, or nobody wished it."""
    return Outcome(applied=False, note=why)


def rewrite(draft: Draft, path: str, text: str, *, now: int) -> None:
    """Other content for a file that is there; its mode and owner stay."""
    path = draft.resolve(path)
    entry = draft.get(path)
    assert entry is not None
    data = Bytes(text.encode(errors="surrogateescape"))
    draft.put(path, dataclasses.replace(entry, content=data, mtime_ns=now))


def below(draft: Draft, path: str) -> list[str]:
    """Every path inside a directory, in order."""
    start = path.rstrip("/") + "/"
    return [name for name in draft.tree() if name.startswith(start)]
