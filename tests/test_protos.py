"""Our own .proto text: the same as protoc reads, and wrong text is refused with its place."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from osbuild import protos
from osbuild.errors import BuildError
from osbuild.resources import resource

# A scrap of everything the parser knows, beyond what agent/proto uses.
EVERYTHING = """
/* a comment
   over two lines */
syntax = "proto3";
package a.b; // deep
import "google/protobuf/empty.proto";
import "other.proto";
service S { rpc One(M) returns (google.protobuf.Empty); rpc Two(M.Inner) returns (c.Far); }
message M {
  message Inner { enum Kind { NONE = 0; SOME = 7; } Kind kind = 1; repeated Kind kinds = 2; optional Kind maybe = 3; }
  Inner first = 1;
  optional sint64 later_first = 536870911;
  oneof choice { string text = 2; Inner inner = 3; c.Far far = 4; }
  map<string, Inner> by_name_map = 5;
  map<uint32, c.Level> levels = 6;
  oneof other { fixed32 f = 7; double d = 8; }
  optional M m = 9;
  map<bool, bytes> camelCase = 10;
}
enum Top { ZERO = 0; }
message Empty {}
"""
OTHER = 'syntax = "proto3"; package c; message Far { Level level = 1; } enum Level { LOW = 0; HIGH = 1; }'


def described_by_protoc(directory: Path, out: Path) -> dict[str, object]:
    """What the real compiler makes of a directory."""
    protoc = shutil.which("protoc")
    if protoc is None:
        pytest.skip("protoc is not installed (apt-get install protobuf-compiler)")
    from google.protobuf.descriptor_pb2 import FileDescriptorSet

    names = sorted(path.name for path in directory.glob("*.proto"))
    made = out / "set.pb"
    subprocess.run([protoc, f"--proto_path={directory}", f"--descriptor_set_out={made}", *names], check=True)
    files = FileDescriptorSet.FromString(made.read_bytes()).file
    for file in files:
        for message in file.message_type:
            forget_json_names(message)
    return {file.name: file for file in files}


def described_by_us(directory: Path) -> dict[str, object]:
    return {file.name: file for file in protos.parse(directory) if not file.name.startswith("google/")}


def forget_json_names(message: Any) -> None:
    """They only matter to JSON, which nobody speaks here."""
    for member in message.field:
        member.ClearField("json_name")
    for nested in message.nested_type:
        forget_json_names(nested)


def test_protoc_reads_agent_proto_as_we_do(tmp_path: Path) -> None:
    theirs = described_by_protoc(resource("agent/proto"), tmp_path)
    assert described_by_us(resource("agent/proto")) == theirs
    assert theirs.keys() == {f"{name}.proto" for name in ("agent", "csi", "health", "oci", "ttrpc", "types")}


def test_protoc_reads_every_construct_as_we_do(tmp_path: Path) -> None:
    (tmp_path / "all.proto").write_text(EVERYTHING)
    (tmp_path / "other.proto").write_text(OTHER)
    theirs = described_by_protoc(tmp_path, tmp_path)
    assert described_by_us(tmp_path) == theirs
    assert protos.load(tmp_path).message("a.b.M")(text="x").WhichOneof("choice") == "text"


def test_every_file_comes_after_what_it_imports() -> None:
    done: set[str] = set()
    for file in protos.parse(resource("agent/proto")):
        assert set(file.dependency) <= done
        done.add(file.name)


# Vectors of kata-contract.md 1.6: the inner messages.
@pytest.mark.parametrize(
    ("name", "fields", "encoded"),
    [
        pytest.param("grpc.ReseedRandomDevRequest", {"data": b"\1\2\3\4"}, "120401020304", id="E reseed"),
        pytest.param(
            "grpc.GuestDetailsRequest", {"mem_block_size": True, "mem_hotplug_probe": True}, "08011001", id="F details"
        ),
        pytest.param("grpc.SetGuestDateTimeRequest", {"Sec": 1700000000, "Usec": 5}, "0880e2cfaa061005", id="G time"),
        pytest.param(
            "grpc.UpdateInterfaceRequest",
            {
                "interface": {
                    "device": "eth0",
                    "name": "eth0",
                    "IPAddresses": [{"address": "10.0.0.2", "mask": "24"}],
                    "mtu": 1500,
                    "hwAddr": "02:00:00:00:00:01",
                }
            },
            "0a320a04657468301204657468301a0e120831302e302e302e321a02323420dc0b2a1130323a30303a30303a30303a30303a3031",
            id="H interface",
        ),
        pytest.param("grpc.WaitProcessResponse", {"status": 137}, "088901", id="J 137"),
        pytest.param("grpc.WaitProcessResponse", {"status": -1}, "08ffffffffffffffffff01", id="J minus one"),
    ],
)
def test_a_message_encodes_to_the_contract_s_bytes(name: str, fields: dict[str, object], encoded: str) -> None:
    made = protos.message(name)(**fields)
    assert made.SerializeToString().hex() == encoded
    assert protos.message(name).FromString(bytes.fromhex(encoded)) == made


@pytest.mark.parametrize(
    ("message", "field", "number"),
    [
        ("grpc.ReseedRandomDevRequest", "data", 2),
        ("grpc.FSGroup", "group_id", 2),
        ("grpc.Interfaces", "Interfaces", 1),
        ("grpc.Routes", "Routes", 1),
        ("grpc.ARPNeighbors", "ARPNeighbors", 1),
        ("grpc.CreateContainerRequest", "OCI", 6),
        ("grpc.CreateContainerRequest", "shared_mounts", 8),
        ("types.Interface", "devicePath", 6),
        ("grpc.LinuxSyscall", "errnoret", 3),
    ],
)
def test_the_traps_of_the_contract_are_not_fallen_into(message: str, field: str, number: int) -> None:
    assert protos.message(message).DESCRIPTOR.fields_by_name[field].number == number


def test_presence_is_explicit_exactly_where_the_contract_says_so() -> None:
    compact = protos.message("grpc.MemAgentCompactConfig")(disabled=False)
    assert compact.HasField("disabled")
    assert compact.SerializeToString() == b"\x08\x00"
    assert protos.message("grpc.LinuxSyscall").DESCRIPTOR.oneofs_by_name.keys() == ["ErrnoRet"]


def test_the_agent_service_has_all_42_methods_and_health_has_two() -> None:
    assert len(protos.schema().methods("grpc.AgentService")) == 42
    assert protos.schema().methods("grpc.Health") == ("Check", "Version")


def test_a_method_gives_the_classes_of_its_messages() -> None:
    found = protos.method("grpc.AgentService", "UpdateInterface")
    assert found.request is protos.message("grpc.UpdateInterfaceRequest")
    assert found.response is protos.message("types.Interface")
    assert protos.method("grpc.AgentService", "SetPolicy").response is protos.message("google.protobuf.Empty")


def test_a_name_that_is_not_there_is_refused_by_name() -> None:
    with pytest.raises(BuildError, match=r"no message 'grpc\.Nothing'"):
        protos.message("grpc.Nothing")
    with pytest.raises(BuildError, match=r"no method 'Fly' of 'grpc\.AgentService'"):
        protos.method("grpc.AgentService", "Fly")
    with pytest.raises(BuildError, match=r"no service 'grpc\.No'"):
        protos.schema().methods("grpc.No")


def test_protobuf_is_not_imported_before_a_message_is_wanted() -> None:
    program = "import sys, osbuild.agent_client, osbuild.ttrpc; sys.exit('google.protobuf' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


HEAD = 'syntax = "proto3";\npackage p;\n'


@pytest.mark.parametrize(
    ("text", "line", "problem"),
    [
        pytest.param('syntax = "proto2";', 1, "expected '\"proto3\"'", id="another syntax"),
        pytest.param('syntax = "proto3";\nmessage M {}', 2, "expected 'package'", id="no package"),
        pytest.param(HEAD + "message M {\n  string a = 1\n}", 5, "expected ';', found '}'", id="no semicolon"),
        pytest.param(HEAD + "message M {\n  string a = 1;", 4, "found 'the end of the file'", id="no closing brace"),
        pytest.param(HEAD + "message M { string a = 1; bool b = 1; }", 3, "two fields of M have number 1", id="number"),
        pytest.param(HEAD + "message M { string a = 1; bool a = 2; }", 3, "two things called a", id="field twice"),
        pytest.param(HEAD + "message M {}\nmessage M {}", 4, "two things called M", id="message twice"),
        pytest.param(HEAD + "message M { string a = 0; }", 3, "0 cannot be the number", id="number zero"),
        pytest.param(HEAD + "message M { string a = 19001; }", 3, "19001 cannot be", id="reserved number"),
        pytest.param(HEAD + "message M { string a = 536870912; }", 3, "cannot be the number", id="number too big"),
        pytest.param(HEAD + "message M { string a = 01; }", 3, "not proto3 as we use it", id="octal"),
        pytest.param(HEAD + "message M { string a = x; }", 3, "expected a number, found 'x'", id="no number"),
        pytest.param(HEAD + "message M {\n  Missing a = 1; }", 4, "no message or enum Missing", id="unknown type"),
        pytest.param(HEAD + "message M { map<bytes, bool> a = 1; }", 3, "cannot be the key", id="map key"),
        pytest.param(HEAD + "message M { oneof o { repeated bool a = 1; } }", 3, "no place in a oneof", id="oneof"),
        pytest.param(HEAD + "message M { oneof o { } }", 3, "a oneof of nothing", id="empty oneof"),
        pytest.param(HEAD + "message M { string a.b = 1; }", 3, "has no dots", id="dotted name"),
        pytest.param(HEAD + "enum E { A = 1; }", 3, "must be 0", id="enum without zero"),
        pytest.param(HEAD + "enum E { A = 0; B = 0; }", 3, "taken in E", id="enum value twice"),
        pytest.param(HEAD + "enum E { A = 0; }\nenum F { A = 0; }", 4, "two things called A", id="enum siblings"),
        pytest.param(HEAD + "enum E { A = 0; }\nservice S { rpc X(E) returns (E); }", 4, "E is an enum", id="enum rpc"),
        pytest.param(HEAD + "service S { rpc X(stream M) returns (M); }", 3, "expected ')'", id="streaming"),
        pytest.param(HEAD + "option java_package = 1;", 3, "expected message, enum or service", id="option"),
        pytest.param(HEAD + 'import "nowhere.proto";', 3, 'no "nowhere.proto" to import', id="unknown import"),
        pytest.param(HEAD + 'import "bad.proto";', 3, "import each other", id="imports itself"),
        pytest.param(HEAD + "message M { /* never ends", 3, "not proto3 as we use it", id="open comment"),
        pytest.param(HEAD + "message M { string ä = 1; }", 3, "not proto3 as we use it", id="not ASCII"),
    ],
)
def test_wrong_text_is_refused_with_its_file_and_line(tmp_path: Path, text: str, line: int, problem: str) -> None:
    file = tmp_path / "bad.proto"
    file.write_text(text)
    with pytest.raises(BuildError, match=re.escape(problem)) as caught:
        protos.load(tmp_path)
    assert str(caught.value).startswith(f"{file}:{line}: ")


def test_a_type_of_a_file_that_is_not_imported_is_unknown(tmp_path: Path) -> None:
    (tmp_path / "a.proto").write_text(HEAD + "message M { p.N n = 1; }")
    (tmp_path / "b.proto").write_text(HEAD + "message N {}")
    with pytest.raises(BuildError, match=r"a\.proto:3: no message or enum p\.N"):
        protos.load(tmp_path)


def test_what_only_protobuf_notices_still_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "a.proto").write_text(HEAD + "message M {}")
    (tmp_path / "b.proto").write_text(HEAD + "message M {}")
    with pytest.raises(BuildError, match=r"b\.proto: "):
        protos.load(tmp_path)


def test_a_directory_without_proto_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=r"holds no \.proto files"):
        protos.load(tmp_path)


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.proto").write_bytes(b"\xff\xfe")
    with pytest.raises(BuildError, match=r"cannot read .*a\.proto"):
        protos.load(tmp_path)
