"""Guests that systemd starts: units where systemd looks, links that survive, nothing in the way; chrony's clock."""

from __future__ import annotations

import shutil
import stat
import subprocess
from pathlib import Path

import pytest

from osbuild.chrony import LINES, configured
from osbuild.errors import InputError
from osbuild.rootfs import assemble_rootfs
from osbuild.spec import RootfsSpec
from osbuild.tree import Tree
from tests.guest_trees import SYSTEMD, assemble, explained, fake_agent, text
from tests.layer_tools import folder, link, member, opened

ETC = "/etc/systemd/system"
UNITS = "/usr/lib/systemd/system"
DEBIAN = Path.home() / ".cache/osbuilder/images/debian-1"


def test_the_agent_is_a_service_under_the_names_of_kata(tmp_path: Path) -> None:
    rootfs = assemble(tmp_path, *SYSTEMD, init="systemd")
    tree = rootfs.tree
    assert tree["/usr/bin/osbuilder-agent"].mode == stat.S_IFREG | 0o755
    assert "\nExecStart=/usr/bin/osbuilder-agent\n" in text(tree, f"{UNITS}/kata-agent.service")
    # Else containers would have no limits of processors, and one that is out of memory would end the guest.
    assert "\nDelegate=yes\nOOMPolicy=continue\n" in text(tree, f"{UNITS}/kata-agent.service")
    assert "\nAllowIsolate=yes\n" in text(tree, f"{UNITS}/kata-containers.target")
    assert tree[f"{ETC}/basic.target.wants/kata-containers.target"].target == f"{UNITS}/kata-containers.target"
    assert rootfs.words == (
        "systemd.unit=kata-containers.target",
        "systemd.mask=systemd-networkd.service",
        "systemd.mask=systemd-networkd.socket",
    )
    assert rootfs.init == "/sbin/init"


def test_units_go_where_an_image_without_usrmerge_has_its_own(tmp_path: Path) -> None:
    members = (member("lib/systemd/systemd", b"x", mode=0o755), member("lib/systemd/system/basic.target"))
    tree = assemble(tmp_path, *members, init="systemd").tree
    assert tree["/lib/systemd/system/kata-agent.service"].is_file
    assert UNITS not in tree
    assert tree["/sbin/init"].target == tree["/init"].target == "/lib/systemd/systemd"


def test_an_init_that_leads_to_systemd_stays(tmp_path: Path) -> None:
    tree = assemble(tmp_path, *SYSTEMD, link("usr/sbin/init", "../lib/systemd/systemd"), init="systemd").tree
    assert tree["/usr/sbin/init"].target == "../lib/systemd/systemd"
    assert tree["/init"].target == "/usr/lib/systemd/systemd"


def test_an_init_that_leads_elsewhere_is_replaced(tmp_path: Path) -> None:
    tree = assemble(tmp_path, *SYSTEMD, member("usr/sbin/init", b"x", mode=0o755), init="systemd").tree
    assert tree["/usr/sbin/init"].target == "/usr/lib/systemd/systemd"


def test_an_image_without_systemd_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the image has no systemd") as caught:
        assemble(tmp_path, member("sbin/init", b"x", mode=0o755), init="systemd")
    assert "--init agent" in caught.value.hint


def test_masks_and_drop_ins_of_an_image_do_not_stop_the_agent(tmp_path: Path) -> None:
    in_the_way = (
        link("etc/systemd/system/kata-agent.service", "/dev/null"),
        link("etc/systemd/system/kata-containers.target", "/dev/null"),
        link("etc/systemd/system/tmp.mount", "/dev/null"),
        member("usr/local/lib/systemd/system/kata-agent.service", b"[Service]\nExecStart=/bin/false\n"),
        member("etc/systemd/system/kata-agent.service.d/x.conf", b"[Unit]\nConditionPathExists=/no\n"),
        member("usr/lib/systemd/system/kata-.service.d/x.conf", b"[Unit]\nConditionPathExists=/no\n"),
        member("etc/systemd/system/other.service.d/x.conf"),
    )
    tree = assemble(tmp_path, *SYSTEMD, *in_the_way, init="systemd").tree
    about = [path for path in tree if "kata-" in path and "/systemd/system/" in path]
    assert about == [
        f"{ETC}/basic.target.wants/kata-containers.target",
        f"{UNITS}/kata-agent.service",
        f"{UNITS}/kata-containers.target",
    ]
    assert tree[f"{ETC}/tmp.mount"].is_file
    assert f"{ETC}/other.service.d/x.conf" in tree


