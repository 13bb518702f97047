"""Every command in the README and in docs/ is run by a test, or marked with the reason."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import document_commands
import pytest
import yaml
from document_commands import HERE, ROOT, RUNS
from lab import tutorial
from samples import HOSTS
from test_clients import FAST, URL, aider, files, generation
from test_diagnose import SETUP_C

from stackctl.observe.client_settings import client_report
from stackctl.values.base import to_json

LANGUAGES = {"sh", "console", "text", "yaml", "json", "ini"}
#: Commands whose output in the document comes from another machine.
OTHER_OUTPUT = {"stackctl probe"}


def test_every_command_is_listed_and_no_other() -> None:
    found = set(document_commands.found())
    assert len(found) > 50
    assert not found - set(RUNS), "add them to tests/document_commands.py, then: make reference"
    assert not set(RUNS) - found, "no document has them any more"
    assert all(run.test or run.note for run in RUNS.values())


def test_commands_stand_in_fenced_blocks() -> None:
    """A block without a fence, or of an unknown language, would not be read."""
    for path in document_commands.documents():
        fenced = tutorial.blocks(path)
        assert {block.language for block in fenced} <= LANGUAGES, path
        inside = {n for one in fenced for n in range(one.line, one.line + len(one.lines))}
        lines = path.read_text("utf-8").splitlines()
        for number, line in enumerate(lines, 1):
            if line.startswith("    ") and number not in inside and not lines[number - 2]:
                pytest.fail(f"{path.name}:{number}: an indented block")
        for block in fenced:
            if block.language == "text":
                for line in block.lines:
                    assert not line.startswith(("$ ", "make ", "sudo ")), f"{path.name}: {line}"


@pytest.mark.parametrize("command", RUNS)
def test_the_named_test_runs_the_command(command: str) -> None:
    run = RUNS[command]
    if command.startswith("make "):
        target = command.split()[1]
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
    if not run.test:
        return
    name, _, function = run.test.partition("::")
    source = document_commands.reach(ROOT / name, function)
    assert source, f"{run.test} does not exist"
    if run.test == HERE:
        return
    followed = re.findall(r"\.follow\(\"(.*?)\"\)", source)
    if followed:
        commands = tutorial.commands(ROOT / "docs/fresh-epyc-box.md")
        texts = [document_commands.normalised(text) for one in followed for text in commands[one]]
        assert command in texts
        return
    missing = {
        word for word in document_commands.required_words(command)
        if not re.search(rf"(?<![\w-]){re.escape(word)}(?![\w-])", source)
    }  # fmt: skip
    assert not missing, f"{run.test} lacks {missing}"


def test_every_command_and_option_that_documents_name_exists() -> None:
    wrong = []
    for path in document_commands.documents():
        text = path.read_text("utf-8")
        texts = [command.text for command in tutorial.typed(path)]
        texts += re.findall(
            r"(?<!`)`(stackctl [^`]+)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
        )
        for one in texts:
            for words in document_commands.stackctl_words(one):
                try:
                    document_commands.parse(words)
                except ValueError as error:
                    wrong.append(f"{path.name}: {one}: {error}")
    assert not wrong, "\n".join(wrong)


def test_the_settings_of_aider_are_those_of_the_document() -> None:
    page = tutorial.blocks(ROOT / "docs/your-agent.md")
    (shown,) = (yaml.safe_load("\n".join(one.lines)) for one in page if one.language == "yaml")
    report = aider(FAST, context=32768)
    settings, _, _ = files(report)
    assert shown.items() <= settings.items()
    (exports,) = (list(one.lines) for one in page if one.language == "text")
    report = client_report(generation(), URL, FAST, "openai")
    assert exports == [f"export {text}" for text in report.environment]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Return a folder with the files that documents name."""
    (tmp_path / "epyc-9175f.json").write_text(to_json(HOSTS["epyc-gpu"]), "utf-8")
    (tmp_path / "vllm.log").write_text(SETUP_C, "utf-8")
    return tmp_path


@pytest.mark.parametrize("command", [text for text, run in RUNS.items() if run.test == HERE])
def test_commands_that_need_no_stack_do_what_is_shown(command: str, place: Path) -> None:
    environment = {"HOME": str(place), "PATH": os.environ["PATH"], "COLUMNS": "80"}
    stackctl = f'stackctl() {{ {shlex.quote(sys.executable)} -m stackctl "$@"; }}'
    done = subprocess.run(
        ["sh", "-c", f"{stackctl}; {command}"],
        cwd=place, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True,
        check=False, timeout=60,
    )  # fmt: skip
    expected = 0
    printed = [line for line in (done.stdout + done.stderr).splitlines() if line]
    for shown in outputs(command):
        if command in OTHER_OUTPUT:
            continue
        position = 0
        for part in parts_between_dots(shown):
            if (code := re.fullmatch(r"\(exit (\d)\)", part[0])) is not None:
                expected = int(code[1])
                continue
            places = range(position, len(printed) - len(part) + 1)
            position = next(
                (n + len(part) for n in places if printed[n : n + len(part)] == part), -1
            )
            assert position > 0, "\n".join([*part, "-- is not in --", *printed])
    assert done.returncode == expected, done.stderr


def outputs(command: str) -> list[list[str]]:
    """Return the outputs that documents show below a command."""
    found: list[list[str]] = []
    for path in document_commands.documents():
        for block in tutorial.blocks(path):
            below: list[str] | None = None
            for line in block.lines if block.language == "console" else ():
                if line.startswith("$ "):
                    below = [] if re.sub(r" {2,}#.*", "", line[2:]) == command else None
                    if below is not None:
                        found.append(below)
                elif below is not None:
                    below.append(line)
    return found


def parts_between_dots(lines: list[str]) -> list[list[str]]:
    """Return runs of lines that stand together.

    ``...`` stands for lines that are left out. An exit code is a run of its own.
    """
    parts: list[list[str]] = [[]]
    for line in lines:
        if line.strip() == "...":
            parts.append([])
        elif line.startswith("(exit "):
            parts += [[line], []]
        elif line:
            parts[-1].append(line)
    return [part for part in parts if part]
