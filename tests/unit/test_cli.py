"""The command line: exit codes, what goes where, and what it does not do."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from ggufs import write as write_model
from samples import GEMMA, HOSTS, IQUEST
from servers import wait_until

from stackctl import __version__
from stackctl.cli.image import IMAGES
from stackctl.cli.main import HEADINGS, VERBS, run
from stackctl.cli.main import cli as group
from stackctl.deploy.image_build import recipes
from stackctl.values.base import from_json, to_json
from stackctl.values.plan import Plan
from stackctl.values.profile import Profile
from stackctl.values.result import ErrorReport

ROOT = Path(__file__).resolve().parents[2]
ESCAPE = "\x1b"
GROUPS = {
    "profiles": ("list", "show", "schema"),
    "image": ("build", "load"),
    "client": ("aider", "openai"),
    "key": ("create", "show", "rotate", "path", "remove"),
    "model": (
        *("show", "catalogue", "fetch", "list", "verify", "remove", "import", "lock", "export"),
    ),
}
COMMANDS = [
    *((verb,) for verb in VERBS),
    *((verb, name) for verb, names in GROUPS.items() for name in names),
]


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A user with nothing of their own; what a command changes in this process is put back."""
    for name in ("CONFIG", "STATE", "CACHE"):
        monkeypatch.setenv(f"XDG_{name}_HOME", str(tmp_path / name.lower()))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    for name in ("NO_COLOR", "COLUMNS", "LINES", "_STACKCTL_COMPLETE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.chdir(tmp_path)
    for name, host in HOSTS.items():
        (tmp_path / f"{name}.json").write_text(to_json(host), encoding="utf-8")
    (tmp_path / "gemma.json").write_text(to_json(GEMMA), encoding="utf-8")
    (tmp_path / "iquest.json").write_text(to_json(IQUEST), encoding="utf-8")
    (tmp_path / "none-cpp.yaml").write_text("engine: llama.cpp\n")
    (tmp_path / "none-vllm.yaml").write_text("engine: vllm\nplacement: {gpus: none}\n")
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    yield tmp_path
    for number, handler in handlers.items():
        signal.signal(number, handler)


class Cli:
    """Runs commands in this process and remembers what they printed."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys
        self.out = self.err = ""

    def __call__(self, *arguments: str) -> int:
        self._capsys.readouterr()
        code = run(arguments)
        self.out, self.err = self._capsys.readouterr()
        assert "Traceback" not in self.err
        return code

    def error(self) -> ErrorReport:
        return from_json(self.out, ErrorReport, where="stdout")


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Cli:
    return Cli(capsys)


def process(*arguments: str, **more: Any) -> subprocess.CompletedProcess[str]:
    """A command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "stackctl", *arguments],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=30, check=False, **more,
    )  # fmt: skip


FITS = ("plan", "cpu", "--facts", "epyc-nps1.json", "--model", "facts:iquest.json",
        "--set", "slo.ttft_s=600")  # fmt: skip
TOO_BIG = ("plan", "cpu", "--facts", "lab.json", "--model", "facts:iquest.json")

# Exit codes


