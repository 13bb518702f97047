"""vLLM: its help, what is planned for it, memory, and what its log tells."""

from __future__ import annotations

import re
from typing import Any

import msgspec
import pytest
from samples import (
    CARD,
    EPYC_GPU,
    GIB,
    HOSTS,
    MIB,
    SHARED,
    facts_of,
    plan,
    profile,
    shipped,
    shipped_model,
)

from stackctl.engines import engine
from stackctl.engines.options import Dialect, Option
from stackctl.engines.vllm.memory import kv_token_bytes
from stackctl.errors import ExitCode, StackctlError
from stackctl.plan.claimed_resources import claim_of
from stackctl.sources.catalogue import read_entry
from stackctl.values.cpu_list import CpuList
from stackctl.values.engine_facts import MeasuredMemory
from stackctl.values.host import Gpu, Host
from stackctl.values.plan import Claim, Decision, GpuShare, Plan

VLLM = engine("vllm")
HELP = SHARED / "captures" / "vllm-0.32-serve-help.txt"
LOG = SHARED / "captures" / "vllm-0.32-cpu-startup.log"
NVFP4 = shipped("gpu-nvfp4")
MODEL = shipped_model(NVFP4)
KIB = 2**10


def made_for(host: Host = EPYC_GPU, model: Any = MODEL, facts: Any = None, **changes: Any) -> Plan:
    claims = changes.pop("claims", ())
    return plan(host, model, profile(NVFP4, **changes), facts, claims=claims)


def with_cards(*cards: Gpu) -> Host:
    return msgspec.structs.replace(EPYC_GPU, gpus=cards)


def values_of(made: Plan, option: str) -> list[str]:
    pairs = zip(made.argv, made.argv[1:], strict=False)
    return [after for token, after in pairs if token == f"--{option}"]


@pytest.fixture(scope="module")
def recorded() -> Dialect:
    if not HELP.is_file():
        pytest.skip("the recorded help is not beside this checkout")
    return Dialect(VLLM.parse_help(HELP.read_text("utf-8")), inspected=True)


# Help and dialects


def test_the_recorded_help(recorded: Dialect) -> None:
    assert len(recorded.options) > 150
    for option in VLLM.newest.options:
        for name in option.names:
            assert recorded.find(name[2:]) is not None, name
    # Whole names: the engine's own parser takes abbreviations, a check must not.
    assert recorded.find("max-num-seq") is None
    assert recorded.find("max-num-seqs") is not None
    switch = recorded.find("trust-remote-code")
    assert switch is not None
    assert switch is recorded.find("no-trust-remote-code")
    assert switch.value is None
    utilization = recorded.find("gpu-memory-utilization")
    assert utilization is not None
    assert utilization.value is not None
    for option in recorded.options:
        assert all(re.fullmatch(r"-{1,2}[a-zA-Z][\w-]*", name) for name in option.names), option


@pytest.mark.parametrize("objective", ["latency", "throughput"])
@pytest.mark.parametrize("name", ["gpu-nvfp4", "gpu-reasoning"])
def test_every_option_that_is_written_is_in_the_recorded_help(
    recorded: Dialect, name: str, objective: str
) -> None:
    wish = profile(shipped(name, objective=objective), kv_type="fp8")
    host = with_cards(CARD, msgspec.structs.replace(CARD, index=1))
    wish = msgspec.structs.replace(
        wish, placement=msgspec.structs.replace(wish.placement, gpus="all")
    )
    facts = msgspec.structs.replace(facts_of(recorded.options), engine="vllm")
    looked_at = plan(host, shipped_model(wish), wish, facts)
    for token in looked_at.argv:
        if token.startswith("--"):
            assert recorded.find(token[2:]) is not None, token
    assert looked_at.argv == plan(host, shipped_model(wish), wish).argv
    assert "--kv-cache-dtype" in looked_at.argv
    assert values_of(looked_at, "tensor-parallel-size") == ["2"]


@pytest.mark.parametrize("text", ["", "usage: cat [FILE]\n", "Error: no such file\n"])
def test_what_is_no_help(text: str) -> None:
    assert VLLM.parse_help(text) == ()


