"""A matrix carried out on this machine: what is made once, what is left alone, and what fails alone."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from osbuild import cli_matrix
from osbuild.artifacts import File
from osbuild.console import Show
from osbuild.errors import InputError
from osbuild.matrix import Plan
from osbuild.matrix_index import parse_target
from osbuild.matrix_job import BUILT, CELL, FAILED, KERNEL, NEEDED, SKIPPED, UNCHANGED, Job, Result, worst
from osbuild.matrix_run import Outcome, Wishes, run
from tests.fake_registry import Handler, always, answering
from tests.layer_tools import archive, folder, member, write_layout
from tests.published import Uploading, UploadRegistry
from tests.test_cli import OSBUILDER, one_line
from tests.test_cli import run as command
from tests.test_matrix import FULL, plan_of

# --- decisions, with a crew that does nothing ---


class Pretending:
    """Does each job at once, as `do` says; at most two are open."""

    def __init__(self, do: Callable[[Job], Result]) -> None:
        self.jobs: list[Job] = []
        self.ended = False
        self._do = do
        self._open: list[Job] = []

    def free(self) -> bool:
        return len(self._open) < 2

    def start(self, job: Job) -> None:
        assert self.free()
        self.jobs.append(job)
        self._open.append(job)

    def wait(self) -> Result:
        return self._do(self._open.pop(0))

    def end(self) -> None:
        self.ended = True


def good(job: Job) -> Result:
    road = {"key": "k", "reference": "r"} if job.kind == KERNEL else {}
    return Result(kind=job.kind, name=job.name, verdict=BUILT, kernel=road)


def carried_out(plan: Plan, do: Callable[[Job], Result], **wishes: Any) -> tuple[Outcome, Pretending]:
    crew = Pretending(do)
    outcome = run(plan, crew, Wishes(epoch=None, **wishes), Show(quiet=True))
    assert crew.ended
    assert outcome.cells.keys() == {cell.name for cell in plan.cells}, "nothing is forgotten"
    return outcome, crew


def test_a_cell_begins_when_its_kernel_is_there_and_each_kernel_is_one_job(tmp_path: Path) -> None:
    plan = plan_of(FULL, tmp_path)
    outcome, crew = carried_out(plan, good)
    names = [(job.kind, job.name) for job in crew.jobs]
    assert len(names) == len(set(names)) == 12 + 3
    for cell in plan.cells:
        assert names.index((KERNEL, cell.stages["kernel"].key)) < names.index((CELL, cell.name))
    assert all(job.kernel for job in crew.jobs if job.kind == CELL), "and is told where it is"
    assert outcome.code == 0


def test_a_kernel_that_nobody_has_is_made_only_when_a_cell_needs_it(tmp_path: Path) -> None:
    plan = plan_of('[axes]\nimage = { a = "oci:a", b = "oci:b" }', tmp_path)

    def lacking(*cells: str) -> Callable[[Job], Result]:
        def do(job: Job) -> Result:
            needed = job.look and (job.kind == KERNEL or job.name in cells)
            verdict = NEEDED if needed else UNCHANGED if job.look else BUILT
            return dataclasses.replace(good(job), verdict=verdict)

        return do

    outcome, crew = carried_out(plan, lacking())
    assert [(job.kind, job.look) for job in crew.jobs] == [(KERNEL, True), (CELL, True), (CELL, True)]
    assert {result.verdict for result in outcome.cells.values()} == {UNCHANGED}
    outcome, crew = carried_out(plan, lacking("b"))
    assert [(job.kind, job.name) for job in crew.jobs if not job.look] == [(KERNEL, crew.jobs[0].name), (CELL, "b")]
    assert {name: result.verdict for name, result in outcome.cells.items()} == {"a": UNCHANGED, "b": BUILT}


def test_a_kernel_that_fails_fails_its_cells_and_no_others(tmp_path: Path) -> None:
    plan = plan_of(FULL, tmp_path)
    bad = plan.cells[0].stages["kernel"].key

    def do(job: Job) -> Result:
        if job.name == bad:
            return Result(kind=KERNEL, name=bad, verdict=FAILED, code=5, reason="no")
        return good(job)

    outcome, _ = carried_out(plan, do)
    for cell in plan.cells:
        assert (outcome.cells[cell.name].verdict == FAILED) == (cell.stages["kernel"].key == bad)
    assert outcome.cells[plan.cells[0].name].reason == "its kernel: no"
    assert outcome.code == 5


def test_the_first_failure_ends_it_only_when_that_is_wished(tmp_path: Path) -> None:
    plan = plan_of(FULL, tmp_path)

    def do(job: Job) -> Result:
        bad = job.name == "small-x86_64-plain-ext4"
        return dataclasses.replace(good(job), verdict=FAILED, code=6) if bad else good(job)

    outcome, crew = carried_out(plan, do)
    assert sum(result.verdict == BUILT for result in outcome.cells.values()) == 11
    outcome, crew = carried_out(plan, do, fail_fast=True)
    assert len(crew.jobs) < 15
    verdicts = [result.verdict for result in outcome.cells.values()]
    assert verdicts.count(FAILED) == 1
    assert SKIPPED in verdicts
    assert outcome.code == 6
    assert not outcome.good(plan)


def test_what_came_of_the_cells_is_written_also_when_they_cannot_be_named(tmp_path: Path) -> None:
    plan = plan_of(FULL, tmp_path)
    outcome, _ = carried_out(plan, lambda job: dataclasses.replace(good(job), published=f"sha256:{'0' * 64}"))
    with answering(UploadRegistry()) as server:  # which has none of them
        target = parse_target(f"{server.address}/guests/all:1")
        named, problem = cli_matrix._finish(plan, outcome, tmp_path / "matrix.json", target, None, Show(quiet=True))
    assert isinstance(problem, InputError)
    table = json.loads((tmp_path / "matrix.json").read_text())
    assert (table["code"], table["error"]) == (3, str(problem))
    assert {cell["verdict"] for cell in table["cells"]} == {BUILT}
    assert named["indexes"] == []


def test_who_asked_for_json_gets_one_document_when_the_cells_cannot_be_named(kernel: object, tmp_path: Path) -> None:
    write_layout(tmp_path / "one", [archive(folder("etc"), member("etc/hello"))])
    (tmp_path / "matrix.toml").write_text(
        'no-smoke = true\nmake = "initrd"\ncompress = "gzip"\n[axes]\nimage = { one = "oci:one" }\n'
    )
    with answering(UploadRegistry()) as server:
        server.faults["PUT /manifests/all"] = always(refuse_the_index)
        words = ("matrix", "matrix.toml", "--publish", f"{server.address}/guests:all", "--json", "--quiet")
        done = command(*words, cwd=tmp_path)
    assert done.returncode == 4, done.stderr
    table = json.loads(done.stdout)
    assert (table["code"], [cell["verdict"] for cell in table["cells"]]) == (4, [BUILT])
    assert one_line(done.stderr) == f"error: {table['error']}"
    assert json.loads((tmp_path / "matrix-out/matrix.json").read_text()) == table


def refuse_the_index(handler: Handler, _body: bytes, _kind: str) -> None:
    assert isinstance(handler, Uploading)
    if handler.path.endswith("/manifests/all"):
        handler.answer(403)
    else:  # a cell's tag begins with the same word
        handler.store()
        handler.answer(201)


@pytest.mark.parametrize(
    ("codes", "code"), [([], 0), ([0, 0], 0), ([0, 7], 7), ([7, 6], 6), ([6, 3, 0], 3), ([1, 2], 1)]
)
def test_the_exit_code_is_that_of_the_worst(codes: list[int], code: int) -> None:
    assert worst(codes) == code


def test_a_job_is_the_same_after_its_way_to_another_process(tmp_path: Path) -> None:
    plan = plan_of(
        '[axes]\nimage = ["oci:x"]\n[rootfs]\npolicy = "p.rego"\nadd = ["a:/b"]\n[guest]\ncpus = 2', tmp_path
    )
    job = Wishes(epoch=7, target="h.example/x:1").cell(plan.cells[0], plan, {"key": "k"})
    assert Job.parse(job.to_json()) == job


# --- real builds ---

MATRIX = """
no-smoke = true
[axes]
image = { one = "oci:layout:one", two = "oci:layout:two" }
filesystem = ["ext4", "erofs"]
[rootfs]
add = ["motd:/etc/motd"]
"""


@pytest.fixture(scope="module")
def built(kernel: object, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with two images, a matrix of four cells, and what came of it."""
    home = tmp_path_factory.mktemp("matrix")
    for tag in ("one", "two"):
        write_layout(home / "layout", [archive(folder("etc"), member("etc/hello", tag.encode()))], tag=tag)
        (home / f"{tag}-index.json").write_bytes((home / "layout/index.json").read_bytes())
    both = [json.loads((home / f"{tag}-index.json").read_text())["manifests"] for tag in ("one", "two")]
    index = {"schemaVersion": 2, "manifests": list({m["digest"]: m for each in both for m in each}.values())}
    (home / "layout/index.json").write_text(json.dumps(index))
    (home / "motd").write_text("welcome")
    (home / "matrix.toml").write_text(MATRIX)
    found = matrix(home)
    assert [cell["verdict"] for cell in found["cells"]] == ["built"] * 4
    return home


