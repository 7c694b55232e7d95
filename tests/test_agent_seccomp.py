"""The agent's seccomp filters: against what OCI's words mean, against libseccomp, and against the kernel."""

from __future__ import annotations

import errno
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NoReturn

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from osbuild import protos
from tests.agent_part import answers, compile_part
from tests.seccomp_oracle import ACTIONS, ARCHES, OPS, Instruction, Libseccomp, action_number, run

Profile = Mapping[str, Any]

_SOURCES: Final = ("seccomp", "bpf_code", "syscalls_native", "syscalls_x86", "syscalls_x32")
_X86_64, _I386, _ARM64 = 0xC000003E, 0x40000003, 0xC00000B7
_X32: Final = 0x40000000
_MASK64: Final = 2**64 - 1
_MASK32: Final = 2**32 - 1
_KILL: Final = ACTIONS["SCMP_ACT_KILL"]
# name: its number on x86_64, x32 and i386, from the kernel's tables
_CALLS: Final[Mapping[str, tuple[int | None, int | None, int | None]]] = {
    "read": (0, 0, 3),
    "write": (1, 1, 4),
    "ioctl": (16, 514, 54),
    "getdents": (78, 78, 141),
    "clone": (56, 56, 120),
    "personality": (135, 135, 136),
    "arch_prctl": (158, 158, 384),
    "socketcall": (None, None, 102),
    "chown32": (None, None, 212),
    "openat": (257, 257, 295),
    "execveat": (322, 545, 358),
    "clone3": (435, 435, 435),
    "fchmodat2": (452, 452, 452),
    "no_such_call": (None, None, None),
}
_VALUES: Final = (0, 1, 2, 40, _MASK32, 2**32, 2**32 + 1, 0x7E020000, 2**63, _MASK64)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_part("seccomp", tmp_path_factory.mktemp("seccomp"), *_SOURCES)


class Compiler:
    """One process for many profiles: starting it takes longer than what it does."""

    def __init__(self, process: subprocess.Popen[str], work: Path) -> None:
        self._process = process
        self._path = work / "profile"

    def answer(self, profile: Profile) -> list[str]:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        stdin.write(f"{write(profile, self._path)}\n")
        stdin.flush()
        return [line.rstrip("\n") for line in iter(stdout.readline, "\n") if line or self._died()]

    def compile(self, profile: Profile) -> list[Instruction]:
        first, *rows = self.answer(profile)
        assert first.startswith("ok"), first
        return [(int(a), int(b), int(c), int(d)) for a, b, c, d in (row.split() for row in rows)]

    def _died(self) -> NoReturn:
        raise AssertionError(f"the compiler ended with {self._process.wait()}")


