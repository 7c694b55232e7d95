"""A matrix on Dask's workers: processes of this machine, some of which are killed in the middle of a cell."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from osbuild import kernel_registry, oci
from osbuild.artifacts import File
from osbuild.cache import Cache, default_cache
from osbuild.console import Show
from osbuild.errors import HostError, InputError, SpecError
from osbuild.fleet import Fleet
from osbuild.kernel import KernelSpec, build_kernel
from osbuild.matrix_job import BUILT, CELL, FAILED, Job, Result
from osbuild.registry_spec import RegistrySpec
from tests.layer_tools import archive, folder, member, write_layout
from tests.published import get
from tests.test_cli import OSBUILDER, one_line
from tests.test_cli import run as short
from tests.test_distribution import _surroundings as _surroundings  # a fixture
from tests.test_kernel import fragment as fragment  # a fixture
from tests.test_kernel import spec as spec  # a fixture
from tests.test_matrix_run import gone, wait_for
from tests.test_registry import debian as debian  # a fixture

CACHE = default_cache().root  # of the user who runs the tests, whose home is another one meanwhile
ROOT = Path(__file__).parent.parent
MATRIX = """
no-smoke = true
make = "image"
format = "qcow2"
[axes]
image = { one = "oci:one", two = "oci:two", three = "oci:three" }
arch = ["x86_64"]
filesystem = ["ext4"]
"""
# A worker's process starts osbuild.matrix_job, and that asks qemu-img for its version.
_WORKER = "$(cut -d' ' -f4 /proc/$PPID/stat)"
_IN_CELL = "tr '\\0' ' ' < /proc/$PPID/cmdline | grep -q cells/two-"


@pytest.fixture
def home(kernel: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with three images and their matrix, and an empty one for programs."""
    monkeypatch.setenv("OSBUILDER_CACHE", str(CACHE))  # which has the kernel
    for name in ("one", "two", "three"):
        write_layout(tmp_path / name, [archive(folder("etc"), member("etc/hello", name.encode()))])
    (tmp_path / "matrix.toml").write_text(MATRIX)
    (tmp_path / "bin").mkdir()
    return tmp_path


def before_qemu_img(home: Path, text: str) -> None:
    """What happens whenever a worker wants that program."""
    (home / "bin/qemu-img").write_text(f'#!/bin/sh\n{text}\nexec /usr/bin/qemu-img "$@"\n')
    (home / "bin/qemu-img").chmod(0o755)


@contextlib.contextmanager
def cluster(home: Path, *, workers: int = 2, failures: int = 3, path: str = "") -> Iterator[str]:
    """The address of a scheduler with workers in processes of their own."""
    pytest.importorskip("distributed")
    env = os.environ | {"PATH": f"{home}/bin:{os.environ['PATH']}", "PYTHONPATH": path or str(ROOT)}
    env |= {"DASK_TEMPORARY_DIRECTORY": str(home / "dask")}
    argv = [sys.executable, str(ROOT / "tests/cluster.py"), str(workers), str(failures)]
    with (home / "cluster.log").open("wb") as log:
        process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, env=env, cwd=home)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        assert line, (home / "cluster.log").read_text()
        yield json.loads(line)["address"]
    finally:
        process.stdin.close()
        try:
            process.wait(30)
        finally:
            process.kill()
            process.wait()
            process.stdout.close()


