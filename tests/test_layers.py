"""Layers over each other: the rules of the OCI image specification, layer.md."""

from __future__ import annotations

import tarfile

import pytest

from osbuild.errors import InputError
from osbuild.layers import flatten
from osbuild.limits import Limits
from osbuild.tree import Tree
from tests.layer_tools import archive, folder, hardlink, header, layer, link, member, pax, sparse_archive


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


PASSING = (folder("d"), member("d/x"), member("f"), link("gone", "no/such/../../d"), link("file", "f/../d"))


@pytest.mark.parametrize("way", ["gone", "file"])
def test_what_a_link_only_passes_need_not_be_there_and_is_not_made(way: str) -> None:
    """As umoci and containerd do it, for members, whiteouts and hard links alike."""
    there = {"/", "/d", "/d/x", "/f", "/file", "/gone"}
    assert set(stack(archive(*PASSING, member(f"{way}/new")))) == there | {"/d/new"}
    assert set(stack(archive(*PASSING), archive(member(f"{way}/.wh.x")))) == there - {"/d/x"}
    assert set(stack(archive(*PASSING), archive(member(f"{way}/.wh..wh..opq")))) == there - {"/d/x"}
    linked = stack(archive(*PASSING, hardlink("h", f"{way}/x")))
    assert linked["/h"] is linked["/d/x"]


def test_where_a_link_ends_at_a_file_is_no_directory() -> None:
    with pytest.raises(InputError, match="'f' on the way is not a directory"):
        stack(archive(member("f"), link("l", "f/g/.."), member("l/x")))
    assert "/d/x" in stack(archive(*PASSING, link("l", "f/g/..")), archive(member("l/.wh.x")))


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


@pytest.mark.parametrize(
    ("target", "rule"), [("nothing", "does not exist"), ("d", "is a directory"), ("/", "is a directory")]
)
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


def test_every_directory_may_be_2000_deep_and_no_more() -> None:
    assert len(stack(archive(member("d/" * 2000 + "f")))) == 2002
    assert len(stack(archive(folder("/".join("d" * 2000))))) == 2001
    with pytest.raises(InputError, match="2000 directories"):
        stack(archive(folder("/".join("d" * 2001))))


def test_links_cannot_make_a_path_deeper_or_longer_than_allowed() -> None:
    with pytest.raises(InputError, match="2000 directories"):
        stack(
            archive(folder("/".join("d" * 1500)), link("l", "/".join("d" * 1500)), folder("l/" + "/".join("e" * 600)))
        )
    deep = "/".join(["c" * 250] * 12)
    with pytest.raises(InputError, match="path of more than 4095 bytes"):
        stack(archive(folder(deep), link("l", deep), member(f"l/{deep}")))


@pytest.mark.parametrize("name", ["d/.wh.x", "d/.wh..wh..opq"])
def test_a_whiteout_below_a_lower_link_acts_where_the_link_leads(name: str) -> None:
    lower = archive(member("real/x"), link("d", "real"))
    assert "/real/x" not in stack(lower, archive(member(name)))


@pytest.mark.parametrize("order", [1, -1], ids=["directory first", "whiteout first"])
@pytest.mark.parametrize("name", ["d/.wh.x", "d/.wh..wh..opq", "d/e/.wh.x"])
def test_no_lower_link_redirects_a_whiteout_in_a_directory_of_the_same_layer(name: str, order: int) -> None:
    lower = archive(member("real/x"), member("real/e/x"), link("d", "real"))
    tree = stack(lower, archive(*[folder("d"), member(name)][::order]))
    assert {"/real/x", "/real/e/x"} <= set(tree)
    assert tree["/d"].is_dir


def test_whiteouts_do_not_depend_on_each_other() -> None:
    lower = archive(member("real/x"), link("d", "real"))
    upper = [member(".wh.d"), member("d/.wh.x")]
    assert list(stack(lower, archive(*upper))) == list(stack(lower, archive(*upper[::-1]))) == ["/", "/real"]


def test_an_opaque_root_hides_everything_below_and_keeps_its_inode() -> None:
    tree = stack(archive(folder(".", mode=0o700), member("a")), archive(member(".wh..wh..opq"), member("b")))
    assert list(tree) == ["/", "/b"]
    assert tree["/"].mode & 0o777 == 0o700


@pytest.mark.parametrize("name", [".wh..wh.aufs", ".wh..wh.plnk/1.2", "d/.wh..wh.orph/x", ".wh..wh.x/.wh.a"])
def test_what_aufs_kept_for_itself_is_ignored(name: str) -> None:
    assert list(stack(archive(member("a")), archive(member(name, b"x")))) == ["/", "/a"]


def test_whiteouts_that_are_hard_links_of_each_other_are_whiteouts() -> None:
    upper = archive(member(".wh.a"), hardlink(".wh.b", ".wh.a"))
    assert list(stack(archive(member("a"), member("b"), member("c")), upper)) == ["/", "/c"]


@pytest.mark.parametrize(
    "odd", [folder(".wh.a"), link(".wh.a", "x"), member(".wh.a", b"x"), member(".wh.a", type=tarfile.CHRTYPE)]
)
def test_a_whiteout_must_be_an_empty_file(odd: tuple[tarfile.TarInfo, bytes]) -> None:
    with pytest.raises(InputError, match="whiteout that is no empty regular file"):
        stack(archive(odd))


