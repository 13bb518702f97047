"""Settings of clients: what they say, and what becomes of files that are there already."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml
from samples import LATENCY, plan, served

from stackctl.cli.client import _present, _resolved, _write, tunnel_to, without_keys
from stackctl.errors import StackctlError
from stackctl.observe.client_settings import (
    AIDER_CONFIG,
    AIDER_METADATA,
    AIDER_SETTINGS,
    client_report,
    measured_speed,
    merge_settings,
    planned_speed,
    shadows_api_key,
)
from stackctl.values.bench import BenchCell, BenchReport, Quantiles, Workload
from stackctl.values.client import ClientFile, ClientReport, Speeds
from stackctl.values.generation import EngineFact, Generation, Outcome
from stackctl.values.proxy import Proxy

URL = "http://127.0.0.1:8080"
FAST = Speeds(decode_tok_s=27.0, prefill_tok_s=1500.0, source="measured")
DOOR = Proxy(port=8080, engine_port=29000, health_path="/health", image="x@sha256:00", key=True)


def generation(context: int | None = 32768, door: Proxy | None = None) -> Generation:
    facts = () if context is None else (EngineFact(name="context", value=str(context)),)
    outcome = Outcome(state="ready", changed="2026-11-28T12:00:00Z", report=facts)
    return served(plan(wish=LATENCY), door=door, outcome=outcome)


def aider(speeds: Speeds = FAST, **changes: Any) -> ClientReport:
    return client_report(generation(**changes), URL, speeds, "aider")


def files(report: ClientReport) -> tuple[Any, Any, Any]:
    config, models, metadata = (file.text for file in report.files)
    return yaml.safe_load(config), yaml.safe_load(models), json.loads(metadata)


def test_aider_is_told_what_the_server_takes() -> None:
    report = aider()
    config, models, metadata = files(report)
    name = f"openai/{report.model}"
    assert config == {
        "model": name,
        "weak-model": name,
        "openai-api-base": "http://127.0.0.1:8080/v1",
        "edit-format": "diff",
        "map-tokens": 1280,
        "timeout": 660,
        "openai-api-key": "unused",
    }
    (entry,) = models
    assert entry == {
        "name": name,
        "edit_format": "diff",
        "use_repo_map": True,
        "use_temperature": 0,
        "streaming": True,
        "extra_params": {"max_tokens": 8192},
    }
    limits = metadata[name]
    assert limits["max_tokens"] == 32768
    assert limits["max_input_tokens"] + limits["max_output_tokens"] == 32768


@pytest.mark.parametrize(
    ("speeds", "tokens"),
    [
        (FAST, 1280),
        (Speeds(prefill_tok_s=90.0, decode_tok_s=9.0, source="measured"), 512),
        (Speeds(prefill_tok_s=50_000.0, decode_tok_s=90.0, source="measured"), 2048),
        (Speeds(), 1024),
    ],
)
def test_a_slow_reader_gets_a_small_map(speeds: Speeds, tokens: int) -> None:
    assert files(aider(speeds))[0]["map-tokens"] == tokens


def test_the_map_is_no_more_than_an_eighth_of_a_prompt() -> None:
    config, _, metadata = files(aider(context=4096))
    (limits,) = metadata.values()
    assert config["map-tokens"] == limits["max_input_tokens"] // 8 == 384


def test_the_timeout_is_for_the_longest_request() -> None:
    slow = aider(Speeds(decode_tok_s=1.0, prefill_tok_s=20.0, source="predicted"))
    assert files(slow)[0]["timeout"] == 3600
    assert any("smaller ones only" in reason for file in slow.files for reason in file.reasons)
    assert files(aider(Speeds()))[0]["timeout"] == 600


def test_a_key_stands_nowhere() -> None:
    report = aider(door=DOOR)
    assert report.key_command == "stackctl --system key show cpu"
    assert "openai-api-key" not in files(report)[0]
    assert not any("KEY" in text for text in report.environment)


def test_the_context_is_the_engines_word_else_the_plans() -> None:
    planned = {d.field: d.value for d in generation().plan.decisions}
    assert aider(context=4096).context == 4096
    assert aider(context=None).context == planned["ctx-size"]


def test_programs_are_told_by_environment() -> None:
    report = client_report(generation(), URL, FAST, "openai")
    assert report.environment == (
        "OPENAI_BASE_URL=http://127.0.0.1:8080/v1",
        "OPENAI_API_KEY=unused",
    )
    assert report.files == ()


def test_what_was_not_measured_is_taken_from_the_plan() -> None:
    expected = generation().plan.prediction
    assert expected.decode_tok_s is not None
    found = planned_speed(generation())
    assert (found.decode_tok_s, found.source) == (expected.decode_tok_s[0], "predicted")
    plan_without = msgspec.structs.replace(generation().plan, prediction=type(expected)())
    unknown = msgspec.structs.replace(generation(), plan=plan_without)
    assert planned_speed(unknown) == Speeds()


def file(name: str) -> ClientFile:
    return next(file for file in aider().files if file.name == name)


def test_what_no_file_can_hold_is_kept_as_json_names_it() -> None:
    text = merge_settings(file(AIDER_METADATA), '{"other": {"note": "\\ud800 é"}}')
    text.encode()
    assert json.loads(text)["other"] == {"note": "\ud800 é"}
    assert merge_settings(file(AIDER_METADATA), text) == text


@pytest.mark.parametrize("name", [AIDER_CONFIG, AIDER_SETTINGS, AIDER_METADATA])
@pytest.mark.parametrize("present", [None, "", "\n"])
def test_a_new_file_is_ours_alone(name: str, present: str | None) -> None:
    text = merge_settings(file(name), present)
    assert text == file(name).text
    assert merge_settings(file(name), text) == text


def test_what_else_is_in_the_config_stays_with_its_comments() -> None:
    present = "# mine\nauto-commits: false\nmodel: gpt-x  # before\ntimeout: 5"
    text = merge_settings(file(AIDER_CONFIG), present)
    assert text.startswith("# mine\nauto-commits: false\nmodel: openai/")
    ours = yaml.safe_load(file(AIDER_CONFIG).text)
    assert yaml.safe_load(text) == {"auto-commits": False, **ours}
    assert merge_settings(file(AIDER_CONFIG), text) == text


@pytest.mark.parametrize("shape", [str, lambda text: json.dumps(yaml.safe_load(text))])
def test_a_stand_in_for_a_key_goes_when_there_is_one(shape: Any) -> None:
    """aider takes a key of its file before the environment's."""
    (guarded, *_) = aider(door=DOOR).files
    present = shape("auto-commits: false\n" + file(AIDER_CONFIG).text)
    text = merge_settings(guarded, present)
    assert yaml.safe_load(text) == {"auto-commits": False, **yaml.safe_load(guarded.text)}
    assert merge_settings(guarded, text) == text


