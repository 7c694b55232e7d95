"""sbom.cdx.json: what is in a guest, as a CycloneDX 1.6 bill of materials; the same bytes for the same build.

Joined are the packages that the image's databases name, the kernel with its patches (pedigree) and its fragments, and
the agent. Sources: CycloneDX 1.6 JSON schema; the package-url specification and its types deb, apk, rpm and generic.
"""

from __future__ import annotations

import base64
import datetime
import hashlib
import json
import re
import urllib.parse
import uuid
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final

from osbuild.errors import InputError

if TYPE_CHECKING:
    from osbuild.kernel_patches import Patch
    from osbuild.packages import Inventory, Package

Json = dict[str, Any]

KERNEL: Final = "kernel"  # bom-refs
AGENT: Final = "agent"
_GUEST: Final = "guest"
_DISTRIBUTION: Final = "distribution"
_SPACE: Final = uuid.uuid5(uuid.NAMESPACE_OID, "osbuilder sbom")  # of our serial numbers
_TYPES: Final = {"dpkg": "deb", "apk": "apk", "rpm": "rpm"}
_NUMBER: Final = re.compile(r"(\d+\.\d+(?:\.\d+)*)")


def describe(document: Json, lock: Json, inventory: Inventory, patches: Iterable[Patch]) -> Json:
    """The bill of a build, from its manifest, its lock, what its image's databases say, and its kernel's patches."""
    packages = _packages(inventory)
    components = [*_distribution(inventory), _kernel(document, lock, patches), _agent(lock["agent"]), *packages]
    bill: Json = {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX", "specVersion": "1.6", "version": 1,
        "metadata": {
            "timestamp": _moment(document["epoch"]), "lifecycles": [{"phase": "build"}],
            "tools": {"components": _tools(lock)}, "component": _guest(document, inventory),
        },
        "components": components,
        "dependencies": [{"ref": _GUEST, "dependsOn": sorted(one["bom-ref"] for one in components)}],
        # Files that no package owns are in none of these components.
        "compositions": [{"aggregate": "incomplete", "assemblies": [_GUEST]}],
    }  # fmt: skip
    return _numbered(bill)


def with_agent(bill: Json, document: Json, lock: Json) -> Json:
    """The same after another agent was put in; InputError when it is no bill of ours."""
    try:
        components = [_agent(lock["agent"]) if one["bom-ref"] == AGENT else one for one in bill["components"]]
        guest = bill["metadata"]["component"] | {"components": _files(document)}
        metadata = bill["metadata"] | {"tools": {"components": _tools(lock)}, "component": guest}
        return _numbered(bill | {"components": components, "metadata": metadata})
    except (KeyError, TypeError) as problem:
        raise InputError(f"the bill of materials is not one of ours: {problem}") from None


def _numbered(bill: Json) -> Json:
    """With the serial number that follows from all the rest."""
    content = {key: value for key, value in bill.items() if key != "serialNumber"}
    name = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    order = ("$schema", "bomFormat", "specVersion")
    rest = {key: value for key, value in content.items() if key not in order}
    return {key: content[key] for key in order} | {"serialNumber": f"urn:uuid:{uuid.uuid5(_SPACE, name)}"} | rest


def _moment(epoch: int) -> str:
    return f"{datetime.datetime.fromtimestamp(epoch, tz=datetime.UTC):%Y-%m-%dT%H:%M:%SZ}"


def _sha256(digest: str) -> list[Json]:
    return [{"alg": "SHA-256", "content": digest.removeprefix("sha256:")}]


def _properties(**values: str) -> list[Json]:
    return [{"name": f"osbuilder:{name.replace('_', ':')}", "value": value} for name, value in values.items() if value]


# --- the guest and what made it -----------------------------------------------------------------------------------


def _guest(document: Json, inventory: Inventory) -> Json:
    found: Json = {
        "type": "operating-system", "bom-ref": _GUEST, "name": "osbuilder-guest", "version": document["image"],
        "description": "a guest image: a root filesystem, a kernel and an agent", "components": _files(document),
        "properties": _properties(image_digest=document["image"], architecture=document["kernel"]["arch"]),
    }  # fmt: skip
    found["properties"] += [{"name": "osbuilder:note", "value": _text(note)} for note in inventory.notes]
    return found


def _files(document: Json) -> list[Json]:
    return [
        {"type": "file", "bom-ref": f"file:{name}", "name": name, "hashes": _sha256(about["sha256"])}
        for name, about in sorted(document["outputs"].items())
    ]


def _tools(lock: Json) -> list[Json]:
    ours = lock["osbuilder"]
    found: list[Json] = [
        {"type": "application", "name": "osbuilder", "version": ours["version"], "hashes": _sha256(ours["code"])}
    ]
    compilers = {**lock["kernel"]["inputs"].get("tools", {}), **ours.get("tools", {})}
    for name, said in sorted(compilers.items()):
        found.append({"type": "application", "name": name, "version": said})
    if compiler := lock["agent"]["inputs"].get("compiler"):
        name, said = compiler
        found.append({"type": "application", "name": name, "version": said.strip().partition("\n")[0]})
    return found


# --- components ---------------------------------------------------------------------------------------------------


