"""The demo: `make demo` serves a small model and asks for one answer, `make demo-down` ends it.

It uses the systemd and Podman of this machine. If they are missing, it starts a lab on the
machine's network, so the commands that it prints work in the caller's shell.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import http.client
import io
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, NoReturn, Self

from . import trees
from .furnish import python_version
from .host import CHECKOUT, LabError, cache_root, need
from .lab import IMAGE, MODEL_PATH, Lab

PROFILE = "demo"
PORT = 8089
USER = "lab"
FOLDER = CHECKOUT / ".demo"
OLDEST_PODMAN = (4, 7)
# The model is a base model: it continues a text and does not converse.
PROMPT = "A recipe for apple pie:"
SAMPLING = {"max_tokens": 128, "temperature": 0.6, "repeat_penalty": 1.15, "seed": 1}
SHOWN_VARIABLES = ("TERM", "NO_COLOR", "COLUMNS")

WRAPPER = """\
#!/bin/sh
# stackctl of the demo: {where}.
{elevate}PYTHONPATH={code} exec {python} -P -m lab.demo --folder {folder} exec -- "$@"
"""


class DemoError(Exception):
    """The demo cannot go on. The message gives the reason, the hint the remedy."""

    def __init__(self, message: str, hint: str = "") -> None:
        """Store the message and the hint."""
        super().__init__(message)
        self.hint = hint


class Here:
    """This machine itself."""

    where = "on this machine"

    def __init__(self) -> None:
        """Use the systemd and podman of this machine."""
        self.model = ""

    def start(self, argv: Sequence[str]) -> subprocess.Popen[Any]:
        """Start a command in a session of its own, so that only the demo forwards Ctrl-C to it."""
        words = self.words(argv)
        return subprocess.Popen(words, stdin=subprocess.DEVNULL, start_new_session=True)

    def words(self, argv: Sequence[str]) -> list[str]:
        """Return the command line of that command."""
        if argv[0] == "stackctl":
            return trees.project(*argv[1:])
        return list(argv)

    def prepare(self) -> None:
        """Build the engine image, unless Podman has it."""
        self.model = str(trees.fetch_model())
        with step("image") as shown:
            if quiet(["podman", "image", "exists", IMAGE]).returncode:
                load = self.words(["stackctl", "image", "load", str(trees.build_engine_archive())])
                if (done := quiet(load)).returncode:
                    raise DemoError(f"the engine image cannot be loaded\n{done.stderr.strip()}")
                shown.done("llama.cpp from Debian's packages, built and loaded")
            else:
                shown.done("llama.cpp from Debian's packages, present")


class InLab:
    """The lab, as its ordinary user."""

    where = f'in the lab, as its user "{USER}"'

    def __init__(self, folder: Path) -> None:
        """Attach to the lab that is recorded in FOLDER, if it is running."""
        self.model = MODEL_PATH
        self._folder = folder
        self._lab: Lab | None = Lab.attach(folder) if Lab.running(folder) else None

    @property
    def lab(self) -> Lab:
        """Return the booted lab. Raise DemoError if there is none."""
        if self._lab is None:
            raise DemoError("the demo is not up", "make demo")
        return self._lab

    def start(self, argv: Sequence[str]) -> subprocess.Popen[Any]:
        """Start a command in the lab."""
        return self.lab.spawn(argv, user=USER, env=shown_variables(), stdout=None, stderr=None)

    def words(self, argv: Sequence[str]) -> list[str]:
        """Return the command line of this machine that runs ARGV in the lab."""
        return self.lab.words(argv, user=USER, env=shown_variables())

    def prepare(self) -> None:
        """Build the engine image and start the lab with it."""
        if not os.environ.get("LAB_IMAGE") and not os.environ.get("LAB_ROOT"):
            with step("image") as shown:
                size = trees.build_engine_archive().stat().st_size
                shown.done(f"llama.cpp from Debian's packages, {size / 1e6:.0f} MB")
        with step("lab") as shown:
            if self._lab is not None and self._code(self._lab) != self._noted():
                shown.keep("the checkout has changed: starting it afresh")
                Lab.stop(self._folder)
                self._lab = None
            if self._lab is None:
                shown.note("booting")
                # The demo's profile has no front door.
                self._lab = Lab.start_detached(self._folder, private_network=False, door=False)
                (self._folder / "code").write_text(self._code(self._lab))
            shown.done(self.describe())

    def describe(self) -> str:
        """Return one line with the system of the lab and the versions of its tools."""
        release = self.lab.read("/etc/os-release")
        name = re.search(r'^PRETTY_NAME="?([^"\n(]+)', release, re.MULTILINE)
        return f"{name[1].strip() if name else 'Linux'}, {tool_versions(self)}"

    def _noted(self) -> str:
        noted = self._folder / "code"
        return noted.read_text() if noted.exists() else ""

    @staticmethod
    def _code(lab: Lab) -> str:
        return trees.build_app(python_version(Path(f"/proc/{lab.pid}/root"))).name


def main() -> int:
    """Run one command of the demo."""
    parser = argparse.ArgumentParser(prog="make demo", description=__doc__)
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where it keeps its state")
    verbs = parser.add_subparsers(dest="verb", required=True)
    begin = verbs.add_parser("up", help="set up what is missing and show stackctl")
    begin.add_argument("--lab", action="store_true", help="in the lab even where it could be here")
    begin.add_argument("--port", type=int, default=int(os.environ.get("PORT") or PORT))
    verbs.add_parser("down", help="end everything that `up` started")
    execute = verbs.add_parser("exec", help="run stackctl where the demo runs")
    execute.add_argument("arguments", nargs=argparse.REMAINDER, help="-- ARGUMENTS ...")
    options = parser.parse_args()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    folder = options.folder.resolve()
    try:
        if options.verb == "exec":
            return enter(folder, options.arguments)
        with alone(folder):
            if options.verb == "down":
                return down(folder)
            return up(folder, options.port, always_lab=options.lab)
    except DemoError as error:
        print(f"error: {error}", file=sys.stderr)
        if error.hint:
            print("hint: " + error.hint.replace("\n", "\n  "), file=sys.stderr)
        return 1
    except LabError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; make demo goes on, make demo-down clears up", file=sys.stderr)
        return 130


def up(folder: Path, port: int, *, always_lab: bool = False) -> int:
    """Set up the missing parts, then show stackctl with its usual commands."""
    running = Lab.running(folder)
    reason = "this machine is left alone" if always_lab else why_not_here()
    place: Here | InLab = InLab(folder) if running or reason else Here()
    if reason and not running and os.geteuid() != 0:
        raise DemoError(f"{reason}, and the lab needs root", "sudo make demo")
    refuse_taken_port(place, folder, port)
    if running:
        say("demo", "the lab is up already")
    elif reason:
        say("demo", f"{reason}: setting up the lab,")
        say("", "a throw-away machine with both; make demo-down ends it")
        need({"curl": "curl"})
    else:
        say("demo", f"uses this machine's own {tool_versions(place)}")
    fetch_model()
    place.prepare()
    (folder / "port").write_text(str(port))
    write_wrapper(place, folder)
    if isinstance(place, InLab):
        say("", f"the commands below run in it as its user {USER} (rootless)")
    model = ["--model", f"file:{place.model}"]
    if port != PORT:
        model += ["--set", f"port={port}"]
    show(place, ["stackctl", "probe"])
    show(place, ["stackctl", "plan", PROFILE, *model, "--explain"])
    show(place, ["stackctl", "up", PROFILE, *model])
    show(place, ["stackctl", "check", PROFILE])
    ask(port)
    show(place, ["stackctl", "status"])
    farewell(folder, port)
    return 0


def down(folder: Path) -> int:
    """End everything that `up` started, and check that nothing remains."""
    kept = f"the demo is down\nkept for the next time: {cache_root()}"
    if Lab.running(folder):
        lab = Lab.attach(folder)
        home, init = lab._folder, Path("/proc", str(lab.pid))
        with step("lab") as shown:
            shown.note("ending it")
            Lab.stop(folder)
            if init.exists() or home.exists() or f" {home}/" in Path("/proc/mounts").read_text():
                raise DemoError(f"something of the lab is left: process {init.name}, {home}")
            shown.done("ended: no process, mount or file of it is left")
        print(kept, flush=True)
    elif (folder / "here").exists():
        place = Here()
        with step("stack") as shown:
            done = quiet(place.words(["stackctl", "down", PROFILE]))
            # 3: it is not running, 4: it does not exist.
            if done.returncode not in (0, 3, 4):
                raise DemoError(f"stackctl down {PROFILE} failed\n{done.stderr.strip()}")
            shown.done("stopped: no container and no unit of it is left")
        print(f"{kept}\nand the image {IMAGE}", flush=True)
    else:
        # Remove the remains of a lab that was killed.
        Lab.stop(folder)
        print("the demo is not up: nothing to stop", flush=True)
    for name in ("stackctl", "port", "code", "here"):
        (folder / name).unlink(missing_ok=True)
    return 0


def enter(folder: Path, arguments: Sequence[str]) -> int:
    """Replace this process by stackctl where the demo runs."""
    words = list(arguments[1:] if arguments[:1] == ["--"] else arguments)
    here = (folder / "here").exists()
    argv = (Here() if here else InLab(folder)).words(["stackctl", *words])
    sys.stdout.flush()
    os.execvp(argv[0], argv)


# Abilities of this machine


def why_not_here() -> str:
    """Return the reason why the demo cannot use this machine's systemd and Podman, or ""."""
    if not Path("/run/systemd/system").is_dir():
        return "this machine is not run by systemd"
    if not shutil.which("podman"):
        return "this machine has no podman"
    version = podman_version(quiet(["podman", "--version"]).stdout)
    if version < OLDEST_PODMAN:
        oldest = ".".join(map(str, OLDEST_PODMAN))
        return f"this machine's podman {'.'.join(map(str, version))} is older than {oldest}"
    if quiet(["podman", "info"]).returncode:
        return "this machine's podman does not work"
    scope = "--system" if os.geteuid() == 0 else "--user"
    if quiet(["systemctl", scope, "show-environment"]).returncode:
        return "this user's service manager does not answer"
    return ""


