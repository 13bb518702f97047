"""Comparison of a running stack with its plan: process, image, files, ports and front door."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Iterator, Mapping

from stackctl.diagnose import compare_engine, compare_memory, compare_threads
from stackctl.diagnose.findings import (
    fail,
    info,
    not_told,
    ok,
    up_again,
    warn,
    worst_first,
)
from stackctl.quantity import format_bytes
from stackctl.values.generation import Generation
from stackctl.values.result import Result
from stackctl.values.seen import Listening, ModelFileSeen, Seen

#: The start of a process has a resolution of 0.01 s, the change of a file that of a clock tick.
_CLOCK_S = 0.05
#: The addresses of a socket that listens on all addresses of the machine.
_EVERY = frozenset(("0.0.0.0", "::"))


def compare(generation: Generation, seen: Seen) -> tuple[Result, ...]:
    """Compare an inspected stack with its generation; mismatches come first."""
    return worst_first(
        (
            *_unit(generation, seen),
            _argv(generation, seen),
            _environment(generation, seen),
            *compare_threads.compare(generation, seen),
            *compare_memory.compare(generation, seen),
            _ports(generation, seen),
            *compare_engine.compare(generation, seen),
            _files(generation, seen),
            _image(generation, seen),
            _restarts(generation, seen),
            *_door(generation, seen),
        )
    )


def _unit(generation: Generation, seen: Seen) -> Iterator[Result]:
    """Check for changed unit files and settings, and for an engine that systemd did not start."""
    service = generation.units.service
    if seen.by_unit is False:
        yield fail(
            "unit",
            f"started by {service}",
            f"process {seen.pid} was started by hand",
            f"its parent is not the main process of {service}",
            f"stackctl restart {generation.stack}",
        )
    elif seen.drift:
        # Other versions of stackctl or Podman write the front door's unit differently.
        only_door = all(one.code == "door" for one in seen.drift)
        yield (warn if only_door else fail)(
            "unit",
            f"as generation {generation.number} was stored",
            "changed by hand" if not only_door else "the front door's differs",
            "; ".join(one.text for one in seen.drift),
            up_again(generation),
        )
    else:
        yield ok("unit", None, f"as stored (generation {generation.number})")


def _argv(generation: Generation, seen: Seen) -> Result:
    planned = generation.plan.argv
    expected = f"{len(planned) - 1} arguments as planned"
    if seen.argv is None:
        return not_told(seen, "argv", expected)
    difference = argv_difference(seen.argv, planned)
    if difference is None:
        return ok("argv", expected, f"as planned ({len(planned) - 1} arguments)")
    cause = seen.first_drift or "the unit is as stored: it was started otherwise"
    remedy = up_again(generation) if seen.drift else f"stackctl restart {generation.stack}"
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


def _environment(generation: Generation, seen: Seen) -> Result:
    planned = generation.plan.environment
    expected = f"{len(planned)} variables as planned" if planned else "no variable but the image's"
    if seen.environment is None:
        return not_told(seen, "environment", expected)
    lacking = [text for text in planned if text not in seen.environment]
    if not lacking and not seen.unplanned:
        few = f"as planned ({len(planned)} variables)" if planned else "nothing but the image's"
        return ok("environment", expected, few)
    have = dict(text.partition("=")[::2] for text in seen.environment)
    told = []
    for text in lacking:
        name, _, value = text.partition("=")
        told.append(
            f"{name}={have[name]} instead of {value}" if name in have else f"{name} is missing"
        )
    told += [f"{name} is not planned, and engines read it" for name in seen.unplanned]
    cause = seen.first_drift
    more = "; ".join(told[1:])
    return fail(
        "environment",
        expected,
        told[0],
        "; ".join(filter(None, (more, cause))) or None,
        up_again(generation) if seen.drift else f"stackctl restart {generation.stack}",
    )


def _ports(generation: Generation, seen: Seen) -> Result:
    """Compare the listening sockets with the planned ones."""
    plan, door = generation.plan, generation.door
    meant = {("engine", _plain("127.0.0.1"), plan.listens): f"127.0.0.1:{plan.listens}"}
    if door is not None:
        meant["door", _plain(door.address), door.port] = f"{_host(door.address)}:{door.port}"
    expected = " and ".join(meant.values())
    if seen.listening is None:
        return not_told(seen, "ports", expected)
    foreign = [one for one in seen.listening if one.owner == "other" and _in_the_way(one, meant)]
    if foreign:
        return _foreign_port(generation, expected, foreign[0], seen.listening)
    further = [
        one
        for one in seen.listening
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
            f"{up_again(generation)} puts the unit back; a firewall closes the port",
        )
    closed = _closed(meant, seen.listening)
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
    generation: Generation, expected: str, one: Listening, listening: Iterable[Listening]
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
    meant: Mapping[tuple[str, str, int], str], listening: Iterable[Listening]
) -> str | None:
    """Return the first planned address without a listening socket; None: all are open."""
    have = {_key(one) for one in listening if one.protocol == "tcp"}
    return next((text for key, text in meant.items() if key not in have), None)


def _key(one: Listening) -> tuple[str, str, int]:
    return one.owner, _plain(one.address), one.port


def _in_the_way(one: Listening, meant: Iterable[tuple[str, str, int]]) -> bool:
    """Return True if a foreign socket may receive requests for this stack.

    It does if both have one port and one address, or if one of them listens on all addresses.
    """
    return any(
        one.port == port and (_plain(one.address) == address or _EVERY & {one.address, address})
        for _, address, port in meant
    )


def _named(one: Listening) -> str:
    return f"{one.protocol} {_host(one.address)}:{one.port}"


def _plain(address: str) -> str:
    """Return the canonical spelling of an address; an IPv4-mapped one as IPv4."""
    parsed = ipaddress.ip_address(address)
    mapped = getattr(parsed, "ipv4_mapped", None)
    return str(mapped or parsed)


def _host(address: str) -> str:
    return f"[{address}]" if ":" in address else address


def _files(generation: Generation, seen: Seen) -> Result:
    """Check that the model's files are those that the engine loaded."""
    count = len(seen.files)
    noun = "file" if count == 1 else "files"
    expected = f"{count} {noun}, unchanged since the start"
    if not seen.files:
        return not_told(seen, "files", None)
    restart = f"stackctl restart {generation.stack} serves what is there now"
    touched = None
    for file in seen.files:
        problem = _changed(file, seen.started)
        if problem is not None:
            return fail("files", expected, *problem, restart)
        if file.engine is None:
            return not_told(seen, "files", expected)
        if file.now is not None and _after(file.now.changed, seen.started):
            touched = touched or file.path
    if seen.started is None:
        return not_told(seen, "files", expected)
    if touched is not None:
        return warn(
            "files",
            expected,
            f"{_name(touched)} was touched since the start",
            "same file and size, but renamed, with other rights, or rewritten with its time set "
            "back",
            f"compare its checksum with the source; {restart}",
        )
    total = sum(file.now.bytes for file in seen.files if file.now is not None)
    return ok("files", expected, f"{count} {noun}, {format_bytes(total)}, unchanged")


