"""Values: frozen all the way down, and the same after a round trip through JSON."""

from __future__ import annotations

import importlib
import json
import pkgutil
import types
import typing
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec import inspect
from samples import EPYC, GEMMA, HOSTS, LATENCY, plan

import stackctl.values
from stackctl.errors import ExitCode, StackctlError
from stackctl.values.base import Value, convert, from_json, to_json
from stackctl.values.cpu_list import CpuList
from stackctl.values.generation import Generation, Outcome, UnitFile, UnitSet
from stackctl.values.host import UNLIMITED, Host
from stackctl.values.model import Model
from stackctl.values.plan import Plan

for _module in pkgutil.iter_modules(stackctl.values.__path__):
    importlib.import_module(f"stackctl.values.{_module.name}")


def _below(kind: type[Value]) -> list[type[Value]]:
    return [one for sub in kind.__subclasses__() for one in (sub, *_below(sub))]


KINDS = sorted(_below(Value), key=lambda kind: kind.__name__)
DOCUMENTS = [kind for kind in KINDS if "schema" in kind.__struct_fields__]


def instances(kind: type[msgspec.Struct]) -> st.SearchStrategy[Any]:
    """Any instance of a value, from its types; nested ones too."""
    hints = typing.get_type_hints(kind, include_extras=True)
    fields = {
        field.encode_name: _any(inspect.type_info(hints[field.encode_name]))
        for field in msgspec.structs.fields(kind)
    }
    return st.builds(kind, **fields)


#: The widest integer that JSON carries unchanged through msgspec.
WHOLE = st.integers(-(2**63), UNLIMITED)


def _any(kind: inspect.Type) -> st.SearchStrategy[Any]:
    match kind:
        case inspect.Metadata(type=described):
            return _any(described)
        case inspect.BoolType():
            return st.booleans()
        case inspect.IntType(ge=low, le=high):
            return WHOLE if low is None else st.integers(low, high)
        case inspect.FloatType(gt=above, le=most):
            return st.floats(above, most, exclude_min=above is not None, allow_nan=False,
                             allow_infinity=False)  # fmt: skip
        case inspect.StrType(pattern=None):
            return st.text(st.characters(codec="utf-8"), max_size=8)
        case inspect.NoneType():
            return st.none()
        case inspect.LiteralType(values=values):
            return st.sampled_from(values)
        case inspect.VarTupleType(item_type=item):
            return st.lists(_any(item), max_size=2).map(tuple)
        case inspect.TupleType(item_types=items):
            return st.tuples(*map(_any, items))
        case inspect.UnionType(types=union):
            return st.one_of(*map(_any, union))
        case inspect.StructType(cls=cls):
            return instances(cls)
        case inspect.CustomType(cls=cls) if cls is CpuList:
            return st.frozensets(st.integers(0, 300)).map(CpuList)
    raise AssertionError(f"a value may not hold {kind}")


def test_all_kinds_are_looked_at() -> None:
    assert {Host, Model, Plan, Generation} <= set(DOCUMENTS)
    assert len(KINDS) > 20


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_kinds_are_frozen_and_strict(kind: type[Value]) -> None:
    config = kind.__struct_config__
    assert config.frozen
    assert config.forbid_unknown_fields
    assert kind.__doc__


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_optional_fields_default_to_none(kind: type[Value]) -> None:
    """Reading drops nulls, so that a field which may be null must not be required."""
    hints = typing.get_type_hints(kind)
    for field in msgspec.structs.fields(kind):
        hint = hints[field.encode_name]
        union = typing.get_origin(hint) in (typing.Union, types.UnionType)
        if union and types.NoneType in typing.get_args(hint):
            assert field.default is None, f"{kind.__name__}.{field.encode_name}"


@pytest.mark.parametrize("kind", DOCUMENTS, ids=lambda kind: kind.__name__)
def test_schema_is_the_first_key_and_names_the_version(kind: type[Value]) -> None:
    first = msgspec.structs.fields(kind)[0]
    assert first.encode_name == "schema"
    assert first.default.startswith("stackctl.")
    assert first.default.endswith("/1")
    assert len({document.__struct_defaults__[0] for document in DOCUMENTS}) == len(DOCUMENTS)


