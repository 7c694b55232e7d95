"""Small random Kconfig files: acyclic, but otherwise with everything that decides a value."""

from __future__ import annotations

import random
from collections.abc import Iterator

KINDS = ("bool", "bool", "bool", "tristate", "tristate", "int", "hex", "string")


class Writer:
    """One file; symbols refer only to those before them, so nothing hangs on itself."""

    def __init__(self, seed: int, *, modules: bool = True) -> None:
        self.modules = modules
        self.random = random.Random(seed)
        self.kinds: dict[str, str] = {}
        self.pushing: dict[str, str] = {}  # what selects or implies, and what hangs on that

    def switches(self) -> list[str]:
        return [name for name, kind in self.kinds.items() if kind in ("bool", "tristate")]

    def word(self) -> str:
        names = self.switches()
        return self.random.choice(names) if names and self.random.random() < 0.93 else self.random.choice("ynm")

    def condition(self, depth: int = 2) -> str:
        """A random expression."""
        r = self.random.random()
        if depth == 0 or r < 0.35:
            return self.word()
        if r < 0.5:
            return f"!{self.word()}"
        if r < 0.6:
            # Not "!= y": of a bool that makes conf itself go wrong (see conf_oracle).
            return self.word() + self.random.choice(("=y", "=m", "=n", "!=m", "!=n"))
        numbers = [name for name, kind in self.kinds.items() if kind == "int"]
        if r < 0.66 and numbers:
            operator = self.random.choice(("<", ">", "<=", ">=", "=", "!="))
            return f"{self.random.choice(numbers)} {operator} {self.random.randint(0, 20)}"
        operator = self.random.choice((" && ", " || "))
        return "(" + operator.join(self.condition(depth - 1) for _ in range(2)) + ")"

    def maybe_if(self, chance: float = 0.4) -> str:
        return f" if {self.condition()}" if self.random.random() < chance else ""

    def value(self, kind: str) -> str:
        """A random value of a kind, as .config has it."""
        if kind == "int":
            return str(self.random.randint(0, 30))
        if kind == "hex":
            return hex(self.random.randint(0, 30))
        if kind == "string":
            return self.random.choice(('"a"', '"b c"', '""'))
        return self.random.choice("yyn" if kind == "bool" else "ymn")

    def text(self) -> str:
        lines = ["config MODULES", '\tbool "modules"', *(["\tmodules"] if self.modules else [])]
        self.kinds["MODULES"] = "bool"
        for number in range(self.random.randint(4, 14)):
            lines += self.item(number)
        return "\n".join(lines) + "\n"

    def item(self, number: int) -> Iterator[str]:
        r = self.random.random()
        if r < 0.1:
            yield f"if {self.condition()}"
            yield from self.config(f"I{number}")
            yield "endif"
        elif r < 0.2:
            yield f'menu "m{number}"'
            if self.random.random() < 0.7:
                yield f"\tdepends on {self.condition()}"
            if self.random.random() < 0.5:
                yield f"\tvisible if {self.condition()}"
            yield from self.config(f"M{number}")
            yield "endmenu"
        elif r < 0.32:
            yield from self.choice(number)
        else:
            yield from self.config(f"S{number}")
            if self.random.random() < 0.1:  # a second definition
                yield from self.again(f"S{number}")

    def again(self, name: str) -> Iterator[str]:
        yield f"config {name}"
        if self.random.random() < 0.5:
            yield f"\tdepends on {self.condition_before(name)}"
        kind = self.kinds[name]
        yield f"\tdefault {self.value(kind)}"

    def condition_before(self, name: str) -> str:
        kind = self.kinds.pop(name)
        text = self.condition()
        self.kinds[name] = kind
        return text

    def config(self, name: str) -> Iterator[str]:
        kind = self.random.choice(KINDS)
        yield f"config {name}"
        prompt = self.random.random() < 0.65
        yield f'\t{kind} "{name}"{self.maybe_if(0.3)}' if prompt else f"\t{kind}"
        if self.random.random() < 0.45:
            yield f"\tdepends on {self.condition()}"
        for _ in range(self.random.choice((0, 1, 1, 2))):
            if kind in ("bool", "tristate"):
                yield f"\tdefault {self.random.choice(('y', 'm', 'n', self.condition()))}{self.maybe_if()}"
            else:
                yield f"\tdefault {self.value(kind)}{self.maybe_if()}"
        if kind in ("int", "hex") and self.random.random() < 0.5:
            low = self.random.randint(0, 15)
            ends = (low, low + self.random.randint(0, 10))
            yield "\trange " + " ".join(hex(end) if kind == "hex" else str(end) for end in ends) + self.maybe_if(0.3)
        if kind in ("bool", "tristate"):
            for word in ("select", "imply"):
                # Only what comes later is selected: the other way round it could hang on itself.
                if self.random.random() < 0.3:
                    self.pushing[name] = kind
                    yield f"\t{word} T{self.random.randint(0, 3)}{self.maybe_if()}"
        self.kinds[name] = kind

    def choice(self, number: int) -> Iterator[str]:
        yield "choice"
        yield f'\tprompt "c{number}"{self.maybe_if(0.3)}'
        names = [f"C{number}_{index}" for index in range(self.random.randint(2, 3))]
        if self.random.random() < 0.5:
            yield f"\tdepends on {self.condition()}"
        if self.random.random() < 0.6:
            yield f"\tdefault {self.random.choice(names)}{self.maybe_if(0.3)}"
        for name in names:
            yield f"config {name}"
            yield f'\tbool "{name}"{self.maybe_if(0.2)}'
            if self.random.random() < 0.3:
                yield f"\tdepends on {self.condition()}"
        yield "endchoice"
        self.kinds |= dict.fromkeys(names, "bool")

    def targets(self) -> str:
        """What the others select and imply."""
        lines = []
        self.kinds = {name: kind for name, kind in self.kinds.items() if name not in self.pushing}
        for number in range(4):
            kind = self.random.choice(("bool", "tristate"))
            lines += [f"config T{number}", f"\t{kind}"]
            if self.random.random() < 0.5:
                lines[-1] += f' "T{number}"{self.maybe_if(0.3)}'
            if self.random.random() < 0.3:
                lines.append(f"\tdepends on {self.condition()}")
            if self.random.random() < 0.3:
                lines.append(f"\tdefault y{self.maybe_if()}")
        self.kinds = self.kinds | self.pushing | {f"T{number}": "bool" for number in range(4)}
        return "\n".join(lines) + "\n"


def random_case(seed: int, *, modules: bool = True) -> tuple[str, dict[str, str]]:
    """A Kconfig file, and settings that somebody asks for."""
    writer = Writer(seed, modules=modules)
    text = writer.text()
    text += writer.targets()
    names = [name for name in writer.kinds if writer.random.random() < 0.6]
    writer.random.shuffle(names)
    return text, {name: writer.value(writer.kinds[name]) for name in names}
