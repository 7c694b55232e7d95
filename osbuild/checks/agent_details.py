"""The agent knows what it is there: PID 1, or one of systemd's services."""

from __future__ import annotations

from osbuild.checks.base import CALL_SECONDS, Session
from osbuild.findings import Wrong


def look(session: Session) -> str:
    details = session.client.guest_details(seconds=min(CALL_SECONDS, session.left))
    if details.agent.init_daemon is session.service:
        raise Wrong(f"the agent says that it is {'' if session.service else 'not '}PID 1")
    return f"{'a service' if session.service else 'PID 1'}, {details.agent.version}"
