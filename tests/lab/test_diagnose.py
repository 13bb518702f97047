"""``diagnose``, ``metrics`` and ``top`` of a real llama-server with real requests."""

from __future__ import annotations

import json
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from . import look
from .conftest import Seat
from .lab import Lab

URL = f"http://127.0.0.1:{look.PORT}"
CLIENT = "/tmp/client.py"


@pytest.fixture(scope="module")
def served(lab: Lab, tiny: str) -> Iterator[Seat]:
    """Yield a user whose stack is up and has answered only its own checks."""
    seat = Seat(lab, "lab")
    try:
        seat.stackctl("up", "cpu-latency", "--model", tiny, "--set", "context=2048")
        look.put(lab, CLIENT, (Path(__file__).parent / "client.py").read_bytes())
        yield seat
    finally:
        seat.reset()


@pytest.fixture
def loaded(served: Seat) -> Iterator[Seat]:
    """Yield the user while three clients send requests to an engine that serves one at a time."""
    words = ["python3", CLIENT, URL, "60", "3", "300"]
    with served.lab.spawn(words, user=served.user) as client:
        try:
            assert client.stdout is not None
            assert client.stdout.readline() == "asking\n"
            look.wait_for(
                "an answer", lambda: "release" in served.stackctl("logs", "-n", "5").stdout
            )
            yield served
        finally:
            client.kill()


def results(seat: Seat, *words: str) -> dict[str, dict[str, object]]:
    """Run ``diagnose`` and return its results by name."""
    found = json.loads(seat.stackctl("diagnose", "--json", *words).stdout)
    assert next(iter(found)) == "schema"
    assert found["schema"] == "stackctl.diagnose/1"
    order = [result["status"] for result in found["results"]]
    assert order == sorted(order, key=["fail", "warn", "ok", "info"].index)
    return {result["name"]: result for result in found["results"]}


def test_nothing_is_wrong_with_what_idles(served: Seat) -> None:
    started = time.monotonic()
    found = results(served, "cpu", "--since", "1s")
    # There is no load to watch.
    assert time.monotonic() - started < 10
    assert not {"hang", "queueing", "kv-pressure"} & {
        name for name, result in found.items() if result["status"] in ("warn", "fail")
    }
    assert found["queueing"]["actual"] == "0 waiting"
    text = served.stackctl("diagnose").stdout
    assert "queue (0 waiting)" in " ".join(text.split())
    # Lines with commands are never wrapped.
    prose = [line for line in text.splitlines() if not line.lstrip().startswith("stackctl ")]
    assert max(map(len, prose)) <= 80


def test_requests_that_wait_for_others_are_named(loaded: Seat) -> None:
    found = results(loaded)
    queue = found["queueing"]
    assert queue["status"] == "warn"
    assert re.search(r"[1-9] waiting at most", str(queue["actual"]))
    assert "stackctl switch throughput --stack cpu" in str(queue["remedy"])
    assert found["kv-pressure"]["status"] == "ok", found["kv-pressure"]
    assert "hang" not in found


def test_metrics_of_what_works(loaded: Seat) -> None:
    text = loaded.stackctl("metrics").stdout
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if line[0] != "#")
    assert values['stackctl_up{stack="cpu"}'] == "1"
    assert values['stackctl_generation{stack="cpu"}'] == "1"
    assert 0 < float(values['stackctl_kv_cache_usage_ratio{stack="cpu"}']) <= 1
    assert float(values['stackctl_time_to_first_token_seconds_count{stack="cpu"}']) >= 1
    assert values == values | dict(
        line.rsplit(" ", 1)
        for line in loaded.stackctl("metrics", "--all").stdout.splitlines()
        if line.startswith("stackctl_stack_info")
    )
    report = json.loads(loaded.stackctl("metrics", "--json").stdout)
    assert report["schema"] == "stackctl.metrics/1"
    assert report["stacks"][0]["numbers"]["running"] == 1


def test_top_tells_the_speed(loaded: Seat) -> None:
    head, _, row = loaded.stackctl("top", "--once").stdout.splitlines()
    assert head.split()[:4] == ["STACK", "IN", "OUT", "RUN"]
    assert len(row) <= 80
    cells = row.split()
    assert cells[0] == "cpu"
    assert float(cells[2]) > 0  # tokens a second
    # One is served. A request that an earlier test left may still wait with ours.
    assert cells[3] == "1"
    assert int(cells[4]) >= 1
    assert cells[5].startswith("~")


def test_top_ends_with_ctrl_c(served: Seat) -> None:
    words = ["stackctl", "top", "--interval", "0.2s"]
    with served.lab.spawn(words, user=served.user) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("STACK")
        process.stdout.readline()
        assert process.stdout.readline().startswith("cpu ")
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=10)
    assert (process.returncode, err) == (130, "")


def test_what_is_not_up(lab: Lab) -> None:
    seat = Seat(lab, "root")
    for verb in ("diagnose", "metrics", "top"):
        look.assert_error(seat.stackctl(verb, code=3), "no stack is up", "stackctl up")
        look.assert_error(seat.stackctl(verb, "nothing", code=4), "no stack named nothing")
