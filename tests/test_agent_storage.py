"""Storages: the agent in namespaces of its own, under sanitizers. For what is on a bus: test_agent_devices."""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import shutil
import signal
import stat
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from osbuild import ttrpc
from osbuild.agent_client import AGENT, AgentClient
from osbuild.arch import X86_64, host_arch
from tests.agent_container import Containers, description, make_root, process
from tests.agent_guest import agent_pid, contained, inside

pytestmark = [
    pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc is not installed"),
    pytest.mark.skipif(host_arch() is not X86_64, reason="the agent is compiled for x86_64 only"),
]

INVALID_ARGUMENT, NOT_FOUND, ALREADY_EXISTS, PERMISSION_DENIED, UNIMPLEMENTED, INTERNAL = 3, 5, 6, 7, 12, 13
BASE: Final = "/run/kata-containers"
MIB: Final = 1 << 20
ALWAYS, ON_ROOT_MISMATCH = 0, 1

_CLEAN: Final = """
for place in /run/mine /dev/shm; do while umount "$place" 2>/dev/null; do :; done; done
cd /run && for name in *; do case $name in cgroup | sandbox-ns | kata-containers) ;; *) rm -rf "$name" ;; esac; done
rm -rf /var/tmp/*
"""

Storage = dict[str, Any]  # Any: as AgentClient.call, a grpc.Storage


def ephemeral(place: str, **fields: Any) -> Storage:
    return {"driver": "ephemeral", "source": "tmpfs", "fstype": "tmpfs", "mount_point": place, **fields}


def bind(source: str, place: str, **fields: Any) -> Storage:
    return {"driver": "virtio-fs", "source": source, "fstype": "bind", "mount_point": place, **fields}


class Agent:
    def __init__(self, client: AgentClient, process: subprocess.Popen[bytes]) -> None:
        self.client, self.process = client, process
        self.root = Path(f"/proc/{agent_pid(process)}/root")
        self.before: tuple[str, ...] = ()
        self.before = tuple(self.mounts())  # of this machine, below the agent's own /run: /run/netns of `ip netns`

    def call(self, method: str, /, **fields: Any) -> Any:
        return self.client.call(AGENT, method, **fields)

    def refused(self, method: str, /, **fields: Any) -> ttrpc.StatusError:
        with pytest.raises(ttrpc.StatusError) as refused:
            self.call(method, **fields)
        return refused.value

    def mount(self, *storages: Storage) -> None:
        self.call("CreateSandbox", storages=storages)

    def refuses(self, *storages: Storage) -> ttrpc.StatusError:
        return self.refused("CreateSandbox", storages=storages)

    def inside(self, *argv: str) -> str:
        return inside(self.process, *argv)

    def path(self, path: str) -> Path:
        """The same file, seen from here."""
        return self.root / path.lstrip("/")

    def mounts(self) -> dict[str, list[str]]:
        """What was mounted below /run since the agent began, by place: options, type, options of the filesystem."""
        found = {}
        for line in (self.root.parent / "mountinfo").read_text().splitlines():
            before, _, after = line.partition(" - ")
            place = before.split()[4]
            if place.startswith("/run/") and not place.startswith(("/run/cgroup", "/run/sandbox-ns", *self.before)):
                found[place] = [before.split()[5], after.split()[0], after.split()[-1]]
        return found


@pytest.fixture(scope="module")
def only_agent(sanitized_agent: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Agent]:
    with contained(sanitized_agent, tmp_path_factory.mktemp("storage") / "log") as (client, process):
        yield Agent(client, process)


@pytest.fixture
def agent_(only_agent: Agent) -> Iterator[Agent]:
    """One agent for all, and nothing in its /run that a test before has left."""
    yield only_agent
    only_agent.mount()
    only_agent.inside("sh", "-c", _CLEAN)


def test_the_agent_says_sorted_what_it_can_mount(agent_: Agent) -> None:
    details = agent_.client.guest_details().agent
    handlers = ("9p", "blk", "ephemeral", "local", "mmioblk", "nvdimm", "overlayfs", "scsi", "virtio-fs",
                "watchable-bind")  # fmt: skip
    assert details.storage_handlers == handlers
    assert details.device_handlers == ("blk", "mmioblk", "nvdimm", "scsi")