def test_a_help_of_argparse() -> None:
    text = (
        "options:\n"
        "  -h, --help            show this help message and exit\n"
        "  --port PORT           Port number. Not --ports.\n"
        "  --dtype {auto,half}   Data type.\n"
        "  --trust-remote-code, --no-trust-remote-code\n"
        "                        Trust --remote code.\n"
        "  --tensor-parallel-size N, -tp N\n"
    )
    dialect = Dialect(VLLM.parse_help(text), inspected=True)
    assert set(dialect.option_names()) == {
        "help", "port", "dtype", "trust-remote-code", "no-trust-remote-code", "tensor-parallel-size"
    }  # fmt: skip
    values = {"port": "PORT", "dtype": "{auto,half}", "tensor-parallel-size": "N", "help": None}
    for name, value in values.items():
        found = dialect.find(name)
        assert found is not None
        assert found.value == value


@pytest.mark.parametrize(
    ("text", "version"),
    [("0.32.1\n", "0.32.1"), ("vllm 0.33.0.dev12+gabc", "0.33.0.dev12+gabc"), ("none", None)],
)
def test_version(text: str, version: str | None) -> None:
    assert VLLM.parse_version(text) == version


def spell(name: str, *values: Any) -> tuple[str, ...] | None:
    return VLLM.render_option(Option(name, values, "test"), VLLM.newest)


def test_how_options_are_written() -> None:
    assert spell("model", "org/name") == ("serve", "org/name")
    assert spell("max-num-seqs", 1) == ("--max-num-seqs", "1")
    assert spell("trust-remote-code") == ("--trust-remote-code",)
    assert spell("gpu-memory-utilization", 0.92) == ("--gpu-memory-utilization", "0.92")
    assert spell("no-such-option", 1) is None
    assert VLLM.render_option(Option("quantization", None, "left out"), VLLM.newest) == ()


@pytest.mark.parametrize("name", ["host", "port", "model", "served-model-name", "api-key"])
def test_options_that_stackctl_sets_itself_are_refused(name: str) -> None:
    with pytest.raises(StackctlError, match="set by stackctl itself"):
        made_for(engine_args={name: ("x",)})


def test_an_abbreviated_option_is_not_taken_for_the_whole_one(recorded: Dialect) -> None:
    facts = msgspec.structs.replace(facts_of(recorded.options), engine="vllm")
    with pytest.raises(StackctlError, match="has no option --max-num-seq") as caught:
        made_for(facts=facts, engine_args={"max-num-seq": (4,)})
    assert caught.value.hint == "did you mean max-num-seqs?"


# What is planned


def test_both_objectives() -> None:
    latency = plan(EPYC_GPU, MODEL, NVFP4)
    throughput = plan(EPYC_GPU, MODEL, shipped("gpu-nvfp4", objective="throughput"))
    assert [values_of(made, name)[0] for made in (latency, throughput) for name in (
        "max-num-seqs", "max-num-batched-tokens", "performance-mode")] == [
        "1", "8192", "interactivity", "64", "16384", "throughput",
    ]  # fmt: skip
    for made in (latency, throughput):
        assert values_of(made, "max-model-len") == ["32768"]
        assert values_of(made, "host") == ["127.0.0.1"]
        assert "--quantization" not in made.argv
        assert "--api-key" not in made.argv


def test_the_quantisation_is_given_only_when_asked_for() -> None:
    made = made_for(engine_args={"quantization": ("fp8",)})
    assert values_of(made, "quantization") == ["fp8"]


def test_a_backend_can_be_forced() -> None:
    made = made_for(engine_args={"linear-backend": ("marlin",)})
    assert values_of(made, "linear-backend") == ["marlin"]


HUB = msgspec.structs.replace(MODEL, folder=f"/hub/models--Org--Repo/snapshots/{'a1' * 20}")


def test_code_of_the_model_is_trusted_at_one_commit_only() -> None:
    assert "--trust-remote-code" not in made_for(model=HUB).argv
    made = made_for(model=HUB, trust_remote_code=True)
    assert "--trust-remote-code" in made.argv
    (why,) = (d for d in made.decisions if d.field == "trust-remote-code")
    assert (why.value, why.source) == (True, "profile")
    assert why.reason == "the code of commit a1a1a1a1a1a1 is trusted"


