"""Reads agent/proto/*.proto when the program runs: no compiler, no generated code.

What is understood is what those files use: proto3 with package, import, messages (nested too), enums, oneof, map,
repeated, optional, services with unary methods, and comments. Everything else is an error with its file and line.
google.protobuf is imported on first use only: most commands never talk to a guest.
"""

from __future__ import annotations

import functools
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple, NoReturn

from osbuild.errors import BuildError
from osbuild.resources import resource

if TYPE_CHECKING:
    from google.protobuf.descriptor_pb2 import (
        DescriptorProto,
        EnumDescriptorProto,
        FieldDescriptorProto,
        FileDescriptorProto,
        ServiceDescriptorProto,
    )
    from google.protobuf.descriptor_pool import DescriptorPool

_SCALARS: Final = frozenset({
    "bool", "bytes", "double", "fixed32", "fixed64", "float", "int32", "int64", "sfixed32", "sfixed64", "sint32",
    "sint64", "string", "uint32", "uint64",
})  # fmt: skip
_MAP_KEYS: Final = _SCALARS - {"bytes", "double", "float"}
_LABELS: Final = frozenset({"repeated", "optional"})
_WELL_KNOWN: Final = frozenset({"google/protobuf/any.proto", "google/protobuf/empty.proto"})
_LAST_NUMBER: Final = (1 << 29) - 1
_RESERVED: Final = range(19000, 20000)  # protobuf keeps these for itself
_TOKEN: Final = re.compile(
    r"""(?P<skip> [ \t\r\n]+ | //[^\n]* | /\*.*?\*/ )
    | "[^"\n]*"
    | [A-Za-z_][A-Za-z0-9_.]*
    | (?: 0 | [1-9][0-9]{0,9} ) (?![A-Za-z0-9_.])
    | [{}()<>=;,]
    """,
    re.DOTALL | re.VERBOSE,
)


@dataclass(frozen=True, slots=True)
class Method:
    """The classes of what a method takes and gives."""

    request: Any  # Any, here and below: classes made at run time have no attributes a checker could know
    response: Any


class Schema:
    """What a directory of .proto files describes."""

    def __init__(self, pool: DescriptorPool, directory: Path) -> None:
        self._pool = pool
        self._directory = directory

    def message(self, name: str) -> Any:
        """The class of a message, by full name: `grpc.CheckRequest`."""
        from google.protobuf.message_factory import GetMessageClass

        try:
            return GetMessageClass(self._pool.FindMessageTypeByName(name))
        except KeyError:
            raise BuildError(f"{self._directory} describes no message {name!r}") from None

    def method(self, service: str, name: str) -> Method:
        """What a method takes and gives, by the service's full name and the method's own."""
        from google.protobuf.message_factory import GetMessageClass

        try:
            found = self._pool.FindServiceByName(service).methods_by_name[name]
        except KeyError:
            raise BuildError(f"{self._directory} describes no method {name!r} of {service!r}") from None
        return Method(GetMessageClass(found.input_type), GetMessageClass(found.output_type))

    def methods(self, service: str) -> tuple[str, ...]:
        """The names of a service's methods, in the order of the file."""
        try:
            return tuple(method.name for method in self._pool.FindServiceByName(service).methods)
        except KeyError:
            raise BuildError(f"{self._directory} describes no service {service!r}") from None


def message(name: str) -> Any:
    """The class of a message in agent/proto, by full name: `grpc.CheckRequest`."""
    return schema().message(name)


def method(service: str, name: str) -> Method:
    """What a method in agent/proto takes and gives: `method("grpc.AgentService", "GetGuestDetails")`."""
    return schema().method(service, name)


_loading = threading.Lock()


def schema() -> Schema:
    """What agent/proto describes, read once."""
    # Two threads that both find the cache empty would make two sets of classes that refuse each other's messages.
    with _loading:
        return _own_schema()


@functools.cache
def _own_schema() -> Schema:
    return load(resource("agent/proto"))


def load(directory: Path) -> Schema:
    """Read every .proto file of a directory; BuildError names the file and line of the first thing that is wrong."""
    from google.protobuf.descriptor_pool import DescriptorPool

    pool = DescriptorPool()
    for file in parse(directory):
        try:
            pool.Add(file)
        except TypeError as problem:
            raise BuildError(f"{directory / file.name}: {problem}") from problem
    return Schema(pool, directory)


