"""Requirements of a host as a whole; their problems, findings and changes are tested in
test_probe.py, test_probe_doctor.py and test_provision.py."""

from __future__ import annotations

from collections import Counter
from typing import get_args

import pytest

from stackctl.requirements import ITEMS, REQUIREMENTS
from stackctl.requirements.requirement import ProvisionItem, Requirement, code_of
from stackctl.values.base import from_json
from stackctl.values.host import Host, Problem, ProblemCode


def test_names_and_codes_belong_to_one_requirement_each() -> None:
    names = [requirement.name for requirement in REQUIREMENTS]
    codes = Counter(code for requirement in REQUIREMENTS for code in requirement.codes)
    assert len(names) == len(set(names))
    assert set(codes.values()) == {1}
    assert set(codes) < set(get_args(ProblemCode))


def test_every_requirement_has_a_part_of_its_own() -> None:
    parts = ("problems", "check", "changes")
    bases = (Requirement, ProvisionItem)
    for requirement in REQUIREMENTS:
        own = {part for kind in type(requirement).mro() if kind not in bases for part in vars(kind)}
        assert own & set(parts), requirement.name
        # A problem that the probe reports is judged by doctor, unless it is one of the recording.
        if requirement.codes and requirement.codes != ("recording-incomplete",):
            assert own >= {"problems", "check"}, requirement.name
    assert list(ITEMS) == [r.name for r in REQUIREMENTS if isinstance(r, ProvisionItem)]


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("podman is not installed", "podman-missing"),
        ("podman does not answer", "podman-no-answer"),
        ("podman 4.3.1 is too old", "podman-too-old"),
        ("no Quadlet generator", "quadlet-missing"),
        ("systemd is not running", "systemd-not-running"),
        ("no service manager for this user", "user-manager-not-running"),
        ("cgroup version 1", "cgroup-v1"),
        ("user services end at logout", "linger-off"),
        ("no cpuset controller", "cpuset-missing"),
        ("cpuset is not delegated to user services", "cpuset-not-delegated"),
        ("locked memory limit is unknown", "memlock-unknown"),
        ("locked memory is limited", "memlock-limited"),
        ("tools: not recorded", "recording-incomplete"),
        ("memory size is unknown", None),
    ],
)
def test_documents_from_before_there_were_codes_are_read(text: str, code: str | None) -> None:
    document = f'{{"schema": "stackctl.host/1", "problems": [{{"what": "{text}", "why": "x"}}]}}'
    (problem,) = from_json(document, Host, where="facts").problems
    assert problem.code is None
    assert code_of(problem) == code


def test_a_code_counts_more_than_the_text() -> None:
    assert code_of(Problem(code="cgroup-v1", what="podman is not installed", why="")) == "cgroup-v1"
