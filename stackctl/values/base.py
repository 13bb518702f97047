"""The base class of all values, and the JSON form of documents."""

from __future__ import annotations

import json
from typing import Any, TypeVar

import msgspec

from stackctl.errors import ExitCode, StackctlError
from stackctl.values.cpu_list import CpuList


class Value(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A frozen value of scalars, tuples, CPU lists and other values; it can be hashed."""


V = TypeVar("V", bound=Value)


def to_json(value: Value, *, indent: int = 2) -> str:
    """Return the JSON text of a value, keys in the order of its fields, ending in a newline."""
    try:
        raw = msgspec.json.encode(value, enc_hook=_plain)
    except UnicodeEncodeError:
        # A file name may hold bytes that are not UTF-8; JSON must be UTF-8.
        plain = json.dumps(to_plain(value), ensure_ascii=False)
        raw = plain.encode("utf-8", "replace")
    return msgspec.json.format(raw, indent=indent).decode() + "\n"


def to_plain(value: Value) -> Any:
    """Return a value as dicts, lists and scalars, as they stand in its JSON."""
    return msgspec.to_builtins(value, enc_hook=_plain)


def _plain(value: object) -> str:
    if isinstance(value, CpuList):
        return str(value)
    raise NotImplementedError(type(value).__name__)


def _value(kind: type, raw: object) -> CpuList:
    if kind is not CpuList:
        raise NotImplementedError(kind.__name__)
    if not isinstance(raw, str):
        raise TypeError(f"expected a list such as 0-13,16, got {type(raw).__name__}")
    try:
        return CpuList.parse(raw)
    except StackctlError as error:
        raise ValueError(error.message) from None


def unique_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object without nulls, for json.loads. Raises ValueError for duplicate keys."""
    seen: set[str] = set()
    for name, _ in pairs:
        if name in seen:
            raise ValueError(f"duplicate key {name[:80]!r}")
        seen.add(name)
    # A null means "unknown", as does a missing key.
    return {name: item for name, item in pairs if item is not None}


def _integer(text: str) -> int:
    number = int(text)
    # The JSON encoder writes 64 bits at most, so a larger number could not be written again.
    if not -(2**63) <= number < 2**64:
        raise ValueError(f"{text[:24]} has more than 64 bits")
    return number


def _constant(text: str) -> float:
    raise ValueError(f"{text} is not a number in JSON")


def from_json(text: str | bytes, kind: type[V], *, where: str) -> V:
    """Read a document; ``where`` names the file in errors.

    A null is the same as a missing key. Unknown and duplicate keys, wrong types and a different
    schema version are errors.

    Raises:
        StackctlError: exit 2, with the key path.
    """
    try:
        raw = json.loads(
            text, object_pairs_hook=unique_pairs, parse_int=_integer, parse_constant=_constant
        )
    except (ValueError, RecursionError) as error:
        raise StackctlError(
            f"{where} is not valid JSON: {error}", exit_code=ExitCode.USAGE
        ) from None
    return convert(raw, kind, where=where)


def convert(raw: Any, kind: type[V], *, where: str) -> V:
    """Turn plain data into a value, with errors as in from_json."""
    if isinstance(raw, dict) and "schema" in kind.__struct_fields__:
        expected = next(f.default for f in msgspec.structs.fields(kind) if f.name == "schema")
        found = raw.get("schema", expected)
        if found != expected:
            raise StackctlError(
                f"{where} has schema {found!r}, this stackctl reads {expected!r}",
                hint="write it again with this version, or use the stackctl that wrote it",
                exit_code=ExitCode.USAGE,
            )
    try:
        return msgspec.convert(raw, kind, strict=True, dec_hook=_value)
    except (msgspec.ValidationError, RecursionError, UnicodeEncodeError) as error:
        raise StackctlError(f"{where}: {error}", exit_code=ExitCode.USAGE) from None
