"""The front door with the real HAProxy, Quadlet and systemd; mostly with a fake engine."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator

import pytest

from stackctl.machine.haproxy import Traffic

from . import look
from .conftest import Seat, both_users
from .front import ENGINE_PORT, PORT, STACK, Front, Reply, ask, connect, tokens
from .lab import Lab

CONTAINER = f"stackctl-{STACK}_door"


@pytest.fixture(autouse=True, scope="module")
def door_image(lab: Lab) -> None:
    """Skip the tests if a tree from elsewhere lacks the image of the front door."""
    if lab.load_door("root") is None:
        pytest.skip("no image of the front door, and none can be built")


@pytest.fixture
def both(seat: Seat) -> Iterator[Front]:
    """Yield a front door: one case as root, one as an ordinary user."""
    front = Front(seat)
    yield front
    front.stop()


@pytest.fixture
def front(one: Seat) -> Iterator[Front]:
    """Yield a front door of an ordinary user, for tests that do not depend on the user."""
    place = Front(one)
    yield place
    place.stop()


def assert_refused(reply: Reply, status: int, code: str) -> None:
    """Check that the reply is an error in the format of OpenAI's clients."""
    assert reply.status == status, reply.body
    assert reply.headers["content-type"] == "application/json"
    error = reply.json["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == code


# Without an engine


def test_a_request_waits_for_an_engine_that_is_not_there_yet(both: Front) -> None:
    both.start()
    reply = both.later()
    time.sleep(3)
    assert both.admin.state() == "down"
    assert both.admin.traffic() == Traffic(running=0, waiting=1)
    assert not reply.done()
    # The health check is answered at once.
    health = both.ask("GET", "/health")
    assert_refused(health, 503, "engine_unavailable")
    assert health.seconds < 0.5
    began = time.monotonic()
    both.engine()
    assert reply.result(10).status == 200
    print(f"answered {time.monotonic() - began:.3f} s after the engine was seen to answer")
    assert reply.result().seconds > 3
    waited = both.admin.queue_stats()
    assert waited.requests == 1
    assert waited.longest_s == pytest.approx(reply.result().seconds, abs=0.5)
    assert both.ask("GET", "/health").status == 200


@pytest.mark.deep
def test_the_wait_is_bounded(front: Front) -> None:
    front.start(hold_s=2)
    reply = front.ask()
    assert_refused(reply, 503, "engine_unavailable")
    assert 2 <= reply.seconds < 3
    assert int(reply.headers["retry-after"]) > 0
    assert front.admin.traffic() == Traffic(running=0, waiting=0)


def test_an_engine_that_dies_is_waited_for(front: Front) -> None:
    front.start()
    engine = front.engine()
    assert front.ask().status == 200
    engine.kill()
    engine.communicate()
    # Before the next health check, the refused connection itself must make the request wait again.
    reply = front.later()
    time.sleep(3)
    assert front.admin.traffic() == Traffic(running=0, waiting=1)
    front.engine()
    assert reply.result(10).status == 200


def test_fifty_wait_and_all_are_answered(front: Front) -> None:
    front.start()
    front.engine()
    front.admin.hold()
    replies = [front.later(body={"n": number}) for number in range(50)]
    look.wait_for("all wait", lambda: front.admin.traffic().waiting == 50)
    front.admin.release()
    assert [reply.result(10).status for reply in replies] == [200] * 50
    assert front.admin.queue_stats().requests == 50


# Switching


@both_users
def test_hold_drain_move_release(both: Front) -> None:
    both.start()
    both.engine(name="old")
    both.engine(ENGINE_PORT + 1, name="new")
    slow = both.later(body={"wait": 1.5})
    look.wait_for("it runs", lambda: both.admin.traffic().running == 1)
    both.admin.hold()
    assert (both.admin.state(), both.admin.port()) == ("held", ENGINE_PORT)
    held = both.later()
    look.wait_for("it waits", lambda: both.admin.traffic() == Traffic(running=1, waiting=1))
    # A running request is not interrupted.
    assert slow.result(10).json["name"] == "old"
    assert both.admin.traffic() == Traffic(running=0, waiting=1)
    both.admin.set_backend_port(ENGINE_PORT + 1)
    assert both.admin.port() == ENGINE_PORT + 1
    time.sleep(0.3)
    assert not held.done()
    began = time.monotonic()
    both.admin.release()
    assert held.result(10).json["name"] == "new"
    print(f"answered {time.monotonic() - began:.3f} s after the release")
    assert both.admin.state() == "up"
    assert both.ask().json["name"] == "new"


@pytest.mark.deep
def test_a_release_does_not_let_requests_run_into_a_dead_engine(front: Front) -> None:
    front.start()
    front.admin.hold()
    front.admin.release(healthy=False)
    reply = front.later()
    time.sleep(1.5)
    assert front.admin.state() == "down"
    front.engine()
    assert reply.result(10).status == 200
    # The release claims a healthy engine, but there is none.
    front.admin.hold()
    front.admin.set_backend_port(ENGINE_PORT + 1)
    front.admin.release()
    reply = front.later()
    time.sleep(1.5)
    assert not reply.done()
    front.engine(ENGINE_PORT + 1)
    assert reply.result(10).status == 200


# Transfer


def test_tokens_arrive_one_by_one(front: Front) -> None:
    front.start()
    front.engine()
    arrived = list(tokens(front.lab, {"stream": True, "tokens": 5, "pause": 0.3}))
    assert [text for _, text in arrived] == list("01234")
    for number, (seconds, _) in enumerate(arrived):
        assert seconds == pytest.approx(number * 0.3, abs=0.25)


@pytest.mark.deep
def test_a_big_prompt_passes_also_after_a_wait(front: Front) -> None:
    front.start()
    front.engine()
    body = {"prompt": "x" * 2_000_000}
    assert front.ask(body=body).json["bytes"] == len(json.dumps(body))
    front.admin.hold()
    reply = front.later(body=body)
    time.sleep(0.5)
    front.admin.release()
    assert reply.result(10).json["bytes"] == len(json.dumps(body))


def test_a_client_keeps_its_connection_over_a_switch(front: Front) -> None:
    front.start()
    front.engine(name="old")
    front.engine(ENGINE_PORT + 1, name="new")
    client = connect(front.lab, PORT)
    try:
        names = [ask(client).json["name"], ask(client).json["name"]]
        address = client.sock.getsockname()
        front.admin.hold()
        front.admin.set_backend_port(ENGINE_PORT + 1)
        front.admin.release()
        names.append(ask(client).json["name"])
        assert names == ["old", "old", "new"]
        assert client.sock.getsockname() == address
    finally:
        client.close()


def test_a_client_that_leaves_stops_its_generation(front: Front) -> None:
    front.start()
    front.engine()
    client = connect(front.lab, PORT)
    client.request("POST", "/v1/chat/completions", json.dumps({"wait": 60}))
    look.wait_for("it runs", lambda: front.admin.traffic().running == 1)
    client.close()
    seen = {"running": 0, "cut_off": 1}
    look.wait_for(
        "it was stopped",
        lambda: seen.items() <= front.ask("GET", "/x", port=ENGINE_PORT).json.items(),
    )


# Keys


def test_keys(both: Front) -> None:
    files = both.start(keys=["sk-first", "sk-second"])
    both.engine()
    missing = both.ask()
    assert_refused(missing, 401, "invalid_api_key")
    assert missing.headers["www-authenticate"] == "Bearer"
    for wrong in ("", "sk-wrong", "sk-firs", "sk-first2"):
        assert both.ask(key=wrong).status == 401, wrong
    passed = both.ask(key="sk-first")
    assert passed.status == 200
    # The door does not forward the key to the engine.
    assert "authorization" not in passed.json["headers"]
    assert both.ask(key="sk-second").status == 200
    assert both.ask("GET", "/health").status == 200
    # New keys apply at once and without a restart. Waiting requests are not checked again.
    client = connect(both.lab, PORT)
    both.admin.hold()
    held = both.later(key="sk-first")
    look.wait_for("it waits", lambda: both.admin.traffic().waiting == 1)
    both.admin.replace_keys(["sk-third"])
    both.admin.release()
    assert held.result(10).status == 200
    assert both.ask(key="sk-first").status == 401
    assert ask(client, key="sk-third").status == 200
    client.close()
    # The key is in no unit, no file that the door reads, no command line and no log.
    process = look.engine_pid(both.seat, CONTAINER)
    texts = [files.unit.text, both.lab.read(f"/proc/{process}/cmdline"), both.seat.journal()]
    texts += [both.lab.read(path) for path in both.seat.files(both.folder)]
    for key in ("sk-first", "sk-second", "sk-third", "sk-wrong"):
        assert not any(key in text for text in texts)


@pytest.mark.deep
def test_keys_last_over_a_crash_of_the_engine(front: Front) -> None:
    front.start(keys=["sk-first"])
    engine = front.engine()
    assert front.ask(key="sk-first").status == 200
    engine.kill()
    engine.communicate()
    reply = front.later(key="sk-first")
    time.sleep(1.5)
    front.engine()
    assert reply.result(10).status == 200


def test_what_others_can_reach_shows_clients_routes_only(front: Front) -> None:
    front.start(address="0.0.0.0", keys=["k"])
    front.engine()
    for path in ("/v1/models", "/completion", "/tokenize"):
        assert front.ask("GET", path, key="k").status == 200, path
    private = ("/metrics", "/slots", "/props", "/", "/v1/../metrics", "/%6detrics", "//metrics")
    for path in (*private, "/v1/%2e%2e/metrics", "/v1x", "http://x/metrics"):
        assert_refused(front.ask("GET", path, key="k"), 404, "not_found")
    shown = front.seat.run("ss", "-Hltn", f"sport = :{PORT}").stdout
    assert shown.split()[3] == f"0.0.0.0:{PORT}"


def test_on_loopback_without_a_key_everything_passes(front: Front) -> None:
    front.start()
    front.engine()
    assert front.ask("GET", "/metrics").json["path"] == "/metrics"
    shown = front.seat.run("ss", "-Hltn", f"sport = :{PORT}").stdout
    assert shown.split()[3] == f"127.0.0.1:{PORT}"


# Its unit


def test_the_door_may_do_as_little_as_possible(both: Front) -> None:
    both.start()
    pid = look.engine_pid(both.seat, CONTAINER)
    status = look.process_status(both.lab, pid)
    for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
        assert int(status[name], 16) == 0, name
    assert status["NoNewPrivs"] == "1"
    lines = both.lab.read(f"/proc/{pid}/mounts").splitlines()
    mounts = {fields[1]: fields[3].split(",") for fields in (line.split() for line in lines)}
    assert {"ro"} <= set(mounts["/"]) & set(mounts["/door"])
    assert "rw" in mounts["/admin"]
    # Only the owner can read the files and use the admin socket.
    for path in (both.folder, f"{both.folder}/admin/admin.sock"):
        mode = both.lab.run(["stat", "--format=%a %U", path]).stdout.strip()
        assert mode in (f"700 {both.seat.user}", f"600 {both.seat.user}")


@pytest.mark.deep
def test_a_stop_lets_requests_end_and_tells_those_that_wait(both: Front) -> None:
    both.start()
    both.engine()
    short = both.later(body={"wait": 3})
    endless = both.later(body={"wait": 60})
    look.wait_for("they run", lambda: both.admin.traffic().running == 2)
    both.admin.hold()
    held = both.later()
    look.wait_for("it waits", lambda: both.admin.traffic().waiting == 1)
    began = time.monotonic()
    both.seat.systemctl("stop", both.service)
    took = time.monotonic() - began
    assert short.result(1).status == 200
    assert_refused(held.result(1), 503, "engine_unavailable")
    assert endless.exception(1) or endless.result().status >= 500
    assert 9 < took < 15
    found = look.unit_properties(both.seat, "Result", "ActiveState", unit=both.service)
    assert found == {"Result": "success", "ActiveState": "inactive"}


def test_a_restart_and_a_crash_of_the_door(both: Front) -> None:
    both.start()
    both.engine()
    both.seat.systemctl("restart", both.service)
    assert both.ask().status == 200
    both.lab.run(["kill", "-KILL", str(look.engine_pid(both.seat, CONTAINER))], check=True)

    def restarted() -> bool:
        seen = look.unit_properties(both.seat, "NRestarts", "ActiveState", unit=both.service)
        return seen == {"NRestarts": "1", "ActiveState": "active"}

    look.wait_for("systemd starts it again", restarted)
    assert both.ask().status == 200


@pytest.mark.deep
def test_a_configuration_that_cannot_be_read_fails_the_start(front: Front) -> None:
    front.start()
    front.seat.systemctl("stop", front.service)
    front.lab.write(f"{front.folder}/haproxy.cfg", "nonsense\n", user=front.seat.user)
    front.seat.systemctl("start", front.service, check=False)
    assert look.unit_properties(front.seat, "ActiveState", unit=front.service) != {
        "ActiveState": "active"
    }
    # The journal may be behind the unit.
    words = ("-u", front.service, "-t", "front-door")
    look.wait_for(
        "the reason",
        lambda: "unknown keyword 'nonsense'" in front.seat.journal(*words),
        20,
        step=0.5,
    )


# A real engine


@pytest.mark.deep
def test_llama_server_behind_the_door(both: Front) -> None:
    words = ("--set", f"port={ENGINE_PORT}", "--set", "front_door=off")
    both.seat.stackctl(
        "up", "cpu-latency", "--model", look.GEMMA, *look.ONE_THREAD_AT_ANY_SPEED, *words
    )
    both.start()
    assert look.chat(both.seat)["usage"]["completion_tokens"] > 0
    wish = {"stream": True, "max_tokens": 8, "messages": [{"role": "user", "content": "Count."}]}
    arrived = [text for _, text in tokens(both.lab, wish)]
    assert arrived[-1] == "[DONE]"
    assert len(arrived) > 5
    # After a kill systemd starts it again. A client only notices a longer answer.
    both.lab.run(["kill", "-KILL", str(look.engine_pid(both.seat))], check=True)
    listening = ["ss", "-Hltn", f"sport = :{ENGINE_PORT}"]
    look.wait_for("it is gone", lambda: not both.lab.run(listening).stdout)
    answer = both.ask(body={"messages": wish["messages"], "max_tokens": 4})
    assert answer.status == 200, answer.body
    assert answer.json["usage"]["completion_tokens"] > 0
    assert answer.seconds > 3
