"""Images and containers that mean harm: nothing of the guest outside the container is reached or changed."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from osbuild import command
from osbuild.artifacts import Initrd, Kernel
from osbuild.ttrpc import StatusError
from tests.agent_container import DEV, PROC, PTS, SYS, Containers, Message, description, make_root, process
from tests.agent_guest import agent_pid, booted, contained, inside
from tests.agent_program import BUSYBOX

pytestmark = [
    pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc is not installed"),
    pytest.mark.skipif(not BUSYBOX.exists(), reason="a static busybox is not installed"),
]

Pod = tuple[Containers, "subprocess.Popen[bytes]"]
MASKED: Final = ["/proc/kcore", "/proc/keys", "/proc/cpuinfo", "/proc/driver", "/proc/absent", "/sys/firmware"]
READ_ONLY: Final = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"]
ALL: Final = ("CAP_SYS_ADMIN", "CAP_SYS_CHROOT", "CAP_DAC_OVERRIDE", "CAP_DAC_READ_SEARCH", "CAP_FOWNER", "CAP_KILL",
              "CAP_MKNOD", "CAP_SETUID", "CAP_SETGID")  # fmt: skip


@pytest.fixture(scope="module")
def pod(sanitized_agent: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pod]:
    with contained(sanitized_agent, tmp_path_factory.mktemp("agent") / "log") as (client, started):
        yield Containers(client), started


@pytest.fixture
def containers(pod: Pod) -> Containers:
    return pod[0]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return make_root(tmp_path / "root")


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A directory beside the container's root that nothing may touch."""
    path = tmp_path / "outside"
    path.mkdir()
    (path / "secret").write_text("secret")
    return path


def replace(path: Path, target: str) -> None:
    """A link in the place of what is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif path.exists():
        path.unlink()
    path.symlink_to(target)


def climb(outside: Path) -> str:
    """As many steps up as lead to the guest's root from anywhere, and down to that directory."""
    return "../" * 30 + str(outside).lstrip("/")


# --- images full of links ---


@pytest.mark.parametrize("way", ["absolute", "relative"])
@pytest.mark.parametrize("place", ["dev", "etc", "mnt", "home"])
def test_a_link_of_the_image_leads_a_mount_nowhere_but_into_the_container(
    containers: Containers, root: Path, outside: Path, place: str, way: str
) -> None:
    replace(root / place, str(outside) if way == "absolute" else climb(outside))
    mounts: list[Message] = [
        PROC, DEV,
        {"destination": f"/{place}/sub", "type": "tmpfs", "source": "tmpfs"},
        {"destination": f"/{place}/file", "type": "bind", "source": str(BUSYBOX), "options": ["bind", "ro"]},
    ]  # fmt: skip
    containers.run(description(root, process("true", Cwd=f"/{place}/made"), mounts=mounts))
    assert sorted(path.name for path in outside.iterdir()) == ["secret"]


@pytest.mark.parametrize("target", ["/", "/etc", "../../..", "/dev"])
@pytest.mark.parametrize("place", ["proc", "sys"])
def test_the_kernels_trees_are_mounted_on_directories_only(
    containers: Containers, root: Path, place: str, target: str
) -> None:
    replace(root / place, target)
    with pytest.raises(StatusError, match=f"no place to mount on at /{place}"):
        containers.create(description(root, process("true"), mounts=[PROC, SYS, DEV]))


@pytest.mark.parametrize("target", ["/proc/sysrq-trigger", "/proc/self/attr/exec", "proc/sys/kernel/hostname"])
def test_a_mount_is_not_led_into_procfs_by_a_link(containers: Containers, root: Path, target: str) -> None:
    replace(root / "etc/hosts", target if target[0] == "/" else f"../{target}")
    mounts = [PROC, DEV, {"destination": "/etc/hosts", "type": "bind", "source": str(BUSYBOX), "options": ["bind"]}]
    with pytest.raises(StatusError, match="no place to mount on at /etc/hosts"):
        containers.create(description(root, process("true"), mounts=mounts))


