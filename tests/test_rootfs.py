"""The guest's tree: what is added to every image, what is dropped, and how that is explained."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest

from osbuild.errors import InputError
from osbuild.rootfs import RULES
from tests.guest_trees import SYSTEMD, assemble, explained
from tests.layer_tools import folder, hardlink, link, member


def test_an_empty_image_gets_all_a_guest_needs(tmp_path: Path) -> None:
    tree = assemble(tmp_path, folder("etc")).tree
    for path in ("/proc", "/sys", "/dev", "/run", "/tmp", "/mnt"):
        assert tree[path].is_dir, path
    assert tree["/tmp"].mode & 0o7777 == 0o1777
    assert (tree["/dev/console"].major, tree["/dev/console"].minor) == (5, 1)
    assert stat.S_ISCHR(tree["/dev/null"].mode)
    assert tree["/var/run"].target == "/run"
    assert tree["/var/tmp"].target == "/tmp"
    assert tree["/etc/machine-id"].content.size == 0
    assert tree["/etc/resolv.conf"].is_file


def test_every_inode_has_a_time(tmp_path: Path) -> None:
    tree = assemble(tmp_path, member("a/b/c", b"x")).tree
    assert all(entry.mtime_ns is not None for entry in tree.values())
    assert tree["/a"].mtime_ns == tree["/var/lib/osbuilder"].mtime_ns == 1000 * 10**9


def test_an_images_own_mount_points_and_files_stay(tmp_path: Path) -> None:
    tree = assemble(tmp_path, folder("tmp", mode=0o700), member("etc/resolv.conf", b"mine")).tree
    assert tree["/tmp"].mode & 0o777 == 0o700
    assert tree["/etc/resolv.conf"].content.size == 4


def test_a_mount_point_that_is_something_else_becomes_a_directory(tmp_path: Path) -> None:
    tree = assemble(tmp_path, member("proc", b"x"), link("dev", "/etc"), folder("etc")).tree
    assert tree["/proc"].is_dir
    assert tree["/dev"].is_dir
    assert "/etc/console" not in tree


def test_a_resolv_conf_that_is_a_link_becomes_a_file(tmp_path: Path) -> None:
    tree = assemble(tmp_path, link("etc/resolv.conf", "../run/systemd/resolve/stub-resolv.conf")).tree
    assert tree["/etc/resolv.conf"].is_file


def test_a_machine_id_does_not_travel(tmp_path: Path) -> None:
    tree = assemble(tmp_path, member("etc/machine-id", b"1234"), member("var/lib/dbus/machine-id", b"1234")).tree
    assert tree["/etc/machine-id"].content.size == 0
    assert tree["/var/lib/dbus/machine-id"].target == "/etc/machine-id"


def test_an_image_without_dbus_gets_no_machine_id_for_it(tmp_path: Path) -> None:
    assert "/var/lib/dbus" not in assemble(tmp_path, folder("etc")).tree


def test_a_link_from_var_run_to_run_stays_as_it_is(tmp_path: Path) -> None:
    assert assemble(tmp_path, link("var/run", "../run")).tree["/var/run"].target == "../run"


def test_what_lies_in_a_real_var_run_is_dropped_and_counted(tmp_path: Path) -> None:
    members = (folder("var/run"), member("var/run/a/b", b"x"), member("var/tmp/c", b"x"))
    tree = assemble(tmp_path / "a", *members).tree
    assert tree["/var/run"].target == "/run"
    assert not [path for path in tree if path.startswith(("/var/run/", "/var/tmp/"))]
    rows = explained(tmp_path / "b", *members)
    assert rows["var_run"].note == "2 entries of a directory there are dropped"
    assert rows["var_run"].removed.first == ("/var/run/a", "/var/run/a/b")
    assert rows["var_tmp"].removed.count == 1


def test_nothing_is_newer_than_the_epoch_when_that_is_asked(tmp_path: Path) -> None:
    tree = assemble(tmp_path, member("new", mtime=5000), member("old", mtime=500), clamp=True).tree
    assert tree["/new"].mtime_ns == 1000 * 10**9
    assert tree["/old"].mtime_ns == 500 * 10**9


def test_hard_links_survive_the_rules(tmp_path: Path) -> None:
    xattrs = {"SCHILY.xattr.trusted.x": "y", "SCHILY.xattr.user.kept": "z"}
    tree = assemble(tmp_path, member("a", b"1", pax_headers=xattrs), hardlink("b", "a")).tree
    assert tree["/a"] is tree["/b"]
    assert dict(tree["/a"].xattrs) == {"user.kept": b"z"}


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("security.capability", True),
        ("user.anything", True),
        ("system.posix_acl_access", True),
        ("system.posix_acl_default", True),
        ("trusted.anything", False),
        ("trusted.overlay.opaque", False),
        ("user.overlay.opaque", False),
        ("security.selinux", False),
        ("security.ima", False),
        ("security.evm", False),
    ],
)
def test_an_attribute_of_the_building_machine_is_dropped_and_counted_once_an_inode(
    name: str, kept: bool, tmp_path: Path
) -> None:
    one = member("a", b"1", pax_headers={f"SCHILY.xattr.{name}": "x"})
    other = member("c", b"2", pax_headers={f"SCHILY.xattr.{name}": "y"})
    rootfs = assemble(tmp_path, one, hardlink("b", "a"), other)
    assert dict(rootfs.tree["/a"].xattrs) == ({name: b"x"} if kept else {})
    assert dict(rootfs.dropped_xattrs) == ({} if kept else {name: 2})


# --- The agent as the first process ---------------------------------------------------------------------------------


def test_the_agent_is_init_in_a_usrmerged_image(tmp_path: Path) -> None:
    rootfs = assemble(tmp_path, *SYSTEMD, link("usr/sbin/init", "../lib/systemd/systemd"))
    assert rootfs.tree["/sbin"].is_symlink
    assert rootfs.tree["/usr/sbin/init"].mode == stat.S_IFREG | 0o755
    assert rootfs.tree["/init"].target == "/sbin/init"
    assert (rootfs.init, rootfs.agent, rootfs.words) == ("/sbin/init", "osbuilder-agent 9.9", ())
    assert rootfs.tree["/usr/lib/systemd/systemd"].content.size == 4


def test_the_agent_finds_a_place_in_an_image_without_sbin(tmp_path: Path) -> None:
    tree = assemble(tmp_path, folder("etc")).tree
    assert tree["/sbin/init"].is_file
    assert tree["/sbin"].mtime_ns == 1000 * 10**9


def test_an_image_cannot_make_the_agent_write_elsewhere(tmp_path: Path) -> None:
    assert assemble(tmp_path, link("sbin", "/../../../../opt")).tree["/opt/init"].is_file
    assert not Path("/opt/init").exists()


def test_an_image_whose_etc_is_a_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="on the way is not a directory"):
        assemble(tmp_path, member("etc", b"x"))


# --- Explanations ---------------------------------------------------------------------------------------------------


def test_every_rule_says_in_a_sentence_what_and_why() -> None:
    for rule in RULES:
        sentence = (rule.__doc__ or "").partition("\n\n")[0]
        assert sentence.endswith("."), rule
        assert len(sentence) > 30, rule


def test_the_explanation_names_every_rule_in_order_and_only_those_that_applied_change_anything(tmp_path: Path) -> None:
    rows = explained(tmp_path, *SYSTEMD, member("etc/resolv.conf", b""))
    assert list(rows) == ["settle", *(rule.__name__ for rule in RULES)]
    for row in rows.values():
        assert row.applied or row.added.count + row.changed.count + row.removed.count == 0, row
        assert row.applied or row.note, row
    assert {name for name, row in rows.items() if not row.applied} == {
        "removals", "additions", "kernel_modules", "guest_hooks", "agent_policy",
        "slim", "tmp_mount", "chrony", "agent_as_service", "workload_description",
    }  # fmt: skip
    assert rows["resolv_conf"].changed.count == 0
    assert rows["machine_id"].added.first == ("/etc/machine-id",)
    assert rows["device_nodes"].added.count == 4


def test_the_explanations_add_up_to_the_tree(tmp_path: Path) -> None:
    members = (*SYSTEMD, folder("var/run"), member("var/run/x"), member("etc/machine-id", b"1"))
    rows = explained(tmp_path / "a", *members)
    tree = assemble(tmp_path / "b", *members).tree
    raw = 1 + len({"/usr", "/usr/lib", "/var", "/etc", "/var/run", "/var/run/x", "/etc/machine-id"} | {
        f"/{info.name}" for info, _ in SYSTEMD
    } | {"/usr/lib/systemd"})  # fmt: skip
    assert raw + sum(row.added.count - row.removed.count for row in rows.values()) == len(tree)


def test_an_explanation_is_json(tmp_path: Path) -> None:
    rows = explained(tmp_path, member("caf\udce9", b""), remove=("/caf?",))
    document = json.loads(json.dumps([row.to_dict() for row in rows.values()]))
    assert document[1]["name"] == "removals"
    assert document[1]["removed"] == {"count": 1, "first": ["/caf\udce9"]}
    assert document[1]["why"].startswith("What --remove names is gone")


def test_an_explanation_says_which_attributes_went(tmp_path: Path) -> None:
    rows = explained(tmp_path, member("a", b"1", pax_headers={"SCHILY.xattr.security.selinux": "x"}))
    assert rows["settle"].note == "dropped: security.selinux of 1"
    assert rows["settle"].changed.first == ("/", "/a")  # nobody gave the root a time


def test_the_same_image_gives_the_same_tree(tmp_path: Path) -> None:
    members = (*SYSTEMD, member("usr/share/x", b"1"))
    wishes = {"init": "systemd", "slim": True}
    first = assemble(tmp_path / "a", *members, **wishes)  # type: ignore[arg-type]
    second = assemble(tmp_path / "b", *members, **wishes)  # type: ignore[arg-type]
    assert first.tree.digest() == second.tree.digest()
