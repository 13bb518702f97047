"""Interrupted, killed and parallel runs of stackctl: the state is restored or can be repaired."""

from __future__ import annotations

import contextlib
import json
import re
import shlex
import signal
import subprocess
from collections.abc import Callable

import pytest

from . import look
from .conftest import Seat
from .lab import LabProcess

UP = ("up", "cpu-latency", "--model")
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def spawn(seat: Seat, *arguments: str) -> LabProcess:
    """Start stackctl without waiting for it."""
    return seat.lab.spawn(["stackctl", *arguments], user=seat.user)


def is_locked(seat: Seat) -> bool:
    """Return True if a change is running."""
    return look.exists(seat.lab, f"{seat.runtime}/lock")


def engine_runs(seat: Seat) -> bool:
    """Return True if the engine that never answers is running, so that systemd waits for it."""
    return bool(look.processes(seat.lab, "sleep 98765"))


def interrupt(
    seat: Seat, process: LabProcess, when: Callable[[Seat], bool], number: signal.Signals
) -> str:
    """Send a signal when the condition holds, and return stackctl's error output."""
    with process:
        look.wait_for(when.__name__, lambda: when(seat) or process.poll() is not None)
        assert process.poll() is None, process.communicate()
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert out == ""
    assert err.count("error: interrupted") == 1
    assert "Traceback" not in err
    return str(err)


@pytest.mark.deep
def test_interrupted_before_anything_is_installed(seat: Seat, tiny: str) -> None:
    for number in SIGNALS:
        interrupt(seat, spawn(seat, *UP, tiny), is_locked, number)
        assert not seat.files(seat.units, seat.state, seat.runtime)
    look.assert_clean(seat)


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGINT,
        pytest.param(signal.SIGTERM, marks=pytest.mark.deep),
        pytest.param(signal.SIGHUP, marks=pytest.mark.deep),
    ],
)
def test_interrupted_while_the_engine_starts(one: Seat, tiny: str, number: signal.Signals) -> None:
    image = look.never_healthy(one)
    interrupt(one, spawn(one, *UP, tiny, "--set", f"image={image}"), engine_runs, number)
    look.assert_clean(one)
    assert look.record(one, 1)["outcome"]["state"] == "interrupted"


@pytest.mark.deep
def test_interrupted_again_while_it_clears_up(seat: Seat, tiny: str) -> None:
    image = look.never_healthy(seat)
    with spawn(seat, *UP, tiny, "--set", f"image={image}") as process:
        look.wait_for("the engine runs", lambda: engine_runs(seat))
        for _ in range(3):
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.1)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    look.assert_clean(seat)


def test_interrupted_while_it_replaces(seat: Seat, tiny: str) -> None:
    image = look.never_healthy(seat)
    seat.stackctl(*UP, tiny)
    old, text = look.argv(seat), look.unit_text(seat)
    words = (*UP, tiny, "--set", f"image={image}", "-y")
    err = interrupt(seat, spawn(seat, *words), engine_runs, signal.SIGINT)
    assert re.search(r"^restored +generation 1, ", err, re.MULTILINE)
    assert (look.argv(seat), look.unit_text(seat)) == (old, text)
    assert look.chat(seat)["usage"]["completion_tokens"] > 0
    states = [look.record(seat, number)["outcome"]["state"] for number in (1, 2)]
    assert states == ["ready", "interrupted"]
    seat.stackctl("down")
    look.assert_clean(seat)


@pytest.mark.deep
def test_a_reader_that_goes_away_does_not_stop_it(one: Seat, tiny: str) -> None:
    one.stackctl(*UP, tiny)
    text = look.unit_text(one)
    image = look.never_healthy(one)
    for words in (("--set", f"image={image}", "--timeout", "2s"), ("--set", "context=1024")):
        line = shlex.join(["stackctl", *UP, tiny, *words, "-y"])
        one.run("sh", "-c", f"{line} 2>&1 | head -n 1", timeout=60)
    # The first run restored the old state and recorded it, the second became ready.
    assert [look.record(one, number)["outcome"]["state"] for number in (1, 2, 3)] == [
        "replaced", "failed", "ready"
    ]  # fmt: skip
    assert look.unit_text(one) != text
    one.stackctl("check")
    one.stackctl("down")
    look.assert_clean(one)


