"""Builds of one image differ in nothing, whoever makes them, where, when and with what."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from osbuild.filesystem import FILESYSTEMS
from osbuild.initrd import COMPRESSIONS
from tests.elsewhere import NOBODY, Elsewhere, give_to_nobody, need_root

pytestmark = [pytest.mark.xdist_group("same bytes"), pytest.mark.slow, pytest.mark.timeout(900)]

EPOCH = {"SOURCE_DATE_EPOCH": "1700000000"}
# What is built: every filesystem and every compression, with everything that is made from the tree.
WORDS = {
    **{f"{name}.img": ("image", "--fs", name) for name in FILESYSTEMS},
    "verity.img": ("image", "--verity", "--free", "3M"),
    "plain.qcow2": ("image", "--no-dax-header", "--format", "qcow2"),
    "rw.img": ("image", "--no-dax-header", "--writable", "--size", "64M"),
    **{f"{name}.cpio": ("initrd", "--compress", name) for name in COMPRESSIONS},
}
OTHER = {
    "another user": ((), {}),
    "another umask": (("sh", "-c", 'umask 077; exec "$@"', "sh"), {}),
    "another time zone and locale": ((), {"TZ": "Pacific/Kiritimati", "LC_ALL": "C.utf8", "LANG": "tr_TR.UTF-8"}),
    "another host name": (("unshare", "--uts", "sh", "-c", 'hostname elsewhere; exec "$@"', "sh"), {}),
    "one core": (("taskset", "--cpu-list", "0"), {}),
    "another date": (("faketime", "2031-05-05 05:05:05"), {}),
    "another order of hashes": ((), {"PYTHONHASHSEED": "7"}),
}


@pytest.fixture(scope="module")
def home() -> Iterator[Path]:
    need_root()
    path = Path(tempfile.mkdtemp(dir="/tmp"))
    path.chmod(0o755)
    try:
        make_root(path / "root", reverse=False)
        make_root(path / "reversed", reverse=True)
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(scope="module")
def there(home: Path) -> Elsewhere:
    return Elsewhere.at(home / "program")


@pytest.fixture(scope="module")
def expected(there: Elsewhere, home: Path) -> dict[str, str]:
    """By root, from the directory as it is."""
    (home / "base").mkdir(mode=0o755)
    return {
        name: digest(
            there.command(*words, work=home / "base", env=EPOCH, before=()), home / "root", name, home / "base"
        )
        for name, words in WORDS.items()
    }


def make_root(root: Path, *, reverse: bool) -> None:
    """The same files, made in one order or the other: on disk they lie, and are listed, in different orders."""
    files = {f"usr/lib/d{number % 5}/file-{number}": b"%d " % number * (number * 9) for number in range(150)}
    files["usr/lib/large"] = bytes(range(256)) * 9000
    files["usr/\U0001fae8"] = b"a character that Python 3.13 knows, and 3.11 does not"
    files["usr/sparse"] = bytes(1 << 20) + b"1"
    files["etc/passwd"] = b"root:x:0:0::/root:/bin/sh\n"
    for name in sorted(files, reverse=reverse):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if reverse and name == "usr/sparse":
            with path.open("wb") as file:
                file.seek(1 << 20)
                file.write(b"1")
            continue
        path.write_bytes(files[name])
    for path in sorted(root.rglob("*"), reverse=True):
        path.chmod(0o755 if path.is_dir() else 0o644)
        os.utime(path, ns=(0, 1_600_000_000_123_456_789))
    root.chmod(0o755)
    os.utime(root, ns=(0, 1_600_000_000_000_000_000))


def digest(command: list[str], root: Path, name: str, cwd: Path) -> str:
    done = subprocess.run(
        [*command, f"dir:{root}", "-o", name, "--quiet"], cwd=cwd, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    with (cwd / name).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@pytest.mark.parametrize("what", OTHER)
def test_nothing_around_a_build_is_in_it(what: str, there: Elsewhere, home: Path, expected: dict[str, str]) -> None:
    wrapper, env = OTHER[what]
    for program in wrapper[:1]:
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")
    work = home / what.replace(" ", "-")
    work.mkdir(mode=0o755)
    give_to_nobody(work)
    before = (*NOBODY, *wrapper) if "unshare" not in wrapper else (*wrapper, *NOBODY)
    for name, words in WORDS.items():
        command = there.command(*words, work=work, env=EPOCH | env, before=before)
        assert digest(command, home / "root", name, work) == expected[name], f"{name} with {what}"


def test_the_order_of_files_on_disk_is_in_no_build(there: Elsewhere, home: Path, expected: dict[str, str]) -> None:
    names = [os.listdir(home / kind / "usr/lib/d1") for kind in ("root", "reversed")]
    assert sorted(names[0]) == sorted(names[1])
    work = home / "other order"
    work.mkdir()
    for name, words in WORDS.items():
        command = there.command(*words, work=work, env=EPOCH, before=())
        assert digest(command, home / "reversed", name, work) == expected[name], name


def test_another_python_gives_the_same_bytes(there: Elsewhere, home: Path, expected: dict[str, str]) -> None:
    python = other_python(home / "venv")
    work = home / "other python"
    work.mkdir()
    for name, words in WORDS.items():
        command = there.command(*words, work=work, env=EPOCH, before=(), python=python)
        assert digest(command, home / "root", name, work) == expected[name], name


def other_python(venv: Path) -> Path:
    """Python 3.13 with our dependencies."""
    candidates = [
        shutil.which("python3.13"),
        *map(str, Path("~/.pyenv/versions").expanduser().glob("3.13*/bin/python")),
    ]
    found = next((path for path in candidates if path and _runs(path)), None)
    if found is None:
        pytest.skip("no Python 3.13 here")
    subprocess.run([found, "-m", "venv", str(venv)], check=True)
    project = Path(__file__).parent.parent
    install = [str(venv / "bin/pip"), "install", "-q", "--disable-pip-version-check", str(project)]
    if subprocess.run(install, check=False, capture_output=True).returncode != 0:
        pytest.skip("the packages for Python 3.13 cannot be reached")
    return venv / "bin/python"


def _runs(python: str) -> bool:
    return subprocess.run([python, "-c", "pass"], check=False, capture_output=True).returncode == 0


def test_the_time_of_the_build_counts_where_it_is_asked_for(
    there: Elsewhere, home: Path, expected: dict[str, str]
) -> None:
    work = home / "another epoch"
    work.mkdir()
    command = there.command(*WORDS["ext4.img"], work=work, env={"SOURCE_DATE_EPOCH": "1500000000"}, before=())
    assert digest(command, home / "root", "ext4.img", work) != expected["ext4.img"]
