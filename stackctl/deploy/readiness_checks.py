"""Tests of a new engine before it replaces another one."""

from __future__ import annotations

import time
from collections.abc import Sequence

from stackctl.deploy import startup
from stackctl.deploy.context import Context
from stackctl.engines import engine as find_engine
from stackctl.errors import StartFailed
from stackctl.health import completion_check, endpoint
from stackctl.quantity import format_duration
from stackctl.values.generation import Generation
from stackctl.values.result import Result

_SOAK_POLL_S = 0.25


def require_engine_answer(context: Context, generation: Generation) -> None:
    """Check the engine's health, its model list and one completion, without its front door.

    Raises:
        StartFailed: a check failed; ``kernel`` is set if the answer was not text.
    """
    plan = generation.plan
    context.progress.progress("answer", "asking for a completion")
    results = endpoint.check_endpoint(
        endpoint.base_url(plan.engine_listen_port),
        find_engine(plan.engine).health_path,
        plan.served_name,
        answer_timeout_s=plan.timing.deadline_s,
        parameters=plan.model.parameters,
    )
    failed = next((result for result in results if result.status == "fail"), None)
    if failed is not None:
        error = _wrong(generation, failed)
        # Wrong arithmetic shows as garbage; other kernels of the image may compute correctly.
        error.kernel = failed.code == "not-text"
        raise error
    context.progress.step("answer", f"ok     {results[-1].actual}")


def check_stop_and_streaming(context: Context, generation: Generation) -> None:
    """Check the ends of answers and a stream, when clients are served already.

    Raises:
        StartFailed: a check failed.
    """
    plan = generation.plan
    context.progress.progress("answer", "asking for a stream, and for answers that end early")
    probe = completion_check.CompletionProbe(
        endpoint.base_url(plan.engine_listen_port),
        plan.served_name,
        plan.timing.deadline_s,
        parameters=plan.model.parameters,
    )
    for result in completion_check.extended_checks(probe):
        if result.status == "fail":
            raise _wrong(generation, result)


def soak(context: Context, generation: Generation, seconds: float) -> None:
    """Watch the new engine for a while, because its first real requests may crash it.

    Raises:
        StartFailed: the engine has ended or was restarted.
    """
    started, since = time.monotonic(), time.time()
    engine = find_engine(generation.plan.engine)
    while (elapsed := time.monotonic() - started) < seconds:
        context.progress.progress(
            "soak", f"{format_duration(elapsed)} of {format_duration(seconds)}"
        )
        state = context.systemd.state(generation.units.service)
        if not state.is_active or state.restarts:
            raise startup.start_failure(
                context, generation, engine, state, since - seconds, answered=True
            )
        time.sleep(_SOAK_POLL_S)


def _wrong(generation: Generation, failed: Result) -> StartFailed:
    stack = generation.stack
    error = StartFailed(
        f"{stack} started, but {failed.name} is wrong: {failed.actual}",
        details=_evidence(failed),
        hint=f"log: stackctl logs {stack} --generation {generation.number}",
    )
    error.cause = failed.actual
    return error


def _evidence(result: Result) -> Sequence[str]:
    lines = (f"expected {result.expected}" if result.expected else None, result.evidence)
    return [line for line in lines if line]
