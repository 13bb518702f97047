"""Questions to an endpoint, against a server that plays an engine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from servers import READY, Reply, chat, engine, models

from stackctl.engines import engine as find_engine
from stackctl.health.completion_check import ANSWER_TOKENS
from stackctl.health.endpoint import base_url, check_endpoint, is_busy, liveness
from stackctl.values.result import Result


def ask(
    replies: Mapping[str, Reply],
    *,
    name: str = "m",
    timeout_s: float = 5,
    parameters: int | None = None,
) -> dict[str, Result]:
    with engine(replies) as server:
        results = check_endpoint(
            base_url(server.port),
            "/health",
            name,
            answer_timeout_s=timeout_s,
            parameters=parameters,
        )
    assert len({result.name for result in results}) == len(results)
    return {result.name: result for result in results}


def test_a_ready_engine() -> None:
    with engine(READY) as server:
        assert liveness(server.port, "/health") == "ready"
        results = check_endpoint(base_url(server.port), "/health", "m", answer_timeout_s=5)
        asked = server.requests
    assert [(result.name, result.status) for result in results] == [
        ("endpoint", "ok"), ("model", "ok"), ("answer", "ok")
    ]  # fmt: skip
    assert results[0].actual == f"{base_url(server.port)}/health"
    assert results[2].evidence == "Red, green, blue."
    assert (results[2].actual or "").startswith("6 tokens in ")
    method, path, body = asked[-1]
    assert (method, path) == ("POST", "/v1/chat/completions")
    assert body["model"] == "m"
    assert body["max_tokens"] == ANSWER_TOKENS
    assert body["stream"] is False


def test_a_loading_engine() -> None:
    body = {"error": {"message": "Loading model", "type": "unavailable_error", "code": 503}}
    with engine({"/health": Reply(body, status=503)}) as server:
        assert liveness(server.port, "/health") == "loading"
        (result,) = check_endpoint(base_url(server.port), "/health", "m", answer_timeout_s=5)
    assert (result.name, result.status) == ("endpoint", "fail")
    assert result.actual == "HTTP 503, still loading"
    assert result.remedy


def test_a_stopped_engine() -> None:
    with engine({}) as server:
        port = server.port
    assert liveness(port, "/health") == "closed"
    (result,) = check_endpoint(base_url(port), "/health", "m", answer_timeout_s=5)
    assert (result.status, result.actual) == ("fail", "connection refused")
    assert result.expected == f"200 from {base_url(port)}/health"


@pytest.mark.parametrize("status", [301, 404, 500])
def test_something_else_on_the_port(status: int) -> None:
    with engine({"/health": Reply("", status=status)}) as server:
        assert liveness(server.port, "/health") == "failing"
        (result,) = check_endpoint(base_url(server.port), "/health", "m", answer_timeout_s=5)
    assert result.actual == f"HTTP {status}"


def test_a_hanging_engine() -> None:
    with engine({"/health": Reply(wait_s=10)}) as server:
        assert liveness(server.port, "/health", timeout_s=0.2) == "failing"


def test_another_model() -> None:
    results = ask({**READY, "/v1/models": models("other", "more")})
    assert results["model"].status == "fail"
    assert (results["model"].expected, results["model"].actual) == ("m", "other, more")
    assert "another process" in (results["model"].remedy or "")
    # It is not asked for a completion then.
    assert "answer" not in results


@pytest.mark.parametrize(
    "body", ["<html>", "", [], {}, {"data": None}, {"data": {"id": "m"}}, {"data": ["m"]}]
)
def test_a_model_list_that_is_none(body: Any) -> None:
    results = ask({**READY, "/v1/models": Reply(body)})
    assert (results["model"].status, results["model"].actual) == ("fail", "none listed")


@pytest.mark.parametrize(
    "body",
    [
        "not json",
        "",
        [],
        {},
        {"choices": []},
        {"choices": [{"message": None}], "usage": {"completion_tokens": 1}},
        {"choices": [{"message": {"content": "x"}}]},
        {"choices": [{"message": {"content": "x"}}], "usage": None},
        {"choices": [{"message": {"content": "x"}}], "usage": {"completion_tokens": "many"}},
        {"error": {"message": "context size exceeded"}},
    ],
)
def test_a_completion_that_is_none(body: Any) -> None:
    results = ask({**READY, "/v1/chat/completions": Reply(body)})
    assert results["answer"].status == "fail"
    assert results["answer"].actual == "HTTP 200"
    assert results["answer"].remedy == "stackctl logs"


def test_an_error_instead_of_a_completion_is_shown() -> None:
    reply = Reply({"error": {"message": "context size exceeded"}}, status=500)
    results = ask({**READY, "/v1/chat/completions": reply})
    assert results["answer"].actual == "HTTP 500"
    assert "context size exceeded" in (results["answer"].evidence or "")


def test_no_tokens_is_no_answer() -> None:
    results = ask({**READY, "/v1/chat/completions": chat("", tokens=0)})
    assert (results["answer"].status, results["answer"].actual) == ("fail", "HTTP 200, 0 tokens")


def test_tokens_without_text_are_an_answer() -> None:
    """A model that thinks first may not have come to its answer yet."""
    results = ask({**READY, "/v1/chat/completions": chat(None, tokens=16)})
    assert results["answer"].status == "ok"


def test_an_answer_that_takes_too_long() -> None:
    slow = Reply(wait_s=10)
    results = ask({**READY, "/v1/chat/completions": slow}, timeout_s=0.3)
    assert results["answer"].status == "fail"
    assert "no answer within" in (results["answer"].actual or "")


def test_a_long_answer_with_lines_stays_one_short_line() -> None:
    results = ask({**READY, "/v1/chat/completions": chat("Red,\n\ngreen\t" + "blue " * 50)})
    evidence = results["answer"].evidence or ""
    assert evidence.startswith("Red, green blue")
    assert len(evidence) <= 60


@pytest.mark.parametrize(
    ("reply", "works"),
    [
        (Reply("# HELP x y\nllamacpp:requests_processing 1\n"), True),
        (Reply('llamacpp:requests_processing{slot="0"} 2.0\n'), True),
        (Reply("llamacpp:requests_processing 0\nother 7\n"), False),
        (Reply("no metrics", status=501), False),
        # In the midst of a long batch it answers late, and must not be taken for idle.
        (Reply("llamacpp:requests_processing 1\n", wait_s=3), True),
    ],
)
def test_whether_an_engine_works(reply: Reply, works: bool) -> None:
    with engine({"/metrics": reply}) as server:
        assert is_busy(server.port, find_engine("llama.cpp"), ()) is works


def test_an_engine_that_is_gone_does_not_work() -> None:
    with engine({}) as server:
        port = server.port
    assert not is_busy(port, find_engine("llama.cpp"), ())


@pytest.mark.parametrize("text", ["!" * 16, "! " * 8, "\n!!!!!!!!!"])
def test_exclamation_marks_alone_are_no_answer(text: str) -> None:
    result = ask({**READY, "/v1/chat/completions": chat(text, 16)})["answer"]
    assert (result.status, result.expected) == ("fail", "text")
    assert result.actual == f'not text: "{text.strip()[:16]}"'


@pytest.mark.parametrize(
    "text", ["aaaaaaaaaaaaaaaa", "################", "!!", "", "Ha! Ha! Ha! Ha!"]
)
def test_odd_answers_of_small_models_are_answers(text: str) -> None:
    replies = {**READY, "/v1/chat/completions": chat(text, 16)}
    assert ask(replies, parameters=1_000_000)["answer"].status == "ok"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("aaaaaaaaaaaaaaaa", "the same again and again"),
        ("the the the the the the the", "the same again and again"),
        ("", "empty"),
        ("\x00\x01\x02\x03 \ufffd\ufffd\ufffd", "not text"),
    ],
)
def test_garbage_of_a_grown_model_is_no_answer(text: str, why: str) -> None:
    result = ask({**READY, "/v1/chat/completions": chat(text, 16)})["answer"]
    assert result.status == "fail"
    assert (result.actual or "").startswith(why)


@pytest.mark.parametrize("text", ["Red, green, blue.", "1. **Red**\n2. **Blue**", "赤、緑、青"])
def test_answers_of_a_grown_model(text: str) -> None:
    assert ask({**READY, "/v1/chat/completions": chat(text, 16)})["answer"].status == "ok"
