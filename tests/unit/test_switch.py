"""Which profile a switch means."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from test_rollout_strategy import generation

from stackctl.deploy.switch import resolve_target
from stackctl.errors import ExitCode, StackctlError
from stackctl.resources import data_folder
from stackctl.sources.profiles import Profiles
from stackctl.values.profile import Overrides


@pytest.mark.parametrize("word", ["throughput", "cpu-throughput"])
def test_a_stack_keeps_its_name_whatever_its_profile_says_since(tmp_path: Path, word: str) -> None:
    for name in ("cpu-latency", "cpu-throughput"):
        (tmp_path / f"{name}.yaml").write_text(f"extends: {name}\nstack: edited\n")
    profiles = Profiles([tmp_path, data_folder("profiles")])
    old = generation(1, 20000)
    assert old.plan.profile == "cpu-latency"
    old = msgspec.structs.replace(old, asked=Overrides(sets=("port=9000",)))
    profile, asked = resolve_target(old, word, profiles)
    assert (profile.stack, profile.objective, profile.port) == ("cpu", "throughput", 9000)
    assert profiles.resolve(word if "-" in word else "cpu-latency", asked) == profile


def test_another_stack_s_profile_is_not_taken(tmp_path: Path) -> None:
    with pytest.raises(StackctlError, match="demo runs as a stack of its own") as caught:
        resolve_target(generation(1, 20000), "demo", Profiles([data_folder("profiles")]))
    assert caught.value.exit_code == ExitCode.USAGE
