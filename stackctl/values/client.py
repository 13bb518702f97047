"""Settings for programs that use a stack: the document ``stackctl.client/1``."""

from __future__ import annotations

from typing import Literal

from stackctl.values.base import Value

Tool = Literal["aider", "openai"]


class Speeds(Value, frozen=True, kw_only=True):
    """Tokens per second of one request, in generation and in prompts; None if unknown."""

    decode_tok_s: float | None = None
    prefill_tok_s: float | None = None
    source: Literal["measured", "predicted"] | None = None


class ClientFile(Value, frozen=True, kw_only=True):
    """A configuration file of a client: its name, its text, and the reasons for the settings."""

    name: str
    text: str
    reasons: tuple[str, ...] = ()


class ClientReport(Value, frozen=True, kw_only=True):
    """The settings that a client needs to use a stack.

    ``environment`` holds NAME=VALUE texts. ``key_command`` prints the API key (None: clients need
    no key); the report never holds the key itself. ``context`` is the number of tokens of one
    request, prompt and answer; ``output_tokens`` of them are reserved for the answer.
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
