"""The command line as a user meets it: one clear line, the right exit code, nothing lost."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import signal
import stat
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

import osbuild
from osbuild.artifacts import File
from osbuild.blobs import Blobs
from osbuild.cache import Cache
from tests.layer_tools import archive, folder, hardlink, member, write_layout

OSBUILDER = (sys.executable, "-c", "from osbuild.__main__ import main; main()")


def run(
    *words: str, env: dict[str, str] | None = None, cwd: Path | None = None, before: tuple[str, ...] = ()
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*before, *OSBUILDER, *words], capture_output=True, text=True, check=False, cwd=cwd, timeout=120,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent), "COLUMNS": "100"} | (env or {}),
    )  # fmt: skip


@pytest.fixture
def layout(tmp_path: Path) -> Path:
    write_layout(tmp_path / "layout", [archive(folder("etc"), member("etc/hello", b"hello"))])
    return tmp_path / "layout"


def one_line(text: str) -> str:
    """The error line; there must be exactly one, and a hint at most."""
    lines = [line for line in text.splitlines() if not line.startswith(("✓", "✗"))]
    assert lines[0].startswith("error: "), text
    assert len(lines) <= 2, text
    assert all(line.startswith("hint:") for line in lines[1:]), text
    assert "Traceback" not in text
    return lines[0]


def test_help_names_every_command_of_the_readme() -> None:
    told = run("--help").stdout
    for word in ("build", "image", "initrd", "kernel", "agent", "smoke", "doctor"):
        assert word in told
    assert run("--version").stdout.startswith("osbuilder ")


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (("build", "oci:/no/such/place"), 3, "/no/such/place"),
        (("build", "./dir"), 2, "is a path"),
        (("build", "A B"), 2, "no image name"),
        (("build", "docker-deamon:foo"), 2, "'docker-deamon:' is no source"),
        (("build", "docker:foo"), 2, "'docker:' is no source"),
        (("build", "docker://127.0.0.1:5059"), 2, "is a registry"),
        (("build", "docker-daemon:NAME:TAG"), 2, "names are lower case"),
        (("build", "docker://h.io/a@sha256:123"), 2, "is no digest"),
        (("build", "docker://joe:right@h.io/a"), 2, "no user name and no password"),
        (("image", "oci:/etc"), 3, "is no OCI layout"),
        (("build", "oci:x", "--fs", "ntfs"), 2, "ntfs"),
        (("build", "oci:x", "--compress", "rar"), 2, "rar"),
        (("build", "oci:x", "--arch", "z80"), 2, "z80"),
        (("build", "oci:x", "--accel", "warp"), 2, "warp"),
        (("build", "oci:x", "--make", "cake"), 2, "cake"),
        (("build", "oci:x", "--timeout", "-1"), 2, "-1"),
        (("build", "oci:x", "--timeout", "soon"), 2, "--timeout: 'soon' is not a number"),
        (("build", "oci:x", "--timeout", "nan"), 2, "--timeout: 'nan' is not a number"),
        (("build", "oci:x", "--memory", "64M"), 2, "--memory: '64M' is not a whole number"),
        (("build", "oci:x", "--cpus", "1.5"), 2, "--cpus: '1.5' is not a whole number"),
        (("build", "--recipe", "-q"), 2, "--recipe: no value, for '-q' is an option"),
        (("build", "oci:x", "--add", "--slim"), 2, "--add: no value, for '--slim' is an option"),
        (("build", "oci:x", "--nosuch"), 2, "no such option: --nosuch"),
        (("build", "oci:x", "y"), 2, "unexpected extra argument"),
        (("rootfs", "oci:x", "--json", "--tar", "-"), 2, "both want standard output"),
        (("smoke", "/no/such/build"), 3, "no finished build"),
        (("build", "oci:/no/such", "--with", "warp"), 2, "no kernel feature 'warp'"),
        (("build", "oci:/no/such", "--agent", "/no/such/agent"), 3, "cannot read '/no/such/agent'"),
        (("image", "docker-archive:/dev/null/x"), 3, "cannot read"),
    ],
)
def test_bad_input_gets_one_line_and_its_exit_code(
    words: tuple[str, ...], code: int, says: str, tmp_path: Path
) -> None:
    out = ("-o", str(tmp_path / "out")) if words[0] not in ("smoke", "rootfs") else ()
    done = run(*words, *out, "--quiet")
    assert done.returncode == code, done.stderr
    assert says in one_line(done.stderr)
    assert "--json" in words or done.stdout == ""


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("bake", "x"), "no such command 'bake'"),
        (("build", "oci:x", "--memroy", "64"), "did you mean --memory?"),
        (("diff", "one"), "missing argument 'second'"),
        (("diff", "a", "b", "--most", "0"), "--most: not a number from 1"),
        (("cache", "prune", "--days", "x"), "--days: not a number"),
        (("cache", "prune", "--kind", "kernels"), "'kernels'"),
        (("build",), "no image is named"),
    ],
)
def test_a_usage_error_looks_like_every_other_error(words: tuple[str, ...], says: str) -> None:
    done = run(*words, "--json") if words[0] != "bake" else run(*words)
    assert done.returncode == 2
    assert one_line(done.stderr)
    assert says in done.stderr
    if words[0] != "bake":
        told = json.loads(done.stdout)
        assert says in told["error"] + told["hint"]
        assert told["code"] == 2


def test_a_command_without_words_prints_its_help() -> None:
    done = run("cache")
    assert done.returncode == 2
    assert done.stderr.startswith("Usage: osbuilder cache")
    assert "..." not in done.stderr.partition("Commands:")[2], "a summary is cut"


def test_the_limits_are_listed_without_an_image() -> None:
    done = run("build", "--limit", "help")
    assert (done.returncode, done.stderr) == (0, "")
    assert "header-records" in done.stdout
    assert "1000000" in done.stdout


def test_a_limit_that_refuses_an_image_is_named(layout: Path) -> None:
    done = run("rootfs", f"oci:{layout}", "--limit", "entries=1", "--quiet")
    assert done.returncode == 3
    assert "hint:  --limit entries=NUMBER allows more" in done.stderr


def test_a_tar_goes_into_a_pipe_or_a_device_as_it_comes(layout: Path, tmp_path: Path) -> None:
    words = ("rootfs", f"oci:{layout}", "--raw", "--quiet", "--tar")
    assert run(*words, str(tmp_path / "whole.tar")).returncode == 0
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with (tmp_path / "read").open("wb") as sink, subprocess.Popen(["cat", str(fifo)], stdout=sink) as reader:
        done = run(*words, str(fifo))
        assert (done.returncode, done.stderr) == (0, "")
        assert reader.wait(30) == 0
    assert (tmp_path / "read").read_bytes() == (tmp_path / "whole.tar").read_bytes()
    assert stat.S_ISFIFO(fifo.stat().st_mode)
    assert run(*words, "/dev/null").returncode == 0
    assert stat.S_ISCHR(Path("/dev/null").stat().st_mode)


def test_nobody_is_told_to_remove_what_is_no_file(layout: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "precious")
    for out in (tmp_path, tmp_path / "link"):
        done = run("rootfs", f"oci:{layout}", "--quiet", "--tar", str(out))
        assert done.returncode == 2
        assert "not a regular file" in one_line(done.stderr)
        assert not re.search(r"\bremove\b", done.stderr)


def test_an_explanation_begins_with_what_was_changed(layout: Path) -> None:
    said = run("rootfs", f"oci:{layout}", "--explain", "--quiet").stdout
    changed, _, idle = said.partition("as it should be already: ")
    assert len(re.findall(r"(?m)^    [+~-] /", changed)) == len(re.findall(r"(?m)^\w+: ", changed)) > 5
    assert not re.search(r"(?m)^    [+~-] ", idle)
    assert "    + /dev /mnt /proc /run /sys /tmp\n" in said, "six paths are not called five and one more"
    assert said.index("summary:") < said.index("not asked for: removals, additions, ")
    assert "not for this image: " in said
    assert "1 more" not in said


@pytest.mark.parametrize("limit", ["--nofile=64", "--as=600000000"])
def test_an_image_of_many_layers_is_read_within_small_limits(limit: str, tmp_path: Path) -> None:
    stack = [archive(folder("d"), member(f"d/{number}", b"x" * 5000)) for number in range(80)]
    write_layout(tmp_path / "l", stack, compress=True)
    argv = ["prlimit", limit, *OSBUILDER, "rootfs", f"oci:{tmp_path}/l", "--raw", "--json", "-q"]
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    done = subprocess.run(argv, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["entries"]) == 82


@pytest.mark.parametrize("words", ["--raw", "--tar {0}/out.tar", "--raw --json", "--raw --tar -"])
def test_an_explanation_is_of_the_policy_and_writes_nothing(words: str, layout: Path, tmp_path: Path) -> None:
    done = run("rootfs", f"oci:{layout}", "--explain", "--quiet", *words.format(tmp_path).split())
    assert done.returncode == 2
    assert "--explain is about the policy" in one_line(done.stderr)
    assert not (tmp_path / "out.tar").exists()


@pytest.mark.parametrize(
    ("wish", "reason"),
    [("--policy", "the built-in agent obeys no policy"), ("--modules", "the kernel of this build loads no modules")],
)
def test_what_nobody_in_the_guest_would_use_is_refused_before_anything_is_made(
    wish: str, reason: str, layout: Path, tmp_path: Path
) -> None:
    done = run("build", f"oci:{layout}", "-o", str(tmp_path / "out"), "--quiet", "--no-smoke", wish, str(tmp_path))
    assert done.returncode == 2
    assert reason in one_line(done.stderr)
    assert not (tmp_path / "out" / "manifest.json").exists()


@pytest.mark.parametrize("command", ["image", "initrd", "build", "rootfs"])
def test_what_is_read_is_never_written_to(command: str, layout: Path, tmp_path: Path) -> None:
    saved = tmp_path / "saved.tar"
    saved.write_bytes(b"not looked at")
    (tmp_path / "alias").symlink_to(layout)
    word = "--tar" if command == "rootfs" else "-o"
    cases = [
        (f"oci:{layout}", layout / "out"),
        (f"dir:{layout}", tmp_path / "alias" / "new"),
        (f"oci:{layout}", layout),
    ]
    if command != "build":
        cases.append((f"docker-archive:{saved}", saved))
    before = sorted(tmp_path.rglob("*"))
    for source, out in cases:
        ended = run(command, source, word, str(out), "--force")
        assert ended.returncode == 2, ended.stderr
        assert "what is read" in one_line(ended.stderr) or "not a regular file" in one_line(ended.stderr)
    assert sorted(tmp_path.rglob("*")) == before
    assert saved.read_bytes() == b"not looked at"


@pytest.mark.parametrize("command", ["image", "initrd"])
def test_an_image_does_not_go_to_standard_output(command: str, layout: Path, tmp_path: Path) -> None:
    ended = run(command, f"oci:{layout}", "-o", "-", cwd=tmp_path)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert "standard output" in one_line(ended.stderr)
    assert not (tmp_path / "-").exists()


def test_a_bad_source_date_epoch_is_refused(layout: Path, tmp_path: Path) -> None:
    done = run("image", f"oci:{layout}", "-o", str(tmp_path / "i"), env={"SOURCE_DATE_EPOCH": "yesterday"})
    assert done.returncode == 2
    assert "SOURCE_DATE_EPOCH" in one_line(done.stderr)


def test_an_image_is_written_and_told_as_json(layout: Path, tmp_path: Path) -> None:
    done = run("image", f"oci:{layout}", "-o", str(tmp_path / "x.img"), "--json", "--quiet")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["size"] == (tmp_path / "x.img").stat().st_size
    assert told["words"][0] == "root=/dev/pmem0p1"
    assert done.stderr == ""


def test_the_same_bytes_with_another_umask_zone_locale_and_directory(layout: Path, tmp_path: Path) -> None:
    digests = set()
    for number, env in enumerate(({"TZ": "UTC"}, {"TZ": "Asia/Kathmandu", "LANG": "tr_TR.UTF-8", "COLUMNS": "1"})):
        cwd = tmp_path / f"dir {number}"
        cwd.mkdir()
        before = os.umask(0o077 if number else 0o022)
        try:
            for kind in ("image", "initrd"):
                done = run(kind, f"oci:{layout}", "-o", f"{kind}.out", "--json", "--quiet", env=env, cwd=cwd)
                digests.add((kind, json.loads(done.stdout)["sha256"]))
        finally:
            os.umask(before)
    assert len(digests) == 2


def test_a_directory_that_is_not_ours_is_left_alone(layout: Path, tmp_path: Path) -> None:
    out = tmp_path / "precious"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    done = run("build", f"oci:{layout}", "-o", str(out), "--quiet")
    assert done.returncode == 2
    assert "thesis.tex" in one_line(done.stderr)
    assert os.listdir(out) == ["thesis.tex"]


def test_an_output_that_is_a_file_is_refused(layout: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("x")
    done = run("build", f"oci:{layout}", "-o", str(tmp_path / "out"), "--quiet")
    assert done.returncode == 2
    assert "not a directory" in one_line(done.stderr)


def test_a_hostile_name_reaches_the_terminal_harmless(tmp_path: Path) -> None:
    write_layout(tmp_path / "l", [archive(hardlink("\x1b]0;owned\x07[/red]\n", "x"))])
    done = run("image", f"oci:{tmp_path}/l", "-o", str(tmp_path / "x"))
    assert done.returncode == 3
    assert "\x1b" not in done.stderr
    assert "hard link" in done.stderr
    assert not (tmp_path / "x").exists()


def test_the_agents_version_is_read_from_its_bytes(agent: File, tmp_path: Path) -> None:
    said = run("agent", "version", str(agent.path)).stdout.splitlines()
    assert said[0].split() == ["agent", "osbuilder-agent", osbuild.__version__]
    (tmp_path / "b").write_bytes(b"something else")
    assert run("agent", "version", str(tmp_path / "b")).returncode == 3
    missing = run("agent", "version", "/no/such")
    assert (missing.returncode, one_line(missing.stderr)) == (3, "error: '/no/such' is not there")


def test_a_failure_is_told_as_json_too(tmp_path: Path) -> None:
    done = run("image", f"oci:{tmp_path}/no", "-o", str(tmp_path / "x"), "--json", "--quiet")
    told = json.loads(done.stdout)
    assert done.returncode == told["code"] == 3
    assert "no" in told["error"]
    assert "oci:PATH" in told["hint"]


def on_terminal(columns: int, *words: str, env: dict[str, str] | None = None) -> list[str]:
    """What a terminal of so many columns gets, without its colours."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    settings = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    process = subprocess.Popen(
        [*OSBUILDER, *words], stdin=theirs, stdout=theirs, stderr=theirs, cwd=Path(__file__).parent.parent,
        env=settings | {"TERM": "xterm"} | (env or {}),
    )  # fmt: skip
    os.close(theirs)
    said = b""
    try:
        while data := os.read(ours, 65536):
            said += data
    except OSError:  # the other end is closed
        pass
    os.close(ours)
    process.wait(60)
    return re.sub(r"\x1b\[[0-?]*[@-~]", "", said.decode()).replace("\r", "").splitlines()


