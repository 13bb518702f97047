"""What stands in the way of a launch: judged from facts, without looking at the machine."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass

from stackctl.probe.tools import Scope, Seen, Who
from stackctl.quantity import format_bytes
from stackctl.values.host import UNLIMITED, Limits, Problem, ProblemCode

#: The first podman with Quadlet.
_OLDEST_PODMAN = (4, 4)
#: What "stackctl provision" installs; it has an effect on managers that start afterwards.
DELEGATE = "/etc/systemd/system/user@.service.d/10-stackctl-delegate.conf"
MEMLOCK = "/etc/systemd/system/user@.service.d/10-stackctl-memlock.conf"
_INSTALL = {
    "debian": "apt-get install podman",
    "ubuntu": "apt-get install podman",
    "fedora": "dnf install podman",
    "rhel": "dnf install podman",
    "suse": "zypper install podman",
    "arch": "pacman -S podman",
}
#: Releases whose own podman is too old for Quadlet.
TOO_OLD = (("debian", "11"), ("debian", "12"), ("ubuntu", "20.04"), ("ubuntu", "22.04"))
UPGRADE = "upgrade to Debian 13, Ubuntu 24.04 or newer, or install podman 4.4 or newer"

_UNIFIED = "systemd.unified_cgroup_hierarchy=1"
CGROUP_FIX = f"add {_UNIFIED} to the kernel command line and reboot"


#: How the texts of problems began before documents held codes: fixed, for reading those documents.
_TEXTS_WITHOUT_CODE: tuple[tuple[str, ProblemCode], ...] = (
    ("podman is not installed", "podman-missing"),
    ("podman does not answer", "podman-no-answer"),
    ("podman ", "podman-too-old"),
    ("no Quadlet generator", "quadlet-missing"),
    ("systemd is not running", "systemd-not-running"),
    ("no service manager", "user-manager-not-running"),
    ("cgroup version 1", "cgroup-v1"),
    ("user services end", "linger-off"),
    ("no cpuset controller", "cpuset-missing"),
    ("cpuset is not delegated", "cpuset-not-delegated"),
    ("locked memory limit is unknown", "memlock-unknown"),
    ("locked memory is limited", "memlock-limited"),
    ("tools: not recorded", "recording-incomplete"),
)


def code_of(problem: Problem) -> ProblemCode | None:
    """Return the code of a problem, also for a document written before there were codes."""
    if problem.code is not None:
        return problem.code
    return next((code for text, code in _TEXTS_WITHOUT_CODE if problem.what.startswith(text)), None)


@dataclass(frozen=True)
class Facts:
    """What the judgement rests on."""

    live: bool
    scope: Scope
    seen: Seen
    limits: Limits
    #: Whether services of the system manager can be given any limit.
    may_raise: bool | None
    nodes: int
    #: The limit of locked memory that process 1 itself has, and so can hand on.
    memlock_reachable: int | None = None
    #: Drop-ins of user managers that are installed.
    drop_ins: frozenset[str] = frozenset()


def launch_problems(facts: Facts) -> tuple[Problem, ...]:
    """The problems, in the order in which a launch would meet them."""
    return (
        *_unrecorded(facts),
        *_podman(facts),
        *_systemd(facts),
        *_cgroups(facts),
        *_user_services(facts),
        *_memlock(facts),
    )


def _root(facts: Facts, command: str) -> str:
    return command if facts.seen.who.uid == 0 else f"sudo {command}"


def _linger(who: Who) -> str:
    return f"loginctl enable-linger {shlex.quote(who.name or '')}".rstrip()


def provision(item: str, by_hand: str | None = None) -> str:
    """The fix that stackctl does, shows first and takes back; the same by hand as a comment."""
    fix = f"stackctl provision --only {item}"
    return fix if by_hand is None else f"{fix}\n# by hand: {by_hand}"


def drop_in(item: str, path: str, line: str, *, sudo: str = "sudo ") -> str:
    """The fix that a file for the service managers of all users is."""
    steps = (
        f"{sudo}mkdir -p {path.rpartition('/')[0]}",
        f"printf '[Service]\\n{line}\\n' | {sudo}tee {path}",
        f"{sudo}systemctl daemon-reload",
    )
    return provision(item, f"{' && '.join(steps)}; then log in anew")


def _in_effect(facts: Facts, item: str, path: str, line: str) -> tuple[str, str]:
    """What is to be said of the cause, and the fix: the file, or a manager that reads it."""
    if path in facts.drop_ins:
        return (
            f"; {path} changes that when the user's service manager starts anew",
            f"stackctl provision --only {item} --restart-user\n"
            "# or log out everywhere and in again",
        )
    sudo = "" if facts.seen.who.uid == 0 else "sudo "
    return "", drop_in(item, path, line, sudo=sudo)


def _unrecorded(facts: Facts) -> Iterator[Problem]:
    if facts.seen.unrecorded:
        yield Problem(
            code="recording-incomplete",
            what="tools: not recorded",
            why=f"the recording holds no answer of {', '.join(facts.seen.unrecorded)}",
        )


def _podman(facts: Facts) -> Iterator[Problem]:
    seen = facts.seen
    version = seen.tools.podman
    if version is None:
        if facts.live:
            absent = seen.podman_absent
            yield Problem(
                code="podman-missing" if absent else "podman-no-answer",
                what="podman is not installed" if absent else "podman does not answer",
                why="containers run under podman"
                if absent
                else seen.podman_error or "podman --version gives no version",
                fix=_install(facts) if absent else None,
            )
        return
    if tuple(map(int, version.split(".")[:2])) < _OLDEST_PODMAN:
        yield Problem(
            code="podman-too-old",
            what=f"podman {version} is too old",
            why="services need Quadlet, which came with podman 4.4",
            fix=UPGRADE,
        )
    elif seen.generator_runs is False:
        yield Problem(
            code="quadlet-missing",
            what="no Quadlet generator",
            why=f"systemd finds no podman-{facts.scope}-generator, so .container files do nothing",
            fix="install podman with its systemd generators (the distribution's package has them)",
        )


def _install(facts: Facts) -> str | None:
    families = facts.seen.families
    if (*families[:1], facts.seen.release) in TOO_OLD:
        return UPGRADE
    command = next((_INSTALL[name] for name in families if name in _INSTALL), None)
    if command is None:
        return None
    by_hand = _root(facts, command)
    return provision("podman", by_hand) if command.startswith("apt-get") else by_hand


def _systemd(facts: Facts) -> Iterator[Problem]:
    if facts.seen.tools.systemd_running is not False:
        return
    if facts.scope == "system" or facts.seen.booted is False:
        yield Problem(
            code="systemd-not-running",
            what="systemd is not running",
            why="process 1 is not systemd (no /run/systemd/system), which runs the services",
            fix="boot this machine or container with systemd as process 1",
        )
        return
    who = facts.seen.who
    start = f"systemctl start user@{who.uid}.service"
    if facts.seen.tools.linger is False:
        start = _linger(who)
    yield Problem(
        code="user-manager-not-running",
        what="no service manager for this user",
        why=f"user@{who.uid}.service does not run; user services and their limits depend on it",
        fix=_root(facts, start),
    )


def _cgroups(facts: Facts) -> Iterator[Problem]:
    if facts.seen.tools.cgroup_version == 1:
        yield Problem(
            code="cgroup-v1",
            what="cgroup version 1",
            why="Quadlet needs cgroup version 2; here the controllers are in version 1 (or hybrid)",
            fix=_boot_with_version_2(facts),
        )


def _boot_with_version_2(facts: Facts) -> str:
    steps: tuple[str, ...] = ()
    if facts.seen.booted is not False and {"debian", "ubuntu"} & set(facts.seen.families):
        edit = f"""sed -i 's/^GRUB_CMDLINE_LINUX="/&{_UNIFIED} /' /etc/default/grub"""
        steps = (edit, "update-grub", "reboot")
    elif facts.seen.booted is not False and {"fedora", "rhel"} & set(facts.seen.families):
        steps = (f"grubby --update-kernel=ALL --args={_UNIFIED}", "reboot")
    return " && ".join(_root(facts, step) for step in steps) or CGROUP_FIX


def _user_services(facts: Facts) -> Iterator[Problem]:
    tools, who = facts.seen.tools, facts.seen.who
    if tools.linger is False and tools.systemd_running is not False:
        yield Problem(
            code="linger-off",
            what="user services end at logout",
            why=f"lingering is off for {who.name}",
            fix=provision("linger", _root(facts, _linger(who))),
        )
    known = facts.seen.controllers_known
    if facts.nodes < 2 or not known or "cpuset" in tools.cgroup_controllers:
        return
    if facts.scope == "system":
        yield Problem(
            code="cpuset-missing",
            what="no cpuset controller",
            why=f"services cannot be bound to one of the {facts.nodes} NUMA nodes without it",
        )
        return
    more, fix = _in_effect(facts, "cpuset", DELEGATE, "Delegate=cpu cpuset io memory pids")
    yield Problem(
        code="cpuset-not-delegated",
        what="cpuset is not delegated to user services",
        why=f"without it they cannot be bound to one of the {facts.nodes} NUMA nodes; "
        f"delegated: {' '.join(tools.cgroup_controllers) or 'nothing'}{more}",
        fix=fix,
    )


def _memlock(facts: Facts) -> Iterator[Problem]:
    limit = facts.limits.memlock_bytes
    if limit is None:
        # Without a manager there is no limit to read, and that is a problem already.
        if facts.live and facts.seen.tools.systemd_running:
            yield Problem(
                code="memlock-unknown",
                what="locked memory limit is unknown",
                why="the limits of the service manager's process cannot be read",
            )
        return
    if limit == UNLIMITED:
        return
    fixable = facts.scope == "user" and (
        facts.may_raise is not False or limit < (facts.memlock_reachable or 0)
    )
    more, fix = _in_effect(facts, "memlock", MEMLOCK, "LimitMEMLOCK=infinity")
    if not fixable:
        more = "; process 1 lacks CAP_SYS_RESOURCE, so no setting inside this machine can raise it"
    yield Problem(
        code="memlock-limited",
        what="locked memory is limited",
        why=f"services may lock {format_bytes(limit)} of memory at most{more}",
        fix=fix if fixable else None,
    )
