"""The load generator: sends requests to a running stack at a given concurrency."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import msgspec

from stackctl.machine.streaming_client import StreamedRequest, StreamingClient
from stackctl.observe.bench.sse import StreamedCompletion, read_completion
from stackctl.values.bench import Workload

_PATH = "/v1/chat/completions"
_TICK_S = 0.2


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

    A new request follows each one that has ended. Stop early if the first request of every stream
    fails. After an interrupt ``run`` holds complete replies only.

    Args:
        client: the connections to the server.
        run: the cell.
        bodies: the bodies of the requests.
        timeout_s: the seconds that one request may take.
        tick: called about five times a second, to show progress.
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
