"""Directories of this host that the guest shares: by virtio-fs, where there is a virtiofsd, and by 9p.

Each is a storage of the agent's, and what looks at it is the probe in a container that has it bound, as Kata's are:

    files        what either side writes, the other reads; a large one to its end; renamed or removed, gone for both
    links        say the same on both sides, and one that leads out of the share leads to the guest's own files
    read-only    a second share refuses all that would change it
"""

from __future__ import annotations

import dataclasses
import os
import secrets
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, Final

from osbuild import agent_process
from osbuild.agent_values import Storage
from osbuild.checks.base import Session
from osbuild.container import Mount
from osbuild.findings import NotHere, Unclear, Wrong
from osbuild.probe import Probe, Refused
from osbuild.runtime.base import Machine
from osbuild.runtime.shares import NINEP, VIRTIO_FS, Share, Shares

HERE: Final = "/dev/shared"  # in the container, whose /dev is a tmpfs: its root may be read-only
READ_ONLY: Final = "/dev/read-only"
BOOT: Final = "/proc/sys/kernel/random/boot_id"  # every machine's own, and not the same twice
_ABOVE: Final = "/dev"  # where .. of a share leads
BYTES: Final = 256 << 10  # more than one message of either protocol
LARGE: Final = 5 << 30  # of which no byte is stored but the last ones: more than 32 bits hold

_TYPES: Final = {VIRTIO_FS: "virtiofs", NINEP: "9p"}
# As Kata's runtime mounts 9p; the agent adds transport and version.
OPTIONS: Final[dict[str, tuple[str, ...]]] = {VIRTIO_FS: ("nodev",), NINEP: ("nodev", "cache=mmap", "msize=8192")}
_SECONDS: Final = 10.0  # after which what was changed must be seen; the guest believes what it knows for a second
_POLL_SECONDS: Final = 0.02
_LONGEST: Final = 1 << 20  # bytes that are read of what a guest has written
_GONE: Final = "No such file or directory"
_NO_LINK: Final = "Invalid argument"  # readlink(2), of what is none
_REFUSALS: Final = ("Read-only file system", "Permission denied", "Operation not permitted")


def prepare(machine: Machine) -> Machine:
    return dataclasses.replace(machine, shares=True)


def look(session: Session) -> str:
    shares = session.guest.shares
    if shares is None:
        raise NotHere("this guest shares no directory")
    try:
        told = [f"{way}: {'; '.join(_Look(session, shares, way).tell())}" for way in shares.ways]
    except OSError as problem:
        raise Unclear(f"the host's side of a share: {problem.strerror or problem}") from problem
    if shares.missing:
        raise NotHere(". ".join((*told, *(f"{way} is not here: {why}" for way, why in shares.missing.items()))))
    return ". ".join(told)


