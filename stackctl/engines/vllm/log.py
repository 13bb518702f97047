"""vLLM's log: phases of a start, causes of a failed one, facts of the running engine.

Texts are those of vLLM 0.32, matched loosely: they drift.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from stackctl.engines.failures import Failure, failure_table, first_match
from stackctl.values.generation import EngineFact

_GIB = 2**30
_MARLIN = "--set engine_args.linear-backend=marlin, and for an MoE engine_args.moe-backend=marlin"
_NEWER = "a newer image: --set image=..."

#: Most specific first. A row is pattern, cause, remedy; all may use the pattern's named groups.
_FAILURES = failure_table(
    (r"estimated maximum model length is (?P<most>[1-9]\d*)",
     "the KV cache does not hold one request of the planned context",
     "--set context={most}"),
    (r"\((?P<needed>[\d.]+ GiB) KV cache is needed.*"
     r"available KV cache memory \((?P<left>[\d.]+ GiB)\)",
     "the KV cache does not hold one request: it needs {needed}, {left} is left",
     "a smaller context: --set context=N, or a smaller model"),
    (r"No available memory for the cache blocks",
     "no memory is left for the KV cache",
     "--set gpu_reserve=2GiB, or --set concurrency=N with a smaller N"),
    (r"Free memory on device.*\((?P<free>[\d.]+/[\d.]+ GiB)\).*less than desired GPU memory "
     r"utilization",
     "another process holds GPU memory: {free} is free",
     "nvidia-smi shows which one"),
    (r"Free memory on device.*less than desired GPU memory utilization",
     "another process holds GPU memory",
     "nvidia-smi shows which one"),
    (r"Available memory on node (?P<node>\d+) \((?P<free>[\d./]+ GiB)\).*less than "
     r"requested memory for kv",
     "memory node {node} has too little free memory for the KV cache: {free}",
     "end what uses it, or a smaller KV cache: --set context=N"),
    (r"max_model_len \((?P<asked>\d+)\) is greater than the derived max_model_len "
     r"\(\w+=(?P<most>\d+)",
     "the context of {asked} is longer than the model was made for",
     "--set context={most}"),
    (r"max_num_batched_tokens \((?P<asked>\d+)\) is smaller than max_model_len "
     r"\((?P<least>\d+)\)",
     "without chunked prefill a step must take a whole prompt",
     "--set engine_args.max-num-batched-tokens={least}"),
    (r"number of attention heads \((?P<heads>\d+)\) must be divisible by tensor parallel "
     r"size \((?P<gpus>\d+)\)",
     "the model's {heads} attention heads cannot be split over {gpus} GPUs",
     "another number of GPUs: --set placement.gpus=..."),
    (r"CUDA out of memory|OutOfMemoryError",
     "the GPU's memory ran out",
     "--set concurrency=N, smaller; or --set gpu_reserve=8GiB"),
    (r"Model architectures (?P<names>\[[^\]]*\]) (are not supported|failed to be inspected)",
     "this image does not know the model's architecture {names}",
     _NEWER),
    (r"model type [`'\"]?(?P<name>[\w-]+)[`'\"]? but Transformers does not recognize",
     "this image does not know the model's type {name}",
     _NEWER),
    (r"No NvFp4 MoE backend supports",
     "no nvfp4 kernel for this model's experts on this GPU",
     "--set engine_args.moe-backend=marlin"),
    (r"CUDA error: an illegal instruction|illegal instruction was encountered|"
     r"cudaErrorIllegalInstruction",
     "a kernel of this image is wrong for this GPU (illegal instruction)",
     _MARLIN),
    (r"no kernel image is available for execution on the device",
     "this image has no kernels for this GPU",
     _NEWER),
    (r"NVIDIA driver on your system is too old|driver version is insufficient for CUDA",
     "the NVIDIA driver is too old for this image",
     "stackctl doctor says which one it needs"),
    (r"No CUDA GPUs are available|Failed to infer device type|"
     r"libcuda\.so\.1: cannot open|no NVIDIA driver on your system",
     "the container sees no GPU",
     "stackctl doctor checks driver and CDI"),
    (r"(option|set|pass) `?trust_remote_code=True|requires you to execute the \w+ file",
     "the model brings code of its own, which is not run unasked",
     "read it; then --set trust_remote_code=true"),
    (r"(outgoing traffic has been disabled|offline mode is enabled|"
     r"couldn't connect to '?https://huggingface\.co|Repository Not Found)",
     "a file of the model is missing, and nothing is downloaded while it starts",
     "copy the whole model folder, configuration and tokenizer too"),
    (r"does not appear to have a file named (?P<name>[\w.-]+)",
     "the model folder holds no {name}",
     "copy the whole model folder again"),
    (r"config file at '(?P<path>[^']*)' is not a valid JSON|JSONDecodeError|"
     r"Invalid JSON in",
     "a JSON file of the model is damaged",
     "copy the model's *.json files again"),
    (r"Cannot find any model weights|SafetensorError|HeaderTooLarge|"
     r"incomplete metadata, file not fully covered",
     "the model's weights are missing or damaged",
     "compare sizes and checksums with the source, and copy them again"),
    (r"Can't load tokenizer|Couldn't instantiate the backend tokenizer",
     "the model's tokenizer is missing or damaged",
     "copy tokenizer.json and tokenizer_config.json again"),
    (r"Address already in use|error while attempting to bind on address",
     "the port is taken by another process",
     "stackctl down, or another port: --set port=N"),
    (r"error: unrecognized arguments?: (?P<name>\S+)",
     "this image's vLLM has no option {name}",
     "remove it from engine_args, or use another image"),
    (r"error: argument (?P<name>\S+): (?P<why>.*)",
     "vLLM refuses the value of {name}: {why}",
     "correct it in engine_args"),
    (r"Permission denied: '(?P<path>/models[^']*)'",
     "the engine may not read the model",
     "chmod a+r on its files and a+x on the folders above them"),
    (r"No space left on device",
     "a disk or the shared memory is full",
     "df -h shows which"),
    (r"executable file [`'\"]?\S+?[`'\"]? not found",
     "the image holds no vllm",
     "another image: --set image=..."),
)  # fmt: skip
#: Rows whose remedy is another kernel: the fault is the image's, and marlin avoids it.
_KERNELS = re.compile(r"No NvFp4 MoE backend supports|illegal.?instruction", re.IGNORECASE)
_SETS = re.compile(r"--set (\w[\w.-]*=\d+)(?:$|[;,] )")
#: The parent's list of ended children with their statuses; a negative status is a signal.
_KILLED = re.compile(r"Failed core proc\(s\): \{[^}]*: -(?P<signal>\d+)")
#: The same list if the statuses are lost.
_VANISHED = re.compile(r"Failed core proc\(s\): \{\}")
_CORE_RAISED = re.compile(r"\(EngineCore\b.*Traceback")
_SIGNALS = {
    "9": ("was killed, most likely for want of main memory", "journalctl -k tells; free memory"),
    "4": ("used an instruction that this CPU lacks", "another image: --set image=..."),
}

_PHASES: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"Application startup complete|Starting vLLM server on"), "answering"),
    (re.compile(r"Fetching \d+ files:\s+(?P<percent>\d+)%"), "downloading {percent} %"),
    (re.compile(r"Capturing CUDA graph.*?(?P<percent>\d+)%"), "capturing CUDA graphs {percent} %"),
    (re.compile(r"Capturing CUDA graph|Graph capturing finished"), "capturing CUDA graphs"),
    (re.compile(r"KV cache size: (?P<tokens>[\d,]+) tokens"), "KV cache, {tokens} tokens"),
    (re.compile(r"KV cache memory|GiB for KV cache|Profiling CUDA graph memory"), "KV cache"),
    (re.compile(r"Initial profiling|Model loading took|Loading weights took"), "profiling"),
    (
        re.compile(r"torch\.compile|Dynamo bytecode|Compiling a graph|AOT compil|for the compil"),
        "compiling",
    ),
    (
        re.compile(r"Loading \w+ checkpoint shards.*?(?P<percent>\d+)% Completed"),
        "loading weights {percent} %",
    ),
    (re.compile(r"Starting to load model|Loading model from scratch"), "loading weights"),
    (re.compile(r"Initializing a V1 LLM engine"), "starting the engine"),
    (re.compile(r"Resolved architecture"), "reading the model's configuration"),
)

#: Lines of an engine core that has ended, or of its parent, which may live on for a while.
_DEAD = re.compile(
    r"EngineCore failed to start|EngineCore encountered (a fatal error|an issue)|EngineDeadError|"
    r"Engine core initialization failed|Engine core proc \S+ died unexpectedly|"
    r"WorkerProc (failed to start|initialization failed)"
)

_PREFIX = re.compile(
    r"^(?:\((?P<process>[A-Za-z]+)[^)]*\) ?)?"
    r"(?:(?:ERROR|WARNING|INFO|CRITICAL) \d\d-\d\d [\d:]+ \[[^\]]*\] ?)?"
)
_EXCEPTION = re.compile(
    r"^(?:[A-Za-z_][\w]*\.)*[A-Z]\w*(?:Error|Exception|Failure|Timeout|NotFound|Expired)(?::|$)"
)
#: Exceptions that only report another exception or an end.
_WRAPPER = re.compile(
    r"Engine core initialization failed|EngineDeadError|EngineGenerateError|"
    r"WorkerProc initialization failed|Worker failed with error|Frontend process failed|"
    r"EngineCore encountered an issue|[Ss]ee (the )?(root cause|stack trace)|CancelledError|"
    r"stack trace above"
)
_CHAINED = re.compile(r"direct cause of the following|During handling of the above")
#: Processes, from the worker that computes to the server that clients connect to.
_DEPTH = ("Worker", "VllmWorker", "EngineCore")
_LONGEST = 200

_FACTS: Mapping[str, re.Pattern[str]] = {
    "kv_cache_tokens": re.compile(r"KV cache size: ([\d,]+) tokens"),
    "max_concurrency": re.compile(r"Maximum concurrency for [\d,]+ tokens per request: ([\d.]+)x"),
    "kv_cache_bytes": re.compile(
        r"Available KV cache memory: ([\d.]+) GiB|"
        r"(?:Explicitly|Auto) set \(([\d.]+)/[\d.]+\) GiB for KV cache"
    ),
    "weights_bytes": re.compile(r"Model loading took ([\d.]+) (?:GiB|GB)"),
    "attention_backend": re.compile(r"Using (\S+) (?:attention )?backend out of potential"),
    "linear_backend": re.compile(r"Using (\w+) for \w+ GEMM"),
    "moe_backend": re.compile(r"Using '?([\w-]+)'? \w+ MoE backend out of"),
    "quantization": re.compile(r"with config: .*\bquantization=([\w-]+)"),
    "kv_cache_dtype": re.compile(r"with config: .*\bkv_cache_dtype=([\w-]+)"),
    "device": re.compile(r"with config: .*\bdevice_config=([\w-]+)"),
}


def phase(line: str) -> str | None:
    """Return the step of the start that a log line reports."""
    for pattern, name in _PHASES:
        if match := pattern.search(line):
            return name.format(**match.groupdict())
    return None


def has_crashed(lines: Sequence[str]) -> bool:
    """Return True if the engine core has ended, even if its parent lives on."""
    return any(_DEAD.search(line) for line in lines)


def failure(lines: Sequence[str]) -> Failure | None:
    """Return the cause of a failed start: a known one, else the deepest process's exception."""
    known = first_match(lines, _FAILURES)
    if known is not None:
        return Failure(
            known.cause,
            known.evidence,
            known.remedy,
            sets=tuple(_SETS.findall(known.remedy or "")),
            kernel=_KERNELS.search(known.evidence) is not None,
        )
    for line in lines:
        if match := _KILLED.search(line):
            usual = (f"crashed (signal {match['signal']})", "another image: --set image=...")
            what, remedy = _SIGNALS.get(match["signal"], usual)
            return Failure(f"the engine core {what}", line.strip(), remedy)
    vanished = next((line for line in lines if _VANISHED.search(line)), None)
    if vanished is not None and not any(_CORE_RAISED.search(line) for line in lines):
        what, remedy = _SIGNALS["9"]
        return Failure(f"the engine core {what}", vanished.strip(), remedy)
    return _raised(lines)