# --- ephemeral and local ---


def test_ephemeral_storage_is_a_tmpfs_with_the_options_that_were_asked_for(agent_: Agent) -> None:
    options = ["noexec", "nosuid", "nodev", "mode=1777", "size=67108864"]
    agent_.mount(ephemeral(f"{BASE}/sandbox/shm", source="shm", options=options))
    flags, kind, own = agent_.mounts()[f"{BASE}/sandbox/shm"]
    assert {"noexec", "nosuid", "nodev"} <= set(flags.split(","))
    assert kind == "tmpfs"
    assert "size=65536k" in own
    assert agent_.path(f"{BASE}/sandbox/shm").stat().st_mode & 0o7777 == 0o1777


def test_ephemeral_storage_belongs_to_its_group_and_so_does_what_is_made_in_it(agent_: Agent) -> None:
    agent_.mount(ephemeral(f"{BASE}/sandbox/volume", options=["fsgid=2000"]))
    status = agent_.path(f"{BASE}/sandbox/volume").stat()
    assert status.st_gid == 2000
    assert status.st_mode & stat.S_ISGID


def test_ephemeral_storage_is_resized_while_its_files_and_flags_stay(agent_: Agent) -> None:
    place = f"{BASE}/sandbox/shm"
    agent_.mount(ephemeral(place, options=["nosuid", "nodev", "mode=1777", "size=1048576"]))
    agent_.path(f"{place}/kept").write_text("kept")
    agent_.call("UpdateEphemeralMounts", storages=[ephemeral(place, options=["remount", "size=2097152", "fsgid=5"])])
    flags, _, own = agent_.mounts()[place]
    assert "size=2048k" in own
    assert {"nosuid", "nodev"} <= set(flags.split(","))
    assert agent_.path(f"{place}/kept").read_text() == "kept"
    assert agent_.path(place).stat().st_mode & 0o7777 == 0o1777


def test_only_ephemeral_storage_that_is_mounted_is_resized(agent_: Agent) -> None:
    agent_.mount({"driver": "local", "mount_point": f"{BASE}/sandbox/local"})
    size = ["size=4096"]
    wrong = [
        (ephemeral("/run", options=size), NOT_FOUND),
        (ephemeral(f"{BASE}/sandbox/local", options=size), NOT_FOUND),
        (ephemeral("run", options=size), INVALID_ARGUMENT),
        ({"driver": "local", "mount_point": f"{BASE}/sandbox/local", "options": size}, INVALID_ARGUMENT),
    ]
    for storage, code in wrong:
        assert agent_.refused("UpdateEphemeralMounts", storages=[storage]).code == code


def test_local_storage_is_a_directory_with_the_mode_and_group_that_were_asked_for(agent_: Agent) -> None:
    place = f"{BASE}/sandbox/storage/a/b"
    agent_.mount({"driver": "local", "mount_point": place, "options": ["mode=0770", "fsgid=77"]})
    status = agent_.path(place).stat()
    assert status.st_mode & 0o7777 == 0o2770
    assert status.st_gid == 77
    assert place not in agent_.mounts()


@pytest.mark.parametrize("option", ["mode=99", "mode=", "mode=-1", "mode=77777", "fsgid=x", "fsgid=4294967295"])
def test_a_mode_or_group_that_is_none_is_refused(only_agent: Agent, option: str) -> None:
    error = only_agent.refuses({"driver": "local", "mount_point": f"{BASE}/local", "options": [option]})
    assert error.code == INVALID_ARGUMENT
    assert not only_agent.path(f"{BASE}/local").exists()


@pytest.mark.parametrize(
    "options",
    [[], ["pagesize=2M"], ["size=2M"], ["pagesize=2M,size=1M"], ["pagesize=0", "size=0"], ["pagesize=2Q,size=2M"]],
)
def test_huge_pages_need_their_sizes(only_agent: Agent, options: list[str]) -> None:
    error = only_agent.refuses(ephemeral(f"{BASE}/huge", fstype="hugetlbfs", options=options))
    assert error.code == INVALID_ARGUMENT
    assert "pagesize=" in error.message


# --- where something may be mounted ---