def _distribution(inventory: Inventory) -> list[Json]:
    if not inventory.distro:
        return []
    version = {"version": inventory.distro_version} if inventory.distro_version else {}
    return [{"type": "operating-system", "bom-ref": _DISTRIBUTION, "name": inventory.distro, **version}]


def _kernel(document: Json, lock: Json, patches: Iterable[Patch]) -> Json:
    about, inputs = document["kernel"], lock["kernel"]["inputs"]
    release = about["release"]
    numbers = _NUMBER.match(release)
    version = numbers[1] if numbers else release
    source = str(inputs.get("source", ""))
    ancestor: Json = {"type": "operating-system", "name": "linux", "version": version}
    if source:
        ancestor["hashes"] = _sha256(source)
    fragments = [
        {"type": "file", "bom-ref": f"fragment:{name}", "name": f"kernel-configs/{name}", "hashes": _sha256(digest)}
        for name, digest in sorted(lock["kernel"]["fragments"].items())
    ]
    found: Json = {
        "type": "operating-system", "bom-ref": KERNEL, "name": "linux", "version": release,
        "cpe": f"cpe:2.3:o:linux:linux_kernel:{version}:*:*:*:*:*:*:*",
        "purl": f"pkg:generic/linux@{_escaped(release)}",
        "hashes": _sha256(document["outputs"]["vmlinux"]["sha256"]),
        "pedigree": {"ancestors": [ancestor], "patches": [_patch(patch) for patch in patches]},
        "properties": _properties(kernel_key=about["key"], kernel_settings=str(inputs.get("settings", ""))),
    }  # fmt: skip
    return found | ({"components": fragments} if fragments else {})


def _patch(patch: Patch) -> Json:
    """A patch with its text, byte for byte: what its digest in the lock is over."""
    kind = "backport" if re.match(r"(?i)(merged|in [0-9v]|backport)", patch.upstream) else "unofficial"
    content = base64.b64encode(patch.body()).decode()
    diff = {"text": {"contentType": "text/x-diff", "encoding": "base64", "content": content}}
    issue = {"type": "enhancement", "name": _text(patch.subject), "description": _text(patch.why)}
    return {"type": kind, "diff": diff, "resolves": [issue]}


def _agent(agent: Json) -> Json:
    name, _, version = str(agent["name"]).partition(" ")
    inputs = agent["inputs"]
    sources = json.dumps(inputs.get("sources", {}), sort_keys=True) if inputs else ""
    digest = hashlib.sha256(sources.encode()).hexdigest() if sources else ""
    compiler = inputs["compiler"][0] if inputs else ""
    return {
        "type": "application", "bom-ref": AGENT, "name": name, "version": version,
        "purl": f"pkg:generic/{_escaped(name)}@{_escaped(version)}", "hashes": _sha256(agent["sha256"]),
        "properties": _properties(agent_sources=digest, agent_compiler=compiler),
    }  # fmt: skip


def _packages(inventory: Inventory) -> list[Json]:
    found: dict[str, Json] = {}
    for package in inventory.packages:
        reference = purl(package, inventory)
        one: Json = {
            "type": "library", "bom-ref": reference, "name": _text(package.name), "version": _text(package.version),
            "purl": reference,
        }  # fmt: skip
        if package.maintainer:
            one["publisher"] = _text(package.maintainer)
        if package.license:  # as the distribution writes it: not always an SPDX identifier
            one["licenses"] = [{"license": {"name": _text(package.license)}}]
        found.setdefault(reference, one)
    return list(found.values())


def purl(package: Package, inventory: Inventory) -> str:
    """The package's URL: pkg:deb/debian/bash@5.2.15-2%2Bb2?arch=amd64&distro=debian-12&upstream=bash@5.2.15-2"""
    kind, version, qualifiers = _TYPES[inventory.manager], package.version, {"arch": package.arch}
    if kind == "rpm" and ":" in version:
        qualifiers["epoch"], _, version = version.partition(":")
    if inventory.distro:
        qualifiers["distro"] = "-".join(part for part in (inventory.distro, inventory.distro_version) if part)
    if package.source != package.name or package.source_version != package.version:
        same = package.source_version in (package.version, version)
        qualifiers["upstream"] = package.source + ("" if same else f"@{package.source_version}")
    if qualifiers.get("upstream") == package.name:
        del qualifiers["upstream"]
    parts = [kind, *([_escaped(inventory.distro.lower())] if inventory.distro else []), _escaped(_name(kind, package))]
    words = "&".join(f"{key}={_escaped(value)}" for key, value in sorted(qualifiers.items()) if value)
    return f"pkg:{'/'.join(parts)}@{_escaped(version)}" + (f"?{words}" if words else "")


def _name(kind: str, package: Package) -> str:
    return package.name.lower() if kind in ("deb", "apk") else package.name


def _escaped(text: str) -> str:
    return urllib.parse.quote(text.encode(errors="surrogateescape"), safe="-._~:")


def _text(text: str) -> str:
    """What any reader of JSON takes: bytes that were no UTF-8 are spelled out."""
    return text.encode(errors="backslashreplace").decode()


def read(text: bytes, where: str) -> Json:
    """A bill that lies in a build's directory."""
    try:
        found = json.loads(text)
    except ValueError as problem:
        raise InputError(f"{where} is not JSON: {problem}") from None
    if not isinstance(found, Mapping):
        raise InputError(f"{where} is not one of ours")
    return dict(found)
