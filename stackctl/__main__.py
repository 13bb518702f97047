"""Entry point of the ``stackctl`` command and of ``python -m stackctl``."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line and exit with its documented code."""
    try:
        from stackctl.cli.main import run

        code = run(sys.argv[1:])
    except KeyboardInterrupt:
        # Ctrl-C during the imports, or after the command has ended.
        sys.stderr.write("error: interrupted\n")
        code = 130
    sys.exit(code)


if __name__ == "__main__":
    main()
