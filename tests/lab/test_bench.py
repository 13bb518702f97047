"""``stackctl bench`` on a real llama-server, through the front door and its API key."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Iterator
from typing import Any

import pytest

from . import look
from .conftest import Seat
from .lab import Lab
from .test_switch import needs_a_door

__all__ = ["needs_a_door"]

UP = (
    *("up", "cpu-latency", "--yes", "--soak", "0s"), *look.ONE_THREAD,
    *("--set", "api_key=true", "--model"),
)  # fmt: skip
#: Short enough to run in seconds, long enough to measure a speed.
SHORT = ("--prompt", "256", "--output", "32", "--requests", "2")
#: Some 15 s of requests. After WELL tokens some are answered; the warm-up generates 72.
LONG = ("bench", "--prompt", "64", "--output", "32", "--requests", "200")
WELL = 200


@pytest.fixture(scope="module")
def seat(lab: Lab, tiny: str) -> Iterator[Seat]:
    """Yield a user whose stack serves all tests of this module."""
    place = Seat(lab, "lab")
    try:
        place.stackctl(*UP, tiny, "--set", "slo.ttft_s=6000")
        yield place
    finally:
        place.reset()


def bench(seat: Seat, *words: str, code: int | None = 0) -> dict[str, Any]:
    """Run a bench and return its document."""
    done = seat.stackctl("bench", *words, "--json", code=code, timeout=500)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def generated(seat: Seat) -> int:
    """Return the tokens that the engine has generated since its start, or 0 without an engine."""
    port = look.record(seat, 1)["plan"]["engine_port"]
    said = seat.run("curl", "-s", f"http://127.0.0.1:{port}/metrics", check=False).stdout
    found = re.search(r"^llamacpp:tokens_predicted_total (\S+)", said, re.M)
    return int(float(found[1])) if found else 0


def test_a_run_is_measured_stored_shown_and_compared(seat: Seat) -> None:
    before = look.record(seat, 1)["plan"]
    first = bench(seat, "--quick")
    assert next(iter(first)) == "schema" and first["schema"] == "stackctl.bench/1"
    assert (first["id"], first["stack"], first["generation"]) == (1, "cpu", 1)
    assert (first["complete"], first["lengths"]) == (True, "tokenizer")
    plain, cached = first["cells"][0], first["cells"][-1]
    for cell in (plain, cached):
        assert (cell["requests"] >= 1, cell["failed"]) == (True, 0)
        # The engine counts the requested tokens, including the chat template. At the border of text
        # and template there may be one token more or less.
        assert cell["prompt_tokens"] == pytest.approx(512, abs=1)
        assert cell["output_tokens"] == 64
        # The weights are random: some answers contain no two letters of text.
        assert cell["ttft_s"]["n"] <= cell["requests"] == cell["e2e_s"]["n"]
    assert plain["shape"] == {
        "prompt_tokens": 512, "output_tokens": 64, "concurrency": 1, "cached": False
    }  # fmt: skip
    # With a shared prefix nearly all tokens were in the cache, without it almost none.
    assert cached["cached_tokens"] >= 400
    assert plain["cached_tokens"] <= 40
    if plain["generation_tok_s"]:
        factor = plain["generation_tok_s"]["p50"] / (before["model"]["parameters"] / 1e9)
        assert plain["performance_factor"] == pytest.approx(factor)
    words = ["--prompt", "512", "--output", "64", "--requests", "2", "--prefix", "uncached"]
    second = bench(seat, *words, "--concurrency", "1,2")
    assert [cell["shape"]["concurrency"] for cell in second["cells"]] == [1, 2]
    assert [cell["requests"] for cell in second["cells"]] == [2, 2]
    listed = json.loads(seat.stackctl("bench", "list", "--json").stdout)
    assert listed["schema"] == "stackctl.benches/1"
    assert [(run["id"], run["cells"]) for run in listed["runs"]] == [
        (2, 2), (1, len(first["cells"]))
    ]  # fmt: skip
    assert json.loads(seat.stackctl("bench", "show", "1", "--json").stdout) == first
    compared = json.loads(seat.stackctl("bench", "compare", "1", "2", "--json").stdout)
    assert {"ttft_s", "e2e_s"} <= {one["figure"] for one in compared["differences"]}
    assert [shape["concurrency"] for shape in compared["only_after"]] == [2]
    assert compared["differs"] == []
    text = "".join(
        seat.stackctl("bench", *words).stdout for words in (["list"], ["show", "2"],
                                                            ["compare", "1", "2"])
    )  # fmt: skip
    assert max(len(line) for line in text.splitlines()) <= 100
    path = f"{seat.state}/benches.sqlite"
    assert seat.lab.run(["stat", "-c", "%a", path]).stdout.strip() == "600"
    # The results do not contain the key.
    key = seat.stackctl("key", "show").stdout.strip()
    assert key not in text + json.dumps([first, second, listed, compared])
    assert seat.lab.run(["grep", "-cF", key, path]).returncode == 1
    # The page shows the newest run, and clients get the measured speeds.
    folder = seat.run("mktemp", "-d").stdout.strip()
    page = f"{folder}/page.html"
    assert seat.stackctl("report", "--output", page).stdout.strip() == page
    html = seat.run("cat", page).stdout
    assert "<td>bench 2, " in html
    assert html.count("<svg") >= 2
    assert key not in html
    seat.run("sh", "-c", f"echo mine > {page}")
    look.assert_error(seat.stackctl("report", "-o", page, code=5), "not a report", "-o FILE")
    assert seat.run("cat", page).stdout == "mine\n"
    told = json.loads(seat.stackctl("client", "aider", "--json").stdout)
    assert told["speeds"]["source"] == "measured"
    seat.run("rm", "-r", folder)


def test_ctrl_c_keeps_what_was_measured(seat: Seat) -> None:
    runs = json.loads(seat.stackctl("bench", "list", "--json").stdout)["runs"]
    begun = generated(seat)
    with seat.lab.spawn(["stackctl", *LONG], user=seat.user) as process:
        look.wait_for("some answers", lambda: generated(seat) > begun + WELL, step=0.2)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    number = runs[0]["id"] + 1 if runs else 1
    assert f"interrupted: the results so far are bench {number}" in err
    assert re.search(rf"^bench {number} · cpu generation 1", out, re.M)
    kept = json.loads(seat.stackctl("bench", "show", str(number), "--json").stdout)
    assert kept["complete"] is False
    (cell,) = kept["cells"]
    assert cell["failed"] == 0 and 2 <= cell["requests"] < 200
    # The lock of the interrupted run is free.
    bench(seat, "--prompt", "64", "--output", "16", "--requests", "1", "--prefix", "uncached")


@pytest.mark.deep
def test_an_engine_that_is_killed_costs_the_requests_that_it_served(seat: Seat) -> None:
    begun, pid = generated(seat), look.engine_pid(seat)
    words = ["stackctl", *LONG[:-1], "5000", "--prefix", "uncached", "--json"]
    with seat.lab.spawn(words, user=seat.user) as process:
        look.wait_for("some answers", lambda: generated(seat) > begun + WELL, step=0.2)
        seat.lab.run(["kill", "-9", str(pid)], check=True)
        look.wait_for("its end", lambda: generated(seat) < begun)
        # The front door holds the next requests until systemd has started the engine again.
        look.wait_for("others", lambda: generated(seat) > WELL, step=0.2)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    (cell,) = json.loads(out)["cells"]
    # The running request, and at most one that arrived at the same moment.
    assert cell["failed"] in (1, 2) and 3 <= cell["requests"] < 5000


@pytest.mark.deep
def test_one_at_a_time(seat: Seat) -> None:
    with seat.lab.spawn(["stackctl", *LONG[:-1], "5000"], user=seat.user) as process:
        lock = f"{seat.runtime}/bench.lock"
        look.wait_for("the lock", lambda: look.exists(seat.lab, lock))
        done = seat.stackctl("bench", "--quick", code=7)
        look.assert_error(done, "another stackctl is at work here: process .*bench cpu")
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
    assert process.returncode == 130


def test_the_slo_decides(seat: Seat, tiny: str) -> None:
    folder = f"{seat.lab.home(seat.user)}/.config/stackctl/profiles"
    seat.run("mkdir", "-p", folder)

    def wanted(slo: str) -> None:
        text = f"extends: cpu\nobjective: latency\nmodel: {tiny}\nobjectives:\n  latency:\n"
        seat.lab.write(f"{folder}/cpu-mine.yaml", f"{text}    slo: {{{slo}}}\n", user=seat.user)

    wanted("prompt_tokens: 256, ttft_s: 6000.0, min_prefix_hits: 0.5")
    words = ("--yes", "--soak", "0s", *look.ONE_THREAD, "--set", "engine_args.temp=0.5")
    seat.stackctl("up", "cpu-mine", *words)
    done = seat.stackctl("check", "--slo")
    assert "generation 2 was not measured yet" in done.stdout
    assert "stackctl bench cpu --quick" in done.stdout
    found = bench(seat, *SHORT)
    verdicts = {result["name"]: result["status"] for result in found["results"]}
    # A model as small as this one can be faster than the client of a busy machine.
    verdicts.pop("client", None)
    assert verdicts == {"slo-ttft": "ok", "slo-prefix": "ok", "requests": "ok"}
    # The SLO may be changed while the stack runs. No engine can reach this one.
    wanted("prompt_tokens: 256, ttft_s: 0.000001, itl_ms: 6000.0, min_prefix_hits: 0.5")
    done = seat.stackctl("check", "--slo", "--json", code=1)
    results = {r["name"]: r for r in json.loads(done.stdout)["results"]}
    assert (results["answer"]["status"], results["slo-ttft"]["status"]) == ("ok", "fail")
    assert results["slo-ttft"]["evidence"].startswith(f"bench {found['id']} of ")
    assert results["slo-itl"]["status"] == "ok"
    # llama.cpp counts cached tokens, and has no histograms.
    assert "slo-prefix-engine" in results and "slo-itl-engine" not in results
    missed = bench(seat, *SHORT[:4], "--requests", "2", "--prefix", "uncached", code=1)
    assert (missed["results"][0]["name"], missed["results"][0]["status"]) == ("slo-ttft", "fail")
    # Without --slo the check succeeds.
    seat.stackctl("check")


def test_what_does_not_run_is_not_measured(seat: Seat) -> None:
    seat.systemctl("stop", look.engine_unit(seat))
    look.assert_error(seat.stackctl("bench", "--quick", code=3), "cpu is not up")
    look.assert_error(seat.stackctl("bench", "cpu", "--quick", code=3), "cpu is not up")
    seat.stackctl("down")
    look.assert_error(seat.stackctl("bench", code=3), "no stack is up")
    # The stored runs remain.
    assert json.loads(seat.stackctl("bench", "list", "--json").stdout)["runs"]
    look.assert_error(seat.stackctl("bench", "list", "other", code=4), "other")
    seat.run("rm", f"{seat.state}/benches.sqlite")
    look.assert_clean(seat)
