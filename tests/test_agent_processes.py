"""Processes in the agent's containers: their streams, terminals, signals and ends."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from osbuild.agent_client import AgentClient
from osbuild.ttrpc import RpcError, StatusError, connect_unix
from tests.agent_container import Containers, description, make_root, process
from tests.agent_guest import agent_pid, contained
from tests.agent_program import BUSYBOX

pytestmark = [
    pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc is not installed"),
    pytest.mark.skipif(not BUSYBOX.exists(), reason="a static busybox is not installed"),
]

Pod = tuple[Containers, "subprocess.Popen[bytes]"]
INVALID_ARGUMENT, NOT_FOUND, ALREADY_EXISTS, FAILED_PRECONDITION, INTERNAL, UNAVAILABLE = 3, 5, 6, 9, 13, 14


@pytest.fixture(scope="module")
def pod(sanitized_agent: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pod]:
    with contained(sanitized_agent, tmp_path_factory.mktemp("agent") / "log") as (client, started):
        yield Containers(client), started


@pytest.fixture
def containers(pod: Pod) -> Containers:
    return pod[0]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_root(tmp_path_factory.mktemp("processes") / "root")


@pytest.fixture
def idle(containers: Containers, root: Path) -> Iterator[str]:
    """A container that does nothing."""
    name = containers.start(description(root, process("sleep", "1000")))
    yield name
    containers.remove(name)


def code(caught: pytest.ExceptionInfo[StatusError]) -> int:
    return int(caught.value.code)


# --- streams ---


def test_the_two_outputs_are_apart_and_the_status_is_the_programs(containers: Containers, idle: str) -> None:
    name = containers.execute(idle, "sh", "-c", "echo out; echo err >&2; exit 9")
    assert containers.read(idle, name) == b"out\n"
    assert containers.read(idle, name, method="ReadStderr") == b"err\n"
    assert containers.wait(idle, name) == 9


def test_a_read_gives_what_there_is_waits_for_more_and_fails_at_the_end(containers: Containers, idle: str) -> None:
    name = containers.execute(idle, "sh", "-c", "printf 12345; read x; printf $x")
    first = containers.call("ReadStdout", container_id=idle, exec_id=name, len=2)
    second = containers.call("ReadStdout", container_id=idle, exec_id=name, len=100)
    assert (first.data, second.data) == (b"12", b"345")
    third = containers.later("ReadStdout", container_id=idle, exec_id=name, len=100)
    assert not third.done(0.1)
    assert containers.call("WriteStdin", container_id=idle, exec_id=name, data=b"more\n").len == 5
    assert third.result().data == b"more"
    for _ in range(2):  # Kata's runtime reads on for ever while it gets answers, also without a byte in them
        with pytest.raises(StatusError, match="EOF") as caught:
            containers.call("ReadStdout", container_id=idle, exec_id=name, len=100)
        assert code(caught) == INTERNAL


def test_what_was_written_before_the_end_can_be_read_after_it(containers: Containers, idle: str) -> None:
    name = containers.execute(idle, "sh", "-c", "dd if=/dev/zero bs=1024 count=60 2>/dev/null")
    time.sleep(0.2)
    assert len(containers.read(idle, name)) == 60 * 1024
    assert containers.wait(idle, name) == 0


def test_nothing_to_read_is_refused(containers: Containers, idle: str) -> None:
    with pytest.raises(StatusError) as caught:
        containers.call("ReadStdout", container_id=idle, len=0)
    assert code(caught) == INVALID_ARGUMENT


def test_much_output_comes_whole(containers: Containers, idle: str) -> None:
    script = "i=0; while [ $i -lt 20000 ]; do echo line $i; i=$((i+1)); done"
    name = containers.execute(idle, "sh", "-c", script)
    text = containers.read(idle, name, size=1 << 20)
    assert text == b"".join(b"line %d\n" % i for i in range(20000))


@pytest.mark.parametrize("way", ["CloseStdin", "WriteStdin"])
def test_input_ends_when_it_is_closed(containers: Containers, idle: str, way: str) -> None:
    name = containers.execute(idle, "cat")
    containers.call("WriteStdin", container_id=idle, exec_id=name, data=b"all")
    containers.call(way, container_id=idle, exec_id=name)
    assert containers.read(idle, name) == b"all"
    with pytest.raises(StatusError, match="closed"):
        containers.call("WriteStdin", container_id=idle, exec_id=name, data=b"x")
    assert containers.wait(idle, name) == 0


def test_a_write_is_answered_when_all_of_it_was_taken(containers: Containers, idle: str) -> None:
    name = containers.execute(idle, "sh", "-c", "sleep 0.3; exec busybox wc -c")
    assert containers.call("WriteStdin", container_id=idle, exec_id=name, data=bytes(1 << 20)).len == 1 << 20
    containers.call("CloseStdin", container_id=idle, exec_id=name)
    assert containers.read(idle, name) == b"1048576\n"
    assert containers.wait(idle, name) == 0


def test_a_full_pipe_makes_the_writer_wait_until_nobody_reads_any_more(containers: Containers, idle: str) -> None:
    name = containers.execute(idle, "sleep", "1000")
    more = containers.later("WriteStdin", container_id=idle, exec_id=name, data=bytes(1 << 20))
    assert not more.done(0.2)
    containers.call("SignalProcess", container_id=idle, exec_id=name, signal=signal.SIGKILL)
    with pytest.raises(StatusError, match="Broken pipe"):
        more.result()
    assert containers.wait(idle, name) == 137


# One byte, and the rest when it may.
READS_LATER = "dd bs=1 count=1 of=/tmp/begun 2>/dev/null; until [ -e /tmp/go ]; do sleep 0.02; done; cat > /tmp/got"


@pytest.fixture
def reader(containers: Containers, idle: str, root: Path) -> Iterator[str]:
    name = containers.execute(idle, "sh", "-c", READS_LATER)
    yield name
    for file in ("begun", "go", "got"):
        (root / "tmp" / file).unlink(missing_ok=True)


def await_size(path: Path, size: int) -> None:
    deadline = time.monotonic() + 60
    while not path.exists() or path.stat().st_size < size:
        assert time.monotonic() < deadline, f"{path} stays smaller than {size} bytes"
        time.sleep(0.01)


def test_what_is_written_by_several_calls_comes_in_the_order_of_the_calls(
    pod: Pod, idle: str, reader: str, root: Path
) -> None:
    containers, started = pod
    first = b"A" * (2 << 20)
    writes = [containers.later("WriteStdin", container_id=idle, exec_id=reader, data=b"." + first)]
    await_size(root / "tmp/begun", 1)
    agent = agent_pid(started)
    os.kill(agent, signal.SIGSTOP)  # so that it finds the calls and the room in the pipe at the same time
    try:
        writes += [containers.later("WriteStdin", container_id=idle, exec_id=reader, data=b"B") for _ in range(60)]
        assert not writes[-1].done(0.2)
        (root / "tmp/go").touch()
        await_size(root / "tmp/got", 4096)
    finally:
        os.kill(agent, signal.SIGCONT)
    for write in writes:
        write.result()
    containers.call("CloseStdin", container_id=idle, exec_id=reader)
    assert containers.wait(idle, reader) == 0
    assert (root / "tmp/got").read_bytes() == first + b"B" * 60


def test_input_is_closed_behind_what_was_written_before(
    containers: Containers, idle: str, reader: str, root: Path
) -> None:
    first = containers.later("WriteStdin", container_id=idle, exec_id=reader, data=bytes(1 << 20))
    await_size(root / "tmp/begun", 1)
    closing = containers.later("CloseStdin", container_id=idle, exec_id=reader)
    assert not closing.done(0.2)
    (root / "tmp/go").touch()
    closing.result()
    assert first.result().len == 1 << 20
    assert containers.wait(idle, reader) == 0
    assert (root / "tmp/got").stat().st_size == (1 << 20) - 1


@pytest.mark.parametrize("way", ["hang-up", "deadline"])
def test_a_write_that_is_given_up_makes_way_for_the_next(
    pod: Pod, idle: str, reader: str, root: Path, way: str
) -> None:
    containers, started = pod
    words = Path(f"/proc/{agent_pid(started)}/cmdline").read_text().split("\0")
    path = Path(words[words.index("--listen") + 1].removeprefix("unix:"))
    with connect_unix(path, 20.0) as connection:
        other = Containers(AgentClient(connection))
        seconds = 3.0 if way == "deadline" else 60.0
        first = other.later("WriteStdin", container_id=idle, exec_id=reader, data=b"A" * (1 << 20), seconds=seconds)
        await_size(root / "tmp/begun", 1)
        second = containers.later("WriteStdin", container_id=idle, exec_id=reader, data=b"B")
        assert not second.done(0.2)
        if way == "hang-up":
            connection.close()
        with pytest.raises(RpcError):
            first.result()  # the deadline is the agent's as well, and passes there a moment earlier or later
        (root / "tmp/go").touch()
        assert second.result().len == 1
    containers.call("CloseStdin", container_id=idle, exec_id=reader)
    assert containers.wait(idle, reader) == 0
    got = (root / "tmp/got").read_bytes()
    assert got == b"A" * (len(got) - 1) + b"B"


def test_a_grandchild_that_keeps_the_pipe_does_not_hold_up_the_wait(containers: Containers, idle: str) -> None:
    name = containers.execute(idle, "sh", "-c", "sleep 1000 & exit 4")
    reader = containers.later("ReadStdout", container_id=idle, exec_id=name, len=10)
    assert containers.wait(idle, name) == 4
    with pytest.raises(StatusError, match="EOF"):
        reader.result(5)


def test_a_grandchild_that_keeps_the_pipe_does_not_hold_up_who_reads_to_the_end(
    containers: Containers, idle: str
) -> None:
    name = containers.execute(idle, "sh", "-c", "sleep 1000 & echo last; exit 4")
    reader = containers.later("ReadStderr", container_id=idle, exec_id=name, len=10)
    assert containers.read(idle, name) == b"last\n"
    with pytest.raises(StatusError, match="EOF"):
        reader.result(5)
    assert containers.wait(idle, name) == 4


def test_a_program_that_is_not_root_can_open_its_own_output(containers: Containers, idle: str) -> None:
    user = {"UID": 1000, "GID": 1001}
    assert containers.run_in(idle, "sh", "-c", "echo fine >/dev/stdout", User=user) == (0, "fine\n")


# --- the end ---


def test_all_who_wait_get_the_status_and_who_comes_later_gets_not_found(containers: Containers, idle: str) -> None:
    name = containers.execute(idle, "sh", "-c", "read x; exit 5")
    waiters = [containers.later("WaitProcess", container_id=idle, exec_id=name) for _ in range(4)]
    assert not waiters[0].done(0.1)
    containers.call("CloseStdin", container_id=idle, exec_id=name)
    assert [waiter.result().status for waiter in waiters] == [5] * 4
    for method in ("WaitProcess", "ReadStdout", "SignalProcess"):
        extra = {"signal": 9} if method == "SignalProcess" else {}
        with pytest.raises(StatusError) as caught:
            containers.call(method, container_id=idle, exec_id=name, **extra)
        assert code(caught) == NOT_FOUND
    assert containers.run_in(idle, "echo", "again", exec_id=name) == (0, "again\n")


def test_a_killed_process_has_128_and_its_signal(containers: Containers, idle: str) -> None:
    name = containers.execute(idle, "sleep", "1000")
    containers.call("SignalProcess", container_id=idle, exec_id=name, signal=signal.SIGUSR1)
    assert containers.wait(idle, name) == 128 + signal.SIGUSR1


def test_signalling_a_process_that_has_ended_is_no_failure(containers: Containers, idle: str) -> None:
    name = containers.execute(idle, "true")
    containers.read(idle, name)
    time.sleep(0.1)
    containers.call("SignalProcess", container_id=idle, exec_id=name, signal=signal.SIGTERM)
    assert containers.wait(idle, name) == 0


@pytest.mark.parametrize("number", [0, 65, 4096])
def test_a_signal_that_there_is_not_is_refused(containers: Containers, idle: str, number: int) -> None:
    with pytest.raises(StatusError) as caught:
        containers.call("SignalProcess", container_id=idle, signal=number)
    assert code(caught) == INVALID_ARGUMENT


def test_sigterm_kills_a_first_process_without_a_handler(containers: Containers, root: Path) -> None:
    name = containers.start(description(root, process("sleep", "1000")))
    containers.call("SignalProcess", container_id=name, exec_id=name, signal=signal.SIGTERM)
    assert containers.wait(name) == 137
    containers.remove(name)


def test_sigterm_reaches_a_first_process_with_a_handler(containers: Containers, root: Path) -> None:
    name = containers.start(
        description(root, process("sh", "-c", "trap 'exit 6' TERM; echo; while :; do sleep 0.05; done"))
    )
    containers.call("ReadStdout", container_id=name, len=10)
    containers.call("SignalProcess", container_id=name, signal=signal.SIGTERM)
    assert containers.wait(name) == 6
    containers.remove(name)


def test_a_signal_for_no_process_in_particular_reaches_all_of_the_container(containers: Containers, root: Path) -> None:
    waits = "echo; while :; do sleep 0.05; done"
    name = containers.start(description(root, process("sh", "-c", f"trap '' USR1; {waits}")))
    other = containers.execute(name, "sh", "-c", f"trap 'exit 6' USR1; {waits}")
    for process_id in ("", other):
        containers.call("ReadStdout", container_id=name, exec_id=process_id, len=10)
    containers.call("SignalProcess", container_id=name, signal=signal.SIGUSR1)
    assert containers.wait(name, other) == 6
    containers.remove(name)


def test_killing_a_container_kills_all_that_is_in_it(containers: Containers, root: Path) -> None:
    name = containers.start(description(root, process("sleep", "1000")))
    other = containers.execute(name, "sleep", "1000")
    containers.call("SignalProcess", container_id=name, signal=signal.SIGKILL)
    assert containers.wait(name) == 137
    assert containers.wait(name, other) == 137
    containers.remove(name)


def test_a_container_can_be_removed_while_its_process_is_waited_for(containers: Containers, root: Path) -> None:
    name = containers.start(description(root, process("sleep", "1000")))
    waiters = [containers.later("WaitProcess", container_id=name) for _ in range(3)]
    reader = containers.later("ReadStdout", container_id=name, len=10)
    assert not waiters[0].done(0.1)
    containers.remove(name)
    assert [waiter.result().status for waiter in waiters] == [137] * 3
    with pytest.raises(StatusError, match="EOF"):
        reader.result()


# --- starting ---


def test_a_program_that_is_not_there_is_told_by_execs_own_words(containers: Containers, idle: str) -> None:
    for words, reason in (
        (["absent"], "cannot execute absent: No such file or directory"),
        (["/etc/passwd"], "cannot execute /etc/passwd: Permission denied"),
    ):
        with pytest.raises(StatusError, match=reason):
            containers.execute(idle, *words, exec_id="same")


def test_an_exec_id_is_taken_while_its_process_is_there(containers: Containers, idle: str) -> None:
    containers.execute(idle, "sleep", "1000", exec_id="taken")
    with pytest.raises(StatusError) as caught:
        containers.execute(idle, "true", exec_id="taken")
    assert code(caught) == ALREADY_EXISTS


def test_nothing_joins_a_container_that_has_ended(containers: Containers, root: Path) -> None:
    name = containers.start(description(root, process("true")))
    containers.wait(name)
    with pytest.raises(StatusError) as caught:
        containers.execute(name, "true")
    assert code(caught) == FAILED_PRECONDITION
    containers.remove(name)


def test_no_process_leaves_a_descriptor_or_a_zombie_behind(pod: Pod, idle: str) -> None:
    containers, started = pod
    home = Path(f"/proc/{agent_pid(started)}")
    containers.run_in(idle, "true")
    time.sleep(1.1)  # the record of a process whose status was told is kept for a second
    containers.run_in(idle, "true")
    before = len(os.listdir(home / "fd"))
    for _ in range(20):
        containers.run_in(idle, "sh", "-c", "true & exec true")
        with pytest.raises(StatusError):
            containers.execute(idle, "absent")
    time.sleep(1.1)
    containers.run_in(idle, "true")
    assert len(os.listdir(home / "fd")) == before
    assert len((home / f"task/{home.name}/children").read_text().split()) == 1


# --- who it is ---


def test_a_process_has_the_user_groups_limits_and_score_that_were_asked_for(containers: Containers, idle: str) -> None:
    text = containers.run_in(
        idle, "sh", "-c", "id -u; id -g; id -G; ulimit -n; ulimit -Hn; cat /proc/self/oom_score_adj; umask",
        User={"UID": 1000, "GID": 1001, "AdditionalGids": [29, 77]},
        Rlimits=[{"Type": "RLIMIT_NOFILE", "Soft": 123, "Hard": 456}],
        OOMScoreAdj=321,
    )[1]  # fmt: skip
    assert text.split() == ["1000", "1001", "1001", "29", "77", "123", "456", "321", "0022"]


def test_names_of_users_and_groups_are_those_of_the_container(containers: Containers, root: Path) -> None:
    first = process("sh", "-c", "id; echo $HOME")
    text = containers.run(description(root, first), string_user={"uid": "user", "additionalGids": ["audio"]})[1]
    assert text == "uid=1000(user) gid=1001(users) groups=29(audio)\n/home/user\n"
    with pytest.raises(StatusError, match="no user stranger"):
        containers.run(description(root, first), string_user={"uid": "stranger"})
    with pytest.raises(StatusError, match="no group strangers"):
        containers.run(description(root, first), string_user={"uid": "0", "gid": "strangers"})


def test_home_is_the_environments_before_it_is_the_users(containers: Containers, idle: str) -> None:
    assert containers.run_in(idle, "sh", "-c", "echo $HOME")[1] == "/root\n"
    assert containers.run_in(idle, "sh", "-c", "echo $HOME", Env=["HOME=/x", "PATH=/bin"])[1] == "/x\n"
    assert containers.run_in(idle, "sh", "-c", "echo $HOME", User={"UID": 4242})[1] == "/\n"


def test_a_variable_has_its_last_value_and_a_word_without_one_is_none(containers: Containers, idle: str) -> None:
    text = containers.run_in(idle, "env", Env=["A=1", "PATH=/bin", "B", "A=2=3", "AB=4", "=5", "HOME=/x", "HOME=/y"])[1]
    assert sorted(text.splitlines()) == ["A=2=3", "AB=4", "HOME=/y", "PATH=/bin"]


def capability_sets(text: str) -> dict[str, int]:
    return {line[3:6]: int(line.split()[1], 16) for line in text.splitlines() if line.startswith("Cap")}


def test_capabilities_are_those_that_were_listed_but_never_mknod(containers: Containers, idle: str) -> None:
    sets = {"Bounding": ["CAP_KILL", "CAP_MKNOD", "CAP_CHOWN"], "Effective": ["CAP_KILL", "CAP_MKNOD"]}
    sets |= {"Permitted": ["CAP_KILL", "CAP_CHOWN", "CAP_MKNOD"], "Inheritable": ["CAP_KILL"], "Ambient": ["CAP_KILL"]}
    text = containers.run_in(
        idle, "cat", "/proc/self/status", Capabilities=sets, User={"UID": 1000}, NoNewPrivileges=True
    )[1]
    # Of a program without privileges of its own, ambient ones are what survives execve.
    assert capability_sets(text) == {"Inh": 1 << 5, "Prm": 1 << 5, "Eff": 1 << 5, "Bnd": 1 << 5 | 1, "Amb": 1 << 5}
    assert "NoNewPrivs:\t1" in text


def test_only_the_annotation_gives_a_container_mknod(containers: Containers, root: Path) -> None:
    first = process("grep", "CapBnd", "/proc/self/status")
    bounding = []
    for value in ("", "false", "true"):
        text = containers.run(description(root, first, Annotations={"io.osbuilder.allow-mknod": value}))[1]
        bounding.append(bool(int(text.split()[1], 16) >> 27 & 1))
    assert bounding == [False, False, True]


# --- terminals ---


def test_a_terminal_has_its_size_and_takes_another(containers: Containers, idle: str) -> None:
    name = containers.execute(
        idle, "sh", "-c", "stty size; read x; stty size; tty", Terminal=True, ConsoleSize={"Height": 33, "Width": 101}
    )
    assert containers.call("ReadStdout", container_id=idle, exec_id=name, len=100).data == b"33 101\r\n"
    containers.call("TtyWinResize", container_id=idle, exec_id=name, row=44, column=55)
    containers.call("WriteStdin", container_id=idle, exec_id=name, data=b"go\n")
    text = containers.read(idle, name)
    assert b"44 55\r\n" in text
    assert b"/dev/pts/" in text
    assert containers.wait(idle, name) == 0


def test_a_process_without_a_terminal_has_no_size(containers: Containers, idle: str) -> None:
    with pytest.raises(StatusError) as caught:
        containers.call("TtyWinResize", container_id=idle, exec_id=idle, row=1, column=1)
    assert code(caught) == UNAVAILABLE


def test_control_c_reaches_the_process_of_a_terminal(containers: Containers, idle: str) -> None:
    name = containers.execute(
        idle, "sh", "-c", "trap 'exit 3' INT; echo ready; while :; do sleep 0.05; done", Terminal=True
    )
    containers.call("ReadStdout", container_id=idle, exec_id=name, len=100)
    containers.call("WriteStdin", container_id=idle, exec_id=name, data=b"\x03")
    assert containers.wait(idle, name) == 3


def test_the_first_process_with_a_terminal_has_it_as_its_console(containers: Containers, root: Path) -> None:
    name = containers.start(description(root, process("sh", "-c", "echo by console >/dev/console", Terminal=True)))
    assert containers.read(name) == b"by console\r\n"
    assert containers.wait(name) == 0
    containers.remove(name)


def test_a_terminal_that_somebody_keeps_open_ends_soon_after_its_process(containers: Containers, idle: str) -> None:
    name = containers.execute(idle, "sh", "-c", "trap '' HUP; sleep 1000 & echo last; exit 2", Terminal=True)
    began = time.monotonic()
    assert containers.read(idle, name) == b"last\r\n"
    assert time.monotonic() - began < 5
    assert containers.wait(idle, name) == 2


def test_leftovers_of_a_terminal_are_read_after_its_process_has_ended(containers: Containers, idle: str) -> None:
    name = containers.execute(
        idle, "sh", "-c", "i=0; while [ $i -lt 300 ]; do echo $i; i=$((i+1)); done", Terminal=True
    )
    time.sleep(0.3)
    assert containers.read(idle, name).split() == [b"%d" % i for i in range(300)]
