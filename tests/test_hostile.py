"""Images that mean harm, given to the program as a user gives them: one line, exit code 3, little memory, no time.

The rules are those of the OCI image specification and of our own reader; the finer tests of each stand beside their
module. Here every one goes through the whole program.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from osbuild import zstd
from tests.layer_tools import archive, folder, hardlink, header, link, member, write_layout
from tests.measured import run_measured

MEMORY_MIB = 400
SECONDS = 30.0

ESCAPE = "evil\x1b[31m\nname"


def pax(**records: str) -> bytes:
    """An extended header; its values are taken as they are."""
    body = b""
    for key, value in records.items():
        text = f" {key.replace('__', '.')}={value}\n".encode(errors="surrogateescape")
        length = len(text) + 1
        while len(str(length)) + len(text) != length:
            length += 1
        body += str(length).encode() + text
    return header(name=b"x", kind=b"x", size=b"%011o\0" % len(body)) + body + bytes(-len(body) % 512)


END = bytes(1024)

# A program starts with the memory of the one that starts it on its account: this one is small.
LAYERS: dict[str, tuple[Callable[[], bytes], str]] = {
    "a name that climbs out": (lambda: archive(member("../etc/passwd")), "'../etc/passwd': '..'"),
    "a name that climbs in the middle": (lambda: archive(member("a/../../b")), "'a/../../b': '..'"),
    "a hard link that climbs out": (lambda: archive(hardlink("x", "../../etc/shadow")), "hard link"),
    "a hard link to nothing": (lambda: archive(hardlink("x", "gone")), "'/x': hard link to '/gone'"),
    "a hard link to a directory": (lambda: archive(folder("d"), hardlink("x", "d")), "is a directory"),
    "a hard link to itself": (lambda: archive(hardlink("x", "x")), "'/x': hard link to '/x'"),
    "a file twice": (lambda: archive(member("x", b"1"), member("./x", b"2")), "'/x': stands twice"),
    "a name with an escape code": (lambda: archive(hardlink(ESCAPE, "gone")), r"\x1b[31m\nname"),
    "a whiteout of nothing": (lambda: archive(member("d/.wh.")), "a whiteout of nothing"),
    "a file below a file": (lambda: archive(member("f", b"x"), member("f/g", b"y")), "is not a directory"),
    "a loop of links on the way": (lambda: archive(link("a", "b"), link("b", "a"), member("a/x")), "symbolic links"),
    "a component of 256 bytes": (lambda: archive(member("c" * 256)), "more than 255 bytes"),
    "a path of 5000 bytes": (lambda: archive(member("/".join(["d" * 99] * 50))), "more than 4095 bytes"),
    "too many directories": (lambda: archive(member("d/" * 2001 + "f")), "2000"),
    "an owner out of range": (lambda: pax(uid="4294967295") + header() + END, "owner"),
    "a device out of range": (lambda: header(kind=b"3", major=b"0010000\0") + END, "device 4096:0"),
    "a wrong checksum in the middle": (
        lambda: archive(member("a"))[:512] + header(name=b"b", checksum=b"000001\0 ") + header(name=b"c") + END,
        "checksum",
    ),
    "a negative size": (lambda: header(size=b"\xff" * 12) + END, "size out of range"),
    "a size beyond 2^63": (lambda: header(size=b"\x80" + b"\x7f" * 11) + END, "size out of range"),
    "a size that is no number": (lambda: header(size=b"0000000009x\0") + END, "size"),
    "a size beyond the archive": (lambda: header(size=b"77777777777\0") + END, "end after the archive"),
    "a huge extended header": (lambda: pax(path="a" * (1 << 21)) + header() + END, "extended header"),
    "too many records": (lambda: pax(**{f"k{n}": "v" for n in range(65)}) + header() + END, "64 records"),
    "a NUL in a long name": (lambda: pax(path="etc/passwd\0.txt") + header() + END, "NUL"),
    "a million digits": (lambda: pax(mtime="1" * 1_000_000) + header() + END, "mtime"),
    "an infinite time": (lambda: pax(mtime="inf") + header() + END, "mtime"),
    "a global header": (
        lambda: header(kind=b"g", size=b"%011o\0" % 13) + b"13 path=evil\n".ljust(512, b"\0") + header() + END,
        "global header",
    ),
    "an unknown member type": (lambda: header(kind=b"Z") + END, "unknown tar member type"),
    "a link with bytes": (lambda: header(kind=b"2", link=b"x", size=b"00000000001\0") + bytes(512) + END, "size is 1"),
    "two names of two kinds": (
        lambda: header(kind=b"L", size=b"%011o\0" % 2) + b"n\0".ljust(512, b"\0") + pax(path="p") + header() + END,
        "'p': a long name of GNU's kind and another"),
    "a prefix where GNU has times": (
        lambda: header(magic=b"ustar ", version=b" \0", prefix=b"etc") + END, "'file': access time 'etc'"),
    "data after the end": (lambda: header() + bytes(512) + header(name=b"b") + END, "single zero block"),
    "no archive at all": (lambda: b"MZ" * 2000, "checksum"),
    "a header cut off": (lambda: header()[:300], "cut off"),
}  # fmt: skip


def run(reference: str, *words: str) -> tuple[int, str, str, int]:
    """Exit code, standard output and error, and the most memory in MiB."""
    argv = [sys.executable, "-m", "osbuild", "rootfs", reference, "--raw", "--json", "--quiet", *words]
    done, kibibytes = run_measured(argv)
    return done.returncode, done.stdout, done.stderr, kibibytes // 1024


def refused(reference: str, says: str, *words: str) -> None:
    began = time.monotonic()
    code, out, err, memory = run(reference, *words)
    assert code == 3, err
    lines = err.splitlines()
    assert lines[0].startswith("error: "), err
    assert says in lines[0], err
    assert all(line.startswith("hint: ") for line in lines[1:]), err
    assert len(lines) <= 2, err
    assert err.replace("\n", "").isprintable()
    assert set(json.loads(out)) == {"error", "hint", "code"}
    assert memory < MEMORY_MIB
    assert time.monotonic() - began < SECONDS


@pytest.mark.parametrize("name", LAYERS)
def test_a_hostile_layer_is_refused_by_name(name: str, tmp_path: Path) -> None:
    make, says = LAYERS[name]
    write_layout(tmp_path / "l", [make()])
    refused(f"oci:{tmp_path}/l", says)


def edited(root: Path, change: Callable[[dict[str, Any], dict[str, Any]], None]) -> str:
    """A layout whose manifest and config were changed, with digests that fit the change."""
    manifest = write_layout(root, [archive(member("a", b"1"))])
    blobs = root / "blobs/sha256"
    config = json.loads((blobs / manifest["config"]["digest"][7:]).read_bytes())
    change(manifest, config)
    data = json.dumps(config).encode()
    if "digest" in manifest.get("config", {}):
        digest = hashlib.sha256(data).hexdigest()
        (blobs / digest).write_bytes(data)
        manifest["config"] |= {"digest": f"sha256:{digest}", "size": len(data)}
    data = json.dumps(manifest).encode()
    digest = hashlib.sha256(data).hexdigest()
    (blobs / digest).write_bytes(data)
    index = json.loads((root / "index.json").read_text())
    index["manifests"] = [index["manifests"][0] | {"digest": f"sha256:{digest}", "size": len(data)}]
    (root / "index.json").write_text(json.dumps(index))
    return f"oci:{root}"


LIES: dict[str, tuple[Callable[[dict[str, Any], dict[str, Any]], Any], str]] = {
    "no layers": (lambda m, c: m.update(layers=[]), "without layers"),
    "no diff_ids": (lambda m, c: c["rootfs"].update(diff_ids=[]), "without layers"),
    "a layer too many": (lambda m, c: m["layers"].append(m["layers"][0]), "2 layers, but the config names 1"),
    "a wrong diff_id": (lambda m, c: c["rootfs"].update(diff_ids=["sha256:" + "0" * 64]), "but the config says"),
    "a digest of another kind": (lambda m, c: m["layers"][0].update(digest="sha512:" + "0" * 128), "not a sha256"),
    "a digest that is a path": (lambda m, c: m["layers"][0].update(digest="sha256:../../etc/passwd"), "not a sha256"),
    "a wrong size": (lambda m, c: m["layers"][0].update(size=3), "its descriptor says 3"),
    "a negative size": (lambda m, c: m["layers"][0].update(size=-1), "size '-1'"),
    "a size that is true": (lambda m, c: m["layers"][0].update(size=True), "size 'True'"),
    "a layer that is JSON": (lambda m, c: m["layers"][0].update(mediaType=m["mediaType"]), "unknown layer type"),
    "a layer from elsewhere": (
        lambda m, c: m["layers"][0].update(mediaType="application/vnd.docker.image.rootfs.foreign.diff.tar.gzip"),
        "unknown layer type",
    ),
    "a layer that says gzip": (
        lambda m, c: m["layers"][0].update(mediaType="application/vnd.oci.image.layer.v1.tar+gzip"),
        "damaged gzip data",
    ),
    "a manifest that is an index too": (lambda m, c: m.update(manifests=[]), "both an index and a manifest"),
    "an old schema": (lambda m, c: m.update(schemaVersion=1), "schemaVersion is not 2"),
    "a manifest that calls itself an index": (
        lambda m, c: m.update(mediaType="application/vnd.oci.image.index.v1+json"), "calls itself"),
    "names that differ in capitals": (lambda m, c: m.update(Layers=[]), "differ in capitals only"),
    "a number that JSON has not": (lambda m, c: c.update(x=float("nan")), "NaN is no number"),
    "another system": (lambda m, c: c.update(os="windows"), "windows/amd64"),
    "another machine": (lambda m, c: c.update(architecture="s390x"), "linux/s390x"),
    "a config that is no image's": (lambda m, c: m["config"].update(mediaType="text/html"), "is not an image's config"),
    "JSON too deep": (lambda m, c: c.update(x=json.loads("[" * 150 + "]" * 150)), "nested more than"),
    "JSON too long": (lambda m, c: c.update(x="x" * (5 << 20)), "more than"),
}  # fmt: skip


@pytest.mark.parametrize("name", LIES)
def test_a_lie_about_the_image_is_refused(name: str, tmp_path: Path) -> None:
    change, says = LIES[name]
    refused(edited(tmp_path / "l", change), says)


@pytest.mark.parametrize("kind", ["symlink", "fifo", "directory", "missing", "flipped"])
def test_a_blob_that_is_no_blob_is_refused(kind: str, tmp_path: Path) -> None:
    manifest = write_layout(tmp_path / "l", [archive(member("a", b"1"))])
    blob = tmp_path / "l/blobs/sha256" / manifest["layers"][0]["digest"][7:]
    data = blob.read_bytes()
    blob.unlink()
    if kind == "symlink":
        (tmp_path / "real").write_bytes(data)
        blob.symlink_to(tmp_path / "real")
    elif kind == "fifo":
        os.mkfifo(blob)
    elif kind == "directory":
        blob.mkdir()
    elif kind == "flipped":
        blob.write_bytes(data[:600] + bytes([data[600] ^ 1]) + data[601:])
    refused(f"oci:{tmp_path}/l", manifest["layers"][0]["digest"][7:] if kind != "flipped" else "has the content of")


@pytest.mark.parametrize("kind", ["gzip", pytest.param("zstd", marks=pytest.mark.slow)])
def test_a_decompression_bomb_is_refused(kind: str, tmp_path: Path) -> None:
    """A few MB or KB that would become many GB, if anybody let them."""
    if kind == "gzip":
        data = gzip.compress(bytes(64 << 20)) * 200  # 13 MB become 12.5 GB
    else:
        packer = zstd.compressor(19)
        data = b"".join(packer.compress(bytes(1 << 20)) for _ in range(4096)) + packer.flush()
    write_layout(tmp_path / "l", [archive(member("a", b"1"))])
    digest = hashlib.sha256(data).hexdigest()
    (tmp_path / "l/blobs/sha256" / digest).write_bytes(data)

    def change(m: dict[str, Any], c: dict[str, Any]) -> None:
        suffix = f"application/vnd.oci.image.layer.v1.tar+{kind}"
        m["layers"][0] |= {"digest": f"sha256:{digest}", "size": len(data), "mediaType": suffix}

    refused(edited(tmp_path / "l", change), "decompression bomb")


def saved(**changes: Any) -> bytes:
    layer = archive(member("a", b"1"))
    config = {"os": "linux", "architecture": "amd64",
              "rootfs": {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(layer).hexdigest()}"]}}  # fmt: skip
    record = {"Config": "c.json", "RepoTags": ["x:1"], "Layers": ["l.tar"]} | changes.get("record", {})
    members = [
        member("c.json", json.dumps(config).encode()),
        *[member("manifest.json", json.dumps([record] * changes.get("images", 1)).encode())] * changes.get("times", 1),
        member("l.tar", layer),
    ]
    return archive(*members)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (lambda: saved(images=2), "2 images in one archive"),
        (lambda: saved(times=2), "'/manifest.json' stands twice"),
        (lambda: saved(record={"Layers": []}), "without layers"),
        (lambda: saved(record={"Layers": ["../../etc/passwd"]}), "'../../etc/passwd' is not in the archive"),
        (lambda: saved(record={"Config": "/etc/passwd"}), "'/etc/passwd' is not in the archive"),
        (lambda: saved(record={"Config": 7}), "names a file with '7'"),
        (lambda: saved()[:1500], "cut off"),
        (lambda: gzip.compress(saved())[:-20], "cut off"),
        (lambda: b"", "manifest.json"),
        (lambda: b"not a tar" * 100, "checksum"),
    ],
    ids=["two images", "two manifests", "no layers", "a path", "an absolute path", "a number", "cut", "gzip cut",
         "empty", "noise"],
)  # fmt: skip
def test_a_hostile_archive_is_refused(data: Callable[[], bytes], says: str, tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(data())
    refused(f"docker-archive:{tmp_path}/a.tar", says)


@pytest.mark.slow
def test_a_million_empty_files_are_refused_in_little_memory(tmp_path: Path) -> None:
    one = header(name=b"%07d")
    out = io.BytesIO()
    for number in range(300_000):
        name = b"%07d" % number
        block = name + one[7:]
        checksum = sum(block) - sum(block[148:156]) + 8 * 32
        out.write(block[:148] + b"%06o\0 " % checksum + block[156:])
    write_layout(tmp_path / "l", [out.getvalue() + END])
    refused(f"oci:{tmp_path}/l", "more than 299999", "--limit", "entries=299999")


def test_awkward_but_legal_is_exactly_right(tmp_path: Path) -> None:
    """What looks like an attack and is none: every path stays inside the tree."""
    deep = "d/" * 1990 + "f"
    lower = archive(
        folder("etc"), member("etc/passwd", b"lower"), member("etc/gone", b"x"), folder("opaque"),
        member("opaque/old", b"x"), link("out", "../../../.."), link("abs", "/etc"),
    )  # fmt: skip
    upper = archive(
        member("out/etc/added", b"1"), member("abs/passwd", b"upper"), member("etc/.wh.gone"),
        member("opaque/new", b"new"), member("opaque/.wh..wh..opq"), hardlink("twin", "/etc/passwd"),
        member("/rooted", b"r"), member("./dotted//twice", b"d"), member(deep, b"deep"),
        member("new\nline"), member("sticky", b"", mode=0o7777), link("loop", "loop"),
    )  # fmt: skip
    write_layout(tmp_path / "l", [lower, upper])
    code, out, err, _ = run(f"oci:{tmp_path}/l")
    assert code == 0, err
    entries = json.loads(out)["entries"]
    assert entries["/etc/passwd"]["sha256"] == hashlib.sha256(b"upper").hexdigest()
    assert entries["/etc/passwd"]["same_inode_as"] == ["/etc/passwd", "/twin"]
    assert entries["/etc/added"]["size"] == 1
    assert "/etc/gone" not in entries
    assert [path for path in entries if path.startswith("/opaque")] == ["/opaque", "/opaque/new"]
    assert entries["/opaque"]["mtime"] == 1_000_000_000
    assert entries["/rooted"]["type"] == "file"
    assert entries["/dotted"]["mtime"] is None
    assert entries["/" + deep]["size"] == 4
    assert entries["hex:" + b"/new\nline".hex()]["type"] == "file"
    assert entries["/sticky"]["mode"] == "7777"
    assert entries["/loop"]["target"] == "loop"
    assert entries["/out"]["target"] == "../../../.."


def test_the_tar_of_a_raw_tree_is_the_tree(tmp_path: Path) -> None:
    write_layout(tmp_path / "l", [archive(folder("etc"), member("etc/a", b"1"), hardlink("etc/b", "etc/a"))])
    code, _, err, _ = run(f"oci:{tmp_path}/l", "--tar", str(tmp_path / "out.tar"))
    assert code == 0, err
    with tarfile.open(tmp_path / "out.tar") as tar:
        assert [info.name for info in tar] == ["etc", "etc/a", "etc/b"]
        assert tar.getmember("etc/b").linkname == "etc/a"