@pytest.mark.parametrize("name", [".wh..", ".wh...", "d/.wh..."])
def test_a_whiteout_cannot_climb(name: str) -> None:
    with pytest.raises(InputError, match="whiteout of nothing"):
        stack(archive(folder("d"), member(name)))


def test_a_whiteout_behind_links_in_a_circle_is_refused() -> None:
    with pytest.raises(InputError, match="40 symbolic links"):
        stack(archive(link("a", "b"), link("b", "a")), archive(member("a/.wh.x")))


@pytest.mark.parametrize(("name", "target"), [("a", "a"), ("./a", "/a"), ("l/a", "a")])
def test_a_hard_link_to_itself_is_refused(name: str, target: str) -> None:
    with pytest.raises(InputError, match="itself"):
        stack(archive(member("a"), link("l", ".")), archive(hardlink(name, target)))


@pytest.mark.parametrize(("name", "target"), [("d", "d/f"), ("l", "l/f")], ids=["a directory", "a link"])
def test_a_hard_link_cannot_replace_the_way_to_its_target(name: str, target: str) -> None:
    with pytest.raises(InputError, match="which it replaces"):
        stack(archive(member("d/f"), link("l", "d")), archive(hardlink(name, target)))


def test_a_hard_link_to_what_comes_later_is_refused_or_means_the_lower_layer() -> None:
    upper = archive(hardlink("b", "a"), member("a", b"new"))
    with pytest.raises(InputError, match="does not exist"):
        stack(upper)
    tree = stack(archive(member("a", b"old")), upper)
    assert (body(tree, "/a"), body(tree, "/b")) == (b"new", b"old")


def test_a_hard_link_to_what_the_same_layer_hides_is_refused() -> None:
    with pytest.raises(InputError, match="does not exist"):
        stack(archive(member("a")), archive(hardlink("b", "a"), member(".wh.a")))


def test_a_chain_of_hard_links_is_one_inode() -> None:
    tree = stack(archive(member("a", b"x"), hardlink("b", "a"), hardlink("c", "b")), archive(hardlink("d", "c")))
    assert tree.names()[tree["/a"]] == ["/a", "/b", "/c", "/d"]


def test_a_hard_link_survives_the_hiding_of_its_first_name() -> None:
    tree = stack(archive(member("a", b"x"), hardlink("b", "a")), archive(member(".wh.a")))
    assert body(tree, "/b") == b"x"


def test_a_link_over_a_directory_takes_everything_away() -> None:
    tree = stack(archive(member("d/f"), folder("e")), archive(link("d", "e")))
    assert list(tree) == ["/", "/d", "/e"]
    assert tree["/d"].is_symlink


def test_a_directory_may_stand_twice_in_one_layer_and_the_last_counts() -> None:
    tree = stack(archive(folder("d", mode=0o700), member("d/f"), folder("./d/", mode=0o711)))
    assert tree["/d"].mode & 0o777 == 0o711
    assert "/d/f" in tree


@pytest.mark.parametrize("second", ["a", "/a", ".//a", "./a/."])
def test_other_spellings_are_the_same_path(second: str) -> None:
    with pytest.raises(InputError, match="'/a': stands twice"):
        stack(archive(member("a"), folder(second)))


def test_a_sparse_file_lies_in_a_tree_like_any_other() -> None:
    tree = stack(sparse_archive())
    assert {entry.content.size for path, entry in tree.items() if path != "/"} == {8192}


@pytest.mark.parametrize(
    ("limits", "rule"),
    [
        (Limits(entries=5), "more than 5 entries"),
        (Limits(memory_bytes=2000), "more than 2000 bytes"),
        (Limits(image_bytes=20_000), "all layers have more than 20000 bytes"),
        (Limits(depth=1), "more than 1 directories"),
        (Limits(path_bytes=4), "more than 4 bytes"),
        (Limits(name_bytes=3), "more than 3 bytes"),
        (Limits(link_hops=0), "more than 0 symbolic links"),
        (Limits(target_bytes=1), "not 1 to 1"),
        (Limits(steps=3), "too long to follow"),
        (Limits(file_bytes=4), "more than the 4 a file"),
        (Limits(header_records=0), "more than 0 records"),
        (Limits(header_bytes=5), "more than 5"),
        (Limits(xattr_bytes=1), "more than 1"),
        (Limits(trailing_bytes=100), "more than 100"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_limits_hold_for_all_layers_together(limits: Limits, rule: str) -> None:
    lower = archive(member("one/f", b"12345"), link("l", "one"), folder("one"))
    upper = archive(
        member("l/g", pax_headers={"SCHILY.xattr.user.k": "vv"}), member("one/two/three", b"1"), member("h")
    )
    assert len(stack(lower, upper)) == 8
    with pytest.raises(InputError, match=rule):
        flatten([layer(lower), layer(upper)], limits)


def test_the_holes_of_sparse_files_count() -> None:
    huge = pax({"GNU.sparse.map": b"0,0", "GNU.sparse.size": b"%d" % (40 << 30)})
    with pytest.raises(InputError, match="all files together"):
        stack(huge + header(name=b"a") + huge + header(name=b"b"))


def test_directories_that_only_names_ask_for_count() -> None:
    with pytest.raises(InputError, match="no entry of their own"):
        flatten([layer(archive(member("a/b/c/d/e/f")))], Limits(entries=5))
