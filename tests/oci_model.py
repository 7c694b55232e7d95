"""A slow and obvious model of the OCI layer rules (image-spec layer.md), sharing nothing with osbuild.

An image is a dict from path (a tuple of names) to an inode (a dict); a layer is a list of members (dicts). Every rule
is one plain function over whole dicts. Hard links are paths whose inode is the same dict.
"""

from __future__ import annotations

from typing import Any

Path = tuple[str, ...]
Inode = dict[str, Any]
Image = dict[Path, Inode]


class RefusedError(Exception):
    """The layer breaks a rule."""


def parts(name: str) -> Path:
    names = tuple(part for part in name.split("/") if part not in ("", "."))
    if ".." in names:
        raise RefusedError(name)
    return names


def flatten(layers: list[list[dict[str, Any]]]) -> Image:
    image: Image = {(): implicit()}
    for layer in layers:
        image = lay(image, layer)
    return image


def implicit() -> Inode:
    return {"type": "dir", "mode": 0o755, "mtime": None, "xattrs": {}}


def lay(lower: Image, layer: list[dict[str, Any]]) -> Image:
    members = [(parts(member["name"]), member) for member in layer]
    plain = [(path, member) for path, member in members if not any(name.startswith(".wh.") for name in path)]
    refuse_doubles(plain)
    own = {path for path, member in plain if member["type"] == "dir"}
    gone = set()
    for path, member in members:
        if any(name.startswith(".wh.") for name in path):
            gone |= hidden_by(lower, path, member, own)
    image = {path: inode for path, inode in lower.items() if path not in gone}
    for path, member in plain:
        add(image, path, member)
    return image


def refuse_doubles(plain: list[tuple[Path, dict[str, Any]]]) -> None:
    for number, (path, member) in enumerate(plain):
        for other_path, other in plain[:number]:
            if path == other_path and not member["type"] == other["type"] == "dir":
                raise RefusedError(f"{path} twice")


def hidden_by(lower: Image, path: Path, member: dict[str, Any], own: set[Path]) -> set[Path]:
    """All paths of the lower image that a whiteout takes away."""
    *above, name = path
    if name != ".wh..wh..opq" and any(part.startswith(".wh..wh.") for part in path):
        return set()  # what aufs kept for itself
    if any(part.startswith(".wh.") for part in above):
        raise RefusedError(f"{path} below a whiteout")
    if name in (".wh.", ".wh..", ".wh..."):
        raise RefusedError(f"{path} hides nothing")
    if member["type"] not in ("file", "hardlink") or member.get("data"):
        raise RefusedError(f"{path} is no empty file")
    directory = real_directory(lower, tuple(above), own)
    if directory is None:
        return set()
    top = directory if name == ".wh..wh..opq" else (*directory, name.removeprefix(".wh."))
    inside = {found for found in lower if found[: len(top)] == top}
    return inside - {top} if name == ".wh..wh..opq" else inside


def real_directory(image: Image, written: Path, own: set[Path] | None = None) -> Path | None:
    """Where a directory really is; None if nowhere, as through a link that the layer makes a directory of its `own`."""
    at = where(image, written, own)
    return at if at is not None and image.get(at, {"type": "none"})["type"] == "dir" else None


def make_directory(image: Image, written: Path) -> Path:
    """The same, with everything made that is missing on the way there, and nothing besides."""
    at = where(image, written, None)
    assert at is not None
    for count in range(len(at)):
        if image.setdefault(at[: count + 1], implicit())["type"] != "dir":
            raise RefusedError(f"{at[: count + 1]} on the way is no directory")
    return at


def where(image: Image, written: Path, own: set[Path] | None) -> Path | None:
    """Where a path leads, word for word where there is no link; see real_directory for `own` and None."""
    at: Path = ()
    todo: list[tuple[str, Path | None]] = [(name, written[: n + 1]) for n, name in enumerate(written)]
    hops = 0
    while todo:
        name, as_written = todo.pop(0)
        if name == "..":
            at = at[:-1]
            continue
        inode = image.get((*at, name))
        if inode is None or inode["type"] != "symlink":
            at = (*at, name)
            continue
        if own is not None and as_written in own:
            return None
        hops += 1
        if hops > 40:
            raise RefusedError("symbolic links in a circle")
        if inode["target"].startswith("/"):
            at = ()
        todo = [(part, None) for part in inode["target"].split("/") if part not in ("", ".")] + todo
    return at


def add(image: Image, path: Path, member: dict[str, Any]) -> None:
    if path == ():
        if member["type"] != "dir":
            raise RefusedError("the root must be a directory")
        image[()] = inode_of(member)
        return
    if member["type"] == "hardlink":
        target = parts(member["target"])
        directory = real_directory(image, target[:-1]) if target else None
        if directory is None or image.get((*directory, target[-1]), {"type": "dir"})["type"] == "dir":
            raise RefusedError(f"{path} is a hard link to nothing, or to a directory")
        inode = image[(*directory, target[-1])]
        place = (*make_directory(image, path[:-1]), path[-1])
        if place == (*directory, target[-1]):
            raise RefusedError(f"{path} is a hard link to itself")
        take_away(image, place)
        if (*directory, target[-1]) not in image or real_directory(image, target[:-1]) != directory:
            raise RefusedError(f"{path} replaces what it is a hard link to")
        image[place] = inode
        return
    place = (*make_directory(image, path[:-1]), path[-1])
    if not (member["type"] == "dir" and image.get(place, {"type": "none"})["type"] == "dir"):
        take_away(image, place)
    image[place] = inode_of(member)


def take_away(image: Image, top: Path) -> None:
    for path in [path for path in image if path[: len(top)] == top]:
        del image[path]


def inode_of(member: dict[str, Any]) -> Inode:
    return {key: value for key, value in member.items() if key != "name"}
