"""llama.cpp: its help, dialects, memory, and what its log tells."""

from __future__ import annotations

import re
from typing import Any

import msgspec
import pytest
from samples import (
    EPYC,
    GEMMA,
    GIB,
    IQUEST,
    LLAMA_CPP,
    MIB,
    OLD_HELP,
    SHARED,
    THROUGHPUT,
    facts_of,
    plan,
    profile,
)

from stackctl.engines.llamacpp.memory import KV_TYPE_BYTES, kv_bytes
from stackctl.engines.options import Dialect, Option
from stackctl.values.engine_facts import EngineOption
from stackctl.values.model import KvLayout

HELP = SHARED / "captures" / "llama-server-b11669-help.txt"
LOG = SHARED / "captures" / "llama-server-b11669-startup.log"
KIB = 2**10

OLD = Dialect(LLAMA_CPP.parse_help(OLD_HELP), inspected=True)


@pytest.fixture(scope="module")
def new() -> Dialect:
    if not HELP.is_file():
        pytest.skip("the recorded help is not beside this checkout")
    return Dialect(LLAMA_CPP.parse_help(HELP.read_text("utf-8")), inspected=True)


# Help and version


def test_an_old_help() -> None:
    assert OLD.options[0] == EngineOption(names=("-h", "--help", "--usage"))
    assert OLD.find("threads") == EngineOption(names=("-t", "--threads"), value="N")
    assert OLD.find("flash-attn") == EngineOption(names=("-fa", "--flash-attn"))
    assert OLD.find("cache-type-k") == EngineOption(names=("-ctk", "--cache-type-k"), value="TYPE")
    assert OLD.find("load-mode") is None
    # Whole names only, and not what the explanations mention.
    assert OLD.find("thread") is None
    assert len(OLD.options) == 21


def test_the_recorded_help(new: Dialect) -> None:
    assert len(new.options) > 200
    flash = new.find("flash-attn")
    assert flash is not None
    assert flash.value == "[on|off|auto]"
    unified = new.find("no-kv-unified")
    assert unified is new.find("kv-unified")
    assert unified is not None
    assert unified.value is None
    load = new.find("load-mode")
    assert load is not None
    assert load.value == "MODE"
    assert new.find("mlock") is None
    assert {"metrics", "jinja", "alias", "cache-ram", "cache-reuse"} <= set(new.option_names())
    # Every option that stands in the first column of the text is known.
    text = HELP.read_text("utf-8")
    for name in re.findall(r"^--([a-z][a-z0-9-]+)", text, re.MULTILINE):
        assert new.find(name) is not None, name
    assert all(re.fullmatch(r"-{1,2}[\w-]+", name) for o in new.options for name in o.names)


def test_every_planned_option_is_in_the_recorded_help(new: Dialect) -> None:
    for option in LLAMA_CPP.newest.options:
        known = new.find(option.names[0][2:])
        assert known is not None, option
        assert (known.value is None) == (option.value is None), option


@pytest.mark.parametrize(
    "text", ["", "usage: cat [FILE]\n", "Error: no such file\nsomething --else\n"]
)
def test_what_is_no_help(text: str) -> None:
    assert LLAMA_CPP.parse_help(text) == ()


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("version: 11669 (abc1234)\nbuilt with cc for x86_64\n", "11669 (abc1234)"),
        ("noise\nversion: b5000\n", "b5000"),
        ("", None),
        ("llama-server 3\n", None),
    ],
)
def test_version(text: str, version: str | None) -> None:
    assert LLAMA_CPP.parse_version(text) == version


# Dialects


def spell(name: str, *values: Any, dialect: Dialect = OLD) -> tuple[str, ...] | None:
    return LLAMA_CPP.render_option(Option(name, values, "test"), dialect)


