"""The front door of a stack on the machine: HAProxy's unit, its files and its state.

The door outlives the engines behind it. A switch gives the running HAProxy the port of the new
engine. When the switch is final, the port is also written to the configuration, for HAProxy's next
start.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import time
from pathlib import Path

from stackctl.deploy import unit_files
from stackctl.deploy.context import Context
from stackctl.engines import engine as find_engine
from stackctl.errors import StackctlError, StartFailed
from stackctl.health import endpoint
from stackctl.machine import podman
from stackctl.machine.files import remove_file, write_atomically
from stackctl.machine.haproxy import Haproxy
from stackctl.machine.path_security import make_private_folder
from stackctl.probe.fact_reader import FactReader
from stackctl.probe.tools import probe_apparmor
from stackctl.quantity import format_duration
from stackctl.state import keys
from stackctl.units import proxy_unit, render
from stackctl.values.generation import Generation, UnitFile
from stackctl.values.proxy import Proxy, key_digest

_POLL_S = 0.05
#: HAProxy is up within a fraction of a second; a machine under load may need more.
_START_S = 30.0
#: The line of the configuration that holds the engine's port.
_ENGINE = re.compile(r"^ +server engine 127\.0\.0\.1:\d+", re.MULTILINE)


def reconcile_proxy(context: Context, stack: str, proxy: Proxy | None) -> None:
    """Install this front door for the stack (None: no door) and open it for requests.

    If only the engine's port differs, the running door changes it while it serves. Any other change
    restarts the door, which ends the requests that wait in it.
    """
    if proxy is None:
        remove_proxy(context, stack)
    else:
        _apply(context, stack, proxy, _render(context, stack, proxy))


def _apply(context: Context, stack: str, proxy: Proxy, files: proxy_unit.ProxyFiles) -> None:
    service = proxy_unit.proxy_service(stack)
    if not _same(files, context, stack):
        # Stop it before its files change: if stackctl ends in between, the stopped unit shows that
        # the door must be started.
        context.systemd.stop(service)
    unit_files.ensure_loaded(context, service, changed=_write(context, stack, proxy, files))
    state = context.systemd.show(service, "ActiveState")["ActiveState"]
    if state != "active":
        context.progress.progress("door", "starting")
        if state != "activating":
            start(context, stack)
        _wait(context, stack)
    try:
        _lead(context, stack, proxy)
    except StackctlError:
        # It runs but does not obey: it hangs, or its socket is gone.
        context.systemd.abort(service)
        start(context, stack)
        _wait(context, stack)
        _lead(context, stack, proxy)


def _lead(context: Context, stack: str, proxy: Proxy) -> None:
    """Make the running door pass requests to its engine."""
    admin = _admin(context, stack)
    state = admin.state()
    if state == "up" and admin.port() == proxy.engine_port:
        # Do not hold it without need: if stackctl ended in between without a journal, the door
        # would stay held.
        return
    if state != "held":
        admin.hold()
    admin.set_backend_port(proxy.engine_port)
    alive = endpoint.liveness(proxy.engine_port, proxy.health_path) == "ready"
    admin.release(healthy=alive)


def route_to(context: Context, stack: str, proxy: Proxy) -> None:
    """Pass requests to the engine of a door, until the change is committed or reverted.

    If only the engine's port differs, the files stay as they are until ``reconcile_proxy``, so that
    after a power loss the door leads to the old engine. Any other door is installed without its
    [Install] section, so that it does not start at boot before its final text is installed.
    """
    files = _render(context, stack, proxy)
    if is_running(context, stack) and _same(files, context, stack):
        _lead(context, stack, proxy)
    else:
        _apply(context, stack, proxy, _pending(files))


def unit_file(context: Context, stack: str, proxy: Proxy) -> UnitFile:
    """Return the unit of a door as ``reconcile_proxy`` installs it."""
    return _render(context, stack, proxy).unit


def write_first_files(context: Context, stack: str, proxy: Proxy) -> None:
    """Write the files of a first front door; systemd reads its unit together with the engine's.

    Like the engine's, the unit does not start at boot yet.
    """
    _write(context, stack, proxy, _pending(_render(context, stack, proxy)))


def start(context: Context, stack: str) -> None:
    """Ask systemd to start an installed door, and return without waiting."""
    service = proxy_unit.proxy_service(stack)
    context.systemd.reset_failed(service)
    context.systemd.start(service)


def remove_proxy(context: Context, stack: str) -> None:
    """Remove the front door, if there is one."""
    path, folder = _unit_path(context, stack), context.paths.proxy_folder(stack)
    if not path.exists() and not folder.exists():
        return
    service = proxy_unit.proxy_service(stack)
    context.systemd.stop(service)
    podman.remove_container(proxy_unit.proxy_container(stack))
    remove_file(path)
    # Even if the file was gone: an earlier removal may have been interrupted before the reload.
    context.systemd.daemon_reload()
    context.systemd.reset_failed(service)
    shutil.rmtree(folder, ignore_errors=True)
    with contextlib.suppress(OSError):
        folder.parent.rmdir()


def is_running(context: Context, stack: str) -> bool:
    """Return True if the door runs; otherwise no request can pass."""
    service = proxy_unit.proxy_service(stack)
    return context.systemd.show(service, "ActiveState")["ActiveState"] == "active"


def backend_state(context: Context, stack: str) -> tuple[str, int | None]:
    """Return the state of the running door ("up", "down" or "held") and its engine's port."""
    admin = _admin(context, stack)
    return admin.state(), admin.port()


