"""The main task: up, replace, restore, restart and down, as root and as an ordinary user."""

from __future__ import annotations

import json
import re
import shlex

import pytest

from . import look
from .conftest import Seat, both_users
from .lab import Lab

ODD_MODEL = '/srv/odd names/$x %n "q" m.gguf'
# An option with fixed values, which llama-server has had for a long time.
BROKEN = ("--set", "engine_args.rope-scaling=nonsense")


@both_users
def test_the_acceptance_line(seat: Seat) -> None:
    ask = {
        "messages": [{"role": "user", "content": "Name the capital of France."}],
        "max_tokens": 16,
        "temperature": 0,
    }
    url = f"http://127.0.0.1:{look.PORT}/v1/chat/completions"
    words = ["curl", "-sS", "--fail", "--json", json.dumps(ask), url]
    if not look.exists(seat.lab, "/usr/bin/curl"):
        words = ["python3", "-c", look.POST, url, json.dumps(ask)]
    line = (
        f"stackctl up cpu-latency --model {look.GEMMA} && stackctl check"
        f" && {shlex.join(words)} >answer.json"
        " && stackctl down"
    )
    done = seat.run("sh", "-c", line, timeout=120)
    answer = json.loads(seat.run("cat", "answer.json").stdout)
    assert answer["choices"][0]["message"]["content"].strip()
    assert answer["usage"]["completion_tokens"] > 0
    lines = done.stdout.splitlines()
    assert lines[0] == "cpu is up (generation 1)"
    assert lines[1] == "  http://127.0.0.1:8080/v1   model gemma-3-270m-q4_k_m"
    checked = [text.split()[:2] for text in lines[2:-1]]
    names = ("unit", "door", "endpoint", "model", "answer")
    assert checked == [["ok", name] for name in names if name != "door" or len(checked) == 5]
    assert lines[-1] == "cpu is down"
    for step in ("model", "image", "plan", "unit", "ready", "answer"):
        assert re.search(rf"^{step} ", done.stderr, re.MULTILINE), step
    assert "enable-linger" not in done.stderr
    look.assert_clean(seat)
    assert look.record(seat, 1)["outcome"]["state"] == "stopped"


def test_a_second_generation_replaces_the_first(seat: Seat, tiny: str) -> None:
    seat.stackctl("up", "cpu-latency", "--model", tiny)
    first = look.container_id(seat)
    done = seat.stackctl("up", "cpu-throughput", "--model", tiny, "-y")
    assert "cpu is up (generation 2)" in done.stdout
    assert look.container_id(seat) not in ("", first)
    assert look.engine_files(seat) == ["cpu_b.container"]
    second = look.record(seat, 2)
    running = look.argv(seat)
    assert running == second["plan"]["argv"]
    assert running != look.record(seat, 1)["plan"]["argv"]
    assert running[running.index("--ubatch-size") + 1] == "2048"
    states = [look.record(seat, number)["outcome"]["state"] for number in (1, 2)]
    assert states == ["replaced", "ready"]
    # The log of the older generation remains, separate from that of the new one.
    for number in ("1", "2"):
        assert "model loaded" in seat.stackctl("logs", "--generation", number).stdout
    seat.stackctl("down")
    look.assert_clean(seat)


@pytest.mark.deep
def test_a_replacement_is_asked_for_on_a_terminal(seat: Seat, tiny: str) -> None:
    seat.stackctl("up", "cpu-latency", "--model", tiny)
    before = look.container_id(seat)
    line = shlex.join(["stackctl", "up", "cpu-throughput", "--model", tiny])
    words = ("script", "--quiet", "--return", "--command", line, "/dev/null")
    done = seat.run(*words, input="n\n", check=False)
    assert "would be replaced: go on? [y/N]" in done.stdout
    assert "error: nothing was changed" in done.stdout
    assert done.returncode == 1
    assert look.container_id(seat) == before
    assert "Objective=latency\n" in look.unit_text(seat)