def parse(directory: Path) -> list[FileDescriptorProto]:
    """The directory's files as protoc would describe them, each after what it imports."""
    sources = {path.name: _Parser(path).parse() for path in sorted(directory.glob("*.proto"))}
    if not sources:
        raise BuildError(f"{directory} holds no .proto files")
    ordered: dict[str, FileDescriptorProto] = {}
    for name in sources:
        _order(name, sources, ordered, under_way=())
    for source in sources.values():
        visible = dict(source.names)
        for imported in source.imports:
            visible |= sources[imported].names if imported in sources else _names_in(ordered[imported])
        for reference in source.references:
            reference.resolve(visible)
    return list(ordered.values())


def _order(
    name: str, sources: Mapping[str, _Source], ordered: dict[str, FileDescriptorProto], *, under_way: tuple[str, ...]
) -> None:
    """Put `name` into `ordered`, after its imports."""
    if name in ordered:
        return
    for imported, where in sources[name].imports.items():
        if imported in _WELL_KNOWN:
            ordered.setdefault(imported, _well_known(imported))
        elif imported in (*under_way, name):
            raise BuildError(f"{where}: {imported} and {name} import each other")
        elif imported not in sources:
            raise BuildError(f'{where}: there is no "{imported}" to import')
        else:
            _order(imported, sources, ordered, under_way=(*under_way, name))
    ordered[name] = sources[name].file


def _well_known(name: str) -> FileDescriptorProto:
    from google.protobuf import any_pb2, descriptor_pb2, empty_pb2

    known = {module.DESCRIPTOR.name: module.DESCRIPTOR for module in (any_pb2, empty_pb2)}
    return descriptor_pb2.FileDescriptorProto.FromString(known[name].serialized_pb)


def _names_in(file: FileDescriptorProto) -> dict[str, bool]:
    return {f"{file.package}.{item.name}": False for item in file.message_type}


class _Token(NamedTuple):
    text: str
    line: int


@dataclass(frozen=True, slots=True)
class _Reference:
    """A type that was named, to be found when all files are read."""

    name: str
    scope: str  # the full name of the message or package it was named in
    where: str
    found: Callable[[str, bool], None]

    def resolve(self, names: Mapping[str, bool]) -> None:
        """Innermost scope first, as protoc does it."""
        scope = self.scope
        while True:
            candidate = f"{scope}.{self.name}" if scope else self.name
            if candidate in names:
                self.found(f".{candidate}", names[candidate])
                return
            if not scope:
                raise BuildError(f"{self.where}: no message or enum {self.name} here or in what is imported")
            scope = scope.rpartition(".")[0]


@dataclass(frozen=True, slots=True)
class _Source:
    """One file, read, with its types still to be connected."""

    file: FileDescriptorProto
    imports: dict[str, str] = field(default_factory=dict)  # name -> where
    names: dict[str, bool] = field(default_factory=dict)  # full name of a type -> is it an enum
    references: list[_Reference] = field(default_factory=list)


