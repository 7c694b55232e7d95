"""`osbuilder inspect`: what it says of whole files, of damaged ones, and of what it does not know."""

from __future__ import annotations

import gzip
import json
import random
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from osbuild import command, hash_check, initrd
from osbuild.artifacts import Kernel, Rootfs
from osbuild.errors import InputError, SpecError
from osbuild.filesystem import erofs, ext4
from osbuild.inspection import Inspection, drawing, inspect
from osbuild.nvdimm_image import build_nvdimm_image
from osbuild.tree import Entry, Tree, directory, regular, symlink

MIB = 1 << 20
WRITERS = {"ext4": ext4, "erofs": erofs}
FILES: dict[str, Entry] = {
    "/": directory(mtime_ns=0),
    "/init": symlink("sbin/init"),
    "/sbin": directory(mtime_ns=0),
    "/sbin/init": regular(random.Random(5).randbytes(300_000), 0o755),
}


def image(
    path: Path,
    kind: str = "ext4",
    *,
    header: bool = True,
    hashed: bool = False,
    salt: bytes = b"",
    align: int = 2 * MIB,
) -> Path:
    plan = WRITERS[kind].plan(Tree(FILES), start=MIB, epoch=0)
    build_nvdimm_image(WRITERS[kind], plan, path, name=kind, header=header, hashed=hashed, salt=salt, align=align)
    return path


def changed(path: Path, at: int, data: bytes) -> Path:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(data)
    return path


def sights(found: Inspection) -> dict[str, str]:
    return {sight.device: sight.sees for sight in found.sights}


def osbuilder(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "osbuild", *words], capture_output=True, text=True, check=False
    )  # fmt: skip


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("hashed", [False, True], ids=["without a hash tree", "with one"])
def test_a_whole_image_is_whole_and_drawn_within_80_columns(kind: str, hashed: bool, tmp_path: Path) -> None:
    found = inspect(image(tmp_path / "i", kind, hashed=hashed))
    assert found.problems == ()
    lines = list(drawing(found))
    assert max(map(len, lines[1:])) <= 80
    assert "nothing is wrong with it" in lines
    assert [stretch.offset for stretch in found.layout[:4]] == [0, 4096, 2 * MIB, 3 * MIB]
    assert sights(found)["NVDIMM"].startswith(f"/dev/pmem0p1: {kind} at 3 MiB of the file")
    assert sights(found)["NVDIMM"].endswith("DAX works")
    assert sights(found)["virtio-blk"].startswith(f"/dev/vda1: {kind} at 3 MiB of the file")


def test_a_plain_disk_is_no_dax_device(tmp_path: Path) -> None:
    found = inspect(image(tmp_path / "i", header=False))
    assert found.problems == ()
    assert sights(found)["virtio-blk"] == "/dev/vda1: ext4 at 1 MiB of the file"
    assert "no DAX" in sights(found)["NVDIMM"]


def test_a_size_off_the_boundary_leaves_an_nvdimm_with_nothing(tmp_path: Path) -> None:
    path = image(tmp_path / "i")
    with path.open("ab") as file:
        file.write(bytes(MIB))
    found = inspect(path)
    assert sights(found)["NVDIMM"].startswith("nothing: ")
    assert sights(found)["virtio-blk"].startswith("/dev/vda1")
    assert any("no multiple of 2 MiB" in problem for problem in found.problems)


def test_a_header_that_the_kernel_refuses_leaves_an_nvdimm_with_nothing(tmp_path: Path) -> None:
    found = inspect(changed(image(tmp_path / "i"), 4096 + 64, b"\1"))
    assert sights(found)["NVDIMM"].startswith("nothing: the nd_pfn superblock is refused: its checksum")


def test_blocks_smaller_than_pages_mean_no_dax(tmp_path: Path) -> None:
    path = tmp_path / "fs"
    argv = [command.find("mke2fs"), "-q", "-t", "ext4", "-b", "1024", str(path), "8M"]
    subprocess.run(argv, check=True)
    assert "blocks have 1024 bytes" in sights(inspect(path))["virtio-pmem"]


def test_counts_are_those_of_the_tree(tmp_path: Path) -> None:
    facts = inspect(image(tmp_path / "i")).facts["partition 1 ext4"]
    assert (facts["files"], facts["directories"], facts["symbolic links"]) == ("1", "2", "1")
    assert facts["bytes in files"] == "300000"


# Hash trees


