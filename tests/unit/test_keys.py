"""API keys: where they are, who may read them, what is refused."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

import pytest

from stackctl.errors import ExitCode, StackctlError
from stackctl.state import keys

KEY = re.compile(r"sk-stackctl-[\w-]{43}")


def put(state: Path, text: str | bytes, mode: int = 0o600) -> Path:
    file = keys.path(state, "cpu")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    file.chmod(mode)
    return file


def test_a_key_is_made_once(tmp_path: Path) -> None:
    assert keys.read(tmp_path, "cpu") == ()
    before = os.umask(0)
    try:
        (made,) = keys.create(tmp_path, "cpu")
    finally:
        os.umask(before)
    assert KEY.fullmatch(made)
    file = tmp_path / "keys" / "cpu"
    assert file == keys.path(tmp_path, "cpu")
    assert file.read_text() == made + "\n"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    with pytest.raises(StackctlError, match="cpu has a key already") as caught:
        keys.create(tmp_path, "cpu")
    assert caught.value.exit_code == ExitCode.REFUSED
    assert keys.read(tmp_path, "cpu") == (made,)
    assert keys.create(tmp_path, "other") != (made,)


def test_rotation(tmp_path: Path) -> None:
    with pytest.raises(StackctlError, match="cpu has no key") as caught:
        keys.rotate(tmp_path, "cpu", keep=True)
    assert caught.value.exit_code == ExitCode.NOT_FOUND
    (first,) = keys.create(tmp_path, "cpu")
    second = keys.rotate(tmp_path, "cpu", keep=True)
    assert second[1:] == (first,)
    third = keys.rotate(tmp_path, "cpu", keep=True)
    # Two are valid, never three.
    assert third[1:] == second[:1]
    assert keys.read(tmp_path, "cpu") == third
    fourth = keys.rotate(tmp_path, "cpu", keep=False)
    assert keys.read(tmp_path, "cpu") == fourth
    assert len({first, *second, *third, *fourth}) == 4
    assert all(KEY.fullmatch(key) for key in (first, *second, *third, *fourth))
    assert stat.S_IMODE(keys.path(tmp_path, "cpu").stat().st_mode) == 0o600


def test_removal(tmp_path: Path) -> None:
    assert keys.remove_keys(tmp_path, "cpu") is False
    keys.create(tmp_path, "cpu")
    assert keys.remove_keys(tmp_path, "cpu") is True
    assert keys.read(tmp_path, "cpu") == ()
    # Whatever lies there, and without touching what it points to.
    target = tmp_path / "target"
    target.write_text("x")
    keys.path(tmp_path, "cpu").symlink_to(target)
    assert keys.remove_keys(tmp_path, "cpu") is True
    assert target.read_text() == "x"
    keys.path(tmp_path, "cpu").mkdir()
    with pytest.raises(StackctlError, match="cannot remove"):
        keys.remove_keys(tmp_path, "cpu")


def test_keys_written_by_hand(tmp_path: Path) -> None:
    put(tmp_path, "my-own-secret-key-1\n\nand/another+one~==\n")
    assert keys.read(tmp_path, "cpu") == ("my-own-secret-key-1", "and/another+one~==")


@pytest.mark.parametrize(
    "line",
    ["short", "with a space in it", "# a comment of length", "a" * 16 + "\r", "a" * 600, "ü" * 20,
     "a" * 16 + "\0", "a" * 16 + '"', "a" * 16 + "=a", "\x1b[31maaaaaaaaaaaa", "$(reboot)aaaaaaaa"],
)  # fmt: skip
def test_what_is_no_key_is_refused_and_not_shown(tmp_path: Path, line: str) -> None:
    put(tmp_path, f"{'k' * 20}\n{line}\n")
    with pytest.raises(StackctlError, match=r"line 2 of .*/keys/cpu is not a key") as caught:
        keys.read(tmp_path, "cpu")
    assert line not in caught.value.message + str(caught.value.hint)
    with pytest.raises(StackctlError, match="is not a key"):
        keys.rotate(tmp_path, "cpu", keep=True)
    with pytest.raises(StackctlError, match="is not a key"):
        keys.create(tmp_path, "cpu")


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644, 0o620, 0o602])
def test_a_file_that_others_may_read_or_change_is_refused(tmp_path: Path, mode: int) -> None:
    file = put(tmp_path, "k" * 20 + "\n", mode)
    with pytest.raises(StackctlError, match="may be read by other users") as caught:
        keys.read(tmp_path, "cpu")
    assert caught.value.hint == f"chmod 600 {file}"


def test_a_link_is_refused(tmp_path: Path) -> None:
    target = put(tmp_path, "k" * 20 + "\n").rename(tmp_path / "target")
    keys.path(tmp_path, "cpu").symlink_to(target)
    for change in (keys.read, keys.create):
        with pytest.raises(StackctlError, match="is a symbolic link"):
            change(tmp_path, "cpu")
    assert target.read_text() == "k" * 20 + "\n"


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to own files as somebody else")
def test_another_users_file_or_folder_is_refused(tmp_path: Path) -> None:
    file = put(tmp_path, "k" * 20 + "\n")
    os.chown(file, 65534, 65534)
    with pytest.raises(StackctlError, match="belongs to another user"):
        keys.read(tmp_path, "cpu")
    file.unlink()
    os.chown(file.parent, 65534, 65534)
    with pytest.raises(StackctlError, match="not a folder of this user's own"):
        keys.create(tmp_path, "cpu")
    assert not file.exists()
