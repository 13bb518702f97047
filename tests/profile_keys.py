"""Write docs/profile-keys.md from the schema of profiles: ``make reference``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from stackctl.quantity import format_bytes
from stackctl.sources.profiles import profile_schema
from stackctl.values.profile import Profile

TARGET = Path(__file__).resolve().parent.parent / "docs" / "profile-keys.md"
HEAD = """\
# Keys of a profile

This file is generated from `stackctl/values/profile.py` by `make reference`. Do not edit it.

A profile is a YAML file (see the [guide](profiles.md)). `--set KEY=VALUE` sets a key for
one run, a nested key by its path: `--set placement.nodes=0-1`. `stackctl profiles show NAME` prints
the values that apply, and `stackctl profiles schema` prints the JSON Schema. If a key has no fixed
default, the plan derives the value: `stackctl plan PROFILE --explain` shows it with its reason.

| key | values | default | meaning |
|---|---|---|---|
"""
FOOT = """
Each key of `objectives.latency` and `objectives.throughput` has the meaning of the same key at the
top level: `{first}` to `{last}` in this table.
"""


def reference() -> str:
    """Return the text of docs/profile-keys.md."""
    schema = profile_schema()
    definitions = schema["$defs"]
    defaults = msgspec.to_builtins(Profile(name="", engine="", stack="", objective="latency"))
    del defaults["objective"]  # Required there, but a profile file may omit it.
    # Profile files write sizes as text, without the unit in the name.
    sizes = {key: value for key, value in defaults.items() if key.endswith("_bytes")}
    defaults |= {key.removesuffix("_bytes"): format_bytes(size) for key, size in sizes.items()}
    rows = _rows(definitions["ProfileFile"], definitions, defaults, "")
    # The keys of a profile begin with those that an objective may set too.
    first, *_, last = definitions["Settings"]["properties"]
    foot = FOOT.format(first=first, last=last)
    return HEAD + "".join(f"| {' | '.join(row)} |\n" for row in rows) + foot


def _rows(
    struct: dict[str, Any], definitions: dict[str, Any], defaults: dict[str, Any], prefix: str
) -> Iterator[tuple[str, str, str, str]]:
    for name, field in struct["properties"].items():
        path = prefix + name
        options = field.get("anyOf", [field])
        nested = [option["$ref"] for option in options if "$ref" in option]
        values = " or ".join(text for option in options if (text := _values(option)))
        default = None if nested else defaults.get(name)
        shown = "" if default in (None, "", {}, [], ()) else f"`{_yaml(default)}`"
        yield f"`{path}`", values, shown, field["description"]
        below = definitions[nested[0].removeprefix("#/$defs/")] if nested else None
        if below is not None and below["title"] != "Settings":
            yield from _rows(below, definitions, defaults.get(name, {}), f"{path}.")


def _values(option: dict[str, Any]) -> str:
    """Return the values that one alternative of a key takes; empty for null."""
    if "enum" in option:
        return ", ".join(f"`{value}`" for value in option["enum"])
    kind = option.get("type")
    if kind in ("integer", "number"):
        text = "integer" if kind == "integer" else "number"
        low, above = option.get("minimum"), option.get("exclusiveMinimum")
        high = option.get("maximum")
        parts = [
            f"at least {low}" if low is not None else "",
            f"above {above:g}" if above is not None else "",
            f"at most {high}" if high is not None else "",
        ]
        return ", ".join([text, *(part for part in parts if part)])
    if kind == "array":
        return f"list of {_values(option['items'])}"
    names = {"string": "text", "boolean": "`true`, `false`", "object": "mapping", "null": ""}
    return "mapping" if "$ref" in option else names[str(kind)]


def _yaml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
