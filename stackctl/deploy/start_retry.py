"""A second attempt at a start that failed for a reason with a known remedy."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TypeVar

from stackctl.deploy import gpu_access
from stackctl.deploy.context import Context
from stackctl.engines import engine as find_engine
from stackctl.errors import StartFailed
from stackctl.state import engine_workarounds
from stackctl.state.generations import utc_now
from stackctl.values.engine_facts import EngineWorkaround
from stackctl.values.generation import Generation

T = TypeVar("T")


def retry_with_fallback_kernels(
    context: Context, stack: str, attempt: Callable[[Context, EngineWorkaround | None], T]
) -> T:
    """Attempt a start, and once more with other kernels if the engine's usual ones are at fault.

    If that helps, the options are stored for this image and GPU.

    Raises:
        StackctlError: the error of the last attempt; the machine is as it was before.
    """
    try:
        return attempt(context, None)
    except StartFailed as error:
        lesson = _lesson(context, stack, error) if error.kernel else None
        if lesson is None:
            raise
        options = " ".join(f"--{text.replace('=', ' ')}" for text in lesson.options)
        context.progress.warn(f"{error.message}: once more with {options}")
    done = attempt(without_confirmation(context), lesson)
    engine_workarounds.add(context.paths.state, lesson)
    return done


def without_confirmation(context: Context) -> Context:
    """Return the context for another attempt at a change, which the user has already confirmed."""
    return dataclasses.replace(context, confirm=lambda _: True)


def _lesson(context: Context, stack: str, error: StartFailed) -> EngineWorkaround | None:
    """Return the options for the next attempt; None if no options are known to help."""
    failed = _newest(context, stack)
    if failed is None:
        return None
    cards = gpu_access.planned_gpus(failed.host, failed.plan)
    fallback = find_engine(failed.plan.engine).fallback_kernels(failed.plan.model, cards)
    decided = {decision.field for decision in failed.plan.decisions}
    facts = context.engine_facts.get(failed.image_id)
    known = {name for option in facts.options for name in option.names} if facts else set()
    options = [
        f"{name}={value}"
        for name, value in fallback
        if name not in decided and f"--{name}" in known
    ]
    if not options:
        return None
    return EngineWorkaround(
        image_id=failed.image_id,
        gpu=cards[0].name if cards else None,
        options=tuple(options),
        why=error.cause or error.message,
        seen=utc_now(),
    )


def _newest(context: Context, stack: str) -> Generation | None:
    numbers = context.generations.numbers(stack)
    return context.generations.read(stack, max(numbers)) if numbers else None
