"""vLLM for real, on the CPU: from a profile to a sane answer, and back."""

from __future__ import annotations

import json
import re

import pytest

from . import look
from .conftest import Seat
from .lab import CHECKPOINT_PATH, STORE_USERS, Lab

PORT = 8085
UP = ("up", "cpu-vllm", "--model", f"dir:{CHECKPOINT_PATH}")


def compiled(seat: Seat) -> set[str]:
    """The kernels that the compiler has made, by path and time."""
    folder = "/var/cache" if seat.user == "root" else f"{seat.lab.home(seat.user)}/.cache"
    words = ["find", f"{folder}/stackctl/compiled", "-name", "*.so", "-printf", "%p %T@\\n"]
    return set(seat.run(*words).stdout.splitlines())


@pytest.mark.parametrize("user", STORE_USERS)
def test_the_acceptance_line(vllm_lab: Lab, user: str) -> None:
    seat = Seat(vllm_lab, user)
    try:
        _serve_twice(seat)
    finally:
        seat.reset()


def _verify(seat: Seat) -> None:
    """What verify sees of three processes, of which one computes."""
    done = seat.stackctl("verify", "cpu-vllm", "--json", code=None)
    results = {result["name"]: result for result in json.loads(done.stdout)["results"]}
    wrong = {name: one for name, one in results.items() if one["status"] in ("fail", "skip")}
    assert not wrong, wrong
    plan = look.record(seat, 1, "cpu-vllm")["plan"]
    assert results["environment"]["actual"] == f"as planned ({len(plan['environment'])} variables)"
    assert results["cpus"]["actual"].startswith(f"{plan['placement']['cpus']}, ")
    assert results["kv-cache"]["actual"].startswith("1 GiB, ")
    assert results["device"]["actual"] == "cpu"
    assert results["context"]["actual"] == plan["argv"][plan["argv"].index("--max-model-len") + 1]
    # Its processes talk to each other over loopback; nobody else can listen there with them.
    engine = f"127.0.0.1:{plan['engine_port'] or PORT}"
    assert re.match(
        rf"{engine}( and 127\.0\.0\.1:{PORT})?(; \d+ more on loopback|$)",
        results["ports"]["actual"],
    )


def _serve_twice(seat: Seat) -> None:
    done = seat.stackctl(*UP, timeout=300)
    assert "cpu-vllm is up (generation 1)" in done.stdout
    for step in ("model", "image", "plan", "unit", "ready", "answer"):
        assert re.search(rf"^{step} ", done.stderr, re.MULTILINE), step
    answer = look.chat(seat, PORT)
    assert answer["choices"][0]["message"]["content"].strip()
    checked = seat.stackctl("check", "cpu-vllm").stdout
    assert {line.split()[0] for line in checked.splitlines()} == {"ok"}
    _verify(seat)
    port = look.record(seat, 1, "cpu-vllm")["plan"]["engine_port"] or PORT
    metrics = seat.run("curl", "-sS", "--fail", f"http://127.0.0.1:{port}/metrics").stdout
    assert re.search(r"^vllm:generation_tokens_total\{.*\} [1-9]", metrics, re.MULTILINE)
    kernels = compiled(seat)
    assert kernels
    seat.stackctl("down", "cpu-vllm")
    seat.assert_nothing_left()
    # Kept for the image: the next start compiles nothing again. (The graph itself this vLLM, built
    # for CPUs, stores and cannot load; that is seconds of Python, and the compiler is not called.)
    seat.stackctl(*UP, timeout=300)
    assert compiled(seat) == kernels
    seat.stackctl("down", "cpu-vllm")
    seat.assert_nothing_left()
    volumes = seat.run("podman", "volume", "ls", "--quiet").stdout
    assert not volumes.strip()