def test_a_failed_replacement_brings_the_old_one_back(seat: Seat, tiny: str) -> None:
    seat.stackctl("up", "cpu-latency", "--model", tiny)
    old = look.argv(seat)
    text = look.unit_text(seat)
    done = seat.stackctl("up", "cpu-latency", "--model", tiny, *BROKEN, "-y", code=1)
    look.assert_error(
        done,
        "cpu did not start: llama-server refuses the value of --rope-scaling",
        r"correct it in engine_args\n  log: stackctl logs cpu --generation 2",
    )
    assert re.search(r"^restored +generation 1, ", done.stderr, re.MULTILINE)
    assert look.argv(seat) == old
    assert look.chat(seat)["usage"]["completion_tokens"] > 0
    assert look.unit_text(seat) == text
    assert look.engine_files(seat) == ["cpu.container"]
    states = [look.record(seat, number)["outcome"]["state"] for number in (1, 2)]
    assert states == ["ready", "failed"]
    assert "rope-scaling" in look.record(seat, 2)["outcome"]["message"]
    # The log of the failed generation can still be read.
    shown = seat.stackctl("logs", "--generation", "2").stdout
    assert 'error while handling argument "--rope-scaling"' in shown
    found = json.loads(seat.stackctl("status", "--json").stdout)
    assert [(s["generation"], s["state"]) for s in found["stacks"]] == [(1, "ready")]
    # A number is never used twice.
    seat.stackctl("up", "cpu-throughput", "--model", tiny, "-y", "--soak", "0s")
    assert look.record(seat, 3)["outcome"]["state"] == "ready"
    seat.stackctl("down")
    look.assert_clean(seat)


def test_restart(seat: Seat, tiny: str) -> None:
    seat.stackctl("up", "cpu-latency", "--model", tiny)
    before = look.container_id(seat)
    done = seat.stackctl("restart")
    assert "cpu is up (generation 1, restarted)" in done.stdout
    (stack,) = json.loads(seat.stackctl("restart", "--json").stdout)["stacks"]
    assert (stack["stack"], stack["state"]) == ("cpu", "ready")
    assert look.container_id(seat) not in ("", before)
    seat.stackctl("check")
    # A stop by hand is noticed, and the next ``up`` starts the engine again.
    seat.systemctl("stop", "cpu.service")
    done = seat.stackctl("check", code=3)
    assert done.stdout.startswith("FAIL  unit  inactive")
    done = seat.stackctl("status", code=1)
    assert done.stdout.startswith("cpu   stopped")
    done = seat.stackctl("up", "cpu-latency", "--model", tiny)
    assert "cpu is up (generation 2)" in done.stdout
    seat.stackctl("down")
    look.assert_clean(seat)


def test_a_small_model_is_really_locked(seat: Seat, tiny: str) -> None:
    seat.stackctl("up", "cpu-latency", "--model", tiny)
    decisions = {d["field"]: d["value"] for d in look.record(seat, 1)["plan"]["decisions"]}
    assert decisions["load-mode"] == "mmap+mlock"
    locked = look.process_status(seat.lab, look.engine_pid(seat))["VmLck"]
    assert int(locked.removesuffix(" kB")) > 1300


@pytest.mark.deep
def test_odd_names_come_out_as_they_went_in(seat: Seat, odd: str) -> None:
    served = "a 'served' $HOME %h \"name\" \\ end"
    words = ("--model", f"file:{odd}", "--set", f"served_name={served}", "--name", "odd-1")
    done = seat.stackctl("up", "cpu-latency", *words)
    assert "odd-1 is up (generation 1)" in done.stdout
    running = look.argv(seat, "stackctl-odd-1")
    assert running == look.record(seat, 1, "odd-1")["plan"]["argv"]
    assert running[running.index("--alias") + 1] == served
    assert running[running.index("--model") + 1] == f"/models/{odd.rpartition('/')[2]}"
    assert look.chat(seat)["model"] == served
    shown = look.unit_properties(
        seat, "Description", "RequiresMountsFor", "NeedDaemonReload", unit="odd-1.service"
    )
    assert shown["Description"] == f"stackctl odd-1 (llama.cpp, {served})"
    assert "/srv/odd names" in shown["RequiresMountsFor"]
    assert "$$" not in shown["RequiresMountsFor"]
    done = seat.stackctl("up", "cpu-latency", *words)
    assert "nothing to change" in done.stdout
    seat.stackctl("check", "odd-1")
    seat.stackctl("down")
    look.assert_clean(seat, "odd-1")


@pytest.fixture(scope="module")
def odd(lab: Lab, tiny: str) -> str:
    """Return a model whose folder and file have names that need quoting everywhere."""
    content = lab.run(["base64", tiny.removeprefix("file:")], check=True).stdout
    script = 'mkdir -p "$(dirname "$1")" && base64 --decode >"$1"'
    lab.run(["sh", "-c", script, "sh", ODD_MODEL], input=content, check=True)
    return ODD_MODEL


def test_a_stack_has_a_simple_name(seat: Seat, tiny: str) -> None:
    for name in ("two words", "50%", "$x", 'a"b', "../b", "", "x" * 41):
        done = seat.stackctl("up", "cpu-latency", "--model", tiny, "--name", name, code=2)
        look.assert_error(done, "is not a stack name")
    assert not seat.files(seat.units, seat.state, seat.runtime)


