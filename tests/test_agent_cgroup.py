"""The agent's cgroups: which words become which files, the kernel's version 2 itself, and limits in a booted guest.

What is written into which file is looked at in a plain directory, since hosts seldom give their controllers away; that
the kernel takes these texts and goes by them is seen in a boot.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import pytest

from osbuild import protos
from osbuild.artifacts import Initrd, Kernel
from tests.agent_container import DEV, PROC, Containers, description, process
from tests.agent_guest import booted
from tests.agent_part import answers, compile_part

_SOURCES: Final = (
    "cgroup",
    "cgroup_path",
    "cgroup_file",
    "cgroup_limits",
    "cgroup_stats",
    "cgroup_devices",
    "small_file",
)
_UNIFIED: Final = (Path("/sys/fs/cgroup/unified"), Path("/sys/fs/cgroup"))
_CONTAIN: Final = """
echo 0 >"$0/cgroup.procs" && exec unshare --mount --cgroup sh -c '
  mount -t cgroup2 cgroup2 /sys/fs/cgroup && exec "$@"' sh "$@"
"""
_IN_THE_FIRST: Final = """
echo 0 >"$0/cgroup.procs" && exec unshare --mount sh -c '
  mount -t cgroup2 cgroup2 /sys/fs/cgroup && exec "$@"' sh "$@"