@pytest.mark.parametrize(
    "folder",
    [None, "/srv/models/x", "/hub/models--Org--Repo/snapshots/main", "/snapshots/" + "a1" * 20],
)
def test_code_of_no_known_commit_is_not_trusted(folder: str | None) -> None:
    with pytest.raises(StackctlError, match="nothing tells the commit of hf:") as caught:
        made_for(model=msgspec.structs.replace(MODEL, folder=folder), trust_remote_code=True)
    assert caught.value.exit_code == ExitCode.USAGE
    assert "@COMMIT" in (caught.value.hint or "")


def variables(made: Plan) -> dict[str, str]:
    return dict(text.split("=", 1) for text in made.environment)


def test_the_environment() -> None:
    """Nothing is fetched or told to others, and all that is written lies in the kept cache."""
    found = variables(made_for())
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "VLLM_NO_USAGE_STATS", "DO_NOT_TRACK"):
        assert found.pop(name) == "1"
    assert {"HOME", "VLLM_CACHE_ROOT", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"} <= set(found)
    assert all(path.split("/")[:2] == ["", "cache"] for path in found.values()), found
    # Engines beside each other in the cache do not mix.
    assert len({found["VLLM_CACHE_ROOT"], found["TRITON_CACHE_DIR"], found["HOME"]}) == 3


def test_without_gpus_it_computes_on_the_cores_of_the_plan() -> None:
    made = made_for(placement={"gpus": "none"})
    assert made.placement.gpus == ()
    assert made.host_memory is None
    assert claim_of(made).gpus == ()
    assert not any(decision.field == "gpus" for decision in made.decisions)
    assert made.placement.cpus == CpuList.parse("0-13")
    assert variables(made)["VLLM_CPU_OMP_THREADS_BIND"] == "0-13"
    assert "VLLM_CPU_OMP_THREADS_BIND" not in variables(made_for())
    # The cache is told in bytes, as much as the requests take: nothing counts as spare there.
    assert "--gpu-memory-utilization" not in made.argv
    assert int(values_of(made, "kv-cache-memory-bytes")[0]) == made.memory.kv_bytes == 10 * GIB
    bare = msgspec.structs.replace(EPYC_GPU, gpus=())
    assert made_for(host=bare, placement={"gpus": "none"}).argv == made.argv


def test_a_profile_without_gpus_is_not_sent_to_them() -> None:
    """Even where it does not fit and GPUs would have room."""
    host = with_cards(CARD, msgspec.structs.replace(CARD, index=1))
    small = msgspec.structs.replace(host.memory, total_bytes=16 * GIB, available_bytes=15 * GIB)
    host = msgspec.structs.replace(host, memory=small)
    made = made_for(host=host, placement={"gpus": "none"})
    assert made.verdict.fits is False
    assert not any("GPU" in text for text in made.verdict.alternatives)


@pytest.mark.parametrize("engine_name", ["vllm", "llama.cpp"])
def test_gpus_none_for_either_engine(engine_name: str) -> None:
    wish = profile(shipped("gpu-gguf" if engine_name == "llama.cpp" else "cpu-vllm"))
    made = plan(EPYC_GPU, shipped_model(wish), profile(wish, placement={"gpus": "none"}))
    assert made.placement.gpus == ()
    assert "--n-gpu-layers" not in made.argv or values_of(made, "n-gpu-layers") == ["0"]


def test_a_gpu_profile_without_a_gpu() -> None:
    with pytest.raises(StackctlError, match="needs a GPU") as caught:
        made_for(host=msgspec.structs.replace(EPYC_GPU, gpus=()))
    assert caught.value.exit_code == ExitCode.HOST


@pytest.mark.parametrize(("wish", "match"), [("1", "no GPU 1"), ("0-3", "no GPU"), ("", "no GPU")])
def test_a_gpu_that_is_not_there(wish: str, match: str) -> None:
    with pytest.raises(StackctlError, match=match) as caught:
        made_for(placement={"gpus": wish})
    assert caught.value.exit_code == ExitCode.USAGE


def test_the_worker_sits_on_the_gpu_s_node() -> None:
    card = msgspec.structs.replace(CARD, numa_node=2)
    host = msgspec.structs.replace(HOSTS["dual-nps4"], gpus=(card,))
    assert made_for(host=host).placement.cpus == CpuList.parse("70-71")
    unknown = msgspec.structs.replace(CARD, numa_node=None)
    host = msgspec.structs.replace(HOSTS["dual-nps4"], gpus=(unknown,))
    assert made_for(host=host).placement.cpus == CpuList.parse("190-191")
    named = made_for(placement={"cpus": "4-9"})
    assert named.placement.cpus == CpuList.parse("4-9")
    # Each GPU's worker on its own GPU's node.
    pair = (card, msgspec.structs.replace(CARD, index=1, numa_node=5))
    host = msgspec.structs.replace(HOSTS["dual-nps4"], gpus=pair)
    both = made_for(host=host, placement={"gpus": "all"})
    assert both.placement.cpus == CpuList.parse("70-71,142-143")
    (why,) = (d.reason for d in both.decisions if d.field == "cpus")
    assert "on GPU 0's node, on GPU 1's node" in why
    # What is not known is not said.
    host = msgspec.structs.replace(HOSTS["dual-nps4"], gpus=(unknown,))
    (why,) = (d.reason for d in made_for(host=host).decisions if d.field == "cpus")
    assert "node of GPU 0 unknown" in why
    taken = Claim(stack="x", cpus=CpuList.parse("48-71"))
    host = msgspec.structs.replace(HOSTS["dual-nps4"], gpus=(card,))
    (why,) = (d.reason for d in made_for(host=host, claims=(taken,)).decisions if d.field == "cpus")
    assert "no core left on GPU 0's node" in why


def test_the_gpu_with_most_room_is_taken() -> None:
    host = with_cards(CARD, msgspec.structs.replace(CARD, index=1))
    assert made_for(host=host).placement.gpus == ("0",)
    busy = Claim(stack="x", gpus=(GpuShare(index=0, bytes=20 * GIB),))
    made = made_for(host=host, claims=(busy,))
    assert made.placement.gpus == ("1",)
    # It stays there when it is planned again.
    both = (busy, claim_of(made))
    assert made_for(host=host, claims=both) == made


def test_three_gpus_do_not_divide_attention_heads() -> None:
    host = with_cards(*(msgspec.structs.replace(CARD, index=n) for n in range(3)))
    made = made_for(host=host, placement={"gpus": "all"})
    assert made.placement.gpus == ("0", "1")
    (why,) = (d.reason for d in made.decisions if d.field == "gpus")
    assert "of 3 GPUs as many as divide the heads" in why
    # llama.cpp splits by layers.
    wish = shipped("gpu-gguf")
    assert plan(host, shipped_model(wish), wish).placement.gpus == ("0", "1", "2")


def spare_tokens(made: Plan) -> int:
    reason = next(d.reason for d in made.decisions if d.field == "gpu-memory-utilization")
    return int(re.findall(r"\(([\d,]+) tokens\)", reason)[0].replace(",", ""))


def test_several_gpus_share_the_weights() -> None:
    host = with_cards(CARD, msgspec.structs.replace(CARD, index=1))
    one, two = made_for(host=host), made_for(host=host, placement={"gpus": "all"})
    assert values_of(two, "tensor-parallel-size") == ["2"]
    assert not values_of(one, "tensor-parallel-size")
    assert two.memory.weights_bytes == one.memory.weights_bytes // 2
    assert two.placement.gpus == ("0", "1")
    assert two.prediction.decode_tok_s is not None
    assert one.prediction.decode_tok_s is not None
    assert two.prediction.decode_tok_s[0] > one.prediction.decode_tok_s[0]
    # Each takes its share of the memory, and half of the weights leave more to the cache.
    assert two.memory.compute_bytes == one.memory.compute_bytes
    for made in (one, two):
        assert made.memory.total_bytes == pytest.approx(0.92 * (CARD.memory_bytes or 0), abs=2)
    assert claim_of(two).gpus[1].bytes == two.memory.total_bytes
    assert spare_tokens(two) > 2 * spare_tokens(one)


def test_what_one_gpu_cannot_hold_two_can() -> None:
    large = msgspec.structs.replace(MODEL, weights_bytes=130 * GIB)
    host = with_cards(CARD, msgspec.structs.replace(CARD, index=1))
    assert made_for(model=large, host=host).verdict.fits is False
    both = made_for(model=large, host=host, placement={"gpus": "0-1"})
    assert both.verdict.fits is True
    assert spare_tokens(both) > 32768


def test_a_cache_without_enough_heads_is_copied_to_each_gpu() -> None:
    kimi = read_entry("kimi-k2.5-1t-a32b-q4_k_s")
    assert kv_token_bytes(kimi, gpus=4) == 4 * kv_token_bytes(kimi)
    assert kv_token_bytes(MODEL, gpus=4) == kv_token_bytes(MODEL)
    assert kv_token_bytes(MODEL, gpus=16) == 2 * kv_token_bytes(MODEL)


@pytest.mark.parametrize("gibibytes", [28, 30, 32, 37, 41])
def test_the_context_that_is_said_to_fit_has_its_cache(gibibytes: int) -> None:
    """Digits of the utilisation that were cut off must not cut off the one request."""
    host = with_cards(msgspec.structs.replace(CARD, memory_bytes=gibibytes * GIB))
    made = made_for(host=host, context="auto", gpu_reserve_bytes=GIB)
    assert made.verdict.fits is True
    (text,) = values_of(made, "gpu-memory-utilization")
    cache = float(text) * gibibytes * GIB - made.memory.weights_bytes - made.memory.compute_bytes
    context = int(values_of(made, "max-model-len")[0])
    assert cache >= context * kv_token_bytes(MODEL) - 1e-4 * gibibytes * GIB


# Memory


def test_bytes_of_the_cache() -> None:
    assert kv_token_bytes(MODEL) == 320 * KIB
    assert kv_token_bytes(MODEL, "fp8") == 160 * KIB
    assert kv_token_bytes(MODEL, "nvfp4") == 320 * KIB * 0.5625 / 2
    # The Loop variant keeps a cache for each of its two passes.
    assert kv_token_bytes(read_entry("iquest-coder-40b-loop-nvfp4")) == 640 * KIB
    # One latent of 576 in 61 layers.
    kimi = read_entry("kimi-k2.5-1t-a32b-q4_k_s")
    assert kv_token_bytes(kimi) == 61 * 576 * 2 == pytest.approx(68.6 * KIB, rel=0.001)
    assert kv_token_bytes(msgspec.structs.replace(MODEL, kv=None)) == 0


def test_the_utilisation_on_the_reference_card() -> None:
    """0.92 of 96 GB leaves about 62 GiB, or 203,000 tokens, to the cache."""
    made = made_for()
    assert values_of(made, "gpu-memory-utilization") == ["0.92"]
    assert made.memory.kv_bytes == pytest.approx(62 * GIB, rel=0.01)
    reason = next(d.reason for d in made.decisions if d.field == "gpu-memory-utilization")
    tokens = int(re.findall(r"\(([\d,]+) tokens\)", reason)[0].replace(",", ""))
    assert tokens == pytest.approx(203_161, rel=0.01)


@pytest.mark.parametrize("reserve", [0, 1, 4, 8, 20, 40])
@pytest.mark.parametrize("claimed", [0, 10, 30])
def test_the_utilisation_leaves_reserve_and_claims_alone(reserve: int, claimed: int) -> None:
    claims = (Claim(stack="x", gpus=(GpuShare(index=0, bytes=claimed * GIB),)),)
    made = made_for(gpu_reserve_bytes=reserve * GIB, claims=claims)
    (text,) = values_of(made, "gpu-memory-utilization")
    total = CARD.memory_bytes or 0
    assert float(text) * total <= total - (reserve + claimed) * GIB
    assert 0 < float(text) <= 0.99
    assert made.memory.total_bytes == pytest.approx(float(text) * total, abs=1) or not (
        made.verdict.fits
    )


def test_a_larger_need_raises_the_utilisation() -> None:
    """0.92 is the usual; a context that needs more gets it, where the reserve allows."""
    wide = made_for(context=131072, gpu_reserve_bytes=2 * GIB, kv_type="auto")
    assert wide.verdict.fits is True
    assert float(values_of(wide, "gpu-memory-utilization")[0]) >= 0.92


def test_a_context_that_does_not_fit() -> None:
    small = msgspec.structs.replace(CARD, memory_bytes=32 * GIB)
    made = made_for(host=with_cards(small), context=131072)
    assert made.verdict.fits is False
    assert made.memory.headroom_bytes is not None
    assert made.memory.headroom_bytes < 0
    auto = made_for(host=with_cards(small), context="auto")
    (context,) = values_of(auto, "max-model-len")
    assert auto.verdict.fits is True
    assert int(context) < 32768
    fits = made_for(host=with_cards(small), context=int(context))
    more = made_for(host=with_cards(small), context=int(context) + 256)
    assert (fits.verdict.fits, more.verdict.fits) == (True, False)


def test_a_card_of_unknown_size() -> None:
    made = made_for(host=with_cards(msgspec.structs.replace(CARD, memory_bytes=None)))
    assert made.verdict.fits is None
    assert values_of(made, "gpu-memory-utilization") == ["0.92"]
    assert any("unknown" in text for text in made.verdict.reasons)


# The log


@pytest.mark.parametrize(
    ("line", "cause", "remedy"),
    [
        ("ValueError: To serve at least one request with the model's max seq len (131072), "
         "(40.00 GiB KV cache is needed, which is larger than the available KV cache memory "
         "(30.1 GiB). Based on the available memory, the estimated maximum model length is 98656. "
         "Try increasing `gpu_memory_utilization`.",
         "does not hold one request", "--set context=98656"),
        ("ValueError: No available memory for the cache blocks. Try increasing "
         "`gpu_memory_utilization` when initializing the engine.",
         "no memory is left", "gpu_reserve"),
        ("ValueError: Free memory on device cuda:0 (10.2/95.0 GiB) on startup is less than desired "
         "GPU memory utilization (0.92, 87.4 GiB).", "another process", "nvidia-smi"),
        ("ValueError: User-specified max_model_len (262144) is greater than the derived "
         "max_model_len (max_position_embeddings=131072.0 or model_max_length=None in model's "
         "config.json).", "longer than the model", "--set context=131072"),
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.", "ran out",
         "concurrency"),
        ("ValueError: Model architectures ['IQuestLoopCoderForCausalLM'] are not supported for "
         "now. Supported architectures: dict_keys([...])", "IQuestLoopCoderForCausalLM",
         "--set image="),
        ("NotImplementedError: No NvFp4 MoE backend supports the deployment configuration.",
         "no nvfp4 kernel", "marlin"),
    ],
)  # fmt: skip
def test_causes_of_a_failed_start(line: str, cause: str, remedy: str) -> None:
    prefix = "(EngineCore_DP0 pid=42) ERROR 01-09 19:15:06 [core.py:844] "
    noise = ["INFO 01-09 19:15:00 [api_server.py:10] vLLM API server version 0.32.0",
             prefix + "EngineCore failed to start.", prefix + line,
             "gpu-nvfp4.service: Failed with result 'exit-code'."]  # fmt: skip
    failure = VLLM.failure(noise)
    assert failure is not None
    assert cause in failure.cause
    assert remedy in (failure.remedy or "")
    assert failure.evidence == prefix + line


