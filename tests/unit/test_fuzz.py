"""Damaged and hostile input to every reader: an error that says so, no hang, no flood of memory.

Every day tries a few inputs, ``make test-deep`` more. A still longer run is
``STACKCTL_FUZZ=100000 pytest -m deep tests/unit/test_fuzz.py``, the number being that of all inputs
together. A failure names the kind and number of its input, which are the seed that makes it again.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import resource
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from checkpoints import CONFIG, checkpoint, sharded
from ggufs import LLAMA, TENSORS, As, Tensor, Value, gguf, write_shards
from samples import EPYC, EPYC_GPU, GEMMA, HOSTS, LATENCY, shipped, shipped_model
from samples import plan as plan_of

from stackctl.errors import StackctlError
from stackctl.machine.machine import RecordedMachine
from stackctl.probe import probe
from stackctl.resources import data_folder
from stackctl.sources.model_text import model_rows
from stackctl.sources.models import read_model
from stackctl.sources.profiles import Profiles
from stackctl.values.base import from_json, to_json
from stackctl.values.host import Host
from stackctl.values.model import Model
from stackctl.values.profile import Overrides

#: Inputs of all kinds together, every day and in depth.
FEW, MANY = 600, int(os.environ.get("STACKCTL_FUZZ", "10000"))
MOST_SECONDS = 1.0
MOST_BYTES = 200 * 2**20

Fuzz = Callable[[random.Random], None]

WHOLE = (0, 1, 2, 31, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63 - 1, 2**63, 2**64 - 1)
SCALARS = (
    *(
        "0",
        "-1",
        "1",
        "4294967296",
        "9223372036854775808",
        "-9223372036854775808",
        "1e999",
        "1e308",
    ),
    *("NaN", "Infinity", "null", "true", '""', '"0-9999999"', '"\\ud800"', "[]", "{}", "[[[]]]"),
    *('"' + "x" * 5000 + '"', "9" * 5000, "[" * 2000 + "]" * 2000, "0.5", "1e-320"),
)
LINES = (
    *(
        "",
        "0",
        "-1",
        "zebra",
        "0-4294967295",
        "0-65535," * 40,
        "4K",
        "32768K",
        "99999999999999999K",
    ),
    *("0,2-1", "\0\0", "\xff", "1 2 3", "MemTotal: -5 kB", "MemTotal: 99999999999999999999 kB"),
    *("Node 0 MemTotal: x kB", "f" * 9000, "ffffffff,ffffffff", "10 20 30", "max", "-1 100000"),
)


def damaged(data: bytes, rng: random.Random) -> bytes:
    """A few bytes changed, numbers made extreme, parts cut, doubled, moved."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        at = rng.randrange(len(out) + 1)
        match rng.randrange(7):
            case 0 if out:
                out[at % len(out)] ^= 1 << rng.randrange(8)
            case 1 if out:
                out[at % len(out)] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
            case 2:
                size = rng.choice((4, 8))
                out[at : at + size] = (rng.choice(WHOLE) % 2 ** (8 * size)).to_bytes(size, "little")
            case 3:
                del out[at:]
            case 4:
                del out[at : at + rng.randrange(1, 64)]
            case 5:
                start = rng.randrange(len(out) + 1)
                out[at:at] = out[start : start + rng.randrange(1, 256)]
            case _:
                out[at:at] = rng.randbytes(rng.randrange(1, 32))
    return bytes(out)


def reworded(text: str, rng: random.Random) -> bytes:
    """Values of a JSON or YAML text replaced, lines lost and doubled; or bytes damaged."""
    if rng.randrange(3) == 0:
        return damaged(text.encode(), rng)
    for _ in range(rng.choice((1, 1, 2, 4))):
        found = list(re.finditer(r'"(?:[^"\\]|\\.)*"(?!\s*:)|-?\d+(?:\.\d+)?|\bnull\b|\[\]', text))
        lines = text.splitlines(keepends=True)
        match rng.randrange(4):
            case 0 | 1 if found:
                spot = rng.choice(found)
                number = spot[0].lstrip("-").isdigit() and rng.randrange(2)
                value = str(rng.choice(WHOLE) - rng.randrange(3)) if number else rng.choice(SCALARS)
                text = text[: spot.start()] + value + text[spot.end() :]
            case 2 if lines:
                del lines[rng.randrange(len(lines))]
                text = "".join(lines)
            case _ if lines:
                line = rng.choice(lines)
                lines.insert(rng.randrange(len(lines)), line)
                text = "".join(lines)
            case _:
                pass
    return text.encode("utf-8", "surrogatepass")