@pytest.mark.parametrize(
    ("name", "values", "expected"),
    [
        ("threads", (14,), ("--threads", "14")),
        ("metrics", (), ("--metrics",)),
        ("flash-attn", ("on",), ("--flash-attn",)),
        ("flash-attn", ("off",), ()),
        ("load-mode", ("mmap",), ()),
        ("load-mode", ("auto",), ()),
        ("load-mode", ("mmap+mlock",), ("--mlock",)),
        ("load-mode", ("mlock",), ("--no-mmap", "--mlock")),
        ("load-mode", ("none",), ("--no-mmap",)),
        ("load-mode", ("dio",), None),
        ("load-mode", ("odd",), None),
        ("kv-unified", (), None),
        ("cache-ram", (100,), None),
    ],
)
def test_an_old_dialect(name: str, values: Any, expected: tuple[str, ...] | None) -> None:
    assert spell(name, *values) == expected


def test_the_new_dialect() -> None:
    newest = LLAMA_CPP.newest
    assert spell("flash-attn", "on", dialect=newest) == ("--flash-attn", "on")
    assert spell("load-mode", "mmap+mlock", dialect=newest) == ("--load-mode", "mmap+mlock")
    assert spell("kv-unified", dialect=newest) == ("--kv-unified",)
    assert spell("mlock", dialect=newest) is None


def test_options_with_several_and_odd_values() -> None:
    dialect = Dialect((EngineOption(names=("--lora",), value="FILE"),), inspected=True)
    assert spell("lora", "a b", "c", dialect=dialect) == ("--lora", "a b", "--lora", "c")
    assert spell("lora", True, 0.5, dialect=dialect) == ("--lora", "true", "--lora", "0.5")
    assert LLAMA_CPP.render_option(Option("lora", None, "left out"), dialect) == ()


def test_a_whole_plan_in_the_old_dialect() -> None:
    wish = profile(THROUGHPUT)
    argv = plan(EPYC, IQUEST, wish, facts_of(OLD.options)).argv
    assert "--mlock" in argv
    assert "--flash-attn" in argv
    assert not {"--load-mode", "on", "--kv-unified", "--cache-ram"} & set(argv)


def test_a_whole_plan_in_the_recorded_dialect(new: Dialect) -> None:
    """The image that was looked at and the newest known dialect plan the same."""
    for wish in (profile(), THROUGHPUT):
        assert plan(wish=wish, facts=facts_of(new.options)).argv == plan(wish=wish).argv


# Memory


def test_kv_cache_of_a_dense_model() -> None:
    # 2 * 80 layers * 8 heads * 128 * 2 bytes = 320 KiB a token.
    assert kv_bytes(IQUEST, context=256) == 256 * 320 * KIB
    assert kv_bytes(IQUEST, context=131072) == 40 * GIB
    # A started step of 256 is allocated whole.
    assert kv_bytes(IQUEST, context=257) == 512 * 320 * KIB
    # The context is that of all slots: their number changes nothing without windows.
    assert kv_bytes(IQUEST, context=8192, parallel=4) == kv_bytes(IQUEST, context=8192)


def test_kv_cache_types() -> None:
    q8, q4 = KV_TYPE_BYTES["q8_0"], KV_TYPE_BYTES["q4_0"]
    assert (q8, q4) == (34 / 32, 18 / 32)
    # 160 * 8 * 128 elements a token: 170 KiB at q8_0, 90 KiB at q4_0.
    assert kv_bytes(IQUEST, context=1024, key_bytes=q8, value_bytes=q8) == 1024 * 170 * KIB
    assert kv_bytes(IQUEST, context=1024, key_bytes=q4, value_bytes=q4) == 1024 * 90 * KIB
    assert kv_bytes(IQUEST, context=1024, key_bytes=q8) == 1024 * (85 + 160) * KIB
    mixed = {
        "cache-type-k": Option("cache-type-k", ("q8_0",), ""),
        "ctx-size": Option("ctx-size", (1024,), ""),
    }
    assert LLAMA_CPP.footprint(IQUEST, mixed, 0).kv_bytes == 1024 * (85 + 160) * KIB