@pytest.mark.parametrize("link", ["/proc/self/cwd", "/proc/self/root", "/proc/self/fd/5", "/proc/1/root"])
@pytest.mark.parametrize("place", ["etc/hosts", "srv"])
def test_a_link_of_procfs_leads_nowhere(containers: Containers, root: Path, place: str, link: str) -> None:
    replace(root / place, link + "/tmp/x")
    mounts = [PROC, DEV, {"destination": f"/{place}", "type": "bind", "source": str(BUSYBOX), "options": ["bind"]}]
    with pytest.raises(StatusError, match="Too many levels of symbolic links"):
        containers.create(description(root, process("true"), mounts=mounts))


def test_devices_are_made_in_the_container_whatever_its_dev_is(
    containers: Containers, root: Path, outside: Path
) -> None:
    replace(root / "dev", str(outside))
    device = {"Path": "/dev/x/y", "Type": "c", "Major": 1, "Minor": 3}
    replace(root / "srv", climb(outside))
    other = {"Path": "/srv/z", "Type": "c", "Major": 1, "Minor": 3}
    containers.run(description(root, process("true"), mounts=[PROC, DEV], linux={"Devices": [device, other]}))
    assert sorted(path.name for path in outside.iterdir()) == ["secret"]


def test_names_are_not_looked_up_in_the_guests_files(containers: Containers, root: Path, outside: Path) -> None:
    (outside / "passwd").write_text("intruder:x:77:77::/:/bin/sh\n")
    replace(root / "etc/passwd", climb(outside / "passwd"))
    with pytest.raises(StatusError, match="no user intruder"):
        containers.create(description(root, process("true")), string_user={"uid": "intruder"})


@pytest.mark.parametrize("kind", ["fifo", "device", "directory"])
def test_a_passwd_that_is_no_file_holds_up_nobody(containers: Containers, root: Path, kind: str) -> None:
    passwd = root / "etc/passwd"
    passwd.unlink()
    if kind == "fifo":
        os.mkfifo(passwd)
    elif kind == "device":
        passwd.symlink_to("/dev/zero")
    else:
        passwd.mkdir()
    assert containers.run(description(root, process("true")))[0] == 0


def test_the_source_of_a_mount_is_no_link_that_a_container_made(pod: Pod, root: Path, outside: Path) -> None:
    containers, started = pod
    inside(started, "mkdir", "-p", "/run/kata-containers/shared/volume")
    inside(started, "ln", "-sfn", str(outside), "/run/kata-containers/shared/volume/sub")
    source = "/run/kata-containers/shared/volume/sub/secret"
    mounts = [PROC, {"destination": "/x", "type": "bind", "source": source, "options": ["bind"]}]
    with pytest.raises(StatusError, match="Too many levels of symbolic links"):
        containers.create(description(root, process("true"), mounts=mounts))


# --- leaked descriptors, and the agent's own program ---


@pytest.mark.parametrize("number", range(3, 12))
def test_no_working_directory_is_a_leaked_descriptor(containers: Containers, root: Path, number: int) -> None:
    for cwd in (f"/proc/self/fd/{number}", "/proc/self/cwd"):
        with pytest.raises(StatusError, match="cannot change to the directory"):
            containers.start(description(root, process("true", Cwd=cwd)))
    replace(root / "srv", f"/proc/self/fd/{number}/../..")
    with pytest.raises(StatusError, match="cannot change to the directory"):
        containers.start(description(root, process("true", Cwd="/srv")))


def test_a_process_has_no_descriptors_but_its_three(containers: Containers, root: Path) -> None:
    first = process("sh", "-c", "ls /proc/$$/fd; read x")
    name = containers.start(description(root, first))
    assert containers.call("ReadStdout", container_id=name, len=100).data.split() == [b"0", b"1", b"2"]
    assert containers.run_in(name, "sh", "-c", "ls /proc/$$/fd; true")[1].split() == ["0", "1", "2"]
    containers.remove(name)


