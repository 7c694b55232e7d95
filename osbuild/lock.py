"""lock.json: everything that went into a build, by digest; what of it is another now; and the build that it asks for.

What decides bytes is compared. `given` is what the inputs were called on the machine that built: where a rebuild looks
for them, and nobody else. docs/lock.md has the fields.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import osbuild
from osbuild.errors import InputError, SpecError
from osbuild.manifest import about_agent
from osbuild.resources import resource
from osbuild.tree import quote

if TYPE_CHECKING:  # slow to import: with them comes all that speaks to registries
    from osbuild.artifacts import Rootfs
    from osbuild.kernel import KernelInputs
    from osbuild.oci import Json
    from osbuild.sources.image import SourceImage
    from osbuild.spec import BuildSpec

SCHEMA: Final = "osbuilder.lock"
VERSION: Final = 2

_NOT_COMPARED: Final = frozenset(("schema", "version", "given"))
_PATHS: Final = ("docker-archive:", "oci:", "dir:")
_SHOWN: Final = 100  # characters of a value
_NOTHING: Final = "nothing"
# What follows from other inputs of the same kind: said when nothing else of that kind is, the first one only.
_FOLLOWS: Final[Mapping[str, tuple[str, ...]]] = {
    "image": ("image.config", "image.digest", "image.manifest"),
    "agent": ("agent.sha256", "agent.name"),
    "kernel": ("kernel.inputs.settings", "kernel.key"),
}


# --- what goes in -------------------------------------------------------------------------------------------------


def describe(spec: BuildSpec, image: SourceImage, rootfs: Rootfs, kernel: KernelInputs) -> Json:
    """Every input of a build, known before anything is compiled or written."""
    return {
        "schema": SCHEMA, "version": VERSION,
        "osbuilder": {"version": osbuild.__version__, "code": code_digest(), "tools": _tools(spec)},
        "image": _image(image),
        "agent": about_agent(rootfs),
        "rootfs": {
            "init": spec.rootfs.init, "slim": spec.rootfs.slim, "remove": list(spec.rootfs.remove),
            "inputs": dict(rootfs.inputs),
        },
        "kernel": {"key": kernel.key, "inputs": dict(kernel.inputs), "fragments": dict(kernel.fragments)},
        "options": {
            "arch": spec.arch.name, "platform": str(spec.platform or ""), "kinds": list(spec.kinds),
            "compress": spec.compress, "disk": asdict(spec.disk) | {"salt": spec.disk.salt.hex()},
            "features": list(spec.features), "epoch": rootfs.epoch, "clamp": spec.epoch is not None,
        },
        "given": _given(spec, image),
    }  # fmt: skip


def code_digest() -> str:
    """sha256 over the program itself: its modules and templates, which decide what comes of the inputs."""
    package = Path(osbuild.__file__).parent
    templates = resource("templates")
    files = {f"osbuild/{path.relative_to(package)}": path for path in package.rglob("*.py")}
    files |= {f"templates/{path.relative_to(templates)}": path for path in templates.rglob("*.j2")}
    lines = (f"{name} {hashlib.sha256(files[name].read_bytes()).hexdigest()}\n" for name in sorted(files))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _tools(spec: BuildSpec) -> Json:
    """What this build leaves to others, in the version that is here."""
    import zlib

    from osbuild import command, zstd

    found: dict[str, str] = {}
    if "initrd" in spec.kinds:
        found |= {"zstd": {"zstd": zstd.VERSION}, "gzip": {"zlib": zlib.ZLIB_RUNTIME_VERSION}}.get(spec.compress, {})
        if spec.compress == "lz4":
            found["lz4"] = command.version("lz4")
    if "image" in spec.kinds and spec.disk.format != "raw":
        found["qemu-img"] = command.version("qemu-img")
    if "image" in spec.kinds and spec.disk.filesystem == "xfs":
        found["mkfs.xfs"] = command.run("mkfs.xfs", "-V").output.strip()
    return found


def _image(image: SourceImage) -> Json:
    layers: list[Json] = [{"diff_id": diff_id} for diff_id in image.config.diff_ids]
    if image.manifest is not None:
        for about, layer in zip(layers, image.manifest.layers, strict=True):
            about |= {"digest": layer.digest, "size": layer.size, "media_type": layer.media_type}
    return {
        "digest": image.digest, "manifest": image.digest if image.manifest else "", "config": image.config_digest,
        "layers": layers,
    }  # fmt: skip


def _given(spec: BuildSpec, image: SourceImage) -> Json:
    wishes, usual = spec.rootfs, type(spec.limits)()
    chosen = {field.name: getattr(spec.limits, field.name) for field in fields(usual)}
    return {
        "image": _pinned(image), "agent": wishes.agent if wishes.agent == "builtin" else _absolute(Path(wishes.agent)),
        "source": _kernel_source(spec.kernel_source),
        **{name: _absolute(path) if path is not None else None for name, path in (
            ("keyring", spec.keyring), ("modules", wishes.modules), ("hooks", wishes.hooks), ("policy", wishes.policy),
        )},
        "add": [[_absolute(each.source), each.target] for each in wishes.add],
        "limits": {name: value for name, value in chosen.items() if value != getattr(usual, name)},
    }  # fmt: skip


def _absolute(path: Path) -> str:
    return str(path.absolute())


def _kernel_source(text: str | None) -> str | None:
    if text is None:
        return None
    from osbuild import kernel_sources

    return kernel_sources.below(text, Path.cwd())


def _pinned(image: SourceImage) -> str:
    """The image's name, good anywhere on this machine and for ever: with an absolute path, or with its digest."""
    text = image.reference
    for transport in _PATHS:
        if text.startswith(transport) and text != f"{transport}-":
            return f"{transport}{Path.cwd() / text.removeprefix(transport)}"
    if text.startswith("docker://") and image.manifest is not None:
        return f"{text.partition('@')[0]}@{image.digest}"
    return text