@pytest.mark.parametrize(
    "place", ["", "run/x", "/", "/run", "/run/../run/x", "/proc/x", "/sys", "/dev/x", "/" + "x" * 5000]
)
def test_nothing_is_mounted_where_nothing_may_be(only_agent: Agent, place: str) -> None:
    before = only_agent.mounts()
    assert only_agent.refuses(ephemeral(place)).code == INVALID_ARGUMENT
    assert only_agent.mounts() == before


@pytest.mark.parametrize("place", ["/run/link", "/run/link/below", "/run/link/a/b"])
def test_no_mount_point_is_found_through_a_symbolic_link(agent_: Agent, place: str) -> None:
    agent_.path("/run/link").symlink_to("/var/tmp")
    agent_.path("/var/tmp/a").mkdir()
    for storage in (ephemeral(place), {"driver": "local", "mount_point": place}, bind("/var/tmp/a", place)):
        error = agent_.refuses(storage)
        assert error.code == INTERNAL
        assert place in error.message
    assert not agent_.mounts()
    assert os.listdir(agent_.path("/var/tmp")) == ["a"]
    assert os.listdir(agent_.path("/var/tmp/a")) == []


def test_var_run_is_another_name_of_run(agent_: Agent) -> None:
    agent_.mount(ephemeral("/var/run//kata-containers/./volume/"))
    assert f"{BASE}/volume" in agent_.mounts()


@pytest.mark.parametrize("driver", ["", "image_guest_pull", "erofs.multi-layer", "blk-ccw", "x" * 5000])
def test_a_driver_that_is_not_there_is_named(only_agent: Agent, driver: str) -> None:
    error = only_agent.refuses({"driver": driver, "mount_point": f"{BASE}/x"})
    assert error.code == UNIMPLEMENTED
    assert driver[:80] in error.message


def test_when_one_of_several_storages_fails_none_is_mounted(agent_: Agent) -> None:
    error = agent_.refuses(
        ephemeral(f"{BASE}/one"),
        {"driver": "local", "mount_point": f"{BASE}/one/two"},
        ephemeral(f"{BASE}/one/three", options=["such_an_option=does_not_exist"]),
    )
    assert f"{BASE}/one/three" in error.message
    assert not agent_.mounts()
    assert not agent_.path(f"{BASE}/one").exists()


def test_what_was_mounted_there_before_stays_when_a_storage_fails(agent_: Agent) -> None:
    agent_.inside("mkdir", "/run/mine")
    agent_.inside("mount", "-t", "tmpfs", "mine", "/run/mine")
    agent_.refuses(ephemeral("/run/mine", options=["such_an_option=does_not_exist"]))
    assert "/run/mine" in agent_.mounts()


def test_two_storages_of_one_kind_share_a_place_and_others_do_not(agent_: Agent) -> None:
    agent_.mount(ephemeral(f"{BASE}/one"), ephemeral(f"{BASE}/one"))
    lines = (agent_.root.parent / "mountinfo").read_text().splitlines()
    assert sum(line.split()[4] == f"{BASE}/one" for line in lines) == 1
    error = agent_.refuses(ephemeral(f"{BASE}/one"), ephemeral(f"{BASE}/one", source="another"))
    assert error.code == ALREADY_EXISTS


def test_the_end_of_a_sandbox_takes_away_what_is_stacked_and_what_is_busy(agent_: Agent) -> None:
    agent_.mount(ephemeral("/run/one"), ephemeral("/run/one/two"), ephemeral("/run/one/two/three"))
    with agent_.path("/run/one/two/busy").open("w"):
        agent_.mount()  # another sandbox: the first is at its end
        assert not agent_.mounts()
    assert not agent_.path("/run/one").exists()


# --- bind mounts and overlays ---


def test_a_bind_mount_has_the_flags_that_were_asked_for(agent_: Agent) -> None:
    agent_.path("/run/source").mkdir()
    agent_.path("/run/source/file").write_text("text")
    agent_.mount(
        bind("/run/source", "/run/bound", options=["ro", "nosuid", "noexec", "rslave"]),
        bind("/run/source/file", "/run/file", options=["ro"]),
    )
    assert {"ro", "nosuid", "noexec"} <= set(agent_.mounts()["/run/bound"][0].split(","))
    assert agent_.path("/run/bound/file").read_text() == "text"
    assert agent_.path("/run/file").read_text() == "text"
    with pytest.raises(OSError, match="Read-only"):
        agent_.path("/run/file").write_text("other")
    agent_.path("/run/source/file").write_text("still writable")


