"""Where kernel sources come from, on tests/toy-kernel: pins, tarballs, signatures, git, directories."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from osbuild import command
from osbuild.arch import X86_64
from osbuild.cache import Cache
from osbuild.errors import HostError, InputError, SpecError
from osbuild.kernel import KernelSpec, build_kernel
from osbuild.kernel_pins import KEYS, Key, Pin, Pins, parse_pins, read_pins
from osbuild.kernel_sources import KINDS, below, open_source, signature
from osbuild.kernel_sources.directory import measure
from osbuild.options import read_config
from osbuild.resources import resource

TOY = Path(__file__).parent / "toy-kernel"
GIT = {
    "GIT_CONFIG_GLOBAL": "/dev/null", "GIT_CONFIG_NOSYSTEM": "1", "GIT_AUTHOR_NAME": "a", "GIT_AUTHOR_EMAIL": "a@b",
    "GIT_COMMITTER_NAME": "a", "GIT_COMMITTER_EMAIL": "a@b", "PATH": os.environ["PATH"],
}  # fmt: skip


@pytest.fixture
def tarball(tmp_path: Path) -> Path:
    path = tmp_path / "linux-6.12.7.tar.xz"
    subprocess.run(["tar", "-C", TOY.parent, "-cJf", path, TOY.name], check=True)
    return path


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return shutil.copytree(TOY, tmp_path / "mine", symlinks=True)


def git(repository: Path, *words: str) -> str:
    done = subprocess.run(["git", "-C", repository, *words], check=True, env=GIT, stdout=subprocess.PIPE, text=True)
    return done.stdout.strip()


@pytest.fixture
def repository(directory: Path) -> Path:
    git(directory, "init", "-q", "-b", "main")
    git(directory, "add", "-A")
    git(directory, "commit", "-q", "-m", "first")
    return directory


def pins(tarball: Path, **more: str) -> Pins:
    digest = hashlib.sha256(tarball.read_bytes()).hexdigest()
    words = {"series": "6.12", "version": "6.12.7", "source": "debian", "package": "linux-toy", "sha256": digest}
    return Pins(default="toy", kernels={"toy": Pin(file=tarball, **words | more)}, keys=())


def contents_of(tree: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(path.relative_to(tree)): (path.stat().st_mode, path.read_bytes())
        for path in sorted(tree.rglob("*"))
        if path.is_file() and ".git" not in path.parts
    }


def stamps_of(tree: Path) -> dict[str, tuple[int, int, int]]:
    """Everything in it, git's own included: inode, time, size."""
    found = {}
    for path in sorted(tree.rglob("*")):
        status = path.lstat()
        found[str(path)] = (status.st_ino, status.st_mtime_ns, status.st_size)
    return found


# --- Pins -----------------------------------------------------------------------------------------------------------


def test_what_is_pinned_here_is_read_and_the_default_is_debians_6_12() -> None:
    found = read_pins()
    assert found.default == "6.12"
    assert found.kernels["6.12"].file == Path("/usr/src/linux-source-6.12.tar.xz")
    assert {"6.12", "6.1"} <= found.kernels.keys()
    assert {key.fingerprint[-16:] for key in found.keys} == {"38DBBDC86092693E", "79BE3E4300411886"}


@pytest.mark.parametrize("name", sorted(read_pins().kernels))
def test_each_pinned_file_that_is_here_is_the_one_that_is_pinned(name: str) -> None:
    pin = read_pins().kernels[name]
    if not pin.file.is_file():
        pytest.skip(f"no {pin.file}: apt-get install {pin.package}")
    version = subprocess.run(
        ["dpkg-query", "-W", "-f", "${Version}", pin.package], capture_output=True, text=True, check=False
    )
    if version.stdout != pin.version:
        pytest.skip(f"Debian has moved on to {version.stdout}")
    with pin.file.open("rb") as file:
        assert hashlib.file_digest(file, "sha256").hexdigest() == pin.sha256


