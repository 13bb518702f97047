"""llama-server's log: phases of a start, causes of a failed one, facts of the engine."""

from __future__ import annotations

import re
from collections.abc import Sequence

from stackctl.engines.failures import Failure, failure_table, first_match
from stackctl.values.generation import EngineFact

#: Causes of a failed start, most specific first. Checked against the last lines of the log.
_FAILURES = failure_table(
    (r"setrlimit `?RLIMIT_MEMLOCK`?: Operation not permitted",
     "this machine does not let the container raise its locked-memory limit",
     "--set engine_args.load-mode=mmap"),
    (r"unknown model architecture: '(?P<name>[^']*)'",
     "this image does not know the model's architecture {name}",
     "a newer image: --set image=..."),
    (r"error: (invalid|unknown) argument: (?P<name>\S+)",
     "this image's llama-server has no option {name}",
     "remove it from engine_args, or use another image"),
    (r"error while handling argument \"(?P<name>[^\"]+)\": (?P<why>.*)",
     "llama-server refuses the value of {name}: {why}",
     "correct it in engine_args"),
    (r"tensor '(?P<name>[^']*)' data is not within the file bounds|read error: unexpectedly "
     r"reached end of file|failed to read (magic|tensor|key)",
     "the model file is damaged or incomplete",
     "compare its size and checksum with the source, and copy it again"),
    (r"(couldn't bind|failed to bind|bind HTTP server socket)",
     "the port is taken by another process",
     "stackctl down, or another port: --set port=N"),
    (r"(failed to open GGUF file|gguf_init_from_file).*(Permission denied)|"
     r"open.*\.gguf.*Permission denied",
     "the engine may not read the model file",
     "chmod a+r on the file and a+x on the folders above it"),
    (r"^(?!.*mlock).*((unable|failed) to allocate|cannot allocate|std::bad_alloc)",
     "not enough memory",
     "a smaller context: --set context=N, or a smaller model"),
    (r"(executable file [`'\"]?(?P<name>\S+?)[`'\"]? not found|no such file or directory"
     r".*llama-server)",
     "the image holds no llama-server",
     "stackctl image build llama-cpp, or another image: --set image=..."),
    (r"error loading model: (?P<why>.*)", "llama-server cannot load the model: {why}", None),
    (r"illegal instruction", "the image was built for a newer CPU than this one",
     "stackctl image build llama-cpp makes one that picks its code at run time"),
)  # fmt: skip

_PHASES: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"listening on http|server is listening"), "answering"),
    (re.compile(r"model loaded"), "model loaded"),
    (re.compile(r"warming up"), "warming up"),
    (re.compile(r"loading model|load_tensors|load_model"), "loading model"),
)

#: Facts in the log of a start: a failed mlock, and the number of threads.
_SAID = (
    ("mlock", re.compile(r"(failed to mlock .*)")),
    ("threads", re.compile(r"threadpool init, n_threads = (\d+)")),
)


def phase(line: str) -> str | None:
    """Return the step of the start that a log line reports."""
    return next((name for pattern, name in _PHASES if pattern.search(line)), None)


def failure(lines: Sequence[str]) -> Failure | None:
    """Return the cause of a failed start; None if no line matches a known one."""
    return first_match(lines, _FAILURES)


def facts_from_log(lines: Sequence[str]) -> tuple[EngineFact, ...]:
    """Return facts of a start, each from the last line that holds it.

    The rest is read over HTTP, because the log names no sizes by default.
    """
    found = ((name, pattern.search(line)) for line in lines for name, pattern in _SAID)
    return tuple({n: EngineFact(name=n, value=match[1]) for n, match in found if match}.values())
