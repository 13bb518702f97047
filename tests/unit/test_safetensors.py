"""The safetensors header reader: what it finds, and what it makes of damaged and hostile files."""

from __future__ import annotations

import contextlib
import struct
import time
from pathlib import Path

import pytest
from checkpoints import PLAIN, raw_header, safetensors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stackctl.errors import StackctlError
from stackctl.sources import safetensors as module
from stackctl.sources.safetensors import read_safetensors

ENTRY = b'"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}'


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "is truncated: it has 0 bytes"),
        (struct.pack("<Q", 50) + b"{}", "ends inside its header"),
        (struct.pack("<Q", 1 << 60) + b"{}", "its header would be"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a git-lfs pointer"),
        (b"<!DOCTYPE html><html>", "its header would be"),
        (raw_header(b"{" + ENTRY + b"," + ENTRY + b"}", 2), "tensor 'a' is there twice"),
        (raw_header(b"{" + ENTRY + b"}", 1), "is truncated"),
        (raw_header(b"{" + ENTRY + b"}", 3), "is longer than it says"),
        (raw_header(b"{" + ENTRY + b"} x", 2), "text after the end"),
        (raw_header(b"{" + ENTRY + b",", 2), "not understood at byte"),
        (raw_header(b"{" + ENTRY.replace(b"U8", b"Q4") + b"}", 2), "unknown type Q4"),
        (raw_header(b"{" + ENTRY.replace(b"[2]", b"[3]") + b"}", 2), "shape [3] lies at 0 to 2"),
        (raw_header(b"{" + ENTRY.replace(b"[2]", b"[2 1]") + b"}", 2), "shape that is not"),
        (raw_header(b"{" + ENTRY.replace(b"[2]", b"[-2]") + b"}", 2), "not understood"),
        (raw_header(b"{" + ENTRY.replace(b'"shape":[2]', b'"dtype":"U8"') + b"}", 2), "not have"),
        (raw_header(b"{" + ENTRY.replace(b"[0,2]", b"[2,4]") + b"}", 4), "a gap or overlaps"),
        (raw_header(b'{"a":1}'), "not understood"),
        (raw_header(b"{" + ENTRY.replace(b"a", b"\\x", 1) + b"}", 2), "of a tensor is not under"),
        (raw_header(b"{" + ENTRY.replace(b"a", b"\\", 1) + b"}", 2), "not understood at byte"),
        (raw_header(b"{" + ENTRY.replace(b"a", b"n" * 600, 1) + b"}", 2), "600 bytes long"),
        (
            raw_header(b"{" + ENTRY.replace(b"[2]", b"[" + b"9" * 18 + b",9999999999]") + b"}", 2),
            "lies at",
        ),
        (raw_header(b"{" + ENTRY.replace(b"[2]", b"[1,1,1,1,1,1,1,1,2]") + b"}", 2), "9 dim"),
        (raw_header(b'{"__metadata__":{},"__metadata__":{}}'), "two blocks of metadata"),
    ],
)
def test_safetensors_damage_is_named(tmp_path: Path, raw: bytes, message: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(raw)
    with pytest.raises(StackctlError) as caught:
        read_safetensors(path)
    assert message in caught.value.message
    assert str(path) in caught.value.message


def test_safetensors_as_other_writers_make_them(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    text = (
        b'{ "b" : {"shape" : [ ], "data_offsets":[2,6] , "dtype":"F32"},\n'
        b'"__metadata__": {"format":"pt", "x": "}\\"{"}, "t.\xc3\xa9":'
        b'{"data_offsets": [0, 2],"dtype":"U8","shape":[2 , 1]} }   '
    )
    path.write_bytes(raw_header(text, 6))
    tensors = read_safetensors(path).tensors
    assert {name: (t.dtype, t.shape, t.bytes) for name, t in tensors.items()} == {
        "b": ("F32", (), 4),
        "t.é": ("U8", (2, 1), 2),
    }
    for escaped, label in ((b"t.\\u00e9", "t.é"), (b'a\\"}', 'a"}'), (b"\\ud800", "?")):
        path.write_bytes(raw_header(b"{" + ENTRY.replace(b"a", escaped, 1) + b"}", 2))
        assert list(read_safetensors(path).tensors) == [label]
    path.write_bytes(raw_header(b"{}"))
    assert not read_safetensors(path).tensors


def test_hostile_safetensors_are_refused_quickly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.safetensors"
    for text in (
        b'{"' + b"a" * 4_000_000,
        b'{"a":{"shape":[' + b"1," * 2_000_000,
        b'{"__metadata__":{' + b'"a":"b",' * 500_000,
        b"{" + b"[" * 4_000_000,
        b'{"a":{' + b" " * 4_000_000,
    ):
        path.write_bytes(raw_header(text))
        start = time.perf_counter()
        with pytest.raises(StackctlError):
            read_safetensors(path)
        assert time.perf_counter() - start < 1
    monkeypatch.setattr(module, "MAX_TENSORS", 2)
    path.write_bytes(safetensors(PLAIN))
    with pytest.raises(StackctlError, match="more than 2 tensors"):
        read_safetensors(path)


VALID = safetensors(PLAIN)
FUZZ = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
CHANGES = st.lists(
    st.tuples(st.integers(0, 500), st.integers(0, 6), st.binary(max_size=6)), max_size=4
)


def mutated(raw: bytes, changes: list[tuple[int, int, bytes]]) -> bytes:
    out = bytearray(raw)
    for at, length, new in changes:
        out[at : at + length] = new
    return bytes(out)


@FUZZ
@given(CHANGES)
def test_mutated_safetensors_fail_in_one_way_only(
    tmp_path: Path, changes: list[tuple[int, int, bytes]]
) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(mutated(VALID, changes))
    with contextlib.suppress(StackctlError):
        read_safetensors(path)
