"""What a streamed completion says and when: split pieces, odd first events, errors, no usage."""

from __future__ import annotations

import json
from typing import Any

import pytest

from stackctl.machine.streaming_client import StreamedRequest
from stackctl.observe.bench.cell_stats import gaps_ms, generation_tok_s
from stackctl.observe.bench.load_generator import StreamedCompletion, read_completion

HEAD = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n"
    b"Connection: close\r\n\r\n"
)
USAGE = {
    "choices": [],
    "usage": {
        "prompt_tokens": 27, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 5},
    },
    "timings": {"predicted_per_second": 64.3, "predicted_n": 3, "kind": "x"},
}  # fmt: skip
DONE = b"data: [DONE]\n\n"


def event(delta: dict[str, Any], finish: str | None = None) -> bytes:
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    return data({"choices": [choice]})


def data(value: Any) -> bytes:
    return b"data: " + json.dumps(value).encode() + b"\n\n"


def chunk(raw: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(raw), raw)


def exchange(*pieces: tuple[float, bytes], error: str | None = None) -> StreamedRequest:
    moved = [(100.0 + moment, raw) for moment, raw in pieces]
    end = moved[-1][0] if moved else 100.0
    return StreamedRequest(0, 100.0, pieces=moved, ended=end, error=error)


def whole() -> list[tuple[float, bytes]]:
    return [
        (0.1, HEAD + chunk(event({"role": "assistant", "content": None}))),
        (0.5, chunk(event({"content": "Red"}))),
        (0.7, chunk(event({"content": ", "}))),
        (1.0, chunk(event({"content": "green"})) + chunk(event({}, "length"))),
        (1.1, chunk(data(USAGE)) + chunk(DONE) + b"0\r\n\r\n"),
    ]


def test_a_stream() -> None:
    reply = read_completion(exchange(*whole()))
    assert reply.error is None
    # The first event has a role only: it is no token.
    assert reply.ttft_s == pytest.approx(0.5)
    assert reply.moments == pytest.approx((0.5, 0.7, 1.0))
    assert gaps_ms(reply) == pytest.approx((200, 300))
    assert reply.finished_s == pytest.approx(1.0)
    assert reply.ended_s == pytest.approx(1.1)
    assert (reply.prompt_tokens, reply.cached_tokens, reply.output_tokens) == (27, 5, 3)
    assert reply.timings["predicted_per_second"] == 64.3


def test_pieces_may_be_cut_anywhere() -> None:
    """Also inside of a sign, a chunk's size or a line: nothing is lost, and nothing comes early."""
    raw = b"".join(piece for _, piece in whole())
    for cut in range(1, len(raw)):
        reply = read_completion(exchange((0.2, raw[:cut]), (0.9, raw[cut:])))
        assert reply.error is None, cut
        assert (len(reply.moments), reply.output_tokens) == (3, 3)
        assert {round(moment, 6) for moment in reply.moments} <= {0.2, 0.9}
    one = [(0.01 * n, raw[n : n + 1]) for n in range(len(raw))]
    reply = read_completion(exchange(*one))
    end_of_first_token = raw.index(b"Red") + raw[raw.index(b"Red") :].index(b"\n")
    assert reply.ttft_s == pytest.approx(0.01 * end_of_first_token)


def test_a_stream_that_is_not_chunked() -> None:
    head = HEAD.replace(b"Transfer-Encoding: chunked\r\n", b"")
    body = event({"content": "a"}) + data(USAGE)
    reply = read_completion(exchange((0.1, head), (0.4, body), (0.5, DONE)))
    assert reply.error is None
    assert reply.ttft_s == pytest.approx(0.4)


@pytest.mark.parametrize(
    "delta",
    [
        {"content": "a"},
        {"reasoning_content": "Hm"},
        {"reasoning": "Hm"},
        {"tool_calls": [{"index": 0, "function": {"name": "f", "arguments": ""}}]},
    ],
)
def test_what_counts_as_output(delta: dict[str, Any]) -> None:
    first: dict[str, Any] = {
        "role": "assistant",
        "content": "",
        "reasoning_content": None,
        "tool_calls": [],
    }
    reply = read_completion(
        exchange(
            (0.1, HEAD + chunk(event(first))),
            (0.4, chunk(b": a comment\n\n" + event(delta))),
            (0.9, chunk(data(USAGE) + DONE)),
        )
    )
    assert reply.error is None
    assert reply.moments == pytest.approx((0.4,))


@pytest.mark.parametrize(
    ("pieces", "error"),
    [
        ([], "no answer"),
        ([(0.1, b"nonsense")], "no answer"),
        ([(0.1, HEAD)], "the stream broke off"),
        (whole()[:3], "the stream broke off"),
        ([*whole()[:2], (0.6, chunk(b"data: {broken\n\n"))], "not understood"),
        ([*whole()[:2], (0.6, chunk(b"data: 5\n\n"))], "not understood"),
        ([*whole()[:2], (0.6, b"xyz\r\n")], "not understood"),
        (
            [*whole()[:2], (0.6, chunk(data({"error": {"message": "slot lost"}}) + DONE))],
            "error in the stream: slot lost",
        ),
        (
            [(0.1, b'HTTP/1.1 401 Unauthorized\r\n\r\n{"error": {"message": "Invalid API Key"}}')],
            "HTTP 401: Invalid API Key",
        ),
        ([(0.1, b"HTTP/1.1 503 Service Unavailable\r\n\r\n")], "HTTP 503: no word about it"),
        ([(0.1, b"HTTP/1.1 400 Bad\r\n\r\n<html>\n no</html>")], "HTTP 400: <html> no</html>"),
    ],
)
def test_what_fails(pieces: list[tuple[float, bytes]], error: str) -> None:
    assert (read_completion(exchange(*pieces)).error or "").startswith(error)


def test_an_error_of_the_connection_comes_first() -> None:
    reply = read_completion(exchange(*whole()[:3], error="the connection broke off"))
    assert reply.error == "the connection broke off"
    assert reply.ttft_s == pytest.approx(0.5)


def test_without_usage_there_is_no_speed() -> None:
    pieces = [*whole()[:4], (1.1, chunk(DONE))]
    reply = read_completion(exchange(*pieces))
    assert (reply.error, reply.output_tokens) == (None, None)
    assert generation_tok_s(reply) is None
    odd = {"choices": [], "usage": {"prompt_tokens": "many", "completion_tokens": -1}}
    reply = read_completion(exchange(*pieces[:4], (1.1, chunk(data(odd) + DONE))))
    assert (reply.error, reply.prompt_tokens, reply.output_tokens) == (None, None, None)


def reply(tokens: int, pieces: int, gap_s: float = 0.01, **more: Any) -> StreamedCompletion:
    moments = tuple(0.5 + gap_s * n for n in range(pieces))
    end = moments[-1] if moments else 1.0
    return StreamedCompletion(began=0.0, ended_s=end, moments=moments, output_tokens=tokens, **more)


def test_speed_from_64_tokens_up() -> None:
    assert generation_tok_s(reply(63, 63)) is None
    assert generation_tok_s(reply(64, 64)) == pytest.approx(100)
    # Two tokens a piece: the first piece's are part of the time to the first token.
    assert generation_tok_s(reply(128, 64)) == pytest.approx(200)
    # The last token had no text of its own.
    assert generation_tok_s(reply(101, 100, finished_s=0.5 + 1.0)) == pytest.approx(99.99)
    assert generation_tok_s(reply(64, 1)) is None
    assert generation_tok_s(reply(64, 0)) is None
    assert generation_tok_s(reply(64, 64, gap_s=0)) is None
