"""What the smoke test's checks see in guests that boot, and in such as are wrong in one way."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest
from prometheus_client.parser import text_string_to_metric_families

from osbuild import results, smoke, workload
from osbuild.agent_walk.guest import parse_metrics
from osbuild.artifacts import DiskImage, File, Initrd, Kernel, Rootfs
from osbuild.checks import GUESTS, clock, container, dax, entropy, guests, metrics, verity
from osbuild.checks import share as share_checks
from osbuild.checks.base import longest
from osbuild.errors import HostError
from osbuild.filesystem import FILESYSTEMS
from osbuild.findings import Unclear, Wrong
from osbuild.nvdimm_image import FILESYSTEM_START, MIB, build_nvdimm_image
from osbuild.report import Cause, Check, Report, SmokeReport, Verdict
from osbuild.runtime.base import Machine
from osbuild.tree import Sparse, Spool, Tree, directory, regular
from tests.agent_program import BUSYBOX
from tests.boot_fixtures import boot_kernel, boot_rootfs, compile_init, guests_alive
from tests.fake_agent import METRICS

__all__ = ["boot_kernel", "boot_rootfs", "compile_init"]  # fixtures

SECONDS: Final = 240.0
LARGE: Final = "/usr/large"
SIZE: Final = 5 << 20  # two huge pages and a half
HOLES: Final = 64 << 20


@pytest.fixture(scope="module")
def rootfs(boot_rootfs: Rootfs) -> Rootfs:
    """The agent, a large file, one that is larger and has holes, and small ones."""
    draft = boot_rootfs.tree.edit()
    data = hashlib.shake_128(b"large").digest(SIZE)
    draft.put(LARGE, regular(data))
    draft.link("/usr/linked", LARGE)
    spool = Spool()
    spool.append(data[: 64 << 10])
    draft.put("/usr/holes", regular(Sparse(spool, HOLES, ((0, 0, 64 << 10),))))
    for number in range(20):
        draft.put(f"/usr/small-{number}", regular(b"%d" % number * 3000))
    return dataclasses.replace(boot_rootfs, tree=draft.tree())


def make_image(rootfs: Rootfs, path: Path, *, kind: str = "ext4", off: int = 0, **more: Any) -> DiskImage:
    filesystem = FILESYSTEMS[kind]
    plan = filesystem.plan(rootfs.tree, start=FILESYSTEM_START + off, epoch=0)
    return build_nvdimm_image(filesystem, plan, path, name=kind, **more)


Boot = Callable[..., SmokeReport]


@pytest.fixture
def boot(boot_kernel: Kernel, tmp_path: Path) -> Boot:
    def run(root: DiskImage, *checks: str, words: tuple[str, ...] = (), **more: Any) -> SmokeReport:
        machine = Machine(kernel=boot_kernel, root=root, accel="tcg", words=words)
        return smoke.run(machine, tmp_path / "work", seconds=SECONDS, checks=checks, **more)

    return run


def check(report: SmokeReport, name: str) -> Check:
    (found,) = [check for check in report.checks if check.name == name]
    return found


# Guests


@pytest.mark.boot
@pytest.mark.parametrize("kind", ["ext4", "erofs"])
def test_a_root_that_is_mapped_is_seen_to_be(kind: str, rootfs: Rootfs, boot: Boot, tmp_path: Path) -> None:
    root = make_image(rootfs, tmp_path / "root.img", kind=kind)
    report = boot(root, "dax", "entropy", "clock", "metrics", "poweroff")
    assert report.verdict is Verdict.passed, report.checks
    facts = check(report, "dax").facts
    assert facts["map"] == [{"path": LARGE, "bytes": 4 << 20, "faults": 2, "huge_bytes": 4 << 20}]
    assert facts["read"]["files"] >= 22
    assert SIZE + 20 * 3000 <= facts["read"]["bytes"] < 2 * SIZE, "no second name, and no holes"
    assert facts["read"]["cached_after_kib"] - facts["read"]["cached_before_kib"] < 64
    assert facts["kernel"] == "pmem0"
    assert all("Operation not permitted" in word for word in facts["denied"])
    assert len(facts["denied"]) == 2, "the NVDIMM, and its partition"
    assert "sha256" in check(report, "dax").detail
    assert check(report, "entropy").facts["source"] == "virtio_rng.0"
    assert check(report, "metrics").facts["samples"] > 100


@pytest.mark.boot
def test_the_usual_checks_look_at_one_large_file_only(rootfs: Rootfs, boot: Boot, tmp_path: Path) -> None:
    report = boot(make_image(rootfs, tmp_path / "root.img"))
    assert report.verdict is Verdict.passed, report.checks
    facts = check(report, "dax").facts
    assert facts["map"][0]["huge_bytes"] == 4 << 20
    assert (facts["read"]["files"], facts["read"]["bytes"]) == (1, SIZE)


@pytest.mark.slow
@pytest.mark.boot
def test_a_log_that_is_nothing_but_holes_is_not_read_on_erofs(rootfs: Rootfs, boot: Boot, tmp_path: Path) -> None:
    """Two hundred MiB of them, for what would take an hour with as many GiB: erofs gives a guest zeros for each."""
    draft = rootfs.tree.edit()
    spool = Spool()
    spool.append(b"last")
    draft.put("/usr/lastlog", regular(Sparse(spool, 200 << 20, ((0, 0, 4),))))
    root = make_image(dataclasses.replace(rootfs, tree=draft.tree()), tmp_path / "root.img", kind="erofs")
    found = check(boot(root, "dax"), "dax")
    assert (found.verdict, found.facts["read"]["over"]) == (Verdict.passed, 1), found
    assert "(1 that are mostly holes passed over)" in found.detail


@pytest.mark.boot
def test_guests_that_share_nothing_say_so(boot_kernel: Kernel, busybox_initrd: Initrd, tmp_path: Path) -> None:
    machine = Machine(kernel=boot_kernel, root=busybox_initrd, accel="tcg")
    report = smoke.run(machine, tmp_path, seconds=SECONDS, checks=("nonce",), guests=2)
    found = check(report, "guests")
    assert (found.verdict, found.detail) == (Verdict.skipped, "only an NVDIMM that is mapped is shared by guests"), (
        report
    )


@pytest.mark.slow
@pytest.mark.boot
def test_a_large_file_may_have_any_name(rootfs: Rootfs, boot: Boot, tmp_path: Path) -> None:
    draft = rootfs.tree.edit()
    odd = "/usr/\udcff\n\u2028\x1b[31m"
    draft.put(odd, regular(bytes(range(256)) * (6 << 12)))
    report = boot(make_image(dataclasses.replace(rootfs, tree=draft.tree()), tmp_path / "root.img"))
    assert report.verdict is Verdict.passed, report.checks
    facts = check(report, "dax").facts
    assert (facts["map"][0]["path"], facts["map"][0]["huge_bytes"]) == (odd, 6 << 20)
    assert r"/usr/\udcff\n\u2028\x1b[31m" in check(report, "dax").detail
    Report(boots=(report,)).write(tmp_path / "report")


@pytest.mark.boot
def test_files_beside_the_boundaries_of_huge_pages_are_found(rootfs: Rootfs, boot: Boot, tmp_path: Path) -> None:
    """Its writer believed that the filesystem starts elsewhere: everything works, and takes 512 times the faults."""
    report = boot(make_image(rootfs, tmp_path / "root.img", off=MIB), "dax")
    found = check(report, "dax")
    assert found.verdict is Verdict.failed
    assert found.detail == f"0 of 4096 KiB of {LARGE} are mapped by huge pages, with 1024 faults"


@pytest.mark.boot
def test_a_root_that_is_not_mapped_is_found_by_its_mount(rootfs: Rootfs, boot: Boot, tmp_path: Path) -> None:
    image = make_image(rootfs, tmp_path / "root.img")
    words = tuple("rootflags=data=ordered" if word.startswith("rootflags=") else word for word in image.words)
    report = boot(dataclasses.replace(image, words=words), "dax")
    assert (check(report, "dax").verdict, report.verdict) == (Verdict.failed, Verdict.failed)
    assert "mounted without DAX" in check(report, "dax").detail


@pytest.mark.boot
def test_an_image_that_is_a_mebibyte_short_does_not_pass(rootfs: Rootfs, boot: Boot, tmp_path: Path) -> None:
    image = make_image(rootfs, tmp_path / "root.img")
    with image.file.path.open("r+b") as file:
        file.truncate(image.file.size - MIB)
    report = boot(dataclasses.replace(image, file=dataclasses.replace(image.file, size=image.file.size - MIB)), "dax")
    assert report.verdict is Verdict.failed
    assert check(report, "dax").verdict is Verdict.unknown


@pytest.mark.slow
@pytest.mark.boot
def test_a_guest_without_the_machines_randomness_is_found(rootfs: Rootfs, boot: Boot, tmp_path: Path) -> None:
    image = make_image(rootfs, tmp_path / "root.img")
    report = boot(image, "entropy", words=("initcall_blacklist=virtio_rng_driver_init",))
    assert check(report, "entropy").verdict is Verdict.failed
    assert "own is 'none'" in check(report, "entropy").detail


@pytest.mark.boot
def test_one_flipped_byte_keeps_a_verified_guest_from_booting(rootfs: Rootfs, boot: Boot, tmp_path: Path) -> None:
    image = make_image(rootfs, tmp_path / "root.img", hashed=True)
    report = boot(image.through_verity(), "verity")
    found = check(report, "verity")
    assert found.verdict is Verdict.passed, report
    assert found.facts["flipped"]["verdict"] == "failed"
    assert "verity" in found.facts["flipped"]["reason"]
    assert not (tmp_path / "work" / "flipped.img").exists()
    assert (tmp_path / "work" / "flipped" / "console.log").stat().st_size > 1000
    assert File.of(image.file.path) == image.file, "the user's own is as it was"


@pytest.mark.boot
@pytest.mark.parametrize("kind", ["ext4", "erofs"])
def test_a_flipped_byte_that_is_read_after_the_boot_is_an_error_of_reading_and_named(
    kind: str, rootfs: Rootfs, boot: Boot, tmp_path: Path
) -> None:
    """The guest boots: nobody has read that block yet. Who reads it gets EIO, and no byte that is another."""
    if not BUSYBOX.exists():
        pytest.skip("a static busybox is not installed")
    draft = rootfs.tree.edit()
    draft.put("/bin/cat", regular(BUSYBOX.read_bytes(), 0o755))
    reads = {"args": ["/bin/cat", LARGE], "env": ["PATH=/bin"], "cwd": "/", "user": {"uid": 0, "gid": 0}}
    draft.put(workload.PATH, regular(json.dumps({"process": reads}).encode()))
    hashed = dataclasses.replace(rootfs, tree=draft.tree())
    image = make_image(hashed, tmp_path / "root.img", kind=kind, hashed=True)
    middle = hashlib.shake_128(b"large").digest(SIZE)[3 << 20 :][:64]
    data = bytearray(image.file.path.read_bytes())
    assert data.count(middle) == 1
    data[data.index(middle)] ^= 1
    image.file.path.write_bytes(data)
    report = boot(image.through_verity(), "container")
    assert check(report, "agent.check").verdict is Verdict.passed, "it boots"
    assert "Input/output error" in check(report, "container").detail
    assert report.verdict is Verdict.failed
    assert report.cause is not None
    assert (report.cause.name, report.cause.certain) == ("verity", True)
    assert "is corrupted" in report.cause.line


@pytest.mark.slow
@pytest.mark.boot
def test_a_root_that_nobody_verifies_boots_with_a_flipped_byte_and_is_found(
    rootfs: Rootfs, boot: Boot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that says it is verified, and is not."""
    image = make_image(rootfs, tmp_path / "root.img", hashed=True).as_disk()
    monkeypatch.setattr(DiskImage, "verified", property(lambda self: True))
    monkeypatch.setattr(verity, "device", lambda session: "")
    found = check(boot(image, "verity"), "verity")
    assert (found.verdict, found.detail) == (Verdict.failed, "a guest boots although a byte of its image is another")


