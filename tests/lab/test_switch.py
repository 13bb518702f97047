"""Switch, rollback and their failures: the answers to clients, and the state afterwards."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from . import look
from .conftest import Seat, both_users
from .lab import STORE_USERS, Lab

HERE = Path(__file__).parent
UP = ("up", "cpu-latency", "--model")
#: More than half of the memory of the machine: two of these do not fit at once.
LARGE = ("--set", "engine_args.cache-ram={mib}")
QUICK = ("--yes", "--soak", "1s")


@pytest.fixture(autouse=True)
def needs_a_door(lab: Lab) -> None:
    """Skip the tests if a root tree from elsewhere has no HAProxy. Our own lab always has it."""
    for user in STORE_USERS:
        if lab.load_door(user) is None:
            pytest.skip("this root tree brings no HAProxy, and none can be built for it")


class Load:
    """A client that sends requests in the lab."""

    def __init__(self, seat: Seat, threads: int = 2) -> None:
        """Send requests to the stack's endpoint until the result is read."""
        look.put(seat.lab, "/srv/client.py", (HERE / "client.py").read_bytes())
        words = ["python3", "/srv/client.py", f"http://127.0.0.1:{look.PORT}", "300"]
        self.process = seat.lab.spawn([*words, str(threads)], user=seat.user)
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "asking\n"

    def result(self) -> dict[str, Any]:
        """Stop the client and return the outcome of its requests, after all have ended."""
        self.process.terminate()
        out, err = self.process.communicate(timeout=240)
        assert self.process.returncode == 0, err
        found: dict[str, Any] = json.loads(out.splitlines()[-1])
        assert found["answered"] > 0, found
        return found


@contextlib.contextmanager
def load(seat: Seat) -> Iterator[Load]:
    """Run a client until the end of the block, also after an error."""
    client = Load(seat)
    try:
        yield client
    finally:
        if client.process.poll() is None:
            client.process.kill()
            client.process.communicate()


