"""``bench --from-here``: measurement of another machine's stack over ssh."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from urllib.parse import urlsplit

from stackctl.cli import remote
from stackctl.cli.session import Session
from stackctl.engines import engine as find_engine
from stackctl.errors import ExitCode, StackctlError
from stackctl.health import endpoint
from stackctl.observe.bench.run import BenchEndpoint
from stackctl.values.base import from_json
from stackctl.values.bench import BenchTarget
from stackctl.values.generation import Generation
from stackctl.values.history import KeyReport
from stackctl.values.profile import Slo


@contextlib.contextmanager
def remote_endpoint(
    session: Session, host: str, stack: str | None
) -> Iterator[tuple[Generation, Slo | None, BenchEndpoint]]:
    """Yield a running stack of a box, its SLO, and its site behind forwarded local ports.

    Raises:
        StackctlError: as the box's own ``bench``; exit 1 when the connection breaks.
    """

    def ask(*words: str) -> bytes:
        return remote.fetch_json(host, (*words, *session.host_scope, "--json"))

    def look(stack: str | None) -> BenchTarget:
        words = ("bench", "target", *((stack,) if stack else ()))
        return from_json(ask(*words), BenchTarget, where=host)

    def current() -> int | None:
        try:
            return look(generation.stack).generation.number
        except StackctlError as error:
            if error.exit_code == ExitCode.NOT_RUNNING:
                return None
            # The connection broke. The bench ends, and its results so far are stored.
            session.out.warn(f"cannot check that it is still the same stack: {error.message}")
            return generation.number

    found = look(stack)
    generation, address = found.generation, urlsplit(found.url)
    key = None
    if generation.door is not None and generation.door.key:
        text = ask("key", "show", generation.stack)
        key = from_json(text, KeyReport, where=host).key
    there = remote.remote_host(host)
    with (
        there.forward_port(address.hostname or "127.0.0.1", address.port or 80) as clients,
        there.forward_port("127.0.0.1", generation.plan.engine_listen_port) as engine,
    ):
        # The box has just reported that the engine is ready, so a failure here is the tunnel's.
        if endpoint.liveness(engine, find_engine(generation.plan.engine).health_path) != "ready":
            raise StackctlError(
                f"no port of {host} can be reached through ssh",
                hint="its sshd must allow it (AllowTcpForwarding), or measure there: "
                f"{remote.remote_command(host)} bench",
            )
        session.out.step("bench", f"{generation.stack} of {host}, from here over ssh")
        site = BenchEndpoint(
            url=endpoint.base_url(clients),
            engine_url=endpoint.base_url(engine),
            key=key,
            current=current,
            box=host,
            command=remote.remote_command(host),
        )
        yield generation, found.slo, site
