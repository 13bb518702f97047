"""An engine that stackctl does not ship, through the real functions: registered, planned, rendered,
judged by doctor and provisioning, verified and diagnosed, on a GPU and on a CPU.

tests/lab/test_third_engine.py starts it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
from samples import EPYC, EPYC_GPU, GEMMA, HOSTS, IQUEST, plan
from test_verify import generation, results
from thirdengine import StubEngine, profile_text, registered

from stackctl import engines
from stackctl.cli.main import run
from stackctl.diagnose.rules import diagnose
from stackctl.engines import engine, uses_gpu
from stackctl.errors import ExitCode, StackctlError
from stackctl.provision import items
from stackctl.sources.profiles import Profiles, profile_schema
from stackctl.values.base import from_json, to_json
from stackctl.values.diagnosis import DiagnoseReport, Evidence, Finding
from stackctl.values.generation import EngineFact
from stackctl.values.host import Host
from stackctl.values.plan import Plan
from stackctl.values.profile import Overrides, Profile
from stackctl.values.result import DoctorReport

#: Two requests at once, slow on either place, and a cache that is nearly full.
LOG = """\
[stub 0.1s] stub 7.1
[stub 0.2s] reading weights
[stub 1.0s] weights use 246587904 bytes
[stub 1.1s] computing on gpu
[stub 1.2s] ready on 127.0.0.1:8080
""" + "".join(
    f"[stub {10 * n}.0s] speed: prompt 0.0/s, text 1.2/s, 2 running, 3 waiting, cache 99.0%\n"
    for n in range(1, 7)
)


@pytest.fixture(params=[True, False], ids=["gpu", "cpu"])
def stub(request: pytest.FixtureRequest) -> Iterator[StubEngine]:
    """The engine, registered for one test: made for GPUs, then for CPUs."""
    with registered(gpu=request.param) as found:
        yield found


@pytest.fixture
def host(stub: StubEngine) -> Host:
    """A machine on which the engine can run."""
    return EPYC_GPU if stub.gpu_by_default else EPYC


@pytest.fixture
def profile(stub: StubEngine, tmp_path: Path) -> Profile:
    return resolve(tmp_path, stub)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, host: Host, stub: StubEngine) -> Path:
    """A user's folder with a profile of the engine, machines and a model as files."""
    for name in ("CONFIG", "STATE", "CACHE"):
        monkeypatch.setenv(f"XDG_{name}_HOME", str(tmp_path / name.lower()))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "host.json").write_text(to_json(host), encoding="utf-8")
    (tmp_path / "bare.json").write_text(to_json(HOSTS["epyc-nps1"]), encoding="utf-8")
    (tmp_path / "model.json").write_text(to_json(GEMMA), encoding="utf-8")
    (tmp_path / "stub.yaml").write_text(profile_text(gpu=stub.gpu_by_default), encoding="utf-8")
    return tmp_path


def resolve(folder: Path, stub: StubEngine, sets: tuple[str, ...] = (), **more: Any) -> Profile:
    path = folder / "stub.yaml"
    path.write_text(profile_text(gpu=stub.gpu_by_default, **more), encoding="utf-8")
    return Profiles([folder]).resolve(str(path), Overrides(sets=sets))


def stackctl(capsys: pytest.CaptureFixture[str], code: int, *arguments: str) -> str:
    """What stackctl prints on stdout; insists on its exit code."""
    capsys.readouterr()
    done = run(arguments)
    out, err = capsys.readouterr()
    assert done == code, err
    return out


def named(findings: Sequence[Finding]) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings}


# Registered


def test_a_name_is_known_while_the_engine_is_registered(tmp_path: Path) -> None:
    with registered(gpu=True) as stub:
        assert engine("stub-gpu") is stub
        assert resolve(tmp_path, stub).engine == "stub-gpu"
        schema = profile_schema()["$defs"]["ProfileFile"]["properties"]["engine"]
        assert "stub-gpu" in json.dumps(schema)
    with pytest.raises(StackctlError) as caught:
        resolve(tmp_path, stub)
    assert caught.value.exit_code == ExitCode.USAGE
    assert caught.value.message.endswith("stub.yaml:1: engine: unknown engine 'stub-gpu'")
    with pytest.raises(StackctlError) as caught:
        engine("stub-gpu")
    assert caught.value.exit_code == ExitCode.USAGE
    assert caught.value.hint == "engines: llama.cpp, vllm"