def test_a_key_of_the_users_own_is_theirs() -> None:
    present = "openai-api-key: sk-mine\n"
    for report in (aider(door=DOOR), aider()):
        text = merge_settings(report.files[0], present)
        assert yaml.safe_load(text)["openai-api-key"] == "sk-mine"
        assert merge_settings(report.files[0], text) == text
        # It would be sent where another one is wanted.
        assert shadows_api_key(report, text) == (report.key_command is not None)
    assert not shadows_api_key(aider(door=DOOR), merge_settings(aider(door=DOOR).files[0], None))


def test_a_config_of_another_shape_keeps_its_values() -> None:
    present = "{model: gpt-x, auto-commits: false}\n"
    assert yaml.safe_load(merge_settings(file(AIDER_CONFIG), present))["auto-commits"] is False


def test_other_models_keep_their_settings() -> None:
    present = "# others\n- name: other\n  edit_format: whole\n"
    text = merge_settings(file(AIDER_SETTINGS), present)
    assert text.startswith(present)
    assert merge_settings(file(AIDER_SETTINGS), text) == text
    (ours,) = yaml.safe_load(file(AIDER_SETTINGS).text)
    outdated = yaml.safe_dump([{"name": "other"}, {**ours, "edit_format": "whole"}])
    assert yaml.safe_load(merge_settings(file(AIDER_SETTINGS), outdated)) == [
        {"name": "other"},
        ours,
    ]


def test_other_models_keep_their_limits() -> None:
    present = '{"other": {"max_tokens": 5}}'
    found = json.loads(merge_settings(file(AIDER_METADATA), present))
    assert found["other"] == {"max_tokens": 5}
    assert len(found) == 2