"""
_NO_LIMIT: Final = 2**64 - 1
_MAY_MOUNT: Final = ("CAP_SYS_ADMIN", "CAP_DAC_OVERRIDE")


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_part("cgroup", tmp_path_factory.mktemp("cgroup"), *_SOURCES)


# --- paths ---


@pytest.mark.parametrize(
    ("asked", "path"),
    [
        ("/kata/abc", "kata/abc"),
        ("kata//abc/", "kata/abc"),
        ("/kubepods/burstable/pod1/abc", "kubepods/burstable/pod1/abc"),
        ("system.slice:kata:abc", "system.slice/kata-abc.scope"),
        (":kata:abc", "system.slice/kata-abc.scope"),
        (":: abc".replace(" ", ""), "system.slice/abc.scope"),
        ("kubepods-burstable-pod1.slice:cri-containerd:abc",
         "kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1.slice/cri-containerd-abc.scope"),
        ("-.slice:kata:abc", "kata-abc.scope"),
        ("a.slice:x:b.slice", "a.slice/b.slice"),
    ],
)  # fmt: skip
def test_a_path_lies_where_runtimes_expect_it(program: Path, asked: str, path: str) -> None:
    assert answers(program, "path", asked) == [f"ok {path}"]


@pytest.mark.parametrize(
    "asked",
    ["", "/", "..", "/kata/../..", "/kata/./abc", "/kata/a b", "/kata/a\nb", "/cgroup.procs", "/kata/memory.max",
     "/" + "x" * 256, "/x" * 300, "a--b.slice:kata:abc", "-a.slice:kata:abc", "a-.slice:kata:abc", "a:kata:abc",
     "a.slice:kata:", "../a.slice:kata:abc", "a.slice:../..:abc", "a.slice:kata:../../x", "a.slice:k/../..:x"],
)  # fmt: skip
def test_an_odd_path_is_refused(program: Path, asked: str) -> None:
    assert answers(program, "path", asked)[0].startswith("3 ")  # INVALID_ARGUMENT


# --- which text goes where ---

_FILES: Final = (
    "memory.max", "memory.low", "memory.swap.max", "cpu.weight", "cpu.max", "cpuset.cpus", "cpuset.mems", "pids.max",
    "io.weight", "io.max", "hugetlb.2MB.max", "hugetlb.2MB.rsvd.max",
)  # fmt: skip
_GIB: Final = 1 << 30


def resources(path: Path, fields: Mapping[str, Any]) -> Path:
    path.write_bytes(protos.message("grpc.LinuxResources")(**fields).SerializeToString())
    return path


def limited(
    program: Path, work: Path, fields: Mapping[str, Any], *, before: Mapping[str, str] | None = None, without: str = ""
) -> tuple[str, dict[str, str]]:
    """The answer, and what each file that was written holds."""
    home = work / "cgroup"
    home.mkdir()
    for name in _FILES:
        if name != without:
            (home / name).write_text((before or {}).get(name, "untouched"))
    first, answer = answers(program, "at", home, "limit", resources(work / "resources", fields))
    assert first == "ok"
    found = {path.name: path.read_text() for path in home.iterdir()}
    return answer, {name: text for name, text in found.items() if text != (before or {}).get(name, "untouched")}


@pytest.mark.parametrize(
    ("fields", "written"),
    [
        ({}, {}),
        ({"Memory": {}, "CPU": {}, "Pids": {}, "BlockIO": {}}, {}),
        ({"Memory": {"Limit": _GIB}}, {"memory.max": str(_GIB)}),
        ({"Memory": {"Limit": _GIB, "Swap": 3 * _GIB}}, {"memory.max": str(_GIB), "memory.swap.max": str(2 * _GIB)}),
        ({"Memory": {"Limit": _GIB, "Swap": _GIB}}, {"memory.max": str(_GIB), "memory.swap.max": "0"}),
        ({"Memory": {"Limit": _GIB, "Swap": -1}}, {"memory.max": str(_GIB), "memory.swap.max": "max"}),
        ({"Memory": {"Limit": -1}}, {"memory.max": "max", "memory.swap.max": "max"}),
        ({"Memory": {"Reservation": 5}}, {"memory.low": "5"}),
        ({"Memory": {"Kernel": 5, "KernelTCP": 5, "Swappiness": 9, "DisableOOMKiller": True}}, {}),
        ({"CPU": {"Shares": 2}}, {"cpu.weight": "1"}),
        ({"CPU": {"Shares": 1024}}, {"cpu.weight": "39"}),
        ({"CPU": {"Shares": 262144}}, {"cpu.weight": "9999"}),
        ({"CPU": {"Shares": _NO_LIMIT}}, {"cpu.weight": "9999"}),
        ({"CPU": {"Quota": 50000, "Period": 100000}}, {"cpu.max": "50000 100000"}),
        ({"CPU": {"Quota": 50000}}, {"cpu.max": "50000"}),
        ({"CPU": {"Quota": -1, "Period": 100000}}, {"cpu.max": "max 100000"}),
        ({"CPU": {"Cpus": "0-1,3", "Mems": "0"}}, {"cpuset.cpus": "0-1,3", "cpuset.mems": "0"}),
        ({"Pids": {"Limit": 7}}, {"pids.max": "7"}),
        ({"Pids": {"Limit": -1}}, {"pids.max": "max"}),
        ({"BlockIO": {"Weight": 10}}, {"io.weight": "default 1"}),
        ({"BlockIO": {"Weight": 1000}}, {"io.weight": "default 10000"}),
        ({"BlockIO": {"WeightDevice": [{"Major": 8, "Minor": 16, "Weight": 505}]}}, {"io.weight": "8:16 5000"}),
        ({"BlockIO": {"ThrottleReadBpsDevice": [{"Major": 8, "Rate": 9}]}}, {"io.max": "8:0 rbps=9"}),
        ({"BlockIO": {"ThrottleWriteIOPSDevice": [{"Major": 8, "Rate": 0}]}}, {"io.max": "8:0 wiops=max"}),
        ({"HugepageLimits": [{"Pagesize": "1GB", "Limit": 0}]}, {}),
        ({"HugepageLimits": [{"Pagesize": "2MB", "Limit": 4 << 20}]},
         {"hugetlb.2MB.max": "4194304", "hugetlb.2MB.rsvd.max": "4194304"}),
        ({"HugepageLimits": [{"Pagesize": "1GB"}, {"Pagesize": "64KB", "Limit": 1}]}, {}),  # of the host, not the guest
    ],
    ids=str,
)  # fmt: skip
def test_a_limit_becomes_the_kernels_text(
    program: Path, tmp_path: Path, fields: Mapping[str, Any], written: Mapping[str, str]
) -> None:
    assert limited(program, tmp_path, fields) == ("ok", written)


def test_a_period_alone_keeps_the_quota(program: Path, tmp_path: Path) -> None:
    found = limited(program, tmp_path, {"CPU": {"Period": 50000}}, before={"cpu.max": "30000 100000\n"})
    assert found == ("ok", {"cpu.max": "30000 50000"})


def test_a_limit_of_swap_alone_counts_from_the_memory_there_is(program: Path, tmp_path: Path) -> None:
    found = limited(program, tmp_path, {"Memory": {"Swap": 3 * _GIB}}, before={"memory.max": f"{_GIB}\n"})
    assert found == ("ok", {"memory.swap.max": str(2 * _GIB)})


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"Memory": {"Limit": _GIB, "Swap": 1}}, "below that of memory"),
        ({"Memory": {"Swap": 1}}, "needs one of memory"),
        ({"BlockIO": {"Weight": 9}}, "10 to 1000"),
        ({"HugepageLimits": [{"Pagesize": "../x", "Limit": 1}]}, "../x"),
        ({"CPU": {"RealtimeRuntime": 1}}, "realtime"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_limit_that_cannot_be_is_refused(
    program: Path, tmp_path: Path, fields: Mapping[str, Any], words: str
) -> None:
    before = {"memory.max": "max\n"}
    answer, _ = limited(program, tmp_path, fields, before=before)
    assert answer[:2] in ("3 ", "9 ")
    assert words in answer


@pytest.mark.parametrize("file", ["memory.max", "pids.max", "cpu.max", "cpuset.cpus"])
def test_a_limit_without_its_controller_is_a_failure_that_names_both(program: Path, tmp_path: Path, file: str) -> None:
    fields = {"Memory": {"Limit": 5}, "Pids": {"Limit": 5}, "CPU": {"Quota": 5000, "Cpus": "0"}}
    answer, _ = limited(program, tmp_path, fields, without=file)
    assert answer.startswith("9 ")  # FAILED_PRECONDITION
    assert file in answer
    assert f"controller {file.split('.')[0]}" in answer


# --- numbers ---


def stats_of(program: Path, files: Mapping[str, str], home: Path) -> Any:  # Any: a message
    home.mkdir()
    for name, text in files.items():
        (home / name).write_text(text)
    (_, line) = answers(program, "at", home, "stats")
    message = protos.message("grpc.CgroupStats")()
    message.ParseFromString(bytes.fromhex(line.removeprefix("ok ")))
    return message


def test_numbers_are_the_kernels_in_katas_units(program: Path, tmp_path: Path) -> None:
    stats = stats_of(
        program,
        {
            "cpu.stat": "usage_usec 30\nuser_usec 20\nsystem_usec 10\nnr_periods 4\nnr_throttled 3\nthrottled_usec 2\n",
            "memory.current": "1000\n", "memory.peak": "2000\n", "memory.max": "3000\n",
            "memory.events": "low 0\nhigh 0\nmax 7\noom 1\noom_kill 1\n",
            "memory.stat": "anon 1\nfile 500\nkernel 60\nfile_mapped 9\n",
            "memory.swap.current": "5\n", "memory.swap.max": "max\n", "memory.swap.events": "max 2\nfail 3\n",
            "pids.current": "4\n", "pids.max": "max\n",
            "io.stat": "8:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=5 dios=6\n259:1 \n",
            "hugetlb.2MB.current": "8\n", "hugetlb.2MB.events": "max 1\n", "hugetlb.2MB.rsvd.current": "9\n",
        },
        tmp_path / "cgroup",
    )  # fmt: skip
    cpu, memory = stats.cpu_stats, stats.memory_stats
    assert (cpu.cpu_usage.total_usage, cpu.cpu_usage.usage_in_usermode) == (30000, 20000)
    assert (cpu.throttling_data.periods, cpu.throttling_data.throttled_time) == (4, 2000)
    usage = memory.usage
    assert (usage.usage, usage.max_usage, usage.failcnt, usage.limit) == (1000, 2000, 7, 3000)
    assert (memory.cache, memory.kernel_usage.usage, memory.use_hierarchy) == (500, 60, True)
    assert (memory.swap_usage.usage, memory.swap_usage.failcnt, memory.swap_usage.limit) == (5, 2, _NO_LIMIT)
    assert dict(memory.stats) == {"anon": 1, "file": 500, "kernel": 60, "file_mapped": 9}
    assert (stats.pids_stats.current, stats.pids_stats.limit) == (4, 0)
    disks = [(e.major, e.minor, e.op, e.value) for e in stats.blkio_stats.io_service_bytes_recursive]
    names = ("read", "write", "rios", "wios", "dbytes", "dios")
    assert disks == [(8, 0, name, value) for value, name in enumerate(names, 1)]
    assert {size: (e.usage, e.failcnt) for size, e in stats.hugetlb_stats.items()} == {"2MB": (8, 1)}


def test_files_that_are_not_there_count_as_zeros(program: Path, tmp_path: Path) -> None:
    stats = stats_of(program, {}, tmp_path / "cgroup")
    assert stats.cpu_stats.cpu_usage.total_usage == stats.memory_stats.usage.usage == stats.pids_stats.current == 0


# --- the kernel's own, without controllers ---


@pytest.fixture
def unified() -> Iterator[Path]:
    """A cgroup of this host for the agent to be in."""
    home = next((path for path in _UNIFIED if (path / "cgroup.procs").exists()), None)
    if os.geteuid() != 0 or home is None or shutil.which("unshare") is None:
        pytest.skip("needs root, unshare, and cgroup version 2")
    own = home / f"osbuilder-test-{os.getpid()}-{time.monotonic_ns()}"
    own.mkdir()
    yield own
    for directory, _, _ in os.walk(own, topdown=False):
        Path(directory).rmdir()


def steps(program: Path, unified: Path, *words: str | Path) -> list[str]:
    return answers("sh", "-c", _CONTAIN, unified, program, *words)


def test_it_is_made_frozen_thawed_killed_and_removed(program: Path, unified: Path) -> None:
    made = steps(
        program, unified, "create", "/kata/abc", "run", "grep -qx 0::/kata/abc /proc/self/cgroup", "start",
        "sleep 100", "empty", "freeze", "frozen", "kill", "wait", "emptied", "remove", "outside",
        "test ! -e /sys/fs/cgroup/kata",
    )  # fmt: skip
    assert made == ["ok", "ok 0", "ok", "ok 0", "ok", "ok 1", "ok", "ok 137", "ok 1", "ok", "ok 0"]


def test_the_agent_makes_way_for_the_controllers(program: Path, unified: Path) -> None:
    moved = 'test -z "$(cat /sys/fs/cgroup/cgroup.procs)" && grep -qx 0::/osbuilder-agent /proc/self/cgroup'
    assert steps(program, unified, "create", "/kata/abc", "outside", moved, "remove") == ["ok", "ok 0", "ok"]


def test_one_that_is_in_use_is_not_taken_and_one_that_was_left_is_made_afresh(program: Path, unified: Path) -> None:
    first = steps(program, unified, "create", "/kata/abc", "start", "sleep 100", "create", "/kata/abc", "outside",
                  "echo 1 >/sys/fs/cgroup/kata/abc/cgroup.kill", "wait")  # fmt: skip
    assert first[2].startswith("6 ")  # ALREADY_EXISTS
    assert first[4] == "ok 137"
    left = "mkdir -p /sys/fs/cgroup/kata/abc/below/deeper && echo 3 >/sys/fs/cgroup/kata/abc/cgroup.max.depth"
    fresh = "test ! -e /sys/fs/cgroup/kata/abc/below && grep -qx 64 /sys/fs/cgroup/kata/abc/cgroup.max.depth"
    second = steps(program, unified, "outside", left, "create", "/kata/abc", "outside", fresh, "remove")
    assert second == ["ok 0", "ok", "ok 0", "ok"]


def test_what_a_container_made_below_is_removed_however_deep(program: Path, unified: Path) -> None:
    deep = "d=/sys/fs/cgroup/kata/abc; for i in $(seq 60); do d=$d/x; mkdir $d $d-side; done"
    made = steps(program, unified, "create", "/kata/abc", "outside", deep, "remove", "outside",
                 "test ! -e /sys/fs/cgroup/kata")  # fmt: skip
    assert made == ["ok", "ok 0", "ok", "ok 0"]


def test_a_container_cannot_make_cgroups_without_end(program: Path, unified: Path) -> None:
    deep = "d=/sys/fs/cgroup/kata/abc; for i in $(seq 70); do d=$d/x; mkdir $d 2>/dev/null || exit 9; done"
    assert steps(program, unified, "create", "/kata/abc", "outside", deep, "remove") == ["ok", "ok 9", "ok"]


# --- devices ---


def linux(path: Path, **fields: Any) -> Path:
    path.write_bytes(protos.message("grpc.Linux")(**fields).SerializeToString())
    return path


def rules(*words: str) -> dict[str, Any]:
    """ "+c 1:11 rw" as a rule; * is any."""
    made = []
    for word in words:
        kind, numbers, access = word[1:].split()
        major, minor = (-1 if each == "*" else int(each) for each in numbers.split(":"))
        made.append({"Allow": word[0] == "+", "Type": kind, "Major": major, "Minor": minor, "Access": access})
    return {"Devices": made}


_KMSG: Final = "exec 3</dev/kmsg"  # 1:11, which is none of the usual ones
_KMSG_BOTH: Final = "exec 3<>/dev/kmsg"
_NULL: Final = (
    "echo x >/dev/null && head -c1 /dev/urandom | grep -q . ; test -c /dev/zero && head -c1 /dev/zero >/dev/null"
)
_BLOCK: Final = "rm -f $T/n; mknod $T/n b 7 77"


@pytest.mark.parametrize(
    ("fields", "denied", "script", "works"),
    [
        ({}, "", _NULL, True),
        ({}, "", _KMSG, False),
        ({}, "", _BLOCK, False),
        ({"Resources": rules("+c 1:11 r")}, "", _KMSG, True),
        ({"Resources": rules("+c 1:11 r")}, "", _KMSG_BOTH, False),
        ({"Resources": rules("+c 1:11 rw")}, "", _KMSG_BOTH, True),
        ({"Resources": rules("+c 1:11 rw", "-c 1:11 w")}, "", _KMSG, True),
        ({"Resources": rules("+c 1:11 rw", "-c 1:11 w")}, "", _KMSG_BOTH, False),
        ({"Resources": rules("-c 1:11 rwm", "+c 1:* r")}, "", _KMSG, True),
        ({"Resources": rules("+c 1:11 r", "-a *:* rwm")}, "", _KMSG, False),
        ({"Resources": rules("-a *:* rwm")}, "", _NULL, True),
        ({"Resources": rules("+b 1:11 rwm")}, "", _KMSG, False),
        ({"Resources": rules("+a *:* rwm")}, "", _BLOCK, True),
        ({"Resources": rules("+a *:* rwm")}, "8:0,7:77", _BLOCK, False),
        ({"Resources": rules("+b 7:77 rwm")}, "7:77", _BLOCK, False),
        ({"Resources": rules("+b 7:77 m")}, "7:78", _BLOCK, True),
        ({"Devices": [{"Path": "/dev/kmsg", "Type": "c", "Major": 1, "Minor": 11}]}, "", _KMSG_BOTH, True),
        ({"Devices": [{"Path": "/dev/x", "Type": "b", "Major": 7, "Minor": 77}]}, "7:77", _BLOCK, False),
    ],
    ids=str,
)  # fmt: skip
def test_a_device_is_reached_if_the_rules_say_so(
    program: Path, unified: Path, tmp_path: Path, fields: Mapping[str, Any], denied: str, script: str, works: bool
) -> None:
    asked = linux(tmp_path / "linux", **fields)
    script = f"T={tmp_path}; {script}"
    assert subprocess.run(["sh", "-c", script], check=False).returncode == 0, "it works without a fence"
    *_, found, _ = steps(program, unified, "create", "/kata/abc", "devices", asked, denied, "run", script, "remove")
    assert (found == "ok 0") is works


def test_what_is_said_later_replaces_what_was_said(program: Path, unified: Path, tmp_path: Path) -> None:
    none = linux(tmp_path / "none")
    kmsg = linux(tmp_path / "kmsg", Resources=rules("+c 1:11 r"))
    found = steps(program, unified, "create", "/a/b", "devices", none, "", "run", _KMSG, "devices", kmsg, "", "run",
                  _KMSG, "devices", none, "", "run", _KMSG, "remove")  # fmt: skip
    assert [line == "ok 0" for line in found[2:7:2]] == [False, True, False]


@pytest.mark.parametrize("rule", ["+x 1:1 r", "+c 1:1 z", f"+c {2**40}:1 r"])
def test_a_rule_that_says_nothing_is_refused(program: Path, unified: Path, tmp_path: Path, rule: str) -> None:
    asked = linux(tmp_path / "linux", Resources=rules(rule))
    assert steps(program, unified, "create", "/a/b", "devices", asked, "", "remove")[1].startswith("3 ")


def test_five_hundred_rules_are_taken_and_more_are_refused(program: Path, unified: Path, tmp_path: Path) -> None:
    many = linux(tmp_path / "many", Resources=rules(*(f"{'+-'[i % 2]}c {i + 10}:{i} rw" for i in range(510))))
    more = linux(tmp_path / "more", Resources=rules(*(f"+c {i + 10}:{i} rw" for i in range(513))))
    found = steps(program, unified, "create", "/a/b", "devices", many, "", "devices", more, "", "remove")
    assert found[1] == "ok"
    assert found[2].startswith("8 ")  # RESOURCE_EXHAUSTED


def test_what_is_denied_to_all_is_said_once_and_by_the_last_who_said_it(
    program: Path, unified: Path, tmp_path: Path
) -> None:
    """However often it is said, and by an agent after another one as well."""
    asked = linux(tmp_path / "linux", Resources=rules("+a *:* rwm"))
    other = f"T={tmp_path}; {_BLOCK.replace('7 77', '7 78')}"
    this = f"T={tmp_path}; {_BLOCK}"
    first = steps(program, unified, "create", "/a/b", "devices", asked, "", "guards", "deny", "", "guards",
                  "run", this, "deny", "7:77", "deny", "7:77", "guards", "run", this, "run", other,
                  "remove")  # fmt: skip
    second = steps(program, unified, "guards", "create", "/a/c", "devices", asked, "", "deny", "7:77", "guards",
                   "deny", "8:0,7:78", "guards", "run", this, "run", other, "remove")  # fmt: skip
    assert first == ["ok", "ok", "ok 0", "ok", "ok 0", "ok 0", "ok", "ok", "ok 1", "ok 1", "ok 0", "ok"]
    assert second == ["ok 1", "ok", "ok", "ok", "ok 1", "ok", "ok 1", "ok 0", "ok 1", "ok"]


def test_by_hand_on_a_host_nothing_is_denied_to_all_of_it(program: Path, unified: Path) -> None:
    """It would stay, and the host would not come to its own disk any more. No host has a loop device of that number."""
    if (unified.parent / "cgroup.type").exists():
        pytest.skip("this is a container, which has no first cgroup")
    words = (program, "guards", "deny", "7:1048575", "guards")
    before, said, denied, after = answers("sh", "-c", _IN_THE_FIRST, unified.parent, *words)
    assert "the root disk is guarded in each container only" in said
    assert (denied, after) == ("ok", before)
    assert steps(program, unified, *words[1:]) == ["ok 0", "ok", "ok 1"], "elsewhere it is"


# --- in a guest, where all controllers are ---


@pytest.fixture(scope="module")
def guest(kernel: Kernel, busybox_initrd: Initrd, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Containers]:
    with booted(kernel, busybox_initrd, tmp_path_factory.mktemp("guest")) as client:
        yield Containers(client)
        client.destroy_sandbox()


def looked_up(guest: Containers, name: str, *files: str) -> list[str]:
    """What files of a container's cgroup say: it is the root of what is seen from inside."""
    mounted = "test -e /mnt/cgroup.procs || { mkdir -p /mnt; mount -t cgroup2 none /mnt; }"
    script = f"{mounted}; cd /mnt; for f; do tr '\\n' ' ' <$f; echo; done"
    status, text = guest.run_in(name, "sh", "-c", script, "sh", *files, capabilities=_MAY_MOUNT)
    assert status == 0, text
    return [line.strip() for line in text.splitlines()]


