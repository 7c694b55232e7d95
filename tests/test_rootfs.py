"""The guest's tree: what is added to every image, and the agent's place in it."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from osbuild.agent import install_agent
from osbuild.arch import X86_64
from osbuild.artifacts import File, Rootfs
from osbuild.rootfs import assemble_rootfs
from tests.layer_tools import archive, folder, hardlink, link, member, opened, write_layout


def assemble(tmp_path: Path, *members: object, epoch: int = 1000, clamp: bool = False) -> Rootfs:
    write_layout(tmp_path / "layout", [archive(*members)])  # type: ignore[arg-type]
    return assemble_rootfs(opened(f"oci:{tmp_path}/layout", X86_64), epoch=epoch, clamp=clamp)


def test_an_empty_image_gets_all_a_guest_needs(tmp_path: Path) -> None:
    tree = assemble(tmp_path, folder("etc")).tree
    for path in ("/proc", "/sys", "/dev", "/run", "/tmp", "/mnt"):
        assert tree[path].is_dir, path
    assert tree["/tmp"].mode & 0o7777 == 0o1777
    assert (tree["/dev/console"].major, tree["/dev/console"].minor) == (5, 1)
    assert stat.S_ISCHR(tree["/dev/null"].mode)
    assert tree["/var/run"].target == "/run"
    assert tree["/etc/machine-id"].content.size == 0
    assert tree["/etc/resolv.conf"].is_file


def test_every_inode_has_a_time(tmp_path: Path) -> None:
    tree = assemble(tmp_path, member("a/b/c", b"x")).tree
    assert all(entry.mtime_ns is not None for entry in tree.values())
    assert tree["/a"].mtime_ns == 1000 * 10**9


def test_an_images_own_mount_points_and_files_stay(tmp_path: Path) -> None:
    tree = assemble(tmp_path, folder("tmp", mode=0o700), member("etc/resolv.conf", b"mine")).tree
    assert tree["/tmp"].mode & 0o777 == 0o700
    assert tree["/etc/resolv.conf"].content.size == 4


def test_a_resolv_conf_that_is_a_link_becomes_a_file(tmp_path: Path) -> None:
    tree = assemble(tmp_path, link("etc/resolv.conf", "../run/systemd/resolve/stub-resolv.conf")).tree
    assert tree["/etc/resolv.conf"].is_file


def test_a_machine_id_does_not_travel(tmp_path: Path) -> None:
    assert assemble(tmp_path, member("etc/machine-id", b"1234")).tree["/etc/machine-id"].content.size == 0


def test_nothing_is_newer_than_the_epoch_when_that_is_asked(tmp_path: Path) -> None:
    tree = assemble(tmp_path, member("new", mtime=5000), member("old", mtime=500), clamp=True).tree
    assert tree["/new"].mtime_ns == 1000 * 10**9
    assert tree["/old"].mtime_ns == 500 * 10**9


def test_hard_links_survive_the_rules(tmp_path: Path) -> None:
    xattrs = {"SCHILY.xattr.trusted.x": "y", "SCHILY.xattr.user.kept": "z"}
    tree = assemble(tmp_path, member("a", b"1", pax_headers=xattrs), hardlink("b", "a")).tree
    assert tree["/a"] is tree["/b"]
    assert dict(tree["/a"].xattrs) == {"user.kept": b"z"}


@pytest.fixture
def agent(tmp_path: Path) -> File:
    path = tmp_path / "agent"
    path.write_bytes(b"\x7fELF osbuilder-agent version=9.9;")
    return File.of(path)


def test_the_agent_is_init_in_a_usrmerged_image(tmp_path: Path, agent: File) -> None:
    rootfs = assemble(
        tmp_path, folder("usr/sbin"), link("sbin", "usr/sbin"), link("usr/sbin/init", "../lib/systemd/systemd")
    )
    installed = install_agent(rootfs, agent)
    assert installed.tree["/sbin"].is_symlink
    assert installed.tree["/usr/sbin/init"].is_file
    assert installed.tree["/usr/sbin/init"].mode == stat.S_IFREG | 0o755
    assert installed.tree["/init"].target == "/sbin/init"
    assert (installed.init, installed.agent) == ("/sbin/init", "osbuilder-agent 9.9")


def test_the_agent_finds_a_place_in_an_image_without_sbin(tmp_path: Path, agent: File) -> None:
    installed = install_agent(assemble(tmp_path, folder("etc")), agent)
    assert installed.tree["/sbin/init"].is_file
    assert installed.tree["/sbin"].mtime_ns == 1000 * 10**9


def test_an_image_cannot_make_the_agent_write_elsewhere(tmp_path: Path, agent: File) -> None:
    rootfs = assemble(tmp_path, link("sbin", "/../../../../tmp"))
    assert install_agent(rootfs, agent).tree["/tmp/init"].is_file
    assert not Path("/tmp/init").exists()
