"""Verdicts: what fits, what is worth running, and advice that helps."""

from __future__ import annotations

import re
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import (
    CARD,
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
from stackctl.plan.claimed_resources import claim_of
from stackctl.plan.verdict import (
    format_range,
    objective_status,
    refusal,
    with_alternatives,
)
from stackctl.resources import data_folder
from stackctl.sources.catalogue import catalogue_entries, read_entry
from stackctl.sources.profiles import Profiles
from stackctl.values.host import Host
from stackctl.values.plan import Claim, GpuShare, Plan, Verdict
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
    verdict = with_alternatives(made, LATENCY, candidates(EPYC_GPU))
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
    verdict = with_alternatives(made, LATENCY, candidates(EPYC))
    assert not any("gpu-" in text or "hybrid" in text for text in verdict.alternatives)
    assert verdict.alternatives[0].startswith("shorter prompts: under 30 s up to about ")


def test_shorter_prompts_are_short_enough() -> None:
    made = plan(EPYC, read_entry("iquest-coder-40b-q5_k_m"), LATENCY)
    verdict = with_alternatives(made, LATENCY, ())
    found = re.search(r"up to about ([\d,]+) tokens", " ".join(verdict.alternatives))
    assert found is not None
    tokens = int(found[1].replace(",", ""))
    shorter = profile(LATENCY, slo=Slo(prompt_tokens=tokens, ttft_s=30.0))
    again = plan(EPYC, read_entry("iquest-coder-40b-q5_k_m"), shorter)
    assert again.verdict.viable is True


def test_a_refusal_says_the_most_important_thing_first() -> None:
    made = plan(EPYC, read_entry("iquest-coder-40b-q5_k_m"), LATENCY)
    said, rest = refusal(made)
    assert re.fullmatch(
        r"not viable: first token after \d+-\d+ s at 4,640 tokens, allowed 30 s", said
    )
    assert rest[0].startswith("dense 39.4B: every token reads all 28.1 GB")
    assert re.fullmatch(r"generation would be \d+-\d+ tok/s", rest[1])
    assert len(rest) == 2


def test_reasons_are_chosen_by_their_codes_and_never_by_their_text() -> None:
    """Two pools are too small: the headline gives the larger shortage, the rest all else."""
    made = plan(EPYC, read_entry("iquest-coder-40b-q5_k_m"), LATENCY)
    gpu = msgspec.structs.replace(made.memory, pool="GPU 0", headroom_bytes=-GIB)
    main = msgspec.structs.replace(made.memory, headroom_bytes=-3 * GIB)
    both = msgspec.structs.replace(
        made,
        memory=gpu,
        host_memory=main,
        verdict=Verdict(
            fits=False,
            viable=False,
            reasons=("a", "b", "c", "d"),
            codes=("memory-exceeded", "memory-shortage", "memory-exceeded", "memory-shortage"),
        ),
    )
    assert refusal(both) == ("cpu-latency does not fit: 3 GiB too much", ["a", "b", "c"])
    slow = Verdict(
        fits=True,
        viable=False,
        reasons=("a", "b", "c"),
        codes=("memory-fits", "first-token-missed", "model-size"),
    )
    late = msgspec.structs.replace(made, verdict=slow)
    assert refusal(late) == ("not viable: b", ["c"])


def test_the_same_model_on_a_gpu_is_offered_with_its_name() -> None:
    mine = msgspec.structs.replace(read_entry("iquest-coder-40b-q5_k_m"), source="file:/m/x.gguf")
    made = plan(EPYC_GPU, mine, LATENCY)
    offers = [plan(EPYC_GPU, mine, shipped("gpu-gguf")), *candidates(EPYC)]
    first = with_alternatives(made, LATENCY, offers, moved=["gpu-gguf"]).alternatives[0]
    assert first.startswith("stackctl up gpu-gguf --model file:/m/x.gguf: ")
    # What runs under the same name is no other way out.
    assert not any("up cpu:" in t for t in with_alternatives(made, LATENCY, offers).alternatives)


def test_advice_for_interactive_use_is_not_slower_than_the_refused_plan() -> None:
    small = shipped_model(shipped("cpu-small"))
    strict = profile(LATENCY, slo=Slo(prompt_tokens=4640, ttft_s=0.001))
    fast = plan(EPYC, small, strict)
    slow = plan(EPYC, read_entry("iquest-coder-40b-q5_k_m"), shipped("cpu"))
    viable = msgspec.structs.replace(
        slow, profile="other", stack="other",
        verdict=msgspec.structs.replace(slow.verdict, fits=True, viable=True),
    )  # fmt: skip
    assert (fast.verdict.fits, fast.verdict.viable) == (True, False)
    assert not any("up other" in t for t in with_alternatives(fast, strict, [viable]).alternatives)
    # If the plan does not fit, its speed is no reason.
    large = msgspec.structs.replace(fast, verdict=msgspec.structs.replace(fast.verdict, fits=False))
    assert any("up other" in t for t in with_alternatives(large, strict, [viable]).alternatives)


def test_how_a_plan_stands_to_its_objectives() -> None:
    made = plan(EPYC, IQUEST, profile(LATENCY)).prediction
    assert made.ttft_s is not None
    assert made.ttft_s.range is not None
    low, high = made.ttft_s.range
    for allowed, stands in ((low / 2, "missed"), ((low + high) / 2, "at risk"), (high, "ok")):
        assert objective_status(Slo(ttft_s=allowed), made) == [
            (f"p95 first token {allowed:g} s", stands)
        ]
    slo = Slo(itl_ms=1.0, min_tok_s=1.0)
    assert objective_status(slo, made) == [
        ("p95 between tokens 1 ms", "missed"),
        ("at least 1 tok/s", "ok"),
    ]
    unknown = plan(Host(), IQUEST).prediction
    assert [how for _, how in objective_status(Slo(ttft_s=1.0, min_tok_s=1.0), unknown)] == [
        "unknown", "unknown",
    ]  # fmt: skip
    assert objective_status(Slo(), made) == []


def test_a_good_plan_needs_no_advice() -> None:
    wish = shipped("gpu-nvfp4")
    made = plan(EPYC_GPU, shipped_model(wish), wish)
    assert with_alternatives(made, wish, candidates(EPYC_GPU)) == made.verdict


def test_advice_never_names_the_same_plan_or_one_that_is_no_good() -> None:
    offered = candidates(HOSTS["desktop"])
    for made in offered:
        wish = shipped(made.profile)
        verdict = with_alternatives(made, wish, offered)
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
    """The profile with every --set of an alternative; None when it names none."""
    found = re.findall(r"--set ([\w.]+)=(\S+)", text)
    for key, word in found:
        value: Any = int(word) if word.isdigit() else word
        group, _, name = key.rpartition(".")
        if group:
            value = msgspec.structs.replace(getattr(wish, group), **{name: value})
        wish = msgspec.structs.replace(wish, **{group or name: value})
    return wish if found else None


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


@settings(max_examples=120, deadline=None)
@given(st.data())
def test_every_change_that_is_offered_fits(data: st.DataObject) -> None:
    """On any machine, beside any other stack, for every shipped profile."""
    name = data.draw(st.sampled_from(Profiles([data_folder("profiles")]).names()))
    gib = data.draw(st.integers(4, 200))
    cards = tuple(
        msgspec.structs.replace(CARD, index=n, memory_bytes=data.draw(st.integers(4, 100)) * GIB)
        for n in range(data.draw(st.integers(0, 3)))
    )
    host = msgspec.structs.replace(
        machine(cores=["0", "1", "2", "3"], nodes=["0-3"], memory=gib * GIB), gpus=cards
    )
    beside = tuple(
        Claim(
            stack=stack,
            memory_bytes=data.draw(st.integers(0, 64)) * GIB,
            gpus=(GpuShare(index=0, bytes=data.draw(st.integers(0, 64)) * GIB),),
        )
        for stack in data.draw(st.sampled_from([(), ("x",), ("x", "y")]))
    )
    wish = profile(
        shipped(name),
        context=data.draw(st.sampled_from(["auto", 2048, 32768, 131072])),
        concurrency=data.draw(st.sampled_from(["auto", 1, 8])),
    )
    model = shipped_model(wish)
    try:
        made = plan(host, model, wish, claims=beside)
    except StackctlError:
        return
    if made.verdict.fits is not False:
        return
    assert made.verdict.alternatives
    for text in made.verdict.alternatives:
        if stop := re.search(r"stackctl down (\S+)$", text):
            rest = tuple(claim for claim in beside if claim.stack != stop[1])
            assert plan(host, model, wish, claims=rest).verdict.fits is True, text
        elif (changed := applied(wish, text)) is not None:
            assert plan(host, model, changed, claims=beside).verdict.fits is True, text
        else:
            assert re.search(r"weights of .* at most|a smaller model", text), text


def test_what_else_runs_is_named_when_stopping_it_is_enough() -> None:
    coder, thinker = shipped("gpu-nvfp4"), shipped("gpu-reasoning")
    claim = claim_of(plan(EPYC_GPU, shipped_model(coder), coder))
    made = plan(EPYC_GPU, shipped_model(thinker), thinker, claims=(claim,))
    assert made.verdict.fits is False
    assert made.verdict.alternatives[0].endswith("stackctl down gpu-nvfp4")


def test_two_small_changes_where_one_is_not_enough() -> None:
    host = machine(cores=["0", "1"], nodes=["0-1"], memory=29 * GIB)
    made = plan(host, IQUEST, profile(context=131072, concurrency=4))
    assert made.verdict.fits is False
    (first, *_) = made.verdict.alternatives
    assert re.fullmatch(r"a smaller context: --set context=\d+ --set kv_type=q8_0", first) or (
        re.fullmatch(r"a smaller context: --set context=\d+", first)
    )


def test_the_unknown_fact_is_named_where_no_speed_is_predicted() -> None:
    wish = shipped("gpu-nvfp4")
    card = msgspec.structs.replace(EPYC_GPU.gpus[0], name="Some GPU", bandwidth_bytes_s=None)
    host = msgspec.structs.replace(EPYC_GPU, gpus=(card,))
    made = plan(host, shipped_model(wish), wish)
    assert "speed not predicted: memory bandwidth of Some GPU unknown" in made.verdict.reasons


def test_more_gpus_are_offered() -> None:
    small = msgspec.structs.replace(CARD, memory_bytes=56 * GIB)
    host = msgspec.structs.replace(EPYC_GPU, gpus=(small, msgspec.structs.replace(small, index=1)))
    wish = shipped("gpu-reasoning")
    made = plan(host, shipped_model(wish), wish)
    assert made.verdict.fits is False
    wide = [text for text in made.verdict.alternatives if "placement.gpus=all" in text]
    changed = applied(wish, wide[0]) if wide else None
    assert changed is not None
    assert plan(host, shipped_model(wish), changed).verdict.fits is True


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
    for name in catalogue_entries():
        model = read_entry(name)
        wish = shipped("gpu-nvfp4" if model.format == "safetensors" else "cpu-throughput")
        made = plan(EPYC_GPU, model, wish)
        assert made.verdict.fits is True, name
        assert made.verdict.viable is not None, name


def test_ranges_for_people() -> None:
    assert format_range((25.2, 38.4)) == "25-38"
    assert format_range((2.04, 4.21)) == "2.0-4.2"
