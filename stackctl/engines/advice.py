"""The shape of the advice that each engine has for its users."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from stackctl.values.diagnosis import Step


@dataclass(frozen=True)
class Advice:
    """The parts of the advice to users that differ between engines.

    ``use_gpu`` is the step from a CPU to a GPU. ``large_batches`` are options for the prompt tokens
    of one step, each with a value above which prompts are hardly faster. ``small_batches`` are
    arguments with which the first token comes sooner; None if the engine has none.
    ``cached_tokens_option`` makes each answer report the tokens that the prefix cache had; None if
    answers always do. ``log_mark`` stands in lines of its log that report a speed.
    """

    use_gpu: Step
    large_batches: Mapping[str, int]
    small_batches: str | None
    cached_tokens_option: str | None
    log_mark: str
