"""A layer that an image mentions again and again costs what one costs, in every source."""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from osbuild.arch import X86_64
from osbuild.cache import Cache
from osbuild.errors import InputError
from osbuild.limits import Limits
from osbuild.sources.members import Members
from osbuild.tree import Spool
from tests.fake_registry import serving
from tests.layer_tools import archive, hardlink, member, opened, write_layout
from tests.test_sources import blob, packed, save

ONE = archive(member("f", bytes(100_000)))


@pytest.fixture
def fifty(tmp_path: Path) -> Iterator[dict[str, str]]:
    """The image that has the layer fifty times, in each place."""
    (tmp_path / "a.tar").write_bytes(save((ONE,) * 50, linked=True))
    write_layout(tmp_path / "layout", [ONE] * 50)
    (tmp_path / "layout.tar").write_bytes(packed(tmp_path / "layout"))
    everywhere = {
        "docker-archive": f"docker-archive:{tmp_path}/a.tar",
        "oci": f"oci:{tmp_path}/layout",
        "oci in a tar": f"oci:{tmp_path}/layout.tar",
    }
    with serving(tmp_path / "layout") as registry:
        yield everywhere | {"docker": f"docker://{registry.address}/some/image:latest"}


@pytest.mark.parametrize("transport", ["docker-archive", "oci", "oci in a tar", "docker"])
def test_a_layer_is_read_once_however_often_it_is_mentioned(
    transport: str, fifty: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = _count_hashed(monkeypatch)
    image = opened(fifty[transport], X86_64, cache=Cache(root=tmp_path / "cache"))
    assert len(image.config.diff_ids) == 50
    assert image.tree["/f"].content.size == 100_000
    assert sum(counted) < 6 * len(ONE)  # a registry's blob is looked at when it comes, when it is kept and as a layer
    with pytest.raises(InputError, match="all layers have more than 1000000 bytes") as caught:
        opened(fifty[transport], X86_64, cache=Cache(root=tmp_path / "cache"), limits=Limits(image_bytes=1_000_000))
    assert caught.value.hint == "--limit image-bytes=NUMBER allows more"


def test_a_layer_under_two_diff_ids_is_refused(tmp_path: Path) -> None:
    write_layout(tmp_path / "l", [ONE, ONE], rootfs={"type": "layers", "diff_ids": [blob(ONE), blob(b"")]})
    with pytest.raises(InputError, match=f"content is {blob(ONE)}, but the config says {blob(b'')}"):
        opened(f"oci:{tmp_path}/l", X86_64)


def test_a_packed_blob_may_be_a_hard_link(tmp_path: Path) -> None:
    write_layout(tmp_path / "l", [ONE])
    name = blob(ONE).removeprefix("sha256:")
    (tmp_path / "l/0").hardlink_to(tmp_path / "l/blobs/sha256" / name)  # tar(1) meets this name first
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for path in ("0", "blobs", "index.json", "oci-layout"):
            tar.add(tmp_path / "l" / path, arcname=path)
    (tmp_path / "l.tar").write_bytes(out.getvalue())
    with tarfile.open(tmp_path / "l.tar") as tar:
        assert tar.getmember(f"blobs/sha256/{name}").islnk()
    assert "/f" in opened(f"oci:{tmp_path}/l.tar", X86_64).tree


@pytest.mark.parametrize("target", ["a", "b", "nowhere"])
def test_hard_links_that_lead_nowhere_are_refused(target: str, tmp_path: Path) -> None:
    data = archive(hardlink("a", "b"), hardlink("b", target), member("manifest.json", b"[]"))
    spool = Spool()
    spool.append(data)
    with pytest.raises(InputError, match="'a' is not"):
        Members(spool, "here", Limits()).content("a")


def _count_hashed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many bytes each call of sha256 is given from now on."""
    counted: list[int] = []
    real = hashlib.sha256

    class Counting:
        def __init__(self, data: bytes = b"") -> None:
            self._real = real()
            self.update(data)

        def update(self, data: bytes) -> None:
            counted.append(len(data))
            self._real.update(data)

        def hexdigest(self) -> str:
            return self._real.hexdigest()

        def digest(self) -> bytes:
            return self._real.digest()

    monkeypatch.setattr(hashlib, "sha256", Counting)
    return counted
