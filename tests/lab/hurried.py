"""Runs stackctl with a shorter patience for starts, as no test can wait for the usual one.

    python3 hurried.py DEADLINE STEP ARGUMENT...

DEADLINE is what a start gets at first, STEP what progress gives it, both in seconds.
"""

from __future__ import annotations

import sys

from stackctl.cli.main import run
from stackctl.deploy import startup
from stackctl.engines.llamacpp.engine import LlamaCpp

if __name__ == "__main__":
    deadline, step, *words = sys.argv[1:]
    LlamaCpp.start_s = int(deadline)
    startup._STEP_S = int(step)
    sys.exit(run(words))
