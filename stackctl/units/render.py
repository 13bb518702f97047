"""Render a plan into the unit files of its stack. Pure, but for the template that it reads."""

from __future__ import annotations

import functools
import json
import re
from dataclasses import dataclass
from pathlib import PurePath
from typing import Literal

import jinja2

from stackctl.engines import engine as find_engine
from stackctl.engines import model_mounts
from stackctl.engines.protocol import CACHE
from stackctl.errors import ExitCode, StackctlError
from stackctl.resources import data_folder
from stackctl.units import healthcheck, quoting, wait_for_cdi
from stackctl.units.quadlet import Keys, parse_version
from stackctl.values.base import to_plain
from stackctl.values.generation import UnitFile, UnitSet
from stackctl.values.host import UNLIMITED
from stackctl.values.plan import Claim, Plan
from stackctl.values.profile import NAME_PATTERN

#: Restarts before systemd gives up, and the pause between them in seconds.
RESTARTS = 3
RESTART_PAUSE_S = 5
_GENERATION = re.compile(r"^Generation=(\d+)$", re.MULTILINE)
_IDENTIFIER = re.compile(r"^SyslogIdentifier=.*$", re.MULTILINE)
_CONTAINER = re.compile(r"^ContainerName=.*$", re.MULTILINE)
_CLAIMED = re.compile(r"^Claim=.*$", re.MULTILINE)
_INSTALL = re.compile(r"^\[Install\]\nWantedBy=.*\n\n?", re.MULTILINE)


@dataclass(frozen=True)
class UnitTarget:
    """The inputs of a unit's text besides the plan.

    ``image`` is the pinned reference (digest or image ID), ``program`` the command to start in it
    (empty: its entry point), ``entrypoint`` the replacement of that, ``podman`` the version whose
    keys are used (None: the newest), ``claim`` the stack's share of the machine: written into the
    unit for other plans to read. ``devices`` are the CDI names of its GPUs, ``cache`` the host
    folder for kernels that the engine compiles; stackctl owns the two folders above it too.
    ``apparmor``: Podman confines root's containers with AppArmor.
    """

    scope: Literal["user", "system"]
    podman: str | None
    image: str
    program: tuple[str, ...]
    claim: Claim
    entrypoint: str | None = None
    devices: tuple[str, ...] = ()
    cache: str | None = None
    apparmor: bool = False


#: A stack's engine lives in one of two slots, so that a new generation can be installed, and can
#: run when memory allows, beside the one that serves. No stack name has an underscore.
SLOTS = ("", "_b")


def engine_unit_names(stack: str) -> tuple[str, ...]:
    """Return the names of the units that may hold a stack's engine."""
    return tuple(f"{stack}{slot}" for slot in SLOTS)


def service_name(unit: str) -> str:
    """Return the name of the systemd service that Quadlet generates from a unit."""
    return f"{unit}.service"


def sets_no_new_privileges(scope: Literal["user", "system"], *, apparmor: bool) -> bool:
    """Return True if the containers of a scope run with no-new-privileges.

    With it, crun stacks Podman's AppArmor profile on its own, and no rule of Podman's profile
    allows signals to such a label (decision 18). Rootless containers have no profile.
    """
    return scope == "user" or not apparmor


def render_units(
    plan: Plan, target: UnitTarget, generation: int, unit: str | None = None
) -> UnitSet:
    """Render one generation's unit files; ``unit`` is the name of its slot (None: the first).

    Raises:
        StackctlError: exit 2 for values that a unit cannot hold, 6 for a Podman without Quadlet.
    """
    unit = unit or plan.stack
    for name in (plan.stack, plan.profile, plan.objective):
        # The profile's schema guarantees these; the template writes them unquoted.
        if not re.fullmatch(NAME_PATTERN, name):
            raise StackctlError(f"{name[:40]!r} is not a name", exit_code=ExitCode.USAGE)
    keys = Keys(parse_version(target.podman))
    template = template_environment().get_template("engine.container.j2")
    memlock = plan.memlock_bytes
    engine = find_engine(plan.engine)
    shared = [(source, inside, "ro") for source, inside in model_mounts.model_mounts(plan.model)]
    waits_s = wait_for_cdi.WAIT_S if target.devices else 0
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
        mounts=[
            (source, quoting.join_volume(source, inside, mode)) for source, inside, mode in shared
        ],
        devices=target.devices,
        wait=quoting.quote_words(wait_for_cdi.wait_command(target.devices))
        if target.devices
        else None,
        cache=None if cache is None else quoting.quote_words(_levels(cache)),
        no_new_privileges=sets_no_new_privileges(target.scope, apparmor=target.apparmor),
        shm=None if engine.shm_bytes is None else str(engine.shm_bytes),
        startup=healthcheck.startup_command(plan.engine_listen_port, engine.health_path),
        health=healthcheck.health_command(plan.engine_listen_port, engine.health_path),
        unset=engine.conflicting_env,
        claim=json.dumps(to_plain(target.claim), ensure_ascii=True),
        memlock=None if memlock is None else "-1" if memlock == UNLIMITED else str(memlock),
        restart=engine.restart,
        restarts=RESTARTS,
        restart_pause=RESTART_PAUSE_S,
        # The interval must exceed the time of all its attempts, or the start limit never trips.
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
        files=(UnitFile(name=unit_file_name(unit), text=quoting.checked_unit_text(text)),),
    )


