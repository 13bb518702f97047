"""Logs that only grow: written whole, cut in time, read whatever became of them."""

from __future__ import annotations

import os
import pwd
import random
import resource
import signal
import stat
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from stackctl.errors import StackctlError
from stackctl.machine.files import append_line, read_private
from stackctl.machine.path_security import make_private_folder
from stackctl.state import logs
from stackctl.values.base import to_json
from stackctl.values.history import AuditEntry, HealthEntry

MIB = 2**20
LINE = b'{"when":"2026-11-21T12:00:00Z","user":"x","operation":"up","stack":"s","result":"done"}\n'
root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to own files as somebody else")


def entry(number: int = 0, **changes: object) -> AuditEntry:
    found: dict[str, object] = {
        "when": "2026-11-21T12:00:00Z", "user": "alice", "operation": "up", "stack": "cpu",
        "generation": number, "result": "done", **changes,
    }  # fmt: skip
    return AuditEntry(**found)  # type: ignore[arg-type]


def seen(when: str, status: str = "ok", **changes: object) -> HealthEntry:
    return HealthEntry(when=f"2026-11-21T{when}Z", status=status, **changes)  # type: ignore[arg-type]


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def open_files() -> set[str]:
    return {path.name for path in Path("/proc/self/fd").iterdir()}