def test_the_most_specific_cause_is_named() -> None:
    lines = ["CUDA out of memory", "the estimated maximum model length is 4096."]
    failure = VLLM.failure(lines)
    assert failure is not None
    assert failure.remedy == "--set context=4096"
    assert VLLM.failure(["all is well"]) is None
    assert VLLM.failure([]) is None


def test_the_recorded_log() -> None:
    if not LOG.is_file():
        pytest.skip("the recorded log is not beside this checkout")
    lines = LOG.read_text("utf-8").splitlines()
    assert VLLM.failure(lines) is None
    phases = [phase for line in lines if (phase := VLLM.phase(line))]
    assert phases[-1] == "answering"
    assert any(phase.startswith("loading weights") for phase in phases)


def test_phases() -> None:
    line = "Loading safetensors checkpoint shards:  33% Completed | 1/3 [00:01<00:03, 1.5s/it]"
    assert VLLM.phase(line) == "loading weights 33 %"
    assert VLLM.phase("INFO: Application startup complete.") == "answering"
    assert VLLM.phase("GPU KV cache size: 203,120 tokens") == "KV cache, 203,120 tokens"
    assert VLLM.phase("") is None
    assert VLLM.footprint(MODEL, {}, 96 * GIB).compute_bytes > 1 * GIB > MIB


