"""A cache of engine facts by image ID: an image never changes under its ID."""

from __future__ import annotations

from pathlib import Path

from stackctl.errors import StackctlError
from stackctl.machine.files import write_atomically
from stackctl.values.base import from_json, to_json
from stackctl.values.engine_facts import EngineFacts


class EngineFactsCache:
    """Facts of inspected images. A damaged entry counts as absent, because it can be read again."""

    def __init__(self, cache: Path) -> None:
        self._folder = cache / "engines"

    def get(self, image_id: str) -> EngineFacts | None:
        """Return the facts of the image with that ID."""
        return self._read(self._folder / f"{image_id}.json")

    def latest(self, reference: str) -> EngineFacts | None:
        """Return the facts of the image last inspected under a name, without a call to Podman."""
        found = [facts for path in self._folder.glob("*.json") if (facts := self._read(path))]
        named = [facts for facts in found if facts.reference == reference]
        return max(named, key=lambda facts: facts.seen, default=None)

    def put(self, facts: EngineFacts) -> None:
        """Store facts."""
        write_atomically(self._folder / f"{facts.image_id}.json", to_json(facts), mode=0o600)

    def _read(self, path: Path) -> EngineFacts | None:
        try:
            return from_json(path.read_bytes(), EngineFacts, where=str(path))
        except (OSError, StackctlError):
            return None
