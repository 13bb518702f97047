"""What is printed cannot command the terminal, wherever its text comes from."""

from __future__ import annotations

import pytest

from stackctl.cli.output import Output, sanitize_terminal
from stackctl.errors import StackctlError
from stackctl.values.result import Result

ATTACK = "a\x1b]0;title\x07b\x1b[2Jc\x9b1Ad\re\x00f\x7f"
SAFE = "a\\x1b]0;title\\x07b\\x1b[2Jc\\x9b1Ad\\re\\x00f\\x7f"


def test_commands_for_the_terminal_are_shown_and_not_sent() -> None:
    assert sanitize_terminal(ATTACK) == SAFE
    assert sanitize_terminal("größe\t模型\n\x1b[31mred\x1b[0m") == "größe\t模型\n\x1b[31mred\x1b[0m"


def test_every_way_to_print(capsys: pytest.CaptureFixture[str]) -> None:
    out = Output(json=False, quiet=False, verbose=False, color="never", progress=False)
    out.line(ATTACK)
    out.note(ATTACK)
    out.step("model", ATTACK)
    out.warn(ATTACK, ATTACK)
    out.error(StackctlError(ATTACK, details=[ATTACK], hint="hint"))
    out.results([Result(name="answer", status="fail", actual=ATTACK, evidence=ATTACK)])
    out.table(["A", "B"], [[ATTACK, "x"]], fold=1)
    printed = "".join(capsys.readouterr())
    assert printed.count("title\\x07b") >= 8
    assert not set(printed) & set("\x1b\x07\x9b\r\x00\x7f")


def test_progress_into_a_pipe_is_plain_lines_and_few(capsys: pytest.CaptureFixture[str]) -> None:
    out = Output(json=False, quiet=False, verbose=False, color="never", progress=True)
    weights = ((3, "10 %"), (6, "20 %"), (7, "30 %"))
    seen = [(0, "starting"), *((second, f"loading weights {part}") for second, part in weights)]
    seen += [(second, "compiling") for second in (9, 20, 45)]
    for elapsed_s, text in seen:
        out.progress("start", text, elapsed_s=elapsed_s)
    out.progress("stop", "what takes a moment")
    printed = capsys.readouterr()
    assert printed.out == ""
    # A phase once, however often its percentage changes; and one that lasts, now and then.
    assert printed.err.splitlines() == [
        "start     loading weights 20 %  ·  0:06",
        "start     compiling  ·  0:09",
        "start     compiling  ·  0:45",
    ]
    quiet = Output(json=False, quiet=True, verbose=False, color="never", progress=True)
    quiet.progress("start", "compiling", elapsed_s=60)
    assert capsys.readouterr() == ("", "")
