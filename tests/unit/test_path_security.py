"""What other users could change is found, and what they wrote is data and no more."""

from __future__ import annotations

import os
import stat
import threading
import time
from pathlib import Path

import pytest

from stackctl.errors import ExitCode, StackctlError
from stackctl.machine import path_security, runner
from stackctl.machine.files import write_atomically
from stackctl.sources.profiles import Profiles
from stackctl.values.profile import Overrides

OTHER = 12345
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="gives files to another user")
PROFILE = "engine: llama.cpp\nport: 9001\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder that nobody else can change, whatever the umask."""
    made = tmp_path / "own"
    made.mkdir()
    made.chmod(0o755)
    return made


# What could be changed


def test_what_only_we_and_root_can_change(folder: Path) -> None:
    assert path_security.find_weakness("/") is None
    assert path_security.find_weakness("/usr/bin") is None
    (folder / "file").write_text("x")
    (folder / "file").chmod(0o644)
    assert path_security.find_weakness(folder / "file") is None
    # Of what is not there, the folder it would be in counts.
    assert path_security.find_weakness(folder / "a" / "b" / "c") is None


@pytest.mark.parametrize("level", ["", "a", "a/b"])
def test_what_everybody_can_write_counts_at_every_level(folder: Path, level: str) -> None:
    (folder / "a" / "b").mkdir(parents=True)
    (folder / level).chmod(0o777)
    assert (
        str(path_security.find_weakness(folder / "a" / "b"))
        == f"{folder / level} can be written by everybody"
    )
    # Nobody can rename what is not theirs in a sticky folder, but put something else there.
    (folder / level).chmod(0o1777)
    assert (path_security.find_weakness(folder / "a" / "b") is None) == (level != "a/b")


@needs_root
@pytest.mark.parametrize("level", ["", "a", "a/b"])
def test_owners_and_groups_count_at_every_level(folder: Path, level: str) -> None:
    (folder / "a" / "b").mkdir(parents=True)
    os.chown(folder / level, OTHER, 0)
    assert (
        str(path_security.find_weakness(folder / "a" / "b"))
        == f"{folder / level} belongs to user {OTHER}"
    )
    os.chown(folder / level, 0, OTHER)
    (folder / level).chmod(0o775)
    assert str(path_security.find_weakness(folder / "a" / "b")) == (
        f"{folder / level} can be written by group {OTHER}"
    )
    os.chown(folder / level, 0, 0)
    assert path_security.find_weakness(folder / "a" / "b") is None


@needs_root
def test_links_count_and_what_they_lead_to(folder: Path) -> None:
    theirs = folder / "theirs"
    theirs.mkdir()
    os.chown(theirs, OTHER, OTHER)
    (folder / "link").symlink_to("theirs")
    assert str(path_security.find_weakness(folder / "link")) == f"{theirs} belongs to user {OTHER}"
    (folder / "up").symlink_to(f"{theirs}/../own")
    assert str(path_security.find_weakness(folder / "up")) == f"{theirs} belongs to user {OTHER}"
    (folder / "planted").symlink_to("/etc")
    os.chown(folder / "planted", OTHER, OTHER, follow_symlinks=False)
    assert (
        str(path_security.find_weakness(folder / "planted"))
        == f"{folder}/planted belongs to user {OTHER}"
    )
    (folder / "loop").symlink_to("loop")
    assert path_security.find_weakness(folder / "loop") is None


# Folders and files that are written


def test_private_folders(folder: Path) -> None:
    before = os.umask(0o002)
    try:
        path_security.make_private_folder(folder / "a" / "b")
    finally:
        os.umask(before)
    for path in (folder / "a", folder / "a" / "b"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
    # A folder that was there may be shared with others.
    assert stat.S_IMODE(folder.stat().st_mode) == 0o755
    path_security.restrict_permissions(folder)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    path_security.restrict_permissions(folder / "absent")


@needs_root
def test_only_folders_of_our_own_are_closed(folder: Path) -> None:
    os.chown(folder, OTHER, OTHER)
    path_security.restrict_permissions(folder)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o755
    os.chown(folder, 0, 0)
    (folder / "link").symlink_to(folder)
    path_security.restrict_permissions(folder / "link")
    assert stat.S_IMODE(folder.stat().st_mode) == 0o755


@needs_root
def test_nothing_is_written_over_a_planted_link(folder: Path) -> None:
    target = folder / "target"
    target.mkdir()
    (folder / "planted").symlink_to(target)
    os.chown(folder / "planted", OTHER, OTHER, follow_symlinks=False)
    for path in (folder / "planted" / "x.container", folder / "planted" / "deep" / "x"):
        with pytest.raises(
            StackctlError, match=f"planted is a link that belongs to user {OTHER}"
        ) as e:
            write_atomically(path, "x")
        assert e.value.exit_code == ExitCode.USAGE
    assert list(target.iterdir()) == []
    # In the place of the file itself it is replaced, and what it leads to stays.
    (target / "kept").write_text("kept")
    (folder / "file").symlink_to(target / "kept")
    os.chown(folder / "file", OTHER, OTHER, follow_symlinks=False)
    write_atomically(folder / "file", "ours")
    assert (target / "kept").read_text() == "kept"
    assert (folder / "file").read_text() == "ours"
    assert not (folder / "file").is_symlink()


def test_our_own_links_are_followed(folder: Path) -> None:
    (folder / "real").mkdir()
    (folder / "link").symlink_to("real")
    write_atomically(folder / "link" / "file", "x")
    assert (folder / "real" / "file").read_text() == "x"


# Profiles


@needs_root
def test_root_takes_no_profile_that_another_user_could_change(folder: Path) -> None:
    path = folder / "mine.yaml"
    path.write_text(PROFILE)
    assert Profiles([folder]).resolve("mine", Overrides()).port == 9001
    for owner, mode in ((OTHER, 0o644), (0, 0o666)):
        os.chown(path, owner, 0)
        path.chmod(mode)
        with pytest.raises(StackctlError, match=f"root does not use profile {path}") as caught:
            Profiles([folder]).resolve("mine", Overrides())
        assert caught.value.exit_code == ExitCode.USAGE
        assert "chown root" in (caught.value.hint or "")
    # Named on the command line, it is the caller's own choice.
    assert Profiles([folder], chosen=folder).resolve("mine", Overrides()).port == 9001
    assert Profiles([]).resolve(str(path), Overrides()).port == 9001


@needs_root
def test_what_a_profile_extends_is_looked_at_as_well(folder: Path) -> None:
    shared = folder / "shared"
    shared.mkdir()
    shared.chmod(0o1777)
    (shared / "mine.yaml").write_text("extends: base\nport: 9002\n")
    (shared / "base.yaml").write_text(PROFILE)
    named = str(shared / "mine.yaml")
    assert Profiles([]).resolve(named, Overrides()).port == 9002
    os.chown(shared / "base.yaml", OTHER, OTHER)
    for profiles in (Profiles([]), Profiles([shared], chosen=shared)):
        with pytest.raises(
            StackctlError, match=rf"base\.yaml is a file that belongs to user {OTHER}"
        ):
            profiles.resolve(named, Overrides())
    # In a folder of theirs alone it is theirs that was chosen.
    shared.chmod(0o755)
    assert Profiles([]).resolve(named, Overrides()).port == 9002


# Units of other users


def claims(home: Path) -> dict[str, str]:
    return dict(path_security.read_user_files(str(home), "c/s", ".container"))


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / "c" / "s" / "a").mkdir(parents=True)
    (tmp_path / "c" / "s" / "a" / "a.container").write_text("Claim=1")
    (tmp_path / "c" / "s" / "a" / "other").write_text("no")
    return tmp_path


