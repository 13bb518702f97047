"""The front door of a stack as it is on the machine: HAProxy's unit, its files, what it does.

The door outlives the engines behind it. A switch tells the running HAProxy where the new engine is
and writes the same into its configuration, so that it finds it again after a restart.
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path

from stackctl.deploy import install
from stackctl.deploy.context import Context
from stackctl.engines import engine as find_engine
from stackctl.errors import StackctlError
from stackctl.health import endpoint
from stackctl.machine import podman, runner
from stackctl.machine.files import write_atomically
from stackctl.machine.haproxy import Haproxy
from stackctl.quantity import format_duration
from stackctl.state import keys
from stackctl.units import door as units
from stackctl.units import render
from stackctl.values.door import Door
from stackctl.values.generation import Generation
from stackctl.values.unit import UnitFile

_POLL_S = 0.05
#: HAProxy is up within a fraction of a second; a machine under load may need more.
_START_S = 30.0


def apply(context: Context, stack: str, door: Door | None) -> None:
    """Make the stack's front door be this one (None: no door), open for requests.

    A door that only leads to another engine is told so while it serves; any other change restarts
    it, which ends what is waiting in it.
    """
    if door is None:
        remove(context, stack)
        return
    files = _render(context, stack, door)
    folder = _folder(context, stack)
    _write_keys(context, stack, door)
    service = render.service_name(units.unit_name(stack))
    same = _same(files.files, folder) and _installed(context, stack) == files.unit.text
    for file in files.files:
        if _read(folder / file.name) != file.text:
            write_atomically(folder / file.name, file.text, mode=0o600)
    install.add(context, stack, (files.unit,))
    state = context.systemd.show(service, "ActiveState")["ActiveState"]
    if not same or state != "active":
        context.report.progress("door", "starting")
        context.systemd.reset_failed(service)
        context.systemd.restart(service)
        _wait_open(context, stack, service)
    admin = _admin(context, stack)
    admin.point_to(door.engine_port)
    admin.release()


def remove(context: Context, stack: str) -> None:
    """Take the front door away, if there is one."""
    unit = units.unit_name(stack)
    path = context.paths.unit_folder(stack) / render.file_name(unit)
    folder = _folder(context, stack)
    if not path.exists() and not folder.exists():
        return
    context.systemd.stop(render.service_name(unit))
    container = render.container_name(unit)
    if podman.containers(container):
        runner.run(("podman", "rm", "--force", "--time=5", container))
    if path.exists():
        path.unlink()
        context.systemd.daemon_reload()
    context.systemd.reset_failed(render.service_name(unit))
    shutil.rmtree(folder, ignore_errors=True)


def hold(context: Context, stack: str) -> None:
    """Let new requests wait; those that run go on."""
    _admin(context, stack).hold()


def drain(context: Context, generation: Generation, limit_s: float) -> None:
    """Wait until no request runs. ``limit_s`` of 0 does not wait: what runs is cut off.

    Raises:
        StackctlError: requests still run after ``limit_s`` seconds.
    """
    admin, started, most = _admin(context, generation.stack), time.monotonic(), 0
    while (running := admin.running()) > 0:
        most = max(most, running)
        elapsed = time.monotonic() - started
        if limit_s == 0:
            context.report.warn(f"{_requests(running)} cut off")
            return
        if elapsed > limit_s:
            raise StackctlError(
                f"{_requests(running)} of {generation.stack} still running after "
                f"{format_duration(limit_s)}",
                hint="try later, wait longer with --drain 10m, or cut them off with --drain 0s",
            )
        context.report.progress("drain", f"{_requests(running)} running")
        time.sleep(_POLL_S)
    elapsed = time.monotonic() - started
    if most:
        context.report.step("drained", f"{format_duration(elapsed)}   {_requests(most)} finished")


def wait_idle(context: Context, generation: Generation, limit_s: float) -> None:
    """Wait until an engine that gets no new requests has ended those that it has."""
    plan, started = generation.plan, time.monotonic()
    while endpoint.busy(plan.listens, find_engine(plan.engine).running_metrics):
        elapsed = time.monotonic() - started
        if elapsed > limit_s:
            context.report.warn(f"generation {generation.number} is still busy: cut off")
            return
        context.report.progress("drain", f"generation {generation.number} ends its requests")
        time.sleep(_POLL_S)


def require_answer(context: Context, generation: Generation) -> None:
    """Raise StackctlError when the door does not lead to the engine."""
    door, plan = generation.door, generation.plan
    if door is None:
        return
    url = endpoint.base_url(door.port, door.address)
    result = endpoint.model(url, plan.served_name, key=key(context, generation.stack, door))
    if result.status != "ok":
        raise StackctlError(
            f"the front door of {generation.stack} does not lead to the engine: {result.actual}",
            hint=f"log: stackctl logs {generation.stack}",
        )


def key(context: Context, stack: str, door: Door | None) -> str | None:
    """A key that the door lets in; None when it asks for none."""
    if door is None or not door.key:
        return None
    return next(iter(keys.read(context.paths.state, stack)), None)


def reload_keys(context: Context, stack: str) -> None:
    """Have a running door let in the keys that are stored now, and no others."""
    if not _folder(context, stack).exists():
        return
    valid = keys.read(context.paths.state, stack)
    write_atomically(_folder(context, stack) / "keys", units.keys_text(valid), mode=0o600)
    service = render.service_name(units.unit_name(stack))
    if context.systemd.show(service, "ActiveState")["ActiveState"] == "active":
        _admin(context, stack).replace_keys(valid)


def installed(context: Context, stack: str) -> bool:
    """Whether the stack has a front door."""
    return _installed(context, stack) is not None


def _render(context: Context, stack: str, door: Door) -> units.DoorFiles:
    return units.render_door(
        stack,
        door,
        scope=context.paths.scope,
        podman=podman.version(),
        folder=str(_folder(context, stack)),
    )


def _write_keys(context: Context, stack: str, door: Door) -> None:
    folder = _folder(context, stack)
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    if door.key:
        valid = keys.read(context.paths.state, stack) or keys.create(context.paths.state, stack)
        text = units.keys_text(valid)
        if _read(folder / "keys") != text:
            write_atomically(folder / "keys", text, mode=0o600)


def _wait_open(context: Context, stack: str, service: str) -> None:
    deadline = time.monotonic() + _START_S
    while time.monotonic() < deadline:
        state = context.systemd.show(service, "ActiveState", "SubState", "NRestarts")
        if state["ActiveState"] == "active" and _admin(context, stack).answers():
            return
        if state["ActiveState"] == "failed" or state.get("SubState") == "auto-restart":
            break
        time.sleep(_POLL_S)
    lines = context.systemd.journal(service, units.unit_name(stack), since=time.time() - _START_S)
    raise StackctlError(
        f"the front door of {stack} did not start",
        details=lines[-5:],
        hint=f"log: stackctl logs {stack}; without it: --set front_door=off",
    )


def _same(files: tuple[UnitFile, ...], folder: Path) -> bool:
    """Whether the files are there already, but for the engine's port."""
    texts = ((file.text, _read(folder / file.name)) for file in files)
    return all(
        old is not None and units.without_engine(old) == units.without_engine(new)
        for new, old in texts
    )


def _installed(context: Context, stack: str) -> str | None:
    return _read(context.paths.unit_folder(stack) / render.file_name(units.unit_name(stack)))


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None


def _admin(context: Context, stack: str) -> Haproxy:
    return Haproxy(units.socket_path(str(_folder(context, stack))))


def _folder(context: Context, stack: str) -> Path:
    return context.paths.state / "doors" / stack


def _requests(count: int) -> str:
    return f"{count} request" + ("" if count == 1 else "s")
