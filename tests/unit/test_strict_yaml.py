"""YAML without surprises."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from stackctl.errors import ExitCode, StackctlError
from stackctl.sources.strict_yaml import parse_document, parse_scalar


def fails(text: str) -> StackctlError:
    with pytest.raises(StackctlError) as caught:
        parse_document(text, where="p.yaml")
    assert caught.value.exit_code == ExitCode.USAGE
    return caught.value


@pytest.mark.parametrize(
    ("text", "data"),
    [
        ("", {}),
        ("# only a comment\n", {}),
        ("---\na: 1\n", {"a": 1}),
        ("a: 0\nb: -7\nc: +3\n", {"a": 0, "b": -7, "c": 3}),
        ("a: 1.5\nb: -0.25\nc: 1.5e+3\n", {"a": 1.5, "b": -0.25, "c": 1500.0}),
        ("a: true\nb: false\n", {"a": True, "b": False}),
        ("a:\nb: null\nc: ~\n", {"a": None, "b": None, "c": None}),
        ("a: word\nb: two words\nc: 'on'\nd: \"010\"\n",
         {"a": "word", "b": "two words", "c": "on", "d": "010"}),
        ("a: |\n  two\n  lines\n", {"a": "two\nlines\n"}),
        ("a: [1, x, {b: 2}]\n", {"a": [1, "x", {"b": 2}]}),
        # A key is text whatever it looks like.
        ("on: 1\n010: 2\n", {"on": 1, "010": 2}),
        ("a: 0-13,16\nb: 8080:80x\n", {"a": "0-13,16", "b": "8080:80x"}),
    ],
)  # fmt: skip
def test_what_is_read(text: str, data: Any) -> None:
    assert parse_document(text, where="p.yaml").data == data


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("a: 1\nb: on\n", "p.yaml:2: on means different things", "did you mean true?"),
        ("a: No\n", "p.yaml:1: No means different things", "did you mean false?"),
        ("a: TRUE\n", "p.yaml:1: TRUE means different things", "did you mean true?"),
        ("a:\n  b: 010\n", "p.yaml:2: 010 is not a plain decimal number", "did you mean 10?"),
        ("a: 0x1f\n", "p.yaml:1: 0x1f is not a plain decimal", 'write "0x1f"'),
        ("a: 1_000\n", "p.yaml:1: 1_000 is not a plain decimal", "did you mean 1000?"),
        ("a: 1:30\n", "p.yaml:1: 1:30 is not a plain decimal", 'write "1:30"'),
        ("a: .5\n", "p.yaml:1: .5 is not a plain decimal", 'write ".5"'),
        ("a: .inf\n", "p.yaml:1: .inf is not a plain decimal", 'write ".inf"'),
        ("a: 2026-11-21\n", "p.yaml:1: 2026-11-21 would be read as a timestamp", "2026-11-21"),
        ("a: 1\nb: 2\na: 3\n", "p.yaml:3: duplicate key 'a' (first on line 1)", None),
        ("a:\n  - b: 1\n    b: 2\n", "p.yaml:3: duplicate key 'b' (first on line 2)", None),
        ("a: &x 1\nb: *x\n", "p.yaml:2: anchors and aliases", "write the value out"),
        ("a: &x {b: 1}\nc:\n  <<: *x\n", "p.yaml:3: a key must be a plain word", None),
        ("[a, b]: 1\n", "p.yaml:1: a key must be a plain word", None),
        ("a: !x {b: 1}\n", "p.yaml:1: tags such as !x are not allowed", "plain values"),
        ("a: !!set {b}\n", "tags such as", None),
        ("a: =\n", "p.yaml:1: = would be read as a value", 'write "="'),
        ("a: !!python/object/apply:os.system [ls]\n", "tags such as", None),
        ("a: !x y\n", "tags such as !x are not allowed", None),
        ("a: !!binary aGk=\n", "tags such as", None),
        ("a: [1\n", "p.yaml:2: ", None),
        ("a: 1\n b: 2\n", "p.yaml:2: ", None),
        ("a: 'x\n", "p.yaml:2: ", None),
        ("a: \x00\n", "p.yaml:1: ", None),
        ("a: 1\n---\nb: 2\n", "p.yaml:2: ", None),
        ("\ta: 1\n", "p.yaml:1: ", None),
        (f"a: {'9' * 5000}\n", "p.yaml:1: 999999999999999999999999... is too large", None),
        ("a: 99999999999999999999\n", "p.yaml:1: ", None),
        ("[" * 5000, "p.yaml:1: ", None),
    ],
)
def test_surprises_are_errors(text: str, message: str, hint: str | None) -> None:
    error = fails(text)
    assert message in error.message
    if hint is not None:
        assert hint in (error.hint or "")


def test_every_key_has_its_line() -> None:
    document = parse_document("a: 1\n\nb:\n  c:\n    - 1\n    - d: 2\n", where="p.yaml")
    assert document.line(("a",)) == 1
    assert document.line(("b", "c", 1, "d")) == 6
    # What has no line of its own has that of what is above it.
    assert document.line(("b", "c", "x", "y")) == 4
    assert document.line(("z",)) == 1
    assert document.error(("b", "c"), "wrong").message == "p.yaml:4: wrong"


@pytest.mark.parametrize(
    ("text", "value"),
    [("", ""), (" ", ""), ("5", 5), ("true", True), ("mmap", "mmap"), ("q8_0", "q8_0"),
     ("0-3,5", "0-3,5"), ("file:/a b.gguf", "file:/a b.gguf"), ('"on"', "on"), ("null", None),
     ("[1, 2]", [1, 2])],
)  # fmt: skip
def test_values_of_the_command_line(text: str, value: Any) -> None:
    assert parse_scalar(text, where="--set x") == value


def test_values_of_the_command_line_follow_the_same_rules() -> None:
    with pytest.raises(StackctlError, match="--set x") as caught:
        parse_scalar("on", where="--set x")
    assert "did you mean true?" in (caught.value.hint or "")


# PyYAML's writer has faults of its own with other line breaks than \n.
TEXT = st.text(st.characters(codec="latin-1", exclude_categories=["Cc"]), max_size=8)
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**16), 10**16) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner),
    max_leaves=8,
)


@given(st.dictionaries(TEXT, PLAIN, max_size=4))
def test_plain_data_is_read_as_written(data: dict[str, Any]) -> None:
    text = yaml.safe_dump(data, allow_unicode=True)
    if "&id" not in text:
        try:
            assert parse_document(text, where="p.yaml").data == data
        except StackctlError as error:
            # Keys that YAML does not take for words are written in another form.
            assert "a key must be a plain word" in error.message or "tags" in error.message


@given(st.text(alphabet="ab:-[]{},'\"\n #&*!|>%@`01.?~", max_size=30))
def test_any_text_is_data_or_an_error(text: str) -> None:
    try:
        parse_document(text, where="p.yaml")
    except StackctlError as error:
        assert error.message.startswith("p.yaml:")
        assert "\n" not in error.message
