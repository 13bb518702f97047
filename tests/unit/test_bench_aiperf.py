"""aiperf's records become answers like our own; what goes wrong is told.

The file beside this one is what aiperf 0.13 wrote of two requests for 64 tokens, the first of them
after 0.3 s, then one every 20 ms."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from stackctl.cli.main import run
from stackctl.errors import ExitCode, StackctlError
from stackctl.observe.bench.aiperf import Aiperf, find_aiperf, parse_records
from stackctl.observe.bench.cell_stats import gaps_ms, generation_tok_s
from stackctl.observe.bench.load_generator import CellRun
from stackctl.values.bench import Workload

RECORDS = Path(__file__).with_name("aiperf-0.13.jsonl").read_text("utf-8")
SHAPE = Workload(prompt_tokens=104, output_tokens=64, concurrency=2)


def test_records() -> None:
    first, second = parse_records(RECORDS)
    assert (first.error, first.prompt_tokens, first.output_tokens) == (None, 104, 64)
    assert first.cached_tokens == 0
    assert len(first.moments) == 64
    assert first.ttft_s == pytest.approx(0.3174558)
    assert first.ended_s == pytest.approx(1.7017907)
    # Its first token, the gaps and the whole agree.
    assert first.moments[-1] == pytest.approx(first.ended_s, abs=0.01)
    assert min(gaps_ms(first)) == pytest.approx(17.79, abs=0.01)
    assert generation_tok_s(first) == pytest.approx(63 / 1.384, rel=0.01)
    assert 0 <= second.began - first.began < 1


def test_a_request_that_failed() -> None:
    record = json.loads(RECORDS.splitlines()[0])
    record |= {"metrics": {}, "error": {"type": "X", "message": "HTTP 503"}}
    (reply,) = parse_records(json.dumps(record))
    assert (reply.error, reply.moments) == ("HTTP 503", ())
    # What Unicode calls the end of a line ends no line here.
    record["error"]["message"] = "no\u2028luck"
    (reply,) = parse_records(json.dumps(record, ensure_ascii=False) + "\n")
    assert reply.error == "no\u2028luck"


@pytest.mark.parametrize("line", ["{", "[]", "{}", '{"metadata": {}, "metrics": {}}'])
def test_another_form_is_refused(line: str) -> None:
    with pytest.raises(StackctlError, match="line 3 of aiperf's profile_export") as caught:
        parse_records(RECORDS + line)
    assert "0.13" in (caught.value.hint or "")


def script(tmp_path: Path, text: str) -> str:
    path = tmp_path / "aiperf"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def test_what_it_is_given(tmp_path: Path) -> None:
    """Prompts, lengths and load; the key in its environment only, in a folder for its user only."""
    seen = tmp_path / "seen"
    seen.mkdir()
    program = script(
        tmp_path,
        f'cp -r "$(dirname "$3")"/* {seen}/; echo "$@" > {seen}/argv; env > {seen}/env\n'
        f'stat -c %a "$(dirname "$3")" > {seen}/mode\n'
        f'mkdir "$(dirname "$3")/out"\n'
        f'cp {Path(__file__).with_name("aiperf-0.13.jsonl")} '
        '"$(dirname "$3")/out/profile_export.jsonl"',
    )  # fmt: skip
    cell = CellRun(SHAPE, 2)
    Aiperf(program, "http://127.0.0.1:8080", "sk-1").measure(cell, ["one", "two"], "m", timeout_s=5)
    assert [reply.error for reply in cell.replies] == [None, None]
    assert 1 < cell.ended - cell.began < 3
    config = json.loads((seen / "run.yaml").read_text())["benchmark"]
    assert config["phases"] == {"type": "concurrency", "concurrency": 2, "requests": 2}
    assert config["endpoint"]["url"] == "http://127.0.0.1:8080"
    rows = [json.loads(line) for line in (seen / "prompts.jsonl").read_text().splitlines()]
    assert rows == [{"text": "one", "output_length": 64}, {"text": "two", "output_length": 64}]
    with_key = [path.name for path in seen.rglob("*") if path.is_file() and "sk-1" in
                path.read_text()]  # fmt: skip
    assert with_key == ["env"]
    assert (seen / "mode").read_text().strip() == "700"


def test_what_it_cannot_do_is_told(tmp_path: Path) -> None:
    cell = CellRun(SHAPE, 2)
    program = script(tmp_path, "echo '12:00 ERROR no such model'; exit 3")
    with pytest.raises(StackctlError, match=r"measured nothing \(exit 3\)") as caught:
        Aiperf(program, "http://127.0.0.1:1", None).measure(cell, ["a"], "m", timeout_s=5)
    assert caught.value.details == ("12:00 ERROR no such model",)
    assert cell.replies == []


def test_where_it_is_not_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    with pytest.raises(StackctlError, match="aiperf is not installed") as caught:
        find_aiperf(None)
    assert caught.value.exit_code == ExitCode.HOST
    assert "-m venv" in (caught.value.hint or "") and "pip install" in (caught.value.hint or "")
    with pytest.raises(StackctlError, match="cannot be run"):
        find_aiperf(str(tmp_path / "none"))
    if os.geteuid() != 0:
        assert find_aiperf(script(tmp_path, "true")) == str(tmp_path / "aiperf")
    assert run(["--user", "bench", "--aiperf", "/bin/true"]) == ExitCode.USAGE
    assert "--with aiperf" in capsys.readouterr().err
    assert run(["--user", "bench", "--with", "aiperf"]) == ExitCode.HOST