def test_kv_cache_with_sliding_windows() -> None:
    # 1 KiB a token and layer. 3 layers keep all 8192 tokens, 15 the window of 512 and a
    # micro-batch of 128, in steps of 256: 768.
    assert kv_bytes(GEMMA, context=8192, ubatch=128) == (3 * 8192 + 15 * 768) * KIB
    # The window of each of four requests, and a larger micro-batch.
    assert kv_bytes(GEMMA, context=32768, parallel=4, ubatch=2048) == (
        (3 * 32768 + 15 * (4 * 512 + 2048)) * KIB
    )
    # A window never keeps more than the context.
    assert kv_bytes(GEMMA, context=512, ubatch=512) == 18 * 512 * KIB


def test_kv_cache_of_layers_that_differ() -> None:
    layout = KvLayout(
        kv_heads=(4, 0, 2, 2),
        key_dim=64,
        value_dim=32,
        sliding_window=256,
        sliding_layers=1,
        sliding=(False, False, False, True),
        sliding_key_dim=16,
        sliding_value_dim=8,
    )
    model = msgspec.structs.replace(GEMMA, kv=layout, layers=4)
    # Two bytes an element: 4 and 2 heads of 96 elements for all tokens, 2 of 24 for the window.
    assert kv_bytes(model, context=1024, ubatch=256) == 2 * (6 * 96 * 1024 + 2 * 24 * 512)
    assert kv_bytes(msgspec.structs.replace(model, kv=None), context=1024) == 0


def test_footprint_counts_logits_and_prompt_cache() -> None:
    options = {
        "ctx-size": Option("ctx-size", (4096,), ""),
        "batch-size": Option("batch-size", (128,), ""),
        "ubatch-size": Option("ubatch-size", (512,), ""),
        "cache-ram": Option("cache-ram", (0,), ""),
    }
    small = LLAMA_CPP.footprint(GEMMA, options, 0)
    assert small.weights_bytes == GEMMA.weights_bytes
    # Logits are kept for one token of each of the engine's own 4 slots.
    assert 4 * 262144 * 4 < small.compute_bytes < 4 * 262144 * 4 + 200 * MIB
    # A micro-batch is never larger than the batch.
    less = {**options, "ubatch-size": Option("ubatch-size", (128,), "")}
    assert LLAMA_CPP.footprint(GEMMA, less, 0) == small
    cached = LLAMA_CPP.footprint(
        GEMMA, {**options, "cache-ram": Option("cache-ram", (1000,), "")}, 0
    )
    assert cached.compute_bytes - small.compute_bytes == 1000 * MIB


def test_footprint_without_options_takes_the_defaults_of_the_engine() -> None:
    """What is not said is llama-server's own default: the trained context, 8 GiB of prompts."""
    footprint = LLAMA_CPP.footprint(IQUEST, {}, 0)
    assert footprint.kv_bytes == 40 * GIB
    assert footprint.compute_bytes > 8 * GIB


# The log


