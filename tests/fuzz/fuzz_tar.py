"""A coverage-guided fuzz target over uncompressing, the tar reader and the laying of layers (see README.md).

    python -m tests.fuzz.fuzz_tar CORPUS [libFuzzer options, as -max_total_time=720]

The first byte of an input says how the rest is packed; an input may hold several layers, cut at SEPARATOR. Findings:
any exception but InputError, an input that takes more than SECONDS or MEBIBYTES, and a tree that breaks an invariant.
"""

from __future__ import annotations

import gzip
import itertools
import resource
import sys
import tarfile
import time
from pathlib import Path
from typing import Final

import atheris

with atheris.instrument_imports(include=["osbuild"]):
    from osbuild import zstd
    from osbuild.errors import InputError
    from osbuild.layers import Layer, flatten
    from osbuild.limits import Limits
    from osbuild.tree import NAME_MAX, PATH_MAX, Spool, Tree
    from osbuild.uncompress import uncompressed

from tests import layer_tools as tools

SEPARATOR: Final = b"<next layer>"
SECONDS: Final = 3.0
MEBIBYTES: Final = 64  # more than the process had before
BLOCK: Final = 512
LIMITS: Final = Limits(entries=10_000, memory_bytes=8 << 20, image_bytes=8 << 20, file_bytes=8 << 20, steps=500_000)
PACKINGS: Final = ("none", "gzip", "zstd", "sums")


def one_input(data: bytes) -> None:
    began = time.monotonic()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        tree = flatten([_layer(part, data[:1]) for part in data[1:].split(SEPARATOR)], LIMITS)
    except InputError as refused:
        message = str(refused)
        if not message.isascii() or "\n" in message or "\x1b" in message:
            raise AssertionError(f"a message that is not one plain line: {message!r}") from None
    else:
        check(tree)
    if time.monotonic() - began > SECONDS:
        raise AssertionError("too slow")
    if (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10 > MEBIBYTES:
        raise AssertionError("too much memory")


def _layer(data: bytes, packing: bytes) -> Layer:
    kind = PACKINGS[packing[0] % len(PACKINGS)] if packing else "none"
    spool = Spool()
    if kind == "sums":
        spool.append(with_sums(data))
    else:
        for piece in uncompressed([data], kind, "here", LIMITS):
            spool.append(piece)
    return Layer(spool=spool, offset=0, size=spool.size, diff_id="sha256:0")


def with_sums(data: bytes) -> bytes:
    """Every block that could be a header gets the right checksum, which no fuzzer finds by itself."""
    blocks = [data[at : at + BLOCK] for at in range(0, len(data), BLOCK)]
    return b"".join(_with_sum(block) if len(block) == BLOCK and block.strip(b"\0") else block for block in blocks)


def _with_sum(block: bytes) -> bytes:
    total = sum(block[:148]) + sum(block[156:]) + 8 * 32
    return block[:148] + b"%06o\0 " % total + block[156:]


def check(tree: Tree) -> None:
    """What holds for every tree, whatever the image."""
    assert tree["/"].is_dir
    total = 0
    for path, entry in tree.items():
        assert path == "/" or not path.endswith("/")
        assert path.startswith("/")
        parts = path[1:].split("/") if path != "/" else []
        assert not {"", ".", ".."} & set(parts), path
        assert not any(part.startswith(".wh.") for part in parts), path
        assert "\0" not in path
        assert len(path.encode(errors="surrogateescape")) <= PATH_MAX
        assert all(len(part.encode(errors="surrogateescape")) <= NAME_MAX for part in parts)
        assert path == "/" or tree[path.rpartition("/")[0] or "/"].is_dir, path
        assert 0 <= entry.uid < 1 << 32
        assert entry.mode & 0o7777 == entry.mode & 0xFFF
        if entry.is_file:
            assert sum(map(len, entry.content.chunks())) == entry.content.size
            total += entry.content.size
    assert total <= len(tree) * LIMITS.image_bytes
    tree.digest()


def seeds(corpus: Path) -> None:
    """A small corpus: one input of each kind of thing that a layer can hold."""
    corpus.mkdir(parents=True, exist_ok=True)
    lower = tools.archive(
        tools.folder("d"), tools.member("d/f", b"x" * 600), tools.link("l", "d"), tools.hardlink("h", "d/f"),
        tools.member("c", type=tarfile.CHRTYPE, devmajor=1, devminor=3),
        tools.member("x", pax_headers={"SCHILY.xattr.user.k": "v", "mtime": "1.5", "path": "long/" * 30}),
    )  # fmt: skip
    upper = tools.archive(
        tools.member("d/.wh.f"), tools.member("l/new"), tools.member("d/.wh..wh..opq"), tools.hardlink("h2", "h"),
        form=tarfile.GNU_FORMAT,
    )  # fmt: skip
    long = tools.archive(
        tools.member("p/" * 80 + "f"), tools.link("t", "t" * 300), tools.member("n", mtime=-5, uid=1 << 30),
        form=tarfile.GNU_FORMAT,
    )  # fmt: skip
    inputs = {f"layers-{n}": b"\0" + part for n, part in enumerate((lower, upper, long, tools.sparse_archive()))}
    inputs |= {f"sums-{n}": b"\3" + part for n, part in enumerate((lower, upper, long, tools.sparse_archive()))}
    inputs["stack"] = b"\3" + lower + SEPARATOR + upper
    inputs["gzip"] = b"\1" + gzip.compress(lower) + gzip.compress(b"")
    packer = zstd.compressor(3)
    inputs["zstd"] = b"\2" + packer.compress(lower) + packer.flush()
    for (name, data), number in zip(inputs.items(), itertools.count()):
        (corpus / f"{number:02}-{name}").write_bytes(data)


def main() -> None:
    if len(sys.argv) > 1 and not sys.argv[1].startswith("-") and not Path(sys.argv[1]).exists():
        seeds(Path(sys.argv[1]))
    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