def matrix(home: Path, *words: str, code: int = 0, **more: Any) -> dict[str, Any]:
    done = command("matrix", "matrix.toml", "-o", "out", "-j", "2", "--json", "--quiet", *words, cwd=home, **more)
    assert done.returncode == code, done.stderr + done.stdout
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def log_of(home: Path, cell: str) -> str:
    return (home / "out/cells" / cell / "log").read_text()


def test_a_cell_has_the_bytes_of_a_build_alone(built: Path, tmp_path: Path) -> None:
    words = ("--fs", "erofs", "--add", "motd:/etc/motd", "--no-smoke", "--quiet", "-o", str(tmp_path / "out"))
    done = command("build", "oci:layout:two", *words, cwd=built)
    assert done.returncode == 0, done.stderr
    for name in ("rootfs.img", "initrd.img", "vmlinux", "vmlinuz", "config", "manifest.json", "sbom.cdx.json"):
        assert File.of(built / "out/cells/two-erofs/build" / name).sha256 == File.of(tmp_path / "out" / name).sha256


def test_what_two_cells_have_in_common_was_made_once_and_is_gone(built: Path) -> None:
    notes = [log_of(built, f"{image}-{fs}") for image in ("one", "two") for fs in ("ext4", "erofs")]
    assert sum("writing initrd.img" in note for note in notes) == 2, "one for each image"
    assert sum("writing rootfs.img" in note for note in notes) == 4
    assert not (built / "out/.shared").exists()
    plan = json.loads((built / "out/plan.json").read_text())
    assert [stage["kind"] for stage in plan["stages"]].count("initrd") == 2