ROW = '[kernel.x]\nseries = "6.12"\nversion = "1"\nsource = "debian"\nfile = "/f"\n'
ROW_DIGEST = ROW + f'sha256 = "{"0" * 64}"\n'


@pytest.mark.parametrize(
    ("text", "said"),
    [
        pytest.param("default = ", "is not TOML", id="no TOML"),
        pytest.param('default = "y"\n' + ROW_DIGEST, "default = 'y' is no kernel of it", id="another default"),
        pytest.param('default = "x"\n' + ROW, r"\[kernel.x\] has no sha256", id="no digest"),
        pytest.param('default = "x"\n' + ROW + 'sha256 = "beef"\n', "'beef' is not a sha256", id="a short digest"),
        pytest.param('default = "x"\n' + ROW_DIGEST + "size = 3\n", "size = 3 is no word of it", id="a strange word"),
        pytest.param(
            'default = "x"\n' + ROW_DIGEST.replace("debian", "ftp"), "no source 'ftp'", id="a strange publisher"
        ),
        pytest.param(
            'default = "x"\n' + ROW_DIGEST + '[[key]]\nname = "n"\nfingerprint = "abc"\n', "not a fingerprint", id="key"
        ),
    ],
)
def test_a_wrong_versions_file_is_refused_by_its_place(text: str, said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        parse_pins(text, "v.toml")
    assert str(caught.value).startswith("v.toml")


def test_a_pinned_tarball_is_opened_by_its_name_and_by_default(tarball: Path, cache: Cache) -> None:
    known = pins(tarball)
    first, second = (open_source(name, cache, pins=known) for name in (None, "toy"))
    assert first == second
    assert (first.series, first.origin) == ("6.12", "debian 6.12.7")
    assert not list((cache.root / "v1/kernel-source").glob("*/")), "a kernel that is there needs no source"
    assert contents_of(first.tree) == contents_of(TOY)


def test_a_pinned_tarball_of_another_series_is_refused_when_it_is_unpacked(tarball: Path, cache: Cache) -> None:
    source = open_source(None, cache, pins=pins(tarball, series="6.6"))
    with pytest.raises(InputError, match=r"holds Linux 6\.12, where kernel-configs/versions\.toml says 6\.6"):
        _ = source.tree


def test_a_pinned_tarball_with_other_bytes_is_refused_with_its_digest_and_what_to_do(
    tarball: Path, cache: Cache
) -> None:
    known = pins(tarball, sha256="0" * 64)
    with pytest.raises(InputError, match=r"is not 6\.12\.7, which kernel-configs/versions\.toml pins") as caught:
        open_source(None, cache, pins=known)
    assert hashlib.sha256(tarball.read_bytes()).hexdigest() in str(caught.value)
    assert caught.value.hint == f"apt-get install linux-toy=6.12.7; or --source {tarball} takes it as it is"
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("owner", "verify", "taken"),
    [
        ("linux-source-toy", "", True),
        ("linux-source-toy", "??5??????   /usr/src/toy.tar", False),  # somebody changed the file
        ("another-package", "", False),
    ],
)
def test_when_debian_has_moved_on_its_package_is_built_if_it_is_whole_and_nobody_named_a_version(
    owner: str, verify: str, taken: bool, tarball: Path, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = {"-S": f"{owner}: {tarball}\n", "-W": "6.12.8-1", "--verify": verify}
    monkeypatch.setattr("osbuild.kernel_sources.tarball._has_dpkg", lambda: True)
    monkeypatch.setattr("osbuild.kernel_sources.tarball.command.run", _answering(answers))
    known = pins(tarball, sha256="0" * 64, package="linux-source-toy")
    if taken:
        assert open_source(None, cache, pins=known).origin == "debian 6.12.8-1, where 6.12.7 is pinned"
    else:
        with pytest.raises(InputError, match=r"is not 6\.12\.7"):
            open_source(None, cache, pins=known)
    with pytest.raises(InputError, match=r"is not 6\.12\.7"):
        open_source("toy", cache, pins=known)


def _answering(answers: dict[str, str]) -> Callable[..., command.Completed]:
    real = command.run

    def answer(*words: str, **more: Any) -> command.Completed:
        if words[0].startswith("dpkg"):
            return command.Completed(output=answers[words[1]], seconds=0.0)
        return real(*words, **more)

    return answer


def test_a_pinned_tarball_that_is_missing_names_its_package(tarball: Path, cache: Cache) -> None:
    known = pins(tarball)
    tarball.unlink()
    with pytest.raises(HostError, match=r"linux-6\.12\.7\.tar\.xz is missing") as caught:
        open_source(None, cache, pins=known)
    assert caught.value.hint == "apt-get install linux-toy=6.12.7"


# --- Signatures -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def signer(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Key]:
    """A key made for this test, and its gpg home."""
    if shutil.which("gpg") is None or shutil.which("gpgv") is None:
        pytest.skip("no gpg or gpgv: apt-get install gpg gpgv")
    home = tmp_path_factory.mktemp("gpg")
    home.chmod(0o700)
    gpg(home, "--quick-generate-key", "Toy Kernel <toy@example.org>", "ed25519", "sign", "never")
    lines = gpg(home, "--with-colons", "--fingerprint").splitlines()
    fingerprint = next(line.split(":")[9] for line in lines if line.startswith("fpr:"))
    gpg(home, "--armor", "--output", str(home / "key.asc"), "--export")
    gpg(home, "--output", str(home / "key.gpg"), "--export")
    return home, Key(name="Toy", fingerprint=fingerprint)


def gpg(home: Path, *words: str) -> str:
    argv = ["gpg", "--homedir", str(home), "--batch", "--quiet", "--passphrase", "", "--pinentry-mode", "loopback"]
    return subprocess.run([*argv, *words], check=True, stdout=subprocess.PIPE, text=True).stdout


def sign(home: Path, tarball: Path) -> Path:
    """As kernel.org does it: a signature of the tar, beside the tar.xz."""
    plain = tarball.with_suffix("")
    subprocess.run(f"xz -dc {tarball} > {plain}", shell=True, check=True)
    signed = plain.with_name(f"{plain.name}.sign")
    gpg(home, "--armor", "--output", str(signed), "--detach-sign", str(plain))
    plain.unlink()
    return signed


@pytest.mark.parametrize("keyring", ["key.asc", "key.gpg"])
def test_a_tarball_signed_by_a_key_that_is_named_is_taken(
    signer: tuple[Path, Key], tarball: Path, cache: Cache, keyring: str
) -> None:
    home, key = signer
    sign(home, tarball)
    known = dataclasses.replace(pins(tarball), keys=(key,))
    source = open_source(f"kernel.org:{tarball}", cache, pins=known, keyring=home / keyring)
    assert contents_of(source.tree) == contents_of(TOY)
    assert source.origin == f"{tarball.name}, signed by Toy"
    assert open_source(tarball, cache).sha256 == source.sha256  # the same bytes are the same kernel


def test_a_pin_of_kernel_org_is_not_enough_without_a_signature(
    signer: tuple[Path, Key], tarball: Path, cache: Cache
) -> None:
    home, key = signer
    known = dataclasses.replace(pins(tarball, source="kernel.org"), keys=(key,))
    with pytest.raises(InputError, match=r"linux-6\.12\.7\.tar\.sign is missing"):
        open_source(None, cache, pins=known, keyring=home / "key.asc")
    sign(home, tarball)
    assert open_source(None, cache, pins=known, keyring=home / "key.asc").origin == "kernel.org 6.12.7"


def test_a_signature_by_somebody_who_is_not_named_is_refused_with_the_fingerprint(
    signer: tuple[Path, Key], tarball: Path, cache: Cache
) -> None:
    home, key = signer
    sign(home, tarball)
    with pytest.raises(InputError, match=f"signed by {key.fingerprint}, whom .* does not name"):
        open_source(f"kernel.org:{tarball}", cache, keyring=home / "key.asc")


def test_the_keys_in_the_tree_are_those_that_their_names_say_and_all_that_are_named_are_there(tmp_path: Path) -> None:
    if shutil.which("gpg") is None:
        pytest.skip("no gpg: apt-get install gpg")
    tmp_path.chmod(0o700)
    found = {}
    for path in resource(KEYS).iterdir():
        (tmp_path / "key").write_bytes(signature.binary(path))  # as gpgv gets it
        lines = gpg(tmp_path, "--with-colons", "--show-keys", str(tmp_path / "key")).splitlines()
        found[path.name] = next(line.split(":")[9] for line in lines if line.startswith("fpr:"))
    assert found == {f"{key.fingerprint}.asc": key.fingerprint for key in read_pins().keys}


def test_a_tarball_changed_after_it_was_signed_is_refused_and_not_unpacked(
    signer: tuple[Path, Key], tarball: Path, cache: Cache
) -> None:
    home, key = signer
    sign(home, tarball)
    subprocess.run(["tar", "-C", TOY, "-cJf", tarball, "init"], check=True)
    with pytest.raises(InputError, match="the signature is not of this file"):
        signature.check(tarball, (key,), home / "key.asc")
    with pytest.raises(InputError):
        open_source(f"kernel.org:{tarball}", cache, keyring=home / "key.asc")
    assert not any(path.is_dir() for path in cache.scratch("kernel-source").iterdir())


def test_a_keyring_without_the_signers_key_says_which_key_it_takes(
    signer: tuple[Path, Key], tarball: Path, tmp_path: Path
) -> None:
    home, key = signer
    sign(home, tarball)
    other = tmp_path / "other"
    other.mkdir(mode=0o700)
    gpg(other, "--quick-generate-key", "Other <other@example.org>", "ed25519", "sign", "never")
    gpg(other, "--output", str(other / "key.gpg"), "--export")
    with pytest.raises(InputError, match=r"no key here can check the signature \(key [0-9A-F]{16}\)") as caught:
        signature.check(tarball, (key,), other / "key.gpg")
    assert key.fingerprint in caught.value.hint


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("-----BEGIN PGP PUBLIC KEY BLOCK-----\n\nno base64!\n-----END PGP PUBLIC KEY BLOCK-----\n", "no public key"),
        (None, "cannot read the keyring"),
    ],
)
def test_a_keyring_that_is_none_is_refused(tmp_path: Path, text: str | None, said: str) -> None:
    path = tmp_path / "keys.asc"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError, match=said):
        signature.binary(path)