@contextmanager
def no_file_longer_than(count: int) -> Iterator[None]:
    """What a full disk looks like to one process."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (count, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


# Folders


def test_folders_are_for_this_user_alone(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        make_private_folder(tmp_path / "a" / "b")
    finally:
        os.umask(before)
    assert mode(tmp_path / "a") == mode(tmp_path / "a" / "b") == 0o700
    (tmp_path / "a").chmod(0o755)
    make_private_folder(tmp_path / "a")
    assert mode(tmp_path / "a") == 0o700


def test_what_is_no_folder_of_ours_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    for name in ("file", "nowhere", "file/below"):
        with pytest.raises(StackctlError, match=name.partition("/")[0]):
            make_private_folder(tmp_path / name)
    # A link of one's own is how one puts the state on another disk.
    (tmp_path / "disk").mkdir()
    (tmp_path / "state").symlink_to(tmp_path / "disk")
    make_private_folder(tmp_path / "state")


@root
def test_another_users_folder_is_refused_and_so_is_his_link(tmp_path: Path) -> None:
    (tmp_path / "his").mkdir()
    os.chown(tmp_path / "his", 65534, 65534)
    (tmp_path / "mine").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "mine")
    os.lchown(tmp_path / "link", 65534, 65534)
    for name in ("his", "link"):
        with pytest.raises(StackctlError, match="not a folder of this user's own"):
            make_private_folder(tmp_path / name)
    assert mode(tmp_path / "his") == 0o755


# Lines


def test_what_was_added_is_read_in_order(tmp_path: Path) -> None:
    state = tmp_path / "state"
    assert logs.read_changes(state) == ()
    before = os.umask(0)
    try:
        for number in range(5):
            logs.record_change(state, entry(number))
    finally:
        os.umask(before)
    assert [found.generation for found in logs.read_changes(state)] == [0, 1, 2, 3, 4]
    assert mode(state) == 0o700
    assert mode(state / "audit.jsonl") == 0o600
    assert (state / "audit.jsonl").read_bytes().count(b"\n") == 5
    # Made readable by accident, it is so no longer than to the next entry.
    (state / "audit.jsonl").chmod(0o644)
    logs.record_change(state, entry(5))
    assert mode(state / "audit.jsonl") == 0o600


@pytest.mark.parametrize("text", ['"\n{}\r\x00', "größe \u2028 \x85", "\ud800", "x" * 5000])
def test_any_message_is_one_line(tmp_path: Path, text: str) -> None:
    logs.record_change(tmp_path, entry(1, message=text))
    logs.record_change(tmp_path, entry(2))
    first, second = logs.read_changes(tmp_path)
    assert second.generation == 2
    assert first.message == (text if len(text) < 1000 and text != "\ud800" else first.message)
    assert len(first.message or "") <= 1000
    assert (tmp_path / "audit.jsonl").read_bytes().count(b"\n") == 2


def test_a_torn_line_costs_only_itself(tmp_path: Path) -> None:
    logs.record_change(tmp_path, entry(1))
    path = tmp_path / "audit.jsonl"
    path.write_bytes(path.read_bytes() + b'{"when": "2026-11-')
    logs.record_change(tmp_path, entry(2))
    assert [found.generation for found in logs.read_changes(tmp_path)] == [1, 2]


def test_a_full_disk_leaves_the_log_as_it_was(tmp_path: Path) -> None:
    logs.record_change(tmp_path, entry(1))
    path = tmp_path / "audit.jsonl"
    before = path.read_bytes()
    files = open_files()
    with (
        no_file_longer_than(len(before) + 10),
        pytest.raises(StackctlError, match="cannot write"),
    ):
        logs.record_change(tmp_path, entry(2))
    assert path.read_bytes() == before
    assert open_files() == files
    logs.record_change(tmp_path, entry(3))
    assert [found.generation for found in logs.read_changes(tmp_path)] == [1, 3]


def test_the_log_is_bounded(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    path.write_bytes(LINE * (MIB // len(LINE) + 1))
    logs.record_change(tmp_path, entry(7))
    found = logs.read_changes(tmp_path)
    assert len(found) == 2000
    assert found[-1].generation == 7
    assert mode(path) == 0o600
    assert [one.name for one in tmp_path.iterdir()] == ["audit.jsonl"]
    # Long lines: fewer of them, and not a new file with each.
    path.unlink()
    for number in range(1500):
        logs.record_change(tmp_path, entry(number, message="x" * 1000))
        assert path.stat().st_size <= MIB + 2000
    found = logs.read_changes(tmp_path)
    assert found[-1].generation == 1499
    assert len(found) > 400


def test_several_writers_lose_nothing_also_while_it_is_cut(tmp_path: Path) -> None:
    code = """
        import sys
        from pathlib import Path
        from stackctl.machine.files import append_line
        for number in range(200):
            line = f"{sys.argv[2]} {number}".encode()
            append_line(Path(sys.argv[1]), line, most_bytes=400, keep=30)
            seen = Path(sys.argv[1]).read_bytes()
            assert line in seen.split(b"\\n")[-40:], number
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "log")]
    # The tail of 30 lines is longer than what the other two add meanwhile; 400 bytes hold it not.
    writers = [subprocess.Popen([*command, name]) for name in "ab"]
    assert [writer.wait(timeout=60) for writer in writers] == [0, 0]
    found = (tmp_path / "log").read_bytes().split(b"\n")[:-1]
    assert found[-1] in (b"a 199", b"b 199")
    for name in (b"a", b"b"):
        numbers = [int(line.split()[1]) for line in found if line.startswith(name)]
        assert numbers == list(range(200 - len(numbers), 200))


# What another user might plant


def plant(path: Path, kind: str, target: Path) -> None:
    match kind:
        case "link":
            path.symlink_to(target)
        case "dangling":
            path.symlink_to(target.parent / "new")
        case "fifo":
            os.mkfifo(path)
        case "folder":
            path.mkdir()
        case "theirs":
            path.write_bytes(LINE)
            os.chown(path, 65534, 65534)


@pytest.mark.parametrize(
    "kind", ["link", "dangling", "fifo", "folder", pytest.param("theirs", marks=root)]
)
def test_nothing_planted_is_written_to_or_believed(tmp_path: Path, kind: str) -> None:
    (tmp_path / "target").write_bytes(LINE)
    state = tmp_path / "state"
    state.mkdir()
    path = state / "audit.jsonl"
    plant(path, kind, tmp_path / "target")
    files = open_files()
    with pytest.raises(StackctlError) as caught:
        logs.record_change(state, entry())
    assert str(path) in caught.value.message
    with pytest.raises(StackctlError):
        logs.read_changes(state)
    assert (tmp_path / "target").read_bytes() == LINE
    assert not (tmp_path / "new").exists()
    if kind == "theirs":
        assert path.read_bytes() == LINE
    assert open_files() == files


