"""Containers for tests of the agent: a root with a busybox, the description a runtime would send, and short words."""

from __future__ import annotations

import itertools
import shutil
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from osbuild import ttrpc
from osbuild.agent_client import AGENT, AgentClient
from tests.agent_program import BUSYBOX

APPLETS: Final = ("sh", "cat", "echo", "id", "ls", "sleep", "stat", "mount", "env", "pwd", "hostname", "true", "dd",
                  "head", "stty", "grep", "mknod", "touch", "readlink", "umount", "mkdir", "kill",
                  "ps", "ln", "rm", "cut")  # fmt: skip
PROC: Final = {"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"]}
DEV: Final = {
    "destination": "/dev",
    "type": "tmpfs",
    "source": "tmpfs",
    "options": ["nosuid", "strictatime", "mode=755", "size=65536k"],
}
PTS: Final = {
    "destination": "/dev/pts",
    "type": "devpts",
    "source": "devpts",
    "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"],
}
SYS: Final = {
    "destination": "/sys",
    "type": "sysfs",
    "source": "sysfs",
    "options": ["nosuid", "noexec", "nodev", "ro"],
}
DOCKER: Final = ("CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FSETID", "CAP_FOWNER", "CAP_MKNOD", "CAP_NET_RAW",
                 "CAP_SETGID", "CAP_SETUID", "CAP_SETFCAP", "CAP_SETPCAP", "CAP_NET_BIND_SERVICE",
                 "CAP_SYS_CHROOT", "CAP_KILL", "CAP_AUDIT_WRITE")  # fmt: skip
_ids: Final = itertools.count(1)
Message = dict[str, Any]  # Any: what protobuf takes for a message


def make_root(path: Path) -> Path:
    """A directory that a container can have for its root."""
    for name in ("bin", "etc", "tmp", "proc", "sys", "dev", "home/user"):
        (path / name).mkdir(parents=True, exist_ok=True)
    shutil.copy(BUSYBOX, path / "bin/busybox")
    for applet in APPLETS:
        (path / "bin" / applet).symlink_to("busybox")
    (path / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/sh\nuser:x:1000:1001:User:/home/user:/bin/sh\n")
    (path / "etc/group").write_text("root:x:0:\nusers:x:1001:\naudio:x:29:user\n")
    return path


def process(*args: str, capabilities: Sequence[str] = DOCKER, **fields: Any) -> Message:
    """A process that runs these words."""
    names = list(capabilities)
    sets = dict.fromkeys(("Bounding", "Effective", "Permitted"), names)
    return {
        "Args": list(args),
        "Cwd": "/",
        "Env": ["PATH=/bin"],
        "User": {"UID": 0, "GID": 0},
        "Capabilities": sets,
        **fields,
    }


def description(
    root: Path, first: Message, *, mounts: Sequence[Message] = (PROC, DEV, PTS), linux: Mapping[str, Any] | None = None,
    **fields: Any,
) -> Message:  # fmt: skip
    """What a runtime sends of a container."""
    kinds = ("pid", "ipc", "uts", "mount")
    about: Message = {"Namespaces": [{"Type": kind} for kind in kinds], "Resources": {}, **(linux or {})}
    return {
        "Version": "1.0.2",
        "Process": first,
        "Root": {"Path": str(root)},
        "Mounts": list(mounts),
        "Linux": about,
        **fields,
    }


class Containers:
    """The calls about containers, in the fewest words."""

    def __init__(self, client: AgentClient) -> None:
        self.client = client

    def call(self, method: str, /, **fields: Any) -> Any:  # Any: the answer's message
        return self.client.call(AGENT, method, **fields)

    def create(self, oci: Message, *, name: str = "", **fields: Any) -> str:
        name = name or f"c{next(_ids)}"
        self.call("CreateContainer", container_id=name, exec_id=name, OCI=oci, **fields)
        return name

    def start(self, oci: Message, *, name: str = "", **fields: Any) -> str:
        name = self.create(oci, name=name, **fields)
        try:
            self.call("StartContainer", container_id=name)
        except ttrpc.StatusError:
            self.remove(name)
            raise
        return name

    def execute(self, name: str, *args: str, exec_id: str = "", **fields: Any) -> str:
        exec_id = exec_id or f"e{next(_ids)}"
        self.call("ExecProcess", container_id=name, exec_id=exec_id, process=process(*args, **fields))
        return exec_id

    def read(self, name: str, exec_id: str = "", *, method: str = "ReadStdout", size: int = 1 << 16) -> bytes:
        """All that it writes."""
        read = self.client.read_stdout if method == "ReadStdout" else self.client.read_stderr
        return b"".join(iter(lambda: read(name, exec_id, size=size), b""))

    def wait(self, name: str, exec_id: str = "") -> int:
        return int(self.call("WaitProcess", container_id=name, exec_id=exec_id).status)

    def remove(self, name: str, *, timeout: int = 10) -> None:
        self.call("RemoveContainer", container_id=name, timeout=timeout)

    def run(self, oci: Message, **fields: Any) -> tuple[int, str]:
        """A container from its making to its removal: its status and what it wrote, errors behind the rest."""
        name = self.start(oci, **fields)
        try:
            return self._finish(name, "")
        finally:
            self.remove(name)

    def run_in(self, name: str, *args: str, **fields: Any) -> tuple[int, str]:
        """One more process, to its end."""
        return self._finish(name, self.execute(name, *args, **fields))

    def _finish(self, name: str, exec_id: str) -> tuple[int, str]:
        text = self.read(name, exec_id) + self.read(name, exec_id, method="ReadStderr")
        return self.wait(name, exec_id), text.decode()

    def later(self, method: str, /, **fields: Any) -> Later:
        return Later(self, method, fields)


class Later:
    """A call that is under way."""

    def __init__(self, containers: Containers, method: str, fields: Message) -> None:
        self._result: Any = None
        self._thread = threading.Thread(target=self._run, args=(containers, method, fields), daemon=True)
        self._thread.start()

    def _run(self, containers: Containers, method: str, fields: Message) -> None:
        try:
            self._result = containers.call(method, **fields)
        except ttrpc.RpcError as problem:
            self._result = problem

    def done(self, seconds: float) -> bool:
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def result(self, seconds: float = 20.0) -> Any:
        assert self.done(seconds), "the call does not end"
        if isinstance(self._result, Exception):
            raise self._result
        return self._result
