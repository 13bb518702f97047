"""Options of engines: chosen ones, those that an image has, and those of a command line."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from stackctl.values.engine_facts import EngineOption, EngineWorkaround
from stackctl.values.plan import DecisionSource, Scalar

#: Engines count in 32 bits.
_WHOLE = re.compile(r"[0-9]{1,10}")


@dataclass(frozen=True)
class Option:
    """One chosen option by its newest long name.

    ``values`` is empty for a bare flag, and None for an option that is left out on purpose, with
    its reason.
    """

    name: str
    values: tuple[Scalar, ...] | None
    reason: str
    source: DecisionSource = "derived"

    @property
    def value(self) -> Scalar:
        """Return the value as one scalar: True for a bare flag, None if it is left out."""
        if self.values is None:
            return None
        if not self.values:
            return True
        return self.values[0] if len(self.values) == 1 else " ".join(map(str, self.values))


@dataclass(frozen=True)
class Dialect:
    """The options that an image's engine has, from its own help."""

    options: tuple[EngineOption, ...]
    #: False if the image was not inspected: these are the newest known options only.
    inspected: bool
    _by_name: Mapping[str, EngineOption] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        index = {name: option for option in self.options for name in option.names}
        object.__setattr__(self, "_by_name", index)

    def find(self, name: str) -> EngineOption | None:
        """Return the option with exactly that long name (without dashes); None if there is none."""
        return self._by_name.get(f"--{name}")

    def option_names(self) -> tuple[str, ...]:
        """Return all long names without dashes."""
        return tuple(name[2:] for name in self._by_name if name.startswith("--"))


def option(names: str, value: str | None = None) -> EngineOption:
    """Make an option from its long names without dashes."""
    return EngineOption(names=tuple(f"--{name}" for name in names.split()), value=value)


def int_option(options: Mapping[str, Option], name: str, default: int) -> int:
    """Return the whole number that an option has; the default if it has none."""
    value = options[name].value if name in options else None
    return value if isinstance(value, int) and not isinstance(value, bool) else default


def option_in_argv(argv: Sequence[str], name: str) -> str | None:
    """Return the value of a planned option in a command line; the last one counts."""
    values = [after for word, after in itertools.pairwise(argv) if word == f"--{name}"]
    return values[-1] if values else None


def int_option_in_argv(argv: Sequence[str], name: str) -> int | None:
    """Return the whole number of a planned option in a command line; None for any other text."""
    text = option_in_argv(argv, name)
    return int(text) if text is not None and _WHOLE.fullmatch(text) else None


def workaround_options(workaround: EngineWorkaround | None) -> tuple[Option, ...]:
    """Return the options that an earlier start has proved to be necessary."""
    if workaround is None:
        return ()
    reason = f"this image needs it on this GPU: {workaround.why} ({workaround.seen[:10]})"
    pairs = (text.partition("=") for text in workaround.options)
    return tuple(Option(name, (value,), reason, "measured") for name, _, value in pairs)
