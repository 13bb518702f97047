"""Heavy load by aiperf, a separate program: it sends stackctl's prompts and writes the times.

The configuration and the result files are those of aiperf 0.13. The tokenizer is a stub, so that
aiperf downloads none: stackctl makes prompts of the right length, and the server counts tokens.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stackctl.errors import ExitCode, StackctlError
from stackctl.machine import path_security, runner
from stackctl.observe.bench.load_generator import CellRun, StreamedCompletion

_KEY = "STACKCTL_BENCH_KEY"
_RECORDS = "profile_export.jsonl"
#: Seconds that aiperf needs to start and to write its results.
_OVERHEAD_S = 300
_TOKENIZER: dict[str, Any] = {
    "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
    "pre_tokenizer": {"type": "WhitespaceSplit"}, "post_processor": None, "decoder": None,
    "model": {"type": "WordLevel", "vocab": {"[UNK]": 0}, "unk_token": "[UNK]"},
}  # fmt: skip
_INSTALL = (
    "python3 -m venv ~/.local/share/aiperf && ~/.local/share/aiperf/bin/pip install aiperf"
    "   (1.2 GB)\nstackctl bench --with aiperf --aiperf ~/.local/share/aiperf/bin/aiperf"
)


def find_aiperf(given: str | None) -> str:
    """Return the path of the program: the given one, else the one on PATH.

    Raises:
        StackctlError: exit 6 if there is no such program; exit 2 if this is root and another user
            could change the program.
    """
    path = runner.controlled_environment()["PATH"]
    found = shutil.which(str(Path(given).expanduser()) if given else "aiperf", path=path)
    if found is None:
        what = f"{given} cannot be run" if given else "aiperf is not installed"
        raise StackctlError(what, hint=_INSTALL, exit_code=ExitCode.HOST)
    program = Path(found).absolute()
    path_security.require_root_only(program, "program")
    return str(program)


class Aiperf:
    """A runner of aiperf for the cells of one server."""

    def __init__(self, program: str, url: str, key: str | None) -> None:
        """Use a program for the server at a URL. The program gets the key in its environment."""
        self._program, self._url, self._key = program, url, key

    def measure(
        self, run: CellRun, texts: Sequence[str], served_name: str, *, timeout_s: float
    ) -> None:
        """Send the prompts of a cell through aiperf, and add the answers to ``run``.

        Raises:
            StackctlError: aiperf measured nothing, or needed longer than ``timeout_s`` and its own
                overhead.
        """
        with tempfile.TemporaryDirectory(prefix="stackctl-aiperf-") as name:
            folder = Path(name)
            self._write(folder, run, texts, served_name, timeout_s)
            words = (self._program, "profile", "--config", str(folder / "run.yaml"),
                     "--ui-type", "none")  # fmt: skip
            env = {"TMPDIR": name, **({_KEY: self._key} if self._key else {})}
            run.began = time.perf_counter()
            done = runner.run_process_group(words, timeout_s=timeout_s + _OVERHEAD_S, extra_env=env)
            try:
                text = (folder / "out" / _RECORDS).read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError):
                text = ""
        replies = parse_records(text)
        if not replies:
            raise StackctlError(
                f"aiperf measured nothing (exit {done.status})",
                details=[line for line in done.stdout.splitlines() if "ERROR" in line][-5:],
            )
        run.replies.extend(replies)
        run.began = min(completion.began for completion in replies)
        run.ended = max(completion.began + completion.ended_s for completion in replies)

    def _write(
        self, folder: Path, run: CellRun, texts: Sequence[str], name: str, timeout_s: float
    ) -> None:
        workload, tokenizer = run.shape, folder / "tokenizer"
        tokenizer.mkdir()
        kind = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "[UNK]"}
        (tokenizer / "tokenizer.json").write_text(json.dumps(_TOKENIZER))
        (tokenizer / "tokenizer_config.json").write_text(json.dumps(kind))
        with (folder / "prompts.jsonl").open("w", encoding="utf-8") as file:
            for text in texts:
                row = {"text": text, "output_length": workload.output_tokens}
                file.write(json.dumps(row) + "\n")
        endpoint = {
            "url": self._url, "type": "chat", "streaming": True, "timeout": timeout_s,
            "use_legacy_max_tokens": True, "use_server_token_count": True,
            "connection_reuse": "never", "extra": {"ignore_eos": True, "temperature": 0},
        }  # fmt: skip
        if self._key:
            endpoint["api_key"] = f"${{{_KEY}}}"
        config = {
            "schemaVersion": "2.0",
            "benchmark": {
                "model": name,
                "endpoint": endpoint,
                "tokenizer": {"name": str(tokenizer)},
                "dataset": {"type": "file", "path": str(folder / "prompts.jsonl"),
                            "format": "single_turn", "sampling": "sequential"},
                "phases": {"type": "concurrency", "concurrency": workload.concurrency,
                           "requests": len(texts)},
                "artifacts": {"dir": str(folder / "out"), "summary": ["json"],
                              "records": ["jsonl"]},
                "serverMetrics": {"enabled": False},
                "gpuTelemetry": {"enabled": False},
            },
        }  # fmt: skip
        # JSON is valid YAML, and the standard library can write it.
        descriptor = os.open(folder / "run.yaml", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump(config, file)


def parse_records(text: str) -> list[StreamedCompletion]:
    """Return the requests in aiperf's records, which are one JSON document per line.

    Raises:
        StackctlError: a line is not in the form that aiperf 0.13 writes.
    """
    found = []
    # aiperf uses the wall clock, stackctl the monotonic clock.
    offset = time.time() - time.perf_counter()
    # splitlines would also split at Unicode line ends, which JSON strings may hold.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            found.append(_reply(json.loads(line), offset))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise StackctlError(
                f"line {number} of aiperf's {_RECORDS} is not understood: {error!r}",
                hint="this stackctl reads what aiperf 0.13 writes",
            ) from None
    return found


def _reply(record: Any, offset: float) -> StreamedCompletion:
    told, metrics = record["metadata"], record["metrics"]
    began, ended = (told[f"request_{name}_ns"] / 1e9 for name in ("start", "end"))
    error = record.get("error")
    if error is not None or told.get("was_cancelled"):
        text = str((error or {}).get("message") or "cancelled")[:200]
        return StreamedCompletion(began=began - offset, ended_s=ended - began, error=text)
    first = metrics["time_to_first_token"]["value"] / 1000
    gaps = (gap / 1000 for gap in metrics.get("inter_chunk_latency", {}).get("value", []))
    return StreamedCompletion(
        began=began - offset,
        ended_s=metrics["request_latency"]["value"] / 1000,
        moments=tuple(itertools.accumulate(gaps, initial=first)),
        prompt_tokens=_count(metrics, "usage_prompt_tokens"),
        cached_tokens=_count(metrics, "usage_prompt_cache_read_tokens"),
        output_tokens=_count(metrics, "usage_completion_tokens"),
    )


def _count(metrics: Any, name: str) -> int | None:
    return int(metrics[name]["value"]) if name in metrics else None
