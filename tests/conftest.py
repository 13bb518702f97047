"""Options and fixtures of all tests."""

from __future__ import annotations

import difflib
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings

from stackctl.machine import runner

# A slow machine is no failure, and a build server repeats the same examples.
settings.register_profile("stackctl", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("stackctl")

HERE = Path(__file__).parent
GOLDEN = HERE / "golden"
#: The modules of the lab that take longest, longest first. The others follow, unit tests last. The
#: first and the third run in one worker, which boots the lab with vLLM for both.
SLOWEST = (
    "test_vllm", "test_crashes", "test_vllm_flags", "test_vllm_failures", "test_switch",
    "test_remote", "test_provision", "test_security", "test_up", "test_guard", "test_demo",
    "test_bench", "test_gpu", "test_failures", "test_door",
)  # fmt: skip

Golden = Callable[[str, str], None]


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option --update-golden."""
    parser.addoption(
        "--update-golden",
        action="store_true",
        help="Write the files below tests/golden anew; read the diff before committing it.",
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order tests by module, long ones first, so that parallel workers end at the same time."""

    def rank(item: pytest.Item) -> tuple[int, int]:
        folder = item.path.relative_to(HERE).parts[0]
        name = item.path.stem
        place = SLOWEST.index(name) if name in SLOWEST else len(SLOWEST)
        return {"lab": 0, "unit": 2}.get(folder, 1), place

    items.sort(key=rank)


class FailuresAtOnce:
    """Shows each failure when it happens, because an interrupted run has no summary."""

    def __init__(self, terminal: pytest.TerminalReporter) -> None:
        """Store the terminal for the output."""
        self._terminal = terminal

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Show the place and the text of a failure."""
        if report.failed:
            self._terminal.ensure_newline()
            self._terminal.section(f"{report.nodeid} ({report.when})", "_")
            self._terminal.line(report.longreprtext)


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    """Show failures at once, in the process that reports (with xdist, not its workers).

    Also accept SIGINT. A shell starts background jobs with SIGINT ignored. Every process that a
    test starts would inherit that, and interrupting it would have no effect.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    terminal = config.pluginmanager.get_plugin("terminalreporter")
    if terminal is not None and not hasattr(config, "workerinput"):
        config.pluginmanager.register(FailuresAtOnce(terminal))


@pytest.fixture(autouse=True)
def no_observer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reset the observer, which --verbose sets in the test's own process."""
    monkeypatch.setattr(runner, "observer", None)


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Golden:
    """Return a function that compares a text with a stored file, or stores it on request."""

    def compare(name: str, text: str) -> None:
        path = GOLDEN / name
        if request.config.getoption("--update-golden"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            return
        if not path.is_file():
            pytest.fail(f"tests/golden/{name} is missing: pytest --update-golden", pytrace=False)
        stored = path.read_text(encoding="utf-8")
        if stored != text:
            lines = difflib.unified_diff(
                stored.splitlines(), text.splitlines(), "stored", "now", lineterm="", n=1
            )
            pytest.fail(
                f"tests/golden/{name} differs (right? pytest --update-golden):\n"
                + "\n".join(lines),
                pytrace=False,
            )

    return compare
