"""libseccomp, by ctypes, as a judge of filters; and a machine for classic BPF on which any two can be compared."""

from __future__ import annotations

import ctypes
import os
import struct
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any, Final

Instruction = tuple[int, int, int, int]  # code, jt, jf, k

ARCHES: Final = {"SCMP_ARCH_X86_64": 0xC000003E, "SCMP_ARCH_X86": 0x40000003, "SCMP_ARCH_X32": 0x4000003E}
ACTIONS: Final = {
    "SCMP_ACT_KILL": 0,
    "SCMP_ACT_KILL_THREAD": 0,
    "SCMP_ACT_KILL_PROCESS": 0x80000000,
    "SCMP_ACT_TRAP": 0x00030000,
    "SCMP_ACT_ERRNO": 0x00050000,
    "SCMP_ACT_TRACE": 0x7FF00000,
    "SCMP_ACT_LOG": 0x7FFC0000,
    "SCMP_ACT_ALLOW": 0x7FFF0000,
}
OPS: Final = ("NE", "LT", "LE", "EQ", "GE", "GT", "MASKED_EQ")  # 1 … 7
_UNKNOWN: Final = -1
_EPERM: Final = 1


class _Argument(ctypes.Structure):
    _fields_ = (("arg", ctypes.c_uint), ("op", ctypes.c_int), ("a", ctypes.c_uint64), ("b", ctypes.c_uint64))


def action_number(rule: Mapping[str, Any], key: str = "Action") -> int:
    number = ACTIONS[rule[key]]
    return number | rule.get("errnoret", _EPERM) if rule[key] in ("SCMP_ACT_ERRNO", "SCMP_ACT_TRACE") else number


class Libseccomp:
    """Raises OSError where the library is not installed."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL("libseccomp.so.2")
        self._library.seccomp_init.restype = ctypes.c_void_p
        self._library.seccomp_init.argtypes = (ctypes.c_uint32,)
        self._library.seccomp_arch_add.argtypes = (ctypes.c_void_p, ctypes.c_uint32)
        self._library.seccomp_export_bpf.argtypes = (ctypes.c_void_p, ctypes.c_int)
        self._library.seccomp_release.argtypes = (ctypes.c_void_p,)
        self._library.seccomp_syscall_resolve_name.argtypes = (ctypes.c_char_p,)
        self._library.seccomp_rule_add_array.argtypes = (
            ctypes.c_void_p, ctypes.c_uint32, ctypes.c_int, ctypes.c_uint, ctypes.c_void_p,
        )  # fmt: skip

    def number(self, name: str) -> int:
        return int(self._library.seccomp_syscall_resolve_name(name.encode()))

    def compile(self, profile: Mapping[str, Any]) -> list[Instruction]:
        """As runc and Kata's agent use it: rules that change nothing and names it does not know are left out."""
        default = action_number(profile, "DefaultAction")
        context = self._library.seccomp_init(default)
        for arch in profile.get("Architectures", ()):
            self._library.seccomp_arch_add(context, ARCHES[arch])  # -EEXIST for the native one
        for rule in profile.get("Syscalls", ()):
            if action_number(rule) != default:
                self._add(context, rule)
        with tempfile.TemporaryFile() as file:
            if self._library.seccomp_export_bpf(context, file.fileno()) != 0:
                raise ValueError("libseccomp makes no program of it")
            file.seek(0)
            data = file.read()
        self._library.seccomp_release(context)
        return list(struct.iter_unpack("<HBBI", data))

    def _add(self, context: int, rule: Mapping[str, Any]) -> None:
        for name in rule["Names"]:
            number = self.number(name)
            if number == _UNKNOWN:
                continue
            for chosen in _alternatives(rule.get("Args", ())):
                arguments = (_Argument * len(chosen))(*chosen)
                action = action_number(rule)
                problem = self._library.seccomp_rule_add_array(context, action, number, len(chosen), arguments)
                if problem not in (0, -17):  # EEXIST: it is there already
                    raise ValueError(f"libseccomp refuses {rule}: {os.strerror(-problem)}")


def _alternatives(args: Sequence[Mapping[str, Any]]) -> list[list[_Argument]]:
    """All conditions together; or, where two are about the same argument, each by itself, as runc has it."""
    made = [
        _Argument(a["Index"], 1 + OPS.index(a["Op"].removeprefix("SCMP_CMP_")), a["Value"], a.get("ValueTwo", 0))
        for a in args
    ]
    indexes = [a["Index"] for a in args]
    return [[each] for each in made] if len(set(indexes)) < len(indexes) else [made]


def run(program: Sequence[Instruction], number: int, arch: int, args: Sequence[int]) -> tuple[int, int]:
    """The answer to one call, and how many instructions it took."""
    data = struct.pack("<iIQ6Q", ctypes.c_int32(number).value, arch, 0, *args)
    accumulator = at = steps = 0
    while True:
        code, yes, no, k = program[at]
        at += 1
        steps += 1
        match code:
            case 0x20:  # BPF_LD | BPF_W | BPF_ABS
                (accumulator,) = struct.unpack_from("<I", data, k)
            case 0x54:  # BPF_ALU | BPF_AND | BPF_K
                accumulator &= k
            case 0x05:  # BPF_JMP | BPF_JA
                at += k
            case 0x15:
                at += yes if accumulator == k else no
            case 0x25:
                at += yes if accumulator > k else no
            case 0x35:
                at += yes if accumulator >= k else no
            case 0x45:
                at += yes if accumulator & k else no
            case 0x06:  # BPF_RET | BPF_K
                return k, steps
            case _:
                raise ValueError(f"no instruction {code:#x}")
