"""The check `shares`: in real guests, and with guests and hosts that share wrongly in one way each."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from osbuild import smoke
from osbuild.artifacts import DiskImage, Initrd, Kernel
from osbuild.checks import SHARES, select, shares
from osbuild.findings import NotHere, Unclear, Wrong
from osbuild.probe import Refused
from osbuild.report import Check, SmokeReport, Verdict
from osbuild.runtime.base import Machine
from osbuild.runtime.shares import DAEMON, NINEP, VIRTIO_FS, Share, Shares, find_program
from tests.boot_fixtures import boot_kernel, boot_rootfs, good_image

__all__ = ["boot_kernel", "boot_rootfs", "good_image"]  # fixtures

# --- Guests ---


def boot(kernel: Kernel, root: Initrd | DiskImage, work: Path) -> tuple[SmokeReport, Check]:
    report = smoke.run(Machine(kernel=kernel, root=root, accel="tcg"), work, checks=(SHARES,), seconds=120)
    (found,) = [check for check in report.checks if check.name == SHARES]
    return report, found


@pytest.fixture
def no_daemon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("osbuild.runtime.shares._PLACES", ())
    monkeypatch.setenv("PATH", without(DAEMON))


def without(program: str) -> str:
    return os.pathsep.join(path for path in os.environ["PATH"].split(os.pathsep) if not Path(path, program).exists())


@pytest.mark.boot
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["microvm", "q35"])
def test_a_guest_shares_directories_both_ways(
    kind: str, boot_kernel: Kernel, busybox_initrd: Initrd, good_image: DiskImage, tmp_path: Path
) -> None:
    if os.geteuid() != 0 or shutil.which(find_program()) is None:
        pytest.skip("virtiofsd needs root")
    before = pid_files()
    report, found = boot(boot_kernel, busybox_initrd if kind == "microvm" else good_image, tmp_path)
    assert (report.verdict, found.verdict) == (Verdict.passed, Verdict.passed), found
    assert set(found.facts) == {VIRTIO_FS, NINEP}
    assert found.detail.count("no link leads out of it, but to the guest's own files") == 2
    assert all(len(facts["refused"]) == 5 for facts in found.facts.values())
    assert pid_files() == before, "a virtiofsd that makes its own socket leaves one of these"


def pid_files() -> set[str]:
    return set(os.listdir("/run/virtiofsd")) if Path("/run/virtiofsd").is_dir() else set()


@pytest.mark.boot
@pytest.mark.usefixtures("no_daemon")
def test_a_host_without_virtiofsd_is_told_and_what_9p_showed_with_it(
    boot_kernel: Kernel, busybox_initrd: Initrd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With attrcache= of our kernel's, for which a guest believes what it knows for a second."""
    monkeypatch.setitem(shares.OPTIONS, NINEP, (*shares.OPTIONS[NINEP], "attrcache=1000"))
    report, found = boot(boot_kernel, busybox_initrd, tmp_path)
    assert (report.verdict, found.verdict) == (Verdict.unknown, Verdict.unknown), "nobody saw virtio-fs"
    assert found.detail.startswith("9p: 256 KiB of the host's read")
    assert "virtio-fs is not here: virtiofsd is not installed: apt-get install virtiofsd" in found.detail
    assert "attrcache=1000" in found.facts[NINEP]["mounts"]["share-9p"]
    assert not report.command.count("-chardev vhost-user-fs")


