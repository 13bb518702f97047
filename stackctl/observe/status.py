"""The state of stacks: unit, endpoint, generation; and the health check."""

from __future__ import annotations

from collections.abc import Sequence

from stackctl.deploy import door, install
from stackctl.deploy.context import Context
from stackctl.deploy.transaction import installed_generation
from stackctl.engines import engine
from stackctl.errors import StackctlError
from stackctl.health import endpoint
from stackctl.units import render
from stackctl.values.generation import Generation
from stackctl.values.result import CheckReport, Result, StackState, StackStatus, StatusReport

_PROPERTIES = ("ActiveState", "SubState", "NRestarts", "ActiveEnterTimestamp", "Result")


def report(context: Context, stacks: Sequence[str]) -> StatusReport:
    """Status of several stacks."""
    return StatusReport(
        scope=context.paths.scope, stacks=tuple(one_status(context, stack) for stack in stacks)
    )


def one(context: Context, stack: str) -> StatusReport:
    """Status of one stack, as a report."""
    return report(context, (stack,))


def one_status(context: Context, stack: str) -> StackStatus:
    """Status of one stack: what systemd and the endpoint say now."""
    file = install.engine_file(stack, install.installed(context, stack))
    unit = file.name.removesuffix(".container") if file else stack
    service = render.service_name(unit)
    seen = context.systemd.show(service, *_PROPERTIES)
    restarts = seen.get("NRestarts", "")
    try:
        generation = installed_generation(context, stack)
    except StackctlError as error:
        # One damaged record must not hide the other stacks.
        context.report.warn(error.message, error.hint)
        return StackStatus(
            stack=stack, state="unknown", unit=service, unit_state=seen.get("ActiveState")
        )
    plan = generation.plan
    return StackStatus(
        stack=stack,
        profile=plan.profile,
        objective=plan.objective,
        engine=plan.engine,
        generation=generation.number,
        state=_state(generation, seen),
        unit=service,
        unit_state=seen.get("ActiveState"),
        since=seen.get("ActiveEnterTimestamp") or None,
        restarts=int(restarts) if restarts.isdecimal() else None,
        endpoint=url(generation),
        model=plan.served_name,
        image=plan.image,
    )


def url(generation: Generation) -> str:
    """Where clients ask a stack."""
    door = generation.door
    return endpoint.base_url(generation.plan.port, door.address if door else "127.0.0.1")


def check(context: Context, stack: str, *, answer_timeout_s: float) -> CheckReport:
    """Unit, endpoint, model and one completion; what fails comes first."""
    generation = installed_generation(context, stack)
    plan = generation.plan
    seen = context.systemd.show(generation.units.service, *_PROPERTIES)
    active = seen.get("ActiveState") == "active"
    results = [
        Result(
            name="unit",
            status="ok" if active else "fail",
            expected="active",
            actual=seen.get("ActiveState"),
            evidence=None if active else f"result {seen.get('Result')}",
            remedy=None if active else f"stackctl logs {stack}; stackctl restart {stack}",
        )
    ]
    if active:
        health_path = engine(plan.engine).health_path
        results += endpoint.check(
            url(generation),
            health_path,
            plan.served_name,
            answer_timeout_s=answer_timeout_s,
            key=door.key(context, stack, generation.door),
        )
        restarts = seen.get("NRestarts", "0")
        if restarts not in ("0", ""):
            results.append(
                Result(
                    name="restarts",
                    status="warn",
                    expected="0",
                    actual=restarts,
                    remedy=f"stackctl logs {stack} tells why",
                )
            )
    order = {"fail": 0, "warn": 1}
    results.sort(key=lambda result: order.get(result.status, 2))
    return CheckReport(stack=stack, results=tuple(results))


def _state(generation: Generation, seen: dict[str, str]) -> StackState:
    match seen.get("ActiveState"):
        case "activating" | "reloading":
            return "starting"
        case "failed":
            return "failed"
        case "active":
            path = engine(generation.plan.engine).health_path
            alive = endpoint.liveness(generation.plan.listens, path)
            return "ready" if alive == "ready" else "not answering"
        case _:
            return "stopped"
