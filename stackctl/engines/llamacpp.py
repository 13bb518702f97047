"""llama.cpp's llama-server on the CPU.

Flags and defaults were read from the engine's own help (builds b11434 to b11669); presets are those
published for CPU use: small micro-batches for latency, large ones and several slots for throughput.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from stackctl.engines.engine import Dialect, Failure, Footprint, Option, Request, first_match
from stackctl.quantity import format_bytes
from stackctl.values.measured import EngineOption
from stackctl.values.model import Model
from stackctl.values.plan import Source

_MIB = 2**20
#: Contexts are padded to this many tokens (llama.cpp: GGML_PAD(n_ctx, 256)).
_CONTEXT_STEP = 256
#: Bytes an element of a KV cache type: a block's bytes over its elements (ggml block layouts).
KV_TYPE_BYTES = {
    "f32": 4.0, "f16": 2.0, "bf16": 2.0, "q8_0": 34 / 32, "q5_1": 24 / 32, "q5_0": 22 / 32,
    "q4_1": 20 / 32, "q4_0": 18 / 32, "iq4_nl": 18 / 32,
}  # fmt: skip
#: llama-server itself: code, vocabulary, thread stacks, HTTP buffers.
_ENGINE_BYTES = 128 * _MIB
_DEFAULT_CONTEXT = 8192
#: llama-server's own default for --cache-ram, in MiB.
_MOST_CACHE_MIB = 8192

_NAMES = re.compile(r"-{1,2}[A-Za-z0-9][\w-]*(?:,\s+-{1,2}[A-Za-z0-9][\w-]*)*")


def _option(names: str, value: str | None = None) -> EngineOption:
    return EngineOption(names=tuple(f"--{name}" for name in names.split()), value=value)


#: The options planned here as the newest builds spell them.
_NEWEST = (
    _option("model", "FNAME"), _option("alias", "STRING"), _option("host", "HOST"),
    _option("port", "PORT"), _option("ctx-size", "N"), _option("parallel", "N"),
    _option("kv-unified no-kv-unified"), _option("threads", "N"), _option("threads-batch", "N"),
    _option("batch-size", "N"), _option("ubatch-size", "N"), _option("flash-attn", "[on|off|auto]"),
    _option("load-mode", "MODE"), _option("numa", "TYPE"), _option("cache-reuse", "N"),
    _option("cache-ram", "N"), _option("cache-type-k", "TYPE"), _option("cache-type-v", "TYPE"),
    _option("jinja no-jinja"), _option("metrics"), _option("cors-origins", "ORIGINS"),
)  # fmt: skip

#: Causes of a failed start, most specific first. Checked against the last lines of the log.
_FAILURES: tuple[tuple[re.Pattern[str], str, str | None], ...] = tuple(
    (re.compile(pattern, re.IGNORECASE), cause, remedy)
    for pattern, cause, remedy in (
        (
            r"setrlimit `?RLIMIT_MEMLOCK`?: Operation not permitted",
            "this machine does not let the container raise its locked-memory limit",
            "--set engine_args.load-mode=mmap",
        ),
        (
            r"unknown model architecture: '(?P<name>[^']*)'",
            "this image does not know the model's architecture {name}",
            "a newer image: --set image=...",
        ),
        (
            r"error: (invalid|unknown) argument: (?P<name>\S+)",
            "this image's llama-server has no option {name}",
            "remove it from engine_args, or use another image",
        ),
        (
            r"error while handling argument \"(?P<name>[^\"]+)\": (?P<why>.*)",
            "llama-server refuses the value of {name}: {why}",
            "correct it in engine_args",
        ),
        (
            r"tensor '(?P<name>[^']*)' data is not within the file bounds|read error: unexpectedly "
            r"reached end of file|failed to read (magic|tensor|key)",
            "the model file is damaged or incomplete",
            "compare its size and checksum with the source, and copy it again",
        ),
        (
            r"(couldn't bind|failed to bind|bind HTTP server socket)",
            "the port is taken by another process",
            "stackctl down, or another port: --set port=N",
        ),
        (
            r"(failed to open GGUF file|gguf_init_from_file).*(Permission denied)|"
            r"open.*\.gguf.*Permission denied",
            "the engine may not read the model file",
            "chmod a+r on the file and a+x on the folders above it",
        ),
        (
            r"^(?!.*mlock).*((unable|failed) to allocate|cannot allocate|std::bad_alloc)",
            "not enough memory",
            "a smaller context: --set context=N, or a smaller model",
        ),
        (
            r"(executable file [`'\"]?(?P<name>\S+?)[`'\"]? not found|no such file or directory"
            r".*llama-server)",
            "the image holds no llama-server",
            "stackctl image build llama-cpp, or another image: --set image=...",
        ),
        (r"error loading model: (?P<why>.*)", "llama-server cannot load the model: {why}", None),
        (r"illegal instruction", "the image was built for a newer CPU than this one",
         "stackctl image build llama-cpp makes one that picks its code at run time"),
    )
)  # fmt: skip

_PHASES: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"listening on http|server is listening"), "answering"),
    (re.compile(r"model loaded"), "model loaded"),
    (re.compile(r"warming up"), "warming up"),
    (re.compile(r"loading model|load_tensors|load_model"), "loading model"),
)


class LlamaCpp:
    """See Engine."""

    name = "llama.cpp"
    default_image = "ghcr.io/ggml-org/llama.cpp:server"
    local_image = "localhost/stackctl/llama-cpp:latest"
    program = "llama-server"
    reserved: Mapping[str, str] = {
        "host": "stackctl serves on 127.0.0.1 only",
        "port": "use the key port",
        "model": "use the key model",
        "alias": "use the key served_name",
        "api-key": "a secret must not be on a command line",
        "hf-token": "a secret must not be on a command line",
    }
    newest = Dialect(_NEWEST, inspected=False)
    health_path = "/health"

    def parse_help(self, text: str) -> tuple[EngineOption, ...]:
        """See Engine: an entry starts in the first column; two spaces end its value."""
        found = []
        for line in text.splitlines():
            match = _NAMES.match(line)
            if match is None:
                continue
            names = tuple(re.split(r",\s+", match.group()))
            rest = line[match.end() :]
            value = None
            if re.match(r" \S", rest):
                value = re.split(r"\s{2,}", rest.strip())[0]
            found.append(EngineOption(names=names, value=value))
        return tuple(found)

    def parse_version(self, text: str) -> str | None:
        """See Engine."""
        match = re.search(r"^version: (.+)", text, re.MULTILINE)
        return match[1] if match else None

    def choose(self, request: Request) -> tuple[Option, ...]:
        """See Engine."""
        return (
            Option("model", (request.model_path,), "the model, mounted read-only"),
            Option("alias", (request.served_name,), "the name clients ask for"),
            Option("host", ("127.0.0.1",), "loopback only"),
            Option("port", (request.port,), "profile", "profile"),
            *_context(request),
            *_threads(request),
            *_batches(request),
            Option("flash-attn", ("on",), "less memory traffic for attention at no loss"),
            *_load_mode(request),
            *_numa(request),
            *_caches(request),
            Option("jinja", (), "the model's own chat template"),
            Option("cors-origins", ("localhost",), "no foreign web page may use it in a browser"),
            Option("metrics", (), "counters for health and measurement"),
        )

    def footprint(self, model: Model, options: Mapping[str, Option]) -> Footprint:
        """See Engine."""

        def number(name: str, default: int) -> int:
            value = options[name].value if name in options else None
            return value if isinstance(value, int) and not isinstance(value, bool) else default

        context = number("ctx-size", 0) or model.context or _DEFAULT_CONTEXT
        batch = number("batch-size", 2048)
        ubatch = min(batch, number("ubatch-size", 512))
        parallel = max(1, number("parallel", 4))
        cache_mib = max(0, number("cache-ram", _MOST_CACHE_MIB))
        kv = kv_bytes(
            model,
            context=context,
            parallel=parallel,
            ubatch=ubatch,
            key_bytes=_kv_type(options, "cache-type-k"),
            value_bytes=_kv_type(options, "cache-type-v"),
        )
        # The graph is reserved for a full micro-batch with the logits of every token, F32.
        width = (model.vocabulary or 0) + 4 * (model.embedding or 0) + 2 * (model.feed_forward or 0)
        compute = ubatch * width * 4 + _ENGINE_BYTES + cache_mib * _MIB
        return Footprint(model.weights_bytes, kv, compute)

    def spell(self, option: Option, dialect: Dialect) -> tuple[str, ...] | None:
        """See Engine."""
        if option.values is None:
            return ()
        known = dialect.find(option.name)
        if option.name == "load-mode" and known is None:
            return _old_load_mode(str(option.value), dialect)
        if known is None:
            return None
        flag = f"--{option.name}"
        if option.name == "flash-attn" and known.value is None:
            # Builds before 2025-08 had a bare switch, off by default.
            return (flag,) if option.value == "on" else ()
        if not option.values:
            return (flag,)
        return tuple(token for value in option.values for token in (flag, _text(value)))

    def phase(self, line: str) -> str | None:
        """See Engine."""
        return next((name for pattern, name in _PHASES if pattern.search(line)), None)

    def failure(self, lines: Sequence[str]) -> Failure | None:
        """See Engine."""
        return first_match(lines, _FAILURES)


def kv_bytes(
    model: Model,
    *,
    context: int,
    parallel: int = 1,
    ubatch: int = 512,
    key_bytes: float = 2.0,
    value_bytes: float = 2.0,
) -> int:
    """Bytes of the KV cache of all slots together.

    Each layer keeps ``kv_heads * (key_dim * key_bytes + value_dim * value_bytes)`` a token; layers
    with a sliding window keep the window of every sequence and one micro-batch (llama.cpp:
    llama_kv_cache_iswa).
    """
    if model.kv is None:
        return 0
    layout = model.kv
    padded = window = _pad(context)
    if layout.sliding_window is not None:
        window = min(padded, _pad(layout.sliding_window * parallel + ubatch))
    row = layout.key_dim * key_bytes + layout.value_dim * value_bytes
    narrow = (layout.sliding_key_dim or layout.key_dim) * key_bytes
    narrow += (layout.sliding_value_dim or layout.value_dim) * value_bytes
    sliding = layout.sliding or (False,) * len(layout.kv_heads)
    return round(
        sum(
            heads * (window * narrow if slides else padded * row)
            for heads, slides in zip(layout.kv_heads, sliding, strict=True)
        )
    )


def _pad(tokens: int) -> int:
    return -(-tokens // _CONTEXT_STEP) * _CONTEXT_STEP


def _kv_type(options: Mapping[str, Option], name: str) -> float:
    value = options[name].value if name in options else None
    return KV_TYPE_BYTES.get(str(value), 2.0)


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _latency(request: Request) -> bool:
    return request.profile.objective == "latency"


def _slots(request: Request) -> tuple[int, str]:
    wanted = request.profile.concurrency
    if wanted is not None:
        return wanted, "profile"
    return (1, "latency: one request at a time") if _latency(request) else (4, "throughput")


def _context(request: Request) -> tuple[Option, ...]:
    slots, why = _slots(request)
    profile = request.profile
    each, source = profile.context, "profile"
    if each is None:
        each, source = min(_DEFAULT_CONTEXT, request.model.context or _DEFAULT_CONTEXT), "default"
    trained = request.model.context
    reason = f"{source}: {each} tokens a request"
    if trained is not None and each > trained:
        each, reason = trained, f"all the model was trained for; the {source} asks for {each}"
    if slots > 1:
        reason += f", {slots} requests"
    total = _pad(each * slots)
    if total != each * slots:
        reason += f", padded to {_CONTEXT_STEP}"
    origin: Source = "override" if "context" in profile.overrides else "profile"
    options = [
        Option("ctx-size", (total,), reason, origin if profile.context else "derived"),
        Option(
            "parallel",
            (slots,),
            why if why != "profile" else f"profile: {slots} at the same time",
            ("override" if "concurrency" in profile.overrides else "profile")
            if profile.concurrency is not None
            else "derived",
        ),
    ]
    if slots > 1:
        options.append(
            Option("kv-unified", (), "slots share one KV cache: a long prompt may use it all")
        )
    return tuple(options)


def _threads(request: Request) -> tuple[Option, ...]:
    options = []
    for name, choice in (("threads", request.threads), ("threads-batch", request.threads_batch)):
        if choice is None:
            options.append(Option(name, None, "cores unknown: the engine counts them itself"))
        else:
            options.append(Option(name, (choice[0],), choice[1]))
    return tuple(options)


def _batches(request: Request) -> tuple[Option, ...]:
    if _latency(request):
        return (
            Option("batch-size", (512,), "latency: prompts enter in small steps"),
            Option("ubatch-size", (128,), "latency: on a CPU small micro-batches answer sooner"),
        )
    return (
        Option("batch-size", (2048,), "throughput: long prompts in few steps"),
        Option("ubatch-size", (2048,), "throughput: as large as the batch"),
    )


def _load_mode(request: Request) -> tuple[Option, ...]:
    limit = request.host.limits.memlock_bytes
    need = request.model.weights_bytes
    if limit is None:
        reason = "not locked: the locked-memory limit of services is unknown"
    elif limit < need:
        reason = (
            f"not locked: services may lock {format_bytes(limit)}, "
            f"the model is {format_bytes(need)}; stackctl probe says how to raise it"
        )
    else:
        return (
            Option("load-mode", ("mmap+mlock",), "mapped and locked: never paged out under load"),
        )
    return (Option("load-mode", ("mmap",), reason),)


def _numa(request: Request) -> tuple[Option, ...]:
    nodes = [node for node in request.host.cpu.numa if node.memory_bytes]
    if len(nodes) <= 1:
        return (Option("numa", None, "one NUMA node: nothing to spread or bind"),)
    policy = request.placement.policy
    if policy in ("bind", "interleave"):
        reason = f"keeps the {policy} memory policy and CPUs that the unit sets"
        if len(nodes) > 8:
            reason += f"; 'distribute' knows 8 nodes, this machine has {len(nodes)}"
        return (Option("numa", ("numactl",), reason),)
    return (Option("numa", None, "memory policy left to the kernel, as the profile asks"),)


def _caches(request: Request) -> tuple[Option, ...]:
    limit = request.memory_limit_bytes
    options = []
    if limit is not None:
        mib = min(_MOST_CACHE_MIB, limit // 20 // _MIB)
        options.append(
            Option("cache-ram", (mib,), "MiB of prompts kept in memory: 5 %, at most 8 GiB")
        )
    if _latency(request):
        options.append(_cache_reuse(request.model))
    return tuple(options)


def _cache_reuse(model: Model) -> Option:
    """Shifting a cache needs every layer to keep the whole context (llama.cpp: can_shift)."""
    if model.kv is not None and (model.kv.sliding_layers or 0 in model.kv.kv_heads):
        reason = "left out: layers with a sliding window or recurrent state cannot shift"
        return Option("cache-reuse", None, reason)
    return Option("cache-reuse", (256,), "a prompt that moved keeps its cache from 256 tokens on")


def _old_load_mode(mode: str, dialect: Dialect) -> tuple[str, ...] | None:
    """Before --load-mode (2026): mmap by default, --mlock and --no-mmap to change it."""
    flags = {"auto": (), "mmap": (), "mmap+mlock": ("mlock",), "mlock": ("no-mmap", "mlock"),
             "none": ("no-mmap",), "dio": ("direct-io",)}.get(mode)  # fmt: skip
    if flags is None or any(dialect.find(flag) is None for flag in flags):
        return None
    return tuple(f"--{flag}" for flag in flags)