# Planned


def test_it_is_planned_where_it_belongs(stub: StubEngine, host: Host, profile: Profile) -> None:
    made = plan(host, GEMMA, profile)
    on_gpu = stub.gpu_by_default
    assert uses_gpu(profile) is on_gpu
    assert made.engine == stub.name
    assert made.placement.gpus == (("0",) if on_gpu else ())
    assert made.argv[0] == "stub-server"
    words = " ".join(made.argv)
    assert f"--device {'gpu' if on_gpu else 'cpu'}" in words
    assert "--window 2048" in words
    assert made.memory.pool == ("GPU 0" if on_gpu else "memory")
    assert made.memory.weights_bytes == GEMMA.weights_bytes
    assert made.timing.deadline_s == pytest.approx(45 + GEMMA.weights_bytes / 100e6, abs=1)
    assert made.verdict.fits is True
    # A GPU does the work with a few cores, a CPU with all but a few.
    assert int(made.argv[made.argv.index("--workers") + 1]) == (2 if on_gpu else 14)
    assert made.prediction.decode_tok_s is not None


def test_no_engine_for_gpus_is_planned_on_a_cpu_unasked(tmp_path: Path) -> None:
    with registered(gpu=True) as stub:
        wish = resolve(tmp_path, stub)
        with pytest.raises(StackctlError) as caught:
            plan(EPYC, GEMMA, wish)
        assert caught.value.exit_code == ExitCode.HOST
        assert "needs a GPU" in caught.value.message
        # But where the profile asks for it.
        asked = resolve(tmp_path, stub, sets=("placement.gpus=none",))
        assert not uses_gpu(asked)
        assert "cpu" in plan(EPYC_GPU, GEMMA, asked).argv


def test_auto_and_advice_ask_the_engine(stub: StubEngine, host: Host, tmp_path: Path) -> None:
    wish = resolve(tmp_path, stub, context="auto", concurrency=1)
    made = plan(host, GEMMA, wish)
    (window,) = (one for one in made.decisions if one.field == "window")
    assert (window.value, window.reason.partition(";")[0]) == (32768, "auto: the most that fits")
    lanes = 2 if stub.gpu_by_default else 32
    large = resolve(tmp_path, stub, context=131072, concurrency=lanes)
    advice = plan(host, IQUEST, large).verdict.alternatives
    assert any("--set concurrency=" in text for text in advice)
    assert any("--set kv_type=half" in text for text in advice)


def test_a_model_that_it_cannot_run_is_refused(
    stub: StubEngine, host: Host, profile: Profile
) -> None:
    mixture = msgspec.structs.replace(GEMMA, experts=128, experts_used=8)
    judged = engines.with_unsupported(mixture)
    assert judged.reason_unsupported(stub.name) == "too many experts"
    with pytest.raises(StackctlError) as caught:
        plan(host, judged, profile)
    assert caught.value.exit_code == ExitCode.REFUSED
    assert caught.value.details == ("too many experts",)


