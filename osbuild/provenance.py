"""provenance.json: what was made, of what and how, as an in-toto Statement v1 with a SLSA Provenance v1 predicate.

It is made from the manifest and the lock and from nothing else, and so the same bytes whoever builds, where and when:
without times, names of machines, or paths. Sources: in-toto attestation spec/v1 (statement, resource_descriptor); SLSA
v1.0 provenance.
"""

from __future__ import annotations

import hashlib
from typing import Any, Final

Json = dict[str, Any]

STATEMENT: Final = "https://in-toto.io/Statement/v1"
PREDICATE: Final = "https://slsa.dev/provenance/v1"
BUILD_TYPE: Final = "urn:osbuilder:build:v1"  # docs/lock.md says what its parameters are
BUILDER: Final = "urn:osbuilder:local"  # whoever ran the program: nobody vouches for that


def describe(document: Json, lock: Json, byproducts: dict[str, bytes]) -> Json:
    """The statement about a build; byproducts are other files that were made of the same inputs."""
    predicate = {
        "buildDefinition": definition(lock),
        "runDetails": {
            "builder": builder(lock),
            "byproducts": [
                _resource(name, hashlib.sha256(data).hexdigest()) for name, data in sorted(byproducts.items())
            ],
        },
    }  # fmt: skip
    subjects = [_resource(name, about["sha256"]) for name, about in sorted(document["outputs"].items())]
    return {"_type": STATEMENT, "subject": subjects, "predicateType": PREDICATE, "predicate": predicate}


def definition(lock: Json) -> Json:
    """What was asked for, and of what: all of it from the lock.

    `pull` compares it with what is published: another wording needs another BUILD_TYPE, and this one kept beside it.
    """
    given = str(lock["given"]["image"])
    external = {
        "image": given if given.startswith("docker://") else lock["image"]["digest"],
        "options": lock["options"], "rootfs": {key: lock["rootfs"][key] for key in ("init", "slim", "remove")},
    }  # fmt: skip
    return {
        "buildType": BUILD_TYPE, "externalParameters": external,
        "internalParameters": {"tools": _tools(lock)},
        "resolvedDependencies": _dependencies(lock, given),
    }  # fmt: skip


def builder(lock: Json) -> Json:
    """Who made it, as far as anybody can say."""
    return {"id": BUILDER, "version": {"osbuilder": lock["osbuilder"]["version"]}}


def _resource(name: str, digest: str, **more: str) -> Json:
    return {"name": name, "digest": {"sha256": digest.removeprefix("sha256:")}, **more}


def _tools(lock: Json) -> Json:
    found = {**lock["kernel"]["inputs"].get("tools", {}), **lock["osbuilder"]["tools"]}
    if compiler := lock["agent"]["inputs"].get("compiler"):
        found[compiler[0]] = compiler[1].strip().partition("\n")[0]
    return dict(sorted(found.items()))


def _dependencies(lock: Json, given: str) -> list[Json]:
    """Every input that has a digest of its own."""
    image, kernel = lock["image"], lock["kernel"]
    more = {"uri": given} if given.startswith("docker://") else {}
    found = [_resource("osbuilder", lock["osbuilder"]["code"]), _resource("image", image["digest"], **more)]
    found += [
        _resource(f"image layer {number}", layer.get("digest") or layer["diff_id"])
        for number, layer in enumerate(image["layers"], 1)
    ]
    agent = lock["agent"]
    sources = sorted(agent["inputs"].get("sources", {}).items())
    found += [_resource(f"agent/{name}", digest) for name, digest in sources]
    if not sources:
        found.append(_resource("agent", agent["sha256"]))
    found += [_resource(name, digest) for name, digest in sorted(lock["rootfs"]["inputs"].items())]
    if source := kernel["inputs"].get("source"):
        found.append(_resource("kernel source", source))
    found += [_resource(f"kernel patch {name}", digest) for name, digest in kernel["inputs"].get("patches", ())]
    found += [_resource(f"kernel-configs/{name}", digest) for name, digest in sorted(kernel["fragments"].items())]
    return found
