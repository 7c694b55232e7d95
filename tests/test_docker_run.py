"""An image's program is given in a guest what `docker run` gives it: both for real, the program being our probe."""

from __future__ import annotations

import dataclasses
import errno
import io
import json
import os
import secrets
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import pytest

from osbuild import agent_process, probe, process_view, smoke
from osbuild.agent_client import AgentClient
from osbuild.arch import X86_64
from osbuild.artifacts import File, Kernel, Rootfs
from osbuild.cache import default_cache
from osbuild.checks.container import described
from osbuild.container import ContainerSpec, ProcessSpec, Rlimit
from osbuild.initrd import build_initrd
from osbuild.report import Check, Verdict
from osbuild.rootfs import assemble_rootfs
from osbuild.runtime import qemu
from osbuild.runtime.base import Machine
from osbuild.spec import RootfsSpec
from osbuild.tree import Tree, regular
from osbuild.workload import PATH
from tests.agent_program import BUSYBOX
from tests.boot_fixtures import boot_kernel
from tests.docker_tools import private_docker
from tests.guest_trees import parsed
from tests.layer_tools import opened

__all__ = ["boot_kernel"]  # fixtures

PASSWD: Final = """root:x:0:0:root:/root:/bin/sh
app:x:1000:1001::/home/app:/bin/sh
homeless:x:1002:1001:::/bin/sh
"""
GROUP: Final = "root:x:0:\nstaff:x:50:app,homeless\naudio:x:29:app\napp:x:1001:app\n"
PROBE: Final = '["/probe"]'

# Instructions of a Dockerfile, for the same files.
IMAGES: Final = {
    "nothing but a command": (f"CMD {PROBE}",),
    "words, variables without a PATH, and no such directory": (
        'ENTRYPOINT ["/probe", "a b"]', 'CMD ["", "--c=\\"d\\"", "ä"]', "WORKDIR /not/there",
        "ENV A=1", 'ENV B="two words"', "ENV C=", "ENV A=last",
    ),
    "the shell form and a user by name": ("CMD exec /probe $A", "ENV A=one", "USER app", "WORKDIR /home/app"),
    "a name looked for in PATH by numbers that nobody has": (
        'CMD ["probe-by-name"]', "ENV PATH=/opt/bin:/bin", "USER 4242:4343",
    ),
    "the shell form of an entrypoint, a HOME, and a number without a group": (
        "ENTRYPOINT exec /probe", 'CMD ["ignored by the shell"]', "ENV HOME=/somewhere", "USER 4242",
    ),
    "no command, and a number with a name": (f"ENTRYPOINT {PROBE}", "CMD []", "USER 1000"),
    "no such directory, a user and a group": (f"CMD {PROBE}", "USER app:staff", "WORKDIR /nor/here/"),
    "a group alone": (f"CMD {PROBE}", "USER :audio"),
    "a user without a home": (f"CMD {PROBE}", "USER homeless"),
}  # fmt: skip


@pytest.fixture(scope="module")
def docker() -> Iterator[None]:
    """A daemon of our own."""
    if shutil.which("docker") is None or not BUSYBOX.exists():
        pytest.skip("docker or a static busybox is not installed")
    with pytest.MonkeyPatch.context() as patch, private_docker(patch):
        yield


def files() -> bytes:
    """The images' layer."""
    program = probe.build_probe(X86_64, default_cache()).read_bytes()
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, data, mode in (
            ("probe", program, 0o755), ("opt/bin/probe-by-name", program, 0o755),
            ("bin/sh", BUSYBOX.read_bytes(), 0o755),
            ("etc/passwd", PASSWD.encode(), 0o644), ("etc/group", GROUP.encode(), 0o644),
        ):  # fmt: skip
            about = tarfile.TarInfo(name)
            about.size, about.mode = len(data), mode
            tar.addfile(about, io.BytesIO(data))
        home = tarfile.TarInfo("home/app")
        home.type, home.mode, home.uid, home.gid = tarfile.DIRTYPE, 0o700, 1000, 1001
        tar.addfile(home)
    return file.getvalue()


def make(*instructions: str) -> str:
    """The image's name."""
    name = f"osbuilder-test/{secrets.token_hex(4)}:1"
    changes = [word for line in instructions for word in ("--change", line)]
    subprocess.run(["docker", "import", *changes, "-", name], input=files(), check=True, capture_output=True)
    return name


QUESTIONS: Final = b"".join(probe.question(*words) for words in process_view.QUESTIONS)


def viewed(said: bytes) -> dict[str, Any]:
    answers = probe.answers(said)
    assert None not in answers
    assert len(answers) == len(process_view.QUESTIONS)
    return process_view.view([answer or b"" for answer in answers])


