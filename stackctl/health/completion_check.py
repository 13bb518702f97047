"""Tests of completions: text, the requested length, stop words, and the same answer as a stream."""

from __future__ import annotations

import json
import re
import time
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from stackctl.machine import http
from stackctl.values.result import Result, ResultCode, Status

#: Tokens of the first answer (cheap, but enough for an answer), and of the further ones.
ANSWER_TOKENS, SHORT_TOKENS = 16, 8
PROMPT = "Name three colours."
#: Fewest tokens for a speed; with fewer, most of the time is the time to the first token.
SPEED_TOKENS = 64
#: A model with fewer parameters is a toy, whose text proves nothing.
_TOY_PARAMETERS = 50_000_000
#: Only a unit of up to 12 characters, repeated six times or more.
_REPETITION = re.compile(r"(.{1,12}?)\1{5,}.{0,11}", re.DOTALL)
_FEWEST_SIGNS = 8


@dataclass(frozen=True)
class Completion:
    """A completion: its text (reasoning first), its tokens as the server counts them, and its
    finish_reason.

    ``hidden`` is set if the message has no content, for example because the server does not show
    its reasoning.
    """

    text: str
    tokens: int
    finish: str | None
    hidden: bool = False


@dataclass(frozen=True)
class CompletionProbe:
    """A server and model to ask, the time limit in seconds, and the API key.

    ``parameters`` is the size of the model; an answer without words fails only if the model is
    large enough to produce text (None: it is).
    """

    url: str
    served_name: str
    timeout_s: float
    key: str | None = None
    parameters: int | None = None

    def post(self, **more: object) -> http.HttpAnswer | http.NoAnswer:
        """Send a request for a completion of the fixed prompt, and return the answer."""
        body: dict[str, object] = {
            "model": self.served_name,
            "messages": [{"role": "user", "content": PROMPT}],
            "temperature": 0,
            "stream": False,
            **more,
        }
        url = self.url + "/v1/chat/completions"
        return http.post(url, body, timeout_s=self.timeout_s, key=self.key)

    @property
    def is_toy_model(self) -> bool:
        """Return True if the model is too small to produce text."""
        return self.parameters is not None and self.parameters < _TOY_PARAMETERS


def check_completion(probe: CompletionProbe) -> Result:
    """Return the result of one short completion: it must be an answer, and text."""
    started = time.monotonic()
    answer = probe.post(max_tokens=ANSWER_TOKENS)
    elapsed = time.monotonic() - started
    expected = f"a completion of at most {ANSWER_TOKENS} tokens"
    if isinstance(answer, http.NoAnswer):
        return _failed("answer", expected, answer.reason, code=no_answer_code(answer))
    completion = parse_completion(answer.json)
    if completion is None:
        return _failed("answer", expected, f"HTTP {answer.status}", answer.text[:200])
    if answer.status != 200 or completion.tokens < 1:
        seen = f"HTTP {answer.status}, {completion.tokens} tokens"
        return _failed("answer", expected, seen, completion.text[:200])
    if not completion.hidden and (why := text_defect(completion.text, toy=probe.is_toy_model)):
        shown = " ".join(completion.text.split())[:16]
        return _failed(
            "answer",
            "text",
            f'{why}: "{shown}"' if shown else why,
            "wrong arithmetic answers like this: damaged weights, or a faulty kernel",
            code="not-text",
        )
    return Result(
        name="answer",
        status="ok",
        expected=expected,
        actual=completion_speed(completion.tokens, elapsed),
        evidence=" ".join(completion.text.split())[:60],
    )


def completion_speed(tokens: int, seconds: float) -> str:
    """Return tokens and time as text, with the speed if there are enough tokens for it."""
    text = f"{tokens} tokens in {seconds:.1f} s"
    return f"{text}, {tokens / seconds:.1f} tok/s" if tokens >= SPEED_TOKENS and seconds else text


def text_defect(text: str, *, toy: bool = False) -> str | None:
    """Return the reason why a text cannot be an answer; None if it can.

    Logits that are NaN always choose token 0: "!" in byte-level vocabularies, in others an
    invisible character. For a ``toy`` model only a row of "!" counts.
    """
    signs = "".join(text.split())
    if len(signs) >= _FEWEST_SIGNS and set(signs) == {"!"}:
        return "not text"
    if toy:
        return None
    if not signs:
        return "empty"
    odd = sum(s == "\ufffd" or unicodedata.category(s) in ("Cc", "Cn", "Co") for s in signs)
    # A last character of several bytes may be cut off.
    if odd > 1 and odd * 3 >= len(signs):
        return "not text"
    if len(signs) >= _FEWEST_SIGNS and _REPETITION.fullmatch(signs):
        return "the same again and again"
    return None


def extended_checks(probe: CompletionProbe) -> list[Result]:
    """Check that ``max_tokens`` and ``stop`` end an answer, and that a stream gives the same one.

    This takes a few completions of a few tokens. If the engine is too busy for them, the result is
    "skip".
    """
    # ignore_eos, which both engines accept, keeps a finished model from ending the count.
    body = {"max_tokens": SHORT_TOKENS, "ignore_eos": True}
    answer = probe.post(**body)
    whole = None if isinstance(answer, http.NoAnswer) else parse_completion(answer.json)
    if isinstance(answer, http.NoAnswer) or whole is None:
        return [_unanswered("length", answer)]
    return [_length(whole), _stream(probe, whole, body), _stop(probe, whole, body)]