def _changed(file: ModelFileSeen, started: float | None) -> tuple[str, str] | None:
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


def _image(generation: Generation, seen: Seen) -> Result:
    planned = generation.image_id.removeprefix("sha256:")
    if seen.image_id is None:
        return not_told(seen, "image", planned[:12])
    if seen.image_id == planned:
        return ok("image", planned[:12], f"{planned[:12]}, as deployed")
    return fail(
        "image",
        planned[:12],
        seen.image_id[:12],
        seen.first_drift or "the container runs another image than was deployed",
        up_again(generation),
    )


def _restarts(generation: Generation, seen: Seen) -> Result:
    if seen.restarts is None:
        return not_told(seen, "restarts", "none")
    if seen.restarts == 0:
        return ok("restarts", "none", "none since it was started")
    times = "once" if seen.restarts == 1 else f"{seen.restarts} times"
    return warn(
        "restarts",
        "none",
        f"{times} since it was started",
        "systemd started it again after it failed",
        f"stackctl logs {generation.stack} tells why",
    )


def _door(generation: Generation, seen: Seen) -> Iterator[Result]:
    if generation.door is None:
        return
    port = generation.plan.listens
    expected = f"open, to port {port}"
    state = seen.door
    if state is None:
        yield not_told(seen, "door", expected)
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
