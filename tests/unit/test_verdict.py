"""Verdicts: what fits, what is worth running, and advice that helps."""

from __future__ import annotations

import re
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import (
    EPYC,
    EPYC_GPU,
    GIB,
    HOSTS,
    IQUEST,
    LATENCY,
    THROUGHPUT,
    machine,
    plan,
    profile,
    shipped,
    shipped_model,
)

from stackctl.errors import StackctlError
from stackctl.plan.verdict import advise, numbers, seconds
from stackctl.resources import data_folder
from stackctl.sources.catalogue import entries, read_entry
from stackctl.sources.profiles import Profiles
from stackctl.values.host import Host
from stackctl.values.plan import Plan
from stackctl.values.profile import Profile, Slo


def candidates(host: Host) -> list[Plan]:
    """Plans of all shipped profiles that name a model, where they can run."""
    made = []
    for name in Profiles([data_folder("profiles")]).names():
        wish = shipped(name)
        if wish.model is not None:
            try:
                made.append(plan(host, shipped_model(wish), wish))
            except StackctlError:
                continue
    return made


# Not viable, and what to do


def test_advice_for_a_dense_40b_on_the_cpu_in_the_owner_s_order() -> None:
    """The GPU first, also with llama.cpp; shorter prompts; a small model; batch work."""
    model = read_entry("iquest-coder-40b-q5_k_m")
    made = plan(EPYC_GPU, model, LATENCY)
    verdict = advise(made, LATENCY, candidates(EPYC_GPU))
    assert (verdict.fits, verdict.viable) == (True, False)
    kinds = [
        re.match(r"stackctl up ([\w-]+)|(shorter prompts)", text) for text in verdict.alternatives
    ]
    assert all(kinds), verdict.alternatives
    names = [(kind[1] or kind[2]) for kind in kinds if kind]
    on_gpu = names[: names.index("shorter prompts")]
    assert {"gpu-nvfp4", "gpu-gguf"} <= set(on_gpu)
    assert on_gpu[0] == "gpu-nvfp4"
    assert names.index("shorter prompts") < names.index("cpu-small") < names.index("cpu-moe-batch")


def test_advice_on_a_machine_without_gpu_names_no_gpu_profile() -> None:
    made = plan(EPYC, read_entry("iquest-coder-40b-q5_k_m"), LATENCY)
    verdict = advise(made, LATENCY, candidates(EPYC))
    assert not any("gpu-" in text or "hybrid" in text for text in verdict.alternatives)
    assert verdict.alternatives[0].startswith("shorter prompts: under 30 s up to about ")


def test_shorter_prompts_are_short_enough() -> None:
    made = plan(EPYC, read_entry("iquest-coder-40b-q5_k_m"), LATENCY)
    verdict = advise(made, LATENCY, ())
    found = re.search(r"up to about ([\d,]+) tokens", " ".join(verdict.alternatives))
    assert found is not None
    tokens = int(found[1].replace(",", ""))
    shorter = profile(LATENCY, slo=Slo(prompt_tokens=tokens, ttft_s=30.0))
    again = plan(EPYC, read_entry("iquest-coder-40b-q5_k_m"), shorter)
    assert again.verdict.viable is True


def test_a_good_plan_needs_no_advice() -> None:
    wish = shipped("gpu-nvfp4")
    made = plan(EPYC_GPU, shipped_model(wish), wish)
    assert advise(made, wish, candidates(EPYC_GPU)) == made.verdict


def test_advice_never_names_the_same_plan_or_one_that_is_no_good() -> None:
    offered = candidates(HOSTS["desktop"])
    for made in offered:
        wish = shipped(made.profile)
        verdict = advise(made, wish, offered)
        for text in verdict.alternatives:
            if name := re.match(r"stackctl up ([\w-]+)", text):
                assert name[1] != made.profile
                good = next(one for one in offered if one.profile == name[1])
                assert (good.verdict.fits, good.verdict.viable) == (True, True)


