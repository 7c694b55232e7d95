"""What `kernel explain` says of a toy tree, and of the real one."""

from __future__ import annotations

import itertools
import json
import random
import time
from dataclasses import replace
from pathlib import Path

import pytest

from osbuild.arch import X86_64
from osbuild.cache import Cache, default_cache
from osbuild.errors import SpecError
from osbuild.kconfig import parse_fragment
from osbuild.kconfig_lang import remedy
from osbuild.kconfig_lang.evaluate import Evaluator
from osbuild.kconfig_lang.model import BOOL, INT, TRISTATE, Model
from osbuild.kconfig_lang.parser import read_tree
from osbuild.kernel import default_spec, prepared_tree, requests_for
from osbuild.kernel_config import asked, explainer
from osbuild.kernel_explain import Explainer, bare, lines, nearest, parse_setting, reason, renamings
from osbuild.kernel_model import load_model
from tests.conf_oracle import allnoconfig, build_conf, linux, parse, variables_of
from tests.kconfig_random import random_case

TOY = Path(__file__).parent / "toy-kconfig"


@pytest.fixture(scope="module")
def toy() -> Model:
    return read_tree(TOY, {"KERNELVERSION": "6.12.7"}, lambda script: "")


def explain(toy: Model, *settings: str, **more: str) -> Explainer:
    text = "# why: a test\n" + "".join(f"{line}\n" for line in settings)
    return Explainer(toy, parse_fragment(text, "a.conf"), more)


def test_what_was_asked_for_is_said_with_its_line(toy: Model) -> None:
    found = explain(toy, "CONFIG_NET=y").explain("NET")
    assert (found.value, found.asked, found.asked_at, found.kept) == ("y", "y", "a.conf:2", True)
    assert lines(found) == [
        "CONFIG_NET=y",
        '  bool, "talk to others" (Kconfig:3)',
        "  asked for: y (a.conf:2)",
        "  why: it is what was asked for",
    ]


def test_what_selects_a_symbol_is_named_with_the_line_that_does(toy: Model) -> None:
    found = explain(toy, "CONFIG_EXT4=y").explain("CONFIG_CRC")
    assert found.value == "y"
    assert [str(fact) for fact in found.because] == ["selected by EXT4 (Kconfig:26)"]


def test_a_default_that_counts_is_named_with_its_line(toy: Model) -> None:
    assert str(explain(toy).explain("LEVELS").because[0]) == "its default is 4 (Kconfig:19)"
    assert str(explain(toy).explain("HAS_IOMEM").because[0]) == "its default is y (Kconfig:7)"


def test_a_number_outside_its_range_is_said_to_be(toy: Model) -> None:
    found = explain(toy, "CONFIG_LEVELS=9").explain("LEVELS")
    assert (found.value, found.kept) == ("5", False)
    assert "it is what was asked for" not in [str(fact) for fact in found.because]
    assert "it must lie between 3 and 5 (Kconfig:18)" in [str(fact) for fact in found.because]


def test_the_winner_of_a_choice_is_named(toy: Model) -> None:
    found = explain(toy, "CONFIG_EXT4=y").explain("ZSTD")
    assert str(found.because[0]) == "one of a choice, in which GZIP is y by default (Kconfig:28)"


def test_an_unmet_dependency_is_named_with_its_line_and_the_fewest_lines_that_help(toy: Model) -> None:
    found = explain(toy, "CONFIG_VIRTIO_NET=y").explain("VIRTIO_NET")
    assert [(each.condition, each.place) for each in found.unmet] == [
        ("NET", "drivers/Kconfig:19"), ("VIRTIO", "drivers/Kconfig:19"),
    ]  # fmt: skip
    assert "only selected: by VIRTIO_PCI, VIRTIO_MMIO" in str(found.unmet[1])
    assert sorted(found.fix) == ["CONFIG_NET=y", "CONFIG_PCI=y", "CONFIG_VIRTIO_PCI=y"]
    assert found.smallest


def test_a_fix_that_contradicts_a_line_names_it(toy: Model) -> None:
    found = explain(toy, "CONFIG_VIRTIO_PCI=y", "# CONFIG_PCI is not set").explain("VIRTIO_PCI")
    assert (found.fix, found.instead) == (("CONFIG_PCI=y",), ("a.conf:3",))
    assert "enough: CONFIG_PCI=y (instead of a.conf:3)" in reason(found)


def test_of_two_ways_the_one_that_opens_less_comes_first(toy: Model) -> None:
    found = explain(toy, "CONFIG_NET=y", "CONFIG_MITIGATION_WARP=y").explain("MITIGATION_WARP")
    assert found.fix == ("CONFIG_LEVELS=5",)  # not EXPERT, which opens everything


def test_what_is_off_and_selected_cannot_be_asked_off(toy: Model) -> None:
    found = explain(toy, "CONFIG_EXT4=y", "# CONFIG_CRC is not set").explain("CRC")
    assert not found.kept
    assert found.fix == ("# CONFIG_EXT4 is not set",)