@pytest.mark.parametrize(
    ("name", "present", "says"),
    [
        (AIDER_CONFIG, "a: [\n", "line 2 cannot be read: expected the node content"),
        (AIDER_CONFIG, "\ta: 1\n", r"line 1 cannot be read: found character '\\t'"),
        (AIDER_CONFIG, "a: !!bool x\n", "cannot be read: 'x'"),
        (AIDER_CONFIG, "a: !!int ''\n", "cannot be read: string index"),
        (AIDER_CONFIG, "- a\n", "is not a map"),
        (AIDER_SETTINGS, "a: b\n", "is not a list"),
        (AIDER_METADATA, "{", "cannot be read"),
        (AIDER_METADATA, "[]", "is not a map"),
    ],
)
def test_what_cannot_be_read_is_not_overwritten(name: str, present: str, says: str) -> None:
    with pytest.raises(StackctlError, match=says) as caught:
        merge_settings(file(name), present)
    assert caught.value.exit_code == 2


def test_the_last_measurement_comes_before_the_plan() -> None:
    def quantiles(value: float) -> Quantiles:
        return Quantiles(n=8, mean=value, p5=value, p50=value, p95=value, p99=value)

    def cell(prompt: int, speed: float, *, at_once: int = 1, cached: bool = False) -> BenchCell:
        return BenchCell(
            shape=Workload(
                prompt_tokens=prompt, output_tokens=200, concurrency=at_once, cached=cached
            ),
            requests=8,
            seconds=1.0,
            generation_tok_s=quantiles(speed),
            prompt_tok_s=quantiles(10 * speed),
        )

    run = BenchReport(
        stack="cpu", generation=1, when="2026-11-28T12:00:00Z", seconds=1.0, profile="cpu",
        objective="latency", engine="llama.cpp", image_id="0" * 64, model="m",
        cells=(cell(1000, 27.0), cell(8000, 25.0), cell(1000, 9.0, at_once=4),
               cell(1000, 90.0, cached=True)),
    )  # fmt: skip
    assert measured_speed(run) == Speeds(decode_tok_s=25.0, prefill_tok_s=250.0, source="measured")
    assert measured_speed(msgspec.structs.replace(run, cells=())) == Speeds()


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ("-openai-api-key: sk-real", "-openai-api-key: ..."),
        (" anthropic-api-key:  'sk-real'  # mine", " anthropic-api-key:  ..."),
        (' "openai-api-key": "sk-real"', ' "openai-api-key": ...'),
        ("   - gemini=sk-real", "   - gemini=..."),
        ('+- "gemini=sk-real"', '+- "gemini=...'),
        ("   - 'OPENAI_API_KEY=sk-real'", "   - 'OPENAI_API_KEY=..."),
        ("   - my-own=sk-real", "   - my-own=..."),
        (" #openai-api-key: sk-real", " #openai-api-key: ..."),
        (" set-env: ['A=sk-real']", " set-env: ..."),
        ("     Authorization: Bearer sk-real", "     Authorization: ..."),
        ("+- api_key: sk-real", "+- api_key: ..."),
        (" - name: openai/a=b", " - name: openai/a=b"),
        (" api-key:", " api-key:"),
        ("+model: openai/coder", "+model: openai/coder"),
        ("+++ /home/key: x/.aider.conf.yml", "+++ /home/key: x/.aider.conf.yml"),
    ],
)
def test_a_difference_shows_no_key(line: str, shown: str) -> None:
    assert without_keys(line) == shown


def test_links_in_a_circle_are_one_error(tmp_path: Path) -> None:
    link = tmp_path / AIDER_CONFIG
    link.symlink_to(link)
    with pytest.raises(StackctlError, match="Too many levels of symbolic links"):
        _present(_resolved(link))
    link.unlink()
    link.symlink_to("mine.yml")
    assert _resolved(link) == tmp_path.resolve() / "mine.yml"


def test_a_file_of_keys_leaves_its_folder_to_others(tmp_path: Path) -> None:
    tmp_path.chmod(0o775)
    path = tmp_path / AIDER_CONFIG
    path.write_text("openai-api-key: mine\n")
    path.chmod(0o600)
    _write([(path, "openai-api-key: mine\n", "model: x\n")])
    assert path.read_text() == "model: x\n"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o775


@pytest.mark.parametrize(
    ("address", "tunnel"),
    [
        ("127.0.0.1", "ssh -N -L 8080:127.0.0.1:8080 ann@box"),
        ("[::1]", "ssh -N -L '8080:[::1]:8080' ann@box"),
        ("192.168.7.5", None),
    ],
)
def test_only_a_boxs_own_address_needs_a_tunnel(address: str, tunnel: str | None) -> None:
    assert tunnel_to(f"http://{address}:8080/v1", "ann@box") == tunnel
