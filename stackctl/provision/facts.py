"""Read the facts for a plan: the host, the service user, settings, packages and files."""

from __future__ import annotations

import os
import re
from pathlib import Path

from stackctl.errors import StackctlError
from stackctl.machine import path_security
from stackctl.probe import probe
from stackctl.probe.fact_reader import FactReader
from stackctl.probe.tools import can_raise_limits, manager_socket, probe_limits, user_service
from stackctl.provision import apt, foreign_settings, self_install
from stackctl.provision.target_root import TargetRoot
from stackctl.provision.undo_record import UndoStore
from stackctl.requirements import host_paths, podman
from stackctl.requirements.facts import MachineFacts, ProbeUser, ServiceUser, SettingValue
from stackctl.resources import data_folder
from stackctl.values.host import UNLIMITED
from stackctl.values.provision import FileChange

#: Without these options apt writes its cache of package lists when root runs it.
_WRITE_NOTHING = ("--option=Dir::Cache::pkgcache=", "--option=Dir::Cache::srcpkgcache=")


def read_facts(target: TargetRoot, store: UndoStore, user: str | None) -> MachineFacts:
    """Read the facts of a machine; ``user`` is the service user, None for root's stacks only."""
    reader = FactReader(target.machine)
    host = probe(target.machine, scope="system")
    release = _os_release(target)
    families = tuple(f"{release.get('ID', '')} {release.get('ID_LIKE', '')}".split())
    packages, held = _packages(target)
    candidate = None if host.tools.podman else _candidate(target, "podman")
    needed = podman.packages(families, release.get("VERSION_ID"), host.tools.podman or candidate)
    missing = tuple(name for name in needed if packages is not None and name not in packages)
    program = _program(target)
    weakness = None if program is None else _program_weakness(target, program)
    return MachineFacts(
        host=host,
        families=families,
        release=release.get("VERSION_ID"),
        user=None if user is None else _user(target, reader, user),
        may_raise=can_raise_limits(reader),
        memlock_reachable=probe_limits(reader, "system", ProbeUser(0, "root")).memlock_bytes,
        root_controllers=tuple((target.read("/sys/fs/cgroup/cgroup.controllers") or "").split()),
        files={path: target.read(path) for path in host_paths.FILES.values()},
        written=_written(store),
        shipped={
            name: (data_folder("systemd") / name).read_text("utf-8") for name in host_paths.FILES
        },
        foreign=foreign_settings.find_foreign_settings(target, user_id=_uid(target, user)),
        settings=_settings(target),
        packages=packages,
        held=held,
        simulated=_simulated(target, missing) if missing else (),
        podman_candidate=candidate,
        toolkit=_candidate(target, host_paths.TOOLKIT) if host.gpus else None,
        subuid=target.read("/etc/subuid") or "",
        subgid=target.read("/etc/subgid") or "",
        swap=len((target.read("/proc/swaps") or "").splitlines()) > 1,
        folders=frozenset(filter(target.exists, (host_paths.MODELS,))),
        units=frozenset(unit for unit in host_paths.CDI_UNITS if _has_unit(target, unit)),
        enabled=frozenset(unit for unit in host_paths.CDI_UNITS if _enabled(target, unit)),
        guarded=target.exists(host_paths.GUARD_TIMER),
        program=program,
        program_weakness=None if weakness is None else str(weakness),
        program_ours=program is not None and _is_own_copy(target, target.path_of(program)),
        program_replaceable=weakness is not None and _is_own_copy(target, Path(weakness.path)),
        program_current=self_install.is_current(target.path_of(host_paths.PROGRAM_FOLDER)),
        python_weakness=_weakness(self_install.base_python()),
    )


def _program(target: TargetRoot) -> str | None:
    return next((path for path in host_paths.LINKS if target.exists(path)), None)


def _is_own_copy(target: TargetRoot, path: Path) -> bool:
    """Return True if a path leads into the folder of the copy that provisioning installs."""
    return path.resolve().is_relative_to(target.path_of(host_paths.PROGRAM_FOLDER).resolve())


def _program_weakness(target: TargetRoot, program: str) -> path_security.Weakness | None:
    """Return the first right by which other users can change a program.

    Every file of the copy that provisioning installs counts, because the program imports them.
    """
    paths = [target.path_of(program)]
    if _is_own_copy(target, paths[0]):
        paths += sorted(target.path_of(host_paths.PROGRAM_FOLDER).rglob("*"))
    found = (path_security.find_weakness(path) for path in paths)
    return next((weakness for weakness in found if weakness is not None), None)


def _has_unit(target: TargetRoot, unit: str) -> bool:
    return any(target.exists(f"{folder}/{unit}") for folder in host_paths.UNIT_FOLDERS)


