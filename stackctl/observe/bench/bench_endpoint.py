"""The target of a measurement: the stack's addresses as the measuring machine reaches them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from stackctl.deploy import proxy
from stackctl.deploy.context import Context
from stackctl.deploy.stack_state import installed_number, not_running
from stackctl.engines import engine as find_engine
from stackctl.errors import ExitCode, StackctlError
from stackctl.health import endpoint
from stackctl.observe import engine_snapshot
from stackctl.observe.status import stack_url
from stackctl.values.generation import Generation


@dataclass(frozen=True)
class BenchEndpoint:
    """The addresses of a measured stack.

    ``url`` is the address for clients, ``engine_url`` that of the engine, ``key`` the API key for
    the front door (None: no key). ``current`` returns the number of the installed generation (None:
    no generation). ``box`` is the machine of the stack if it is another one, and ``command`` the
    beginning of a command for it.
    """

    url: str
    engine_url: str
    key: str | None
    current: Callable[[], int | None]
    box: str | None = None
    command: str = "stackctl"


def local_endpoint(context: Context, generation: Generation) -> BenchEndpoint:
    """Return the target for a stack of this machine."""
    return BenchEndpoint(
        url=stack_url(generation),
        engine_url=endpoint.base_url(generation.plan.engine_listen_port),
        key=proxy.client_key(context, generation),
        current=lambda: installed_number(context, generation.stack),
    )


def require_running(context: Context, generation: Generation) -> None:
    """Check that a stack can be measured, and warn if its engine has other requests.

    Raises:
        StackctlError: exit 3 if the stack does not run or is not ready; 1 if its health check
        fails.
    """
    stack, port = generation.stack, generation.plan.engine_listen_port
    engine = find_engine(generation.plan.engine)
    state = engine_snapshot.read_unit_state(context, generation).active
    if state != "active":
        raise not_running(stack)
    alive = endpoint.liveness(port, engine.health_path)
    if alive != "ready":
        raise StackctlError(
            f"{stack} is not ready: {alive}",
            hint=f"stackctl status {stack}",
            exit_code=ExitCode.FAILED if alive == "failing" else ExitCode.NOT_RUNNING,
        )
    if endpoint.is_busy(port, engine, generation.plan.argv):
        context.progress.warn(
            f"{stack} is serving other requests: the results are those of a shared engine"
        )
