"""Install and remove packages of Debian and Ubuntu; each failure has a remedy."""

from __future__ import annotations

import re
from collections.abc import Sequence

from stackctl.errors import ExitCode, StackctlError
from stackctl.machine import runner

#: Ask no questions, because nobody would answer, and restart no other services.
_ENVIRONMENT = {
    "DEBIAN_FRONTEND": "noninteractive",
    "APT_LISTCHANGES_FRONTEND": "none",
    "NEEDRESTART_SUSPEND": "1",
}
#: Seconds, more than slow mirrors take. apt itself waits half a minute for its lock (_OPTIONS).
_PATIENCE_S = 1800
_OPTIONS = ("-o", "DPkg::Lock::Timeout=30", "-o", "Dpkg::Options::=--force-confold")
#: Messages of apt and dpkg, their cause and the remedy.
_FAILURES = (
    (r"Could not get lock|Unable to acquire the dpkg|Unable to lock",
     "the package manager is at work on something else",
     "wait until it is done (unattended upgrades may take minutes), then again"),
    (r"dpkg was interrupted",
     "an earlier installation of packages was cut off",
     "sudo dpkg --configure -a, then again"),
    (r"No space left|enough free space",
     "the disk is too full for the packages",
     "df -h / /var shows what is full; sudo apt-get clean helps a little"),
    (r"Read-only file system",
     "the file system is read-only",
     "see why (dmesg), then: sudo mount -o remount,rw /"),
    (r"Could not resolve|Temporary failure|Could not connect|Network is unreachable|timed out"
     r"|Unable to locate package|no installation candidate|Failed to fetch|not found",
     "the packages cannot be fetched: no network, or no package source that has them",
     "connect this machine, or add a package source (/etc/apt/sources.list.d), then again"),
)  # fmt: skip


def packages_to_install(names: Sequence[str]) -> tuple[str, ...]:
    """Return the packages that an installation would add, with the dependencies.

    If apt cannot find the packages, its lists are updated first.

    Raises:
        StackctlError: exit 6, with the reason and its remedy.
    """
    done = _simulate("install", names)
    if done.status != 0:
        fetched = _apt_get("update")
        again = _simulate("install", names)
        if again.status != 0:
            # A failed update explains more than the packages that are missing because of it.
            raise _failure(again, before=fetched)
        done = again
    return new_packages(done.stdout)


def new_packages(simulation: str) -> tuple[str, ...]:
    """Return the packages that are new in the output of ``apt-get --simulate install``.

    apt prints ``Inst NAME (NEW ...)`` for these, and ``Inst NAME [OLD] (NEW ...)`` for upgrades of
    installed packages, which an undo must not remove.
    """
    return tuple(sorted(set(re.findall(r"^Inst (\S+) \(", simulation, re.MULTILINE))))


def install_packages(names: Sequence[str]) -> None:
    """Install packages. Raises StackctlError (exit 6) with the reason and its remedy."""
    words = (*_OPTIONS, "--yes", "--no-install-recommends", "install", *names)
    done = _apt_get(*words)
    if done.status != 0 and re.search("404|Failed to fetch", done.stderr):
        # Old lists name versions that the mirror no longer has.
        _apt_get("update")
        done = _apt_get(*words)
    _require_success(done)


def finish_interrupted() -> None:
    """Complete an installation that a crash interrupted. Raises StackctlError if that fails."""
    _require_success(_run("dpkg", "--force-confold", "--configure", "--pending"))


def reverse_dependencies(names: Sequence[str]) -> tuple[str, ...]:
    """Return the other packages that would be removed with these, because they need them.

    Raises:
        StackctlError: exit 6, if apt fails.
    """
    done = _require_success(_simulate("purge", names))
    removed = re.findall(r"^(?:Remv|Purg) (\S+)", done.stdout, re.MULTILINE)
    return tuple(sorted(set(removed) - set(names)))


def remove_packages(names: Sequence[str]) -> None:
    """Remove packages with their settings. Raises StackctlError (exit 6)."""
    _require_success(_apt_get(*_OPTIONS, "--yes", "purge", *names))


def _simulate(verb: str, names: Sequence[str]) -> runner.Completed:
    return _apt_get("--simulate", "--no-install-recommends", verb, *names)


def _apt_get(*arguments: str) -> runner.Completed:
    return _run("apt-get", *arguments)


def _run(*argv: str) -> runner.Completed:
    return runner.run(argv, check=False, timeout_s=_PATIENCE_S, extra_env=_ENVIRONMENT)


def _require_success(done: runner.Completed) -> runner.Completed:
    if done.status != 0:
        raise _failure(done)
    return done


def _failure(done: runner.Completed, before: runner.Completed | None = None) -> StackctlError:
    said = "\n".join((before.stderr if before else "", done.stderr, done.stdout[-4000:]))
    for pattern, message, hint in _FAILURES:
        found = re.search(rf"^.*(?:{pattern}).*$", said, re.MULTILINE)
        if found is not None:
            return StackctlError(
                message,
                details=(f"$ {done.command}", found[0].strip()),
                hint=hint,
                exit_code=ExitCode.HOST,
            )
    error = runner.process_error(done, f"{done.argv[0]} failed (exit {done.status})")
    error.hint = "correct the fault named above, then run the command again"
    error.exit_code = ExitCode.HOST
    return error
