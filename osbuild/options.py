"""The words of the command line and of osbuild.toml: one table for both, and the specs they come to.

    image = "oci:debian"         the argument
    fs = "ext4"                  what --fs says
    [rootfs]
    add = ["motd:/etc/motd"]     what --add says, as often as it may be given

All paths in a file are relative to the file.

A word on the command line wins over the same word in the file; of words that may be given again, both count.
"""

from __future__ import annotations

import functools
import inspect
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from osbuild import console
from osbuild import limits as limits_table
from osbuild.agents import BUILTIN, absolute
from osbuild.arch import Arch, find_arch, host_arch
from osbuild.checks import CHECKS
from osbuild.errors import SpecError
from osbuild.filesystem import FILESYSTEMS
from osbuild.limits import Limits, option_name
from osbuild.manifest import LOCK
from osbuild.networks import NETWORKS
from osbuild.nvdimm_image import ALIGN
from osbuild.spec import KINDS, Addition, BuildSpec, DiskSpec, GuestSpec, RegistrySpec, RootfsSpec
from osbuild.tree import quote
from osbuild.verity import parse_salt

if TYPE_CHECKING:  # what is slow to import is imported where it is used
    from osbuild.oci import Platform

# Words that several commands have, and no file.
ArchName = Annotated[str, typer.Option("--arch", help="x86_64 or aarch64; this machine's when not given")]
Json = Annotated[bool, typer.Option("--json", help="the result as JSON on standard output")]
Progress = Annotated[
    str,
    typer.Option("--progress", metavar="KIND", help="on standard error: auto, plain, rich or json (a line an event)"),
]
Force = Annotated[bool, typer.Option("--force", help="replace a file that is there, whatever it is")]
OutFile = Annotated[Path, typer.Option("--out", "-o", help="the file to write")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="no progress on standard error")]

# A word's value; Any because the table says per word what it is, and both readers check it.
Words = Mapping[str, Any]


