"""The real vLLM on the CPU: from a profile to a sensible answer, and down again."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from . import look
from .conftest import Seat
from .lab import CHECKPOINT_PATH, Lab

PORT = 8085
UP = ("up", "cpu-vllm", "--model", f"dir:{CHECKPOINT_PATH}")
#: Without compiling, a start takes half the time.
EAGER = ("--set", "engine_args.enforce-eager=true")


def compiled(seat: Seat) -> set[str]:
    """Return the compiled kernels, by path and time."""
    words = ["find", f"{seat.cache}/compiled", "-name", "*.so", "-printf", "%p %T@\\n"]
    return set(seat.run(*words).stdout.splitlines())


@pytest.mark.parametrize(
    ("user", "compiles"),
    [
        ("lab", False),
        pytest.param("lab", True, marks=pytest.mark.deep),
        pytest.param("root", True, marks=pytest.mark.deep),
    ],
)
def test_the_acceptance_line(vllm_lab: Lab, user: str, compiles: bool) -> None:
    seat = Seat(vllm_lab, user)
    try:
        _serve(seat, *(() if compiles else EAGER))
        if compiles:
            _serve_again(seat)
    finally:
        seat.reset()


def _verify(seat: Seat) -> None:
    """Check the results of ``verify`` for three processes, of which one computes."""
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
    # The processes use loopback ports among themselves. No other process can listen on them.
    engine = f"127.0.0.1:{plan['engine_port'] or PORT}"
    assert re.match(
        rf"{engine}( and 127\.0\.0\.1:{PORT})?(; \d+ more on loopback|$)",
        results["ports"]["actual"],
    )


def _told_of(seat: Seat) -> None:
    """Check that diagnose, metrics and top read a real vLLM and its log."""
    look.wait_for(
        "a line of speed in its log",
        lambda: "Avg generation throughput" in seat.stackctl("logs", "--generation", "1").stdout,
        step=1,
    )
    report = json.loads(seat.stackctl("diagnose", "cpu-vllm", "--json").stdout)
    assert (report["engine"], report["windows"] >= 1) == ("vllm", True)
    found = {result["name"]: result for result in report["results"]}
    assert found["kv-pressure"]["status"] == "ok"
    assert "hang" not in found
    stack: dict[str, Any] = {}

    def all_have_ended() -> bool:
        """Return True if no request is running; the health check sends some of its own."""
        nonlocal stack
        stack = _metrics(seat)
        return bool(stack["numbers"]["ttft"]["count"] == stack["numbers"]["finished"])

    look.wait_for("no request is under way", all_have_ended, step=0.5)
    numbers = stack["numbers"]
    assert numbers["generation_tokens"] >= 1
    assert numbers["finished"] >= 1
    assert numbers["kv_capacity_tokens"] > 1000
    assert (numbers["estimates"], stack["ttft"]) == ([], None)
    row = seat.stackctl("top", "cpu-vllm", "--once").stdout.splitlines()[-1]
    assert row.split()[0] == "cpu-vllm"
    assert "~" not in row


def _metrics(seat: Seat) -> dict[str, Any]:
    """Return the stack's entry in ``metrics``."""
    (stack,) = json.loads(seat.stackctl("metrics", "cpu-vllm", "--json").stdout)["stacks"]
    found: dict[str, Any] = stack
    return found


def _measured(seat: Seat) -> None:
    """Check that prompts and answers of a bench have exact lengths by vLLM's tokenizer."""
    words = ["--prompt", "200", "--output", "64", "--requests", "2", "--prefix", "uncached"]
    found = json.loads(seat.stackctl("bench", "cpu-vllm", *words, "--json", timeout=200).stdout)
    (cell,) = found["cells"]
    assert (found["lengths"], cell["failed"], cell["output_tokens"]) == ("tokenizer", 0, 64)
    assert cell["prompt_tokens"] == pytest.approx(200, abs=1)


def _serve(seat: Seat, *words: str) -> None:
    """Start the stack from its profile, request an answer, and stop the stack."""
    # Variables that an image or a user sets for all containers do not replace the plan's: 1 GiB,
    # not 3.
    seat.lab.write(
        "/etc/containers/containers.conf.d/cache.conf",
        '[containers]\nenv = ["VLLM_CPU_KVCACHE_SPACE=3"]\n',
    )
    done = seat.stackctl(*UP, *words, timeout=600)
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
    _told_of(seat)
    _measured(seat)
    find = ["find", seat.cache, "-maxdepth", "2", "-type", "d", "-printf", "%m %u\\n"]
    assert set(seat.run(*find).stdout.splitlines()) == {f"700 {seat.user}"}
    seat.stackctl("down", "cpu-vllm")
    seat.assert_nothing_left()


def _serve_again(seat: Seat) -> None:
    """Start again with the compiled kernels and measured sizes of the first start."""
    kernels = compiled(seat)
    assert kernels
    # The kernels are kept for the image, so the compiler does not run again. (This vLLM for CPUs
    # stores the graph itself but cannot load it; that costs seconds of Python, without the
    # compiler.)
    seat.stackctl(*UP, timeout=600)
    assert compiled(seat) == kernels
    # The next plan uses the measured sizes, which are no reason for another start.
    (told,) = (
        decision
        for decision in look.record(seat, 2, "cpu-vllm")["plan"]["decisions"]
        if decision["field"] == "kv-cache-memory-bytes"
    )
    assert told["source"] == "measured"
    assert told["reason"].endswith("vLLM measured 2,097,152 tokens of KV cache in generation 1")
    assert "nothing to change (generation 2)" in seat.stackctl(*UP).stdout
    planned = seat.stackctl("plan", *UP[1:], "--explain").stdout
    assert "in generation 2" in " ".join(planned.split())
    seat.stackctl("down", "cpu-vllm")
    seat.assert_nothing_left()
    # Renamed to the cache of another image, which is no longer used.
    (used,) = (path for path in seat.run("ls", f"{seat.cache}/compiled").stdout.split())
    seat.run("mv", f"{seat.cache}/compiled/{used}", f"{seat.cache}/compiled/0123456789ab")
    pruned = seat.stackctl("prune", "cpu-vllm", "--yes").stdout
    assert re.search(r"^removed the compiled code of 1 image \(.+ [KM]iB\)$", pruned, re.MULTILINE)
    assert not seat.run("ls", f"{seat.cache}/compiled").stdout
    volumes = seat.run("podman", "volume", "ls", "--quiet").stdout
    assert not volumes.strip()
