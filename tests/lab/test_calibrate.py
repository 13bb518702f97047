"""Calibration with the engine's own benchmark, and memory predictions against the real process."""

from __future__ import annotations

import json

import pytest

from . import look
from .conftest import Seat
from .lab import Lab

MODEL = "file:/srv/models/gemma-3-270m-q4_k_m.gguf"
#: On a CPU with AMX llama.cpp makes a second copy of the weights, which plans do not count yet.
ARGUMENTS = ("--set", "engine_args.no-repack=true", *look.ONE_THREAD_AT_ANY_SPEED)


def test_calibration_makes_plans_say_measured(seat: Seat) -> None:
    wish = ("cpu", "--model", MODEL, *look.ONE_THREAD_AT_ANY_SPEED, "--json")
    before = json.loads(seat.stackctl("plan", *wish).stdout)
    assert before["prediction"]["basis"] == "estimated"
    done = seat.stackctl("calibrate", *wish, timeout=400)
    entry = json.loads(done.stdout)
    assert entry["decode_tok_s"] > 0
    assert entry["prefill_tok_s"] > 0
    after = json.loads(seat.stackctl("plan", *wish, code=None).stdout)
    assert after["prediction"]["basis"] == "measured"
    low, high = after["prediction"]["decode_tok_s"]
    # The KV cache of a long prompt lowers the lower bound, so the measured speed is in the range.
    assert low < entry["decode_tok_s"] <= high * 1.01
    seat.assert_nothing_left()


@pytest.mark.deep
@pytest.mark.parametrize("user", ["root"])
@pytest.mark.parametrize("objective", ["latency", "throughput"])
@pytest.mark.parametrize("kv_type", ["f16", "q8_0"])
def test_predicted_memory_is_what_the_engine_takes(
    lab: Lab, seat: Seat, objective: str, kv_type: str
) -> None:
    """The resident size is within 10 %, without the prompt cache, which fills up later."""
    question = " ".join(map(str, range(300)))
    for context in (2048, 8192, 32768):
        seat.stackctl(
            "up", "cpu", "--objective", objective, "--model", MODEL, "--yes",
            "--soak", "0s", "--set", f"context={context}", "--set", f"kv_type={kv_type}",
            *ARGUMENTS,
        )  # fmt: skip
        look.chat(seat, content=question)
        resident = look.process_status(lab, look.engine_pid(seat))["VmRSS"]
        numbers = sorted(int(name) for name in lab.run(
            ["sh", "-c", f"ls {seat.state}/stacks/cpu | sed 's/.json//'"], check=True
        ).stdout.split())  # fmt: skip
        plan = json.loads(lab.read(f"{seat.state}/stacks/cpu/{numbers[-1]}.json"))["plan"]
        cache = next(d["value"] for d in plan["decisions"] if d["field"] == "cache-ram")
        predicted = plan["memory"]["total_bytes"] - cache * 2**20
        actual = int(resident.removesuffix(" kB")) * 1024
        assert predicted == pytest.approx(actual, rel=0.10), (context, objective, kv_type)
    seat.stackctl("down")
    seat.assert_nothing_left()