class Size(str):
    """A number of bytes as people write it: 64M, 2G, 128MiB, 4096."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class Option:
    """One word: on the command line `--name`, in the file a key of its table."""

    name: str
    kind: type  # str, int, float, bool, Path, Size or list (of str)
    group: str  # commands take words by the group
    help: str

    @property
    def table(self) -> str:
        """Its table in the file; empty for the top."""
        return "" if self.group in _TOP else self.group


_TOP: Final = frozenset(("image", "output", "disk", "initramfs"))

_NETWORK_HELP: Final = (
    "a network card, and a look at what it leads to; none when not given. user needs no privilege, the others root; "
    "bridge=NAME joins the host's bridge of that name; all of it ends with the guest"
)
_ALIGN_HELP: Final = (
    "the image's size is a multiple of this, itself one of 2M: all that DAX needs (the default). 128M: as Kata's own "
    "images, where guests get memory as pc-dimm: QEMU puts it right behind the image, and Linux wants it so aligned; "
    "1G: for arm64 hosts that plug memory in steps of that size"
)
_WRITABLE_HELP: Final = (
    "the filesystem is good for a guest that has a copy of its own and writes to it: a journal, inodes to spare. As a "
    "disk it is mounted rw; as an NVDIMM, which guests share, it stays read-only"
)
_TRANSPORT_HELP: Final = (
    "how the agent is asked: serial, vsock (/dev/vhost-vsock), vhost-user-vsock (by the program vhost-device-vsock); "
    "auto (the default): serial where the agent is osbuilder's, else vsock"
)
_MACHINE_HELP: Final = (
    "QEMU's board: q35, microvm (without PCI: an image is a disk there) or virt (aarch64's); auto (the default): "
    "microvm for an initramfs and q35 for an image, or virt"
)
_ATTACH_HELP: Final = (
    "how a guest gets an image: nvdimm, virtio-pmem (both mapped with DAX; the second on x86_64 only) or virtio-blk (as"
    " a disk); auto (the default): nvdimm where the image can be one"
)
_CHECK_HELP: Final = (
    "without it, at what takes no time; agent takes one step after the other through the agent's calls, up to a minute "
    "for each guest. docs/checks.md says what each of them shows"
)
_VERITY_HELP: Final = (
    "add a hash tree for dm-verity as partition 2 (sha256, blocks of 4 KiB), and say what the kernel must be told; a "
    "boot uses either verity or DAX, and the file is good for both"
)
_AGENT_HELP: Final = (
    "builtin (the default), or the path of an agent's binary, or of a tarball that holds one, such as "
    "kata-static-agent.tar.zst"
)

_WITH_HELP: Final = (
    "a kernel feature to add: 9p, cloud-hypervisor, debug, ebpf, firecracker, gpu, io-uring, nftables, systemd, "
    "verity, virtiofs, xfs; may be given again"
)
_SOURCE_HELP: Final = (
    "the kernel's source: a name of kernel-configs/versions.toml (6.12, the default; 6.1), kernel.org:FILE (checks the "
    "signature beside it), git:PATH[#REF], dir:PATH, or the PATH of a tarball or directory"
)

OPTIONS: Final = (
    Option("platform", str, "image", "which image of several: OS/ARCHITECTURE[/VARIANT]; by default the guest's own"),
    Option("arch", str, "image", "of the guest: x86_64 or aarch64; this machine's when not given"),
    Option("make", str, "output", "what to make and boot: image, initrd, or both with a comma (the default)"),
    Option("no-smoke", bool, "output", "do not boot what was made"),
    Option("locked", bool, "output", "take nothing that is not in OUT/lock.json, by digest: else refuse, and say what"),
    Option("lock", Path, "output", "the same with another lock.json"),
    Option(
        "fs",
        str,
        "disk",
        f"the image's filesystem: {', '.join(FILESYSTEMS)} (ext4 when not given; xfs is an experiment)",
    ),
    Option("align", Size, "disk", _ALIGN_HELP),
    Option("size", Size, "disk", "of the whole image, a multiple of --align; as small as can be when not given"),
    Option("free", Size, "disk", "at least so much free space in the filesystem; none when not given"),
    Option("writable", bool, "disk", _WRITABLE_HELP),
    Option("no-dax-header", bool, "disk", "a plain disk, its partition at 1 MiB, as Firecracker takes it; no NVDIMM"),
    Option("verity", bool, "disk", _VERITY_HELP),
    Option("salt", str, "disk", "of the hash tree, hex digits; the same for all images when not given"),
    Option("format", str, "disk", "raw (the default) or qcow2, by qemu-img: the same disk, but it cannot be an NVDIMM"),
    Option("compress", str, "initramfs", "zstd (the default), gzip, lz4 or none"),
    Option("recipe", str, "recipe", "make the image by docker build: debian, ubuntu, alpine or fedora; no IMAGE then"),
    Option("base", str, "recipe", "the image that a recipe starts from, instead of its own"),
    Option("release", str, "recipe", "another release of the recipe's distribution"),
    Option("package", list, "recipe", "a package on top of the recipe's; may be given again"),
    Option("package-mirror", str, "recipe", "where the recipe's packages come from, a URL"),
    Option("fresh", bool, "recipe", "build the recipe again, whatever Docker remembers of it"),
    Option("init", str, "rootfs", "agent: it is the first process (the default); systemd: it is a service"),
    Option("agent", str, "rootfs", _AGENT_HELP),
    Option("slim", bool, "rootfs", "leave out the systemd units that a guest has no use for"),
    Option("modules", Path, "rootfs", "a directory of kernel modules, …/lib/modules/RELEASE"),
    Option("hooks", Path, "rootfs", "a directory of OCI hooks: prestart/, poststart/, poststop/"),
    Option("policy", Path, "rootfs", "the agent's policy, a .rego file"),
    Option("add", list, "rootfs", "SOURCE:TARGET, a file or directory to add; may be given again"),
    Option("remove", list, "rootfs", "a path to leave out, * and ? match in one component; may be given again"),
    Option("with", list, "kernel", _WITH_HELP),
    Option("source", str, "kernel", _SOURCE_HELP),
    Option("keyring", Path, "kernel", "OpenPGP public keys for --source kernel.org:FILE, where the tree has none"),
    Option("accel", str, "guest", "auto (the default), kvm or tcg"),
    Option("memory", int, "guest", "MiB for each guest, 64 at least; as much as it needs when not given"),
    Option("cpus", int, "guest", "processors for each guest, 1 when not given"),
    Option("guests", int, "guest", "boot so many of each NVDIMM image at once, and count the memory that they share"),
    Option("timeout", float, "guest", "seconds that a guest has to answer, 60 when not given"),
    Option("machine", str, "guest", _MACHINE_HELP),
    Option("attach", str, "guest", _ATTACH_HELP),
    Option("transport", str, "guest", _TRANSPORT_HELP),
    Option("network", str, "guest", f"{', '.join(NETWORKS)}; bridge=NAME: {_NETWORK_HELP}"),
    Option("check", list, "guest", f"look at this only: {', '.join(CHECKS)}; may be given again; {_CHECK_HELP}"),
    Option("mirror", list, "registry", "HOST=MIRROR, a registry to try before HOST; may be given again"),
    Option("insecure-registry", list, "registry", "HOST[:PORT] that may speak plain HTTP; may be given again"),
    Option("authfile", Path, "registry", "credentials, instead of ~/.docker/config.json"),
    Option("offline", bool, "registry", "touch no network: what the cache and this machine have, or an error"),
    Option("limit", list, "image", "NAME=NUMBER, how much an image may hold; --limit help lists them"),
)
_TABLES: Final = frozenset(option.table for option in OPTIONS) - {""}
_TYPES: Final = {
    str: "text", int: "a whole number", float: "a number", bool: "true or false", Path: "a path", Size: "a size",
}  # fmt: skip
_METAVARS: Final = {str: "WORD", int: "N", float: "SECONDS", Path: "PATH", list: "TEXT", Size: "SIZE"}
_CONFIG: Final = "osbuild.toml"
_OF_A_MATRIX: Final = frozenset(("axes", "exclude"))  # tables of matrix.toml, see matrix
_OF_FILES: Final = frozenset(("docker-archive", "oci", "dir"))  # sources that name a path


def takes(*groups: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """The command also takes every option of these groups, and `-f FILE`; it gets them as `words`."""

    return lambda function: _Command(function, {_identifier(row): row for row in OPTIONS if row.group in groups})


class _Command:
    """A command's function with more options than it is written with; which, is worked out for whoever asks."""

    def __init__(self, function: Callable[..., None], rows: Mapping[str, Option]) -> None:
        functools.update_wrapper(self, function)
        self._function = function
        self._rows = rows

    def __call__(self, *, config: Path | None, **values: Any) -> None:
        said = [(row, values.pop(name)) for name, row in self._rows.items()]
        given = {row.name: _given(row, value) for row, value in said if value not in (None, [], False)}
        if "help" in given.get("limit", ()):
            console.print_table("--limit NAME=NUMBER", ("limit", "default", "unit", "of what"), limits_table.rows())
            return
        file = {**read_config(config), "config": config} if config else {}
        self._function(words=merged(file, given), **values)

    @property
    def __signature__(self) -> inspect.Signature:
        """What typer makes options of."""
        own = [p for p in inspect.signature(self._function, eval_str=True).parameters.values() if p.name != "words"]
        about = f"{_CONFIG}: the same words in a file; its tables are {', '.join(sorted(_TABLES))}"
        file = Annotated[Path | None, typer.Option("--config", "-f", help=about)]
        added = [_parameter(name, _type(row), None) for name, row in self._rows.items()]
        keyword = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own]
        return inspect.Signature([*keyword, _parameter("config", file, None), *added])


