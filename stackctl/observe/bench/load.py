"""The load generator: sends requests to a running stack at a given concurrency."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import msgspec

from stackctl.machine.streaming_client import StreamedRequest, StreamingClient
from stackctl.observe.bench.reply import Reply, read
from stackctl.values.bench import Workload

_PATH = "/v1/chat/completions"
_TICK_S = 0.2


@dataclass
class Measured:
    """One cell during its measurement, with the replies so far."""

    shape: Workload
    planned: int
    replies: list[Reply] = field(default_factory=list)
    began: float = 0.0
    ended: float = 0.0

    @property
    def failed(self) -> list[Reply]:
        """Return the replies of failed requests."""
        return [reply for reply in self.replies if reply.error is not None]


def body(served_name: str, prompt: str, output_tokens: int) -> bytes:
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


def measure(
    client: StreamingClient,
    measured: Measured,
    bodies: Sequence[bytes],
    *,
    timeout_s: float,
    tick: Callable[[], None],
) -> None:
    """Send the requests of a cell and collect the replies in ``measured``.

    A new request follows each one that has ended. Stop early if the first request of every stream
    fails. After an interrupt ``measured`` holds complete replies only.

    Args:
        streams: the connections to the server.
        measured: the cell.
        bodies: the bodies of the requests.
        timeout_s: the seconds that one request may take.
        tick: called about five times a second, to show progress.
    """
    waiting = list(reversed(list(enumerate(bodies))))
    measured.began = measured.ended = time.perf_counter()

    def take(request: StreamedRequest) -> None:
        measured.replies.append(read(request))
        measured.ended = max(measured.ended, request.ended)

    told = 0.0
    while waiting or len(client):
        while waiting and len(client) < measured.shape.concurrency:
            number, content = waiting.pop()
            failed = client.post(_PATH, content, number)
            if failed is not None:
                take(failed)
            if _hopeless(measured):
                waiting.clear()
        for request in client.poll(_TICK_S):
            take(request)
        for request in client.cancel(timeout_s):
            request.error = f"no end within {timeout_s:.0f} s"
            take(request)
        if _hopeless(measured):
            waiting.clear()
        if (now := time.perf_counter()) - told >= _TICK_S:
            told = now
            tick()


def _hopeless(measured: Measured) -> bool:
    replies = measured.replies
    return len(replies) >= measured.shape.concurrency and len(measured.failed) == len(replies)
