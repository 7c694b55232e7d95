"""Sources: the same image by every road, and lies about it."""

from __future__ import annotations

import contextlib
import gc
import gzip
import hashlib
import http.server
import io
import json
import os
import re
import socket
import socketserver
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from osbuild import distribution, listing, sources, tar_writer, uncompress, zstd
from osbuild.arch import AARCH64, X86_64
from osbuild.cache import Cache
from osbuild.errors import HostError, InputError, SpecError
from osbuild.layers import flatten
from osbuild.limits import Limits
from osbuild.rootfs import settle
from osbuild.sources import SOURCES, registry
from osbuild.transport import Patience
from osbuild.tree import Tree
from tests.elsewhere import need_root
from tests.fake_registry import serving
from tests.layer_tools import archive, folder, hardlink, layer, link, member, opened, write_layout

LAYERS = (
    archive(folder("etc"), member("etc/a", b"lower"), member("etc/gone", b"x"), link("l", "etc")),
    archive(member("etc/a", b"upper" * 1000), member("etc/.wh.gone"), hardlink("etc/b", "etc/a")),
)


def save(layers: tuple[bytes, ...] = LAYERS, *, linked: bool = False, images: int = 1) -> bytes:
    """What `docker save` of Docker 20 streams."""
    digests = [hashlib.sha256(data).hexdigest() for data in layers]
    config = json.dumps(
        {"os": "linux", "architecture": "amd64",
         "rootfs": {"type": "layers", "diff_ids": [f"sha256:{digest}" for digest in digests]}}
    ).encode()  # fmt: skip
    names = [f"{index}/layer.tar" for index in range(len(layers))]
    manifest = [{"Config": "c.json", "RepoTags": ["x:latest"], "Layers": names}] * images
    members = [member("c.json", config), member("manifest.json", json.dumps(manifest).encode())]
    for index, data in enumerate(layers):
        same = layers.index(data)
        if linked and same != index:
            members.append(link(f"{index}/layer.tar", f"../{same}/layer.tar"))
        else:
            members.append(member(f"{index}/layer.tar", data))
    return archive(*members)


