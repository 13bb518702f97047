"""Looks after all stacks: checks each, and restarts what is dead by all that can be seen.

An engine is dead when it does not answer, and neither uses a processor nor counts tokens, at two
looks in a row. An engine that answers late because it computes is well.
"""

from __future__ import annotations

import datetime
import re
import time

from stackctl.deploy import install, record
from stackctl.deploy.context import Context
from stackctl.deploy.transaction import installed_generation
from stackctl.errors import ExitCode, StackctlError
from stackctl.health import endpoint
from stackctl.machine import http, lock
from stackctl.observe.check import check, remember, summary
from stackctl.observe.status import cpu_seconds
from stackctl.state import health
from stackctl.state.generations import now
from stackctl.values.generation import Generation
from stackctl.values.history import Health
from stackctl.values.result import Result
from stackctl.values.status import Guarded, GuardReport

#: Seconds for which counters are watched. Below a tenth of one processor they stand still: a
#: sleeping engine uses none, Podman's own health check a hundredth.
WATCH_S = 5.0
#: The name under which the history has an engine that neither answers nor works.
_DEAD = "dead"
#: Two looks in a row are not further apart than this, in seconds.
_IN_A_ROW_S = 900
_COUNTERS = re.compile(r"^[\w:]*tokens\w*_total\b.*$", re.MULTILINE)


def guard(context: Context, *, answer_timeout_s: float, watch_s: float = WATCH_S) -> GuardReport:
    """One pass over all stacks of the scope; what is being changed or starts is left alone."""
    return GuardReport(
        scope=context.paths.scope,
        stacks=tuple(
            _guarded(context, stack, answer_timeout_s, watch_s)
            for stack in install.installed_stacks(context)
        ),
    )


def _guarded(context: Context, stack: str, answer_timeout_s: float, watch_s: float) -> Guarded:
    began = time.time()
    if lock.holder(context.paths.lock) is not None:
        return Guarded(stack=stack, action="skipped")
    try:
        generation = installed_generation(context, stack)
    except StackctlError as error:
        seen = Health(when=now(), status="fail", name="record", message=error.message)
        remember(context, stack, seen)
        return Guarded(stack=stack, health=seen)
    service = generation.units.service
    unit = context.systemd.show(service, "ActiveState", "InvocationID")
    if unit.get("ActiveState") in ("activating", "deactivating", "reloading"):
        return Guarded(stack=stack, action="skipped")
    report = check(context, generation, answer_timeout_s=answer_timeout_s)
    seen, worst = summary(generation, report), report.results[0]
    if lock.holder(context.paths.lock) is not None:
        # A change began meanwhile: what was seen may be its doing.
        return Guarded(stack=stack, action="skipped")
    if worst.status == "fail" and worst.code == "no-answer":
        seen = _watch(context, generation, worst, watch_s)
        if seen.name == _DEAD and _was_dead(context, generation, began):
            if not _restart(context, generation, unit.get("InvocationID", "")):
                return Guarded(stack=stack, action="skipped")
            remember(context, stack, seen)
            return Guarded(stack=stack, action="restarted", health=seen)
    remember(context, stack, seen)
    return Guarded(stack=stack, health=seen)


def _watch(context: Context, generation: Generation, worst: Result, watch_s: float) -> Health:
    """Whether an engine that does not answer works all the same."""
    service, tokens = generation.units.service, list[str]()
    # Who does not answer at all does not tell its counters either.
    answers = worst.name != "endpoint"
    before = context.systemd.show(service, "CPUUsageNSec")
    if answers:
        tokens = _tokens(generation)
    time.sleep(watch_s)
    used = cpu_seconds(before, context.systemd.show(service, "CPUUsageNSec"))
    counted = answers and bool(tokens) and tokens != (_tokens(generation) or tokens)
    silent = f"{worst.name}: {worst.actual}"
    if counted or (used is not None and used >= watch_s / 10):
        work = "it counts tokens" if counted else f"{used:.1f} s of processor time"
        return Health(
            when=now(),
            generation=generation.number,
            status="ok",
            name="busy",
            message=f"{silent}, but {work} in {watch_s:.0f} s",
        )
    # Where processor time is not counted nobody can say that it stands still.
    return Health(
        when=now(),
        generation=generation.number,
        status="fail",
        name=worst.name if used is None else _DEAD,
        message=silent if used is None else f"{silent}, and it does not compute",
    )


def _tokens(generation: Generation) -> list[str]:
    """What the engine's metrics say of tokens; empty without an answer."""
    url = endpoint.base_url(generation.plan.listens) + "/metrics"
    answer = http.get(url, timeout_s=2)
    return _COUNTERS.findall(answer.text) if isinstance(answer, http.Answer) else []


def _was_dead(context: Context, generation: Generation, began: float) -> bool:
    """Whether the look before this one, which ``began`` then, saw the same run dead."""
    try:
        before = health.last(context.paths.state, generation.stack)
    except StackctlError:
        return False
    if before is None or (before.name, before.generation) != (_DEAD, generation.number):
        return False
    seen = context.systemd.show(generation.units.service, "ActiveEnterTimestampMonotonic")
    running_s = time.monotonic() - int(seen.get("ActiveEnterTimestampMonotonic") or 0) / 1e6
    seen_at = datetime.datetime.fromisoformat(before.when).timestamp()
    # Another guard that looks at this very moment is not a second look.
    return seen_at < began and time.time() - seen_at < min(_IN_A_ROW_S, running_s)


def _restart(context: Context, generation: Generation, invocation: str) -> bool:
    """Have systemd restart the engine, unless another stackctl is at work or it was replaced."""
    stack, service = generation.stack, generation.units.service
    try:
        with lock.exclusive(context.paths.lock, f"guard {stack}"):
            if context.systemd.show(service, "InvocationID").get("InvocationID") != invocation:
                return False
            # It would not hear a SIGTERM. systemd restarts it as after any failure, and counts.
            context.systemd.kill(service)
    except StackctlError as error:
        if error.exit_code == ExitCode.LOCKED:
            return False
        raise
    record.done(
        context,
        "restart",
        stack,
        generation=generation.number,
        message="by the guard: it neither answered nor computed, twice in a row",
    )
    return True