class _Look:
    """One way to share, from both sides."""

    def __init__(self, session: Session, shares: Shares, way: str) -> None:
        self._shares, self._way = shares, way
        self._writable, self._read_only = shares.of(way)
        self._home = self._writable.home
        self._facts: dict[str, Any] = session.facts.setdefault(way, {})
        self._session = session
        self._secret = secrets.token_hex(16)
        self._outside = shares.home / f"outside-{way}"

    def tell(self) -> Iterator[str]:
        """Each step, in words, once it was seen."""
        self._probe = self._start()
        yield from (self._files(), self._changes(), self._large(), self._links(), self._refused())
        self._probe.remove()

    def _start(self) -> Probe:
        places = {HERE: self._writable, READ_ONLY: self._read_only}
        probe = self._session.start_probe(
            storages=[storage(share) for share in places.values()],
            mounts=[
                Mount(destination=there, source=mount_point(share), kind="bind", options=("rbind", "rprivate"))
                for there, share in places.items()
            ],
        )
        mounts = probe.file("/proc/self/mounts")
        self._facts["mounts"] = {share.tag: mounted(mounts, there, self._way) for there, share in places.items()}
        return probe

    # Files

    def _files(self) -> str:
        data = secrets.token_bytes(BYTES)
        put(self._home / "nonce", self._secret.encode())
        put(self._home / "bytes", data)
        self._same("nonce", self._secret.encode())
        self._same("bytes", data)
        self._ask("put", f"{HERE}/from-guest", self._secret)
        if (found := take(self._home / "from-guest")) != self._secret.encode():
            raise Wrong(f"{self._way}: the guest wrote 32 bytes, and {len(found)} others are here")
        return f"{BYTES >> 10} KiB of the host's read, and the guest's here"

    def _same(self, name: str, data: bytes) -> None:
        if self._ask("file", f"{HERE}/{name}") != data:
            raise Wrong(f"{self._way}: the guest reads other bytes of {name} than the host wrote")

    def _changes(self) -> str:
        (self._home / "nonce").rename(self._home / "renamed")
        self._seen("renamed_s", lambda: self._is_gone("nonce") and not self._is_gone("renamed"))
        self._same("renamed", self._secret.encode())
        (self._home / "renamed").unlink()
        self._seen("removed_s", lambda: self._is_gone("renamed"))
        self._ask("rename", f"{HERE}/from-guest", f"{HERE}/moved")
        self._names({"bytes", "moved"}, "the guest renamed a file")
        self._ask("remove", f"{HERE}/moved")
        self._names({"bytes"}, "the guest removed a file")
        slowest = max(self._facts["renamed_s"], self._facts["removed_s"])
        return f"renamed and removed on either side is seen on the other, within {slowest:.1f} s"

    def _is_gone(self, name: str) -> bool:
        try:
            self._probe.ask("at", f"{HERE}/{name}", "0", "1")
        except Refused as problem:
            if _GONE in str(problem):
                return True
            raise Wrong(f"{self._way}: in the guest, {problem}") from problem
        return False

    def _seen(self, name: str, good: Callable[[], bool]) -> None:
        began = time.monotonic()
        while not good():
            if time.monotonic() > began + _SECONDS:
                what = name.removesuffix("_s")
                raise Wrong(f"{self._way}: what the host {what}, the guest does not see within {_SECONDS:g} s")
            time.sleep(_POLL_SECONDS)
        self._facts[name] = time.monotonic() - began

    def _names(self, wanted: set[str], what: str) -> None:
        if (found := set(os.listdir(self._home))) != wanted:
            raise Wrong(f"{self._way}: {what}, and the host has {', '.join(sorted(map(repr, found)))}")

    def _large(self) -> str:
        end = self._secret.encode()
        put(self._home / "large", end, at=LARGE)
        answer = self._ask("at", f"{HERE}/large", str(LARGE), "64")
        judge_large(self._way, answer, LARGE + len(end), end)
        return f"a file of {(LARGE + len(end)) / (1 << 30):.0f} GiB has its size and its end"

    # Links

    def _links(self) -> str:
        put(self._outside, self._secret.encode())
        leading = {"absolute": str(self._outside), "relative": f"../{self._outside.name}"}
        for name, target in leading.items():
            make_link(target, self._home / name)
            self._reads(name, target)
            self._stays_out("file", f"{HERE}/{name}")
            self._stays_out("put", f"{HERE}/{name}", "written by a guest")
        self._stays_out("file", f"{HERE}/../{self._outside.name}")
        self._ask("symlink", leading["relative"], f"{HERE}/its")
        if (self._home / "its").readlink() != Path(leading["relative"]):
            raise Wrong(f"{self._way}: a link says another thing here than in the guest, which made it")
        self._stays_out("file", f"{HERE}/its")
        self._lead_to_its_own()
        return "no link leads out of it, but to the guest's own files"

    def _reads(self, name: str, target: str) -> None:
        """A server that follows links by itself shows what they lead to, and no link."""
        try:
            said = self._probe.ask("link", f"{HERE}/{name}")
        except Refused as problem:
            if _NO_LINK in str(problem):
                raise Wrong(f"{self._way}: the guest finds no link where this host has one: it was followed") from None
            raise Wrong(f"{self._way}: in the guest, link: {problem}") from problem
        if said != os.fsencode(target):
            raise Wrong(f"{self._way}: a link says another thing in the guest than here")

    def _lead_to_its_own(self) -> None:
        """Both machines have such files, and each its own: what is read by a link must be the guest's."""
        own = secrets.token_hex(16)
        name = self._outside.name
        self._ask("put", f"{_ABOVE}/{name}", own)
        make_link("..", self._home / "up")
        make_link(BOOT, self._home / "boot")
        wanted = {
            "relative": own.encode(), "its": own.encode(), f"up/{name}": own.encode(), "boot": self._ask("file", BOOT),
        }  # fmt: skip
        for link, mine in wanted.items():
            found = self._ask("file", f"{HERE}/{link}")
            judge_led(self._way, link, found, mine, (self._secret.encode(), Path(BOOT).read_bytes()))

    def _stays_out(self, *words: str) -> None:
        """What the guest finds at such a place is its own, mostly nothing; never this host's."""
        try:
            answer = self._probe.ask(*words)
        except Refused:
            answer = b""
        secret = self._secret.encode()
        if secret in answer:
            raise Wrong(f"{self._way}: the guest reads a file of the host's that is not in the share, by {words[1]}")
        if take(self._outside) != secret:
            raise Wrong(
                f"{self._way}: the guest writes to a file of the host's that is not in the share, by {words[1]}"
            )

    # The read-only one

    def _refused(self) -> str:
        home = self._read_only.home
        put(home / "nonce", self._secret.encode())
        if self._ask("file", f"{READ_ONLY}/nonce") != self._secret.encode():
            raise Wrong(f"{self._way}: the guest reads other bytes of the read-only share than the host wrote")
        attempts = (
            ("put", f"{READ_ONLY}/new", "x"), ("put", f"{READ_ONLY}/nonce", "x"), ("symlink", "x", f"{READ_ONLY}/new"),
            ("rename", f"{READ_ONLY}/nonce", f"{READ_ONLY}/new"), ("remove", f"{READ_ONLY}/nonce"),
        )  # fmt: skip
        words = [self._refusal(*attempt) for attempt in attempts]
        if os.listdir(home) != ["nonce"] or take(home / "nonce") != self._secret.encode():
            raise Wrong(f"{self._way}: the read-only share has changed, though each attempt was refused")
        self._facts["refused"] = words
        by = "the host" if self._read_only.refuses else "the guest's mount only, for this virtiofsd cannot refuse"
        return f"a read-only one refuses {len(words)} kinds of change (by {by})"

    def _refusal(self, *words: str) -> str:
        try:
            self._probe.ask(*words)
        except Refused as problem:
            if any(word in str(problem) for word in _REFUSALS):
                return f"{words[0]}: {str(problem).rpartition(': ')[2]}"
            raise Wrong(f"{self._way}: in the guest's read-only share, {words[0]}: {problem}") from problem
        raise Wrong(f"{self._way}: the guest can {words[0]} in its read-only share")

    def _ask(self, *words: str) -> bytes:
        try:
            return self._probe.ask(*words)
        except Refused as problem:
            raise Wrong(f"{self._way}: in the guest, {words[0]}: {problem}") from problem


