"""What is remembered on disk, and where."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import msgspec
import pytest
from samples import EPYC, LLAMA_CPP, facts_of, plan

from stackctl.errors import ExitCode, StackctlError
from stackctl.resources import data_folder
from stackctl.state.generations import Generations, utc_now
from stackctl.state.learned_facts import EngineFactsCache, measured_memory
from stackctl.state.paths import scope_paths
from stackctl.values.generation import EngineFact, Generation, Outcome, UnitFile, UnitSet


def generation(number: int, stack: str = "cpu") -> Generation:
    return Generation(
        number=number,
        stack=stack,
        created="2026-11-21T12:00:00Z",
        image="ghcr.io/x@sha256:00",
        image_id="0" * 64,
        units=UnitSet(
            stack=stack,
            service=f"{stack}.service",
            container=f"stackctl-{stack}",
            files=(UnitFile(name=f"{stack}.container", text="[Container]\n"),),
        ),
        plan=plan(),
        host=EPYC,
        outcome=Outcome(state="starting", changed="2026-11-21T12:00:00Z"),
    )


# Generations


def test_generations_are_stored_and_numbered(tmp_path: Path) -> None:
    store = Generations(tmp_path / "state")
    assert store.numbers("cpu") == ()
    for number in (2, 10, 1):
        store.write(generation(number))
    store.write(generation(5, "other"))
    assert store.numbers("cpu") == (1, 2, 10)
    assert store.read("cpu", 10) == generation(10)
    path = tmp_path / "state" / "stacks" / "cpu" / "10.json"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert json.loads(path.read_text())["schema"] == "stackctl.generation/1"


def test_foreign_files_are_no_generations(tmp_path: Path) -> None:
    store = Generations(tmp_path)
    store.write(generation(1))
    folder = tmp_path / "stacks" / "cpu"
    for name in (".stackctl-abc.tmp", "notes.json", "2.json.bak", "-3.json"):
        (folder / name).write_text("{}")
    assert store.numbers("cpu") == (1,)


def test_the_outcome_is_all_that_changes(tmp_path: Path) -> None:
    store = Generations(tmp_path)
    first = generation(1)
    store.write(first)
    done = store.set_outcome(first, "ready", ready_s=12.5)
    assert store.read("cpu", 1) == done
    assert (done.outcome.state, done.outcome.ready_s) == ("ready", 12.5)
    assert done.outcome.changed >= "2026"
    assert msgspec.structs.replace(done, outcome=first.outcome) == first
    failed = store.set_outcome(done, "failed", message="port taken")
    assert (failed.outcome.message, failed.outcome.ready_s) == ("port taken", None)


def test_what_engines_said_of_their_memory(tmp_path: Path) -> None:
    store = Generations(tmp_path)
    report = (
        EngineFact(name="weights_bytes", value="100"),
        EngineFact(name="kv_cache_tokens", value="2097152"),
        EngineFact(name="kv_cache_bytes", value="odd"),
    )
    for number, state in enumerate(("ready", "failed", "replaced", "ready"), 1):
        made = generation(number)
        outcome = msgspec.structs.replace(made.outcome, state=state, report=report)
        image = "1" * 64 if number == 4 else made.image_id
        store.write(msgspec.structs.replace(made, outcome=outcome, image_id=image))
    (tmp_path / "stacks" / "cpu" / "5.json").write_text("damaged")
    model = plan().model
    newest, oldest = measured_memory(store, "cpu", model, "0" * 64)
    assert (newest.generation, oldest.generation) == (3, 1)
    assert newest.argv == plan().argv
    assert (newest.weights_bytes, newest.kv_bytes, newest.kv_tokens) == (100, None, 2097152)
    assert [one.generation for one in measured_memory(store, "cpu", model)] == [
        4,
        3,
        1,
    ]
    other = msgspec.structs.replace(model, weights_bytes=1)
    assert measured_memory(store, "cpu", other) == ()


def test_a_generation_that_is_not_there(tmp_path: Path) -> None:
    store = Generations(tmp_path)
    with pytest.raises(StackctlError, match="cpu has no generation 4") as caught:
        store.read("cpu", 4)
    assert caught.value.exit_code == ExitCode.NOT_FOUND
    assert caught.value.hint == "generations: none"
    store.write(generation(1))
    store.write(generation(2))
    with pytest.raises(StackctlError) as caught:
        store.read("cpu", 4)
    assert caught.value.hint == "generations: 1, 2"


def test_a_record_of_an_engine_that_this_stackctl_lacks_is_unreadable(tmp_path: Path) -> None:
    """The commands over all stacks then show the other stacks."""
    store, made = Generations(tmp_path), generation(3)
    store.write(msgspec.structs.replace(made, plan=msgspec.structs.replace(made.plan, engine="x")))
    store.write(generation(2))
    with pytest.raises(StackctlError, match="generation 3 of cpu cannot be read") as caught:
        store.read("cpu", 3)
    assert caught.value.exit_code == ExitCode.FAILED
    assert caught.value.details == ("unknown engine 'x'",)


@pytest.mark.parametrize(
    "raw",
    [b"", b"{", b"\xff\xfe", b'{"schema": "stackctl.generation/9"}', b"{}", b'{"number": "one"}'],
)
def test_a_damaged_record_says_which_and_what_still_works(tmp_path: Path, raw: bytes) -> None:
    store = Generations(tmp_path)
    store.write(generation(3))
    (tmp_path / "stacks" / "cpu" / "3.json").write_bytes(raw)
    with pytest.raises(StackctlError) as caught:
        store.read("cpu", 3)
    assert "generation 3 of cpu" in caught.value.message
    assert caught.value.details
    assert caught.value.exit_code == ExitCode.FAILED
    assert "stackctl down cpu" in (caught.value.hint or "")


def test_moments_are_utc_to_the_second() -> None:
    text = utc_now()
    assert len(text) == len("2026-11-21T12:00:00Z")
    assert text.endswith("Z")


# Facts of engines


def test_facts_are_kept_by_image(tmp_path: Path) -> None:
    cache = EngineFactsCache(tmp_path / "cache")
    facts = facts_of(LLAMA_CPP.newest.options)
    assert cache.get(facts.image_id) is None
    assert cache.latest(facts.reference) is None
    cache.put(facts)
    assert cache.get(facts.image_id) == facts
    assert cache.latest(facts.reference) == facts
    assert cache.latest("other") is None
    newer = msgspec.structs.replace(facts, image_id="1" * 64, seen="2027-01-01T00:00:00Z")
    cache.put(newer)
    assert cache.latest(facts.reference) == newer
    assert cache.get(facts.image_id) == facts


@pytest.mark.parametrize("raw", [b"", b"{}", b"\xff", b'{"schema": "stackctl.engine/2"}'])
def test_damaged_facts_are_read_from_the_image_again(tmp_path: Path, raw: bytes) -> None:
    cache = EngineFactsCache(tmp_path)
    facts = facts_of(LLAMA_CPP.newest.options)
    cache.put(facts)
    (tmp_path / "engines" / f"{facts.image_id}.json").write_bytes(raw)
    assert cache.get(facts.image_id) is None
    assert cache.latest(facts.reference) is None
    cache.put(facts)
    assert cache.get(facts.image_id) == facts


# Where things live


def test_folders_of_the_system() -> None:
    found = scope_paths("system", {"HOME": "/root"})
    assert found.units == Path("/etc/containers/systemd/stackctl")
    assert found.unit_folder("cpu") == found.units / "cpu"
    assert found.state == Path("/var/lib/stackctl")
    assert found.cache == Path("/var/cache/stackctl")
    assert found.lock == Path("/run/stackctl/lock")


def test_folders_of_a_user(tmp_path: Path) -> None:
    runtime = tmp_path / "run"
    runtime.mkdir()
    found = scope_paths("user", {"HOME": "/home/me", "XDG_RUNTIME_DIR": str(runtime)})
    assert found.units == Path("/home/me/.config/containers/systemd/stackctl")
    assert found.state == Path("/home/me/.local/state/stackctl")
    assert found.cache == Path("/home/me/.cache/stackctl")
    assert found.lock == runtime / "stackctl" / "lock"
    environment = {
        "HOME": "/home/me", "XDG_RUNTIME_DIR": str(runtime), "XDG_CONFIG_HOME": "/c",
        "XDG_STATE_HOME": "/s", "XDG_CACHE_HOME": "not/absolute",
    }  # fmt: skip
    found = scope_paths("user", environment)
    assert found.units == Path("/c/containers/systemd/stackctl")
    assert found.state == Path("/s/stackctl")
    # The specification says that a relative path is to be ignored.
    assert found.cache == Path("/home/me/.cache/stackctl")


def test_without_a_login_session_the_lock_is_with_the_state() -> None:
    found = scope_paths("user", {"HOME": "/home/me", "XDG_RUNTIME_DIR": "/nowhere"})
    assert found.lock == Path("/home/me/.local/state/stackctl/stackctl/lock")


def test_profiles_are_looked_for_from_the_given_folder_to_the_shipped(tmp_path: Path) -> None:
    found = scope_paths("user", {"HOME": "/home/me"}, profile_folder=tmp_path)
    assert found.profiles == (
        tmp_path,
        Path("/home/me/.config/stackctl/profiles"),
        Path("/etc/stackctl/profiles"),
        data_folder("profiles"),
    )
    assert len(scope_paths("system", {"HOME": "/root"}).profiles) == 3


def test_data_folders() -> None:
    for name in ("templates", "profiles", "systemd"):
        assert data_folder(name).is_dir()
    with pytest.raises(StackctlError, match="no nonsense folder"):
        data_folder("nonsense")
