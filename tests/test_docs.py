"""The documents: generated parts, links and paths."""

from __future__ import annotations

import re
from pathlib import Path

import profile_keys
import pytest

ROOT = Path(__file__).resolve().parent.parent


def documents() -> list[Path]:
    return [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]


def test_the_reference_of_profile_keys_is_current() -> None:
    current = profile_keys.TARGET.read_text("utf-8")
    assert current == profile_keys.reference(), "run: make profile-keys"
    for path in ("slo.ttft_s", "placement.cpu_experts", "objectives.throughput", "engine_args"):
        assert f"| `{path}` |" in current
    assert not re.search(r"\| *\|$", current, re.MULTILINE), "a key without a description"


def test_links_between_documents_lead_somewhere() -> None:
    wrong = []
    for path in documents():
        text = path.read_text("utf-8")
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            file, _, anchor = target.partition("#")
            if "://" in file:
                continue
            found = path.parent / file if file else path
            if not found.exists():
                wrong.append(f"{path.relative_to(ROOT)}: {target}")
            elif anchor and anchor not in _anchors(found):
                wrong.append(f"{path.relative_to(ROOT)}: no heading {target}")
    assert not wrong, "\n".join(wrong)


def _anchors(path: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", path.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


#: ``stackctl/plan/planner.py`` or ``stackctl/plan/planner.py::make_plan``, as documents write it.
PLACE = re.compile(r"`((?:stackctl|tests|docs|templates|profiles|systemd)/[^`\s:]*)(?:::(\w+))?`")


@pytest.mark.parametrize("document", ["architecture.md", "contributing.md"])
def test_places_that_guides_name_exist(document: str) -> None:
    text = (ROOT / "docs" / document).read_text("utf-8")
    # A word in capitals stands for a name that the reader chooses.
    found = [place for place in PLACE.findall(text) if not re.search(r"/[A-Z]+(\.py|/)", place[0])]
    assert len(found) > 20
    wrong = [path for path, _ in found if not (ROOT / path).exists()]
    for path, name in found:
        if name and path not in wrong:
            source = (ROOT / path).read_text("utf-8")
            defined = rf"^\s*(?:def |class |async def )?{name}\b\s*[\[(:=]"
            if not re.search(defined, source, re.MULTILINE):
                wrong.append(f"{path}::{name}")
    assert not wrong, "\n".join(wrong)