@pytest.mark.parametrize(
    ("code", "arguments", "words", "hint"),
    [
        (2, ["plna"], "there is no command 'plna'", "did you mean plan?"),
        (2, ["zzz"], "there is no command 'zzz'", "stackctl --help lists them"),
        (2, ["--jsno"], "No such option", "stackctl --help"),
        (2, ["plan"], "missing PROFILE", "stackctl profiles"),
        (2, ["profiles", "show"], "missing NAME", "stackctl profiles"),
        (2, ["switch"], "missing OBJECTIVE|PROFILE",
         "latency, throughput, or a profile: stackctl profiles"),
        (2, ["plan", "cpu", "--facts", "none.json"], "does not exist", "stackctl plan --help"),
        (2, ["plan", "cpu", "--facts", "."], "is a directory", "stackctl plan --help"),
        (2, ["plan", "cpu", "--facts", "/proc/self/mem", "--model", "facts:gemma.json"],
         "cannot read /proc/self/mem", None),
        (2, ["plan", "cpu", "--facts", "gemma.json", "--model", "facts:gemma.json"],
         "gemma.json has schema 'stackctl.model/1'", None),
        (2, ["plan", "cpu", "--objective", "speed"], "'speed'", "stackctl plan --help"),
        (2, ["plan", "./none-cpp.yaml", "--facts", "lab.json"], "names no model", "--model file:"),
        (2, ["plan", "./none-vllm.yaml", "--facts", "lab.json"], "names no model", "--model dir:"),
        (2, [*FITS, "--set", "contxt=5"], "--set contxt: no such key", "did you mean context?"),
        (2, [*FITS, "--set", "engine_args.port=1"], "set by stackctl itself", "use the key port"),
        (2, [*FITS, "--set", "placement.cpus=0-99"], "may not use CPU 16-99", "CPUs: 0-15"),
        (2, [*FITS, "--name", "No Name"], "is not a stack name", "lower-case"),
        (2, ["plan", "cpu", "--facts", "lab.json", "--model", "odd"], "is not understood", "file:"),
        (2, ["image", "bulid"], "bulid", "stackctl image --help"),
        (2, ["up", "cpu", "--timeout", "soon"], "'soon' is not a duration", "90s or 2m"),
        (2, ["completion", "tcsh"], "'tcsh'", "stackctl completion --help"),
        (3, ["--user", "check"], "no stack is up", "stackctl up PROFILE"),
        (3, ["--user", "logs"], "no stack is up", "stackctl up PROFILE"),
        (3, ["--user", "down"], "no stack is up", "stackctl up PROFILE"),
        (3, ["--user", "restart"], "no stack is up", "stackctl up PROFILE"),
        (4, ["plan", "cpu-latncy"], "no profile named cpu-latncy", "did you mean cpu-latency?"),
        (4, ["profiles", "show", "zzz"], "no profile named zzz", "profiles: cpu"),
        (4, ["--user", "switch", "zzz"], "no profile named zzz", "objectives: latency, throughput"),
        (4, ["plan", "./none.yaml"], "no such file: ./none.yaml", None),
        (4, ["--user", "status", "zzz"], "no stack named zzz", "none is up"),
        (4, ["--user", "down", "zzz"], "no stack named zzz", "none is up"),
        (5, [*TOO_BIG], "cpu does not fit", "--model SOURCE"),
        (6, ["plan", "cpu", "--facts", "desktop.json", "--model", "facts:gemma.json",
             "--set", "placement.cpus=0-3"], "cpuset", "elegate"),
        (1, ["plan", "cpu", "--facts", "lab.json", "--model", "file:none.gguf"],
         "model file not found", None),
    ],
)  # fmt: skip
def test_exit_codes_and_errors(
    cli: Cli, code: int, arguments: list[str], words: str, hint: str | None
) -> None:
    assert cli(*arguments) == code
    assert cli.err.startswith("error: ") or "\nerror: " in cli.err
    assert words in cli.err
    if hint is not None:
        assert hint in cli.err.partition("hint: ")[2]
    if code != 5:
        assert cli.out == ""
    # The same as a document, whatever comes first.
    for spelled in (["--json", *arguments], [*arguments, "--json"]):
        assert cli(*spelled) == code
        if code == 5:
            assert from_json(cli.out, Plan, where="stdout").verdict.fits is False
        else:
            assert cli.error().exit_code == code
            assert words in cli.error().message
        assert "error: " not in cli.err


def test_the_document_of_an_error(cli: Cli) -> None:
    cli("plan", "cpu-latncy", "--json")
    assert list(json.loads(cli.out)) == ["schema", "message", "hint", "details", "exit_code"]
    assert cli.err == ""


