"""The reference of commands and the man pages, from the click commands themselves."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click

from stackctl import __version__
from stackctl.cli.main import HEADINGS, cli
from stackctl.cli.session import GLOBAL_NAMES

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "docs" / "commands.md"
MAN = ROOT / "man"
#: click's mark of a paragraph that keeps its lines.
_VERBATIM = "\b\n"

HEAD = """\
# Commands

This file is generated from the commands by `make reference`. Do not edit it. The package installs
the same as man pages: `man stackctl`, `man stackctl-up`.

Results go to stdout, everything else to stderr. Commands that replace a running engine (`up`,
`switch`, `rollback`) or remove data for good (`prune`, `key remove`) ask first. `--yes` answers;
without a terminal and without `--yes` they exit 2. `down` does not ask, because `up` brings the
stack back.
"""


@dataclass(frozen=True)
class Option:
    """One option: its names with the name of its value, and its help."""

    names: str
    help: str


@dataclass(frozen=True)
class Page:
    """One command: its name, usage, paragraphs of help, own options, and commands below it.

    A paragraph that begins with a newline keeps its lines.
    """

    name: str
    usage: str
    paragraphs: tuple[str, ...]
    options: tuple[Option, ...]
    commands: tuple[Page, ...]


def page(command: click.Command, name: str) -> Page:
    """Return the page of a command, with the pages of the commands below it."""
    # A command keeps the help option that its first context gives it.
    context = click.Context(command, info_name=name, **cli.context_settings)
    options = tuple(
        Option(*record)
        for parameter in command.params
        if isinstance(parameter, click.Option)
        and (parameter.name not in GLOBAL_NAMES or command is cli)
        and (record := parameter.get_help_record(context)) is not None
    )
    below: tuple[Page, ...] = ()
    if isinstance(command, click.Group):
        names = command.list_commands(context)
        found = [(one, command.get_command(context, one)) for one in names]
        below = tuple(page(one, f"{name} {word}") for word, one in found if one is not None)
    return Page(
        name=name,
        usage=" ".join([name, *command.collect_usage_pieces(context)]),
        paragraphs=tuple(_paragraphs(command.help or "")),
        options=options,
        commands=below,
    )


def _paragraphs(text: str) -> Iterator[str]:
    for part in inspect.cleandoc(text).split("\n\n"):
        if part.startswith(_VERBATIM):
            yield "\n" + part.removeprefix(_VERBATIM)
        else:
            yield " ".join(part.split())


# Markdown


def reference() -> str:
    """Return the text of docs/commands.md."""
    root = page(cli, "stackctl")
    pages = {one.name.removeprefix("stackctl "): one for one in root.commands}
    parts = [HEAD, textwrap.fill(cli.epilog or "", 105) + "\n"]
    parts += ["## Options of every command\n", *_options(root)]
    for heading, verbs in HEADINGS.items():
        parts.append(f"## {heading}\n")
        for verb in verbs:
            parts += _markdown(pages[verb], "###")
    return "\n".join(parts)


def _markdown(one: Page, level: str) -> Iterator[str]:
    yield f"{level} {one.name}\n"
    yield f"```text\n{one.usage}\n```\n"
    for text in one.paragraphs:
        if text.startswith("\n"):
            yield f"```text\n{inspect.cleandoc(text)}\n```\n"
        else:
            yield f"{_escaped(text)}\n"
    yield from _options(one)
    for below in one.commands:
        yield from _markdown(below, f"{level}#")


def _options(one: Page) -> Iterator[str]:
    if one.options:
        lines = (f"- `{option.names}`: {_escaped(option.help)}" for option in one.options)
        yield "\n".join(lines) + "\n"


def _escaped(text: str) -> str:
    """Return a text in which no character has a meaning of Markdown."""
    text = re.sub(r"([\\`*_\[\]])", r"\\\1", text)
    return text.replace("<", "&lt;").replace(">", "&gt;")


# Man pages (man(7) of groff)


def man_pages() -> dict[Path, str]:
    """Return the text of each man page: one of stackctl, and one of each of its commands."""
    root = page(cli, "stackctl")
    summaries = {verb: text for verbs in HEADINGS.values() for verb, text in verbs.items()}
    found = {MAN / "stackctl.1": _root_man(root)}
    for one in root.commands:
        verb = one.name.removeprefix("stackctl ")
        found[MAN / f"stackctl-{verb}.1"] = _command_man(one, summaries[verb])
    return found


def _root_man(root: Page) -> str:
    lines = [*_head(root, root.paragraphs[0].partition(":")[0]), *_description(root)]
    lines.append(".SH COMMANDS")
    for heading, verbs in HEADINGS.items():
        lines.append(f".SS {_roff(heading)}")
        for verb, text in verbs.items():
            lines += [".TP", f"\\fBstackctl\\-{verb}\\fR(1)", _roff(text)]
    lines += [".SH OPTIONS", *_man_options(root)]
    status, _, codes = (cli.epilog or "").partition(": ")
    lines += [".SH EXIT STATUS", f"{_roff(status)}: {_roff(codes)}"]
    return "\n".join(lines) + "\n"


def _command_man(one: Page, summary: str) -> str:
    lines = [*_head(one, summary), *_description(one)]
    if one.options:
        lines += [".SH OPTIONS", *_man_options(one)]
    if one.commands:
        lines.append(".SH COMMANDS")
    for below in one.commands:
        lines += [f".SS {_roff(below.usage)}", *_texts(below), *_man_options(below)]
    lines += [".SH SEE ALSO", "\\fBstackctl\\fR(1) has the options of every command."]
    return "\n".join(lines) + "\n"


def _head(one: Page, summary: str) -> list[str]:
    name = one.name.replace(" ", "-")
    return [
        '.\\" Generated by make reference. Do not edit.',
        f'.TH {_roff(name.upper())} 1 "" "stackctl {__version__}" "stackctl"',
        ".SH NAME",
        f"{_roff(name)} \\- {_roff(summary[:1].lower() + summary[1:].rstrip('.'))}",
        ".SH SYNOPSIS",
        _roff(one.usage),
    ]


def _description(one: Page) -> list[str]:
    return [".SH DESCRIPTION", *_texts(one)]


def _texts(one: Page) -> list[str]:
    lines = []
    for text in one.paragraphs:
        lines.append(".PP")
        if text.startswith("\n"):
            lines += [".nf", *map(_roff, inspect.cleandoc(text).splitlines()), ".fi"]
        else:
            lines.append(_roff(text))
    return lines


def _man_options(one: Page) -> list[str]:
    lines = []
    for option in one.options:
        lines += [".TP", f"\\fB{_roff(option.names)}\\fR", _roff(option.help)]
    return lines


def _roff(text: str) -> str:
    """Return a text in which no character has a meaning of roff."""
    text = text.replace("\\", "\\e").replace("-", "\\-").replace("'", "\\(aq")
    return re.sub(r"^\.", r"\\&.", text)
