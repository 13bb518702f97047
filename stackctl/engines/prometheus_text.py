"""Prometheus' text format, as engines print it (exposition format 0.0.4).

prometheus_client's parser takes three times as long for vLLM's text, and its import longer than
reading the text here. It fails on the first damaged line; this reader skips such a line.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from stackctl.values.metrics import Histogram

_LABEL = r'[a-zA-Z_][a-zA-Z0-9_]*[ \t]*=[ \t]*"(?:[^"\\]|\\.)*"'
_LINE = re.compile(
    r"[ \t]*(?P<name>[a-zA-Z_:][a-zA-Z0-9_:]*)[ \t]*"
    rf"(?:\{{[ \t]*(?P<labels>(?:{_LABEL}[ \t]*(?:,[ \t]*|(?=\}})))*)\}})?[ \t]*"
    r"(?<=[ \t}])(?P<value>[-+]?(?:\d+\.?\d*(?:[eE][-+]?\d+)?|\.\d+(?:[eE][-+]?\d+)?|[iI]nf|NaN))"
    r"(?:[ \t]+-?\d+)?[ \t]*"
)
_PAIR = re.compile(r'([a-zA-Z_][a-zA-Z0-9_]*)[ \t]*=[ \t]*"((?:[^"\\]|\\.)*)"')
_ESCAPED = re.compile(r"\\(.)")


class MetricSample(NamedTuple):
    """One line: a name, its labels, a value (which may be infinite or not a number)."""

    name: str
    labels: Mapping[str, str]
    value: float


def parse_samples(text: str) -> Iterator[MetricSample]:
    """Yield the samples of a text in its order."""
    for line in text.split("\n"):
        if match := _LINE.fullmatch(line.rstrip("\r")):
            labels = {name: _plain(value) for name, value in _PAIR.findall(match["labels"] or "")}
            yield MetricSample(match["name"], labels, float(match["value"]))


def _plain(text: str) -> str:
    return _ESCAPED.sub(lambda found: "\n" if found[1] == "n" else found[1], text)


class Scrape:
    """Samples by name. Values of several engines of one server are combined."""

    def __init__(self, text: str) -> None:
        """Read the text of /metrics."""
        self._by_name: dict[str, list[MetricSample]] = {}
        for sample in parse_samples(text):
            self._by_name.setdefault(sample.name, []).append(sample)

    def _values(self, name: str, labels: Mapping[str, str]) -> list[float]:
        return [
            sample.value
            for sample in self._by_name.get(name, ())
            if math.isfinite(sample.value)
            and all(sample.labels.get(key) == value for key, value in labels.items())
        ]

    def total(self, name: str, **labels: str) -> float | None:
        """Return the sum of a metric over all samples with these labels; None if there are none."""
        values = self._values(name, labels)
        return sum(values) if values else None

    def count(self, name: str) -> int | None:
        """Return the sum as a whole number, at least zero; None if there are no samples."""
        total = self.total(name)
        return None if total is None else max(0, round(total))

    def max_value(self, name: str) -> float | None:
        """Return the largest value of a gauge; None if there are no samples."""
        return max(self._values(name, {}), default=None)

    def int_label(self, name: str, label: str) -> int | None:
        """Return a label of the first sample of that name, if it is a whole number; else None."""
        found = self._by_name.get(name)
        text = found[0].labels.get(label, "") if found else ""
        return int(text) if re.fullmatch(r"\d{1,15}", text) else None

    def histogram(self, name: str) -> Histogram | None:
        """Return a histogram, summed over all labels but the bound; None if it is missing."""
        counts: dict[float, float] = {}
        for sample in self._by_name.get(f"{name}_bucket", ()):
            with contextlib.suppress(ValueError):
                bound = float(sample.labels.get("le", ""))
                if math.isfinite(bound) and math.isfinite(sample.value):
                    counts[bound] = counts.get(bound, 0.0) + sample.value
        count, total = self.total(f"{name}_count"), self.total(f"{name}_sum")
        if count is None or total is None:
            return None
        return Histogram(buckets=tuple(sorted(counts.items())), count=count, sum=total)
