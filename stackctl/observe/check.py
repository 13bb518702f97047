"""The check of a running stack: its unit, its endpoint, its model and one real completion."""

from __future__ import annotations

import os

from stackctl.deploy import proxy
from stackctl.deploy.context import Context
from stackctl.diagnose.results import sort_by_severity
from stackctl.engines import engine
from stackctl.errors import StackctlError
from stackctl.health import endpoint
from stackctl.machine.systemd import UnitState
from stackctl.observe.status import stack_url
from stackctl.state import logs
from stackctl.state.generations import utc_now
from stackctl.units.proxy_unit import proxy_service
from stackctl.values.generation import Generation
from stackctl.values.history import HealthEntry
from stackctl.values.result import CheckReport, Result


def check_stack(
    context: Context, generation: Generation, *, answer_timeout_s: float
) -> CheckReport:
    """Check unit, endpoint, model and one completion; failures come first.

    The endpoint is checked only if all units are active.
    """
    stack = generation.stack
    services = {"unit": generation.units.service}
    if generation.door is not None:
        services["door"] = proxy_service(stack)
    states = context.systemd.states(tuple(services.values()))
    results = [_unit(stack, name, states[service]) for name, service in services.items()]
    if all(result.status == "ok" for result in results):
        plan = generation.plan
        results += endpoint.check_endpoint(
            stack_url(generation),
            engine(plan.engine).health_path,
            plan.served_name,
            answer_timeout_s=answer_timeout_s,
            key=proxy.client_key(context, generation),
            parameters=plan.model.parameters,
        )
        if restarts := states[services["unit"]].restarts:
            results.append(
                Result(
                    name="restarts",
                    status="warn",
                    expected="0",
                    actual=str(restarts),
                    remedy=f"stackctl logs {stack} tells why",
                )
            )
    return CheckReport(stack=stack, results=sort_by_severity(results))


def health_entry(generation: Generation, report: CheckReport) -> HealthEntry:
    """Return the worst result of a check, as an entry of the health log."""
    worst, when, number = report.results[0], utc_now(), generation.number
    if worst.status not in ("fail", "warn"):
        return HealthEntry(when=when, generation=number, status="ok")
    return HealthEntry(
        when=when, generation=number, status=worst.status, name=worst.name, message=worst.actual
    )


def record_health(context: Context, stack: str, seen: HealthEntry) -> None:
    """Add an entry to the health log if the caller owns it; warn if it cannot be written."""
    try:
        owner = (context.paths.state / "stacks" / stack).stat().st_uid
    except FileNotFoundError:
        # The record of a running stack was lost.
        return
    except OSError as error:
        context.progress.warn(f"not in the history: {error}")
        return
    if owner != os.geteuid():
        return
    try:
        logs.record_health(context.paths.state, stack, seen)
    except StackctlError as error:
        context.progress.warn(f"not in the history: {error.message}")


def _unit(stack: str, name: str, state: UnitState) -> Result:
    active = state.is_active
    return Result(
        name=name,
        status="ok" if active else "fail",
        expected="active",
        actual=state.active,
        evidence=None if active else f"result {state.result}",
        remedy=None if active else f"stackctl logs {stack}; stackctl restart {stack}",
    )
