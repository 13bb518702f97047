"""Completions, and whether they are sane: text, the length that was asked for, also as a stream."""

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

#: Short enough to cost little, long enough to be an answer; and what is asked for besides it.
ANSWER_TOKENS, SHORT_TOKENS = 16, 8
PROMPT = "Name three colours."
#: From so many tokens on a speed is one; below, it is the time to the first token mostly.
SPEED_TOKENS = 64
#: A model of fewer parameters is a toy, of whose text nothing follows.
_TOY_PARAMETERS = 50_000_000
#: A unit of up to 12 signs, six times in a row or more, and nothing else.
_REPETITION = re.compile(r"(.{1,12}?)\1{5,}.{0,11}", re.DOTALL)
_FEWEST_SIGNS = 8


@dataclass(frozen=True)
class Reply:
    """A completion: its text (thoughts first), tokens as the server counts them, why it ended.

    ``hidden``: the server says that there is no content (yet): thoughts that it does not show.
    """

    text: str
    tokens: int
    finish: str | None
    hidden: bool = False


@dataclass(frozen=True)
class Asked:
    """Whom to ask, and how long to wait. ``parameters`` is the size of the model, for which an
    answer that is no text counts only where text can be expected (None: expect it)."""

    url: str
    served_name: str
    timeout_s: float
    key: str | None = None
    parameters: int | None = None

    def post(self, **more: object) -> http.Answer | http.NoAnswer:
        """Ask for a completion of the prompt, always the same one."""
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
    def toy(self) -> bool:
        """Whether nothing can be expected of the model's text."""
        return self.parameters is not None and self.parameters < _TOY_PARAMETERS


def first(asked: Asked) -> Result:
    """One short completion: is it an answer, and is that text?"""
    started = time.monotonic()
    answer = asked.post(max_tokens=ANSWER_TOKENS)
    elapsed = time.monotonic() - started
    expected = f"a completion of at most {ANSWER_TOKENS} tokens"
    if isinstance(answer, http.NoAnswer):
        return _failed("answer", expected, answer.reason, code=no_answer_code(answer))
    reply = read(answer.json)
    if reply is None:
        return _failed("answer", expected, f"HTTP {answer.status}", answer.text[:200])
    if answer.status != 200 or reply.tokens < 1:
        seen = f"HTTP {answer.status}, {reply.tokens} tokens"
        return _failed("answer", expected, seen, reply.text[:200])
    if not reply.hidden and (why := garbage(reply.text, toy=asked.toy)):
        shown = " ".join(reply.text.split())[:16]
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
        actual=told(reply.tokens, elapsed),
        evidence=" ".join(reply.text.split())[:60],
    )


def told(tokens: int, seconds: float) -> str:
    """Tokens and time; a speed only where there are enough tokens for one."""
    text = f"{tokens} tokens in {seconds:.1f} s"
    return f"{text}, {tokens / seconds:.1f} tok/s" if tokens >= SPEED_TOKENS and seconds else text


def garbage(text: str, *, toy: bool = False) -> str | None:
    """Why a text is not one; None where it may be.

    Logits that are no numbers choose token 0 for ever: "!" in byte-level vocabularies, in others a
    sign that is not shown at all.
    """
    signs = "".join(text.split())
    if len(signs) >= _FEWEST_SIGNS and set(signs) == {"!"}:
        return "not text"
    if toy:
        return None
    if not signs:
        return "empty"
    odd = sum(
        sign == "\ufffd" or unicodedata.category(sign) in ("Cc", "Cn", "Co") for sign in signs
    )
    # A last sign of several bytes may be cut off.
    if odd > 1 and odd * 3 >= len(signs):
        return "not text"
    if len(signs) >= _FEWEST_SIGNS and _REPETITION.fullmatch(signs):
        return "the same again and again"
    return None


def further(asked: Asked) -> list[Result]:
    """Whether ``max_tokens`` and ``stop`` end an answer, and a stream says what a whole one says.

    Three completions of a few tokens. An engine too busy for them is not wrong: "skip".
    """
    # ignore_eos: both engines know it; a model that has said all must not end the count.
    body = {"max_tokens": SHORT_TOKENS, "ignore_eos": True}
    answer = asked.post(**body)
    whole = None if isinstance(answer, http.NoAnswer) else read(answer.json)
    if isinstance(answer, http.NoAnswer) or whole is None:
        return [_unanswered("length", answer)]
    return [_length(whole), _stream(asked, whole, body), _stop(asked, whole, body)]


def read(data: Any) -> Reply | None:
    """A completion in one piece, as JSON; None when it is none."""
    try:
        choice, tokens = data["choices"][0], int(data["usage"]["completion_tokens"])
        message = choice["message"]
        hidden = message.get("content") is None
        return Reply(_text(message), tokens, choice.get("finish_reason"), hidden)
    except (TypeError, KeyError, IndexError, ValueError, AttributeError):
        return None


