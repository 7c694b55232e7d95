"""What one process does of a matrix: a kernel, or a cell. `python -m osbuild.matrix_job HOME`, the job on its input.

HOME/log           all that it says
HOME/build/        a cell's build, as osbuilder build leaves it
HOME/booted        a digest of the wishes ([guest]) with which that booted well
HOME/result.json   what came of it, written last

Here and on a worker elsewhere it is the same process: what it gets is the job, and nothing of the one that asks.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import signal
import sys
import time
import traceback
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from osbuild import options, signals
from osbuild.cache import Cache, default_cache
from osbuild.console import PLAIN, Show
from osbuild.errors import HostError, InputError, Interrupted, OsbuilderError
from osbuild.manifest import LOCK, MANIFEST
from osbuild.output import write_whole
from osbuild.report import Report
from osbuild.spec import BuildSpec, GuestSpec
from osbuild.tree import quote

LOG: Final = "log"
BUILD: Final = "build"
RESULT: Final = "result.json"
BOOTED: Final = "booted"
KERNEL, CELL = "kernel", "cell"
BUILT, UNCHANGED, FAILED, SKIPPED = "built", "unchanged", "failed", "skipped"
NEEDED = "needed"  # of a look: it is not there
# Of several exit codes the one that says most: a bug of ours, then what was asked for, refused, lacking, broken, wrong.
_WORST_FIRST: Final = (1, 2, 3, 4, 5, 6, 7)


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A stage or a cell, in words that survive JSON: no secret, and nothing of this machine but the paths in words."""

    kind: str
    name: str
    words: Mapping[str, Any]
    epoch: int | None
    look: bool = False  # only see whether it is there already
    publish: str = ""  # where a cell's build goes; of a kernel, the repository
    kernel: Mapping[str, str] = field(default_factory=dict)  # key and reference of one that a registry has
    shared: tuple[str, ...] = ()  # kinds of roots that other cells have, too
    store: str = ""  # where those lie
    signed_by: str = ""  # a public key in PEM: what a registry has counts only if its owner signed it

    def to_json(self) -> str:
        return json.dumps(asdict(self), default=str)  # paths

    @classmethod
    def parse(cls, text: str | bytes) -> Job:
        found = json.loads(text)
        return cls(**found | {"words": options.from_json(found["words"]), "shared": tuple(found["shared"])})


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What came of a job."""

    kind: str
    name: str
    verdict: str
    seconds: float = 0.0
    reason: str = ""
    hint: str = ""
    code: int = 0
    digest: str = ""  # of the build's manifest.json; of a kernel, its key
    published: str = ""  # digest of what the registry has
    note: str = ""
    where: str = ""  # the worker; empty: this machine
    lost: int = 0  # workers that ended while they had it
    kernel: Mapping[str, str] = field(default_factory=dict)  # as a job takes it

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        found = asdict(self)
        del found["kernel"]
        return found | {"seconds": round(self.seconds, 3)}

    @classmethod
    def parse(cls, text: str | bytes) -> Result:
        return cls(**json.loads(text))

    @classmethod
    def of_error(cls, job: Job, error: OsbuilderError, seconds: float = 0.0) -> Result:
        """A job that ended with an error raised on purpose."""
        return cls(
            kind=job.kind, name=job.name, verdict=FAILED, seconds=seconds, reason=str(error), hint=error.hint,
            code=error.code,
        )  # fmt: skip


def worst(codes: list[int]) -> int:
    """The exit code of several that ended with these."""
    return next((code for code in _WORST_FIRST if code in codes), max(codes, default=0))


def do(job: Job, home: Path, cache: Cache, show: Show) -> Result:
    """The job; every error raised on purpose is a result."""
    began = time.monotonic()
    try:
        result = _make_kernel(job, cache, show) if job.kind == KERNEL else _build(job, home, cache, show)
    except OsbuilderError as error:
        show.say(f"error: {error}")
        for line in (getattr(error, "tail", ""), *error.details, error.hint):
            if line:
                show.say(line)
        result = Result.of_error(job, error)
    except OSError as problem:
        where = f"{quote(str(problem.filename))}: " if problem.filename else ""
        result = Result.of_error(job, HostError(f"{where}{problem.strerror or problem}"))
    except MemoryError:
        result = Result.of_error(job, HostError("out of memory", hint="fewer at a time: -j"))
    except Exception as bug:  # of ours: the others go on, and the log has all of it
        traceback.print_exc()
        result = Result(
            kind=job.kind, name=job.name, verdict=FAILED, code=1, reason=f"a bug of osbuilder: {bug!r}",
            hint="its log has the rest",
        )  # fmt: skip
    return dataclasses.replace(result, seconds=time.monotonic() - began)


def _make_kernel(job: Job, cache: Cache, show: Show) -> Result:
    from osbuild import kernel, kernel_registry, kernel_steps

    spec = options.build_spec("", Path(), job.words, epoch=job.epoch)
    wanted = kernel_steps.kernel_spec(spec)
    if job.look and kernel.find_kernel(wanted, cache) is None:
        return Result(kind=KERNEL, name=job.name, verdict=NEEDED)
    made = kernel_steps.make_kernel(wanted, cache, show)
    road: dict[str, str] = {}
    if job.publish:
        reference = kernel_registry.put(made, job.publish, spec.registry, show)
        road = {"key": made.key, "reference": reference}
    return Result(
        kind=KERNEL, name=job.name, verdict=UNCHANGED if made.cached else BUILT, digest=made.key, kernel=road,
        note=f"{made.release}, {'from the cache' if made.cached else 'compiled'}",
    )  # fmt: skip


def _build(job: Job, home: Path, cache: Cache, show: Show) -> Result:
    from osbuild import kernel_registry, kernel_steps, pipeline
    from osbuild.shared_roots import SharedRoots

    out = home / BUILD
    spec = options.build_spec(options.image_of("", job.words), out, job.words, epoch=job.epoch)
    inputs = pipeline.find_inputs(spec, cache, show)
    known = _known(job, spec, out, inputs.lock, show)
    if known is not None or job.look:
        return known or Result(kind=CELL, name=job.name, verdict=NEEDED)
    if job.kernel:
        kernel_registry.get(job.kernel, kernel_steps.kernel_spec(spec), spec.registry, cache, show)
    (home / BOOTED).unlink(missing_ok=True)
    if _holds(out, inputs.lock):  # it lacks a boot that went well
        report: Report | None = pipeline.boot_again(out, spec.guest, show)
        verdict, note = UNCHANGED, "booted again"
    else:
        shared = SharedRoots(store=Cache(root=Path(job.store)), kinds=frozenset(job.shared)) if job.shared else None
        made = pipeline.build(spec, cache, show, inputs=inputs, shared=shared)
        report, verdict, note = made.report, BUILT, ""
    if report is not None and report.code:
        bad = next(boot for boot in report.boots if boot.verdict == report.verdict)
        return Result(
            kind=CELL, name=job.name, verdict=FAILED, code=report.code, reason=f"the {bad.name} guest: {bad.reason}",
            digest=_digest(out),
        )  # fmt: skip
    if report is not None:
        write_whole(home / BOOTED, _wishes(spec.guest).encode())
    return _finished(job, spec, out, verdict, note, show)


def _known(job: Job, spec: BuildSpec, out: Path, lock_now: Mapping[str, Any], show: Show) -> Result | None:
    """The result of a cell that needs no work: its build lies here, or in the registry, and was made of the same."""
    from osbuild import lock, matrix_index

    if _holds(out, lock_now) and (not spec.smoke or _booted(out) == _wishes(spec.guest)):
        return _finished(job, spec, out, UNCHANGED, "", show)
    if out.exists() or not job.publish:
        return None
    with show.step(f"looking for {job.publish}"):
        there = matrix_index.find_lock(job.publish, spec.registry, job.signed_by)
    if there is None or lock.differences(there.lock, dict(lock_now)):
        return None
    if spec.smoke and there.booted != _wishes(spec.guest):
        return None
    return Result(
        kind=CELL, name=job.name, verdict=UNCHANGED, digest=there.manifest, published=there.digest,
        note="the registry has it",
    )  # fmt: skip


def _holds(out: Path, now: Mapping[str, Any]) -> bool:
    """Whether a whole build of the same inputs lies there."""
    from osbuild import lock, manifest

    if not (out / MANIFEST).exists():
        return False
    try:
        if lock.differences(lock.read(out / LOCK), dict(now)):
            return False
        manifest.read(out)  # every file
    except InputError:
        return False
    return True


def _wishes(guest: GuestSpec) -> str:
    """A digest of how a cell is to be booted, and what is to be looked at."""
    return hashlib.sha256(json.dumps(asdict(guest), sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _booted(out: Path) -> str:
    """With which wishes what lies there booted well; empty when it did not."""
    from osbuild import report_page

    with contextlib.suppress(InputError, FileNotFoundError, UnicodeDecodeError):
        if report_page.read_report(out)["verdict"] == "passed":
            return (out.parent / BOOTED).read_text()
    return ""


def _finished(job: Job, spec: BuildSpec, out: Path, verdict: str, note: str, show: Show) -> Result:
    """A build that lies there whole: into the registry, where one is named."""
    from osbuild import publish

    published = ""
    if job.publish:
        published = publish.publish(
            [out], job.publish, spec.registry, show, booted=_booted(out), signed_by=job.signed_by
        ).digest
    return Result(
        kind=CELL, name=job.name, verdict=verdict, digest=_digest(out), published=published, note=note
    )  # fmt: skip


def _digest(out: Path) -> str:
    return hashlib.sha256((out / MANIFEST).read_bytes()).hexdigest()


def main() -> int:
    """The process: exit code 0 when there is a result."""
    signals.heed()
    home = Path(sys.argv[1])
    job = Job.parse(sys.stdin.buffer.read())
    try:
        result = do(job, home, default_cache(), Show(progress=PLAIN))
    except Interrupted as interruption:
        return interruption.code
    signals.heed_no_more(signal.SIG_IGN)  # it is done; half a result would be none
    write_whole(home / RESULT, json.dumps(asdict(result)).encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