def test_success(cli: Cli) -> None:
    assert cli(*FITS) == 0
    assert cli.out.startswith("cpu · latency · llama.cpp · IQuest-Coder")
    assert re.search(r"^fits +weights 26.4 \+ engine", cli.out, re.MULTILINE)
    assert "stackctl plan cpu --explain" in cli.err
    assert cli("--user", "status") == 0
    assert (cli.out, cli.err) == ("", "no user stack is up: stackctl up PROFILE starts one\n")
    assert cli("-q", "--user", "status") == 0
    assert (cli.out, cli.err) == ("", "")


def test_without_a_command_the_help_is_shown(cli: Cli) -> None:
    assert cli() == 2
    assert cli.err.startswith("Usage: stackctl")
    assert "error:" not in cli.err
    assert cli("image") == 2
    assert cli.err.startswith("Usage: stackctl image")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "missing [llama-cpp|vllm-cpu|haproxy] ARCHIVE"),
        (("haproxi", "x.tar"), "'haproxi' is not one of 'llama-cpp', 'vllm-cpu', 'haproxy'"),
        (("absent.tar",), "File 'absent.tar' does not exist"),
        (("haproxy", "absent.tar"), "File 'absent.tar' does not exist"),
        (("haproxy", "x.tar", "y.tar"), "unexpected extra argument (y.tar)"),
    ],
)
def test_which_image_an_archive_is(cli: Cli, words: tuple[str, ...], message: str) -> None:
    assert cli("image", "load", *words) == 2
    assert message in cli.err


def test_what_can_be_built_has_a_recipe() -> None:
    found = recipes()
    assert tuple(found) == IMAGES
    assert len({recipe.image for recipe in found.values()}) == len(found)


def test_version(cli: Cli) -> None:
    assert cli("--version") == 0
    assert cli.out == f"stackctl {__version__}\n"


# Help and completion


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_every_command_has_help(cli: Cli, command: tuple[str, ...], flag: str) -> None:
    assert cli(*command, flag) == 0
    assert cli.out.startswith(f"Usage: stackctl {' '.join(command)} ")
    assert cli.err == ""
    assert max(map(len, cli.out.splitlines())) <= 80
    if command[0] not in GROUPS or len(command) == 2:
        for option in ("--json", "--quiet", "--color", "--user", "--system", "--host"):
            assert option in cli.out


def test_the_help_lists_every_verb_and_exit_code(cli: Cli) -> None:
    assert cli("--help") == 0
    for heading, verbs in HEADINGS.items():
        (section,) = re.findall(rf"^{heading}:\n((?:  .*\n)+)", cli.out, re.MULTILINE)
        # One line for each verb, with the texts in one column.
        assert section.splitlines() == [f"  {verb:<12}{text}" for verb, text in verbs.items()]
        assert all(text.endswith(".") for text in verbs.values())
    told = " ".join(cli.out.split())
    for code in ("0 done", "1 failed", "2 usage", "3 not running", "4 no such profile",
                 "5 refused", "6 the host lacks", "7 another", "130 interrupted"):  # fmt: skip
        assert code in told


def test_every_option_is_explained() -> None:
    import click

    def commands(command: click.Command) -> Iterator[click.Command]:
        yield command
        if isinstance(command, click.Group):
            for name in command.list_commands(click.Context(command)):
                found = command.get_command(click.Context(command), name)
                assert found is not None
                yield from commands(found)

    for command in commands(group):
        assert command.help, command.name
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                assert parameter.help, f"{command.name}: {parameter.name}"
                assert parameter.help.endswith("."), f"{command.name}: {parameter.name}"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts(cli: Cli, shell: str) -> None:
    assert cli("completion", shell) == 0
    assert "_STACKCTL_COMPLETE" in cli.out
    assert "stackctl" in cli.out


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("stackctl pl", {"plan"}),
        ("stackctl plan cpu", {"cpu", "cpu-latency", "cpu-throughput"}),
        ("stackctl plan --obj", {"--objective"}),
        ("stackctl plan --objective ", {"latency", "throughput"}),
        ("stackctl completion f", {"fish"}),
        ("stackctl down ", set()),
    ],
)
def test_completion(words: str, expected: set[str], place: Path) -> None:
    environment = {
        **os.environ, "_STACKCTL_COMPLETE": "bash_complete", "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split(" ")) - 1),
    }  # fmt: skip
    command = "import sys; sys.argv = ['stackctl']; from stackctl.__main__ import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", command],
        env=environment, capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip
    found = {line.partition(",")[2] for line in done.stdout.splitlines() if line}
    assert expected <= found if expected else found == set(), done.stderr
    assert "Traceback" not in done.stderr


