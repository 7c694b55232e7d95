"""Every injection, carried out: its cause is named, and seconds after the last that happened.

OSBUILDER_RECORD=1 keeps what each left behind in tests/consoles, where the tests of the parser read it.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from _pytest.mark import ParameterSet

from osbuild.artifacts import DiskImage, File, Initrd, Kernel, Rootfs
from osbuild.rootfs import assemble_rootfs
from osbuild.spec import RootfsSpec
from tests import recordings
from tests.boot_fixtures import boot_kernel, boot_rootfs, compile_init, good_image, good_initrd
from tests.injections import INJECTIONS, Injection
from tests.lab import Lab
from tests.layer_tools import opened

__all__ = ["boot_kernel", "boot_rootfs", "compile_init", "good_image", "good_initrd"]  # fixtures

pytestmark = [pytest.mark.boot, pytest.mark.timeout(600)]  # the slow ones, on a busy machine

# After the last that happened. What the code itself waits is 5 s for a port of the agent's to be announced, 0.3 s for
# what a kernel says after a panic, and 0.6 s for a VMM to end; the rest is reading, and a busy machine.
SOON = 10.0

# A kernel's own word, a VMM that ends, a port that is missing, a guest that is silent.
AT_ONCE = frozenset(
    ("kernel-panics", "another-disk", "init-exits", "kernel-faults-three-times", "no-virtio-blk", "no-agent")
)

IMAGES = Path.home() / ".cache/osbuilder/images"
DEBIAN = IMAGES / "debian-1"


@pytest.fixture(scope="session")
def debian(agent: File) -> Callable[[], Rootfs]:
    """A root that systemd starts."""

    def make() -> Rootfs:
        if not DEBIAN.is_dir():
            pytest.skip(f"there is no {DEBIAN}: scripts/base-image debian makes it")
        return assemble_rootfs(opened(f"oci:{DEBIAN}"), agent, epoch=0, wishes=RootfsSpec(init="systemd", slim=True))

    return make


@pytest.fixture(scope="session")
def debian_kernel(boot_kernel: Kernel) -> Callable[[], Kernel]:
    """Debian's kernel, nearly all of which is modules, as its package has it; fetched once, never installed."""

    def make() -> Kernel:
        image = File.of(fetched_kernel(IMAGES / "debian-kernel"))
        return dataclasses.replace(boot_kernel, vmlinux=image, vmlinuz=image, release="Debian's")

    return make


def fetched_kernel(home: Path) -> Path:
    kernel = home / "vmlinuz"
    if kernel.is_file():
        return kernel
    if shutil.which("apt-get") is None:
        pytest.skip("Debian's kernel comes from apt-get")
    depends = subprocess.run(["apt-cache", "depends", "linux-image-amd64"], capture_output=True, text=True, check=False)
    found = re.search(r"Depends: (linux-image-\S+)", depends.stdout)
    with tempfile.TemporaryDirectory() as place:
        name = found[1] if found else "linux-image-amd64"
        done = subprocess.run(["apt-get", "download", name], cwd=place, capture_output=True, text=True, check=False)
        packages = list(Path(place).glob("linux-image-*.deb"))
        if not packages:
            pytest.skip(f"apt-get download {name}: {done.stderr.strip()[-200:]}")
        unpacker = subprocess.Popen(["dpkg-deb", "--fsys-tarfile", packages[0]], stdout=subprocess.PIPE)
        assert unpacker.stdout is not None
        home.mkdir(parents=True, exist_ok=True)
        with unpacker, tarfile.open(fileobj=unpacker.stdout, mode="r|") as tar:
            for member in tar:
                if member.name.startswith("./boot/vmlinuz-"):
                    content = tar.extractfile(member)
                    assert content is not None
                    (home / "new").write_bytes(content.read())
                    (home / "new").rename(kernel)
    return kernel


@pytest.fixture
def lab(
    boot_kernel: Kernel, boot_rootfs: Rootfs, good_image: DiskImage, good_initrd: Initrd, agent: File,
    compile_init: Callable[[str], bytes], debian: Callable[[], Rootfs], debian_kernel: Callable[[], Kernel],
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Lab]:  # fmt: skip
    made = Lab(
        kernel=boot_kernel, rootfs=boot_rootfs, image=good_image, initrd=good_initrd, agent=agent,
        compile_init=compile_init, debian=debian, debian_kernel=debian_kernel, home=tmp_path, monkeypatch=monkeypatch,
    )  # fmt: skip
    with made.cleanup:
        yield made


def _all() -> list[ParameterSet]:
    """One of each way to see it at once, and slow the others; what those left behind, test_autopsy reads every time."""
    names = {one.name for one in INJECTIONS}
    assert names >= AT_ONCE, AT_ONCE - names
    marks = {one.name: pytest.mark.long if one.slow else pytest.mark.slow for one in INJECTIONS}
    return [
        pytest.param(one, id=one.name, marks=[] if one.name in AT_ONCE else [marks[one.name]]) for one in INJECTIONS
    ]


@pytest.mark.parametrize("injected", _all())
def test_what_was_injected_is_named_and_nobody_waits_for_the_deadline(injected: Injection, lab: Lab) -> None:
    report = injected.carry_out(lab)
    assert report.cause is not None, report
    if os.environ.get("OSBUILDER_RECORD"):
        recordings.keep(injected.name, lab, report)
    assert (report.cause.name, report.cause.certain) == (injected.named or injected.cause, injected.certain), report
    assert report.verdict != "passed"
    since = report.seconds - max(event.seconds for event in report.timeline if event.name != "given up")
    assert since < SOON + injected.waits, "it was waited for"


def test_a_guest_that_quotes_a_panic_on_its_console_is_not_ended_for_it(lab: Lab) -> None:
    quoted = "Kernel panic - not syncing: is what I look for"
    report = lab.boot(lab.script(f"echo '{quoted}'\necho 'systemd[2]: Freezing execution'\nexec /bin/agent"))
    assert (report.verdict, report.cause) == ("passed", None), report
    assert quoted in report.console.read_text(errors="replace")
