"""osbuilder publish and pull against Debian's docker-registry: the same files come back, and little goes twice."""

from __future__ import annotations

import errno
import json
import os
import random
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from osbuild import manifest, oci, parts, publication, switch, uploads
from osbuild.borrowed import Borrowed
from osbuild.content import HOLE
from osbuild.errors import HostError, InputError, SpecError
from osbuild.registry_spec import RegistrySpec
from osbuild.workspace import locked
from tests.published import MIB, check_same, get, make, put
from tests.test_cli import one_line, run
from tests.test_distribution import SECRET, log_in
from tests.test_distribution import _surroundings as _surroundings  # a fixture
from tests.test_registry import debian as debian  # a fixture
from tests.test_registry import start_registry


@pytest.fixture(scope="module")
def locked_registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    yield from start_registry(tmp_path_factory.mktemp("locked"), login=True)


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    """A repository of this test's own."""
    return "guests/" + re.sub(r"[^a-z0-9]+", "-", request.node.name.lower()).strip("-")


def test_what_is_pulled_is_what_was_published(debian: str, name: str, tmp_path: Path) -> None:
    build = make(tmp_path / "a")
    done = put(debian, build, name=f"{name}:1")
    assert done.changed
    found = get(debian, tmp_path / "out", tmp_path / "cache", name=f"{name}:1", platform=None)
    check_same(build, tmp_path / "out")
    assert found.digest == done.digest
    assert found.platform == "linux/amd64"
    image = (tmp_path / "out/rootfs.img").stat()
    assert image.st_blocks * 512 < 6 * MIB < image.st_size, "its holes are holes"


def test_a_second_publication_sends_nothing(debian: str, name: str, tmp_path: Path) -> None:
    first = put(debian, make(tmp_path / "a"), name=f"{name}:1").to_dict()
    again = put(debian, make(tmp_path / "b"), name=f"{name}:1").to_dict()
    assert first["digest"] == again["digest"], "the same build has the same digest, wherever it lies"
    assert (again["sent"], again["changed"]) == (0, False)
    assert again["reused"] == first["sent"] + first["reused"] > 3 * MIB


def test_of_a_swapped_agent_little_moves_either_way(debian: str, name: str, tmp_path: Path) -> None:
    builds = {mark: make(tmp_path / mark, mark, data=12) for mark in "ab"}
    put(debian, builds["a"], name=f"{name}:1")
    get(debian, tmp_path / "out", tmp_path / "cache", name=f"{name}:1")
    sent = put(debian, builds["b"], name=f"{name}:1").to_dict()["files"]["linux/amd64"]["rootfs.img"]
    assert 0 < sent["sent"] < sent["reused"] / 10
    for cache in ("cache", "another"):  # what the directory holds is enough
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        shutil.copytree(tmp_path / "out", tmp_path / "copy")
        came = get(debian, tmp_path / "copy", tmp_path / cache, name=f"{name}:1").to_dict()["files"]["rootfs.img"]
        check_same(builds["b"], tmp_path / "copy")
        assert came["fetched"] + came["cached"] < came["reused"] / 10
    shutil.rmtree(tmp_path / "copy")
    came = get(debian, tmp_path / "copy", tmp_path / "cache", name=f"{name}:1").to_dict()
    assert came["fetched"] == 0, "and so is what the cache holds"
    check_same(builds["b"], tmp_path / "copy")


def test_another_repository_of_the_registry_saves_sending(debian: str, name: str, tmp_path: Path) -> None:
    build = make(tmp_path / "a")
    put(debian, build, name=f"{name}/one:1")
    done = put(debian, build, name=f"{name}/two:1", mount_from=f"{name}/one").to_dict()
    assert done["sent"] == 0
    assert done["mounted"] > 3 * MIB
    named = put(debian, build, name=f"{name}/three:1", mount_from=f"{debian}/{name}/one").to_dict()
    assert named["sent"] == 0
    assert named["mounted"] > 3 * MIB  # of two layers that are alike, one may find the other there
    get(debian, tmp_path / "out", tmp_path / "cache", name=f"{name}/two:1")