@pytest.mark.parametrize("share", ["", "/passthrough"], ids=["the Go runtime's", "runtime-rs's"])
def test_what_is_watched_is_bound_on_a_filesystem_of_its_own_where_the_share_is_read_only(
    agent_: Agent, share: str
) -> None:
    shared = f"{BASE}/shared/containers"
    agent_.path(f"/run/source{share}/watchable").mkdir(parents=True)
    for name in ("token", "certificate"):
        agent_.path(f"/run/source{share}/{name}").mkdir()
        agent_.path(f"/run/source{share}/{name}/file").write_text(name)
    watched = [
        {**bind(f"{shared}{share}/{name}", f"{shared}{share}/watchable/{name}"), "driver": "watchable-bind"}
        for name in ("token", "certificate")
    ]
    agent_.mount(bind("/run/source", shared, options=["ro"]), *watched)
    for name in ("token", "certificate"):
        assert agent_.path(f"{shared}{share}/watchable/{name}/file").read_text() == name
        agent_.path(f"/run/source{share}/{name}/file").write_text("changed")
        assert agent_.path(f"{shared}{share}/watchable/{name}/file").read_text() == "changed"
    assert agent_.mounts()[f"{shared}{share}/watchable"][1] == "tmpfs"
    assert os.listdir(agent_.path(f"/run/source{share}/watchable")) == []
    error = agent_.refuses({**watched[0], "fstype": "ext4"})
    assert error.code == INVALID_ARGUMENT


@pytest.mark.parametrize("source", ["/run/link", "/run/link/etc", "relative", "/run/nothing"])
def test_what_is_bound_is_not_found_through_a_symbolic_link(agent_: Agent, source: str) -> None:
    agent_.path("/run/link").symlink_to("/")
    agent_.refuses(bind(source, "/run/bound"))
    assert not agent_.mounts()


def overlay(place: str, *options: str) -> Storage:
    return {"driver": "overlayfs", "source": "none", "fstype": "overlay", "mount_point": place, "options": options}


def test_an_overlay_is_made_of_its_layers_and_written_to_the_upper_one(agent_: Agent) -> None:
    for layer in ("a", "b:c", "d,e"):
        agent_.path(f"/run/layers/{layer}").mkdir(parents=True)
        agent_.path(f"/run/layers/{layer}/of").write_text(layer)
        agent_.path(f"/run/layers/{layer}/{layer}").write_text(layer)
    lower = r"lowerdir=/run/layers/b\:c:/run/layers/a:/run/layers/d\,e"
    agent_.mount(overlay("/run/all", lower, "upperdir=/run/w/upper", "workdir=/run/w/work"))
    assert {"a", "b:c", "d,e", "of"} == set(os.listdir(agent_.path("/run/all")))
    assert agent_.path("/run/all/of").read_text() == "b:c"
    agent_.path("/run/all/new").write_text("new")
    assert agent_.path("/run/w/upper/new").read_text() == "new"


@pytest.mark.parametrize(
    "options",
    [
        ["lowerdir=/run/a:/run/link/etc"],
        ["lowerdir=/run/a", "upperdir=/run/link/upper", "workdir=/run/work"],
        ["lowerdir=/run/a,upperdir=/run/upper,workdir=/run/link/work"],
        ["lowerdir=/run/a:/run/nothing"],
        ["lowerdir=a"],
        ["lowerdir=/run/../etc"],
        ["lowerdir=" + ":".join(["/run/a"] * 300)],
        ["lowerdir=" + "/x" * 4000],
        ["lowerdir=/run/a", "io.katacontainers.fs-opt.overlay-rw"],  # whose would it be
        [],
    ],
    ids=["lower", "upper", "work", "missing", "relative", "dots", "many", "long", "nobody", "none"],
)
def test_an_overlay_of_what_may_not_be_opened_is_refused(agent_: Agent, options: list[str]) -> None:
    agent_.path("/run/a").mkdir()
    agent_.path("/run/link").symlink_to("/var/tmp/")
    agent_.refuses(overlay("/run/all", *options))
    assert not agent_.mounts()
    assert os.listdir(agent_.path("/var/tmp")) == []