def test_units_are_read(home: Path) -> None:
    assert claims(home) == {f"{home}/c/s/a/a.container": "Claim=1"}
    assert dict(path_security.read_user_files(f"{home}/c/s", "", ".container")) == claims(home)
    assert claims(home / "absent") == {}


@pytest.mark.parametrize("level", ["c", "c/s", "c/s/a", "c/s/a/a.container"])
def test_no_link_is_followed_below_a_home(home: Path, level: str) -> None:
    path = home / level
    path.rename(home / "moved")
    path.symlink_to(home / "moved")
    assert claims(home) == {}


def test_pipes_sockets_and_devices_are_not_opened(home: Path) -> None:
    folder = home / "c" / "s" / "a"
    os.mkfifo(folder / "pipe.container")
    opened = threading.Event()

    def write() -> None:
        with (folder / "pipe.container").open("w"):
            opened.set()

    threading.Thread(target=write, daemon=True).start()
    time.sleep(0.1)  # until it waits for somebody to open the other end
    if os.geteuid() == 0:
        os.mknod(folder / "zero.container", stat.S_IFCHR | 0o666, os.makedev(1, 5))
    began = time.monotonic()
    assert list(claims(home).values()) == ["Claim=1"]
    assert time.monotonic() - began < 1
    # It still waits: nobody has.
    assert not opened.wait(0.1)
    with (folder / "pipe.container").open():
        assert opened.wait(5)


def test_no_more_is_read_than_a_few_units_have(home: Path) -> None:
    folder = home / "c" / "s" / "big"
    folder.mkdir()
    with (folder / "a.container").open("wb") as file:
        file.truncate(2**40)
    assert list(claims(home).values()) == ["Claim=1"]
    for number in range(500):
        (home / "c" / "s" / f"n{number}").mkdir()
        (home / "c" / "s" / f"n{number}" / "x.container").write_text("x" * 1000)
    began = time.monotonic()
    assert len(claims(home)) <= 64
    assert time.monotonic() - began < 1


@needs_root
def test_only_files_of_the_home_s_owner_count(home: Path) -> None:
    path = home / "c" / "s" / "a" / "a.container"
    os.chown(path, OTHER, OTHER)
    assert claims(home) == {}
    os.chown(home, OTHER, OTHER)
    assert len(claims(home)) == 1


# The environment of what root starts


@needs_root
def test_root_gets_no_folder_that_another_user_could_change(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = folder / "theirs"
    theirs.mkdir()
    os.chown(theirs, OTHER, OTHER)
    names = ("HOME", "TMPDIR", "XDG_CONFIG_HOME", "XDG_RUNTIME_DIR", "CONTAINERS_CONF",
             "REGISTRY_AUTH_FILE")  # fmt: skip
    for name in names:
        monkeypatch.setenv(name, str(theirs / "x"))
    monkeypatch.setenv("DBUS_SESSION_BUS_ADDRESS", f"unix:path={theirs}/bus,guid=1")
    monkeypatch.setenv("PATH", f"{theirs}:{folder}::.:bin:/usr/bin")
    env = runner.controlled_environment()
    assert env["PATH"] == f"{folder}:/usr/bin"
    assert env["HOME"] == "/root"
    assert not env.keys() & {*names[1:], "DBUS_SESSION_BUS_ADDRESS"}
    monkeypatch.setenv("PATH", str(theirs))
    assert runner.controlled_environment()["PATH"].startswith("/usr/local/sbin:")
    os.chown(theirs, 0, 0)
    assert runner.controlled_environment()["HOME"] == str(theirs / "x")


def test_nobody_gets_a_search_path_relative_to_the_current_folder(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PATH", ":.:bin:/usr/bin:")
    assert runner.controlled_environment()["PATH"] == "/usr/bin"
