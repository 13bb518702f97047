"""A stack while it serves: its process, its unit, and the output of stackctl about it."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator

import pytest

from . import look
from .conftest import EITHER_USER, Seat
from .lab import IMAGE, Lab

MIB = 2**20
MODEL = ("--model", look.GEMMA, *look.ONE_THREAD_AT_ANY_SPEED)


@pytest.fixture(scope="module", params=EITHER_USER)
def served(request: pytest.FixtureRequest, lab: Lab) -> Iterator[Seat]:
    """Yield a user whose stack is up with the real model. No test here may change it."""
    seat = Seat(lab, str(request.param))
    try:
        seat.stackctl("up", "cpu-latency", *MODEL)
        yield seat
    finally:
        seat.reset()


# The process


def test_the_engine_runs_what_was_planned(served: Seat) -> None:
    plan = look.record(served, 1)["plan"]
    assert look.argv(served) == plan["argv"]
    assert plan["argv"][0] == "llama-server"


def test_a_model_over_the_limit_is_not_locked_and_the_plan_says_why(served: Seat) -> None:
    pid = look.engine_pid(served)
    limits = served.lab.read(f"/proc/{pid}/limits")
    hard = next(line.split()[4] for line in limits.splitlines() if "locked memory" in line)
    decisions = {d["field"]: d for d in look.record(served, 1)["plan"]["decisions"]}
    mode, locked = decisions["load-mode"], look.process_status(served.lab, pid)["VmLck"]
    if hard == "unlimited" or int(hard) > 256 * MIB:
        assert mode["value"] == "mmap+mlock"
        assert locked != "0 kB"
        return
    assert mode["value"] == "mmap"
    assert mode["reason"].startswith(f"not locked: services may lock {int(hard) // MIB} MiB,")
    assert locked == "0 kB"


# The unit


def test_the_unit_is_pinned_and_never_pulls(served: Seat) -> None:
    lines = look.unit_text(served).splitlines()
    image = next(line for line in lines if line.startswith("Image=")).removeprefix("Image=")
    assert len(image) == 64
    assert set(image) <= set("0123456789abcdef")
    words = ("podman", "image", "inspect", "--format", "{{.Id}}", IMAGE)
    assert served.run(*words).stdout.strip() == image
    started = look.unit_properties(served, "ExecStart")["ExecStart"]
    assert "--pull=never" in started or "--pull never" in started


def test_the_unit_gives_up_after_a_few_crashes(served: Seat) -> None:
    names = ("StartLimitBurst", "StartLimitIntervalUSec", "TimeoutStartUSec", "RestartUSec")
    found = look.unit_properties(served, *names, "Restart")
    assert (found["Restart"], found["StartLimitBurst"]) == ("on-failure", "3")
    window, start = _seconds(found["StartLimitIntervalUSec"]), _seconds(found["TimeoutStartUSec"])
    # A shorter window than all its attempts would never reach the limit.
    assert window > 3 * (start + _seconds(found["RestartUSec"]))


def _seconds(span: str) -> float:
    """Return the seconds of a time span that systemctl prints."""
    units = {"h": 3600, "min": 60, "s": 1, "ms": 0.001}
    total = 0.0
    for word in span.split():
        number = word.rstrip("hmins")
        total += float(number) * units[word[len(number) :]]
    return total


def test_the_unit_is_what_render_shows(served: Seat) -> None:
    shown = served.stackctl("render", "cpu-latency", *MODEL).stdout
    installed = look.unit_text(served)
    # Then the files of the front door follow, if there is one.
    engine = _plain(installed)
    assert _plain(shown)[: len(engine)] == engine
    assert "Generation=1\n" in installed


def _plain(text: str) -> list[str]:
    """Return the lines without those that name the generation."""
    return [
        line
        for line in text.splitlines()
        if not line.startswith(("Generation=", "SyslogIdentifier="))
    ]


# Output of stackctl


def test_up_again_says_that_nothing_changed(served: Seat) -> None:
    before = look.container_id(served)
    started = time.monotonic()
    done = served.stackctl("up", "cpu-latency", *MODEL)
    assert time.monotonic() - started < 5
    assert "cpu is up already, nothing to change (generation 1)" in done.stdout
    assert "http://127.0.0.1:8080/v1" in done.stdout
    assert look.container_id(served) == before != ""
    # A longer timeout of the start changes nothing either.
    done = served.stackctl("up", "cpu-latency", *MODEL, "--timeout", "9m")
    assert "nothing to change" in done.stdout
    assert not look.exists(served.lab, f"{served.state}/stacks/cpu/2.json")
    runtime = served.run("find", served.runtime, "-mindepth", "1").stdout
    assert runtime == ""


def test_status(served: Seat) -> None:
    done = served.stackctl("status")
    assert done.stderr == ""
    assert done.stdout.startswith("cpu   ready since ")
    assert "http://127.0.0.1:8080/v1" in done.stdout
    assert served.stackctl("status", "cpu").stdout == done.stdout
    # The profile's name works too, although the stack has another one.
    assert served.stackctl("status", "cpu-latency").stdout == done.stdout


def test_status_json(served: Seat) -> None:
    found = json.loads(served.stackctl("status", "--json").stdout)
    assert next(iter(found)) == "schema"
    assert found["schema"] == "stackctl.status/1"
    assert found["scope"] == ("system" if served.user == "root" else "user")
    (stack,) = found["stacks"]
    assert stack["stack"] == "cpu"
    assert stack["state"] == "ready"
    assert stack["unit"] == "cpu.service"
    assert stack["unit_state"] == "active"
    assert stack["generation"] == 1
    assert stack["restarts"] == 0
    assert stack["endpoint"] == "http://127.0.0.1:8080"
    assert stack["model"] == "gemma-3-270m-q4_k_m"


def test_up_json_is_the_status(served: Seat) -> None:
    done = served.stackctl("--json", "up", "cpu-latency", *MODEL)
    found = json.loads(done.stdout)
    assert next(iter(found)) == "schema"
    assert found["schema"] == "stackctl.status/1"
    assert [stack["state"] for stack in found["stacks"]] == ["ready"]


def test_check_json(served: Seat) -> None:
    found = json.loads(served.stackctl("check", "--json").stdout)
    assert next(iter(found)) == "schema"
    assert found["schema"] == "stackctl.check/1"
    assert found["stack"] == "cpu"
    door = ["door"] if look.record(served, 1)["door"] else []
    assert [(result["name"], result["status"]) for result in found["results"]] == [
        (name, "ok") for name in ("unit", *door, "endpoint", "model", "answer")
    ]


def test_plan_json(served: Seat) -> None:
    words = ("plan", "cpu-latency", *MODEL, "--json")
    found = json.loads(served.stackctl(*words).stdout)
    assert next(iter(found)) == "schema"
    assert found["schema"] == "stackctl.plan/1"
    # ``up`` has read the image's facts, so the plan has them without Podman.
    assert found["image"] == look.record(served, 1)["plan"]["image"]
    assert found["argv"] == look.argv(served)
    assert found["verdict"]["fits"] is True
    assert all(decision["reason"] for decision in found["decisions"])


def test_another_objective_is_not_taken_without_a_word(served: Seat) -> None:
    before = look.container_id(served)
    done = served.stackctl("up", "cpu-throughput", *MODEL, code=2)
    look.assert_error(done, r"cpu is running \(generation 1\) and would be replaced", "--yes")
    assert look.container_id(served) == before
    assert not look.exists(served.lab, f"{served.state}/stacks/cpu/2.json")
    assert "Objective=latency\n" in look.unit_text(served)


def test_a_dry_run_shows_the_new_unit_and_changes_nothing(served: Seat) -> None:
    before = look.unit_text(served)
    done = served.stackctl("up", "cpu-throughput", *MODEL, "--dry-run")
    assert "Objective=throughput\n" in done.stdout
    assert "nothing was changed" in done.stderr
    assert look.unit_text(served) == before
    assert "would stop cpu.service" in served.stackctl("down", "--dry-run").stdout
    # The document shows the remaining stacks, as it does without --dry-run.
    done = served.stackctl("down", "--dry-run", "--json")
    assert json.loads(done.stdout)["stacks"] == []
    assert "would stop cpu.service" in done.stderr
    assert served.systemctl("is-active", "cpu.service").strip() == "active"


def test_down_of_what_is_not_there(served: Seat) -> None:
    done = served.stackctl("down", "nothing", code=4)
    look.assert_error(done, "no stack named nothing", "cpu")


def test_logs(served: Seat) -> None:
    both = served.stackctl("logs").stdout
    assert "model loaded" in both
    assert len(served.stackctl("logs", "-n", "3").stdout.splitlines()) == 3
    engine = served.stackctl("logs", "--generation", "1").stdout
    assert "model loaded" in engine
    done = served.stackctl("logs", "--generation", "9", code=4)
    look.assert_error(done, "cpu has no generation 9", "generations: 1")
    line = served.stackctl("logs", "--json", "-n", "1").stdout
    assert json.loads(line)["SYSLOG_IDENTIFIER"]


def test_logs_that_are_followed_end_with_ctrl_c(served: Seat) -> None:
    with served.lab.spawn(["stackctl", "logs", "-f"], user=served.user) as process:
        assert process.stdout is not None
        assert process.stdout.readline()
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=10)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert not look.processes(served.lab, "journalctl")