# --- what is another one ------------------------------------------------------------------------------------------


def read(path: Path) -> Json:
    """A lock; InputError when it is none, or of another version of its schema."""
    from osbuild.oci import parse_json

    where = quote(str(path))
    try:
        document = parse_json(path.read_bytes(), where)
    except OSError as problem:
        hint = "a build writes it: build once without --locked, or name another with --lock"
        raise InputError(f"cannot read {where}: {problem.strerror}", hint=hint) from None
    if document.get("schema") != SCHEMA:
        raise InputError(f"{where} is no lock of osbuilder's: its schema is not {SCHEMA}")
    if document.get("version") != VERSION:
        raise InputError(
            f"{where} has version {quote(str(document.get('version'))[:20])} of {SCHEMA}, not {VERSION}",
            hint="build it again with this osbuilder",
        )
    missing = [name for name in ("osbuilder", "image", "agent", "rootfs", "kernel", "options", "given")
               if not isinstance(document.get(name), dict)]  # fmt: skip
    if missing:
        raise InputError(f"{where} says nothing of {', '.join(missing)}", hint="build it again")
    return document


def refuse_what_differs(locked: Json, now: Json, path: Path) -> None:
    """InputError with a line for each input that is not the one in the lock."""
    found = differences(locked, now)
    if found:
        many = "an input is" if len(found) == 1 else f"{len(found)} inputs are"
        raise InputError(
            f"{many} not what {quote(str(path))} has", details=found,
            hint="build without --locked to accept that, and to write a new lock",
        )  # fmt: skip


def differences(locked: Json, now: Json) -> tuple[str, ...]:
    """A line for each input that is not the same in two locks, named as in the file; not for what follows from it."""
    one, two = _inputs(locked), _inputs(now)
    names = [name for name in sorted(one.keys() | two.keys()) if one.get(name) != two.get(name)]
    return tuple(f"{name}: {_value(one, name)} in the lock, {_value(two, name)} now" for name in _telling(names))


