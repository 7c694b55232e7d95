"""What `kernel check` makes of a configuration."""

from __future__ import annotations

import gzip
import json
import time
from pathlib import Path

import pytest

from osbuild.arch import ARCHES, X86_64
from osbuild.errors import InputError, SpecError
from osbuild.kernel_check import Checked, Wanted, check, lines, read_config, read_contract, split
from osbuild.resources import resource
from tests.conf_oracle import linux

CONTRACT = """\
[[every]]
need = "TMPFS && PROC_FS"
why = "init mounts them"
[[vmm.qemu]]
need = "VIRTIO_PCI"
why = "every device"
[[vmm.qemu]]
need = "VIRTIO_FS"
when = 'AGENT = "kata"'
why = "the shared directory"
[[vmm.firecracker]]
need = "VIRTIO_MMIO || VIRTIO_PCI"
why = "every device"
[[agent.kata]]
need = "MEMCG_V1"
when = "MEMCG && KERNEL_VERSION >= 6011"
why = "cgroup v1"
[[agent.kata]]
group = "containers"
[[agent.builtin]]
group = "containers"
[[group.containers]]
need = "CGROUPS"
why = "limits"
[[image.dax]]
need = "ACPI_NFIT"
when = 'VMM = "qemu" && X86_64'
why = "the NVDIMM is announced there"
[[image.dax]]
need = "FS_DAX"
why = "the host's pages"
"""

HEAD = "# Linux/x86 6.12.7 Kernel Configuration\n"


def checked(tmp_path: Path, config: str, **wanted: tuple[str, ...]) -> Checked:
    path = tmp_path / "contract.toml"
    path.write_text(CONTRACT)
    return check("a.config", HEAD + config, Wanted(**wanted), read_contract(path))


def test_each_missing_part_is_one_line_with_whose_need_it_is_and_why(tmp_path: Path) -> None:
    found = checked(tmp_path, "CONFIG_TMPFS=y\nCONFIG_VIRTIO_PCI=m\n", vmms=("qemu",))
    assert lines(found) == [
        "not met: every guest: PROC_FS (CONFIG_PROC_FS=n): init mounts them",
        "not met: vmm qemu: VIRTIO_PCI (CONFIG_VIRTIO_PCI=m): every device",
        "Linux 6.12, a.config: 2 needs checked, 2 not met",
    ]


def test_one_of_several_is_enough_and_a_module_is_not(tmp_path: Path) -> None:
    base = "CONFIG_TMPFS=y\nCONFIG_PROC_FS=y\n"
    assert not checked(tmp_path, base + "CONFIG_VIRTIO_PCI=y\n", vmms=("firecracker",)).unmet
    (unmet,) = checked(tmp_path, base + "CONFIG_VIRTIO_MMIO=m\n", vmms=("firecracker",)).unmet
    assert dict(unmet.values) == {"VIRTIO_MMIO": "m", "VIRTIO_PCI": "n"}


def test_a_need_holds_only_where_it_says(tmp_path: Path) -> None:
    base = "CONFIG_TMPFS=y\nCONFIG_PROC_FS=y\nCONFIG_VIRTIO_PCI=y\nCONFIG_CGROUPS=y\nCONFIG_FS_DAX=y\nCONFIG_X86_64=y\n"
    assert [each.need for each in checked(tmp_path, base, vmms=("qemu",), agents=("builtin",)).unmet] == []
    assert [each.need for each in checked(tmp_path, base, vmms=("qemu",), agents=("kata",)).unmet] == ["VIRTIO_FS"]
    assert [each.need for each in checked(tmp_path, base, images=("dax",)).unmet] == []
    (unmet,) = checked(tmp_path, base, vmms=("qemu", "firecracker"), images=("dax",)).unmet
    assert (unmet.need, unmet.wanted_by) == ("ACPI_NFIT", ("image dax", "vmm qemu"))
    assert [each.need for each in checked(tmp_path, base + "CONFIG_MEMCG=y\n", agents=("kata",)).unmet] == ["MEMCG_V1"]


def test_what_two_need_is_said_once_for_both(tmp_path: Path) -> None:
    base = "CONFIG_TMPFS=y\nCONFIG_PROC_FS=y\n"
    (unmet,) = checked(tmp_path, base, agents=("kata", "builtin")).unmet
    assert unmet.wanted_by == ("agent kata", "agent builtin")


def test_an_older_kernel_is_not_asked_for_what_came_later(tmp_path: Path) -> None:
    path = tmp_path / "contract.toml"
    path.write_text(CONTRACT)
    text = (
        "# Linux/x86 6.1.90 Kernel Configuration\nCONFIG_TMPFS=y\nCONFIG_PROC_FS=y\nCONFIG_CGROUPS=y\nCONFIG_MEMCG=y\n"
    )
    assert not check("old", text, Wanted(agents=("kata",)), read_contract(path)).unmet


def test_names_that_are_not_in_the_contract_are_refused_with_those_that_are(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="--vmm xen") as caught:
        checked(tmp_path, "CONFIG_TMPFS=y\n", vmms=("xen",))
    assert "qemu, firecracker" in caught.value.hint
    assert split(["qemu,firecracker", "qemu"]) == ("qemu", "firecracker")