def test_a_container_that_waits_to_be_started_holds_nothing_of_the_agent(pod: Pod, root: Path) -> None:
    containers, started = pod
    name = containers.create(description(root, process("true")))
    pid = agent_pid(started)
    child = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[-1]
    held = {str(link.readlink()) for link in Path(f"/proc/{child}/fd").iterdir()}
    agents = {str(link.readlink()) for link in Path(f"/proc/{pid}/fd").iterdir()}
    assert {name for name in held & agents if name.startswith("socket:")} == set()
    containers.remove(name)


def test_the_agents_program_is_not_run_by_a_link_to_it(containers: Containers, root: Path) -> None:
    replace(root / "bin/agent", "/proc/self/exe")
    name = containers.start(description(root, process("sleep", "1000")))
    for words in (["/proc/self/exe"], ["agent"], ["/bin/agent"]):
        with pytest.raises(StatusError, match=r"cannot execute .*: Too many levels of symbolic links"):
            containers.execute(name, *words)
    containers.remove(name)


# --- what is hidden ---


@pytest.fixture
def hidden(root: Path) -> Message:
    return description(root, process("sleep", "1000", capabilities=ALL), mounts=[PROC, DEV, PTS, SYS],
                       linux={"MaskedPaths": MASKED, "ReadonlyPaths": READ_ONLY})  # fmt: skip


def test_who_may_trace_does_not_get_at_the_guests_root_by_a_process_that_is_being_made(
    containers: Containers, root: Path, outside: Path
) -> None:
    """It may look into every process of its PID namespace, also into one that is not its container's yet."""
    look = f"if [ -e /proc/$n/root{outside}/secret ]; then echo seen; exec sleep 1000; fi"
    script = f"n=1; while :; do n=$((n % 60 + 2)); {look}; done"
    watcher = process("sh", "-c", script, capabilities=(*ALL, "CAP_SYS_PTRACE"))
    name = containers.start(description(root, watcher))
    for _ in range(40):
        containers.wait(name, containers.execute(name, "true"))
    containers.call("SignalProcess", container_id=name, signal=9)
    assert containers.read(name) == b""
    containers.remove(name)


def test_masked_paths_are_empty_and_read_only_paths_cannot_be_written(containers: Containers, hidden: Message) -> None:
    name = containers.start(hidden)
    script = (
        "cat /proc/cpuinfo; ls -A /proc/driver; ls -A /sys/firmware; "
        "echo x 2>/dev/null >/proc/sys/kernel/hostname || echo refused; "
        "touch 2>/dev/null /sys/firmware/x || echo refused"
    )
    assert containers.run_in(name, "sh", "-c", script, capabilities=ALL) == (0, "refused\nrefused\n")
    containers.remove(name)


@pytest.mark.parametrize("target", ["/dev/zero", "/etc/passwd", "/proc/self/mem"])
def test_an_image_with_another_dev_null_masks_with_the_real_one(
    containers: Containers, root: Path, hidden: Message, target: str
) -> None:
    replace(root / "dev/null", target)
    hidden["Mounts"] = [PROC, SYS]
    name = containers.start(hidden)
    assert containers.run_in(name, "sh", "-c", "stat -c %t,%T /proc/cpuinfo; cat /proc/cpuinfo") == (0, "1,3\n")
    containers.remove(name)


def test_what_is_masked_below_proc_must_be_the_kernels(containers: Containers, root: Path, hidden: Message) -> None:
    (root / "srv").mkdir()
    mounts = [PROC, {"destination": "/proc/fs", "type": "bind", "source": str(root / "srv"), "options": ["bind"]}]
    hidden["Mounts"] = mounts
    with pytest.raises(StatusError, match="/proc/fs of the container is not the kernel's"):
        containers.create(hidden)


# --- what a container may do ---


def test_the_guests_tree_cannot_be_seen_from_inside(containers: Containers, root: Path, outside: Path) -> None:
    script = f"cat /proc/mounts; cd /; cat {climb(outside)}/secret; umount -l /; ls {outside}"
    status, text = containers.run(description(root, process("sh", "-c", script, capabilities=ALL)))
    assert status != 0
    assert "secret" not in text.replace("/secret", "")
    assert [line.split()[1] for line in text.splitlines() if line.count(" ") == 5] == ["/", "/proc", "/dev", "/dev/pts"]


