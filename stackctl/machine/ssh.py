"""OpenSSH: reach a box with the user's own settings, and run the box's stackctl.

The user's configuration, agent and known hosts decide which machine is reached and how; stackctl
never passes an option about host keys. All commands share one connection. It is kept for a minute
after its last use, so that the next command need not connect again.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shlex
import signal
import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from stackctl.errors import ExitCode, StackctlError
from stackctl.machine.path_security import make_private_folder
from stackctl.machine.runner import controlled_environment
from stackctl.machine.signals import handle_signals

#: Exit status of ssh itself if it fails (ssh(1)); stackctl never exits with it.
FAILED = 255
#: Exit statuses of a shell for a program that is missing, or cannot be run (POSIX, 2.8.2).
ABSENT = (127, 126)

#: Seconds for which a connection is kept after its last command.
_KEPT_S = 60
#: A box that sends nothing for 3 times 15 s is gone; without these options ssh would wait for ever.
_ALIVE = ("-o", "ServerAliveInterval=15", "-o", "ServerAliveCountMax=3")
#: ssh asks nothing and prints only errors; the command gets no terminal.
_QUIET = ("-o", "LogLevel=ERROR", "-o", "BatchMode=yes", "-T")
_SIGNAL_S = 20
#: Variables that ssh needs to ask for passwords and keys, beside those that all programs get.
_PASSED = (
    "SSH_AUTH_SOCK", "SSH_ASKPASS", "SSH_ASKPASS_REQUIRE", "DISPLAY", "WAYLAND_DISPLAY",
    "KRB5CCNAME",
)  # fmt: skip
#: Bytes that the box's shell may print before the announcement.
_MOST_BEFORE = 65536
#: A script for sh on the box, for any login shell. pipx installs programs in ~/.local/bin.
_PREPARE = (
    'PATH="$PATH:$HOME/.local/bin"; export PATH; '
    'STACKCTL_CALLER="$1"; export STACKCTL_CALLER; shift; '
    'command -v "$1" >/dev/null 2>&1 || exit 127; '
)
_ANNOUNCE = 'echo "stackctl runs as $$" >&2; '
_ANNOUNCED = re.compile(rb"stackctl runs as (\d+)\n")
_BEGIN = 'exec "$@"'
#: Bytes that are sent between two reports of progress.
_PIECE = 256 * 1024
#: Free ports that are tried, because another program may take one first.
_PORTS = 3


@dataclass(frozen=True)
class RemoteHost:
    """A machine that is reached with ssh.

    ``destination`` is the argument of ssh: ``USER@HOST``, a host of ssh's configuration, or
    ``ssh://USER@HOST:PORT``. ``folder`` holds the sockets of connections and is this user's own.
    """

    destination: str
    folder: Path

    def connect(self) -> tuple[str, ...]:
        """Connect, unless a connection exists. ssh itself asks its questions on the terminal.

        Returns:
            The lines that ssh or the box has printed.

        Raises:
            StackctlError: exit 1 with ssh's message; exit 6 if ssh is not installed.
        """
        if self.is_connected():
            return ()
        make_private_folder(self.folder)
        # A file, because the connection that is kept holds it open: a pipe would not end.
        with tempfile.TemporaryFile(dir=self.folder) as said:
            keep = ("-o", "ControlMaster=auto", "-o", f"ControlPersist={_KEPT_S}", *_ALIVE)
            words = [*self._ssh(), *keep, "-T", self.destination, "exit"]
            status = _start(words, asks=True, stdout=said, stderr=said).wait()
            lines = tuple(_whole(said).splitlines())
        if status == 0:
            return lines
        if status != FAILED:
            raise StackctlError(
                f"{self.destination} runs no commands for this user (exit {status})",
                details=lines,
                hint=f"ssh {shlex.quote(self.destination)} must give a shell",
            )
        why = next((line for line in reversed(lines) if line.strip()), "ssh does not say why")
        raise StackctlError(
            f"cannot connect to {self.destination}: {why.strip()}",
            details=lines[:-1],
            hint=_remedy(self.destination, why),
        )

    def is_connected(self) -> bool:
        """Return True if a connection exists."""
        return self._ask("-O", "check") == 0

    def query(self, command: str) -> tuple[int, str, str]:
        """Run a shell command that asks nothing; return exit status, stdout and stderr."""
        words = [*self._ssh(), *_QUIET, self.destination, command]
        with (
            tempfile.TemporaryFile(dir=self.folder) as out,
            tempfile.TemporaryFile(dir=self.folder) as err,
        ):
            status = _status(_start(words, stdout=out, stderr=err))
            return status, _whole(out), _whole(err)

    @contextlib.contextmanager
    def hold_upload(
        self, argv: Sequence[str], data: bytes, progress: Callable[[int], None]
    ) -> Iterator[str]:
        """Send data to a program on the box, and yield the path at which the program keeps it.

        The program prints ``kept PATH`` and removes the data when its stdin is closed. ``progress``
        is called with the number of bytes sent.

        Raises:
            StackctlError: exit 6 with the program's message, exit 1 if the connection broke.
        """
        words = [*self._ssh(), *_QUIET, self.destination, shlex.join(["exec", *argv])]
        with tempfile.TemporaryFile(dir=self.folder) as said:
            process = _start(
                words,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said,
            )  # fmt: skip
            assert process.stdin is not None and process.stdout is not None
            try:
                with contextlib.suppress(BrokenPipeError):
                    for begin in range(0, len(data), _PIECE):
                        process.stdin.write(data[begin : begin + _PIECE])
                        progress(min(begin + _PIECE, len(data)))
                    process.stdin.flush()
                # The start-up files of the box's shell may print lines, too.
                lines = (line.decode("utf-8", "replace").rstrip() for line in process.stdout)
                path = next((line[5:] for line in lines if line.startswith("kept ")), None)
                if path is None:
                    raise self._not_kept(_status(process), said)
                yield path
            except KeyboardInterrupt:
                # Else ssh would first send all that it has buffered, however slow the line is.
                process.kill()
                raise
            finally:
                with contextlib.suppress(BrokenPipeError):
                    process.stdin.close()
                process.stdout.close()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(_SIGNAL_S)
                process.kill()
                process.wait()

    @contextlib.contextmanager
    def forward_port(self, address: str, port: int) -> Iterator[int]:
        """Forward a port of 127.0.0.1 here to ADDRESS:PORT of the box; yield its number.

        Raises:
            StackctlError: the connection is gone, or the box forwards no ports.
        """
        with contextlib.ExitStack() as forwarded:
            for _ in range(_PORTS):
                with socket.create_server(("127.0.0.1", 0)) as free:
                    ours = int(free.getsockname()[1])
                # Another program may take the port first; then the next one is tried.
                way = ("-L", f"127.0.0.1:{ours}:[{address}]:{port}")
                # Before the request, because ssh may have opened the port when Ctrl-C ends it.
                forwarded.callback(self._ask, "-O", "cancel", *way)
                if self._ask("-O", "forward", *way) == 0:
                    break
                forwarded.pop_all()
            else:
                raise StackctlError(
                    f"ssh forwards no port to {self.destination}",
                    hint=f"ssh -N -L {port}:{address}:{port} {shlex.quote(self.destination)} "
                    "must work",
                )
            # An unused port does not keep the connection open, but a running command does.
            words = [*self._ssh(), "-o", "BatchMode=yes", "-T", self.destination, "exec cat"]
            with _start(words, stdin=subprocess.PIPE) as held:
                try:
                    yield ours
                finally:
                    forwarded.close()
                    held.kill()

    def _not_kept(self, status: int, said: IO[bytes]) -> StackctlError:
        lines = _whole(said).splitlines()
        if status == FAILED:
            return StackctlError(
                f"the connection to {self.destination} broke while stackctl was sent",
                details=lines,
                hint="nothing was changed there: try again",
            )
        why = lines[-1].removeprefix("error: ") if lines else f"exit {status}"
        return StackctlError(
            f"{self.destination} cannot take stackctl: {why}",
            details=lines[:-1],
            hint="the box needs free disk space and the whole python3, not python3-minimal",
            exit_code=ExitCode.HOST,
        )

    def run(
        self,
        caller: str,
        argv: Sequence[str],
        tell: Callable[[bytes], None],
        *,
        stdout: int | None = None,
    ) -> int:
        """Run the box's stackctl, by default with this process's stdout; pass its stderr to
        ``tell``.

        ``argv`` begins with the program on the box. An interrupt here is passed on to the box's
        stackctl, and its end is waited for. A second interrupt ends the waiting
        (KeyboardInterrupt), and the box's stackctl goes on.

        Returns:
            Its exit code, FAILED if the connection broke, or one of ABSENT.
        """
        command = _command(_ANNOUNCE + _BEGIN, caller, argv)
        words = [*self._ssh(), *_QUIET, self.destination, command]
        number: int | None = None
        interrupts: list[subprocess.Popen[bytes] | None] = []

        def interrupt(*_: object) -> None:
            if interrupts:
                raise KeyboardInterrupt
            interrupts.append(self._interrupt(number) if number else None)

        # SIGHUP is left alone: a terminal that is closed here must not interrupt the box.
        with handle_signals(interrupt, (signal.SIGINT, signal.SIGTERM)):
            process = _start(words, stdout=stdout, stderr=subprocess.PIPE)
            assert process.stderr is not None
            try:
                held = b""
                while part := os.read(process.stderr.fileno(), 65536):
                    if number is None:
                        # The start-up files of the box's shell may print lines, too.
                        held += part
                        if found := _ANNOUNCED.search(held):
                            number = int(found[1])
                            held = held[: found.start()] + held[found.end() :]
                            if interrupts:
                                interrupts[0] = self._interrupt(number)
                        elif len(held) < _MOST_BEFORE:
                            continue
                        part, held = held, b""
                    tell(part)
                tell(held)
                return _status(process)
            finally:
                process.stderr.close()
                for child in (process, *interrupts):
                    if child is not None:
                        with contextlib.suppress(subprocess.TimeoutExpired):
                            child.wait(0 if child is process else _SIGNAL_S)
                        child.kill()
                        child.wait()

    def fetch(
        self, caller: str, argv: Sequence[str], tell: Callable[[bytes], None]
    ) -> tuple[int, bytes]:
        """Run the box's stackctl like ``run``; return its exit code and its stdout."""
        with tempfile.TemporaryFile(dir=self.folder) as out:
            status = self.run(caller, argv, tell, stdout=out.fileno())
            out.seek(0)
            return status, out.read()

    def run_tty(self, caller: str, argv: Sequence[str]) -> int:
        """Run the box's stackctl on this terminal; return the same as ``run``.

        It asks, draws and is interrupted as if it ran here.
        """
        command = _command(_BEGIN, caller, argv)
        words = [*self._ssh(), "-o", "LogLevel=ERROR", "-t", self.destination, command]
        process = _start(words, asks=True, stdin=None, stdout=None, stderr=None)
        try:
            return _status(process)
        except BaseException:
            # A signal has ended the wait. Ctrl-C as a key goes to the box and does not come here.
            process.terminate()
            process.wait()
            raise

    def _interrupt(self, number: int) -> subprocess.Popen[bytes]:
        """Send SIGINT to the box's stackctl; if it runs as root, sudo sends it."""
        words = [*self._ssh(), "-o", "BatchMode=yes", "-T", self.destination]
        return _start([*words, f"kill -INT {number} || sudo -n kill -INT {number}"])

    def _ask(self, *options: str) -> int:
        """Run a control command of the kept connection (ssh -O); return its exit status."""
        with _start([*self._ssh(), *options, self.destination]) as process:
            try:
                return process.wait()
            finally:
                process.kill()

    def _ssh(self) -> list[str]:
        # Short, because a socket's path has at most 108 bytes, and ssh adds 17 of its own.
        name = hashlib.sha256(self.destination.encode()).hexdigest()[:12]
        return ["ssh", "-S", str(self.folder / name).replace("%", "%%")]


