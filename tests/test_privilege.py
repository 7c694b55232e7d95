"""Nothing that makes an image asks the kernel for a privilege: strace watches, as an unprivileged user."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.elsewhere import NOBODY, Elsewhere, give_to_nobody, need_root
from tests.layer_tools import archive, folder, hardlink, link, member, write_layout

pytestmark = pytest.mark.timeout(120)

FORBIDDEN = (
    "mount", "umount2", "move_mount", "open_tree", "fsopen", "fsmount", "mount_setattr", "pivot_root", "chroot",
    "unshare", "setns", "mknod", "mknodat", "init_module", "finit_module", "delete_module",
)  # fmt: skip
COMMANDS = {
    "image": ("image", "IMAGE", "-o", "x.img", "--json"),
    "image, erofs": ("image", "IMAGE", "-o", "e.img", "--fs", "erofs", "--json"),
    "image, verity": ("image", "IMAGE", "-o", "v.img", "--verity", "--json"),
    "image, qcow2": ("image", "IMAGE", "-o", "q.img", "--no-dax-header", "--format", "qcow2", "--json"),
    "image, xfs": ("image", "IMAGE", "-o", "f.img", "--fs", "xfs", "--remove", "/etc/again", "--json"),
    "image, writable": ("image", "IMAGE", "-o", "w.img", "--writable", "--size", "2G", "--json"),
    "image, plain, aligned": ("image", "IMAGE", "-o", "p.img", "--no-dax-header", "--align", "1G", "--free", "64M"),
    "initrd, lz4": ("initrd", "IMAGE", "-o", "l", "--compress", "lz4", "--json"),
    "initrd": ("initrd", "IMAGE", "-o", "y", "--json"),
    "rootfs": ("rootfs", "IMAGE", "--tar", "tree.tar"),
    "inspect": ("inspect", "x.img", "--json"),
    "diff": ("diff", "x.img", "x.img"),
}


@pytest.fixture(scope="module")
def home() -> Iterator[Path]:
    need_root()
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    path = Path(tempfile.mkdtemp(dir="/tmp"))
    path.chmod(0o755)
    try:
        layer = archive(
            folder("etc"), member("etc/hello", b"hello"), hardlink("etc/again", "etc/hello"), link("l", "etc"),
            member("bin/su", b"x", mode=0o4755), member("large", b"12345678" * 400_000),
        )  # fmt: skip
        write_layout(path / "image", [layer])
        (path / "work").mkdir()
        give_to_nobody(path / "work")
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(scope="module")
def there(home: Path) -> Elsewhere:
    return Elsewhere.at(home)


SLOW = ("image, qcow2", "image, plain, aligned", "image, xfs", "image, writable", "initrd, lz4")


@pytest.mark.parametrize(
    "what", [pytest.param(what, marks=[pytest.mark.slow] if what in SLOW else []) for what in COMMANDS]
)
def test_no_privilege_is_asked_for(what: str, there: Elsewhere, home: Path) -> None:
    words = [word.replace("IMAGE", f"oci:{home}/image") for word in COMMANDS[what]]
    work = home / "work"
    if what in ("inspect", "diff") and not (work / "x.img").exists():
        made = there.command("image", f"oci:{home}/image", "-o", "x.img", work=work)
        subprocess.run(made, cwd=work, check=True, capture_output=True)
    trace = work / "trace"
    calls = ",".join((*FORBIDDEN, "ioctl", "clone", "clone3"))
    watched = (*NOBODY, "strace", "-f", "-o", str(trace), "-e", f"trace={calls}")
    done = subprocess.run(
        there.command(*words, work=work, before=watched), cwd=work, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = trace.read_text(errors="replace")
    assert "exited with 0" in found, "strace saw it"
    asked = [line for line in found.splitlines() if re.search(rf"\b({'|'.join(FORBIDDEN)})\(", line)]
    assert not asked
    assert "LOOP_" not in found
    assert "CLONE_NEW" not in found


def test_the_watcher_sees_what_is_forbidden(home: Path) -> None:
    """Were strace not to follow children, or its names to change, the test above could not fail."""
    trace = home / "work/seen"
    calls = ",".join((*FORBIDDEN, "ioctl", "clone", "clone3"))
    script = "unshare --user true; mknod node c 1 3; true"
    command = (*NOBODY, "strace", "-f", "-o", str(trace), "-e", f"trace={calls}", "sh", "-c", script)
    subprocess.run(command, cwd=home / "work", capture_output=True, check=True)
    found = trace.read_text(errors="replace")
    assert re.search(r"\bunshare\(", found)
    assert re.search(r"\bmknodat?\(", found)