def test_a_mount_of_a_container_is_seen_by_nobody_else(pod: Pod, root: Path) -> None:
    containers, started = pod
    before = inside(started, "cat", "/proc/self/mountinfo")
    first = process("sh", "-c", "mount -t tmpfs tmpfs /tmp && echo done", capabilities=ALL)
    assert containers.run(description(root, first))[1] == "done\n"
    assert inside(started, "cat", "/proc/self/mountinfo") == before


def test_a_container_makes_no_device_and_reaches_no_block_device(containers: Containers, root: Path) -> None:
    first = process("sh", "-c", "mknod /tmp/x b 254 0; mknod /tmp/y c 1 3; ls /tmp", capabilities=ALL)
    text = containers.run(description(root, first))[1]
    assert text.count("Operation not permitted") == 2
    disk = Path("/").stat().st_dev
    node = {"Path": "/dev/disk", "Type": "b", "Major": os.major(disk), "Minor": os.minor(disk)}
    with pytest.raises(StatusError, match="PERMISSION_DENIED"):
        containers.create(description(root, process("true"), linux={"Devices": [node]}))
    allowed = {"io.osbuilder.allow-mknod": "true"}
    script = f"mknod /tmp/d b {os.major(disk)} {os.minor(disk)} || echo refused; head -c 1 /tmp/d || echo refused"
    oci = description(root, process("sh", "-c", script, capabilities=ALL), Annotations=allowed)
    assert containers.run(oci)[1].count("refused") == 2


@pytest.fixture
def attacker(tmp_path: Path, root: Path) -> str:
    """The program of tests/attackers that takes off what its cgroup denies, in the container's root."""
    source = Path(__file__).parent / "attackers/root_device.c"
    command.run("gcc", "-static", "-O1", str(source), "-o", str(root / "bin/attacker"))
    return "/bin/attacker"


def test_who_takes_off_what_its_cgroup_denies_still_does_not_reach_the_root(
    containers: Containers, root: Path, attacker: str
) -> None:
    disk = Path("/").stat().st_dev
    if os.major(disk) == 0:
        pytest.skip("this machine's root is on no device")
    numbers = f"{os.major(disk)}:{os.minor(disk)}"
    first = process(attacker, numbers, "7:77", capabilities=ALL)
    allowed = {"io.osbuilder.allow-mknod": "true"}
    status, text = containers.run(description(root, first, Annotations=allowed))
    refused = "mknod: Operation not permitted"
    assert status == 0, text
    before, other_before, detached, after, other_after = text.splitlines()
    assert (before, other_before) == (f"before {numbers}: {refused}", f"before 7:77: {refused}")
    assert detached == "detached 1"
    assert "not permitted" not in other_after, "its own cgroup denies nothing any more"
    assert after == f"after {numbers}: {refused}"


def test_processes_of_one_container_are_not_seen_in_another(containers: Containers, root: Path) -> None:
    name = containers.start(description(root, process("sleep", "987")))
    text = containers.run(description(root, process("ps")))[1]
    containers.remove(name)
    assert "987" not in text
    assert len(text.splitlines()) == 2


# --- in a guest: the agent is PID 1 and its root an initramfs, which pivot_root cannot leave ---


MAKE_ROOT: Final = """
mkdir -p /srv/root/bin /srv/root/proc /srv/root/etc && cp /bin/busybox /srv/root/bin/busybox && cd /srv/root/bin &&
for name in sh cat ls grep sleep mknod umount chroot mount head dd sysctl; do ln -s busybox $name; done
printf '#!/proc/self/exe\\n' >evil; chmod 755 evil
"""


@pytest.fixture(scope="module")
def guest(kernel: Kernel, busybox_initrd: Initrd, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Containers]:
    """A guest in which /srv/root can be a container's root."""
    with booted(kernel, busybox_initrd, tmp_path_factory.mktemp("guest")) as client:
        containers = Containers(client)
        made = process("sh", "-c", MAKE_ROOT, capabilities=ALL)
        assert containers.run(description(Path("/"), made, mounts=[PROC, DEV])) == (0, "")
        yield containers
        client.destroy_sandbox()