def test_only_what_an_image_has_of_dbus_and_chrony_is_wanted(tmp_path: Path) -> None:
    units = (
        member("usr/lib/systemd/system/dbus.socket", b"[Socket]\n"),
        member("usr/lib/systemd/system/chrony.service", b"[Service]\n"),
        link("etc/systemd/system/chronyd.service", "/usr/lib/systemd/system/chrony.service"),
    )
    tree = assemble(tmp_path, *SYSTEMD, *units, init="systemd").tree
    above = f"{ETC}/kata-containers.target.wants"
    assert {path: tree[path].target for path in tree if path.startswith(f"{above}/")} == {
        f"{above}/dbus.socket": f"{UNITS}/dbus.socket",
        f"{above}/chrony.service": f"{UNITS}/chrony.service",
    }


# --- tmp.mount and slimming -----------------------------------------------------------------------------------------


def test_tmp_mount_is_the_distributions_where_it_has_one(tmp_path: Path) -> None:
    theirs = member("usr/share/systemd/tmp.mount", b"theirs")
    assert text(assemble(tmp_path / "1", *SYSTEMD, theirs, init="systemd").tree, f"{ETC}/tmp.mount") == "theirs"
    assert "Where=/tmp" in text(assemble(tmp_path / "2", *SYSTEMD, init="systemd").tree, f"{ETC}/tmp.mount")
    there = member("usr/lib/systemd/system/tmp.mount", b"there")
    assert f"{ETC}/tmp.mount" not in assemble(tmp_path / "3", *SYSTEMD, there, init="systemd").tree
    assert f"{ETC}/tmp.mount" not in assemble(tmp_path / "4", *SYSTEMD).tree


def test_slimming_takes_units_and_what_wants_them_and_nothing_else(tmp_path: Path) -> None:
    units = (
        member("usr/lib/systemd/system/systemd-udevd.service", b"x"),
        link("usr/lib/systemd/system/sysinit.target.wants/systemd-udevd.service", "../systemd-udevd.service"),
        link("etc/systemd/system/dbus-org.freedesktop.timesync1.service", f"{UNITS}/systemd-timesyncd.service"),
        member("usr/lib/systemd/system-generators/systemd-getty-generator", b"x"),
        member("usr/lib/systemd/system/systemd-logind.service", b"x"),
        member("usr/share/doc/systemd-udevd.service", b"x"),
    )
    before = assemble(tmp_path / "1", *SYSTEMD, *units).tree
    after = assemble(tmp_path / "2", *SYSTEMD, *units, slim=True).tree
    assert set(before) - set(after) == {
        f"{UNITS}/systemd-udevd.service",
        f"{UNITS}/sysinit.target.wants/systemd-udevd.service",
        "/usr/lib/systemd/system-generators/systemd-getty-generator",
    }


def test_slimming_an_image_without_systemd_says_so(tmp_path: Path) -> None:
    row = explained(tmp_path, folder("etc"), slim=True)["slim"]
    assert (row.applied, row.note) == (False, "there is no systemd in the image")


# --- chrony ---------------------------------------------------------------------------------------------------------

DEBIANS_CONF = b"""# Use Debian vendor zone.
confdir /etc/chrony/conf.d
pool 2.debian.pool.ntp.org iburst
  server ntp.example
peer other
serverstats
makestep 1 3"""
DEBIANS_UNIT = b"""[Unit]
ReadWritePaths=/not/this
[Service]
ExecStart=!/usr/sbin/chronyd $DAEMON_OPTS
ReadWritePaths=/run
ReadWritePaths=-/var/spool
StateDirectory=chrony
"""
ANOTHERS_UNIT = b"""[Service]
ExecStart=/usr/sbin/chronyd -u chrony \\
  $OPTIONS
ReadWritePaths=/run /var/lib/chrony -/var/log
"""


@pytest.mark.parametrize("path", ["etc/chrony/chrony.conf", "etc/chrony.conf"])
def test_chrony_takes_the_hosts_clock_and_no_server(path: str, tmp_path: Path) -> None:
    tree = assemble(tmp_path, member(path, DEBIANS_CONF, mode=0o640)).tree
    assert text(tree, f"/{path}").splitlines() == [
        "# Use Debian vendor zone.",
        "confdir /etc/chrony/conf.d",
        "# pool 2.debian.pool.ntp.org iburst",
        "#   server ntp.example",
        "# peer other",
        "serverstats",
        "makestep 1 3",
        "refclock PHC /dev/ptp0 poll 3 dpoll -2 offset 0",
        "makestep 1 -1",
    ]
    assert tree[f"/{path}"].mode & 0o777 == 0o640


