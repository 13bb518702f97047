"""The process runner."""

from __future__ import annotations

import os
import pwd
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from stackctl.errors import ExitCode, StackctlError
from stackctl.machine import runner


def test_output_and_status() -> None:
    done = runner.run(["sh", "-c", "echo out; echo err >&2"])
    assert (done.status, done.stdout, done.stderr) == (0, "out\n", "err\n")
    assert runner.run(["cat"], stdin="text").stdout == "text"
    assert runner.run(["cat"]).stdout == ""


def test_there_is_no_shell() -> None:
    assert runner.run(["echo", "$HOME; `id` *"]).stdout == "$HOME; `id` *\n"


def test_output_that_is_no_text() -> None:
    assert runner.run(["printf", r"a\377b"]).stdout == "a\ufffdb"


def test_a_failure_shows_the_command_as_typed_and_the_end_of_its_output() -> None:
    script = "i=0; while [ $i -lt 40 ]; do echo line $i >&2; i=$((i+1)); done; exit 3"
    with pytest.raises(StackctlError) as caught:
        runner.run(["sh", "-c", script])
    error = caught.value
    assert error.message == "sh failed (exit 3)"
    assert error.exit_code == ExitCode.FAILED
    assert error.details[0] == f"$ sh -c '{script}'"
    assert error.details[1:] == tuple(f"line {n}" for n in range(25, 40))


def test_a_failure_that_wrote_to_stdout_only() -> None:
    with pytest.raises(StackctlError) as caught:
        runner.run(["sh", "-c", "echo sorry; exit 1"])
    assert caught.value.details[-1] == "sorry"
    assert runner.run(["false"], check=False).status == 1


def test_a_program_that_is_not_there() -> None:
    with pytest.raises(StackctlError, match="no-such-program is not installed") as caught:
        runner.run(["no-such-program", "a b"])
    assert caught.value.exit_code == ExitCode.HOST
    assert caught.value.hint == "needed for: no-such-program 'a b'"


def test_a_program_that_may_not_run(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("")
    with pytest.raises(StackctlError, match="not allowed to run") as caught:
        runner.run([str(tmp_path / "x")])
    assert caught.value.exit_code == ExitCode.HOST


@pytest.mark.parametrize(
    ("text", "words"),
    [(b"", "Exec format error"), (b"\x7fELF of another machine", "Exec format error")],
)
def test_a_program_that_cannot_be_executed(tmp_path: Path, text: bytes, words: str) -> None:
    program = tmp_path / "podman"
    program.write_bytes(text)
    program.chmod(0o755)
    with pytest.raises(StackctlError, match=f"cannot run {program}: {words}") as caught:
        runner.run([str(program), "--version"])
    assert caught.value.exit_code == ExitCode.HOST


def test_a_program_that_takes_too_long() -> None:
    started = time.monotonic()
    with pytest.raises(StackctlError, match="no answer within 0 s: sleep 30"):
        runner.run(["sleep", "30"], timeout_s=0.2)
    assert time.monotonic() - started < 5


def test_a_signal_is_an_exit_status() -> None:
    assert runner.run(["sh", "-c", "kill -9 $$"], check=False).status == -9


def test_the_environment_is_controlled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LD_PRELOAD_TEST", "x")
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    monkeypatch.setenv("LANG", "de_DE.UTF-8")
    monkeypatch.setenv("LC_MESSAGES", "de_DE.UTF-8")
    monkeypatch.setenv("XDG_CONFIG_HOME", "/c")
    lines = dict(
        line.split("=", 1) for line in runner.run(["env"], extra_env={"MORE": "1"}).stdout.split()
    )
    assert lines["LC_ALL"] == "C.UTF-8"
    assert (lines["XDG_CONFIG_HOME"], lines["MORE"]) == ("/c", "1")
    assert not {"LD_PRELOAD_TEST", "OPENAI_API_KEY", "LANG", "LC_MESSAGES"} & set(lines)


def test_a_path_and_a_bus_are_filled_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PATH")
    monkeypatch.delenv("DBUS_SESSION_BUS_ADDRESS", raising=False)
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/1234")
    env = runner.controlled_environment()
    assert "/usr/bin" in env["PATH"]
    assert env["DBUS_SESSION_BUS_ADDRESS"] == "unix:path=/run/user/1234/bus"
    monkeypatch.setenv("DBUS_SESSION_BUS_ADDRESS", "unix:path=/other")
    assert runner.controlled_environment()["DBUS_SESSION_BUS_ADDRESS"] == "unix:path=/other"


@pytest.mark.parametrize("home", [None, ""])
def test_without_home_it_is_that_of_the_account(
    monkeypatch: pytest.MonkeyPatch, home: str | None
) -> None:
    monkeypatch.delenv("HOME")
    if home is not None:
        monkeypatch.setenv("HOME", home)
    assert runner.controlled_environment()["HOME"] == pwd.getpwuid(os.getuid()).pw_dir


def test_the_observer_hears_of_every_command(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[str] = []
    monkeypatch.setattr(runner, "observer", heard.append)
    runner.run(["echo", "a b"])
    with pytest.raises(StackctlError):
        runner.run(["no-such-program"])
    assert runner.stream(["true", "c d"]) == 0
    assert heard == ["echo 'a b'", "no-such-program", "true 'c d'"]


def test_stream_passes_output_and_status(capfd: pytest.CaptureFixture[str]) -> None:
    assert runner.stream(["sh", "-c", "echo out; echo err >&2; exit 4"]) == 4
    assert capfd.readouterr() == ("out\n", "err\n")
    with pytest.raises(StackctlError, match="cannot run no-such-program") as caught:
        runner.stream(["no-such-program"])
    assert caught.value.exit_code == ExitCode.HOST


STREAM = """
    from stackctl.machine import runner
    try:
        runner.stream(["sh", "-c", "echo $$; exec sleep 60"])
    except KeyboardInterrupt:
        print("interrupted", flush=True)
"""


def test_ctrl_c_ends_what_is_streamed() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(STREAM)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=10)[0] == "interrupted\n"
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)


def test_ctrl_c_does_not_reach_what_is_run() -> None:
    """It would end systemctl in the middle; stackctl then ends things in order."""
    done = runner.run([sys.executable, "-c", "import os; print(os.getsid(0), os.getpid())"])
    session, child = map(int, done.stdout.split())
    assert session == child != os.getsid(0)


# A program that starts others


def ended(pid: int) -> bool:
    try:
        return "State:\tZ" in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return True


@pytest.mark.parametrize("how", ["late", "done"])
def test_a_family_ends_together(tmp_path: Path, how: str) -> None:
    note = tmp_path / "pid"
    child = f"sleep 300 & echo $! > {note}; echo said; "
    words = ["sh", "-c", child + ("exit 3" if how == "done" else "wait")]
    if how == "late":
        with pytest.raises(StackctlError, match="not done within 2 s"):
            runner.run_process_group(words, timeout_s=2, extra_env={})
    else:
        done = runner.run_process_group([*words[:2], f"({words[2]}) >{tmp_path}/out 2>&1"],
                                 timeout_s=20, extra_env={"A": "b"})  # fmt: skip
        assert done.status == 3
    pid = int(note.read_text())
    deadline = time.monotonic() + 10
    while not ended(pid):
        assert time.monotonic() < deadline, "it lives on"
        time.sleep(0.01)
