"""Engines that hang, compute, crash repeatedly or were changed by hand: status and guard."""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections.abc import Iterator

import pytest

from . import look
from .conftest import Seat
from .lab import Lab

UP = ("up", "cpu-latency", "--model")
# The engine serves until USR1. Then it does not answer, and one processor is busy.
SPINNER = """\
#!/bin/sh
[ "$1" = --model ] || exec "$0.real" "$@"
"$0.real" "$@" &
child=$!
trap 'kill -STOP $child; while :; do :; done' USR1
trap 'kill $child; exit 0' TERM
wait $child
"""


def spinner(seat: Seat) -> str:
    """Return an image whose engine computes without end after a signal."""
    change = f"""
        program=$(find . -path ./proc -prune -o -type f -perm -111 -name llama-server -print)
        mv "$program" "$program.real"
        cat >"$program" <<'END'
{SPINNER}END
        chmod 755 "$program"
    """
    return look.derived_image(seat, "spinner", change)


def edit_unit(seat: Seat, change: str) -> None:
    """Change the installed unit by hand and restart it, also to get shorter waits."""
    path = f"{seat.units}/{look.STACK}/{look.STACK}.container"
    before = seat.lab.read(path)
    seat.run("sed", "-i", change, path)
    assert seat.lab.read(path) != before, change
    seat.systemctl("daemon-reload")
    seat.systemctl("restart", f"{look.STACK}.service")


def signal_engine(seat: Seat, name: str) -> None:
    """Send a signal to the engine."""
    seat.run("podman", "kill", "--signal", name, look.CONTAINER)


def health_check(seat: Seat) -> int:
    """Run the unit's health command as Podman's timer does, and return its exit status."""
    done = seat.run("podman", "healthcheck", "run", look.CONTAINER, check=False, timeout=40)
    return done.returncode


def status(seat: Seat, code: int = 0) -> dict[str, object]:
    """Return the stack's entry in ``status``."""
    (stack,) = json.loads(seat.stackctl("status", "--json", code=code).stdout)["stacks"]
    assert isinstance(stack, dict)
    return stack


def history(seat: Seat) -> list[dict[str, str]]:
    """Return the results of the checks, oldest first."""
    text = seat.lab.read(f"{seat.state}/stacks/{look.STACK}/health.jsonl")
    return [json.loads(line) for line in text.splitlines()]


def invocation(seat: Seat) -> str:
    """Return systemd's id of the unit's current run."""
    return look.unit_properties(seat, "InvocationID")["InvocationID"]


# Dead or busy


def test_an_engine_that_hangs_is_killed_and_restarted(seat: Seat, tiny: str) -> None:
    seat.stackctl(*UP, tiny)
    edit_unit(seat, "s/^HealthRetries=.*/HealthRetries=1/")
    assert health_check(seat) == 0
    before = invocation(seat)
    signal_engine(seat, "STOP")
    assert health_check(seat) == 1
    look.wait_for("systemd has restarted it", lambda: invocation(seat) not in (before, ""))
    ready = {"ActiveState": "active", "NRestarts": "1"}
    look.wait_for(
        "it is up again", lambda: look.unit_properties(seat, "ActiveState", "NRestarts") == ready
    )
    assert look.chat(seat)["usage"]["completion_tokens"] > 0


@pytest.mark.deep
def test_an_engine_that_is_busy_is_left_alone(one: Seat, tiny: str) -> None:
    one.stackctl(*UP, tiny, "--set", f"image={spinner(one)}")
    edit_unit(one, "s/^HealthRetries=.*/HealthRetries=1/")
    before = look.container_id(one)
    signal_engine(one, "USR1")
    assert health_check(one) == 0
    seen = status(one, code=1)
    assert seen["state"] == "not answering"
    assert re.search("busy: .* s of processor time in", str(seen["cause"]))
    done = one.stackctl("guard")
    assert (done.stdout, done.stderr) == ("", "")
    assert (history(one)[-1]["status"], history(one)[-1]["name"]) == ("ok", "busy")
    assert look.container_id(one) == before


