"""Failures during and after recovery: no user is locked out, and the state can be repaired."""

from __future__ import annotations

import json
import re
import signal
import subprocess

import pytest

from . import look
from .conftest import Seat
from .lab import IMAGE

MODEL = "/home/lab/own.gguf"
UP = ("up", "cpu-latency", "--model", f"file:{MODEL}", "--set", "front_door=auto", "--yes")
DOOR = "cpu_door.service"


def own_model(seat: Seat, tiny: str) -> None:
    """Copy the model to a file that a test may remove."""
    seat.run("cp", tiny.removeprefix("file:"), MODEL)


def leave_journal(seat: Seat, **changes: object) -> None:
    """Write the journal of a stackctl that was killed while it switched from generation 1 to 2."""
    change = {
        "schema": "stackctl.transaction/1", "operation": "switch", "stack": "cpu", "before": 1,
        "running": True, "after": 2, "step": "start", "started": "2026-11-21T12:00:00Z", **changes,
    }  # fmt: skip
    look.put(seat.lab, f"{seat.state}/transaction.json", json.dumps(change).encode())


def state(seat: Seat) -> str:
    """Return the state of the stack from ``status``."""
    (stack,) = json.loads(seat.stackctl("status", "--json", code=None).stdout)["stacks"]
    return str(stack["state"])


def test_an_old_engine_that_does_not_start_is_recovered_all_the_same(one: Seat, tiny: str) -> None:
    own_model(one, tiny)
    one.stackctl(*UP)
    one.systemctl("stop", "cpu.service")
    one.run("mv", MODEL, f"{MODEL}.away")
    leave_journal(one)
    done = one.stackctl("recover", code=1)
    look.assert_error(done, "generation 1 of cpu is installed again, but cpu did not start")
    assert not look.exists(one.lab, f"{one.state}/transaction.json")
    # The door is not held: requests pass as soon as the engine is back.
    one.run("mv", f"{MODEL}.away", MODEL)
    one.systemctl("reset-failed", "cpu.service", check=False)
    one.systemctl("restart", "cpu.service")
    look.wait_for("the engine is back", lambda: state(one) == "ready")
    assert look.chat(one)["usage"]["completion_tokens"] > 0
    # A failed switch ends in the same way if the old engine does not run, and a next one can help.
    one.run("mv", MODEL, f"{MODEL}.away")
    one.run("podman", "kill", "stackctl-cpu")
    look.wait_for("systemd tries again", lambda: state(one) != "ready")
    one.run("mv", f"{MODEL}.away", MODEL)
    done = one.stackctl(*UP, "--set", "engine_args.rope-scaling=x", code=1)
    assert not look.exists(one.lab, f"{one.state}/transaction.json")
    one.stackctl(*UP)
    assert state(one) == "ready"


@pytest.mark.deep
def test_a_record_that_is_gone_locks_nobody_out(one: Seat, tiny: str) -> None:
    own_model(one, tiny)
    one.stackctl(*UP)
    one.run("rm", f"{one.state}/stacks/cpu/1.json")
    leave_journal(one)
    done = one.stackctl("status", code=1)
    assert "cannot recover cpu: cpu has no generation 1" in done.stderr
    assert "stackctl down cpu gives it up" in done.stderr
    done = one.stackctl(*UP, code=4)
    look.assert_error(done, "cannot recover cpu: cpu has no generation 1")
    one.stackctl("down")
    look.assert_clean(one)
    assert not look.exists(one.lab, f"{one.state}/transaction.json")


@pytest.mark.deep
def test_a_door_that_is_shut_or_stuck_is_started_anew(one: Seat, tiny: str) -> None:
    own_model(one, tiny)
    one.stackctl(*UP)
    for words in (("restart",), (*UP, "--set", "engine_args.cache-ram=64", "--soak", "0s")):
        one.systemctl("stop", DOOR)
        one.stackctl(*words)
        assert look.chat(one)["usage"]["completion_tokens"] > 0
    one.run("podman", "kill", "--signal", "STOP", "stackctl-cpu_door")
    done = one.stackctl(*UP, "--set", "engine_args.cache-ram=64")
    assert "nothing to change" in done.stdout
    assert look.chat(one)["usage"]["completion_tokens"] > 0
    # The engine is in the second slot now, and its log is found there.
    shown = one.stackctl("logs", "--generation", "2").stdout
    assert "model loaded" in shown
    assert "cpu_door" in one.stackctl("logs").stdout


LISTEN = """\
import socket, sys
server = socket.create_server(("127.0.0.1", int(sys.argv[1])))
print(flush=True)
sys.stdin.read()
"""