def test_a_file_that_is_no_signature_is_refused(signer: tuple[Path, Key], tarball: Path) -> None:
    home, key = signer
    sign(home, tarball).write_text("nothing of the kind\n")
    with pytest.raises(InputError, match=f"{tarball}: "):
        signature.check(tarball, (key,), home / "key.asc")


def test_a_key_that_is_named_after_a_signature_of_somebody_else_proves_nothing(
    signer: tuple[Path, Key], tarball: Path, tmp_path: Path
) -> None:
    _, key = signer
    other = tmp_path / "other"
    other.mkdir(mode=0o700)
    gpg(other, "--quick-generate-key", f"[GNUPG:] VALIDSIG x {key.fingerprint}", "ed25519", "sign", "never")
    gpg(other, "--output", str(other / "key.gpg"), "--export")
    sign(other, tarball)
    with pytest.raises(InputError, match="does not name"):
        signature.check(tarball, (key,), other / "key.gpg")


def test_a_signature_by_a_key_that_was_revoked_is_refused(tarball: Path, tmp_path: Path) -> None:
    if shutil.which("gpg") is None or shutil.which("gpgv") is None:
        pytest.skip("no gpg or gpgv: apt-get install gpg gpgv")
    home = tmp_path / "home"
    home.mkdir(mode=0o700)
    gpg(home, "--quick-generate-key", "Toy Kernel <toy@example.org>", "ed25519", "sign", "never")
    record = next((home / "openpgp-revocs.d").glob("*.rev"))
    key = Key(name="Toy", fingerprint=record.stem)
    sign(home, tarball)
    gpg(home, "--output", str(home / "before.gpg"), "--export")
    assert signature.check(tarball, (key,), home / "before.gpg") == key
    record.write_text(record.read_text().replace(":-----BEGIN", "-----BEGIN"))  # gpg puts a colon there, as a guard
    gpg(home, "--import", str(record))
    gpg(home, "--output", str(home / "after.gpg"), "--export")
    with pytest.raises(InputError, match="the key that signed it was revoked"):
        signature.check(tarball, (key,), home / "after.gpg")


