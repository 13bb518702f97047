"""Run programs: without a shell and with a controlled environment.

Errors show the command as a user would type it.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from stackctl.errors import ExitCode, NotInstalled, StackctlError
from stackctl.machine import path_security

#: Variables of the caller that started programs get; all others are removed.
_PASSED = (
    "PATH", "HOME", "USER", "LOGNAME", "TERM", "TMPDIR", "DBUS_SESSION_BUS_ADDRESS",
    "XDG_RUNTIME_DIR", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "XDG_STATE_HOME", "XDG_CACHE_HOME",
    "CONTAINERS_CONF", "CONTAINERS_STORAGE_CONF", "CONTAINERS_REGISTRIES_CONF",
    "REGISTRY_AUTH_FILE", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY",
    "http_proxy", "https_proxy", "no_proxy",
)  # fmt: skip

#: The variables that name files and folders.
_PLACES = (
    "HOME", "TMPDIR", "XDG_RUNTIME_DIR", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "XDG_STATE_HOME",
    "XDG_CACHE_HOME", "CONTAINERS_CONF", "CONTAINERS_STORAGE_CONF", "CONTAINERS_REGISTRIES_CONF",
    "REGISTRY_AUTH_FILE",
)  # fmt: skip
_SEARCH_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

#: Called with every command before it runs (--verbose); set by the command line only.
observer: Callable[[str], None] | None = None


@dataclass(frozen=True)
class Completed:
    """A finished process: its command, its exit status and its output as text."""

    argv: tuple[str, ...]
    status: int
    stdout: str
    stderr: str

    @property
    def command(self) -> str:
        """Return the command as a user would type it."""
        return shlex.join(self.argv)


def controlled_environment() -> dict[str, str]:
    """Return the environment for programs that stackctl starts.

    ``su`` and ``sudo -u`` leave out XDG_RUNTIME_DIR and the bus address, and then every
    ``systemctl --user`` fails. Both are filled in if the user's runtime folder exists. Cron and
    services may have no HOME; then it is that of the user's account. For root, folders that another
    user could change are removed, because ``sudo -E`` passes on the caller's.
    """
    env = {name: os.environ[name] for name in _PASSED if name in os.environ}
    if not env.get("HOME"):
        try:
            env["HOME"] = pwd.getpwuid(os.getuid()).pw_dir
        except KeyError:
            env["HOME"] = "/"
    env["LC_ALL"] = "C.UTF-8"
    env["PATH"] = _search_path(env.get("PATH", ""))
    if os.geteuid() == 0:
        for name in _PLACES:
            if name in env and path_security.find_weakness(env[name]) is not None:
                del env[name]
        where = env.get("DBUS_SESSION_BUS_ADDRESS", "").removeprefix("unix:path=").partition(",")[0]
        if where.startswith("/") and path_security.find_weakness(where) is not None:
            del env["DBUS_SESSION_BUS_ADDRESS"]
        env.setdefault("HOME", pwd.getpwuid(0).pw_dir)
    runtime = Path(f"/run/user/{os.getuid()}")
    if "XDG_RUNTIME_DIR" not in env and os.getuid() != 0 and runtime.is_dir():
        env["XDG_RUNTIME_DIR"] = str(runtime)
    if "DBUS_SESSION_BUS_ADDRESS" not in env and (bus := env.get("XDG_RUNTIME_DIR")):
        env["DBUS_SESSION_BUS_ADDRESS"] = f"unix:path={bus}/bus"
    return env


def _search_path(given: str) -> str:
    """Return PATH with its absolute folders; for root, those that no other user can change."""
    folders = [folder for folder in given.split(":") if folder.startswith("/")]
    if os.geteuid() == 0:
        folders = [folder for folder in folders if path_security.find_weakness(folder) is None]
    return ":".join(folders) or _SEARCH_PATH


def working_folder() -> str | None:
    """Return the folder to start programs in: None for the current one, else ``/``.

    ``su`` and ``sudo -u`` may leave the user in a folder that the user may not enter. Rootless
    Podman refuses to start there.
    """
    return None if os.access(".", os.R_OK | os.X_OK) else "/"


def run(
    argv: Sequence[str],
    *,
    check: bool = True,
    timeout_s: float = 60,
    stdin: str | None = None,
    extra_env: dict[str, str] | None = None,
) -> Completed:
    """Run a program to its end.

    Raises:
        StackctlError: the program is absent or cannot be executed (exit 6), took longer than
            ``timeout_s``, or exited non-zero while ``check`` is set.
    """
    command = shlex.join(argv)
    if observer is not None:
        observer(command)
    try:
        # In a session of its own, so that Ctrl-C reaches only stackctl, which then ends in order.
        done = subprocess.run(
            list(argv),
            input=stdin,
            stdin=subprocess.DEVNULL if stdin is None else None,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout_s,
            env=controlled_environment() | (extra_env or {}),
            cwd=working_folder(),
            start_new_session=True,
            check=False,
        )
    except FileNotFoundError:
        raise NotInstalled(
            f"{argv[0]} is not installed", hint=f"needed for: {command}", exit_code=ExitCode.HOST
        ) from None
    except PermissionError:
        raise StackctlError(f"not allowed to run {argv[0]}", exit_code=ExitCode.HOST) from None
    except OSError as error:
        # For example a file of another architecture, or an empty one.
        raise StackctlError(
            f"cannot run {argv[0]}: {error.strerror}", exit_code=ExitCode.HOST
        ) from None
    except subprocess.TimeoutExpired:
        raise StackctlError(f"no answer within {timeout_s:.0f} s: {command}") from None
    result = Completed(tuple(argv), done.returncode, done.stdout, done.stderr)
    if check and result.status != 0:
        raise process_error(result)
    return result


def run_process_group(
    argv: Sequence[str], *, timeout_s: float, extra_env: dict[str, str]
) -> Completed:
    """Run a program that starts others, and kill all of them at its end.

    They are killed, too, if it takes longer than ``timeout_s``, and on Ctrl-C. ``stdout`` of the
    result holds stderr as well.

    Raises:
        StackctlError: the program is absent (exit 6), or took too long.
    """
    process = _start(argv, capture=True, extra_env=extra_env)
    try:
        output, _ = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        raise StackctlError(f"not done within {timeout_s:.0f} s: {shlex.join(argv)}") from None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if process.stdout is not None:
            process.stdout.close()
    return Completed(tuple(argv), process.returncode, output, "")


def stream(argv: Sequence[str]) -> int:
    """Run a program with this process's stdout and stderr, and return its exit status.

    Its output appears at once. Ctrl-C ends the program and raises KeyboardInterrupt.
    """
    process = _start(argv)
    try:
        return process.wait()
    except BaseException:
        process.terminate()
        process.wait()
        raise


def _start(
    argv: Sequence[str], *, capture: bool = False, extra_env: dict[str, str] | None = None
) -> subprocess.Popen[str]:
    """Start a program. With ``capture`` its output is piped and it gets a session of its own."""
    if observer is not None:
        observer(shlex.join(argv))
    try:
        return subprocess.Popen(
            list(argv),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE if capture else None,
            stderr=subprocess.STDOUT if capture else None,
            text=True,
            errors="replace",
            env=controlled_environment() | (extra_env or {}),
            cwd=working_folder(),
            start_new_session=capture,
        )
    except OSError as error:
        raise StackctlError(
            f"cannot run {argv[0]}: {error.strerror}", exit_code=ExitCode.HOST
        ) from None


def exec_program(argv: Sequence[str], *, hint: str) -> NoReturn:
    """Replace this process by another program, which keeps its terminal, input and output.

    Raises:
        StackctlError: the program cannot be run (exit 6, with the hint).
    """
    if observer is not None:
        observer(shlex.join(argv))
    try:
        os.execvpe(argv[0], list(argv), controlled_environment())
    except OSError as error:
        raise StackctlError(
            f"cannot run {argv[0]}: {error.strerror}", hint=hint, exit_code=ExitCode.HOST
        ) from None


def process_error(result: Completed, message: str | None = None) -> StackctlError:
    """Return the error for a failed process, with its command and its last 15 lines of output."""
    lines = (result.stderr.strip() or result.stdout.strip()).splitlines()
    return StackctlError(
        message or f"{result.argv[0]} failed (exit {result.status})",
        details=(f"$ {result.command}", *lines[-15:]),
    )


def own_command() -> tuple[str, ...]:
    """Return the command that starts this stackctl again, from any folder."""
    script = Path(sys.argv[0]).absolute()
    if script.suffix != ".py" and script.is_file() and os.access(script, os.X_OK):
        return (str(script),)
    # -P: Python does not import modules from the current folder.
    return (sys.executable, "-P", "-m", "stackctl")
