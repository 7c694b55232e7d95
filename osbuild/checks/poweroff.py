"""The guest goes when it is told to."""

from __future__ import annotations

import contextlib
from typing import Final

from osbuild import ttrpc
from osbuild.checks.base import CALL_SECONDS, Session
from osbuild.findings import Unsaid, Wrong

_POWEROFF_SECONDS: Final = 10.0


def look(session: Session) -> str:
    with contextlib.suppress(ttrpc.PeerClosed):  # it may be gone before its answer is
        session.client.destroy_sandbox(seconds=min(CALL_SECONDS, session.left))
    end = session.watcher.wait_for_end(_POWEROFF_SECONDS)
    if end.panicked:
        raise Wrong("the kernel panicked instead of powering off")
    if end.halted:
        return "halted: this machine has no power switch"
    if end.status is None:
        raise Wrong(f"the guest is still there {_POWEROFF_SECONDS:g} s after it was told to power off")
    if end.status != 0:
        raise Wrong(f"the VMM ended with status {end.status}")
    if not end.leaving:
        raise Unsaid("the VMM ended, but the guest's kernel never said that it would power off")
    return "the VMM ended by itself"
