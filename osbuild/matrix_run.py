"""A plan, carried out: kernels first, then the cells that need them, by a crew that does several jobs at a time.

OUT/plan.json       what was to be done; written first
OUT/cells/NAME/     log, build/ as `osbuilder build` leaves it, result.json
OUT/kernels/KEY/    log, result.json
OUT/matrix.json     what came of all; written last
OUT/.shared/        roots that several cells have; gone when all of them are there
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol

import osbuild
from osbuild import command
from osbuild.console import Show
from osbuild.errors import BuildError, SpecError
from osbuild.matrix import Cell, Plan, Stage
from osbuild.matrix_job import CELL, FAILED, KERNEL, LOG, NEEDED, RESULT, SKIPPED, Job, Result, worst
from osbuild.tree import quote

PLAN, TABLE, CELLS, KERNELS, SHARED = "plan.json", "matrix.json", "cells", "kernels", ".shared"
_OURS: Final = frozenset((PLAN, TABLE, CELLS, KERNELS, SHARED))
_POLL_SECONDS: Final = 0.05


class Crew(Protocol):
    """Who does the jobs."""

    def free(self) -> bool:
        """Whether another job can be started."""

    def start(self, job: Job) -> None:
        """Begin a job."""

    def wait(self) -> Result:
        """The result of the next that ends."""

    def end(self) -> None:
        """End what is still going on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wishes:
    """What the jobs of a run have in common."""

    epoch: int | None
    target: str = ""  # REPO:TAG; empty: nothing is published
    share_kernels: bool = False  # by way of the registry
    fail_fast: bool = False
    signed_by: str = ""  # as a job takes it

    def kernel(self, stage: Stage, cell: Cell, *, look: bool) -> Job:
        """The job that sees to a kernel; `cell` is one that needs it."""
        spec = cell.spec
        words: dict[str, Any] = {"arch": spec.arch.name, "with": list(spec.features)}
        words |= {"source": spec.kernel_source} if spec.kernel_source is not None else {}
        words |= {name: cell.words[name] for name in _REGISTRY_WORDS if name in cell.words}
        words |= {"keyring": spec.keyring} if spec.keyring is not None else {}
        repository = self.target.rpartition(":")[0] if self.share_kernels else ""
        return Job(kind=KERNEL, name=stage.key, words=words, epoch=self.epoch, publish=repository, look=look)

    def cell(self, cell: Cell, plan: Plan, kernel: Mapping[str, str], *, look: bool = False) -> Job:
        """The job that sees to a cell."""
        return Job(
            kind=CELL, name=cell.name, words=cell.words, epoch=self.epoch, kernel=kernel, look=look,
            publish=f"{self.target}-{cell.name}" if self.target else "", shared=tuple(plan.shared(cell)),
            signed_by=self.signed_by,
        )  # fmt: skip


_REGISTRY_WORDS: Final = ("insecure-registry", "mirror", "authfile", "offline")


@dataclass(slots=True)
class Outcome:
    """What came of a matrix."""

    cells: dict[str, Result] = field(default_factory=dict)
    kernels: dict[str, Result] = field(default_factory=dict)

    @property
    def code(self) -> int:
        """The worst of all."""
        return worst([result.code for result in (*self.cells.values(), *self.kernels.values())])

    def good(self, plan: Plan) -> bool:
        """Whether every cell is there."""
        return all(cell.name in self.cells and not self.cells[cell.name].code for cell in plan.cells)


def run(plan: Plan, crew: Crew, wishes: Wishes, show: Show) -> Outcome:
    """All cells. One that fails does not stop the others, unless that is wished."""
    course = _Course(plan, wishes)
    try:
        while course.queue or course.running:
            while course.queue and crew.free():
                crew.start(course.queue.popleft())
                course.running += 1
            result = crew.wait()
            course.running -= 1
            if result.verdict != NEEDED:
                _tell(result, plan, show)
            course.take(result)
            if wishes.fail_fast and course.outcome.code:
                break
    finally:
        crew.end()
    for cell in plan.cells:
        course.outcome.cells.setdefault(cell.name, _skipped(cell))
    return course.outcome


class _Course:
    """What is to be done next. A kernel that nobody has is made only when a cell is not what it should be already."""

    def __init__(self, plan: Plan, wishes: Wishes) -> None:
        self.outcome = Outcome()
        self.running = 0
        self._plan = plan
        self._wishes = wishes
        self._cells = {cell.name: cell for cell in plan.cells}
        self._kernels = {stage.key: (stage, cells) for stage, cells in plan.stages("kernel").items()}
        self._looks = dict.fromkeys(self._kernels, 0)  # cells that are being looked at
        self._lacking: dict[str, list[Cell]] = {key: [] for key in self._kernels}
        self.queue = deque(wishes.kernel(stage, cells[0], look=True) for stage, cells in self._kernels.values())

    def take(self, result: Result) -> None:
        """A job has ended: what follows from that."""
        if result.kind == KERNEL:
            self._take_kernel(result)
            return
        key = self._cells[result.name].stages["kernel"].key
        if self._looks[key]:
            self._looks[key] -= 1
            if result.verdict == NEEDED:
                self._lacking[key].append(self._cells[result.name])
            else:
                self.outcome.cells[result.name] = result
            if not self._looks[key] and self._lacking[key]:
                stage, cells = self._kernels[key]
                self.queue.appendleft(self._wishes.kernel(stage, cells[0], look=False))
            return
        self.outcome.cells[result.name] = result

    def _take_kernel(self, result: Result) -> None:
        key = result.name
        cells = self._lacking[key] or self._kernels[key][1]
        if result.verdict == NEEDED:
            self._looks[key] = len(cells)
            self.queue.extend(self._wishes.cell(cell, self._plan, {}, look=True) for cell in cells)
            return
        self.outcome.kernels[key] = result
        if result.code:
            self.outcome.cells |= {cell.name: _without_kernel(cell, result) for cell in cells}
        else:
            self.queue.extend(self._wishes.cell(cell, self._plan, result.kernel) for cell in cells)


