"""What the owner of the reference box measured, as a table that predictions must agree with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from samples import (
    CARD,
    EPYC,
    EPYC_GPU,
    HOSTS,
    LATENCY,
    plan,
    profile,
    shipped,
    shipped_model,
)

from stackctl.plan.roofline import Range, RooflineInput, predict, prefill_operations
from stackctl.sources.catalogue import read_entry
from stackctl.values.cpu_list import CpuList
from stackctl.values.engine_facts import Calibration
from stackctl.values.host import Bandwidth, Host
from stackctl.values.model import Model
from stackctl.values.plan import Placement, Plan
from stackctl.values.profile import Slo


def entry(name: str) -> Model:
    return read_entry(name)


def on_card(model: str | Model, wish: str = "gpu-nvfp4") -> Plan:
    found = entry(model) if isinstance(model, str) else model
    return plan(EPYC_GPU, found, shipped(wish))


def decode(made: Plan) -> Range:
    assert made.prediction.decode_tok_s is not None
    return made.prediction.decode_tok_s


def prefill(made: Plan) -> Range:
    assert made.prediction.prefill_tok_s is not None
    return made.prediction.prefill_tok_s


def ttft(made: Plan) -> Range:
    assert made.prediction.ttft_s is not None
    assert made.prediction.ttft_s.range is not None
    return made.prediction.ttft_s.range


def covers(predicted: Range, low: float, high: float) -> bool:
    return predicted[0] <= low and high <= predicted[1]


def overlaps(predicted: Range, low: float, high: float) -> bool:
    return predicted[0] <= high and low <= predicted[1]


# The three set-ups, and what else was measured


def test_a_dense_40b_on_the_cpu_is_not_viable() -> None:
    """Set-up A: prompts of 4,640 tokens take tens of seconds to the first token."""
    made = plan(EPYC, entry("iquest-coder-40b-q5_k_m"), LATENCY)
    assert (made.verdict.fits, made.verdict.viable) == (True, False)
    assert made.prediction.ttft_s is not None
    assert made.prediction.ttft_s.prompt_tokens == 4640
    low, high = ttft(made)
    assert 20 < low < high < 110
    said = " ".join(made.verdict.reasons)
    assert "at 4,640 tokens, allowed 30 s" in said
    assert "every token reads all" in said


def test_10b_active_of_229b_are_viable_for_batch_on_the_cpu() -> None:
    made = plan(EPYC, entry("minimax-m2-229b-a10b-q4_k_m"), shipped("cpu-moe-batch"))
    assert (made.verdict.fits, made.verdict.viable) == (True, True)
    low, high = decode(made)
    assert overlaps((low, high), 10, 37)
    # Neither wild below nor above what was seen.
    assert low > 5
    assert high < 50


def test_the_second_model_for_batch_fits_and_runs() -> None:
    """Kimi-K2.5: 32B active; 13 threads were best on this CPU."""
    made = plan(EPYC, entry("kimi-k2.5-1t-a32b-q4_k_s"), shipped("cpu-moe-batch"))
    assert made.verdict.fits is True
    other = plan(EPYC, entry("minimax-m2-229b-a10b-q4_k_m"), shipped("cpu-moe-batch"))
    assert decode(made)[1] < decode(other)[1] / 2


def test_the_40b_in_nvfp4_on_the_card() -> None:
    """Set-up B: 25-28 tok/s, 1,100-2,300 tok/s of prompt, PF 0.65-0.70."""
    made = on_card("iquest-coder-40b-nvfp4")
    assert (made.verdict.fits, made.verdict.viable) == (True, True)
    assert covers(decode(made), 25, 28)
    assert covers(prefill(made), 1100, 2300)
    assert made.prediction.performance_factor is not None
    assert covers(made.prediction.performance_factor, 0.65, 0.70)
    # 200 tokens of answer took 7-8 s, 800 about 30 s.
    low, high = decode(made)
    assert overlaps((200 / high, 200 / low), 7, 8)
    assert overlaps((800 / high, 800 / low), 28, 32)


def test_the_loop_variant_is_half_as_fast() -> None:
    """Set-up C: its layers run twice for every token; prompts reached about 900 tok/s."""
    plain, loop = on_card("iquest-coder-40b-nvfp4"), on_card("iquest-coder-40b-loop-nvfp4")
    for before, after in zip(decode(plain), decode(loop), strict=True):
        assert 1.8 < before / after < 2.2
    assert overlaps(prefill(loop), 500, 900)
    assert loop.verdict.viable is False
    assert any("2 times for every token" in text for text in loop.verdict.reasons)


def test_the_111b_is_about_2_4_times_slower_than_the_40b() -> None:
    small = on_card("iquest-coder-40b-nvfp4")
    large = on_card("command-a-reasoning-111b-nvfp4", "gpu-reasoning")
    assert (large.verdict.fits, large.verdict.viable) == (True, True)
    assert covers(decode(large), 11, 11)
    for fast, slow in zip(decode(small), decode(large), strict=True):
        assert 2.3 <= fast / slow <= 2.5
    assert large.prediction.performance_factor is not None
    assert covers(large.prediction.performance_factor, 0.10, 0.10)


def test_a_7b_in_16_bit_on_the_card() -> None:
    small = entry("qwen2.5-coder-7b-q5_k_m")
    fp16 = msgspec.structs.replace(
        small,
        format="safetensors",
        quantization="fp16",
        quantization_method=None,
        weights_bytes=2 * small.parameters,
        embedding_bytes=2 * (small.vocabulary or 0) * (small.embedding or 0),
        unsupported=(),
    )
    made = on_card(fp16)
    assert overlaps(decode(made), 60, 80)
    assert made.prediction.performance_factor is not None
    assert overlaps(made.prediction.performance_factor, 9, 11)


def test_a_7b_on_the_cpu_is_interactive_with_short_prompts() -> None:
    made = plan(EPYC, entry("qwen2.5-coder-7b-q5_k_m"), shipped("cpu-small"))
    assert made.verdict.viable is True
    assert ttft(made)[1] < 5


# The commands behind set-ups A and B


def words(made: Plan) -> list[str]:
    """Options with their values, one text each."""
    found: list[str] = []
    for token in made.argv:
        if token.startswith("--") or not found:
            found.append(token)
        else:
            found[-1] += f" {token}"
    return found


def test_the_command_of_set_up_a_can_be_said_exactly() -> None:
    """--jinja -c 8192 --threads 14 --threads-batch 14 -b 2048 -ub 512 --parallel 1 --flash-attn on,
    by profile keys where there is one."""
    wish = profile(LATENCY, engine_args={"batch-size": (2048,), "ubatch-size": (512,)})
    said = words(plan(EPYC, entry("iquest-coder-40b-q5_k_m"), wish))
    for option in ("--jinja", "--ctx-size 8192", "--threads 14", "--threads-batch 14",
                   "--batch-size 2048", "--ubatch-size 512", "--parallel 1",
                   "--flash-attn on"):  # fmt: skip
        assert said.count(option) == 1, option
    # And with nothing but engine options.
    wish = profile(LATENCY, engine_args={
        "jinja": (), "ctx-size": (8192,), "threads": (14,), "threads-batch": (14,),
        "batch-size": (2048,), "ubatch-size": (512,), "parallel": (1,), "flash-attn": ("on",),
    })  # fmt: skip
    assert words(plan(EPYC, entry("iquest-coder-40b-q5_k_m"), wish)) == said


def test_the_command_of_set_up_b_is_what_gpu_nvfp4_says() -> None:
    wish = shipped("gpu-nvfp4")
    made = plan(EPYC_GPU, shipped_model(wish), wish)
    said = words(made)
    assert said[0] == "vllm serve IQuestLab/IQuest-Coder-V1-40B-Instruct-nvfp4"
    for option in ("--max-num-seqs 1", "--max-model-len 32768", "--gpu-memory-utilization 0.92"):
        assert said.count(option) == 1, option
    assert not any(option.startswith("--quantization") for option in said)
    assert [d.reason for d in made.decisions if d.field == "quantization"] == [
        "in the checkpoint: modelopt"
    ]


def test_golden_commands(golden: Callable[[str, str], None]) -> None:
    """Both commands, whole."""
    a = profile(LATENCY, engine_args={"batch-size": (2048,), "ubatch-size": (512,)})
    b = shipped("gpu-nvfp4")
    lines = [
        *words(plan(EPYC_GPU, entry("iquest-coder-40b-q5_k_m"), a)),
        "",
        *words(plan(EPYC_GPU, shipped_model(b), b)),
    ]
    golden("commands.txt", "\n".join(lines) + "\n")


# The arithmetic


def work(model: Model, **changes: Any) -> RooflineInput:
    base = {
        "model": model, "cpu_bytes": float(model.active_bytes), "gpu_bytes": 0.0,
        "kv_token_bytes": 0.0, "prompt_tokens": 4640, "threads": 14,
    }  # fmt: skip
    return RooflineInput(**{**base, **changes})


CPU = Placement(cpus=CpuList.parse("0-13"), mems=CpuList.parse("0"))
DENSE = entry("iquest-coder-40b-q5_k_m")


def with_bandwidth(host: Host, **values: float | None) -> Host:
    memory = msgspec.structs.replace(host.memory, bandwidth_bytes_s=Bandwidth(**values))
    return msgspec.structs.replace(host, memory=memory)


def test_decode_never_beats_the_memory() -> None:
    for model in map(entry, ("iquest-coder-40b-q5_k_m", "minimax-m2-229b-a10b-q4_k_m")):
        made = predict(EPYC, CPU, work(model))
        assert made.decode_tok_s is not None
        bound = (EPYC.memory.bandwidth_bytes_s.theoretical or 0) / model.active_bytes
        assert made.decode_tok_s[0] <= made.decode_tok_s[1] < bound


def test_the_cache_that_is_read_slows_generation_down() -> None:
    plain = predict(EPYC, CPU, work(DENSE))
    full = predict(EPYC, CPU, work(DENSE, kv_token_bytes=320 * 1024.0))
    assert plain.decode_tok_s is not None
    assert full.decode_tok_s is not None
    assert full.decode_tok_s[0] < plain.decode_tok_s[0]


def test_what_was_measured_counts_before_what_is_published() -> None:
    measured = predict(with_bandwidth(EPYC, theoretical=614e9, measured=400e9), CPU, work(DENSE))
    assert measured.decode_tok_s is not None
    assert measured.decode_tok_s[1] <= 400e9 / DENSE.active_bytes * 1.01
    calibration = Calibration(
        engine="llama.cpp", quantization="Q5_K_M", threads=14, decode_bytes_s=300e9,
        prefill_flops=5e12, decode_tok_s=10, prefill_tok_s=60, model="m", image_id="i",
        measured="2026-01-01T00:00:00Z",
    )  # fmt: skip
    known = predict(EPYC, CPU, work(DENSE), calibration)
    assert known.basis == "measured"
    assert known.decode_tok_s is not None
    assert overlaps(known.decode_tok_s, 300e9 / DENSE.active_bytes, 300e9 / DENSE.active_bytes)
    assert known.prefill_tok_s is not None
    exact = 5e12 / prefill_operations(DENSE, 4640)
    assert overlaps(known.prefill_tok_s, exact, exact)


def test_what_is_unknown_is_not_predicted() -> None:
    nothing = predict(Host(), Placement(), work(DENSE, threads=None))
    assert nothing.decode_tok_s is None
    assert nothing.prefill_tok_s is None
    assert nothing.performance_factor is None
    assert nothing.ttft_s is not None
    assert nothing.ttft_s.range is None
    # A GPU of an unknown make: bandwidth and rate are not guessed.
    odd = msgspec.structs.replace(CARD, name="Some GPU", bandwidth_bytes_s=None)
    host = msgspec.structs.replace(EPYC, gpus=(odd,))
    made = predict(host, Placement(gpus=("0",)), work(DENSE, cpu_bytes=0.0, gpu_bytes=1e9))
    assert (made.decode_tok_s, made.prefill_tok_s) == (None, None)


def test_a_bound_node_has_its_share_of_the_bandwidth() -> None:
    host = HOSTS["dual-nps4"]
    bound = Placement(cpus=CpuList.parse("0-23"), mems=CpuList.parse("0"), policy="bind")
    one = predict(host, bound, work(DENSE, threads=24))
    spread = Placement(cpus=CpuList.parse("0-95"), mems=CpuList.parse("0-3"), policy="interleave")
    four = predict(host, spread, work(DENSE))
    all_nodes = Placement(cpus=CpuList.parse("0-191"), mems=CpuList.parse("0-7"))
    everything = predict(host, all_nodes, work(DENSE))
    assert one.decode_tok_s is not None
    assert four.decode_tok_s is not None
    assert everything.decode_tok_s is not None
    assert everything.decode_tok_s[1] == pytest.approx(8 * one.decode_tok_s[1], rel=0.1)
    assert four.decode_tok_s[1] == pytest.approx(4 * one.decode_tok_s[1], rel=0.1)


def test_a_few_cores_do_not_fill_the_memory_channels() -> None:
    """What other stacks leave of the cores bounds generation too."""
    few = plan(EPYC, DENSE, profile(LATENCY, placement={"cpus": "14-15"}))
    assert decode(few)[1] < 100e9 / DENSE.active_bytes
    # Nearly all cores do.
    most = plan(EPYC, DENSE, profile(LATENCY, placement={"cpus": "0-13"}))
    everything = predict(EPYC, CPU, work(DENSE, decode_threads=None))
    assert everything.decode_tok_s is not None
    assert decode(most)[1] == pytest.approx(everything.decode_tok_s[1], rel=0.02)


def test_prompts_cost_more_the_longer_they_are() -> None:
    assert prefill_operations(DENSE, 32768) > prefill_operations(DENSE, 512)
    # Two operations a parameter, without the output layer.
    head = (DENSE.vocabulary or 0) * (DENSE.embedding or 0)
    least = 2 * ((DENSE.active_parameters or 0) - head)
    assert least < prefill_operations(DENSE, 512) < 1.05 * least
    loop = entry("iquest-coder-40b-loop-nvfp4")
    plain = entry("iquest-coder-40b-nvfp4")
    ratio = prefill_operations(loop, 4640) / prefill_operations(plain, 4640)
    assert ratio == pytest.approx(2, rel=0.01)


def test_a_window_bounds_attention() -> None:
    gemma = entry("gemma-3-270m-q4_k_m")
    assert gemma.kv is not None
    wide = msgspec.structs.replace(gemma, kv=msgspec.structs.replace(
        gemma.kv, sliding_window=None, sliding_layers=0, sliding=()
    ))  # fmt: skip
    assert prefill_operations(gemma, 32768) < prefill_operations(wide, 32768) / 2
    assert prefill_operations(gemma, 256) == prefill_operations(wide, 256)


@pytest.mark.parametrize("name", HOSTS)
def test_predictions_are_ranges(name: str) -> None:
    for wish in ("cpu-latency", "cpu-small", "cpu-moe-batch", "cpu"):
        made = plan(HOSTS[name], shipped_model(shipped(wish)), shipped(wish))
        for pair in (made.prediction.decode_tok_s, made.prediction.prefill_tok_s,
                     made.prediction.performance_factor):  # fmt: skip
            if pair is not None:
                assert 0 < pair[0] <= pair[1]
        assert made.prediction.basis == "estimated"
        assert len(made.placement.cpus or ()) <= (HOSTS[name].cpu.cores or 0)


def test_the_prompt_of_the_objective_is_the_one_predicted() -> None:
    made = plan(EPYC, DENSE, profile(LATENCY, slo=Slo(prompt_tokens=230, ttft_s=30.0)))
    assert made.prediction.ttft_s is not None
    assert made.prediction.ttft_s.prompt_tokens == 230
    assert made.verdict.viable is True