def test_trust_is_not_given_past_its_key() -> None:
    wish = profile(shipped("gpu-nvfp4"), engine_args={"trust-remote-code": True})
    with pytest.raises(StackctlError, match="set by stackctl itself") as caught:
        plan(HOSTS["epyc-gpu"], shipped_model(wish), wish)
    assert "trust_remote_code" in (caught.value.hint or "")


def test_on_the_cpu_one_node_holds_all() -> None:
    wish = profile(shipped("cpu-vllm"))
    made = plan(HOSTS["dual-nps4"], shipped_model(wish), wish)
    host = HOSTS["dual-nps4"]
    (node,) = [n for n in host.cpu.numa if CpuList([n.id]) == made.placement.mems]
    assert made.placement.policy == "bind"
    assert made.memory.limit_bytes is not None
    assert node.memory_bytes is not None
    assert made.memory.limit_bytes < node.memory_bytes
    several = profile(wish, placement=msgspec.structs.replace(wish.placement, nodes="0-1"))
    with pytest.raises(StackctlError, match="uses one NUMA node, not 0-1"):
        plan(host, shipped_model(wish), several)


def test_it_answers_to_several_names(recorded: Dialect) -> None:
    made = made_for(served_name="coder", other_names=("gpt-4o", "an odd name"))
    start = made.argv.index("--served-model-name")
    assert made.argv[start : start + 5] == (
        "--served-model-name", "coder", "gpt-4o", "an odd name", "--host"
    )  # fmt: skip
    # The first is the one that answers carry, and what checks ask for.
    assert made.served_name == "coder"
    assert recorded.find("served-model-name") is not None