# Documents


def test_a_plan_as_a_document(cli: Cli) -> None:
    assert cli(*FITS, "--json") == 0
    made = from_json(cli.out, Plan, where="stdout")
    assert made.verdict.fits is True
    keys = list(json.loads(cli.out))
    assert keys[:7] == ["schema", "profile", "stack", "objective", "engine", "image", "argv"]
    assert cli.err == ""
    before = cli.out
    assert cli("--json", *FITS) == 0
    assert cli.out == before


def test_profiles_as_documents(cli: Cli) -> None:
    assert cli("profiles", "show", "cpu-throughput", "--json", "--set", "context=512") == 0
    shown = from_json(cli.out, Profile, where="stdout")
    assert (shown.name, shown.stack, shown.context) == ("cpu-throughput", "cpu", 512)
    assert cli("profiles", "--json") == 0
    listed = json.loads(cli.out)
    assert next(iter(listed)) == "schema"
    assert {"cpu", "demo"} <= {profile["name"] for profile in listed["profiles"]}
    assert cli("profiles", "schema") == 0
    assert json.loads(cli.out)["$schema"].startswith("https://json-schema.org/")


def test_status_as_a_document(cli: Cli) -> None:
    assert cli("--user", "status", "--json") == 0
    assert json.loads(cli.out) == {
        "schema": "stackctl.status/1",
        "scope": "user",
        "guard": None,
        "stacks": [],
    }


def test_what_is_shown_of_profiles(cli: Cli, place: Path) -> None:
    folder = place / "config" / "stackctl" / "profiles"
    folder.mkdir(parents=True)
    (folder / "bad.yaml").write_text("engine: llama.cpp\nprot: 1\n")
    (folder / "cpu.yaml").write_text("extends: cpu\nport: 9999\nengine_args: {metrics: false}\n")
    assert cli("profiles") == 0
    assert "not valid:" in cli.out
    assert cli("profiles", "show", "cpu") == 0
    assert "9999" in cli.out
    assert "(left out)" in cli.out
    other = place / "other"
    other.mkdir()
    (other / "cpu.yaml").write_text("extends: cpu\nport: 7777\n")
    assert cli("profiles", "show", "cpu", "--profiles", str(other), "--json") == 0
    shown = from_json(cli.out, Profile, where="stdout")
    assert shown.port == 7777
    assert len(shown.files) == 3