# --- git ------------------------------------------------------------------------------------------------------------


def test_a_git_commit_is_built_as_it_was_committed_and_the_repository_stays_what_it_is(
    repository: Path, cache: Cache
) -> None:
    (repository / "init/main.c").write_text("not committed\n")
    (repository / ".git/info/attributes").write_text("init export-ignore\n")
    before = stamps_of(repository)
    source = open_source(f"git:{repository}", cache)
    assert contents_of(source.tree) == contents_of(TOY)
    assert source.origin == f"git commit {git(repository, 'rev-parse', 'HEAD')}"
    assert stamps_of(repository) == before


def test_a_ref_names_another_commit_and_the_same_tree_is_the_same_kernel(repository: Path, cache: Cache) -> None:
    git(repository, "tag", "v1")
    git(repository, "commit", "-q", "--allow-empty", "-m", "nothing")
    first, same = open_source(f"git:{repository}#v1", cache), open_source(f"git:{repository}#main", cache)
    assert (first.tree, first.sha256) == (same.tree, same.sha256)
    (repository / "Kconfig").write_text((repository / "Kconfig").read_text() + '\nconfig MORE\n\tbool "more"\n')
    git(repository, "commit", "-q", "-a", "-m", "more")
    assert open_source(f"git:{repository}", cache).sha256 != first.sha256
    assert open_source(f"git:{repository}#v1", cache).sha256 == first.sha256


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("git:{home}#v9", "git cannot find v9 in .*: fatal"),
        ("git:{home}#--all", "is not a git ref"),
        ("git:{home}/absent", "no git repository at"),
        ("git:{home}#HEAD:Kconfig", "git cannot find HEAD:Kconfig"),
    ],
)
def test_what_git_does_not_have_is_one_line(repository: Path, cache: Cache, place: str, said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        open_source(place.format(home=repository), cache)
    assert "\n" not in str(caught.value)


# --- Directories ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "dir:"])
def test_a_directory_is_built_as_it_is_and_stays_what_it_is(repository: Path, cache: Cache, prefix: str) -> None:
    (repository / "init/main.c").write_text((TOY / "init/main.c").read_text() + "/* mine */\n")
    before = stamps_of(repository)
    source = open_source(f"{prefix}{repository}", cache)
    assert contents_of(source.tree) == contents_of(repository)
    assert not (source.tree / ".git").exists()
    assert stamps_of(repository) == before


def test_the_copy_of_a_directory_shares_no_file_with_it(directory: Path, cache: Cache) -> None:
    source = open_source(directory, cache)
    with (directory / "init/main.c").open("r+") as file:  # in place, as some editors do
        file.write("/* changed */")
    assert contents_of(source.tree) == contents_of(TOY)


def test_a_directory_that_changes_is_another_kernel_even_when_size_and_time_stay(directory: Path, cache: Cache) -> None:
    first = open_source(directory, cache)
    path = directory / "init/main.c"
    status, text = path.stat(), path.read_text()
    path.write_text(text.replace("a", "e", 1))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert open_source(directory, cache).sha256 != first.sha256
    path.write_text(text)
    assert open_source(directory, cache).sha256 == first.sha256


def test_a_directory_that_lies_still_is_not_read_again_until_something_in_it_is_touched(
    directory: Path, cache: Cache
) -> None:
    time.sleep(2.1)  # until its times are old enough to tell a later change by
    first = open_source(directory, cache)
    (record,) = cache.scratch("kernel-source").glob("*.json")
    record.write_text(record.read_text().replace(first.sha256, "f" * 64))
    with pytest.raises(InputError, match="changed while it was copied"):  # it believed what we wrote there
        open_source(directory, cache)
    (directory / "Kconfig").chmod(0o644)
    assert open_source(directory, cache).sha256 == first.sha256


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda home: (home / "Kconfig").rename(home / "Kconfig2"), id="a name"),
        pytest.param(lambda home: (home / "Kconfig").chmod(0o755), id="a mode"),
        pytest.param(lambda home: (home / "more").symlink_to("Kconfig"), id="a link"),
        pytest.param(lambda home: (home / "init/more").write_text(""), id="an empty file"),
    ],
)
def test_everything_that_make_can_see_counts(directory: Path, change: object) -> None:
    before = measure(directory)
    assert callable(change)
    change(directory)
    assert measure(directory) != before