@pytest.fixture(scope="module")
def compiler(program: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Compiler]:
    with subprocess.Popen([program, "compile"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield Compiler(process, tmp_path_factory.mktemp("profiles"))
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(timeout=20) == 0


def write(profile: Profile, path: Path) -> Path:
    path.write_bytes(protos.message("grpc.LinuxSeccomp")(**profile).SerializeToString())
    return path


def rule(*names: str, action: str = "ALLOW", args: Sequence[tuple[int, str, int, int]] = (), **more: Any) -> Any:
    listed = [{"Index": i, "Op": f"SCMP_CMP_{op}", "Value": a, "ValueTwo": b} for i, op, a, b in args]
    return {"Names": list(names), "Action": f"SCMP_ACT_{action}", "Args": listed, **more}


def profile_of(*rules: Any, default: str = "ERRNO", arches: Sequence[str] = ("X86_64",)) -> Profile:
    return {
        "DefaultAction": f"SCMP_ACT_{default}",
        "Architectures": [f"SCMP_ARCH_{arch}" for arch in arches],
        "Syscalls": list(rules),
    }


# --- what the words mean, said once more and otherwise ---


def _holds(arg: Mapping[str, Any], args: Sequence[int], mask: int) -> bool:
    value, second = int(arg["Value"]) & mask, int(arg["ValueTwo"]) & mask
    seen = args[int(arg["Index"])] & mask
    return {
        "NE": seen != value,
        "LT": seen < value,
        "LE": seen <= value,
        "EQ": seen == value,
        "GE": seen >= value,
        "GT": seen > value,
        "MASKED_EQ": seen & value == second & value,
    }[arg["Op"].removeprefix("SCMP_CMP_")]


def _applies(rule: Mapping[str, Any], args: Sequence[int], mask: int) -> bool:
    found = [_holds(arg, args, mask) for arg in rule["Args"]]
    twice = len({arg["Index"] for arg in rule["Args"]}) < len(found)
    return any(found) if twice else all(found)


def meaning(profile: Profile, number: int, arch: int, args: Sequence[int]) -> int:
    """The answer that a call must get on x86_64."""
    listed = {*profile["Architectures"], "SCMP_ARCH_X86_64"}
    default = action_number(profile, "DefaultAction")
    x32 = arch == _X86_64 and number & _X32 != 0 and number != _MASK32
    if arch not in (_X86_64, _I386) or (arch == _I386 and "SCMP_ARCH_X86" not in listed):
        return _KILL
    if x32 and "SCMP_ARCH_X32" not in listed:
        return _KILL
    column, mask = (2, _MASK32) if arch == _I386 else (1, _MASK32) if x32 else (0, _MASK64)
    plain = number & ~_X32 if x32 else number
    names = {name for name, numbers in _CALLS.items() if numbers[column] == plain}
    rules = [r for r in profile["Syscalls"] if names & set(r["Names"]) and action_number(r) != default]
    for chosen in [r for r in rules if not r["Args"]] or [r for r in rules if _applies(r, args, mask)]:
        return action_number(chosen)
    return default


_args = st.builds(
    lambda index, op, value, second: {"Index": index, "Op": f"SCMP_CMP_{op}", "Value": value, "ValueTwo": second},
    st.integers(0, 5), st.sampled_from(OPS), st.sampled_from(_VALUES), st.sampled_from(_VALUES),
)  # fmt: skip
_rules: st.SearchStrategy[dict[str, Any]] = st.fixed_dictionaries(
    {
        "Names": st.lists(st.sampled_from(list(_CALLS)), min_size=1, max_size=4, unique=True),
        "Action": st.sampled_from(list(ACTIONS)),
        "Args": st.lists(_args, max_size=3),
    },
    optional={"errnoret": st.sampled_from((0, 1, 38, 4094))},
)
_profiles: st.SearchStrategy[dict[str, Any]] = st.fixed_dictionaries(
    {
        "DefaultAction": st.sampled_from(list(ACTIONS)),
        "Architectures": st.lists(st.sampled_from(list(ARCHES)), unique=True),
        "Syscalls": st.lists(_rules, max_size=6),
    }
)
_numbers = sorted({n | bit for numbers in _CALLS.values() for n in numbers if n is not None for bit in (0, _X32)})
_probes = st.lists(
    st.tuples(
        st.sampled_from((*_numbers, 500, _X32 - 1, _X32, _MASK32)),
        st.sampled_from((_X86_64, _X86_64, _I386, _ARM64)),
        st.lists(st.sampled_from(_VALUES) | st.integers(0, _MASK64), min_size=6, max_size=6),
    ),
    min_size=10,
    max_size=30,
)
_checked = settings(max_examples=60, deadline=None)


@_checked
@given(profile=_profiles, probes=_probes)
def test_every_call_gets_the_answer_that_its_rules_say(
    compiler: Compiler, profile: Profile, probes: list[tuple[int, int, list[int]]]
) -> None:
    made = compiler.compile(profile)
    for number, arch, given_args in probes:
        args = [each & _MASK32 for each in given_args] if arch == _I386 else given_args
        assert run(made, number, arch, args)[0] == meaning(profile, number, arch, args), (number, arch, args)


# --- libseccomp ---


@pytest.fixture(scope="module")
def libseccomp() -> Libseccomp:
    try:
        return Libseccomp()
    except OSError:
        pytest.skip("libseccomp.so.2 is not installed (apt-get install libseccomp2)")


@st.composite
def _simple_profiles(draw: st.DrawFn) -> Profile:
    """Those on whose meaning nobody argues: a call in one rule at most, an argument in one condition at most, and of
    the comparisons those by equality: version 2.5 gets 64-bit order wrong where rules share parts of a program."""
    profile = draw(_profiles)
    seen: set[str] = {"fchmodat2"}  # younger than Debian 12's libseccomp
    for each in profile["Syscalls"]:
        each["Names"] = [name for name in each["Names"] if name not in seen]
        seen.update(each["Names"])
        by_index = {arg["Index"]: arg for arg in each["Args"]}
        each["Args"] = [arg for arg in by_index.values() if arg["Op"][9:] in ("EQ", "NE", "MASKED_EQ")]
    return profile


@settings(_checked, derandomize=True)
@given(profile=_simple_profiles(), probes=_probes)
def test_every_call_gets_the_answer_that_libseccomp_gives(
    compiler: Compiler, libseccomp: Libseccomp, profile: Profile, probes: list[tuple[int, int, list[int]]]
) -> None:
    made, theirs = compiler.compile(profile), libseccomp.compile(profile)
    for number, arch, given_args in probes:
        args = [each & _MASK32 for each in given_args] if arch == _I386 else given_args
        assert run(made, number, arch, args)[0] == run(theirs, number, arch, args)[0], (number, arch, args)


@pytest.mark.parametrize("op", OPS)
def test_a_single_comparison_is_libseccomps(compiler: Compiler, libseccomp: Libseccomp, op: str) -> None:
    for value in _VALUES:
        profile = profile_of(rule("write", args=[(2, op, value, 1)]))
        made, theirs = compiler.compile(profile), libseccomp.compile(profile)
        for seen in {*_VALUES, *(each ^ 1 for each in _VALUES), 3, 2**31, 2**33}:
            args = [7, 7, seen, 7, 7, 7]
            assert run(made, 1, _X86_64, args)[0] == run(theirs, 1, _X86_64, args)[0], (value, seen)


def _docker_sized(libseccomp: Libseccomp) -> Profile:
    """In the shape of Docker's profile: some 400 names, a few conditions, all three architectures of a PC."""
    # libseccomp has map_shadow_stack for x32 as well as for us, under another number.
    names = [name for name in _all_names() if libseccomp.number(name) != -1 and name != "map_shadow_stack"]
    refused = {"mount", "umount2", "reboot", "kexec_load", "init_module", "bpf", "swapon", "ptrace", "settimeofday"}
    special = {"clone", "clone3", "personality", "socket"}
    return profile_of(
        rule(*(name for name in names if name not in refused | special)),
        *(rule("personality", args=[(0, "EQ", value, 0)]) for value in (0, 8, 0x20000, 0x20008, _MASK32)),
        rule("socket", args=[(0, "NE", 40, 0)]),
        rule("clone", args=[(0, "MASKED_EQ", 0x7E020000, 0)]),
        rule("clone3", action="ERRNO", errnoret=errno.ENOSYS),
        arches=("X86_64", "X86", "X32"),
    )


def _all_names() -> list[str]:
    header = Path(__file__).parent.parent / "agent" / "syscalls.h"
    return [word.split("(")[1].rstrip("),\\") for word in header.read_text().split() if word.startswith("X(")][1:]


def test_a_profile_of_dockers_size_is_libseccomps_and_shorter(compiler: Compiler, libseccomp: Libseccomp) -> None:
    profile = _docker_sized(libseccomp)
    made, theirs = compiler.compile(profile), libseccomp.compile(profile)
    steps_of = {}
    for arch in (_X86_64, _I386, _ARM64):
        for number in (*range(600), *range(_X32, _X32 + 600), _MASK32):
            for first in (0, 8, 40, 0x20000, 0x7E020000):
                ours, steps = run(made, number, arch, [first, 0, 0, 0, 0, 0])
                if not (arch == _I386 and number == 102):  # socketcall: libseccomp unfolds it
                    assert ours == run(theirs, number, arch, [first, 0, 0, 0, 0, 0])[0], (number, arch, first)
                steps_of[number, arch, first] = steps
    assert len(profile["Syscalls"][0]["Names"]) > 350
    assert len(made) < len(theirs) / 2
    assert steps_of[0, _X86_64, 0] <= 12  # read
    assert max(steps_of.values()) <= 40  # personality's five conditions


# --- limits and nonsense ---


def test_a_filter_whose_jumps_are_longer_than_a_branch_can_say_is_right(compiler: Compiler) -> None:
    # Every other number, each with a condition: no two ranges are alike, and every way through is far.
    names = [name for name in _all_names() if name not in ("socketcall", "ipc")]
    rules = [rule(name, action="ERRNO", errnoret=i + 2, args=[(0, "EQ", i, 0)]) for i, name in enumerate(names[:300])]
    made = compiler.compile(profile_of(*rules, default="ALLOW"))
    assert len(made) > 1000
    numbers = dict(zip(names, range(len(names)), strict=True))
    for name in ("accept", "getpid", "openat", "brk"):
        if numbers[name] < 300 and name in _KNOWN_NUMBERS:
            number = _KNOWN_NUMBERS[name]
            assert run(made, number, _X86_64, [numbers[name], 0, 0, 0, 0, 0])[0] == 0x50000 | (numbers[name] + 2)
            assert run(made, number, _X86_64, [_MASK64, 0, 0, 0, 0, 0])[0] == ACTIONS["SCMP_ACT_ALLOW"]


_KNOWN_NUMBERS: Final = {"accept": 43, "getpid": 39, "openat": 257, "brk": 12}


def test_a_filter_longer_than_the_kernel_takes_is_refused(compiler: Compiler) -> None:
    conditions = [(i, "EQ", 1 << 40, 0) for i in range(6)]
    rules = [rule("write", action="ERRNO", errnoret=i, args=conditions) for i in range(2, 400)]
    assert "4096" in compiler.answer(profile_of(*rules))[0]


@pytest.mark.parametrize(
    ("profile", "word"),
    [
        (profile_of(default="NOTIFY"), "SCMP_ACT_NOTIFY"),
        (profile_of(default="MAYBE"), "SCMP_ACT_MAYBE"),
        (profile_of(rule("read", action="NOTIFY")), "SCMP_ACT_NOTIFY"),
        (profile_of(rule("read", action="ERRNO", errnoret=4096)), "4096"),
        (profile_of(rule("read", action="TRACE", errnoret=65536)), "65536"),
        (profile_of(rule("read", args=[(6, "EQ", 0, 0)])), "index 6"),
        (profile_of(rule("read", args=[(0, "LIKE", 0, 0)])), "SCMP_CMP_LIKE"),
        ({**profile_of(), "Flags": ["SECCOMP_FILTER_FLAG_NEW_LISTENER"]}, "NEW_LISTENER"),
        ({"Syscalls": [rule("read")]}, "default action"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_done_is_refused_and_named(compiler: Compiler, profile: Profile, word: str) -> None:
    (line,) = compiler.answer(profile)
    assert line.startswith("3 ")  # INVALID_ARGUMENT
    assert word in line


def test_an_empty_description_is_no_filter(compiler: Compiler) -> None:
    assert compiler.answer({}) == ["ok 0"]


def test_flags_are_the_kernels(compiler: Compiler) -> None:
    flags = [f"SECCOMP_FILTER_FLAG_{name}" for name in ("TSYNC", "LOG", "SPEC_ALLOW")]
    assert compiler.answer({**profile_of(), "Flags": flags})[0] == "ok 7"


# --- the kernel ---


def tried(program: Path, profile: Profile, work: Path, *calls: str) -> list[str]:
    return answers(program, "try", write(profile, work / "profile"), *calls)


def test_the_kernel_takes_a_filter_and_goes_by_it(program: Path, tmp_path: Path) -> None:
    profile = profile_of(
        rule("getppid", action="ERRNO", errnoret=99),
        rule("personality", action="ERRNO", errnoret=98, args=[(0, "EQ", _MASK64, 0)]),
        rule("dup2", action="ERRNO", errnoret=97, args=[(0, "GT", 2**32, 0), (1, "LE", 5, 0)]),
        rule("sync", action="KILL_PROCESS"),
        rule("getuid", action="TRAP"),
        default="ALLOW",
    )
    calls = {
        "110": "99",
        f"135,{_MASK64}": "98",
        f"135,{_MASK32}": "0",
        f"33,{2**32 + 1},5": "97",
        f"33,{2**32},5": str(errno.EBADF),
        f"33,{2**32 + 1},6": str(errno.EBADF),
        "162": "signal 31",
        "102": "signal 31",
        "39": "0",
    }
    # fd 0 of 2**32 is 0: dup2(0, 5) works, so those two say 0 where standard input is open
    found = dict(zip(calls, tried(program, profile, tmp_path, *calls), strict=True))
    for call, expected in calls.items():
        assert found[call] in ({expected, "0"} if expected == str(errno.EBADF) else {expected}), call


def test_the_kernel_takes_a_filter_of_dockers_size(program: Path, libseccomp: Libseccomp, tmp_path: Path) -> None:
    found = tried(program, _docker_sized(libseccomp), tmp_path, "39", "41,40", "41,1,1", "169", "435", "165")
    assert found == ["0", "1", "0", "1", str(errno.ENOSYS), "1"]