def facts_from_log(lines: Sequence[str]) -> tuple[EngineFact, ...]:
    """Return facts of the running engine, each from the last line that holds it.

    Sizes are whole numbers of bytes.
    """
    found = []
    for name, pattern in _FACTS.items():
        matches = [match for line in lines if (match := pattern.search(line))]
        if not matches:
            continue
        value = next(group for group in matches[-1].groups() if group is not None)
        if name.endswith("_bytes"):
            value = str(round(float(value) * _GIB))
            if value == "0":
                continue  # below the log's resolution of 0.01 GiB
        found.append(EngineFact(name=name, value=value.replace(",", "")))
    return tuple(found)


def _raised(lines: Sequence[str]) -> Failure | None:
    """Return the last exception in the first chain of tracebacks of the deepest process.

    Exceptions that only wrap another one do not count. None if there is none.
    """
    split = [
        (match["process"] or "", line[match.end() :])
        for line in lines
        if (match := _PREFIX.match(line))
    ]
    processes = {process for process, _ in split}
    for process in (*(name for name in _DEPTH if name in processes), None):
        own = [
            (place, text)
            for place, (name, text) in enumerate(split)
            if name == process or (process is None and name not in _DEPTH)
        ]
        if (place := _last_of_first(own)) is not None:
            text = split[place][1].strip()
            if re.search(r"validation errors? for", text):
                # pydantic prints the field, if there is one, and the reason on the next lines.
                below = [line for _, line in split[place + 1 : place + 3]]
                cut = next((n for n, line in enumerate(below, 1) if line.startswith(" ")), 0)
                detail = ": ".join(line.strip() for line in below[:cut])
                text = re.sub(r"Value error, | \[type=.*", "", detail) or text
            return Failure(f"it stopped: {_short(text)}", lines[place].strip())
    return None


def _last_of_first(own: Sequence[tuple[int, str]]) -> int | None:
    """Return the place of the last exception of a process's first chain of tracebacks."""
    found, chained = None, False
    for place, text in own:
        if _CHAINED.search(text):
            chained = True
        elif _EXCEPTION.match(text) and not _WRAPPER.search(text):
            if found is not None and not chained:
                break
            found, chained = place, False
        elif found is not None and not chained and text.startswith("Traceback"):
            break
    return found


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"
