"""The words of the command line and of osbuild.toml."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from osbuild import limits as limits_table
from osbuild import options, zstd
from osbuild.errors import SpecError
from osbuild.limits import Limits
from osbuild.options import (
    build_spec,
    disk_spec,
    guest_spec,
    image_of,
    limits,
    merged,
    read_config,
    registry_spec,
    rootfs_spec,
)
from osbuild.spec import DiskSpec

EVERY = """
image = "oci:layout"
platform = "linux/amd64"
arch = "x86_64"
limit = ["entries=5"]
make = "image"
no-smoke = true
locked = true
lock = "ci.lock.json"
fs = "ext4"
align = "128M"
size = "2GiB"
free = 65536
writable = true
no-dax-header = true
verity = true
salt = "c0ffee"
format = "qcow2"
compress = "gzip"

[recipe]
recipe = "debian"
base = "debian:bookworm"
release = "bookworm"
package = ["socat"]
package-mirror = "http://mirror.example/debian"
fresh = true

[rootfs]
init = "systemd"
agent = "kata-static-agent.tar.zst"
slim = true
modules = "lib/modules/6.12"
hooks = "hooks"
policy = "p.rego"
add = ["motd:/etc/motd"]
remove = ["/usr/share/doc"]

[kernel]
with = ["xfs"]
source = "linux.tar.xz"
keyring = "keys.gpg"

[guest]
accel = "tcg"
transport = "serial"
machine = "q35"
attach = "virtio-pmem"
network = "user"
check = ["agent", "root"]
memory = 512
cpus = 2
guests = 3
timeout = 9