def podman_version(text: str) -> tuple[int, ...]:
    """Return the version from the output of `podman --version`."""
    found = re.search(r"(\d+)\.(\d+)\.(\d+)", text)
    return tuple(int(part) for part in found.groups()) if found else (0,)


def tool_versions(place: Here | InLab) -> str:
    """Return the versions of systemd and Podman there."""
    systemd = quiet(place.words(["systemctl", "--version"])).stdout.split()
    podman = podman_version(quiet(place.words(["podman", "--version"])).stdout)
    return f"systemd {systemd[1] if len(systemd) > 1 else '?'}, podman {'.'.join(map(str, podman))}"


def refuse_taken_port(place: Here | InLab, folder: Path, port: int) -> None:
    """Raise DemoError if another program has the port. The demo itself may have it."""
    noted = folder / "port"
    ours = noted.exists() and noted.read_text() == str(port)
    if ours and (isinstance(place, Here) or place._lab is not None):
        return
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            raise DemoError(
                f"port {port} is taken by {holder(port)}",
                f"another port: make demo PORT={port + 1}\n"
                "a demo of another checkout ends with make demo-down there",
            ) from None


def holder(port: int) -> str:
    """Return the program that listens on that port."""
    code = (
        "from stackctl.machine.machine import Machine\n"
        "from stackctl.machine.ports import listener\n"
        f"print(listener(Machine(), {port}))\n"
    )
    path = f"PYTHONPATH={CHECKOUT}"
    return quiet(["env", path, trees.project_python(), "-c", code]).stdout.strip() or "a program"


