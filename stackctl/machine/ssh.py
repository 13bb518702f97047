"""OpenSSH: a box reached by the user's own settings, and its own stackctl run over one connection.

The user's configuration, agent and known hosts decide who is reached and how; no setting about host
keys is ever given. A connection is kept for a minute after its last use, so that the next command
need not make another one.
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
from stackctl.machine.runner import controlled_environment
from stackctl.machine.trust import private_folder

#: What ssh itself exits with when it fails (ssh(1)); stackctl never does.
FAILED = 255
#: What a shell exits with for a program that is not there (POSIX, 2.8.2), or cannot be run.
ABSENT = (127, 126)

#: Seconds that a connection outlives its last command.
_KEPT_S = 60
#: A box that has said nothing for 3 times 15 s is gone; without this ssh would wait for ever.
_ALIVE = ("-o", "ServerAliveInterval=15", "-o", "ServerAliveCountMax=3")
_SIGNAL_S = 20
#: Of the caller's environment, what ssh asks by, beside what all programs get.
_PASSED = (
    "SSH_AUTH_SOCK", "SSH_ASKPASS", "SSH_ASKPASS_REQUIRE", "DISPLAY", "WAYLAND_DISPLAY",
    "KRB5CCNAME",
)  # fmt: skip
#: What may come before the announcement of who runs.
_MOST_BEFORE = 65536
#: Run by sh on the box, whatever shell the user has there. pipx puts programs into ~/.local/bin.
_PREPARE = (
    'PATH="$PATH:$HOME/.local/bin"; export PATH; '
    'STACKCTL_CALLER="$1"; export STACKCTL_CALLER; shift; '
    'command -v "$1" >/dev/null 2>&1 || exit 127; '
)
_ANNOUNCE = 'echo "stackctl runs as $$" >&2; '
_ANNOUNCED = re.compile(rb"stackctl runs as (\d+)\n")
_BEGIN = 'exec "$@"'
#: What is sent between two reports of how far it is.
_PIECE = 256 * 1024
#: Free ports that are tried, of which another program may take one first.
_PORTS = 3


@dataclass(frozen=True)
class Box:
    """A machine as ssh knows it (``USER@HOST``, a name of ssh's settings, ``ssh://USER@HOST:PORT``)
    and the folder of sockets of connections, which is this user's own."""

    destination: str
    folder: Path

    def open(self) -> tuple[str, ...]:
        """Connect, or find that we are; ssh asks its questions on the terminal itself.

        Returns:
            The lines that ssh, or the box, has said.

        Raises:
            StackctlError: exit 1 with what ssh said; exit 6 when there is no ssh.
        """
        if self.connected():
            return ()
        private_folder(self.folder)
        # A file: the connection that stays holds on to it, and a pipe would not end.
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

    def connected(self) -> bool:
        """Whether a connection is there."""
        return self._ask("-O", "check") == 0

    def ask(self, command: str) -> tuple[int, str, str]:
        """Run a command of the box's shell that asks nothing; exit status, stdout and stderr."""
        words = [*self._ssh(), "-o", "LogLevel=ERROR", "-o", "BatchMode=yes", "-T"]
        with (
            tempfile.TemporaryFile(dir=self.folder) as out,
            tempfile.TemporaryFile(dir=self.folder) as err,
        ):
            status = _status(_start([*words, self.destination, command], stdout=out, stderr=err))
            return status, _whole(out), _whole(err)

    @contextlib.contextmanager
    def lend(
        self, argv: Sequence[str], data: bytes, progress: Callable[[int], None]
    ) -> Iterator[str]:
        """Send data to a program of the box that keeps it for as long as its stdin is open, and
        prints ``kept PATH``; gives the path. ``progress`` hears of bytes sent.

        Raises:
            StackctlError: exit 6 with its own words, 1 when the connection broke.
        """
        words = [*self._ssh(), "-o", "LogLevel=ERROR", "-o", "BatchMode=yes", "-T"]
        command = shlex.join(["exec", *argv])
        with tempfile.TemporaryFile(dir=self.folder) as said:
            process = _start(
                [*words, self.destination, command],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said,
            )  # fmt: skip
            assert process.stdin is not None and process.stdout is not None
            try:
                with contextlib.suppress(BrokenPipeError):
                    for begin in range(0, len(data), _PIECE):
                        process.stdin.write(data[begin : begin + _PIECE])
                        progress(min(begin + _PIECE, len(data)))
                    process.stdin.flush()
                # Files that the shell there reads first may say something, too.
                lines = (line.decode("utf-8", "replace").rstrip() for line in process.stdout)
                path = next((line[5:] for line in lines if line.startswith("kept ")), None)
                if path is None:
                    raise self._not_kept(_status(process), said)
                yield path
            except KeyboardInterrupt:
                # It would first send what it has taken, however slow the line.
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
    def forwarded(self, address: str, port: int) -> Iterator[int]:
        """A port of this machine's 127.0.0.1 that leads to one of the box, over this connection.

        Raises:
            StackctlError: the connection is gone, or the box forwards no ports.
        """
        for _ in range(_PORTS):
            with socket.create_server(("127.0.0.1", 0)) as free:
                ours = int(free.getsockname()[1])
            # Somebody may be faster.
            way = ("-L", f"127.0.0.1:{ours}:[{address}]:{port}")
            if self._ask("-O", "forward", *way) == 0:
                break
        else:
            raise StackctlError(
                f"ssh forwards no port to {self.destination}",
                hint=f"ssh -N -L {port}:{address}:{port} {shlex.quote(self.destination)} must work",
            )
        # A port that nobody uses for a while does not keep the connection; a command does.
        words = [*self._ssh(), "-o", "BatchMode=yes", "-T", self.destination, "exec cat"]
        with _start(words, stdin=subprocess.PIPE) as held:
            try:
                yield ours
            finally:
                self._ask("-O", "cancel", *way)
                held.kill()

    def _not_kept(self, status: int, said: IO[bytes]) -> StackctlError:
        lines = _whole(said).splitlines()
        if status == FAILED:
            return StackctlError(
                f"the connection to {self.destination} broke while stackctl was sent",
                details=lines,
                hint="nothing was changed there: again",
            )
        why = lines[-1].removeprefix("error: ") if lines else f"exit {status}"
        return StackctlError(
            f"{self.destination} cannot take stackctl: {why}",
            details=lines[:-1],
            hint="room and a whole python3 are needed there (python3-minimal is not one)",
            exit_code=ExitCode.HOST,
        )

    def call(self, caller: str, argv: Sequence[str], tell: Callable[[bytes], None]) -> int:
        """Run the box's stackctl with our stdout; what it writes on stderr goes to ``tell``.

        ``argv`` are words of the box, the program first. An interrupt of ours becomes one of the
        box's stackctl, whose end is then waited for; a second one ends the waiting
        (KeyboardInterrupt), while the box goes on.

        Returns:
            Its exit code, FAILED when the connection broke, or one of ABSENT.
        """
        return self._call(caller, argv, tell, stdout=None)

    def fetch(
        self, caller: str, argv: Sequence[str], tell: Callable[[bytes], None]
    ) -> tuple[int, bytes]:
        """Run the box's stackctl like ``call``; returns its exit code and what it has printed."""
        with tempfile.TemporaryFile(dir=self.folder) as out:
            status = self._call(caller, argv, tell, stdout=out.fileno())
            out.seek(0)
            return status, out.read()

    def call_on_terminal(self, caller: str, argv: Sequence[str]) -> int:
        """Run the box's stackctl on a terminal there that is ours here: it asks, draws and is
        interrupted as if it ran here. Returns as ``call`` does."""
        command = _command(_BEGIN, caller, argv)
        words = [*self._ssh(), "-o", "LogLevel=ERROR", "-t", self.destination, command]
        process = _start(words, asks=True, stdin=None, stdout=None, stderr=None)
        try:
            return _status(process)
        except BaseException:
            # By a signal for this process: the key would have gone to the box.
            process.terminate()
            process.wait()
            raise

    def _call(
        self,
        caller: str,
        argv: Sequence[str],
        tell: Callable[[bytes], None],
        *,
        stdout: int | None,
    ) -> int:
        command = _command(_ANNOUNCE + _BEGIN, caller, argv)
        words = [*self._ssh(), "-o", "LogLevel=ERROR", "-o", "BatchMode=yes", "-T"]
        number: int | None = None
        interrupts: list[subprocess.Popen[bytes] | None] = []

        def interrupt(*_: object) -> None:
            if interrupts:
                raise KeyboardInterrupt
            interrupts.append(self._interrupt(number) if number else None)

        with _handling(interrupt):
            process = _start(
                [*words, self.destination, command], stdout=stdout, stderr=subprocess.PIPE
            )
            assert process.stderr is not None
            try:
                held = b""
                while part := os.read(process.stderr.fileno(), 65536):
                    if number is None:
                        # Files that the shell there reads first may say something, too.
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

    def _interrupt(self, number: int) -> subprocess.Popen[bytes]:
        """Interrupt the box's stackctl: this user's there, or through sudo, which passes it on."""
        words = [*self._ssh(), "-o", "BatchMode=yes", "-T", self.destination]
        return _start([*words, f"kill -INT {number} || sudo -n kill -INT {number}"])

    def _ask(self, *options: str) -> int:
        """Ask the connection that is kept, on this side; its exit status."""
        return _start([*self._ssh(), *options, self.destination]).wait()

    def _ssh(self) -> list[str]:
        # Short, since the path of a socket has 108 bytes at most; ssh adds 17 of its own.
        name = hashlib.sha256(self.destination.encode()).hexdigest()[:12]
        return ["ssh", "-S", str(self.folder / name).replace("%", "%%")]


def _command(begin: str, caller: str, argv: Sequence[str]) -> str:
    """One text for the user's shell there, which hands all of it to sh as it is."""
    return shlex.join(["exec", "sh", "-c", _PREPARE + begin, "stackctl", caller, *argv])


def _start(
    argv: Sequence[str],
    *,
    asks: bool = False,
    stdin: int | None = subprocess.DEVNULL,
    stdout: int | IO[bytes] | None = subprocess.DEVNULL,
    stderr: int | IO[bytes] | None = subprocess.DEVNULL,
) -> subprocess.Popen[bytes]:
    """Start ssh; None is our own descriptor. One that may not ask on the terminal is in a group of
    its own, out of reach of Ctrl-C, which would cut the connection off."""
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
    """All that is in a file, as text."""
    stream.seek(0)
    return stream.read().decode("utf-8", "replace")


def _status(process: subprocess.Popen[bytes]) -> int:
    """Its exit status; that ssh was killed is a connection that broke."""
    status = process.wait()
    return status if status >= 0 else FAILED


@contextlib.contextmanager
def _handling(interrupt: Callable[..., None]) -> Iterator[None]:
    # Not SIGHUP: a terminal that is closed here is nothing to the box.
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _remedy(destination: str, why: str) -> str:
    """How to get a connection that ssh refused, or did not get."""
    name = shlex.quote(destination)
    if "verification failed" in why:
        return (
            f"compare the box's key with the one that ssh {name} shows, then accept it there;\n"
            "on the box: ssh-keygen -lf /etc/ssh/ssh_host_ed25519_key.pub"
        )
    if "Permission denied" in why:
        return f"ssh-copy-id {name}, or name user and key in ~/.ssh/config"
    return f"ssh {name} must work by itself; its settings are in ~/.ssh/config"