class _Daemon(socketserver.ThreadingUnixStreamServer):
    daemon_threads = True
    body = b""
    status = 200
    fault = ""  # what goes wrong in the middle of a save

    def handle_error(self, request: object, address: object) -> None:
        """A client that has gone away is no news."""


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def address_string(self) -> str:
        return "unix"

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass

    def do_GET(self) -> None:
        server = self.server
        assert isinstance(server, _Daemon)
        if self.path.endswith("/version"):
            self._answer(200, json.dumps({"ApiVersion": "1.41", "MinAPIVersion": "1.12"}).encode())
        elif server.status != 200:
            self._answer(server.status, json.dumps({"message": "No such image"}).encode())
        elif server.fault:
            self._break(server.fault, server.body)
        else:
            self._answer(200, server.body)

    def _break(self, fault: str, body: bytes) -> None:
        """Half of the body, in one framing or the other, and then nothing more: at once, or after a while."""
        self.send_response(200)
        chunked = fault == "a chunk is cut"
        self.send_header(*(("Transfer-Encoding", "chunked") if chunked else ("Content-Length", str(len(body)))))
        self.end_headers()
        half = body[: len(body) // 2]
        self.wfile.write(b"%x\r\n" % len(body) * chunked + half)
        self.wfile.flush()
        if fault == "it hangs":
            time.sleep(6)
        self.close_connection = True

    def _answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[_Daemon]:
    """A Docker daemon that can do nothing but save one image."""
    path = tmp_path / "docker.sock"
    with _Daemon(str(path), _Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        monkeypatch.setenv("DOCKER_HOST", f"unix://{path}")
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def roads(tmp_path: Path, daemon: _Daemon) -> Iterator[dict[str, str]]:
    """One image in each of the places that SOURCES knows."""
    write_layout(tmp_path / "layout", LAYERS)
    daemon.body = save()
    (tmp_path / "a.tar").write_bytes(save())
    (tmp_path / "layout.tar").write_bytes(packed(tmp_path / "layout"))
    unpack(flatten([layer(data) for data in LAYERS]), tmp_path / "root")
    everywhere = {
        "docker-daemon": "docker-daemon:x",
        "docker-archive": f"docker-archive:{tmp_path}/a.tar",
        "oci": f"oci:{tmp_path}/layout",
        "oci in a tar": f"oci:{tmp_path}/layout.tar:latest",
        "dir": f"dir:{tmp_path}/root",
    }
    with serving(tmp_path / "layout") as registry:
        yield everywhere | {"docker": f"docker://{registry.address}/some/image:latest"}


ROADS = (*SOURCES, "oci in a tar")


def packed(layout: Path) -> bytes:
    """A layout directory as an archive."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        tar.add(layout, arcname=".")
    return out.getvalue()


def unpack(tree: Tree, root: Path) -> None:
    """A tree on disk, by somebody else's tar."""
    root.mkdir()
    data = b"".join(tar_writer.archive(tree))
    subprocess.run(["tar", "-xpf", "-", "-C", str(root)], input=data, check=True)
    if tree["/"].mtime_ns is None:  # then the archive says nothing of it
        os.utime(root, (0, 0))


@pytest.mark.parametrize("transport", ROADS)
def test_the_same_image_by_every_road_gives_the_same_tree(
    transport: str, roads: dict[str, str], tmp_path: Path
) -> None:
    image = opened(roads[transport], X86_64, cache=Cache(root=tmp_path / "cache"))
    tree = image.tree
    assert list(tree) == ["/", "/etc", "/etc/a", "/etc/b", "/l"]
    assert tree["/etc/a"] is tree["/etc/b"]
    # A directory on disk has a time even where the image has none.
    same = settle(opened(roads["oci"]).tree, epoch=0, clamp=False)
    assert listing.entries(settle(tree, epoch=0, clamp=False)) == listing.entries(same)


@pytest.mark.parametrize("transport", [road for road in ROADS if road != "dir"])  # a directory does not say
def test_an_image_for_another_machine_is_refused(transport: str, roads: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="linux/arm64"):
        opened(roads[transport], AARCH64, cache=Cache(root=tmp_path / "cache"))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_no_daemon_is_the_hosts_lack_and_names_the_other_roads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/no.sock")
    with pytest.raises(HostError, match="no Docker daemon answers") as caught:
        opened("docker-daemon:x", X86_64)
    assert "oci:DIR" in caught.value.hint
    del caught
    gc.collect()  # docker 7.2 leaves the socket open that could not be connected: here, not in the next test


@pytest.mark.parametrize(
    "text", ["garbage", "ssh://joe@h.io", "npipe:///x", "http:///x", "tcp://h.io:port", "nope://h.io:1", "tcp://[::1:1"]
)
def test_a_docker_host_that_is_none_is_said_to_be_none(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCKER_HOST", text)
    with pytest.raises(HostError, match=f"^DOCKER_HOST is {re.escape(repr(text))}, neither unix://PATH nor tcp://"):
        opened("docker-daemon:x", X86_64)


@pytest.fixture
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory to be in, where no daemon answers, and no registry either."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setenv("DOCKER_HOST", "nothing")
    monkeypatch.setattr(registry, "PATIENCE", Patience(first=0.001))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and never listens
        monkeypatch.setattr(distribution, "_HUB_ADDRESS", f"127.0.0.1:{taken.getsockname()[1]}")
        yield work


def test_a_bare_name_that_is_nowhere_says_who_was_asked_and_why(alone: Path) -> None:
    with pytest.raises(HostError) as caught:
        opened("debain", X86_64)
    said = r"^DOCKER_HOST is 'nothing', neither .*, so docker\.io was asked: docker\.io/library/debain: 127.* refuses"
    assert re.search(said, str(caught.value)), str(caught.value)
    assert caught.value.hint.startswith("is it running?")


def test_a_bare_name_that_is_a_path_too_is_told_how_to_say_so(alone: Path) -> None:
    (alone / "plain/etc").mkdir(parents=True)
    (alone / "Plain").mkdir()
    write_layout(alone / "layout", LAYERS)
    (alone / "a.tar").write_bytes(save())
    hints = {"plain": "dir:plain", "./plain": "dir:./plain", "layout": "oci:layout", "Plain": "dir:Plain",
             ".": "dir:.", "a.tar": "docker-archive:a.tar or oci:a.tar", str(alone): f"dir:{alone}"}  # fmt: skip
    for text, hint in hints.items():
        with pytest.raises((HostError, SpecError)) as caught:
            opened(text, X86_64)
        kind = "file" if text == "a.tar" else "directory"
        assert caught.value.hint.partition("; ")[0] == f"the {kind}: {hint}"


def test_no_words_at_all_are_no_directory(alone: Path) -> None:
    with pytest.raises(SpecError, match="no image is named") as caught:
        opened("", X86_64)
    assert caught.value.hint == ""


def test_a_bare_registry_is_no_image(alone: Path) -> None:
    with pytest.raises(SpecError, match=r"^DOCKER_HOST is 'nothing', .*; '127.0.0.1:5059' is a registry"):
        opened("127.0.0.1:5059", X86_64)


def test_a_bare_name_the_daemon_has_not_is_not_looked_for_elsewhere(daemon: _Daemon) -> None:
    daemon.status = 404
    with pytest.raises(InputError, match=r"^the Docker daemon has no image 'nothing-here:latest'"):
        opened("nothing-here", X86_64)


def test_an_image_the_daemon_has_not_is_named(daemon: _Daemon) -> None:
    daemon.status = 404
    with pytest.raises(InputError, match="no image 'x:latest'"):
        opened("docker-daemon:x", X86_64)


def test_a_save_that_was_cut_off_is_refused(daemon: _Daemon) -> None:
    daemon.body = save()[: len(save()) // 2 + 100]
    with pytest.raises(InputError):
        opened("docker-daemon:x", X86_64)


@pytest.mark.parametrize("fault", ["it dies", "a chunk is cut", "it hangs"])
def test_a_daemon_that_stops_in_the_middle_is_the_hosts_lack(
    fault: str, daemon: _Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources.daemon, "SECONDS", 1)
    daemon.body, daemon.fault = save(), fault
    began = time.monotonic()
    with pytest.raises(HostError, match="the Docker daemon could not give 'x:latest'") as caught:
        opened("docker-daemon:x", X86_64)
    assert str(caught.value).isprintable()
    assert time.monotonic() - began < 5, "it waited for the end of the silence"


def test_a_daemon_that_refuses_is_quoted_in_one_line(daemon: _Daemon) -> None:
    daemon.status = 500
    with pytest.raises(HostError, match=r"could not give .x:latest.: 500 .*No such image") as caught:
        opened("docker-daemon:x", X86_64)
    assert str(caught.value).isprintable()


def test_a_layer_that_stands_twice_is_read_through_its_link(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(save((LAYERS[0], LAYERS[0]), linked=True))
    assert len(opened(f"docker-archive:{tmp_path}/a.tar", X86_64).config.diff_ids) == 2


@pytest.mark.parametrize("pack", [gzip.compress, lambda data: _zstd(data)], ids=["gzip", "zstd"])
def test_a_compressed_archive_is_read(pack: Any, tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(pack(save()))
    assert len(opened(f"docker-archive:{tmp_path}/a.tar", X86_64).config.diff_ids) == 2


ZEROS = archive(member("zeros", bytes(4 << 20)))  # a thousandth of it as gzip


def test_many_small_bombs_are_one_large_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uncompress, "_RATIO_FLOOR", 6 << 20)
    write_layout(tmp_path / "one", [ZEROS], compress=True)
    assert "/zeros" in opened(f"oci:{tmp_path}/one", X86_64).tree
    write_layout(tmp_path / "two", [ZEROS, archive(member("more", bytes(4 << 20)))], compress=True)
    with pytest.raises(InputError, match="a decompression bomb"):
        opened(f"oci:{tmp_path}/two", X86_64)


@pytest.mark.parametrize("source", ["docker-archive", "oci"])
def test_a_bomb_in_a_bomb_counts_as_both(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uncompress, "_RATIO_FLOOR", 1 << 20)
    config = {"os": "linux", "architecture": "amd64", "rootfs": {"type": "layers", "diff_ids": [blob(ZEROS)]}}
    record = [{"Config": "c.json", "RepoTags": [], "Layers": ["l"]}]
    data = archive(
        member("c.json", json.dumps(config).encode()), member("manifest.json", json.dumps(record).encode()),
        member("l", gzip.compress(ZEROS)),
    )  # fmt: skip
    if source == "oci":
        write_layout(tmp_path / "l", [ZEROS], compress=True)
        data = packed(tmp_path / "l")
    limits = Limits(ratio=1500)
    (tmp_path / "plain").write_bytes(data)
    assert "/zeros" in opened(f"{source}:{tmp_path}/plain", X86_64, limits=limits).tree
    (tmp_path / "twice").write_bytes(gzip.compress(data))
    with pytest.raises(InputError, match="a decompression bomb"):
        opened(f"{source}:{tmp_path}/twice", X86_64, limits=limits)


def blob(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def test_two_images_in_one_archive_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(save(images=2))
    with pytest.raises(InputError, match="2 images"):
        opened(f"docker-archive:{tmp_path}/a.tar", X86_64)


def test_a_compressed_layer_is_the_same_image(tmp_path: Path) -> None:
    write_layout(tmp_path / "plain", LAYERS)
    write_layout(tmp_path / "packed", LAYERS, compress=True)
    plain, packed = (opened(f"oci:{tmp_path}/{name}", X86_64).tree for name in ("plain", "packed"))
    assert plain.digest() == packed.digest()


def test_a_tag_chooses_and_a_wrong_one_lists_the_right_ones(tmp_path: Path) -> None:
    write_layout(tmp_path / "l", LAYERS[:1], tag="one")
    write_layout(tmp_path / "l", LAYERS, tag="two")
    assert len(opened(f"oci:{tmp_path}/l:one", X86_64).config.diff_ids) == 1
    assert len(opened(f"oci:{tmp_path}/l:two", X86_64).config.diff_ids) == 2
    with pytest.raises(InputError) as caught:
        opened(f"oci:{tmp_path}/l:three", X86_64)
    assert "'one', 'two'" in caught.value.hint
    with pytest.raises(InputError, match="2 of 2 images"):
        opened(f"oci:{tmp_path}/l", X86_64)


def test_a_platform_chooses_when_no_tag_does(tmp_path: Path) -> None:
    write_layout(tmp_path / "l", LAYERS[:1], architecture="arm64")
    write_layout(tmp_path / "l", LAYERS, architecture="amd64")
    assert len(opened(f"oci:{tmp_path}/l", X86_64).config.diff_ids) == 2
    assert len(opened(f"oci:{tmp_path}/l", AARCH64).config.diff_ids) == 1


def _lie(layout: Path, blob: str, data: bytes) -> None:
    (layout / "blobs" / "sha256" / blob.removeprefix("sha256:")).write_bytes(data)


def test_a_blob_with_other_bytes_of_the_right_length_is_refused(tmp_path: Path) -> None:
    manifest = write_layout(tmp_path / "l", LAYERS)
    layer = manifest["layers"][0]
    _lie(tmp_path / "l", layer["digest"], b"x" * layer["size"])
    with pytest.raises(InputError, match="has the content of"):
        opened(f"oci:{tmp_path}/l", X86_64)


def test_a_blob_of_another_size_is_refused(tmp_path: Path) -> None:
    manifest = write_layout(tmp_path / "l", LAYERS)
    _lie(tmp_path / "l", manifest["layers"][0]["digest"], b"short")
    with pytest.raises(InputError, match="has 5 bytes"):
        opened(f"oci:{tmp_path}/l", X86_64)


def test_a_layer_that_is_not_its_diff_id_is_refused(tmp_path: Path) -> None:
    write_layout(tmp_path / "l", LAYERS, rootfs={"type": "layers", "diff_ids": ["sha256:" + "0" * 64] * 2})
    with pytest.raises(InputError, match="but the config says"):
        opened(f"oci:{tmp_path}/l", X86_64)


def test_more_layers_than_the_config_names_are_refused(tmp_path: Path) -> None:
    digest = "sha256:" + hashlib.sha256(LAYERS[0]).hexdigest()
    write_layout(tmp_path / "l", LAYERS, rootfs={"type": "layers", "diff_ids": [digest]})
    with pytest.raises(InputError, match="2 layers, but the config names 1"):
        opened(f"oci:{tmp_path}/l", X86_64)


def test_a_blob_that_is_a_link_to_a_host_file_is_not_followed(tmp_path: Path) -> None:
    manifest = write_layout(tmp_path / "l", LAYERS)
    blob = tmp_path / "l/blobs/sha256" / manifest["layers"][0]["digest"].removeprefix("sha256:")
    blob.rename(tmp_path / "elsewhere")
    blob.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="cannot read"):
        opened(f"oci:{tmp_path}/l", X86_64)


@pytest.mark.parametrize("what", ["nothing", "a file", "an empty directory"])
def test_what_is_no_layout_is_refused(what: str, tmp_path: Path) -> None:
    if what == "a file":
        (tmp_path / "l").write_bytes(b"")
    elif what == "an empty directory":
        (tmp_path / "l").mkdir()
    with pytest.raises(InputError):
        opened(f"oci:{tmp_path}/l", X86_64)


@pytest.mark.parametrize(
    ("names", "hint"),
    [
        (["etc", "usr"], "an unpacked root filesystem is dir:{path}"),
        (["blobs", "index.json"], "oci:PATH[:TAG] names an OCI image layout"),
        ([], "oci:PATH[:TAG] names an OCI image layout"),
    ],
)
def test_a_directory_that_is_no_layout_is_told_what_it_may_be(names: list[str], hint: str, tmp_path: Path) -> None:
    path = tmp_path / "root"
    for name in names:
        (path / name).mkdir(parents=True)
    path.mkdir(exist_ok=True)
    with pytest.raises(InputError, match=r"/root' is no OCI layout \(no file oci-layout\)$") as caught:
        opened(f"oci:{path}:tag", X86_64)
    assert caught.value.hint == hint.format(path=path)


def test_an_archive_of_the_other_kind_is_told_its_source(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(save())
    with pytest.raises(InputError, match=r"a.tar' holds no OCI layout") as caught:
        opened(f"oci:{path}", X86_64)
    assert caught.value.hint == f"docker save makes such a file: docker-archive:{path}"
    path.write_bytes(archive(member("a")))
    with pytest.raises(InputError, match=r"a.tar' holds no OCI layout") as caught:
        opened(f"oci:{path}", X86_64)
    assert caught.value.hint == ""


@contextlib.contextmanager
def nobody(path: Path) -> Iterator[None]:
    """The block is run by a user who may not read everything."""
    need_root()
    for above in (path, *path.parents):
        if above.stat().st_uid == 0 and not above.stat().st_mode & 0o001:
            above.chmod(0o755)
    os.setegid(65534)
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)


@pytest.mark.parametrize("transport", ["docker-archive", "oci", "oci in a tar", "dir", "oci in the dark"])
def test_what_may_not_be_read_is_the_hosts_fault_and_gets_no_other_hint(transport: str, tmp_path: Path) -> None:
    write_layout(tmp_path / "top/layout", LAYERS)
    (tmp_path / "top/a.tar").write_bytes(save())
    (tmp_path / "top/layout.tar").write_bytes(packed(tmp_path / "top/layout"))
    word, name = {
        "docker-archive": ("docker-archive", "a.tar"), "oci in a tar": ("oci", "layout.tar"), "dir": ("dir", "layout"),
        "oci": ("oci", "layout"), "oci in the dark": ("oci", "layout"),
    }[transport]  # fmt: skip
    path = tmp_path / "top" / name
    (tmp_path / "top" if transport.endswith("dark") else path).chmod(0)
    with nobody(tmp_path), pytest.raises(HostError, match=f"cannot read '{path}': Permission denied") as caught:
        opened(f"{word}:{path}", X86_64)
    assert caught.value.hint == "run as its owner, as root, or make it readable"


def test_a_blob_that_may_not_be_read_is_the_hosts_fault(tmp_path: Path) -> None:
    manifest = write_layout(tmp_path / "top/l", LAYERS)
    blob = tmp_path / "top/l/blobs/sha256" / manifest["layers"][0]["digest"].removeprefix("sha256:")
    blob.chmod(0)
    with nobody(tmp_path), pytest.raises(HostError, match="Permission denied"):
        opened(f"oci:{tmp_path}/top/l", X86_64)


def test_a_name_too_long_for_a_file_is_refused() -> None:
    with pytest.raises(InputError, match="File name too long"):
        opened(f"oci:{'x' * 300}", X86_64)


@pytest.mark.parametrize("transport", ["docker-archive", "oci", "dir"])
def test_a_temporary_directory_that_is_not_there_is_not_replaced(
    transport: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.tar").write_bytes(gzip.compress(save()))
    write_layout(tmp_path / "l", LAYERS)
    (tmp_path / "root").mkdir()
    monkeypatch.setenv("TMPDIR", f"{tmp_path}/nonexistent")
    name = {"docker-archive": "a.tar", "oci": "l", "dir": "root"}[transport]
    with pytest.raises(HostError, match=r"cannot keep the image in '.*/nonexistent': No such file") as caught:
        opened(f"{transport}:{tmp_path}/{name}", X86_64)
    assert "TMPDIR" in caught.value.hint


def test_skopeo_makes_a_layout_that_we_read(tmp_path: Path) -> None:
    import shutil
    import subprocess

    if shutil.which("skopeo") is None:
        pytest.skip("skopeo is not installed")
    (tmp_path / "a.tar").write_bytes(save())
    command = ["skopeo", "--insecure-policy", "copy", "-q", f"docker-archive:{tmp_path}/a.tar", f"oci:{tmp_path}/l:t"]
    subprocess.run(command, check=True)
    theirs = opened(f"oci:{tmp_path}/l:t", X86_64).tree
    assert theirs.digest() == opened(f"docker-archive:{tmp_path}/a.tar", X86_64).tree.digest()


def _zstd(data: bytes) -> bytes:
    compressor = zstd.compressor(3)
    packed: bytes = compressor.compress(data) + compressor.flush()
    return packed


def test_whoever_reads_an_image_does_not_load_what_writes_one() -> None:
    """An unchanged archive is to be a tree again in 0.3 s: imports are most of that."""
    code = (
        "import sys; from osbuild.sources import SOURCES; SOURCES['docker-archive'].open_image; "
        "print(*sorted(name for name in sys.modules if name.startswith('osbuild.')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "osbuild.sources.archive" in loaded
    assert not loaded & {"osbuild.filesystem", "osbuild.spec", "osbuild.initrd", "osbuild.pipeline"}
