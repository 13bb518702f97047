"""Starts that fail in a way whose remedy is known, and are tried once more with it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TypeVar

from stackctl.deploy import gpu
from stackctl.deploy.context import Context
from stackctl.errors import DidNotStart
from stackctl.state import learned
from stackctl.state.generations import now
from stackctl.values.generation import Generation
from stackctl.values.measured import Learned

#: The GPUs on which some nvfp4 kernels of vLLM compute wrongly, or not at all: RTX PRO 6000 and
#: RTX 50 (Blackwell, but not the data centre's).
_SM_120 = "12.0"
_MARLIN = "marlin"

T = TypeVar("T")


def with_other_kernels(
    context: Context, stack: str, attempt: Callable[[Context, Learned | None], T]
) -> T:
    """Attempt a start. Where nvfp4 kernels are at fault, once more with those that compute in 16
    bits; if that helps, it is remembered for this image and GPU.

    Raises:
        StackctlError: of the last attempt; the machine is as it was before.
    """
    try:
        return attempt(context, None)
    except DidNotStart as error:
        lesson = _lesson(context, stack, error) if error.kernel else None
        if lesson is None:
            raise
        options = " ".join(f"--{text.replace('=', ' ')}" for text in lesson.options)
        context.report.warn(f"{error.message}: once more with {options}")
    done = attempt(agreed(context), lesson)
    learned.add(context.paths.state, lesson)
    return done


def agreed(context: Context) -> Context:
    """For one more attempt at a change to which the user has agreed."""
    return dataclasses.replace(context, confirm=lambda _: True)


def _lesson(context: Context, stack: str, error: DidNotStart) -> Learned | None:
    """What the next attempt does differently; None where nothing is known to help."""
    failed = _newest(context, stack)
    if failed is None or not gpu.wants_nvfp4(failed.plan):
        return None
    cards = gpu.planned(failed.host, failed.plan)
    if not cards or any(card.compute_capability != _SM_120 for card in cards):
        return None
    wanted = ["linear-backend", *(["moe-backend"] if failed.plan.model.experts else [])]
    decided = {decision.field for decision in failed.plan.decisions}
    facts = context.engine_facts.get(failed.image_id)
    known = {name for option in facts.options for name in option.names} if facts else set()
    names = [name for name in wanted if name not in decided and f"--{name}" in known]
    if not names:
        return None
    return Learned(
        image_id=failed.image_id,
        gpu=cards[0].name,
        options=tuple(f"{name}={_MARLIN}" for name in names),
        why=error.message.partition(": ")[2] or error.message,
        seen=now(),
    )


def _newest(context: Context, stack: str) -> Generation | None:
    numbers = context.generations.numbers(stack)
    return context.generations.read(stack, max(numbers)) if numbers else None