# --- giving a volume to its group ---


def make_tree(top: Path) -> None:
    (top / "deep/er").mkdir(parents=True)
    (top / "deep/er/file").write_text("")
    (top / "deep/er/file").chmod(0o604)
    (top / "suid").write_text("")
    (top / "suid").chmod(0o6755)
    (top / "link").symlink_to("../outside")
    os.mkfifo(top / "pipe")
    (top.parent / "outside").write_text("")
    (top.parent / "outside").chmod(0o600)


def group(number: int, policy: int = ALWAYS) -> dict[str, int]:
    return {"group_id": number, "group_change_policy": policy}


def test_a_volume_is_given_to_its_group_with_all_that_is_in_it(agent_: Agent) -> None:
    top = agent_.path("/run/source")
    top.mkdir()
    make_tree(top)
    agent_.mount(bind("/run/source", "/run/volume", fs_group=group(3000)))
    found = {name: (top / name).lstat() for name in (".", "deep", "deep/er", "deep/er/file", "suid", "pipe", "link")}
    modes = {name: status.st_mode & 0o7777 for name, status in found.items()}
    assert {name for name, status in found.items() if status.st_gid != 3000} == {"link"}
    assert modes["."] == modes["deep"] == modes["deep/er"] == 0o2775
    assert modes["deep/er/file"] == 0o664
    assert modes["suid"] == 0o775, "what a program may do is not handed on to another group"
    outside = agent_.path("/run/outside").stat()
    assert (outside.st_gid, outside.st_mode & 0o777) == (0, 0o600)


def test_a_volume_that_cannot_be_written_to_is_not_mounted_for_a_group(agent_: Agent) -> None:
    agent_.path("/run/source").mkdir()
    error = agent_.refuses(bind("/run/source", "/run/volume", fs_group=group(3000), options=["ro"]))
    assert "Read-only" in error.message
    assert not agent_.mounts()


def test_a_volume_whose_root_is_right_is_left_alone_where_that_is_the_policy(agent_: Agent) -> None:
    top = agent_.path("/run/source")
    top.mkdir()
    make_tree(top)
    os.chown(top, 0, 3000)
    top.chmod(0o2770)
    agent_.mount(bind("/run/source", "/run/volume", fs_group=group(3000, ON_ROOT_MISMATCH)))
    assert (top / "suid").stat().st_gid == 0
    agent_.mount(bind("/run/source", "/run/volume", fs_group=group(3001, ON_ROOT_MISMATCH)))
    assert (top / "suid").stat().st_gid == 3001


def test_a_volume_too_deep_to_be_given_away_is_not_mounted(agent_: Agent) -> None:
    agent_.path("/run/source").mkdir()
    agent_.inside("sh", "-c", "cd /run/source; for i in $(seq 300); do mkdir d; cd -P d; done")
    error = agent_.refuses(bind("/run/source", "/run/volume", fs_group=group(3000)))
    assert error.code == INTERNAL
    assert "/run/volume" in error.message
    assert not agent_.mounts()


def state(pid: int) -> tuple[str, str]:
    """Name and state of a process."""
    try:
        before, _, after = Path(f"/proc/{pid}/stat").read_text().rpartition(")")
    except (FileNotFoundError, ProcessLookupError):
        return "", ""
    return before.partition("(")[2], after.split()[0]


def stop_the_giver(agent_: Agent, mounting: concurrent.futures.Future[None]) -> int | None:
    """The process that gives a volume away, in the middle of it; None: it was faster than we were."""
    pid = agent_pid(agent_.process)
    while not mounting.done():
        for child in map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()):
            if state(child)[0] != "volume":
                continue
            os.kill(child, signal.SIGSTOP)  # to a zombie no less
            while (now := state(child)[1]) not in ("T", "Z", ""):
                pass
            if now == "T":
                return child
    return None


