"""The keys of profile files by their types, and the keys that ``--set`` changes.

Everything is derived from the types in ``values/profile.py``. A new key of ``Settings`` needs no
change here; one of ``ProfileFile`` that ``--set`` may change is added to ``_SETTABLE``.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import Any, Literal, get_args, get_origin, get_type_hints

import msgspec

from stackctl.errors import ExitCode, StackctlError, did_you_mean
from stackctl.sources import strict_yaml
from stackctl.values.profile import Overrides, ProfileFile, Settings

#: Keys of a profile that --set may change: settings, and the few that are not per objective.
_SETTABLE = (*Settings.__struct_fields__, "engine")


@functools.cache
def _types(struct: type[msgspec.Struct]) -> dict[str, Any]:
    return get_type_hints(struct)


def _alternatives(struct: type[msgspec.Struct], key: str) -> tuple[Any, ...]:
    """Return the types that the value of a key may have; none for an unknown key."""
    kind = _types(struct).get(key)
    if kind is None or get_origin(kind) in (dict, Literal):
        return () if kind is None else (kind,)
    return get_args(kind) or (kind,)


def nested_type(struct: type[msgspec.Struct], key: str) -> type[msgspec.Struct] | None:
    """Return the type of the keys below a key; None if its value is no mapping with fixed keys."""
    kinds = _alternatives(struct, key)
    return next(
        (kind for kind in kinds if isinstance(kind, type) and issubclass(kind, msgspec.Struct)),
        None,
    )


def known_keys(path: Sequence[str | int]) -> tuple[str, ...]:
    """Return the keys that a profile may have in the mapping at a path."""
    struct: type[msgspec.Struct] = ProfileFile
    for step in path:
        struct = nested_type(struct, str(step)) or struct
    return struct.__struct_fields__


def _is_switch(key: str) -> bool:
    return any(
        get_origin(kind) is Literal and {"on", "off"} <= set(get_args(kind))
        for kind in _alternatives(ProfileFile, key)
    )


def _has_keys(key: str) -> bool:
    """Return True if the value of a key is a mapping, whose keys --set names after a dot."""
    kinds = _alternatives(ProfileFile, key)
    return nested_type(ProfileFile, key) is not None or any(get_origin(k) is dict for k in kinds)


#: Keys with the values on and off, which YAML readers understand as words or as booleans.
SWITCHES = frozenset(filter(_is_switch, ProfileFile.__struct_fields__))
_WITH_KEYS = frozenset(filter(_has_keys, _SETTABLE))


def parse_overrides(overrides: Overrides) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return the overrides as data of a profile, and the keys that they set.

    Raises:
        StackctlError: exit 2 for a key that does not exist or a value that is not valid.
    """
    data: dict[str, Any] = {}
    keys: list[str] = []
    for text in overrides.sets:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise StackctlError(
                f"--set {text}: no value",
                hint="write it like --set context=4096",
                exit_code=ExitCode.USAGE,
            )
        head, *rest = key.split(".")
        if head not in _SETTABLE or bool(rest) != (head in _WITH_KEYS) or len(rest) > 1:
            hint = did_you_mean(
                head, _SETTABLE, f"engine options go under engine_args: --set engine_args.{text}"
            )
            raise StackctlError(f"--set {key}: no such key", hint=hint, exit_code=ExitCode.USAGE)
        parsed = strict_yaml.parse_scalar(value, where=f"--set {key}", switch=head in SWITCHES)
        if head == "engine_args":
            check_argument_name(
                rest[0],
                StackctlError(f"--set {key}: {rest[0]!r}", exit_code=ExitCode.USAGE),
            )
        target = data.setdefault(head, {}) if rest else data
        target[rest[0] if rest else head] = parsed
        keys.append(key)
    if overrides.model is not None:
        data["model"] = overrides.model
        keys.append("model")
    return data, tuple(keys)


def check_argument_name(name: str, error: StackctlError) -> None:
    """Check that a name is a long option without dashes, such as ``threads``.

    Otherwise extend the message of ``error`` and raise it.
    """
    if not re.fullmatch(r"[a-z][a-z0-9-]+", name):
        error.message += " is not a long option name without dashes"
        error.hint = "write threads: 14 for --threads 14; short options have a long name too"
        raise error