def hold(context: Context, stack: str) -> None:
    """Make new requests wait; running requests go on."""
    _admin(context, stack).hold()


def drain(context: Context, generation: Generation, limit_s: float) -> None:
    """Wait until no request runs. With ``limit_s`` 0 do not wait: running requests are cut off.

    Raises:
        StackctlError: requests still run after ``limit_s`` seconds.
    """
    admin, started, most = _admin(context, generation.stack), time.monotonic(), 0
    while (running := admin.traffic().running) > 0:
        most = max(most, running)
        elapsed = time.monotonic() - started
        if limit_s == 0:
            context.progress.warn(f"{_requests(running)} cut off")
            return
        if elapsed > limit_s:
            raise StackctlError(
                f"{_requests(running)} of {generation.stack} still running after "
                f"{format_duration(limit_s)}",
                hint="try later, wait longer with --drain 10m, or cut them off with --drain 0s",
            )
        context.progress.progress("drain", f"{_requests(running)} running")
        time.sleep(_POLL_S)
    elapsed = time.monotonic() - started
    if most:
        context.progress.step("drained", f"{format_duration(elapsed)}   {_requests(most)} finished")


def wait_idle(context: Context, generation: Generation, limit_s: float) -> None:
    """Wait until an engine that gets no new requests has ended its own; warn after ``limit_s``."""
    plan, started = generation.plan, time.monotonic()
    while endpoint.is_busy(plan.engine_listen_port, find_engine(plan.engine), plan.argv):
        elapsed = time.monotonic() - started
        if elapsed > limit_s:
            context.progress.warn(f"generation {generation.number} is still busy: cut off")
            return
        context.progress.progress("drain", f"generation {generation.number} ends its requests")
        time.sleep(_POLL_S)


def report_queued(context: Context, stack: str) -> None:
    """Report the number of requests that waited since the last hold, and the longest wait."""
    seen = _admin(context, stack).queue_stats()
    if seen.requests:
        text = f"{_requests(seen.requests)} waited, the longest {seen.longest_s:.1f} s"
        context.progress.step("door", text)


def require_proxy_answer(context: Context, generation: Generation) -> None:
    """Raise StackctlError if the door does not lead to the engine."""
    proxy, plan = generation.door, generation.plan
    if proxy is None:
        return
    url = endpoint.base_url(proxy.port, proxy.address)
    result = endpoint.check_model_listed(url, plan.served_name, key=client_key(context, generation))
    if result.status != "ok":
        raise StackctlError(
            f"the front door of {generation.stack} does not lead to the engine: {result.actual}",
            hint=f"log: stackctl logs {generation.stack}",
        )


def client_key(context: Context, generation: Generation) -> str | None:
    """Return a key that the stack's door accepts; None if it asks for none or none is stored."""
    if generation.door is None or not generation.door.key:
        return None
    return next(iter(keys.read(context.paths.state, generation.stack)), None)


