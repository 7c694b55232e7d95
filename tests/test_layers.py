"""Layers over each other: the rules of the OCI image specification, layer.md."""

from __future__ import annotations

import pytest

from osbuild.errors import InputError
from osbuild.layers import flatten
from osbuild.tree import Tree
from tests.layer_tools import archive, folder, hardlink, layer, link, member


def stack(*layers: bytes) -> Tree:
    return flatten([layer(data) for data in layers])


def body(tree: Tree, path: str) -> bytes:
    return b"".join(tree[path].content.chunks())


def test_an_upper_file_replaces_a_lower_one() -> None:
    tree = stack(archive(member("etc/a", b"lower")), archive(member("etc/a", b"upper")))
    assert body(tree, "/etc/a") == b"upper"


def test_a_directory_over_a_directory_keeps_what_lies_in_it() -> None:
    tree = stack(archive(folder("d"), member("d/f")), archive(folder("d", mode=0o700)))
    assert tree["/d"].mode & 0o777 == 0o700
    assert "/d/f" in tree


def test_a_file_over_a_directory_takes_everything_away() -> None:
    tree = stack(archive(folder("d"), member("d/f")), archive(member("d", b"x")))
    assert list(tree) == ["/", "/d"]


def test_a_directory_over_a_link_replaces_the_link() -> None:
    tree = stack(archive(folder("real"), link("d", "real")), archive(folder("d"), member("d/f")))
    assert tree["/d"].is_dir
    assert "/real/f" not in tree


def test_a_parent_that_is_a_link_is_followed_inside_the_tree() -> None:
    tree = stack(archive(folder("usr/bin"), link("bin", "usr/bin")), archive(member("bin/sh", b"x")))
    assert "/usr/bin/sh" in tree
    assert tree["/bin"].is_symlink


def test_a_link_cannot_lead_out_of_the_tree() -> None:
    tree = stack(archive(link("out", "../../../../etc")), archive(member("out/passwd", b"x")))
    assert body(tree, "/etc/passwd") == b"x"


def test_links_in_a_circle_are_refused() -> None:
    with pytest.raises(InputError, match="40 symbolic links"):
        stack(archive(link("a", "b"), link("b", "a")), archive(member("a/f")))


def test_a_file_on_the_way_is_refused() -> None:
    with pytest.raises(InputError, match="not a directory"):
        stack(archive(member("f", b"x"), member("f/g", b"y")))


def test_missing_parents_are_made_without_a_time() -> None:
    tree = stack(archive(member("a/b/c")))
    assert tree["/a"].is_dir
    assert tree["/a"].mtime_ns is None


@pytest.mark.parametrize("order", [1, -1], ids=["whiteout last", "whiteout first"])
def test_a_whiteout_acts_on_lower_layers_only_wherever_it_stands(order: int) -> None:
    upper = [member("d/new", b"n"), member("d/.wh.old"), member("d/.wh.new")][::order]
    tree = stack(archive(folder("d"), member("d/old"), member("d/new", b"lower")), archive(*upper))
    assert "/d/old" not in tree
    assert body(tree, "/d/new") == b"n"


@pytest.mark.parametrize("order", [1, -1], ids=["marker last", "marker first"])
def test_an_opaque_directory_hides_the_lower_one_only(order: int) -> None:
    upper = [member("d/new"), member("d/.wh..wh..opq")][::order]
    tree = stack(archive(folder("d"), member("d/old"), member("d/sub/older")), archive(*upper))
    assert [path for path in tree if path.startswith("/d")] == ["/d", "/d/new"]


def test_a_whiteout_takes_a_whole_directory_away() -> None:
    tree = stack(archive(member("d/e/f")), archive(member(".wh.d")))
    assert list(tree) == ["/"]


def test_a_whiteout_of_what_is_not_there_is_harmless() -> None:
    assert list(stack(archive(member(".wh.nothing"), member("no/such/.wh.thing")))) == ["/"]


@pytest.mark.parametrize("name", [".wh.", "d/.wh.", "a/.wh.b/c"])
def test_no_name_with_the_whiteout_prefix_gets_into_the_tree(name: str) -> None:
    with pytest.raises(InputError, match="whiteout"):
        stack(archive(member(name)))


def test_hard_links_share_an_inode_across_layers() -> None:
    tree = stack(archive(member("a", b"x")), archive(hardlink("b", "a")))
    assert tree["/a"] is tree["/b"]


def test_replacing_one_name_leaves_the_other_names_their_inode() -> None:
    tree = stack(archive(member("a", b"x"), hardlink("b", "a")), archive(member("a", b"y")))
    assert body(tree, "/a") == b"y"
    assert body(tree, "/b") == b"x"


def test_a_hard_link_may_name_a_symbolic_link() -> None:
    tree = stack(archive(link("l", "nowhere"), hardlink("m", "l")))
    assert tree["/m"] is tree["/l"]


@pytest.mark.parametrize(("target", "rule"), [("nothing", "does not exist"), ("d", "is a directory")])
def test_a_hard_link_needs_a_file(target: str, rule: str) -> None:
    with pytest.raises(InputError, match=rule):
        stack(archive(folder("d"), hardlink("b", target)))


def test_a_file_twice_in_one_layer_is_refused() -> None:
    with pytest.raises(InputError, match="stands twice"):
        stack(archive(member("a", b"1"), member("./a", b"2")))


def test_a_directory_of_2000_levels_is_read_and_one_of_more_refused() -> None:
    tree = stack(archive(folder("/".join("d" * 1900))))
    assert len(tree) == 1901
    with pytest.raises(InputError, match="2000 directories"):
        stack(archive(member("/".join("d" * 2002))))


def test_flattening_twice_gives_the_same_tree() -> None:
    data = archive(member("a", b"x"), hardlink("b", "a"), link("c", "a"), folder("d"))
    assert stack(data).digest() == stack(data).digest()


def test_the_digest_tells_hard_links_from_copies() -> None:
    linked = stack(archive(member("a", b"x"), hardlink("b", "a")))
    copied = stack(archive(member("a", b"x"), member("b", b"x")))
    assert linked.digest() != copied.digest()
