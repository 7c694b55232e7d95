"""Wishes for the guest's tree: what is removed, what is added from this machine, and what of that is refused."""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path

import pytest

from osbuild.arch import X86_64
from osbuild.errors import InputError, SpecError
from osbuild.kernel_steps import check_modules
from osbuild.spec import BuildSpec, RootfsSpec
from osbuild.tree import quote
from osbuild.wishes import check_policy
from tests.guest_trees import SYSTEMD, add, assemble, text
from tests.layer_tools import folder, link, member

EPOCH = 1000


def put(path: Path, data: str = "x", mode: int = 0o644, mtime: int = 10) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(data)
    path.chmod(mode)
    os.utime(path, (mtime, mtime))
    return path


# --- Removals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "gone"),
    [
        ("/a/one", {"/a/one"}),
        ("/a", {"/a", "/a/one", "/a/two", "/a/.three"}),
        ("/a/*", {"/a/one", "/a/two", "/a/.three"}),
        ("/a/t?o", {"/a/two"}),
        ("/?/one", {"/a/one", "/b/one"}),
        ("/alias/one", {"/a/one"}),
        ("/alias/*o", {"/a/two"}),
        ("/alias", {"/alias"}),
        ("/b/[x]", {"/b/[x]"}),
    ],
)
def test_a_pattern_removes_what_it_names_and_nothing_else(pattern: str, gone: set[str], tmp_path: Path) -> None:
    members = [member("a/one"), member("a/two"), member("a/.three"), member("b/one"), member("b/[x]"), member("b/x")]
    members.append(link("alias", "a"))
    before = assemble(tmp_path / "a", *members).tree
    after = assemble(tmp_path / "b", *members, remove=(pattern,)).tree
    assert set(before) - set(after) == gone


def test_a_pattern_that_matches_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nothing in the image matches '/nothing/\*'"):
        assemble(tmp_path, member("a"), remove=("/nothing/*",))


@pytest.mark.parametrize("pattern", ["", "/", "a", "//", "/a/", "/a//b", "/a/../b", "/.", "/a\0b"])
def test_a_pattern_that_cannot_be_meant_is_refused_before_anything_is_read(pattern: str) -> None:
    with pytest.raises(SpecError, match="cannot remove"):
        RootfsSpec(remove=(pattern,))


def test_a_removal_cannot_lead_out_of_the_tree(tmp_path: Path) -> None:
    outside = put(tmp_path / "outside")
    with pytest.raises(InputError, match="nothing in the image"):
        assemble(tmp_path, link("out", f"../../../..{tmp_path}"), remove=("/out/outside",))
    assert outside.exists()


def test_what_a_guest_needs_wins_over_removals_and_additions(tmp_path: Path) -> None:
    put(tmp_path / "id", "1234")
    tree = assemble(
        tmp_path,
        member("etc/x"),
        folder("proc"),
        remove=("/etc", "/proc"),
        add=(add(tmp_path / "id", "/etc/machine-id"),),
    ).tree
    assert tree["/proc"].is_dir
    assert tree["/etc/machine-id"].content.size == 0


def test_an_addition_wins_over_a_removal(tmp_path: Path) -> None:
    put(tmp_path / "new", "new")
    tree = assemble(tmp_path, member("x/old"), remove=("/x",), add=(add(tmp_path / "new", "/x"),)).tree
    assert text(tree, "/x") == "new"


# --- Additions ------------------------------------------------------------------------------------------------------


def test_a_file_is_added_as_roots_with_its_mode_and_no_newer_than_the_epoch(tmp_path: Path) -> None:
    old, new = put(tmp_path / "old", mode=0o4751, mtime=10), put(tmp_path / "new", mode=0o600, mtime=EPOCH + 5)
    tree = assemble(tmp_path, member("a"), add=(add(old, "/opt/old"), add(new, "/opt/new"))).tree
    entry = tree["/opt/old"]
    assert (entry.mode, entry.uid, entry.gid, entry.mtime_ns) == (stat.S_IFREG | 0o4751, 0, 0, 10 * 10**9)
    assert tree["/opt/new"].mode & 0o7777 == 0o600
    assert tree["/opt/new"].mtime_ns == EPOCH * 10**9
    assert tree["/opt"].mtime_ns == EPOCH * 10**9


def test_a_file_goes_into_a_directory_under_its_own_name(tmp_path: Path) -> None:
    source = put(tmp_path / "motd", "hello")
    assert text(assemble(tmp_path, folder("etc"), add=(add(source, "/etc/"),)).tree, "/etc/motd") == "hello"