def _weakness(path: Path) -> str | None:
    weakness = path_security.find_weakness(path)
    return None if weakness is None else str(weakness)


def _os_release(target: TargetRoot) -> dict[str, str]:
    text = target.read("/etc/os-release") or target.read("/usr/lib/os-release") or ""
    pairs = (line.partition("=") for line in text.splitlines())
    return {name: value.strip("\"'") for name, equals, value in pairs if equals}


def _uid(target: TargetRoot, user: str | None) -> int | None:
    for line in (target.read("/etc/passwd") or "").splitlines():
        fields = line.split(":")
        if len(fields) > 2 and fields[0] == user and fields[2].isdecimal():
            return int(fields[2])
    return None


def _user(target: TargetRoot, reader: FactReader, name: str) -> ServiceUser:
    uid = _uid(target, name)
    home = next(
        (
            line.split(":")[5]
            for line in (target.read("/etc/passwd") or "").splitlines()
            if line.startswith(f"{name}:") and line.count(":") == 6
        ),
        None,
    )
    if uid is None and target.machine.live:
        # Not every user is in /etc/passwd (LDAP, systemd-homed).
        import pwd

        try:
            uid, home = pwd.getpwnam(name).pw_uid, pwd.getpwnam(name).pw_dir
        except KeyError:
            uid = None
    if uid is None:
        return ServiceUser(name)
    unit = _properties(target, f"user@{uid}.service")
    limit = unit.get("LimitMEMLOCK", "")
    return ServiceUser(
        name,
        uid=uid,
        home=home,
        lingers=target.exists(f"/var/lib/systemd/linger/{name}"),
        running=target.exists(manager_socket(uid)),
        memlock_bytes=probe_limits(reader, "user", ProbeUser(uid, name)).memlock_bytes,
        memlock_next=UNLIMITED if limit == "infinity" else int(limit) if limit.isdigit() else None,
        controllers=tuple((target.read(f"{user_service(uid)}/cgroup.controllers") or "").split()),
        controllers_next=tuple(unit.get("DelegateControllers", "").split()),
        stale=unit.get("NeedDaemonReload") == "yes",
        guarded=home is not None
        and target.exists(f"{home}/.config/systemd/user/stackctl-guard.timer"),
    )


def _properties(target: TargetRoot, unit: str) -> dict[str, str]:
    names = "--property=LimitMEMLOCK,DelegateControllers,NeedDaemonReload"
    done = target.query("systemctl", "show", unit, names)
    pairs = (line.partition("=") for line in (done.stdout if done else "").splitlines())
    return {name: value for name, equals, value in pairs if equals}


def _written(store: UndoStore) -> dict[str, str]:
    try:
        changes = [one.change for one in store.read().changes]
    except StackctlError:
        # Only root may read the record. A preview by an ordinary user does without it.
        if os.geteuid() == 0:
            raise
        return {}
    return {change.path: change.text for change in changes if isinstance(change, FileChange)}


def _settings(target: TargetRoot) -> dict[str, SettingValue]:
    found = {}
    for pattern in host_paths.SETTINGS:
        for path in target.machine.glob(pattern):
            value = target.kernel_value(path)
            if value is not None:
                found[path] = SettingValue(value, target.may_write(path))
    return found


def _packages(target: TargetRoot) -> tuple[dict[str, str] | None, frozenset[str]]:
    """Return the versions of dpkg's installed packages (None without dpkg), and the held ones."""
    text = target.read("/var/lib/dpkg/status")
    if text is None:
        return None, frozenset()
    found: dict[str, str] = {}
    held = set()
    for block in text.split("\n\n"):
        name = re.search(r"^Package: (\S+)$", block, re.MULTILINE)
        status = re.search(r"^Status: (\S+) \S+ (\S+)$", block, re.MULTILINE)
        version = re.search(r"^Version: (\S+)$", block, re.MULTILINE)
        if name and status and status[2] == "installed":
            found[name[1]] = version[1] if version else ""
            if status[1] == "hold":
                held.add(name[1])
    return found, frozenset(held)


def _simulated(target: TargetRoot, names: tuple[str, ...]) -> tuple[str, ...]:
    done = target.query(
        "apt-get", *_WRITE_NOTHING, "--simulate", "--no-install-recommends", "install", *names
    )
    return apt.new_packages(done.stdout if done is not None and done.status == 0 else "")


def _candidate(target: TargetRoot, package: str) -> str | None:
    done = target.query("apt-cache", *_WRITE_NOTHING, "policy", package)
    found = re.search(r"^\s+Candidate: (\d\S*)$", done.stdout if done else "", re.MULTILINE)
    return found[1] if found else None


def _enabled(target: TargetRoot, unit: str) -> bool:
    done = target.query("systemctl", "is-enabled", unit)
    return done is not None and done.stdout.strip() == "enabled"