def test_a_large_file_goes_in_pieces(debian: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads, "PIECE", 100_000)
    build = make(tmp_path / "a", kernel=350_000)
    put(debian, build, name=f"{name}:1")
    get(debian, tmp_path / "out", tmp_path / "cache", name=f"{name}:1")
    check_same(build, tmp_path / "out")


@pytest.mark.parametrize("later", [False, True], ids=["at once", "one after the other"])
def test_each_machine_pulls_its_own_of_an_index(later: bool, debian: str, name: str, tmp_path: Path) -> None:
    builds = {"linux/amd64": make(tmp_path / "x"), "linux/arm64": make(tmp_path / "arm", "b", arch="aarch64")}
    if later:
        put(debian, builds["linux/amd64"], name=f"{name}:1")
        done = put(debian, builds["linux/arm64"], name=f"{name}:1", add=True)
    else:
        done = put(debian, *builds.values(), name=f"{name}:1")
    assert done.platforms == tuple(builds)
    for platform, build in builds.items():
        found = get(
            debian, tmp_path / "out", tmp_path / "cache", name=f"{name}:1", platform=oci.parse_platform(platform)
        )
        assert found.platform == platform
        check_same(build, tmp_path / "out")
    with pytest.raises(InputError, match="no image for linux/riscv64"):
        get(
            debian, tmp_path / "out", tmp_path / "cache", name=f"{name}:1", platform=oci.parse_platform("linux/riscv64")
        )
    check_same(build, tmp_path / "out")


def test_one_build_more_takes_the_place_of_the_one_for_the_same_machine(debian: str, name: str, tmp_path: Path) -> None:
    put(debian, make(tmp_path / "x"), make(tmp_path / "arm", arch="aarch64"), name=f"{name}:1")
    newer = make(tmp_path / "newer", "b")
    done = put(debian, newer, name=f"{name}:1", add=True)
    assert done.platforms == ("linux/amd64", "linux/arm64")
    get(debian, tmp_path / "out", tmp_path / "cache", name=f"{name}:1", platform=oci.parse_platform("linux/amd64"))
    check_same(newer, tmp_path / "out")


def skopeo(*words: str) -> str:
    """It writes one blob twice at a time where two manifests of an index have it.

    docker-registry answers 500 to who reads the link to a blob that is just being written; skopeo does not ask again.
    """
    for _ in range(3):
        done = subprocess.run(["skopeo", "--insecure-policy", *words], capture_output=True, text=True)
        if "500 (Internal Server Error)" not in done.stderr:
            break
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_skopeo_copies_it_and_zstd_joins_the_parts(debian: str, name: str, tmp_path: Path) -> None:
    if shutil.which("zstd") is None:
        pytest.skip("zstd is not installed")
    build = make(tmp_path / "a")
    done = put(debian, build, name=f"{name}:1")
    skopeo("copy", "--src-tls-verify=false", f"docker://{debian}/{name}:1", f"oci:{tmp_path}/copy:1")
    index = json.loads((tmp_path / "copy/index.json").read_text())
    assert index["manifests"][0]["digest"] == done.digest, "skopeo changes nothing"
    blobs = tmp_path / "copy/blobs"
    document = json.loads((blobs / done.digest.replace(":", "/")).read_text())
    files: dict[str, list[Path]] = {}
    for layer in document["layers"]:
        title = layer["annotations"]["org.opencontainers.image.title"]
        files.setdefault(title.partition(".zst.")[0], []).append(blobs / layer["digest"].replace(":", "/"))
    for parted in publication.PARTED:
        packed = b"".join(path.read_bytes() for path in files.pop(parted))
        whole = subprocess.run(["zstd", "-dc"], input=packed, capture_output=True, check=True).stdout
        assert whole == (build / parted).read_bytes()
    assert {name: path.read_bytes() for name, (path,) in files.items()} == {
        name: (build / name).read_bytes() for name in files
    }
    assert len(files) == 7


