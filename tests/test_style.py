"""The prose of docstrings and comments, and the names of classes (docs/style.md)."""

from __future__ import annotations

from pathlib import Path

import prose
import pytest

STACKCTL = Path(__file__).resolve().parent.parent / "stackctl"
MODULES = prose.modules(STACKCTL)


def test_prose_is_plain() -> None:
    found = [text for path in MODULES for text in prose.texts(path)]
    counted = prose.rates(found)
    assert counted.words > 20_000
    offenders = "\n".join(prose.measured_lines(found))
    assert counted.what_rate <= prose.MOST_WHAT, offenders
    assert counted.tell_rate <= prose.MOST_TELL, offenders


def test_no_two_public_classes_have_one_name() -> None:
    repeated = prose.repeated_classes(MODULES)
    assert not repeated, "\n".join(f"{name}: {places}" for name, places in repeated.items())


def test_public_functions_have_a_docstring_that_begins_with_a_verb() -> None:
    assert sum(1 for path in MODULES for _ in prose.public_functions(path)) > 900
    offenders = [line for path in MODULES for line in prose.docstring_offenders(path)]
    assert not offenders, "\n".join(offenders)


SAMPLE = '''
"""Read what the engine has said."""

class Twice:
    """A class."""

    @property
    def size(self):
        """Bytes of it."""

    def _hidden(self):
        """What is hidden."""

if True:
    def listed():
        """List of names."""

def read():
    """Read a file.

    It tells nothing.
    """
    def nested():
        """Whatever."""

def bare():
    pass  # what's missing

class _Private:
    def method(self):
        """The method."""

class Twice:
    """Again."""
'''


def test_offenders_of_every_kind_are_found(tmp_path: Path) -> None:
    path = tmp_path / "sample.py"
    path.write_text(SAMPLE)
    found = prose.texts(path)
    lines = [line.split(":")[1] for line in prose.measured_lines(found)]
    assert lines == ["2", "12", "21", "27"]
    counted = prose.rates(found)
    assert (counted.what, counted.tell, counted.whether) == (3, 2, 0)
    offenders = [line.split(": ")[1] for line in prose.docstring_offenders(path)]
    assert offenders == ["Twice.size", "listed", "bare"]
    assert list(prose.repeated_classes([path])) == ["Twice"]


@pytest.mark.parametrize(
    ("docstring", "good"),
    [
        ("Return the plan.", True),
        ("Normalize a path.", True),
        ("Color a text.", True),
        ("Returns the plan.", False),
        ("The plan.", False),
        ("Start of the log.", False),
        ("What the plan needs.", False),
        ("Tell what the plan needs.", False),
        ("Have the plan made.", False),
        ("``begin``, in seconds.", False),
    ],
)
def test_a_verb_comes_first(docstring: str, good: bool) -> None:
    assert prose.begins_with_verb(docstring) is good
