"""Files written before it is known what else the image holds."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from osbuild.begun import beginning
from osbuild.borrowed import Borrowed
from osbuild.content import Content, Slice, Spool
from osbuild.errors import InputError, SpecError

MIB = 1 << 20


def slices(spool: Spool, count: int = 40) -> dict[int, Content]:
    chance = random.Random(1)
    spool.append(chance.randbytes(MIB))
    found: dict[int, Content] = {}
    at = 0
    for _ in range(count):
        size = chance.choice((1, 100, 4096, 70_000, 200_000))
        found[at] = Slice(spool, chance.randrange(MIB - size), size)
        at += size + -size % 4096
    return found


def test_what_was_begun_lies_at_its_places_and_is_known_to_be_there(tmp_path: Path) -> None:
    contents = slices(Spool())
    with beginning(tmp_path / "f", offset=8192, contents=contents.items()) as begun:
        assert begun.there(contents.items()) == contents
    data = (tmp_path / "f").read_bytes()
    for at, content in contents.items():
        wanted = b"".join(content.chunks())
        assert data[8192 + at : 8192 + at + len(wanted)] == wanted


@pytest.mark.parametrize("change", ["another place", "one more", "one fewer"])
def test_a_file_begun_with_other_contents_is_empty_again(change: str, tmp_path: Path) -> None:
    contents = slices(Spool())
    first = contents[0]
    wanted = dict(contents)
    if change != "one more":
        del wanted[0]
    if change != "one fewer":
        wanted[1 << 30] = first
    with beginning(tmp_path / "f", contents=contents.items()) as begun:
        assert begun.there(wanted.items()) == {}
        assert os.fstat(begun.descriptor).st_size == 0


def test_what_cannot_be_copied_is_said_where_it_is_wanted(tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(bytes(200_000))
    backing = Borrowed(tmp_path / "source")
    (tmp_path / "source").write_bytes(b"x" * 200_000)
    contents: dict[int, Content] = {0: Slice(backing, 0, 200_000)}
    with (
        pytest.raises(InputError, match="changed while it was read"),
        beginning(tmp_path / "f", contents=contents.items()) as begun,
    ):
        begun.there(contents.items())
    assert not (tmp_path / "f").exists()


def test_a_block_that_fails_leaves_what_was_there_and_no_more(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"old")
    with pytest.raises(SpecError), beginning(tmp_path / "f", contents=slices(Spool()).items()):
        raise SpecError("no")
    assert (tmp_path / "f").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["f"]
