"""Questions to an engine's HTTP endpoint, from "is the port open" to a real completion."""

from __future__ import annotations

import time
from typing import Literal

from stackctl.machine import http
from stackctl.values.result import Result

Liveness = Literal["ready", "loading", "closed", "failing"]

#: Short enough to cost little, long enough to be an answer.
ANSWER_TOKENS = 16
PROMPT = "Name three colours."


def base_url(port: int) -> str:
    """The address of an engine on this machine."""
    return f"http://127.0.0.1:{port}"


def liveness(port: int, health_path: str, *, timeout_s: float = 2) -> Liveness:
    """What the health path says: 200 is ready, 503 still loading, a closed port closed."""
    answer = http.get(base_url(port) + health_path, timeout_s=timeout_s)
    if isinstance(answer, http.NoAnswer):
        return "closed" if "refused" in answer.reason else "failing"
    if answer.status == 200:
        return "ready"
    return "loading" if answer.status == 503 else "failing"


def check(
    port: int, health_path: str, served_name: str, *, answer_timeout_s: float
) -> list[Result]:
    """Health, model list and one completion; stops at the first failure."""
    results = [_health(port, health_path)]
    if results[-1].status == "ok":
        results.append(_model(port, served_name))
    if results[-1].status == "ok":
        results.append(_completion(port, served_name, answer_timeout_s))
    return results


def _health(port: int, health_path: str) -> Result:
    url = base_url(port) + health_path
    answer = http.get(url)
    if isinstance(answer, http.Answer) and answer.status == 200:
        return Result(name="endpoint", status="ok", actual=url)
    seen = answer.reason if isinstance(answer, http.NoAnswer) else f"HTTP {answer.status}"
    if isinstance(answer, http.Answer) and answer.status == 503:
        seen += ", still loading"
    return Result(
        name="endpoint",
        status="fail",
        expected=f"200 from {url}",
        actual=seen,
        remedy="stackctl logs; stackctl restart",
    )


def _model(port: int, served_name: str) -> Result:
    answer = http.get(base_url(port) + "/v1/models")
    listed: list[str] = []
    if isinstance(answer, http.Answer) and isinstance(answer.json, dict):
        data = answer.json.get("data")
        entries = data if isinstance(data, list) else []
        listed = [str(entry.get("id")) for entry in entries if isinstance(entry, dict)]
    return Result(
        name="model",
        status="ok" if served_name in listed else "fail",
        expected=served_name,
        actual=", ".join(listed) or "none listed",
        remedy=None if served_name in listed else "another process answers on this port?",
    )


def _completion(port: int, served_name: str, timeout_s: float) -> Result:
    body = {
        "model": served_name,
        "messages": [{"role": "user", "content": PROMPT}],
        "max_tokens": ANSWER_TOKENS,
        "temperature": 0,
        "stream": False,
    }
    started = time.monotonic()
    answer = http.post(base_url(port) + "/v1/chat/completions", body, timeout_s=timeout_s)
    elapsed = time.monotonic() - started
    expected = f"a completion of at most {ANSWER_TOKENS} tokens"
    if isinstance(answer, http.NoAnswer):
        return Result(
            name="answer", status="fail", expected=expected, actual=answer.reason,
            remedy="stackctl logs",
        )  # fmt: skip
    try:
        text = str(answer.json["choices"][0]["message"]["content"] or "")
        tokens = int(answer.json["usage"]["completion_tokens"])
    except (TypeError, KeyError, IndexError, ValueError):
        return Result(
            name="answer",
            status="fail",
            expected=expected,
            actual=f"HTTP {answer.status}",
            evidence=answer.text[:200],
            remedy="stackctl logs",
        )
    if answer.status != 200 or tokens < 1:
        return Result(
            name="answer", status="fail", expected=expected,
            actual=f"HTTP {answer.status}, {tokens} tokens", evidence=text[:200],
            remedy="stackctl logs",
        )  # fmt: skip
    return Result(
        name="answer",
        status="ok",
        expected=expected,
        actual=f"{tokens} tokens in {elapsed:.1f} s",
        evidence=" ".join(text.split())[:60],
    )
