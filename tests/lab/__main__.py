"""Build the lab, enter it or run one command in it: `python3 -m tests.lab --help`."""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import time

from . import trees
from .host import CHECKOUT, LabError, say
from .lab import Lab, app_available


def main() -> int:
    """Run one command of the lab."""
    parser = argparse.ArgumentParser(prog="python3 -m tests.lab", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("build", help="build all that is cached")
    shell = verbs.add_parser("shell", help="boot a lab and give a shell in it")
    execute = verbs.add_parser("exec", help="boot a lab and run one command in it")
    for verb in (shell, execute):
        verb.add_argument("--user", default="root", help="root, lab or nolinger")
        verb.add_argument(
            "--host-network", action="store_true", help="share this machine's network"
        )
    execute.add_argument("command", nargs=argparse.REMAINDER, help="-- COMMAND ...")
    machine = verbs.add_parser("vm", help="boot a virtual machine and give a shell in it")
    machine.add_argument("--user", default="root", help="root or lab")
    options = parser.parse_args()
    try:
        if options.verb == "vm":
            return enter_vm(options.user)
        if options.verb == "build":
            return build()
        command = getattr(options, "command", [])
        command = command[1:] if command[:1] == ["--"] else command
        if options.verb == "exec" and not command:
            parser.error("exec needs a command")
        return enter(options.user, command or ["bash", "-l"], not options.host_network)
    except LabError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def build() -> int:
    """Build all cached parts and boot once, so that the next lab starts in seconds."""
    begin = time.monotonic()
    if not os.environ.get("LAB_ROOT"):
        trees.build_tree()
    trees.fetch_model()
    with Lab(app=app_available()):
        pass
    say(f"ready after {time.monotonic() - begin:.0f} s")
    return 0


def enter_vm(user: str) -> int:
    """Start a virtual machine and open a shell in it."""
    from .vm import VM

    with VM() as vm:
        say(f"ssh to 127.0.0.1, port {vm.port}; /srv holds images and a model; it ends with this")
        return subprocess.run(vm.ssh(user), check=False).returncode


def enter(user: str, command: list[str], private_network: bool) -> int:
    """Start a lab and run one command in it, on the caller's terminal."""
    app = app_available()
    if not app:
        say(f"no pyproject.toml in {CHECKOUT}: stackctl is not installed in the lab")
    with Lab(app=app, private_network=private_network) as lab:
        terminal = {"TERM": os.environ.get("TERM", "dumb")}
        if sys.stdin.isatty():
            # The shell needs a terminal of the lab: the caller's terminal has no device file there.
            command = [
                "script",
                "--quiet",
                "--return",
                "--command",
                shlex.join(command),
                "/dev/null",
            ]
        return subprocess.run(lab.words(command, user=user, env=terminal), check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
