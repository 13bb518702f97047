"""Dead or busy: the health command in every shell, drift, and the guard's own units."""

from __future__ import annotations

import http.server
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from stackctl.deploy import guard_timer
from stackctl.diagnose.verify_process import argv_difference
from stackctl.errors import ExitCode, StackctlError
from stackctl.health import endpoint
from stackctl.machine import lock, runner
from stackctl.machine.systemd import UnitState, parse_unit_state
from stackctl.observe.engine_snapshot import EngineSnapshot, work_between
from stackctl.resources import data_folder
from stackctl.units import healthcheck, quoting
from stackctl.values.metrics import EngineMetrics

SHELLS = [
    words
    for words in (["dash"], ["bash", "--posix"], ["bash"], ["busybox", "sh"], ["mksh"])
    if shutil.which(words[0])
]

# The health command


@contextmanager
def server(status: int) -> Iterator[int]:
    """Answers /health with that status; its port."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == "/health" else 404)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as made:
        thread = threading.Thread(target=made.serve_forever)
        thread.start()
        try:
            yield made.server_address[1]
        finally:
            made.shutdown()
            thread.join()


def run(shell: list[str], text: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*shell, "-c", text], capture_output=True, text=True, timeout=30, check=False
    )


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
@pytest.mark.parametrize("shell", SHELLS, ids=lambda words: " ".join(words))
def test_an_answer_decides_at_once(shell: list[str]) -> None:
    with server(200) as port:
        assert run(shell, healthcheck.health_command(port, "/health")).returncode == 0
        assert run(shell, healthcheck.startup_command(port, "/health")).returncode == 0
    with server(503) as port:
        assert run(shell, healthcheck.health_command(port, "/health")).returncode != 0
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        command = healthcheck.health_command(closed.getsockname()[1], "/health")
        assert run(shell, command).returncode != 0


@pytest.mark.parametrize("shell", SHELLS, ids=lambda words: " ".join(words))
def test_processor_time_is_read_in_every_shell(shell: list[str], tmp_path: Path) -> None:
    # Two processes, the name of one as nasty as names get; utime and stime are fields 14 and 15.
    rest = "S 0 1 1 0 -1 4194560 2413 0 14 0 {} {} 0 0 20 0 11 0 152186 614924288"
    for pid, name, utime, stime in ((1, "llama-server", 400, 30), (7, "a) * b) (", 2, 1)):
        (tmp_path / str(pid)).mkdir()
        text = f"{pid} ({name}) {rest.format(utime, stime)}\n"
        (tmp_path / str(pid) / "stat").write_text(text)
    functions = healthcheck._TICKS.replace("/proc/", f"{tmp_path}/")
    assert functions != healthcheck._TICKS
    done = run(shell, f"{functions}; t")
    assert (done.stdout, done.stderr) == ("433\n", "")


def test_a_check_ends_within_its_time() -> None:
    # HealthTimeout of the template is 20 s.
    assert healthcheck.ANSWER_S + healthcheck.WATCH_S <= 12
    # What a unit file holds is what the shell gets.
    command = healthcheck.health_command(8080, "/health")
    assert quoting.quote_raw(command).replace("$$", "$") == command
    assert not set(command) & set("\"'\\%`\n")


# Dead or busy


def test_only_a_missing_answer_has_the_code_of_one() -> None:
    def worst(port: int) -> tuple[str, str, str | None]:
        url = f"http://127.0.0.1:{port}"
        last = endpoint.check_endpoint(url, "/health", "model", answer_timeout_s=2)[-1]
        return last.name, last.status, last.code

    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        assert worst(closed.getsockname()[1]) == ("endpoint", "fail", "no-answer")
    with server(500) as port:
        assert worst(port) == ("endpoint", "fail", None)
    # Well, but /v1/models answers 404: an answer that reports an error is an answer.
    with server(200) as port:
        assert worst(port) == ("model", "fail", None)


def look(cpu_s: float | None, at_s: float, **metrics: float) -> EngineSnapshot:
    numbers = EngineMetrics(**metrics) if metrics else None  # type: ignore[arg-type]
    return EngineSnapshot(unit=UnitState(at_s=at_s, active="active", cpu_s=cpu_s), metrics=numbers)


def test_work_between_two_looks() -> None:
    done = work_between(look(1.0, 100.0), look(3.5, 105.0))
    assert (done.cpu_s, done.interval_s, done.is_working) == (2.5, 5.0, True)
    # A unit that was started again counts from zero; one without accounting shows nothing.
    assert work_between(look(3.5, 100.0), look(1.0, 105.0)).cpu_s == 0
    assert work_between(look(None, 100.0), look(1.0, 105.0)).is_working is None


def test_one_limit_for_the_guard_and_for_the_container() -> None:
    least_s = healthcheck.BUSY_TICKS / 100
    assert work_between(look(0.0, 0.0), look(least_s, healthcheck.WATCH_S)).is_working is True
    assert (
        work_between(look(0.0, 0.0), look(least_s - 0.01, healthcheck.WATCH_S)).is_working is False
    )


def test_counters_of_tokens_that_move_are_work() -> None:
    idle = {"prompt_tokens": 5.0, "running": 1}
    assert work_between(look(0.0, 0.0, **idle), look(0.0, 5.0, **idle)).is_working is False
    more = {"prompt_tokens": 6.0, "running": 1}
    assert work_between(look(0.0, 0.0, **idle), look(0.0, 5.0, **more)).is_working is True
    # Numbers of one look alone show nothing.
    assert work_between(look(0.0, 0.0), look(0.0, 5.0, **more)).is_working is False


@pytest.mark.parametrize(
    ("seen", "expected"),
    [
        ({"Result": "start-limit-hit", "NRestarts": "0", "StartLimitBurst": "3"}, 3),
        ({"Result": "exit-code", "NRestarts": "3", "StartLimitBurst": "3"}, 3),
        ({"Result": "exit-code", "NRestarts": "2", "StartLimitBurst": "3"}, None),
        ({"Result": "exit-code", "NRestarts": "0", "StartLimitBurst": "0"}, None),
        ({}, None),
    ],
)
def test_when_systemd_gave_up(seen: dict[str, str], expected: int | None) -> None:
    assert parse_unit_state(seen, at_s=1.0).gave_up_after == expected


def test_properties_of_systemd_become_a_typed_state() -> None:
    state = parse_unit_state(
        {
            "ActiveState": "active", "SubState": "running", "Result": "success",
            "ExecMainStatus": "0", "NRestarts": "2", "MainPID": "315", "Job": "0",
            "CPUUsageNSec": "3500000000", "ActiveEnterTimestampMonotonic": "90000000",
            "ActiveEnterTimestamp": "Sat 2026-11-28", "StateChangeTimestamp": "Sun 2026-11-29",
            "NeedDaemonReload": "yes", "DropInPaths": "/etc/a.conf /etc/b.conf",
        },
        at_s=100.0,
    )  # fmt: skip
    assert (state.restarts, state.main_pid, state.cpu_s) == (2, 315, 3.5)
    assert (state.running_s, state.since) == (10.0, "Sat 2026-11-28")
    assert state.needs_reload
    assert state.drop_ins == ("/etc/a.conf", "/etc/b.conf")
    # A restart is a failure of the start that was asked for.
    assert state.has_failed
    stopped = parse_unit_state(
        {"ActiveState": "inactive", "CPUUsageNSec": "[not set]", "MainPID": "0", "Job": "7"}, 1.0
    )
    assert (stopped.cpu_s, stopped.main_pid, stopped.running_s) == (None, None, None)
    # What systemd still has to do with it may start it.
    assert not stopped.has_failed
    assert parse_unit_state({"ActiveState": "inactive"}, 1.0).has_failed


# Drift

PLANNED = ("llama-server", "--port", "8080", "--jinja")


@pytest.mark.parametrize(
    ("running", "difference"),
    [
        (PLANNED, None),
        (("/app/llama-server", "--port", "8080", "--jinja"), None),
        (("/bin/sh", "/app/start", "--port", "8080", "--jinja"), None),
        (("llama-server", "--port", "8081", "--jinja"), "--port 8081 instead of 8080"),
        (("llama-server", "--port", "8080"), "--jinja is missing"),
        (("llama-server",), "--port is missing"),
        ((*PLANNED, "--lora"), "--lora is not planned"),
        (("llama-server", "--lora", "--port", "8080", "--jinja"), "--lora is not planned"),
        ((), "--port is missing"),
    ],
)
def test_arguments_that_differ(running: tuple[str, ...], difference: str | None) -> None:
    assert argv_difference(running, PLANNED) == difference


# The guard's units


@pytest.mark.parametrize("scope", ["user", "system"])
def test_the_shipped_units(scope: str) -> None:
    folder = data_folder("systemd") / scope
    service = (folder / guard_timer.SERVICE).read_text("utf-8")
    assert service.count("@STACKCTL@") == 1
    assert f"\nExecStart=@STACKCTL@ --{scope} " in service
    assert "WantedBy=timers.target" in (folder / guard_timer.TIMER).read_text("utf-8")


def test_the_program_that_runs_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "stackctl"
    script.write_text("#!/bin/sh\n")
    script.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["stackctl", "guard"])
    assert runner.own_command() == (str(script),)
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "__main__.py")])
    assert runner.own_command() == (sys.executable, "-P", "-m", "stackctl")


def test_root_trusts_only_what_root_alone_can_change(tmp_path: Path) -> None:
    guard_timer._require_roots_own(Path("/bin/sh"))
    program = tmp_path / "stackctl"
    program.touch()
    program.chmod(0o757)
    with pytest.raises(StackctlError) as caught:
        guard_timer._require_roots_own(program)
    assert caught.value.exit_code == ExitCode.REFUSED
    assert caught.value.message == f"refusing timer: {program} can be written by everybody"


def test_root_does_not_trust_a_program_of_another_owner(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root, to give a file away")
    program = tmp_path / "stackctl"
    program.touch(mode=0o755)
    os.chown(program, 65533, 0)
    with pytest.raises(StackctlError, match=r"refusing timer: .*stackctl belongs to user 65533$"):
        guard_timer._require_roots_own(program)


# Who holds the lock


def test_looking_at_the_lock_does_not_take_it(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    assert lock.lock_holder(path) is None
    with lock.exclusive(path, "up cpu"):
        assert "up cpu" in str(lock.lock_holder(path))
    assert lock.lock_holder(path) is None
    # A file that a killed writer left, of a process that is there and has nothing to do with it.
    path.write_text("process 1, up cpu\n")
    assert lock.lock_holder(path) is None
    path.write_text("nonsense")
    assert lock.lock_holder(path) is None