def planned(model: Model, host: Host = EPYC) -> None:
    """A model that was read can be described, written, read again and planned."""
    assert from_json(to_json(model), Model, where="again") == model
    model_rows(model)
    with contextlib.suppress(StackctlError):
        to_json(plan_of(host, model, LATENCY))


# Attention as other families have it: latent, with windows, mixed with a recurrent state.
LAYOUTS: tuple[dict[str, Value], ...] = (
    {
        "general.architecture": "llama",
        "llama.expert_count": 4,
        "llama.expert_used_count": 2,
        "llama.attention.kv_lora_rank": 512,
        "llama.attention.key_length": 576,
        "llama.attention.key_length_mla": 192,
        "llama.rope.dimension_count": 64,
    },
    {
        "llama.attention.head_count_kv": As("i32", [2, 0, 2, 0]),
        "llama.attention.sliding_window": 512,
        "llama.attention.sliding_window_pattern": [True, False, True, False],
        "llama.ssm.conv_kernel": 4,
        "llama.ssm.inner_size": 128,
        "llama.ssm.state_size": 16,
        "llama.loop.num": 2,
    },
)
EXPERTS = (*TENSORS, Tensor("blk.0.ffn_up_exps.weight", (256, 2, 4), "Q4_K"))
CONFIGS: tuple[dict[str, Any], ...] = (
    {"text_config": dict(CONFIG), "rope_scaling": {"type": "yarn", "factor": 4}},
    {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "n_routed_experts": 8, "num_experts_per_tok": 2},
    {
        "sliding_window": 128,
        "layer_types": ["sliding_attention", "full_attention"],
        "quantization_config": {
            "quant_method": "compressed-tensors",
            "format": "nvfp4-pack-quantized",
            "config_groups": {"group_0": {"weights": {"num_bits": 4, "type": "float"}}},
        },
    },
    {
        "hybrid_override_pattern": "M*",
        "mamba_num_heads": 4,
        "mamba_head_dim": 8,
        "ssm_state_size": 16,
        "quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4"},
    },
)


def fuzz_gguf(folder: Path) -> Fuzz:
    whole = folder / "m.gguf"
    files = [*write_shards(folder), *[whole] * 4]
    kept = {path: path.read_bytes() for path in files[:3]}
    texts = [gguf(LLAMA, TENSORS), *(gguf({**LLAMA, **more}, EXPERTS) for more in LAYOUTS)]

    def one(rng: random.Random) -> None:
        path = rng.choice(files)
        try:
            path.write_bytes(damaged(kept.get(path) or rng.choice(texts), rng))
            planned(read_model(f"file:{path}"))
        finally:
            if path in kept:
                path.write_bytes(kept[path])

    return one


def fuzz_safetensors(folder: Path) -> Fuzz:
    places = [checkpoint(folder / "one"), sharded(folder / "two")]
    for number, config in enumerate(CONFIGS):
        places.append(checkpoint(folder / f"more{number}", **config))
    files = [path for place in places for path in sorted(place.iterdir())]
    kept = {path: path.read_bytes() for path in files}

    def one(rng: random.Random) -> None:
        path = rng.choice(files)
        text = path.suffix == ".json"
        try:
            data = kept[path]
            path.write_bytes(reworded(data.decode(), rng) if text else damaged(data, rng))
            model = read_model(f"dir:{path.parent}")
            planned(model)
            with contextlib.suppress(StackctlError):
                to_json(plan_of(EPYC_GPU, model, shipped("gpu-nvfp4")))
        finally:
            path.write_bytes(kept[path])

    return one


