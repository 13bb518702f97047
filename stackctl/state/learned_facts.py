"""Facts of images and of this machine that earlier runs have found, for later plans.

They are speeds, ``STATE/calibrations.json``, options that an image needed on a GPU,
``STATE/learned.json``, facts of inspected images, ``CACHE/engines/ID.json``, and the memory use
that engines reported, from the stored generations of a stack.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

from stackctl.errors import StackctlError
from stackctl.machine.files import write_atomically
from stackctl.machine.path_security import make_private_folder
from stackctl.state.generations import Generations
from stackctl.values.base import V, from_json, to_json
from stackctl.values.engine_facts import (
    Calibration,
    Calibrations,
    EngineFacts,
    EngineWorkaround,
    EngineWorkarounds,
    MeasuredMemory,
)
from stackctl.values.generation import Generation
from stackctl.values.model import Model

_CALIBRATIONS = "calibrations.json"
_WORKAROUNDS = "learned.json"
#: The number of newest generations to read: each is a file of some tens of KB.
_LOOKED_AT = 20


class EngineFactsCache:
    """Facts of inspected images by image ID: an image never changes under its ID.

    A damaged entry counts as absent, because it can be read again.
    """

    def __init__(self, cache: Path) -> None:
        self._folder = cache / "engines"

    def get(self, image_id: str) -> EngineFacts | None:
        """Return the facts of the image with that ID."""
        return _read(self._folder / f"{image_id}.json", EngineFacts)

    def latest(self, reference: str) -> EngineFacts | None:
        """Return the facts of the image last inspected under a name, without a call to Podman."""
        found = (_read(path, EngineFacts) for path in self._folder.glob("*.json"))
        named = [facts for facts in found if facts is not None and facts.reference == reference]
        return max(named, key=lambda facts: facts.seen, default=None)

    def put(self, facts: EngineFacts) -> None:
        """Store facts."""
        write_atomically(self._folder / f"{facts.image_id}.json", to_json(facts), mode=0o600)


def calibrations(state: Path) -> tuple[Calibration, ...]:
    """Return all measured speeds; none when the file is absent or unreadable (calibrate again)."""
    found = _read(state / _CALIBRATIONS, Calibrations)
    return found.entries if found is not None else ()


def add_calibration(state: Path, entry: Calibration) -> None:
    """Store a measurement; it replaces the one of the same engine, weights, threads and GPU."""

    def key(one: Calibration) -> tuple[object, ...]:
        return (one.engine, one.quantization, one.threads, one.moe, one.gpu)

    others = (one for one in calibrations(state) if key(one) != key(entry))
    document = Calibrations(entries=(*others, entry))
    write_atomically(state / _CALIBRATIONS, to_json(document), mode=0o600)


def workaround(state: Path, image_id: str, gpu: str | None = None) -> EngineWorkaround | None:
    """Return the options learned for an image on GPUs of that name; None: none, or unreadable."""
    found = (one for one in _workarounds(state) if (one.image_id, one.gpu) == (image_id, gpu))
    return next(found, None)


def add_workaround(state: Path, entry: EngineWorkaround) -> None:
    """Store an entry; it replaces the one of the same image and GPU."""
    others = (x for x in _workarounds(state) if (x.image_id, x.gpu) != (entry.image_id, entry.gpu))
    make_private_folder(state)
    document = EngineWorkarounds(entries=(*others, entry))
    write_atomically(state / _WORKAROUNDS, to_json(document), mode=0o600)


def _workarounds(state: Path) -> tuple[EngineWorkaround, ...]:
    found = _read(state / _WORKAROUNDS, EngineWorkarounds)
    return found.entries if found is not None else ()


def _read(path: Path, kind: type[V]) -> V | None:
    try:
        return from_json(path.read_bytes(), kind, where=str(path))
    except (OSError, StackctlError):
        return None


def measured_memory(
    store: Generations, stack: str, model: Model, image_id: str | None = None
) -> tuple[MeasuredMemory, ...]:
    """Return the memory measured for this model in this image (None: in any) by generations that
    were ready, newest first."""
    found = []
    for number in reversed(store.numbers(stack)[-_LOOKED_AT:]):
        # An unreadable generation is no measurement.
        with contextlib.suppress(StackctlError):
            generation = store.read(stack, number)
            ready = generation.outcome.state in ("ready", "replaced", "stopped")
            same = image_id in (None, generation.image_id) and generation.plan.model == model
            if ready and same:
                found.append(_measured(generation))
    return tuple(found)


def _measured(generation: Generation) -> MeasuredMemory:
    facts = {fact.name: fact.value for fact in generation.outcome.report}

    def number(name: str) -> int | None:
        text = facts.get(name, "")
        return int(text) if text.isascii() and text.isdigit() else None

    gpus = generation.plan.placement.gpus
    return MeasuredMemory(
        generation=generation.number,
        argv=generation.plan.argv,
        gpus=tuple(
            (gpu.name, gpu.memory_bytes) for gpu in generation.host.gpus if str(gpu.index) in gpus
        ),
        weights_bytes=number("weights_bytes"),
        kv_bytes=number("kv_cache_bytes"),
        kv_tokens=number("kv_cache_tokens"),
    )
