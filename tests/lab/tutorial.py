"""Read the commands of a document as its reader types them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

_HEADING, _FENCE, _PROMPT = "## ", "```", "$ "
_COMMENT = re.compile(r"( {2,}|^)# .*$")
#: Fenced blocks with commands: a script, or a session with prompts and output.
_SCRIPT, _SESSION = "sh", "console"


@dataclass(frozen=True)
class Typed:
    """One command, with the heading above it."""

    section: str
    line: int
    text: str


@dataclass(frozen=True)
class Block:
    """One fenced block: its language, the number of its first line, and its lines."""

    section: str
    language: str
    line: int
    lines: tuple[str, ...]


def blocks(path: Path) -> list[Block]:
    """Return the fenced blocks of a document, in order."""
    found: list[Block] = []
    section, language, first = "", "", 0
    inside: list[str] | None = None
    for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
        if inside is not None:
            if line == _FENCE:
                found.append(Block(section, language, first, tuple(inside)))
                inside = None
            else:
                inside.append(line)
        elif line.startswith(_FENCE):
            language, first, inside = line.removeprefix(_FENCE), number + 1, []
        elif line.startswith(_HEADING):
            section = line.removeprefix(_HEADING)
    assert inside is None, f"{path}: a block without an end"
    return found


def typed(path: Path) -> list[Typed]:
    """Return the commands of a document, in order, without comments.

    A command continues after a line that ends in a backslash. If its first line ends in a brace, it
    continues until the line that closes the brace. In a session only lines after a prompt are
    commands.
    """
    found: list[Typed] = []
    for block in blocks(path):
        if block.language not in (_SCRIPT, _SESSION):
            continue
        whole, first = "", 0
        for number, line in enumerate(block.lines, block.line):
            if block.language == _SESSION and not whole and not line.startswith(_PROMPT):
                continue
            text = _COMMENT.sub("", line if whole else line.removeprefix(_PROMPT)).rstrip()
            if not whole:
                if not text:
                    continue
                first = number
            whole = f"{whole}\n{text}" if whole else text
            braced = whole.partition("\n")[0].endswith("{") and text != "}"
            if not braced and not text.endswith("\\"):
                found.append(Typed(block.section, first, whole))
                whole = ""
        assert not whole, f"{path}:{first}: a command without an end"
    return found


def commands(path: Path) -> dict[str, list[str]]:
    """Return the commands of each section, in order."""
    found: dict[str, list[str]] = {}
    for command in typed(path):
        found.setdefault(command.section, []).append(command.text)
    return found