def test_the_guard_restarts_what_is_dead_twice(seat: Seat, tiny: str) -> None:
    seat.stackctl(*UP, tiny)
    done = seat.stackctl("guard")
    assert (done.stdout, done.stderr) == ("", "")
    assert history(seat)[-1]["status"] == "ok"
    before = invocation(seat)
    signal_engine(seat, "STOP")
    done = seat.stackctl("guard", code=1)
    assert re.fullmatch(r"cpu   FAIL  dead: endpoint: .*, and it does not compute\n", done.stdout)
    # One failed check is not enough.
    assert invocation(seat) == before
    assert str(status(seat, code=1)["cause"]) == "and it does not compute"
    done = seat.stackctl("guard", "--json", code=1)
    (guarded,) = json.loads(done.stdout)["stacks"]
    assert (guarded["action"], guarded["health"]["name"]) == ("restarted", "dead")
    look.wait_for("it serves again", lambda: seat.stackctl("status", code=None).returncode == 0)
    assert look.chat(seat)["usage"]["completion_tokens"] > 0
    log = json.loads(seat.stackctl("history", "--log", "--json").stdout)["entries"]
    assert (log[-1]["operation"], log[-1]["generation"]) == ("restart", 1)
    assert "by the guard" in log[-1]["message"]
    # No check has found the current run dead.
    assert seat.stackctl("guard").stdout == ""