def test_what_is_no_use_is_refused_with_what_helps_before_it_is_there(seat: Seat) -> None:
    words = ("--model", "catalogue:kimi-k2.5-1t-a32b-q4_k_s")
    done = seat.stackctl("up", "cpu-latency", *words, code=5)
    assert "error: cpu-latency does not fit: " in done.stderr
    assert "hint: what helps, best first" in done.stderr
    assert done.stderr.endswith("  --force: start it anyway\n")
    assert "image " not in done.stderr
    look.assert_clean(seat)


def test_two_stacks_side_by_side(seat: Seat, tiny: str) -> None:
    seat.stackctl("up", "cpu-latency", "--model", tiny)
    words = ("--model", tiny, "--name", "second", "--set", "port=8081")
    done = seat.stackctl("up", "cpu-latency", *words)
    # On a machine with few cores both stacks share them, and a warning names the other one.
    shared = look.record(seat, 1, "second")["plan"]["placement"]["shared_with"]
    assert ("warning: cores shared with cpu:" in done.stderr) == (shared == ["cpu"])
    done = seat.stackctl("check", code=2)
    look.assert_error(done, "missing STACK: several stacks are up", "cpu, second")
    found = json.loads(seat.stackctl("status", "--json").stdout)
    assert [stack["stack"] for stack in found["stacks"]] == ["cpu", "second"]
    seat.stackctl("down", "cpu")
    assert look.chat(seat, 8081)["usage"]["completion_tokens"] > 0
    assert look.engine_files(seat) == ["second.container"]
    assert json.loads(seat.stackctl("down", "--json").stdout)["stacks"] == []
    look.assert_clean(seat)


def test_nothing_is_up(seat: Seat) -> None:
    for verb in ("check", "logs", "restart", "down"):
        done = seat.stackctl(verb, code=3)
        look.assert_error(done, "no stack is up", "stackctl up PROFILE")
    done = seat.stackctl("status")
    assert "no " in done.stderr
    assert done.stdout == ""
    found = json.loads(seat.stackctl("status", "--json").stdout)
    assert found["stacks"] == []
    look.assert_clean(seat)


def test_a_killed_engine_is_started_again_and_check_tells(seat: Seat, tiny: str) -> None:
    seat.stackctl("up", "cpu-latency", "--model", tiny)
    before = look.container_id(seat)
    seat.lab.run(["sh", "-c", f"kill -KILL {look.engine_pid(seat)}"], check=True)

    def back() -> bool:
        shown = look.unit_properties(seat, "ActiveState", "NRestarts")
        return shown == {"ActiveState": "active", "NRestarts": "1"}

    look.wait_for("the engine serves again", back)
    assert look.container_id(seat) not in ("", before)
    done = seat.stackctl("check")
    assert re.search(r"^warn  restarts +1$", done.stdout, re.MULTILINE), done.stdout
    (stack,) = json.loads(seat.stackctl("status", "--json").stdout)["stacks"]
    assert (stack["state"], stack["restarts"]) == ("ready", 1)
    # The restarts of the old unit do not make a new start a failure.
    done = seat.stackctl("up", "cpu-throughput", "--model", tiny, "-y", "--soak", "0s")
    assert "cpu is up (generation 2)" in done.stdout
    done = seat.stackctl("check")
    assert "restarts" not in done.stdout
    seat.stackctl("down")
    look.assert_clean(seat)


OLDER = """\
#!/bin/sh
[ "$1" = --version ] && echo "podman version {version}" && exit
exec {podman} "$@"
"""


@pytest.mark.deep
@pytest.mark.parametrize(
    ("version", "argument"),
    [("4.9.3", "--sdnotify=healthy"), ("4.7.2", "--read-only-tmpfs=true")],
)
def test_a_unit_for_an_older_podman(one: Seat, tiny: str, version: str, argument: str) -> None:
    """Keys that its Quadlet lacks are written as podman arguments with the same effect."""
    program = one.run("sh", "-c", "command -v podman").stdout.strip()
    script = OLDER.format(version=version, podman=program)
    look.put(one.lab, "/srv/older-bin/podman", script.encode(), mode=0o755)
    path = {"PATH": "/srv/older-bin:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"}
    # The Quadlet here is newer: it waits for the network, but older ones do not for users' units.
    one.lab.run(["systemctl", "start", "network-online.target"], check=True)
    one.stackctl("up", "cpu-latency", "--model", tiny, env=path)
    one.lab.run(["systemctl", "stop", "network-online.target"], check=True)
    assert f"\nPodmanArgs={argument}\n" in look.unit_text(one)
    assert look.argv(one) == look.record(one, 1)["plan"]["argv"]
    status = look.process_status(one.lab, look.engine_pid(one))
    assert (int(status["CapBnd"], 16), status["NoNewPrivs"]) == (0, "1")
    one.stackctl("check", env=path)
    one.stackctl("down", env=path)
    look.assert_clean(one)