def test_every_key_of_a_profile_is_shown(cli: Cli, place: Path) -> None:
    (place / "all.yaml").write_text(
        "{description: All of it, engine: vllm, stack: everything, objective: throughput,\n"
        " model: 'dir:/m', image: 'localhost/img:1', context: 512, concurrency: 7, kv_type: fp8,\n"
        " gpu_reserve: 3 GiB, port: 9999, address: 0.0.0.0, api_key: true, front_door: 'on',\n"
        " slo: {prompt_tokens: 100, ttft_s: 1.5, itl_ms: 20.0, min_tok_s: 30.5,\n"
        "       min_prefix_hits: 0.25}, served_name: [one, two, three], trust_remote_code: true,\n"
        " placement: {policy: bind, nodes: 0-1, cpus: 0-13, gpus: '2', cpu_experts: 11},\n"
        " engine_args: {swap-space: 8, enforce-eager: true}}\n"
    )
    assert cli("profiles", "show", "all.yaml", "--json", "--set", "concurrency=8") == 0
    profile = json.loads(cli.out)
    assert cli("profiles", "show", "all.yaml", "--set", "concurrency=8") == 0
    title, _, *lines = cli.out.splitlines()
    assert title == "all: All of it"
    (place_of,) = (number for number, line in enumerate(lines) if line.startswith("concurrency "))
    lines[place_of] = lines[place_of].removesuffix("  (command line)")
    shown = {key: value.strip() for key, _, value in (line.partition(" ") for line in lines)}
    for key in ("schema", "name", "description"):
        del profile[key]
    assert shown.pop("gpu_reserve") == "3 GiB" and profile.pop("gpu_reserve_bytes") == 3 << 30
    assert shown.pop("served_name") == "one, two, three"
    assert [profile.pop("served_name"), *profile.pop("other_names")] == ["one", "two", "three"]
    assert [shown.pop("from")] == profile.pop("files")
    expected = {}
    for argument in profile.pop("engine_args"):
        values = json.dumps(argument["values"]).strip("[]") or "true"
        expected[f"engine_args.{argument['name']}"] = values
    for key, value in profile.items():
        if isinstance(value, dict):
            expected |= {f"{key}.{inner}": _written(one) for inner, one in value.items()}
        else:
            expected[key] = _written(value)
    assert shown == expected
    assert cli("profiles", "show", "hybrid-moe") == 0
    shown_rows = [line.split() for line in cli.out.splitlines()]
    assert ["placement.gpus", "all"] in shown_rows
    assert ["placement.cpu_experts", "auto"] in shown_rows


def test_shown_values_have_their_origin(cli: Cli) -> None:
    assert cli("profiles", "show", "gpu-gguf", "--set", "slo.ttft_s=7") == 0
    rows = {line.split()[0]: " ".join(line.split()[1:]) for line in cli.out.splitlines()}
    assert rows["concurrency"] == "1 (objective latency)"
    assert rows["slo.prompt_tokens"] == "4640 (objective latency)"
    assert rows["slo.ttft_s"] == "7.0 (command line)"
    assert rows["slo.itl_ms"] == "(none)"
    assert rows["port"] == "8083"
    assert "(up fetches hf:mradermacher/IQuest-Coder" in " ".join(cli.out.split())
    assert cli("profiles", "show", "gpu-gguf", "--objective", "throughput") == 0
    assert "4  (objective throughput)" in cli.out
    assert cli("profiles", "show", "demo", "--model", "file:/m.gguf") == 0
    assert "file:/m.gguf  (command line)" in cli.out
    # Without ttft_s its length of the prompt has no use.
    assert "slo.prompt_tokens" not in cli.out


def _written(value: Any) -> str:
    """A JSON value as ``profiles show`` writes it."""
    if isinstance(value, list):
        return ", ".join(value)
    return str(value).lower() if isinstance(value, bool) else str(value)


def test_an_explained_plan(cli: Cli) -> None:
    assert cli(*FITS, "--explain", "--set", "engine_args.threads=12") == 0
    told = " ".join(cli.out.split())
    assert "FIELD VALUE WHY" in told
    assert "the plan had 14" in told
    assert "override" in told
    assert "(unset)" in told


def test_render(cli: Cli, place: Path) -> None:
    arguments = ("render", *FITS[1:])
    assert cli("--user", *arguments) == 0
    assert "[Container]" in cli.out
    assert "WantedBy=default.target" in cli.out
    assert "was not looked at" in cli.err
    text = cli.out
    assert cli("--user", "--json", *arguments) == 0
    found = json.loads(cli.out)
    assert (found["schema"], found["service"]) == ("stackctl.units/1", "cpu.service")
    assert found["files"] == [{"name": "cpu.container", "text": text}]
    assert cli("--system", *arguments) == 0
    assert "WantedBy=multi-user.target" in cli.out
    assert cli("--user", *arguments, "-o", "units") == 0
    assert cli.out == "units/cpu.container\n"
    assert (place / "units" / "cpu.container").read_text("utf-8") == text
    assert cli("--user", *arguments, "-o", "lab.json") == 2
    assert "lab.json is not a folder" in cli.err


# Colour and width


