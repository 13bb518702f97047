"""Renders a plan into the unit files of its stack. Pure, but for reading the shipped template."""

from __future__ import annotations

import functools
import json
import re
from dataclasses import dataclass
from pathlib import PurePath
from typing import Literal

import jinja2
import msgspec

from stackctl.engines import engine as find_engine
from stackctl.engines import model_mounts
from stackctl.engines.protocol import CACHE
from stackctl.errors import ExitCode, StackctlError
from stackctl.resources import data_folder
from stackctl.units import devicewait, healthcheck, quoting
from stackctl.units.quadlet import Keys, parse_version
from stackctl.values.claim import Claim
from stackctl.values.host import UNLIMITED
from stackctl.values.plan import Plan
from stackctl.values.profile import NAME_PATTERN
from stackctl.values.unit import UnitFile, UnitSet

#: Restarts before systemd gives up, and the pause between them in seconds.
RESTARTS = 3
RESTART_PAUSE_S = 5
_GENERATION = re.compile(r"^Generation=(\d+)$", re.MULTILINE)
_IDENTIFIER = re.compile(r"^SyslogIdentifier=.*$", re.MULTILINE)
_CONTAINER = re.compile(r"^ContainerName=.*$", re.MULTILINE)
_CLAIMED = re.compile(r"^Claim=.*$", re.MULTILINE)
_INSTALL = re.compile(r"^\[Install\]\nWantedBy=.*\n\n?", re.MULTILINE)


@dataclass(frozen=True)
class Target:
    """What the text of a unit depends on besides the plan.

    ``image`` is the pinned reference (digest or image ID), ``program`` what must be started in it
    (empty: its entry point), ``entrypoint`` what replaces that, ``podman`` the version whose keys
    are used (None: the newest), ``claim`` what the stack takes of the machine: written into the
    unit for other plans to read. ``devices`` are the CDI names of its GPUs, ``cache`` the host
    folder in which an engine that compiles keeps what it has compiled; the two above are ours too.
    """

    scope: Literal["user", "system"]
    podman: str | None
    image: str
    program: tuple[str, ...]
    claim: Claim
    entrypoint: str | None = None
    devices: tuple[str, ...] = ()
    cache: str | None = None


#: A stack's engine lives in one of two slots, so that a new generation can be installed, and where
#: memory allows it run, beside the one that serves. No stack name has an underscore.
SLOTS = ("", "_b")


def engine_names(stack: str) -> tuple[str, ...]:
    """Names of the units that may hold a stack's engine."""
    return tuple(f"{stack}{slot}" for slot in SLOTS)


def service_name(unit: str) -> str:
    """The systemd service that Quadlet makes of a unit."""
    return f"{unit}.service"


def render(plan: Plan, target: Target, generation: int, unit: str | None = None) -> UnitSet:
    """The unit files of one generation of a stack; ``unit`` is its slot's name (None: the first).

    Raises:
        StackctlError: exit 2 for values that a unit cannot hold, 6 for a Podman without Quadlet.
    """
    unit = unit or plan.stack
    for name in (plan.stack, plan.profile, plan.objective):
        # Held by the profile's schema; the template writes them as they are, on lines of their own.
        if not re.fullmatch(NAME_PATTERN, name):
            raise StackctlError(f"{name[:40]!r} is not a name", exit_code=ExitCode.USAGE)
    keys = Keys(parse_version(target.podman))
    template = environment().get_template("engine.container.j2")
    memlock = plan.memlock_bytes
    engine = find_engine(plan.engine)
    health_path = engine.health_path
    shared = [(source, inside, "ro") for source, inside in model_mounts.mounts(plan.model)]
    waits_s = devicewait.WAIT_S if target.devices else 0
    compiles = engine.compiles == "everywhere" or plan.placement.gpus
    cache = target.cache if compiles else None
    if cache is not None:
        shared.append((cache, CACHE, "rw"))
    text = template.render(
        plan=plan,
        target=target,
        generation=generation,
        container=container_name(unit),
        arguments=(*target.program, *plan.argv[1:]),
        mounts=[(source, quoting.volume(source, inside, mode)) for source, inside, mode in shared],
        devices=target.devices,
        wait=quoting.words(devicewait.command(target.devices)) if target.devices else None,
        cache=None if cache is None else quoting.words(_levels(cache)),
        shm=None if engine.shm_bytes is None else str(engine.shm_bytes),
        startup=healthcheck.startup_command(plan.listens, health_path),
        health=healthcheck.command(plan.listens, health_path),
        unset=engine.overriding,
        claim=json.dumps(msgspec.to_builtins(target.claim), ensure_ascii=True),
        memlock=None if memlock is None else "-1" if memlock == UNLIMITED else str(memlock),
        restart=engine.restart,
        restarts=RESTARTS,
        restart_pause=RESTART_PAUSE_S,
        # Must be longer than all the attempts that it counts, or it never trips.
        restart_window=(RESTARTS + 1) * (plan.timing.ceiling_s + RESTART_PAUSE_S + waits_s),
        key=keys.key,
        argument=keys.argument,
        podman_args=keys.podman_args,
        version=keys.version,
    )
    return UnitSet(
        stack=plan.stack,
        service=service_name(unit),
        container=container_name(unit),
        files=(UnitFile(name=file_name(unit), text=quoting.unit(text)),),
    )