@pytest.mark.deep
def test_a_door_that_systemd_tries_again_is_waited_for(one: Seat, tiny: str) -> None:
    own_model(one, tiny)
    one.stackctl(*UP)
    one.systemctl("stop", DOOR)
    words = ["python3", "-c", LISTEN, str(look.PORT)]
    with one.lab.spawn(words, user=one.user, stdin=subprocess.PIPE) as listener:
        assert listener.stdout is not None
        listener.stdout.readline()
        with one.lab.spawn(["stackctl", *UP], user=one.user) as process:
            look.wait_for(
                "it is tried again",
                lambda: look.unit_properties(one, "NRestarts", unit=DOOR)["NRestarts"] != "0",
            )
            listener.communicate("", timeout=10)
            out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "nothing to change" in out
    assert look.chat(one)["usage"]["completion_tokens"] > 0


@pytest.mark.deep
def test_a_restart_tells_of_the_engine_before_the_door(one: Seat, tiny: str) -> None:
    own_model(one, tiny)
    one.stackctl(*UP)
    config, journal = f"{one.state}/doors/cpu/haproxy.cfg", f"{one.state}/transaction.json"
    # Neither starts. The error names the engine, because the user asked for its restart.
    one.run("mv", MODEL, f"{MODEL}.away")
    one.run("sh", "-c", f"rm {config} && mkdir {config}")
    done = one.stackctl("restart", code=1)
    look.assert_error(done, "cpu did not start")
    assert re.search(f"^warning: .*{config}", done.stderr, re.MULTILINE), done.stderr
    assert look.exists(one.lab, journal)
    one.run("rmdir", config)
    one.run("mv", f"{MODEL}.away", MODEL)
    assert one.stackctl("recover").stdout == "cpu is recovered: generation 1\n"
    assert look.chat(one)["usage"]["completion_tokens"] > 0
    # If only the door fails, it is the error, and the change can still be recovered.
    one.run("sh", "-c", f"rm {config} && mkdir {config}")
    look.assert_error(one.stackctl("restart", code=1), config)
    one.run("rmdir", config)
    assert one.stackctl("recover").stdout == "cpu is recovered: generation 1\n"
    assert not look.exists(one.lab, journal)
    assert look.chat(one)["usage"]["completion_tokens"] > 0


@pytest.mark.deep
def test_an_engine_that_starts_is_waited_for_not_started_anew(one: Seat, tiny: str) -> None:
    own_model(one, tiny)
    slow = look.derived_image(
        one,
        "slow",
        """
        program=$(find . -path ./proc -prune -o -type f -perm -111 -name llama-server -print)
        mv "$program" "$program.real"
        printf '#!/bin/sh\nsleep 4\nexec "$0.real" "$@"\n' >"$program"
        chmod 755 "$program"
        """,
    )
    one.stackctl(*UP, "--set", f"image={slow}")
    one.systemctl("restart", "--no-block", "cpu.service")
    look.wait_for(
        "it starts",
        lambda: look.unit_properties(one, "ActiveState") == {"ActiveState": "activating"},
    )
    started = look.unit_properties(one, "InvocationID")
    leave_journal(one)
    done = one.stackctl("recover")
    assert done.stdout == "cpu is recovered: generation 1\n"
    assert look.unit_properties(one, "InvocationID") == started
    assert state(one) == "ready"


@pytest.mark.deep
def test_what_is_only_known_at_the_end_is_kept(one: Seat, tiny: str) -> None:
    own_model(one, tiny)
    one.stackctl(*UP)
    config, journal = f"{one.state}/doors/cpu/haproxy.cfg", f"{one.state}/transaction.json"
    words = ("stackctl", "switch", "throughput", "--yes", "--soak", "5s")
    with one.lab.spawn(words, user=one.user) as process:
        look.wait_for(
            "it is watched",
            lambda: look.exists(one.lab, journal) and b'"soak"' in look.get(one.lab, journal),
        )
        # At that time the new engine serves; its door cannot be written.
        one.run("sh", "-c", f"rm {config} && mkdir {config}")
        _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "warning: it serves, but" in err
    assert look.exists(one.lab, journal)
    one.run("rmdir", config)
    assert one.stackctl("recover").stdout == "cpu is recovered: generation 2\n"
    outcome = look.record(one, 2)["outcome"]
    assert outcome["state"] == "ready"
    assert outcome["ready_s"] > 0
    assert look.record(one, 1)["outcome"]["state"] == "replaced"


@pytest.mark.deep
def test_a_unit_that_was_changed_by_hand_is_put_back_as_stored(one: Seat, tiny: str) -> None:
    own_model(one, tiny)
    one.stackctl(*UP)
    path = f"{one.units}/cpu/cpu.container"
    one.run("sh", "-c", f"echo '# by hand' >>{path}")
    done = one.stackctl(*UP, "--set", "engine_args.rope-scaling=x", code=1)
    assert "warning: cpu.container was changed by hand: it is put back as stored" in done.stderr
    assert look.get(one.lab, path).decode() == look.record(one, 1)["units"]["files"][0]["text"]
    done = one.stackctl(*UP, "--set", "engine_args.rope-scaling=x", code=1)
    assert "by hand" not in done.stderr


