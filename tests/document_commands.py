"""The commands in the README and in docs/, and the test that runs each.

``make reference`` writes the table, docs/tested-commands.md.
"""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click
from lab import tutorial

from stackctl.cli.main import cli

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "docs" / "tested-commands.md"
#: The test that runs commands in test_document_commands.py
HERE = "tests/test_document_commands.py::test_commands_that_need_no_stack_do_what_is_shown"
LAB = "tests/lab/test_"
BOX = f"{LAB}vm.py::test_"
FETCH = f"{LAB}fetch.py::test_"
BENCH = f"{LAB}bench.py::test_a_run_is_measured_stored_shown_and_compared"
CARD = "with a simulated GPU"


@dataclass(frozen=True)
class Run:
    """The test that runs a command, or the reason why none does (``test`` is empty)."""

    test: str
    note: str = ""


#: The runs by the text of their command
RUNS = {
    # README
    "git clone <this repository> stackctl && cd stackctl": Run(
        "", "the tests are in the clone already"
    ),
    "make demo": Run(f"{LAB}demo.py::test_the_demo_keeps_what_it_promises"),
    "pip install .": Run(
        "tests/test_project.py::test_an_installed_wheel_renders_without_a_checkout"
    ),
    "stackctl up cpu-small": Run(
        f"{LAB}profiles.py::test_a_profile_on_the_cpu_fetches_its_model_and_serves",
        "with `--force` and a small model in a hub of the lab",
    ),
    "stackctl profiles": Run(
        "tests/unit/test_cli.py::test_what_is_shown_of_profiles", "the output is another machine's"
    ),
    "stackctl probe": Run(HERE, "the output is another machine's"),
    "stackctl plan cpu-latency --model file:/srv/models/gemma-3-270m-q4_k_m.gguf --explain": Run(
        "tests/unit/test_cli.py::test_an_explained_plan"
    ),
    "stackctl up cpu-latency --model file:/srv/models/gemma-3-270m-q4_k_m.gguf": Run(
        f"{LAB}up.py::test_the_acceptance_line"
    ),
    "stackctl up cpu-latency --model file:... --set engine_args.load-mode=x --yes": Run(
        f"{LAB}switch.py::test_failed_switches_restore_what_was"
    ),
    "stackctl switch throughput": Run(
        f"{LAB}switch.py::test_switch_and_back_by_objective_and_by_profile"
    ),
    "stackctl down": Run(f"{LAB}up.py::test_the_acceptance_line"),
    "make test": Run("", "it runs these tests"),
    "make test-deep": Run("", "CI runs it after `make test`"),
    "make lab": Run("", "it opens a shell; `tests/lab/test_lab.py` boots the same machine"),
    "make lab-vm": Run("", "it opens a shell; `make test-vm` boots the same machine"),
    "make bench": Run("", "it measures for minutes, on an idle machine"),
    # A fresh box: tests read the commands from the document.
    "stackctl --host root@box provision --profile cpu-latency": Run(
        f"{BOX}two_commands_make_it_serve_for_root"
    ),
    "stackctl --host root@box up cpu-latency --model file:/srv/models/your-model.gguf": Run(
        f"{BOX}two_commands_make_it_serve_for_root"
    ),
    "stackctl --host root@box provision --dry-run --profile cpu-latency --service-user models": (
        Run(f"{BOX}looking_changes_nothing")
    ),
    "stackctl --host root@box provision --profile cpu-latency --service-user models": Run(
        f"{BOX}it_is_made_ready_once_and_then_nothing_changes"
    ),
    "models() { sudo -u models -H XDG_RUNTIME_DIR=/run/user/$(id -u models)"
    " sh -c 'cd && exec \"$@\"'"
    ' - "$@" }': Run(f"{BOX}it_serves_as_the_tutorial_says"),
    "models stackctl doctor cpu-latency --model file:/srv/models/your-model.gguf": Run(
        f"{BOX}it_serves_as_the_tutorial_says"
    ),
    "models stackctl up cpu-latency --model file:/srv/models/your-model.gguf": Run(
        f"{BOX}it_serves_as_the_tutorial_says"
    ),
    "models stackctl check": Run(f"{BOX}it_serves_as_the_tutorial_says"),
    "models stackctl verify": Run(f"{BOX}it_serves_as_the_tutorial_says"),
    "models stackctl down cpu": Run(f"{LAB}vm_undo.py::test_all_is_as_it_was"),
    "sudo rm /srv/models/your-model.gguf": Run(f"{LAB}vm_undo.py::test_all_is_as_it_was"),
    "stackctl provision --undo --dry-run": Run(f"{LAB}vm_undo.py::test_all_is_as_it_was"),
    "stackctl provision --undo": Run(f"{LAB}vm_undo.py::test_all_is_as_it_was"),
    "sudo userdel --remove models": Run(f"{LAB}vm_undo.py::test_all_is_as_it_was"),
    # Your agent
    "stackctl check": Run(f"{LAB}up.py::test_the_acceptance_line"),
    'curl -s http://127.0.0.1:8080/v1/chat/completions -d \'{"messages": [{"role": "user",'
    ' "content": "Hello"}], "max_tokens": 32}\'': Run(f"{LAB}up.py::test_the_acceptance_line"),
    'eval "$(stackctl client openai)"': Run(
        f"{LAB}api_keys.py::test_a_key_is_asked_for_and_known_to_nobody_else"
    ),
    "stackctl client aider": Run(BENCH),
    "stackctl client aider --write": Run(
        f"{LAB}api_keys.py::test_a_key_is_asked_for_and_known_to_nobody_else"
    ),
    "stackctl bench --prompt 4k --output 200 --concurrency 1": Run(BENCH),
    "stackctl check --slo": Run(f"{LAB}bench.py::test_the_slo_decides"),
    "stackctl diagnose": Run(f"{LAB}diagnose.py::test_nothing_is_wrong_with_what_idles"),
    "stackctl key show": Run(f"{LAB}api_keys.py::test_a_new_key_counts_at_once"),
    "stackctl key rotate --keep": Run(f"{LAB}api_keys.py::test_a_new_key_counts_at_once"),
    # Switching
    "stackctl rollback": Run(f"{LAB}switch.py::test_rollback_reinstalls_what_was_stored"),
    "stackctl history": Run(f"{LAB}switch.py::test_rollback_reinstalls_what_was_stored"),
    "stackctl diff 1 2": Run(f"{LAB}history.py::test_what_became_of_three_generations"),
    # How to
    "stackctl model show hf:ORG/REPO": Run(
        f"{FETCH}up_fetches_the_model_and_it_serves_without_a_network", "from a hub in the lab"
    ),
    "stackctl up cpu --model hf:ORG/REPO:Q4_K_M": Run(
        f"{FETCH}up_fetches_the_model_and_it_serves_without_a_network", "from a hub in the lab"
    ),
    "stackctl model fetch hf:ORG/REPO:Q4_K_M": Run(
        f"{FETCH}up_fetches_the_model_and_it_serves_without_a_network", "from a hub in the lab"
    ),
    "stackctl model export hf:ORG/REPO:Q4_K_M /media/disk"
    " --image localhost/stackctl/llama-cpp:latest": Run(
        f"{FETCH}models_and_images_are_carried_to_a_machine_without_network"
    ),
    "stackctl model import /media/disk": Run(
        f"{FETCH}models_and_images_are_carried_to_a_machine_without_network"
    ),
    "stackctl doctor gpu-nvfp4": Run(
        f"{LAB}gpu.py::test_doctor_proves_the_device_with_podman", CARD
    ),
    "stackctl up gpu-nvfp4 --model dir:/srv/models/NAME": Run(
        f"{LAB}gpu.py::test_the_engine_has_the_card", f"{CARD} and a stand-in for vLLM"
    ),
    "stackctl up gpu-nvfp4 --auto-fit": Run(
        f"{LAB}vllm_failures.py::test_a_cache_too_small_for_one_request_and_auto_fit",
        "vLLM on the CPU",
    ),
    "stackctl verify": Run(f"{LAB}verify.py::test_for_people"),
    "stackctl diagnose --log vllm.log": Run(HERE, "the output is compared"),
    "stackctl bench --quick": Run(BENCH),
    "stackctl bench --prompt 1k,4k --output 200 --concurrency 1,2,4": Run(BENCH),
    "stackctl bench compare 3 7": Run(BENCH),
    "stackctl --host root@box provision": Run(
        f"{LAB}remote_bootstrap.py::test_from_nothing_to_provisioned_and_back"
    ),
    "stackctl --host root@box up cpu-latency --model file:/srv/models/coder.gguf": Run(
        f"{LAB}remote.py::test_the_same_commands_on_the_box"
    ),
    "stackctl --host root@box bench --from-here --prompt 4k --output 200 --concurrency 1": Run(
        f"{LAB}remote.py::test_a_stack_is_measured_from_here"
    ),
    "stackctl --host lab@box status --json": Run(
        f"{LAB}remote.py::test_the_same_commands_on_the_box"
    ),
    'eval "$(stackctl --host lab@box client openai)"': Run(
        f"{LAB}remote.py::test_no_secret_is_in_an_argument"
    ),
    "stackctl probe --json > epyc-9175f.json": Run(HERE),
    "stackctl plan cpu-small --facts epyc-9175f.json": Run(HERE, "the output is compared"),
    "stackctl plan cpu-small --facts epyc-9175f.json --diff throughput": Run(
        HERE, "the output is compared"
    ),
    "stackctl render cpu-small --facts epyc-9175f.json --output units": Run(HERE),
    # Explanations
    "stackctl plan cpu-latency --model catalogue:iquest-coder-40b-q5_k_m --facts epyc-9175f.json": (
        Run(HERE, "the output is compared")
    ),
}

