"""A start that fails because of the engine's kernels is attempted once more with others."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from samples import EPYC_GPU, facts_of, plan, shipped, shipped_model
from servers import READY, chat, engine, models
from test_state import generation

from stackctl.cli.output import Output
from stackctl.deploy.context import Context
from stackctl.deploy.lifecycle import retry_with_fallback_kernels
from stackctl.deploy.startup import require_engine_answer
from stackctl.engines import engine as find_engine
from stackctl.errors import StartFailed
from stackctl.machine.machine import Machine
from stackctl.machine.systemd import Systemd
from stackctl.state import learned_facts
from stackctl.state.paths import scope_paths
from stackctl.values.engine_facts import EngineWorkaround


def a_context(home: Path) -> Context:
    return Context(
        paths=scope_paths("user", {"HOME": str(home)}),
        machine=Machine(),
        systemd=Systemd("user"),
        progress=Output(json=False, quiet=True, verbose=False, color="never", progress=False),
        confirm=lambda _: False,
    )


def test_an_answer_that_is_not_text_is_answered_with_other_kernels(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    context = a_context(tmp_path)
    profile = shipped("gpu-nvfp4")
    made = plan(EPYC_GPU, shipped_model(profile), profile)
    facts = msgspec.structs.replace(facts_of(find_engine("vllm").newest.options), engine="vllm")
    context.engine_facts.put(facts)
    tried: list[EngineWorkaround | None] = []

    with engine({**READY, "/v1/models": models("m"), "/v1/chat/completions": chat("!" * 40)}) as on:
        started = msgspec.structs.replace(
            generation(1),
            image_id=facts.image_id,
            host=EPYC_GPU,
            plan=msgspec.structs.replace(made, served_name="m", port=on.port, engine_port=None),
        )
        context.generations.write(started)

        def attempt(context: Context, lesson: EngineWorkaround | None) -> str:
            tried.append(lesson)
            if lesson is None:
                require_engine_answer(context, started)
            return "up"

        assert retry_with_fallback_kernels(context, started.stack, attempt) == "up"
    assert [lesson is None for lesson in tried] == [True, False]
    kept = learned_facts.workaround(context.paths.state, facts.image_id, EPYC_GPU.gpus[0].name)
    assert kept == tried[1]
    assert kept is not None
    assert kept.options == ("linear-backend=marlin",)
    # The reason stands in later plans, of any stack: it does not name the one that failed.
    assert "!!!!" in kept.why
    assert started.stack not in kept.why
    assert "started, but answer is wrong" in capsys.readouterr().err


def test_other_failures_are_not_tried_again(tmp_path: Path) -> None:
    tried: list[EngineWorkaround | None] = []

    def attempt(_: Context, lesson: EngineWorkaround | None) -> str:
        tried.append(lesson)
        raise StartFailed("cpu did not start: no memory")

    with pytest.raises(StartFailed, match="no memory"):
        retry_with_fallback_kernels(a_context(tmp_path), "cpu", attempt)
    assert tried == [None]