@pytest.mark.parametrize("kind", DOCUMENTS, ids=lambda kind: kind.__name__)
def test_documents_survive_json_and_can_be_hashed(kind: type[Value]) -> None:
    @settings(
        max_examples=15, deadline=None, database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )  # fmt: skip
    @given(instances(kind))
    def check(value: Value) -> None:
        text = to_json(value)
        assert next(iter(json.loads(text))) == "schema"
        again = from_json(text, kind, where="test")
        assert again == value
        assert to_json(again) == text
        assert hash(again) == hash(value)
        field = value.__struct_fields__[1]
        with pytest.raises(AttributeError):
            setattr(value, field, None)

    check()


GENERATION = Generation(
    number=3,
    stack="cpu",
    created="2026-11-21T12:00:00Z",
    image="localhost/x",
    image_id="0" * 64,
    units=UnitSet(
        stack="cpu",
        service="cpu.service",
        container="stackctl-cpu",
        files=(UnitFile(name="cpu.container", text="[Container]\n"),),
    ),
    plan=plan(),
    host=EPYC,
    outcome=Outcome(state="ready", changed="2026-11-21T12:00:30Z", ready_s=30.5),
)


@pytest.mark.parametrize(
    "value", [*HOSTS.values(), GEMMA, LATENCY, plan(), GENERATION], ids=lambda v: type(v).__name__
)
def test_real_documents_survive_json(value: Value) -> None:
    assert from_json(to_json(value), type(value), where="test") == value
    assert hash(value) == hash(from_json(to_json(value), type(value), where="test"))


def test_numbers_beyond_64_bits_are_an_error_not_a_crash() -> None:
    text = f'{{"memory": {{"total_bytes": {10**40}}}}}'
    with pytest.raises(StackctlError) as caught:
        from_json(text, Host, where="h.json")
    assert caught.value.exit_code == ExitCode.USAGE


def test_unlimited_survives() -> None:
    text = to_json(EPYC)
    assert json.loads(text)["limits"]["memlock_bytes"] == UNLIMITED == 2**64 - 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"cpu": {"coers": 2}}', ["h.json", "coers", "$.cpu"]),
        ('{"cpu": {"numa": [{"id": 0, "size": 1}]}}', ["size", "$.cpu.numa[0]"]),
        ('{"cpu": {"cores": "two"}}', ["Expected `int", "$.cpu.cores"]),
        ('{"cpu": {"cores": true}}', ["Expected `int", "$.cpu.cores"]),
        ('{"cpu": {"cores": "2"}}', ["Expected `int", "$.cpu.cores"]),
        ('{"cpu": {"numa": [{}]}}', ["required field `id`", "$.cpu.numa[0]"]),
        ('{"schema": "stackctl.host/2"}', ["stackctl.host/2", "stackctl.host/1"]),
        ('{"schema": "stackctl.plan/1"}', ["stackctl.plan/1", "stackctl.host/1"]),
        ('{"scope": "system", "scope": "user"}', ["h.json", "duplicate key 'scope'"]),
        ("{", ["h.json", "not valid JSON"]),
        ("", ["h.json", "not valid JSON"]),
        ("[]", ["h.json", "Expected `object`"]),
        ("NaN", ["h.json"]),
        ("[" * 100_000, ["h.json", "not valid JSON"]),
    ],
)
def test_what_is_wrong_with_a_document_is_said(text: str, words: list[str]) -> None:
    with pytest.raises(StackctlError) as caught:
        from_json(text, Host, where="h.json")
    assert caught.value.exit_code == ExitCode.USAGE
    for word in words:
        assert word in caught.value.message


def test_bytes_that_are_no_text() -> None:
    with pytest.raises(StackctlError, match=r"h\.json is not valid JSON"):
        from_json(b"\xff\xfe\x00", Host, where="h.json")


def test_a_null_is_a_missing_key() -> None:
    host = from_json('{"cpu": {"cores": null, "l3": null}, "memory": null}', Host, where="x")
    assert host == Host()


def test_plain_data_of_another_schema_is_refused() -> None:
    with pytest.raises(StackctlError) as caught:
        convert({"schema": "stackctl.model/7"}, Model, where="m")
    assert caught.value.hint


def test_text_outside_ascii_stays_readable() -> None:
    assert "Müller · 模型" in to_json(msgspec.structs.replace(GEMMA, name="Müller · 模型"))
