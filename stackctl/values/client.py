"""Settings for programs that use a stack: the document ``stackctl.client/1``."""

from __future__ import annotations

from typing import Literal

from stackctl.values.base import Value

Tool = Literal["aider", "openai"]


class Speeds(Value, frozen=True, kw_only=True):
    """Tokens a second of one request: in generation and in prompts; None where unknown."""

    decode_tok_s: float | None = None
    prefill_tok_s: float | None = None
    source: Literal["measured", "predicted"] | None = None


class ClientFile(Value, frozen=True, kw_only=True):
    """A file of a client, with what it should hold, and why so."""

    name: str
    text: str
    reasons: tuple[str, ...] = ()


class ClientReport(Value, frozen=True, kw_only=True):
    """How a client reaches a stack.

    ``environment`` is NAME=VALUE texts; ``key_command`` prints the API key, which stands nowhere
    here, and is None when clients need none. ``context`` counts the tokens of one request, prompt
    and answer; ``output_tokens`` of them are left for the answer.
    """

    schema: Literal["stackctl.client/1"] = "stackctl.client/1"
    stack: str
    tool: Tool
    endpoint: str
    model: str
    context: int | None = None
    output_tokens: int | None = None
    environment: tuple[str, ...]
    key_command: str | None = None
    speeds: Speeds = Speeds()
    files: tuple[ClientFile, ...] = ()
