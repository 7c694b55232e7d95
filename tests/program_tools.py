"""Programs and libraries for tests: built by gcc and musl-gcc into a directory, run there by the real loaders."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
from pathlib import Path
from typing import Final

import pytest

from osbuild.tree import Draft, Tree, directory, regular, symlink

GLIBC: Final = {
    "/lib64/ld-linux-x86-64.so.2": Path("/lib64/ld-linux-x86-64.so.2"),
    "/lib/x86_64-linux-gnu/libc.so.6": Path("/lib/x86_64-linux-gnu/libc.so.6"),
}
MUSL: Final = {"/lib/ld-musl-x86_64.so.1": Path("/usr/lib/x86_64-linux-musl/libc.so")}


def tree_of(root: Path) -> Tree:
    """A directory of this machine as a tree, modes included."""
    draft = Draft()
    for above, folders, files in os.walk(root):
        for name in [*folders, *files]:
            path = Path(above) / name
            inside = f"/{path.relative_to(root)}"
            if path.is_symlink():
                draft.put(inside, symlink(str(path.readlink())))
            elif path.is_dir():
                draft.put(inside, directory(path.stat().st_mode & 0o7777))
            else:
                draft.put(inside, regular(path.read_bytes(), path.stat().st_mode & 0o7777))
    return draft.tree()


class Lab:
    """A root directory in which programs are built, and asked what they load."""

    def __init__(self, root: Path, *, musl: bool = False) -> None:
        self.root, self.musl = root, musl
        compiler = shutil.which("musl-gcc" if musl else "gcc")
        files = MUSL if musl else GLIBC
        if compiler is None or not all(path.exists() for path in files.values()):
            pytest.skip("musl-gcc is not installed" if musl else "this is no x86_64 Debian with gcc")
        self.compiler, self.loader = compiler, next(iter(files))
        for inside, path in files.items():
            self.put(inside, path.read_bytes(), 0o755)

    def put(self, inside: str, data: bytes | str, mode: int = 0o644) -> Path:
        path = self.root / inside.lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data if isinstance(data, bytes) else data.encode())
        path.chmod(mode)
        return path

    def link(self, inside: str, target: str) -> None:
        path = self.root / inside.lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(target)

    def build(self, inside: str, *flags: str, needs: tuple[str, ...] = (), code: str = "") -> Path:
        """A library, when its name has ".so", else a program; `needs` are libraries by their paths in here."""
        path = self.put(inside, b"")
        name = path.name
        if ".so" in name:
            stem = name.partition(".")[0]
            source, kind = code or f"int {stem}(void) {{ return 0; }}", ["-shared", "-fPIC", f"-Wl,-soname,{name}"]
        else:
            source, kind = code or "int main(void) { return 0; }", []
        libraries = [str(self.root / need.lstrip("/")) for need in needs]
        argv = [
            self.compiler, "-x", "c", "-", "-o", str(path), *kind, *flags,
            "-Wl,--no-as-needed", "-Wl,--allow-shlib-undefined", *["-x", "none", *libraries],
        ]  # fmt: skip
        if libraries:
            argv.append("-Wl,-rpath-link=" + ":".join(sorted({os.path.dirname(one) for one in libraries})))  # noqa: PTH120
        subprocess.run(argv, input=source.encode(), check=True)
        return path

    def asked(self, inside: str) -> dict[str, str | None]:
        """Name -> path by the word of the real loader, None for what it did not find."""
        return listed(self.root, self.loader, inside)


def listed(root: Path, loader: str, program: str) -> dict[str, str | None]:
    if os.geteuid() != 0:
        pytest.skip("chroot needs root")
    # As ldd does it: in this mode glibc's loader goes on after something is missing; musl's needs the option.
    argv = [loader, *(["--list"] if "musl" in loader else []), program]

    def enter() -> None:
        os.chroot(root)
        os.chdir("/")

    done = subprocess.run(
        argv, preexec_fn=enter, capture_output=True, text=True, env={"LD_TRACE_LOADED_OBJECTS": "1"}, check=False
    )
    found: dict[str, str | None] = {}
    for line in (done.stdout + done.stderr).splitlines():
        words = line.split()
        if "=>" in words:
            path = words[words.index("=>") + 1]
            found[words[0]] = None if path == "not" else path
        elif line.startswith("Error loading shared library"):  # musl
            found[line.split("library ")[1].split(":")[0]] = None
        elif words and words[0].startswith("/"):
            found[words[0]] = words[0]
    return {name: path for name, path in found.items() if loader not in (name, path)}


def run(root: Path, program: str) -> int:
    """Start a program as the kernel would in a guest, with /proc: its exit status."""
    if os.geteuid() != 0:
        pytest.skip("chroot needs root")
    (root / "proc").mkdir(exist_ok=True)
    script = 'mount --bind /proc "$1/proc" && exec chroot "$1" "$2"'
    argv = ["unshare", "--mount", "sh", "-c", f"{script} || exit 99", "sh", str(root), program]
    done = subprocess.run(argv, capture_output=True, check=False)
    if done.returncode == 99:
        pytest.skip("no private mounts are allowed here")
    return done.returncode


def make_elf(
    *, bits: int = 64, order: str = "<", machine: int = 62, kind: int = 3, interpreter: bytes = b"",
    needed: tuple[bytes, ...] = (), tags: tuple[tuple[int, int], ...] = (),
) -> bytes:  # fmt: skip
    """An ELF file by the book: one PT_LOAD over all of it, PT_INTERP and PT_DYNAMIC where asked for."""
    wide = bits == 64
    head, entry = (64, 56) if wide else (52, 32)
    count = 1 + bool(interpreter) + bool(needed or tags)
    names, offsets = b"\0", []
    for name in needed:
        offsets.append(len(names))
        names += name + b"\0"
    start = head + entry * count
    text = interpreter + b"\0" if interpreter else b""
    table = start + len(text)
    table += -table % 8
    dynamic_at = table + len(names)
    dynamic_at += -dynamic_at % 8
    pairs = [(1, offset) for offset in offsets] + [(5, table), (10, len(names)), *tags, (0, 0)]
    dynamic = b"".join(struct.pack(f"{order}{'QQ' if wide else 'II'}", *pair) for pair in pairs) if count > 1 else b""
    body = text.ljust(table - start, b"\0") + names
    body = body.ljust(dynamic_at - start, b"\0") + dynamic

    def header(segment: int, offset: int, size: int) -> bytes:
        if wide:
            return struct.pack(f"{order}IIQQQQQQ", segment, 5, offset, offset, offset, size, size, 8)
        return struct.pack(f"{order}IIIIIIII", segment, offset, offset, offset, size, size, 5, 8)

    headers = header(1, 0, start + len(body))
    if interpreter:
        headers += header(3, start, len(text))
    if needed or tags:
        headers += header(2, dynamic_at, len(dynamic))
    ident = b"\x7fELF" + bytes([2 if wide else 1, 1 if order == "<" else 2, 1]) + bytes(9)
    word = "Q" if wide else "I"
    rest = struct.pack(
        f"{order}HHI{word}{word}{word}IHHHHHH", kind, machine, 1, start, head, 0, 0, head, entry, count, 0, 0, 0
    )
    return ident + rest + headers + body