def test_a_directory_is_laid_over_what_is_there(tmp_path: Path) -> None:
    put(tmp_path / "over/lib/new", "new")
    put(tmp_path / "over/etc/both", "mine")
    (tmp_path / "over").chmod(0o700)
    (tmp_path / "over/empty").mkdir(mode=0o700)
    (tmp_path / "over/link").symlink_to("/etc/shadow")
    tree = assemble(
        tmp_path, *SYSTEMD, member("etc/both", b"theirs"), member("etc/other"), add=(add(tmp_path / "over", "/"),)
    ).tree
    assert tree["/"].mode & 0o777 == 0o755, "a strict umask on this machine does not lock the guest's root"
    assert tree["/lib"].is_symlink, "usrmerge stays"
    assert text(tree, "/usr/lib/new") == "new"
    assert text(tree, "/etc/both") == "mine"
    assert "/etc/other" in tree
    assert tree["/empty"].mode & 0o777 == 0o700
    assert tree["/link"].target == "/etc/shadow"


def test_a_symbolic_link_is_added_as_one_and_never_followed(tmp_path: Path) -> None:
    put(tmp_path / "secret", "secret")
    (tmp_path / "link").symlink_to(tmp_path / "secret")
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree/directory").symlink_to(tmp_path)
    tree = assemble(tmp_path, member("a"), add=(add(tmp_path / "link", "/l"), add(tmp_path / "tree", "/t"))).tree
    assert tree["/l"].target == str(tmp_path / "secret")
    assert tree["/t/directory"].target == str(tmp_path)
    assert [path for path in tree if path.startswith("/t/")] == ["/t/directory"]


def test_a_link_in_the_image_cannot_lead_an_addition_out_of_the_tree(tmp_path: Path) -> None:
    source = put(tmp_path / "x")
    tree = assemble(tmp_path, link("out", f"../../../..{tmp_path}/elsewhere"), add=(add(source, "/out/x"),)).tree
    assert f"{tmp_path}/elsewhere/x" in tree
    assert not (tmp_path / "elsewhere").exists()


def test_a_file_takes_the_place_of_a_link_and_not_of_what_it_leads_to(tmp_path: Path) -> None:
    source = put(tmp_path / "x", "new")
    tree = assemble(tmp_path, member("a", b"old"), link("b", "a"), add=(add(source, "/b"),)).tree
    assert (text(tree, "/a"), text(tree, "/b")) == ("old", "new")


def test_what_changes_on_the_disk_later_does_not_matter(tmp_path: Path) -> None:
    source = put(tmp_path / "x", "before")
    tree = assemble(tmp_path, member("a"), add=(add(source, "/x"),)).tree
    source.write_text("after!")
    assert text(tree, "/x") == "before"


def test_the_order_of_a_directory_on_the_disk_does_not_matter(tmp_path: Path) -> None:
    for name in ("b", "a", "c/z", "c/y"):
        put(tmp_path / "one" / name, name)
    for name in ("c/y", "c/z", "a", "b"):
        put(tmp_path / "two" / name, name)
    for above in ("one", "two"):
        for path in (tmp_path / above / "c", tmp_path / above):
            os.utime(path, (5, 5))
    first = assemble(tmp_path / "1", member("x"), add=(add(tmp_path / "one", "/t"),)).tree
    second = assemble(tmp_path / "2", member("x"), add=(add(tmp_path / "two", "/t"),)).tree
    assert first.digest() == second.digest()


def test_a_file_and_a_directory_do_not_replace_each_other(tmp_path: Path) -> None:
    source = put(tmp_path / "x")
    (tmp_path / "d").mkdir()
    with pytest.raises(InputError, match="'/etc' is a directory in the image"):
        assemble(tmp_path / "1", folder("etc"), add=(add(source, "/etc"),))
    with pytest.raises(InputError, match="'/f' is no directory in the image"):
        assemble(tmp_path / "2", member("f"), add=(add(tmp_path / "d", "/f"),))


def test_sockets_and_pipes_are_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    os.mkfifo(tmp_path / "d/pipe\n")
    with pytest.raises(InputError) as caught:
        assemble(tmp_path, member("a"), add=(add(tmp_path / "d", "/d"),))
    assert quote(str(tmp_path / "d/pipe\n")) in str(caught.value)
    assert "\n" not in str(caught.value)
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(tmp_path / "s"))
        with pytest.raises(InputError, match="is no file, directory or symbolic link"):
            assemble(tmp_path / "2", member("a"), add=(add(tmp_path / "s", "/s"),))


def test_a_source_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No such file or directory"):
        assemble(tmp_path, member("a"), add=(add(tmp_path / "nothing", "/x"),))


@pytest.mark.parametrize("target", ["", "x", "//", "/a//b", "/a/../b", "/a\0"])
def test_a_target_that_cannot_be_meant_is_refused(target: str, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="cannot add"):
        add(tmp_path, target)


# --- Kernel modules -------------------------------------------------------------------------------------------------


def modules(home: Path) -> Path:
    put(home / "modules.dep", "kernel/x.ko:\n")
    put(home / "kernel/x.ko", "module")
    (home / "build").symlink_to("/usr/src/linux")
    return home


