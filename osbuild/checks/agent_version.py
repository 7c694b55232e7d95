"""The agent that answers is the one that was put in."""

from __future__ import annotations

from osbuild.agent_binary import UNKNOWN
from osbuild.checks.base import CALL_SECONDS, Session
from osbuild.findings import Wrong


def look(session: Session) -> str:
    version = session.client.version(seconds=min(CALL_SECONDS, session.left))
    wanted = session.machine.agent.rpartition(" ")[2]
    if wanted not in ("", UNKNOWN) and version.agent != wanted:
        raise Wrong(f"the agent that answers is {version.agent}, not the {wanted} that was put in")
    return f"{version.agent}, interface {version.grpc}"
