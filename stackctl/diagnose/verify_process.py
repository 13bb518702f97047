"""Comparison of a running stack with its plan: process, image, files, ports and front door."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Iterator

from stackctl.diagnose.results import Comparison, redeploy_command, sort_by_severity
from stackctl.diagnose.verify_engine import verify_engine
from stackctl.diagnose.verify_placement import verify_placement
from stackctl.quantity import format_bytes
from stackctl.values.generation import Generation
from stackctl.values.inspection import Inspection, ListeningSocket, ObservedModelFile
from stackctl.values.result import Result

#: The start of a process has a resolution of 0.01 s, the change of a file that of a clock tick.
_CLOCK_S = 0.05
#: The addresses of a socket that listens on all addresses of the machine.
_EVERY = frozenset(("0.0.0.0", "::"))


def verify_inspection(generation: Generation, inspection: Inspection) -> tuple[Result, ...]:
    """Compare an inspected stack with its generation; mismatches come first."""
    return sort_by_severity(
        (
            _unit(generation, inspection),
            _argv(generation, inspection),
            _environment(generation, inspection),
            *verify_placement(generation, inspection),
            _ports(generation, inspection),
            *verify_engine(generation, inspection),
            _files(generation, inspection),
            _image(generation, inspection),
            _restarts(generation, inspection),
            *_door(generation, inspection),
        )
    )


def _unit(generation: Generation, inspection: Inspection) -> Result:
    """Check for changed unit files and settings, and for an engine that systemd did not start."""
    service = generation.units.service
    if inspection.by_unit is False:
        return Comparison("unit", f"started by {service}").fail(
            f"process {inspection.pid} was started by hand",
            f"its parent is not the main process of {service}",
            f"stackctl restart {generation.stack}",
        )
    if not inspection.drift:
        return Comparison("unit").ok(f"as stored (generation {generation.number})")
    unit = Comparison("unit", f"as generation {generation.number} was stored")
    cause, remedy = "; ".join(one.text for one in inspection.drift), redeploy_command(generation)
    if all(one.code == "door" for one in inspection.drift):
        # Other versions of stackctl or Podman write the front door's unit differently.
        return unit.warn("the front door's differs", cause, remedy)
    return unit.fail("changed by hand", cause, remedy)


def _start_again(generation: Generation, inspection: Inspection) -> str:
    """Return the remedy for a process that differs from the plan: its unit may differ too."""
    if inspection.drift:
        return redeploy_command(generation)
    return f"stackctl restart {generation.stack}"


def _argv(generation: Generation, inspection: Inspection) -> Result:
    planned = generation.plan.argv
    count = f"{len(planned) - 1} arguments"
    argv = Comparison("argv", f"{count} as planned")
    if inspection.argv is None:
        return argv.skip_missing(inspection)
    difference = argv_difference(inspection.argv, planned)
    if difference is None:
        return argv.ok(f"as planned ({count})")
    cause = inspection.first_drift or "the unit is as stored: it was started otherwise"
    return argv.fail(difference, cause, _start_again(generation, inspection))


def argv_difference(running: tuple[str, ...], planned: tuple[str, ...]) -> str | None:
    """Return the first difference between a process's arguments and the plan's; None if equal.

    The program (the plan's first word) is not compared: it depends on the image, which may have an
    entry point or an interpreter.
    """
    wanted = planned[1:]
    count = len(running) - len(wanted)
    if count > 0 and running[count:] == wanted:
        option = next((word for word in running[:count] if word.startswith("-")), None)
        return None if option is None else f"{option} is not planned"
    have = running[1:]
    for place, word in enumerate(wanted):
        if place >= len(have):
            return f"{word} is missing"
        if have[place] != word:
            option = wanted[place - 1] if place else ""
            same = option.startswith("--") and have[place - 1] == option
            return f"{option + ' ' if same else ''}{have[place]} instead of {word}"
    return f"{have[len(wanted)]} is not planned"


def _environment(generation: Generation, inspection: Inspection) -> Result:
    planned = generation.plan.environment
    count = f"{len(planned)} variables"
    expected = f"{count} as planned" if planned else "no variable but the image's"
    environment = Comparison("environment", expected)
    if inspection.environment is None:
        return environment.skip_missing(inspection)
    lacking = [text for text in planned if text not in inspection.environment]
    if not lacking and not inspection.unplanned:
        return environment.ok(f"as planned ({count})" if planned else "nothing but the image's")
    have = dict(text.partition("=")[::2] for text in inspection.environment)
    told = []
    for text in lacking:
        name, _, value = text.partition("=")
        told.append(
            f"{name}={have[name]} instead of {value}" if name in have else f"{name} is missing"
        )
    told += [f"{name} is not planned, and engines read it" for name in inspection.unplanned]
    cause = "; ".join(filter(None, (*told[1:], inspection.first_drift))) or None
    return environment.fail(told[0], cause, _start_again(generation, inspection))


def _ports(generation: Generation, inspection: Inspection) -> Result:
    """Compare the listening sockets with the planned ones."""
    own_port, proxy = generation.plan.engine_listen_port, generation.door
    meant = {("engine", _plain("127.0.0.1"), own_port): f"127.0.0.1:{own_port}"}
    if proxy is not None:
        meant["door", _plain(proxy.address), proxy.port] = f"{_host(proxy.address)}:{proxy.port}"
    expected = " and ".join(meant.values())
    ports = Comparison("ports", expected)
    if inspection.listening is None:
        return ports.skip_missing(inspection)
    ours = [one for one in inspection.listening if one.owner != "other"]
    restart = f"stackctl restart {generation.stack}"
    for one in inspection.listening:
        if one.owner == "other" and _in_the_way(one, meant):
            also = "also " if any(mine.port == one.port for mine in ours) else ""
            return ports.fail(
                f"{_host(one.address)}:{one.port} is {also}{one.process}'s",
                "requests for this stack reach another process",
                f"end that process; then {restart}",
            )
    further = [one for one in ours if one.protocol != "tcp" or _key(one) not in meant]
    for one in further:
        if not ipaddress.ip_address(one.address).is_loopback:
            return ports.fail(
                f"also {_named(one)}, which other machines may reach",
                f"{one.process} listens there",
                f"{redeploy_command(generation)} puts the unit back; a firewall closes the port",
            )
    open_keys = {_key(one) for one in ours if one.protocol == "tcp"}
    for key, address in meant.items():
        if key not in open_keys:
            logs = f"stackctl logs {generation.stack}"
            return ports.fail(f"nobody listens on {address}", None, f"{logs}; {restart}")
    more = f"; {len(further)} more on loopback, among its own processes" if further else ""
    return ports.ok(f"{expected}{more}", ", ".join(map(_named, further)) or None)


def _key(one: ListeningSocket) -> tuple[str, str, int]:
    return one.owner, _plain(one.address), one.port


def _in_the_way(one: ListeningSocket, meant: Iterable[tuple[str, str, int]]) -> bool:
    """Return True if a foreign socket may receive requests for this stack.

    It does if both have one port and one address, or if one of them listens on all addresses.
    """
    return any(
        one.port == port and (_plain(one.address) == address or _EVERY & {one.address, address})
        for _, address, port in meant
    )


def _named(one: ListeningSocket) -> str:
    return f"{one.protocol} {_host(one.address)}:{one.port}"


def _plain(address: str) -> str:
    """Return the canonical spelling of an address; an IPv4-mapped one as IPv4."""
    parsed = ipaddress.ip_address(address)
    mapped = getattr(parsed, "ipv4_mapped", None)
    return str(mapped or parsed)


def _host(address: str) -> str:
    return f"[{address}]" if ":" in address else address


def _files(generation: Generation, inspection: Inspection) -> Result:
    """Check that the model's files are those that the engine loaded."""
    if not inspection.files:
        return Comparison("files").skip_missing(inspection)
    count = f"{len(inspection.files)} file{'' if len(inspection.files) == 1 else 's'}"
    files = Comparison("files", f"{count}, unchanged since the start")
    restart = f"stackctl restart {generation.stack} serves what is there now"
    touched = None
    for file in inspection.files:
        problem = _changed(file, inspection.started)
        if problem is not None:
            return files.fail(*problem, restart)
        if file.engine is None:
            return files.skip_missing(inspection)
        if file.now is not None and _after(file.now.changed, inspection.started):
            touched = touched or file.path
    if inspection.started is None:
        return files.skip_missing(inspection)
    if touched is not None:
        return files.warn(
            f"{_name(touched)} was touched since the start",
            "same file and size, but renamed, with other rights, or rewritten with its time set "
            "back",
            f"compare its checksum with the source; {restart}",
        )
    total = sum(file.now.bytes for file in inspection.files if file.now is not None)
    return files.ok(f"{count}, {format_bytes(total)}, unchanged")


def _changed(file: ObservedModelFile, started: float | None) -> tuple[str, str] | None:
    """Return the change of a file and its consequence; None if it is unchanged."""
    now, name = file.now, _name(file.path)
    if now is None:
        return f"{name} is gone", "what runs has it still; the next start will not"
    same = file.engine is None or (now.device, now.inode) == (file.engine.device, file.engine.inode)
    if file.deleted or not same:
        return f"{name} was replaced", "the engine still serves the file that was there before"
    if now.bytes != file.planned_bytes:
        sizes = f"{now.bytes:,} bytes, planned with {file.planned_bytes:,}"
        return f"{name} has another size", sizes
    if _after(now.content_changed, started):
        return f"{name} was written to since the start", "what is mapped changes under the engine"
    return None


def _after(when: float, started: float | None) -> bool:
    return started is not None and when > started + _CLOCK_S


def _name(path: str) -> str:
    return path.rpartition("/")[2]


def _image(generation: Generation, inspection: Inspection) -> Result:
    planned, running = generation.image_id.removeprefix("sha256:"), inspection.image_id
    image = Comparison("image", planned[:12])
    if running is None:
        return image.skip_missing(inspection)
    if running == planned:
        return image.ok(f"{planned[:12]}, as deployed")
    cause = inspection.first_drift or "the container runs another image than was deployed"
    return image.fail(running[:12], cause, redeploy_command(generation))


def _restarts(generation: Generation, inspection: Inspection) -> Result:
    restarts = Comparison("restarts", "none")
    if inspection.restarts is None:
        return restarts.skip_missing(inspection)
    if inspection.restarts == 0:
        return restarts.ok("none since it was started")
    times = "once" if inspection.restarts == 1 else f"{inspection.restarts} times"
    cause = "systemd started it again after it failed"
    remedy = f"stackctl logs {generation.stack} tells why"
    return restarts.warn(f"{times} since it was started", cause, remedy)


def _door(generation: Generation, inspection: Inspection) -> Iterator[Result]:
    if generation.door is None:
        return
    port, state = generation.plan.engine_listen_port, inspection.door
    door = Comparison("door", f"open, to port {port}")
    restart = f"stackctl restart {generation.stack}"
    if state is None:
        yield door.skip_missing(inspection)
    elif state.state != "up":
        word = {"held": "it holds requests back", "down": "it finds its engine not well"}
        remedy = f"stackctl check {generation.stack}; {restart}"
        yield door.fail(word.get(state.state, state.state), None, remedy)
    elif state.port is None:
        yield door.info("open; it does not tell where it leads")
    elif state.port != port:
        cause = "requests reach another engine than this generation's"
        yield door.fail(f"it leads to port {state.port}", cause, restart)
    else:
        yield door.ok(f"open, leads to generation {generation.number} (port {port})")
