"""The GGUF header reader: what it finds, and what it makes of damaged and hostile files."""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from ggufs import LLAMA, TENSORS, As, Tensor, Value, gguf, text, write
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stackctl.errors import ExitCode, StackctlError
from stackctl.sources import gguf as module
from stackctl.sources.gguf import GgufArray, GgufHeader, read_header


def read(tmp_path: Path, raw: bytes) -> GgufHeader:
    path = tmp_path / "m.gguf"
    path.write_bytes(raw)
    return read_header(path)


def fails(tmp_path: Path, raw: bytes) -> StackctlError:
    with pytest.raises(StackctlError) as caught:
        read(tmp_path, raw)
    assert caught.value.exit_code == ExitCode.FAILED
    assert str(tmp_path / "m.gguf") in caught.value.message
    return caught.value


@pytest.mark.parametrize("version", [2, 3])
def test_scalars_of_every_type_are_read(tmp_path: Path, version: int) -> None:
    values: dict[str, Value] = {
        "u8": As("u8", 255),
        "i8": As("i8", -1),
        "u16": As("u16", 65535),
        "i16": As("i16", -2),
        "u32": 1 << 31,
        "i32": As("i32", -3),
        "f32": 0.5,
        "u64": As("u64", 1 << 63),
        "i64": As("i64", -4),
        "f64": As("f64", 0.1),
        "yes": True,
        "text": "grüße",
        "nothing": "",
    }
    header = read(tmp_path, gguf(values, version=version))
    assert header.version == version
    plain = {k: v.value if isinstance(v, As) else v for k, v in values.items()}
    assert dict(header.metadata) == plain
    assert header.metadata["yes"] is True
    assert header.tensors.count == 0
    assert header.expected_size == header.size == header.data_offset


def test_arrays_are_measured_and_short_whole_numbers_kept(tmp_path: Path) -> None:
    values: dict[str, Value] = {
        "tokens": ["a", "", "ü" * 70_000],
        "floats": As("f32", [1.0, 2.0]),
        "heads": As("i32", [1, -2, 3]),
        "flags": [True, False],
        "bytes": As("u8", [7] * 1024),
        "long": As("u8", [7] * 1025),
        "none": As("u32", []),
        "last": 5,
    }
    header = read(tmp_path, gguf(values))
    assert dict(header.arrays) == {
        "tokens": GgufArray("string", 3),
        "floats": GgufArray("float32", 2),
        "heads": GgufArray("int32", 3, (1, -2, 3)),
        "flags": GgufArray("bool", 2, (True, False)),
        "bytes": GgufArray("uint8", 1024, (7,) * 1024),
        "long": GgufArray("uint8", 1025),
        "none": GgufArray("uint32", 0, ()),
    }
    assert dict(header.metadata) == {"last": 5}


def test_a_long_string_is_measured_not_kept(tmp_path: Path) -> None:
    header = read(tmp_path, gguf({"json": "x" * 3_000_000, "last": 1}))
    assert dict(header.long_texts) == {"json": 3_000_000}
    assert dict(header.metadata) == {"last": 1}


def test_string_arrays_that_cross_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = gguf({"tokens": ["x" * (n % 19) for n in range(500)], "last": 1}, TENSORS)
    for chunk in (8, 9, 13, 64, 1000):
        monkeypatch.setattr(module, "_CHUNK", chunk)
        header = read(tmp_path, raw)
        assert header.arrays["tokens"].length == 500
        assert header.metadata["last"] == 1
        assert header.tensors.count == 3


