"""Run stackctl with shorter timeouts for starts, because a test cannot wait for the usual ones.

    python3 hurried.py DEADLINE STEP ARGUMENT...

DEADLINE is the first timeout of a start, STEP its extension for progress, both in seconds.
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
