"""Quantities as people write and read them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stackctl.errors import ExitCode, StackctlError
from stackctl.quantity import (
    format_bytes,
    format_duration,
    format_number,
    format_share,
    parse_bytes,
    parse_duration,
    parse_tokens,
)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("512", 512),
        ("1k", 1024),
        ("4 GiB", 4 * 2**30),
        ("16g", 16 * 2**30),
        ("16G", 16 * 2**30),
        ("1.5MiB", 3 * 2**19),
        ("2TB", 2 * 10**12),
        ("1 kb", 1000),
        ("7B", 7),
        ("  3m ", 3 * 2**20),
    ],
)
def test_bytes(text: str, count: int) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize(
    "text", ["", "GiB", "-1", "1e3", "4 GiBs", "1,5 GiB", "0x10", "1 Gi B", "9" * 400]
)
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(StackctlError) as caught:
        parse_bytes(text)
    assert caught.value.exit_code == ExitCode.USAGE
    assert repr(text) in caught.value.message
    assert caught.value.hint == "write it like 4 GiB"


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (1536, "1.5 KiB"),
        (241 * 2**20 + 400, "241 MiB"),
        (23_515_000_000, "21.9 GiB"),
        (28_400_000_000, "26.4 GiB"),
        (809_984_000_000, "754 GiB"),
        (5 * 2**50, "5120 TiB"),
        (-3 * 2**30, "-3 GiB"),
    ],
)
def test_bytes_for_people(count: int, text: str) -> None:
    assert format_bytes(count) == text


@given(st.integers(0, 2**50))
def test_printed_bytes_are_close_and_short(count: int) -> None:
    text = format_bytes(count)
    assert len(text) <= len("1023.9 GiB")
    assert abs(parse_bytes(text) - count) <= max(0.051 * count, 0)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 90), ("90s", 90), ("2m", 120), ("1h30m", 5400), ("1h", 3600), ("1.5s", 1.5),
     ("1h 2m 3s", 3723), ("2M", 120)],
)  # fmt: skip
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", " ", "m", "1d", "-5", "1.5m", "10m5h", "two"])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(StackctlError, match="is not a duration") as caught:
        parse_duration(text)
    assert caught.value.exit_code == ExitCode.USAGE


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (38.9, "0:38"), (60, "1:00"), (3723, "1:02:03")]
)
def test_elapsed_time(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


@pytest.mark.parametrize(
    ("text", "tokens"), [("8192", 8192), ("16K", 16384), ("16k", 16000), ("25.6k", 25600)]
)
def test_tokens(text: str, tokens: int) -> None:
    assert parse_tokens(text) == tokens


@pytest.mark.parametrize("text", ["", "K", "1M", "-1", "8 192", "9" * 400])
def test_what_is_no_number_of_tokens(text: str) -> None:
    with pytest.raises(StackctlError, match="is not a number of tokens"):
        parse_tokens(text)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"), (0.0, "0"), (0.00421, "0.00421"), (0.30000000000000004, "0.3"), (9.996, "10"),
        (12.34, "12.3"), (99.96, "100"), (120.4, "120"), (999.7, "1,000"), (123456.7, "123,457"),
        (-3.14159, "-3.14"), (float("inf"), "inf"),
    ],
)  # fmt: skip
def test_a_number(value: float, text: str) -> None:
    assert format_number(value) == text


@given(st.floats(min_value=1e-9, max_value=1e15))
def test_a_number_is_told_to_three_digits_and_without_exponent(value: float) -> None:
    text = format_number(value)
    assert "e" not in text
    assert float(text.replace(",", "")) == pytest.approx(value, rel=0.005001)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0 %"), (0.125, "12.5 %"), (0.6, "60 %"), (0.228, "23 %"), (1, "100 %")],
)
def test_a_share(value: float, text: str) -> None:
    assert format_share(value) == text