def parse_completion(data: Any) -> Completion | None:
    """Return a completion from JSON; None if the JSON is not a completion."""
    try:
        choice, tokens = data["choices"][0], int(data["usage"]["completion_tokens"])
        message = choice["message"]
        hidden = message.get("content") is None
        return Completion(_text(message), tokens, choice.get("finish_reason"), hidden)
    except (TypeError, KeyError, IndexError, ValueError, AttributeError):
        return None


def parse_stream(text: str) -> Completion | None:
    """Return a completion from server-sent events; None if they break off or hold an error.

    ``tokens`` is the number of pieces; each holds one or more tokens.
    """
    parts, finish = list[str](), None
    for line in text.splitlines():
        field, _, value = line.partition(":")
        if field != "data":
            continue
        if value.strip() == "[DONE]":
            return Completion("".join(parts), len(list(filter(None, parts))), finish)
        try:
            for choice in json.loads(value)["choices"]:
                parts.append(_text(choice.get("delta") or {}))
                finish = choice.get("finish_reason") or finish
        except (ValueError, AttributeError, KeyError, TypeError):
            return None
    return None


def _text(message: Mapping[str, Any]) -> str:
    """Return the text of a message, reasoning first; engines use different keys for it."""
    thoughts = message.get("reasoning_content") or message.get("reasoning")
    return str(thoughts or "") + str(message.get("content") or "")


def _length(whole: Completion) -> Result:
    expected = f"{SHORT_TOKENS} tokens, finish_reason length"
    seen = f"{whole.tokens} tokens, finish_reason {whole.finish}"
    early = whole.finish == "stop" and whole.tokens < SHORT_TOKENS
    exact = whole.finish == "length" and whole.tokens == SHORT_TOKENS
    return _judged("length", early or exact, expected, seen)


def _stream(probe: CompletionProbe, whole: Completion, body: Mapping[str, object]) -> Result:
    expected, seen = "the same answer as in one piece", ""
    for attempt in range(2):
        answer = probe.post(**{**body, "stream": True})
        if isinstance(answer, http.NoAnswer) or answer.status != 200:
            return _unanswered("stream", answer)
        streamed = parse_stream(answer.text)
        if streamed is None:
            end = answer.text.strip()[-200:]
            return _failed("stream", expected, "it breaks off, or is not a stream", end)
        if streamed.finish != whole.finish:
            why = f"finish_reason {streamed.finish} instead of {whole.finish}"
            return _failed("stream", expected, why)
        if _same_start(whole.text, streamed.text):
            return Result(name="stream", status="ok", expected=expected, actual="as in one piece")
        seen = f'"{streamed.text[:24]}" instead of "{whole.text[:24]}"'
        # The second of two equal requests uses the prefix cache, so it is computed in other batches
        # than the first, and rounding decides between two tokens of nearly equal probability. Two
        # requests that both use the cache agree, so another pair is compared.
        again = probe.post(**body) if attempt == 0 else None
        if isinstance(again, http.HttpAnswer):
            whole = parse_completion(again.json) or whole
    if probe.is_toy_model:
        return Result(name="stream", status="info", expected=expected, actual=seen)
    return _failed("stream", expected, seen)


def _same_start(one: str, two: str) -> bool:
    if not one or not two:
        return one == two
    half = max(1, min(len(one), len(two)) // 2)
    return one[:half] == two[:half]


def _stop(probe: CompletionProbe, whole: Completion, body: Mapping[str, object]) -> Result:
    found = re.search(r"\S{2,3}", whole.text[1:])
    if found is None:
        return Result(name="stop", status="skip", actual="the answer has no text to stop at")
    word = found[0]
    expected = f'an end before "{word}", finish_reason stop'
    answer = probe.post(**{**body, "stop": [word]})
    completion = None if isinstance(answer, http.NoAnswer) else parse_completion(answer.json)
    if isinstance(answer, http.NoAnswer) or completion is None:
        return _unanswered("stop", answer)
    seen = f'finish_reason {completion.finish}, "{completion.text[:24]}"'
    without = word not in completion.text
    if without and completion.finish == "length" and completion.tokens == SHORT_TOKENS:
        # A different answer than before, because of rounding; see _stream.
        return Result(name="stop", status="info", expected=expected, actual=seen)
    return _judged("stop", without and completion.finish == "stop", expected, seen)


def _judged(name: str, well: bool, expected: str, seen: str) -> Result:
    status: Status = "ok" if well else "fail"
    remedy = None if well else "stackctl logs"
    return Result(name=name, status=status, expected=expected, actual=seen, remedy=remedy)


def _unanswered(name: str, answer: http.HttpAnswer | http.NoAnswer) -> Result:
    if isinstance(answer, http.NoAnswer):
        if answer.late:
            return Result(name=name, status="skip", actual=f"busy: {answer.reason}")
        return _failed(name, "an answer", answer.reason, code=no_answer_code(answer))
    return _failed(name, "an answer", f"HTTP {answer.status}", answer.text[:200])


def no_answer_code(answer: http.HttpAnswer | http.NoAnswer) -> ResultCode | None:
    """Return the code of a request without an HTTP answer; None if there was one."""
    return "no-answer" if isinstance(answer, http.NoAnswer) else None


def _failed(
    name: str,
    expected: str,
    actual: str,
    evidence: str | None = None,
    code: ResultCode | None = None,
) -> Result:
    return Result(
        name=name, status="fail", expected=expected, actual=actual, evidence=evidence,
        remedy="stackctl logs", code=code,
    )  # fmt: skip