def test_tensors_add_up(tmp_path: Path) -> None:
    tensors = [
        Tensor("a", (64, 4), "Q8_0"),  # 272 bytes, padded to 288
        Tensor("blk.0.ffn_up_exps.weight", (256, 3, 2), "Q4_K"),
        Tensor("c", (5,), "F32"),
        Tensor("scalar", (), "F32"),
        Tensor("empty", (0, 3), "F16"),
    ]
    header = read(tmp_path, gguf({}, tensors))
    summary = header.tensors
    assert (summary.count, summary.elements) == (5, 256 + 1536 + 5 + 1)
    assert summary.bytes == 272 + 864 + 20 + 4
    assert (summary.expert_elements, summary.expert_bytes) == (1536, 864)
    assert dict(summary.counts) == {"Q8_0": 1, "Q4_K": 1, "F32": 2, "F16": 1}
    assert dict(summary.elements_by_type) == {"Q8_0": 256, "Q4_K": 1536, "F32": 6, "F16": 0}
    assert header.data_offset % 32 == 0
    assert header.expected_size == header.size


@pytest.mark.parametrize(
    ("kind", "elements", "size"),
    [
        ("MXFP4", 32, 17),
        ("NVFP4", 64, 36),
        ("TQ1_0", 256, 54),
        ("TQ2_0", 256, 66),
        ("IQ1_M", 256, 56),
        ("IQ4_XS", 256, 136),
        ("Q2_K", 256, 84),
        ("BF16", 3, 6),
    ],
)
def test_block_sizes(tmp_path: Path, kind: str, elements: int, size: int) -> None:
    assert read(tmp_path, gguf({}, [Tensor("t", (elements,), kind)])).tensors.bytes == size


def test_tables_of_the_vocabulary_are_told_apart(tmp_path: Path) -> None:
    tensors = [Tensor("token_embd.weight", (64, 4), "Q8_0"), Tensor("output.weight", (8,))]
    tables = read(tmp_path, gguf({}, tensors)).tensors.tables
    assert dict(tables) == {"token_embd.weight": (256, 272), "output.weight": (8, 32)}


def test_alignment_is_taken_from_the_file(tmp_path: Path) -> None:
    raw = gguf({"general.alignment": 8}, [Tensor("a", (1,)), Tensor("b", (1,))], alignment=8)
    header = read(tmp_path, raw)
    assert header.expected_size == header.data_offset + 12
    for wrong in (0, 3, As("i32", -8), "32"):
        assert "alignment" in fails(tmp_path, gguf({"general.alignment": wrong})).message


@pytest.mark.parametrize(
    ("raw", "shown", "hint"),
    [
        (b"hello world", "(starts with 'hello wo')", None),
        (b"PK\x03\x04aaaa", r"'PK\x03\x04aaaa'", "zip"),
        (b"version https://git-lfs.github.com/spec/v1\n", "'version '", "git lfs pull"),
        (b"<!DOCTYPE html>", "'<!DOCTYP'", "web page"),
        (b"tjgg\x01\0\0\0", "tjgg", "older than GGUF"),
        (b"GG", "'GG'", None),
    ],
)
def test_what_is_not_gguf(tmp_path: Path, raw: bytes, shown: str, hint: str | None) -> None:
    error = fails(tmp_path, raw)
    assert "is not a GGUF file (starts with " in error.message
    assert shown in error.message
    assert hint in error.hint if hint and error.hint else error.hint is hint


def test_versions_and_byte_orders_that_are_refused(tmp_path: Path) -> None:
    assert "GGUF version 1" in fails(tmp_path, gguf(LLAMA, version=1)).message
    assert "GGUF version 4" in fails(tmp_path, gguf(LLAMA, version=4)).message
    assert "GGUF version 0" in fails(tmp_path, gguf(LLAMA, version=0)).message
    assert "big-endian" in fails(tmp_path, gguf(LLAMA, version=3 << 24)).message


def test_truncated_data_is_told_from_a_truncated_header(tmp_path: Path) -> None:
    raw = gguf(LLAMA, TENSORS)
    start = read(tmp_path, raw).data_offset
    for size in range(4, len(raw)):
        error = fails(tmp_path, raw[:size])
        assert f"is truncated: it has {size} bytes" in error.message
        if size >= start:
            assert f"its header describes {len(raw)}" in error.message
        elif size < start - 32:
            assert "ends inside its header" in error.message
    read(tmp_path, raw + b"more")


