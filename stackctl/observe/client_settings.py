"""Settings of clients, from the context and the speed of a stack. Pure."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import msgspec
import yaml

from stackctl.engines import context_per_request
from stackctl.errors import ExitCode, StackctlError
from stackctl.values.bench import BenchReport
from stackctl.values.client import ClientFile, ClientReport, Speeds, Tool
from stackctl.values.generation import Generation

#: An answer may use a quarter of the context. That is more than diffs need, and leaves the rest for
#: files and their map.
_OUTPUT_PART, _MOST_OUTPUT = 4, 8192
#: By default aider's map of the repository is an eighth of the prompt, 1,024 to 4,096 tokens.
_MAP_PART, _LEAST_MAP, _USUAL_MAP, _MOST_MAP = 8, 512, 1024, 2048
_USUAL_TIMEOUT_S, _MOST_TIMEOUT_S = 600, 3600
#: Clients require a key. Without an API key at the front door any text works.
NO_KEY = "unused"
_API_KEY = "openai-api-key"

AIDER_CONFIG = ".aider.conf.yml"
AIDER_SETTINGS = ".aider.model.settings.yml"
AIDER_METADATA = ".aider.model.metadata.json"


def planned_speed(generation: Generation) -> Speeds:
    """Return the low ends of the planned ranges, for a stack without a measurement."""
    expected = generation.plan.prediction
    decode, prefill = expected.decode_tok_s, expected.prefill_tok_s
    return Speeds(
        decode_tok_s=decode[0] if decode else None,
        prefill_tok_s=prefill[0] if prefill else None,
        source="predicted" if decode or prefill else None,
    )


def measured_speed(run: BenchReport) -> Speeds:
    """Return the lowest median speeds of a run, from cells with one uncached request at a time."""
    alone = [cell for cell in run.cells if cell.shape.is_single_uncached]
    decode = [cell.generation_tok_s.p50 for cell in alone if cell.generation_tok_s]
    prefill = [cell.prompt_tok_s.p50 for cell in alone if cell.prompt_tok_s]
    return Speeds(
        decode_tok_s=min(decode, default=None),
        prefill_tok_s=min(prefill, default=None),
        source="measured" if decode or prefill else None,
    )


def client_report(generation: Generation, url: str, speeds: Speeds, tool: Tool) -> ClientReport:
    """Return the settings of a client; ``url`` is the stack's address without /v1."""
    plan = generation.plan
    context = context_tokens(generation)
    guarded = generation.door is not None and generation.door.key
    scope = "--system " if generation.host.scope == "system" else ""
    output = None if context is None else min(context // _OUTPUT_PART, _MOST_OUTPUT)
    # aider reads the older of the two names.
    name = "OPENAI_API_BASE" if tool == "aider" else "OPENAI_BASE_URL"
    environment = [f"{name}={url}/v1"]
    if not guarded:
        environment.append(f"OPENAI_API_KEY={NO_KEY}")
    report = ClientReport(
        stack=generation.stack,
        tool=tool,
        endpoint=f"{url}/v1",
        model=plan.served_name,
        context=context,
        output_tokens=output,
        environment=tuple(environment),
        key_command=f"stackctl {scope}key show {generation.stack}" if guarded else None,
        speeds=speeds,
    )
    if tool == "openai":
        return report
    return msgspec.structs.replace(report, files=_aider(report))


def context_tokens(generation: Generation) -> int | None:
    """Return the tokens that one request may use, as the engine reported, else as planned.

    Return None if both are unknown.
    """
    said = (fact.value for fact in generation.outcome.report if fact.name == "context")
    return next((int(value) for value in said if value.isdecimal()), None) or context_per_request(
        generation.plan
    )


def _aider(report: ClientReport) -> tuple[ClientFile, ...]:
    model = f"openai/{report.model}"
    tokens, why_tokens = _map_tokens(report)
    timeout_s, why_timeout = _timeout(report)
    config: dict[str, Any] = {
        "model": model,
        # Without it aider uses a model of its own choice for commit messages.
        "weak-model": model,
        "openai-api-base": report.endpoint,
        "edit-format": "diff",
        "map-tokens": tokens,
        "timeout": timeout_s,
    }
    if report.key_command is None:
        config[_API_KEY] = NO_KEY
    entry: dict[str, Any] = {
        "name": model,
        "edit_format": "diff",
        "use_repo_map": True,
        "use_temperature": 0,
        "streaming": True,
    }
    limits: dict[str, Any] = {
        "input_cost_per_token": 0,
        "output_cost_per_token": 0,
        "litellm_provider": "openai",
        "mode": "chat",
    }
    if report.context is not None and report.output_tokens is not None:
        entry["extra_params"] = {"max_tokens": report.output_tokens}
        limits["max_tokens"] = report.context
        limits["max_input_tokens"] = report.context - report.output_tokens
        limits["max_output_tokens"] = report.output_tokens
        why = (
            f"the server takes {report.context:,} tokens a request: "
            f"{report.context - report.output_tokens:,} in, {report.output_tokens:,} out"
        )
    else:
        why = "the server's context is not known: no token limits"
    return (
        ClientFile(
            name=AIDER_CONFIG,
            text=yaml.safe_dump(config, sort_keys=False),
            reasons=(
                "diff edits: whole files take far longer to generate",
                why_tokens,
                why_timeout,
            ),
        ),
        ClientFile(
            name=AIDER_SETTINGS,
            text=yaml.safe_dump([entry], sort_keys=False),
            reasons=("temperature 0: edits that apply",),
        ),
        ClientFile(
            name=AIDER_METADATA, text=json.dumps({model: limits}, indent=2) + "\n", reasons=(why,)
        ),
    )


def _map_tokens(report: ClientReport) -> tuple[int, str]:
    """Return the tokens of aider's map, and the reason.

    The map begins every prompt and changes, so it may cost about a second of prompt time.
    """
    speed, tokens = report.speeds.prefill_tok_s, _USUAL_MAP
    why = "the least that aider takes by itself"
    if speed is not None:
        tokens = int(min(max(speed, _LEAST_MAP), _MOST_MAP)) // 256 * 256
        why = f"about a second at {speed:,.0f} tok/s ({report.speeds.source})"
        if speed < _LEAST_MAP:
            why = f"small: prompts are read at {speed:,.0f} tok/s ({report.speeds.source})"
    if report.context is not None and report.output_tokens is not None:
        most = (report.context - report.output_tokens) // _MAP_PART
        if most < tokens:
            tokens, why = most, "an eighth of what a prompt may be"
    return tokens, f"map of {tokens:,} tokens: {why}"


def _timeout(report: ClientReport) -> tuple[int, str]:
    """Return twice the seconds of the longest prompt and answer, and the reason."""
    speeds, context, output = report.speeds, report.context, report.output_tokens
    if not (speeds.decode_tok_s and speeds.prefill_tok_s and context and output):
        return _USUAL_TIMEOUT_S, f"timeout {_USUAL_TIMEOUT_S} s: the speed is not known"
    longest_s = (context - output) / speeds.prefill_tok_s + output / speeds.decode_tok_s
    timeout_s = min(max(math.ceil(2 * longest_s / 60) * 60, 60), _MOST_TIMEOUT_S)
    why = f"twice the longest request, {longest_s:,.0f} s ({speeds.source})"
    if 2 * longest_s > _MOST_TIMEOUT_S:
        why = f"the longest request takes {longest_s:,.0f} s ({speeds.source}): smaller ones only"
    return timeout_s, f"timeout {timeout_s} s: {why}"


def merge_settings(file: ClientFile, present: str | None) -> str:
    """Return the text of a client's file with our settings; other settings stay.

    ``present`` is the text of the existing file (None: there is no file).

    Raises:
        StackctlError: exit 2 if the existing text cannot be parsed or has another structure.
    """
    if present is None or not present.strip():
        return file.text
    if file.name == AIDER_METADATA:
        kept = _read(file.name, present, json.loads, dict)
        added = json.loads(file.text)
        return present if {**kept, **added} == kept else _json({**kept, **added})
    if file.name == AIDER_CONFIG:
        return _merged_config(file, present)
    return _merged_settings(file, present)


def _merged_config(file: ClientFile, present: str) -> str:
    """Merge line by line, so that comments stay; if that fails, write the whole file anew."""
    kept: Mapping[str, Any] = _read(file.name, present, yaml.safe_load, dict)
    ours = yaml.safe_load(file.text)
    if _own_key(kept):
        # The placeholder must not replace the user's key, which may be stored only here.
        ours.pop(_API_KEY, None)
    # aider prefers the key in its file to the environment, so an old placeholder must go.
    stale = _API_KEY not in ours and kept.get(_API_KEY) == NO_KEY
    wanted = {key: value for key, value in kept.items() if not (stale and key == _API_KEY)} | ours
    if wanted == kept:
        return present
    text = present if present.endswith("\n") else present + "\n"
    for line in file.text.splitlines(keepends=True):
        key = line.partition(":")[0]
        if key not in ours:
            continue
        if key not in kept:
            text += line
        elif kept[key] != ours[key]:
            # A function, because a backslash in a replacement text would be read as a group.
            text = re.sub(rf"(?m)^{re.escape(key)}[ \t]*:.*\n", _always(line), text, count=1)
    if stale:
        text = re.sub(rf"(?m)^{_API_KEY}[ \t]*:.*\n", "", text, count=1)
    return _text_of(wanted, text)


def shadows_api_key(report: ClientReport, text: str) -> bool:
    """Return True if aider would use the key in its file instead of the stack's key.

    ``text`` is the content of aider's file.
    """
    kept: Mapping[str, Any] = _read(AIDER_CONFIG, text, yaml.safe_load, dict)
    return report.key_command is not None and _own_key(kept)


def _own_key(kept: Mapping[str, Any]) -> bool:
    return kept.get(_API_KEY) not in (None, NO_KEY)


def _always(text: str) -> Callable[[re.Match[str]], str]:
    return lambda _: text


def _merged_settings(file: ClientFile, present: str) -> str:
    kept: list[Any] = _read(file.name, present, yaml.safe_load, list)
    (ours,) = yaml.safe_load(file.text)
    others = [
        one for one in kept if not (isinstance(one, dict) and one.get("name") == ours["name"])
    ]
    if ours in kept and len(others) == len(kept) - 1:
        return present
    text = (present if present.endswith("\n") else present + "\n") + file.text
    return _text_of([*others, ours], text)


def _text_of(wanted: Any, text: str) -> str:
    """Return the text if it is YAML for this value, so that its comments stay; else a new one."""
    try:
        fits = yaml.safe_load(text) == wanted
    except yaml.YAMLError:
        fits = False
    return text if fits else yaml.safe_dump(wanted, sort_keys=False)


def _json(value: Any) -> str:
    text = json.dumps(value, indent=2, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        # JSON can express half of a surrogate pair; UTF-8 cannot.
        text = json.dumps(value, indent=2)
    return text + "\n"


def _read(name: str, text: str, parse: Callable[[str], Any], kind: type) -> Any:
    try:
        found = parse(text)
    # A YAML tag may raise any of these errors: !!bool x raises a KeyError.
    except (ValueError, LookupError, TypeError, yaml.YAMLError, RecursionError) as error:
        # The text of a YAML error ends with the line and a mark below it, so the parts are used.
        reason = getattr(error, "problem", None) or (str(error) or "too deep").splitlines()[-1]
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark is not None else ""
        fault = f"{name}{line} cannot be read: {reason}"
    else:
        if found is None or isinstance(found, kind):
            return kind() if found is None else found
        fault = f"{name} is not {'a map' if kind is dict else 'a list'}"
    raise StackctlError(fault, hint="mend it, or move it away", exit_code=ExitCode.USAGE)
