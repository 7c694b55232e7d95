"""What an image would have run: converted as the image specification says, found in the guest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from osbuild.errors import InputError
from osbuild.oci import ImageConfig, Platform
from osbuild.tree import Draft, regular
from osbuild.workload import DEFAULT_PATH, PATH, User, find_user, workload
from tests.guest_trees import assemble, explained, make_image, parsed
from tests.layer_tools import link, member

PASSWD = b"""root:x:0:0:root:/root:/bin/sh
broken line
web:x:33:33:web:/var/www:/bin/sh
app:x:1000:1001::/home/app:/bin/sh
nan:x:one:two::/:/bin/sh
"""
GROUP = b"""root:x:0:
www:x:33:web
staff:x:50:app,web
audio:x:29:app
app:x:1001:app
empty:x:60
"""


def users() -> Draft:
    draft = Draft()
    draft.put("/etc/passwd", regular(PASSWD))
    draft.put("/etc/group", regular(GROUP))
    return draft


def config(**fields: Any) -> ImageConfig:
    document = {"os": "linux", "architecture": "amd64", "config": fields}
    return ImageConfig(platform=Platform(os="linux", architecture="amd64"), diff_ids=(), document=document)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", User(uid=0, gid=0, additional_gids=(0,))),
        ("root", User(uid=0, gid=0, additional_gids=(0,))),
        ("web", User(uid=33, gid=33, additional_gids=(33, 50))),
        ("app", User(uid=1000, gid=1001, additional_gids=(29, 50, 1001))),
        ("1000", User(uid=1000, gid=1001, additional_gids=(29, 50, 1001))),
        ("app:staff", User(uid=1000, gid=50, additional_gids=(50,))),
        ("app:7", User(uid=1000, gid=7, additional_gids=(7,))),
        ("1000:staff", User(uid=1000, gid=50, additional_gids=(50,))),
        ("5:6", User(uid=5, gid=6, additional_gids=(6,))),
        ("5", User(uid=5, gid=0, additional_gids=(0,))),
        (":staff", User(uid=0, gid=50, additional_gids=(50,))),
        ("0", User(uid=0, gid=0, additional_gids=(0,))),
    ],
)
def test_a_user_becomes_numbers(text: str, expected: User) -> None:
    assert find_user(text, users()) == expected


@pytest.mark.parametrize("text", ["nobody", "nan", "app:nobody", "-1", "4294967295", "9" * 20, "broken line"])
def test_a_user_or_group_that_is_not_there_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="is to run as USER"):
        find_user(text, users())


def test_numbers_need_no_passwd() -> None:
    assert find_user("7:8", Draft()) == User(uid=7, gid=8, additional_gids=(8,))
    with pytest.raises(InputError):
        find_user("app", Draft())


def test_entrypoint_and_command_are_one_list_of_arguments() -> None:
    found = workload(config(Entrypoint=["/bin/sh", "-c"], Cmd=["echo hi"], Env=["A=1"], WorkingDir="/srv"), Draft())
    assert found is not None
    assert found.args == ("/bin/sh", "-c", "echo hi")
    assert found.env == ("A=1", DEFAULT_PATH)
    assert found.cwd == "/srv"


def test_a_path_of_the_images_own_is_the_only_one() -> None:
    found = workload(config(Cmd=["x"], Env=["PATH=/mine", "B=2"]), Draft())
    assert found is not None
    assert found.env == ("PATH=/mine", "B=2")
    assert found.cwd == "/"


def test_a_variable_has_its_last_value_and_one_without_a_value_is_none() -> None:
    found = workload(config(Cmd=["x"], Env=["A=1", "PATH=/old", "B", "A=2", "=c", "PATH=/mine", "D="]), Draft())
    assert found is not None
    assert found.env == ("A=2", "PATH=/mine", "D=")


@pytest.mark.parametrize("fields", [{}, {"Entrypoint": None, "Cmd": None}, {"Entrypoint": [], "User": "nobody"}])
def test_an_image_that_names_no_program_has_no_workload(fields: dict[str, Any]) -> None:
    assert workload(config(**fields), Draft()) is None


def test_the_rest_is_annotations_and_labels_win() -> None:
    found = workload(
        config(
            Cmd=["x"], StopSignal="SIGQUIT", ExposedPorts={"443/tcp": {}, "80/tcp": {}}, Volumes={"/data": {}},
            Labels={"mine": "yes", "org.opencontainers.image.os": "other"},
        ),
        Draft(),
    )  # fmt: skip
    assert found is not None
    assert dict(found.annotations) == {
        "mine": "yes",
        "org.opencontainers.image.architecture": "amd64",
        "org.opencontainers.image.exposedPorts": "443/tcp,80/tcp",
        "org.opencontainers.image.os": "other",
        "org.opencontainers.image.stopSignal": "SIGQUIT",
        "osbuilder.volumes": "/data",
    }


@pytest.mark.parametrize(
    "fields",
    [
        {"Cmd": "sh"},
        {"Cmd": [1]},
        {"Cmd": ["a\0b"]},
        {"Cmd": ["x"], "Env": {"A": "1"}},
        {"Cmd": ["x"], "Labels": ["a"]},
        {"Cmd": ["x"], "Labels": {"a": 1}},
        {"Cmd": ["x"], "ExposedPorts": ["80"]},
        {"Cmd": ["x"], "User": 1000},
        {"Cmd": ["x"], "WorkingDir": ["/"]},
        {"Env": "A=1"},
        {"User": 1000},
        {"WorkingDir": 7},
        {"StopSignal": 15},
        {"Labels": ["a"]},
    ],
)
def test_a_config_of_other_types_is_refused_also_without_a_program(fields: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="the image's config"):
        workload(config(**fields), Draft())


def test_the_description_is_in_the_guest_and_follows_links_inside_it_only(tmp_path: Path) -> None:
    fields = {"Cmd": ["/bin/app"], "User": "app"}
    tree = assemble(
        tmp_path, link("etc/passwd", "../../../usr/passwd"), member("usr/passwd", PASSWD), member("etc/group", GROUP),
        config=fields,
    ).tree  # fmt: skip
    found = parsed(tree, PATH)
    assert found["ociVersion"] == "1.0.2"
    assert found["process"] == {
        "terminal": False,
        "user": {"uid": 1000, "gid": 1001, "additionalGids": [29, 50, 1001]},
        "args": ["/bin/app"],
        "env": [DEFAULT_PATH],
        "cwd": "/",
    }
    assert tree[PATH].mode & 0o777 == 0o644


def test_a_description_of_an_earlier_guest_does_not_stay(tmp_path: Path) -> None:
    stale = member(PATH[1:], json.dumps({"process": {"args": ["old"]}}).encode())
    assert PATH not in assemble(tmp_path / "a", stale).tree
    row = explained(tmp_path / "b", stale)["workload_description"]
    assert (row.applied, row.note) == (False, "the image names nothing to start")


def test_a_user_that_the_image_lacks_refuses_the_image(tmp_path: Path) -> None:
    assert make_image(tmp_path, member("a"), config={"Cmd": ["x"], "User": "app"}).config
    with pytest.raises(InputError, match="'app', and its /etc/passwd has no 'app'") as caught:
        assemble(tmp_path / "2", member("a"), config={"Cmd": ["x"], "User": "app"})
    assert "no engine" in caught.value.hint
