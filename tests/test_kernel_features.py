"""kernel-configs/feature: what can be asked for, one by one and all at once, keeps every line of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from osbuild.agent_client import AGENT
from osbuild.arch import ARCHES, X86_64, Arch
from osbuild.artifacts import Initrd, Kernel
from osbuild.cache import default_cache
from osbuild.errors import HostError
from osbuild.kernel import configure, default_spec, feature_files, read_fragments
from osbuild.kernel_pins import default_file
from osbuild.options import OPTIONS
from osbuild.resources import resource
from tests.agent_container import DEV, DOCKER, PROC, SYS, Containers, description, process
from tests.agent_guest import booted
from tests.boot_fixtures import boot_kernel, other_kernel

__all__ = ["boot_kernel"]  # a fixture

FEATURES: Final = (
    "9p", "cloud-hypervisor", "debug", "ebpf", "firecracker", "gpu", "io-uring", "nftables", "systemd", "verity",
    "virtiofs", "xfs",
)  # fmt: skip
OURS: Final = [arch for name, arch in ARCHES.items() if resource("kernel-configs").joinpath(name).is_dir()]
needs_linux = pytest.mark.skipif(
    not default_file().is_file(), reason=f"no {default_file()}: apt-get install linux-source-6.12"
)


def settings(arch: Arch, *features: str) -> dict[str, str]:
    requests = read_fragments(default_spec(arch, features=features).fragments)
    return {request.symbol: request.value for request in requests}


@pytest.mark.parametrize("arch", OURS, ids=lambda arch: arch.name)
def test_every_feature_is_there_and_adds_something(arch: Arch) -> None:
    assert tuple(feature_files(arch)) == FEATURES
    (option,) = [each for each in OPTIONS if each.name == "with"]
    assert f": {', '.join(FEATURES)};" in option.help, "who reads --help is told of all"
    default = settings(arch)
    for feature in FEATURES:
        assert settings(arch, feature).items() - default.items()


@pytest.mark.parametrize("arch", OURS, ids=lambda arch: arch.name)
def test_a_feature_takes_back_only_what_is_kept_apart_for_it(arch: Arch) -> None:
    """Each default is in the kernel of any feature, with the same value, but for those in a without- file."""
    default = settings(arch)
    for feature in FEATURES:
        files = [resource("kernel-configs") / home / f"without-{feature}.conf" for home in ("common", arch.name)]
        apart = {request.symbol for request in read_fragments([file for file in files if file.exists()])}
        chosen = settings(arch, feature)
        assert {symbol for symbol, value in default.items() if chosen.get(symbol) != value} <= apart
        assert apart <= default.keys()


@pytest.mark.parametrize("arch", OURS, ids=lambda arch: arch.name)
def test_what_is_kept_apart_is_kept_apart_for_a_feature_that_is_there(arch: Arch) -> None:
    for home in ("common", arch.name):
        for file in (resource("kernel-configs") / home).glob("without-*.conf"):
            assert file.stem.removeprefix("without-") in FEATURES


def test_a_feature_asked_for_twice_is_asked_for_once() -> None:
    assert default_spec(X86_64, features=["xfs", "xfs"]) == default_spec(X86_64, features=["xfs"])


SETS: Final = [pytest.param(FEATURES, id="all", marks=pytest.mark.slow)] + [
    pytest.param((feature,), id=feature, marks=pytest.mark.long) for feature in FEATURES
]


@pytest.mark.timeout(900)
@needs_linux
@pytest.mark.parametrize("features", SETS)
@pytest.mark.parametrize("arch", OURS, ids=lambda arch: arch.name)
def test_linux_keeps_every_line_of_a_feature_and_of_all_together(arch: Arch, features: tuple[str, ...]) -> None:
    try:
        configure(default_spec(arch, features=features), default_cache())  # what is dropped raises
    except HostError as problem:
        pytest.skip(f"{problem}: {problem.hint}")


# --- one kernel with all of them, booted ---

# What of a feature a process sees: a path that is there, or the end of a shell's line.
SEEN: Final = {
    "9p": ["grep -w cachefiles /proc/misc"],
    "cloud-hypervisor": [
        "ls -d /sys/bus/pci/drivers/pvpanic-pci", "ls -d /sys/bus/virtio/drivers/virtio_iommu", "ls -d /sys/class/tpm",
    ],
    "debug": ["ls /proc/sysrq-trigger", "ls /proc/sys/kernel/hung_task_timeout_secs"],
    "ebpf": ["grep -w tracefs /proc/filesystems", "ls /proc/sys/debug/kprobes-optimization"],
    "firecracker": [
        "ls -d /sys/bus/serio/drivers/atkbd", "ls -d /sys/class/tty/tty1", "ls -d /sys/bus/platform/drivers/vmgenid",
    ],
    "gpu": ["ls /proc/modules", "ls -d /sys/bus/virtio/drivers/virtio_gpu", "ls -d /sys/class/drm"],
    "io-uring": ["ls /proc/sys/kernel/io_uring_disabled"],
    "nftables": ["ls /proc/net/netfilter/nfnetlink_queue"],
    "systemd": ["ls -d /sys/class/bsg", "ls -d /sys/class/rtc"],
    "verity": ["ls /sys/fs/ext4/features/verity", "ls -d /sys/module/dm_crypt"],
    "virtiofs": ["grep -w cuse /proc/misc"],
    "xfs": ["grep -w xfs /proc/filesystems"],
}  # fmt: skip


@pytest.fixture(scope="module")
def whole(boot_kernel: Kernel) -> Kernel:
    """The kernel with everything."""
    return other_kernel(X86_64, *FEATURES)


@pytest.fixture(scope="module")
def guest(whole: Kernel, busybox_initrd: Initrd, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Containers]:
    with booted(whole, busybox_initrd, tmp_path_factory.mktemp("features")) as client:
        client.call(AGENT, "CreateSandbox")
        yield Containers(client)


@pytest.mark.slow
@pytest.mark.boot
@pytest.mark.parametrize("feature", FEATURES)
def test_a_kernel_with_every_feature_boots_and_shows_each(guest: Containers, feature: str) -> None:
    script = " && ".join(f"{{ {line} >/dev/null || {{ echo 'not seen: {line}'; false; }}; }}" for line in SEEN[feature])
    oci = description(Path("/"), process("sh", "-c", script, capabilities=DOCKER), mounts=[PROC, DEV, SYS])
    assert guest.run(oci) == (0, "")


@pytest.mark.slow
@pytest.mark.boot
def test_what_a_feature_shows_the_default_does_not_have(
    boot_kernel: Kernel, busybox_initrd: Initrd, tmp_path: Path
) -> None:
    """Or the test above would pass with features that do nothing."""
    with booted(boot_kernel, busybox_initrd, tmp_path) as client:
        client.call(AGENT, "CreateSandbox")
        for feature in FEATURES:
            script = "; ".join(f"{{ {line}; }} >/dev/null 2>&1 || echo missing" for line in SEEN[feature])
            oci = description(Path("/"), process("sh", "-c", script, capabilities=DOCKER), mounts=[PROC, DEV, SYS])
            assert "missing" in Containers(client).run(oci)[1], feature
