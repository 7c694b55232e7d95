"""Stacks of layers that hypothesis makes up: our tree against a slow, obvious model, and against umoci."""

from __future__ import annotations

import io
import os
import shutil
import stat
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, event, given, settings
from hypothesis import strategies as st

from osbuild.errors import InputError
from osbuild.layers import flatten
from osbuild.tree import Entry, Tree
from tests import oci_model
from tests.layer_tools import layer, write_layout

TYPES = {
    "file": tarfile.REGTYPE, "dir": tarfile.DIRTYPE, "symlink": tarfile.SYMTYPE, "hardlink": tarfile.LNKTYPE,
    "fifo": tarfile.FIFOTYPE, "char": tarfile.CHRTYPE,
}  # fmt: skip
KINDS = {
    stat.S_IFREG: "file", stat.S_IFDIR: "dir", stat.S_IFLNK: "symlink", stat.S_IFIFO: "fifo", stat.S_IFCHR: "char",
}  # fmt: skip

# Few names, so that layers meet: replacing, hiding and linking is what is looked for.
names = st.sampled_from(["a", "b", "c", "d", "é", "\udcff", "x\n\x1b[1m", "."])
paths = st.lists(names, min_size=1, max_size=3).map("/".join)
rarely = st.integers(0, 60).map(lambda number: number == 1)
targets = st.one_of(
    paths, paths.map("/".__add__), st.sampled_from(["..", "../a", "../../b", "/", ".", "a/../b", "d//c", "nowhere/x"])
)
whiteouts = st.one_of(
    st.sampled_from(["a", "b", "c", "d"]).map(".wh.".__add__),
    st.sampled_from([".wh..wh..opq", ".wh..wh..opq", ".wh..wh..opq", ".wh..wh.aufs"]),
    st.sampled_from([".wh.a", ".wh.b", ".wh.", ".wh..", ".wh..."]),
)


@st.composite
def members(draw: st.DrawFn) -> dict[str, Any]:
    kind = draw(
        st.sampled_from(["file"] * 4 + ["dir"] * 5 + ["symlink"] * 3 + ["hardlink"] * 3 + ["wh"] * 4 + ["fifo", "char"])
    )
    name = draw(paths)
    if kind == "wh":
        above = draw(st.one_of(st.just(""), paths))
        odd = draw(rarely)
        return {"name": f"{above}/{draw(whiteouts)}".lstrip("/"), "type": "dir" if odd else "file", "data": b""}
    found: dict[str, Any] = {
        "name": draw(st.sampled_from(["", "./", "/"])) + name, "type": kind,
        "mode": draw(st.sampled_from([0o644, 0o4755, 0o1777])), "mtime": draw(st.integers(-5, 5)),
        "xattrs": draw(st.sampled_from([{}, {}, {"user.k": b"v"}])),
    }  # fmt: skip
    if kind in ("symlink", "hardlink"):
        found["target"] = draw(targets if kind == "symlink" else paths)
    elif kind == "file":
        found["data"] = draw(st.sampled_from([b"", b"1", b"22" * 600]))
    return found


@st.composite
def stacks(draw: st.DrawFn) -> list[list[dict[str, Any]]]:
    """One to five layers. What would be refused is left out, mostly: else most stacks would be."""
    found: list[list[dict[str, Any]]] = []
    image = oci_model.flatten([])
    for _ in range(draw(st.integers(1, 5))):
        layer: list[dict[str, Any]] = []
        for one in draw(st.lists(members(), max_size=12)):
            layer.append(one)
            if draw(rarely):
                continue
            files = [member["name"] for member in sum(found, layer[:-1]) if member["type"] == "file"]
            if one["type"] == "hardlink" and files:
                one["target"] = draw(st.sampled_from(files))
            try:
                oci_model.lay(image, layer)
            except oci_model.RefusedError:
                layer.pop()
        found.append(layer)
        try:
            image = oci_model.lay(image, layer)
        except oci_model.RefusedError:
            break
    return found


def written(members: list[dict[str, Any]]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT, errors="surrogateescape") as tar:
        for one in members:
            info = tarfile.TarInfo(one["name"])
            info.type = TYPES[one["type"]]
            info.mode = one.get("mode", 0o644)
            info.mtime = one.get("mtime", 0)
            info.linkname = one.get("target", "")
            data = one.get("data", b"")
            info.size = len(data)
            info.pax_headers = {f"SCHILY.xattr.{key}": value.decode() for key, value in one.get("xattrs", {}).items()}
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def shown(entry: Entry) -> dict[str, Any]:
    kind = KINDS[stat.S_IFMT(entry.mode)]
    found: dict[str, Any] = {
        "type": kind, "mode": entry.mode & 0o7777, "xattrs": dict(entry.xattrs),
        "mtime": None if entry.mtime_ns is None else entry.mtime_ns // 10**9,
    }  # fmt: skip
    if kind == "symlink":
        found["target"] = entry.target
    elif kind == "file":
        found["data"] = b"".join(entry.content.chunks())
    return found


