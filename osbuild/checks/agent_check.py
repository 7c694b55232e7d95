"""The agent answers: without it nothing else can be asked."""

from __future__ import annotations

from osbuild.checks.base import Session


def look(session: Session) -> str:
    session.client.wait(session.left)
    session.watcher.record("agent answered")
    return "it serves"