def test_what_is_no_tree_to_build_from_is_refused(directory: Path, cache: Cache, tmp_path: Path) -> None:
    (directory / ".config").write_text("")
    with pytest.raises(InputError, match="has been built in") as caught:
        open_source(directory, cache)
    assert "make mrproper" in caught.value.hint
    (directory / ".config").unlink()
    os.mkfifo(directory / "pipe")
    with pytest.raises(InputError, match="pipe is neither a file nor a symbolic link"):
        open_source(directory, cache)
    with pytest.raises(InputError, match="no directory at"):
        open_source(f"dir:{tmp_path}/absent", cache)


# --- All of them ----------------------------------------------------------------------------------------------------


def test_every_kind_gives_the_same_kernel_and_a_patch_reaches_none_of_their_files(
    tarball: Path, repository: Path, cache: Cache, tmp_path: Path
) -> None:
    fragment = tmp_path / "toy.conf"
    fragment.write_text('# why: a toy\nCONFIG_NAME="toy"\n')
    patch = tmp_path / "patches/6.12/0001-comment.patch"
    patch.parent.mkdir(parents=True)
    text = (TOY / "Kconfig").read_text().splitlines()
    patch.write_text(
        "kconfig: a comment\n\nWhy: a test.\nOrigin: this test.\nUpstream: never.\n\n"
        "diff --git a/Kconfig b/Kconfig\n--- a/Kconfig\n"
        f"+++ b/Kconfig\n@@ -1,2 +1,3 @@\n+# patched\n {text[0]}\n {text[1]}\n"
    )
    before = stamps_of(repository)
    kernels = [
        build_kernel(KernelSpec(arch=X86_64, source=source, fragments=(fragment,), patches=tmp_path / "patches"), cache)
        for source in (str(tarball), f"git:{repository}", f"dir:{repository}")
    ]
    assert len({kernel.vmlinux.sha256 for kernel in kernels}) == 1
    assert len({kernel.key for kernel in kernels}) == 3  # what went in has three names
    assert stamps_of(repository) == before
    assert contents_of(repository) == contents_of(TOY)


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_without_a_place_and_a_place_without_anything_are_one_line(kind: str, cache: Cache) -> None:
    with pytest.raises(SpecError, match="names no place"):
        open_source(f"{kind}:", cache)
    with pytest.raises(InputError, match=r"no .* at /nowhere") as caught:
        open_source(f"{kind}:/nowhere/linux", cache)
    assert "\n" not in str(caught.value)


def test_in_a_file_of_words_a_source_is_relative_to_the_file(tmp_path: Path) -> None:
    for text, wanted in (
        ("6.12", "6.12"), ("linux.tar.xz", f"{tmp_path}/linux.tar.xz"), ("/usr/src/x", "/usr/src/x"),
        ("git:linux#v6.12", f"git:{tmp_path}/linux#v6.12"), ("dir:/a", "dir:/a"),
    ):  # fmt: skip
        assert below(text, tmp_path) == wanted
        (tmp_path / "osbuild.toml").write_text(f'[kernel]\nsource = "{text}"\n')
        assert read_config(tmp_path / "osbuild.toml") == {"source": wanted}
