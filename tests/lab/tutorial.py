"""The commands of a tutorial, as its reader types them."""

from __future__ import annotations

import re
from pathlib import Path

_HEADING, _BLOCK, _COMMENT = "## ", "    ", re.compile(r" {2,}# .*$")


def commands(path: Path) -> dict[str, list[str]]:
    """The commands of each section, in order: what its indented blocks say, without comments.

    A line that ends in a backslash goes on in the next one, one that ends in a brace until the line
    that closes it.
    """
    found: dict[str, list[str]] = {}
    section, whole = "", ""
    for line in path.read_text("utf-8").splitlines():
        if line.startswith(_HEADING):
            section = line.removeprefix(_HEADING)
        if not line.startswith(_BLOCK):
            continue
        text = _COMMENT.sub("", line.removeprefix(_BLOCK)).rstrip()
        whole = f"{whole}\n{text}" if whole else text
        braced = whole.partition("\n")[0].endswith("{") and text != "}"
        if not braced and not text.endswith("\\"):
            found.setdefault(section, []).append(whole)
            whole = ""
    return found
