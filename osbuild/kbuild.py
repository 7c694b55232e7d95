"""Which objects a configuration compiles, from the tree's own Makefiles: obj-y, obj-$(CONFIG_X), name-y, ifdef.

A small part of make: assignments, $(VARIABLE), conditionals, and the functions that kernel Makefiles choose objects
with. A function it does not know gives nothing, and the objects behind it are not foretold: whoever asks compares with
a real build. Nothing is run.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

# The directories of a tree whose top has no Kbuild to name them.
_ALWAYS: Final = ("init/", "usr/", "kernel/", "certs/", "mm/", "fs/", "ipc/", "security/", "crypto/", "block/")
_MORE: Final = ("io_uring/", "rust/", "lib/", "drivers/", "sound/", "samples/", "net/", "virt/")
_ARCH_DIRECTORY: Final = {"x86_64": "x86"}  # elsewhere the same as ARCH

_NAME: Final = r"(?:[\w./@%,-]|\$\((?:[^()]|\([^()]*\))*\))+?"  # of a variable; it may hold $(subst m,y,$(CONFIG_X))
_ASSIGN: Final = re.compile(rf"^\s*(?:export\s+|override\s+)*({_NAME})\s*(\+=|:=|::=|\?=|=)\s*(.*)$")
_LIST: Final = re.compile(r"\t\s*(?:obj|lib|[\w-]+)-(?:y|objs|\$\S+)\s*[:+]?=")
_CONDITION: Final = re.compile(r"^\s*(ifdef|ifndef|ifeq|ifneq)\b\s*(.*)$")
_ELSE: Final = re.compile(r"^\s*else\b\s*(.*)$")
_PAIR: Final = re.compile(r"""^\(\s*(.*?)\s*,\s*(.*?)\s*\)\s*(?:\#.*)?$|^"(.*?)"\s+"(.*?)"|^'(.*?)'\s+'(.*?)'""")
_DEEP: Final = 40  # nested references: more is a variable that names itself


def objects(tree: Path, arch: str, config: Mapping[str, str]) -> frozenset[str]:
    """The objects below their directories; `arch` is make's ARCH, `config` as kconfig.parse_config gives it."""
    here = source_arch(arch)
    world = {"SRCARCH": here, "ARCH": arch, "srctree": str(tree), **config}
    if config.get("CONFIG_64BIT"):
        world |= {"BITS": "64"}
    if here == "x86":
        world |= {"UTS_MACHINE": "x86_64"} | ({"BITS": "64"} if "CONFIG_X86_64" in config else {"BITS": "32"})
    found: set[str] = set()
    if (tree / "Kbuild").is_file():
        _enter(tree, "", world, found, name="Kbuild")
        _enter(tree, "lib/", world, found)  # the top Makefile's libs-y
    else:
        for directory in (*_ALWAYS, *_MORE):
            _enter(tree, directory, world, found)
    _arch(tree, f"arch/{here}/", world, found)
    return frozenset(found)


def source_arch(arch: str) -> str:
    """make's SRCARCH: the directory below arch/ of an ARCH."""
    return _ARCH_DIRECTORY.get(arch, arch)


def _arch(tree: Path, home: str, world: Mapping[str, str], found: set[str]) -> None:
    """arch/X/Makefile names the rest: core-y, libs-y, drivers-y; Kbuild in it is entered for obj-y."""
    if not (tree / home / "Makefile").is_file():
        return
    makefile = _Makefile(tree, home, "Makefile", world)
    _enter(tree, home, world, found, name="Kbuild")
    for list_name in ("core-y", "drivers-y", "libs-y", "net-y", "virt-y"):
        for word in makefile.words(list_name):
            if word.endswith("/") and word.startswith("arch/"):
                _enter(tree, word, world, found)


def _enter(tree: Path, home: str, world: Mapping[str, str], found: set[str], *, name: str = "") -> None:
    names = (name,) if name else ("Kbuild", "Makefile")
    file = next((each for each in names if (tree / home / each).is_file()), "")
    if not file:
        return
    makefile = _Makefile(tree, home, file, world)
    for word in dict.fromkeys([*makefile.words("obj-y"), *makefile.words("lib-y")]):
        if word.endswith("/"):
            _enter(tree, _join(home, word), world, found)
        elif word.endswith(".o"):
            found.update(_join(home, part) for part in makefile.parts(word))
    for word in makefile.words("subdir-y") if file == "Kbuild" else ():
        _enter(tree, _join(home, f"{word.rstrip('/')}/"), world, found)


def _join(home: str, word: str) -> str:
    parts: list[str] = []
    for part in f"{home}{word}".split("/"):
        if part == ".." and parts:
            parts.pop()
        elif part != ".":
            parts.append(part)
    return "/".join(parts)


class _Makefile:
    """The variables that a Makefile leaves."""

    def __init__(self, tree: Path, home: str, name: str, world: Mapping[str, str]) -> None:
        self._tree, self._home = tree, home
        self._values: dict[str, str] = {"obj": home.rstrip("/"), "src": home.rstrip("/"), **world}
        self._read(tree / home / name, 0)

    def words(self, name: str) -> list[str]:
        """A list variable."""
        return self._expand(self._values.get(name, "")).split()

    def parts(self, word: str) -> list[str]:
        """The objects of a composite one, or itself."""
        stem = word.removesuffix(".o")
        inside = [*self.words(f"{stem}-y"), *self.words(f"{stem}-objs"), *self.words(f"{stem}-objs-y")]
        return [part for part in dict.fromkeys(inside) if part.endswith(".o")] or [word]

    def _read(self, path: Path, depth: int) -> None:
        active: list[list[bool]] = []  # of each open conditional: this branch, and whether one was taken before
        for line in _lines(path):
            if match := _CONDITION.match(line):
                on = all(level[0] for level in active) and self._holds(match[1], match[2])
                active.append([on, on])
            elif re.match(r"^\s*endif\b", line):
                if active:
                    active.pop()
            elif match := _ELSE.match(line):
                if active:
                    outer = all(level[0] for level in active[:-1])
                    again = _CONDITION.match(match[1])
                    on = outer and not active[-1][1] and (again is None or self._holds(again[1], again[2]))
                    active[-1] = [on, active[-1][1] or on]
            elif all(level[0] for level in active):
                self._take(line, depth)

    def _take(self, line: str, depth: int) -> None:
        if line.startswith("\t") and not _LIST.match(line):  # a recipe's line, most likely
            return
        if match := re.match(r"^\s*-?include\s+(.*)$", line):
            for word in self._expand(match[1]).split():
                path = Path(word) if word.startswith("/") else self._tree / word
                if depth < 3 and path.is_file():
                    self._read(path, depth + 1)
        elif (match := _ASSIGN.match(line)) and ":" not in match[1]:
            name, kind, value = self._expand(match[1]).strip(), match[2], match[3]
            if kind in (":=", "::="):
                value = self._expand(value)
            if kind == "+=":
                value = f"{self._values.get(name, '')} {self._expand(value)}"
            if kind != "?=" or name not in self._values:
                self._values[name] = value

    def _holds(self, kind: str, text: str) -> bool:
        if kind in ("ifdef", "ifndef"):
            name = self._expand(text.split("#")[0].strip())
            return bool(self._values.get(name, "")) is (kind == "ifdef")
        match = _PAIR.match(text.strip())
        if match is None:
            return False
        left, right = next((match[i], match[i + 1]) for i in (1, 3, 5) if match[i] is not None)
        return (self._expand(left).strip() == self._expand(right).strip()) is (kind == "ifeq")

    def _expand(self, text: str, depth: int = 0) -> str:
        if "$" not in text or depth > _DEEP:
            return text
        out, at = [], 0
        while (dollar := text.find("$", at)) >= 0:
            out.append(text[at:dollar])
            if text[dollar + 1 : dollar + 2] not in ("(", "{"):
                at = dollar + 2
                continue
            end = _closing(text, dollar + 1)
            out.append(self._value(text[dollar + 2 : end], depth))
            at = end + 1
        return "".join([*out, text[at:]])

    def _value(self, inside: str, depth: int) -> str:
        word, blank, rest = inside.partition(" ")
        if blank and word in _FUNCTIONS:
            return self._call(word, rest, depth)
        name = self._expand(inside, depth + 1)
        if ":" in name:  # $(list:.c=.o)
            name, _, change = name.partition(":")
            old, _, new = change.partition("=")
            words = self._expand(self._values.get(name, ""), depth + 1).split()
            return " ".join(w.removesuffix(old) + new if w.endswith(old) else w for w in words)
        return self._expand(self._values.get(name.strip(), ""), depth + 1)

    def _call(self, name: str, rest: str, depth: int) -> str:
        arguments = list(_arguments(rest))
        if name == "if":
            taken = self._expand(arguments[0], depth + 1).strip()
            chosen = arguments[1] if taken else (arguments[2] if len(arguments) > 2 else "")
            return self._expand(chosen, depth + 1)
        values = [self._expand(argument, depth + 1) for argument in arguments]
        match name, values:
            case "or", _:
                return next((value for value in values if value.strip()), "")
            case "and", _:
                return values[-1] if all(value.strip() for value in values) else ""
            case "subst", [old, new, text]:
                return text.replace(old, new)
            case "strip", [text]:
                return " ".join(text.split())
            case (("filter" | "filter-out"), [patterns, text]):
                wanted = [re.compile(re.escape(p).replace("%", ".*")) for p in patterns.split()]
                keep = name == "filter"
                return " ".join(w for w in text.split() if any(c.fullmatch(w) for c in wanted) is keep)
            case (("addprefix" | "addsuffix"), [affix, text]):
                return " ".join(affix + w if name == "addprefix" else w + affix for w in text.split())
        return ""


_FUNCTIONS: Final = frozenset((
    "if", "or", "and", "subst", "strip", "filter", "filter-out", "addprefix", "addsuffix", "shell", "call", "wildcard",
    "foreach", "patsubst", "notdir", "basename", "dir", "sort", "word", "words", "error", "warning", "eval", "origin",
))  # fmt: skip


def _lines(path: Path) -> Iterator[str]:
    """Logical lines without comments; `define` blocks are somebody else's."""
    text = path.read_text(errors="replace").replace("\\\n", " ")
    inside = False
    for line in text.split("\n"):
        if re.match(r"^\s*define\b", line):
            inside = True
        elif inside:
            inside = re.match(r"^\s*endef\b", line) is None
        else:
            yield re.sub(r"(?<!\\)#.*", "", line).rstrip()


def _closing(text: str, start: int) -> int:
    """Where the bracket at `start` ends; the end of the text when it does not."""
    opening = text[start]
    closing = ")" if opening == "(" else "}"
    level = 0
    for at in range(start, len(text)):
        if text[at] == opening:
            level += 1
        elif text[at] == closing:
            level -= 1
            if level == 0:
                return at
    return len(text)


def _arguments(text: str) -> Iterator[str]:
    level, begin = 0, 0
    for at, character in enumerate(text):
        if character in "({":
            level += 1
        elif character in ")}":
            level -= 1
        elif character == "," and level == 0:
            yield text[begin:at]
            begin = at + 1
    yield text[begin:]