@pytest.mark.deep
def test_what_is_being_changed_is_left_alone(one: Seat, tiny: str) -> None:
    one.stackctl(*UP, tiny)
    signal_engine(one, "STOP")
    hold = """if True:
        import sys
        from pathlib import Path
        from stackctl.machine.lock import exclusive
        with exclusive(Path(sys.argv[1]), "up cpu"):
            print("held", flush=True)
            sys.stdin.read()
    """
    words = ["python3", "-c", hold, f"{one.runtime}/lock"]
    with one.lab.spawn(words, user=one.user, stdin=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        started = time.monotonic()
        done = one.stackctl("guard", "--json")
        assert time.monotonic() - started < 4
        process.communicate("")
    assert json.loads(done.stdout)["stacks"] == [
        {"stack": "cpu", "action": "skipped", "health": None}
    ]
    signal_engine(one, "CONT")


# Crash loops


@pytest.mark.deep
def test_a_crash_loop_ends_in_a_clear_state(one: Seat, tiny: str) -> None:
    one.stackctl(*UP, tiny)
    runs: set[str] = set()

    def has_given_up() -> bool:
        seen = look.unit_properties(one, "ActiveState", "InvocationID")
        if seen["ActiveState"] == "active":
            runs.add(seen["InvocationID"])
            time.sleep(1)
            one.run("podman", "kill", "--signal", "KILL", look.CONTAINER, check=False)
        return seen["ActiveState"] == "failed"

    look.wait_for("systemd gives up", has_given_up, 60, step=0.2)
    assert len(runs) == 3
    done = one.stackctl("status", code=1)
    assert done.stdout.startswith("cpu   crash loop since ")
    assert "  why         gave up after 3 starts: it" in done.stdout
    assert "  fix         stackctl restart cpu" in done.stdout
    assert "container   stackctl-cpu (absent)" in done.stdout
    assert one.stackctl("guard", code=1).stdout.startswith("cpu   FAIL  unit: failed")
    one.stackctl("restart")
    assert (status(one)["state"], status(one)["restarts"]) == ("ready", 0)


# Changed by hand


@pytest.mark.deep
def test_status_names_what_was_changed_by_hand(seat: Seat, tiny: str) -> None:
    seat.stackctl(*UP, tiny)
    assert status(seat)["drift"] == []
    folder = f"{seat.units}/{look.STACK}"
    file = f"{folder}/{look.STACK}.container"
    edit_unit(seat, "s/--ctx-size 2048/--ctx-size 1024/")
    assert status(seat)["drift"] == [
        f"{file} was changed by hand",
        "the running engine's arguments are not the plan's: --ctx-size 1024 instead of 2048",
    ]
    seat.stackctl(*UP, tiny, "--yes", "--soak", "0s")
    now = status(seat)
    assert now["drift"] == []
    # The unit is in the other slot now, with another file.
    unit = str(now["unit"])
    file = f"{folder}/{unit.removesuffix('.service')}.container"
    seat.run("touch", "-d", "next minute", file)
    changed = status(seat)["drift"]
    assert isinstance(changed, list)
    assert any(re.search(f"systemd has not read {unit} .*daemon-reload", x) for x in changed)
    seat.run("rm", file)
    assert f"{file} is missing" in str(status(seat)["drift"])
    # The front door's file, if the lab has a front door.
    if seat.lab.load_door(seat.user) is not None:
        seat.run("sh", "-c", f"echo '# by hand' >>{folder}/{look.STACK}_door.container")
        text = f"the front door's {look.STACK}_door.container is not as this stackctl writes it"
        assert text in str(status(seat)["drift"])
    shown = seat.stackctl("status").stdout
    assert "  changed     " in shown
    assert max(len(line) for line in shown.splitlines()) <= 80


# The timer


@pytest.fixture
def unguarded(seat: Seat) -> Iterator[Seat]:
    """Yield a user, and remove the guard afterwards."""
    yield seat
    seat.stackctl("guard", "--remove", code=None)


def test_the_timer(unguarded: Seat, tiny: str) -> None:
    seat = unguarded
    told = "guard  stackctl guard --install"
    assert told in seat.stackctl(*UP, tiny).stderr
    assert seat.stackctl("status").stdout.endswith("\nguard: off (stackctl guard --install)\n")
    assert seat.stackctl("guard", "--install").stdout == "guarding all stacks, every minute\n"
    assert seat.stackctl("status").stdout.endswith("\nguard: every minute\n")
    units = ("stackctl-guard.service", "stackctl-guard.timer")
    verified = seat.run("systemd-analyze", *seat.scope, "verify", *units)
    assert (verified.stdout, verified.stderr) == ("", "")
    assert seat.systemctl("is-enabled", units[1]).strip() == "enabled"
    seat.systemctl("start", units[0])
    assert history(seat)[-1]["status"] == "ok"
    seat.stackctl("guard", "--install")
    seat.stackctl("down")
    seat.run("rm", "-r", f"{seat.state}/stacks")
    assert told not in seat.stackctl(*UP, tiny).stderr
    assert seat.stackctl("guard", "--remove").stdout == "guarding no more\n"
    # The hint is not repeated after the guard was removed.
    words = ("--set", "engine_args.cache-ram=64", "--yes", "--soak", "0s")
    assert told not in seat.stackctl(*UP, tiny, *words).stderr
    assert seat.stackctl("guard", "--remove").stdout == "there was no guard\n"
    seen = look.unit_properties(seat, "LoadState", unit=units[1])
    assert seen == {"LoadState": "not-found"}


def test_root_runs_no_program_that_others_can_change(lab: Lab) -> None:
    root = Seat(lab, "root")
    program = "/usr/local/bin/stackctl"
    lab.run(["chown", "lab", program], check=True)
    try:
        done = root.stackctl("guard", "--install", code=5)
    finally:
        lab.run(["chown", "root", program], check=True)
    look.assert_error(done, f"refusing timer: {program} belongs to lab", "only root can write")
    assert not look.exists(lab, "/etc/systemd/system/stackctl-guard.service")


# The history


@pytest.mark.deep
def test_a_check_is_remembered_and_needs_no_history(one: Seat, tiny: str) -> None:
    one.stackctl(*UP, tiny)
    one.stackctl("check", "--all")
    assert status(one)["health"] == history(one)[-1]
    one.run("chmod", "500", f"{one.state}/stacks/{look.STACK}")
    try:
        assert one.stackctl("check").stderr == ""
    finally:
        one.run("chmod", "700", f"{one.state}/stacks/{look.STACK}")
    two = one.stackctl("check", "cpu", "--all", code=2)
    look.assert_error(two, "exclude each other")