@pytest.mark.parametrize(
    ("slo", "viable", "words"),
    [
        (Slo(ttft_s=1.0), False, "allowed 1 s"),
        (Slo(ttft_s=60.0), True, "may miss the 60 s allowed"),
        (Slo(ttft_s=600.0), True, None),
        (Slo(min_tok_s=100.0), False, "wanted 100"),
        (Slo(itl_ms=5.0), False, "wanted 200"),
        (Slo(itl_ms=80.0), True, "may miss the 12.5 wanted"),
        (Slo(min_tok_s=1.0), True, None),
        (Slo(), True, None),
    ],
)
def test_objectives(slo: Slo, viable: bool, words: str | None) -> None:
    made = plan(EPYC, IQUEST, profile(LATENCY, slo=slo))
    assert made.verdict.viable is viable
    rest = made.verdict.reasons[1:]
    if words is None:
        assert rest == ()
    else:
        assert any(words in text for text in rest), rest


# Too big, and what would fit


def applied(wish: Profile, text: str) -> Profile | None:
    """The profile with the --set of an alternative; None when it names none."""
    found = re.search(r"--set (\w+)=(\S+)$", text)
    if found is None:
        return None
    value: Any = int(found[2]) if found[2].isdigit() else found[2]
    return msgspec.structs.replace(wish, **{found[1]: value})


@settings(max_examples=80, deadline=None)
@given(
    st.integers(24, 96),
    st.integers(4096, 131072),
    st.integers(1, 8),
    st.sampled_from([LATENCY, THROUGHPUT]),
    st.sampled_from([None, "f16", "q8_0"]),
)
def test_what_is_said_to_fit_fits(
    gibibytes: int, context: int, concurrency: int, base: Profile, kind: str | None
) -> None:
    host = machine(cores=["0", "1"], nodes=["0-1"], memory=gibibytes * GIB)
    wish = profile(base, context=context, concurrency=concurrency, kv_type=kind)
    made = plan(host, IQUEST, wish)
    if made.verdict.fits:
        return
    assert made.verdict.alternatives
    for text in made.verdict.alternatives:
        if (changed := applied(wish, text)) is not None:
            assert plan(host, IQUEST, changed).verdict.fits is True, text


@pytest.mark.parametrize("gibibytes", [30, 34, 40])
def test_what_is_said_to_fit_a_gpu_fits(gibibytes: int) -> None:
    card = msgspec.structs.replace(EPYC_GPU.gpus[0], memory_bytes=gibibytes * GIB)
    host = msgspec.structs.replace(EPYC_GPU, gpus=(card,))
    for name, more in (
        ("gpu-nvfp4", {"context": 131072}),
        ("gpu-gguf", {"context": 131072}),
    ):
        wish = profile(shipped(name), **more)
        made = plan(host, shipped_model(wish), wish)
        assert made.verdict.fits is False
        assert any("too much" in text for text in made.verdict.reasons)
        changes = [c for text in made.verdict.alternatives if (c := applied(wish, text))]
        for changed in changes:
            assert plan(host, shipped_model(wish), changed).verdict.fits is True
    moe = profile(shipped("hybrid-moe"), placement={"gpus": "all"})
    made = plan(host, shipped_model(moe), moe)
    assert any("placement.cpu_experts=auto" in text for text in made.verdict.alternatives)


def test_models_that_an_engine_cannot_run_are_refused_with_the_reason() -> None:
    gguf = read_entry("iquest-coder-40b-q5_k_m")
    with pytest.raises(StackctlError, match="vllm cannot run") as caught:
        plan(EPYC_GPU, gguf, shipped("gpu-nvfp4"))
    assert caught.value.details
    assert caught.value.exit_code == 5
    with pytest.raises(StackctlError, match=r"llama\.cpp cannot run") as caught:
        plan(EPYC, read_entry("iquest-coder-40b-loop-nvfp4"), LATENCY)
    assert caught.value.details


def test_every_catalogue_entry_gets_a_verdict_from_an_engine() -> None:
    for name in entries():
        model = read_entry(name)
        wish = shipped("gpu-nvfp4" if model.format == "safetensors" else "cpu-throughput")
        made = plan(EPYC_GPU, model, wish)
        assert made.verdict.fits is True, name
        assert made.verdict.viable is not None, name


def test_ranges_for_people() -> None:
    assert numbers((25.2, 38.4)) == "25-38"
    assert seconds((2.04, 4.21)) == "2.0-4.2"