@pytest.fixture
def hashed(tmp_path: Path) -> tuple[Path, str]:
    """An image with a hash tree, and the root hash that veritysetup gives for it."""
    path = image(tmp_path / "i", hashed=True)
    found = inspect(path)
    assert found.hash_tree is not None
    data, tree = (stretch for stretch in found.layout if stretch.what.startswith("partition"))
    with path.open("rb") as file:
        file.seek(data.offset)
        (tmp_path / "data").write_bytes(file.read(data.size))
        file.seek(tree.offset)
        (tmp_path / "tree").write_bytes(file.read(tree.size))
    told = subprocess.run(
        [command.find("veritysetup"), "format", "--no-superblock", f"--salt={found.hash_tree.salt}",
         str(tmp_path / "data"), str(tmp_path / "other")],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    return path, next(line.split()[-1] for line in told.splitlines() if line.startswith("Root hash"))


def test_the_root_hash_is_the_one_that_veritysetup_gives(hashed: tuple[Path, str]) -> None:
    path, root_hash = hashed
    found = inspect(path, hash_check.Claim(root_hash=root_hash))
    assert found.problems == ()
    assert found.hash_tree is not None
    assert found.hash_tree.root_hash == root_hash
    assert found.hash_tree.checked == "the root hash"


def test_another_root_hash_is_said(hashed: tuple[Path, str]) -> None:
    found = inspect(hashed[0], hash_check.Claim(root_hash="0" * 64))
    assert found.problems == (f"hash tree: the hash tree's root hash is {hashed[1]}, not {'0' * 64}",)


def test_a_changed_block_of_data_is_named(hashed: tuple[Path, str]) -> None:
    found = inspect(changed(hashed[0], 3 * MIB + 300 * 4096 + 5, b"\xff"))
    assert any("data block 300 has not the digest" in problem for problem in found.problems)


def test_a_changed_digest_is_named(hashed: tuple[Path, str]) -> None:
    tree = next(stretch for stretch in inspect(hashed[0]).layout if "hash tree" in stretch.what)
    found = inspect(changed(hashed[0], tree.offset + 4096 + 32 * 7, b"\xff"))
    assert any("data block 7 has not the digest" in problem for problem in found.problems)
    assert any("block 0 of hash level 0 has not the digest" in problem for problem in found.problems)


def test_a_salt_of_somebody_else_must_be_given(tmp_path: Path) -> None:
    path = image(tmp_path / "i", hashed=True, salt=b"their own salt")
    assert any("--verity-params" in problem for problem in inspect(path).problems)
    salt = b"their own salt".hex()
    root = inspect(path, hash_check.Claim(root_hash="", salt=b"their own salt")).hash_tree
    assert root is not None
    params = (
        f"root_hash={root.root_hash},salt={salt},data_blocks={root.blocks},data_block_size=4096,hash_block_size=4096"
    )
    assert inspect(path, hash_check.parse_params(params)).problems == ()
    (tmp_path / "manifest.json").write_text(json.dumps({"outputs": {"i": {"verity": {"params": params}}}}))
    assert inspect(path).problems == ()


def test_a_root_hash_for_an_image_without_a_tree_is_said(tmp_path: Path) -> None:
    found = inspect(image(tmp_path / "i"), hash_check.Claim(root_hash="0" * 64))
    assert any("no partition 2" in problem for problem in found.problems)


@pytest.mark.parametrize(
    "text", ["", "root_hash=xyz", "root_hash=" + "0" * 64 + ",salt=zz", "root_hash=" + "0" * 64 + ",data_blocks=-1",
             "root_hash=" + "0" * 64 + ",data_block_size=512"],
    ids=["nothing", "no hash", "no salt", "no number", "other blocks"],
)  # fmt: skip
def test_parameters_that_cannot_be_are_refused(text: str) -> None:
    with pytest.raises(SpecError):
        hash_check.parse_params(text)


# Other files


def test_an_initramfs_is_described(tmp_path: Path) -> None:
    data = gzip.compress(b"".join(initrd.archive(Tree(FILES))))
    (tmp_path / "initrd").write_bytes(data)
    found = inspect(tmp_path / "initrd")
    assert found.problems == ()
    assert found.facts["initramfs"]["compression"] == "gzip"
    assert found.facts["initramfs"]["/init"] == "'/sbin/init', 300000 bytes"


@pytest.mark.parametrize(
    ("entry", "sentence"),
    [(None, "there is no /init"), (regular(b""), "cannot be executed"), (symlink("/init"), "leads nowhere")],
    ids=["none", "not executable", "a loop"],
)
def test_an_initramfs_that_starts_nothing_is_said(entry: Entry | None, sentence: str, tmp_path: Path) -> None:
    entries = {path: each for path, each in FILES.items() if path != "/init"} | ({"/init": entry} if entry else {})
    (tmp_path / "initrd").write_bytes(b"".join(initrd.archive(Tree(entries))))
    assert any(sentence in problem for problem in inspect(tmp_path / "initrd").problems)


def test_a_qcow2_image_is_said_to_be_one(tmp_path: Path) -> None:
    argv = [command.find("qemu-img"), "create", "-q", "-f", "qcow2", str(tmp_path / "q"), "100M"]
    subprocess.run(argv, check=True)
    found = inspect(tmp_path / "q")
    assert found.kind == "qcow2 image"
    assert "104857600 bytes" in found.facts["qcow2"]["virtual size"]
    assert "qemu-img convert" in found.notes[0]


QCOW2_DAMAGE = {
    "a cut in the header": (lambda data: data[:71], "cut off in its header"),
    "a cut after the header": (lambda data: data[:104], "its first table goes beyond the end, 104"),
    "a cut in the data": (lambda data: data[:-65536], "and the file ends at"),
    "a cut in a table": (lambda data: data[: 4 * 65536 + 100], "table 0 begins at 262144"),
    "a later version": (lambda data: patched(data, 4, b"\0\0\0\x09"), "unknown version 9"),
    "another file": (lambda data: patched(data, 8, struct.pack(">QI", 200, 3)), "without another file"),
    "clusters of 1 byte": (lambda data: patched(data, 20, bytes(4)), "its clusters have 2^0 bytes"),
    "no size": (lambda data: patched(data, 24, bytes(8)), "the disk has 0 bytes"),
    "encryption": (lambda data: patched(data, 32, b"\0\0\0\1"), "it is encrypted"),
    "a short table": (lambda data: patched(data, 36, bytes(4)), "its first table has 0 entries, and the disk takes 1"),
    "a table elsewhere": (lambda data: patched(data, 40, b"\xff" * 8), "its first table goes beyond the end"),
    "counts elsewhere": (lambda data: patched(data, 48, b"\xff" * 8), "its table of reference counts goes beyond"),
    "an entry that leads nowhere": (
        lambda data: patched(data, 3 * 65536, b"\x80\0\0\0\0\0\2\0"),
        "no table of its own is",
    ),
}


def patched(data: bytes, at: int, new: bytes) -> bytes:
    return data[:at] + new + data[at + len(new) :]


@pytest.mark.parametrize(("damage", "sentence"), QCOW2_DAMAGE.values(), ids=QCOW2_DAMAGE)
def test_a_damaged_qcow2_image_is_said(damage: Callable[[bytes], bytes], sentence: str, tmp_path: Path) -> None:
    disk = image(tmp_path / "i", header=False)
    command.run("qemu-img", "convert", "-O", "qcow2", str(disk), str(tmp_path / "q"))
    assert inspect(tmp_path / "q").problems == ()
    (tmp_path / "q").write_bytes(damage((tmp_path / "q").read_bytes()))
    try:
        problems = inspect(tmp_path / "q").problems
    except InputError as problem:
        problems = (str(problem),)
    assert any(sentence in problem for problem in problems), problems


@pytest.mark.parametrize("words", [(), ("-c",), ("-o", "cluster_size=4096"), ("-o", "compat=0.10")], ids=str)
def test_every_kind_of_qcow2_that_qemu_img_writes_is_whole(words: tuple[str, ...], tmp_path: Path) -> None:
    disk = image(tmp_path / "i", header=False)
    command.run("qemu-img", "convert", "-O", "qcow2", *words, str(disk), str(tmp_path / "q"))
    assert inspect(tmp_path / "q").problems == ()


@pytest.mark.parametrize("compress", ["lz4", "none"])
def test_what_checks_nothing_itself_is_held_against_the_manifest_beside_it(compress: str, tmp_path: Path) -> None:
    """An initramfs without a checksum: only its digest says that a byte of a file is another."""
    rootfs = Rootfs(tree=Tree(FILES | {"/init": FILES["/sbin/init"]}), init="/init", epoch=0)
    made = initrd.build_initrd(rootfs, tmp_path / "i", compress=compress)
    about = {"size": made.file.size, "sha256": made.file.sha256}
    (tmp_path / "manifest.json").write_text(json.dumps({"outputs": {"i": about}}))
    assert inspect(tmp_path / "i").problems == ()
    changed(tmp_path / "i", made.file.size // 2, b"\xaa\x55")
    assert any("not what the manifest.json beside it" in problem for problem in inspect(tmp_path / "i").problems)
    (tmp_path / "manifest.json").write_text('{"outputs": {"i": ["of", "somebody", "else"]}}')
    assert inspect(tmp_path / "i").problems == ()


def test_both_kernels_say_their_release(kernel: Kernel, tmp_path: Path) -> None:
    for file, form in ((kernel.vmlinux, "vmlinux"), (kernel.vmlinuz, "bzImage")):
        found = inspect(file.path)
        assert found.problems == ()
        assert found.facts["kernel"]["format"].startswith(form)
        assert found.facts["kernel"]["release"] == kernel.release
        assert found.facts["kernel"]["architecture"] == "x86_64"
        data = file.path.read_bytes()
        (tmp_path / "cut").write_bytes(data[: len(data) * 3 // 4])
        assert inspect(tmp_path / "cut").problems, form


def test_an_arm64_kernel_is_known_by_its_header(tmp_path: Path) -> None:
    head = struct.pack("<IIQQQ", 0, 0, 0, 1 << 20, 0).ljust(56, b"\0") + b"ARM\x64"
    (tmp_path / "Image").write_bytes(head.ljust(5000, b"\0") + b"Linux version 6.12.1 (x@y) ")
    found = inspect(tmp_path / "Image")
    assert (found.facts["kernel"]["architecture"], found.facts["kernel"]["release"]) == ("aarch64", "6.12.1")


@pytest.mark.parametrize("data", [b"", b"text", bytes(100_000), b"\x7fELF" + bytes(5000), b"\x1f\x8b\x08no"], ids=len)
def test_what_nobody_knows_is_one_line(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(data)
    with pytest.raises(InputError) as caught:
        inspect(tmp_path / "file")
    assert "\n" not in str(caught.value)


# The command


def test_the_exit_code_says_whether_it_is_whole(tmp_path: Path) -> None:
    path = image(tmp_path / "i")
    whole = osbuilder("inspect", str(path))
    assert (whole.returncode, whole.stderr) == (0, "")
    assert "seen as" in whole.stdout
    changed(path, 4096 + 4088, b"\0\0")
    damaged = osbuilder("inspect", str(path), "--json")
    assert damaged.returncode == 3
    assert json.loads(damaged.stdout)["problems"]
    assert "Traceback" not in damaged.stderr


def test_an_unknown_file_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"text")
    done = osbuilder("inspect", str(tmp_path / "file"))
    assert done.returncode == 3
    assert done.stderr.count("\n") == 1
    assert osbuilder("inspect", str(tmp_path / "missing")).returncode == 3
    assert osbuilder("inspect", str(tmp_path)).returncode == 3


def test_two_ways_to_say_a_root_hash_are_one_too_many(tmp_path: Path) -> None:
    done = osbuilder("inspect", str(image(tmp_path / "i")), "--root-hash", "0" * 64, "--verity-params", "x")
    assert done.returncode == 2


# Damage


@pytest.fixture(scope="module", params=WRITERS)
def victim(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return image(tmp_path_factory.mktemp("victim") / "i", request.param, hashed=True)


PLACES = [(0, 8192), (4096, 4096), (2 * MIB, 512), (3 * MIB, 65536), (0, 4 * MIB)]


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    flips=st.lists(
        st.tuples(st.sampled_from(PLACES), st.integers(0), st.integers(1, 255)), min_size=1, max_size=6
    )
)  # fmt: skip
def test_no_flipped_byte_makes_it_crash_or_goes_by(flips: list[tuple[tuple[int, int], int, int]], victim: Path) -> None:
    """With a hash tree every byte of the partition is covered, and the nd_pfn superblock by its checksum."""
    wrong: dict[int, int] = {}
    for (start, size), where, bits in flips:
        at = start + where % size
        wrong[at] = wrong.get(at, 0) ^ bits
    flip(victim, wrong)
    covered = any(bits and (4096 <= at < 8192 or at >= 3 * MIB) for at, bits in wrong.items())
    try:
        found = inspect(victim)
        list(drawing(found))
        json.dumps(found.to_dict())
        assert found.problems or not covered
    except InputError as problem:
        assert "\n" not in str(problem)  # noqa: PT017
    finally:
        flip(victim, wrong)


def flip(path: Path, wrong: dict[int, int]) -> None:
    with path.open("r+b") as file:
        for at, bits in wrong.items():
            file.seek(at)
            (old,) = file.read(1)
            file.seek(at)
            file.write(bytes([old ^ bits]))


@pytest.mark.parametrize(
    "size", [1, 511, 512, 4096, 8191, 8192, 2 * MIB, 2 * MIB + 512, 3 * MIB, 3 * MIB + 1100, 3 * MIB + 5000, 4 * MIB]
)
def test_a_cut_is_never_whole(size: int, victim: Path, tmp_path: Path) -> None:
    (tmp_path / "cut").write_bytes(victim.read_bytes()[:size])
    try:
        found = inspect(tmp_path / "cut")
    except InputError:
        return
    assert found.problems
    list(drawing(found))
