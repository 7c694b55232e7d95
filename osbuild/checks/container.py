"""The image's own ENTRYPOINT, CMD, ENV, USER and WORKDIR make a container in the guest, and it runs.

First our probe takes the program's place and says what such a process is given: what the image asks for, and the same
as under Docker where a daemon has that image. Then the program itself is started. One that has ended must have ended
well; one that goes on is what a service does.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import Any, Final

from osbuild import agent_process, ordinary_container, process_view
from osbuild.checks.base import Session
from osbuild.container import ContainerSpec, ProcessSpec, User
from osbuild.findings import NotHere, Unclear, Wrong
from osbuild.probe import HOME, Probe, Refused
from osbuild.ttrpc import CallTimeout
from osbuild.workload import PATH

_RUNS_SECONDS: Final = 5.0  # after which a program that has not ended is one that stays
_SAID: Final = 200


def look(session: Session) -> str:
    try:
        process = described(session.probe.file(PATH))
    except Refused:
        raise NotHere("the image names nothing to start") from None
    session.facts["args"] = list(process.args)
    probe = session.start_probe(process=process)
    try:
        session.facts["seen"] = found = seen(probe)
    finally:
        probe.remove()
    judge(found, process)
    number = len(process.env)
    variables = f"{number} variable{'s' * (number != 1)}"
    told = f"{found['uid']}:{found['gid']} in {found['cwd']} with {variables}, as the image asks"
    docker = ordinary_container.image_seen(session.machine)
    if docker is not None:
        session.facts["docker"] = docker
        told += judge_docker(found | {"args": list(process.args)}, docker)
    return f"{told}; {run(session, process)}"


def described(text: str) -> ProcessSpec:
    """What workload.py has written."""
    try:
        process = json.loads(text)["process"]
        user = process["user"]
        return ProcessSpec(
            args=tuple(process["args"]), env=tuple(process["env"]), cwd=process["cwd"],
            user=User(uid=user["uid"], gid=user["gid"], groups=tuple(user.get("additionalGids", ()))),
        )  # fmt: skip
    except (ValueError, KeyError, TypeError) as problem:
        raise Wrong(f"{PATH} is not what was written: {problem!r}") from None


def seen(probe: Probe) -> dict[str, Any]:
    """What a process in the program's place has."""
    return process_view.view([probe.ask(*words) for words in process_view.QUESTIONS])


def judge(found: Mapping[str, Any], process: ProcessSpec) -> None:
    """Wrong when it is not what the image asks for."""
    user = process.user
    wanted = {"uid": user.uid, "gid": user.gid, "cwd": process.cwd.rstrip("/") or "/"}
    for name, value in wanted.items():
        if found[name] != value:
            raise Wrong(f"the image's container has the {name} {found[name]!r}, not {value!r}")
    if missing := set(user.groups) - set(found["groups"]):
        raise Wrong(f"the image's container lacks the groups {sorted(missing)}")
    if lost := set(process.env) - set(found["env"]):
        raise Wrong(f"the image's container lacks {sorted(lost)[0]!r} in its environment")


def judge_docker(found: Mapping[str, Any], docker: Mapping[str, Any]) -> str:
    """Wrong when the same image gives its program something else under Docker."""
    if others := process_view.differences(found, docker, ours=(HOME.rpartition("/")[2],)):
        more = f", and {len(others) - 1} more" if len(others) > 1 else ""
        raise Wrong(f"the image's container is not what Docker makes of it: {others[0]}{more}")
    return " and as under Docker"


def run(session: Session, process: ProcessSpec) -> str:
    """The program itself, for a while, its input open."""
    spec = ContainerSpec(id=f"image-{session.machine.nonce}", process=process)
    began = time.monotonic()
    with agent_process.running(session.client, spec) as started:
        try:
            done = started.wait(_RUNS_SECONDS)
        except CallTimeout:
            session.facts["ended"] = None
            return f"{process.args[0]} runs"
    session.facts.update(ended=done.status, seconds=round(time.monotonic() - began, 3))
    said = " ".join((done.stderr or done.stdout)[-_SAID:].decode(errors="replace").split())
    if done.status in (126, 127):
        raise Wrong(f"{process.args[0]} cannot be run: {said}")
    if done.status != 0:
        raise Unclear(f"{process.args[0]} ended with {done.status}: {said}")
    return f"{process.args[0]} ended with 0"