def test_oras_py_pulls_every_file_and_zstd_joins_the_parts(debian: str, name: str, tmp_path: Path) -> None:
    client = pytest.importorskip("oras.client", reason="oras (PyPI) is not installed")
    if shutil.which("zstd") is None:
        pytest.skip("zstd is not installed")
    build = make(tmp_path / "a")
    put(debian, build, name=f"{name}:1")
    found = client.OrasClient(insecure=True).pull(target=f"{debian}/{name}:1", outdir=str(tmp_path / "out"))
    assert sorted(os.listdir(tmp_path / "out")) == sorted(Path(path).name for path in found)
    for parted in publication.PARTED:
        packed = b"".join(path.read_bytes() for path in sorted((tmp_path / "out").glob(f"{parted}.zst.*")))
        whole = subprocess.run(["zstd", "-dc"], input=packed, capture_output=True, check=True).stdout
        assert whole == (build / parted).read_bytes()
    single = [path for path in (tmp_path / "out").iterdir() if ".zst." not in path.name]
    assert {path.name: path.read_bytes() for path in single} == {
        path.name: (build / path.name).read_bytes() for path in single
    }
    assert {path.name for path in single} == publication.FILES.keys()


def test_skopeo_carries_an_index_to_another_repository(debian: str, name: str, tmp_path: Path) -> None:
    build = make(tmp_path / "x")
    put(debian, build, make(tmp_path / "arm", arch="aarch64"), name=f"{name}:1")
    skopeo(
        "copy", "--all", "--src-tls-verify=false", "--dest-tls-verify=false", f"docker://{debian}/{name}:1",
        f"docker://{debian}/{name}/other:2",
    )  # fmt: skip
    get(debian, tmp_path / "out", tmp_path / "c", name=f"{name}/other:2", platform=oci.parse_platform("linux/amd64"))
    check_same(build, tmp_path / "out")


def test_a_password_opens_both_ways(locked_registry: str, name: str, tmp_path: Path) -> None:
    build = make(tmp_path / "a")
    with pytest.raises(HostError, match="no login for it"):
        put(locked_registry, build, name=f"{name}:1")
    log_in(tmp_path / "home", locked_registry)
    put(locked_registry, build, name=f"{name}:1")
    get(locked_registry, tmp_path / "out", tmp_path / "cache", name=f"{name}:1")
    check_same(build, tmp_path / "out")
    assert SECRET


def test_without_a_network_the_cache_is_enough(debian: str, name: str, tmp_path: Path) -> None:
    build = make(tmp_path / "a")
    put(debian, build, name=f"{name}:1")
    offline = RegistrySpec(offline=True)
    with pytest.raises(InputError, match="not in the cache"):
        get(debian, tmp_path / "out", tmp_path / "cache", name=f"{name}:1", registry=offline)
    assert not (tmp_path / "out").exists()
    get(debian, tmp_path / "other", tmp_path / "cache", name=f"{name}:1")
    get(debian, tmp_path / "out", tmp_path / "cache", name=f"{name}:1", registry=offline)
    check_same(build, tmp_path / "out")


def test_a_changed_build_is_not_published(debian: str, name: str, tmp_path: Path) -> None:
    build = make(tmp_path / "a")
    with (build / "rootfs.img").open("r+b") as file:
        file.write(b"x")
    with pytest.raises(InputError, match=r"rootfs\.img' is not what manifest\.json says"):
        put(debian, build, name=f"{name}:1")
    with pytest.raises(InputError, match="404"):
        get(debian, tmp_path / "out", tmp_path / "cache", name=f"{name}:1")


