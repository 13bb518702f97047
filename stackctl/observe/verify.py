"""The comparison of a running stack with its plan: an inspection, then the rules."""

from __future__ import annotations

from stackctl.deploy.context import Context
from stackctl.diagnose.verify_process import verify_inspection
from stackctl.errors import ExitCode, StackctlError
from stackctl.machine import podman
from stackctl.observe import engine_snapshot, procfs
from stackctl.observe.inspection import collect_inspection
from stackctl.values.generation import Generation
from stackctl.values.result import VerifyReport


def verify_stack(context: Context, generation: Generation) -> VerifyReport:
    """Compare a running stack with its generation.

    Raises:
        StackctlError: exit 3 if the stack does not run or ended during the inspection.
    """
    stack, name = generation.stack, generation.units.container
    unit = engine_snapshot.read_unit_state(context, generation)
    state = unit.active or "unknown"
    container = podman.inspect_containers((name,)).get(name)
    if state != "active" or container is None or not container.pid:
        raise StackctlError(
            f"{stack} is not running ({state if state != 'active' else 'no container'})",
            hint=f"stackctl status {stack}; stackctl restart {stack}",
            exit_code=ExitCode.NOT_RUNNING,
        )
    inspection = collect_inspection(context, generation, unit, container)
    now = procfs.read_stat(context.machine, container.pid)
    again = podman.inspect_containers((name,)).get(name)
    if now is None or again is None or again.pid != container.pid:
        # The inspection may have mixed two runs of the engine.
        raise StackctlError(
            f"{stack} ended during the inspection",
            hint=f"stackctl status {stack}",
            exit_code=ExitCode.NOT_RUNNING,
        )
    return VerifyReport(
        stack=stack, generation=generation.number, results=verify_inspection(generation, inspection)
    )
