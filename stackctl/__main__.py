"""Entry point of the ``stackctl`` command and of ``python -m stackctl``."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line and exit with its documented code."""
    try:
        from stackctl.cli.main import run

        code = run(sys.argv[1:])
    except KeyboardInterrupt:
        # Before the command line could take it, or when it was all but done.
        sys.stderr.write("error: interrupted\n")
        code = 130
    sys.exit(code)


if __name__ == "__main__":
    main()
