"""The tree as a value, and the draft that changes it."""

from __future__ import annotations

import hashlib
import os
import random
from dataclasses import replace
from pathlib import Path

import pytest

from osbuild.content import digests
from osbuild.errors import InputError
from osbuild.tree import Bytes, Content, Draft, Slice, Sparse, Spool, Tree, directory, regular, symlink


def test_a_tree_is_sorted_and_has_a_root() -> None:
    draft = Draft()
    draft.put("/b", regular(b""))
    draft.put("/a/z", regular(b""))
    assert list(draft.tree()) == ["/", "/a", "/a/z", "/b"]


def test_editing_a_copy_leaves_the_tree_alone() -> None:
    draft = Draft()
    draft.put("/a", regular(b"x"))
    tree = draft.tree()
    changed = tree.edit()
    changed.remove("/a")
    assert "/a" in tree
    assert "/a" not in changed.tree()


def test_editing_keeps_hard_links() -> None:
    draft = Draft()
    draft.put("/a", regular(b"x"))
    draft.link("/b", "/a")
    again = draft.tree().edit().tree()
    assert again["/a"] is again["/b"]


@pytest.mark.parametrize(
    ("path", "where"),
    [
        ("/bin/sh", "/usr/bin/sh"),
        ("/abs/x", "/usr/x"),
        ("/up/x", "/x"),
        ("/chain", "/usr/bin"),
        ("/no/such", "/no/such"),
    ],
)
def test_resolving_follows_links_inside_the_tree(path: str, where: str) -> None:
    draft = Draft()
    draft.put("/usr/bin", directory())
    draft.put("/bin", symlink("usr/bin"))
    draft.put("/abs", symlink("/usr"))
    draft.put("/up", symlink("../../.."))
    draft.put("/chain", symlink("bin"))
    assert draft.resolve(path) == where


def test_resolving_a_circle_ends() -> None:
    draft = Draft()
    draft.put("/a", symlink("b"))
    draft.put("/b", symlink("/a"))
    with pytest.raises(InputError, match="40"):
        draft.resolve("/a/x")


def test_a_remembered_way_is_forgotten_when_a_link_on_it_changes() -> None:
    draft = Draft()
    draft.put("/one", directory())
    draft.put("/two", directory())
    draft.put("/l", symlink("one"))
    draft.put("/l/a", regular(b""))
    draft.put("/l", symlink("two"))
    draft.put("/l/b", regular(b""))
    assert list(draft.tree()) == ["/", "/l", "/one", "/one/a", "/two", "/two/b"]


def test_removing_a_directory_forgets_the_ways_through_it() -> None:
    draft = Draft()
    draft.put("/d/e/f", regular(b""))
    assert draft.remove("/d")
    draft.put("/d/e/g", regular(b""))
    assert list(draft.tree()) == ["/", "/d", "/d/e", "/d/e/g"]


def test_the_root_cannot_become_a_file() -> None:
    with pytest.raises(InputError, match="root"):
        Draft().put("/", regular(b""))


def test_spooled_content_is_copied_exactly(tmp_path: Path) -> None:
    spool = Spool(str(tmp_path))
    spool.append(b"before")
    data = os.urandom(3_000_000)
    spool.append(data)
    content = Slice(spool, 6, len(data))
    assert b"".join(content.chunks()) == data
    with (tmp_path / "out").open("w+b") as out:
        content.copy_to(out.fileno(), 10)
    assert (tmp_path / "out").read_bytes() == bytes(10) + data
    assert os.listdir(tmp_path) == ["out"], "a spool has no name"


def test_every_field_counts_in_the_digest() -> None:
    def digest(**fields: object) -> str:
        draft = Draft()
        draft.put("/a", regular(**{"data": b"x", **fields}))  # type: ignore[arg-type]
        return draft.tree().digest()

    digests = {digest(), digest(data=b"y"), digest(permissions=0o600), digest(mtime_ns=1)}
    assert len(digests) == 4


def test_a_digest_is_the_same_on_every_python() -> None:
    """U+1FAE8 is a character since Unicode 15, which Python 3.11 does not know: repr() gives other text than 3.13's."""
    draft = Draft()
    for name in ("\U0001fae8", "\xe9", "\udcff"):
        draft.put("/" + name, replace(regular(b"x"), xattrs={f"user.{name}": b""}))
        draft.put(f"/{name}.link", symlink(name))
    assert draft.tree().digest() == "3b6f11e26f97f5c731a1dbc8d3c64e12a9c2ec72a7ee5398c78d2092f723742a"