def test_until_it_is_final_the_old_engine_is_what_a_power_loss_leaves(one: Seat, tiny: str) -> None:
    own_model(one, tiny)
    one.stackctl(*UP)
    config = f"{one.state}/doors/cpu/haproxy.cfg"
    old = look.get(one.lab, config)
    words = ("stackctl", "switch", "throughput", "--yes", "--soak", "60s")
    with one.lab.spawn(words, user=one.user) as process:
        journal = f"{one.state}/transaction.json"
        look.wait_for(
            "it is watched",
            lambda: look.exists(one.lab, journal) and b'"soak"' in look.get(one.lab, journal),
        )
        # The new engine serves the clients; after a boot the old one would start.
        assert look.chat(one)["usage"]["completion_tokens"] > 0
        assert look.get(one.lab, config) == old
        assert "[Install]" in look.get(one.lab, f"{one.units}/cpu/cpu.container").decode()
        assert "[Install]" not in look.get(one.lab, f"{one.units}/cpu/cpu_b.container").decode()
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=10)
    assert one.stackctl("recover").stdout == "cpu is recovered: generation 1\n"
    assert look.get(one.lab, config) == old
    one.stackctl("switch", "throughput", "--yes", "--soak", "0s")
    port = look.record(one, 3)["plan"]["engine_port"]
    assert f"127.0.0.1:{port} check" in look.get(one.lab, config).decode()
    assert look.chat(one)["usage"]["completion_tokens"] > 0


@pytest.mark.deep
def test_until_it_is_final_a_new_door_is_not_what_boots(one: Seat, tiny: str) -> None:
    own_model(one, tiny)
    off = [word.replace("front_door=auto", "front_door=off") for word in UP]
    one.stackctl(*off)
    unit = f"{one.units}/cpu/cpu_door.container"
    with one.lab.spawn(("stackctl", *UP, "--soak", "60s"), user=one.user) as process:
        journal = f"{one.state}/transaction.json"
        look.wait_for(
            "it is watched",
            lambda: look.exists(one.lab, journal) and b'"soak"' in look.get(one.lab, journal),
        )
        assert look.chat(one)["usage"]["completion_tokens"] > 0
        # After a boot the door would take the port on which the old engine listens.
        assert "[Install]" not in look.get(one.lab, unit).decode()
        assert "[Install]" in look.get(one.lab, f"{one.units}/cpu/cpu.container").decode()
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=10)
    assert one.stackctl("recover").stdout == "cpu is recovered: generation 1\n"
    assert not look.exists(one.lab, unit)
    assert look.chat(one)["usage"]["completion_tokens"] > 0
    one.stackctl(*UP, "--soak", "0s")
    started = look.unit_properties(one, "InvocationID", unit=DOOR)
    assert "[Install]" in look.get(one.lab, unit).decode()
    one.stackctl(*UP)
    assert look.unit_properties(one, "InvocationID", unit=DOOR) == started


def test_an_engine_whose_unit_file_is_gone_is_found(seat: Seat, tiny: str) -> None:
    up = ("up", "cpu-latency", "--model", tiny, "--yes", "--soak", "0s")
    seat.stackctl(*up)
    for again in ("up", "down"):
        seat.run("rm", "-r", f"{seat.units}/cpu")
        seat.systemctl("daemon-reload")
        if again == "up":
            seat.stackctl(*up)
            assert look.chat(seat)["usage"]["completion_tokens"] > 0
        else:
            assert "cpu is down" in seat.stackctl("down", "cpu").stdout
    look.assert_clean(seat)


@pytest.mark.deep
def test_a_container_whose_monitor_was_killed_is_removed(seat: Seat) -> None:
    """systemd kills it after its timeout. Podman then takes the container for a running one."""
    name = "stackctl-left"
    seat.run("podman", "run", "--detach", "--network=none", f"--name={name}", IMAGE, "sleep", "99")
    shown = seat.run("podman", "inspect", "--format={{.State.ConmonPid}} {{.State.Pid}}", name)
    seat.run("kill", "-KILL", *shown.stdout.split())
    remove = f"from stackctl.machine import podman; podman.remove_container({name!r})"
    seat.run("python3", "-c", remove)
    assert name not in seat.run("podman", "ps", "--all", "--format={{.Names}}").stdout
    # Without a container nothing is done.
    seat.run("python3", "-c", remove)