@pytest.mark.slow
@pytest.mark.parametrize("columns", [80, pytest.param(120, marks=pytest.mark.slow)])
def test_on_a_terminal_lines_end_between_words_and_paths_stay_whole(columns: int, layout: Path, tmp_path: Path) -> None:
    env = {"OSBUILDER_CACHE": str(tmp_path / "a directory with blanks is broken there" / ("long" * 8))}
    for words in (("doctor",), ("rootfs", f"oci:{layout}", "--explain", "-q"), ("image", "docker-daemon:a", "-q")):
        lines = on_terminal(columns, *words, env=env | {"DOCKER_HOST": "unix:///nonexistent"})
        wide = on_terminal(1000, *words, env=env | {"DOCKER_HOST": "unix:///nonexistent"})
        one, other = (set(re.sub(r"\d+\.\d+\s+s\b", "N s", " ".join(said)).split()) for said in (lines, wide))
        assert one == other, "a word was split"
        assert all(len(line) <= columns or len(line.split()[-1]) > columns // 3 for line in lines)
        assert len(lines) > len(wide) or max(map(len, wide)) <= columns


def test_a_tree_without_layers_and_one_with_one_are_counted_rightly(layout: Path, tmp_path: Path) -> None:
    (tmp_path / "tree/etc").mkdir(parents=True)
    assert "(3 entries in 1 layer)" in run("rootfs", f"oci:{layout}", "--raw").stderr
    assert "(2 entries)" in run("rootfs", f"dir:{tmp_path}/tree", "--raw").stderr


def test_a_cache_that_is_not_there_is_said_to_be_none(tmp_path: Path) -> None:
    assert "there is no cache yet" in run("cache", "ls", env={"OSBUILDER_CACHE": str(tmp_path / "none")}).stdout


def test_what_the_cache_lists_is_named_and_locks_are_counted(tmp_path: Path) -> None:
    env = {"OSBUILDER_CACHE": str(tmp_path)}
    Blobs(cache=Cache(root=tmp_path)).remember("docker.io/library/debian:12", "sha256:" + "a" * 64)
    for name in ("locks/kernel-" + "a" * 64, "logs/kernel-config-1.log", "logs/kernel-config.log"):
        (tmp_path / "v1" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "v1" / name).touch()
    said = run("cache", "ls", env=env).stdout
    assert "docker.io/library/debian:12" in said
    assert "besides: 1 leftover, 1 lock, 1 log; --all lists them" in said
    assert "kernel-config.log" not in said
    assert "kernel-config.log" in run("cache", "ls", "--all", env=env).stdout


@pytest.mark.parametrize("both", ["", "2>&1"])
@pytest.mark.parametrize("words", ["cache --help", "rootfs oci:{0}", "rootfs oci:{0} --tar /dev/stdout", "doctor"])
def test_a_reader_who_has_gone_is_no_error(words: str, both: str, layout: Path) -> None:
    program = f'{sys.executable} -c "from osbuild.cli import main; main()" {words.format(layout)}'
    line = f"(sleep 0.2; {program}) {both} | (exec <&-; sleep 0.1); exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(
        ["bash", "-c", line], check=False, cwd=Path(__file__).parent.parent, capture_output=True, text=True
    )
    assert done.returncode == 141
    assert not [text for text in done.stderr.splitlines() if not text.startswith("✓")], done.stderr


