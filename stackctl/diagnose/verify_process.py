"""Comparison of a running stack with its plan: process, image, files, ports and front door."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Iterator, Mapping

from stackctl.diagnose import verify_engine, verify_memory, verify_threads
from stackctl.diagnose.verify_results import (
    fail,
    info,
    ok,
    redeploy_command,
    skip_missing,
    sort_by_severity,
    warn,
)
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
            *_unit(generation, inspection),
            _argv(generation, inspection),
            _environment(generation, inspection),
            *verify_threads.verify_threads(generation, inspection),
            *verify_memory.verify_memory(generation, inspection),
            _ports(generation, inspection),
            *verify_engine.verify_engine(generation, inspection),
            _files(generation, inspection),
            _image(generation, inspection),
            _restarts(generation, inspection),
            *_door(generation, inspection),
        )
    )


def _unit(generation: Generation, inspection: Inspection) -> Iterator[Result]:
    """Check for changed unit files and settings, and for an engine that systemd did not start."""
    service = generation.units.service
    if inspection.by_unit is False:
        yield fail(
            "unit",
            f"started by {service}",
            f"process {inspection.pid} was started by hand",
            f"its parent is not the main process of {service}",
            f"stackctl restart {generation.stack}",
        )
    elif inspection.drift:
        # Other versions of stackctl or Podman write the front door's unit differently.
        only_door = all(one.code == "door" for one in inspection.drift)
        yield (warn if only_door else fail)(
            "unit",
            f"as generation {generation.number} was stored",
            "changed by hand" if not only_door else "the front door's differs",
            "; ".join(one.text for one in inspection.drift),
            redeploy_command(generation),
        )
    else:
        yield ok("unit", None, f"as stored (generation {generation.number})")


def _argv(generation: Generation, inspection: Inspection) -> Result:
    planned = generation.plan.argv
    expected = f"{len(planned) - 1} arguments as planned"
    if inspection.argv is None:
        return skip_missing(inspection, "argv", expected)
    difference = argv_difference(inspection.argv, planned)
    if difference is None:
        return ok("argv", expected, f"as planned ({len(planned) - 1} arguments)")
    cause = inspection.first_drift or "the unit is as stored: it was started otherwise"
    remedy = (
        redeploy_command(generation) if inspection.drift else f"stackctl restart {generation.stack}"
    )
    return fail("argv", expected, difference, cause, remedy)


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
            return (
                f"{option} {have[place]} instead of {word}"
                if same
                else (f"{have[place]} instead of {word}")
            )
    return f"{have[len(wanted)]} is not planned"


def _environment(generation: Generation, inspection: Inspection) -> Result:
    planned = generation.plan.environment
    expected = f"{len(planned)} variables as planned" if planned else "no variable but the image's"
    if inspection.environment is None:
        return skip_missing(inspection, "environment", expected)
    lacking = [text for text in planned if text not in inspection.environment]
    if not lacking and not inspection.unplanned:
        few = f"as planned ({len(planned)} variables)" if planned else "nothing but the image's"
        return ok("environment", expected, few)
    have = dict(text.partition("=")[::2] for text in inspection.environment)
    told = []
    for text in lacking:
        name, _, value = text.partition("=")
        told.append(
            f"{name}={have[name]} instead of {value}" if name in have else f"{name} is missing"
        )
    told += [f"{name} is not planned, and engines read it" for name in inspection.unplanned]
    cause = inspection.first_drift
    more = "; ".join(told[1:])
    return fail(
        "environment",
        expected,
        told[0],
        "; ".join(filter(None, (more, cause))) or None,
        redeploy_command(generation)
        if inspection.drift
        else f"stackctl restart {generation.stack}",
    )


def _ports(generation: Generation, inspection: Inspection) -> Result:
    """Compare the listening sockets with the planned ones."""
    plan, proxy = generation.plan, generation.door
    meant = {
        (
            "engine",
            _plain("127.0.0.1"),
            plan.engine_listen_port,
        ): f"127.0.0.1:{plan.engine_listen_port}"
    }
    if proxy is not None:
        meant["door", _plain(proxy.address), proxy.port] = f"{_host(proxy.address)}:{proxy.port}"
    expected = " and ".join(meant.values())
    if inspection.listening is None:
        return skip_missing(inspection, "ports", expected)
    foreign = [
        one for one in inspection.listening if one.owner == "other" and _in_the_way(one, meant)
    ]
    if foreign:
        return _foreign_port(generation, expected, foreign[0], inspection.listening)
    further = [
        one
        for one in inspection.listening
        if one.owner != "other" and (one.protocol != "tcp" or _key(one) not in meant)
    ]
    reachable = [one for one in further if not ipaddress.ip_address(one.address).is_loopback]
    if reachable:
        one = reachable[0]
        return fail(
            "ports",
            expected,
            f"also {_named(one)}, which other machines may reach",
            f"{one.process} listens there",
            f"{redeploy_command(generation)} puts the unit back; a firewall closes the port",
        )
    closed = _closed(meant, inspection.listening)
    if closed is not None:
        return fail(
            "ports",
            expected,
            f"nobody listens on {closed}",
            None,
            f"stackctl logs {generation.stack}; stackctl restart {generation.stack}",
        )
    more = f"; {len(further)} more on loopback, among its own processes" if further else ""
    evidence = ", ".join(_named(one) for one in further) or None
    return ok("ports", expected, f"{expected}{more}", evidence)


def _foreign_port(
    generation: Generation,
    expected: str,
    one: ListeningSocket,
    listening: Iterable[ListeningSocket],
) -> Result:
    """Report another process on a port of the plan."""
    ours = any(mine.owner != "other" and mine.port == one.port for mine in listening)
    return fail(
        "ports",
        expected,
        f"{_host(one.address)}:{one.port} is {'also ' if ours else ''}{one.process}'s",
        "requests for this stack reach another process",
        f"end that process; then stackctl restart {generation.stack}",
    )


def _closed(
    meant: Mapping[tuple[str, str, int], str], listening: Iterable[ListeningSocket]
) -> str | None:
    """Return the first planned address without a listening socket; None: all are open."""
    have = {_key(one) for one in listening if one.protocol == "tcp"}
    return next((text for key, text in meant.items() if key not in have), None)


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
    count = len(inspection.files)
    noun = "file" if count == 1 else "files"
    expected = f"{count} {noun}, unchanged since the start"
    if not inspection.files:
        return skip_missing(inspection, "files", None)
    restart = f"stackctl restart {generation.stack} serves what is there now"
    touched = None
    for file in inspection.files:
        problem = _changed(file, inspection.started)
        if problem is not None:
            return fail("files", expected, *problem, restart)
        if file.engine is None:
            return skip_missing(inspection, "files", expected)
        if file.now is not None and _after(file.now.changed, inspection.started):
            touched = touched or file.path
    if inspection.started is None:
        return skip_missing(inspection, "files", expected)
    if touched is not None:
        return warn(
            "files",
            expected,
            f"{_name(touched)} was touched since the start",
            "same file and size, but renamed, with other rights, or rewritten with its time set "
            "back",
            f"compare its checksum with the source; {restart}",
        )
    total = sum(file.now.bytes for file in inspection.files if file.now is not None)
    return ok("files", expected, f"{count} {noun}, {format_bytes(total)}, unchanged")


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
    planned = generation.image_id.removeprefix("sha256:")
    if inspection.image_id is None:
        return skip_missing(inspection, "image", planned[:12])
    if inspection.image_id == planned:
        return ok("image", planned[:12], f"{planned[:12]}, as deployed")
    return fail(
        "image",
        planned[:12],
        inspection.image_id[:12],
        inspection.first_drift or "the container runs another image than was deployed",
        redeploy_command(generation),
    )


def _restarts(generation: Generation, inspection: Inspection) -> Result:
    if inspection.restarts is None:
        return skip_missing(inspection, "restarts", "none")
    if inspection.restarts == 0:
        return ok("restarts", "none", "none since it was started")
    times = "once" if inspection.restarts == 1 else f"{inspection.restarts} times"
    return warn(
        "restarts",
        "none",
        f"{times} since it was started",
        "systemd started it again after it failed",
        f"stackctl logs {generation.stack} tells why",
    )


def _door(generation: Generation, inspection: Inspection) -> Iterator[Result]:
    if generation.door is None:
        return
    port = generation.plan.engine_listen_port
    expected = f"open, to port {port}"
    state = inspection.door
    if state is None:
        yield skip_missing(inspection, "door", expected)
    elif state.state != "up":
        word = {"held": "it holds requests back", "down": "it finds its engine not well"}
        yield fail(
            "door",
            expected,
            word.get(state.state, state.state),
            None,
            f"stackctl check {generation.stack}; stackctl restart {generation.stack}",
        )
    elif state.port is None:
        yield info("door", expected, "open; it does not tell where it leads")
    elif state.port != port:
        yield fail(
            "door",
            expected,
            f"it leads to port {state.port}",
            "requests reach another engine than this generation's",
            f"stackctl restart {generation.stack}",
        )
    else:
        yield ok("door", expected, f"open, leads to generation {generation.number} (port {port})")