def test_secrets_must_not_be_readable_by_others(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_text("x")
    for bits in (0o640, 0o604, 0o620):
        path.chmod(bits)
        with pytest.raises(StackctlError, match="read by other users") as caught:
            read_private(path, 10, secret=True)
        assert caught.value.hint == f"chmod 600 {path}"
        assert read_private(path, 10) == b"x"
    path.chmod(0o600)
    assert read_private(path, 10, secret=True) == b"x"
    assert read_private(tmp_path / "none", 10, secret=True) is None


# Damaged logs

LONG = b"[" * 9000 + b"]" * 9000
PIECES = (
    b"", b"{}", b"[]", b"null", b"\xff\xfe", b"\0" * 4096, b'{"when": 5}', b"1e999", b"{" * 3000,
    b'{"generation": ' + b"9" * 5000 + b"}", LONG, LINE[:40], b"x" * 20_000,
    b'{"when":"a","when":"b","user":"x","operation":"up","stack":"s","result":"done"}',
    LINE.replace(b'"done"', b'"well"'), LINE.replace(b"{", b'{"new":1,'), b"\r", b"\xe2\x80\xa8",
    b"{" + b",".join(b'"k%d":0' % n for n in range(1300)) + b"}",
)  # fmt: skip


@pytest.mark.parametrize("seed", range(120))
def test_of_a_damaged_log_all_good_lines_are_read(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    audit_path, health_path = tmp_path / "audit.jsonl", tmp_path / "stacks/s/health.jsonl"
    health_path.parent.mkdir(parents=True)
    good = 0
    written: dict[Path, list[bytes]] = {audit_path: [], health_path: []}
    for _ in range(rng.randrange(1, 40)):
        if rng.random() < 0.5:
            piece = rng.choice(PIECES)
            for path in written:
                written[path].append(piece)
        else:
            good += 1
            text = to_json(entry(good), indent=-1).strip().encode()
            written[audit_path].append(text)
            text = to_json(seen("12:00:00", generation=good), indent=-1).strip().encode()
            written[health_path].append(text)
    for path, parts in written.items():
        path.write_bytes(b"\n".join(parts) + rng.choice((b"", b"\n", b"\n\n", b"\xff")))
    # A torn end may take the last line with it.
    expected = list(range(1, good + 1))
    for found in (logs.read_changes(tmp_path), logs.read_health(tmp_path, "s")):
        assert [one.generation for one in found] in (expected, expected[:-1])
    newest = logs.last_health(tmp_path, "s")
    assert (newest.generation if newest else 0) in (good, good - 1)
    # And it goes on.
    logs.record_change(tmp_path, entry(1000))
    assert logs.record_health(tmp_path, "s", seen("13:00:00", generation=1000))
    assert logs.read_changes(tmp_path)[-1].generation == 1000
    newest = logs.last_health(tmp_path, "s")
    assert newest is not None
    assert newest.generation == 1000


@pytest.mark.parametrize("seed", range(60))
def test_random_bytes_are_no_entries(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    data = bytearray(LINE * rng.randrange(1, 30))
    for _ in range(rng.randrange(1, 200)):
        data[rng.randrange(len(data))] = rng.randrange(256)
    (tmp_path / "audit.jsonl").write_bytes(bytes(data))
    for found in logs.read_changes(tmp_path):
        assert isinstance(found, AuditEntry)
        assert isinstance(found.user, str)


# Who it was


def test_the_user_is_the_login_name(monkeypatch: pytest.MonkeyPatch) -> None:
    name = pwd.getpwuid(os.getuid()).pw_name
    for variable in ("SUDO_USER", "PKEXEC_UID"):
        monkeypatch.delenv(variable, raising=False)
    assert logs.current_user() == name
    monkeypatch.setenv("USER", "mallory")
    monkeypatch.setenv("LOGNAME", "mallory")
    assert logs.current_user() == name
    monkeypatch.setenv("SUDO_USER", "alice")
    assert logs.current_user() == f"{name} (alice)"
    monkeypatch.setenv("SUDO_USER", "DOMAIN\\alice.b-c$")
    assert logs.current_user() == f"{name} (DOMAIN\\alice.b-c$)"
    for nonsense in ("", "a b", "x\n", "y" * 70, "root) (bob", name, "\x1b[31m"):
        monkeypatch.setenv("SUDO_USER", nonsense)
        assert logs.current_user() == name
    monkeypatch.delenv("SUDO_USER")
    monkeypatch.setenv("PKEXEC_UID", "65534")
    assert logs.current_user() == f"{name} ({pwd.getpwuid(65534).pw_name})"
    monkeypatch.setenv("PKEXEC_UID", "4000000")
    assert logs.current_user() == name + " (4000000)"
    for nonsense in ("-1", "9" * 30, "x", "٣"):
        monkeypatch.setenv("PKEXEC_UID", nonsense)
        assert logs.current_user() == name


def test_a_key_does_not_get_into_the_log(tmp_path: Path) -> None:
    key = "sk-stackctl-" + "aB3_-" * 8
    logs.record_change(tmp_path, entry(message=f"HTTP 401 for Bearer {key}!"))
    assert key not in (tmp_path / "audit.jsonl").read_text()
    assert logs.read_changes(tmp_path)[0].message == "HTTP 401 for Bearer sk-stackctl-...!"


# Health


def test_a_change_is_written_at_once_the_same_once_a_minute(tmp_path: Path) -> None:
    steps = [
        (seen("12:00:00", generation=1), True),
        (seen("12:00:30", generation=1), False),
        (seen("12:00:59", generation=1), False),
        (seen("12:01:00", generation=1), True),
        (seen("12:01:01", "fail", generation=1, name="answer", message="503"), True),
        (seen("12:01:02", "fail", generation=1, name="answer", message="503"), False),
        (seen("12:01:02", "fail", generation=1, name="answer", message="500"), True),
        (seen("12:01:03", generation=1), True),
        (seen("12:01:04", generation=2), True),
        # The clock was set back.
        (seen("11:00:00", generation=2), True),
    ]
    for one, written in steps:
        assert logs.record_health(tmp_path, "cpu", one) is written, one
    kept = tuple(one for one, written in steps if written)
    assert logs.read_health(tmp_path, "cpu") == kept
    assert logs.last_health(tmp_path, "cpu") == kept[-1]
    path = tmp_path / "stacks" / "cpu" / "health.jsonl"
    assert mode(path) == 0o600
    assert logs.last_health(tmp_path, "other") is None
    assert logs.read_health(tmp_path, "other") == ()


def test_a_moment_that_is_none_is_no_reason_to_fail(tmp_path: Path) -> None:
    odd = HealthEntry(when="soon", status="ok")
    naive = HealthEntry(when="2026-11-21T12:00:00", status="ok")
    for one in (odd, odd, naive, seen("12:00:01"), naive):
        assert logs.record_health(tmp_path, "cpu", one)


def test_the_history_of_health_is_bounded(tmp_path: Path) -> None:
    path = tmp_path / "stacks" / "cpu" / "health.jsonl"
    make_private_folder(path.parent)
    text = to_json(seen("12:00:00"), indent=-1).encode()
    path.write_bytes(text * (256 * 1024 // len(text) + 1))
    assert logs.record_health(tmp_path, "cpu", seen("12:00:01", "fail", message="y" * 9000))
    found = logs.read_health(tmp_path, "cpu")
    assert len(found) == 1000
    assert found[-1].status == "fail"
    assert len(found[-1].message or "") == 1000


def test_a_line_of_a_log_is_short_enough_to_be_read(tmp_path: Path) -> None:
    path = tmp_path / "log"
    append_line(path, b"x" * 20_000, most_bytes=MIB, keep=10)
    logs.record_change(tmp_path, entry(message="\x01" * 9000))
    assert len(logs.read_changes(tmp_path)) == 1