def test_a_value_that_is_wanted_is_explained_as_if_it_had_been_asked_for(toy: Model) -> None:
    found = explain(toy, "CONFIG_EXT4=y").explain("ZSTD", wanted="y")
    assert found.fix == ("CONFIG_ZSTD=y",)


def test_a_loss_that_is_tolerated_is_said_to_be_and_one_that_is_none_is_not(toy: Model) -> None:
    requests = parse_fragment("# why: a test\nCONFIG_VIRTIO_PCI=y\nCONFIG_NET=y\n", "a.conf")
    explainer = Explainer(toy, requests, tolerated={"CONFIG_VIRTIO_PCI": "no bus", "CONFIG_NET": "no net"})
    assert "  tolerated: no bus" in lines(explainer.explain("VIRTIO_PCI"))
    assert explainer.explain("NET").tolerated == ""


def test_an_end_of_a_range_that_moves_with_another_setting_is_moved(tmp_path: Path) -> None:
    (tmp_path / "Kconfig").write_text(
        'config BIG\n\tbool "big"\nconfig MOST\n\tint\n\tdefault 4096 if BIG\n\tdefault 64\n'
        'config CPUS\n\tint "processors"\n\trange 2 MOST\n\tdefault 8\n'
    )
    model = read_tree(tmp_path, {}, lambda script: "")
    assert explain(model, "CONFIG_CPUS=200").explain("CPUS").fix == ("CONFIG_BIG=y",)
    assert explain(model, "CONFIG_CPUS=5000").explain("CPUS").unfixed == "no lines of a fragment are enough"


def test_what_no_line_can_reach_has_no_fix(toy: Model) -> None:
    found = explain(toy, "CONFIG_VIRTIO_MMIO=y").explain("VIRTIO_MMIO")
    assert (found.fix, found.unfixed) == ((), "no lines of a fragment are enough")
    assert "BROKEN_BUS is not defined on this architecture (drivers/Kconfig:16)" in [str(each) for each in found.unmet]


def test_a_value_that_a_symbol_cannot_have_is_said_to_be_none(toy: Model) -> None:
    assert explain(toy, "CONFIG_NET=5").explain("NET").unfixed == "5 is no value of a bool"
    assert explain(toy, "CONFIG_LEVELS=y").explain("LEVELS").unfixed == "y is no value of an int"
    with pytest.raises(SpecError, match="--want 5"):
        explain(toy).explain("NET", wanted="5")


def test_an_unknown_name_is_answered_with_the_nearest_and_with_what_became_of_it(toy: Model) -> None:
    assert explain(toy, "CONFIG_VIRTO_PCI=y").explain("VIRTO_PCI").near[0] == "CONFIG_VIRTIO_PCI"
    assert explain(toy).explain("WARP").near == ("CONFIG_MITIGATION_WARP",)
    found = explain(toy, "CONFIG_RETPOLINE=y").explain("RETPOLINE")
    assert "renamed to CONFIG_MITIGATION_RETPOLINE in 6.9" in reason(found)
    assert not found.kept


def test_set_overrides_a_fragment_and_takes_a_text_without_quotes(toy: Model) -> None:
    assert parse_setting("NAME=a b", toy) == ("NAME", '"a b"')
    found = explain(toy, "CONFIG_NET=y", NET="n").explain("NET")
    assert (found.value, found.asked, found.asked_at) == ("n", "n", "--set")


@pytest.mark.parametrize("text", ["NET", "NET=5", "LEVELS=y", "NOWHERE=y", "=y", "NET=m"])
def test_a_setting_that_cannot_be_meant_is_refused(toy: Model, text: str) -> None:
    with pytest.raises(SpecError):
        parse_setting(text, toy)


@pytest.mark.parametrize(("settings", "says"), [(["FOO"], "not SYMBOL=value"), (["A=y", "CONFIG_A=n"], "set twice")])
def test_what_is_no_setting_for_any_kernel_is_refused_before_one_is_read(
    settings: list[str], says: str, tmp_path: Path
) -> None:
    nowhere = replace(default_spec(X86_64), source=f"dir:{tmp_path}/nowhere")
    with pytest.raises(SpecError, match=says):
        explainer(nowhere, settings, Cache(root=tmp_path / "cache"))


def test_a_symbol_that_can_be_none_is_refused() -> None:
    with pytest.raises(SpecError):
        bare("CONFIG_A-B")


def test_an_explanation_for_programs_is_plain_json(toy: Model) -> None:
    data = json.loads(json.dumps(explain(toy, "CONFIG_VIRTIO_PCI=y").explain("VIRTIO_PCI").to_dict()))
    assert (data["symbol"], data["value"], data["kept"]) == ("CONFIG_VIRTIO_PCI", "n", False)
    assert data["fix"] == {"lines": ["CONFIG_PCI=y"], "instead": [], "smallest": True}
    assert data["unmet"][0]["place"] == "drivers/Kconfig:11"