@pytest.mark.boot
def test_in_a_guest_the_kernel_takes_every_limit(guest: Containers) -> None:
    about = {
        "CgroupsPath": "/kata/all",
        "Resources": {
            "Memory": {"Limit": 32 << 20, "Swap": 48 << 20, "Reservation": 1 << 20},
            "CPU": {"Shares": 1024, "Quota": 50000, "Period": 100000, "Cpus": "0", "Mems": "0"},
            "Pids": {"Limit": 20},
        },
    }
    files = ("memory.max", "memory.swap.max", "memory.low", "cpu.weight", "cpu.max", "cpuset.cpus", "pids.max")
    sleeper = process("sleep", "1000", capabilities=_MAY_MOUNT)
    name = guest.start(description(Path("/"), sleeper, linux=about, mounts=[PROC, DEV]))
    try:
        found = looked_up(guest, name, *files)
        assert found == [str(32 << 20), str(16 << 20), str(1 << 20), "39", "50000 100000", "0", "20"]
        guest.call(
            "UpdateContainer", container_id=name, resources={"Memory": {"Limit": 40 << 20}, "CPU": {"Quota": -1}}
        )
        assert looked_up(guest, name, "memory.max", "cpu.max") == [str(40 << 20), "max 100000"]
    finally:
        guest.remove(name)


@pytest.mark.boot
def test_in_a_guest_a_value_the_kernel_refuses_is_named_with_its_file(guest: Containers) -> None:
    about = {"CgroupsPath": "/kata/wrong", "Resources": {"CPU": {"Cpus": "4000"}}}
    with pytest.raises(Exception, match=r"4000.*cpuset\.cpus"):
        guest.create(description(Path("/"), process("sleep", "1"), linux=about, mounts=[PROC, DEV]))
