"""Two builds of one kernel, by different users in different places at different times, are the same bytes."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from osbuild.arch import X86_64
from osbuild.cache import Cache, default_cache
from osbuild.kernel import KernelSpec, build_kernel, default_spec
from tests.elsewhere import Elsewhere
from tests.test_kernel import TOY, programs_without

NOBODY = 65534
NAMES = ("vmlinux", "vmlinuz", "config", "System.map", "objects.json", "kernel.json")

_BUILD = """
import sys
from pathlib import Path
from osbuild.arch import X86_64
from osbuild.cache import Cache
from osbuild.kernel import KernelSpec, build_kernel, default_spec
cache = Cache(root=Path(sys.argv[1]))
fragment, source = map(Path, sys.argv[2:]) if sys.argv[2:] else (None, None)
spec = KernelSpec(arch=X86_64, source=source, fragments=(fragment,)) if fragment else default_spec(X86_64, jobs=3)
print(build_kernel(spec, cache).vmlinux.path.parent)
"""


@pytest.fixture
def elsewhere() -> Iterator[Path]:
    """A directory of another user's, with a longer name than the caches of tests have."""
    if os.getuid() != 0 or shutil.which("faketime") is None:
        pytest.skip("needs root, who can be another user, and faketime: apt-get install faketime")
    home = Path(f"/var/tmp/osbuilder-same-bytes-{os.getpid()}/where/nobody/else/has/ever/built/a/kernel")
    home.mkdir(parents=True)
    os.chown(home, NOBODY, NOBODY)
    yield home
    shutil.rmtree(home.parents[7])


def build_as_another(home: Path, *words: str) -> Path:
    """As another user, more than a year later, in another language and time zone, and without ccache."""
    programs = programs_without("ccache", home.parent)
    # osbuilder gives programs a small environment of its own: what changes make's time has to be in make's place.
    (programs / "make").unlink(missing_ok=True)
    (programs / "make").write_text('#!/bin/sh\nexec faketime -f +400d /usr/bin/make "$@"\n')
    (programs / "make").chmod(0o755)
    others = {"LANG": "tr_TR.UTF-8", "LC_ALL": "tr_TR.UTF-8", "TZ": "Asia/Kathmandu", "PATH": str(programs)}
    argv = Elsewhere.at(home.parent / "program").command(str(home), *words, work=home, env=others)
    argv[argv.index("-c") + 1] = _BUILD
    return Path(subprocess.run(argv, stdout=subprocess.PIPE, text=True, check=True, cwd="/").stdout.strip())


def test_another_user_elsewhere_on_another_day_gets_the_same_toy(elsewhere: Path, tmp_path: Path) -> None:
    fragment = elsewhere.parent / "toy.conf"
    fragment.write_text('# why: a toy\nCONFIG_PRINTK=y\nCONFIG_NAME="toy"\nCONFIG_NET=y\n')
    source = elsewhere.parent / "toy.tar.xz"
    subprocess.run(["tar", "-C", TOY.parent, "-cJf", source, TOY.name], check=True)
    spec = KernelSpec(arch=X86_64, source=source, fragments=(fragment,))
    first = build_kernel(spec, Cache(root=tmp_path / "cache")).vmlinux.path.parent
    second = build_as_another(elsewhere, str(fragment), str(source))
    assert second.stat().st_uid == NOBODY
    assert {name: (first / name).read_bytes() for name in NAMES} == {n: (second / n).read_bytes() for n in NAMES}


@pytest.mark.slow
def test_the_toy_would_tell_if_time_or_place_got_in(elsewhere: Path, tmp_path: Path) -> None:
    """The two builds above differ where a kernel asks for what they do not hide."""
    toy = shutil.copytree(TOY, elsewhere.parent / "toy")
    makefile = (toy / "Makefile").read_text()
    (toy / "Makefile").write_text(makefile.replace("$(KBUILD_BUILD_TIMESTAMP)", "$(shell date +%Y) $(CURDIR)"))
    for path in (toy, *toy.rglob("*")):
        path.chmod(path.stat().st_mode | stat.S_IRGRP | stat.S_IROTH)
    fragment = elsewhere.parent / "toy.conf"
    fragment.write_text("# why: a toy\nCONFIG_PRINTK=y\n")
    spec = KernelSpec(arch=X86_64, source=toy, fragments=(fragment,))
    first = build_kernel(spec, Cache(root=tmp_path / "cache")).vmlinux.path.read_bytes()
    second = (build_as_another(elsewhere, str(fragment), str(toy)) / "vmlinux").read_bytes()
    years = [int(data[data.index(b"toy osbuilder ") + 14 :][:4]) for data in (first, second)]
    assert 1 <= years[1] - years[0] <= 2
    assert str(elsewhere).encode() in second


@pytest.mark.compiles
@pytest.mark.timeout(7200)
def test_another_user_elsewhere_on_another_day_gets_the_same_linux(elsewhere: Path) -> None:
    first = build_kernel(default_spec(X86_64), default_cache()).vmlinux.path.parent
    second = build_as_another(elsewhere)
    for name in NAMES:
        assert (second / name).read_bytes() == (first / name).read_bytes(), name
