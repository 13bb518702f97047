"""Profiles: finding, extending, merging and checking them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stackctl.errors import ExitCode, StackctlError
from stackctl.resources import data_folder
from stackctl.sources import strict_yaml
from stackctl.sources.profile_keys import SWITCHES
from stackctl.sources.profiles import Profiles, profile_schema
from stackctl.values.base import from_json, to_json
from stackctl.values.profile import EngineArgument, Overrides, PlacementRequest, Profile

SHIPPED = data_folder("profiles")
BASE = "engine: llama.cpp\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "profiles"
    made.mkdir()
    return made


def resolve(folder: Path, profile: str, text: str | None = None, **overrides: Any) -> Profile:
    if text is not None:
        (folder / f"{profile}.yaml").write_text(text, encoding="utf-8")
    return Profiles([folder, SHIPPED]).resolve(profile, Overrides(**overrides))


def fails(folder: Path, text: str | None, **overrides: Any) -> StackctlError:
    with pytest.raises(StackctlError) as caught:
        resolve(folder, "p", text, **overrides)
    assert caught.value.exit_code == ExitCode.USAGE
    return caught.value


# What is shipped


@pytest.mark.parametrize("objective", ["latency", "throughput"])
@pytest.mark.parametrize("path", sorted(SHIPPED.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_profiles_resolve_for_both_objectives(path: Path, objective: str) -> None:
    profile = Profiles([SHIPPED]).resolve(path.stem, Overrides(objective=objective))
    assert (profile.name, profile.objective) == (path.stem, objective)
    assert profile.description
    assert from_json(to_json(profile), Profile, where="test") == profile


def test_the_two_objectives_of_the_cpu_profile_replace_each_other() -> None:
    profiles = Profiles([SHIPPED])
    latency = profiles.resolve("cpu-latency", Overrides())
    throughput = profiles.resolve("cpu-throughput", Overrides())
    assert (latency.stack, throughput.stack) == ("cpu", "cpu")
    assert (latency.objective, throughput.objective) == ("latency", "throughput")
    assert latency.port == throughput.port
    assert (latency.concurrency, throughput.concurrency) == (1, 4)
    other = profiles.resolve("cpu", Overrides(objective="throughput"))
    assert other.concurrency == throughput.concurrency
    assert latency.files == (str(SHIPPED / "cpu-latency.yaml"), str(SHIPPED / "cpu.yaml"))


def test_names_are_those_of_all_folders(folder: Path) -> None:
    for name in ("cpu", "mine", "Not-a-name", ".hidden"):
        (folder / f"{name}.yaml").write_text(BASE, encoding="utf-8")
    names = Profiles([folder, folder / "absent", SHIPPED]).names()
    assert list(names) == sorted({"mine", *(path.stem for path in SHIPPED.glob("*.yaml"))})


# Errors: file, line, hint


@pytest.mark.parametrize(
    ("text", "line", "words", "hint"),
    [
        ("engine: llama.cpp\ncontxt: 1\n", 2, "unknown key 'contxt'", "did you mean context?"),
        ("engine: llama.cpp\nzzzz: 1\n", 2, "unknown key 'zzzz'", "keys: "),
        (BASE + "objectives:\n  latncy: {}\n", 3, "unknown key 'latncy'", "did you mean latency?"),
        (BASE + "objectives:\n  latency:\n    port: 80\n    concurency: 2\n", 5,
         "unknown key 'concurency'", "did you mean concurrency?"),
        (BASE + "placement:\n  node: '0'\n", 3, "unknown key 'node'", "did you mean nodes?"),
        (BASE + "context: many\n", 2, "context: invalid enum value 'many'", None),
        (BASE + "context: 0\n", 2, "context: expected int >= 16", None),
        (BASE + "port: 65536\n", 2, "port: expected int <= 65535", None),
        (BASE + "port: '8080'\n", 2, "port: expected int", None),
        (BASE + "concurrency: 1.5\n", 2, "concurrency: expected int", None),
        (BASE + "stack: Not_A_Name\n", 2, "stack: expected str matching", None),
        (BASE + "objective: fast\n", 2, "objective: invalid enum value 'fast'", None),
        ("engine: tgi\n", 1, "engine: unknown engine 'tgi'", "engines: llama.cpp, vllm"),
        (BASE + "placement: {policy: spread}\n", 2, "placement.policy: invalid enum", None),
        (BASE + "port: on\n", 2, "on means different things", "did you mean true?"),
        (BASE + "port: 8080\nport: 8081\n", 3, "duplicate key 'port'", None),
        (BASE + "engine_args:\n  -c: 5\n", 3, "engine option '-c' is not a long option name",
         "threads: 14"),
        (BASE + "engine_args:\n  --threads: 5\n", 3, "is not a long option name", "threads: 14"),
        (BASE + "objectives:\n  latency:\n    engine_args:\n      t: 5\n", 5,
         "engine option 't' is not", "threads: 14"),
        (BASE + "engine_args: {threads: {a: 1}}\n", 2, "engine_args", None),
        (BASE + "engine_args: []\n", 2, "engine_args: expected object", None),
        ("- a\n", 1, "a profile is a mapping", None),
        ("just text\n", 1, "a profile is a mapping", None),
        ("extends: nowhere\n", 1, "no profile named nowhere", "profiles: "),
        ("# hm\nextends: cpu-latncy\n", 2, "no profile named cpu-latncy",
         "did you mean cpu-latency?"),
        ("extends: p\n", 1, "no profile named p", None),
        ("extends: ../x\n", 1, "extends: expected str matching", None),
    ],
)  # fmt: skip
def test_an_error_has_file_line_and_hint(
    folder: Path, text: str, line: int, words: str, hint: str | None
) -> None:
    error = fails(folder, text)
    assert error.message.startswith(f"{folder}/p.yaml:{line}: ")
    assert words in error.message
    assert "`" not in error.message
    if hint is not None:
        assert hint in (error.hint or "")


def test_a_profile_without_engine(folder: Path) -> None:
    error = fails(folder, "port: 80\n")
    assert "key 'engine' is missing" in error.message
    assert str(folder / "p.yaml") in error.message
    assert error.hint == "engines: llama.cpp, vllm"


def test_an_error_in_a_parent_names_the_parent(folder: Path) -> None:
    (folder / "base.yaml").write_text(BASE + "prot: 80\n", encoding="utf-8")
    error = fails(folder, "extends: base\n")
    assert error.message.startswith(f"{folder}/base.yaml:2: ")
    assert error.hint == "did you mean port?"


def test_no_such_profile(folder: Path) -> None:
    with pytest.raises(StackctlError) as caught:
        resolve(folder, "cpu-latencie")
    assert caught.value.exit_code == ExitCode.NOT_FOUND
    assert caught.value.hint == "did you mean cpu-latency?"
    with pytest.raises(StackctlError) as caught:
        resolve(folder, "zzzzzz")
    assert caught.value.hint is not None
    assert "cpu-throughput" in caught.value.hint


@pytest.mark.parametrize("raw", [b"\xff\xfe", b"a: \xc3\x28\n"])
def test_a_file_that_is_no_text(folder: Path, raw: bytes) -> None:
    (folder / "p.yaml").write_bytes(raw)
    assert "is not UTF-8 text" in fails(folder, None).message


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.dictionaries(
        st.sampled_from(
            ["model", "context", "port", "placement", "engine_args", "extends", "stack",
             "objective", "objectives", "engine", "zzz"]
        ),
        st.recursive(
            st.none() | st.booleans() | st.integers(-9, 99999) | st.sampled_from(["a", "on", ""]),
            lambda inner: st.lists(inner, max_size=2)
            | st.dictionaries(st.sampled_from(["latency", "threads", "policy", "x", "..."]), inner),
            max_leaves=4,
        ),
    )
)  # fmt: skip
def test_any_yaml_is_a_profile_or_an_error(folder: Path, data: dict[str, Any]) -> None:
    try:
        profile = resolve(folder, "p", yaml.safe_dump(data))
    except StackctlError as error:
        assert error.exit_code == ExitCode.USAGE
        assert str(folder) in error.message
    else:
        assert from_json(to_json(profile), Profile, where="test") == profile


# Extending and merging


def test_a_profile_overrides_what_it_extends(folder: Path) -> None:
    (folder / "base.yaml").write_text(
        BASE
        + "port: 9000\ncontext: 4096\nplacement: {policy: bind, nodes: '0'}\n"
        + "engine_args: {threads: 4, poll: 50}\n"
        + "objectives: {latency: {concurrency: 2}, throughput: {concurrency: 8}}\n",
        encoding="utf-8",
    )
    text = (
        "extends: base\nport: 9001\ncontext: null\nplacement: {nodes: '1'}\n"
        "engine_args: {threads: 8, poll: null}\nobjectives: {latency: {context: 512}}\n"
    )
    profile = resolve(folder, "p", text)
    assert profile.port == 9001
    assert profile.placement == PlacementRequest(policy="bind", nodes="1")
    assert profile.engine_args == (EngineArgument(name="threads", values=(8,)),)
    assert (profile.context, profile.concurrency) == (512, 2)
    assert profile.files == (str(folder / "p.yaml"), str(folder / "base.yaml"))
    other = resolve(folder, "p", objective="throughput")
    # A null takes back what the parent says: it is derived again.
    assert (other.context, other.concurrency) == (None, 8)


def test_a_null_of_an_objective_takes_back_what_all_have(folder: Path) -> None:
    text = BASE + "context: 4096\nengine_args: {poll: 0}\nobjectives:\n  latency:\n"
    text += "    context: null\n    engine_args: {poll: null, prio: null}\n"
    profile = resolve(folder, "p", text)
    assert (profile.context, profile.engine_args) == (None, ())
    assert resolve(folder, "p", objective="throughput").context == 4096


def test_a_user_profile_extends_the_shipped_one_of_its_own_name(folder: Path) -> None:
    profile = resolve(folder, "cpu", "extends: cpu\nport: 9999\n")
    assert (profile.port, profile.stack, profile.engine) == (9999, "cpu", "llama.cpp")
    assert profile.files == (str(folder / "cpu.yaml"), str(SHIPPED / "cpu.yaml"))
    # And what extends it by name gets the user's.
    assert resolve(folder, "cpu-latency").port == 9999


def test_three_folders_of_one_name(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("given", "user", "etc")]
    for number, made in enumerate(folders):
        made.mkdir()
        text = f"extends: cpu\nport: {9000 + number}\nengine_args: {{poll: {number}}}\n"
        (made / "cpu.yaml").write_text(text, encoding="utf-8")
    profile = Profiles([*folders, SHIPPED]).resolve("cpu", Overrides())
    assert profile.port == 9000
    assert len(profile.files) == 4
    assert Profiles([*folders[1:], SHIPPED]).resolve("cpu", Overrides()).port == 9001


@pytest.mark.parametrize(
    "texts",
    [
        {"a": "extends: b\n", "b": "extends: a\n"},
        {"a": "extends: b\n", "b": "extends: c\n", "c": "extends: b\n"},
    ],
)
def test_profiles_that_extend_each_other(folder: Path, texts: dict[str, str]) -> None:
    for name, text in texts.items():
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(StackctlError, match="profiles extend each other: a -> b") as caught:
        resolve(folder, "a")
    assert caught.value.exit_code == ExitCode.USAGE


def test_a_cycle_through_the_name_it_hides(folder: Path) -> None:
    # cpu (user) -> cpu-latency (shipped) -> cpu, which is the user's again.
    with pytest.raises(StackctlError, match="extend each other"):
        resolve(folder, "cpu", "extends: cpu-latency\n")


def test_a_profile_by_its_path(folder: Path, tmp_path: Path) -> None:
    (folder / "near.yaml").write_text(BASE + "port: 7000\n", encoding="utf-8")
    path = folder / "mine.yaml"
    path.write_text("extends: near\n", encoding="utf-8")
    profile = Profiles([SHIPPED]).resolve(str(path), Overrides())
    assert (profile.name, profile.stack, profile.port) == ("mine", "mine", 7000)
    with pytest.raises(StackctlError, match="no such file") as caught:
        Profiles([SHIPPED]).resolve(str(tmp_path / "none.yaml"), Overrides())
    assert caught.value.exit_code == ExitCode.NOT_FOUND
    wrong = folder / "Not A Name.yaml"
    wrong.write_text(BASE, encoding="utf-8")
    with pytest.raises(StackctlError, match="is not a profile name"):
        Profiles([SHIPPED]).resolve(str(wrong), Overrides())


def test_a_profile_by_path_may_extend_the_shipped_one_of_its_name(folder: Path) -> None:
    path = folder / "cpu.yaml"
    path.write_text("extends: cpu\nport: 7001\n", encoding="utf-8")
    profile = Profiles([SHIPPED]).resolve(str(path), Overrides())
    assert (profile.port, profile.files) == (7001, (str(path), str(SHIPPED / "cpu.yaml")))
    # Also when the folder is one that is searched.
    again = Profiles([folder, SHIPPED]).resolve(str(path), Overrides())
    assert again == profile


def test_the_stack_is_named_by_option_then_profile_then_name(folder: Path) -> None:
    text = BASE + "stack: shared\n"
    assert resolve(folder, "p", text).stack == "shared"
    assert resolve(folder, "p", text, name="mine").stack == "mine"
    assert resolve(folder, "q", BASE).stack == "q"
    assert "is not a stack name" in fails(folder, text, name="No Name").message
    assert "is not a stack name" in fails(folder, text, name="../x").message
    assert "is not a stack name" in fails(folder, text, name="a" * 41).message


@pytest.mark.parametrize(
    ("value", "expected"),
    [("8", (8,)), ("true", ()), ("false", None), ("mmap", ("mmap",)), ("[1, x]", (1, "x")),
     ("0.5", (0.5,)), ("'8'", ("8",))],
)  # fmt: skip
def test_engine_arguments(folder: Path, value: str, expected: object) -> None:
    profile = resolve(folder, "p", BASE + f"engine_args: {{some-option: {value}}}\n")
    assert profile.engine_args == (EngineArgument(name="some-option", values=expected),)  # type: ignore[arg-type]


# The command line


def test_overrides_win(folder: Path) -> None:
    text = (
        BASE + "context: 1024\nmodel: file:/a.gguf\nengine_args: {threads: 4}\n"
        "objective: throughput\nobjectives: {latency: {context: 2048}}\n"
    )
    sets = ("context=512", "engine_args.threads=9", "placement.nodes=0-1", "served_name=x y")
    profile = resolve(folder, "p", text, sets=sets, model="file:/b.gguf", objective="latency")
    assert (profile.context, profile.model, profile.objective) == (512, "file:/b.gguf", "latency")
    assert profile.engine_args == (EngineArgument(name="threads", values=(9,)),)
    assert profile.placement.nodes == "0-1"
    assert profile.served_name == "x y"
    assert profile.overrides == (
        "context", "engine_args.threads", "placement.nodes", "served_name", "model"
    )  # fmt: skip


def test_a_model_may_have_several_names(folder: Path) -> None:
    profile = resolve(folder, "p", BASE + "served_name: [coder, gpt-4o]\n")
    assert (profile.served_name, profile.other_names) == ("coder", ("gpt-4o",))
    one = resolve(folder, "p", BASE + "served_name: [coder, gpt-4o]\n", sets=("served_name=x",))
    assert (one.served_name, one.other_names) == ("x", ())
    with pytest.raises(StackctlError, match="served_name"):
        resolve(folder, "p", BASE + "served_name: []\n")
    with pytest.raises(StackctlError, match="served_name"):
        resolve(folder, "p", BASE + "served_name: [1]\n")


def test_the_last_of_two_settings_wins(folder: Path) -> None:
    profile = resolve(folder, "p", BASE, sets=("context=512", "context=1024"))
    assert profile.context == 1024


def test_an_override_can_take_a_value_back(folder: Path) -> None:
    assert resolve(folder, "p", BASE + "context: 99\n", sets=("context=null",)).context is None
    profile = resolve(folder, "p", BASE, sets=("engine_args.metrics=false",))
    assert profile.engine_args == (EngineArgument(name="metrics", values=None),)


@pytest.mark.parametrize(
    ("text", "words", "hint"),
    [
        ("context", "--set context: no value", "--set context=4096"),
        ("=5", "--set =5: no value", "--set context=4096"),
        ("contxt=5", "--set contxt: no such key", "did you mean context?"),
        ("threads=5", "--set threads: no such key", "--set engine_args.threads=5"),
        ("engine_args=5", "--set engine_args: no such key", None),
        ("placement=bind", "--set placement: no such key", None),
        ("context.x=5", "--set context.x: no such key", None),
        ("objectives.latency.port=5", "--set objectives.latency.port: no such key", None),
        ("extends=cpu", "--set extends: no such key", None),
        ("engine_args.-t=5", "'-t' is not a long option name", "threads: 14"),
        ("engine_args.=5", "is not a long option name", "threads: 14"),
        ("placement.node=0", "unknown key 'node'", "did you mean nodes?"),
        ("context=many", "--set context: invalid enum value 'many'", None),
        ("context=8", "--set context: expected int >= 16", None),
        ("context=010", "--set context:1: 010 is not a plain decimal", "did you mean 10?"),
        ("port=on", "on means different things", None),
        ("engine=tgi", "--set engine: unknown engine", "engines: llama.cpp, vllm"),
        ("model=[", "--set model", None),
        ("engine_args.threads={a: 1}", "engine_args", None),
    ],
)
def test_settings_that_are_wrong(folder: Path, text: str, words: str, hint: str | None) -> None:
    error = fails(folder, BASE, sets=(text,))
    assert words in error.message
    assert "`" not in error.message
    if hint is not None:
        assert hint in (error.hint or "")


def test_an_unknown_objective(folder: Path) -> None:
    error = fails(folder, BASE, objective="speed")
    assert (error.message, error.hint) == ("'speed' is not an objective", "latency or throughput")


# The schema


SCHEMA = profile_schema()


def test_the_schema_is_valid_and_documents_the_keys() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    properties = SCHEMA["$defs"]["ProfileFile"]["properties"]
    assert {"engine", "model", "context", "objectives", "extends", "engine_args"} <= set(properties)
    assert all("description" in properties[key] for key in ("model", "context", "engine_args"))


@pytest.mark.parametrize("path", sorted(SHIPPED.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_schema_accepts_what_is_shipped(path: Path) -> None:
    # As editors read it (YAML 1.2): there ``front_door: off`` is a word.
    text = path.read_text("utf-8")
    data = strict_yaml.parse_document(text, where=path.name, switches=SWITCHES).data
    jsonschema.validate(data, SCHEMA)


def test_a_front_door_is_on_or_off(folder: Path) -> None:
    assert resolve(folder, "p", f"{BASE}front_door: off\n").front_door == "off"
    assert resolve(folder, "p", BASE, sets=("front_door=on",)).front_door == "on"
    assert resolve(folder, "p", BASE).front_door == "auto"
    assert "front_door" in fails(folder, f"{BASE}front_door: true\n").message
    assert fails(folder, f"{BASE}engine_args: {{flash-attn: on}}\n").hint is not None


def test_an_address_is_an_address(folder: Path) -> None:
    assert resolve(folder, "p", BASE).address == "127.0.0.1"
    assert resolve(folder, "p", f"{BASE}address: 0.0.0.0\n").address == "0.0.0.0"
    for text in ("localhost", "1.2.3", "0.0.0.0 # x\n[Service]", "127.0.0.1;"):
        assert "address" in fails(folder, f"{BASE}address: {text!r}\n").message


@pytest.mark.parametrize(
    "data",
    [{"contxt": 1}, {"port": 0}, {"port": "x"}, {"objective": "fast"}, {"stack": "A B"},
     {"placement": {"node": "0"}}, {"objectives": {"latency": {"x": 1}}}, [], "x"],
)  # fmt: skip
def test_the_schema_refuses_what_stackctl_refuses(folder: Path, data: Any) -> None:
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(data, SCHEMA)
    fails(folder, yaml.safe_dump(data))


@pytest.mark.parametrize("image", ["--privileged", "-v", "a b", "a\nb", "a;b", "$(id)", "", "%h"])
def test_an_image_is_a_reference(tmp_path: Path, image: str) -> None:
    text = f"engine: llama.cpp\nimage: {json.dumps(image)}\n"
    (tmp_path / "odd.yaml").write_text(text)
    with pytest.raises(StackctlError, match="image") as caught:
        Profiles([tmp_path]).resolve("odd", Overrides())
    assert caught.value.exit_code == ExitCode.USAGE
    with pytest.raises(StackctlError, match="image"):
        Profiles([SHIPPED]).resolve("cpu", Overrides(sets=(f"image={json.dumps(image)}",)))
