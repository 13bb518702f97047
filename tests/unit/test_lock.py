"""The lock: one writer at a time, free again however its holder ends."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from refusing import run_without

from stackctl.errors import ExitCode, StackctlError
from stackctl.machine.lock import exclusive, mark_waiting

HOLD = """
    import sys
    from pathlib import Path
    from stackctl.machine.lock import exclusive
    with exclusive(Path(sys.argv[1]), "up cpu"):
        print("held", flush=True)
        sys.stdin.read()
"""


def open_files() -> set[str]:
    return {path.name for path in Path("/proc/self/fd").iterdir()}


@contextmanager
def holder(path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock until its standard input ends."""
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(HOLD), str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            if process.poll() is None:
                process.communicate("")


def test_another_process_is_refused_and_told_who_has_it(tmp_path: Path) -> None:
    path = tmp_path / "run" / "lock"
    with holder(path) as process:
        with pytest.raises(StackctlError) as caught, exclusive(path, "down cpu"):
            pytest.fail("two have the lock")
        assert int(caught.value.exit_code) == int(ExitCode.LOCKED) == 7
        assert re.search(
            rf"here: process {process.pid}, up cpu, since \d\d:\d\d:\d\d$", caught.value.message
        )
        assert caught.value.hint
        # To be refused does not harm the holder.
        assert path.exists()
        process.communicate("")
        assert not path.exists()
    with exclusive(path, "down cpu"):
        assert path.read_text().startswith(f"process {os.getpid()}, down cpu, since ")
    assert not path.exists()


def test_a_killed_holder_frees_it(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with holder(path) as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
        # Its file stays, which means nothing.
        assert path.exists()
        with exclusive(path, "up"):
            assert path.read_text().startswith(f"process {os.getpid()}, up, since ")
        assert not path.exists()


def test_a_stale_file_is_taken_over(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    path.write_text("process 1, something that was much longer than what comes now\n")
    with exclusive(path, "up"):
        assert path.read_text().startswith(f"process {os.getpid()}, up, since ")


def test_a_failure_inside_frees_it(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    before = open_files()
    with pytest.raises(KeyboardInterrupt), exclusive(path, "up"):
        raise KeyboardInterrupt
    assert not path.exists()
    assert open_files() == before


def test_it_is_not_entered_twice_by_one_process(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with (
        exclusive(path, "up"),
        pytest.raises(StackctlError, match="another stackctl"),
        exclusive(path, "up"),
    ):
        pytest.fail("entered twice")


def test_programs_that_are_started_do_not_inherit_it(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with exclusive(path, "up"):
        child = subprocess.Popen(["sleep", "30"], stdin=subprocess.DEVNULL, close_fds=False)
    try:
        with exclusive(path, "again"):
            pass
    finally:
        child.kill()
        child.wait()


def test_where_no_file_can_be_made() -> None:
    with (
        pytest.raises(StackctlError, match="cannot make /proc/x: No such file") as caught,
        exclusive(Path("/proc/x/lock"), "up"),
    ):
        pytest.fail("no lock there")
    assert caught.value.exit_code == ExitCode.HOST


@pytest.mark.parametrize("error", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks(tmp_path: Path, error: int) -> None:
    code = f"""
from pathlib import Path
from stackctl.errors import StackctlError
from stackctl.machine.lock import exclusive
try:
    with exclusive(Path({str(tmp_path / "run" / "lock")!r}), "up cpu"):
        print("held")
except StackctlError as error:
    print(int(error.exit_code), error.message)
"""
    done = run_without("flock", error, code)
    where = tmp_path / "run" / "lock"
    assert done.stdout == f"6 cannot lock {where}: {os.strerror(error)}\n", done.stderr


def test_who_waits_for_an_answer_says_so(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with mark_waiting(path):
        assert not path.exists()
    with exclusive(path, "up cpu"):
        before = path.read_text()
        with mark_waiting(path):
            with pytest.raises(StackctlError) as caught, exclusive(path, "up"):
                pytest.fail("two have the lock")
            assert caught.value.message.endswith(f"{before.strip()}, waiting for an answer")
        assert path.read_text() == before
    # Another's lock is not touched.
    with holder(path):
        before = path.read_text()
        with mark_waiting(path):
            assert path.read_text() == before


COUNT = """
    import sys, time
    from pathlib import Path
    from stackctl.errors import StackctlError
    from stackctl.machine.lock import exclusive
    lock, counter = Path(sys.argv[1]), Path(sys.argv[2])
    done = 0
    while done < 40:
        try:
            with exclusive(lock, "count"):
                number = int(counter.read_text())
                time.sleep(0.0002)
                counter.write_text(str(number + 1))
                done += 1
        except StackctlError as error:
            assert error.exit_code == 7
"""


def test_many_writers_at_once(tmp_path: Path) -> None:
    counter = tmp_path / "counter"
    counter.write_text("0")
    command = [sys.executable, "-c", textwrap.dedent(COUNT), str(tmp_path / "lock"), str(counter)]
    started = time.monotonic()
    processes = [subprocess.Popen(command) for _ in range(3)]
    assert [process.wait(timeout=30) for process in processes] == [0, 0, 0]
    assert counter.read_text() == "120", f"after {time.monotonic() - started:.1f} s"