@contextlib.contextmanager
def in_the_middle(
    agent_: Agent, mount: Callable[[Storage], None] | None = None
) -> Iterator[tuple[concurrent.futures.Future[None], int]]:
    """A volume that is being given away, and the process that does it, stopped."""
    with concurrent.futures.ThreadPoolExecutor(1) as other:
        for count in (5_000, 40_000, 160_000):
            agent_.inside("sh", "-c", f"mkdir /run/source-{count}; cd /run/source-{count}; seq {count} | xargs touch")
            storage = bind(f"/run/source-{count}", "/run/volume", fs_group=group(3000))
            mounting = other.submit(mount or agent_.mount, storage)
            if (child := stop_the_giver(agent_, mounting)) is not None:
                yield mounting, child
                return
            mounting.result()
        pytest.fail("160,000 files are given away faster than a signal is sent")


def test_the_agent_answers_while_a_large_volume_is_given_away(agent_: Agent) -> None:
    with in_the_middle(agent_) as (mounting, child):
        try:
            assert agent_.client.check()
            assert not mounting.done()
        finally:
            os.kill(child, signal.SIGCONT)
        mounting.result()
    assert {path.stat().st_gid for path in agent_.path("/run/volume").iterdir()} == {3000}


def test_input_of_a_container_ends_when_it_is_closed_while_a_volume_is_given_away(
    agent_: Agent, tmp_path: Path
) -> None:
    containers = Containers(agent_.client)
    oci = description(make_root(tmp_path / "root"), process("cat"))
    names = [containers.start(oci)]
    try:
        with in_the_middle(agent_, lambda storage: names.append(containers.create(oci, storages=[storage]))) as (
            _,
            child,
        ):
            try:
                containers.call("CloseStdin", container_id=names[0])
                ending = containers.later("WaitProcess", container_id=names[0])
                assert ending.result(10).status == 0
            finally:
                os.kill(child, signal.SIGCONT)
    finally:
        for name in names:
            containers.remove(name)


def test_a_volume_whose_giver_dies_is_not_mounted(agent_: Agent) -> None:
    with in_the_middle(agent_) as (mounting, child):
        os.kill(child, signal.SIGKILL)
        with pytest.raises(ttrpc.StatusError, match="/run/volume"):
            mounting.result()
    assert not agent_.mounts()


def test_a_sandbox_that_ends_while_a_volume_is_given_away_stops_that(agent_: Agent) -> None:
    with in_the_middle(agent_) as (mounting, child):
        agent_.mount()
        with pytest.raises(ttrpc.StatusError):
            mounting.result()
        assert state(child)[1] in ("Z", "")
    assert not agent_.mounts()


def test_what_was_mounted_for_a_container_that_nobody_waited_for_ends_with_the_sandbox(agent_: Agent) -> None:
    def create(storage: Storage) -> None:
        oci = {
            "Root": {"Path": "/"},
            "Process": {"Args": ["true"], "Cwd": "/", "Capabilities": {}},
            "Linux": {"Namespaces": [{"Type": "mount"}]},
        }
        fields = {"container_id": "hasty", "exec_id": "hasty", "OCI": oci, "storages": [storage]}
        with pytest.raises(ttrpc.RpcError):
            agent_.client.call(AGENT, "CreateContainer", seconds=1, **fields)

    agent_.mount()
    with in_the_middle(agent_, create) as (creating, child):
        creating.result()
        time.sleep(0.5)  # the agent gives up a moment after we do
        assert "/run/volume" in agent_.mounts()
        agent_.mount()
        assert state(child)[1] in ("Z", "")
    assert not agent_.mounts()


# --- devices ---


@pytest.mark.parametrize(
    ("driver", "source"),
    [
        *(("blk", text) for text in ("", "xy", "20", "00.8", "0.0.0", "00/", "/00", "2//1", "1/2/3/4" * 9, "02/01 ")),
        *(("scsi", text) for text in ("", "1", "1:", ":1", "1:2:3", "x:1", "256:0", "0:16384", "-1:0")),
        *(("nvdimm", text) for text in ("", "pmem0", "/dev/vda", "/dev/../dev/pmem0", "/dev/pmem" + "0" * 200)),
        *(("mmioblk", text) for text in ("", "vda", "/etc/passwd", "/dev/null", "/dev/../etc")),
    ],
)
def test_a_place_where_no_device_can_be_is_refused_at_once(only_agent: Agent, driver: str, source: str) -> None:
    began = time.monotonic()
    error = only_agent.refuses({"driver": driver, "source": source, "fstype": "ext4", "mount_point": "/run/disk"})
    assert error.code == INVALID_ARGUMENT
    assert time.monotonic() - began < 2


