"""Kernel CPU lists."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stackctl.errors import ExitCode, StackctlError
from stackctl.values.base import from_json, to_json, to_plain
from stackctl.values.cpu_list import CpuList
from stackctl.values.plan import Placement


@given(st.sets(st.integers(0, 8191), max_size=60))
def test_what_is_written_reads_back(cpus: set[int]) -> None:
    assert set(CpuList.parse(str(CpuList(cpus)))) == cpus


@given(st.text(alphabet="0123456789-,:/ \n", max_size=20))
def test_any_text_is_a_list_or_an_error(text: str) -> None:
    try:
        cpus = CpuList.parse(text)
    except StackctlError as error:
        assert error.exit_code == ExitCode.USAGE
        assert error.hint
    else:
        assert list(cpus) == sorted(set(cpus))
        assert CpuList.parse(str(cpus)) == cpus


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
    assert tuple(CpuList.parse(text)) == cpus


@pytest.mark.parametrize(
    "text", ["a", "3-1", "-1", "1-", "0-7:1/0", "0x3", "1;2", "0-99999999", "0-65536"]
)
def test_what_is_no_list(text: str) -> None:
    with pytest.raises(StackctlError, match="is not a CPU list"):
        CpuList.parse(text)


@pytest.mark.parametrize(
    ("cpus", "text"), [((), ""), ((5,), "5"), ((0, 1), "0-1"), ((9, 0, 2, 1, 9), "0-2,9")]
)
def test_short_form(cpus: tuple[int, ...], text: str) -> None:
    assert str(CpuList(cpus)) == text


@given(st.sets(st.integers(0, 40)), st.sets(st.integers(0, 40)))
def test_lists_are_sets(one: set[int], other: set[int]) -> None:
    left, right = CpuList(one), CpuList(other)
    for joined, expected in (
        (left & right, one & other), (left | right, one | other), (left - right, one - other),
        (left & other, one & other), (one & right, one & other),
    ):  # fmt: skip
        assert (type(joined), set(joined)) == (CpuList, expected)
        assert list(joined) == sorted(expected)
    assert (left == right, left <= right, bool(left)) == (one == other, one <= other, bool(one))
    assert left != right or hash(left) == hash(right)


def test_lists_are_texts_in_documents() -> None:
    placement = Placement(cpus=CpuList.parse("3,1-2"), mems=CpuList())
    text = to_json(placement)
    for document in (json.loads(text), to_plain(placement)):
        assert (document["cpus"], document["mems"]) == ("1-3", "")
    assert from_json(text, Placement, where="plan") == placement
    for wrong in ('"3-"', "3", '["3"]'):
        with pytest.raises(StackctlError, match=r"plan: .*\$\.cpus") as caught:
            from_json(f'{{"cpus": {wrong}}}', Placement, where="plan")
        assert caught.value.exit_code == ExitCode.USAGE