@pytest.mark.parametrize("text", ["", "[[vmm.qemu]]\nneed = 'A &&'\nwhy = 'x'\n", "[[every]]\nneed = 'A'\n", "= ["])
def test_a_contract_that_is_none_is_refused_by_its_name(tmp_path: Path, text: str) -> None:
    path = tmp_path / "contract.toml"
    path.write_text(text)
    if not text:
        assert read_contract(path).every == ()
        return
    with pytest.raises(InputError, match=r"contract\.toml"):
        read_contract(path)


def test_a_configuration_is_found_in_a_directory_in_a_kernel_and_in_proc(tmp_path: Path) -> None:
    text = "CONFIG_A=y\n"
    (tmp_path / "config").write_text(text)
    assert read_config(tmp_path) == text
    kernel = tmp_path / "vmlinux"
    kernel.write_bytes(b"\x7fELF" + bytes(500) + b"IKCFG_ST" + gzip.compress(text.encode()) + b"IKCFG_ED" + bytes(9))
    assert read_config(kernel) == text
    saved = tmp_path / "config.gz"
    saved.write_bytes(gzip.compress(text.encode()))
    assert read_config(saved) == text


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"\xff\xfe\x00", id="no text"),
        pytest.param(b"IKCFG_ST\x1f\x8bbroken", id="a damaged kernel"),
        pytest.param(gzip.compress(b"CONFIG_A=y\nCONFIG_B=y\n")[:-9], id="a config.gz that is cut off"),
        pytest.param(gzip.compress(b"CONFIG_A=y\n")[:-1], id="one without its last byte"),
        pytest.param(b"IKCFG_ST" + gzip.compress(b"CONFIG_A=y\n")[:-4], id="a kernel that is cut off"),
        pytest.param(None, id="nothing there"),
    ],
)
def test_what_is_no_configuration_is_refused(tmp_path: Path, data: bytes | None) -> None:
    path = tmp_path / "file"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(InputError):
        read_config(path)


def test_a_text_without_any_setting_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nothing is set"):
        checked(tmp_path, "hello\n")


def test_the_result_for_programs_is_plain_json(tmp_path: Path) -> None:
    data = json.loads(json.dumps(checked(tmp_path, "CONFIG_TMPFS=y\n").to_dict()))
    assert data == {
        "config": "a.config", "release": "6.12", "checked": 1,
        "unmet": [{"for": [], "need": "PROC_FS", "values": {"PROC_FS": "n"}, "why": "init mounts them"}],
    }  # fmt: skip


# The contract that ships.


def everything() -> Wanted:
    contract = read_contract()
    return Wanted(*(contract.names(kind) for kind in ("vmm", "agent", "image")))


def test_every_need_that_ships_has_a_reason_and_names_symbols_that_are_in_the_tree() -> None:
    from osbuild.cache import default_cache
    from osbuild.kconfig_lang.expression import parse
    from osbuild.kernel_model import load_model

    known = set(load_model(linux(), X86_64, "", default_cache()).kinds)
    elsewhere = {"VMM", "AGENT", "IMAGE", "KERNEL_VERSION"}  # context
    elsewhere |= {"ARM64", "ARM64_PMEM", "ARM_AMBA", "MEMORY_HOTPLUG_DEFAULT_ONLINE", "ARCH_MEMORY_PROBE"}  # not x86's
    contract = read_contract()
    for need in (*contract.every, *(n for kind in ("vmm", "agent", "image") for x in contract.names(kind)
                                    for n in contract.needs(kind, x))):  # fmt: skip
        assert need.why
        names = {*parse(need.need).names(), *(parse(need.when).names() if need.when else ())}
        assert {name for name in names if not name.isdigit()} - elsewhere <= known, need


@pytest.mark.parametrize("arch", [name for name in ARCHES if resource("kernel-configs").joinpath(name).is_dir()])
def test_our_fragments_meet_the_contract_but_for_what_only_a_feature_brings(arch: str) -> None:
    from osbuild import kernel_config
    from osbuild.cache import default_cache
    from osbuild.kernel import default_spec
    from tests.test_kconfig_conf import have_compiler

    linux()
    have_compiler(ARCHES[arch])
    text = kernel_config.expected(default_spec(ARCHES[arch]), default_cache())
    found = check("ours", text, everything(), read_contract())
    assert {each.need for each in found.unmet} <= {"XFS_FS"}, lines(found)
    assert found.count > 90
    with_xfs = kernel_config.expected(default_spec(ARCHES[arch], features=["xfs"]), default_cache())
    assert not check("ours", with_xfs, everything(), read_contract()).unmet


def test_a_check_of_everything_takes_less_than_a_fifth_of_a_second(tmp_path: Path) -> None:
    text = HEAD + "".join(f"CONFIG_SYMBOL_{number}=y\n" for number in range(3000))
    (tmp_path / ".config").write_text(text)
    before = time.process_time()
    found = check("a", read_config(tmp_path), everything(), read_contract())
    assert time.process_time() - before < 0.2
    assert len(found.unmet) > 90