# --- Decisions ------------------------------------------------------------------------------------------------------


def mount_point(share: Share) -> str:
    """Where in the guest the agent mounts it."""
    return f"{agent_process.SHARED}/{share.tag}"


def storage(share: Share) -> Storage:
    """What the agent is told. A share that the host guards is mounted for writing: it is the host who is to refuse."""
    access = ("ro",) if share.read_only and not share.refuses else ()
    return Storage(
        driver=share.way, source=share.tag, fstype=_TYPES[share.way], mount_point=mount_point(share),
        options=(*OPTIONS[share.way], *access),
    )  # fmt: skip


def mounted(mounts: str, there: str, way: str) -> str:
    """The options of what is mounted there, out of /proc/self/mounts; Wrong when it is something else."""
    found = [line.split() for line in mounts.splitlines()]
    rows = [row for row in found if len(row) > 3 and row[1] == there]
    if not rows or rows[-1][2] != _TYPES[way]:
        raise Wrong(f"{way}: what the guest has at {there} is {rows[-1][2] if rows else 'nothing'}")
    return rows[-1][3]


def judge_large(way: str, answer: bytes, size: int, end: bytes) -> None:
    """Wrong when a file has another size in the guest, or another end; ValueError for what is no answer."""
    said, _, data = answer.partition(b"\n")
    if int(said) != size:
        raise Wrong(f"{way}: a file of {size} bytes has {int(said)} in the guest")
    if data != end:
        raise Wrong(f"{way}: the end of a file of {size} bytes is another in the guest")


def judge_led(way: str, link: str, found: bytes, own: bytes, hosts: Collection[bytes]) -> None:
    """Wrong when a link that leads out of a share leads a guest elsewhere than to its own file."""
    if found in hosts:
        raise Wrong(f"{way}: the link {link} leads the guest to a file of the host's that is not in the share")
    if found != own:
        raise Wrong(f"{way}: the link {link} leads the guest neither to its own file nor to the host's")


# --- The host's side ------------------------------------------------------------------------------------------------


def put(path: Path, data: bytes, *, at: int = 0) -> None:
    """A new file; a link that the guest has put in its way is not followed."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    with open(file, "wb") as stream:  # noqa: PTH123 - a descriptor
        stream.seek(at)
        stream.write(data)


def make_link(target: str, path: Path) -> None:
    path.symlink_to(target)


def take(path: Path) -> bytes:
    """What is in a file, by no link; nothing of what is no file."""
    file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(file, "rb") as stream:  # noqa: PTH123 - a descriptor
        return stream.read(_LONGEST)
