"""Jobs on many machines: the only user of Dask's distributed scheduler, on both sides of it.

The scheduler carries jobs and results, a few KiB each; what is made goes by way of the registry. A worker gives each
job a process of its own, which ends with the worker. When a worker ends in the middle of a job, Dask gives the job to
another; after its scheduler's `allowed-failures` (3, unless its configuration says otherwise) it gives up on the job.

No more jobs are handed out than there are threads to do them: Dask counts a lost worker against every job that it
had, also those that had not begun.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import re
import secrets
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import osbuild
from osbuild import command, lock
from osbuild.errors import HostError, SpecError
from osbuild.matrix_job import LOG, Job, Result
from osbuild.matrix_run import SHARED, collect, end_all, home_of, started
from osbuild.tree import quote

if TYPE_CHECKING:
    import distributed

_CONNECT_SECONDS: Final = 10.0
_WORKER_SECONDS: Final = 60.0  # until the first worker is there
_ALONE_SECONDS: Final = 600.0  # that a run waits for another worker when it has lost all
_LOOK_SECONDS: Final = 1.0
_POLL_SECONDS: Final = 0.1
_LOG_BYTES: Final = 1 << 16  # of a job's log that come back: the end
_URL: Final = re.compile(r"(?:tcp|tls|ucx)://[^/\s@]+:[0-9]{1,5}\Z")
_INSTALL: Final = "pip install 'CHECKOUT[fleet]' (osbuilder's source)"


def check_url(url: str) -> None:
    """SpecError when no scheduler can have such an address."""
    if not _URL.match(url):
        raise SpecError(f"{quote(url)} is no scheduler's address", hint="--scheduler tcp://HOST:8786")


@contextlib.contextmanager
def hired(url: str, out: Path) -> Iterator[Fleet]:
    """The workers of a scheduler; HostError in one line when there is no scheduler, no worker, or another osbuilder."""
    try:
        import distributed
    except ImportError:
        raise HostError("--scheduler needs Dask's distributed, which is not installed", hint=_INSTALL) from None
    logging.getLogger("distributed").setLevel(logging.CRITICAL)  # what we have to say about it, we say
    try:
        client = distributed.Client(url, timeout=_CONNECT_SECONDS, set_as_default=False)
    except (OSError, TimeoutError, ValueError) as problem:
        raise HostError(
            f"no scheduler answers at {url}: {_first_line(problem)}", hint="dask scheduler starts one"
        ) from None
    fleet = Fleet(client, url, out)
    try:
        fleet.look()
        yield fleet
    finally:
        fleet.end()
        with contextlib.suppress(Exception):  # it may have gone
            client.close(timeout=2)


class Fleet:
    """The crew of a scheduler's workers."""

    def __init__(self, client: distributed.Client, url: str, out: Path) -> None:
        self._client = client
        self._url = url
        self._out = out
        self._run = secrets.token_hex(6)
        self._running: dict[distributed.Future, tuple[Job, float]] = {}
        self._alone = 0.0  # since when there is no worker

    def look(self) -> None:
        """HostError unless there are workers, each with this osbuilder."""
        try:
            self._client.wait_for_workers(1, timeout=_WORKER_SECONDS)
        except TimeoutError:
            raise HostError(
                f"the scheduler at {self._url} has no worker", hint=f"on each machine: dask worker {self._url}"
            ) from None
        found: dict[str, Any] = self._client.run(about, on_error="return")
        for address, said in found.items():
            if isinstance(said, ImportError):
                raise HostError(f"the worker {address} has no osbuilder: {_first_line(said)}", hint=_same_everywhere())
            if isinstance(said, BaseException):
                raise HostError(f"the worker {address} cannot say which osbuilder it has: {_first_line(said)}")
            if (problem := _other(said)) is not None:
                raise HostError(f"the worker {address} has {problem}", hint=_same_everywhere())

    def free(self) -> bool:
        return not self._running or len(self._running) < self._threads()  # a lone worker that begins anew has none

    def start(self, job: Job) -> None:
        key = f"osbuilder-{self._run}-{job.kind}-{job.name}-{'look' if job.look else 'do'}"
        future = self._client.submit(on_worker, job.to_json(), about(), self._run, key=key, pure=False)
        self._running[future] = (job, time.monotonic())

    def wait(self) -> Result:
        while True:
            looked = time.monotonic()
            while time.monotonic() - looked < _LOOK_SECONDS:
                for future in list(self._running):
                    if future.done() and (result := self._result(future)) is not None:
                        del self._running[future]
                        return result
                time.sleep(_POLL_SECONDS)
            self._check_company()

    def end(self) -> None:
        """Nothing of ours goes on, and nothing of ours is left on a worker."""
        with contextlib.suppress(Exception):  # whoever does not answer has nothing of ours, or ends by itself
            for future in self._running:
                future.cancel()
            self._client.run(stop, self._run, on_error="ignore")
        self._running.clear()

    def _threads(self) -> int:
        return sum(self._ask(self._client.nthreads).values())

    def _ask(self, question: Callable[[], Any]) -> Any:  # Any: Dask does not say
        """HostError when the scheduler has gone."""
        if self._client.status not in ("running", "connecting"):
            raise self._gone()
        try:
            return question()
        except (OSError, AttributeError):  # a client that has given up has no scheduler to ask
            raise self._gone() from None

    def _check_company(self) -> None:
        """HostError when the scheduler has gone, or has had no worker for too long."""
        now = time.monotonic()
        self._alone = 0.0 if self._threads() else self._alone or now
        if self._alone and now - self._alone > _ALONE_SECONDS:
            raise HostError(f"the scheduler at {self._url} has no worker any more", hint="start one, and run it again")

    def _gone(self) -> HostError:
        return HostError(f"the scheduler at {self._url} has gone", hint="run it again: it goes on where it was")

    def _result(self, future: distributed.Future) -> Result | None:
        """None when its worker ended with the result: another does the job again."""
        from concurrent.futures import CancelledError

        from distributed.scheduler import KilledWorker

        job, began = self._running[future]
        seconds = time.monotonic() - began
        begun = self._begun(job)
        try:
            text, log = future.result(timeout=_CONNECT_SECONDS)
        except KilledWorker as killed:
            error = HostError(
                f"{killed.allowed_failures + 1} workers ended while they had it, the last at {_address(killed)}",
                hint="it ends every worker that takes it: memory? the workers' own logs say more",
            )
            return dataclasses.replace(Result.of_error(job, error, seconds), lost=killed.allowed_failures + 1)
        except CancelledError:
            raise self._gone() from None
        except Exception as problem:  # whatever a worker met before the job had begun
            if isinstance(problem, TimeoutError) and not future.done():
                return None
            return Result.of_error(job, HostError(f"no worker could begin it: {_first_line(problem)}"), seconds)
        home = home_of(self._out, job)
        home.mkdir(parents=True, exist_ok=True)
        (home / LOG).write_bytes(log)
        return dataclasses.replace(Result.parse(text), lost=max(begun - 1, 0))

    def _begun(self, job: Job) -> int:
        """How many workers began with a job."""
        events = self._ask(lambda: self._client.get_events(_topic(self._run)))
        found = [event for _, event in events if isinstance(event, dict)] if isinstance(events, tuple) else []
        return sum(
            tuple(event.get("job", ())) == (job.kind, job.name, job.look) for event in found
        )  # lists come as tuples