def large(seat: Seat) -> tuple[str, ...]:
    """Return options that make a plan too large to run twice at the same time."""
    found = json.loads(seat.stackctl("probe", "--json").stdout)["memory"]
    total = min(found["total_bytes"], found.get("limit_bytes") or found["total_bytes"])
    return tuple(word.format(mib=int(total * 0.6) // 2**20) for word in LARGE)


def generation(seat: Seat) -> int:
    """Return the serving generation; check that no other is left."""
    (stack,) = json.loads(seat.stackctl("status", "--json").stdout)["stacks"]
    assert (stack["state"], stack["drift"]) == ("ready", [])
    names = seat.run("podman", "ps", "--all", "--format", "{{.Names}}").stdout.split()
    container = look.record(seat, stack["generation"])["units"]["container"]
    assert sorted(names) == sorted([container, "stackctl-cpu_door"])
    assert not look.exists(seat.lab, f"{seat.state}/transaction.json")
    number: int = stack["generation"]
    return number


@both_users
def test_switch_and_back_by_objective_and_by_profile(seat: Seat, tiny: str) -> None:
    seat.stackctl(*UP, tiny)
    done = seat.stackctl("switch", "throughput", *QUICK)
    assert "cpu is up (generation 2)" in done.stdout
    assert re.search(r"^cpu: cpu-latency \(latency, tiny\) -> .*throughput", done.stderr, re.M)
    assert re.search(r"^  parallel +1 +-> 4$", done.stderr, re.MULTILINE)
    assert "side by side: both fit" in done.stderr
    assert generation(seat) == 2
    record = look.record(seat, 2)
    assert (record["operation"], record["strategy"]["value"]) == ("switch", "side by side")
    assert {"name": "slots", "value": "4"} in record["outcome"]["report"]
    # The model of ``up`` stays, also for a profile without a model.
    done = seat.stackctl("switch", "cpu-latency", *QUICK)
    assert generation(seat) == 3
    assert look.record(seat, 3)["plan"]["objective"] == "latency"
    assert look.record(seat, 2)["outcome"]["state"] == "replaced"
    done = seat.stackctl("switch", "latency", *QUICK)
    assert "nothing to change (generation 3)" in done.stdout
    look.assert_error(seat.stackctl("switch", "demo", *QUICK, code=2), "stack of its own, demo")
    look.assert_error(seat.stackctl("switch", "nothing", *QUICK, code=4), "no profile named")
    look.assert_error(seat.stackctl("switch", "throughput", code=2), "would be replaced", "--yes")
    assert generation(seat) == 3
    seat.stackctl("down")
    look.assert_clean(seat)
    look.assert_error(seat.stackctl("switch", "latency", code=3), "no stack is up")


def test_rollback_reinstalls_what_was_stored(seat: Seat, tiny: str) -> None:
    seat.stackctl(*UP, tiny)
    first = look.argv(seat)
    seat.stackctl("switch", "throughput", *QUICK)
    seat.stackctl(*UP, tiny, "--set", "context=1024", *QUICK)
    done = seat.stackctl("rollback", *QUICK)
    assert "cpu is up (generation 4)" in done.stdout
    record = look.record(seat, 4)
    assert (record["operation"], record["of"]) == ("rollback", 2)
    assert record["plan"] == look.record(seat, 2)["plan"]
    done = seat.stackctl("rollback", "1", *QUICK)
    assert generation(seat) == 5
    assert look.argv(seat, look.record(seat, 5)["units"]["container"]) == first
    done = seat.stackctl("rollback", "1", *QUICK)
    assert "nothing to change (generation 5)" in done.stdout
    look.assert_error(seat.stackctl("rollback", "99", *QUICK, code=4), "has no generation 99")
    assert "back to 1" in seat.stackctl("history").stdout
    assert "context" in seat.stackctl("diff", "2", "3").stdout
    # A missing model is noticed before anything stops.
    seat.lab.run(["mv", tiny[5:], tiny[5:] + ".away"], check=True)
    try:
        look.assert_error(seat.stackctl("rollback", "3", *QUICK, code=6), "cannot run again")
    finally:
        seat.lab.run(["mv", tiny[5:] + ".away", tiny[5:]], check=True)
    assert generation(seat) == 5
    seat.stackctl("down")
    look.assert_clean(seat)


def test_side_by_side_under_load_fails_no_request(seat: Seat, tiny: str) -> None:
    seat.stackctl(*UP, tiny)
    with load(seat) as client:
        seat.stackctl("switch", "throughput", *QUICK)
        seat.stackctl("rollback", *QUICK)
        found = client.result()
    assert found["failed"] == 0, found
    assert generation(seat) == 3


def test_stop_first_under_load_fails_no_request(seat: Seat, tiny: str) -> None:
    words = large(seat)
    seat.stackctl(*UP, tiny, *words)
    with load(seat) as client:
        done = seat.stackctl("switch", "throughput", *QUICK)
        found = client.result()
    assert "stop first: both do not fit" in done.stderr
    assert "the front door holds new requests meanwhile (at most 2:00)" in done.stderr
    waited = re.search(r"(\d+) requests? waited, the longest (\S+) s", done.stderr)
    assert waited, done.stderr
    assert found["failed"] == 0, found
    assert found["longest_s"] < 60
    assert generation(seat) == 2


@pytest.mark.deep
def test_requests_that_do_not_end_keep_a_switch_from_happening(one: Seat, tiny: str) -> None:
    # The tiny model fills its context within a second.
    one.stackctl(*UP, look.GEMMA, *look.ONE_THREAD_AT_ANY_SPEED, *large(one))
    body = json.dumps({"prompt": "x", "n_predict": -1, "ignore_eos": True, "stream": True})
    url = f"http://127.0.0.1:{look.PORT}/completion"
    with one.lab.spawn(["python3", "-c", look.POST, url, body], user=one.user) as endless:
        assert endless.stdout is not None
        assert endless.stdout.readline()
        done = one.stackctl("switch", "throughput", *QUICK, "--drain", "1s", code=1)
        look.assert_error(done, "1 request of cpu still running after 0:01", "--drain 0s")
        assert endless.poll() is None
        assert generation(one) == 1
        done = one.stackctl("switch", "throughput", *QUICK, "--drain", "0s")
        assert "warning: 1 request cut off" in done.stderr
        endless.kill()
        endless.communicate()
    assert generation(one) == 3
    assert look.record(one, 2)["outcome"]["state"] == "failed"


# Failures: the old engine runs again, or has never stopped

DIES_LATER = """\
#!/bin/sh
case "$1" in --help|--version) exec "$0.real" "$@" ;; esac
"$0.real" "$@" &
engine=$!
url=http://127.0.0.1:$PORT_OF/metrics
until curl -fs $url | grep -q '^llamacpp:tokens_predicted_total [1-9]'; do sleep 0.1; done
sleep 4
kill -9 $engine
exit 9
"""


def dies_in_its_soak(seat: Seat) -> str:
    """Return an image whose engine answers and dies a little later."""
    script = DIES_LATER.replace("$PORT_OF", "$(echo \"$@\" | sed 's/.*--port //; s/ .*//')")
    return look.scripted_engine(seat, "dies-later", script)


@pytest.mark.parametrize(
    "room", [pytest.param("side by side", marks=pytest.mark.deep), "stop first"]
)
def test_failed_switches_restore_what_was(one: Seat, tiny: str, room: str) -> None:
    extra = large(one) if room == "stop first" else ()
    one.stackctl(*UP, tiny, *extra)
    number, old = 1, look.container_id(one)
    never, dying = look.never_healthy(one), dies_in_its_soak(one)
    cases = [
        (("--set", "engine_args.load-mode=x"), "cpu did not start: llama-server refuses", 1),
        (("--set", 'engine_args.grammar=root ::= "!"+'), "answer is wrong: not text", 1),
        (("--set", f"image={never}", "--timeout", "4s"), "not healthy within 0:04", 1),
        (("--set", f"image={dying}", "--soak", "30s"), "cpu did not last", 1),
        (("--set", "image=localhost/none:1"), "there is no local image", 6),
        (("--set", "engine_args.cache-ram=9000000"), "does not fit", 5),
    ]
    with load(one) as client:
        for words, message, code in cases:
            done = one.stackctl(*UP, tiny, *extra, "--yes", *words, code=code)
            look.assert_error(done, message)
            if code == 1:
                number += 1
                assert look.record(one, number)["outcome"]["state"] == "failed"
            if room == "stop first" and code == 1:
                assert re.search(r"^restored +generation 1, ", done.stderr, re.M)
            assert generation(one) == 1
        found = client.result()
    # A crash during the soak breaks the requests that run on the new engine at that time.
    assert found["failed"] <= 4, found
    if room == "side by side":
        assert look.container_id(one) == old
    assert look.chat(one)["usage"]["completion_tokens"] > 0


@pytest.mark.deep
def test_many_switches_leak_nothing(one: Seat, tiny: str) -> None:
    count = int(os.environ.get("LAB_SWITCHES", "8"))
    one.stackctl(*UP, tiny)

    def seen() -> tuple[int, ...]:
        return (
            len(one.run("podman", "ps", "--all", "--quiet").stdout.split()),
            len(one.run("podman", "secret", "ls", "--quiet").stdout.split()),
            len(one.run("podman", "volume", "ls", "--quiet").stdout.split()),
            len(one.files(one.units, one.runtime)),
            len(look.listening(one.lab)),
            len(one.files("/tmp", "/var/tmp")),
        )

    before = seen()
    for number in range(count):
        words = ("throughput", "latency")[number % 2]
        one.stackctl("switch", words, "--yes", "--soak", "0s")
    assert generation(one) == count + 1
    assert seen() == before
    assert len(one.files(f"{one.state}/stacks")) <= count + 3
    one.stackctl("prune", "--keep", "3", "--yes")
    assert generation(one) == count + 1
    one.stackctl("down")
    look.assert_clean(one)


def test_two_users_at_the_same_time(lab: Lab, tiny: str) -> None:
    root, user = Seat(lab, "root"), Seat(lab, "lab")
    try:
        root.stackctl(*UP, tiny)
        user.stackctl(*UP, tiny, "--set", "port=8081")
        words = ("stackctl", "switch", "throughput", *QUICK)
        with lab.spawn(words, user="root") as one, lab.spawn(words, user="lab") as two:
            for process in (one, two):
                _, err = process.communicate(timeout=120)
                assert process.returncode == 0, err
        assert generation(root) == generation(user) == 2
        # Of two commands of one user one is refused, and the stack stays intact.
        words = ("stackctl", "switch", "latency", *QUICK)
        with lab.spawn(words, user="lab") as one, lab.spawn(words, user="lab") as two:
            codes = []
            for process in (one, two):
                process.communicate(timeout=120)
                codes.append(process.returncode)
        assert sorted(codes) in ([0, 7], [0, 0])
        assert generation(user) == 3
    finally:
        root.reset()
        user.reset()
