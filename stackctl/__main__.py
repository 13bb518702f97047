"""Entry point of the ``stackctl`` command and of ``python -m stackctl``."""

from __future__ import annotations

import os
import signal
import sys


def main() -> None:
    """Run the command line and exit with its documented code."""
    sys.unraisablehook = _repeat_interrupt
    try:
        from stackctl.cli.main import run

        code = run(sys.argv[1:])
    except KeyboardInterrupt:
        # Ctrl-C during the imports, or after the command has ended.
        sys.stderr.write("error: interrupted\n")
        code = 130
    sys.exit(code)


def _repeat_interrupt(lost: sys.UnraisableHookArgs) -> None:
    """Send an interrupt again that a finalizer has swallowed.

    Python prints an exception in a finalizer and goes on, also if it is the KeyboardInterrupt of a
    signal that arrived just then. HTTP clients close their connections in finalizers, so this was
    frequent. SIGTERM is handled like Ctrl-C, but no shell starts a job with SIGTERM ignored.
    """
    if lost.exc_type is None or not issubclass(lost.exc_type, KeyboardInterrupt):
        sys.__unraisablehook__(lost)
        return
    import threading

    # Later, because an exception in this hook is swallowed as well.
    again = threading.Timer(0.01, os.kill, (os.getpid(), signal.SIGTERM))
    again.daemon = True
    again.start()


if __name__ == "__main__":
    main()
