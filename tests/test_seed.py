"""osbuilder seed: an ISO that other programs read, the same bytes every time, and cloud-init takes what is on it."""

from __future__ import annotations

import gzip
import importlib
import json
import os
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from osbuild.errors import InputError, OsbuilderError, SpecError
from osbuild.seed import HEADERS, SIZE_MAX, make_iso, write_seed
from tests.test_cli import one_line, run

CONFIG = b"#cloud-config\nusers:\n  - name: joe\n    shell: /bin/sh\n"
NETWORK = b"version: 2\nethernets:\n  eth0:\n    addresses: [192.0.2.2/24]\n"
META = b"instance-id: web-1\nlocal-hostname: web\n"

# Debian's cloud-init, by Debian's interpreter: the data source's own code, whose seed directory is an unpacked seed.
READER = """
import json, sys
from cloudinit import helpers
from cloudinit.sources import DataSourceNoCloud
paths = helpers.Paths({"cloud_dir": sys.argv[1], "run_dir": sys.argv[1]})
source = DataSourceNoCloud.DataSourceNoCloud({"datasource": {"NoCloud": {"fs_label": None}}}, None, paths)
took = source._get_data()
print(json.dumps({
    "took": took, "id": source.get_instance_id(), "user": (source.get_userdata_raw() or b"").decode(errors="replace"),
    "network": source.network_config, "metadata": source.metadata,
    "types": [part.get_content_type() for part in source.get_userdata(True).walk() if not part.is_multipart()],
}))
"""


def write(home: Path, user: bytes = CONFIG, meta: bytes | None = None, network: bytes | None = None) -> Path:
    home.mkdir(exist_ok=True)
    files = {}
    for name, data in (("user-data", user), ("meta-data", meta), ("network-config", network)):
        if data is not None:
            files[name] = home / name
            files[name].write_bytes(data)
    write_seed(
        home / "seed.iso", files["user-data"], meta_data=files.get("meta-data"),
        network_config=files.get("network-config"),
    )  # fmt: skip
    return home / "seed.iso"


def need(program: str, package: str) -> str:
    found = shutil.which(program)
    if found is None:
        pytest.skip(f"{program} is not installed: Debian's package {package}")
    return found


