"""Where a stack is measured: its addresses as they are true for who measures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from stackctl.deploy import door
from stackctl.deploy.context import Context
from stackctl.deploy.stack_state import installed_number, not_running
from stackctl.engines import engine as find_engine
from stackctl.errors import ExitCode, StackctlError
from stackctl.health import endpoint
from stackctl.observe import looks
from stackctl.observe.status import url
from stackctl.values.generation import Generation


@dataclass(frozen=True)
class Site:
    """``url`` is where clients ask, ``engine_url`` the engine itself, ``key`` what the door wants.

    ``current`` says which generation is installed by now (None: none); ``box`` is the machine where
    the stack runs, when that is another one, and ``command`` how a command for it begins.
    """

    url: str
    engine_url: str
    key: str | None
    current: Callable[[], int | None]
    box: str | None = None
    command: str = "stackctl"


def of(context: Context, generation: Generation) -> Site:
    """A stack of this machine."""
    return Site(
        url=url(generation),
        engine_url=endpoint.base_url(generation.plan.listens),
        key=door.key(context, generation),
        current=lambda: installed_number(context, generation.stack),
    )


def require_running(context: Context, generation: Generation) -> None:
    """Refuse what cannot be measured, and warn of an engine that is busy.

    Raises:
        StackctlError: exit 3 when it does not run, 1 when it fails.
    """
    stack, port = generation.stack, generation.plan.listens
    engine = find_engine(generation.plan.engine)
    state = looks.unit(context, generation).active
    if state != "active":
        raise not_running(stack)
    alive = endpoint.liveness(port, engine.health_path)
    if alive != "ready":
        raise StackctlError(
            f"{stack} is not ready: {alive}",
            hint=f"stackctl status {stack}",
            exit_code=ExitCode.FAILED if alive == "failing" else ExitCode.NOT_RUNNING,
        )
    if endpoint.busy(port, engine, generation.plan.argv):
        context.report.warn(
            f"{stack} is serving other requests: the results are those of a shared engine"
        )