def _levels(cache: str) -> tuple[str, ...]:
    """Return the folders of a cache that stackctl owns, the outermost first: mkdir gives its mode
    to the folders it is given, and the umask's to intermediate ones."""
    above = PurePath(cache).parents[:2]
    return (*(str(folder) for folder in reversed(above)), cache)


def relabel(units: UnitSet, generation: int, unit: str) -> UnitSet:
    """Return stored units under another number and in another slot, otherwise unchanged."""
    (file,) = units.files
    text = _GENERATION.sub(f"Generation={generation}", file.text)
    identifier = log_identifier(units.stack, generation)
    text = _IDENTIFIER.sub(f"SyslogIdentifier={identifier}", text)
    text = _CONTAINER.sub(f"ContainerName={container_name(unit)}", text)
    return UnitSet(
        stack=units.stack,
        service=service_name(unit),
        container=container_name(unit),
        files=(UnitFile(name=unit_file_name(unit), text=text),),
    )


def without_install(*files: UnitFile) -> tuple[UnitFile, ...]:
    """Return unit files without their [Install] section, for a generation that is not proven yet:
    at boot the one that it replaces starts instead."""
    return tuple(UnitFile(name=file.name, text=_INSTALL.sub("", file.text)) for file in files)


def unit_file_name(unit: str) -> str:
    """Return the file name of a unit."""
    return f"{unit}.container"


def container_name(unit: str) -> str:
    """Return the name of a unit's container."""
    return f"stackctl-{unit}"


def log_identifier(stack: str, generation: int) -> str:
    """Return the identifier of a generation's lines in the journal."""
    return f"{stack}-g{generation}"


def without_comments(text: str) -> str:
    """Return the text of a unit or of HAProxy's configuration without lines that are comments."""
    return re.sub(r"^[ \t]*#.*\n", "", text, flags=re.MULTILINE)


def comparison_text(text: str) -> str:
    """Return a unit's text without its number, slot and time limits, to compare two units.

    A different limit for a start is no reason for another start.
    """
    text = _GENERATION.sub("Generation=", text)
    text = re.sub(r"^(TimeoutStartSec|StartLimitIntervalSec)=.*$", r"\1=", text, flags=re.MULTILINE)
    return _CONTAINER.sub("ContainerName=", _IDENTIFIER.sub("SyslogIdentifier=", text))


def without_claimed_bytes(text: str) -> str:
    """Return a unit's text without the memory it claims: a newly measured size is no reason for
    another start."""
    return _CLAIMED.sub(lambda claim: re.sub(r'bytes": \d+', 'bytes": ', claim[0]), text)


def generation_of(text: str) -> int | None:
    """Return the number of the generation that a unit text belongs to; None without one."""
    match = _GENERATION.search(text)
    return int(match[1]) if match else None


def profile_of(text: str) -> str | None:
    """Return the name of the profile that a unit text was made from; None without one."""
    match = re.search(r"^Profile=(\S+)$", text, re.MULTILINE)
    return match[1] if match else None


@functools.cache
def template_environment() -> jinja2.Environment:
    """Return the Jinja environment of the templates, with their filters and tests."""
    found = jinja2.Environment(
        loader=jinja2.FileSystemLoader(data_folder("templates")),
        undefined=jinja2.StrictUndefined,
        autoescape=False,  # unit files, not HTML
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    found.filters["text"] = quoting.quote_text
    found.filters["variable"] = quoting.join_variable
    found.filters["mount_point"] = quoting.mount_point
    found.tests["plain_path"] = quoting.is_plain_path
    found.globals["log_identifier"] = log_identifier
    return found