def told(*argv: str) -> str:
    done = subprocess.run(
        argv, capture_output=True, text=True, check=False, env=os.environ | {"LC_ALL": "C", "TZ": "UTC"}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# --- other people's readers -----------------------------------------------------------------------------------------


def test_isoinfo_finds_the_volume_and_the_names_both_ways(tmp_path: Path) -> None:
    isoinfo = need("isoinfo", "genisoimage")
    seed = write(tmp_path, meta=META, network=NETWORK)
    about = told(isoinfo, "-d", "-i", str(seed))
    assert "Volume id: cidata\n" in about
    assert "Joliet with UCS level 3 found" in about
    assert "Rock Ridge signatures version 1 found" in about
    for way in ("-R", "-J"):
        assert told(isoinfo, way, "-f", "-i", str(seed)).split() == ["/meta-data", "/network-config", "/user-data"]
        for name, data in (("user-data", CONFIG), ("meta-data", META), ("network-config", NETWORK)):
            found = subprocess.run([isoinfo, way, "-i", str(seed), "-x", f"/{name}"], capture_output=True, check=True)
            assert found.stdout == data
    listing = told(isoinfo, "-R", "-l", "-i", str(seed))
    assert listing.count("-r--r--r--   1    0    0 ") == 3
    assert re.findall(r"([A-Z][a-z]{2} +\d+ +\d{4}) \[", listing) == ["Jan  1 1970"] * 5


def test_bsdtar_and_xorriso_read_it(tmp_path: Path) -> None:
    seed = write(tmp_path, network=NETWORK)
    names = told(need("bsdtar", "libarchive-tools"), "-tf", str(seed)).split()
    assert sorted(names) == [".", "meta-data", "network-config", "user-data"]
    (tmp_path / "out").mkdir()
    done = subprocess.run(
        [need("xorriso", "xorriso"), "-osirrox", "on", "-indev", str(seed), "-extract", "/", str(tmp_path / "out")],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "Volume id    : 'cidata'" in done.stderr
    assert (tmp_path / "out/user-data").read_bytes() == CONFIG
    assert (tmp_path / "out/network-config").read_bytes() == NETWORK


def test_blkid_sees_what_cloud_init_looks_for(tmp_path: Path) -> None:
    # cloud-init asks blkid for disks of TYPE iso9660 with this LABEL.
    blkid = shutil.which("blkid", path=os.environ["PATH"] + ":/usr/sbin:/sbin")
    if blkid is None:
        pytest.skip("blkid is not installed: Debian's package util-linux")
    about = told(blkid, "-p", "-o", "export", str(write(tmp_path)))
    assert "LABEL=cidata\n" in about
    assert "TYPE=iso9660\n" in about


def cloud_init(seed: Path, home: Path) -> dict[str, object]:
    """What Debian's cloud-init makes of a seed."""
    if subprocess.run(["/usr/bin/python3", "-c", "import cloudinit"], capture_output=True, check=False).returncode:
        pytest.skip("cloud-init is not installed: Debian's package of that name")
    target = home / "cloud" / "seed" / "nocloud"
    target.mkdir(parents=True)
    told(need("bsdtar", "libarchive-tools"), "-xf", str(seed), "-C", str(target))
    found: dict[str, object] = json.loads(told("/usr/bin/python3", "-c", READER, str(home / "cloud")))
    return found


def test_cloud_inits_own_data_source_takes_it(tmp_path: Path) -> None:
    found = cloud_init(write(tmp_path, meta=META, network=NETWORK), tmp_path)
    assert found["took"] is True
    assert found["id"] == "web-1"
    assert found["user"] == CONFIG.decode()
    assert found["types"] == ["text/cloud-config"]
    assert found["network"] == {"version": 2, "ethernets": {"eth0": {"addresses": ["192.0.2.2/24"]}}}


def test_cloud_init_takes_the_instance_id_that_was_made(tmp_path: Path) -> None:
    done = write_and_tell(tmp_path)
    assert cloud_init(tmp_path / "seed.iso", tmp_path)["id"] == done


def write_and_tell(home: Path, user: bytes = CONFIG) -> str:
    (home / "user-data").write_bytes(user)
    done = write_seed(home / "seed.iso", home / "user-data")
    assert done.made
    return done.instance_id


# The types of its handlers, for the first lines that we let pass.
TYPES = {
    b"#!/bin/sh\n": "text/x-shellscript", b"#cloud-boothook\n": "text/cloud-boothook",
    b"#include\nfile:///dev/null\n": "", b"#cloud-config\n{}\n": "text/cloud-config",
    b"\n  #CLOUD-CONFIG\n{}\n": "text/cloud-config", gzip.compress(b"#!/bin/sh\n", mtime=0): "text/x-shellscript",
    b"#cloud-config-jsonp\n[]\n": "text/cloud-config-jsonp", b"#part-handler\n": "text/part-handler",
}  # fmt: skip


@pytest.mark.parametrize("user", TYPES, ids=lambda user: repr(user[:20]))
def test_a_first_line_that_is_let_pass_means_something_to_cloud_init(tmp_path: Path, user: bytes) -> None:
    found = cloud_init(write(tmp_path, user), tmp_path)
    assert found["took"] is True
    if TYPES[user]:
        assert found["types"] == [TYPES[user]]


def test_every_first_line_that_is_let_pass_is_one_of_cloud_inits(tmp_path: Path) -> None:
    cloud_init(write(tmp_path), tmp_path)  # or there is none
    code = "from cloudinit.handlers import INCLUSION_TYPES_MAP as known; print(*known, sep='\\n')"
    assert set(HEADERS) <= set(told("/usr/bin/python3", "-c", code).splitlines())


def test_cloud_inits_schema_agrees_about_the_configuration(tmp_path: Path) -> None:
    program = need("cloud-init", "cloud-init")
    (tmp_path / "u").write_bytes(CONFIG)
    assert "Valid cloud-config" in told(program, "schema", "--config-file", str(tmp_path / "u"))


# --- the same bytes -------------------------------------------------------------------------------------------------


def test_the_clock_and_the_time_zone_leave_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = write(tmp_path / "a", network=NETWORK).read_bytes()
    monkeypatch.setenv("TZ", "Asia/Kathmandu")
    time.tzset()
    try:
        monkeypatch.setattr(time, "time", lambda: 2e9)
        assert write(tmp_path / "b", network=NETWORK).read_bytes() == first
    finally:
        monkeypatch.undo()
        time.tzset()


def test_pycdlib_has_its_clock_back_afterwards(tmp_path: Path) -> None:
    write(tmp_path)
    for name in ("dates", "headervd", "pycdlib", "utils"):
        assert vars(importlib.import_module(f"pycdlib.{name}"))["time"] is time


def test_source_date_epoch_is_every_date(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")  # 2023-11-14 22:13:20
    seed = write(tmp_path)
    assert b"2023111422132000\0" in seed.read_bytes()
    listing = told(need("bsdtar", "libarchive-tools"), "-tvf", str(seed))
    assert listing.count("Nov 14  2023") == 3
    assert seed.read_bytes() != make_iso({"user-data": CONFIG}, 0)
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "soon")
    with pytest.raises(SpecError, match="SOURCE_DATE_EPOCH is 'soon'"):
        write(tmp_path)


def test_another_content_is_another_instance(tmp_path: Path) -> None:
    first = write_and_tell(tmp_path)
    assert re.fullmatch("iid-[0-9a-f]{16}", first)
    assert write_and_tell(tmp_path) == first
    assert write_and_tell(tmp_path, CONFIG + b"# more\n") != first


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("user", "meta", "network", "says"),
    [
        (b"users:\n- joe\n", None, None, "begins with 'users:', which cloud-init ignores"),
        (b"\xef\xbb\xbf#cloud-config\n", None, None, "which cloud-init ignores"),
        (b"#cloud-config\na: [1\n", None, None, "line 3 is no YAML"),
        (b"#cloud-config\n- a\n", None, None, "has to be a mapping, and is a list"),
        (b"#cloud-config\na: \xff\n", None, None, "is not UTF-8: byte 17"),
        (b"#cloud-config\na: \0\n", None, None, "has a zero byte at 17"),
        (b"#cloud-config\na: " + b"[" * 100_000, None, None, "is no YAML"),
        (b"#!/bin/sh\r\nid\r\n", None, None, "line ends of Windows"),
        (gzip.compress(b"#!/bin/sh\n", mtime=0)[:-3], None, None, "gzip that was cut off"),
        (b"\x1f\x8bxxxxxxxxxxxxxx", None, None, "is damaged gzip"),
        (gzip.compress(bytes(SIZE_MAX + 1), mtime=0), None, None, "unpacks to more than"),
        (CONFIG, b"local-hostname: web\n", None, "has no instance-id"),
        (CONFIG, b"other:\n  instance-id: x\n", None, "has no instance-id"),
        (CONFIG, b"instance-id:\n", None, "has no instance-id"),
        (CONFIG, b"instance-id\n", None, "has to be a mapping, and is a str"),
        (CONFIG, b"", None, "has to be a mapping, and is empty"),
        (CONFIG, None, b"ethernets: {}\n", "no network configuration of version 1 or 2"),
        (CONFIG, None, b"version: 3\n", "no network configuration of version 1 or 2"),
    ],
)  # fmt: skip
def test_what_cloud_init_would_not_take_is_refused(
    tmp_path: Path, user: bytes, meta: bytes | None, network: bytes | None, says: str
) -> None:
    with pytest.raises(InputError) as caught:
        write(tmp_path, user, meta, network)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "seed.iso").exists()