def _without_kernel(cell: Cell, kernel: Result) -> Result:
    return dataclasses.replace(
        kernel, kind=CELL, name=cell.name, verdict=FAILED, reason=f"its kernel: {kernel.reason}", seconds=0.0, digest=""
    )  # fmt: skip


def _skipped(cell: Cell) -> Result:
    return Result(kind=CELL, name=cell.name, verdict=SKIPPED, note="another failed first")


def _tell(result: Result, plan: Plan, show: Show) -> None:
    title = result.name
    if result.kind == KERNEL:
        title = "kernel " + next(stage.title for stage in plan.stages("kernel") if stage.key == result.name)
    said = [result.verdict, result.note, result.reason, f"on {result.where}" if result.where else ""]
    show.ended(title, note=", ".join(word for word in said if word), seconds=result.seconds, ok=not result.code)


# --- this machine's crew ------------------------------------------------------------------------------------------


class Local:
    """Processes of this machine, `jobs` of them at a time."""

    def __init__(self, out: Path, jobs: int) -> None:
        self._out = out
        self._jobs = jobs
        self._running: list[tuple[Job, Path, float, subprocess.Popen[bytes], contextlib.ExitStack]] = []

    def free(self) -> bool:
        return len(self._running) < self._jobs

    def start(self, job: Job) -> None:
        home = home_of(self._out, job)
        job = dataclasses.replace(job, store=str(self._out / SHARED))
        stack = contextlib.ExitStack()
        process = stack.enter_context(started(job, home))
        self._running.append((job, home, time.monotonic(), process, stack))

    def wait(self) -> Result:
        while True:
            for each in self._running:
                job, home, began, process, stack = each
                if command.has_ended(process):
                    self._running.remove(each)
                    stack.close()
                    return collect(job, home, process.returncode, time.monotonic() - began)
            time.sleep(_POLL_SECONDS)

    def end(self) -> None:
        end_all([process for _, _, _, process, _ in self._running])
        while self._running:
            self._running.pop()[-1].close()


def home_of(out: Path, job: Job) -> Path:
    """The directory of a job."""
    return out / (KERNELS if job.kind == KERNEL else CELLS) / job.name


@contextlib.contextmanager
def started(job: Job, home: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The process that does a job; it is gone after the block."""
    home.mkdir(parents=True, exist_ok=True)
    for name in (LOG, RESULT):
        (home / name).unlink(missing_ok=True)
    # Ours before another of that name, wherever we were started: without -P also what lies in the current directory.
    here = str(Path(osbuild.__file__).parent.parent)
    path = os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH")])])
    with tempfile.TemporaryFile() as given:
        given.write(job.to_json().encode())
        given.seek(0)
        with command.start(
            sys.executable, "-P", "-m", "osbuild.matrix_job", str(home), log=home / LOG, stdin=given,
            env=dict(os.environ) | {"PYTHONPATH": path},
        ) as process:  # fmt: skip
            yield process


def collect(job: Job, home: Path, status: int, seconds: float) -> Result:
    """What a process left of its job."""
    try:
        return dataclasses.replace(Result.parse((home / RESULT).read_bytes()), seconds=seconds)
    except (OSError, ValueError, TypeError):
        said = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with {status}"
        hint = "out of memory? fewer at a time: -j" if status == -signal.SIGKILL else "its log has the rest"
        return Result.of_error(job, BuildError(f"its process {said}", hint=hint), seconds)


def end_all(processes: list[subprocess.Popen[bytes]]) -> None:
    """Ask all of them at once to end: to wait for one after the other would take as many times as long."""
    for process in processes:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)


# --- the directory ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def place(out: Path) -> Iterator[Path]:
    """The matrix's directory, ours alone meanwhile; SpecError when it holds anything else."""
    from osbuild.workspace import directory, locked

    with directory(out):
        foreign = sorted(name for name in os.listdir(out) if name not in _OURS and not name.startswith("."))
        if foreign:
            raise SpecError(
                f"{quote(str(out))} holds {quote(foreign[0])}, which is nothing of a matrix",
                hint="name another with -o",
            )
        with locked(out, hint="name another directory with -o"):
            yield out.absolute()


def clean(out: Path) -> None:
    """Nobody needs what cells had in common any more."""
    shutil.rmtree(out / SHARED, ignore_errors=True)
