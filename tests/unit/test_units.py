"""Unit files: what a reader of Quadlet and systemd makes of them is what was meant."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Literal

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from samples import (
    CARD,
    EPYC,
    EPYC_GPU,
    GEMMA,
    HOSTS,
    IQUEST,
    LATENCY,
    THROUGHPUT,
    plan,
    profile,
    shipped,
    shipped_model,
)

from stackctl.deploy import gpu_access
from stackctl.deploy.images import start_command
from stackctl.engines import engine
from stackctl.errors import ExitCode, StackctlError
from stackctl.plan.claimed_resources import claim_of
from stackctl.units import healthcheck, quoting, wait_for_cdi
from stackctl.units.quadlet import NEWEST, OLDEST_TEXT, Keys, parse_version
from stackctl.units.render import (
    RESTARTS,
    UnitTarget,
    comparison_text,
    generation_of,
    log_identifier,
    profile_of,
    render_units,
    service_name,
    without_claimed_bytes,
)
from stackctl.values.model import Model, ModelFile
from stackctl.values.plan import Plan

PINNED = "ghcr.io/ggml-org/llama.cpp@sha256:" + "ab" * 32
VERSIONS = ("4.7.2", "4.8.0", "4.9.3", "5.2.5", "5.4.2", "5.8.2")


# A reader, written from systemd.syntax(7), systemd.service(5) and podman-systemd.unit(5)


def unit_words(text: str) -> list[str]:
    """Split a value as systemd and Quadlet do; only the escapes we write are known here."""
    words: list[str] = []
    word: str | None = None
    quoted = False
    place = 0
    while place < len(text):
        char = text[place]
        if char == "\\":
            place += 1
            assert text[place] in '\\"', f"an escape of another meaning: {text!r}"
            word = (word or "") + text[place]
        elif char == '"':
            quoted = not quoted
            word = word or ""
        elif char == "'":
            assert quoted, f"an opening quote: {text!r}"
            word = (word or "") + char
        elif char.isspace() and not quoted:
            if word is not None:
                words.append(word)
            word = None
        else:
            word = (word or "") + char
        place += 1
    assert not quoted, f"an open quote: {text!r}"
    return words if word is None else [*words, word]


def expanded(text: str, doubled: str = "%$") -> str:
    """What is left after specifiers and variables: doubled signs are single, others an error."""
    for sign in doubled:
        assert re.fullmatch(rf"(?:[^{sign}]|{re.escape(sign * 2)})*", text), text
        text = text.replace(sign * 2, sign)
    return text


def sections(text: str) -> dict[str, list[tuple[str, str]]]:
    """Keys of a unit file by section, in order."""
    found: dict[str, list[tuple[str, str]]] = {}
    for line in text.split("\n"):
        if not line.strip() or line[0] in "#;":
            continue
        assert not line.endswith("\\"), f"a line that goes on: {line!r}"
        if line[0] == "[":
            assert line[1:-1] not in found, f"section twice: {line}"
            now = found.setdefault(line[1:-1], [])
        else:
            key, equals, value = line.partition("=")
            assert equals
            assert re.fullmatch(r"[A-Za-z]+", key), line
            now.append((key, value.strip()))
    return found


class Read:
    """A rendered unit, read back."""

    def __init__(
        self,
        made: Plan,
        podman: str | None = "5.4.2",
        scope: Literal["user", "system"] = "system",
        program: tuple[str, ...] = (),
        generation: int = 7,
        image: str = PINNED,
        **more: Any,
    ) -> None:
        target = UnitTarget(
            scope=scope, podman=podman, image=image, program=program, claim=claim_of(made), **more
        )
        self.units = render_units(made, target, generation)
        (file,) = self.units.files
        self.name, self.text = file.name, file.text
        self.sections = sections(file.text)

    def all(self, section: str, key: str) -> list[str]:
        return [value for name, value in self.sections[section] if name == key]

    def one(self, section: str, key: str) -> str:
        (value,) = self.all(section, key)
        return value

    @property
    def podman_args(self) -> list[str]:
        values = self.all("Container", "PodmanArgs")
        return [expanded(word) for value in values for word in unit_words(value)]

    @property
    def command(self) -> list[str]:
        return [expanded(word) for word in unit_words(self.one("Container", "Exec"))]


# Quoting

LINE = st.text(
    st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]).filter(
        lambda char: ord(char) & 0xFFFE != 0xFFFE and not "\ufdd0" <= char <= "\ufdef"
    ),
    max_size=20,
)
TRICKY = st.text("ab $%\\\"'`{};#=:~!*-\u00e4\u2028", max_size=12)
WORD = (LINE | TRICKY).filter(lambda value: value not in ("", ";"))


@given(st.lists(WORD, max_size=5))
def test_words_come_out_as_they_went_in(values: list[str]) -> None:
    text = quoting.quote_words(values)
    assert "\n" not in text
    assert not text.endswith("\\")
    assert [expanded(word) for word in unit_words(text)] == values


@given(LINE | TRICKY)
def test_raw_values_come_out_as_they_went_in(value: str) -> None:
    try:
        text = quoting.quote_raw(value)
    except StackctlError as error:
        assert error.exit_code == ExitCode.USAGE
        assert not value or value != value.strip() or value.endswith("\\")
    else:
        assert expanded(text.strip()) == value


@given(LINE | TRICKY)
def test_text_of_systemd_s_own_keys(value: str) -> None:
    assert expanded(quoting.quote_text(value), "%") == value


@pytest.mark.parametrize(
    "write", [quoting.quote_raw, quoting.quote_text, lambda text: quoting.quote_words([text])]
)
@pytest.mark.parametrize("char", ["\n", "\r", "\t", "\0", "\x1b", "\x7f", "\x80", "\x9f"])
def test_control_characters_are_refused(write: Callable[[str], str], char: str) -> None:
    with pytest.raises(StackctlError, match="control character") as caught:
        write(f"a{char}b")
    assert caught.value.exit_code == ExitCode.USAGE
    # And the message itself is safe to print.
    assert char not in caught.value.message


@pytest.mark.parametrize(
    "write", [quoting.quote_raw, quoting.quote_text, lambda text: quoting.quote_words([text])]
)
@pytest.mark.parametrize("char", ["\udc80", "\ud800", "\ufffe", "\ufdd0", "\U0010ffff"])
def test_what_is_no_character_is_refused(write: Callable[[str], str], char: str) -> None:
    with pytest.raises(
        StackctlError, match=f"U\\+{ord(char):04X}, which is not a character"
    ) as caught:
        write(f"a{char}b")
    assert caught.value.exit_code == ExitCode.USAGE
    caught.value.message.encode()


# Quadlet ends the list at an empty word, and systemd begins another command at a bare ;.
@pytest.mark.parametrize(
    ("value", "why"),
    [("", "it is empty"), (";", "another command"), ("x" * 131072, "longer than 131071 bytes")],
)
def test_words_that_would_not_come_out(value: str, why: str) -> None:
    with pytest.raises(StackctlError, match=why) as caught:
        quoting.quote_words(["a", value, "b"])
    assert caught.value.exit_code == ExitCode.USAGE
    assert len(caught.value.message) < 200


@pytest.mark.parametrize("value", ["", "A", "=1", "A B=1", "A*", "1A=x", "A-B=1", "-e=1", "A\n=1"])
def test_variables_have_plain_names(value: str) -> None:
    with pytest.raises(StackctlError, match="not NAME=value"):
        quoting.join_variable(value)
    assert quoting.join_variable("A_1=") == "A_1="


def test_a_unit_has_a_longest_line() -> None:
    many = msgspec.structs.replace(plan(), argv=("x", *["y" * 100_000] * 11))
    with pytest.raises(StackctlError, match="longer than 1008 KiB") as caught:
        Read(many)
    assert caught.value.exit_code == ExitCode.USAGE


@pytest.mark.parametrize("field", ["stack", "profile", "objective"])
@pytest.mark.parametrize("name", ["a\n[Service]\nExecStartPre=x", "a b", "-a", "a\n", "%h", ""])
def test_names_that_are_none_are_not_written(field: str, name: str) -> None:
    with pytest.raises(StackctlError, match="is not a name"):
        Read(msgspec.structs.replace(plan(), **{field: name}))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("--threads", "--threads"),
        ("a b", '"a b"'),
        ('say "hi"', '"say \\"hi\\""'),
        ("C:\\x", '"C:\\\\x"'),
        ("100%", "100%%"),
        ("$HOME/m", "$$HOME/m"),
        ("${X}%n", '"$${X}%%n"'),
        ("a;b", '"a;b"'),
    ],
)
def test_words_as_they_are_written(value: str, text: str) -> None:
    assert quoting.quote_words([value]) == text


@pytest.mark.parametrize(("source", "target"), [("/a:b", "/c"), ("/a", "/c:d")])
def test_a_path_with_a_colon_cannot_be_mounted(source: str, target: str) -> None:
    with pytest.raises(StackctlError, match="colon") as caught:
        quoting.join_volume(source, target, "ro")
    assert caught.value.hint
    assert quoting.join_volume("/a,b", "/c", "ro") == "/a,b:/c:ro"


# Versions


@pytest.mark.parametrize(
    ("text", "version"),
    [
        (None, NEWEST),
        ("5.4.2", (5, 4)),
        ("4.9.3", (4, 9)),
        ("5.10.0-dev", (5, 10)),
        ("odd", NEWEST),
    ],
)
def test_podman_versions(text: str | None, version: tuple[int, int]) -> None:
    assert parse_version(text) == version


@pytest.mark.parametrize("text", ["4.6.2", "4.4.4", "4.3.1", "3.4.4"])
def test_podman_that_is_too_old(text: str) -> None:
    with pytest.raises(StackctlError, match=f"Podman {text} is too old: .*subfolders") as caught:
        Read(plan(), text)
    assert caught.value.exit_code == ExitCode.HOST
    assert f"install Podman {OLDEST_TEXT} or newer" in (caught.value.hint or "")


def test_a_key_that_no_version_has() -> None:
    with pytest.raises(KeyError, match="Imgae"):
        Keys((5, 0)).key("Imgae", "x")


@pytest.mark.parametrize("podman", VERSIONS)
def test_keys_that_the_version_lacks_become_arguments(podman: str) -> None:
    read = Read(plan(), podman)
    version = parse_version(podman)
    # The key Notify takes "healthy" from 5.0 on.
    assert ("Notify" in dict(read.sections["Container"])) == (version >= (5, 0))
    assert ("--sdnotify=healthy" in read.podman_args) == (version < (5, 0))
    # Before 4.8, Quadlet adds --read-only-tmpfs=false to each unit; the last argument counts.
    assert ("--read-only-tmpfs=true" in read.podman_args) == (version < (4, 8))
    assert "ReadOnlyTmpfs" not in read.text
    assert ("Quadlet" in read.sections) == (version >= (5, 3))


@pytest.mark.parametrize("podman", VERSIONS)
@pytest.mark.parametrize("host", HOSTS)
def test_podman_args_come_last(podman: str, host: str) -> None:
    keys = [key for key, _ in Read(plan(HOSTS[host], GEMMA), podman).sections["Container"]]
    if "PodmanArgs" in keys:
        first = keys.index("PodmanArgs")
        assert set(keys[first:]) == {"PodmanArgs"}


@pytest.mark.parametrize("podman", [*VERSIONS, None])
def test_what_every_unit_says(podman: str | None) -> None:
    read = Read(plan(), podman)
    assert (read.name, read.units.service) == ("cpu.container", "cpu.service")
    assert read.one("Container", "Image") == PINNED
    assert read.one("Container", "ContainerName") == read.units.container == "stackctl-cpu"
    assert read.one("Container", "Network") == "host"
    assert read.one("Container", "ReadOnly") == "true"
    assert read.one("Container", "NoNewPrivileges") == "true"
    assert read.one("Container", "DropCapability") == "all"
    assert read.command == list(plan().argv[1:])
    assert read.one("Service", "Restart") == "on-failure"
    assert read.one("Service", "SyslogIdentifier") == log_identifier("cpu", 7) == "cpu-g7"
    assert read.text.endswith("\n")
    assert not read.text.endswith("\n\n")
    assert not re.search(r"\n\n\n| +$", read.text, re.MULTILINE)
    assert "PublishPort" not in read.text


@pytest.mark.parametrize(
    ("scope", "apparmor", "sets"),
    [("user", False, True), ("user", True, True), ("system", False, True), ("system", True, False)],
)
def test_no_new_privileges_but_for_root_under_apparmor(
    scope: Literal["user", "system"], apparmor: bool, sets: bool
) -> None:
    read = Read(plan(), scope=scope, apparmor=apparmor)
    assert read.all("Container", "NoNewPrivileges") == (["true"] if sets else [])
    # The rest of the confinement stays, and so does podman's profile.
    assert read.one("Container", "DropCapability") == "all"
    assert "apparmor=" not in read.text


@pytest.mark.parametrize(
    ("scope", "wanted"), [("user", "default.target"), ("system", "multi-user.target")]
)
def test_scopes(scope: Literal["user", "system"], wanted: str) -> None:
    assert Read(plan(), scope=scope).one("Install", "WantedBy") == wanted


def test_an_image_without_entry_point_gets_its_program() -> None:
    assert Read(plan(), program=("llama-server",)).command == list(plan().argv)


def test_locked_memory() -> None:
    assert Read(plan()).one("Container", "Ulimit") == "memlock=-1:-1"
    limited = msgspec.structs.replace(
        EPYC, limits=msgspec.structs.replace(EPYC.limits, memlock_bytes=2**36)
    )
    assert Read(plan(limited)).one("Container", "Ulimit") == f"memlock={2**36}:{2**36}"
    unlocked = Read(plan(HOSTS["lab"], GEMMA))
    assert "memlock" not in unlocked.text


def test_cpusets() -> None:
    assert not any("cpuset" in a for a in Read(plan(HOSTS["desktop"], GEMMA)).podman_args)
    # Cores are kept free, so the others are named.
    assert "--cpuset-cpus=0-13" in Read(plan()).podman_args
    smt = Read(plan(HOSTS["epyc-smt"]))
    assert "--cpuset-cpus=0-13" in smt.podman_args
    assert not any("cpuset-mems" in argument for argument in smt.podman_args)
    bound = Read(plan(HOSTS["dual-nps4"], wish=profile(placement={"nodes": "2"})))
    assert {"--cpuset-cpus=48-71", "--cpuset-mems=2"} <= set(bound.podman_args)


def test_memory_policies() -> None:
    def policy(read: Read) -> dict[str, str]:
        return {k: v for k, v in read.sections["Service"] if k.startswith("NUMA")}

    assert policy(Read(plan())) == {}
    spread = {"NUMAPolicy": "interleave", "NUMAMask": "0-15"}
    assert policy(Read(plan(HOSTS["epyc-l3numa"]))) == spread
    bound = Read(plan(HOSTS["dual-nps4"], wish=profile(placement={"nodes": "2"})))
    assert policy(bound) == {"NUMAPolicy": "bind", "NUMAMask": "2"}
    left = Read(plan(HOSTS["dual-nps4"], wish=profile(placement={"policy": "default"})))
    assert policy(left) == {}


@pytest.mark.parametrize("deadline_s", [1, 60, 404, 20_000])
def test_the_start_limit_spans_all_attempts(deadline_s: int) -> None:
    made = plan(deadline_s=deadline_s)
    read = Read(made)
    burst = int(read.one("Unit", "StartLimitBurst"))
    ceiling = int(read.one("Service", "TimeoutStartSec"))
    pause = int(read.one("Service", "RestartSec"))
    assert burst == RESTARTS
    assert ceiling == made.timing.ceiling_s > deadline_s
    assert int(read.one("Unit", "StartLimitIntervalSec")) > burst * (ceiling + pause)
    read = on_gpu("gpu-gguf")
    attempt = int(read.one("Service", "TimeoutStartSec")) + pause + wait_for_cdi.WAIT_S
    assert int(read.one("Unit", "StartLimitIntervalSec")) > burst * attempt


# Odd values


def with_file(path: str, base: Model = GEMMA) -> Model:
    return msgspec.structs.replace(base, files=(ModelFile(path=path, bytes=1),))


ODD_PATHS = [
    "/m/my model.gguf", "/m/100%.gguf", "/m/$x.gguf", "/m/it's.gguf", '/m/"q".gguf',
    "/m/a\\b.gguf", "/m/größe 模型.gguf", "/m/a,b;c.gguf", "/m/#x.gguf", "/m n/x.gguf",
]  # fmt: skip


@pytest.mark.parametrize("path", ODD_PATHS)
@pytest.mark.parametrize("podman", ["4.9.3", "5.4.2"])
def test_odd_paths_of_models(path: str, podman: str) -> None:
    made = plan(EPYC, with_file(path))
    read = Read(made, podman)
    name = path.rpartition("/")[2]
    volumes = [expanded(value) for value in read.all("Container", "Volume")]
    volumes += [
        argument.removeprefix("--volume=")
        for argument in read.podman_args
        if argument.startswith("--volume=")
    ]
    assert volumes == [f"{path}:/models/{name}:ro"]
    command = read.command
    assert command[command.index("--model") + 1] == f"/models/{name}"
    assert command[command.index("--alias") + 1] == name.removesuffix(".gguf")
    described = expanded(read.one("Unit", "Description"), "%")
    assert described == f"stackctl cpu (llama.cpp, {name.removesuffix('.gguf')})"
    for value in read.all("Unit", "RequiresMountsFor"):
        (mount,) = unit_words(value)
        assert path.startswith(expanded(mount, "%"))


@pytest.mark.parametrize("path", ["/m/a\nb.gguf", "/m/a:b.gguf", "/m/\x1b[31m.gguf"])
def test_paths_that_a_unit_cannot_hold(path: str) -> None:
    with pytest.raises(StackctlError) as caught:
        Read(plan(EPYC, with_file(path)))
    assert caught.value.exit_code == ExitCode.USAGE


@given(st.lists(WORD, min_size=1, max_size=3))
def test_engine_arguments_reach_the_engine(values: list[str]) -> None:
    made = plan(EPYC, GEMMA, profile(engine_args={"chat-template-kwargs": tuple(values)}))
    read = Read(made)
    assert read.command == list(made.argv[1:])
    assert [v for k, v in zip(read.command, read.command[1:], strict=False)
            if k == "--chat-template-kwargs"] == values  # fmt: skip


def test_environment_is_quoted() -> None:
    made = msgspec.structs.replace(plan(), environment=("A=1", "B=two words", "C=$x%"))
    values = Read(made).all("Container", "Environment")
    assert [expanded(word) for value in values for word in unit_words(value)] == [
        "A=1", "B=two words", "C=$x%"
    ]  # fmt: skip


def test_all_parts_of_a_sharded_model_are_mounted() -> None:
    parts = tuple(ModelFile(path=f"/m/x-{n:05}-of-00003.gguf", bytes=1) for n in (1, 2, 3))
    read = Read(plan(EPYC, msgspec.structs.replace(IQUEST, files=parts)))
    assert len(read.all("Container", "Volume")) == 3


def test_nothing_that_a_person_writes_is_in_the_health_command() -> None:
    """A shell reads it."""
    model = with_file("/m/$(id) `id`;id.gguf")
    made = plan(EPYC, model, profile(served_name="$(id);id", engine_args={"api-prefix": ("/;id",)}))
    made = msgspec.structs.replace(made, environment=("A=$(id)",))
    for podman in (*VERSIONS, None):
        read = Read(made, podman)
        found = [value for key, value in read.sections["Container"]
                 if key in ("HealthCmd", "HealthStartupCmd")]  # fmt: skip
        found += [a.partition("=")[2] for a in read.podman_args if "-cmd=" in a]
        assert sorted(text.replace("$$", "$") for text in found) == sorted(
            [
                healthcheck.health_command(8080, "/health"),
                healthcheck.startup_command(8080, "/health"),
            ]
        )


# Its number and names


def test_the_number_is_not_part_of_what_a_unit_says() -> None:
    first, second = Read(plan(), generation=1).text, Read(plan(), generation=12).text
    assert first != second
    assert comparison_text(first) == comparison_text(second)
    assert comparison_text(first) != comparison_text(Read(plan(wish=THROUGHPUT)).text)
    # How much memory it claims is, but the engine may tell that better than the first plan.
    claimed = re.sub(r'"memory_bytes": (\d+)', r'"memory_bytes": 1\1', first)
    assert claimed != first
    assert comparison_text(claimed) != comparison_text(first)
    assert without_claimed_bytes(claimed) == without_claimed_bytes(first)
    assert without_claimed_bytes(re.sub('"port": 8', '"port": 9', first)) != without_claimed_bytes(
        first
    )
    assert (generation_of(first), generation_of(second), generation_of("")) == (1, 12, None)
    assert (profile_of(first), profile_of("")) == (LATENCY.name, None)
    assert service_name("cpu") == "cpu.service"


# GPUs and vLLM

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPO = "/srv/hub/models--IQuestLab--IQuest-Coder-V1-40B-Instruct-nvfp4"
WEIGHTS = ModelFile(path=f"{REPO}/blobs/{'5e' * 32}", bytes=22_000_000_000)


def on_gpu(
    name: str, podman: str | None = "5.4.2", scope: Literal["user", "system"] = "system"
) -> Read:
    """The unit of a shipped profile on the machine with the RTX PRO 6000, as ``up`` makes it."""
    wish = shipped(name)
    model = msgspec.structs.replace(
        shipped_model(shipped("gpu-nvfp4")),
        folder=f"{REPO}/snapshots/{COMMIT}",
        files=(WEIGHTS,),
    )
    if wish.engine == "llama.cpp":
        model = IQUEST
    made = plan(EPYC_GPU, model, wish, engine_port=41000)
    local = wish.forces_cpu
    run = engine(wish.engine)
    program, entrypoint = start_command(run, () if local else run.published_entrypoint)
    folder = "/home/ai/.cache" if scope == "user" else "/var/cache"
    return Read(
        made,
        podman,
        scope,
        program,
        image="cd" * 32 if local else f"{made.image.partition(':')[0]}@sha256:{'ab' * 32}",
        entrypoint=entrypoint,
        devices=gpu_access.cdi_names(gpu_access.planned_gpus(EPYC_GPU, made)),
        cache=f"{folder}/stackctl/compiled/{'cd' * 6}",
    )


def test_a_unit_has_its_memory_beside_the_gpu() -> None:
    card = msgspec.structs.replace(CARD, numa_node=5)
    host = msgspec.structs.replace(HOSTS["dual-nps4"], gpus=(card,))
    wish = shipped("gpu-nvfp4")
    read = Read(plan(host, shipped_model(wish), wish))
    assert read.all("Service", "NUMAPolicy") == ["preferred"]
    assert read.all("Service", "NUMAMask") == ["5"]
    assert not any("cpuset-mems" in argument for argument in read.podman_args)


@pytest.mark.parametrize("podman", VERSIONS)
def test_what_a_unit_with_a_gpu_says(podman: str) -> None:
    read = on_gpu("gpu-nvfp4", podman)
    assert read.all("Container", "AddDevice") == ["nvidia.com/gpu=0"]
    assert read.all("Container", "Volume") == [
        f"{REPO}:/models:ro", f"/var/cache/stackctl/compiled/{'cd' * 6}:/cache:rw"
    ]  # fmt: skip
    # At boot the GPU may be described later, and no volume's folder may be missing.
    waits, made = read.all("Service", "ExecStartPre")
    assert waits.startswith("/bin/sh -c ")
    assert "nvidia.com/gpu /etc/cdi/*.json" in waits
    top, caches = "/var/cache/stackctl", "/var/cache/stackctl/compiled"
    assert made == f"/bin/mkdir -p -m 0700 -- {top} {caches} {caches}/{'cd' * 6}"
    assert read.all("Container", "ShmSize") == [str(8 * 2**30)]
    # The published image starts "vllm serve": the second word is here.
    assert "--entrypoint=vllm" in read.podman_args
    assert read.command[:2] == ["serve", f"/models/snapshots/{COMMIT}"]
    variables = [expanded(value) for value in read.all("Container", "Environment")]
    assert {"HF_HUB_OFFLINE=1", "VLLM_CACHE_ROOT=/cache/vllm", "HOME=/cache"} <= set(variables)


def test_a_unit_for_a_cpu_has_no_device() -> None:
    read = on_gpu("cpu-vllm")
    assert "AddDevice" not in read.text
    assert "cdi" not in read.text
    assert "entrypoint" not in read.text
    assert read.command[:3] == ["vllm", "serve", f"/models/snapshots/{COMMIT}"]
    assert read.one("Container", "ShmSize")
    plain = Read(plan())
    assert not [key for key, _ in plain.sections["Container"] if key in ("AddDevice", "ShmSize")]
    assert "/cache" not in plain.text


def test_llama_cpp_keeps_what_the_driver_compiles_and_its_entry_point() -> None:
    read = on_gpu("gpu-gguf")
    assert read.all("Container", "AddDevice") == ["nvidia.com/gpu=0"]
    assert read.all("Container", "Environment") == ["CUDA_CACHE_PATH=/cache/cuda"]
    assert f"/var/cache/stackctl/compiled/{'cd' * 6}:/cache:rw" in read.all("Container", "Volume")
    assert len(read.all("Service", "ExecStartPre")) == 2
    assert "entrypoint" not in read.text
    assert read.command[0].startswith("--")


@pytest.mark.parametrize(
    ("entrypoint", "program", "replaced"),
    [
        ((), ("vllm",), None),
        (("vllm",), (), None),
        (("/usr/bin/vllm", "serve"), (), "/usr/bin/vllm"),
    ],
)
def test_what_starts_an_engine(
    entrypoint: tuple[str, ...], program: tuple[str, ...], replaced: str | None
) -> None:
    assert start_command(engine("vllm"), entrypoint) == (program, replaced)


# Golden units


@pytest.mark.parametrize(
    ("podman", "scope"),
    [("4.7.2", "user"), ("4.9.3", "user"), ("5.4.2", "system"), ("5.8.2", "system")],
)
@pytest.mark.parametrize("name", ["gpu-nvfp4", "cpu-vllm", "gpu-gguf"])
def test_golden_units_of_the_machine_with_a_gpu(
    name: str,
    podman: str,
    scope: Literal["user", "system"],
    golden: Callable[[str, str], None],
) -> None:
    golden(f"units/{name}--podman-{podman}.container", on_gpu(name, podman, scope).text)


@pytest.mark.parametrize(
    ("podman", "host", "model", "scope"),
    [
        ("4.7.2", "epyc-nps1", IQUEST, "system"),
        ("4.9.3", "desktop", GEMMA, "user"),
        ("5.8.2", "epyc-nps1", IQUEST, "system"),
        ("5.4.2", "epyc-l3numa", IQUEST, "system"),
    ],
)
def test_golden_units(
    podman: str,
    host: str,
    model: Model,
    scope: Literal["user", "system"],
    golden: Callable[[str, str], None],
) -> None:
    read = Read(plan(HOSTS[host], model), podman, scope)
    golden(f"units/{host}--podman-{podman}.container", read.text)


@pytest.mark.parametrize("podman", ["4.9.3", "5.4.2"])
def test_golden_units_under_apparmor(podman: str, golden: Callable[[str, str], None]) -> None:
    read = Read(plan(HOSTS["epyc-nps1"], IQUEST), podman, "system", apparmor=True)
    golden(f"units/epyc-nps1-apparmor--podman-{podman}.container", read.text)
