"""The arguments that stackctl writes for vLLM, checked by vLLM's own parser."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from typing import Any

from samples import HOSTS, IQUEST, plan, profile, shipped, shipped_model

from stackctl.errors import StackctlError
from stackctl.resources import data_folder
from stackctl.sources.profiles import Profiles

from .lab import VLLM_IMAGE, Lab

# Reads lists of arguments and prints the parser's errors for each. The parser accepts
# abbreviations, so whole names are also looked up.
JUDGE = """
import contextlib, io, json, sys
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser

parser = make_arg_parser(FlexibleArgumentParser(prog="vllm serve"))
names = {name for action in parser._actions for name in action.option_strings}
answers = []
for words in json.load(sys.stdin):
    errors = [word for word in words if word.startswith("--") and word not in names]
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            parser.parse_args(words)
    except SystemExit:
        errors.append(said.getvalue()[-500:])
    answers.append(errors)
print(json.dumps(answers))
"""


#: Arguments that the parser accepts, abbreviates, does not have, and refuses.
CONTROLS = (
    ("m", "--max-num-seqs", "1"),
    ("m", "--max-num-seq", "1"),
    ("m", "--no-such-flag", "1"),
    ("m", "--max-num-seqs", "many"),
)


def judge(lab: Lab, lists: Sequence[Sequence[str]]) -> list[list[str]]:
    """Return the errors of vLLM's parser for each list of arguments."""
    words = ["podman", "run", "--rm", "--interactive", "--network=none", "--read-only"]
    words += ["--cap-drop=all", "--pull=never", VLLM_IMAGE, "python3", "-c", JUDGE]
    done = lab.run(words, input=json.dumps(lists), timeout=300, check=True)
    answers: list[list[str]] = json.loads(done.stdout.splitlines()[-1])
    return answers


def test_every_flag_of_every_plan_is_one_of_vllm(vllm_lab: Lab) -> None:
    argvs: dict[tuple[str, ...], str] = {}
    wishes = [shipped(name) for name in Profiles([data_folder("profiles")]).names()]
    wishes = [wish for wish in wishes if wish.engine == "vllm"]
    assert wishes
    changes: tuple[dict[str, Any], ...] = (
        {},
        {"kv_type": "fp8", "context": 65536, "concurrency": 3},
        {"engine_args": {"moe-backend": ("marlin",), "linear-backend": ("marlin",)}},
    )
    for host, wish, objective, change in itertools.product(
        HOSTS, wishes, ("latency", "throughput"), changes
    ):
        for model in (shipped_model(wish), IQUEST):
            wanted = profile(wish, objective=objective, **change)
            try:
                made = plan(HOSTS[host], model, wanted)
            except StackctlError:
                continue
            assert made.argv[:2] == ("vllm", "serve")
            argvs.setdefault(made.argv, f"{host} {wish.name} {objective} {change}")
    assert len(argvs) >= 8
    answers = judge(vllm_lab, [*CONTROLS, *(argv[2:] for argv in argvs)])
    fine, short, unknown, value = answers[: len(CONTROLS)]
    assert fine == []
    assert short == ["--max-num-seq"]
    assert unknown[0] == "--no-such-flag"
    assert "many" in value[0]
    answers = answers[len(CONTROLS) :]
    wrong = {argvs[argv]: said for argv, said in zip(argvs, answers, strict=True) if said}
    assert not wrong