def _command(begin: str, caller: str, argv: Sequence[str]) -> str:
    """Return one command line for the user's shell on the box, which passes all of it on to sh."""
    return shlex.join(["exec", "sh", "-c", _PREPARE + begin, "stackctl", caller, *argv])


def _start(
    argv: Sequence[str],
    *,
    asks: bool = False,
    stdin: int | None = subprocess.DEVNULL,
    stdout: int | IO[bytes] | None = subprocess.DEVNULL,
    stderr: int | IO[bytes] | None = subprocess.DEVNULL,
) -> subprocess.Popen[bytes]:
    """Start ssh. A descriptor of None is this process's own.

    Unless ssh may ask on the terminal, it gets a process group of its own: Ctrl-C does not reach it
    there and so does not cut off the connection.
    """
    environment = controlled_environment()
    environment |= {name: os.environ[name] for name in _PASSED if name in os.environ}
    try:
        return subprocess.Popen(
            list(argv),
            env=environment,
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            process_group=None if asks else 0,
        )
    except FileNotFoundError:
        raise StackctlError(
            "ssh is not installed", hint="install OpenSSH's client", exit_code=ExitCode.HOST
        ) from None


def _whole(stream: IO[bytes]) -> str:
    """Return the whole content of a file as text."""
    stream.seek(0)
    return stream.read().decode("utf-8", "replace")


def _status(process: subprocess.Popen[bytes]) -> int:
    """Wait for ssh and return its exit status; FAILED if a signal killed it."""
    status = process.wait()
    return status if status >= 0 else FAILED


def _remedy(destination: str, why: str) -> str:
    """Return the hint for a connection that failed for the reason ``why``, a line of ssh."""
    name = shlex.quote(destination)
    if "verification failed" in why:
        return (
            f"compare the box's key with the one that ssh {name} shows, then accept it there;\n"
            "on the box: ssh-keygen -lf /etc/ssh/ssh_host_ed25519_key.pub"
        )
    if "Permission denied" in why:
        return f"ssh-copy-id {name}, or name user and key in ~/.ssh/config"
    return f"ssh {name} must work by itself; its settings are in ~/.ssh/config"
