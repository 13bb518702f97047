"""Checks of an engine's HTTP endpoint, from the open port to a real completion."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from stackctl.engines.protocol import Engine, Reports
from stackctl.health.completion_check import CompletionProbe, check_completion, no_answer_code
from stackctl.machine import http
from stackctl.values.generation import EngineFact
from stackctl.values.metrics import EngineMetrics
from stackctl.values.result import Result

Liveness = Literal["ready", "loading", "unwell", "closed", "failing"]


def base_url(port: int, address: str = "127.0.0.1") -> str:
    """Return the URL for requests to a local server that listens on one address or on all."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(address, address)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def liveness(port: int, health_path: str, *, timeout_s: float = 2) -> Liveness:
    """Return the state that the health path reports: 200 is ready, a closed port closed.

    An answer 503 with "loading" in its text comes from an engine that loads its model, and a 503
    with any other text from an engine whose computing process has ended (unwell).
    """
    answer = http.get(base_url(port) + health_path, timeout_s=timeout_s)
    if isinstance(answer, http.NoAnswer):
        return "closed" if answer.refused else "failing"
    if answer.status == 200:
        return "ready"
    if answer.status == 503:
        return "loading" if _loads(answer) else "unwell"
    return "failing"


def _loads(answer: http.HttpAnswer) -> bool:
    return answer.status == 503 and "loading" in answer.text.lower()


def check_endpoint(
    url: str,
    health_path: str,
    served_name: str,
    *,
    answer_timeout_s: float,
    key: str | None = None,
    parameters: int | None = None,
) -> list[Result]:
    """Return the results for health, model list and one completion, up to the first failure.

    ``parameters`` is the size of the model, see CompletionProbe.
    """
    probe = CompletionProbe(url, served_name, answer_timeout_s, key, parameters)
    results = [_health(url + health_path)]
    if results[-1].status == "ok":
        results.append(check_model_listed(url, served_name, key=key))
    if results[-1].status == "ok":
        results.append(check_completion(probe))
    return results


def scrape(
    port: int, engine: Engine, argv: Sequence[str], *, timeout_s: float
) -> tuple[EngineMetrics | None, bool]:
    """Read the metrics of an engine that was started with these arguments.

    Returns:
        The metrics (None if there are none), and True if the engine did not answer in time.
    """
    answers = {}
    for path in engine.metrics_paths:
        answer = http.get(base_url(port) + path, timeout_s=timeout_s)
        if isinstance(answer, http.NoAnswer):
            return None, answer.late
        if answer.status == 200:
            answers[path] = answer.text
    # The first path has the counters; without them the other paths are useless.
    if engine.metrics_paths[0] not in answers:
        return None, False
    return engine.parse_metrics(answers, argv), False


def is_busy(port: int, engine: Engine, argv: Sequence[str]) -> bool:
    """Return True if an engine has requests, by its metrics.

    An engine that does not answer in time is busy too: some answer only between two batches of a
    prompt, and a batch may take long on a CPU. An engine without metrics counts as idle.
    """
    metrics, late = scrape(port, engine, argv, timeout_s=2)
    return late if metrics is None else bool(metrics.running or metrics.waiting)


def read_reports(port: int, reports: Reports) -> tuple[EngineFact, ...]:
    """Return the facts that an engine reports over HTTP: one for each of ``reports`` it answers."""
    facts, answers = [], dict[str, Any]()
    for name, path, keys in reports:
        if path not in answers:
            answer = http.get(base_url(port) + path)
            answers[path] = answer.json if isinstance(answer, http.HttpAnswer) else None
        value = answers[path]
        try:
            for step in keys:
                value = value[step]
        except (TypeError, KeyError, IndexError):
            continue
        if isinstance(value, str | int | float):
            facts.append(EngineFact(name=name, value=str(value)))
    return tuple(facts)


def _health(url: str) -> Result:
    answer = http.get(url)
    if isinstance(answer, http.HttpAnswer) and answer.status == 200:
        return Result(name="endpoint", status="ok", actual=url)
    seen = answer.reason if isinstance(answer, http.NoAnswer) else f"HTTP {answer.status}"
    if isinstance(answer, http.HttpAnswer) and answer.status == 503:
        seen += ", still loading" if _loads(answer) else ": the engine has ended"
    return Result(
        name="endpoint",
        status="fail",
        expected=f"200 from {url}",
        actual=seen,
        remedy="stackctl logs; stackctl restart",
        code=no_answer_code(answer),
    )


def check_model_listed(url: str, served_name: str, *, key: str | None = None) -> Result:
    """Return the result for the model list of the server at a URL: it must hold the model."""
    answer = http.get(url + "/v1/models", key=key)
    listed: list[str] = []
    if isinstance(answer, http.HttpAnswer) and isinstance(answer.json, dict):
        data = answer.json.get("data")
        entries = data if isinstance(data, list) else []
        listed = [str(entry.get("id")) for entry in entries if isinstance(entry, dict)]
    return Result(
        name="model",
        status="ok" if served_name in listed else "fail",
        expected=served_name,
        actual=", ".join(listed) or _no_models_reason(answer),
        remedy=None if served_name in listed else "another process answers on this port?",
        code=no_answer_code(answer),
    )


def _no_models_reason(answer: http.HttpAnswer | http.NoAnswer) -> str:
    if isinstance(answer, http.NoAnswer):
        return answer.reason
    return "none listed" if answer.status == 200 else f"HTTP {answer.status}"