HEAD = """\
# Commands in documents, and their tests

This file is generated by `make reference` from `tests/document_commands.py`. Do not edit it.
`tests/test_document_commands.py` fails for a command in a document that is not listed here. A test
runs the same command with the same options; models, sizes, numbers and names of machines may be
its own.

| command | documents | run by |
|---|---|---|
"""


def documents() -> list[Path]:
    """Return the README and all pages, without the generated table."""
    pages = [path for path in sorted((ROOT / "docs").rglob("*.md")) if path != TARGET]
    return [ROOT / "README.md", *pages]


def normalised(command: str) -> str:
    """Return a command on one line."""
    return " ".join(command.replace("\\\n", " ").split())


def found() -> dict[str, list[str]]:
    """Return every command of the documents, with the names of the documents that show it."""
    places: dict[str, list[str]] = {}
    for path in documents():
        for command in tutorial.typed(path):
            names = places.setdefault(normalised(command.text), [])
            if path.name not in names:
                names.append(path.name)
    return places


def table() -> str:
    """Return the text of docs/tested-commands.md.

    Raises:
        LookupError: a command has no row, or a row no command.
    """
    lines = []
    places = found()
    for command in set(RUNS) - set(places):
        raise LookupError(f"no document has {command!r}: remove it in tests/document_commands.py")
    for command, names in places.items():
        if command not in RUNS:
            raise LookupError(f"{command!r} has no row in tests/document_commands.py ({names[0]})")
        run = RUNS[command]
        by = f"`{run.test}`" if run.test else f"not run: {run.note}"
        if run.test and run.note:
            by += f" ({run.note})"
        links = ", ".join(
            name.removesuffix(".md") if name == "README.md" else f"[{name[:-3]}]({name})"
            for name in names
        )
        lines.append(f"| `{command}` | {links} | {by} |\n")
    return HEAD + "".join(lines)


