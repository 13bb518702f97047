"""The planner's inputs: which records of the machine count for an image."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import msgspec
from samples import CARD, EPYC_GPU, facts_of, shipped, shipped_model

from stackctl.deploy.images import PlannedImage
from stackctl.deploy.planning import PlanBasis, inputs_before_image, with_image
from stackctl.engines import engine
from stackctl.machine.machine import Machine
from stackctl.state import learned_facts
from stackctl.state.paths import scope_paths
from stackctl.values.engine_facts import EngineWorkaround

PROFILE = shipped("gpu-nvfp4")
MODEL = shipped_model(PROFILE)
FACTS = msgspec.structs.replace(facts_of(engine("vllm").newest.options), engine="vllm")


def basis(folder: Path) -> PlanBasis:
    found = scope_paths("user", {"HOME": str(folder)})
    return PlanBasis(paths=found, machine=Machine(), host=EPYC_GPU)


def test_options_that_an_image_needed_on_the_gpu_are_planned(tmp_path: Path) -> None:
    known = basis(tmp_path)
    entry = EngineWorkaround(
        image_id=FACTS.image_id,
        gpu=CARD.name,
        options=("linear-backend=marlin",),
        why="no kernel",
        seen="2026-11-21T12:00:00Z",
    )
    learned_facts.add_workaround(known.paths.state, entry)
    inputs = inputs_before_image(known, PROFILE, MODEL, deadline_s=9)
    assert (inputs.image, inputs.workaround, inputs.deadline_s) == ("", None, 9)
    image = PlannedImage("i@sha256:1", "test", FACTS)
    made = with_image(known, inputs, PROFILE, MODEL, image)
    assert (made.image, made.facts, made.workaround) == ("i@sha256:1", FACTS, entry)
    # The options of a start that has just failed come first.
    other = msgspec.structs.replace(entry, options=("linear-backend=other",))
    assert with_image(known, inputs, PROFILE, MODEL, image, lesson=other).workaround == other
    # Nothing is known of an image that was not inspected, nor of another machine.
    assert with_image(known, inputs, PROFILE, MODEL, PlannedImage("i", "test")).workaround is None
    elsewhere = dataclasses.replace(known, live=False)
    assert with_image(elsewhere, inputs, PROFILE, MODEL, image).workaround is None