@pytest.mark.parametrize("network", [b"network:\n  version: 1\n  config: []\n", b"config: disabled\n", NETWORK])
def test_a_network_configuration_may_be_of_either_kind(tmp_path: Path, network: bytes) -> None:
    assert write(tmp_path, network=network).exists()


@pytest.mark.parametrize("meta", [b'{"instance-id": "x-1"}', b"local-hostname: a\ninstance-id: 'x-1' # one\n"])
def test_an_instance_id_is_found_in_json_and_in_quotes(tmp_path: Path, meta: bytes) -> None:
    (tmp_path / "u").write_bytes(CONFIG)
    (tmp_path / "m").write_bytes(meta)
    assert write_seed(tmp_path / "s", tmp_path / "u", meta_data=tmp_path / "m").instance_id == "x-1"


def test_an_empty_user_data_is_taken(tmp_path: Path) -> None:
    assert cloud_init(write(tmp_path, b"", network=NETWORK), tmp_path)["took"] is True


def test_a_file_is_not_replaced_by_what_is_made_from_it(tmp_path: Path) -> None:
    (tmp_path / "u").write_bytes(CONFIG)
    with pytest.raises(SpecError, match="would replace what it is made from"):
        write_seed(tmp_path / "u", tmp_path / "u")
    assert (tmp_path / "u").read_bytes() == CONFIG


def test_without_pyyaml_the_first_line_is_still_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("osbuild.seed._yaml", lambda: None)
    (tmp_path / "u").write_bytes(b"#cloud-config\na: [1\n")
    done = write_seed(tmp_path / "s", tmp_path / "u")
    assert not done.yaml
    assert "PyYAML is not installed" in done.lines()[-1]
    (tmp_path / "u").write_bytes(b"a: 1\n")
    with pytest.raises(OsbuilderError, match="cloud-init ignores"):
        write_seed(tmp_path / "s", tmp_path / "u")


def test_the_command_gets_one_line_and_its_exit_code(tmp_path: Path) -> None:
    (tmp_path / "u").write_bytes(CONFIG)
    for words, code, says in (
        (("seed",), 2, "--user-data"),
        (("seed", "--user-data", "/no/such/file"), 3, "cannot read '/no/such/file': No such file"),
        (("seed", "--user-data", str(tmp_path)), 3, "is not a regular file"),
        (("seed", "--user-data", "u", "-o", "/no/such/x.iso"), 4, "cannot write in '/no/such'"),
    ):
        done = run(*words, cwd=tmp_path)
        assert (done.returncode, done.stdout) == (code, ""), done.stderr
        assert says in one_line(done.stderr)
    done = run("seed", "--user-data", "u", "--json", cwd=tmp_path)
    told = json.loads(done.stdout)
    assert told["volume"] == "cidata"
    assert set(told["files"]) == {"user-data", "meta-data"}
    assert (tmp_path / "seed.iso").stat().st_size == told["size"]


def test_every_header_is_lower_case_and_none_hides_another() -> None:
    for number, header in enumerate(HEADERS):
        assert header == header.lower()
        assert not any(header.startswith(earlier) for earlier in HEADERS[:number])
