"""The agent that answers is of this run, and not of another one that is still there."""

from __future__ import annotations

from osbuild.checks.base import LINE_SECONDS, Session
from osbuild.findings import Unclear, Wrong


def look(session: Session) -> str:
    if not session.logs_as_ours:
        return "the answers came through this run's own channel; this agent says no nonce"
    fields = session.watcher.message("agent started", min(LINE_SECONDS, session.left))
    if fields is None:
        raise Unclear("no log line of the agent's on the console says which run it belongs to")
    if fields.get("nonce") != session.machine.nonce:
        raise Wrong(f"the agent belongs to another run: its nonce is {fields.get('nonce')!r}")
    return "this run's"
