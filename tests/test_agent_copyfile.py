"""CopyFile: pieces in, whole files out, below one directory and nowhere else."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from osbuild import ttrpc
from osbuild.agent_client import AGENT, AgentClient
from osbuild.arch import X86_64, host_arch
from tests.agent_guest import agent_pid, contained

pytestmark = [
    pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc is not installed"),
    pytest.mark.skipif(host_arch() is not X86_64, reason="the agent is compiled for x86_64 only"),
]

INVALID_ARGUMENT, FAILED_PRECONDITION, INTERNAL = 3, 9, 13
SHARED: Final = "/run/kata-containers/shared/containers"
MIB: Final = 1 << 20


class Agent:
    def __init__(self, client: AgentClient, process: subprocess.Popen[bytes]) -> None:
        self.client = client
        self.root = Path(f"/proc/{agent_pid(process)}/root")
        self.shared = self.root / SHARED.lstrip("/")

    def copy(self, name: str, data: bytes = b"", /, **fields: Any) -> None:  # Any: fields of CopyFileRequest
        usual = {"file_size": len(data), "file_mode": stat.S_IFREG | 0o644, "dir_mode": 0o750}
        self.client.call(AGENT, "CopyFile", path=f"{SHARED}/{name}", data=data, **{**usual, **fields})

    def refuses(self, name: str, data: bytes = b"", /, **fields: Any) -> ttrpc.StatusError:
        with pytest.raises(ttrpc.StatusError) as refused:
            self.copy(name, data, **fields)
        return refused.value

    def all(self) -> set[str]:
        """All that is in the shared directory."""
        return {str(path.relative_to(self.shared)) for path in self.shared.rglob("*")}


@pytest.fixture(scope="module")
def only_agent(sanitized_agent: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Agent]:
    with contained(sanitized_agent, tmp_path_factory.mktemp("copyfile") / "log") as (client, process):
        yield Agent(client, process)


@pytest.fixture
def agent_(only_agent: Agent) -> Iterator[Agent]:
    only_agent.shared.mkdir(parents=True, exist_ok=True)
    yield only_agent
    shutil.rmtree(only_agent.shared)
    for path in (only_agent.root / "run").iterdir():
        if path.is_symlink() or path.is_file():
            path.unlink()
    for path in (only_agent.root / "var/tmp").iterdir():
        path.unlink()


def test_a_file_has_the_content_the_mode_and_the_owner_that_were_asked_for(agent_: Agent) -> None:
    agent_.copy("a/b/file", b"content", file_mode=stat.S_IFREG | 0o4751, uid=1000, gid=2000, dir_mode=0o711)
    status = (agent_.shared / "a/b/file").stat()
    assert (agent_.shared / "a/b/file").read_bytes() == b"content"
    assert (status.st_mode, status.st_uid, status.st_gid) == (stat.S_IFREG | 0o4751, 1000, 2000)
    for made in ("a", "a/b"):
        status = (agent_.shared / made).stat()
        assert (status.st_mode & 0o7777, status.st_uid, status.st_gid) == (0o711, 1000, 2000)
    assert agent_.all() == {"a", "a/b", "a/b/file"}


def test_directories_that_are_there_stay_as_they_are(agent_: Agent) -> None:
    (agent_.shared / "a").mkdir(mode=0o700)
    agent_.copy("a/file", b"x", dir_mode=0o777, uid=5, gid=5)
    status = (agent_.shared / "a").stat()
    assert (status.st_mode & 0o777, status.st_uid) == (0o700, 0)


def test_owners_of_minus_one_are_left_alone_and_a_mode_without_a_kind_is_a_file(agent_: Agent) -> None:
    agent_.copy("file", b"x", uid=-1, gid=-1, file_mode=0o640)
    status = (agent_.shared / "file").lstat()
    assert (status.st_mode, status.st_uid, status.st_gid) == (stat.S_IFREG | 0o640, 0, 0)


def test_nothing_is_seen_of_a_file_until_it_is_whole(agent_: Agent) -> None:
    (agent_.shared / "file").write_bytes(b"before")
    data = os.urandom(3 * MIB + 17)
    for offset in range(0, len(data), MIB):
        assert (agent_.shared / "file").read_bytes() == b"before"
        agent_.copy("file", data[offset : offset + MIB], file_size=len(data), offset=offset)
    assert (agent_.shared / "file").read_bytes() == data
    assert agent_.all() == {"file"}


def test_copies_of_several_files_may_be_interleaved(agent_: Agent) -> None:
    names = ("a.json", "a.yaml", "a.tmp", "a", ".a", "x" * 255, "x" * 254 + "y")
    for offset in range(4):
        for number, name in enumerate(names):
            agent_.copy(f"d/{name}", bytes([number]), file_size=4, offset=offset)
    for number, name in enumerate(names):
        assert (agent_.shared / "d" / name).read_bytes() == bytes([number]) * 4
    assert agent_.all() == {"d", *(f"d/{name}" for name in names)}


def test_an_empty_file_comes_in_one_empty_piece(agent_: Agent) -> None:
    agent_.copy("empty")
    assert (agent_.shared / "empty").stat().st_size == 0


def test_a_copy_that_begins_anew_forgets_the_one_before(agent_: Agent) -> None:
    agent_.copy("file", b"12345678", file_size=100)
    agent_.copy("file", b"abc", file_size=6)
    agent_.copy("file", b"def", file_size=6, offset=3)
    assert (agent_.shared / "file").read_bytes() == b"abcdef"
    assert agent_.all() == {"file"}


def test_a_piece_that_is_sent_twice_does_no_harm(agent_: Agent) -> None:
    for offset in (0, 3, 3, 6):
        agent_.copy("file", b"abcdefghi"[offset : offset + 3], file_size=9, offset=offset)
    assert (agent_.shared / "file").read_bytes() == b"abcdefghi"


@pytest.mark.parametrize(
    "fields",
    [
        {"file_size": -1},
        {"file_size": 4, "offset": -1},
        {"file_size": 4, "offset": 5},
        {"file_size": 4, "offset": 2},
        {"file_size": 2},
        {"file_size": (1 << 63) - 1, "offset": (1 << 63) - 2},
        {"file_size": 0},
        {"file_mode": stat.S_IFCHR | 0o600},
        {"file_mode": stat.S_IFIFO | 0o600},
        {"file_mode": stat.S_IFSOCK | 0o600},
    ],
)
def test_a_piece_that_cannot_be_is_refused(agent_: Agent, fields: dict[str, int]) -> None:
    assert agent_.refuses("file", b"abc", **fields).code == INVALID_ARGUMENT
    assert agent_.all() == set()


@pytest.mark.parametrize("offset", [1, 1 << 40, (1 << 62)])
def test_no_file_gets_a_hole(agent_: Agent, offset: int) -> None:
    assert agent_.refuses("file", b"x", file_size=offset + 1, offset=offset).code == FAILED_PRECONDITION
    agent_.copy("file", b"", file_size=offset + 1)
    assert agent_.refuses("file", b"x", file_size=offset + 1, offset=offset).code == FAILED_PRECONDITION
    assert sum(path.stat().st_size for path in agent_.shared.iterdir()) == 0


def test_a_file_for_which_there_is_no_room_leaves_nothing_behind(agent_: Agent) -> None:
    (agent_.shared / "full").mkdir()
    subprocess.run(
        ["nsenter", f"--mount=/proc/{agent_.root.parent.name}/ns/mnt", "mount", "-t", "tmpfs", "-o", "size=1m", "full",
         f"{SHARED}/full"], check=True,
    )  # fmt: skip
    try:
        error = agent_.refuses("full/file", bytes(2 * MIB))
        assert error.code == INTERNAL
        assert "No space left" in error.message
        assert agent_.all() == {"full"}
    finally:
        subprocess.run(
            ["nsenter", f"--mount=/proc/{agent_.root.parent.name}/ns/mnt", "umount", f"{SHARED}/full"], check=True
        )


# --- directories and links ---


def test_directories_are_made_and_those_that_are_there_keep_what_is_in_them(agent_: Agent) -> None:
    (agent_.shared / "old").mkdir()
    (agent_.shared / "old/kept").touch()
    (agent_.shared / "file").touch()
    for name in ("new/one", "old", "file"):
        agent_.copy(name, file_mode=stat.S_IFDIR | 0o2751, uid=1, gid=2)
        status = (agent_.shared / name).lstat()
        assert (status.st_mode, status.st_uid, status.st_gid) == (stat.S_IFDIR | 0o2751, 1, 2)
    assert (agent_.shared / "old/kept").exists()


def test_links_are_made_and_replaced_and_their_aims_are_left_alone(agent_: Agent) -> None:
    for aim in (b"..2026", b"/etc/passwd", b"\xff\xfe", b"x" * 4095):
        agent_.copy("..data", aim, file_mode=stat.S_IFLNK | 0o777, uid=3, gid=4)
        assert os.fsencode((agent_.shared / "..data").readlink()) == aim
        status = (agent_.shared / "..data").lstat()
        assert (status.st_uid, status.st_gid) == (3, 4)
    assert agent_.all() == {"..data"}


@pytest.mark.parametrize("aim", [b"", b"a\0b", b"x" * 4096])
def test_a_link_to_what_no_path_can_be_is_refused(agent_: Agent, aim: bytes) -> None:
    agent_.refuses("link", aim, file_mode=stat.S_IFLNK)
    assert agent_.all() == set()


@pytest.mark.parametrize("kind", [stat.S_IFREG, stat.S_IFLNK])
def test_a_directory_is_not_replaced_by_something_else(agent_: Agent, kind: int) -> None:
    (agent_.shared / "d").mkdir()
    (agent_.shared / "d/kept").touch()
    agent_.refuses("d", b"x", file_mode=kind | 0o644)
    assert agent_.all() == {"d", "d/kept"}


# --- what may not be ---


@pytest.mark.parametrize(
    "path",
    [
        "",
        "relative",
        "/",
        "/etc/passwd",
        SHARED,
        SHARED + "/",
        SHARED + "/.",
        SHARED + "x/file",
        SHARED + "/../file",
        SHARED + "/a/../../../x",
        "/run/kata-containers/shared",
        SHARED + "/" + "x" * 4096,
    ],
)
@pytest.mark.parametrize("kind", [stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK])
def test_nothing_is_copied_to_where_nothing_is_shared(agent_: Agent, path: str, kind: int) -> None:
    with pytest.raises(ttrpc.StatusError) as refused:
        agent_.client.call(AGENT, "CopyFile", path=path, data=b"x", file_size=1, file_mode=kind | 0o644)
    assert refused.value.code == INVALID_ARGUMENT
    assert agent_.all() == set()


def test_a_name_longer_than_names_can_be_is_refused(agent_: Agent) -> None:
    assert "too long" in agent_.refuses("x" * 256, b"x").message.lower()


@pytest.mark.parametrize("kind", [stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK])
@pytest.mark.parametrize("aim", ["/var/tmp", "../../../../var/tmp", "/proc/self/root/var/tmp", "../elsewhere", "."])
def test_no_link_that_a_container_planted_is_followed(agent_: Agent, aim: str, kind: int) -> None:
    (agent_.shared / "c").mkdir()
    (agent_.shared / "elsewhere").mkdir()
    (agent_.shared / "c/link").symlink_to(aim)
    for name in ("c/link/file", "c/link/a/file"):
        error = agent_.refuses(name, b"x", file_mode=kind | 0o644)
        assert error.code == INTERNAL
        assert "symbolic links" in error.message
    assert agent_.all() == {"c", "c/link", "elsewhere"}
    assert os.listdir(agent_.root / "var/tmp") == []


def test_a_link_in_the_place_of_the_file_is_replaced_and_not_followed(agent_: Agent) -> None:
    victim = agent_.root / "run/victim"
    victim.write_text("untouched")
    victim.chmod(0o600)
    for kind in (stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK):
        (agent_.shared / "file").symlink_to("/run/victim")
        agent_.copy("file", b"x", file_mode=kind | 0o777, uid=9, gid=9)
        assert stat.S_IFMT((agent_.shared / "file").lstat().st_mode) == kind
        if kind == stat.S_IFDIR:
            (agent_.shared / "file").rmdir()
        else:
            (agent_.shared / "file").unlink()
    status = victim.stat()
    assert (victim.read_text(), status.st_mode & 0o777, status.st_uid) == ("untouched", 0o600, 0)


def spare_of(agent_: Agent) -> Path:
    """What a half copied file is called."""
    agent_.copy("file", b"ab", file_size=4)
    (name,) = agent_.shared.iterdir()
    return name


@pytest.mark.parametrize("planted", ["link", "pipe", "hard link", "somebody's", "nothing"])
def test_what_a_container_put_in_the_place_of_a_half_copied_file_is_not_written_to(agent_: Agent, planted: str) -> None:
    spare = spare_of(agent_)
    victim = agent_.root / "run/victim"
    victim.write_text("untouched")
    spare.unlink()
    if planted == "link":
        spare.symlink_to("/run/victim")
    elif planted == "pipe":
        os.mkfifo(spare)
    elif planted == "hard link":
        (agent_.shared / "own").write_text("untouched")
        os.link(agent_.shared / "own", spare)
    elif planted == "somebody's":
        spare.write_text("ab")
        os.chown(spare, 1000, 1000)
    assert agent_.refuses("file", b"cd", file_size=4, offset=2).code == FAILED_PRECONDITION
    assert victim.read_text() == "untouched"
    if planted == "hard link":
        assert (agent_.shared / "own").read_text() == "untouched"
    agent_.copy("file", b"whole")  # and a new copy is not hindered by it
    assert (agent_.shared / "file").read_bytes() == b"whole"
    assert victim.read_text() == "untouched"


def test_the_shared_directory_itself_is_not_found_through_a_link(agent_: Agent) -> None:
    agent_.shared.rmdir()
    agent_.shared.symlink_to("/var/tmp")
    try:
        agent_.refuses("file", b"x")
        assert os.listdir(agent_.root / "var/tmp") == []
    finally:
        agent_.shared.unlink()
        agent_.shared.mkdir()