@pytest.mark.boot
@pytest.mark.slow
@pytest.mark.usefixtures("no_daemon")
def test_a_guest_that_gets_what_a_link_leads_to_on_the_host_fails_the_check(
    boot_kernel: Kernel, busybox_initrd: Initrd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a server that follows links serves: here the file itself is where the link should be."""

    def followed(target: str, path: Path) -> None:
        path.hardlink_to(path.parent / target)

    monkeypatch.setattr(shares, "make_link", followed)
    report, found = boot(boot_kernel, busybox_initrd, tmp_path)
    assert (report.verdict, found.verdict) == (Verdict.failed, Verdict.failed), found
    assert found.detail == "9p: the guest finds no link where this host has one: it was followed"


# --- A guest that is played ---


class Played:
    """What the probe would answer, of directories that are here; and one thing about it that is wrong."""

    def __init__(self, found: Shares, fault: str) -> None:
        writable, read_only = found.of(NINEP)
        self.homes = {shares.HERE: writable.home, shares.READ_ONLY: read_only.home}
        self.fault = fault
        self.own: dict[Path, bytes] = {}  # files of the guest's, in no share

    def file(self, path: str) -> str:
        kind = "tmpfs" if self.fault == "nothing is mounted" else "9p"
        return "".join(f"share {there} {kind} rw,nodev 0 0\n" for there in self.homes)

    def remove(self) -> None:
        pass

    def ask(self, verb: str, *words: str) -> bytes:
        on_read_only = any(word.startswith(shares.READ_ONLY) for word in words)
        if on_read_only and verb in ("put", "rename", "remove", "symlink") and self.fault != f"read-only {verb}":
            raise Refused(f"{words[0]}: {'Input/output error' if self.fault == 'odd' else 'Read-only file system'}")
        try:
            return self._do(verb, *words)
        except OSError as problem:
            if self.fault == "remembers" and verb == "at":
                return b"1\nx"
            raise Refused(f"{words[0]}: {problem.strerror}") from None

    def _do(self, verb: str, *words: str) -> bytes:
        path = self._here(words[0])
        match verb:
            case "file":
                data = self._data(path)
                return data[:-1] + b"?" if self.fault == f"reads {path.name}" else data
            case "link":
                if self.fault == "follows":
                    raise OSError(22, "Invalid argument")
                return os.fsencode("elsewhere" if self.fault == "links" else path.readlink())
            case "at":
                return self._at(path, int(words[1]))
            case "put" if path == Path(words[0]):
                self.own[path] = words[1].encode()
            case "put":
                if path.is_symlink() and self.fault != "writes outside":
                    raise FileNotFoundError(2, "No such file or directory")
                path.write_text("?" if self.fault == "writes" else words[1])
            case "rename":
                if self.fault != "renames nothing":
                    path.rename(self._here(words[1]))
            case "remove":
                if self.fault != "removes nothing":
                    path.unlink()
            case "symlink":
                self._here(words[1]).symlink_to("/other" if self.fault == "makes links" else words[0])
        return b""

    def _here(self, path: str) -> Path:
        for there, home in self.homes.items():
            if path.startswith(f"{there}/"):
                return home / path.removeprefix(f"{there}/")
        return Path(path)

    def _data(self, path: Path) -> bytes:
        if path == Path(shares.BOOT):
            return b"the guest's own boot"
        if not (path.is_symlink() or ".." in path.parts or path.parent.is_symlink()):
            return self.own[path] if path in self.own else path.read_bytes()
        follows = self.fault in ("reads outside", f"follows {path.name}", f"follows {path.parent.name}")
        if (follows and self.own) or self.fault == "reads outside":
            return path.read_bytes()
        if self.fault == "leads astray" and self.own:
            return b"something"
        if path.name == "boot":
            return self._data(Path(shares.BOOT))
        if not self.own:
            raise FileNotFoundError(2, "No such file or directory")
        (own,) = self.own.values()
        return own

    def _at(self, path: Path, offset: int) -> bytes:
        with path.open("rb") as file:
            file.seek(offset)
            data = file.read(64)
        size = path.stat().st_size
        return b"%d\n%b" % (size & 0xFFFFFFFF if self.fault == "32 bits" else size, data[self.fault == "end" :])


@pytest.fixture
def found(tmp_path: Path) -> Shares:
    made = []
    for tag, read_only in (("rw", False), ("ro", True)):
        (tmp_path / tag).mkdir()
        made.append(Share(way=NINEP, tag=tag, home=tmp_path / tag, read_only=read_only, refuses=read_only))
    return Shares(home=tmp_path, shares=tuple(made), missing={})


def look(found: Shares, fault: str = "") -> str:
    played = Played(found, fault)
    session: Any = SimpleNamespace(facts={}, guest=SimpleNamespace(shares=found), start_probe=lambda **_: played)
    return shares.look(session)


def test_a_guest_that_shares_rightly_passes(found: Shares) -> None:
    assert look(found).startswith("9p: 256 KiB of the host's read, and the guest's here; renamed and removed")


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("nothing is mounted", "what the guest has at /dev/shared is tmpfs"),
        ("reads nonce", "reads other bytes of nonce"),
        ("reads bytes", "reads other bytes of bytes"),
        ("writes", "the guest wrote 32 bytes, and 1 others are here"),
        ("remembers", "what the host renamed, the guest does not see within 0.1 s"),
        ("renames nothing", "the guest renamed a file, and the host has 'bytes', 'from-guest'"),
        ("removes nothing", "the guest removed a file, and the host has 'bytes', 'moved'"),
        ("32 bits", "a file of 5368709152 bytes has 1073741856 in the guest"),
        ("end", "the end of a file of 5368709152 bytes is another"),
        ("links", "a link says another thing in the guest than here"),
        ("makes links", "a link says another thing here than in the guest"),
        ("follows", "the guest finds no link where this host has one: it was followed"),
        ("follows relative", "the link relative leads the guest to a file of the host's"),
        ("follows boot", "the link boot leads the guest to a file of the host's"),
        ("follows up", "the link up/outside-9p leads the guest to a file of the host's"),
        ("leads astray", "the link relative leads the guest neither to its own file nor to the host's"),
        ("reads outside", "reads a file of the host's that is not in the share"),
        ("writes outside", "writes to a file of the host's that is not in the share"),
        ("read-only put", "the guest can put in its read-only share"),
        ("read-only rename", "the guest can rename in its read-only share"),
        ("read-only remove", "the guest can remove in its read-only share"),
        ("read-only symlink", "the guest can symlink in its read-only share"),
        ("odd", "in the guest's read-only share, put: /dev/read-only/new: Input/output error"),
    ],
)
def test_what_is_wrong_with_a_share_is_named(
    fault: str, said: str, found: Shares, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shares, "_SECONDS", 0.1)
    with pytest.raises(Wrong) as caught:
        look(found, fault)
    assert said in str(caught.value)


def test_a_link_that_a_guest_has_put_in_the_hosts_way_is_not_followed(found: Shares, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("whole")
    (tmp_path / "rw" / "nonce").symlink_to(victim)
    with pytest.raises(Unclear, match="the host's side of a share: File exists"):
        look(found)
    assert victim.read_text() == "whole"
    with pytest.raises(OSError, match="symbolic links"):
        shares.take(tmp_path / "rw" / "nonce")


def test_a_way_that_is_not_here_leaves_the_check_out_and_says_what_was_seen(found: Shares) -> None:
    missing = Shares(home=found.home, shares=found.shares, missing={VIRTIO_FS: "virtiofsd is not installed"})
    with pytest.raises(NotHere, match=r"^9p: 256 KiB .* virtio-fs is not here: virtiofsd is not installed$"):
        look(missing)


def test_only_who_asks_shares_anything(boot_kernel: Kernel, good_image: DiskImage) -> None:
    machine = Machine(kernel=boot_kernel, root=good_image)
    assert SHARES not in select((), machine)
    assert not machine.shares
    assert shares.prepare(machine).shares


@pytest.mark.parametrize(
    ("read_only", "refuses", "ro"), [(False, False, False), (True, True, False), (True, False, True)]
)
def test_only_a_share_that_the_host_does_not_guard_is_mounted_read_only(
    read_only: bool, refuses: bool, ro: bool
) -> None:
    share = Share(way=VIRTIO_FS, tag="t", home=Path("/h"), read_only=read_only, refuses=refuses)
    made = shares.storage(share)
    assert ("ro" in made.options) is ro
    assert (made.driver, made.fstype, made.source) == ("virtio-fs", "virtiofs", "t")