[registry]
mirror = ["docker.io=mirror.example", "docker.io=second.example"]
insecure-registry = ["registry:5000"]
authfile = "/etc/auth.json"
offline = true
"""


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "osbuild.toml"
    path.write_text(text)
    return path


def test_a_file_can_say_every_word_there_is(tmp_path: Path) -> None:
    words = dict(read_config(written(tmp_path, EVERY)))
    assert set(words) == {option.name for option in options.OPTIONS} | {"image"}
    assert options.recipe_words(words)["packages"] == ("socat",)
    for option in options.OPTIONS:
        if option.group == "recipe":  # it and an image exclude each other
            del words[option.name]
    del words["writable"]  # it and verity, too
    spec = build_spec(image_of("", words), tmp_path / "out", words)
    assert (spec.image, spec.kinds, spec.smoke, spec.compress) == (f"oci:{tmp_path}/layout", ("image",), False, "gzip")
    assert spec.disk == DiskSpec(
        align=128 << 20, size=2 << 30, free=65536, header=False, verity=True, salt=b"\xc0\xff\xee", format="qcow2"
    )  # fmt: skip
    assert (spec.features, spec.kernel_source) == (("xfs",), str(tmp_path / "linux.tar.xz"))
    assert spec.keyring == tmp_path / "keys.gpg"
    assert spec.lock == tmp_path / "ci.lock.json"
    assert spec.limits.entries == 5
    assert (spec.guest.memory_mib, spec.guest.cpus, spec.guest.accel, spec.guest.seconds) == (512, 2, "tcg", 9.0)
    assert (spec.guest.transport, spec.guest.checks) == ("serial", ("agent", "root"))
    assert (spec.guest.machine, spec.guest.attach) == ("q35", "virtio-pmem")
    assert spec.rootfs.init == "systemd"
    assert spec.rootfs.slim
    assert spec.rootfs.agent == str(tmp_path / "kata-static-agent.tar.zst")
    assert spec.rootfs.modules == tmp_path / "lib/modules/6.12"
    assert (spec.rootfs.add[0].source, spec.rootfs.add[0].target) == (tmp_path / "motd", "/etc/motd")
    assert spec.registry.mirrors == {"docker.io": ("mirror.example", "second.example")}
    assert spec.registry.auth_file == Path("/etc/auth.json")
    assert spec.registry.offline


def test_the_command_line_wins_and_lists_add_up(tmp_path: Path) -> None:
    file = read_config(written(tmp_path, EVERY))
    words = merged(file, {"compress": "none", "remove": ["/var/cache"], "memory": 1024})
    assert words["compress"] == "none"
    assert words["memory"] == 1024
    assert words["remove"] == ["/usr/share/doc", "/var/cache"]
    assert image_of("dir:x", {"image": "oci:y"}) == "dir:x"
    with pytest.raises(SpecError, match="both an image"):
        image_of("dir:x", words)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("colour = 'red'", "'colour' is no word of ours"),
        ("[rootfs]\ninti = 'agent'", "[rootfs] 'inti' is no word of ours"),
        ("[guest]\nfs = 'ext4'", "[guest] 'fs' is no word of ours"),
        ("[rootfs]\nslim = 'yes'", "[rootfs] 'slim' is not true or false"),
        ("[guest]\nmemory = true", "[guest] 'memory' is not a whole number"),
        ("[guest]\nmemory = 1.5", "[guest] 'memory' is not a whole number"),
        ("[guest]\ntimeout = 'long'", "[guest] 'timeout' is not a number"),
        ("[rootfs]\nadd = 'a:/b'", "[rootfs] 'add' is not a list of texts"),
        ("[rootfs]\nadd = [1]", "[rootfs] 'add' is not a list of texts"),
        ("free = 1.5", "'free' is not a size"),
        ("free = true", "'free' is not a size"),
        ("free = -1", "'free': --free: '-1' is no size"),
        ("align = '3M'", "'align': an alignment of 3145728 bytes is no multiple of 2 MiB"),
        ("verity = 'yes'", "'verity' is not true or false"),
        ("format = 'vdi'", "'format': no format 'vdi'"),
        ("salt = 'salt'", "'salt': no salt 'salt'"),
        ("image = 3", "'image' is not text"),
        ("rootfs = 3", "'rootfs' is a table"),
        ("[rootfs]\ninit = 'sysv'", "[rootfs] 'init': no init 'sysv'"),
        ("[rootfs]\nadd = ['motd']", "[rootfs] 'add': nothing can be added by"),
        ("[registry]\nmirror = ['docker.io']", "[registry] 'mirror': no mirror 'docker.io'"),
        ("[guest]\ncpus = 0", "[guest] 'cpus': a guest cannot have 0 processors"),
        ("= 3", "is not TOML"),
        ("x = '\udcff'", "is not TOML"),
    ],
)
def test_a_file_is_refused_with_table_and_word(text: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "osbuild.toml"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(SpecError) as caught:
        read_config(path)
    assert says in str(caught.value)
    assert "osbuild.toml" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("imag = 'oci:x'", "did you mean image?"),
        ("[rootfz]\ninit = 'agent'", "did you mean rootfs?"),
        ("[guest]\nfs = 'ext4'", "it belongs to the top of the file"),
        ("memory = 512", "it belongs into [guest]"),
        ("zzz = 1", "and the tables guest, kernel, recipe, registry, rootfs"),
        ("rootfs = 3", "[rootfs], and its words in lines of their own"),
    ],
)
def test_a_word_that_is_none_is_told_what_was_meant(text: str, hint: str, tmp_path: Path) -> None:
    with pytest.raises(SpecError) as caught:
        read_config(written(tmp_path, text))
    assert hint in caught.value.hint


@pytest.mark.parametrize("transport", ["oci", "dir", "docker-archive"])
def test_an_image_is_relative_to_the_file_that_names_it(transport: str, tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    words = read_config(written(tmp_path / "below", f'image = "{transport}:../x"'))
    assert words["image"] == f"{transport}:{tmp_path}/below/../x"
    for name in ("docker-daemon:debian:12", "docker://debian", "debian:12", "docker-archive:-"):
        assert read_config(written(tmp_path, f'image = "{name}"'))["image"] == name


def test_an_xfs_root_wants_a_kernel_that_knows_it(tmp_path: Path) -> None:
    assert build_spec("oci:x", tmp_path, {"fs": "xfs"}).features == ("xfs",)
    assert build_spec("oci:x", tmp_path, {"fs": "xfs", "with": ["xfs"]}).features == ("xfs",)
    assert build_spec("oci:x", tmp_path, {"fs": "ext4"}).features == ()


def test_recipe_words_want_a_recipe() -> None:
    with pytest.raises(SpecError, match="--release is for a recipe"):
        image_of("oci:x", {"release": "trixie"})


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"no\.toml"):
        read_config(tmp_path / "no.toml")


@pytest.mark.parametrize(
    ("reader", "words"),
    [
        (limits, {"limit": ["entries"]}),
        (limits, {"limit": ["entries=-1"]}),
        (limits, {"limit": ["entries=0"]}),
        (limits, {"limit": ["colour=3"]}),
        (registry_spec, {"mirror": ["docker.io"]}),
        (registry_spec, {"mirror": ["=x"]}),
        (rootfs_spec, {"add": ["x"]}),
        (rootfs_spec, {"add": ["x:relative"]}),
        (rootfs_spec, {"init": "runit"}),
        (lambda words: image_of("", words), {}),
        (lambda words: build_spec("x", Path(), words), {"platform": "windows/amd64"}),
        (lambda words: build_spec("x", Path(), words), {"platform": "linux"}),
        (lambda words: build_spec("x", Path(), words), {"platform": "linux/arm64", "arch": "x86_64"}),
    ],
)
def test_words_that_mean_nothing_are_refused(reader: Any, words: dict[str, Any]) -> None:
    with pytest.raises(SpecError):
        reader(words)


@pytest.mark.parametrize(
    ("text", "says", "hint"),
    [
        ("entry=10", "no limit 'entry'", "did you mean entries?"),
        ("xyz", "no limit 'xyz'", "--limit help lists them"),
        ("entries=many", "--limit entries: 'many' is not a whole number", "entries=NUMBER"),
        ("entries", "--limit entries: '' is not a whole number", "entries=NUMBER"),
        ("entries=0", "'0' is not a whole number from 1 to", "entries=NUMBER"),
        ("image-bytes=9223372036854775808", "from 1 to 9223372036854775807", "image-bytes=NUMBER"),
        ("name-bytes=256", "--limit name-bytes: '256' is not a whole number from 1 to 255", "name-bytes=NUMBER"),
        ("path-bytes=4096", "from 1 to 4095", "path-bytes=NUMBER"),
        ("target-bytes=4096", "from 1 to 4095", "target-bytes=NUMBER"),
        ("xattr-bytes=65537", "from 1 to 65536", "xattr-bytes=NUMBER"),
        ("link-hops=256", "from 1 to 255", "link-hops=NUMBER"),
        ("zstd-window-log=9", "from 10 to 31", "zstd-window-log=NUMBER"),
        ("zstd-window-log=32", "from 10 to 31", "zstd-window-log=NUMBER"),
    ],
)
def test_a_wrong_limit_is_told_what_is_wrong_with_it(text: str, says: str, hint: str) -> None:
    with pytest.raises(SpecError, match=re.escape(says)) as caught:
        limits({"limit": [text]})
    assert hint in caught.value.hint


def test_every_limit_says_of_what_it_is_and_in_which_unit() -> None:
    assert set(limits_table.ABOUT) == {field.name for field in dataclasses.fields(Limits)}
    assert limits_table.rows()[2][:3] == ("entries", "1000000", "entries")
    for name, default, unit, of_what in limits_table.rows():
        assert limits({"limit": [f"{name}={default}"]}) == Limits()
        assert unit
        assert of_what


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Limits)])
def test_every_limit_may_be_the_least_and_the_most_that_it_says(field: str) -> None:
    for number in limits_table.allowed(field):
        found = limits({"limit": [f"{limits_table.option_name(field)}={number}"]})
        assert getattr(found, field) == number
        assert zstd.decompressor(found.zstd_window_log) is not None


def test_a_source_may_hold_a_colon() -> None:
    (addition,) = rootfs_spec({"add": ["a:b:/c"]}).add
    assert (addition.source, addition.target) == (Path("a:b"), "/c")


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("64M", 64 << 20), ("64m", 64 << 20), ("128MiB", 128 << 20), ("2G", 2 << 30), ("1T", 1 << 40),
        ("4096K", 4 << 20), ("4096KiB", 4 << 20), ("8388608", 8 << 20), ("0", 0),
    ],
)  # fmt: skip
def test_sizes_are_read_as_people_write_them(text: str, size: int) -> None:
    assert disk_spec({"free": text}).free == size


@pytest.mark.parametrize("text", ["", "M", "64MB", "1.5G", "-1", "64 M", "0x10", "64MiBi", "1E", "\u0661M", "9" * 16])
def test_what_is_no_size_is_refused_with_examples(text: str) -> None:
    with pytest.raises(SpecError, match="is no size") as caught:
        disk_spec({"size": text})
    assert "64M" in caught.value.hint


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ({"verity": True, "writable": True}, "cannot be written to"),
        ({"fs": "erofs", "writable": True}, "erofs is read-only"),
        ({"fs": "erofs", "free": "1M"}, "erofs is read-only"),
        ({"fs": "erofs", "size": "2G"}, "erofs is read-only"),
        ({"size": "63M"}, "no multiple of its alignment"),
        ({"size": "130M", "align": "128M"}, "no multiple of its alignment"),
        ({"size": "2T"}, "less than 2 TiB"),
        ({"free": "3T"}, "less than 2 TiB"),
        ({"size": "2M"}, "cannot have 2097152 bytes"),
        ({"align": "1M"}, "no multiple of 2 MiB"),
        ({"align": "0"}, "no multiple of 2 MiB"),
        ({"fs": "zfs"}, "no filesystem 'zfs'"),
        ({"format": "vmdk"}, "no format 'vmdk'"),
        ({"salt": "00"}, "--salt is for a hash tree"),
    ],
)
def test_images_that_cannot_be_are_refused_before_anything_is_read(words: dict[str, Any], says: str) -> None:
    with pytest.raises(SpecError, match=says) as caught:
        build_spec("dir:/x", Path(), words)
    assert "\n" not in str(caught.value)


def test_a_layout_of_1_gib_for_arm64_can_be_asked_for() -> None:
    assert disk_spec({"align": "1G"}).align == 1 << 30


def test_who_gives_a_matrix_to_build_is_told_whose_it_is(tmp_path: Path) -> None:
    (tmp_path / "matrix.toml").write_text('[axes]\nimage = ["oci:x"]\n')
    with pytest.raises(SpecError, match="'axes' is no word of ours") as caught:
        read_config(tmp_path / "matrix.toml")
    assert "osbuilder matrix" in caught.value.hint


@pytest.mark.parametrize(
    ("checks", "says", "hint"),
    [
        (("dax,resources",), "no check 'dax,resources'", "--check dax --check resources: one at a time"),
        (("wings", "dax", "horns"), "no check 'wings', 'horns'", "one of agent.check"),
    ],
)
def test_every_check_that_nobody_knows_is_named(checks: tuple[str, ...], says: str, hint: str) -> None:
    with pytest.raises(SpecError, match=f"^{says}$") as caught:
        guest_spec({"check": checks})
    assert caught.value.hint.startswith(hint)