def unequal(one: Mapping[str, Any], two: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """(place, the first's value, the second's) of every leaf that is not the same in two documents."""
    first, second = dict(_flat("", one)), dict(_flat("", two))
    for name in sorted(first.keys() | second.keys()):
        if first.get(name) != second.get(name):
            yield name, _value(first, name), _value(second, name)


def _telling(names: list[str]) -> list[str]:
    fragments = [name for name in names if name.startswith("kernel.fragments.")]
    if "kernel.inputs.settings" not in names:  # reworded, or cut up in another way: they set the same
        names = [name for name in names if name not in fragments]
    for kind, follows in _FOLLOWS.items():
        ours = [name for name in names if name.startswith(f"{kind}.")]
        kept = [name for name in ours if name not in follows] or [name for name in follows if name in ours][:1]
        names = [name for name in names if name not in ours or name in kept]
    if "options.epoch" in names and "options.clamp" not in names and any(name.startswith("image.") for name in names):
        names.remove("options.epoch")  # the image's own time
    return names


def _inputs(lock: Json) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, value in lock.items():
        if name not in _NOT_COMPARED:
            found.update(_flat(name, value))
    return found


def _flat(name: str, value: object) -> Iterator[tuple[str, str]]:
    """Every leaf by its place; a pair of texts in a list (a patch and its digest) counts as a key and its value."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(f"{name}.{key}" if name else key, inner)
    elif isinstance(value, list) and value and all(isinstance(item, list) and len(item) == 2 for item in value):
        for key, inner in value:
            yield from _flat(f"{name}.{key}", inner)
    elif isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
        for number, item in enumerate(value):
            yield f"{name}[{number}]", json.dumps(item, sort_keys=True)
    else:
        yield name, value if isinstance(value, str) else json.dumps(value)


def _value(inputs: Mapping[str, str], name: str) -> str:
    text = inputs.get(name)
    if not text:
        return _NOTHING
    if name.startswith("image.layers["):
        about = json.loads(text)
        text = str(about.get("digest") or about.get("diff_id"))
    line = " ".join(text.split())
    return line if len(line) <= _SHOWN else f"{line[:_SHOWN]}…"


# --- the build that it asks for -----------------------------------------------------------------------------------


def pin(spec: BuildSpec, locked: Json) -> BuildSpec:
    """The same build, with a tag of a registry taken for what it meant when the lock was written."""
    from osbuild.sources import find_source

    pinned = str(locked["given"].get("image", ""))
    name, at, _ = pinned.partition("@")
    reference = find_source(spec.image)
    if not at or not name.startswith("docker://") or reference.digest or reference.transport not in ("", "docker"):
        return spec
    wanted = spec.image if reference.transport else f"docker://{spec.image}"
    return dataclasses.replace(spec, image=pinned) if _full(wanted) == _full(name) else spec


def _full(text: str) -> tuple[tuple[str, str], str]:
    from osbuild import oci

    reference = oci.parse_reference(text, frozenset(("docker",)))
    return oci.registry_of(reference.name), reference.tag


def refuse_local_things(lock: Json, image: str, where: str) -> None:
    """InputError for a lock of somebody else's that would have files of this machine read, compiled or let through.

    image: what the user names instead of the lock's.
    """
    given = lock.get("given")
    given = given if isinstance(given, dict) else {}
    found = [name for name in ("modules", "hooks", "policy", "keyring", "add", "limits") if given.get(name)]
    found += ["source"] if re.search("[:/]", str(given.get("source") or "")) else []
    found += ["agent"] if given.get("agent") not in (None, "", "builtin") else []
    found += ["image"] if not image and not str(given.get("image", "")).startswith("docker://") else []
    if found:
        raise InputError(
            f"{where} was made of what lay on another machine ({', '.join(found)}), and its lock would have the same "
            "paths of this one read",
            hint="osbuilder pull it, look at its lock.json, and rebuild the directory"
            + ("; --image names the image" if found == ["image"] else ""),
        )


def spec_from(lock: Json, out: Path, where: str) -> BuildSpec:
    """The build that a lock is of, without its boots; InputError when it does not say all of that."""
    from osbuild.arch import find_arch
    from osbuild.limits import Limits
    from osbuild.oci import parse_platform
    from osbuild.spec import Addition, BuildSpec, DiskSpec, RootfsSpec

    try:
        options, given, rootfs = lock["options"], lock["given"], lock["rootfs"]
        if re.fullmatch("[a-z-]+:-", given["image"]):
            raise InputError(
                f"{where}: the image came from standard input, and is not there any more",
                hint="--image names it",
            )
        if not all(type(number) is int for number in (options["epoch"], *given["limits"].values())):
            raise ValueError("a number that is none")
        paths = {name: Path(given[name]) if given[name] else None for name in ("modules", "hooks", "policy")}
        return BuildSpec(
            image=given["image"], out=out, arch=find_arch(options["arch"]), kinds=tuple(options["kinds"]),
            disk=DiskSpec(**options["disk"] | {"salt": bytes.fromhex(options["disk"]["salt"])}),
            compress=options["compress"], kernel_source=given["source"],
            keyring=Path(given["keyring"]) if given["keyring"] else None, features=tuple(options["features"]),
            smoke=False, platform=parse_platform(options["platform"]) if options["platform"] else None,
            limits=Limits(**given["limits"]),
            rootfs=RootfsSpec(
                init=rootfs["init"], agent=given["agent"], slim=rootfs["slim"], remove=tuple(rootfs["remove"]),
                add=tuple(Addition(source=Path(source), target=target) for source, target in given["add"]), **paths,
            ),
            epoch=options["epoch"] if options["clamp"] else None,
        )  # fmt: skip
    except (KeyError, TypeError, ValueError, AttributeError, SpecError) as problem:
        raise InputError(f"{where} is not one of ours: {quote(str(problem))}", hint="build it again") from None