def test_the_plan_of_the_command_line(
    stub: StubEngine, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("./stub.yaml", "--facts", "host.json", "--model", "facts:model.json")
    made = from_json(stackctl(capsys, 0, "plan", *words, "--json"), Plan, where="stdout")
    assert (made.engine, made.image) == (stub.name, stub.default_image)
    assert bool(made.placement.gpus) is stub.gpu_by_default
    shown = stackctl(capsys, 0, "plan", *words, "--explain")
    assert re.search(r"^ *device +(gpu|cpu) +by placement", shown, re.MULTILINE)


# Rendered


def test_its_unit_holds_its_own_terms(
    stub: StubEngine, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("./stub.yaml", "--facts", "host.json", "--model", "facts:model.json")
    text = stackctl(capsys, 0, "render", *words)
    lines = text.splitlines()
    assert any(line.startswith("Exec=") and "--window 2048" in line for line in lines)
    assert "http://127.0.0.1:8080/livez" in text
    assert "STUB_WINDOW" in text
    on_gpu = stub.gpu_by_default
    assert any(line.startswith("AddDevice=") for line in lines) is on_gpu
    assert ("STUB_CACHE=/cache" in text) is on_gpu
    assert (":/cache:" in text) is on_gpu


# Doctor and provisioning


def test_doctor_asks_for_what_it_needs(
    stub: StubEngine, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("./stub.yaml", "--model", "facts:model.json", "--json")
    out = stackctl(capsys, 0, "doctor", *words, "--facts", "host.json")
    found = {one.name: one for one in from_json(out, DoctorReport, where="stdout").results}
    assert found["plan"].status == "ok"
    assert ("gpu" in found) is stub.gpu_by_default
    # On the machine without a GPU.
    code = ExitCode.HOST if stub.gpu_by_default else ExitCode.OK
    out = stackctl(capsys, code, "doctor", *words, "--facts", "bare.json")
    found = {one.name: one for one in from_json(out, DoctorReport, where="stdout").results}
    assert found["plan"].status == ("fail" if stub.gpu_by_default else "ok")


def test_a_machine_is_provisioned_for_it(stub: StubEngine, host: Host, profile: Profile) -> None:
    found = items.needs_of_profiles([profile], host, ())
    assert (found.gpu, found.memlock) == (stub.gpu_by_default, not stub.gpu_by_default)


# Verified


def test_what_runs_is_compared_with_its_plan(
    stub: StubEngine, host: Host, profile: Profile
) -> None:
    given = generation(plan(host, GEMMA, profile), host=host)
    found = results(given)
    assert {one.status for one in found.values()} <= {"ok", "info", "skip"}, found
    assert found["context"].actual == "2048"
    assert found["lanes"].actual == "1"
    words = list(given.plan.argv)
    words[words.index("--window") + 1] = "1024"
    report = (EngineFact(name="context", value="1024"), EngineFact(name="lanes", value="1"))
    found = results(given, argv=tuple(words), report=report)
    assert found["argv"].actual == "--window 1024 instead of 2048"
    assert (found["context"].status, found["context"].actual) == ("fail", "1024")


# Diagnosed


def test_its_log_alone_is_enough(
    stub: StubEngine, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "stub.log").write_text(LOG, encoding="utf-8")
    out = stackctl(capsys, 0, "diagnose", "--log", "stub.log", "--json")
    found = from_json(out, DiagnoseReport, where="stdout").results
    slow = named(found)
    assert slow["decode-bound"].status == "fail"
    assert "0.6 tok/s" in (slow["decode-bound"].actual or "")
    assert slow["kv-pressure"].actual == "the KV cache is too small: 99 % at most"
    assert slow["queueing"].status == "warn"


def test_advice_is_in_its_own_terms(stub: StubEngine, host: Host, profile: Profile) -> None:
    made = plan(host, GEMMA, profile)
    reader = stub.log_reader()
    for line in LOG.splitlines():
        reader.feed(line)
    found = diagnose(Evidence(stack="x", log=reader.samples(), plan=made, slo=profile.slo))
    text = json.dumps(msgspec.to_builtins(found))
    for foreign in ("max-model-len", "max-num-seqs", "ctx-size", "parallel", "cache-type-k"):
        assert foreign not in text


def test_its_counters_are_read(stub: StubEngine, host: Host, profile: Profile) -> None:
    made = plan(host, GEMMA, profile)
    text = (
        "stub_running 1\nstub_waiting 0\nstub_cache_share 0.5\nstub_prompt_tokens 1000\n"
        "stub_text_tokens {}\nstub_prompt_seconds 2\nstub_text_seconds {}\n"
    )
    before, now = (
        stub.parse_metrics({"/metrics": text.format(tokens, seconds)}, made.argv)
        for tokens, seconds in ((100, 100), (110, 110))
    )
    assert (now.running, now.kv_capacity_tokens) == (1, 2048)
    found = diagnose(Evidence(stack="x", before=before, now=now, interval_s=10, plan=made))
    assert "1.0 tok/s" in (named(found)["decode-bound"].actual or "")


def test_the_cause_of_a_failed_start_is_its_own(stub: StubEngine) -> None:
    failure = stub.failure(["[stub 1.0s] cache of 512 tokens cannot hold a window"])
    assert failure is not None
    assert failure.remedy == "--set context=512"