# Kills, after which stackctl cannot restore the state


def test_killed_while_the_engine_starts(seat: Seat, tiny: str) -> None:
    image = look.never_healthy(seat)
    words = ("--set", f"image={image}")
    with spawn(seat, *UP, tiny, *words) as process:
        look.wait_for("the engine runs", lambda: engine_runs(seat))
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=10)
    assert look.unit_properties(seat, "ActiveState") == {"ActiveState": "activating"}
    assert look.record(seat, 1)["outcome"]["state"] == "starting"
    # The next command reverts the interrupted change: before it there was no stack.
    done = seat.stackctl("status")
    assert "up of cpu was cut off at the step 'start': undoing it (nothing runs)" in done.stderr
    assert look.record(seat, 1)["outcome"]["state"] == "interrupted"
    look.assert_clean(seat)
    done = seat.stackctl(*UP, tiny)
    assert "cpu is up (generation 2)" in done.stdout
    assert look.argv(seat) == look.record(seat, 2)["plan"]["argv"]
    seat.stackctl("check")
    seat.stackctl("down")
    look.assert_clean(seat)


@pytest.mark.deep
def test_killed_while_it_asks_podman(seat: Seat, tiny: str) -> None:
    folder = look.lab_path(seat.lab, seat.runtime)
    with spawn(seat, *UP, tiny) as process:
        look.wait_for("podman is asked", lambda: bool([*folder.glob("podman-*.sock")]), step=0.002)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=10)
    assert process.returncode != 0
    assert [*folder.glob("podman-*.sock")]
    seat.stackctl(*UP, tiny)
    assert not [*folder.iterdir()]
    seat.stackctl("down")
    look.assert_clean(seat)


@pytest.mark.deep
def test_killed_when_it_was_all_but_done(seat: Seat, tiny: str) -> None:
    with spawn(seat, *UP, tiny) as process:
        look.wait_for(
            "the unit is there",
            lambda: look.exists(seat.lab, f"{seat.units}/cpu/cpu.container"),
        )
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=10)
    seat.stackctl(*UP, tiny)
    seat.stackctl("check")
    (stack,) = json.loads(seat.stackctl("status", "--json").stdout)["stacks"]
    assert stack["state"] == "ready"
    assert look.record(seat, stack["generation"])["outcome"]["state"] == "ready"
    seat.stackctl("down")
    look.assert_clean(seat)


# Two at the same time


def test_the_second_up_is_told_who_is_at_work(seat: Seat, tiny: str) -> None:
    image = look.never_healthy(seat)
    with spawn(seat, *UP, tiny, "--set", f"image={image}") as first:
        look.wait_for("the engine runs", lambda: engine_runs(seat))
        for words in ((*UP, tiny), ("down",), ("restart",)):
            done = seat.stackctl(*words, code=7)
            look.assert_error(
                done,
                r"another stackctl is at work here: process \d+, up cpu, since [\d:]{8}$",
                "wait until",
            )
        # Commands that only read are allowed.
        assert '"starting"' in seat.stackctl("status", "--json", code=1).stdout
        first.send_signal(signal.SIGINT)
        first.communicate(timeout=60)
    assert first.returncode == 130
    look.assert_clean(seat)


@pytest.mark.deep
def test_two_at_the_very_same_time(seat: Seat, tiny: str) -> None:
    with spawn(seat, *UP, tiny) as one, spawn(seat, *UP, tiny) as two:
        said = [process.communicate(timeout=60) for process in (one, two)]
    assert sorted((one.returncode, two.returncode)) == [0, 7], said
    assert sum("cpu is up (generation 1)" in out for out, _ in said) == 1
    assert sum("another stackctl is at work" in err for _, err in said) == 1
    names = seat.run("podman", "ps", "--all", "--format", "{{.Names}}").stdout.split()
    assert [name for name in names if not name.endswith("_door")] == ["stackctl-cpu"]
    seat.stackctl("down")
    look.assert_clean(seat)
