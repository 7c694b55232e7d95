"""A build that went through a registry boots as it did before: the commands, a real registry, and real guests."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from osbuild import manifest
from osbuild.artifacts import DiskImage, Initrd, Kernel, Rootfs
from tests.boot_fixtures import boot_kernel, boot_rootfs, good_image, good_initrd
from tests.published import add_records, check_same
from tests.test_cli import run
from tests.test_export import build_of
from tests.test_registry import start_registry

__all__ = ["boot_kernel", "boot_rootfs", "good_image", "good_initrd"]  # fixtures


@pytest.fixture
def debian(tmp_path: Path) -> Iterator[str]:
    (tmp_path / "registry").mkdir()
    yield from start_registry(tmp_path / "registry", login=False)


@pytest.mark.slow
@pytest.mark.boot
def test_what_was_pulled_passes_the_smoke_test(
    debian: str,
    boot_kernel: Kernel,
    boot_rootfs: Rootfs,
    good_image: DiskImage,
    good_initrd: Initrd,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("OSBUILDER_CACHE", str(tmp_path / "cache"))
    build = build_of(tmp_path, boot_kernel, image=good_image, initrd=good_initrd)
    document = json.loads((build / "manifest.json").read_text()) | {"agent": boot_rootfs.agent}
    roots: dict[str, DiskImage | Initrd] = {"rootfs.img": good_image, "initrd.img": good_initrd}
    document["outputs"] |= {name: manifest.about_root(root) for name, root in roots.items()}
    (build / "manifest.json").write_text(json.dumps(document))
    add_records(build)
    out = tmp_path / "out"
    sent = json.loads(run("publish", str(build), f"{debian}/guests/tiny:1", "--json").stdout)
    came = json.loads(run("pull", f"{debian}/guests/tiny:1", "-o", str(out), "--json").stdout)
    assert (came["digest"], came["platform"]) == (sent["digest"], "linux/amd64")
    assert came["fetched"] == sent["sent"] > 0
    check_same(build, out)
    smoked = run("smoke", str(out), "--accel", "tcg", "--json")
    assert smoked.returncode == 0, smoked.stderr
    boots = json.loads(smoked.stdout)["boots"]
    assert {boot["name"]: boot["verdict"] for boot in boots} == {"image": "passed", "initrd": "passed"}
    again = json.loads(run("publish", str(out), f"{debian}/guests/tiny:1", "--json").stdout)
    assert (again["sent"], again["changed"], again["digest"]) == (0, False, sent["digest"])
