"""The check of what a guest shows of its machine: in guests of several sizes, with a JVM, and beside Docker's."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import tarfile
from pathlib import Path
from typing import Any, Final

import pytest

from osbuild import ordinary_container, pipeline, probe, smoke
from osbuild.arch import ARCHES, MIB, X86_64, Arch
from osbuild.artifacts import DiskImage, File, Initrd, Kernel
from osbuild.cache import default_cache
from osbuild.checks import resources
from osbuild.elf import read_elf
from osbuild.errors import HostError
from osbuild.findings import NotHere, Wrong
from osbuild.report import Check, SmokeReport, Verdict
from osbuild.runtime.base import Machine
from osbuild.tree import Bytes
from osbuild.ttrpc import ProtocolError
from tests.boot_fixtures import boot_kernel, boot_rootfs, good_initrd

__all__ = ["boot_kernel", "boot_rootfs", "good_initrd"]  # fixtures

SECONDS: Final = 240.0


def check(report: SmokeReport, name: str) -> Check:
    (found,) = [check for check in report.checks if check.name == name]
    return found


def machine(**more: Any) -> Machine:
    file = File(path=Path("/x"), size=1 << 20, sha256="")
    kernel = Kernel(
        vmlinux=file, vmlinuz=file, config=file, release="6.12", arch="x86_64", key="", cached=True
    )  # fmt: skip
    root = Initrd(file=file, compression="none", unpacked=1)
    wanted: dict[str, Any] = {"kernel": kernel, "root": root, "memory_mib": 2048, "cpus": 2}
    return Machine(**wanted | more)


# Guests


@pytest.mark.boot
@pytest.mark.parametrize(("memory", "cpus"), [(2048, 2), (192, 1), (512, 3)])
def test_a_guest_shows_the_machine_that_it_was_given(
    memory: int, cpus: int, boot_kernel: Kernel, good_initrd: Initrd, tmp_path: Path
) -> None:
    guest = Machine(kernel=boot_kernel, root=good_initrd, memory_mib=memory, cpus=cpus, accel="tcg")
    report = smoke.run(guest, tmp_path / "work", seconds=SECONDS, checks=("resources",))
    found = check(report, "resources")
    assert found.verdict is Verdict.passed, found
    seen = found.facts["guest"]
    assert {seen[name] for name in ("cpuinfo", "online", "affinity", "sysconf")} == {cpus}
    assert resources.least_kib(guest) < seen["total_kib"] < memory << 10
    assert found.facts["container"] == {"memory.max": str(memory * MIB // 2), "cpu.max": f"{cpus * 50000} 100000"}
    assert found.facts["host"]["cpus"] == os.cpu_count()


@pytest.mark.boot
def test_a_guest_that_has_less_than_it_was_given_is_found(
    boot_kernel: Kernel, good_initrd: Initrd, tmp_path: Path
) -> None:
    """Its kernel was told to leave memory and a processor alone."""
    guest = Machine(kernel=boot_kernel, root=good_initrd, memory_mib=512, cpus=2, accel="tcg")
    for words, said in (
        (("mem=256M",), "524288 KiB of memory shows"),
        (("maxcpus=1",), "2 processors shows 1 (cpuinfo)"),
    ):
        tried = dataclasses.replace(guest, words=words)
        report = smoke.run(tried, tmp_path / words[0], seconds=SECONDS, checks=("resources",))
        assert check(report, "resources").verdict is Verdict.failed
        assert said in check(report, "resources").detail


@pytest.fixture(scope="module")
def jre_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Debian's default-jre-headless, unpacked into a directory."""
    if shutil.which("mmdebstrap") is None:
        pytest.skip("mmdebstrap is not installed")
    if os.geteuid() != 0:
        pytest.skip("a tree of Debian's is unpacked by root only")
    home = tmp_path_factory.mktemp("jre")
    kept = os.environ.get("OSBUILDER_TEST_JRE")  # a tar made before
    tar = Path(kept) if kept else home / "jre.tar"
    if not kept:
        done = subprocess.run(
            ["mmdebstrap", "--quiet", "--variant=essential", "--include=default-jre-headless",
             "--dpkgopt=path-exclude=/usr/share/doc/*", "bookworm", str(tar)],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode != 0:
            pytest.skip(f"default-jre-headless cannot be fetched: {done.stderr[-300:]}")
    with tarfile.open(tar) as archive:
        archive.extractall(home / "root", filter="fully_trusted")
    return home / "root"


@pytest.mark.boot
@pytest.mark.long
@pytest.mark.parametrize(("memory", "cpus", "gc"), [(2048, 2, "G1"), (768, 1, "Serial")])
def test_a_jvm_takes_its_heap_and_its_threads_from_the_guest(
    memory: int, cpus: int, gc: str, jre_tree: Path, boot_kernel: Kernel, tmp_path: Path
) -> None:
    from osbuild.console import Show
    from osbuild.options import build_spec

    spec = build_spec(f"dir:{jre_tree}", tmp_path / "out", {}, kinds=("image",), smoke=False)
    show = Show(quiet=True)
    image = pipeline.make_image(spec, pipeline.open_rootfs(spec, default_cache(), show), tmp_path / "root.img", show)
    guest = Machine(kernel=boot_kernel, root=image, memory_mib=memory, cpus=cpus, accel="tcg")
    report = smoke.run(guest, tmp_path / "work", seconds=SECONDS, checks=("resources",))
    found = check(report, "resources")
    assert found.verdict is Verdict.passed, found
    jvm = found.facts["jvm"]
    assert (jvm["gc"], jvm["ParallelGCThreads"]) == (gc, cpus if gc == "G1" else 0)
    assert jvm["MaxHeapSize"] == pytest.approx(found.facts["guest"]["total_kib"] * 1024 / 4, rel=0.03)


# The program, here


@pytest.mark.parametrize("arch", ARCHES.values(), ids=ARCHES)
def test_the_probe_is_a_small_static_program(arch: Arch) -> None:
    try:
        path = probe.build_probe(arch, default_cache())
    except HostError as problem:
        pytest.skip(f"{problem}: {problem.hint}")
    elf = read_elf(Bytes(path.read_bytes()))
    assert elf is not None
    assert (elf.machine, elf.interpreter, elf.needed) == (arch.elf_machine, "", ())


@pytest.fixture(scope="session")
def program() -> Path:
    return probe.build_probe(X86_64, default_cache())


def ask(program: Path, *questions: tuple[str, ...]) -> list[bytes | None]:
    asked = b"".join(probe.question(*words) for words in questions)
    return probe.answers(subprocess.run([program], input=asked, capture_output=True, check=True).stdout)


def test_the_probe_sees_on_this_machine_what_python_does(program: Path) -> None:
    *texts, host = ask(program, *(("file", path) for path in resources.FILES), ("host",))
    assert host is not None
    found = resources.numbers([(text or b"").decode() for text in texts], probe.pairs(host))
    assert found["affinity"] == len(os.sched_getaffinity(0))
    assert found["sysconf"] == os.sysconf("SC_NPROCESSORS_ONLN")
    assert found["sysconf_kib"] == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >> 10


def test_the_probe_says_no_and_goes_on(program: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"what it holds\n")
    (tmp_path / "large").write_bytes(bytes(3 << 20))
    found = ask(
        program, ("nonsense",), ("file",), ("file", str(tmp_path / "none")), (), ("file", str(tmp_path / "file")),
        ("random", "33"), ("map", str(tmp_path / "file")), ("file", str(tmp_path / "large")),
        ("drain", str(tmp_path), "100000000"),
    )  # fmt: skip
    assert found[:5] == [None, None, None, None, b"what it holds\n"]
    assert [len(one) if one is not None else None for one in found[5:8]] == [33, None, 1 << 20]
    read = probe.pairs(found[8] or b"")
    assert (read["files"], read["bytes"]) == ("2", str(14 + (3 << 20)))
    assert read["largest"] == str(tmp_path / "large")


def test_the_probe_counts_a_file_of_two_names_once_and_no_holes(program: Path, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x" * (2 << 20))
    (tmp_path / "b").hardlink_to(tmp_path / "a")
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "c").hardlink_to(tmp_path / "a")
    (tmp_path / "two\nlines").write_bytes(b"y" * (3 << 20))
    with (tmp_path / "lastlog").open("wb") as file:
        file.truncate(290 << 30)
        file.seek(100 << 20)
        file.write(b"z" * (64 << 10))
    other = tmp_path / "lastlog"
    (few,) = ask(program, ("drain", str(tmp_path / "a"), "300000"))
    assert 300_000 <= int(probe.pairs(few or b"")["bytes"]) < 1 << 20, "of a file no more than it takes"
    found = ask(program, *(("drain", str(path), "1000000000") for path in (tmp_path, tmp_path, other)))
    for data, files, size in zip(found, (3, 3, 1), ((5 << 20) + 65536, (5 << 20) + 65536, 65536), strict=True):
        read = probe.pairs(data or b"")
        assert (read["files"], read["bytes"], read["unread"]) == (str(files), str(size), "0")
    assert probe.pairs(found[0] or b"")["largest"] in {str(tmp_path / name) for name in ("a", "b", "below/c")}


def test_a_path_of_any_bytes_is_asked_for_and_read_back(program: Path, tmp_path: Path) -> None:
    for name in (b"\xff\xfe", "ä\u2028\x85\x0b".encode(), b"two\nlines"):
        (tmp_path / os.fsdecode(name)).write_bytes(name)
        path = str(tmp_path / os.fsdecode(name))
        (found,) = ask(program, ("file", path))
        assert found == name
    assert probe.pairs(b"a \xff\xe2\x80\xa8\x0b\nb 1\n") == {"a": "\udcff\u2028\x0b", "b": "1"}
    for words in (("file", ""), ("file", "a\0b"), ("file", "\ud800")):
        with pytest.raises(ValueError, match=r"asked|surrogates"):
            probe.question(*words)


@pytest.mark.parametrize("line", [b"", b"\n", b"+\n", b"+1", b"1\n", b"*1\n", b"+ 1\n", b"+1\r\n", b"+1048577\n"])
def test_what_no_probe_writes_is_no_answer(line: bytes) -> None:
    assert probe.parse_head(b"-1048576\n") == (1 << 20, False)
    with pytest.raises(ProtocolError):
        probe.parse_head(line)


def test_a_question_without_an_end_or_too_long_a_one_ends_the_probe(program: Path) -> None:
    for asked in (b"file\0/etc/hostname", b"x" * 100_000):
        done = subprocess.run([program], input=asked, capture_output=True, check=False, timeout=10)
        assert (done.returncode, done.stdout) == (0, b"")


# Decisions

SEEN: Final = {
    "total_kib": 2060000, "available_kib": 2000000, "sysconf_kib": 2060000, "cpuinfo": 2, "online": 2, "affinity": 2,
    "sysconf": 2,
}  # fmt: skip


def test_what_agrees_with_the_machine_is_right() -> None:
    one = SEEN | dict.fromkeys(("cpuinfo", "online", "affinity", "sysconf"), 1)
    assert resources.judge(one, machine(cpus=1)).startswith("1 processor everywhere")
    assert "2 processors everywhere; 2011 of 2048 MiB" in resources.judge(SEEN, machine())


@pytest.mark.parametrize(
    "wrong",
    [
        {"cpuinfo": 64},
        {"online": 1},
        {"affinity": 3},
        {"sysconf": 4},
        {"total_kib": 1900000, "sysconf_kib": 1900000},
        {"total_kib": 2100000, "sysconf_kib": 2100000},
        {"sysconf_kib": 2059999},
    ],
    ids=str,
)
def test_each_number_that_is_not_the_machines_is_wrong(wrong: dict[str, int]) -> None:
    with pytest.raises(Wrong):
        resources.judge(SEEN | wrong, machine())


def test_an_nvdimms_pages_are_taken_off_a_guests_memory() -> None:
    file = File(path=Path("/i"), size=64 << 30, sha256="")
    image = DiskImage(file=file, filesystem="ext4", dax=True, words=())
    assert resources.least_kib(machine()) - resources.least_kib(machine(root=image)) == 1 << 20


@pytest.mark.parametrize(("text", "processors"), [("0", 1), ("0-3", 4), ("0,2-3,7\n", 4)])
def test_ranges_of_processors_are_counted(text: str, processors: int) -> None:
    assert resources.count(text) == processors


def test_limits_must_be_those_that_were_given() -> None:
    right = {"memory.max": str(1024 * MIB), "cpu.max": "100000 100000"}
    assert "limits" in resources.judge_limits(right, machine())
    for wrong in ({"memory.max": "max"}, {"cpu.max": "max 100000"}):
        with pytest.raises(Wrong):
            resources.judge_limits(right | wrong, machine())


@pytest.mark.parametrize(
    ("heap_mib", "gc", "threads", "guest", "right"),
    [
        (502, "G1", 2, {}, True),
        (502, "Serial", 0, {}, False),
        (502, "G1", 8, {}, False),
        (6000, "G1", 2, {}, False),
        (100, "G1", 2, {}, False),
        (187, "Serial", 0, {"cpuinfo": 1, "total_kib": 768000}, True),
        (502, "G1", 8, {"cpuinfo": 8}, True),
        (502, "G1", 8, {"cpuinfo": 9}, True),
        (502, "G1", 13, {"cpuinfo": 16}, True),
        (502, "G1", 16, {"cpuinfo": 16}, False),
        (502, "G1", 43, {"cpuinfo": 64}, True),
        (187, "G1", 1, {"cpuinfo": 1, "total_kib": 768000}, False),
    ],
)
def test_a_jvm_must_choose_for_the_guest(
    heap_mib: int, gc: str, threads: int, guest: dict[str, int], right: bool
) -> None:
    found = {"MaxHeapSize": heap_mib * MIB, "gc": gc, "ParallelGCThreads": threads}
    if right:
        assert f"heap of {heap_mib} MiB" in resources.judge_java(found, SEEN | guest)
        return
    with pytest.raises(Wrong):
        resources.judge_java(found, SEEN | guest)


def test_java_8_takes_another_collector_where_java_9_takes_g1() -> None:
    found = {"MaxHeapSize": 502 * MIB, "gc": "Parallel", "ParallelGCThreads": 2}
    assert "Parallel with 2 threads" in resources.judge_java(found | {"version": 8}, SEEN)
    for wrong in ({"version": 17}, {"version": 0}, {"version": 8, "gc": "G1"}):
        with pytest.raises(Wrong):
            resources.judge_java(found | wrong, SEEN)


FLAGS_8: Final = """[Global flags]
    uintx MaxHeapSize                              := 526385152                           {product}
    uintx ParallelGCThreads                         = 2                                   {product}
     bool UseParallelGC                            := true                                {product}
"""
FLAGS_17: Final = """   size_t MaxHeapSize                              = 526385152               {product} {ergonomic}
     uint ParallelGCThreads                        = 2                             {product} {default}
     bool UseG1GC                                  = true                       {product} {ergonomic}
"""


@pytest.mark.parametrize(
    ("out", "err", "gc", "version"),
    [
        (FLAGS_8, 'openjdk version "1.8.0_392"\nOpenJDK 64-Bit Server VM (build 25.392-b08)', "Parallel", 8),
        (FLAGS_17, 'openjdk version "17.0.9" 2023-10-17\nOpenJDK 64-Bit Server VM (build 17.0.9+9)', "G1", 17),
        (FLAGS_17, "", "G1", 0),
    ],
)
def test_a_jvms_flags_and_version_are_read(out: str, err: str, gc: str, version: int) -> None:
    assert resources.read_java(0, out, err) == {
        "MaxHeapSize": 526385152, "ParallelGCThreads": 2, "gc": gc, "version": version,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("status", "err", "kind"),
    [
        (0, 'openjdk version "17.0.9"\nOpenJDK Runtime Environment\nEclipse OpenJ9 VM 17.0.9.0 (build openj9-0.41.0)',
         NotHere),
        (1, "JVMJ9VM007E Command-line option unrecognised: -XX:+PrintFlagsFinal", NotHere),
        (0, "a script that is called java", NotHere),
        (0, 'openjdk version "17.0.9"\nOpenJDK 64-Bit Server VM (build 17.0.9+9)', Wrong),
        (0, "OpenJDK 64-Bit Server VM GraalVM CE 22.3.1 (build 17.0.6+10-jvmci-22.3-b13, mixed mode)", Wrong),
        (134, "# A fatal error has been detected by the Java Runtime Environment", Wrong),
        (127, "not found", Wrong),
    ],
)  # fmt: skip
def test_a_jvm_of_another_make_is_not_asked_and_one_that_fails_is_wrong(
    status: int, err: str, kind: type[Exception]
) -> None:
    with pytest.raises(kind):
        resources.read_java(status, "", err)


# Docker's

FAKE_DOCKER = """#!/bin/sh
echo "$@" >>{log}
echo "$DOCKER_HOST" >{home}/host
case $1 in
  version) {version} ;;
  import) cat >{home}/image.tar; echo sha256:1 ;;
  run) tar -x -C {home} -f {home}/image.tar && exec {home}/osbuilder-probe ;;
esac
"""


def fake_docker(home: Path, monkeypatch: pytest.MonkeyPatch, *, version: str = "true") -> Path:
    home.mkdir()
    docker, log = home / "docker", home / "log"
    docker.write_text(FAKE_DOCKER.format(log=log, home=home, version=version))
    docker.chmod(0o755)
    monkeypatch.setenv("PATH", f"{home}:{os.environ['PATH']}")
    return log


def test_docker_is_asked_with_the_guests_limits_and_left_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = fake_docker(tmp_path / "docker", monkeypatch)
    monkeypatch.setenv("DOCKER_HOST", "unix:///some/where")
    found = ordinary_container.seen(machine())
    assert found is not None
    assert (tmp_path / "docker/host").read_text() == "unix:///some/where\n", "a person's own daemon is asked"
    assert found["cpuinfo"] == os.cpu_count()
    version, imported, ran, removed = log.read_text().splitlines()
    name = imported.split()[-1]
    assert version == "version"
    assert ran == f"run --rm --interactive --network none --memory 2048m --cpus 2 {name} /osbuilder-probe"
    assert removed == f"rmi {name}"


def test_without_a_daemon_nothing_is_shown_beside_a_guest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_docker(tmp_path / "docker", monkeypatch, version="exit 1")
    assert ordinary_container.seen(machine()) is None
