"""The least memory with which a guest boots and its agent answers: found by booting it, again and again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

STEP_MIB: Final = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Tried:
    """One boot."""

    memory_mib: int
    booted: bool


def find(low: int, high: int, boots: Callable[[int], bool]) -> tuple[int, list[Tried]]:
    """The least multiple of STEP_MIB with which it boots, and all that was tried; 0 when not even `high` is enough.

    `low` is what certainly is not enough. The answer has booted twice, and STEP_MIB less has not.
    """
    tried: list[Tried] = []

    def attempt(memory: int) -> bool:
        tried.append(Tried(memory_mib=memory, booted=boots(memory)))
        return tried[-1].booted

    below, enough = low // STEP_MIB, -(-high // STEP_MIB)
    if not attempt(enough * STEP_MIB):
        return 0, tried
    while enough - below > 1:
        middle = (below + enough) // 2
        if attempt(middle * STEP_MIB):
            enough = middle
        else:
            below = middle
    while not attempt(enough * STEP_MIB):  # once was luck
        enough += 1
        if enough * STEP_MIB > high + STEP_MIB:
            return 0, tried
    return enough * STEP_MIB, tried
