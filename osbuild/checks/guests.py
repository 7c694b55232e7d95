"""Several guests of one image have its bytes once between them: each reads all of its root, and then this machine's
memory for the image is counted as the kernel shares it out (PSS), not as each of the VMMs sees it (RSS).
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from osbuild.artifacts import DiskImage
from osbuild.checks import mapped as is_mapped
from osbuild.checks.base import Session
from osbuild.findings import NotHere, Unclear, Wrong
from osbuild.runtime import RUNTIMES
from osbuild.runtime.base import Machine, make_nonce
from osbuild.ttrpc import CallTimeout, PeerClosed
from osbuild.watcher import Watcher

_ALL: Final = 1 << 62
_READ_SECONDS: Final = 300.0  # for each guest there is, for all of them to read their roots
_MORE: Final = 1.05  # of what one of them has: they read the same, so what is more is not shared


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """What one VMM has of its image."""

    pss_kib: int
    rss_kib: int
    read_kib: int  # what its guest has read of it


def look(session: Session) -> str:
    root = session.machine.root
    if not isinstance(root, DiskImage) or not is_mapped(session.machine):
        raise NotHere("only an NVDIMM that is mapped is shared by guests")
    if session.guests < 2:
        raise NotHere("one guest shares with nobody (--guests)")
    with contextlib.ExitStack() as stack:
        everyone = [session, *(stack.enter_context(_booted(session, one)) for one in machines(session))]
        for other in everyone[1:]:
            _wait(other)
        question = ("drain", "/", str(_ALL), str(session.longest()))
        seconds = _READ_SECONDS * len(everyone)
        read = [
            session.without_holes(int(one.probe.facts(*question, seconds=seconds)["bytes"])) >> 10 for one in everyone
        ]
        shares = [
            _share(one.guest.process.pid, one.machine.root.file.path, kib)
            for one, kib in zip(everyone, read, strict=True)
        ]
    size = root.file.size >> 10
    session.facts.update(
        guests=len(shares), image_kib=size, pss_kib=sum(one.pss_kib for one in shares),
        rss_kib=sum(one.rss_kib for one in shares), read_kib=sum(read),
        each=[dataclasses.asdict(one) for one in shares],
    )  # fmt: skip
    return judge(shares, size)


def machines(session: Session) -> list[Machine]:
    """The others."""
    return [dataclasses.replace(session.machine, nonce=make_nonce()) for _ in range(session.guests - 1)]


def judge(shares: Sequence[Share], size_kib: int) -> str:
    """Wrong when the memory for the image grows with the guests; Unclear when they do not have it mapped."""
    pss, rss = sum(one.pss_kib for one in shares), sum(one.rss_kib for one in shares)
    if small := [one for one in shares if one.rss_kib < one.read_kib]:
        raise Unclear(f"a guest has read {small[0].read_kib} KiB, and its VMM has only {small[0].rss_kib} KiB mapped")
    one = max(share.rss_kib for share in shares)
    if pss > one * _MORE:
        raise Wrong(f"{len(shares)} guests have {pss} KiB of memory for an image of which each sees {one} KiB")
    return (
        f"{len(shares)} guests have {pss >> 10} MiB of memory between them for their image of {size_kib >> 10} MiB"
        f" (each sees its own: {rss >> 10} MiB)"
    )


def _wait(other: Session) -> None:
    try:
        other.client.wait(other.left)
    except CallTimeout as problem:
        raise Unclear(f"another guest of the same does not answer: {problem} ({other.guest.console})") from None
    except PeerClosed as problem:
        raise Wrong(f"another guest of the same does not boot: {problem} ({other.guest.console})") from None


@contextlib.contextmanager
def _booted(session: Session, machine: Machine) -> Iterator[Session]:
    """Another guest, for the length of the block; it is asked later, for all of them start at once."""
    work = session.work / f"guest-{machine.nonce}"
    seconds = session.seconds * session.guests  # they share the processors
    with RUNTIMES[session.vmm].start(machine, work) as guest, Watcher(guest) as watcher:
        other = Session(
            machine=machine, guest=guest, watcher=watcher, deadline=time.monotonic() + seconds, work=work,
            vmm=session.vmm,
        )  # fmt: skip
        with other.connections:
            yield other


def _share(process: int, image: Path, read_kib: int) -> Share:
    try:
        text = Path(f"/proc/{process}/smaps").read_text(errors="surrogateescape")
    except OSError as problem:
        raise Unclear(f"the mappings of a VMM cannot be read: {problem.strerror}") from problem
    numbers = mapped(text, os.path.realpath(image))
    return Share(pss_kib=numbers["Pss"], rss_kib=numbers["Rss"], read_kib=read_kib)


def mapped(smaps: str, path: str) -> dict[str, int]:
    """KiB of a file's mappings, out of /proc/PID/smaps: Pss and Rss."""
    found = {"Pss": 0, "Rss": 0}
    inside = False
    for line in smaps.splitlines():
        name, colon, value = line.partition(":")
        if colon and name.isidentifier():
            if inside and name in found:
                found[name] += int(value.split()[0])
        else:
            fields = line.split(maxsplit=5)
            inside = len(fields) == 6 and fields[5].replace("\\012", "\n") == path
    return found