# Evidence that a test runs a command


def reach(path: Path, name: str) -> str:
    """Return the source of a test with all of its module that it uses, directly or not."""
    source = path.read_text("utf-8")
    parts: dict[str, str] = {}
    for node in ast.parse(source).body:
        text = ast.get_source_segment(source, node) or ""
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            parts[node.name] = text
        elif isinstance(node, ast.Assign):
            parts |= {one.id: text for one in node.targets if isinstance(one, ast.Name)}
    if name not in parts:
        return ""
    used, new = set[str](), {name}
    while new:
        used |= new
        words = set(re.findall(r"\w+", " ".join(parts[one] for one in new)))
        new = (words & set(parts)) - used
    return "\n".join(parts[one] for one in sorted(used))


def required_words(command: str) -> set[str]:
    """Return the words that a test must have if it runs a command: the verb, and long options."""
    if "stackctl" not in command.split("(")[-1].split() and "stackctl" not in command.split():
        return {"/v1/chat/completions"} if command.startswith("curl") else set()
    (words,) = list(stackctl_words(command))[:1]
    verbs, options = parse(words)
    return {*verbs, *(option for option in options if option.startswith("--"))} - {
        "--host",
        "--yes",
    }


# The commands of stackctl

#: Commands of "bench" and "profiles" that run if none is named.
_DEFAULTS = {"run", "list"}


def stackctl_words(text: str) -> Iterator[list[str]]:
    """Yield the words after each ``stackctl`` of a text."""
    for rest in re.findall(r"(?<![\w./@-])stackctl ([^)`;|&>]*)", text):
        try:
            yield shlex.split(rest)
        except ValueError:
            yield rest.split()


def parse(words: list[str]) -> tuple[list[str], list[str]]:
    """Return the names of the command and its options.

    Raises:
        ValueError: there is no such command or option.
    """
    command: click.Command = cli
    verbs: list[str] = []
    options: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        name, equals, _ = word.partition("=")
        if name.startswith("-") and name != "-":
            option = _option(command, name)
            options.append(name)
            if not (option.is_flag or option.count or equals) and rest:
                rest.pop(0)
        elif isinstance(command, click.Group) and re.fullmatch("[a-z-]+", word):
            below = command.get_command(click.Context(command), word)
            if below is None:
                raise ValueError(f"no command {word}")
            command, verbs = below, [*verbs, word]
    return verbs, options


def _option(command: click.Command, name: str) -> click.Option:
    params = [*command.params, *cli.params]
    below = command.commands if isinstance(command, click.Group) else {}
    for word in _DEFAULTS & set(below):
        params += below[word].params
    for one in params:
        if isinstance(one, click.Option) and name in (*one.opts, *one.secondary_opts):
            return one
    if name in ("-h", "--help"):
        return click.Option([name], is_flag=True)
    raise ValueError(f"no option {name}")