@pytest.mark.parametrize(
    ("lines", "cause", "remedy"),
    [
        (["Error: crun: setrlimit `RLIMIT_MEMLOCK`: Operation not permitted: OCI permission "
          "denied"], "raise its locked-memory limit", "load-mode=mmap"),
        (["llama_model_load: error loading model: error loading model architecture: unknown model "
          "architecture: 'qwen9'"], "architecture qwen9", "newer image"),
        (["error: invalid argument: --mlock"], "no option --mlock", "engine_args"),
        (["error: unknown argument: -fa"], "no option -fa", "engine_args"),
        (['error while handling argument "--numa": invalid value'],
         "refuses the value of --numa: invalid value", "engine_args"),
        (["llama_model_load: error loading model: tensor 'blk.3.ffn_up.weight' data is not within "
          "the file bounds, model is corrupted or incomplete"], "damaged or incomplete", "copy it"),
        (["gguf_init_from_file_impl: failed to read magic"], "damaged or incomplete", "copy it"),
        (["main: couldn't bind HTTP server socket, hostname: 127.0.0.1, port: 8080"],
         "port is taken", "--set port=N"),
        (["E gguf_init_from_file: failed to open GGUF file '/models/m.gguf' (Permission denied)"],
         "may not read the model", "chmod a+r"),
        (["alloc_tensor_range: failed to allocate CPU buffer of size 42949672960"],
         "not enough memory", "--set context=N"),
        (["terminate called after throwing an instance of 'std::bad_alloc'"],
         "not enough memory", "--set context=N"),
        (["Error: crun: executable file `llama-server` not found in $PATH: No such file or "
          "directory: OCI runtime attempted to invoke a command that was not found"],
         "holds no llama-server", "image build"),
        (["llama_model_load: error loading model: missing tensor 'output_norm.weight'"],
         "cannot load the model: missing tensor 'output_norm.weight'", None),
        (["Illegal instruction (core dumped)"], "newer CPU", "image build"),
    ],
)  # fmt: skip
def test_causes_of_a_failed_start(lines: list[str], cause: str, remedy: str | None) -> None:
    noise = ["Starting cpu.service...", *lines, "cpu.service: Failed with result 'exit-code'."]
    failure = LLAMA_CPP.failure(noise)
    assert failure is not None
    assert cause in failure.cause
    assert failure.evidence == lines[0]
    if remedy is None:
        assert failure.remedy is None
    else:
        assert remedy in (failure.remedy or "")


@pytest.mark.parametrize(
    "lines",
    [
        [],
        ["cpu.service: Main process exited, code=exited, status=1/FAILURE"],
        # A locked model that cannot be locked still serves.
        ["W warning: failed to mlock 233320448-byte buffer (after previously locking 0 bytes): "
         "Cannot allocate memory"],
        ["warning: failed to mlock 5-byte buffer (after previously locking 0 bytes): Operation not "
         "permitted", "Try increasing RLIMIT_MEMLOCK ('ulimit -l' as root)."],
    ],
)  # fmt: skip
def test_what_is_no_cause(lines: list[str]) -> None:
    assert LLAMA_CPP.failure(lines) is None


def test_the_recorded_log() -> None:
    if not LOG.is_file():
        pytest.skip("the recorded log is not beside this checkout")
    lines = LOG.read_text("utf-8").splitlines()
    second = next(n for n, line in enumerate(lines) if "initializing ..." in line)
    failure = LLAMA_CPP.failure(lines[:second])
    assert failure is not None
    assert "locked-memory" in failure.cause
    # The second start went well.
    assert LLAMA_CPP.failure(lines[second:]) is None
    phases = [phase for line in lines[second:] if (phase := LLAMA_CPP.phase(line))]
    assert phases[0] == "loading model"
    assert phases[-2:] == ["model loaded", "answering"]


@pytest.mark.parametrize(
    ("line", "phase"),
    [
        ("srv    load_model: loading model '/models/m.gguf'", "loading model"),
        ("load_tensors:   CPU_Mapped model buffer size = 27000.00 MiB", "loading model"),
        ("common_init_from_params: warming up the model with an empty run", "warming up"),
        ("srv  llama_server: model loaded", "model loaded"),
        ("main: server is listening on http://127.0.0.1:8080 - starting the main loop",
         "answering"),
        ("srv  llama_server: listening on http://127.0.0.1:8081", "answering"),
        ("print_info: n_ctx_train = 131072", None),
        ("", None),
    ],
)  # fmt: skip
def test_phases(line: str, phase: str | None) -> None:
    assert LLAMA_CPP.phase(line) == phase


def test_what_the_engine_chooses_is_not_promised() -> None:
    def promised(*argv: str) -> dict[str, str]:
        return {fact.name: fact.value for fact in LLAMA_CPP.expected_facts(("llama-server", *argv))}

    assert promised("--ctx-size", "8192", "--parallel", "4") == {"context": "2048", "slots": "4"}
    assert promised("--ctx-size", "8192", "--parallel", "-1") == {"context": "8192"}
    assert promised("--ctx-size", "0", "--parallel", "1") == {"slots": "1"}
