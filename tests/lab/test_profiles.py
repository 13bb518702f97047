"""Every shipped profile starts with one command.

A hub in the lab, tests/hub.py, has a small model at each place that the catalogue names, in as many
parts as the catalogue's model.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from stackctl.engines import uses_gpu
from stackctl.resources import data_folder
from stackctl.sources.catalogue import HubDownload, find_download
from stackctl.sources.profiles import Profiles
from stackctl.values.profile import Overrides, Profile

from . import look
from .card import cdi
from .conftest import Seat
from .lab import CHECKPOINT_PATH, IMAGE, Lab
from .tinymodel import tiny_model, tiny_shards

HUB = Path(__file__).parents[1] / "hub.py"
PORT = 8601
ENV = {"HF_ENDPOINT": f"http://127.0.0.1:{PORT}"}
UNIT = "profiles-hub"
SHIPPED = Profiles([data_folder("profiles")])


def profile_of(name: str) -> Profile:
    """Return the resolved profile of that name."""
    return SHIPPED.resolve(name, Overrides())


def download_of(name: str) -> HubDownload:
    """Return the place from which the profile's model is fetched."""
    found = find_download(profile_of(name).model or "")
    assert found is not None
    return found


def served_by_llama_cpp(*, gpu: bool) -> list[str]:
    """Return the profiles with a model that a hub can have."""
    found = []
    for name in SHIPPED.names():
        profile = profile_of(name)
        suits = profile.engine == "llama.cpp" and uses_gpu(profile) == gpu
        if suits and find_download(profile.model or "") is not None:
            found.append(name)
    return found


def standin(download: HubDownload) -> dict[str, bytes]:
    """Return the files of a small model, under the names of the catalogue's model."""
    assert download.file is not None
    shard = re.fullmatch(r"(.+)-00001-of-(\d{5})\.gguf", download.file)
    if shard is None:
        return {download.file: tiny_model()}
    stem, count = shard[1], int(shard[2])
    names = [f"{stem}-{number:05}-of-{count:05}.gguf" for number in range(1, count + 1)]
    return dict(zip(names, tiny_shards(count), strict=True))


def start_hub(lab: Lab, repos: dict[str, str]) -> None:
    """Serve folders of the lab as repositories."""
    look.put(lab, "/srv/profiles-hub.py", HUB.read_bytes())
    words = ["systemd-run", "--quiet", f"--unit={UNIT}", "python3", "/srv/profiles-hub.py"]
    words += [f"{repo}={folder}" for repo, folder in repos.items()]
    lab.run([*words, "--port", str(PORT)], check=True)
    look.wait_for("the hub listens", lambda: bool(look.listening(lab, PORT)))


def forget(seat: Seat) -> None:
    """Remove all models from the user's cache."""
    home = "/root" if seat.user == "root" else seat.lab.home(seat.user)
    seat.run("rm", "-rf", f"{home}/.cache/huggingface")


@pytest.fixture(scope="module")
def site(lab: Lab) -> Iterator[Lab]:
    """Yield the lab with a hub that has a small model as each GGUF model of the profiles."""
    repos = {}
    for name in (*served_by_llama_cpp(gpu=False), *served_by_llama_cpp(gpu=True)):
        download = download_of(name)
        repos[download.repo] = f"/srv/profiles-hub/{download.repo}"
        for path, content in standin(download).items():
            look.put(lab, f"{repos[download.repo]}/{path}", content)
    start_hub(lab, repos)
    yield lab
    lab.run(["systemctl", "stop", UNIT])
    lab.run(["rm", "-rf", "/srv/profiles-hub", "/srv/profiles-hub.py"])


@pytest.fixture
def fresh(site: Lab, seat: Seat) -> Iterator[Seat]:
    """Yield a user without any model."""
    assert seat.lab is site
    forget(seat)
    yield seat
    forget(seat)


@pytest.mark.deep
@pytest.mark.parametrize("name", served_by_llama_cpp(gpu=False))
def test_a_profile_on_the_cpu_fetches_its_model_and_serves(fresh: Seat, name: str) -> None:
    profile = profile_of(name)
    # The model of the catalogue would be too slow here; the served one is small.
    words = ("up", name, "--yes", "--force", "--soak", "0s", *look.ONE_THREAD)
    done = fresh.stackctl(*words, env=ENV, timeout=300)
    assert f"model     {download_of(name).source}, " in done.stderr
    assert f"{profile.stack} is up (generation 1)" in done.stdout
    answer = look.chat(fresh, profile.port or look.PORT)
    assert answer["usage"]["completion_tokens"] > 0
    # The model is on the disk now, so the hub is not asked again.
    again = fresh.stackctl(*words)
    assert "nothing to change (generation 1)" in again.stdout
    fresh.stackctl("down", profile.stack)
    look.assert_clean(fresh, profile.stack)


@pytest.mark.deep
@pytest.mark.parametrize("name", served_by_llama_cpp(gpu=True))
def test_a_profile_on_a_gpu_fetches_its_model_and_starts(fresh: Seat, gpu: Seat, name: str) -> None:
    look.put(gpu.lab, "/etc/cdi/nvidia.yaml", cdi().encode())
    # The catalogue's mixture of experts would not fit here.
    words = ("up", name, "--yes", "--force", "--soak", "0s", "--set", f"image={IMAGE}")
    done = fresh.stackctl(*words, env=ENV, timeout=300)
    assert f"model     {download_of(name).source}, " in done.stderr
    stack = profile_of(name).stack
    assert f"{stack} is up (generation 1)" in done.stdout
    assert "AddDevice=nvidia.com/gpu=0" in look.unit_text(fresh, stack).splitlines()
    fresh.stackctl("down", stack)
    look.assert_clean(fresh, stack)


@pytest.mark.deep
def test_vllm_on_the_cpu_fetches_its_model_and_serves(vllm_lab: Lab) -> None:
    seat = Seat(vllm_lab, "lab")
    start_hub(vllm_lab, {download_of("cpu-vllm").repo: CHECKPOINT_PATH})
    try:
        words = ("up", "cpu-vllm", "--yes", "--force", "--set", "engine_args.enforce-eager=true")
        done = seat.stackctl(*words, env=ENV, timeout=900)
        assert "model     hf:Qwen/Qwen2.5-1.5B-Instruct, " in done.stderr
        assert look.chat(seat, 8085)["usage"]["completion_tokens"] > 0
        seat.stackctl("down", "cpu-vllm")
    finally:
        seat.reset()
        forget(seat)
        vllm_lab.run(["systemctl", "stop", UNIT])


@pytest.mark.deep
def test_a_profile_whose_model_has_to_be_made_says_so(fresh: Seat, gpu: Seat) -> None:
    look.put(gpu.lab, "/etc/cdi/nvidia.yaml", cdi().encode())
    done = fresh.stackctl("up", "gpu-nvfp4", "--yes", "--force", env=ENV, code=1)
    look.assert_error(done, "no such repository", "ModelOpt")
    done = fresh.stackctl("up", "gpu-reasoning", "--yes", "--force", env=ENV, code=1)
    look.assert_error(done, "only facts about it", "llm-compressor")
    look.assert_clean(fresh, "gpu-nvfp4")


@pytest.mark.deep
def test_up_without_a_profile_names_the_best(seat: Seat) -> None:
    done = seat.stackctl("up", code=2)
    look.assert_error(done, "missing PROFILE: the best for this machine is ", "stackctl up ")
    assert not seat.files(seat.units, seat.state)
