"""The memory use that engines reported, from the stored generations of a stack."""

from __future__ import annotations

import contextlib

from stackctl.errors import StackctlError
from stackctl.state.generations import Generations
from stackctl.values.engine_facts import MeasuredMemory
from stackctl.values.generation import Generation
from stackctl.values.model import Model

#: The number of newest generations to read: each is a file of some tens of KB.
_LOOKED_AT = 20


def read(
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