@pytest.mark.slow
@pytest.mark.boot
def test_two_guests_of_one_image_have_it_in_memory_once(rootfs: Rootfs, boot: Boot, tmp_path: Path) -> None:
    image = make_image(rootfs, tmp_path / "root.img")
    found = check(boot(image, "guests", guests=2), "guests")
    assert found.verdict is Verdict.passed, found
    assert found.facts["guests"] == 2
    assert SIZE >> 10 < found.facts["pss_kib"] < found.facts["image_kib"] * 1.05
    assert found.facts["rss_kib"] > found.facts["pss_kib"] * 1.6
    assert len(list((tmp_path / "work").glob("guest-*"))) == 1


@pytest.mark.boot
@pytest.mark.slow
def test_eight_guests_of_one_image_have_it_in_memory_once(rootfs: Rootfs, boot: Boot, tmp_path: Path) -> None:
    image = make_image(rootfs, tmp_path / "root.img")
    found = check(boot(image, "guests", guests=8), "guests")
    assert found.verdict is Verdict.passed, found
    assert found.facts["guests"] == 8
    assert len(found.facts["each"]) == 8
    assert SIZE >> 10 < found.facts["pss_kib"] < found.facts["image_kib"] * 1.05
    assert found.facts["rss_kib"] > found.facts["pss_kib"] * 6
    assert guests_alive(tmp_path) == []