def ours(tree: Tree) -> tuple[dict[str, dict[str, Any]], list[list[str]]]:
    return {path: shown(entry) for path, entry in tree.items()}, sorted(tree.names().values())


def theirs(image: oci_model.Image) -> tuple[dict[str, dict[str, Any]], list[list[str]]]:
    groups: dict[int, list[str]] = {}
    found = {}
    for path, inode in image.items():
        text = "/" + "/".join(path)
        groups.setdefault(id(inode), []).append(text)
        found[text] = dict(inode, mode=0o777) if inode["type"] == "symlink" else inode
    return found, sorted(sorted(group) for group in groups.values())


@pytest.mark.slow
@settings(max_examples=400, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(stacks())
def test_any_stack_comes_to_what_the_rules_say_or_is_refused_by_both(layers: list[list[dict[str, Any]]]) -> None:
    packed = [layer(written(members)) for members in layers]
    try:
        expected = theirs(oci_model.flatten(layers))
    except oci_model.RefusedError as reason:
        event("refused")
        with pytest.raises(InputError):
            pytest.fail(f"{reason}, but: {list(flatten(packed))}")
        return
    event(f"{min(len(expected[0]), 6)} entries, hard links: {any(len(group) > 1 for group in expected[1])}")
    assert ours(flatten(packed)) == expected


def on_disk(root: Path) -> tuple[dict[str, dict[str, Any]], list[list[str]]]:
    """What somebody else unpacked."""
    found: dict[str, dict[str, Any]] = {}
    groups: dict[int, list[str]] = {}
    for here, directories, files in os.walk(os.fsencode(root)):
        for name in [b""] * (here == os.fsencode(root)) + directories + files:
            path = here + b"/" + name if name else here
            status = os.lstat(path)
            kind = KINDS[stat.S_IFMT(status.st_mode)]
            one: dict[str, Any] = {"type": kind, "mode": stat.S_IMODE(status.st_mode)}
            if kind == "symlink":
                one["target"] = os.fsdecode(os.readlink(path))  # noqa: PTH115 - pathlib would tidy it up
            elif kind == "file":
                one["data"] = Path(os.fsdecode(path)).read_bytes()
            text = "/" + os.path.relpath(os.fsdecode(path), root).removeprefix(".")
            found[text] = one
            groups.setdefault(status.st_ino, []).append(text)
    return found, sorted(sorted(group) for group in groups.values())


def unpacked(layers: list[list[dict[str, Any]]], work: Path) -> Path | None:
    """The root filesystem that umoci makes of the layers, or None when it refuses."""
    shutil.rmtree(work, ignore_errors=True)
    write_layout(work / "layout", [written(members) for members in layers])
    words = ["umoci", "unpack", "--image", f"{work}/layout:latest", str(work / "bundle")]
    done = subprocess.run(words, capture_output=True, check=False)
    return work / "bundle/rootfs" if done.returncode == 0 else None


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("umoci") is None or os.geteuid() != 0, reason="needs umoci, and root for its devices")
def test_umoci_unpacks_what_we_read(tmp_path: Path) -> None:
    same = 0

    @settings(
        max_examples=120, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],
    )  # fmt: skip
    @given(stacks().map(made_for_umoci))
    def compare(layers: list[list[dict[str, Any]]]) -> None:
        nonlocal same
        try:
            tree = flatten([layer(written(members)) for members in layers])
        except InputError:
            return
        root = unpacked(layers, tmp_path / "umoci")
        if root is None:
            return
        found, groups = ours(tree)
        for one in found.values():
            del one["mtime"], one["xattrs"]
        assert (found, groups) == on_disk(root)
        same += any("/.wh." in f"/{member['name']}" for members in layers for member in members)

    compare()
    assert same > 30, "too few stacks with whiteouts were compared"


def made_for_umoci(layers: list[list[dict[str, Any]]]) -> list[list[dict[str, Any]]]:
    """Whiteouts first, because it goes by the order; no attributes, because not every filesystem takes them."""
    return [
        [one | {"xattrs": {}} for one in sorted(members, key=lambda one: "/.wh." not in f"/{one['name']}")]
        for members in layers
    ]