def read_stream(text: str) -> Reply | None:
    """A completion as server-sent events; None when it breaks off or holds an error.

    ``tokens`` counts its pieces, of which each holds a token or more.
    """
    parts, finish, done = list[str](), None, False
    for line in text.splitlines():
        field, _, value = line.partition(":")
        if field != "data":
            continue
        value = value.strip()
        done = value == "[DONE]"
        if done:
            break
        try:
            choices = json.loads(value).get("choices", None)
            if choices is None:
                return None
            for choice in choices:
                parts.append(_text(choice.get("delta") or {}))
                finish = choice.get("finish_reason") or finish
        except (ValueError, AttributeError, TypeError):
            return None
    return Reply("".join(parts), len([part for part in parts if part]), finish) if done else None


def _text(message: Mapping[str, Any]) -> str:
    """What a message says; thoughts come first, and each engine has its own name for them."""
    thoughts = message.get("reasoning_content") or message.get("reasoning")
    return str(thoughts or "") + str(message.get("content") or "")


def _length(whole: Reply) -> Result:
    expected = f"{SHORT_TOKENS} tokens, finish_reason length"
    seen = f"{whole.tokens} tokens, finish_reason {whole.finish}"
    early = whole.finish == "stop" and whole.tokens < SHORT_TOKENS
    exact = whole.finish == "length" and whole.tokens == SHORT_TOKENS
    return _judged("length", early or exact, expected, seen)


def _stream(asked: Asked, whole: Reply, body: Mapping[str, object]) -> Result:
    expected, seen = "the same answer as in one piece", ""
    for attempt in range(2):
        answer = asked.post(**{**body, "stream": True})
        if isinstance(answer, http.NoAnswer) or answer.status != 200:
            return _unanswered("stream", answer)
        streamed = read_stream(answer.text)
        if streamed is None:
            end = answer.text.strip()[-200:]
            return _failed("stream", expected, "it breaks off, or is none", end)
        if streamed.finish != whole.finish:
            why = f"finish_reason {streamed.finish} instead of {whole.finish}"
            return _failed("stream", expected, why)
        if _same_start(whole.text, streamed.text):
            return Result(name="stream", status="ok", expected=expected, actual="as in one piece")
        seen = f'"{streamed.text[:24]}" instead of "{whole.text[:24]}"'
        # The first of two equal questions is computed in other batches than the second: at a near
        # tie of two tokens rounding decides. Of the caches' answers both are alike.
        again = asked.post(**body) if attempt == 0 else None
        if isinstance(again, http.Answer):
            whole = read(again.json) or whole
    if asked.toy:
        return Result(name="stream", status="info", expected=expected, actual=seen)
    return _failed("stream", expected, seen)


def _same_start(one: str, two: str) -> bool:
    if not one or not two:
        return one == two
    half = max(1, min(len(one), len(two)) // 2)
    return one[:half] == two[:half]


def _stop(asked: Asked, whole: Reply, body: Mapping[str, object]) -> Result:
    found = re.search(r"\S{2,3}", whole.text[1:])
    if found is None:
        return Result(name="stop", status="skip", actual="the answer has no text to stop at")
    word = found[0]
    expected = f'an end before "{word}", finish_reason stop'
    answer = asked.post(**{**body, "stop": [word]})
    reply = None if isinstance(answer, http.NoAnswer) else read(answer.json)
    if isinstance(answer, http.NoAnswer) or reply is None:
        return _unanswered("stop", answer)
    seen = f'finish_reason {reply.finish}, "{reply.text[:24]}"'
    if word not in reply.text and reply.finish == "length" and reply.tokens == SHORT_TOKENS:
        # Another answer than before: rounding, see above.
        return Result(name="stop", status="info", expected=expected, actual=seen)
    return _judged("stop", word not in reply.text and reply.finish == "stop", expected, seen)


def _judged(name: str, well: bool, expected: str, seen: str) -> Result:
    status: Status = "ok" if well else "fail"
    remedy = None if well else "stackctl logs"
    return Result(name=name, status=status, expected=expected, actual=seen, remedy=remedy)


def _unanswered(name: str, answer: http.Answer | http.NoAnswer) -> Result:
    if isinstance(answer, http.NoAnswer):
        if answer.late:
            return Result(name=name, status="skip", actual=f"busy: {answer.reason}")
        return _failed(name, "an answer", answer.reason, code=no_answer_code(answer))
    return _failed(name, "an answer", f"HTTP {answer.status}", answer.text[:200])


def no_answer_code(answer: http.Answer | http.NoAnswer) -> ResultCode | None:
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