@pytest.mark.parametrize("named", ["install path", "release"])
def test_kernel_modules_lie_where_modprobe_looks(named: str, tmp_path: Path) -> None:
    home = modules(tmp_path / "kernel/lib/modules/6.12.1-kata")
    source = tmp_path / "kernel" if named == "install path" else home
    stale = member("usr/lib/modules/6.12.1-kata/kernel/stale.ko")
    tree = assemble(tmp_path, *SYSTEMD, stale, modules=source).tree
    found = {path for path in tree if path.startswith("/usr/lib/modules/")}
    above = "/usr/lib/modules/6.12.1-kata"
    assert found == {above, f"{above}/modules.dep", f"{above}/kernel", f"{above}/kernel/x.ko"}
    assert tree["/lib"].is_symlink


def test_modules_without_their_index_are_refused_with_what_to_run(tmp_path: Path) -> None:
    put(tmp_path / "kernel/lib/modules/6.1/kernel/x.ko")
    with pytest.raises(InputError, match=r"no modules\.dep") as caught:
        assemble(tmp_path, member("a"), modules=tmp_path / "kernel")
    assert caught.value.hint == f"depmod -b {tmp_path}/kernel 6.1"


def test_modules_of_two_kernels_are_refused(tmp_path: Path) -> None:
    modules(tmp_path / "kernel/lib/modules/6.1")
    modules(tmp_path / "kernel/lib/modules/6.2")
    with pytest.raises(InputError, match=r"'6\.1', '6\.2'"):
        assemble(tmp_path, member("a"), modules=tmp_path / "kernel")


def test_a_directory_of_modules_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is no directory of kernel modules"):
        assemble(tmp_path, member("a"), modules=tmp_path / "nothing")


# --- Hooks and policy -----------------------------------------------------------------------------------------------


def test_hooks_lie_where_agents_look(tmp_path: Path) -> None:
    put(tmp_path / "hooks/prestart/10-x", mode=0o755)
    tree = assemble(tmp_path, member("a"), hooks=tmp_path / "hooks").tree
    assert tree["/usr/share/oci/hooks/prestart/10-x"].mode & 0o777 == 0o755


@pytest.mark.parametrize(
    ("path", "mode", "words"),
    [
        ("prestart/10-x", 0o644, "is not executable"),
        ("prestartt/10-x", 0o755, "holds 'prestartt'"),
        ("prestart", 0o755, "is no directory"),
    ],
)
def test_hooks_that_no_agent_would_run_are_refused(path: str, mode: int, words: str, tmp_path: Path) -> None:
    put(tmp_path / "hooks" / path, mode=mode)
    with pytest.raises(InputError, match=words):
        assemble(tmp_path, member("a"), hooks=tmp_path / "hooks")


def test_an_empty_directory_of_hooks_is_refused(tmp_path: Path) -> None:
    (tmp_path / "hooks").mkdir()
    with pytest.raises(InputError, match="holds nothing"):
        assemble(tmp_path, member("a"), hooks=tmp_path / "hooks")


def test_a_policy_lies_where_katas_agent_looks(tmp_path: Path) -> None:
    source = put(tmp_path / "strict.rego", "# mine\npackage agent_policy\n")
    tree = assemble(tmp_path, member("a"), policy=source).tree
    assert text(tree, "/etc/kata-opa/strict.rego").startswith("# mine")
    assert tree["/etc/kata-opa/default-policy.rego"].target == "strict.rego"


def test_a_policy_of_the_default_name_is_no_link_to_itself(tmp_path: Path) -> None:
    source = put(tmp_path / "default-policy.rego", "package agent_policy\n")
    assert assemble(tmp_path, member("a"), policy=source).tree["/etc/kata-opa/default-policy.rego"].is_file


def test_a_file_that_is_no_policy_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="says its package"):
        assemble(tmp_path, member("a"), policy=put(tmp_path / "x.rego", "allow = true\n"))


def test_a_policy_that_nobody_would_obey_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="the built-in agent obeys no policy") as refused:
        check_policy(RootfsSpec(policy=tmp_path / "p.rego"))
    assert "leave --policy out" in refused.value.hint
    check_policy(RootfsSpec(policy=tmp_path / "p.rego", agent="kata-agent"))
    check_policy(RootfsSpec())


def test_modules_for_a_kernel_that_loads_none_are_refused(tmp_path: Path) -> None:
    def given(*features: str) -> BuildSpec:
        return BuildSpec(
            image="oci:x", out=tmp_path, arch=X86_64, features=features, rootfs=RootfsSpec(modules=tmp_path / "m")
        )

    with pytest.raises(SpecError, match="the kernel of this build loads no modules") as refused:
        check_modules(given())
    assert "--with gpu" in refused.value.hint
    with pytest.raises(SpecError, match="loads no modules"):
        check_modules(given("xfs"))
    check_modules(given("gpu"))
    check_modules(BuildSpec(image="oci:x", out=tmp_path, arch=X86_64))