@pytest.mark.parametrize(("redirect", "code"), [("| (exec <&-; sleep 0.5)", 141), (">/dev/full", 4), (">&-", 0)])
def test_a_result_that_nobody_reads_ends_without_a_traceback(
    redirect: str, code: int, layout: Path, tmp_path: Path
) -> None:
    program = f'sleep 0.1; {sys.executable} -c "from osbuild.cli import main; main()"'
    line = f"({program} image oci:{layout} -o {tmp_path}/x.img --json --quiet) {redirect}; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(
        ["bash", "-c", line], check=False, cwd=Path(__file__).parent.parent, capture_output=True, text=True
    )
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr


def test_progress_that_nobody_reads_does_not_stop_the_work(layout: Path, tmp_path: Path) -> None:
    program = f'{sys.executable} -c "from osbuild.cli import main; main()"'
    words = f"{program} image oci:{layout} -o {tmp_path}/x.img"
    line = f"{words} 2>&1 >/dev/null | (exec <&-; sleep 0.5); exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", line], check=False, cwd=Path(__file__).parent.parent, capture_output=True)
    assert done.returncode == 0
    assert (tmp_path / "x.img").exists()


def test_doctor_names_the_package_of_what_is_missing(tmp_path: Path) -> None:
    done = run("doctor", "--json", env={"PATH": str(tmp_path)})
    findings = {finding["name"]: finding for finding in json.loads(done.stdout)}
    assert done.returncode == 4
    assert findings["qemu-system-x86_64"]["state"] == "missing"
    assert findings["git"]["state"] == "missing (optional)"
    assert "qemu-system-x86" in findings["qemu-system-x86_64"]["detail"]