def test_configuring_chrony_twice_changes_nothing() -> None:
    once = configured(DEBIANS_CONF.decode())
    assert configured(once) == once
    assert configured("") == "".join(f"{line}\n" for line in LINES)


def test_chronys_unit_stays_and_a_drop_in_fits_it_to_a_root_that_cannot_be_written(tmp_path: Path) -> None:
    unit = member("usr/lib/systemd/system/chrony.service", DEBIANS_UNIT)
    tree = assemble(tmp_path, *SYSTEMD, member("etc/chrony/chrony.conf", DEBIANS_CONF), unit).tree
    assert text(tree, f"{UNITS}/chrony.service").encode() == DEBIANS_UNIT
    lines = text(tree, f"{ETC}/chrony.service.d/90-osbuilder.conf").splitlines()
    assert "ConditionPathExists=/dev/ptp0" in lines
    assert lines[lines.index("[Service]") :] == [
        "[Service]", "StateDirectory=", "LogsDirectory=", "ReadWritePaths=", "ReadWritePaths=-/run -/var/spool",
    ]  # fmt: skip


def test_chronyd_keeps_its_command_but_for_the_user(tmp_path: Path) -> None:
    unit = member("usr/lib/systemd/system/chronyd.service", ANOTHERS_UNIT)
    tree = assemble(tmp_path, *SYSTEMD, member("etc/chrony.conf"), unit).tree
    lines = text(tree, f"{ETC}/chronyd.service.d/90-osbuilder.conf").splitlines()
    assert [" ".join(line.split()) for line in lines[-3:]] == [
        "ReadWritePaths=-/run -/var/lib/chrony -/var/log", "ExecStart=", "ExecStart=/usr/sbin/chronyd $OPTIONS",
    ]  # fmt: skip


def test_an_image_without_chrony_gets_nothing_of_it(tmp_path: Path) -> None:
    unit = member("usr/lib/systemd/system/chrony.service", DEBIANS_UNIT)
    assert not [path for path in assemble(tmp_path, *SYSTEMD, unit).tree if "90-osbuilder" in path]


# --- What systemd itself says ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Debian with the agent as a service: its systemd, on the disk, for systemd's own tools."""
    if shutil.which("systemctl") is None:
        pytest.skip("systemctl is not installed")
    if not DEBIAN.is_dir():
        pytest.skip(f"there is no {DEBIAN}: scripts/base-image debian makes it")
    work = tmp_path_factory.mktemp("debian")
    wishes = RootfsSpec(init="systemd")
    tree = assemble_rootfs(opened(f"oci:{DEBIAN}"), fake_agent(work), epoch=1000, wishes=wishes).tree
    unpack(tree, work / "root", ("/etc/systemd", "/usr/lib/systemd", "/usr/bin/osbuilder-agent", "/lib", "/sbin/init"))
    return work / "root"


def run(*argv: str) -> subprocess.CompletedProcess[str]:
    environment = {"LC_ALL": "C", "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}
    return subprocess.run(argv, capture_output=True, text=True, timeout=60, env=environment, check=False)


def unpack(tree: Tree, root: Path, wanted: tuple[str, ...]) -> None:
    for path, entry in tree.items():
        if not path.startswith(wanted):
            continue
        target = root / path[1:]
        target.parent.mkdir(parents=True, exist_ok=True)
        if entry.is_dir:
            target.mkdir(exist_ok=True)
        elif entry.is_symlink:
            target.symlink_to(entry.target)
        elif entry.is_file:
            target.write_bytes(b"".join(entry.content.chunks()))
            target.chmod(entry.mode & 0o777)


def test_systemd_understands_every_line_of_our_units(unpacked: Path) -> None:
    options = (f"--root={unpacked}", "--man=no", "--recursive-errors=no")
    done = run("systemd-analyze", "verify", *options, "kata-agent.service", "kata-containers.target", "tmp.mount")
    ours = [line for line in done.stderr.splitlines() if "kata-" in line or "tmp.mount" in line]
    assert done.returncode == 0, done.stderr
    assert ours == []


def test_presets_of_a_first_boot_leave_the_agent_enabled(unpacked: Path) -> None:
    preset = unpacked / "usr/lib/systemd/system-preset/99-default.preset"
    preset.parent.mkdir(exist_ok=True)
    preset.write_text("disable *\n")
    link = unpacked / "etc/systemd/system/basic.target.wants/kata-containers.target"
    other = unpacked / "etc/systemd/system/timers.target.wants/fstrim.timer"
    assert other.is_symlink()
    assert run("systemctl", f"--root={unpacked}", "preset-all").returncode == 0
    assert not other.is_symlink(), "the preset did its work"
    assert link.is_symlink()