def under_docker(name: str) -> dict[str, Any]:
    words = ["docker", "run", "--rm", "--interactive", "--network", "none", name]
    done = subprocess.run(words, input=QUESTIONS, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    return viewed(done.stdout)


def in_guest(client: AgentClient, rootfs: Rootfs, number: int) -> dict[str, Any]:
    text = json.dumps(parsed(rootfs.tree, PATH))
    done = agent_process.run(client, ContainerSpec(id=f"image-{number}", process=described(text)), stdin=QUESTIONS)
    assert done.status == 0, done.stderr
    return viewed(done.stdout)


@pytest.mark.slow
@pytest.mark.boot
@pytest.mark.usefixtures("docker")
def test_an_images_program_is_given_what_docker_run_gives_it(boot_kernel: Kernel, agent: File, tmp_path: Path) -> None:
    """The images differ in their configuration only, so one guest has the files of all of them."""
    images = {about: make(*instructions) for about, instructions in IMAGES.items()}
    trees = {
        about: assemble_rootfs(opened(f"docker-daemon:{name}"), agent, epoch=0, clamp=False, wishes=RootfsSpec())
        for about, name in images.items()
    }
    first = next(iter(trees.values()))
    machine = Machine(kernel=boot_kernel, root=build_initrd(first, tmp_path / "initrd.img"), accel="tcg")
    guest_sees = {}
    with qemu.start(machine, tmp_path / "work") as guest, guest.channel.connect(120) as connection:
        client = AgentClient(connection)
        client.create_sandbox("images")
        for number, (about, rootfs) in enumerate(trees.items()):
            guest_sees[about] = in_guest(client, rootfs, number)
    with ThreadPoolExecutor(4) as pool:
        docker_sees = dict(zip(images, pool.map(under_docker, images.values()), strict=True))

    others = {about: process_view.differences(guest_sees[about], docker_sees[about]) for about in images}
    assert {about: said for about, said in others.items() if said} == {}
    seen = guest_sees["words, variables without a PATH, and no such directory"]
    assert (seen["args"], seen["cwd"]) == (["/probe", "a b", "", '--c="d"', "ä"], "/not/there")
    assert guest_sees["the shell form and a user by name"]["groups"] == [29, 50, 1001]


# Docker's profile refuses the first four; the last two want a capability that neither has (or, as bpf does, a sysctl
# that distributions leave on). What a guest's kernel lacks it has no need to refuse.
FILTERED: Final = ("keyctl", "add_key", "unshare", "personality")
GUARDED: Final = ("mount", "bpf")
# Which limits a daemon or a machine chooses: Docker's are those of whoever started it, and a guest's are its kernel's.
CHOSEN: Final = frozenset((
    "Max open files", "Max processes", "Max pending signals", "Max core file size", "Max locked memory",
))  # fmt: skip
ASKED: Final = {"nofile": (2048, 4096), "core": (0, 1 << 20), "nproc": (100, 200), "stack": (4 << 20, 16 << 20)}
CALLS: Final = probe.question("calls")
LIMITED: Final = QUESTIONS + CALLS


def asked(said: bytes) -> tuple[dict[str, Any], dict[str, int]]:
    """The view of a process, and what each system call is refused with."""
    *answers, calls = probe.answers(said)
    assert calls is not None
    numbers = {name: int(number) for name, number in probe.pairs(calls).items()}
    return process_view.view([answer or b"" for answer in answers]), numbers


def docker_asked(name: str, *words: str) -> tuple[dict[str, Any], dict[str, int]]:
    argv = ["docker", "run", "--rm", "--interactive", "--network", "none", *words, name]
    done = subprocess.run(argv, input=LIMITED, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    return asked(done.stdout)


def guest_asked(client: AgentClient, number: int, **more: Any) -> tuple[dict[str, Any], dict[str, int]]:
    spec = ContainerSpec(
        id=f"limits-{number}", process=ProcessSpec(args=("/probe",), rlimits=more.pop("rlimits", ())), **more
    )
    done = agent_process.run(client, spec, stdin=LIMITED)
    assert done.status == 0, done.stderr
    return asked(done.stdout)


@pytest.mark.slow
@pytest.mark.boot
@pytest.mark.usefixtures("docker")
def test_a_guests_container_has_no_filter_unless_asked_and_the_limits_that_are_asked_for(
    boot_kernel: Kernel, agent: File, tmp_path: Path
) -> None:
    """Kata's runtime takes the filter away unless it is told to send it, and so do we: docs/checks.md says it, too."""
    name = make(f"CMD {PROBE}")
    rootfs = assemble_rootfs(opened(f"docker-daemon:{name}"), agent, epoch=0, clamp=False, wishes=RootfsSpec())
    machine = Machine(kernel=boot_kernel, root=build_initrd(rootfs, tmp_path / "initrd.img"), accel="tcg")
    rlimits = tuple(Rlimit(kind=f"RLIMIT_{kind.upper()}", soft=a, hard=b) for kind, (a, b) in ASKED.items())
    refused: Any = {
        "DefaultAction": "SCMP_ACT_ALLOW", "Architectures": ["SCMP_ARCH_X86_64"],
        "Syscalls": [{"Names": list(FILTERED), "Action": "SCMP_ACT_ERRNO", "errnoret": errno.EPERM}],
    }  # fmt: skip
    with qemu.start(machine, tmp_path / "work") as guest, guest.channel.connect(120) as connection:
        client = AgentClient(connection)
        client.create_sandbox("limits")
        plain, calls = guest_asked(client, 1)
        limited, _ = guest_asked(client, 2, rlimits=rlimits)
        filtered, filtered_calls = guest_asked(client, 3, seccomp=refused)
    docker, docker_calls = docker_asked(name)
    ulimits = [word for kind, (a, b) in ASKED.items() for word in ("--ulimit", f"{kind}={a}:{b}")]
    docker_limited, _ = docker_asked(name, *ulimits)

    assert (plain["seccomp"], docker["seccomp"]) == (0, 2)
    assert {docker_calls[call] for call in (*FILTERED, *GUARDED)} == {errno.EPERM}
    assert [call for call in FILTERED if calls[call] == errno.EPERM] == []
    assert {calls[call] for call in GUARDED} <= {errno.EPERM, errno.ENOSYS}
    assert calls["mount"] == errno.EPERM
    assert filtered["seccomp"] == 2
    assert {filtered_calls[call] for call in FILTERED} == {errno.EPERM}, "as under Docker, once it is asked for"

    assert len(plain["limits"]) == len(docker["limits"]) == 16
    others = {kind for kind in plain["limits"] if plain["limits"][kind] != docker["limits"][kind]}
    assert others <= CHOSEN, others
    wanted = {"Max open files", "Max core file size", "Max processes", "Max stack size"}
    assert {kind: limited["limits"][kind] for kind in wanted} == {
        kind: docker_limited["limits"][kind] for kind in wanted
    }
    changed = {kind for kind, value in limited["limits"].items() if value != plain["limits"][kind]}
    assert changed == wanted


@pytest.mark.slow
@pytest.mark.boot
@pytest.mark.usefixtures("docker")
def test_the_checks_show_what_an_ordinary_container_sees_beside_a_guest(
    boot_kernel: Kernel, agent: File, tmp_path: Path
) -> None:
    """The image is the daemon's, as lock.json says; and a guest that was made of it otherwise is not as Docker's."""
    name = make("CMD exec sleep 1000", "USER app", "WORKDIR /not/there", "ENV A=1")
    image = opened(f"docker-daemon:{name}")
    rootfs = assemble_rootfs(image, agent, epoch=0, clamp=False, wishes=RootfsSpec())
    (tmp_path / "manifest.json").write_text(json.dumps({"outputs": {}, "agent": ""}))
    lock = {"agent": {}, "options": {}, "image": {"digest": image.digest}}
    (tmp_path / "lock.json").write_text(json.dumps(lock))

    def smoked(tree: Tree, file: str) -> dict[str, Check]:
        root = build_initrd(dataclasses.replace(rootfs, tree=tree), tmp_path / file)
        machine = Machine(kernel=boot_kernel, root=root, accel="tcg", cpus=1)
        report = smoke.run(machine, tmp_path / f"{file}.work", seconds=240, checks=("container", "resources"))
        return {check.name: check for check in report.checks}

    good = smoked(rootfs.tree, "good.img")
    other = rootfs.tree.edit()
    about = parsed(rootfs.tree, PATH)
    about["process"]["env"].append("B=2")
    other.put(PATH, regular(json.dumps(about).encode()))
    wrong = smoked(other.tree(), "wrong.img")

    assert good["container"].verdict is Verdict.passed, good["container"]
    assert "as under Docker; /bin/sh runs" in good["container"].detail
    assert good["container"].facts["docker"]["args"] == ["/bin/sh", "-c", "exec sleep 1000"]
    docker = good["resources"].facts["docker"]
    assert docker["cpuinfo"] == os.cpu_count()
    assert str(256 << 20) in docker.values(), "its own control group has the guest's limit, and the rest is the host's"
    assert docker["total_kib"] == good["resources"].facts["host"]["total_kib"]
    assert "an ordinary container sees" in good["resources"].detail
    assert wrong["container"].verdict is Verdict.failed
    assert "is not what Docker makes of it: env: " in wrong["container"].detail
