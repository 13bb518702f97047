"""Memory modules from the firmware's tables (SMBIOS type 17), and known processors' channels.

The tables do not contain the number of channels in use, and each maker words the places of modules
differently. The rule: if the processor is known, the number is that of its channels, or that of the
modules if it is smaller. Otherwise the channels are counted by the places, if every place names its
channel.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

#: Firmware tables of the largest machines have some hundred KiB.
_MOST_BYTES = 2**20
_MOST_MODULES = 1024
_MEMORY_DEVICE, _END = 17, 127
#: LPDDR to LPDDR5: soldered, in channels of 16 or 32 bits, which the tables do not distinguish.
_SOLDERED = frozenset({0x1B, 0x1C, 0x1D, 0x1E, 0x23})
#: Memory technologies that are not main memory: NVDIMM-F, NVDIMM-P and Optane.
_NO_DRAM = frozenset({5, 6, 7})
_UNKNOWN_SPEED = 0xFFFF

_SOCKET = r"(?:(?:CPU|PROCESSOR|PROC|SOCKET|NODE|P)[ _-]?([0-9]{1,2}))?"
_CHANNELS = (
    re.compile(
        rf"(?<![A-Z0-9]){_SOCKET}[^,]{{0,20}}?CH(?:ANNEL)?[ _-]?([A-Z]|[0-9]{{1,2}})(?![A-Z0-9])"
    ),
    re.compile(rf"(?<![A-Z0-9]){_SOCKET}[ _-]?DIMM[ _-]?([A-Z])[0-9]{{1,2}}\b"),
)


@dataclass(frozen=True)
class MemoryModule:
    """One memory module that is plugged in."""

    #: Bank and slot, in the maker's words.
    place: str
    #: The configured speed in million transfers per second; None if the firmware has none.
    speed: int | None
    soldered: bool


@dataclass(frozen=True)
class ProcessorFamily:
    """Memory channels of one socket; ``speed`` in million transfers per second."""

    name: str
    channels: int
    speed: int


#: EPYC families by first and last character of the number, with the fastest memory that AMD
#: specifies. Slower or fewer modules have less bandwidth.
_EPYC = {
    "71": ProcessorFamily("EPYC Naples", 8, 2666),
    "72": ProcessorFamily("EPYC Rome", 8, 3200),
    "73": ProcessorFamily("EPYC Milan", 8, 3200),
    "84": ProcessorFamily("EPYC Siena", 6, 4800),
    "94": ProcessorFamily("EPYC Genoa", 12, 4800),
    "95": ProcessorFamily("EPYC Turin", 12, 6000),
}
#: Numbers that differ from their family. None: less bandwidth than the channels have.
_EPYC_EXCEPTIONS: dict[str, ProcessorFamily | None] = {
    "7251": ProcessorFamily("EPYC Naples", 8, 2400),
    "7252": None, "7272": None, "7282": None,
    # The reference machine: 12 channels of DDR5-6400.
    "9175": ProcessorFamily("EPYC Turin", 12, 6400),
}  # fmt: skip
_MODEL = re.compile(r"\bEPYC ([789][0-9A-Z]{2}[0-9])[A-Z]{0,2}\b")


def processor_family(model: str | None) -> ProcessorFamily | None:
    """Return the family of a processor by its name; None if it is not in the table."""
    match = _MODEL.search(model or "")
    if match is None:
        return None
    number = match[1]
    if number in _EPYC_EXCEPTIONS:
        return _EPYC_EXCEPTIONS[number]
    return _EPYC.get(number[0] + number[-1])


def memory_modules(table: bytes) -> tuple[MemoryModule, ...]:
    """Return the memory modules of a table. A damaged structure ends the list without error."""
    table = table[:_MOST_BYTES]
    found: list[MemoryModule] = []
    at = 0
    while at + 4 <= len(table) and len(found) < _MOST_MODULES:
        kind, length = table[at], table[at + 1]
        if length < 4 or kind == _END:
            break
        body = table[at : at + length]
        texts = table.find(b"\0\0", at + length)
        if texts < 0:
            texts = len(table)
        if kind == _MEMORY_DEVICE:
            module = _module(body, table[at + length : texts])
            if module is not None:
                found.append(module)
        at = texts + 2
    return tuple(found)


def channels_in_use(
    found: tuple[MemoryModule, ...], known: ProcessorFamily | None, sockets: int
) -> int | None:
    """Return the number of memory channels in use, by the rule of this file; None if unknown."""
    if not found or any(module.soldered for module in found):
        return None
    if known is not None:
        return min(len(found), known.channels * sockets)
    names = {_channel(module.place) for module in found}
    # At most three modules share a channel. If there are more, the names mean something else.
    if None in names or 3 * len(names) < len(found):
        return None
    return len(names)


def common_speed(found: tuple[MemoryModule, ...]) -> int | None:
    """Return the lowest speed, at which all modules run; None if the speed of one is unknown."""
    speeds = [module.speed for module in found if module.speed]
    return min(speeds) if speeds and len(speeds) == len(found) else None


def _module(body: bytes, texts: bytes) -> MemoryModule | None:
    if _word(body, 0x0C) in (None, 0):
        return None
    if len(body) > 0x28 and body[0x28] in _NO_DRAM:
        return None
    strings = texts.split(b"\0", 255)
    place = ", ".join(_string(body, at, strings) for at in (0x11, 0x10))
    speed = _speed(body, 0x20, 0x58) or _speed(body, 0x15, 0x54)
    soldered = len(body) > 0x12 and body[0x12] in _SOLDERED
    return MemoryModule(place.strip(", "), speed, soldered)


def _speed(body: bytes, at: int, extended: int) -> int | None:
    speed = _word(body, at)
    if speed == _UNKNOWN_SPEED:
        speed = int.from_bytes(body[extended : extended + 4], "little") & 0x7FFFFFFF
    # Memory reaches some 10,000 million transfers per second. A far larger value is an error.
    return speed if speed and speed < 100_000 else None


def _word(body: bytes, at: int) -> int | None:
    return int.from_bytes(body[at : at + 2], "little") if at + 2 <= len(body) else None


def _string(body: bytes, at: int, strings: list[bytes]) -> str:
    number = body[at] if at < len(body) else 0
    if not 0 < number <= len(strings):
        return ""
    text = strings[number - 1][:64].decode("ascii", "replace")
    return "".join(char for char in text if char.isprintable()).strip()


def _channel(place: str) -> tuple[str, str] | None:
    for pattern in _CHANNELS:
        match = pattern.search(place.upper())
        if match:
            return match[1] or "", match[2]
    return None
