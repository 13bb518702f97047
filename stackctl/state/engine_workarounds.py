"""Options that an image needed on a GPU of this machine, ``STATE/learned.json``."""

from __future__ import annotations

from pathlib import Path

from stackctl.errors import StackctlError
from stackctl.machine.files import write_atomically
from stackctl.machine.path_security import make_private_folder
from stackctl.values.base import from_json, to_json
from stackctl.values.engine_facts import EngineWorkaround, EngineWorkarounds

_NAME = "learned.json"


def read(state: Path, image_id: str, gpu: str | None = None) -> EngineWorkaround | None:
    """Return the options learned for an image on GPUs of that name; None: none, or unreadable."""
    return next((one for one in _all(state) if (one.image_id, one.gpu) == (image_id, gpu)), None)


def add(state: Path, entry: EngineWorkaround) -> None:
    """Store an entry; it replaces the one of the same image and GPU."""
    others = (x for x in _all(state) if (x.image_id, x.gpu) != (entry.image_id, entry.gpu))
    make_private_folder(state)
    text = to_json(EngineWorkarounds(entries=(*others, entry)))
    write_atomically(state / _NAME, text, mode=0o600)


def _all(state: Path) -> tuple[EngineWorkaround, ...]:
    try:
        return from_json((state / _NAME).read_bytes(), EngineWorkarounds, where=_NAME).entries
    except (OSError, StackctlError):
        return ()