def test_a_vocabulary_needs_no_data(tmp_path: Path) -> None:
    assert read(tmp_path, gguf(LLAMA)).tensors.bytes == 0


def header_of(keys: int = 0, tensors: int = 0) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, keys)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (gguf([("a", 1), ("a", "x")]), "key 'a' is there twice"),
        (gguf([("a", [1]), ("a", 1)]), "key 'a' is there twice"),
        (gguf({"": 1}), "empty key"),
        (header_of(1) + text("a") + struct.pack("<I", 13), "key 'a' has the unknown type 13"),
        (header_of(1) + text("a") + struct.pack("<IIQ", 9, 9, 1), "array 'a' holds arrays"),
        (header_of(1) + text("a") + struct.pack("<IIQ", 9, 99, 1), "unknown type 99"),
        (header_of(1) + text("k" * 70_000) + bytes(20), "a key is 70000 bytes long"),
        (gguf({}, keys=1 << 63), "announces 9223372036854775808 keys"),
        (gguf({}, tensor_count=1 << 40), "and 1099511627776 tensors"),
        (header_of(1) + struct.pack("<Q", 1 << 63), "ends inside its header"),
        (header_of(1) + text("a") + struct.pack("<IIQ", 9, 8, 1 << 62), "ends inside its header"),
        (header_of(1) + text("a") + struct.pack("<IIQ", 9, 4, 1 << 62), "ends inside its header"),
        (
            header_of(1) + text("a") + struct.pack("<IIQQ", 9, 8, 1, 1 << 62),
            "ends inside its header",
        ),
        (header_of(1) + text("a") + struct.pack("<IQ", 8, 1 << 62), "ends inside its header"),
        (gguf({}, [Tensor("a"), Tensor("a")]), "tensor 'a' is there twice"),
        (gguf({}, [Tensor("n" * 300)]), "the name of a tensor is 300 bytes long"),
        (gguf({}, [Tensor("a", (1,) * 5)]), "tensor 'a' has 5 dimensions"),
        (gguf({}, [Tensor("a", (33,), "Q8_0")]), "tensor 'a' of type Q8_0 has the shape [33]"),
        (gguf({}, [Tensor("a", (), "Q4_K")]), "has the shape []"),
        (gguf({}, [Tensor("a", (1,), offset=32)]), "tensor 'a' is at offset 32, not at 0"),
        (gguf({}, [Tensor("a"), Tensor("b", offset=0)]), "'b' is at offset 0, not at 128"),
        (gguf({}, [Tensor("a", (32,), 99)]), "tensor 'a' of the unknown GGML type 99"),
        (gguf({}, [Tensor("a", (32,), 31)]), "GGML type 31, which GGML has removed"),
    ],
)
def test_damage_is_named(tmp_path: Path, raw: bytes, message: str) -> None:
    assert message in fails(tmp_path, raw).message


@pytest.mark.parametrize("shape", [(1 << 63,), (1 << 40,) * 4, (1 << 62, 2)])
def test_sizes_that_overflow_are_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    tail = struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, 24, 0)
    assert "has the shape" in fails(tmp_path, header_of(0, 1) + text("a") + tail).message
    big = struct.pack("<I1QIQ", 1, 1 << 62, 28, 0)
    assert "add up to" in fails(tmp_path, header_of(0, 1) + text("a") + big).message


