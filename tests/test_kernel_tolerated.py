"""Losses of settings that are known, and those that are not."""

from __future__ import annotations

from pathlib import Path

import pytest

from osbuild.arch import AARCH64, X86_64
from osbuild.cache import Cache
from osbuild.errors import BuildError, InputError
from osbuild.kconfig import parse_fragment
from osbuild.kernel_config import check_kept, tolerated
from osbuild.resources import resource

TOY = Path(__file__).parent / "toy-kconfig"  # 6.12.7

LOSSES = """\
[[loss]]
series = "6.1"
symbol = "CONFIG_NET"
why = "an older name"

[[loss]]
series = "6.12"
symbol = "CONFIG_VIRTIO_NET"
why = "not in this toy"

[[loss]]
series = "6.12"
symbol = "CONFIG_PCI"
arch = "aarch64"
why = "no such bus"
"""


@pytest.fixture
def losses(tmp_path: Path) -> Path:
    path = tmp_path / "tolerated.toml"
    path.write_text(LOSSES)
    return path


def check(tmp_path: Path, losses: Path, fragment: str, final: str) -> None:
    requests = parse_fragment(f"# why: a test\n{fragment}", "a.conf")
    cache = Cache(root=tmp_path / "cache")
    check_kept(requests, final, tree=TOY, arch=X86_64, cache=cache, losses=losses)


def test_a_loss_that_is_known_does_not_stop_a_build(tmp_path: Path, losses: Path) -> None:
    check(tmp_path, losses, "CONFIG_VIRTIO_NET=y\nCONFIG_NET=y\n", "CONFIG_NET=y\n")


def test_a_loss_that_is_none_any_more_stops_it_and_names_the_entry(tmp_path: Path, losses: Path) -> None:
    with pytest.raises(BuildError, match=rf"CONFIG_VIRTIO_NET is kept by 6\.12 \({losses}:8\)"):
        check(tmp_path, losses, "CONFIG_VIRTIO_NET=y\n", "CONFIG_VIRTIO_NET=y\n")


def test_an_entry_for_what_nobody_asks_for_says_nothing(tmp_path: Path, losses: Path) -> None:
    check(tmp_path, losses, "CONFIG_NET=y\n", "CONFIG_NET=y\nCONFIG_VIRTIO_NET=y\n")


def test_a_loss_of_another_series_or_architecture_is_not_tolerated(tmp_path: Path, losses: Path) -> None:
    for symbol in ("NET", "PCI"):
        with pytest.raises(BuildError, match=f"CONFIG_{symbol}: wanted y, got n"):
            check(tmp_path, losses, f"CONFIG_{symbol}=y\n", "CONFIG_EXPERT=y\n")
    assert [entry.symbol for entry in tolerated("6.12", AARCH64, losses)] == ["CONFIG_VIRTIO_NET", "CONFIG_PCI"]


def test_a_loss_that_is_not_known_comes_with_its_reason_and_what_would_be_enough(tmp_path: Path, losses: Path) -> None:
    with pytest.raises(BuildError) as caught:
        check(tmp_path, losses, "CONFIG_VIRTIO_PCI=y\nCONFIG_VIRTO_NET=y\nCONFIG_RETPOLINE=y\n", "CONFIG_NET=y\n")
    assert "  CONFIG_VIRTIO_PCI: wanted y, got n (a.conf:2)" in str(caught.value)
    assert caught.value.hint.splitlines() == [
        "CONFIG_VIRTIO_PCI: PCI is n, not asked for (drivers/Kconfig:11); enough: CONFIG_PCI=y",
        "CONFIG_VIRTO_NET: this kernel has no such symbol; near: CONFIG_VIRTIO_NET",
        (
            "CONFIG_RETPOLINE: renamed to CONFIG_MITIGATION_RETPOLINE in 6.9 "
            "[Linux 6.9, x86/bugs: mitigation options were given one prefix]"
        ),
    ]


@pytest.mark.parametrize("text", ["loss = 1", "[[loss]]\nseries = '6.12'\n", "= ["])
def test_a_damaged_list_is_refused_by_its_name(tmp_path: Path, text: str) -> None:
    path = tmp_path / "tolerated.toml"
    path.write_text(text)
    with pytest.raises(InputError, match=r"tolerated\.toml is damaged"):
        tolerated("6.12", X86_64, path)


def test_every_loss_that_ships_is_of_a_setting_that_some_fragment_asks_for() -> None:
    asked = "".join(path.read_text() for path in sorted(resource("kernel-configs").rglob("*.conf")))
    for series in ("6.1", "6.12"):
        for arch in (X86_64, AARCH64):
            for entry in tolerated(series, arch):
                assert f"{entry.symbol}=" in asked or f"# {entry.symbol} is not set" in asked, entry
                assert entry.why