def test_a_device_that_does_not_come_is_named_when_its_time_is_over(agent_: Agent) -> None:
    began = time.monotonic()
    error = agent_.refuses(
        ephemeral("/run/one"),
        {"driver": "mmioblk", "source": "/dev/not-there", "fstype": "ext4", "mount_point": "/run/disk"},
    )
    assert 2.9 < time.monotonic() - began < 8
    assert error.code == INTERNAL
    assert "/dev/not-there" in error.message
    assert not agent_.mounts()


def test_a_device_that_comes_late_is_found(agent_: Agent) -> None:
    agent_.inside("mount", "-t", "tmpfs", "tmpfs", "/dev/shm")
    inside_ = ("nsenter", f"--target={agent_pid(agent_.process)}", "--mount")
    child = subprocess.Popen([*inside_, "sh", "-c", "sleep 0.5; mknod /dev/shm/disk b 7 250"])
    began = time.monotonic()
    error = agent_.refuses({"driver": "blk", "source": "/dev/shm/disk", "fstype": "ext4", "mount_point": "/run/disk"})
    assert child.wait() == 0
    assert 0.3 < time.monotonic() - began < 2.9
    assert "cannot mount /dev/shm/disk" in error.message, "there is no such loop device, but it was tried"


def test_the_device_of_the_root_is_never_mounted_or_swapped_on(agent_: Agent) -> None:
    root = Path("/").stat().st_dev
    if os.major(root) == 0:
        pytest.skip("this machine's root is on no device")
    agent_.inside("mount", "-t", "tmpfs", "tmpfs", "/dev/shm")
    agent_.inside("mknod", "/dev/shm/root", "b", str(os.major(root)), str(os.minor(root)))
    storage = {"driver": "blk", "source": "/dev/shm/root", "fstype": "ext4", "mount_point": "/run/disk"}
    assert agent_.refuses(storage).code == PERMISSION_DENIED
    assert agent_.refused("AddSwapPath", path="/dev/shm/root").code == PERMISSION_DENIED
    assert not agent_.mounts()


def test_swap_is_only_put_on_devices(agent_: Agent) -> None:
    for path in ("", "/etc/passwd", "/dev/null", "/dev/../etc/passwd", "swap"):
        assert agent_.refused("AddSwapPath", path=path).code == INVALID_ARGUMENT
    for slots in ([], [0x20], [1, 300], list(range(31))):
        assert agent_.refused("AddSwap", PCIPath=slots).code == INVALID_ARGUMENT


# --- volumes ---


def test_the_statistics_of_a_volume_are_those_of_its_filesystem(agent_: Agent) -> None:
    agent_.mount(ephemeral("/run/volume", options=["size=1048576", "nr_inodes=100"]))
    agent_.path("/run/volume/file").write_bytes(b"x" * 300_000)
    answer = agent_.call("GetVolumeStats", volume_guest_path="/run/volume")
    size, inodes = answer.usage
    assert (size.unit, size.total, size.available + size.used) == (size.BYTES, MIB, MIB)
    assert size.used == -(-300_000 // 4096) * 4096
    assert (inodes.unit, inodes.total, inodes.used) == (inodes.INODES, 100, 2)
    assert answer.HasField("volume_condition")
    assert not answer.volume_condition.abnormal


@pytest.mark.parametrize("path", ["", "run", "/run/nothing", "/run/link", "/run/link/etc", "/run/../etc"])
def test_a_volume_that_is_none_has_no_statistics(agent_: Agent, path: str) -> None:
    agent_.path("/run/link").symlink_to("/")
    agent_.refused("GetVolumeStats", volume_guest_path=path)


def test_stale_mounts_of_the_shared_directory_are_looked_at(agent_: Agent) -> None:
    agent_.mount(ephemeral(f"{BASE}/shared/containers/a b"))
    agent_.call("RemoveStaleVirtiofsShareMounts")
    assert f"{BASE}/shared/containers/a\\040b" in agent_.mounts()


def test_volumes_are_not_resized(agent_: Agent) -> None:
    assert agent_.refused("ResizeVolume", volume_guest_path="/run", size=1).code == UNIMPLEMENTED
