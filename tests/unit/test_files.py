"""Files: written whole or not at all; facts of recorded machines."""

from __future__ import annotations

import os
import resource
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from stackctl.errors import ExitCode, StackctlError
from stackctl.machine import subids
from stackctl.machine.files import sync_folder, write_atomically
from stackctl.machine.machine import Machine, RecordedMachine


@contextmanager
def no_file_longer_than(count: int) -> Iterator[None]:
    """What a full disk looks like to one process."""
    import signal

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (count, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def open_files() -> set[str]:
    return {path.name for path in Path("/proc/self/fd").iterdir()}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_new_file_and_its_folders(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "unit.container"
    write_atomically(path, "größe\n")
    assert path.read_text("utf-8") == "größe\n"
    assert names(path.parent) == ["unit.container"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


def test_modes_do_not_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        write_atomically(tmp_path / "a", "x", mode=0o644)
        write_atomically(tmp_path / "b", "x", mode=0o600)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o644
    assert stat.S_IMODE((tmp_path / "b").stat().st_mode) == 0o600


def test_a_shorter_text_replaces_a_longer_one(tmp_path: Path) -> None:
    path = tmp_path / "x"
    write_atomically(path, "long " * 1000)
    inode = path.stat().st_ino
    write_atomically(path, "short")
    assert path.read_text() == "short"
    # Another file under the same name: who has the old one open still reads it whole.
    assert path.stat().st_ino != inode


def test_a_full_disk_leaves_the_old_text_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "x.container"
    write_atomically(path, "old")
    with no_file_longer_than(1000), pytest.raises(StackctlError) as caught:
        write_atomically(path, "new " * 1000)
    assert str(path) in caught.value.message
    assert "File too large" in caught.value.message
    assert path.read_text() == "old"
    assert names(tmp_path) == ["x.container"]


def test_text_that_cannot_be_encoded_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises((StackctlError, UnicodeEncodeError)):
        write_atomically(tmp_path / "x", "\udcff")
    assert names(tmp_path) == []


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StackctlError, match=r"cannot write .*: (Not a directory|File exists)"):
        write_atomically(tmp_path / "file" / "x", "text")


def test_a_target_that_is_a_folder(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    with pytest.raises(StackctlError, match="Is a directory"):
        write_atomically(tmp_path / "x", "text")
    assert names(tmp_path) == ["x"]


def test_no_permission_names_the_reason() -> None:
    # /proc refuses root too.
    with pytest.raises(StackctlError, match="cannot write /proc/x/y: "):
        write_atomically(Path("/proc/x/y"), "text")


def test_the_temporary_file_is_one_that_neither_quadlet_nor_systemd_loads(tmp_path: Path) -> None:
    seen: set[str] = set()
    done = threading.Event()

    def watch() -> None:
        while not done.is_set():
            seen.update(names(tmp_path))

    watcher = threading.Thread(target=watch)
    watcher.start()
    for number in range(30):
        write_atomically(tmp_path / "x.container", str(number) * 10_000)
    done.set()
    watcher.join()
    assert all(name.startswith(".") and name.endswith(".tmp") for name in seen - {"x.container"})


def test_a_link_is_replaced_and_not_followed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_text("kept")
    (tmp_path / "x").symlink_to("elsewhere")
    write_atomically(tmp_path / "x", "new")
    assert (tmp_path / "elsewhere").read_text() == "kept"
    assert not (tmp_path / "x").is_symlink()


def test_sync_folder(tmp_path: Path) -> None:
    before = open_files()
    sync_folder(tmp_path)
    assert open_files() == before
    with pytest.raises(OSError, match="No such file"):
        sync_folder(tmp_path / "none")


# Machines


def test_the_live_machine(tmp_path: Path) -> None:
    machine = Machine()
    (tmp_path / "a[1].txt").write_text("one\n")
    (tmp_path / "b.txt").write_bytes(b"\xff\n")
    assert machine.live
    assert machine.read(str(tmp_path / "a[1].txt")) == "one\n"
    assert machine.read(str(tmp_path / "b.txt")) == "\ufffd\n"
    assert machine.read(str(tmp_path / "none")) is None
    assert machine.read(str(tmp_path)) is None
    assert machine.read("a\0b") is None
    assert machine.glob(f"{tmp_path}/*.txt") == (
        str(tmp_path / "a[1].txt"), str(tmp_path / "b.txt")
    )  # fmt: skip
    done = machine.run(["sh", "-c", "echo out; exit 3"])
    assert (done.status, done.stdout) == (3, "out\n")


def test_a_recorded_machine(tmp_path: Path) -> None:
    root = tmp_path / "odd [name]*"
    (root / "proc").mkdir(parents=True)
    (root / "proc" / "meminfo").write_text("MemTotal: 1 kB\n")
    (root / "proc" / "inside").symlink_to("meminfo")
    (root / "proc" / "outside").symlink_to("/etc/passwd")
    (root / "proc" / "loop").symlink_to("loop")
    (root / "commands.json").write_text('{"podman --version": "podman version 5.4.2\\n"}')
    machine = RecordedMachine(root)
    assert not machine.live
    assert machine.read("/proc/meminfo") == machine.read("/proc/inside") == "MemTotal: 1 kB\n"
    for path in ("/proc/outside", "/proc/loop", "/../../etc/passwd", "/none", "/a\0b"):
        assert machine.read(path) is None
    assert machine.glob("/proc/mem*") == ("/proc/meminfo",)
    assert machine.run(["podman", "--version"]).stdout == "podman version 5.4.2\n"
    with pytest.raises(StackctlError, match="not recorded: podman info") as caught:
        machine.run(["podman", "info"])
    assert caught.value.exit_code == ExitCode.HOST


def test_what_is_no_recorded_machine(tmp_path: Path) -> None:
    with pytest.raises(StackctlError, match="holds no recorded machine") as caught:
        RecordedMachine(tmp_path)
    assert caught.value.exit_code == ExitCode.USAGE
    (tmp_path / "sys").mkdir()
    (tmp_path / "commands.json").write_text("{")
    with pytest.raises(StackctlError, match=r"commands\.json is not valid JSON"):
        RecordedMachine(tmp_path)


def test_subordinate_ids_leave_the_rights_of_their_folder(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    file = tmp_path / "subuid"
    file.write_text("ann:100000:65536\n")
    file.chmod(0o600)
    subids.add_line(file, "ben:165536:65536")
    assert file.read_text().splitlines() == ["ann:100000:65536", "ben:165536:65536"]
    assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o755
