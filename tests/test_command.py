"""Starting programs: output, errors, and nothing left behind."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from osbuild import command
from osbuild.errors import CommandError, HostError


def test_output_comes_back_with_standard_error_in_it() -> None:
    assert command.run("sh", "-c", "echo out; echo err >&2").output == "out\nerr\n"


def test_standard_error_can_be_kept_out() -> None:
    assert command.run("sh", "-c", "echo out; echo err >&2", merge=False).output == "out\n"


def test_a_program_reads_what_it_is_given_even_if_it_writes_first() -> None:
    given = b"x" * (1 << 20)
    assert command.run("sh", "-c", "seq 100000; wc -c", stdin=given).output.splitlines()[-1] == str(len(given))


def test_a_program_that_is_given_nothing_reads_nothing() -> None:
    assert command.run("wc", "-c").output == "0\n"


def test_a_failure_says_how_it_ended_and_shows_the_end_of_the_output() -> None:
    with pytest.raises(CommandError, match="sh exited with 3") as caught:
        command.run("sh", "-c", "echo because; exit 3")
    assert caught.value.tail == "because\n"


def test_no_program_writes_a_core_file_and_what_is_asked_for_holds_for_its_children(tmp_path: Path) -> None:
    limits = {resource.RLIMIT_NOFILE: 64, resource.RLIMIT_FSIZE: 4096}
    with command.start("sh", "-c", "ulimit -c; ulimit -n; sh -c 'ulimit -n'; exec cat /dev/zero", pipe=False,
                       log=tmp_path / "log", limits=limits) as process:  # fmt: skip
        assert process.wait(timeout=20) == -signal.SIGXFSZ
    assert (tmp_path / "log").read_bytes().split(b"\0")[0].split() == [b"0", b"64", b"64"]
    assert (tmp_path / "log").stat().st_size == 4096


def test_a_limit_above_our_own_is_our_own() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with command.start("sh", "-c", "ulimit -Hn", pipe=True, limits={resource.RLIMIT_NOFILE: hard + 1}) as process:
        assert process.stdout is not None
        assert process.stdout.read().split() == [str(hard).encode()]


def test_a_signal_is_named() -> None:
    with pytest.raises(CommandError, match="SIGSEGV"):
        command.run("sh", "-c", "kill -SEGV $$")


def test_a_log_takes_everything_and_is_named_in_the_hint(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with pytest.raises(CommandError) as caught:
        command.run("sh", "-c", "echo one; echo two; exit 1", log=log)
    assert log.read_text() == "one\ntwo\n"
    assert str(log) in caught.value.hint
    assert "two" in caught.value.tail


def test_a_watcher_sees_every_line_and_the_log_has_them_too(tmp_path: Path) -> None:
    lines: list[str] = []
    command.run("printf", "a\\nb\\n", log=tmp_path / "log", watch=lines.append)
    assert lines == ["a", "b"]
    assert (tmp_path / "log").read_text() == "a\nb\n"


def test_a_missing_program_names_its_package() -> None:
    with pytest.raises(HostError, match="no-such-program is not installed") as caught:
        command.find("no-such-program", package="thing")
    assert caught.value.hint == "apt-get install thing"


def test_a_deadline_ends_the_whole_group(tmp_path: Path) -> None:
    began = time.monotonic()
    with pytest.raises(CommandError, match="did not end within"):
        command.run("sh", "-c", f"sleep 60 & echo $! > {tmp_path}/child; wait", seconds=0.3)
    assert time.monotonic() - began < 30
    assert _is_ended(int((tmp_path / "child").read_text()))


def test_what_a_program_leaves_running_is_ended_with_it(tmp_path: Path) -> None:
    command.run("sh", "-c", f"sleep 60 >/dev/null 2>&1 & echo $! > {tmp_path}/ran; exit 0")
    with command.start("sh", "-c", f"sleep 60 & echo $! > {tmp_path}/started; exit 0"):
        while not (tmp_path / "started").exists() or not (tmp_path / "started").read_text():
            time.sleep(0.01)
        time.sleep(0.1)
    for name in ("ran", "started"):
        assert _is_ended(int((tmp_path / name).read_text()))


def test_the_environment_is_small_and_the_same_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LANG", "tr_TR.UTF-8")
    monkeypatch.setenv("SECRET", "x")
    told = command.run("env").output
    assert "SECRET" not in told
    assert "LANG" not in told
    assert "LC_ALL=C\n" in told
    assert "TZ=UTC\n" in told


def test_leaving_the_block_ends_a_program_that_ignores_polite_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "GRACE_SECONDS", 0.2)
    with command.start("sh", "-c", "trap '' TERM; echo ready; while :; do sleep 1; done", pipe=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        command.end(process, grace=0.2)
    assert not _alive(process.pid)


def test_a_killed_parent_takes_its_programs_with_it() -> None:
    script = (
        "from osbuild import command\nimport time\n"
        "with command.start('sleep', '60') as p:\n print(p.pid, flush=True)\n time.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    assert _alive(child)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    assert _is_ended(child)


def _is_ended(pid: int) -> bool:
    """Whether it ends within some seconds: SIGKILL is certain, and takes its time."""
    deadline = time.monotonic() + 5
    while _alive(pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    return not _alive(pid)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (ProcessLookupError, FileNotFoundError):
        return False
    return state != "Z"


def test_a_program_gets_the_open_files_it_is_meant_to_and_no_others(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("for it")
    with (tmp_path / "mine").open("rb") as mine, (tmp_path / "mine").open("rb") as other:
        log = tmp_path / "log"
        script = f"cat <&{mine.fileno()}; echo; (true <&{other.fileno()}) 2>/dev/null || echo none"
        with command.start("bash", "-c", script, log=log, descriptors=(mine.fileno(),)) as process:
            process.wait(20)
    assert log.read_text() == "for it\nnone\n"