# --- on a worker --------------------------------------------------------------------------------------------------


_children: Final[dict[str, list[subprocess.Popen[bytes]]]] = {}  # run -> its processes here
_stopped: Final[set[str]] = set()
_guard: Final = threading.Lock()


def about() -> tuple[str, str]:
    """Which osbuilder this is: its version, and the digest of its code."""
    return osbuild.__version__, lock.code_digest()


def on_worker(text: str, wanted: tuple[str, str], run: str) -> tuple[str, bytes]:
    """A job here: the result as JSON, and the end of its log."""
    from distributed import get_worker

    worker = get_worker()
    job = Job.parse(text)
    worker.log_event(_topic(run), {"job": [job.kind, job.name, job.look]})
    if (problem := _other(wanted, about())) is not None:  # it came after the others had been asked
        error = HostError(f"the worker {worker.address} has {problem}", hint=_same_everywhere())
        return _pack(Result.of_error(job, error), worker.address), b""
    root = _root(worker.local_directory, run)
    home = home_of(root, job)
    began = time.monotonic()
    with started(dataclasses.replace(job, store=str(root / SHARED)), home) as process:
        with _guard:
            if run in _stopped:
                raise RuntimeError("nobody waits for it any more")
            _children.setdefault(run, []).append(process)
        try:
            while not command.has_ended(process):
                time.sleep(_POLL_SECONDS)
        finally:
            with _guard:
                _children[run].remove(process)
    result = collect(job, home, process.returncode, time.monotonic() - began)
    log = _end_of(home / LOG)
    with _guard:
        over = run in _stopped
    shutil.rmtree(root if over else home, ignore_errors=True)  # the registry has what is good
    return _pack(result, worker.address), log


def stop(run: str, dask_worker: Any) -> None:  # Any: Dask gives the worker under this name
    """End a run's processes here, and remove what it left."""
    with _guard:
        _stopped.add(run)
        end_all(_children.get(run, []))
    if not _children.get(run):
        shutil.rmtree(_root(dask_worker.local_directory, run), ignore_errors=True)


def _root(local_directory: str, run: str) -> Path:
    """What is in a worker's own directory goes with the worker, also when it was killed: Dask sees to that."""
    return Path(local_directory) / f"osbuilder-{run}"


def _pack(result: Result, address: str) -> str:
    import json

    return json.dumps(asdict(dataclasses.replace(result, where=address)))


def _end_of(log: Path) -> bytes:
    with contextlib.suppress(OSError), log.open("rb") as file:
        file.seek(max(log.stat().st_size - _LOG_BYTES, 0))
        return file.read()
    return b""


# --- both ---------------------------------------------------------------------------------------------------------


def _other(said: tuple[str, str], mine: tuple[str, str] | None = None) -> str | None:
    """How two osbuilders differ, in words about the one that is not the asker's; None when they do not."""
    asker, asked = (about(), said) if mine is None else (said, mine)
    if tuple(asked) == tuple(asker):
        return None
    if asked[0] != asker[0]:
        return f"osbuilder {asked[0]}, and this is {asker[0]}"
    return f"another osbuilder {asked[0]}: its code has the digest {asked[1][:12]}, this one's {asker[1][:12]}"


def _same_everywhere() -> str:
    return f"install the same on every worker: {_INSTALL} of version {osbuild.__version__}"


def _topic(run: str) -> str:
    return f"osbuilder-{run}"


def _address(killed: Any) -> str:  # Any: KilledWorker
    return str(getattr(killed.last_worker, "address", killed.last_worker))


def _first_line(problem: BaseException) -> str:
    lines = str(problem).strip().splitlines()
    return lines[0] if lines else type(problem).__name__
