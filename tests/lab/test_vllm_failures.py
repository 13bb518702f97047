"""Failing starts of the real vLLM: cause, evidence, remedy, exit code, and a clean machine."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from . import look
from .conftest import Seat
from .lab import CHECKPOINT_PATH, Lab

UNIT = "cpu-vllm.service"
PORT = 8085
#: Compiling does not matter for these failures.
EAGER = ("--set", "engine_args.enforce-eager=true", "--soak", "1s")
LIMIT_S = 400
pytestmark = pytest.mark.deep


@pytest.fixture
def one(vllm_lab: Lab) -> Iterator[Seat]:
    """Yield an ordinary user of the lab with vLLM."""
    seat = Seat(vllm_lab, "lab")
    yield seat
    seat.reset()


def up(seat: Seat, *words: str, model: str = CHECKPOINT_PATH, code: int = 1) -> str:
    """Run ``up`` and return its stderr."""
    all_words = ("up", "cpu-vllm", "--model", f"dir:{model}", "--yes", *EAGER, *words)
    return seat.stackctl(*all_words, code=code, timeout=LIMIT_S).stderr


def changed_checkpoint(seat: Seat, name: str, **changes: object) -> str:
    """Return a copy of the checkpoint with other values in its config.json."""
    folder = f"{seat.lab.home(seat.user)}/{name}"
    seat.run("cp", "-r", CHECKPOINT_PATH, folder)
    seat.run("chmod", "-R", "u+w", folder)
    config = json.loads(seat.run("cat", f"{folder}/config.json").stdout)
    text = json.dumps({**config, **changes})
    seat.run("sh", "-c", f"cat >{folder}/config.json", input=text)
    return folder


def assert_clean(seat: Seat) -> None:
    """Check that nothing runs, is installed or listens."""
    seat.assert_nothing_left()
    assert not look.processes(seat.lab, "vllm")
    assert not look.listening(seat.lab, PORT)


def test_a_context_longer_than_the_model(one: Seat) -> None:
    said = up(one, "--set", "engine_args.max-model-len=100000")
    assert "the context of 100000 is longer than the model was made for" in said
    assert "hint: --set context=2048" in said
    assert_clean(one)


def test_a_cache_too_small_for_one_request_and_auto_fit(one: Seat) -> None:
    small = ("--set", "engine_args.kv-cache-memory-bytes=524288")
    said = up(one, *small)
    assert "error: cpu-vllm did not start: the KV cache does not hold one request" in said
    assert "hint: --set context=" in said
    assert_clean(one)
    said = up(one, *small, "--auto-fit", code=0)
    assert "(--auto-fit)" in said
    planned = look.record(one, max(numbers(one)), "cpu-vllm")
    context = planned["profile"]["context"]
    assert 0 < context < 2048
    assert f"context={context}" in planned["asked"]["sets"]
    facts = {fact["name"]: fact["value"] for fact in planned["outcome"]["report"]}
    assert int(facts["kv_cache_tokens"]) >= context
    one.stackctl("down", "cpu-vllm")


def test_checkpoints_that_are_wrong(one: Seat) -> None:
    said = up(one, model="/srv/models/none")
    assert "/srv/models/none" in said
    broken = changed_checkpoint(one, "broken")
    one.run("sh", "-c", f"echo '{{' >{broken}/config.json")
    said = up(one, model=broken)
    assert "broken/config.json" in said
    unknown = changed_checkpoint(one, "unknown", architectures=["NopeForCausalLM"])
    said = up(one, model=unknown)
    assert "does not know the model's architecture ['NopeForCausalLM']" in said
    assert "hint: a newer image" in said
    dumb = changed_checkpoint(one, "dumb")
    one.run("sh", "-c", f"rm {dumb}/tokenizer*")
    said = up(one, model=dumb)
    assert "did not start: " in said
    assert "tokenizer" in said
    assert_clean(one)


def test_the_port_is_taken(one: Seat) -> None:
    with one.lab.spawn(["python3", "-m", "http.server", str(PORT)], user="root") as other:
        look.wait_for("a listener", lambda: bool(look.listening(one.lab, PORT)))
        said = up(one)
        other.terminate()
        other.wait(timeout=10)
    assert f"port {PORT} is taken by" in said
    assert f"--set port={PORT + 1}" in said
    one.assert_nothing_left()


def test_killed_while_it_loads(one: Seat) -> None:
    words = ["stackctl", "up", "cpu-vllm", "--model", f"dir:{CHECKPOINT_PATH}", *EAGER]
    with one.lab.spawn(words, user=one.user) as start:
        look.wait_for("the engine core", lambda: bool(cores(one)), LIMIT_S, step=0.5)
        one.lab.run(["kill", "-KILL", str(cores(one)[0])], check=True)
        said = start.communicate(timeout=LIMIT_S)[1]
        assert start.returncode == 1, said
    assert "the engine core was killed" in said
    assert_clean(one)


def test_the_engine_core_dies_after_it_was_ready(one: Seat) -> None:
    up(one, code=0)
    look.wait_for("the engine core", lambda: bool(cores(one)))
    first = cores(one)[0]
    one.lab.run(["kill", "-KILL", str(first)], check=True)
    # Its parent ends, or answers 503 until the health check kills it. Then systemd starts it again.
    look.wait_for(
        "another core", lambda: bool(cores(one)) and cores(one)[0] != first, LIMIT_S, step=1
    )
    look.wait_for("it serves", lambda: one.stackctl("check", code=None).returncode == 0, LIMIT_S)
    shown = json.loads(one.stackctl("status", "--json").stdout)["stacks"][0]
    assert shown["restarts"] == 1, one.journal("--lines=200")
    one.stackctl("down", "cpu-vllm")
    assert_clean(one)


def cores(seat: Seat) -> list[int]:
    """Return the process numbers of vLLM's engine core in the lab's PID namespace.

    It is a child of the API server. Its title is VLLM::EngineCore, but sometimes setproctitle fails
    and the process keeps the command line of multiprocessing.
    """
    found = []
    for server in _pgrep(seat, "-f", "^/usr/bin/python3 /usr/local/bin/vllm serve"):
        found += _pgrep(seat, "-P", str(server), "-f", "^VLLM::EngineCore|import spawn_main")
    return found


def _pgrep(seat: Seat, *words: str) -> list[int]:
    done = seat.lab.run(["pgrep", *words])
    assert not done.stderr, done.stderr
    return [int(line) for line in done.stdout.split()]


def numbers(seat: Seat) -> list[int]:
    """Return the numbers of the stack's generations."""
    listed = json.loads(seat.stackctl("history", "cpu-vllm", "--json").stdout)
    return [entry["number"] for entry in listed["generations"]]