# What it said before

#: As set-up B's machine would tell: 22.4 GiB of weights, and what 0.92 of the card leaves for KV.
SEEN = MeasuredMemory(
    generation=4,
    argv=made_for().argv,
    gpus=((CARD.name, CARD.memory_bytes),),
    weights_bytes=round(22.41 * GIB),
    kv_bytes=round(61.99 * GIB),
    kv_tokens=203_120,
)


def again(*seen: MeasuredMemory, **changes: Any) -> Plan:
    wish = profile(NVFP4, **changes)
    return plan(EPYC_GPU, MODEL, wish, measured_memory=tuple(seen))


def decision(made: Plan, field: str) -> Decision:
    return next(d for d in made.decisions if d.field == field)


def test_the_next_plan_takes_what_the_engine_measured() -> None:
    before, made = made_for(), again(SEEN)
    assert made.argv == before.argv
    memory = made.memory
    assert (memory.weights_bytes, memory.kv_bytes) == (SEEN.weights_bytes, SEEN.kv_bytes)
    # What the engine had of its share besides is its own.
    assert memory.total_bytes == round(0.92 * (CARD.memory_bytes or 0))
    assert (before.memory.basis, memory.basis) == ("estimated", "measured")
    told = decision(made, "gpu-memory-utilization")
    assert told.source == "measured"
    assert told.reason.endswith("; vLLM measured 203,120 tokens of KV cache in generation 4")
    assert any("measured" in text for text in made.verdict.reasons)