@pytest.mark.slow
@pytest.mark.boot
def test_two_guests_with_copies_of_an_image_have_it_twice(
    rootfs: Rootfs, boot: Boot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = make_image(rootfs, tmp_path / "root.img")
    copy = dataclasses.replace(image, file=dataclasses.replace(image.file, path=tmp_path / "copy.img"))
    copy.file.path.write_bytes(image.file.path.read_bytes())
    same = guests.machines
    monkeypatch.setattr(
        guests, "machines", lambda session: [dataclasses.replace(one, root=copy) for one in same(session)]
    )
    found = check(boot(image, "guests", guests=2), "guests")
    assert (found.verdict, found.facts["guests"]) == (Verdict.failed, 2)
    assert "KiB of memory for an image of which each sees" in found.detail


# Decisions


@pytest.mark.parametrize(("roots", "asked"), [("image initrd", {"image"}), ("initrd", {"initrd"})])
def test_guests_are_those_of_the_image_or_of_what_there_is(
    roots: str, asked: set[str], small_image: DiskImage, tmp_path: Path
) -> None:
    initrd = Initrd(file=File.of(small_image.file.path), compression="none", unpacked=1)
    known: dict[str, DiskImage | Initrd] = {"image": small_image, "initrd": initrd}
    found = share_checks((GUESTS,), {name: known[name] for name in roots.split()})
    assert {name for name, names in found.items() if GUESTS in names} == asked


SMAPS = """\
7f0000000000-7f0000a00000 r--s 00000000 08:01 4711                       /a/root image.img
Size:              10240 kB
Rss:                8000 kB
Pss:                4000 kB
Pss_Dirty:             0 kB
VmFlags: rd mr me ms sd
7f0001000000-7f0001a00000 rw-p 00000000 00:00 0
Rss:                 500 kB
Pss:                 500 kB
7f0002000000-7f0002a00000 r--s 00a00000 08:01 4711                       /a/root image.img
Rss:                 200 kB
Pss:                 100 kB
7f0003000000-7f0003a00000 r--s 00000000 08:01 4712                       /a/root image.img.other
Rss:                  77 kB
Pss:                  77 kB
"""


def test_the_mappings_of_one_file_are_summed() -> None:
    assert guests.mapped(SMAPS, "/a/root image.img") == {"Pss": 4100, "Rss": 8200}
    assert guests.mapped(SMAPS, "/a/root") == {"Pss": 0, "Rss": 0}


@pytest.mark.parametrize(
    ("pss", "rss", "kind"),
    [
        ([5000, 5000], [10000, 10000], None),
        ([1300] * 8, [10000] * 8, None),
        ([1500] * 8, [10000] * 8, Wrong),
        ([10000, 10000], [10000, 10000], Wrong),
        ([5000, 0], [10000, 100], Unclear),
    ],
)
def test_what_guests_have_together_may_not_grow_with_them(
    pss: list[int], rss: list[int], kind: type[Exception] | None
) -> None:
    shares = [guests.Share(pss_kib=one, rss_kib=other, read_kib=9000) for one, other in zip(pss, rss, strict=True)]
    if kind is None:
        assert "between them" in guests.judge(shares, 10240)
        return
    with pytest.raises(kind):
        guests.judge(shares, 10240)


@pytest.mark.parametrize(
    ("mounts", "options"),
    [
        ("/dev/root / ext4 ro,dax=always 0 0\nproc /proc proc rw 0 0\n", ["ro", "dax=always"]),
        ("rootfs / rootfs rw 0 0\n/dev/pmem0p1 / erofs ro,dax=never 0 0\n", ["ro", "dax=never"]),
    ],
)
def test_the_last_mount_at_the_root_counts(mounts: str, options: list[str]) -> None:
    assert dax.mount_options(mounts) == options


def test_mounts_without_a_root_are_unclear() -> None:
    with pytest.raises(Unclear):
        dax.mount_options("proc /proc proc rw 0 0\nbroken\n")


@pytest.mark.parametrize(
    ("options", "console", "wrong"),
    [
        (["ro", "dax"], "", ""),
        (["ro", "dax=always"], "[    1.000000] EXT4-fs (pmem0p1): mounted filesystem", ""),
        (["ro", "dax=never"], "", "mounted without DAX"),
        (["ro"], "", "mounted without DAX"),
        (
            ["ro", "dax=always"],
            "[    0.900000] erofs: (device pmem0p1): DAX unsupported by block device. Turning off DAX.",
            "turned DAX off: erofs",
        ),
        (["ro", "dax"], "[    0.900000] pmem0p1: error: unaligned partition for dax", "turned DAX off: pmem0p1"),
    ],
)
def test_the_mount_and_the_kernels_word_decide(options: list[str], console: str, wrong: str) -> None:
    if not wrong:
        dax.judge_mount(options, console)
        return
    with pytest.raises(Wrong, match=wrong):
        dax.judge_mount(options, console)


@pytest.mark.parametrize(
    ("huge", "faults", "kind"),
    [
        (4 << 20, 2, None),
        (2 << 20, 513, None),
        (0, 1024, Wrong),
        (-1, 2, None),
        (-1, 4, None),
        (-1, 33, Wrong),
        (-1, 513, Wrong),
        (-1, 1024, Wrong),
    ],
)
def test_some_of_a_mapping_must_be_huge(huge: int, faults: int, kind: type[Exception] | None) -> None:
    in_use = {"path": "/in/use", "bytes": 4 << 20, "huge_bytes": min(huge, 0), "faults": 1024}
    found = [in_use, {"path": "/f", "bytes": 4 << 20, "huge_bytes": huge, "faults": faults}]
    if kind is None:
        said = dax.judge_map(found)
        assert said.startswith(f"{(huge if huge > 0 else 4 << 20) >> 21} ")
        assert f"with {faults} faults" in said
        assert ("PAGEMAP_SCAN not asked" in said) == (huge < 0)
        return
    with pytest.raises(kind):
        dax.judge_map(found)


def test_one_huge_page_of_many_shows_little() -> None:
    best = {"path": "/best", "bytes": 16 << 20, "huge_bytes": 8 << 20, "faults": 2052}
    few = {"path": "/few", "bytes": 16 << 20, "huge_bytes": 6 << 20, "faults": 3000}
    with pytest.raises(Unclear, match="only 3 of 8 × 2 MiB of /few"):
        dax.judge_map([few])
    assert dax.judge_map([few, best]).startswith("4 of 8")


def test_only_on_erofs_is_a_file_too_long_to_be_read(small_image: DiskImage) -> None:
    spool = Spool()
    log, piece = Sparse(spool, 290 << 30, ((0, 0, 4096),)), Sparse(spool, 100 << 20, ((0, 0, 100 << 20),))
    tree = Tree({"/": directory(), "/log": regular(log), "/small": regular(b"x")})
    erofs = dataclasses.replace(small_image, filesystem="erofs")
    assert longest(erofs, tree) == 64 << 20
    assert longest(erofs, Tree({"/": directory(), "/log": regular(log), "/whole": regular(piece)})) == 100 << 20
    assert longest(small_image, tree) > 290 << 30
    assert longest(erofs, None) > 290 << 30


def test_the_file_to_be_mapped_is_the_largest_that_has_all_its_bytes_and_can_be_seen() -> None:
    spool = Spool()
    log = Sparse(spool, 290 << 30, ((0, 0, 4096),))
    torn = Sparse(spool, 9 << 20, ((0, 0, 4 << 20), (5 << 20, 4 << 20, 4 << 20)))
    linked = regular(bytes(6 << 20))
    entries = {
        "/": directory(), "/lastlog": regular(log), "/torn": regular(torn), "/small": regular(b"x"),
        "/dev/a": linked, "/proc/a": regular(bytes(8 << 20)), "/sys/b": regular(bytes(8 << 20)),
        "/whole\udcff": regular(Sparse(spool, 5 << 20, ((0, 0, 5 << 20),))),
    }  # fmt: skip
    assert dax.large_files(Tree(entries)) == ["/whole\udcff"]
    assert dax.large_files(Tree(entries | {"/devices": linked})) == ["/devices", "/whole\udcff"], (
        "by the name that is seen"
    )
    del entries["/whole\udcff"]
    assert dax.large_files(Tree(entries)) == []
    assert dax.large_files(None) == []
    said = dax.judge_map([{"path": "/\udcff\n", "bytes": 2 << 20, "huge_bytes": 2 << 20, "faults": 1}])
    assert "/\\udcff\\n" in said


@pytest.mark.parametrize(
    ("size", "grown", "kind"),
    [
        (100 << 20, 0, None),
        (100 << 20, -500, None),
        (100 << 20, 2000, None),
        (100 << 20, 2200, Wrong),
        (4 << 20, 4096, Wrong),
        (0, 0, Unclear),
    ],
)
def test_a_page_cache_that_grows_by_more_than_a_fiftieth_is_wrong(
    size: int, grown: int, kind: type[Exception] | None
) -> None:
    found = {
        "bytes": size,
        "files": 7,
        "unread": 0,
        "over": 0,
        "cached_before_kib": 1000,
        "cached_after_kib": 1000 + grown,
    }
    if kind is None:
        assert f"{size >> 10} KiB in 7 files" in dax.judge_cache(found)
        return
    with pytest.raises(kind):
        dax.judge_cache(found)


def test_an_image_that_is_another_afterwards_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(b"x" * 5000)
    image = DiskImage(file=File.of(path), filesystem="ext4", dax=True, words=())
    assert "is what it was" in dax.same_bytes(image)
    path.write_bytes(b"x" * 4999 + b"y")
    with pytest.raises(Wrong, match="sha256 was"):
        dax.same_bytes(image)


@pytest.mark.parametrize(
    ("first", "second", "wrong"),
    [
        (bytes(range(256)) * 16, bytes(range(255, -1, -1)) * 16, ""),
        (bytes(range(256)) * 16, bytes(range(256)) * 16, "twice"),
        (bytes(4096), bytes(range(256)) * 16, "only 1 values"),
    ],
)
def test_what_is_not_random_is_seen(first: bytes, second: bytes, wrong: str) -> None:
    if not wrong:
        entropy.judge_bytes(first, second)
        return
    with pytest.raises(Wrong, match=wrong):
        entropy.judge_bytes(first, second)


@pytest.mark.parametrize(("found", "off"), [(99.0, -1.0), (100.0, 0.0), (101.0, 0.0), (103.5, 1.5)])
def test_a_clock_between_two_looks_at_ours_is_not_off(found: float, off: float) -> None:
    assert clock.offset(found, 100.0, 102.0) == off


@pytest.mark.parametrize(("found", "wrong"), [(100.0, ""), (101.0, ""), (99.9, "behind"), (101.2, "ahead")])
def test_a_clock_goes_on_from_what_it_is_told(found: float, wrong: str) -> None:
    if not wrong:
        clock.judge_told(found, 100.0, 101.0)
        return
    with pytest.raises(Wrong, match=wrong):
        clock.judge_told(found, 100.0, 101.0)


def test_metrics_without_a_family_or_with_more_memory_than_there_is_are_wrong() -> None:
    samples = parse_metrics(METRICS)
    theirs = {
        sample.name: sample.value for family in text_string_to_metric_families(METRICS) for sample in family.samples
    }
    assert {name.partition("{")[0]: value for name, value in samples.items()} == theirs
    assert "14 samples" in metrics.judge(samples, 256)
    with pytest.raises(Wrong, match="200 MiB in a guest of 128"):
        metrics.judge(samples, 128)
    del samples['kata_guest_load{item="mem_total"}']
    with pytest.raises(Wrong, match="without kata_guest_load"):
        metrics.judge(samples, 256)


@pytest.mark.parametrize(
    ("verdict", "cause", "wrong"),
    [
        (Verdict.failed, "verity", ""),
        (Verdict.unknown, "verity", ""),
        (Verdict.passed, "", "boots although"),
        (Verdict.failed, "panic", "does not say that verity"),
        (Verdict.unknown, "", "does not say that verity"),
    ],
)
def test_only_a_guest_that_says_verity_has_noticed_a_flipped_byte(
    verdict: Verdict, cause: str, wrong: str, report_of: Callable[..., SmokeReport]
) -> None:
    report = report_of(verdict, Cause(name=cause, sentence="") if cause else None)
    if not wrong:
        assert "does not boot" in verity.judge(report)
        return
    with pytest.raises(Wrong, match=wrong):
        verity.judge(report)


def test_only_a_copy_that_fails_asks_for_room(small_image: DiskImage, tmp_path: Path) -> None:
    image, copy = small_image, tmp_path / "copy"
    with pytest.raises(FileNotFoundError, match="qemu"), verity.flipped(image, copy):
        raise FileNotFoundError(2, "qemu is not here")
    assert not copy.exists()
    with pytest.raises(HostError, match="cannot copy"), verity.flipped(image, tmp_path / "none" / "copy"):
        pass


@pytest.fixture
def small_image(tmp_path: Path) -> DiskImage:
    tree = Tree({"/": directory(), "/file": regular(b"x")})
    filesystem = FILESYSTEMS["ext4"]
    plan = filesystem.plan(tree, start=FILESYSTEM_START, epoch=0)
    return build_nvdimm_image(filesystem, plan, tmp_path / "root.img", name="ext4")


@pytest.fixture
def report_of(tmp_path: Path) -> Callable[..., SmokeReport]:
    from osbuild.runtime.accel import Accel

    def make(verdict: Verdict, cause: Cause | None) -> SmokeReport:
        return SmokeReport(
            name="x", machine={}, verdict=verdict, reason="r", cause=cause, checks=(), timeline=(), seconds=1.0,
            accel=Accel(name="tcg", reason=""), command=(), console=tmp_path / "c", log=tmp_path / "l",
        )  # fmt: skip

    return make


# The image's own program

WORKLOAD: Final = {
    "process": {
        "args": ["/sbin/init", "--version"], "env": ["PATH=/bin", "A=b c", "UMLAUT=ä"], "cwd": "/var",
        "user": {"uid": 1234, "gid": 2345, "additionalGids": [3456]},
    }
}  # fmt: skip


@pytest.mark.boot
def test_the_images_program_runs_as_the_image_wants(
    rootfs: Rootfs, boot: Boot, compile_init: Callable[[str], bytes], tmp_path: Path
) -> None:
    """Its program is the agent, which says its version and ends; or is not there; or is one that ends badly."""
    draft = rootfs.tree.edit()
    draft.put("/sbin/bad", regular(compile_init("ends badly"), 0o755))
    tried: list[tuple[str, list[str], Verdict, str]] = [
        ("good", ["/sbin/init", "--version"], Verdict.passed, "1234:2345 in /var with 3 variables"),
        ("bad", ["/sbin/bad"], Verdict.unknown, "/sbin/bad ended with 2: usage"),
        ("none", ["/sbin/nothing"], Verdict.failed, "/sbin/nothing"),
    ]
    for name, args, verdict, said in tried:
        text = json.dumps({"process": WORKLOAD["process"] | {"args": args}})
        draft.put(workload.PATH, regular(text.encode()))
        root = make_image(dataclasses.replace(rootfs, tree=draft.tree()), tmp_path / f"{name}.img")
        found = check(boot(root, "container"), "container")
        assert (found.verdict, said in found.detail) == (verdict, True), found
        assert {"A=b c", "PATH=/bin", "UMLAUT=ä"} <= set(found.facts["seen"]["env"])


@pytest.mark.boot
def test_an_image_without_a_program_of_its_own_has_nothing_to_run(rootfs: Rootfs, boot: Boot, tmp_path: Path) -> None:
    found = check(boot(make_image(rootfs, tmp_path / "root.img"), "container"), "container")
    assert (found.verdict, found.detail) == (Verdict.unknown, "the image names nothing to start")


@pytest.mark.parametrize(
    "wrong",
    [{"uid": 0}, {"gid": 0}, {"cwd": "/"}, {"groups": [2345]}, {"env": ["A=b c", "PATH=/bin"]}],
    ids=lambda wrong: next(iter(wrong)),
)
def test_what_an_images_container_lacks_is_wrong(wrong: dict[str, Any]) -> None:
    process = container.described(json.dumps(WORKLOAD))
    seen = {"uid": 1234, "gid": 2345, "groups": [2345, 3456], "cwd": "/var", "env": [*process.env, "MORE=1"]}
    container.judge(seen, process)
    with pytest.raises(Wrong):
        container.judge(seen | wrong, process)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"process": {"args": 7, "user": {}}}', "{" * 10000])
def test_a_description_that_is_damaged_is_wrong(text: str) -> None:
    with pytest.raises(Wrong):
        container.described(text)


def test_what_was_asked_for_is_told_in_the_terminal(
    report_of: Callable[..., SmokeReport], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    checks = (
        Check(name="dax", verdict=Verdict.passed, detail="of the usual ones nobody wants to read"),
        Check(name="guests", verdict=Verdict.passed, detail="8 guests have 161 MiB between them"),
        Check(name="container", verdict=Verdict.skipped, detail="the image names nothing to start"),
    )
    report = dataclasses.replace(report_of(Verdict.passed, None), checks=checks)
    results.print_boots(Report(boots=(report,)), tmp_path)
    shown = capsys.readouterr().out
    assert "x: guests: 8 guests have 161 MiB between them" in shown
    assert "x: container: the image names nothing to start" in shown
    assert "nobody wants to read" not in shown
    assert "2 of 2, 1 skipped" in shown
