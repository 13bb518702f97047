"""The load generator: sends requests at a given concurrency, and parses the streamed answers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from stackctl.machine.streaming_client import StreamedRequest, StreamingClient
from stackctl.values.bench import Workload

_PATH = "/v1/chat/completions"
_TICK_S = 0.2
#: The fields of a message that count as output; engines differ in their names.
_TEXTS = ("content", "reasoning_content", "reasoning")
_MOST_MESSAGE = 200


class StreamedCompletion(msgspec.Struct, frozen=True, kw_only=True):
    """A completion. Times are in seconds since the start of the request.

    ``moments`` are the times of the pieces with content, reasoning or a tool call, ``finished_s``
    that of the last token, ``ended_s`` that of the end. Tokens are the server's counts (usage);
    None if it reports none. ``timings`` are speeds that the server reports for the request.
    ``error`` is the reason of a failure.
    """

    began: float
    ended_s: float
    moments: tuple[float, ...] = ()
    finished_s: float | None = None
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    output_tokens: int | None = None
    timings: dict[str, float] = {}
    error: str | None = None

    @property
    def ttft_s(self) -> float | None:
        """Return the seconds to the first piece of output; None without output."""
        return self.moments[0] if self.moments else None


@dataclass
class CellRun:
    """One cell during its measurement, with the replies so far."""

    shape: Workload
    planned: int
    replies: list[StreamedCompletion] = field(default_factory=list)
    began: float = 0.0
    ended: float = 0.0

    @property
    def failed(self) -> list[StreamedCompletion]:
        """Return the replies of failed requests."""
        return [completion for completion in self.replies if completion.error is not None]


def request_body(served_name: str, prompt: str, output_tokens: int) -> bytes:
    """Return the body of a request for a streamed completion.

    The answer has exactly ``output_tokens`` tokens if the engine has the parameter ``ignore_eos``;
    other engines may end it earlier.
    """
    return msgspec.json.encode(
        {
            "model": served_name,
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": output_tokens,
            "ignore_eos": True,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    )


def run_cell(
    client: StreamingClient,
    run: CellRun,
    bodies: Sequence[bytes],
    *,
    timeout_s: float,
    tick: Callable[[], None],
) -> None:
    """Send the requests of a cell and collect the replies in ``run``.

    A new request follows each one that has ended; one may take ``timeout_s`` seconds. Stop early if
    the first request of every stream fails. After an interrupt ``run`` holds complete replies only.
    ``tick`` is called about five times a second, to show progress.
    """
    waiting = list(reversed(list(enumerate(bodies))))
    run.began = run.ended = time.perf_counter()

    def take(request: StreamedRequest) -> None:
        run.replies.append(read_completion(request))
        run.ended = max(run.ended, request.ended)

    told = 0.0
    while waiting or len(client):
        while waiting and len(client) < run.shape.concurrency:
            number, content = waiting.pop()
            failed = client.post(_PATH, content, number)
            if failed is not None:
                take(failed)
            if _hopeless(run):
                waiting.clear()
        for request in client.poll(_TICK_S):
            take(request)
        for request in client.cancel(timeout_s):
            request.error = f"no end within {timeout_s:.0f} s"
            take(request)
        if _hopeless(run):
            waiting.clear()
        if (now := time.perf_counter()) - told >= _TICK_S:
            told = now
            tick()


def _hopeless(run: CellRun) -> bool:
    replies = run.replies
    return len(replies) >= run.shape.concurrency and len(run.failed) == len(replies)


def read_completion(request: StreamedRequest) -> StreamedCompletion:
    """Parse the completion in an exchange. A failed or incomplete one gets an ``error``."""
    seen: dict[str, Any] = {"moments": [], "timings": {}}
    error, done = request.error, False
    try:
        status, lines = _http(request.pieces)
        if status != 200:
            rest = b" ".join(line for _, line in lines)
            error = f"HTTP {status}: {_error_message(rest)}" if status else error or "no answer"
            lines = iter(())
        for moment, line in lines:
            if not line.startswith(b"data:"):
                continue
            data = line[5:].strip()
            done = done or data == b"[DONE]"
            if not done:
                problem = _event(msgspec.json.decode(data), moment - request.began, seen)
                error = error or problem
    except (ValueError, TypeError, AttributeError) as failure:
        error = error or f"not understood: {failure}"
    if not done and error is None:
        error = "the stream broke off"
    return StreamedCompletion(
        began=request.began,
        ended_s=request.ended - request.began,
        moments=tuple(seen.pop("moments")),
        error=error,
        **seen,
    )


def _event(event: Any, moment: float, seen: dict[str, Any]) -> str | None:
    """Add one event to ``seen``; return the error that it reports, or None."""
    if event.get("error") is not None:
        told = event["error"]
        text = told.get("message") if isinstance(told, dict) else told
        return f"error in the stream: {str(text)[:_MOST_MESSAGE]}"
    for choice in event.get("choices") or ():
        delta = choice.get("delta") or {}
        if any(delta.get(name) for name in (*_TEXTS, "tool_calls")):
            seen["moments"].append(moment)
        if choice.get("finish_reason"):
            # A last token without text (a part of a character) ends here too.
            seen["finished_s"] = moment
    usage = event.get("usage")
    if usage:
        seen["prompt_tokens"] = _count(usage.get("prompt_tokens"))
        seen["output_tokens"] = _count(usage.get("completion_tokens"))
        details = usage.get("prompt_tokens_details") or {}
        seen["cached_tokens"] = _count(details.get("cached_tokens"))
    timings = event.get("timings")
    if isinstance(timings, dict):
        numbers = {k: float(v) for k, v in timings.items() if isinstance(v, int | float)}
        seen["timings"] = numbers
    return None


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and value >= 0 else None


def _error_message(raw: bytes) -> str:
    """Return the message in the body of an error, on one line."""
    text = raw.decode("utf-8", "replace").strip()
    try:
        told = msgspec.json.decode(raw)["error"]
        text = str(told["message"] if isinstance(told, dict) else told)
    except (ValueError, TypeError, KeyError):
        pass
    return " ".join(text.split())[:_MOST_MESSAGE] or "no word about it"


def _http(
    pieces: Sequence[tuple[float, bytes]],
) -> tuple[int, Iterator[tuple[float, bytes]]]:
    """Return the status of an HTTP/1.1 answer (0: no answer), and the lines of its body.

    Each line comes with the time at which its end arrived.
    """
    head, rest, at = b"", b"", 0
    for number, (_, data) in enumerate(pieces):
        head += data
        if b"\r\n\r\n" in head:
            head, _, rest = head.partition(b"\r\n\r\n")
            at = number
            break
    else:
        return 0, iter(())
    first, *fields = head.split(b"\r\n")
    words = first.split(None, 2)
    if len(words) < 2 or not words[0].startswith(b"HTTP/1.") or not words[1].isdigit():
        return 0, iter(())
    chunked = any(
        name.strip().lower() == b"transfer-encoding" and b"chunked" in value.lower()
        for name, _, value in (field.partition(b":") for field in fields)
    )
    body: Iterator[tuple[float, bytes]] = iter(((pieces[at][0], rest), *pieces[at + 1 :]))
    return int(words[1]), _lines(_chunks(body) if chunked else body)


def _chunks(pieces: Iterator[tuple[float, bytes]]) -> Iterator[tuple[float, bytes]]:
    """Yield the body without the frames of a chunked transfer (RFC 9112, 7.1)."""
    waiting, left = b"", 0
    for moment, data in pieces:
        waiting += data
        while waiting:
            if left > 2:
                part, waiting = waiting[: left - 2], waiting[left - 2 :]
                left -= len(part)
                yield moment, part
            elif left:
                if len(waiting) < left:
                    break
                waiting, left = waiting[left:], 0
            else:
                size, found, after = waiting.partition(b"\r\n")
                if not found:
                    break
                length = int(size.split(b";")[0], 16)
                if length == 0:
                    return
                waiting, left = after, length + 2


def _lines(pieces: Iterator[tuple[float, bytes]]) -> Iterator[tuple[float, bytes]]:
    waiting = b""
    for moment, data in pieces:
        *whole, waiting = (waiting + data).split(b"\n")
        for line in whole:
            yield moment, line.rstrip(b"\r")
        last = moment
    if waiting:
        yield last, waiting
