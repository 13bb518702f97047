"""Readers of logs: from lines to samples, for the engine that wrote them."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from stackctl.engines import engines
from stackctl.values.metrics import LoggedRequest, LogSamples, LogWindow


def read_log(lines: Iterable[str]) -> LogSamples | None:
    """Return the samples of a log.

    The engine that recognises the most of the log is taken for its author. Return None if no engine
    recognises a line.
    """
    readers = [engine.log_reader() for engine in engines()]
    for line in lines:
        for reader in readers:
            reader.feed(line)
    found = [reader.samples() for reader in readers]
    best = max(found, key=lambda one: (len(one.windows) + len(one.requests), one.known_lines))
    return best if best.known_lines else None


def last_seconds(samples: LogSamples, since_s: float) -> LogSamples:
    """Return the samples of the last ``since_s`` seconds before the newest one, by the log's clock.

    Samples without a time are kept, because nothing shows that they are old.
    """
    every: tuple[LogWindow | LoggedRequest, ...] = (*samples.windows, *samples.requests)
    times = [one.at_s for one in every if one.at_s is not None]
    if not times:
        return samples
    first = max(times) - since_s
    return msgspec.structs.replace(
        samples,
        windows=tuple(one for one in samples.windows if one.at_s is None or one.at_s >= first),
        requests=tuple(one for one in samples.requests if one.at_s is None or one.at_s >= first),
    )
