"""Kernel CPU lists."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stackctl.errors import ExitCode, StackctlError
from stackctl.values.cpulist import format_cpulist, parse_cpulist


@given(st.sets(st.integers(0, 8191), max_size=60))
def test_what_is_written_reads_back(cpus: set[int]) -> None:
    assert set(parse_cpulist(format_cpulist(cpus))) == cpus


@given(st.text(alphabet="0123456789-,:/ \n", max_size=20))
def test_any_text_is_a_list_or_an_error(text: str) -> None:
    try:
        cpus = parse_cpulist(text)
    except StackctlError as error:
        assert error.exit_code == ExitCode.USAGE
        assert error.hint
    else:
        assert list(cpus) == sorted(set(cpus))
        assert parse_cpulist(format_cpulist(cpus)) == cpus


@pytest.mark.parametrize(
    ("text", "cpus"),
    [
        ("", ()),
        ("\n", ()),
        ("0", (0,)),
        ("3,1, 2", (1, 2, 3)),
        ("0-13,16", (*range(14), 16)),
        ("0-3,2-5", (0, 1, 2, 3, 4, 5)),
        # The kernel's own example: the first 2 of every 4.
        ("0-9:2/4", (0, 1, 4, 5, 8, 9)),
        ("0-3:0/2", ()),
    ],
)
def test_lists(text: str, cpus: tuple[int, ...]) -> None:
    assert parse_cpulist(text) == cpus


@pytest.mark.parametrize(
    "text", ["a", "3-1", "-1", "1-", "0-7:1/0", "0x3", "1;2", "0-99999999", "0-65536"]
)
def test_what_is_no_list(text: str) -> None:
    with pytest.raises(StackctlError, match="is not a CPU list"):
        parse_cpulist(text)


@pytest.mark.parametrize(
    ("cpus", "text"), [((), ""), ((5,), "5"), ((0, 1), "0-1"), ((9, 0, 2, 1, 9), "0-2,9")]
)
def test_short_form(cpus: tuple[int, ...], text: str) -> None:
    assert format_cpulist(cpus) == text