def fetch_model() -> None:
    """Fetch the model and verify its hash."""
    with step("model") as shown:
        model = trees.fetch_model()
        shown.note("verifying")
        with model.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != trees.MODEL_SHA256:
            raise DemoError(f"{model} is damaged (sha256 {digest})", f"rm {model}; make demo")
        size = model.stat().st_size / 1e6
        shown.done(f"Gemma 3 270M Q4_K_M, {size:.0f} MB, sha256 {digest[:8]}… ok")


# Output


def show(place: Here | InLab, argv: Sequence[str]) -> None:
    """Run a command; print its line, then its output as it comes."""
    print(f"\n$ {shlex.join(argv)}", flush=True)
    process = place.start(argv)
    try:
        code = process.wait()
    except KeyboardInterrupt:
        # stackctl restores the previous state before it ends. A second Ctrl-C does not wait for it.
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired, KeyboardInterrupt):
            process.wait(100)
        process.kill()
        raise KeyboardInterrupt from None
    if code:
        line = f"{shlex.join(argv[:3])} exited {code}"
        raise DemoError(line, "make demo tries again, make demo-down clears up")


def ask(port: int) -> None:
    """Request one answer, print it as it comes, and print its speed."""
    print("\nask       one streamed answer; a base model goes on with the text it is given\n")
    out = Wrapped(min(80, shutil.get_terminal_size((80, 24)).columns) - 1, "  ")
    out.write(f"{PROMPT}\n")
    body = {"prompt": f"{PROMPT}\n", "stream": True, "stream_options": {"include_usage": True}}
    body.update(SAMPLING)
    begin = time.monotonic()
    first = last = 0.0
    tokens = 0
    try:
        for event in events(port, body):
            for choice in event.get("choices") or []:
                if text := choice.get("text"):
                    last = time.monotonic()
                    first = first or last
                    out.write(text)
            tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise DemoError(f"no answer from port {port}: {error}") from error
    finally:
        out.end()
    if tokens < 2 or last <= first:
        raise DemoError(f"the answer on port {port} has {tokens} tokens")
    speed = (tokens - 1) / (last - first)
    measured = f"first token {first - begin:.2f} s, {speed:.1f} tok/s over {tokens} tokens"
    print(f"\nanswer    ok     {measured}", flush=True)