def test_the_nearest_names_are_few_and_likely() -> None:
    known = ["VIRTIO_BLK", "VIRTIO_NET", "NET", "EXT4_FS", "CRYPTO_SHA256_SSSE3"]
    assert nearest("VIRTIO_BLOCK", known)[0] == "VIRTIO_BLK"
    assert nearest("XYZZY", known) == []
    assert nearest("virtio_blk", known)[0] == "VIRTIO_BLK"


@pytest.mark.parametrize("modules", [True, False])
def test_no_smaller_set_of_lines_works_than_the_one_that_is_found(tmp_path: Path, modules: bool) -> None:
    """Held against trying all sets of one and of two settings."""
    compared = 0
    for seed in range(24):
        text, settings = random_case(seed, modules=modules)
        (tmp_path / "Kconfig").write_text(text)
        model = read_tree(tmp_path, {}, lambda script: "")
        evaluator, chance = Evaluator(model, settings), random.Random(seed)
        switches = [name for name, kind in model.kinds.items() if kind in (BOOL, TRISTATE)]
        for name in chance.sample(switches, 3):
            goal = "n" if evaluator.tri(name) else "y"
            found = remedy.find(evaluator, name, goal, seconds=60)
            least = _brute_force(evaluator, name, goal)
            if isinstance(found, remedy.Remedy):
                assert remedy.reached(evaluator.with_settings(dict(found.settings)), name, goal)
            if least is not None:
                assert isinstance(found, remedy.Remedy), f"seed {seed}: {name}={goal} by {least}"
                assert len(found.settings) == len(least)
                compared += 1
            else:
                assert isinstance(found, remedy.NoRemedy) or len(found.settings) > 2
    assert compared > 30


def _brute_force(evaluator: Evaluator, name: str, goal: str) -> tuple[tuple[str, str], ...] | None:
    model = evaluator.model
    values = {BOOL: "yn", TRISTATE: "ymn", INT: ("0", "10", "25")}
    single = [
        (each, value) for each, kind in model.kinds.items() for value in values.get(kind, ())
        if evaluator.asked.get(each) != value
    ]  # fmt: skip
    for size in (1, 2):
        for chosen in itertools.combinations(single, size):
            distinct = len({each for each, _ in chosen}) == size
            if distinct and remedy.reached(evaluator.with_settings(dict(chosen)), name, goal):
                return chosen
    return None


def test_what_is_worked_out_again_is_what_is_worked_out_from_the_start(tmp_path: Path) -> None:
    for seed in range(40):
        text, settings = random_case(seed)
        (tmp_path / "Kconfig").write_text(text)
        model = read_tree(tmp_path, {}, lambda script: "")
        first = Evaluator(model, settings)
        list(first.states())
        name = random.Random(seed).choice([each for each, kind in model.kinds.items() if kind == BOOL])
        for value in ("y", "n", None):
            again = first.with_settings({name: value})
            assert dict(again.states()) == dict(Evaluator(model, again.asked).states())


# The real tree.


@pytest.fixture(scope="module")
def real() -> Explainer:
    linux()
    return explainer(default_spec(X86_64), [], default_cache())


def test_every_name_in_the_table_of_renamings_is_gone_and_what_it_leads_to_is_there(real: Explainer) -> None:
    for name, entry in renamings().items():
        assert name not in real.model.definitions, f"{name} is still in 6.12"
        assert not entry.to or entry.to in real.model.definitions, f"{entry.to} is not in 6.12"


HARD = {
    "NFT_FLOW_OFFLOAD": "y", "BTRFS_FS": "y", "VFIO_PCI": "y", "USB_XHCI_HCD": "y", "DM_CRYPT": "y", "CIFS": "y",
    "DRM_VIRTIO_GPU": "y", "IP_VS_NFCT": "y", "NR_CPUS": "8000",
}  # fmt: skip


@pytest.mark.slow
def test_the_lines_that_are_said_to_be_enough_are_enough_for_conf_itself(real: Explainer, tmp_path: Path) -> None:
    tree = prepared_tree(default_spec(X86_64), default_cache())
    conf = build_conf(tree, tmp_path)
    settings = asked(requests_for(default_spec(X86_64), default_cache()))
    for symbol, value in HARD.items():
        found = real.explain(symbol, wanted=value)
        assert found.fix, symbol
        assert found.smallest, symbol
        for line in found.fix:
            settings |= parse(line)
    theirs = parse(allnoconfig(conf, tree, settings, tmp_path, variables_of(tree, X86_64)))
    assert {symbol: theirs.get(symbol) for symbol in HARD} == HARD


@pytest.mark.slow
def test_an_answer_takes_less_than_five_seconds_of_processor_also_the_first_time(tmp_path: Path) -> None:
    tree = prepared_tree(default_spec(X86_64), default_cache()) if linux() else Path()
    before = time.process_time()
    model = load_model(tree, X86_64, "", Cache(root=tmp_path / "cache"))
    Explainer(model, requests_for(default_spec(X86_64), default_cache())).explain("BTRFS_FS", wanted="y")
    assert time.process_time() - before < 5
    before = time.process_time()
    again = load_model(tree, X86_64, "", Cache(root=tmp_path / "cache"))
    assert time.process_time() - before < 2
    assert again == model