_STRUCK = """
import signal, sys
from osbuild import cli, console, program
console.print_error = console.print_note = lambda *_: signal.raise_signal(signal.SIGTERM)
if sys.argv[1] == "interrupted":
    program._command = lambda *_: signal.raise_signal(signal.SIGHUP)
program.run(cli.app)
"""


@pytest.mark.parametrize("word", ["no-such-command", "interrupted"])
def test_a_signal_while_the_end_is_told_is_no_traceback(word: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _STRUCK, word],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parent.parent,
    )
    assert (done.returncode, done.stdout, done.stderr) == (128 + signal.SIGTERM, "", "")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_it_with_the_right_code_and_leaves_nothing(number: signal.Signals, tmp_path: Path) -> None:
    fifo = tmp_path / "slow.tar"
    os.mkfifo(fifo)
    process = subprocess.Popen(
        [*OSBUILDER, "image", f"docker-archive:{fifo}", "-o", str(tmp_path / "x.img")],
        stderr=subprocess.PIPE, cwd=Path(__file__).parent.parent,
    )  # fmt: skip
    writer = os.open(fifo, os.O_WRONLY)  # returns when the program has opened its end
    time.sleep(0.1)
    process.send_signal(number)
    _, told = process.communicate(timeout=20)
    os.close(writer)
    assert process.returncode == 128 + number, told
    assert b"Traceback" not in told
    assert os.listdir(tmp_path) == ["slow.tar"]
