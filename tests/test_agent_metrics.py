"""GetMetrics: somebody else's parser reads it, and the numbers are the kernel's."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest
from prometheus_client.parser import text_string_to_metric_families

from osbuild.agent_client import AGENT, AgentClient
from osbuild.arch import X86_64, host_arch
from tests.agent_guest import agent_pid, contained, inside

pytestmark = [
    pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc is not installed"),
    pytest.mark.skipif(host_arch() is not X86_64, reason="the agent is compiled for x86_64 only"),
]

# Families and their labels, as Kata's agent 4.1 names them. Of the last two the labels are ours.
LABELS: Final = {
    "kata_agent_scrape_count": set(),
    "kata_agent_threads": set(),
    "kata_agent_total_time": set(),
    "kata_agent_total_vm": set(),
    "kata_agent_total_rss": set(),
    "kata_agent_proc_status": {"item"},
    "kata_agent_io_stat": {"item"},
    "kata_agent_proc_stat": {"item"},
    "kata_guest_load": {"item"},
    "kata_guest_tasks": {"item"},
    "kata_guest_cpu_time": {"cpu", "item"},
    "kata_guest_vm_stat": {"item"},
    "kata_guest_netdev_stat": {"interface", "item"},
    "kata_guest_diskstat": {"disk", "item"},
    "kata_guest_meminfo": {"item"},
    "kata_guest_filesystem_bytes": {"disk", "mountpoint", "item"},
    "kata_guest_filesystem_inodes": {"disk", "mountpoint", "item"},
}
MIB: Final = 1 << 20

Samples = dict[frozenset[tuple[str, str]], float]


class Agent:
    def __init__(self, client: AgentClient, process: subprocess.Popen[bytes]) -> None:
        self.client, self.process = client, process
        self.pid = agent_pid(process)

    def text(self) -> str:
        return str(self.client.call(AGENT, "GetMetrics").metrics)

    def samples(self) -> dict[str, Samples]:
        found: dict[str, Samples] = defaultdict(dict)
        for family in text_string_to_metric_families(self.text()):
            for sample in family.samples:
                # The parser calls counters as OpenMetrics does.
                name = sample.name.removesuffix("_total") if family.type == "counter" else sample.name
                labels = frozenset(sample.labels.items())
                assert labels not in found[name], "a sample is there twice"
                found[name][labels] = sample.value
        return found

    def item(self, family: str, **labels: str) -> float:
        return self.samples()[family][frozenset(labels.items())]

    def pretend(self, path: Path, place: str) -> None:
        """Let the agent find another file in /proc."""
        seen = f"/run/{path.name}"
        Path(f"/proc/{self.pid}/root{seen}").write_bytes(path.read_bytes())
        inside(self.process, "mount", "--bind", seen, place)


@pytest.fixture(scope="module")
def agent_(sanitized_agent: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Agent]:
    with contained(sanitized_agent, tmp_path_factory.mktemp("metrics") / "log") as (client, process):
        yield Agent(client, process)


def test_the_families_and_their_labels_are_those_of_katas_agent(agent_: Agent) -> None:
    found = agent_.samples()
    for family, labels in LABELS.items():
        for sample in found.pop(family, ()):
            assert {name for name, _ in sample} == labels
    assert not found, "a family that nobody knows"


def test_each_family_says_what_it_is(agent_: Agent) -> None:
    families = {family.name: family for family in text_string_to_metric_families(agent_.text())}
    assert set(families) == set(LABELS)
    for name, family in families.items():
        assert family.documentation
        assert family.type == ("counter" if name == "kata_agent_scrape_count" else "gauge")


def test_the_text_ends_with_a_newline_and_has_no_empty_line(agent_: Agent) -> None:
    text = agent_.text()
    assert text.endswith("\n")
    assert "\n\n" not in text
    assert re.fullmatch(r"(#.*\n|[a-z_]+(\{[^\n]*\})? [0-9.e+-]+\n)+", text)


def test_scrapes_are_counted(agent_: Agent) -> None:
    first = agent_.item("kata_agent_scrape_count")
    assert agent_.item("kata_agent_scrape_count") == first + 1


def test_the_agents_numbers_are_those_of_its_process(agent_: Agent) -> None:
    found = agent_.samples()
    status = dict(
        line.split(":\t") for line in Path(f"/proc/{agent_.pid}/status").read_text().splitlines() if ":\t" in line
    )
    own = {dict(labels)["item"]: value for labels, value in found["kata_agent_proc_status"].items()}
    assert own["vmsize"] <= own["vmpeak"] <= int(status["VmPeak"].split()[0])
    assert own["vmexe"] == int(status["VmExe"].split()[0])
    assert {"vmrss", "rssanon", "voluntary_ctxt_switches"} <= set(own)
    assert found["kata_agent_threads"][frozenset()] == 1
    assert found["kata_agent_total_vm"][frozenset()] == own["vmsize"] * 1024
    times = {dict(labels)["item"]: value for labels, value in found["kata_agent_proc_stat"].items()}
    assert set(times) == {"utime", "stime", "cutime", "cstime"}
    seconds = (times["utime"] + times["stime"]) / os.sysconf("SC_CLK_TCK")
    assert found["kata_agent_total_time"][frozenset()] == pytest.approx(seconds)


def test_memory_is_in_bytes_under_katas_names(agent_: Agent) -> None:
    kernel = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    found = {dict(labels)["item"]: value for labels, value in agent_.samples()["kata_guest_meminfo"].items()}
    assert found["mem_total"] == int(kernel["MemTotal"].split()[0]) * 1024
    assert found["swap_total"] == int(kernel["SwapTotal"].split()[0]) * 1024
    assert {"active_anon", "committed_as", "s_unreclaim", "mem_available"} <= set(found)


def test_the_time_of_each_processor_is_in_milliseconds(agent_: Agent) -> None:
    before = Path("/proc/stat").read_text().splitlines()
    found = agent_.samples()["kata_guest_cpu_time"]
    after = Path("/proc/stat").read_text().splitlines()
    processors = {dict(labels)["cpu"] for labels in found}
    assert processors == {"total", *(line.split()[0][3:] for line in before if re.match(r"cpu\d", line))}
    scale = 1000 // os.sysconf("SC_CLK_TCK")
    idle = found[frozenset({("cpu", "total"), ("item", "idle")})]
    assert int(before[0].split()[4]) * scale <= idle <= int(after[0].split()[4]) * scale


def test_load_and_tasks_are_those_of_the_guest(agent_: Agent) -> None:
    found = agent_.samples()
    assert {dict(labels)["item"] for labels in found["kata_guest_load"]} == {"load1", "load5", "load15"}
    tasks = {dict(labels)["item"]: value for labels, value in found["kata_guest_tasks"].items()}
    assert 0 < tasks["cur"] <= tasks["max"]


def test_the_interfaces_of_the_agents_own_network_are_counted(agent_: Agent) -> None:
    inside(agent_.process, "ip", "link", "set", "lo", "up")
    found = agent_.samples()["kata_guest_netdev_stat"]
    assert {dict(labels)["interface"] for labels in found} == {"lo"}
    assert len(found) == 16


def test_filesystems_that_are_written_to_are_measured_once(agent_: Agent) -> None:
    found = agent_.samples()["kata_guest_filesystem_bytes"]
    status = os.statvfs("/")
    if os.major(Path("/").stat().st_dev) == 0:
        pytest.skip("this machine's root is on no device")
    totals = {dict(labels)["disk"]: value for labels, value in found.items() if ("item", "total") in labels}
    assert len(totals) == len(found) / 3
    (of_root,) = {dict(labels)["disk"] for labels in found if ("mountpoint", "/") in labels}
    assert totals[of_root] == status.f_blocks * status.f_frsize


def test_names_that_need_quoting_come_through(agent_: Agent, tmp_path: Path) -> None:
    names = (b'qu"ote', b"back\\slash", b"wide\xc3\xa9", b"wrong\xff\xc3(", b"cu\xe2\x82")
    (tmp_path / "disks").write_bytes(b"".join(b" 8 0 %s 1 2 3\n" % name for name in names))
    agent_.pretend(tmp_path / "disks", "/proc/diskstats")
    found = {dict(labels)["disk"] for labels in agent_.samples()["kata_guest_diskstat"]}
    assert found == {'qu"ote', "back\\slash", "wideé", "wrong??(", "cu??"}


def test_a_machine_with_very_many_parts_is_cut_short(agent_: Agent, tmp_path: Path) -> None:
    disk = " 8 {} sd{} " + " ".join(["18446744073709551615"] * 17) + "\n"
    (tmp_path / "disks").write_text("".join(disk.format(number, "x" * 25 + str(number)) for number in range(5000)))
    cpus = "cpu  1 2 3 4 5 6 7 8 9 10\n" + "".join(f"cpu{i} " + "1234567890 " * 10 + "\n" for i in range(8192))
    (tmp_path / "stat").write_text(cpus + "intr " + "0 " * 100_000 + "\n")
    (tmp_path / "vmstat").write_text("".join(f"nr_{'x' * 100}{number} 1\n" for number in range(50_000)))
    agent_.pretend(tmp_path / "disks", "/proc/diskstats")
    agent_.pretend(tmp_path / "stat", "/proc/stat")
    agent_.pretend(tmp_path / "vmstat", "/proc/vmstat")
    assert len(agent_.text().encode()) < MIB
    found = agent_.samples()
    assert len(found["kata_guest_diskstat"]) > 1000
    assert found["kata_guest_diskstat"][frozenset({("disk", f"sd{'x' * 25}0"), ("item", "reads")})] > 1e19


@pytest.mark.parametrize("content", [b"", b"\n\n\n", b"cpu", b"x" * 70_000, b"\0\n\xff: : :\n", b"cpu0\n1 2\n: \n"])
def test_what_makes_no_sense_in_proc_is_left_out(agent_: Agent, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "nonsense").write_bytes(content)
    for name in ("stat", "loadavg", "diskstats", "meminfo", "vmstat"):
        agent_.pretend(tmp_path / "nonsense", f"/proc/{name}")
    assert agent_.samples()["kata_agent_scrape_count"]
