"""The streaming client against a real server: moments, streams at the same time, failures."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from samples import EPYC, IQUEST, LATENCY, plan, served
from streaming import HEAD, Step, completion, event, piece, serve

from stackctl.cli.output import Output
from stackctl.errors import StackctlError
from stackctl.machine.streaming_client import StreamingClient
from stackctl.observe.bench import cell_stats, load_generator, matrix
from stackctl.observe.bench.load_generator import CellRun
from stackctl.observe.bench.run import Bench, BenchEndpoint
from stackctl.values.bench import Workload
from stackctl.values.profile import Slo


def measure(
    url: str, shape: Workload, requests: int, *, key: str | None = None, timeout_s: float = 20
) -> CellRun:
    cell = CellRun(shape, requests)
    words = " ".join(["word"] * (shape.prompt_tokens - 4))
    bodies = [load_generator.request_body("m", words, shape.output_tokens)] * requests
    with StreamingClient(url, key=key) as streams:
        load_generator.run_cell(streams, cell, bodies, timeout_s=timeout_s, tick=lambda: None)
        assert len(streams) == 0
    return cell


def test_a_cell_with_known_delays() -> None:
    def answer(body: dict[str, Any]) -> list[Step]:
        return completion(body, first_s=0.05, gap_s=0.005, cached=7)

    shape = Workload(prompt_tokens=20, output_tokens=64, concurrency=4)
    with serve(answer) as server:
        cell = measure(server.url, shape, 8)
    found = cell_stats.summarize_cell(cell, slo=None, parameters=2_000_000_000)
    assert (found.requests, found.failed, server.most) == (8, 0, 4)
    assert (found.prompt_tokens, found.output_tokens, found.cached_tokens) == (20, 64, 7)
    assert found.ttft_s and found.itl_ms and found.generation_tok_s and found.e2e_s
    assert found.ttft_s.n == 8
    assert found.itl_ms.n == 8 * 63
    # Never earlier than it was sent; how much later is the machine's business. Pieces that it lets
    # wait for each other come together, which makes those between the first and the last fewer.
    assert found.ttft_s.p5 >= 0.05
    assert found.itl_ms.mean >= 5 * 0.8
    assert found.generation_tok_s.p50 <= 1 / 0.005 / 0.8
    assert found.e2e_s.p5 >= 0.05 + 63 * 0.005
    assert found.performance_factor == pytest.approx(found.generation_tok_s.p50 / 2)
    assert found.output_tok_s == pytest.approx(8 * 64 / found.seconds)
    assert (found.goodput, found.prompt_tok_s) == (None, None)


def test_moments_are_those_of_arrival_not_of_reading() -> None:
    """The client sleeps while pieces arrive; what it reads late keeps its moment."""
    with (
        serve(lambda _: [(0, HEAD), (0, piece("a")), (5, None)]) as server,
        StreamingClient(server.url) as streams,
    ):
        time.sleep(0.1)  # the kernel turns its stamps on a moment later
        assert streams.post("/v1/chat/completions", b"{}") is None
        while len(server.sent) < 2:
            time.sleep(0.001)
        time.sleep(0.2)
        asleep_until = time.perf_counter()
        for _ in streams.poll(1):
            pass
        (exchange,) = streams.cancel()
        moment = exchange.pieces[-1][0]
    assert moment < asleep_until - 0.1
    assert server.sent[0][0] - 0.002 <= moment
    assert streams.lags[-1] >= 0.1


def test_what_is_asked_for() -> None:
    with serve(completion) as server:
        measure(server.url, Workload(prompt_tokens=10, output_tokens=3), 1, key="sk-1")
    ((path, fields, body),) = server.requests
    assert path == "/v1/chat/completions"
    assert fields["authorization"] == "Bearer sk-1"
    assert (body["stream"], body["stream_options"]) == (True, {"include_usage": True})
    assert (body["max_tokens"], body["ignore_eos"], body["model"]) == (3, True, "m")


def test_some_requests_fail() -> None:
    told = iter(range(6))

    def answer(body: dict[str, Any]) -> list[Step]:
        if next(told) % 3 == 2:
            return [(0, HEAD), (0, piece("a")), (0, event({"error": {"message": "lost"}})),
                    (0, None)]  # fmt: skip
        return completion(body)

    with serve(answer) as server:
        cell = measure(server.url, Workload(prompt_tokens=10, output_tokens=64), 6)
    found = cell_stats.summarize_cell(cell, slo=Slo(ttft_s=60, prompt_tokens=10), parameters=None)
    assert (found.requests, found.failed) == (6, 2)
    # Those that failed are in no figure but the goodput.
    assert found.ttft_s and found.ttft_s.n == 4
    assert found.goodput == pytest.approx(4 / 6)
    assert found.notes[0] == "2 of 6 requests failed: error in the stream: lost"
    assert found.performance_factor is None


def test_a_server_that_does_not_tell_what_was_cached() -> None:
    def answer(body: dict[str, Any]) -> list[Step]:
        usage = {"prompt_tokens": 10, "completion_tokens": 3}
        return [
            (0, HEAD), (0, piece("a")), (0, event({"choices": [], "usage": usage})),
            (0, event(b"[DONE]") + b"0\r\n\r\n"),
        ]  # fmt: skip

    shape = Workload(prompt_tokens=10, output_tokens=3, cached=True)
    with serve(answer) as server:
        found = cell_stats.summarize_cell(measure(server.url, shape, 1), slo=None, parameters=None)
    assert found.cached_tokens is None
    assert any("does not tell cached tokens" in note for note in found.notes)


def test_where_nothing_answers_it_stops_early() -> None:
    refused = json.dumps({"error": {"message": "no"}}).encode()
    with serve(lambda _: [(0, b"HTTP/1.1 403 No\r\n\r\n" + refused), (0, None)]) as server:
        cell = measure(server.url, Workload(prompt_tokens=10, output_tokens=3, concurrency=2), 50)
        url = server.url
    assert len(cell.replies) <= 4
    assert {reply.error for reply in cell.replies} == {"HTTP 403: no"}
    cell = measure(url, Workload(prompt_tokens=10, output_tokens=3, concurrency=2), 50)
    assert [reply.error for reply in cell.replies] == ["connection refused"] * 2


def test_a_server_that_says_nothing_more() -> None:
    with serve(lambda _: [(0, HEAD), (0, piece("a")), (30, None)]) as server:
        cell = measure(server.url, Workload(prompt_tokens=10, output_tokens=3), 1, timeout_s=0.3)
    assert [reply.error for reply in cell.replies] == ["no end within 0 s"]


def test_an_end_without_closing() -> None:
    """A server that keeps the connection open all the same: the last chunk is the end."""

    def answer(body: dict[str, Any]) -> list[Step]:
        return [*completion(body), (30, None)]

    with serve(answer) as server:
        cell = measure(server.url, Workload(prompt_tokens=10, output_tokens=3), 2)
    assert [reply.error for reply in cell.replies] == [None, None]


def test_an_interrupt_leaves_whole_answers() -> None:
    def stop() -> None:
        if len(cell.replies) >= 2:
            raise KeyboardInterrupt

    cell = CellRun(Workload(prompt_tokens=10, output_tokens=3), 100)
    with (
        serve(lambda body: completion(body, first_s=0.15)) as server,
        StreamingClient(server.url) as streams,
        pytest.raises(KeyboardInterrupt),
    ):
        bodies = [load_generator.request_body("m", "word", 3)] * 100
        load_generator.run_cell(streams, cell, bodies, timeout_s=20, tick=stop)
    assert 2 <= len(cell.replies) < 100
    assert not cell.failed


def test_only_http() -> None:
    with pytest.raises(StackctlError, match="not an http address"):
        StreamingClient("https://example.invalid")


# A whole bench


def test_a_bench_measures_its_cells_and_ends() -> None:
    def answer(body: dict[str, Any]) -> list[Step]:
        if "messages" not in body:  # no tokenizer
            return [(0, b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n"), (0, None)]
        return completion(body, first_s=0.002, gap_s=0.001)

    generation = served(plan(EPYC, IQUEST, LATENCY))
    options = matrix.BenchOptions(prompts=(80,), outputs=(8,), concurrency=(1, 2), requests=2)
    with serve(answer) as server:
        site = BenchEndpoint(
            url=server.url, engine_url=server.url, key=None, current=lambda: generation.number
        )
        bench = Bench(
            Output(quiet=True), generation, options, site=site, slo=Slo(ttft_s=5.0), timeout_s=20
        )
        assert not bench.measure()
    report, samples = bench.result(interrupted=False)
    assert report.complete
    assert report.lengths == "estimated"
    assert [(cell.shape.concurrency, cell.shape.cached) for cell in report.cells] == [
        (1, False), (2, False), (1, True)
    ]  # fmt: skip
    assert [cell.requests for cell in report.cells] == [2, 2, 2]
    assert {result.name for result in report.results} >= {"requests", "slo-ttft"}
    assert [sample.cell for sample in samples] == [0, 0, 1, 1, 2, 2]
