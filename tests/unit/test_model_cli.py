"""stackctl model: what is known of a model, for people and as a document."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import pytest
from ggufs import write
from samples import GEMMA

from stackctl.cli.main import run
from stackctl.sources.catalogue import catalogue_entries, read_entry
from stackctl.sources.models import read_model
from stackctl.values.base import from_json, to_json
from stackctl.values.model import Model
from stackctl.values.result import ErrorReport


class Cli:
    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys
        self.out = self.err = ""

    def __call__(self, *arguments: str) -> int:
        self._capsys.readouterr()
        code = run(arguments)
        self.out, self.err = self._capsys.readouterr()
        return code


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Cli:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return Cli(capsys)


def rows(text: str) -> dict[str, str]:
    """Labels and what follows them, wrapped lines joined."""
    found: dict[str, str] = {}
    label = ""
    for line in text.splitlines():
        match = re.match(r"(\S.*?)  +(.*)", line)
        if match:
            label = match[1]
            found[label] = match[2]
        else:
            found[label] += " " + line.strip()
    return found


def test_a_file(cli: Cli, tmp_path: Path) -> None:
    path = write(tmp_path / "tiny.gguf")
    assert cli("model", "show", "file:tiny.gguf") == 0
    told = rows(cli.out)
    assert told["model"] == "Tiny"
    assert told["architecture"] == "llama (gguf)"
    assert told["files"] == str(path)
    assert "chat template" in told
    assert cli.err == ""
    assert cli("model", "show", "tiny.gguf", "--json") == 0
    shown = from_json(cli.out, Model, where="stdout")
    assert shown == read_model(f"file:{path}")
    assert json.loads(cli.out)["schema"] == "stackctl.model/1"


def test_a_document_can_be_planned_with_elsewhere(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "m.json").write_text(to_json(GEMMA))
    assert cli("model", "show", "facts:m.json", "--json") == 0
    assert from_json(cli.out, Model, where="stdout") == GEMMA
    (tmp_path / "again.json").write_text(cli.out)
    before = cli.out
    assert cli("model", "show", "facts:again.json", "--json") == 0
    assert cli.out == before


@pytest.mark.parametrize("name", list(catalogue_entries()))
def test_the_catalogue(cli: Cli, name: str) -> None:
    assert cli("model", "show", f"catalogue:{name}") == 0
    told = rows(cli.out)
    model = read_entry(name)
    assert told["source"] == f"catalogue:{name}"
    assert told["model"] == model.name
    assert "catalogue:" in told["facts"]
    assert "cannot run" in told
    assert ("fetched from" in told) != ("to fetch" in told)
    if model.experts:
        assert "active for a token" in told["parameters"]
        assert f"{model.experts_used} used for a token" in told["experts"]
    assert max(map(len, cli.out.splitlines())) <= 80
    assert cli("model", "show", f"catalogue:{name}", "--json") == 0
    assert from_json(cli.out, Model, where="stdout") == model


def test_the_loop_variant_says_that_it_loops(cli: Cli) -> None:
    assert cli("model", "show", "catalogue:iquest-coder-40b-loop-nvfp4") == 0
    assert "run 2 times for a token" in rows(cli.out)["layers"]


def test_latent_attention_is_named(cli: Cli) -> None:
    assert cli("model", "show", "catalogue:kimi-k2.5-1t-a32b-q4_k_s") == 0
    assert "MLA, one latent of 576 in 61 layers" in rows(cli.out)["KV cache"]


def test_the_list(cli: Cli) -> None:
    assert cli("model", "catalogue") == 0
    for name in catalogue_entries():
        assert re.search(rf"^{re.escape(name)} ", cli.out, re.MULTILINE)
    assert "e+" not in cli.out
    assert cli("model", "catalogue", "--json") == 0
    assert json.loads(cli.out) == {
        "schema": "stackctl.catalogue/1", "models": sorted(catalogue_entries())
    }  # fmt: skip


@pytest.mark.parametrize(
    ("code", "source", "words", "hint"),
    [
        (4, "catalogue:iquest-coder-40b", "has no model", "did you mean"),
        (4, "catalogue:zzz", "has no model", "stackctl model catalogue lists them"),
        (4, "catalogue:Kimi", "has no model", "did you mean kimi-k2.5-1t-a32b-q4_k_s?"),
        (
            2,
            "gemma-3-270m-q4_k_m",
            "is not understood",
            "did you mean catalogue:gemma-3-270m-q4_k_m?",
        ),
        (2, "Qwen/Qwen3-8B", "is not understood", "did you mean hf:Qwen/Qwen3-8B?"),
        (2, ".", "is not understood", "did you mean dir:.?"),
        (2, "bad.json", "is not understood", "did you mean facts:bad.json?"),
        (1, "file:none.gguf", "not found", None),
        (2, "odd", "is not understood", "file:PATH"),
        (2, "file:", "names nothing", None),
        (2, "facts:bad.json", "not valid JSON", None),
        (1, "hf:Org/Unknown", "not in the local hub cache", "stackctl model fetch"),
        (1, "file:text.gguf", "", None),
    ],
)
def test_sources_that_are_no_model(
    cli: Cli, tmp_path: Path, code: int, source: str, words: str, hint: str | None
) -> None:
    (tmp_path / "bad.json").write_text("{")
    (tmp_path / "text.gguf").write_text("This is a text and no model, whatever its name says.")
    assert cli("model", "show", source) == code
    assert words in cli.err
    if hint is not None:
        assert hint in cli.err.partition("hint: ")[2]
    assert cli.out == ""
    assert cli("model", "show", source, "--json") == code
    assert from_json(cli.out, ErrorReport, where="stdout").exit_code == code


def test_names_cannot_move_the_cursor(cli: Cli, tmp_path: Path) -> None:
    text = to_json(GEMMA).replace(f'"{GEMMA.name}"', '"\\u001b[2Jx"')
    (tmp_path / "m.json").write_text(text)
    assert cli("model", "show", "facts:m.json") == 0
    assert rows(cli.out)["model"] == "?[2Jx"
    (tmp_path / "m.json").write_text('{"\\u001b[2J": 1}')
    assert cli("model", "show", "facts:m.json") == 2
    assert "\\x1b[2J" in cli.err
    assert "\x1b" not in cli.err
    assert "\x1b" not in cli.out + cli.err


def test_a_header_is_read_quickly(tmp_path: Path) -> None:
    """A vocabulary of a quarter of a million words is skipped, not kept."""
    words = [f"word{n}" for n in range(262_144)]
    path = write(tmp_path / "big.gguf", {"tokenizer.ggml.tokens": words})
    started = time.process_time()
    model = read_model(f"file:{path}")
    assert model.vocabulary == 262_144
    assert time.process_time() - started < 1.0