def reload_keys(context: Context, stack: str) -> None:
    """Make a door accept exactly the keys that are stored now."""
    if not context.paths.proxy_folder(stack).exists():
        return
    valid = keys.read(context.paths.state, stack)
    _write_keys(context, stack, valid)
    config = unit_files.read_text(context.paths.proxy_folder(stack) / "haproxy.cfg") or ""
    if is_running(context, stack) and f"/{proxy_unit.KEYS}" in config:
        _admin(context, stack).replace_keys(valid)


def is_installed(context: Context, stack: str) -> bool:
    """Return True if the stack's front door has a unit file."""
    return _unit_path(context, stack).exists()


def _render(context: Context, stack: str, proxy: Proxy) -> proxy_unit.ProxyFiles:
    return proxy_unit.render_proxy(
        stack,
        proxy,
        scope=context.paths.scope,
        podman=podman.podman_version(),
        folder=str(context.paths.proxy_folder(stack)),
        apparmor=probe_apparmor(FactReader(context.machine)) is True,
    )


def _pending(files: proxy_unit.ProxyFiles) -> proxy_unit.ProxyFiles:
    (unit,) = render.without_install(files.unit)
    return proxy_unit.ProxyFiles(unit=unit, files=files.files)


def _write(context: Context, stack: str, proxy: Proxy, files: proxy_unit.ProxyFiles) -> bool:
    """Write a door's files; return True if systemd must read its unit again."""
    folder = context.paths.proxy_folder(stack)
    make_private_folder(folder / proxy_unit.ADMIN)
    for file in files.files:
        if unit_files.read_text(folder / file.name) != file.text:
            write_atomically(folder / file.name, file.text, mode=0o600)
    if proxy.key:
        state = context.paths.state
        valid = keys.read(state, stack)
        if not valid:
            valid = keys.create(state, stack)
            context.progress.step("key", f"made; stackctl key show {stack} prints it")
        _write_keys(context, stack, valid)
    return unit_files.write(context, stack, (files.unit,))


def _write_keys(context: Context, stack: str, valid: tuple[str, ...]) -> None:
    """Write the digests of the keys beside the door's configuration."""
    path = context.paths.proxy_folder(stack) / proxy_unit.KEYS
    text = "".join(f"{key_digest(key)}\n" for key in valid)
    if unit_files.read_text(path) != text:
        write_atomically(path, text, mode=0o600)


def _wait(context: Context, stack: str) -> None:
    service, started = proxy_unit.proxy_service(stack), time.time()
    deadline = time.monotonic() + _START_S
    while time.monotonic() < deadline:
        seen = context.systemd.show(service, "ActiveState", "Job")
        if seen["ActiveState"] == "active":
            return
        # A unit that systemd restarts may still come up, for example when its port becomes free.
        idle = seen["ActiveState"] == "inactive" and seen.get("Job", "0") in ("0", "")
        if idle or seen["ActiveState"] == "failed":
            break
        time.sleep(_POLL_S)
    lines = context.systemd.journal(
        service, proxy_unit.proxy_log_identifier(stack), since=started - _START_S
    )
    raise StartFailed(
        f"the front door of {stack} did not start",
        details=lines[-5:],
        hint=f"log: stackctl logs {stack}; without a door: --set front_door=off",
    )


def _same(files: proxy_unit.ProxyFiles, context: Context, stack: str) -> bool:
    """Return True if this door is installed already.

    The engine's port and comments, which another version of stackctl words differently, may differ.
    """
    folder = context.paths.proxy_folder(stack)
    paths = (_unit_path(context, stack), *(folder / file.name for file in files.files))
    new = (files.unit.text, *(file.text for file in files.files))
    texts = zip(map(unit_files.read_text, paths), new, strict=True)
    return all(old is not None and _comparable(old) == _comparable(text) for old, text in texts)


def _comparable(text: str) -> str:
    return _ENGINE.sub("", render.without_comments(text))


def _unit_path(context: Context, stack: str) -> Path:
    return context.paths.unit_folder(stack) / proxy_unit.proxy_unit_file(stack)


def _admin(context: Context, stack: str) -> Haproxy:
    return Haproxy(context.paths.proxy_folder(stack) / proxy_unit.ADMIN)


def _requests(count: int) -> str:
    return f"{count} request" + ("" if count == 1 else "s")
