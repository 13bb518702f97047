"""Compares what stackctl and the gguf package read of a file: ``agree.py FILE``, run by bench.py.

The package must be importable; it takes seconds and gigabytes where a vocabulary is large.
"""

from __future__ import annotations

import sys
from typing import Any

from gguf import GGUFReader, GGUFValueType

from stackctl.sources.gguf import GgufHeader, read_header


def differences(path: str) -> tuple[int, list[str]]:
    """How many facts were compared, and those that differ."""
    ours, theirs = read_header(path), GGUFReader(path)
    fields = [field for field in theirs.fields.values() if not field.name.startswith("GGUF.")]
    pairs = [(field.name, _mine(ours, field.name), _told(ours, field)) for field in fields]
    found = len(ours.metadata) + len(ours.arrays) + len(ours.long_texts)
    tensors = theirs.tensors
    last = max(tensors, key=lambda tensor: tensor.data_offset, default=None)
    pairs += [
        ("number of keys", found, len(fields)),
        ("tensors", ours.tensors.count, len(tensors)),
        ("elements", ours.tensors.elements, sum(int(t.n_elements) for t in tensors)),
        ("bytes", ours.tensors.bytes, sum(int(t.n_bytes) for t in tensors)),
        ("data", ours.data_offset, int(theirs.data_offset)),
    ]
    if last is not None:
        pairs.append(("end", ours.expected_size, int(last.data_offset + last.n_bytes)))
    wrong = [f"{name}: {mine!r}, not {told!r}" for name, mine, told in pairs if mine != told]
    return len(pairs), wrong


def _mine(ours: GgufHeader, name: str) -> Any:
    if name in ours.arrays:
        array = ours.arrays[name]
        return array.element, array.length, array.values
    return ours.long_texts[name] if name in ours.long_texts else ours.metadata.get(name)


def _told(ours: GgufHeader, field: Any) -> Any:
    """The same of the package; values and long texts only where stackctl keeps them."""
    if field.types[0] == GGUFValueType.ARRAY:
        kept = field.name in ours.arrays and ours.arrays[field.name].values is not None
        values = tuple(field.parts[at].tolist()[0] for at in field.data) if kept else None
        return field.types[1].name.lower(), len(field.data), values
    value = field.contents()
    return len(value.encode()) if field.name in ours.long_texts else value


def main() -> int:
    """Print what differs."""
    count, wrong = differences(sys.argv[1])
    for line in wrong:
        print(line)
    print(f"{count} facts, {len(wrong)} differ")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