IN_GUEST: Final = Path("/srv/root")


@pytest.mark.boot
def test_in_a_guest_the_initramfs_cannot_be_seen_from_inside(guest: Containers) -> None:
    script = "cat /proc/mounts; ls /; ls /../..; umount -l /; ls /sbin/init; chroot .. ls /sbin; ls /proc/1/root/sbin"
    _, text = guest.run(description(IN_GUEST, process("sh", "-c", script, capabilities=ALL)))
    mounts = [line.split()[1] for line in text.splitlines() if line.endswith(" 0 0")]
    assert mounts == ["/", "/proc", "/dev", "/dev/pts"]
    assert "init" not in text.replace("/sbin/init: No such", "")


@pytest.mark.boot
def test_in_a_guest_the_container_on_its_root_sees_none_of_its_mounts(guest: Containers) -> None:
    script = "cut -d' ' -f2 /proc/mounts; ls -A /run /sys"
    status, text = guest.run(description(Path("/"), process("sh", "-c", script), mounts=[PROC, DEV]))
    assert (status, text) == (0, "/\n/proc\n/dev\n/run:\n\n/sys:\n")


@pytest.mark.boot
def test_in_a_guest_the_agents_program_cannot_be_written_to(guest: Containers) -> None:
    """An image whose program is an interpreter line that names /proc/self/exe, and a watcher that writes to it."""
    watcher = "while :; do for p in /proc/[0-9]*; do echo evil 2>/dev/null >$p/exe; done; done"
    name = guest.start(description(IN_GUEST, process("sh", "-c", watcher, capabilities=ALL)))
    for _ in range(5):
        guest.wait(name, guest.execute(name, "/bin/evil", capabilities=ALL))
    guest.remove(name)
    script = "head -c 4 /sbin/init"
    assert guest.run(description(Path("/"), process("sh", "-c", script), mounts=[PROC, DEV])) == (0, "\x7fELF")


@pytest.mark.boot
def test_in_a_guest_an_out_of_memory_kill_is_told_and_its_status_is_137(guest: Containers) -> None:
    event = guest.later("GetOOMEvent")
    hungry = process("dd", "if=/dev/zero", "of=/dev/null", "bs=100M", "count=1")
    about = {"Resources": {"Memory": {"Limit": 20 << 20, "Swap": 20 << 20}}}
    name = guest.start(description(IN_GUEST, hungry, linux=about))
    assert guest.wait(name) == 137
    assert event.result().container_id == name
    guest.remove(name)


@pytest.mark.boot
def test_in_a_guest_limits_are_kept_and_counted(guest: Containers) -> None:
    about = {"Resources": {"Memory": {"Limit": 20 << 20}, "Pids": {"Limit": 9}}, "CgroupsPath": "/kata/limited"}
    name = guest.start(description(IN_GUEST, process("sleep", "1000"), linux=about))
    stats = guest.call("StatsContainer", container_id=name).cgroup_stats
    assert (stats.memory_stats.usage.limit, stats.pids_stats.limit, stats.pids_stats.current) == (20 << 20, 9, 1)
    guest.call("UpdateContainer", container_id=name, resources={"Memory": {"Limit": 30 << 20}})
    stats = guest.call("StatsContainer", container_id=name).cgroup_stats
    assert stats.memory_stats.usage.limit == 30 << 20
    guest.remove(name)


@pytest.mark.boot
def test_in_a_guest_the_disk_of_its_root_is_out_of_reach_even_with_mknod(guest: Containers) -> None:
    """The numbers of RAM disks and of what could be a disk: the cgroup's rule says no before there is a driver."""
    script = "for n in 1 7 8 253 254 259; do mknod /d$n b $n 0 && echo made; head -c 1 /d$n; done"
    notes = {"io.osbuilder.allow-mknod": "true"}
    text = guest.run(description(IN_GUEST, process("sh", "-c", script, capabilities=ALL), Annotations=notes))[1]
    assert "made" not in text
    assert text.count("Operation not permitted") == 6