class _Parser:
    """Recursive descent over one file."""

    def __init__(self, path: Path) -> None:
        from google.protobuf.descriptor_pb2 import FileDescriptorProto

        self._path = path
        self._tokens = self._split()
        self._next = 0
        self._taken: set[str] = set()  # every full name declared in this file
        self._source = _Source(FileDescriptorProto(name=path.name))

    def parse(self) -> _Source:
        for word in ("syntax", "=", '"proto3"', ";"):
            self._expect(word)
        self._source.file.syntax = "proto3"
        self._expect("package")
        self._source.file.package = self._identifier("a package")
        self._expect(";")
        while self._peek() == "import":
            self._import()
        package = self._source.file.package
        while self._peek():
            match self._peek():
                case "message":
                    self._message(self._source.file.message_type.add(), package)
                case "enum":
                    self._enum(self._source.file.enum_type.add(), package)
                case "service":
                    self._service(self._source.file.service.add(), package)
                case other:
                    self._refuse(f"expected message, enum or service, found {other!r}")
        return self._source

    def _split(self) -> list[_Token]:
        try:
            text = self._path.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as problem:
            raise BuildError(f"cannot read {self._path}: {problem}") from problem
        tokens: list[_Token] = []
        at, line = 0, 1
        while at < len(text):
            found = _TOKEN.match(text, at)
            if found is None:
                raise BuildError(
                    f"{self._path}:{line}: {text[at : at + 12].splitlines()[0]!r} is not proto3 as we use it"
                )
            if found["skip"] is None:
                tokens.append(_Token(found[0], line))
            line += found[0].count("\n")
            at = found.end()
        tokens.append(_Token("", line))
        return tokens

    # Words

    def _peek(self) -> str:
        return self._tokens[self._next].text

    def _take(self) -> str:
        text = self._peek()
        if text:  # the empty one at the end stays
            self._next += 1
        return text

    def _expect(self, text: str) -> None:
        if self._peek() != text:
            self._refuse(f"expected {text!r}, found {self._peek() or 'the end of the file'!r}")
        self._take()

    def _identifier(self, what: str) -> str:
        """A name, perhaps with dots."""
        text = self._peek()
        if not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", text):
            self._refuse(f"expected the name of {what}, found {text or 'the end of the file'!r}")
        return self._take()

    def _declare(self, scope: str, what: str) -> str:
        """A new name, which nothing else in this scope may have."""
        name = self._peek()
        if "." in name:
            self._refuse(f"the name of {what} has no dots: {name!r}")
        self._identifier(what)
        if f"{scope}.{name}" in self._taken:
            self._refuse(f"{scope} has two things called {name}", back=1)
        self._taken.add(f"{scope}.{name}")
        return name

    def _number(self) -> int:
        if not self._peek().isdigit():
            self._refuse(f"expected a number, found {self._peek() or 'the end of the file'!r}")
        return int(self._take())

    def _where(self, *, back: int = 0) -> str:
        return f"{self._path}:{self._tokens[self._next - back].line}"

    def _refuse(self, problem: str, *, back: int = 0) -> NoReturn:
        raise BuildError(f"{self._where(back=back)}: {problem}")

    def _body(self) -> Iterator[str]:
        """The first word of each statement between braces."""
        self._expect("{")
        while self._peek() != "}":
            if not self._peek():
                self._refuse("expected '}', found 'the end of the file'")
            yield self._peek()
        self._take()

    # Statements

    def _import(self) -> None:
        where = self._where()
        self._take()
        text = self._peek()
        if not text.startswith('"'):
            self._refuse(f"expected a file name in quotes, found {text!r}")
        name = self._take().strip('"')
        if name in self._source.imports:
            self._refuse(f"{name} is imported twice", back=1)
        self._expect(";")
        self._source.imports[name] = where
        self._source.file.dependency.append(name)

    def _message(self, made: DescriptorProto, scope: str) -> None:
        self._expect("message")
        made.name = self._declare(scope, "a message")
        inside = f"{scope}.{made.name}"
        self._source.names[inside] = False
        for word in self._body():
            if word == "message":
                self._message(made.nested_type.add(), inside)
            elif word == "enum":
                self._enum(made.enum_type.add(), inside)
            elif word == "oneof":
                self._oneof(made, inside)
            elif word == "map":
                self._map(made, inside)
            else:
                label = self._take() if word in _LABELS else ""
                self._field(made, inside, label)
        # What protoc does: presence of a scalar is a oneof of one, after all the real ones.
        for member in made.field:
            if member.proto3_optional:
                member.oneof_index = len(made.oneof_decl)
                made.oneof_decl.add(name=f"_{member.name}")

    def _oneof(self, made: DescriptorProto, scope: str) -> None:
        self._take()
        index = len(made.oneof_decl)
        made.oneof_decl.add(name=self._declare(scope, "a oneof"))
        for word in self._body():
            if word in _LABELS or word == "map":
                self._refuse(f"{word} has no place in a oneof")
            self._field(made, scope, "").oneof_index = index
        if not any(member.HasField("oneof_index") and member.oneof_index == index for member in made.field):
            self._refuse("a oneof of nothing", back=1)

    def _field(self, made: DescriptorProto, scope: str, label: str) -> FieldDescriptorProto:
        from google.protobuf.descriptor_pb2 import FieldDescriptorProto

        member = FieldDescriptorProto(label=FieldDescriptorProto.LABEL_OPTIONAL)
        if label == "repeated":
            member.label = FieldDescriptorProto.LABEL_REPEATED
        if label == "optional":
            member.proto3_optional = True
        made.field.append(member)
        member = made.field[-1]
        self._type(member, scope)
        member.name = self._declare(scope, "a field")
        member.number = self._tag(made)
        return member

    def _map(self, made: DescriptorProto, scope: str) -> None:
        from google.protobuf.descriptor_pb2 import FieldDescriptorProto

        self._take()
        self._expect("<")
        if self._peek() not in _MAP_KEYS:
            self._refuse(f"{self._peek()!r} cannot be the key of a map")
        entry = made.nested_type.add()
        entry.options.map_entry = True
        for number, (name, end) in enumerate((("key", ","), ("value", ">")), start=1):
            part = entry.field.add(name=name, number=number, label=FieldDescriptorProto.LABEL_OPTIONAL)
            self._type(part, scope)
            self._expect(end)
        member = made.field.add(label=FieldDescriptorProto.LABEL_REPEATED, type=FieldDescriptorProto.TYPE_MESSAGE)
        member.name = self._declare(scope, "a field")
        entry.name = "".join(part[:1].upper() + part[1:] for part in member.name.split("_")) + "Entry"
        member.type_name = f".{scope}.{entry.name}"
        member.number = self._tag(made)

    def _type(self, member: FieldDescriptorProto, scope: str) -> None:
        from google.protobuf.descriptor_pb2 import FieldDescriptorProto

        where = self._where()
        name = self._identifier("a type")
        if name in _SCALARS:
            member.type = FieldDescriptorProto.Type.Value(f"TYPE_{name.upper()}")
            return

        def found(full: str, is_enum: bool) -> None:
            member.type = FieldDescriptorProto.TYPE_ENUM if is_enum else FieldDescriptorProto.TYPE_MESSAGE
            member.type_name = full

        self._source.references.append(_Reference(name, scope, where, found))

    def _tag(self, made: DescriptorProto) -> int:
        """`= number;`, a number that no other field of the message has."""
        self._expect("=")
        number = self._number()
        if not 0 < number <= _LAST_NUMBER or number in _RESERVED:
            self._refuse(f"{number} cannot be the number of a field", back=1)
        if any(member.number == number for member in made.field):
            self._refuse(f"two fields of {made.name} have number {number}", back=1)
        self._expect(";")
        return number

    def _enum(self, made: EnumDescriptorProto, scope: str) -> None:
        self._expect("enum")
        made.name = self._declare(scope, "an enum")
        self._source.names[f"{scope}.{made.name}"] = True
        for _ in self._body():
            value = made.value.add(name=self._declare(scope, "a value"))  # siblings of their enum, as in C++
            self._expect("=")
            value.number = self._number()
            if value.number >= 1 << 31 or any(other.number == value.number for other in made.value[:-1]):
                self._refuse(f"{value.number} is too big or taken in {made.name}", back=1)
            self._expect(";")
        if not made.value or made.value[0].number != 0:
            self._refuse(f"the first value of {made.name} must be 0", back=1)

    def _service(self, made: ServiceDescriptorProto, scope: str) -> None:
        self._expect("service")
        made.name = self._declare(scope, "a service")
        inside = f"{scope}.{made.name}"
        for _ in self._body():
            self._expect("rpc")
            method = made.method.add(name=self._declare(inside, "a method"))
            self._signature(inside, functools.partial(setattr, method, "input_type"))
            self._expect("returns")
            self._signature(inside, functools.partial(setattr, method, "output_type"))
            self._expect(";")

    def _signature(self, scope: str, keep: Callable[[str], None]) -> None:
        """A message in parentheses."""
        self._expect("(")
        where = self._where()
        name = self._identifier("a message")
        self._expect(")")

        def found(full: str, is_enum: bool) -> None:
            if is_enum:
                raise BuildError(f"{where}: {name} is an enum; methods take and give messages")
            keep(full)

        self._source.references.append(_Reference(name, scope, where, found))