@pytest.mark.slow
def test_a_second_time_nothing_is_built_and_a_change_builds_its_own_cells_only(built: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in built.glob("out/cells/*/build/manifest.json")}
    assert [cell["verdict"] for cell in matrix(built)["cells"]] == ["unchanged"] * 4
    assert {path: path.stat().st_mtime_ns for path in before} == before
    with (built / "out/cells/one-erofs/build/rootfs.img").open("r+b") as file:
        file.write(b"x")  # no longer what its manifest says
    found = {cell["name"]: cell for cell in matrix(built)["cells"]}
    assert {name for name, cell in found.items() if cell["verdict"] == "built"} == {"one-erofs"}
    table = json.loads((built / "out/matrix.json").read_text())
    assert {cell["name"]: cell["digest"] for cell in table["cells"]} == {
        name: File.of(built / f"out/cells/{name}/build/manifest.json").sha256 for name in found
    }


@pytest.mark.slow
def test_one_that_fails_stops_no_other_and_is_named_with_its_log(built: Path, tmp_path: Path) -> None:
    (tmp_path / "motd").write_text("welcome")
    (tmp_path / "layout").symlink_to(built / "layout")
    text = MATRIX.replace("oci:layout:two", "oci:nosuch").replace('["ext4", "erofs"]', '["erofs"]')
    (tmp_path / "matrix.toml").write_text(text)
    done = command("matrix", "matrix.toml", cwd=tmp_path)
    assert done.returncode == 3, done.stderr
    assert "1 built, 1 failed" in done.stdout
    assert f"two-erofs: '{tmp_path}/nosuch' does not exist" in done.stdout.replace("\n  ", " ")
    assert "log: matrix-out/cells/two-erofs/log" in done.stdout
    assert "does not exist" in (tmp_path / "matrix-out/cells/two-erofs/log").read_text()


WAITING = """#!/bin/sh
if rmdir ARMED 2>/dev/null; then echo $$ > ARMED.who; exec sleep 600; fi
exec /usr/bin/qemu-img "$@"
"""


def gone(pid: int) -> bool:
    try:
        return "\nState:\tZ" in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return True


def wait_for(what: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, -9)], ids=["Ctrl-C", "kill -9"])
def test_a_run_that_was_ended_leaves_no_process_and_goes_on_where_it_was(
    number: signal.Signals, code: int, built: Path, tmp_path: Path
) -> None:
    if not Path("/usr/bin/qemu-img").exists():
        pytest.skip("qemu-img is not installed")
    (tmp_path / "motd").write_text("welcome")
    (tmp_path / "layout").symlink_to(built / "layout")
    (tmp_path / "matrix.toml").write_text('format = "qcow2"\nmake = "image"\n' + MATRIX.replace(', "erofs"', ""))
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/qemu-img").write_text(WAITING.replace("ARMED", str(tmp_path / "armed")))
    (tmp_path / "bin/qemu-img").chmod(0o755)
    env = {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}
    who = tmp_path / "armed.who"
    (tmp_path / "armed").mkdir()
    words = [*OSBUILDER, "matrix", "matrix.toml", "-o", "out", "--quiet"]
    with subprocess.Popen(words, cwd=tmp_path, env=os.environ | env, stderr=subprocess.PIPE) as process:
        wait_for(lambda: who.exists() and who.read_text().strip() != "", 200)
        process.send_signal(number)
        assert process.wait(100) == code
    wait_for(lambda: gone(int(who.read_text())))
    found = matrix(tmp_path, env=env)
    assert [cell["verdict"] for cell in found["cells"]] == ["built", "built"]
    assert not list(tmp_path.glob("out/cells/*/build/.new"))
