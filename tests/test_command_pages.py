"""The reference of commands and the man pages."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import click
import command_pages
import pytest

from stackctl.cli.main import VERBS, cli

PAGES = sorted(command_pages.MAN.iterdir())


def leaves(command: click.Command, name: str) -> dict[str, click.Command]:
    """Return every command without subcommands, by its full name."""
    if not isinstance(command, click.Group):
        return {name: command}
    context = click.Context(command)
    found: dict[str, click.Command] = {}
    for word in command.list_commands(context):
        below = command.get_command(context, word)
        assert below is not None
        found |= leaves(below, f"{name} {word}")
    return found


def test_the_reference_has_every_command_with_every_option() -> None:
    text = command_pages.TARGET.read_text("utf-8")
    common = text.partition("## Set up")[0]
    commands = leaves(cli, "stackctl")
    assert len(commands) > 40
    for name, command in commands.items():
        (section,) = re.findall(rf"^#+ {name}$(.*?)(?=^#|\Z)", text, re.M | re.S)
        options = [one for one in command.params if isinstance(one, click.Option)]
        for option in (one for one in options if not one.hidden):
            for word in (*option.opts, *option.secondary_opts):
                listed = re.compile(rf"^- `[^`]*(?<![\w-]){word}\b", re.M)
                assert listed.search(section) or listed.search(common), f"{name} {word}"


def test_each_verb_has_its_man_page_and_no_other_page_is_left() -> None:
    assert set(PAGES) == set(command_pages.man_pages())
    assert {page.name for page in PAGES} == {
        "stackctl.1", *(f"stackctl-{verb}.1" for verb in VERBS)
    }  # fmt: skip


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_man_pages_are_well_formed(page: Path) -> None:
    lines = page.read_text("utf-8").splitlines()
    assert lines[1].startswith(".TH STACKCTL")
    sections = [line.removeprefix(".SH ") for line in lines if line.startswith(".SH ")]
    assert sections[:3] == ["NAME", "SYNOPSIS", "DESCRIPTION"]
    known = {".TH", ".SH", ".SS", ".TP", ".PP", ".nf", ".fi", '.\\"'}
    for number, line in enumerate(lines, 1):
        assert not line.startswith("'"), f"{page.name}:{number}"
        if line.startswith("."):
            assert line.partition(" ")[0] in known, f"{page.name}:{number}"
        # A lone backslash would begin an escape of groff.
        assert not re.search(r"\\(?![-efB&(\"])", line.replace("\\fR", "")), f"{page.name}:{number}"


@pytest.mark.skipif(shutil.which("groff") is None, reason="groff is not installed")
def test_groff_renders_a_man_page_without_a_warning() -> None:
    page = command_pages.MAN / "stackctl-up.1"
    done = subprocess.run(
        ["groff", "-man", "-Tutf8", "-ww", "-P-cbou", page],
        text=True, capture_output=True, check=True, timeout=60,
    )  # fmt: skip
    assert not done.stderr
    text = " ".join(done.stdout.split())
    assert "SYNOPSIS stackctl up [OPTIONS] " in text
    assert "--set KEY=VALUE Set a key of the profile, e.g. context=4096; may be repeated." in text


@pytest.mark.skipif(shutil.which("groff") is None, reason="groff is not installed")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_man_pages_fit_80_columns(page: Path) -> None:
    done = subprocess.run(
        ["groff", "-man", "-Tutf8", "-P-cbou", page],
        text=True, capture_output=True, check=True, timeout=60,
    )  # fmt: skip
    assert not [line for line in done.stdout.splitlines() if len(line) > 80]