def read_config(path: Path) -> Words:
    """The words of an osbuild.toml, every one checked; SpecError names the file, the table and the word."""
    return words_in(read_toml(path), path)


def read_toml(path: Path) -> dict[str, Any]:
    """What stands in a TOML file; SpecError when it cannot be read."""
    import tomllib

    where = quote(str(path))
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as problem:
        raise SpecError(f"cannot read {where}: {problem.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as problem:
        raise SpecError(f"{where} is not TOML: {problem}") from None


def words_in(document: Mapping[str, Any], path: Path) -> Words:
    """The words of such a document, every one checked."""
    found: dict[str, Any] = {}
    for key, value in document.items():
        if key in _TABLES and isinstance(value, dict):
            for name, inner in value.items():
                found[name] = checked(name, inner, key, path)
        else:
            found[key] = checked(key, value, "", path)
    return found


def merged(file: Words, given: Words) -> Words:
    """What the file says, and over it what the command line says."""
    both = dict(file)
    for name, value in given.items():
        both[name] = [*both.get(name, []), *value] if isinstance(value, list) else value
    return both


def image_of(argument: str, words: Words) -> str:
    """Which image: the argument, or the file's; empty when a recipe makes it."""
    if argument and "recipe" in words:
        raise SpecError(f"both an image, {quote(argument)}, and a recipe, {quote(words['recipe'])}", hint="give one")
    lost = [option.name for option in OPTIONS if option.group == "recipe" and option.name in words]
    if lost and "recipe" not in words:
        raise SpecError(f"--{lost[0]} is for a recipe, and none is named", hint="--recipe debian, or leave it out")
    image = argument or ("" if "recipe" in words else str(words.get("image", "")))
    if not image and "recipe" not in words:
        raise SpecError("no image is named", hint='IMAGE, or --recipe, or image = "…" in osbuild.toml')
    return image


def recipe_words(words: Words) -> dict[str, Any]:
    """What `recipe.render` is to be called with."""
    found = {name: words[name] for name in ("init", "base", "release") if name in words}
    return found | {"packages": tuple(words.get("package", ())), "mirror": words.get("package-mirror", "")}


def build_spec(image: str, out: Path, words: Words, **more: Any) -> BuildSpec:
    """A build, as the words want it; `more` are fields that the command itself decides."""
    platform = _platform(words["platform"]) if "platform" in words else None
    wanted: dict[str, Any] = {
        "kinds": tuple(word for word in words.get("make", ",".join(KINDS)).split(",") if word),
        "disk": disk_spec(words), "compress": words.get("compress", "zstd"),
        "features": _features(words), "kernel_source": words.get("source"), "keyring": words.get("keyring"),
        "smoke": not words.get("no-smoke", False), "lock": _lock(out, words),
    }  # fmt: skip
    if image and "salt" in words and not words.get("verity"):  # without an image, a file's words are tried one by one
        raise SpecError("--salt is for a hash tree, and none is asked for", hint="--verity, or leave it out")
    return BuildSpec(
        image=image, out=out, arch=arch_of(words, platform), platform=platform, limits=limits(words),
        registry=registry_spec(words), rootfs=rootfs_spec(words), guest=guest_spec(words), **wanted | more,
    )  # fmt: skip


def from_json(words: Mapping[str, Any]) -> Words:
    """Words that went through JSON: paths, which became text there, are paths again."""
    paths = {option.name for option in OPTIONS if option.kind is Path}
    return {name: Path(value) if name in paths else value for name, value in words.items()}


def _lock(out: Path, words: Words) -> Path | None:
    given: Path | None = words.get("lock")
    return given or (out / LOCK if words.get("locked") else None)


def _platform(text: str) -> Platform:
    from osbuild.oci import parse_platform

    return parse_platform(text)


def disk_spec(words: Words) -> DiskSpec:
    """What the disk image is to be."""
    return DiskSpec(
        filesystem=words.get("fs", "ext4"), align=_size("align", words, ALIGN), size=_size("size", words),
        free=_size("free", words), writable=words.get("writable", False),
        header=not words.get("no-dax-header", False), verity=words.get("verity", False),
        salt=parse_salt(words["salt"]) if "salt" in words else b"", format=words.get("format", "raw"),
    )  # fmt: skip


def _features(words: Words) -> tuple[str, ...]:
    """What the kernel is to have besides: also what it needs to mount the root."""
    features = tuple(words.get("with", ()))
    return (*features, "xfs") if words.get("fs") == "xfs" and "xfs" not in features else features


def arch_of(words: Words, platform: Platform | None = None) -> Arch:
    """The guest's architecture: what was asked for, or the platform's, or this machine's."""
    if "arch" in words:
        arch = find_arch(words["arch"])
        if platform is not None and platform.architecture != arch.oci:
            raise SpecError(
                f"no guest of {arch.name} can be made of an image for {platform}", hint="give --arch or --platform"
            )
        return arch
    return find_arch(platform.architecture) if platform is not None else host_arch()


def guest_spec(words: Words) -> GuestSpec:
    """How to boot what was made."""
    return GuestSpec(
        memory_mib=words.get("memory", 0), cpus=words.get("cpus", 1), accel=words.get("accel", "auto"),
        seconds=words.get("timeout", 60.0), transport=words.get("transport", "auto"),
        machine=words.get("machine", "auto"), attach=words.get("attach", "auto"),
        network=words.get("network", ""), guests=words.get("guests", 1), checks=tuple(words.get("check", ())),
    )  # fmt: skip


def rootfs_spec(words: Words) -> RootfsSpec:
    """What the guest's tree is to be."""
    return RootfsSpec(
        init=words.get("init", "agent"), agent=words.get("agent", BUILTIN), slim=words.get("slim", False),
        modules=words.get("modules"),
        hooks=words.get("hooks"), policy=words.get("policy"), add=tuple(map(_addition, words.get("add", ()))),
        remove=tuple(words.get("remove", ())),
    )  # fmt: skip


def registry_spec(words: Words) -> RegistrySpec:
    """How registries are to be reached."""
    mirrors: dict[str, tuple[str, ...]] = {}
    for text in words.get("mirror", ()):
        host, _, mirror = text.partition("=")
        if not host or not mirror:
            raise SpecError(f"no mirror {quote(text)}", hint="--mirror docker.io=mirror.example")
        mirrors[host] = (*mirrors.get(host, ()), mirror)
    return RegistrySpec(
        mirrors=mirrors, insecure=frozenset(words.get("insecure-registry", ())), auth_file=words.get("authfile"),
        offline=words.get("offline", False),
    )  # fmt: skip


def limits(words: Words) -> Limits:
    """How much an image may hold."""
    known = {option_name(field.name): field.name for field in fields(Limits)}
    found = {}
    for text in words.get("limit", ()):
        name, _, number = text.partition("=")
        if name not in known:
            guess = near(name, known)
            meant = f"did you mean {guess[0]}? " if guess else ""
            raise SpecError(f"no limit {quote(name)}", hint=f"{meant}--limit help lists them")
        least, most = limits_table.allowed(known[name])
        if not re.fullmatch(r"[0-9]{1,19}", number) or not least <= int(number) <= most:
            raise SpecError(
                f"--limit {name}: {quote(number)} is not a whole number from {least} to {most}", hint=f"{name}=NUMBER"
            )
        found[known[name]] = int(number)
    return Limits(**found)


def _addition(text: str) -> Addition:
    source, _, target = text.rpartition(":")
    if not source or not target.startswith("/"):
        raise SpecError(f"nothing can be added by {quote(text)}", hint="SOURCE:TARGET, the target an absolute path")
    return Addition(source=Path(source), target=target)


def _size(name: str, words: Words, default: int = 0) -> int:
    text = str(words.get(name, default))
    found = re.fullmatch(r"([0-9]{1,15})(?:([KMGT])(?:iB)?)?", text, re.IGNORECASE)
    if found is None:
        raise SpecError(f"--{name}: {quote(text)} is no size", hint="64M, 2G, 128MiB, or a number of bytes")
    return int(found[1]) << 10 * (" KMGT".index(found[2].upper()) if found[2] else 0)


def checked(name: str, value: Any, table: str, path: Path, where: str = "") -> Any:
    """One value of the file as the command line would have given it; paths are relative to the file.

    where: what errors call the place, when it is not the word's own.
    """
    where = where or f"{quote(str(path))}: " + (f"[{table}] " if table else "") + quote(name)
    if name == "image" and not table:
        if not isinstance(value, str):
            raise SpecError(f"{where} is not text", hint='image = "oci:debian"')
        return _relative(value, path.parent)
    if name in _TABLES and not table:
        raise SpecError(f"{where} is a table", hint=f"[{name}], and its words in lines of their own")
    known = {option.name: option for option in OPTIONS if option.table == table}
    if name not in known:
        raise SpecError(f"{where} is no word of ours", hint=_known_words(name, table))
    found = _value(known[name], value, path, where)
    try:
        build_spec("", Path(), {name: found}, epoch=0)  # alone, so that what is wrong is wrong with this one
    except SpecError as problem:
        raise SpecError(f"{where}: {problem}", hint=problem.hint) from None
    return found


def _value(option: Option, value: Any, path: Path, where: str) -> Any:
    if option.kind is list:
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise SpecError(f"{where} is not a list of texts", hint=f'{option.name} = ["…"]')
        return [str(path.parent / item) for item in value] if option.name == "add" else value
    kind: type = str if option.kind in (Path, Size) else option.kind
    if isinstance(value, int) and not isinstance(value, bool) and option.kind in (float, Size):
        value = float(value) if kind is float else str(value)
    if type(value) is not kind:
        raise SpecError(f"{where} is not {_TYPES[option.kind]}")
    if option.name == "source":
        from osbuild import kernel_sources  # only a file of words takes it

        return kernel_sources.below(str(value), path.parent)
    if option.name == "agent":
        return absolute(str(value), path.parent)
    return path.parent / str(value) if option.kind is Path else value


def _relative(image: str, home: Path) -> str:
    """An image's name with its path relative to `home`."""
    transport, colon, path = image.partition(":")
    if transport in _OF_FILES and path != "-":
        return f"{transport}{colon}{home / path}"
    return image


def _known_words(name: str, table: str) -> str:
    """What the user may have meant, or what there is."""
    if name in _OF_A_MATRIX and not table:
        return "that is a matrix's word: osbuilder matrix FILE"
    words = sorted(option.name for option in OPTIONS if option.table == table)
    everywhere = {option.name: option.table for option in OPTIONS} | ({} if table else {"image": ""})
    if name in everywhere:
        home = everywhere[name]
        return f"it belongs into [{home}]" if home else "it belongs to the top of the file"
    here = [*words, *(() if table else ("image", *sorted(_TABLES)))]
    if guess := near(name, here):
        return f"did you mean {guess[0]}?"
    tables = "" if table else f"; and the tables {', '.join(sorted(_TABLES))}"
    return f"there are: {', '.join(words if table else ['image', *words])}{tables}"


def near(name: str, known: Iterable[str]) -> list[str]:
    """The one that may have been meant."""
    import difflib

    return difflib.get_close_matches(name, list(known), n=1)


def _identifier(option: Option) -> str:
    return "word_" + option.name.replace("-", "_")


def _given(option: Option, value: Any) -> Any:
    """A value of the command line as its kind; SpecError when it is none, or is the next option."""
    for text in map(str, value if isinstance(value, list) else [value]):
        if re.match(r"-[A-Za-z]|--", text):
            raise SpecError(f"--{option.name}: no value, for {quote(text)} is an option", hint=option.help)
    if option.kind in (int, float):
        try:
            number = option.kind(value)
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            raise SpecError(f"--{option.name}: {quote(value)} is not {_TYPES[option.kind]}", hint=option.help)
        return number
    return value


def _type(option: Option) -> Any:
    kind: Any = list[str] if option.kind is list else Path if option.kind is Path else str  # numbers: see _given
    if option.kind is bool:
        return Annotated[bool | None, typer.Option(f"--{option.name}", help=option.help, show_default=False)]
    return Annotated[kind | None, typer.Option(f"--{option.name}", help=option.help, metavar=_METAVARS[option.kind])]


def _parameter(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
