"""Looks after all stacks: checks each, and restarts what is dead by all that can be seen.

An engine is dead when it does not answer, and neither uses a processor nor counts tokens, at two
looks in a row. An engine that answers late because it computes is well.
"""

from __future__ import annotations

import datetime
import time

from stackctl.deploy import install, record
from stackctl.deploy.context import Context
from stackctl.deploy.stack_state import installed_generation
from stackctl.errors import ExitCode, StackctlError
from stackctl.machine import lock
from stackctl.observe import looks
from stackctl.observe.check import check, remember, summary
from stackctl.state import health
from stackctl.state.generations import now
from stackctl.values.generation import Generation
from stackctl.values.history import Health
from stackctl.values.result import Result
from stackctl.values.status import Guarded, GuardReport

#: Seconds for which CPU time and counters are watched (values/activity.py has the limit).
WATCH_S = 5.0
#: The name under which the history has an engine that neither answers nor works.
_DEAD = "dead"
#: Two looks in a row are not further apart than this, in seconds.
_IN_A_ROW_S = 900
#: Seconds that an engine has to report its numbers.
_ANSWER_S = 2


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
    unit = looks.unit(context, generation)
    if unit.active in ("activating", "deactivating", "reloading"):
        return Guarded(stack=stack, action="skipped")
    report = check(context, generation, answer_timeout_s=answer_timeout_s)
    seen, worst = summary(generation, report), report.results[0]
    if lock.holder(context.paths.lock) is not None:
        # A change began meanwhile: what was seen may be its doing.
        return Guarded(stack=stack, action="skipped")
    if worst.status == "fail" and worst.code == "no-answer":
        seen = _watch(context, generation, worst, watch_s)
        if seen.name == _DEAD and _was_dead(context, generation, began):
            if not _restart(context, generation, unit.invocation):
                return Guarded(stack=stack, action="skipped")
            remember(context, stack, seen)
            return Guarded(stack=stack, action="restarted", health=seen)
    remember(context, stack, seen)
    return Guarded(stack=stack, health=seen)


def _watch(context: Context, generation: Generation, worst: Result, watch_s: float) -> Health:
    """Watch an engine that gave no answer for ``watch_s`` seconds: it may work all the same."""
    # An engine that does not answer at all does not report its counters either.
    numbers_too = worst.name != "endpoint"

    def look() -> looks.Look:
        return looks.look(
            context, generation, timeout_s=_ANSWER_S, threads_too=False, numbers_too=numbers_too
        )

    before = look()
    time.sleep(watch_s)
    done = looks.work(before, look())
    silent = f"{worst.name}: {worst.actual}"
    if done.is_working:
        used = f"{done.cpu_s or 0:.1f} s of processor time"
        work = "it counts tokens" if done.counted else used
        return Health(
            when=now(),
            generation=generation.number,
            status="ok",
            name="busy",
            message=f"{silent}, but {work} in {watch_s:.0f} s",
        )
    # Where CPU time is not counted, nothing shows that the engine stands still.
    unknown = done.is_working is None
    return Health(
        when=now(),
        generation=generation.number,
        status="fail",
        name=worst.name if unknown else _DEAD,
        message=silent if unknown else f"{silent}, and it does not compute",
    )


def _was_dead(context: Context, generation: Generation, began: float) -> bool:
    """Whether the look before this one, which ``began`` then, saw the same run dead."""
    try:
        before = health.last(context.paths.state, generation.stack)
    except StackctlError:
        return False
    if before is None or (before.name, before.generation) != (_DEAD, generation.number):
        return False
    running_s = looks.unit(context, generation).running_s or 0.0
    seen_at = datetime.datetime.fromisoformat(before.when).timestamp()
    # Another guard that looks at this very moment is not a second look.
    return seen_at < began and time.time() - seen_at < min(_IN_A_ROW_S, running_s)


def _restart(context: Context, generation: Generation, invocation: str | None) -> bool:
    """Have systemd restart the engine, unless another stackctl is at work or it was replaced."""
    stack, service = generation.stack, generation.units.service
    try:
        with lock.exclusive(context.paths.lock, f"guard {stack}"):
            if context.systemd.state(service).invocation != invocation:
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
