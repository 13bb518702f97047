"""The history of a stack's generations, their differences, and the audit log."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from itertools import zip_longest

from stackctl.deploy.context import Context
from stackctl.deploy.stack_state import installed_number
from stackctl.engines import engine as find_engine
from stackctl.errors import ExitCode, StackctlError
from stackctl.plan.plan_diff import changed_decisions
from stackctl.state import logs
from stackctl.units.render import comparison_text
from stackctl.values.generation import Generation, UnitFile
from stackctl.values.history import (
    AuditReport,
    DiffReport,
    FieldChange,
    HealthEntry,
    HistoryEntry,
    HistoryReport,
    UnitChange,
)
from stackctl.values.plan import Scalar


def history_report(context: Context, stack: str) -> HistoryReport:
    """Return all generations of a stack, newest first; report a damaged record as unreadable."""
    current = installed_number(context, stack)
    try:
        seen = {entry.generation: entry for entry in logs.read_health(context.paths.state, stack)}
    except StackctlError as error:
        context.progress.warn(error.message, error.hint)
        seen = {}
    numbers = reversed(context.generations.numbers(stack))
    return HistoryReport(
        scope=context.paths.scope,
        stack=stack,
        generations=tuple(
            _entry(context, stack, number, current=number == current, health=seen.get(number))
            for number in numbers
        ),
    )


def audit_report(context: Context, stack: str | None) -> AuditReport:
    """Return the audit log; of all stacks if ``stack`` is None."""
    entries = logs.read_changes(context.paths.state)
    return AuditReport(
        scope=context.paths.scope,
        stack=stack,
        entries=tuple(entry for entry in entries if stack in (None, entry.stack)),
    )


def _entry(
    context: Context, stack: str, number: int, *, current: bool, health: HealthEntry | None
) -> HistoryEntry:
    try:
        generation = context.generations.read(stack, number)
    except StackctlError as error:
        return HistoryEntry(
            number=number,
            current=current,
            state="unreadable",
            message="; ".join(error.details) or error.message,
            health=health,
        )
    plan, outcome = generation.plan, generation.outcome
    return HistoryEntry(
        number=number,
        current=current,
        created=generation.created,
        operation=generation.operation,
        of=generation.of,
        profile=plan.profile,
        objective=plan.objective,
        model=plan.model.source,
        image=generation.image,
        state=outcome.state,
        changed=outcome.changed,
        message=outcome.message,
        ready_s=outcome.ready_s,
        health=health,
    )


def diff_report(context: Context, stack: str, before: int | None, after: int | None) -> DiffReport:
    """Compare two generations.

    If ``after`` is None, take the installed generation, or the newest if the stack is down. If
    ``before`` is None, take the last one before ``after`` that was ready.

    Raises:
        StackctlError: exit 4 if there is no such generation.
    """
    known = context.generations.numbers(stack)
    if after is None:
        after = installed_number(context, stack) or max(known, default=0)
    new = context.generations.read(stack, after)
    if before is None:
        old = context.generations.last_ready_before(stack, after)
        if old is None:
            raise StackctlError(
                f"no generation of {stack} served before {after}",
                hint=f"generations: {', '.join(map(str, known))}; "
                f"stackctl diff {stack} A B compares any two",
                exit_code=ExitCode.NOT_FOUND,
            )
    else:
        old = context.generations.read(stack, before)
    return compare_generations(old, new)


def compare_generations(old: Generation, new: Generation) -> DiffReport:
    """Return the differences between two generations. Pure."""
    was, now = _facts(old), _facts(new)
    ports = {find_engine(one.plan.engine).port_option for one in (old, new)}
    return DiffReport(
        stack=new.stack,
        before=old.number,
        after=new.number,
        facts=tuple(
            FieldChange(field=field, before=was[field], after=now[field])
            for field in now
            if was[field] != now[field]
        ),
        decisions=tuple(
            change
            for change in changed_decisions(old.plan, new.plan)
            # Behind a front door each engine has a private port, which does not concern clients.
            if change.field not in ports or old.plan.port != new.plan.port
        ),
        units=tuple(_units(old, new)),
    )


def _facts(generation: Generation) -> dict[str, Scalar]:
    plan, place, proxy = generation.plan, generation.plan.placement, generation.door
    front_door = None
    if proxy is not None:
        front_door = f"{proxy.address}:{proxy.port}" + (", with a key" if proxy.key else "")
    return {
        "profile": plan.profile,
        "objective": plan.objective,
        "engine": plan.engine,
        "image": generation.image,
        "image ID": generation.image_id,
        "model": plan.model.source,
        "served name": plan.served_name,
        "port": plan.port,
        "front door": front_door,
        "CPUs": None if place.cpus is None else str(place.cpus),
        "memory nodes": None if place.mems is None else str(place.mems),
        "memory policy": place.policy,
        "GPUs": ",".join(place.gpus) or None,
    }


def _units(old: Generation, new: Generation) -> Iterator[UnitChange]:
    before, after = ({file.name: file for file in one.units.files} for one in (old, new))
    pairs = [(before[name], after[name]) for name in after if name in before]
    gone = [file for name, file in before.items() if name not in after]
    come = [file for name, file in after.items() if name not in before]
    # An engine's unit alternates between two names: pair the removed file with the added one.
    for was, now in (*pairs, *zip_longest(gone, come)):
        name, new_name = (
            f"{one.number}/{file.name}" if file else "/dev/null"
            for one, file in ((old, was), (new, now))
        )
        before_lines = _lines(was, old.plan.engine_port)
        lines = difflib.unified_diff(
            before_lines, _lines(now, new.plan.engine_port), name, new_name, lineterm=""
        )
        if diff := "".join(f"{line}\n" for line in lines):
            yield UnitChange(name=(now or was).name, diff=diff)


def _lines(file: UnitFile | None, private_port: int | None) -> list[str]:
    if file is None:
        return []
    text = comparison_text(file.text)
    if private_port is not None:
        text = re.sub(rf"\b{private_port}\b", "PORT", text)
    # splitlines would also split at characters that do not end a line of a unit.
    return text.removesuffix("\n").split("\n")
