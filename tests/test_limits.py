"""Every limit at its least and at its most: an image is read or refused, and nothing else happens."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from osbuild import initrd
from osbuild.errors import InputError, OsbuilderError
from osbuild.filesystem import FILESYSTEMS
from osbuild.layers import flatten
from osbuild.limits import Limits, allowed
from osbuild.tree import Tree
from tests.layer_tools import archive, header, layer, link, member, opened, pax, sparse_archive, write_layout

FIELDS = tuple(field.name for field in dataclasses.fields(Limits))
DEEP = "/".join(["d"] * 1500)
LAYERS = (
    archive(member(DEEP + "/f", b"1"), link("l", "d"), member("x", pax_headers={"SCHILY.xattr.user.k": "v"})),
    sparse_archive(),
    archive(member("l/" + "n" * 255, bytes(5000)), link("long", "t" * 4095)),
)
LOOP = archive(link("one", "two"), link("two", "one"), member("one/f"))


@pytest.mark.parametrize("field", FIELDS)
def test_the_least_reads_an_image_or_refuses_it_and_the_most_reads_it(field: str, tmp_path: Path) -> None:
    write_layout(tmp_path / "l", LAYERS, compress=True)
    least, most = (Limits(**{field: number}) for number in allowed(field))
    tree = opened(f"oci:{tmp_path}/l", limits=most).tree
    assert "/l" in tree
    with contextlib.suppress(InputError):
        assert opened(f"oci:{tmp_path}/l", limits=least).tree.keys() == tree.keys()


@pytest.mark.parametrize("field", FIELDS)
def test_links_in_a_circle_are_refused_whatever_the_limit(field: str) -> None:
    with pytest.raises(InputError):
        flatten([layer(LOOP)], Limits(**{field: allowed(field)[1]}))


PLANS: dict[str, Callable[[Tree], object]] = {
    kind: functools.partial(filesystem.plan, start=0, epoch=0, digest="00" * 32)
    for kind, filesystem in FILESYSTEMS.items()
} | {"initramfs": initrd.check}


@pytest.mark.parametrize("kind", PLANS)
def test_a_file_as_large_as_a_number_can_be_is_refused_by_every_writer(kind: str) -> None:
    size = sys.maxsize
    huge = pax({"GNU.sparse.map": b"0,0", "GNU.sparse.size": b"%d" % size}) + header(name=b"init")
    tree = flatten([layer(huge + bytes(1024))], Limits(file_bytes=size, image_bytes=size))
    with pytest.raises(OsbuilderError, match=str(size)):
        PLANS[kind](tree)