def _levels(cache: str) -> tuple[str, ...]:
    """The folders of a cache that are ours, from above: mkdir gives its mode to those it is told,
    and the umask's to what it makes on the way."""
    above = PurePath(cache).parents[:2]
    return (*(str(folder) for folder in reversed(above)), cache)


def relabel(units: UnitSet, generation: int, unit: str) -> UnitSet:
    """Stored text under another number and in another slot; nothing else of it changes."""
    (file,) = units.files
    text = _GENERATION.sub(f"Generation={generation}", file.text)
    identifier = log_identifier(units.stack, generation)
    text = _IDENTIFIER.sub(f"SyslogIdentifier={identifier}", text)
    text = _CONTAINER.sub(f"ContainerName={container_name(unit)}", text)
    return UnitSet(
        stack=units.stack,
        service=service_name(unit),
        container=container_name(unit),
        files=(UnitFile(name=file_name(unit), text=text),),
    )


def pending(*files: UnitFile) -> tuple[UnitFile, ...]:
    """Unit files as they are installed until the generation has proven itself: not started at boot,
    when the one that it replaces will be."""
    return tuple(UnitFile(name=file.name, text=_INSTALL.sub("", file.text)) for file in files)


def file_name(unit: str) -> str:
    """The file of a unit."""
    return f"{unit}.container"


def container_name(unit: str) -> str:
    """The container's name."""
    return f"stackctl-{unit}"


def log_identifier(stack: str, generation: int) -> str:
    """What marks a generation's lines in the journal."""
    return f"{stack}-g{generation}"


def without_labels(text: str) -> str:
    """The text of a unit without its number and slot, to tell whether two say the same.

    Nor with its time limits: how long a start may take is no reason for another one.
    """
    text = _GENERATION.sub("Generation=", text)
    text = re.sub(r"^(TimeoutStartSec|StartLimitIntervalSec)=.*$", r"\1=", text, flags=re.MULTILINE)
    return _CONTAINER.sub("ContainerName=", _IDENTIFIER.sub("SyslogIdentifier=", text))


def without_sizes(text: str) -> str:
    """The text of a unit without how much memory it claims: what the engine said since is no reason
    for another start."""
    return _CLAIMED.sub(lambda claim: re.sub(r'bytes": \d+', 'bytes": ', claim[0]), text)


def generation_of(text: str) -> int | None:
    """The number of the generation that a unit text belongs to."""
    match = _GENERATION.search(text)
    return int(match[1]) if match else None


def profile_of(text: str) -> str | None:
    """The name of the profile that a unit text was made from."""
    match = re.search(r"^Profile=(\S+)$", text, re.MULTILINE)
    return match[1] if match else None


@functools.cache
def environment() -> jinja2.Environment:
    """Where templates come from, with the filters and tests they use."""
    found = jinja2.Environment(
        loader=jinja2.FileSystemLoader(data_folder("templates")),
        undefined=jinja2.StrictUndefined,
        autoescape=False,  # unit files, not HTML
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    found.filters["text"] = quoting.text
    found.filters["variable"] = quoting.variable
    found.filters["mount_point"] = quoting.mount_point
    found.tests["plain_path"] = quoting.is_plain_path
    found.globals["log_identifier"] = log_identifier
    return found