def command(*words: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """As in tests of one command, without its deadline: these are many, and pytest has one of its own."""
    return subprocess.run(
        [*OSBUILDER, *words], capture_output=True, text=True, check=False, cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | env,
    )  # fmt: skip


def matrix(home: Path, *words: str, code: int = 0) -> dict[str, Any]:
    done = command("matrix", "matrix.toml", "-o", "out", "--json", "--quiet", *words, cwd=home)
    assert done.returncode == code, done.stderr + done.stdout
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def raw(address: str) -> dict[str, Any]:
    done = subprocess.run(
        ["skopeo", "inspect", "--raw", "--tls-verify=false", f"docker://{address}"], capture_output=True, check=True
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_cell_of_a_killed_worker_is_done_by_another_and_the_matrix_ends_with_one_index(
    home: Path, debian: str
) -> None:
    (home / "armed").mkdir()
    before_qemu_img(
        home, f"if {_IN_CELL} && rmdir {home}/armed 2>/dev/null; then echo $PPID > {home}/who; kill -9 {_WORKER}; "
        "sleep 600; fi",
    )  # fmt: skip
    target = f"{debian}/guests/killed:1"
    with cluster(home) as scheduler:
        found = matrix(home, "--scheduler", scheduler, "--publish", target)
        assert {cell["name"]: (cell["verdict"], cell["lost"]) for cell in found["cells"]} == {
            "one-x86_64-ext4": ("built", 0), "two-x86_64-ext4": ("built", 1), "three-x86_64-ext4": ("built", 0),
        }  # fmt: skip
        assert gone(int((home / "who").read_text())), "the killed worker's cell went with it"
        assert not list((home / "dask").rglob("osbuilder-*/cells/*")), "a worker keeps nothing of it"
        again = matrix(home, "--scheduler", scheduler, "--publish", target)
        assert [(cell["verdict"], cell["note"]) for cell in again["cells"]] == [
            ("unchanged", "the registry has it")
        ] * 3
    index = raw(target)
    names = [each["annotations"]["vnd.osbuilder.cell"] for each in index["manifests"]]
    assert sorted(names) == sorted(cell["name"] for cell in found["cells"])
    assert {each["digest"] for each in index["manifests"]} == {cell["published"] for cell in found["cells"]}
    assert raw(f"{target}-two-ext4")["manifests"][0]["platform"] == {"os": "linux", "architecture": "amd64"}
    alone = command("build", "oci:two", "--make", "image", "--format", "qcow2", "--no-smoke", "-o", "alone", cwd=home)
    assert alone.returncode == 0, alone.stderr
    for tag in ("1-two-x86_64-ext4", "1-two-ext4"):
        get(debian, home / "pulled", home / "cache", name=f"guests/killed:{tag}")
        for name in ("rootfs.img", "vmlinux", "manifest.json"):
            assert File.of(home / "pulled" / name).sha256 == File.of(home / "alone" / name).sha256
    with pytest.raises(InputError, match="is a matrix with 3 builds for linux/amd64") as caught:
        get(debian, home / "pulled", home / "cache", name="guests/killed:1")
    assert "'1-two-x86_64-ext4'" in caught.value.hint


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_cell_that_ends_every_worker_is_named_and_the_others_are_built(home: Path, debian: str) -> None:
    before_qemu_img(home, f"if {_IN_CELL}; then kill -9 {_WORKER}; sleep 600; fi")
    target = f"{debian}/guests/evil:1"
    with cluster(home, failures=1) as scheduler:
        found = matrix(home, "--scheduler", scheduler, "--publish", target, code=4)
    cells = {cell["name"]: cell for cell in found["cells"]}
    assert cells["two-x86_64-ext4"]["verdict"] == "failed"
    assert cells["two-x86_64-ext4"]["reason"].startswith("2 workers ended while they had it, the last at tcp://")
    assert [cells[name]["verdict"] for name in ("one-x86_64-ext4", "three-x86_64-ext4")] == ["built", "built"]
    assert found["indexes"] == []
    with pytest.raises(InputError, match="404"):
        get(debian, home / "pulled", home / "cache", name="guests/evil:1")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_lone_worker_that_begins_anew_gets_the_cells_that_are_left(home: Path, debian: str) -> None:
    before_qemu_img(home, f"if {_IN_CELL}; then kill -9 {_WORKER}; sleep 600; fi")
    with cluster(home, workers=1, failures=1) as scheduler:
        found = matrix(home, "--scheduler", scheduler, "--publish", f"{debian}/guests/lone:1", code=4)
    verdicts = {cell["name"]: cell["verdict"] for cell in found["cells"]}
    assert verdicts == {"one-x86_64-ext4": "built", "two-x86_64-ext4": "failed", "three-x86_64-ext4": "built"}


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_ctrl_c_ends_what_workers_do(home: Path, debian: str) -> None:
    (home / "armed").mkdir()
    before_qemu_img(home, f"if rmdir {home}/armed 2>/dev/null; then echo $$ > {home}/who; exec sleep 600; fi")
    who = home / "who"
    with cluster(home, workers=1) as scheduler:
        words = ["matrix", "matrix.toml", "-o", "out", "--quiet", "--scheduler", scheduler]
        argv = [*OSBUILDER, *words, "--publish", f"{debian}/guests/stopped:1"]
        with subprocess.Popen(argv, cwd=home, stderr=subprocess.PIPE, text=True) as process:
            wait_for(lambda: who.exists() and who.read_text().strip() != "", 600)
            process.send_signal(signal.SIGINT)
            assert process.wait(300) == 130
            assert process.stderr is not None
            assert process.stderr.read() == "interrupted by SIGINT\n"
        wait_for(lambda: gone(int(who.read_text())))
        wait_for(lambda: not list((home / "dask").rglob("osbuilder-*")))


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_worker_with_another_osbuilder_is_refused(home: Path) -> None:
    for name in ("osbuild", "templates", "kernel-configs", "patches", "agent", "probe"):
        shutil.copytree(ROOT / name, home / "other" / name, ignore=shutil.ignore_patterns("__pycache__"))
    with (home / "other/osbuild/tree.py").open("a") as file:
        file.write("# one line more\n")
    with cluster(home, workers=1, path=str(home / "other")) as scheduler:
        words = ("matrix", "matrix.toml", "--scheduler", scheduler, "--publish", "127.0.0.1:1/x:1", "--quiet")
        done = command(*words, cwd=home)
    assert done.returncode == 4, done.stderr
    assert "has another osbuilder 0.1.0: its code has the digest" in one_line(done.stderr)
    assert "install the same on every worker" in done.stderr


def test_without_distributed_one_line_says_how_to_get_it(home: Path) -> None:
    (home / "bin/distributed.py").write_text("raise ImportError('none')\n")
    words = ("matrix", "matrix.toml", "--scheduler", "tcp://127.0.0.1:1", "--publish", "127.0.0.1:1/x:1", "--quiet")
    done = short(*words, cwd=home, env={"PYTHONPATH": f"{home}/bin:{ROOT}"})
    assert done.returncode == 4
    assert "distributed, which is not installed" in one_line(done.stderr)
    assert "pip install 'CHECKOUT[fleet]'" in done.stderr


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_where_no_scheduler_answers_one_line_says_so(home: Path) -> None:
    pytest.importorskip("distributed")
    words = ("matrix", "matrix.toml", "--scheduler", "tcp://127.0.0.1:1", "--publish", "127.0.0.1:1/x:1", "--quiet")
    done = command(*words, cwd=home)
    assert done.returncode == 4
    assert "no scheduler answers at tcp://127.0.0.1:1" in one_line(done.stderr)


# --- decisions, with a scheduler that does what a test says ---


class Client:
    """Dask's, as far as a fleet asks it."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.status = "running"
        self.gone = False
        self.futures: list[Future] = []

    def nthreads(self) -> dict[str, int]:
        if self.gone:
            raise OSError("connection closed")
        return {"tcp://127.0.0.1:1": self.threads}

    def get_events(self, topic: str) -> tuple[object, ...]:
        if self.gone:
            raise OSError("connection closed")
        return ()

    def submit(self, *given: object, **more: object) -> Future:
        return self.futures.pop(0)

    def run(self, *given: object, **more: object) -> None: ...


class Future:
    """A job that has ended; `losses`: whether its worker dies each time before its result is here."""

    def __init__(self, result: str = "", *losses: bool) -> None:
        self._result = result
        self._losses = list(losses)
        self._away = 0

    def done(self) -> bool:
        self._away = max(self._away - 1, 0)
        return not self._away

    def result(self, timeout: float) -> tuple[str, bytes]:
        if self._losses:
            self._away = 3 if self._losses.pop(0) else 0
            raise TimeoutError
        return self._result, b"its log"

    def cancel(self) -> None: ...


JOB = Job(kind=CELL, name="two", words={}, epoch=None)


def fleet_of(client: Client, out: Path) -> Fleet:
    pytest.importorskip("distributed")
    return Fleet(client, "tcp://127.0.0.1:1", out)


def test_a_job_is_handed_out_also_when_no_thread_is_there_if_nothing_else_is_going_on(tmp_path: Path) -> None:
    client = Client(threads=0)
    client.futures = [Future()]
    fleet = fleet_of(client, tmp_path)
    assert fleet.free()
    fleet.start(JOB)
    assert not fleet.free()
    client.threads = 2
    assert fleet.free()


def test_a_scheduler_that_has_gone_is_told_whatever_it_was_asked(tmp_path: Path) -> None:
    client = Client(threads=2)
    client.futures = [Future()]
    fleet = fleet_of(client, tmp_path)
    fleet.start(JOB)
    client.gone = True
    for question in (fleet.free, fleet.wait):
        with pytest.raises(HostError, match=r"the scheduler at tcp://127\.0\.0\.1:1 has gone"):
            question()
    client.gone, client.status = False, "closed"
    with pytest.raises(HostError, match="has gone"):
        fleet.free()


def test_a_job_whose_worker_dies_before_its_result_is_here_is_waited_for(tmp_path: Path) -> None:
    client = Client(threads=1)
    built = json.dumps(dataclasses.asdict(Result(kind=CELL, name="two", verdict=BUILT)))
    client.futures = [Future(built, True, True)]
    fleet = fleet_of(client, tmp_path)
    fleet.start(JOB)
    assert fleet.wait().verdict == BUILT
    assert (tmp_path / "cells/two/log").read_bytes() == b"its log"


def test_a_job_that_has_ended_and_gives_no_result_has_failed(tmp_path: Path) -> None:
    client = Client(threads=1)
    client.futures = [Future("", False)]
    fleet = fleet_of(client, tmp_path)
    fleet.start(JOB)
    result = fleet.wait()
    assert (result.verdict, result.code) == (FAILED, 4)
    assert fleet.free()


# --- a kernel's way ---


def test_a_kernel_that_one_machine_compiled_another_has_from_the_registry(
    spec: KernelSpec, debian: str, tmp_path: Path
) -> None:
    here, there = Cache(root=tmp_path / "here"), Cache(root=tmp_path / "there")
    made = build_kernel(spec, here)
    reference = kernel_registry.put(made, f"{debian}/guests/kernels", RegistrySpec(), Show(quiet=True))
    assert oci.parse_reference(reference, frozenset(("docker",))).digest
    road = {"key": made.key, "reference": reference}
    kernel_registry.get(road, spec, RegistrySpec(), there, Show(quiet=True))
    found = build_kernel(spec, there)
    assert found.cached
    assert (found.key, found.vmlinux.sha256, found.inputs) == (made.key, made.vmlinux.sha256, made.inputs)


def test_a_kernel_of_other_inputs_does_not_get_into_the_cache(
    spec: KernelSpec, fragment: Path, debian: str, tmp_path: Path
) -> None:
    here, there = Cache(root=tmp_path / "here"), Cache(root=tmp_path / "there")
    made = build_kernel(spec, here)
    reference = kernel_registry.put(made, f"{debian}/guests/others", RegistrySpec(), Show(quiet=True))
    fragment.write_text(fragment.read_text().replace('"toy"', '"other"'))
    other = dataclasses.replace(spec)
    kernel_registry.get({"key": made.key, "reference": reference}, other, RegistrySpec(), there, Show(quiet=True))
    assert not build_kernel(other, there).cached, "it was not asked for"
    third = Cache(root=tmp_path / "third")
    key = build_kernel(other, there).key
    with pytest.raises(InputError, match="is not the kernel that it should be"):
        kernel_registry.get({"key": key, "reference": reference}, other, RegistrySpec(), third, Show(quiet=True))
    assert third.have("kernel", key) is None


def test_a_build_is_no_kernel(spec: KernelSpec, debian: str, tmp_path: Path) -> None:
    from tests.published import make, put

    done = put(debian, make(tmp_path / "build"), name="guests/nokernel:1")
    key = build_kernel(spec, Cache(root=tmp_path / "here")).key
    road = {"key": key, "reference": f"{debian}/guests/nokernel@{done.digest}"}
    with pytest.raises((InputError, SpecError)):
        kernel_registry.get(road, spec, RegistrySpec(), Cache(root=tmp_path / "there"), Show(quiet=True))