def on_terminal(arguments: Sequence[str], environment: Mapping[str, str]) -> str:
    """What a command prints on a terminal of 80 columns."""
    primary, secondary = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-m", "stackctl", *arguments],
        stdin=secondary, stdout=secondary, stderr=secondary,
        env={**os.environ, **environment},
    ) as child:  # fmt: skip
        os.close(secondary)
        printed = b""
        with contextlib.suppress(OSError):  # the end of a terminal is an error
            while part := os.read(primary, 65536):
                printed += part
        child.wait()
    os.close(primary)
    return printed.decode()


def test_colour_on_a_terminal_only_and_never_against_no_color() -> None:
    assert ESCAPE in on_terminal(FITS, {})
    assert ESCAPE not in on_terminal(FITS, {"NO_COLOR": "1"})
    assert ESCAPE not in on_terminal(FITS, {"TERM": "dumb"})
    # An empty NO_COLOR says nothing; an option says more than the environment.
    assert ESCAPE in on_terminal(FITS, {"NO_COLOR": ""})
    assert ESCAPE in on_terminal([*FITS, "--color", "always"], {"NO_COLOR": "1"})
    assert ESCAPE not in on_terminal([*FITS, "--color", "never"], {})


READING = [
    FITS,
    (*FITS, "--explain"),
    TOO_BIG,
    ("profiles",),
    ("profiles", "show", "cpu"),
    ("--user", "status"),
    ("--help",),
    ("plan", "cpu-latncy"),
]


@pytest.mark.parametrize("arguments", READING, ids=lambda words: " ".join(words)[:40])
def test_piped_output_has_no_escapes_and_fits_80_columns(
    cli: Cli, arguments: tuple[str, ...]
) -> None:
    cli(*arguments)
    assert ESCAPE not in cli.out + cli.err
    for line in (cli.out + cli.err).splitlines():
        assert len(line) <= 80, line
        assert line == line.rstrip()
    plain = cli.out
    cli("--color", "always", *arguments)
    uncoloured = re.sub(r"\x1b\[[0-9;]*m", "", cli.out)
    assert [line.rstrip() for line in uncoloured.splitlines()] == plain.splitlines()


def test_the_verdict_is_never_told_by_colour_alone(cli: Cli) -> None:
    cli(*TOO_BIG, "--color", "never")
    assert "too big" in cli.out
    assert "does not fit" in cli.err


def test_a_recorded_machine_is_drawn_within_80_columns(cli: Cli, place: Path) -> None:
    node = place / "rec" / "sys/devices/system/node/node0"
    node.mkdir(parents=True)
    (node / "cpulist").write_text("0-3\n")
    (place / "rec" / "proc").mkdir()
    (place / "rec" / "proc" / "meminfo").write_text("MemTotal: 1048576 kB\n")
    assert cli("probe", "--sysroot", "rec") == 0
    assert all(len(line) <= 80 for line in cli.out.splitlines())
    assert cli("probe", "--sysroot", "rec", "--json") == 0
    assert json.loads(cli.out)["memory"]["total_bytes"] == 2**30


# What it does not do

AUDIT = """
    import os, sys
    from stackctl.cli.main import run
    FORBIDDEN = ("subprocess.Popen", "os.fork", "os.forkpty", "os.exec", "os.posix_spawn",
                 "os.system", "os.spawn", "socket.connect", "socket.bind", "os.mkdir", "os.remove",
                 "os.rename", "os.chmod", "shutil.rmtree")
    def audit(event, arguments):
        if event.startswith(FORBIDDEN):
            os.write(2, f"did {event} {arguments}\\n".encode())
        if event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            os.write(2, f"wrote {arguments}\\n".encode())
    sys.addaudithook(audit)
    code = run(sys.argv[1:])
    for name in ("requests", "podman", "cpuinfo"):
        if name in sys.modules:
            os.write(2, f"imported {name}\\n".encode())
    sys.exit(code)
"""


