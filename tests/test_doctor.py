"""osbuilder doctor: what only some wishes need is found where it is, and told with where it comes from."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Final

import pytest

from osbuild import doctor
from osbuild.errors import HostError
from osbuild.runtime import shares

OPTIONAL: Final = {
    "qemu-img": ("apt-get install qemu-utils", "qcow2"), "lz4": ("apt-get install lz4", "--compress lz4"),
    "mkfs.xfs": ("apt-get install xfsprogs", "--fs xfs"), "virtiofsd": ("apt-get install virtiofsd", "virtio-fs"),
    "vhost-device-vsock": ("cargo install vhost-device-vsock", "--transport vhost-user-vsock"),
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIONAL)
def test_doctor_finds_what_is_optional_and_says_what_it_is_for_and_where_from(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("osbuild.command.find", lambda program, **_: only_on_path(program))
    monkeypatch.setattr("osbuild.runtime.shares._PLACES", ())
    how, purpose = OPTIONAL[name]
    missing = finding(name)
    assert (missing.state, missing.detail.startswith(how)) == ("missing (optional)", True), missing
    assert purpose in missing.purpose
    (tmp_path / name).write_text("#!/bin/sh\n")
    (tmp_path / name).chmod(0o755)
    assert (finding(name).state, finding(name).detail) == ("here", str(tmp_path / name))


@pytest.mark.parametrize("place", ["/usr/libexec", "/usr/lib/qemu"])
def test_doctor_looks_for_virtiofsd_where_packages_put_it(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert place in shares._PLACES
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr("osbuild.runtime.shares._PLACES", (str(tmp_path),))
    (tmp_path / "virtiofsd").write_text("#!/bin/sh\n")
    (tmp_path / "virtiofsd").chmod(0o755)
    assert doctor._virtiofsd().detail == str(tmp_path / "virtiofsd")


def finding(name: str) -> doctor.Finding:
    wants = {want.name: want for want in doctor._WANTS}
    return doctor._look_for(wants[name]) if name in wants else doctor._virtiofsd()


def only_on_path(program: str) -> str:
    """As command.find, without the directories that it adds."""
    found = shutil.which(program)
    if found is None:
        raise HostError(f"{program} is not installed")
    return found