def fuzz_models(folder: Path) -> Fuzz:
    texts = [to_json(GEMMA), to_json(shipped_model(shipped("cpu-moe-batch")))]

    def one(rng: random.Random) -> None:
        path = folder / "m.json"
        path.write_bytes(reworded(rng.choice(texts), rng))
        planned(read_model(f"facts:{path}"))

    return one


def fuzz_hosts(_: Path) -> Fuzz:
    texts = [to_json(HOSTS[name]) for name in ("epyc-gpu", "lab", "epyc-smt")]
    wishes = [shipped(name) for name in ("gpu-nvfp4", "cpu-small", "hybrid-moe")]

    def one(rng: random.Random) -> None:
        host = from_json(reworded(rng.choice(texts), rng), Host, where="facts")
        to_json(host)
        wish = rng.choice(wishes)
        to_json(plan_of(host, shipped_model(wish), wish))

    return one


def fuzz_profiles(folder: Path) -> Fuzz:
    shipped_folder = data_folder("profiles")
    texts = [path.read_text("utf-8") for path in sorted(shipped_folder.glob("*.yaml"))]

    def one(rng: random.Random) -> None:
        (folder / "p.yaml").write_bytes(reworded(rng.choice(texts), rng))
        wish = Profiles([folder, shipped_folder]).resolve("p", Overrides())
        to_json(wish)
        to_json(plan_of(EPYC_GPU, GEMMA, wish))

    return one


TREE = {
    "proc/cpuinfo": "".join(
        f"processor\t: {n}\nvendor_id\t: AuthenticAMD\nmodel name\t: AMD EPYC 9175F\n"
        f"flags\t\t: sse4_2 avx avx2 avx512f avx512_vnni\n\n"
        for n in range(4)
    ),
    "proc/meminfo": "MemTotal:       16777216 kB\nMemFree: 1 kB\nMemAvailable:   12000000 kB\n"
    "Hugepagesize: 2048 kB\n",
    "proc/self/status": "Name:\tx\nCpus_allowed_list:\t0-3\nMems_allowed_list:\t0-1\n",
    "proc/self/cgroup": "0::/user.slice\n",
    "proc/self/limits": "Limit Soft Hard Units\nMax locked memory 8388608 8388608 bytes\n",
    "proc/version": "Linux version 6.12.0 (x)\n",
    "sys/fs/cgroup/cgroup.controllers": "cpuset cpu io memory pids\n",
    "sys/fs/cgroup/user.slice/cpu.max": "200000 100000\n",
    "sys/fs/cgroup/user.slice/memory.max": "8589934592\n",
    "sys/devices/system/cpu/online": "0-3\n",
    "sys/devices/system/cpu/possible": "0-3\n",
    "sys/devices/system/cpu/present": "0-3\n",
    "sys/devices/system/cpu/smt/active": "1\n",
    "sys/devices/system/node/online": "0-1\n",
    "sys/kernel/mm/transparent_hugepage/enabled": "always [madvise] never\n",
    "sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages": "4\n",
    "sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages": "2\n",
    "sys/bus/pci/devices/0000:c1:00.0/vendor": "0x10de\n",
    "sys/bus/pci/devices/0000:c1:00.0/device": "0x2bb4\n",
    "sys/bus/pci/devices/0000:c1:00.0/class": "0x030000\n",
    "sys/bus/pci/devices/0000:c1:00.0/numa_node": "0\n",
    "etc/os-release": 'PRETTY_NAME="Debian"\n',
    "etc/cdi/nvidia.yaml": "cdiVersion: 0.6.0\nkind: nvidia.com/gpu\ndevices:\n- name: '0'\n",
    **{
        f"sys/devices/system/node/node{n}/{name}": text
        for n in range(2)
        for name, text in {
            "cpulist": f"{n},{n + 2}\n",
            "cpumap": f"{5 << n:x}\n",
            "meminfo": f"Node {n} MemTotal:       8388608 kB\n",
            "distance": "10 20\n",
        }.items()
    },
    **{
        f"sys/devices/system/cpu/cpu{n}/{name}": text
        for n in range(4)
        for name, text in {
            "topology/core_id": f"{n % 2}\n",
            "topology/physical_package_id": "0\n",
            "topology/die_id": "0\n",
            "topology/thread_siblings_list": f"{n % 2},{n % 2 + 2}\n",
            "topology/thread_siblings": f"{5 << (n % 2):x}\n",
            "topology/core_cpus_list": f"{n % 2},{n % 2 + 2}\n",
            "cache/index3/level": "3\n",
            "cache/index3/type": "Unified\n",
            "cache/index3/size": "32768K\n",
            "cache/index3/id": "0\n",
            "cache/index3/shared_cpu_list": "0-3\n",
            "cache/index3/shared_cpu_map": "f\n",
            "cpufreq/scaling_governor": "performance\n",
        }.items()
    },
}


