"""What our probe sees in an ordinary container under Docker: to be shown beside what it sees in a guest."""

from __future__ import annotations

import contextlib
import io
import json
import os
import secrets
import shutil
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from osbuild import command, manifest, probe, process_view
from osbuild.arch import find_arch, host_arch
from osbuild.cache import default_cache
from osbuild.errors import CommandError, HostError, InputError
from osbuild.runtime.base import Machine

_PROGRAM: Final = "/osbuilder-probe"
_SECONDS: Final = 60.0
_SHORT: Final = 5.0  # for a daemon that may not be there


# With version 1 of control groups a container finds its limits elsewhere.
_LIMITS: Final = {
    "memory.max": ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"),
    "cpu.max": ("/sys/fs/cgroup/cpu.max",),
    "cpu.cfs_quota_us": ("/sys/fs/cgroup/cpu/cpu.cfs_quota_us",),
}


def seen(machine: Machine) -> dict[str, Any] | None:
    """With a guest's limits: the numbers of checks.resources.numbers, and the cgroup's; None without such a daemon."""
    from osbuild.checks import resources  # which asks here

    if not _answers(machine):
        return None
    name = f"osbuilder-probe:{secrets.token_hex(6)}"
    limits = [(limit, path) for limit, paths in _LIMITS.items() for path in paths]
    asked = b"".join(probe.question("file", path) for path in (*resources.FILES, *(path for _, path in limits)))
    asked += probe.question("host")
    try:
        _docker("import", "-", name, stdin=_image(machine), seconds=_SECONDS)
        try:
            said = _docker(
                "run", "--rm", "--interactive", "--network", "none", "--memory", f"{machine.memory_mib}m",
                "--cpus", str(machine.cpus), name, _PROGRAM,
                stdin=asked, merge=False, seconds=_SECONDS,
            ).output  # fmt: skip
        finally:
            with contextlib.suppress(CommandError):
                _docker("rmi", name, seconds=_SECONDS)
    except (CommandError, HostError):
        return None
    *answers, host = probe.answers(said.encode())
    texts, held = answers[: len(resources.FILES)], answers[len(resources.FILES) :]
    if host is None or None in texts:
        return None
    found = resources.numbers([(text or b"").decode() for text in texts], probe.pairs(host))
    known = {limit: text.decode().strip() for (limit, _), text in zip(limits, held, strict=True) if text is not None}
    return found | known


def image_seen(machine: Machine) -> dict[str, Any] | None:
    """process_view's of the image that the guest was made of, with the arguments that it runs with there; None without
    a daemon, or when it does not have that very image.
    """
    digest = _digest(machine)
    if not digest or not _answers(machine):
        return None
    asked = b"".join(probe.question(*words) for words in process_view.QUESTIONS)
    try:
        with _created(digest) as name:
            about = json.loads(_docker("inspect", "--type", "container", name, seconds=_SECONDS).output)
        with _created("--entrypoint", _PROGRAM, digest) as name:
            _docker("cp", "-", f"{name}:/", stdin=_image(machine), seconds=_SECONDS)
            with tempfile.TemporaryDirectory() as work:  # a variable may be no UTF-8
                said = Path(work) / "said"
                _docker(
                    "start", "--attach", "--interactive", name,
                    stdin=asked, log=said, merge=False, seconds=_SECONDS,
                )  # fmt: skip
                answers = probe.answers(said.read_bytes())
    except (CommandError, HostError):
        return None
    if len(answers) != len(process_view.QUESTIONS) or None in answers:
        return None
    found = process_view.view([text or b"" for text in answers])
    return found | {"args": [about[0]["Path"], *about[0]["Args"]]}


@contextlib.contextmanager
def _created(*words: str) -> Iterator[str]:
    """A container that was not started, for the length of the block."""
    name = f"osbuilder-probe-{secrets.token_hex(6)}"
    _docker("create", "--name", name, "--interactive", "--network", "none", *words, merge=False, seconds=_SECONDS)
    try:
        yield name
    finally:
        with contextlib.suppress(CommandError):
            _docker("rm", "--force", "--volumes", name, seconds=_SECONDS)


def _digest(machine: Machine) -> str:
    """What a daemon would know the guest's image by; nothing when it is not known of what it was made."""
    try:
        _, lock = manifest.load(machine.root.file.path.parent)
        return str(lock["image"]["digest"])
    except (InputError, LookupError, TypeError):
        return ""


def _docker(*words: str, **how: Any) -> command.Completed:
    """The daemon is the one that a person's own shell would ask."""
    asked = {name: value for name, value in os.environ.items() if name.startswith("DOCKER_")}
    return command.run("docker", *words, env=asked, **how)


def _answers(machine: Machine) -> bool:
    """Whether there is a daemon that runs what such a guest runs."""
    if shutil.which("docker") is None or find_arch(machine.arch) != host_arch():
        return False
    try:
        _docker("version", seconds=_SHORT)
    except (CommandError, HostError):
        return False
    return True


def _image(machine: Machine) -> bytes:
    program = probe.build_probe(find_arch(machine.arch), default_cache()).read_bytes()
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        about = tarfile.TarInfo(_PROGRAM.lstrip("/"))
        about.size, about.mode = len(program), 0o755
        tar.addfile(about, io.BytesIO(program))
    return file.getvalue()