def test_equal_trees_have_equal_digests_whatever_the_order() -> None:
    entries = {"/a": regular(b"1"), "/b": regular(b"2"), "/": directory()}
    backwards = dict(reversed(entries.items()))
    assert Tree(entries).digest() == Tree(backwards).digest()


def test_bytes_come_in_pieces_that_make_the_whole() -> None:
    data = os.urandom(2_500_000)
    assert b"".join(Bytes(data).chunks()) == data


def test_sparse_content_reads_as_zeros_between_its_pieces(tmp_path: Path) -> None:
    spool = Spool(str(tmp_path))
    spool.append(b"abcdef")
    content = Sparse(spool, 3_000_000, ((2, 0, 3), (2_999_990, 3, 3)))
    expected = b"\0\0abc".ljust(2_999_990, b"\0") + b"def" + bytes(7)
    pieces = list(content.chunks())
    assert b"".join(pieces) == expected
    assert max(map(len, pieces)) <= 1 << 20
    with (tmp_path / "out").open("w+b") as out:
        out.truncate(3_000_010)
        content.copy_to(out.fileno(), 10)
    assert (tmp_path / "out").read_bytes() == bytes(10) + expected
    assert (tmp_path / "out").stat().st_blocks < 100, "holes stay holes"


def test_sparse_and_plain_content_have_the_same_digest(tmp_path: Path) -> None:
    spool = Spool(str(tmp_path))
    spool.append(b"x")
    root = {"/": directory()}
    sparse = Tree(root | {"/a": regular(Sparse(spool, 5000, ((4000, 0, 1),)))})
    plain = Tree(root | {"/a": regular(b"x".rjust(4001, b"\0").ljust(5000, b"\0"))})
    assert sparse.digest() == plain.digest()


def test_an_empty_sparse_file_is_all_hole(tmp_path: Path) -> None:
    content = Sparse(Spool(str(tmp_path)), 5, ())
    assert b"".join(content.chunks()) == bytes(5)


def test_hiding_finds_every_directory_before_anything_goes() -> None:
    draft = Draft()
    draft.put("/real/x", regular(b""))
    draft.put("/real/y", regular(b""))
    draft.put("/l", symlink("real"))
    draft.hide([("", "l"), ("/l", "x"), ("/no", "z")], made=())
    assert list(draft.tree()) == ["/", "/real", "/real/y"]
    draft.hide([("/real", "")], made={"/real"})
    assert list(draft.tree()) == ["/", "/real"]


def test_more_ways_than_are_remembered_all_lead_right() -> None:
    draft = Draft()
    for turn in "ab":
        for number in range(700):
            draft.put(f"/d{number}/{turn}", regular(b""))
    assert len(draft.tree()) == 1 + 3 * 700


@pytest.mark.parametrize(
    "paths",
    [
        ("/a", "/a/b", "/a/b/c", "/b", "/c"),
        ("/a/b/c", "/b"),  # nobody made the directories
        ("/a", "/a/b", "/a/b/c", "/l/b", "/z"),  # what goes through the link takes a directory away
        ("/a", "/a/b", "/a/b/l2/x", "/a/b/z"),
    ],
)
def test_a_copy_is_what_each_path_by_itself_gives(paths: tuple[str, ...]) -> None:
    entries = {path: regular(path.encode()) for path in paths}
    entries |= {path: directory() for path in paths if any(other.startswith(path + "/") for other in paths)}
    entries |= {"/": directory(), "/l": symlink("/a"), "/a/b/l2": symlink("/a")}
    tree = Tree(entries)
    draft = Draft()
    for path, entry in tree.items():
        draft.put(path, entry)
    assert dict(tree.edit().tree()).keys() == dict(draft.tree()).keys()
    assert tree.edit().tree().digest() == draft.tree().digest()


def test_contents_that_are_read_together_have_the_digests_that_each_has_alone() -> None:
    source = random.Random(1)
    spools = [Spool(), Spool()]
    for spool in spools:
        spool.append(source.randbytes(3 << 20))
    contents: list[Content] = [Bytes(b"x"), Slice(spools[0], 0, 1 << 20), Slice(spools[0], 5, 0)]
    for _ in range(500):
        size = source.choice((0, 1, 4095, 4096, 70_000, 200_000))
        contents.append(Slice(source.choice(spools), source.randrange(2 << 20), size))
    known: dict[Content, bytes] = {}
    digests(contents, known)
    assert known == {content: hashlib.sha256(b"".join(content.chunks())).digest() for content in contents}