@pytest.mark.parametrize("record", ["lock.json", "sbom.cdx.json", "provenance.json"])
def test_what_nobody_could_pull_is_not_published(record: str, tmp_path: Path) -> None:
    """No address answers here: it is refused before anything is asked for."""
    build, other = make(tmp_path / "a"), make(tmp_path / "b", "b")
    (other / record).replace(build / record)
    changed = "provenance.json" if record.startswith("sbom") else record  # it says which bill is meant
    with pytest.raises(InputError, match=rf"/a': its {changed} is not the one that its manifest\.json is about"):
        put("127.0.0.1:1", build)
    (build / record).unlink()
    with pytest.raises(InputError, match=rf"/a' has no {record}"):
        put("127.0.0.1:1", build)


def test_what_cannot_be_meant_is_said(tmp_path: Path) -> None:
    build = make(tmp_path / "a")
    with pytest.raises(SpecError, match="both"):
        put("127.0.0.1:1", build, make(tmp_path / "b", "b"))
    with pytest.raises(SpecError, match="digest"):
        put("127.0.0.1:1", build, name=f"x@sha256:{'0' * 64}")
    with pytest.raises(InputError, match="no finished build"):
        put("127.0.0.1:1", tmp_path)


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (("publish", "OUT"), 2, "a build and a reference are needed"),
        (("publish", "OUT", "127.0.0.1:1/a:b:c"), 2, "no image name"),
        (("publish", "OUT", "127.0.0.1:1/a:b", "--offline"), 2, "--offline asks no registry"),
        (("publish", "/", "127.0.0.1:1/a:b"), 3, "no finished build"),
        (("publish", "OUT", "127.0.0.1:1/a:b"), 4, "refuses connections"),
        (("pull", "127.0.0.1:1/a:b", "-o", "new"), 4, "refuses connections"),
        (("pull", "127.0.0.1:1/a:b", "-o", "new", "--offline"), 3, "not in the cache"),
        (("pull", "127.0.0.1:1/a:b", "-o", "new", "--platform", "dos/8086"), 2, "no guests for"),
    ],
)
def test_every_error_is_one_line_and_the_right_code(
    words: tuple[str, ...], code: int, says: str, tmp_path: Path
) -> None:
    make(tmp_path / "OUT", data=1)
    done = run(*words, cwd=tmp_path, env={"OSBUILDER_CACHE": str(tmp_path / "cache")})
    assert done.returncode == code, done.stderr
    assert says in one_line(done.stderr)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("kind", ["a file", "another's files", "a build at work"])
