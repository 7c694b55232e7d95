"""A root behind dm-verity: a guest boots with its hash, and does not boot when one byte of it is another.

The byte is in the filesystem's first kibibyte, which ext4 and erofs do not look at: only who checks each block sees it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from osbuild import smoke
from osbuild.artifacts import DiskImage, File
from osbuild.borrowed import Borrowed
from osbuild.checks.base import Session
from osbuild.disk_layout import read_layout
from osbuild.errors import HostError
from osbuild.findings import NotHere, Wrong
from osbuild.probe import Refused
from osbuild.report import SmokeReport, Verdict
from osbuild.runtime.base import make_nonce
from osbuild.tree import write_all

CAUSE: Final = "verity"  # as autopsy calls it
_FLIPPED: Final = 100  # bytes after the filesystem's start
_PIECE: Final = 1 << 20
_COPY: Final = "flipped.img"
_DEVICE: Final = "/sys/block/dm-0"


def look(session: Session) -> str:
    root = session.machine.root
    if not isinstance(root, DiskImage) or not root.verified:
        raise NotHere("this guest's root is not behind dm-verity")
    if root.format != "raw":
        raise NotHere(f"no byte of a {root.format} image can be changed here")
    told = device(session)
    with flipped(root, session.work / _COPY) as other:
        machine = dataclasses.replace(session.machine, root=other, nonce=make_nonce())
        # Its own deadline: it has as long as this guest had.
        report = smoke.run(machine, session.work / "flipped", name="flipped", vmm=session.vmm, seconds=session.seconds,
                           checks=("agent.check",))  # fmt: skip
    session.facts["flipped"] = {"verdict": report.verdict, "reason": report.reason, "seconds": round(report.seconds, 3)}
    return f"{told}; {judge(report)}"


def device(session: Session) -> str:
    """The device-mapper's device is there, and cannot be written."""
    try:
        if session.probe.file(f"{_DEVICE}/ro").strip() != "1":
            raise Wrong("the verified device can be written")
        name = session.facts["device"] = session.probe.file(f"{_DEVICE}/dm/name").strip()
    except Refused as problem:
        raise Wrong(f"there is no verified device: {problem}") from None
    return f"the root is the read-only device {name}"


def judge(report: SmokeReport) -> str:
    """Wrong when a guest boots from a root that is not what was hashed, or fails for another reason."""
    if report.verdict is Verdict.passed:
        raise Wrong("a guest boots although a byte of its image is another")
    if report.cause is None or report.cause.name != CAUSE:
        raise Wrong(f"with a byte changed, the guest does not say that verity found it: {report.reason}")
    return "with a byte changed, a guest does not boot, and says so"


@contextlib.contextmanager
def flipped(image: DiskImage, path: Path) -> Iterator[DiskImage]:
    """A copy with one byte changed, for the length of the block."""
    layout = read_layout(Borrowed(image.file.path))
    if layout is None or not layout.partitions:
        raise Wrong("the image has no partition")
    at = layout.partitions[0].start + _FLIPPED
    try:
        _copy(image.file.path, path)
        with path.open("r+b", buffering=0) as file:
            (byte,) = os.pread(file.fileno(), 1, at)
            os.pwrite(file.fileno(), bytes([byte ^ 1]), at)
    except OSError as problem:
        path.unlink(missing_ok=True)
        raise HostError(
            f"cannot copy {image.file.path}: {problem.strerror}", hint="make room for one more"
        ) from problem
    try:  # what the block raises is no copy's
        yield dataclasses.replace(image, file=File(path=path, size=image.file.size, sha256=""))
    finally:
        path.unlink(missing_ok=True)


def _copy(source: Path, target: Path) -> None:
    """The same bytes, and the same holes."""
    with source.open("rb") as old, target.open("wb") as new:
        size = os.fstat(old.fileno()).st_size
        os.ftruncate(new.fileno(), size)
        at = 0
        while at < size:
            try:
                at = os.lseek(old.fileno(), at, os.SEEK_DATA)
            except OSError as problem:
                if problem.errno == errno.ENXIO:  # only a hole is left
                    return
                raise
            end = os.lseek(old.fileno(), at, os.SEEK_HOLE)
            while at < end:
                data = os.pread(old.fileno(), min(end - at, _PIECE), at)
                if not data:
                    return
                write_all(new.fileno(), data, at)
                at += len(data)
