"""Could this boot? Each sentence once, and silence about every tree that does boot."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

import pytest

from osbuild.arch import AARCH64, X86_64, Arch
from osbuild.artifacts import Rootfs
from osbuild.bootable import ESSENTIAL, Problem, problems, workload_problems
from osbuild.errors import InputError
from osbuild.pipeline import check_bootable
from osbuild.spec import BuildSpec
from osbuild.systemd import SERVICE, TARGET
from osbuild.tree import Draft, Entry, Tree, device, directory, regular, symlink
from tests.layer_tools import opened
from tests.program_tools import Lab, make_elf, run, tree_of

IMAGES: Final = Path("~/.cache/osbuilder/images").expanduser()
STATIC: Final = make_elf(kind=2)
UNITS: Final = "/usr/lib/systemd/system"
NULL: Final = "-> /dev/null"

Content = bytes | str | Entry


def base(files: Mapping[str, Content] | None = None, *, under: Tree | None = None) -> Tree:
    """A skeleton, or another tree, and files in it: bytes are programs, text is text, "-> there" is a link."""
    draft = under.edit() if under is not None else Draft()
    for path in ("/proc", "/sys", "/dev", "/run", "/tmp", "/etc", "/usr/bin", "/sbin"):
        if draft.get(path) is None:
            draft.put(path, directory())
    for path, data in (files or {}).items():
        if isinstance(data, Entry):
            draft.put(path, data)
        elif isinstance(data, bytes):
            draft.put(path, regular(data, 0o755))
        else:
            draft.put(path, symlink(data[3:]) if data.startswith("-> ") else regular(data.encode()))
    return draft.tree()


def found(files: Mapping[str, Content], init: str = "/sbin/init", arch: Arch = X86_64) -> tuple[Problem, ...]:
    return problems(base(files), init, arch, systemd=False)


def only(files: Mapping[str, Content], init: str = "/sbin/init", arch: Arch = X86_64) -> str:
    (problem,) = found(files, init, arch)
    assert problem.hint
    assert repr(problem.path) in problem.text
    return problem.text


def test_whatever_is_wrong_is_one_readable_line() -> None:
    rootfs = Rootfs(tree=base({"/proc": "x"}), init="/sbin/init", epoch=0)
    with pytest.raises(InputError) as caught:
        check_bootable(rootfs, BuildSpec(image="oci:x", out=Path("out"), arch=X86_64))
    assert str(caught.value) == (
        "this tree would not boot: '/sbin/init' is not in the tree; "
        "'/proc' is no directory: on a read-only root nobody can make the mount point"
    )
    assert caught.value.hint == "install it in the image, or add it to the tree with --add"


# The first process


def test_a_static_program_is_no_problem() -> None:
    assert found({"/sbin/init": STATIC}) == ()
    assert found({"/sbin/init": make_elf(machine=183)}, arch=AARCH64) == ()
    assert found({"/sbin/init": "-> ../opt/x", "/opt/x": STATIC}) == ()


@pytest.mark.parametrize(
    ("files", "text"),
    [
        ({}, "'/sbin/init' is not in the tree"),
        ({"/sbin": "-> usr/sbin"}, "'/sbin/init' is not in the tree: nothing is at '/usr/sbin/init'"),
        ({"/sbin/init": "-> ../lib/x"}, "'/sbin/init' is a symbolic link to '../lib/x', and nothing is at '/lib/x'"),
        ({"/sbin/init": "-> init"}, "'/sbin/init' is a symbolic link that leads in a circle"),
        ({"/sbin/init": directory()}, "'/sbin/init' is a directory, no program"),
        ({"/sbin/init": "-> /etc"}, "'/sbin/init' is a directory, no program"),
        ({"/sbin/init": device(0o020000, 0o755, 1, 3)}, "'/sbin/init' is no regular file"),
        ({"/sbin/init": regular(STATIC, 0o644)}, "'/sbin/init' may not be executed: its mode is 0644"),
        ({"/sbin/init": b""}, "'/sbin/init' is empty"),
        ({"/sbin/init": b"echo hello"}, "'/sbin/init' is neither an ELF program nor a script"),
        ({"/sbin/init": STATIC[:30]}, "'/sbin/init' is a broken ELF file: its ELF header is cut short or broken"),
        ({"/sbin/init": make_elf(machine=183)}, "'/sbin/init' is for aarch64, the guest is x86_64"),
        ({"/sbin/init": make_elf(machine=3, bits=32)}, "'/sbin/init' is for i386, the guest is x86_64"),
        ({"/sbin/init": make_elf(machine=62, bits=32)}, "'/sbin/init' is for x32, the guest is x86_64"),
        ({"/sbin/init": make_elf(kind=1)}, "'/sbin/init' is an object file, no program"),
        ({"/sbin/init": make_elf(kind=4)}, "'/sbin/init' is a core dump, no program"),
        ({"/sbin/init": make_elf(needed=(b"libc.so.6",))}, "'/sbin/init' is a library, no program"),
        (
            {"/sbin/init": make_elf(interpreter=b"/lib64/ld-linux-x86-64.so.2")},
            "'/lib64/ld-linux-x86-64.so.2', the dynamic loader of '/sbin/init', is not in the tree",
        ),
        (
            {"/sbin/init": make_elf(interpreter=b"/lib/ld.so"), "/lib/ld.so": make_elf(machine=183)},
            "'/lib/ld.so', the dynamic loader of '/sbin/init', is for aarch64, the guest is x86_64",
        ),
        (
            {"/sbin/init": make_elf(interpreter=b"/lib/ld.so"), "/lib/ld.so": regular(STATIC, 0o644)},
            "'/lib/ld.so', the dynamic loader of '/sbin/init', may not be executed: its mode is 0644",
        ),
        (
            {"/sbin/init": make_elf(interpreter=b"/lib/ld.so", needed=(b"a.so",)), "/lib/ld.so": STATIC},
            "'/sbin/init' needs 'a.so', which is not in the tree",
        ),
        (
            {
                "/sbin/init": make_elf(interpreter=b"/lib/ld.so", needed=(b"a.so", b"b.so")), "/lib/ld.so": STATIC,
                "/lib/a.so": make_elf(needed=(b"c\n.so",)),
            },
            "'/sbin/init' needs 'b.so', 'c\\n.so' (for '/lib/a.so'), which are not in the tree",
        ),
        (
            {
                "/sbin/init": make_elf(interpreter=b"/lib/ld.so", needed=tuple(b"%d" % one for one in range(20))),
                "/lib/ld.so": STATIC,
            },
            "'/sbin/init' needs '0', '1', '2', '3', '4', '5', '6', '7' and 12 more, which are not in the tree",
        ),
        (
            {
                "/sbin/init": make_elf(interpreter=b"/lib/ld.so", needed=(b"a.so",)), "/lib/ld.so": STATIC,
                "/lib/a.so": make_elf(machine=183),
            },
            "'/sbin/init' needs 'a.so', but '/lib/a.so' is for aarch64",
        ),
        (
            {
                "/sbin/init": make_elf(interpreter=b"/lib/ld.so", needed=(b"a.so",)), "/lib/ld.so": STATIC,
                "/etc/ld.so.conf": "/opt\n", "/opt/a.so": make_elf(),
            },
            "'/sbin/init' needs 'a.so', which is at '/opt/a.so', but not in /etc/ld.so.cache",
        ),
        (
            {"/sbin/init": make_elf(needed=(b"x",) * 1025)},
            "'/sbin/init' is a broken ELF file: it needs more than 1024 libraries",
        ),
    ],
)  # fmt: skip
def test_what_keeps_a_program_from_starting_is_said(files: Mapping[str, Content], text: str) -> None:
    assert only(files) == text


def test_what_a_loader_would_search_for_ever_is_said() -> None:
    names = [f"{number}.so".encode() for number in range(1000)]
    where = ":".join(f"/{number}" for number in range(600)).encode()
    offset = 1 + sum(len(name) + 1 for name in names)
    init = make_elf(interpreter=b"/lib/ld.so", needed=(*names, where), tags=((29, offset),))
    assert only({"/sbin/init": init, "/lib/ld.so": STATIC}) == (
        "'/sbin/init' has libraries that cannot be looked up: its libraries are not found among 200000 paths"
    )


def test_a_library_that_is_too_old_is_said(tmp_path: Path) -> None:
    lab = Lab(tmp_path / "root")
    script = tmp_path / "map"
    code = "int two(void) { return 0; }"
    for version in ("NEW_2", "OLD_1"):
        script.write_text(f"{version} {{ global: two; }};\n")
        lab.build("/lib/libone.so", f"-Wl,--version-script={script}", code=code)
        if version == "NEW_2":
            main = "int two(void); int main(void) { return two(); }"
            lab.build("/sbin/init", needs=("/lib/libone.so",), code=main)
    (problem,) = problems(base(under=tree_of(lab.root)), "/sbin/init", X86_64, systemd=False)
    assert problem.text == "'/sbin/init' needs version 'NEW_2' of '/lib/libone.so', which has no such version"
    assert run(lab.root, "/sbin/init") == 1


@pytest.mark.parametrize(
    ("loader", "word"), [(b"/lib/ld-musl-x86_64.so.1", "musl"), (b"/lib64/ld-linux-x86-64.so.2", "glibc")]
)
def test_a_program_for_the_other_libc_has_a_hint(loader: bytes, word: str) -> None:
    (problem,) = found({"/sbin/init": make_elf(interpreter=loader)})
    assert f"built for {word}" in problem.hint


# Scripts


@pytest.mark.parametrize(
    "line",
    ["#!/bin/sh\n", "#! /bin/sh -e\n", "#!\t/bin/sh\t-e \n", "#!/bin/sh", "#!bin/sh\n", "#!/usr/bin/env sh\n",
     "#!/usr/bin/env -S sh -e\n", "#!/usr/bin/env -i sh\n", "#!/usr/bin/env A=b sh\n", "#!/bin/sh\r\n"],
)  # fmt: skip
def test_a_script_is_no_problem(line: str) -> None:
    files = {"/bin/sh": STATIC, "/usr/bin/env": STATIC, "/sbin/init": line.encode()}
    assert found(files | ({"/bin/sh\r": STATIC} if "\r" in line else {})) == ()


@pytest.mark.parametrize(
    ("files", "text"),
    [
        ({"/sbin/init": b"#!/bin/ash\n"}, "'/bin/ash', the interpreter of '/sbin/init', is not in the tree"),
        ({"/sbin/init": b"#!\n/bin/sh"}, "'/sbin/init' is a script that names no interpreter after #!"),
        ({"/sbin/init": b"#!   \n"}, "'/sbin/init' is a script that names no interpreter after #!"),
        (
            {"/sbin/init": b"#!/bin/sh\r\necho\r\n"},
            "'/sbin/init' ends its lines as Windows does: its interpreter would be '/bin/sh\\r'",
        ),
        (
            {"/sbin/init": b"#!/" + b"x" * 300 + b"\n"},
            "'/sbin/init' has a first line of which the kernel reads 256 bytes only",
        ),
        (
            {"/sbin/init": b"#!/bin/sh\n", "/bin/sh": make_elf(machine=183)},
            "'/bin/sh', the interpreter of '/sbin/init', is for aarch64, the guest is x86_64",
        ),
        (
            {"/sbin/init": b"#!/bin/sh\n", "/bin/sh": make_elf(interpreter=b"/lib/ld.so")},
            "'/lib/ld.so', the dynamic loader of '/bin/sh', is not in the tree",
        ),
        (
            {"/sbin/init": b"#!/usr/bin/env bash\n", "/usr/bin/env": STATIC},
            "'/sbin/init' asks env for 'bash', which is in none of '/usr/local/bin:/bin:/usr/bin'",
        ),
        (
            {"/sbin/init": b"#!/usr/bin/env bash\n", "/usr/bin/env": STATIC, "/bin/bash": regular(STATIC, 0o600)},
            "'/bin/bash', the interpreter of '/sbin/init', may not be executed: its mode is 0600",
        ),
        (
            {"/sbin/init": b"#!/init\n", "/init": b"#!/init\n"},
            "'/init', the interpreter of '/init', is a script below 5 others; the kernel gives up there",
        ),
    ],
)  # fmt: skip
def test_what_keeps_a_script_from_starting_is_said(files: Mapping[str, Content], text: str) -> None:
    assert only(files) == text


def test_the_kernel_agrees_about_scripts_of_scripts(tmp_path: Path) -> None:
    lab = Lab(tmp_path / "root")
    lab.build("/bin/0", "-static")
    for number in range(1, 8):
        lab.put(f"/bin/{number}", f"#!/bin/{number - 1}\n", 0o755)
    tree = base(under=tree_of(lab.root))
    for number in range(8):
        ours = problems(tree, f"/bin/{number}", X86_64, systemd=False)
        assert (not ours) == (run(lab.root, f"/bin/{number}") == 0), number


# Mount points


@pytest.mark.parametrize("path", ["/proc", "/sys", "/dev", "/run", "/tmp"])
def test_a_mount_point_that_is_missing_is_said(path: str) -> None:
    draft = base({"/sbin/init": STATIC}).edit()
    draft.remove(path)
    (problem,) = problems(draft.tree(), "/sbin/init", X86_64, systemd=False)
    assert problem.text == f"'{path}' is not there: on a read-only root nobody can make the mount point"


@pytest.mark.parametrize(
    ("path", "data", "text"),
    [
        ("/tmp", "-> /nowhere", ("'/tmp' is a symbolic link to '/nowhere', where no directory is: on a read-only root "
                                "nobody can make the mount point")),
        ("/proc", "text", "'/proc' is no directory: on a read-only root nobody can make the mount point"),
        ("/tmp", "-> run/tmp", "'/tmp' leads to '/run/tmp', which disappears when '/run' is mounted"),
        ("/tmp", "-> run", "'/tmp' leads to '/run', which disappears when '/run' is mounted"),
    ],
)  # fmt: skip
def test_a_mount_point_out_of_the_way_is_said(path: str, data: str, text: str) -> None:
    draft = base({"/sbin/init": STATIC, "/run/tmp": directory()}).edit()
    draft.remove(path)
    assert only_text(problems(base({path: data}, under=draft.tree()), "/sbin/init", X86_64, systemd=False)) == text


def only_text(some: tuple[Problem, ...]) -> str:
    (problem,) = some
    return problem.text


def test_a_mount_point_that_is_a_link_to_a_directory_is_no_problem() -> None:
    draft = base({"/sbin/init": STATIC, "/var/tmp": directory()}).edit()
    draft.remove("/tmp")
    draft.put("/tmp", symlink("var/tmp"))
    assert problems(draft.tree(), "/sbin/init", X86_64, systemd=False) == ()


# systemd


def unit(kind: str = "Unit", **settings: str) -> str:
    return f"[{kind}]\n" + "".join(f"{key}={value}\n" for key, value in settings.items())


SYSTEMD: Final[Mapping[str, Content]] = {
    "/usr/lib/systemd/systemd": STATIC,
    "/sbin/init": "-> ../usr/lib/systemd/systemd",
    "/etc/machine-id": "",
    f"{UNITS}/{TARGET}": unit(Requires=f"basic.target tmp.mount {SERVICE}"),
    f"{UNITS}/{SERVICE}": unit("Service", ExecStart="/usr/bin/agent"),
    f"{UNITS}/basic.target": unit(Requires="sysinit.target", Wants="nobody.service"),
    f"{UNITS}/sysinit.target": unit(Wants="local-fs.target"),
    f"{UNITS}/local-fs.target": unit(Description="x"),
    f"{UNITS}/tmp.mount": unit("Mount", Where="/tmp"),
    "/usr/bin/agent": STATIC,
}


def with_systemd(files: Mapping[str, Content] | None = None, *, without: tuple[str, ...] = ()) -> tuple[Problem, ...]:
    draft = base(SYSTEMD).edit()
    for path in without:
        assert draft.remove(path)
    return problems(base(files, under=draft.tree()), "/sbin/init", X86_64, systemd=True)


def test_a_tree_with_systemd_is_no_problem() -> None:
    assert with_systemd() == ()


def test_a_tree_without_systemd_is_said_once() -> None:
    some = problems(base({"/sbin/init": STATIC}), "/sbin/init", X86_64, systemd=True)
    assert only_text(some) == (
        "'/usr/lib/systemd/systemd' is not in the tree, nor is '/lib/systemd/systemd': there is no systemd"
    )


def test_an_init_that_is_not_systemd_is_said() -> None:
    assert only_text(with_systemd({"/sbin/init": STATIC})) == (
        "'/sbin/init' leads to '/sbin/init', not to systemd at '/usr/lib/systemd/systemd'"
    )


def test_systemd_outside_usr_is_found() -> None:
    files = {path.removeprefix("/usr") if "systemd" in path else path: data for path, data in SYSTEMD.items()}
    files["/sbin/init"] = "-> /lib/systemd/systemd"
    assert problems(base(files), "/sbin/init", X86_64, systemd=True) == ()


@pytest.mark.parametrize("name", ESSENTIAL)
@pytest.mark.parametrize("home", ["/etc/systemd/system", "/usr/local/lib/systemd/system", UNITS])
@pytest.mark.parametrize("mask", [NULL, "", "-> ../../../../../../dev/null", "-> /etc/other"])
def test_a_mask_is_said(name: str, home: str, mask: str) -> None:
    texts = [one.text for one in with_systemd({f"{home}/{name}": mask, "/etc/other": NULL})]
    assert texts == [f"'{home}/{name}' masks the unit '{name}': {ESSENTIAL[name]}"]


def test_a_mask_below_another_unit_has_no_say() -> None:
    assert with_systemd({f"/etc/systemd/system/{SERVICE}": unit("Service", ExecStart="/usr/bin/agent"),
                         f"{UNITS}/{SERVICE}": NULL}) == ()  # fmt: skip


def test_a_mask_in_run_is_gone_at_boot() -> None:
    assert with_systemd({f"/run/systemd/system/{SERVICE}": NULL}) == ()


def test_a_mask_of_something_else_is_no_problem() -> None:
    assert with_systemd({f"{UNITS}/hwclock.service": NULL, f"{UNITS}/nobody.service": NULL}) == ()


@pytest.mark.parametrize("name", ESSENTIAL)
def test_an_essential_unit_that_is_missing_is_said(name: str) -> None:
    assert only_text(with_systemd(without=(f"{UNITS}/{name}",))) == (
        f"'{UNITS}/{name}' is not there, nor is the unit anywhere else: {ESSENTIAL[name]}"
    )


def test_fstab_stands_in_for_tmp_mount() -> None:
    path = f"{UNITS}/tmp.mount"
    assert with_systemd({"/etc/fstab": "# x\ntmpfs /tmp tmpfs rw 0 0\n"}, without=(path,)) == ()
    assert len(with_systemd({"/etc/fstab": "# tmpfs /tmp tmpfs\nx /tmpx y\n"}, without=(path,))) == 1


def test_what_an_essential_unit_requires_is_followed() -> None:
    files = {f"{UNITS}/basic.target": unit(Requires="sysinit.target dbus.socket -.mount dev-x.device a@%i.service")}
    missing = f"'{UNITS}/dbus.socket' is not there, nor is the unit anywhere else: basic.target requires it"
    assert only_text(with_systemd(files)) == missing
    files[f"{UNITS}/dbus.socket"] = unit(BindsTo="deep.service")
    files[f"{UNITS}/deep.service"] = NULL
    masked = f"'{UNITS}/deep.service' masks the unit 'deep.service': dbus.socket requires it"
    assert only_text(with_systemd(files)) == masked


def test_a_requires_directory_counts() -> None:
    link = {f"/etc/systemd/system/{TARGET}.requires/dbus.socket": f"-> {UNITS}/dbus.socket"}
    assert "kata-containers.target requires it" in only_text(with_systemd(link))
    assert with_systemd(link | {f"{UNITS}/dbus.socket": unit(Description="x")}) == ()


def test_what_is_only_wanted_may_be_missing() -> None:
    assert with_systemd({f"/etc/systemd/system/{TARGET}.wants/dbus.socket": f"-> {UNITS}/dbus.socket"}) == ()


def test_an_instance_is_found_by_its_template() -> None:
    files = {f"{UNITS}/basic.target": unit(Requires="a@b.service"), f"{UNITS}/a@.service": unit(Description="x")}
    assert with_systemd(files) == ()


def test_units_that_require_each_other_end() -> None:
    assert with_systemd({f"{UNITS}/sysinit.target": unit(Requires="basic.target sysinit.target")}) == ()


def test_a_script_in_init_d_becomes_a_unit() -> None:
    files: dict[str, Content] = {f"{UNITS}/basic.target": unit(Requires="old.service"), "/etc/init.d/old": STATIC}
    assert with_systemd(files) == ()


@pytest.mark.parametrize(
    "path",
    [f"/etc/systemd/system/{SERVICE}.d/x.conf", f"{UNITS}/kata-.service.d/x.conf", f"{UNITS}/{TARGET}.d/x.conf"],
)
def test_a_drop_in_for_our_units_is_said(path: str) -> None:
    name = TARGET if TARGET in path else SERVICE
    text = only_text(with_systemd({path: unit("Service", ExecStart="/bin/false")}))
    assert text == f"'{path}' changes '{name}', which is osbuilder's own"
    assert with_systemd({path: NULL}) == ()
    assert with_systemd({path.replace(".conf", ".txt"): "x"}) == ()


def test_a_drop_in_is_said_once_where_lib_is_a_link() -> None:
    files = {"/lib": "-> usr/lib", f"{UNITS}/{SERVICE}.d/x.conf": unit("Service", Nice="1")}
    assert len(with_systemd(files)) == 1


def test_a_drop_in_for_all_services_is_the_images_business() -> None:
    assert with_systemd({f"{UNITS}/service.d/10-timeout-abort.conf": unit("Service", TimeoutStopSec="45")}) == ()


@pytest.mark.parametrize(
    ("command", "text"),
    [
        ("/usr/bin/nobody -x", f"'/usr/bin/nobody', which {SERVICE} starts, is not in the tree"),
        ("-@/usr/bin/nobody x", f"'/usr/bin/nobody', which {SERVICE} starts, is not in the tree"),
        ("nobody", (f"'{UNITS}/{SERVICE}' starts 'nobody', which is in none of "
                   "'/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin'")),
        ("/usr/bin/wrong", f"'/usr/bin/wrong', which {SERVICE} starts, is for aarch64, the guest is x86_64"),
        ("", f"'{UNITS}/{SERVICE}' has no ExecStart="),
    ],
)  # fmt: skip
def test_an_agent_that_cannot_start_is_said(command: str, text: str) -> None:
    files: dict[str, Content] = {
        f"{UNITS}/{SERVICE}": unit("Service", ExecStart=command), "/usr/bin/wrong": make_elf(machine=183)
    }  # fmt: skip
    (problem,) = with_systemd(files)
    assert problem.text == text
    assert problem.hint


@pytest.mark.parametrize(
    "service",
    [
        "[Service]\nExecStart=agent --x\n", '[Service]\nExecStart="/usr/bin/agent" x\n',
        "[Service]\nExecStart=/none\nExecStart=\nExecStart=/usr/bin/agent\n",
        "[Service]\nExecStart=\\\n# why\n  /usr/bin/agent\n",
        "[Service]\n;ExecStart=/no\nExecStart = !!/usr/bin/agent\n",
    ],
    ids=["bare", "quoted", "reset", "continued", "spaced"],
)  # fmt: skip
def test_a_command_is_read_as_systemd_reads_it(service: str) -> None:
    assert with_systemd({f"{UNITS}/{SERVICE}": service}) == ()


def test_a_machine_id_is_needed_whatever_is_in_it() -> None:
    assert with_systemd({"/etc/machine-id": "uninitialized\n"}) == ()
    assert only_text(with_systemd(without=("/etc/machine-id",))) == (
        "'/etc/machine-id' is not there: on a read-only root systemd needs a file to mount the guest's identity on"
    )
    assert "is no regular file" in only_text(with_systemd({"/etc/machine-id": directory()}))


# Real trees


def image(name: str) -> Tree:
    if not (IMAGES / name).exists():
        pytest.skip(f"there is no image at {IMAGES / name}")
    return opened(f"oci:{IMAGES / name}").tree


def test_debian_with_systemd_is_no_problem() -> None:
    tree = image("debian-1")
    files = {path: data for path, data in SYSTEMD.items() if Path(path).name in (SERVICE, TARGET, "tmp.mount", "agent")}
    more = base({**files, "/sbin/init": "-> /lib/systemd/systemd", "/etc/machine-id": ""}, under=tree)
    assert problems(more, "/sbin/init", X86_64, systemd=True) == ()


def test_debian_on_another_machine_is_a_problem() -> None:
    tree = base({"/sbin/init": "-> /lib/systemd/systemd"}, under=image("debian-1"))
    (problem,) = problems(tree, "/sbin/init", AARCH64, systemd=False)
    assert problem.text == "'/sbin/init' is for x86_64, the guest is aarch64"
    assert "--platform linux/arm64" in problem.hint


def test_a_library_taken_from_debian_is_missed() -> None:
    draft = image("debian-1").edit()
    real = draft.resolve("/lib/x86_64-linux-gnu/libcrypto.so.3")
    assert draft.remove(real)
    draft.put("/sbin/init", symlink("/lib/systemd/systemd"))
    (problem,) = problems(base(under=draft.tree()), "/sbin/init", X86_64, systemd=False)
    assert problem.text == (
        "'/sbin/init' needs 'libcrypto.so.3' (for '/usr/lib/x86_64-linux-gnu/systemd/libsystemd-shared-252.so'), "
        "which is not in the tree"
    )


def test_a_static_busybox_is_no_problem() -> None:
    files = {"/init": b"#!/bin/sh\nexec sleep 1\n", "/sbin/init": b"#!/bin/busybox sh\n"}
    tree = base(files, under=image("busybox-1"))
    for init in ("/init", "/sbin/init", "/bin/sh"):
        assert problems(tree, init, X86_64, systemd=False) == ()


def test_a_tree_like_alpines_is_no_problem(tmp_path: Path) -> None:
    lab = Lab(tmp_path / "root", musl=True)
    lab.build("/usr/lib/libone.so.1")
    lab.build("/bin/busybox", needs=("/usr/lib/libone.so.1",))
    lab.link("/sbin/init", "/bin/busybox")
    lab.link("/lib/libc.musl-x86_64.so.1", "ld-musl-x86_64.so.1")
    assert problems(base(under=tree_of(lab.root)), "/sbin/init", X86_64, systemd=False) == ()
    assert run(lab.root, "/sbin/init") == 0


@pytest.mark.parametrize("flags", [("-static",), ("-static-pie",), ("-no-pie",), ("-pie", "-fPIE")], ids=" ".join)
def test_every_way_to_link_a_program_is_no_problem(flags: tuple[str, ...], tmp_path: Path) -> None:
    lab = Lab(tmp_path / "root")
    lab.build("/sbin/init", *flags)
    assert problems(base(under=tree_of(lab.root)), "/sbin/init", X86_64, systemd=False) == ()
    assert run(lab.root, "/sbin/init") == 0


def test_a_static_program_of_gos_is_no_problem() -> None:
    path = Path("/usr/local/go/bin/go")
    if not path.exists():
        pytest.skip("Go is not installed")
    assert found({"/sbin/init": path.read_bytes()}) == ()


def remove_library(lab: Lab) -> None:
    (lab.root / "lib/libone.so").unlink()


def remove_loader(lab: Lab) -> None:
    (lab.root / "lib64/ld-linux-x86-64.so.2").unlink()


def remove_permission(lab: Lab) -> None:
    (lab.root / "sbin/init").chmod(0o644)


def change_machine(lab: Lab) -> None:
    data = bytearray((lab.root / "sbin/init").read_bytes())
    struct.pack_into("<H", data, 18, 183)
    lab.put("/sbin/init", bytes(data), 0o755)


def change_nothing(lab: Lab) -> None:
    pass


@pytest.mark.parametrize("harm", [change_nothing, remove_library, remove_loader, remove_permission, change_machine])
def test_the_kernel_and_the_loader_agree(harm: Callable[[Lab], None], tmp_path: Path) -> None:
    lab = Lab(tmp_path / "root")
    lab.build("/lib/libone.so")
    lab.build("/sbin/init", needs=("/lib/libone.so",))
    harm(lab)
    ours = problems(base(under=tree_of(lab.root)), "/sbin/init", X86_64, systemd=False)
    assert (not ours) == (run(lab.root, "/sbin/init") == 0)
    assert bool(ours) == (harm is not change_nothing)


# The image's own program


PATH: Final = "/usr/local/bin:/usr/bin:/bin"


def test_an_image_without_a_program_is_no_problem() -> None:
    assert workload_problems(base(), "", PATH, X86_64) == ()


@pytest.mark.parametrize("argv0", ["app", "/usr/bin/app", "./usr/bin/app", "usr/bin/app"])
def test_a_program_is_found_as_a_runtime_finds_it(argv0: str) -> None:
    assert workload_problems(base({"/usr/bin/app": STATIC}), argv0, PATH, X86_64) == ()


def test_a_program_is_found_from_its_working_directory() -> None:
    tree = base({"/srv/app": STATIC})
    assert workload_problems(tree, "./app", PATH, X86_64, workdir="/srv") == ()
    assert workload_problems(tree, "app", ".", X86_64, workdir="/srv") == ()
    assert len(workload_problems(tree, "./app", PATH, X86_64)) == 1


def test_without_a_path_there_is_dockers() -> None:
    assert workload_problems(base({"/sbin/app": STATIC}), "app", "", X86_64) == ()


def test_the_first_that_may_be_executed_is_taken() -> None:
    tree = base({"/usr/bin/app": regular(STATIC, 0o644), "/bin/app": STATIC, "/usr/local/bin/app": directory()})
    assert workload_problems(tree, "app", PATH, X86_64) == ()


@pytest.mark.parametrize(
    ("files", "argv0", "text"),
    [
        ({}, "app\x1b", "'app\\x1b' is in no directory of the image's PATH, '/usr/local/bin:/usr/bin:/bin'"),
        ({}, "/app", "'/app' is not in the tree"),
        ({"/bin/app": regular(STATIC, 0o644)}, "app", "'/bin/app' may not be executed: its mode is 0644"),
        ({"/bin/app": make_elf(machine=183)}, "app", "'/bin/app' is for aarch64, the guest is x86_64"),
        ({"/app": b"#!/usr/bin/env node\n", "/usr/bin/env": STATIC}, "/app",
         "'/app' asks env for 'node', which is in none of '/usr/local/bin:/usr/bin:/bin'"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_the_images_program_is_said(files: Mapping[str, Content], argv0: str, text: str) -> None:
    (problem,) = workload_problems(base(files), argv0, PATH, X86_64)
    assert problem.text == text
    assert problem.text.isprintable()
    assert problem.hint