def test_what_is_not_ours_is_not_replaced(kind: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    if kind == "a file":
        out.write_text("mine")
    else:
        make(out)
    if kind == "another's files":
        (out / "thesis.txt").write_text("mine")
    error: tuple[type[Exception], ...] = (SpecError, HostError)
    before = sorted(os.listdir(tmp_path))
    if kind == "a build at work":
        with locked(out), pytest.raises(error, match="at work"):
            get("127.0.0.1:1", out, tmp_path / "cache")
    else:
        with pytest.raises(error):
            get("127.0.0.1:1", out, tmp_path / "cache")
    assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.parametrize("there", [False, True], ids=["first", "over an older one"])
@pytest.mark.parametrize("exchange", [False, True], ids=["renamed twice", "exchanged"])
def test_a_directory_is_replaced_whole(
    exchange: bool, there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cannot(_first: Path, _second: Path, _flags: int) -> None:
        raise OSError(errno.EINVAL, "as a file system says that knows no exchange")

    if not exchange:
        monkeypatch.setattr(switch, "_rename", cannot)
    out = tmp_path / "here/out"
    if there:
        out.parent.mkdir()
        make(out, "old")
    (tmp_path / "here").mkdir(exist_ok=True)
    left = [path.name for path in (tmp_path / "here").iterdir() if path.name != "out"]
    (tmp_path / "here/.out.pull-killed").mkdir()
    with switch.replacing(out) as new:
        (new / "manifest.json").write_text("new")
        assert (out / "rootfs.img").exists() == there, "until the end it is what it was"
    assert sorted(os.listdir(out)) == [".osbuilder", "manifest.json"]
    assert sorted(os.listdir(out.parent)) == sorted([*left, "out"]), "what a killed run left is gone"


@pytest.mark.parametrize("renames", [False, True], ids=["renamed", "not replaced"])
def test_what_appears_while_a_build_is_fetched_stays(
    renames: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cannot(_first: Path, _second: Path, _flags: int) -> None:
        raise OSError(errno.EINVAL, "no such flag")

    if not renames:
        monkeypatch.setattr(switch, "_rename", cannot)
    mine, out = tmp_path / "mine", tmp_path / "out"
    mine.mkdir()
    (mine / "thesis").write_text("mine")
    with pytest.raises(HostError, match="has appeared meanwhile"), switch.replacing(out):
        shutil.copytree(mine, out)
    assert (out / "thesis").read_text() == "mine"
    assert sorted(os.listdir(tmp_path)) == ["mine", "out"]


def test_what_is_put_into_a_build_while_another_is_fetched_stays(tmp_path: Path) -> None:
    out = make(tmp_path / "out")
    with pytest.raises(SpecError, match="thesis"), switch.replacing(out):
        (out / "thesis").write_text("mine")
    assert (out / "thesis").read_text() == "mine"
    assert (out / "rootfs.img").exists()


def test_an_old_build_that_was_moved_aside_comes_back(tmp_path: Path) -> None:
    out = make(tmp_path / "out")
    os.rename(out, tmp_path / ".out.before-pull")  # noqa: PTH104 - as a kill between two renames leaves it
    with pytest.raises(ValueError, match="no"), switch.replacing(out):
        raise ValueError("no")
    assert (out / "rootfs.img").exists()


def test_a_directory_keeps_its_mode(tmp_path: Path) -> None:
    out = make(tmp_path / "out")
    out.chmod(0o700)
    with switch.replacing(out) as new:
        (new / "manifest.json").write_text("new")
    assert out.stat().st_mode & 0o777 == 0o700


def test_a_block_that_fails_replaces_nothing(tmp_path: Path) -> None:
    out = make(tmp_path / "out")
    before = sorted(os.listdir(tmp_path)), sorted(os.listdir(out))
    with pytest.raises(IsADirectoryError), switch.replacing(out) as new:
        new.write_text("new")
    assert (sorted(os.listdir(tmp_path)), sorted(os.listdir(out))) == before


# How it is cut


def image_of(path: Path, layout: str) -> Borrowed:
    """d: random bytes; h: a hole; z: zeros that are written; 64 KiB each."""
    choose = random.Random(3)
    with path.open("wb") as file:
        for number, kind in enumerate(layout):
            file.seek(number * HOLE)
            if kind != "h":
                file.write(choose.randbytes(HOLE) if kind == "d" else bytes(HOLE))
        file.truncate(len(layout) * HOLE)
    return Borrowed(path)


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        ("d", [(0, 1, False)]),
        ("h", [(0, 1, True)]),
        ("hhdhhhd", [(0, 2, True), (2, 1, False), (3, 3, True), (6, 1, False)]),
        ("dhh", [(0, 1, False), (1, 2, True)]),
        ("zzd", [(0, 2, True), (2, 1, False)]),
        ("h" * 4100, [(0, 4096, True), (4096, 4, True)]),
    ],
    ids=["data", "a hole", "both", "a hole at the end", "zeros that are written", "a large hole"],
)
def test_zeros_are_parts_of_their_own(layout: str, expected: list[Any], tmp_path: Path) -> None:
    found = [
        (cut.offset // HOLE, cut.size // HOLE, cut.hole) for cut in parts.cuts(image_of(tmp_path / "i", layout), "i")
    ]
    assert found == expected


def test_parts_are_neither_too_short_nor_too_long(tmp_path: Path) -> None:
    found = list(parts.cuts(image_of(tmp_path / "i", "d" * 256), "i"))
    size = publication.part_size(16 * MIB)
    assert sum(cut.size for cut in found) == 16 * MIB
    assert all(size / 4 <= cut.size <= 4 * size for cut in found[:-1])
    assert len(found) > 4


def test_bytes_that_never_ask_for_a_cut_are_cut(tmp_path: Path) -> None:
    (tmp_path / "i").write_bytes(b"\1" * (5 * MIB))
    assert {cut.size for cut in parts.cuts(Borrowed(tmp_path / "i"), "i")} in ({2 * MIB, MIB}, {128 << 10})


def test_what_moves_by_blocks_is_the_same_parts(tmp_path: Path) -> None:
    data = random.Random(4).randbytes(8 * MIB)
    (tmp_path / "a").write_bytes(data)
    (tmp_path / "b").write_bytes(data[:MIB] + random.Random(5).randbytes(3 * 4096) + data[MIB:])
    first, second = (parts.known(Borrowed(tmp_path / name), "i") for name in "ab")
    new = sum(cut.size for sha256, cut in second.items() if sha256 not in first)
    assert new < 3 * MIB, "only what is around the change is new"


@pytest.mark.parametrize(("size", "part"), [(1, 1), (2048, 1), (2049, 2), (65536, 32)])
def test_no_image_has_too_many_parts_for_a_manifest(size: int, part: int) -> None:
    assert publication.part_size(size * MIB) == part * MIB // 2


def test_every_file_of_a_build_has_its_place() -> None:
    assert {*publication.FILES, *publication.PARTED} == {
        *manifest.NAMES.values(), "vmlinux", "vmlinuz", "config", *manifest.RECORDS,
    }  # fmt: skip


def _most_parts(name: str, size: int) -> list[publication.Piece]:
    """As many parts as a file may have, each with as many digits as there can be."""
    zeros = "0" * 64
    return [
        publication.part(name, number, size, size, zeros, f"sha256:{zeros}", size) for number in range(parts.PARTS_MAX)
    ]


def test_the_largest_manifest_is_one_that_registries_take() -> None:
    pieces = [publication.whole(name, "0" * 64, publication.FILE_MAX) for name in publication.FILES]
    pieces += [piece for name in publication.PARTED for piece in _most_parts(name, publication.FILE_MAX)]
    document = {"agent": "a" * 200, "kernel": {"release": "r" * 200}}
    data = publication.manifest_of(document, pieces[0].layer, pieces)
    assert 3 * MIB < len(data) < 4 * MIB


def stretches(path: Path, number: int, every: int) -> Path:
    """Some bytes in every `every`-th block of 64 KiB, and zeros between."""
    with path.open("wb") as file:
        for each in range(number):
            file.seek(each * every * HOLE)
            file.write(b"stretch %d" % each)
        file.truncate(number * every * HOLE)
    return path


@pytest.mark.parametrize("every", [2, 6])
def test_many_stretches_are_joined_until_a_manifest_holds_them(every: int, tmp_path: Path) -> None:
    number = parts.PARTS_MAX
    found = parts.cuts(Borrowed(stretches(tmp_path / "i", number, every)), "i")
    assert len(found) <= parts.PARTS_MAX
    at = 0
    for cut in found:
        assert cut.offset == at
        at += cut.size
    assert at == number * every * HOLE


def test_an_image_in_more_stretches_than_any_manifest_holds_is_refused_before_a_byte_is_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "PARTS_MAX", 0)
    with pytest.raises(InputError, match=r"img' has .* bytes in more than 0 stretches"):
        put("127.0.0.1:1", make(tmp_path / "a"))  # where nobody listens


@pytest.mark.long  # 5 GB, most of them zeros, are read a dozen times
@pytest.mark.timeout(1200)
def test_an_image_of_forty_thousand_stretches_is_published_and_pulled(debian: str, name: str, tmp_path: Path) -> None:
    build = make(tmp_path / "a", image=stretches(tmp_path / "i", 40_000, 2))
    put(debian, build, name=f"{name}:1")
    get(debian, tmp_path / "out", tmp_path / "cache", name=f"{name}:1")
    check_same(build, tmp_path / "out")
    blocks = (tmp_path / "out/rootfs.img").stat().st_blocks * 512
    assert blocks <= 40_000 * HOLE + MIB, "its holes are holes"
