"""patches/6.12: 9p answers stat from the cached inode where the mount asks for it, seen in a guest and from its host.

One guest mounts one directory of the host four times: as Kata does, and with attrcache= for a second or for an hour.
What is believed for an hour shows what is remembered; what is believed for a second, that it is forgotten.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from osbuild.agent_client import AGENT
from osbuild.arch import X86_64
from osbuild.artifacts import Initrd, Kernel
from tests.agent_container import DEV, DOCKER, PROC, Containers, Message, description, process
from tests.agent_disks import SHARED, put_wrapper
from tests.agent_guest import booted

pytestmark = [
    pytest.mark.boot,
    pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc is not installed"),
    pytest.mark.skipif(shutil.which(X86_64.qemu) is None, reason=f"{X86_64.qemu} is not installed"),
    pytest.mark.skipif(os.geteuid() != 0, reason="files that are given away on a shared directory need root"),
]

HOUR, SECOND = 3_600_000, 1000
MOUNTS: Final = {
    "plain": ["cache=mmap"],
    "hour": ["cache=mmap", f"attrcache={HOUR}"],
    "second": ["cache=mmap", f"attrcache={SECOND}"],
    "none": ["cache=none", f"attrcache={HOUR}"],
}
ASKING: Final = ("hour", "none")
MEASURED_MS: Final = "500"
FILES: Final = [f"deep/er/still/{number}" for number in range(20)]


def storage(tag: str, options: list[str]) -> Message:
    return {"driver": "9p", "source": tag, "fstype": "9p", "mount_point": f"{SHARED}/{tag}", "options": options}


class Share:
    """The directory here, and a shell in the guest that sees it as /plain, /hour, /second and /none."""

    def __init__(self, home: Path, containers: Containers, name: str) -> None:
        self.home, self.containers, self.name = home, containers, name

    def sh(self, script: str) -> str:
        """What a script in the guest prints, without the last newline."""
        status, text = self.containers.run_in(self.name, "sh", "-c", script, capabilities=[*DOCKER, "CAP_SYS_ADMIN"])
        assert status == 0, text
        return text.removesuffix("\n")

    def size(self, path: str) -> int:
        return int(self.sh(f"stat -c %s {path}"))

    def storm(self, *words: str) -> int:
        return int(self.sh(f"/plain/storm {' '.join(words)}"))


@pytest.fixture(scope="module")
def guest(kernel: Kernel, busybox_initrd: Initrd, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Share]:
    home = tmp_path_factory.mktemp("ninep")
    shared = home / "shared"
    for name in FILES:
        (shared / name).parent.mkdir(parents=True, exist_ok=True)
        (shared / name).write_text("x")
    source = Path(__file__).parent / "ninep/storm.c"
    subprocess.run(["gcc", "-O1", "-Wall", "-Werror", "-static", "-o", shared / "storm", source], check=True)
    arguments = []
    for tag in (*MOUNTS, "spare"):
        arguments += ["-fsdev", f"local,id={tag},path={shared},security_model=none"]
        arguments += ["-device", f"virtio-9p-device,fsdev={tag},mount_tag={tag}"]
    put_wrapper(home, arguments)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{home / 'bin'}:{os.environ['PATH']}")
        with booted(kernel, busybox_initrd, home / "work") as client:
            client.call(AGENT, "CreateSandbox", storages=[storage(tag, options) for tag, options in MOUNTS.items()])
            binds = [
                {"destination": f"/{tag}", "type": "bind", "source": f"{SHARED}/{tag}", "options": ["rbind", "rw"]}
                for tag in MOUNTS
            ]
            containers = Containers(client)
            oci = description(Path("/"), process("sleep", "100000"), mounts=[PROC, DEV, *binds])
            yield Share(shared, containers, containers.start(oci))


@pytest.fixture
def share(guest: Share, request: pytest.FixtureRequest) -> Share:
    """With a directory of its own for each test, under a name that no mount knows yet."""
    name = f"test-{abs(hash(request.node.nodeid))}"
    (guest.home / name).mkdir()
    return Share(guest.home / name, guest.containers, guest.name)


@pytest.fixture
def at(share: Share) -> str:
    return share.home.name


def test_a_mount_says_what_it_was_asked_for_and_nothing_when_it_was_not(share: Share) -> None:
    lines = [line.split() for line in share.sh("cat /proc/mounts").splitlines()]
    options = {line[1]: line[3].split(",") for line in lines if line[2] == "9p"}
    assert f"attrcache={HOUR}" in options["/hour"]
    assert f"attrcache={HOUR}" in options["/none"]
    assert not any(option.startswith("attrcache") for option in options["/plain"])


@pytest.mark.parametrize("value", ["x", "-1", "3600001", "99999999999", "1s"])
def test_a_time_that_is_none_or_more_than_an_hour_is_refused(share: Share, value: str) -> None:
    mount = "mount -t 9p -o trans=virtio,version=9p2000.L,attrcache={} spare /srv"
    said = share.sh(f"mkdir -p /srv; {mount.format(value)} 2>&1 && echo mounted; true")
    assert "Invalid argument" in said
    assert "mounted" not in said
    assert share.sh(f"{mount.format(HOUR)} && umount /srv && echo mounted") == "mounted"


@pytest.mark.slow
def test_stat_of_many_names_and_of_an_open_file_is_many_times_as_fast_with_it(share: Share) -> None:
    def measure(tag: str) -> dict[str, int]:
        names = [f"/{tag}/{name}" for name in FILES]
        return {
            "names": share.storm("path", MEASURED_MS, *names),
            "an open file": share.storm("open", MEASURED_MS, names[0]),
        }

    for tag in ASKING:
        slow, fast = measure("plain"), measure(tag)
        for kind, rate in fast.items():
            assert rate > 4 * slow[kind], f"stats a second of {kind}: {slow[kind]} without, {rate} with ({tag})"


def test_a_mount_that_does_not_ask_sees_every_change_of_the_host_at_once(share: Share, at: str) -> None:
    for length in (3, 5, 8):
        (share.home / "file").write_text("x" * length)
        assert share.size(f"/plain/{at}/file") == length


def test_a_change_of_the_host_is_seen_late_and_by_those_who_insist_at_once(share: Share, at: str) -> None:
    (share.home / "file").write_text("four")
    for tag in ASKING:
        assert share.size(f"/{tag}/{at}/file") == 4
    assert share.size(f"/second/{at}/file") == 4
    (share.home / "file").write_text("seventeen letters")
    for tag in ASKING:
        assert share.size(f"/{tag}/{at}/file") == 4
        assert share.storm("sync", f"/{tag}/{at}/file") == 17
        assert share.size(f"/{tag}/{at}/file") == 17, "who insists, asks for all"
    time.sleep(1.2 * SECOND / 1000)
    assert share.size(f"/second/{at}/file") == 17


def test_a_name_that_the_host_gives_to_another_file_is_believed_no_longer_than_asked_for(share: Share, at: str) -> None:
    def numbers(tag: str) -> str:
        return share.sh(f"stat -c %i /{tag}/{at}/current/file /{tag}/{at}/current")

    def replace(version: str) -> None:
        (share.home / version).mkdir()
        (share.home / version / "file").write_text(version)
        if (share.home / "current").exists():
            (share.home / "current").rename(share.home / f"before {version}")
        (share.home / version).rename(share.home / "current")

    replace("old")
    before = {tag: numbers(tag) for tag in ("plain", "hour", "second")}
    replace("new")
    assert numbers("plain") != before["plain"]
    assert numbers("hour") == before["hour"]
    time.sleep(1.2 * SECOND / 1000)
    assert numbers("second") == numbers("plain")
    assert share.sh(f"cat /hour/{at}/current/file") == "new", "what is opened is looked for"


def test_a_name_that_the_host_takes_away_is_gone_after_the_time_and_can_be_made_anew_before(
    share: Share, at: str
) -> None:
    for tag in ("hour", "second"):
        (share.home / tag).mkdir()
        assert share.sh(f"stat -c %F /{tag}/{at}/{tag}") == "directory"
        (share.home / tag).rmdir()
    assert share.sh(f"stat -c %F /hour/{at}/hour; mkdir /hour/{at}/hour && echo made") == "directory\nmade"
    time.sleep(1.2 * SECOND / 1000)
    assert share.sh(f"stat /second/{at}/second 2>/dev/null || echo gone") == "gone"


def test_a_file_that_the_host_makes_is_there_at_once(share: Share, at: str) -> None:
    for tag in ASKING:
        assert share.sh(f"stat /{tag}/{at}/{tag} 2>/dev/null || echo not yet") == "not yet"
        (share.home / tag).write_text("now")
        assert share.size(f"/{tag}/{at}/{tag}") == 3


def test_what_the_host_appends_is_read_whole_by_who_opens_the_file_again(share: Share, at: str) -> None:
    (share.home / "log").write_text("a" * 100)
    for tag in ASKING:
        assert share.size(f"/{tag}/{at}/log") >= 100
    for more in (10, 5000, 300_000):
        with (share.home / "log").open("a") as file:
            file.write("b" * more)
        want = share.sh(f"md5sum < /plain/{at}/log")
        for tag in ASKING:
            assert share.sh(f"md5sum < /{tag}/{at}/log") == want
    (share.home / "log").write_text("short")
    for tag in ASKING:
        assert share.sh(f"cat /{tag}/{at}/log") == "short"


@pytest.mark.parametrize("tag", ASKING)
def test_what_the_guest_does_itself_is_seen_at_once(share: Share, at: str, tag: str) -> None:
    here = f"cd /{tag}/{at}"
    assert share.sh(f"{here}; echo 12345 > a; stat -c %s a; /plain/storm append a 678; stat -c %s a") == "6\n9 9 1\n9"
    assert share.sh(f"{here}; chmod 600 a; stat -c %a a; chmod 751 a; stat -c %a a") == "600\n751"
    assert share.sh(f"{here}; chown 12:34 a; stat -c %u:%g a") == "12:34"
    assert share.sh(f"{here}; touch -d '2001-02-03 04:05:06' a; stat -c %Y a") == "981173106"
    assert share.sh(f"{here}; truncate -s 3 a; stat -c %s a; cat a") == "3\n123"
    assert share.sh(f"{here}; stat -c %s a; ln -s a l; stat -c %F l; stat -Lc %s l") == "3\nsymbolic link\n3"
    assert share.sh(f"{here}; mkdir d; stat -c %h .; mkdir d/e d/f; stat -c %h d; rmdir d/e; stat -c %h d") == "3\n4\n3"
    assert share.sh(f"{here}; mv a d/b; stat a 2>/dev/null || echo moved; stat -c %s d/b") == "moved\n3"
    assert share.sh(f"{here}; echo other > c; mv c d/b; stat -c %s d/b; rm d/b; stat d/b 2>/dev/null || echo gone") == (
        "6\ngone"
    )
    assert sorted(path.name for path in share.home.rglob("*")) == ["d", "f", "l"]


@pytest.mark.parametrize("tag", ASKING)
def test_a_file_with_two_names_is_asked_for_by_both(share: Share, at: str, tag: str) -> None:
    script = f"cd /{tag}/{at}; echo x > a; stat -c %h a; ln a b; stat -c %h a b; chmod 640 b; stat -c %a a"
    assert share.sh(script) == "1\n2\n2\n640"
    assert share.sh(f"cd /{tag}/{at}; stat -c %s b; echo more >> a; stat -c %s b; rm a; stat -c %h b") == "2\n7\n1"


def test_data_is_no_longer_kept_than_without_it(share: Share, at: str) -> None:
    """The same bytes long: only the content tells."""
    for text in ("first", "again", "third"):
        (share.home / "file").write_text(text)
        assert [share.sh(f"cat /{tag}/{at}/file") for tag in MOUNTS] == [text] * len(MOUNTS)
