"""HTTP to engines, against a real server."""

from __future__ import annotations

import time

import pytest
from servers import Reply, engine

from stackctl.machine.http import HttpAnswer, NoAnswer, get, post


def free_port() -> int:
    with engine({}) as server:
        return server.port


def test_answers() -> None:
    with engine({"/a": Reply({"x": [1]}), "/b": Reply("plain", status=503)}) as server:
        url = f"http://127.0.0.1:{server.port}"
        assert get(url + "/a") == HttpAnswer(200, {"x": [1]}, '{"x": [1]}')
        assert get(url + "/b") == HttpAnswer(503, None, "plain")
        missing = get(url + "/c")
        assert isinstance(missing, HttpAnswer)
        assert missing.status == 404
        post(url + "/a", {"ä": 1}, timeout_s=5)
        assert server.requests[-1] == ("POST", "/a", {"ä": 1})


def test_a_redirection_is_not_followed() -> None:
    replies = {"/a": Reply("", status=302, headers={"Location": "/b"}), "/b": Reply({})}
    with engine(replies) as server:
        answer = get(f"http://127.0.0.1:{server.port}/a")
        assert isinstance(answer, HttpAnswer)
        assert answer.status == 302
        assert [path for _, path, _ in server.requests] == ["/a"]


def test_a_closed_port() -> None:
    assert get(f"http://127.0.0.1:{free_port()}/") == NoAnswer("connection refused", refused=True)


def test_an_answer_that_takes_too_long() -> None:
    with engine({"/slow": Reply(wait_s=10)}) as server:
        started = time.monotonic()
        answer = get(f"http://127.0.0.1:{server.port}/slow", timeout_s=0.2)
        assert time.monotonic() - started < 5
    assert isinstance(answer, NoAnswer)
    assert "no answer within" in answer.reason


def test_an_answer_that_is_cut_off() -> None:
    with engine({"/cut": Reply("x" * 100, cut=10)}) as server:
        answer = get(f"http://127.0.0.1:{server.port}/cut")
    assert isinstance(answer, NoAnswer)
    assert "refused" not in answer.reason


def test_a_long_text_is_shortened() -> None:
    with engine({"/long": Reply("x" * (2**20 + 5))}) as server:
        answer = get(f"http://127.0.0.1:{server.port}/long")
    assert isinstance(answer, HttpAnswer)
    assert len(answer.text) == 2**20


@pytest.mark.parametrize("name", ["http_proxy", "HTTP_PROXY", "ALL_PROXY", "all_proxy"])
def test_no_proxy_gets_in_between(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    with engine({"/a": Reply({})}) as server:
        assert isinstance(get(f"http://127.0.0.1:{server.port}/a"), HttpAnswer)


def test_what_answers_is_no_http_server() -> None:
    import socket
    import threading

    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            connection, _ = listening.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(b"SSH-2.0-OpenSSH_9.9\r\n")

        thread = threading.Thread(target=serve)
        thread.start()
        answer = get(f"http://127.0.0.1:{listening.getsockname()[1]}/")
        thread.join()
    assert isinstance(answer, NoAnswer)
    assert "refused" not in answer.reason