def test_port_and_names_make_no_difference_to_memory() -> None:
    made = again(SEEN, port=9999, served_name="other")
    assert made.argv != SEEN.argv
    assert made.memory.basis == "measured"


@pytest.mark.parametrize("changes", [{"context": 16384}, {"concurrency": 8}])
def test_of_other_sizes_the_weights_still_hold(changes: dict[str, Any]) -> None:
    made = again(SEEN, **changes)
    assert made.memory.weights_bytes == SEEN.weights_bytes
    assert made.memory.kv_bytes != SEEN.kv_bytes
    assert made.memory.basis == "estimated"
    told = decision(made, "gpu-memory-utilization")
    assert told.source == "derived"
    assert told.reason.endswith("; vLLM measured weights of 22.4 GiB in generation 4")


def test_what_is_about_something_else_is_not_taken() -> None:
    other = ((CARD.name, 2 * (CARD.memory_bytes or 0)),)
    estimated = made_for().memory
    assert again(msgspec.structs.replace(SEEN, gpus=other)).memory == estimated
    smaller = again(SEEN, kv_type="fp8").memory
    assert smaller.weights_bytes == estimated.weights_bytes
    marlin = profile(NVFP4, engine_args={"linear-backend": ("marlin",)})
    assert plan(EPYC_GPU, MODEL, marlin, measured_memory=(SEEN,)).memory == estimated