def test_too_many_strings_and_too_much_metadata(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_STRINGS", 5)
    monkeypatch.setattr(module, "MAX_KEPT_BYTES", 1000)
    assert "more than 5 strings" in fails(tmp_path, gguf({"a": ["x"] * 6})).message
    assert "more than 5 strings" in fails(tmp_path, gguf({"a": ["x"] * 3, "b": ["y"] * 3})).message
    assert "larger than 1000 bytes" in fails(tmp_path, gguf({"a": "x" * 1000})).message
    assert "larger than 1000 bytes" in fails(tmp_path, gguf({"a": [1] * 100})).message
    monkeypatch.setattr(module, "MAX_HEADER_BYTES", 64)
    monkeypatch.setattr(module, "_CHUNK", 16)
    assert "header is larger than 64" in fails(tmp_path, gguf({"a": "x" * 90})).message


def test_a_hostile_file_is_refused_quickly(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    count = module.MAX_STRINGS
    for body in (
        struct.pack("<IIQ", 9, 8, count),  # as many empty strings as allowed, then garbage
        struct.pack("<IIQ", 9, 8, count) + struct.pack("<Q", 1 << 20) * 8,
        struct.pack("<IIQ", 9, 0, 1 << 39),
    ):
        path.write_bytes(header_of(2, 5) + text("a") + body)
        os.truncate(path, 1 << 40)  # a sparse file of 1 TiB
        start = time.process_time()
        with pytest.raises(StackctlError):
            read_header(path)
        assert time.process_time() - start < 2


def test_files_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def message(path: Path | str) -> str:
        with pytest.raises(StackctlError) as caught:
            read_header(path)
        return caught.value.message

    empty = tmp_path / "empty.gguf"
    empty.touch()
    os.mkfifo(tmp_path / "pipe.gguf")
    assert message(empty) == f"{empty} is empty"
    assert message(tmp_path) == f"{tmp_path} is a directory, not a file"
    assert message(tmp_path / "pipe.gguf").endswith("is not a regular file")
    assert message(tmp_path / "no.gguf").endswith("no.gguf: No such file or directory")
    assert "cannot read" in message("a\0b")

    def refuse(*_: object) -> bytes:
        raise OSError(5, "Input/output error")

    path = write(tmp_path / "m.gguf")
    monkeypatch.setattr(os, "pread", refuse)
    assert message(path) == f"cannot read {path}: Input/output error"


def test_a_file_that_shrinks_while_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "m.gguf")
    real = os.pread

    def shrunk(fd: int, count: int, offset: int) -> bytes:
        return real(fd, min(count, max(0, 200 - offset)), offset)

    monkeypatch.setattr(os, "pread", shrunk)
    with pytest.raises(StackctlError, match="is truncated"):
        read_header(path)


VALID = gguf(LLAMA, TENSORS)
MUTATION = st.tuples(
    st.integers(0, len(VALID) - 1),
    st.sampled_from([0, 1, 4, 8]),
    st.one_of(
        st.binary(max_size=12),
        st.sampled_from([1 << 62, 1 << 63, (1 << 64) - 1, 1 << 31, 0, len(VALID)]).map(
            lambda number: struct.pack("<Q", number)
        ),
    ),
)

END = st.one_of(st.just(len(VALID) + 40), st.integers(4, len(VALID)))


def mutated(changes: Sequence[tuple[int, int, bytes]], end: int) -> bytes:
    raw = bytearray(VALID)
    for at, length, new in changes:
        raw[at : at + length] = new
    return bytes(raw[:end])


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.lists(MUTATION, min_size=1, max_size=4), END)
def test_a_mutated_file_fails_in_one_way_only(
    tmp_path: Path, changes: list[tuple[int, int, bytes]], end: int
) -> None:
    start = time.process_time()
    try:
        header = read(tmp_path, mutated(changes, end))
    except StackctlError:
        pass
    else:
        assert header.expected_size <= header.size
    assert time.process_time() - start < 1


def test_what_is_read_cannot_be_changed(tmp_path: Path) -> None:
    header = read(tmp_path, VALID)
    for mapping in (header.metadata, header.arrays, header.long_texts, header.tensors.counts):
        assert isinstance(mapping, Mapping)
        with pytest.raises(TypeError):
            mapping["x"] = 1  # type: ignore[index]
