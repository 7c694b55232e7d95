from __future__ import annotations

import pytest

from osbuild.arch import ARCHES
from osbuild.errors import InputError
from osbuild.kconfig import Request, combine, dropped, parse_config, parse_fragment
from osbuild.kernel import default_spec, feature_files, read_fragments
from osbuild.resources import resource

FRAGMENT = """\
# why: a root filesystem
CONFIG_EXT4_FS=y

# why: no code enters a running guest
# CONFIG_MODULES is not set

CONFIG_NR_CPUS=64
CONFIG_LSM="landlock,yama"
CONFIG_START=0x1000000
"""


def ask(symbol: str, value: str, place: str = "a.conf:2") -> Request:
    file, line = place.split(":")
    return Request(symbol=symbol, value=value, file=file, line=int(line), why="a test")


def test_a_fragment_gives_each_symbol_with_its_value_its_line_and_its_reason() -> None:
    assert [(r.symbol, r.value, r.place, r.why) for r in parse_fragment(FRAGMENT, "root.conf")] == [
        ("CONFIG_EXT4_FS", "y", "root.conf:2", "a root filesystem"),
        ("CONFIG_MODULES", "n", "root.conf:5", "no code enters a running guest"),
        ("CONFIG_NR_CPUS", "64", "root.conf:7", "a root filesystem"),
        ("CONFIG_LSM", '"landlock,yama"', "root.conf:8", "a root filesystem"),
        ("CONFIG_START", "0x1000000", "root.conf:9", "a root filesystem"),
    ]


@pytest.mark.parametrize(
    "line",
    [
        pytest.param("EXT4_FS=y", id="no CONFIG_"),
        pytest.param("CONFIG_EXT4_FS", id="no value"),
        pytest.param("CONFIG_EXT4_FS=", id="an empty value"),
        pytest.param("CONFIG_EXT4_FS=yes", id="a word"),
        pytest.param("CONFIG_EXT4_FS = y", id="blanks"),
        pytest.param("CONFIG_EXT4_FS=y # root", id="a comment behind it"),
        pytest.param(" CONFIG_EXT4_FS=y", id="indented"),
        pytest.param('CONFIG_LSM="yama', id="an open string"),
        pytest.param("# CONFIG_EXT4_FS is not set.", id="not quite not set"),
        pytest.param("#CONFIG_EXT4_FS=y", id="commented out"),
    ],
)
def test_a_line_that_is_no_setting_is_refused_with_its_place(line: str) -> None:
    with pytest.raises(InputError, match=r"^root\.conf:3: not a setting"):
        parse_fragment(f"# why: a test\n\n{line}\n", "root.conf")


@pytest.mark.parametrize("text", ["", "CONFIG_NET=y\n", "\n# why: late\n", "# why:\n", "# because\n"])
def test_a_fragment_that_does_not_begin_with_its_reason_is_refused(text: str) -> None:
    with pytest.raises(InputError, match=r"^root\.conf:1: "):
        parse_fragment(text, "root.conf")


@pytest.mark.parametrize(("second", "verb"), [("y", "repeats"), ("n", "contradicts")])
def test_a_symbol_asked_for_twice_is_refused_naming_both_places(second: str, verb: str) -> None:
    first = ask("CONFIG_NET", "y", "a.conf:3")
    with pytest.raises(InputError, match=rf"b\.conf:9: CONFIG_NET={second} {verb} a\.conf:3: CONFIG_NET=y"):
        combine([[first], [ask("CONFIG_NET", second, "b.conf:9")]])


def test_symbols_that_only_begin_alike_are_different() -> None:
    both = (ask("CONFIG_NET", "y"), ask("CONFIG_NETFILTER", "y"))
    assert combine([both]) == both


@pytest.mark.parametrize(
    ("wanted", "final", "got"),
    [
        pytest.param("y", "CONFIG_X=y", None, id="kept"),
        pytest.param("y", "# CONFIG_X is not set", "n", id="turned off"),
        pytest.param("y", "CONFIG_XY=y", "n", id="gone"),
        pytest.param("y", "CONFIG_X=m", "m", id="made a module"),
        pytest.param("n", "CONFIG_X=y", "y", id="selected by another"),
        pytest.param("n", "# CONFIG_X is not set", None, id="off as asked"),
        pytest.param("n", "", None, id="absent is off"),
        pytest.param("n", "CONFIG_X=n", None, id="n is off"),
        pytest.param("64", "CONFIG_X=64", None, id="a number"),
        pytest.param("64", "CONFIG_X=512", "512", id="another number"),
        pytest.param("0x10", "CONFIG_X=16", None, id="a number in another base"),
        pytest.param('"a"', 'CONFIG_X="a"', None, id="a string"),
        pytest.param('"a"', 'CONFIG_X=""', '""', id="an emptied string"),
        pytest.param('"1"', "CONFIG_X=1", "1", id="a string is no number"),
    ],
)
def test_a_request_is_dropped_exactly_when_the_final_value_differs(wanted: str, final: str, got: str | None) -> None:
    request = ask("CONFIG_X", wanted)
    assert [(d.request, d.got) for d in dropped([request], final + "\n")] == ([] if got is None else [(request, got)])


def test_a_dropped_request_says_symbol_wanted_got_and_place() -> None:
    (lost,) = dropped([ask("CONFIG_X", "y", "kernel-configs/common/root.conf:7")], "")
    assert str(lost) == "CONFIG_X: wanted y, got n (kernel-configs/common/root.conf:7)"


def test_a_finished_configuration_lists_only_what_is_set() -> None:
    text = "#\n# Automatically generated\n#\nCONFIG_A=y\n# CONFIG_B is not set\n\nCONFIG_C=7\n"
    assert parse_config(text) == {"CONFIG_A": "y", "CONFIG_C": "7"}


@pytest.mark.parametrize("arch", [name for name in ARCHES if resource("kernel-configs").joinpath(name).is_dir()])
def test_our_own_fragments_are_well_formed_and_never_meet_even_with_every_feature(arch: str) -> None:
    default = read_fragments(default_spec(ARCHES[arch]).fragments)
    assert {r.symbol: r.value for r in default}.items() >= {"CONFIG_MODULES": "n", "CONFIG_DEVMEM": "n"}.items()
    whole = read_fragments(default_spec(ARCHES[arch], features=feature_files(ARCHES[arch])).fragments)
    assert {r.symbol: r.value for r in whole}.items() >= {"CONFIG_MODULES": "y", "CONFIG_DEVMEM": "n"}.items()