def events(port: int, body: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the events that the endpoint streams."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        headers = {"Content-Type": "application/json"}
        connection.request("POST", "/v1/completions", json.dumps(body), headers)
        answer = connection.getresponse()
        if answer.status != 200:
            raise DemoError(f"HTTP {answer.status}: {answer.read(300).decode(errors='replace')}")
        for line in answer:
            data = line.decode().strip().removeprefix("data:").strip()
            if data.startswith("{"):
                yield json.loads(data)
    finally:
        connection.close()


def farewell(folder: Path, port: int) -> None:
    """Print the commands to try next, ready to paste, and the command that stops the demo."""
    command = shlex.quote(named(folder / "stackctl"))
    inside = Path(os.environ.get("PWD", "/")).resolve() == CHECKOUT
    make = "make" if inside else f"make -C {shlex.quote(str(CHECKOUT))}"
    print(f"""
demo is up: http://127.0.0.1:{port}/v1
try next, in this shell
  curl -sw '\\n' http://127.0.0.1:{port}/v1/completions \\
    -H 'Content-Type: application/json' \\
    -d '{{"prompt": {json.dumps(PROMPT)},
         "max_tokens": 64, "repeat_penalty": 1.15}}'
  {command} status
  {command} logs -f
stop
  {make} demo-down""")
    sys.stdout.flush()


def named(path: Path) -> str:
    """Return a path in the form that can be pasted in the caller's folder."""
    if Path(os.environ.get("PWD", "/")).resolve() == CHECKOUT and path.is_relative_to(CHECKOUT):
        return str(path.relative_to(CHECKOUT))
    return str(path)


def write_wrapper(place: Here | InLab, folder: Path) -> None:
    """Write the command that runs stackctl where the demo runs, and record the place."""
    if isinstance(place, Here):
        (folder / "here").touch()
    as_root = os.geteuid() == 0
    text = WRAPPER.format(
        where=place.where,
        elevate='test "$(id -u)" = 0 || exec sudo "$0" "$@"\n' if as_root else "",
        code=shlex.quote(str(CHECKOUT / "tests")),
        python=shlex.quote(sys.executable),
        folder=shlex.quote(str(folder)),
    )
    path = folder / "stackctl"
    path.write_text(text)
    path.chmod(0o755)


class Wrapped:
    """Text that comes in pieces, printed at once and wrapped between words."""

    def __init__(self, width: int, indent: str) -> None:
        """Wrap at that width."""
        self._width = width
        self._indent = indent
        self._column = 0
        self._word = ""

    def write(self, text: str) -> None:
        """Print a piece. Its last word waits until it is complete."""
        for sign in text:
            if sign.isspace():
                self._flush_word()
                if sign == "\n" and self._column:
                    print(flush=True)
                    self._column = 0
            elif sign.isprintable():
                self._word += sign
        sys.stdout.flush()

    def end(self) -> None:
        """Print the rest."""
        self._flush_word()
        if self._column:
            print(flush=True)
        self._column = 0

    def _flush_word(self) -> None:
        if not self._word:
            return
        if self._column and self._column + 1 + len(self._word) > self._width:
            print()
            self._column = 0
        lead = " " if self._column else self._indent
        print(f"{lead}{self._word}", end="")
        self._column += len(lead) + len(self._word)
        self._word = ""


def say(name: str, text: str) -> None:
    """Print one line of progress."""
    print(f"{name:<10}{text}", flush=True)


class Shown(io.TextIOBase):
    """One step of the set-up: a live line on a terminal, plain lines elsewhere."""

    def __init__(self, name: str) -> None:
        """Prepare the step of that name."""
        self._name = name
        self._text = ""
        self._said = ""
        self._begin = time.monotonic()
        self._live = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
        self._due = 0.0
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._ticker = threading.Thread(target=self._tick, daemon=True)

    def __enter__(self) -> Self:
        """Start the live line, and show the output on stderr in it."""
        self._redirect = contextlib.redirect_stderr(self)
        self._redirect.__enter__()
        self._ticker.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End the step."""
        self._redirect.__exit__(kind, error, trace)
        self._over.set()
        self._ticker.join()
        if kind is not None:
            self._erase()

    def write(self, text: str) -> int:
        """Show the reports of the builders."""
        for line in text.splitlines():
            if line.strip():
                self.note(line.removeprefix("lab: "))
        return len(text)

    def note(self, text: str) -> None:
        """Show the current action."""
        with self._lock:
            if text != self._text:
                self._text = text
                if self._live:
                    self._draw()
                else:
                    # Printed only if it lasts longer than a second.
                    self._due = time.monotonic() + 1

    def keep(self, text: str) -> None:
        """Print a line that stays."""
        with self._lock:
            self._erase()
            say(self._name, text)

    def done(self, text: str) -> None:
        """Print the result of the step."""
        self._over.set()
        self._ticker.join()
        self._erase()
        seconds = time.monotonic() - self._begin
        say(self._name, f"{text:<60}{clock(seconds) if seconds >= 1 else ''}".rstrip())

    def _tick(self) -> None:
        while not self._over.wait(0.5):
            with self._lock:
                now = time.monotonic()
                if self._live:
                    self._draw()
                elif self._text and now > self._due:
                    if self._text != self._said:
                        say(self._name, self._text)
                    else:
                        say("", f"... {clock(now - self._begin)}")
                    self._said = self._text
                    self._due = now + 20

    def _draw(self) -> None:
        width = shutil.get_terminal_size().columns
        spent = f"  ·  {clock(time.monotonic() - self._begin)}"
        line = f"{self._name:<10}{self._text}"[: width - 1 - len(spent)]
        sys.stdout.write(f"\r\033[K{line}{spent}")
        sys.stdout.flush()

    def _erase(self) -> None:
        if self._live:
            sys.stdout.write("\r\033[K")
            sys.stdout.flush()


step = Shown


def clock(seconds: float) -> str:
    """Return a time as 1:05."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"


# Processes


def quiet(argv: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run a command and return its output without printing it."""
    return subprocess.run(
        argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )


def shown_variables() -> dict[str, str]:
    """Return the variables that decide the form of the output."""
    return {name: os.environ[name] for name in SHOWN_VARIABLES if name in os.environ}


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Lock the folder, so that only one demo at a time uses it."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DemoError("another make demo is at work in this checkout") from None
        yield


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
