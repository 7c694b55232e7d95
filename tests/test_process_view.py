"""How a process in a guest and one under Docker differ, decided from what each has seen."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Final

import pytest

from osbuild import process_view
from osbuild.process_view import differences, view

STATUS: Final = (
    "Name:\tx\nUmask:\t0022\nUid:\t1000\t1000\t1000\t1000\nGid:\t5\t5\t5\t5\nGroups:\t5 29 \n"
    "CapInh:\t0\nCapPrm:\t0\nCapEff:\t0\nCapBnd:\t00000000a80425fb\nCapAmb:\t0\nNoNewPrivs:\t0\nSeccomp:\t2\n"
)
MOUNTS: Final = (
    "1 0 0:1 / / rw - overlay overlay rw\n"
    "2 1 0:2 / /proc rw,nosuid,nodev,noexec,relatime - proc proc rw\n"
    "3 1 0:3 / /dev rw,nosuid - tmpfs tmpfs rw,size=65536k,mode=755\n"
    "4 2 0:2 /sys /proc/sys ro,nosuid - proc proc rw\n"
    "5 2 0:4 / /proc/keys rw - tmpfs tmpfs rw\n"
    "6 1 0:5 / /a\\040b rw shared:1 - tmpfs tmpfs rw\n"
)
LIMITS: Final = (
    "Limit                     Soft Limit           Hard Limit           Units\n"
    "Max open files            1024                 4096                 files\n"
)
ANSWERS: Final = (
    STATUS, "PATH=/bin\0HOSTNAME=one\0A=\udcff\0", "/srv", "/app\0\0b\0", LIMITS, MOUNTS,
    "null c 666 1:3 \nfd l 777 0:0 /proc/self/fd\n", "keys - 400 0:0 \nsys d 555 0:0 \n", "firmware d 555 0:0 \n",
)  # fmt: skip


def seen() -> dict[str, Any]:
    return view([answer.encode(errors="surrogateescape") for answer in ANSWERS])


def test_what_the_probe_answers_is_read() -> None:
    found = seen()
    assert len(ANSWERS) == len(process_view.QUESTIONS)
    assert (found["uid"], found["gid"], found["groups"], found["umask"]) == (1000, 5, [5, 29], "0022")
    assert found["env"] == ["A=\udcff", "HOSTNAME=one", "PATH=/bin"]
    assert found["args"] == ["/app", "", "b"]
    assert found["limits"] == {"Max open files": ["1024", "4096"]}
    assert found["mounts"]["/dev"] == ["tmpfs", "nosuid", "rw", "mode=755", "size=65536k"]
    assert "/a b" in found["mounts"]
    assert found["there"] == ["/proc/keys", "/proc/sys", "/sys/firmware"]


def test_what_an_engine_or_a_machine_chooses_is_no_difference() -> None:
    guest = seen()
    guest["env"].remove("HOSTNAME=one")
    guest["capabilities"]["CapBnd"] &= ~(1 << 27)
    guest["dev"]["probe"] = "probe d 755 0:0 "
    guest |= {"seccomp": 0, "limits": {}}
    guest["mounts"]["/"] = ["rootfs", "rw"]
    del guest["mounts"]["/proc/keys"]
    guest["there"].remove("/proc/keys")
    assert differences(guest, seen(), ours=("probe",)) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda guest: guest["args"].pop(), "args: "),
        (lambda guest: guest["env"].append("B=1"), "env: "),
        (lambda guest: guest["ids"].__setitem__(3, 0), "ids: "),
        (lambda guest: guest["groups"].remove(5), "groups: [29], under Docker [5, 29]"),
        (lambda guest: guest.update(cwd="/"), "cwd: /, under Docker /srv"),
        (lambda guest: guest.update(umask="0077"), "umask: 0077"),
        (lambda guest: guest.update(no_new_privs=1), "no_new_privs: 1"),
        (lambda guest: guest["capabilities"].update(CapEff=1), "CapEff: 1"),
        (lambda guest: None, "CapBnd: "),
        (lambda guest: guest["dev"].pop("fd"), "/dev/fd: nothing, under Docker fd l 777"),
        (lambda guest: guest["dev"].update(kmsg="kmsg c 600 1:11"), "/dev/kmsg: kmsg c 600 1:11, under Docker n"),
        (lambda guest: guest["mounts"]["/dev"].remove("nosuid"), "mount of /dev: "),
        (lambda guest: guest["mounts"].pop("/proc/keys"), "/proc/keys: open, under Docker hidden"),
        (lambda guest: guest["mounts"].pop("/proc/sys"), "/proc/sys: open, under Docker read-only"),
        (lambda guest: guest["mounts"].update({"/proc/sys": ["proc", "rw"]}), "/proc/sys: open, under"),
    ],
)  # fmt: skip
def test_each_difference_is_told(change: Callable[[dict[str, Any]], object], said: str) -> None:
    docker = seen()
    guest = copy.deepcopy(docker)
    if not said.startswith("CapBnd"):  # a guest with CAP_MKNOD has one too many
        guest["capabilities"]["CapBnd"] &= ~(1 << 27)
    change(guest)
    (found,) = differences(guest, docker)
    assert found.startswith(said)