def fuzz_trees(folder: Path) -> Fuzz:
    for name, text in TREE.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    whole = probe(RecordedMachine(folder), scope="user")
    assert whole.cpu.cores == 2
    assert whole.cpu.numa
    names = sorted(TREE)

    def one(rng: random.Random) -> None:
        chosen = rng.sample(names, rng.choice((1, 1, 2, 3, 10)))
        try:
            for name in chosen:
                path = folder / name
                match rng.randrange(6):
                    case 0:
                        path.unlink()
                    case 1:
                        path.unlink()
                        path.mkdir()
                    case 2 | 3:
                        line = rng.choice(LINES)
                        path.write_text(line + "\n", encoding="latin-1")
                    case _:
                        path.write_bytes(damaged(TREE[name].encode(), rng))
            host = probe(RecordedMachine(folder), scope="user")
            to_json(host)
            with contextlib.suppress(StackctlError):
                to_json(plan_of(host, GEMMA, LATENCY))
        finally:
            for name in chosen:
                path = folder / name
                if path.is_dir():
                    path.rmdir()
                path.write_text(TREE[name])

    return one


KINDS: dict[str, Callable[[Path], Fuzz]] = {
    "gguf": fuzz_gguf,
    "safetensors": fuzz_safetensors,
    "models": fuzz_models,
    "hosts": fuzz_hosts,
    "profiles": fuzz_profiles,
    "trees": fuzz_trees,
}


class Hang(Exception):
    """An input took far too long."""


@contextlib.contextmanager
def alarm(seconds: int) -> Iterator[None]:
    """Ends what never comes back."""

    def ring(*_: Any) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def peak() -> int:
    """Most memory this process ever had resident."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@pytest.mark.parametrize(
    "inputs",
    [pytest.param(FEW, id="few"), pytest.param(MANY, id="many", marks=pytest.mark.deep)],
)
@pytest.mark.parametrize("kind", KINDS)
def test_damaged_input(
    kind: str, inputs: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = KINDS[kind](tmp_path)
    count = max(1, inputs // len(KINDS))
    before, slowest, refused = peak(), 0.0, 0
    for number in range(count):
        started = time.process_time()
        try:
            with alarm(20):
                one(random.Random(f"{kind} {number}"))
        except StackctlError as error:
            refused += 1
            assert error.message.strip()
        except Exception as error:
            raise AssertionError(f"{kind} {number}: {type(error).__name__}: {error}") from error
        took = time.process_time() - started
        slowest = max(slowest, took)
        assert took < MOST_SECONDS, f"{kind} {number} took {took:.1f} s"
    grown = peak() - before
    assert grown < MOST_BYTES, f"{kind}: {grown / 2**20:.0f} MiB"
    assert 0 < refused < count or kind == "trees"
    with capsys.disabled():
        print(
            f"\nfuzz {kind}: {count} inputs, {refused} refused, slowest {slowest * 1000:.0f} ms, "
            f"{grown / 2**20:.0f} MiB more, {peak() / 2**20:.0f} MiB in all"
        )


def test_the_inputs_are_the_same_every_time() -> None:
    text = json.dumps({"a": [1, 2, 3], "b": "c"}, indent=1)
    first, second = (reworded(text, random.Random("x 1")) for _ in range(2))
    assert first == second != text.encode()
