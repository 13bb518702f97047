"""Asks servers in turn with the client of `stackctl bench`: for measuring.py, in the lab's network.

    python3 asking.py < SPEC.json

SPEC: targets {NAME: [URL, served name]}, rounds, concurrency, prompt, output, requests of a round
(CONCURRENCY where left out), aiperf (a path, or null). Each round asks every target; prints for
each its first token (s), tok/s, tok/s of all together, and llama-server's own tok/s. Where the
server has counters, also what was measured in a round as a share of theirs: an engine is not as
fast in one round as in the next, and by its own clock two clients can be compared all the same.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from stackctl.engines import engine
from stackctl.machine import http
from stackctl.machine.streaming_client import StreamingClient
from stackctl.observe.bench import load_generator
from stackctl.observe.bench.aiperf import Aiperf
from stackctl.observe.bench.cell_stats import generation_tok_s
from stackctl.observe.bench.load_generator import CellRun
from stackctl.observe.bench.prompts import Prompts
from stackctl.values.bench import Workload
from stackctl.values.metrics import EngineMetrics

TIMEOUT_S = 300


def main() -> None:
    """Measure and print."""
    spec = json.load(sys.stdin)
    shape = Workload(
        prompt_tokens=spec["prompt"],
        output_tokens=spec["output"],
        concurrency=spec["concurrency"],
    )
    found: dict[str, Any] = {}
    for number in range(spec["rounds"] + 1):
        for name, (url, served) in spec["targets"].items():
            for tool in ("", " by aiperf") if spec.get("aiperf") and number else ("",):
                before = counters(url)
                cell = ask(spec, url, served, shape, aiperf=bool(tool))
                if number:  # the first round is a warm-up
                    figures = found.setdefault(name + tool, {})
                    take(figures, cell)
                    compare(figures, cell, before, counters(url))
    print(json.dumps(found))


def ask(spec: Any, url: str, served: str, shape: Workload, *, aiperf: bool) -> CellRun:
    """One round of one server."""

    def count(text: str) -> int | None:
        path, body = engine("llama.cpp").tokenize_request(text, served)
        answer = http.post(url + path, body, timeout_s=TIMEOUT_S)
        told = answer.json if isinstance(answer, http.HttpAnswer) else None
        return len(told["tokens"]) if isinstance(told, dict) else None

    prompts = Prompts(count)
    times = spec.get("requests", shape.concurrency)
    texts = [prompts.unique(shape.prompt_tokens) for _ in range(times)]
    cell = CellRun(shape, times)
    if aiperf:
        Aiperf(spec["aiperf"], url, None).measure(cell, texts, served, timeout_s=TIMEOUT_S)
    else:
        bodies = [load_generator.request_body(served, text, shape.output_tokens) for text in texts]
        with StreamingClient(url) as streams:
            load_generator.run_cell(streams, cell, bodies, timeout_s=TIMEOUT_S, tick=lambda: None)
    if cell.failed:
        sys.exit(f"{url}: {cell.failed[0].error}")
    return cell


def take(found: dict[str, Any], cell: CellRun) -> None:
    """Add the figures of a round."""
    tokens = sum(reply.output_tokens or 0 for reply in cell.replies)
    found.setdefault("all", []).append(tokens / (cell.ended - cell.began))
    for reply in cell.replies:
        found.setdefault("ttft_s", []).append(reply.ttft_s)
        found.setdefault("tok_s", []).append(generation_tok_s(reply))
        found.setdefault("engine_tok_s", []).append(reply.timings.get("predicted_per_second"))


def counters(url: str) -> EngineMetrics:
    """What the engine has counted by now."""
    answer = http.get(f"{url}/metrics", timeout_s=TIMEOUT_S)
    text = answer.text if isinstance(answer, http.HttpAnswer) and answer.status == 200 else ""
    return engine("llama.cpp").parse_metrics({"/metrics": text}, ())


def compare(found: dict[str, Any], cell: CellRun, old: EngineMetrics, new: EngineMetrics) -> None:
    """Add a round's figures as shares of what the engine counted in it."""
    prompt_s, generation_s, tokens = (
        getattr(new, name) - getattr(old, name) if getattr(old, name) is not None else 0.0
        for name in ("prompt_s", "generation_s", "generation_tokens")
    )
    if not (prompt_s and generation_s):
        return
    speed, first_s = tokens / generation_s, prompt_s / len(cell.replies)
    measured = [generation_tok_s(reply) or 0.0 for reply in cell.replies]
    found.setdefault("tok_s share", []).append(statistics.fmean(measured) / speed)
    waited = [reply.ttft_s or 0.0 for reply in cell.replies]
    found.setdefault("ttft_s share", []).append(statistics.fmean(waited) / first_s)


if __name__ == "__main__":
    main()