@pytest.mark.parametrize("verb", ["plan", "render"])
def test_planning_from_files_starts_nothing_and_writes_nothing(verb: str, place: Path) -> None:
    unprivileged = 65534 if os.geteuid() == 0 else None
    place.chmod(0o755)
    environment = {
        **os.environ, "PATH": "/nowhere", "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(ROOT)
    }  # fmt: skip
    command = [sys.executable, "-c", textwrap.dedent(AUDIT), "-q", verb, *FITS[1:], "--json"]
    if verb == "render":
        command.remove("--json")
    if unprivileged is not None and not _may_enter(place, unprivileged):
        unprivileged = None  # a temporary folder, or a Python, that is root's alone
    done = subprocess.run(
        command, cwd=place, env=environment, capture_output=True, text=True, timeout=30,
        check=False, user=unprivileged,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stderr.splitlines() if "was not looked at" not in line] == []
    assert "IQuest" in done.stdout


def _may_enter(folder: Path, user: int) -> bool:
    """Whether another user can run this Python on what lies in a folder."""
    for path in (folder, Path(sys.executable).resolve(), ROOT / "stackctl"):
        done = subprocess.run(
            ["test", "-x", str(path)], user=user, check=False, stdin=subprocess.DEVNULL
        )
        if done.returncode != 0:
            return False
    return True


def test_a_command_imports_only_what_it_needs() -> None:
    code = (
        "import sys; from stackctl.cli.main import run; run(['profiles', 'show', 'cpu', '--json']);"
        "heavy = {'requests', 'podman', 'cpuinfo', 'jinja2', 'rich'} & set(sys.modules);"
        "sys.exit(', '.join(sorted(heavy)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# Text that cannot be shown


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_what_the_terminal_cannot_show_is_escaped(encoding: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "stackctl", *FITS],
        env={**os.environ, "PYTHONIOENCODING": encoding}, capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert b"latency" in done.stdout


def test_names_that_are_no_text(place: Path) -> None:
    folder = os.fsencode(place) + b"/\xff"
    Path(os.fsdecode(folder)).mkdir()
    Path(os.fsdecode(folder + b"/mine.yaml")).write_text("extends: cpu\n")
    for arguments, code in (
        ([b"profiles", b"show", b"mine", b"--profiles", folder], 0),
        ([b"profiles", b"show", b"mine", b"--profiles", folder, b"--json"], 0),
        ([b"plan", b"cpu", b"--facts", b"\xfe", b"--json"], 2),
        ([b"plan", b"cpu", b"--facts", b"lab.json", b"--model", b"file:\xfe.gguf"], 1),
        ([b"plan", b"\xfe", b"--json"], 4),
    ):
        for encoding in ("utf-8", "ascii"):
            done = subprocess.run(
                [os.fsencode(sys.executable), b"-m", b"stackctl", *arguments],
                env={**os.environ, "PYTHONIOENCODING": encoding}, capture_output=True, check=False,
            )  # fmt: skip
            assert b"Traceback" not in done.stderr, done.stderr
            assert done.returncode == code, done.stderr
            if b"--json" in arguments:
                json.loads(done.stdout)


# Ends before its time


@pytest.mark.parametrize(
    "arguments",
    [("profiles", "schema"), (*FITS, "--json"), ("--help",), ("--json", "plna"), FITS,
     (*TOO_BIG, "--json")],
    ids=lambda words: " ".join(words)[:30],
)  # fmt: skip
def test_a_reader_that_has_gone_is_no_error(arguments: tuple[str, ...]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "stackctl", *arguments],
        stdout=writing, stderr=subprocess.PIPE, text=True, timeout=30, check=False,
    )  # fmt: skip
    os.close(writing)
    assert "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr
    assert done.returncode in (0, 2, 5)


def test_head() -> None:
    command = f"{sys.executable} -m stackctl profiles schema | head -1"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("{\n", "")