def test_the_newest_start_of_the_same_kind_counts() -> None:
    newer = msgspec.structs.replace(SEEN, generation=6, kv_tokens=200_000)
    other = msgspec.structs.replace(SEEN, generation=7, argv=again(context=16384).argv)
    silent = msgspec.structs.replace(other, generation=8, weights_bytes=None)
    made = again(silent, other, newer, SEEN)
    assert (
        "200,000 tokens of KV cache in generation 6"
        in decision(made, "gpu-memory-utilization").reason
    )
    assert "in generation 7" in decision(again(silent, other), "gpu-memory-utilization").reason
    assert again(silent).memory == made_for().memory


def test_an_option_of_the_user_s_stays_the_user_s() -> None:
    wish = profile(NVFP4, engine_args={"gpu-memory-utilization": (0.8,)})
    argv = plan(EPYC_GPU, MODEL, wish).argv
    made = plan(EPYC_GPU, MODEL, wish, measured_memory=(msgspec.structs.replace(SEEN, argv=argv),))
    told = decision(made, "gpu-memory-utilization")
    assert told.source == "profile"
    assert "203,120 tokens" in told.reason


def test_several_gpus_each_hold_their_part() -> None:
    second = msgspec.structs.replace(CARD, index=1)
    host, wish = with_cards(CARD, second), profile(NVFP4, placement={"gpus": "all"})
    argv = plan(host, MODEL, wish).argv
    seen = msgspec.structs.replace(
        SEEN, argv=argv, gpus=SEEN.gpus * 2, weights_bytes=11 * GIB, kv_bytes=70 * GIB
    )
    memory = plan(host, MODEL, wish, measured_memory=(seen,)).memory
    assert (memory.weights_bytes, memory.kv_bytes) == (11 * GIB, 70 * GIB)
    assert memory.total_bytes == round(0.92 * (CARD.memory_bytes or 0))


@pytest.mark.parametrize(
    ("asked", "promised"), [("32768", "32768"), ("32K", "32768"), ("25.6k", "25600"),
                            ("auto", None), ("-1", None)],
)  # fmt: skip
def test_a_context_is_promised_in_tokens(asked: str, promised: str | None) -> None:
    told = VLLM.expected_facts(("vllm", "serve", "--max-model-len", asked))
    assert [fact.value for fact in told] == ([] if promised is None else [promised])


# Other kernels


def test_other_kernels_are_for_nvfp4_on_the_cards_that_need_them() -> None:
    kernels = engine("vllm").fallback_kernels
    assert CARD.compute_capability == "12.0"
    assert kernels(MODEL, (CARD,)) == (("linear-backend", "marlin"),)
    experts = msgspec.structs.replace(MODEL, experts=8)
    assert [name for name, _ in kernels(experts, (CARD,))] == ["linear-backend", "moe-backend"]
    other = msgspec.structs.replace(CARD, compute_capability="10.0")
    assert kernels(MODEL, (CARD, other)) == ()
    assert kernels(MODEL, ()) == ()
    plain = msgspec.structs.replace(MODEL, quantization="fp8", quantization_method=None)
    assert kernels(plain, (CARD,)) == ()
    assert engine("llama.cpp").fallback_kernels(MODEL, (CARD,)) == ()