def test_nobody_who_hears_the_progress_is_no_reason_to_stop() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "stackctl", "-v", "probe", "--json"],
        stdout=subprocess.PIPE, stderr=writing, text=True, timeout=30, check=False,
    )  # fmt: skip
    os.close(writing)
    assert done.returncode == 0
    assert json.loads(done.stdout)["schema"] == "stackctl.host/1"


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_descriptors(place: Path, closed: str) -> None:
    """As some supervisors start their programs."""
    command = f"{sys.executable} -m stackctl render cpu --model file:m.gguf -o out {closed}"
    write_model(place / "m.gguf")
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False)
    assert (done.returncode, "bug" in done.stderr) == (0, False), done.stderr
    assert (place / "out" / "cpu.container").read_text().startswith("# cpu: written by stackctl")


def test_a_full_disk_is_told() -> None:
    with open("/dev/full", "w") as full:  # noqa: PTH123
        done = subprocess.run(
            [sys.executable, "-m", "stackctl", "profiles", "schema"],
            stdout=full, stderr=subprocess.PIPE, text=True, timeout=30, check=False,
        )  # fmt: skip
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "No space left" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_interrupts(place: Path, number: signal.Signals) -> None:
    fifo = place / "facts"
    os.mkfifo(fifo)
    with subprocess.Popen(
        [sys.executable, "-m", "stackctl", "plan", "cpu", "--facts", "facts",
         "--model", "facts:gemma.json"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as child:  # fmt: skip
        # It waits for someone to write into the pipe.
        wait_until(lambda: "fifo" in Path(f"/proc/{child.pid}/wchan").read_text() or
                   _waits_for(child.pid))  # fmt: skip
        child.send_signal(number)
        out, err = child.communicate(timeout=10)
    assert child.returncode == 130
    assert (out, err) == ("", "error: interrupted\n")


EARLY = """
import signal, sys
from stackctl.__main__ import main
class Finder:
    def find_spec(self, name, *_):
        if name == "stackctl.cli.main":
            signal.raise_signal(signal.SIGINT)
sys.meta_path.insert(0, Finder())
main()
"""


def test_an_interrupt_before_it_has_begun() -> None:
    done = subprocess.run(
        [sys.executable, "-c", EARLY], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "error: interrupted\n")


LOST = """
import os, signal, sys, time
from stackctl.__main__ import main
import stackctl.cli.main as cli

class Connection:
    def __del__(self):
        signal.raise_signal(signal.%s)

def run(arguments):
    cli._end_gracefully(hang_up=True)
    for _ in range(3):
        Connection()
        time.sleep(%s)
    time.sleep(20)

cli.run = lambda arguments: run(arguments)
main()
"""


@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("pause_s", [0, 0.5])
def test_an_interrupt_in_a_finalizer_is_not_lost(number: str, pause_s: float) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LOST % (number, pause_s)],
        capture_output=True, text=True, check=False, timeout=15,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "error: interrupted\n")


def test_tests_can_be_interrupted_in_the_background_of_a_shell() -> None:
    """A shell starts its background jobs with SIGINT ignored, which processes inherit."""
    chosen = f"{Path(__file__)}::{test_an_interrupt_before_it_has_begun.__name__}"
    done = subprocess.run(
        ["sh", "-c", 'trap "" INT; exec "$@"', "sh", sys.executable, "-m", "pytest", "-q", chosen],
        cwd=ROOT, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert "1 passed" in done.stdout


def _waits_for(pid: int) -> bool:
    """Whether a process sleeps in opening a file (openat is 257 on x86-64, 56 elsewhere)."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/syscall").read_text().split()[0] in ("257", "56")
    return False


def test_as_a_module_and_as_a_script() -> None:
    done = process("--version")
    assert (done.returncode, done.stdout) == (0, f"stackctl {__version__}\n")
    assert process("plna").returncode == 2
    assert process(*TOO_BIG).returncode == 5


def test_verbose_shows_the_commands(cli: Cli) -> None:
    cli("-v", "--user", "--json", "probe")
    shown = [line for line in cli.err.splitlines() if line.startswith("$ ")]
    assert shown
    assert json.loads(cli.out)["schema"] == "stackctl.host/1"
