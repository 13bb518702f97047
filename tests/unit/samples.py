"""Machines, models and profiles as values, for tests of what is computed from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec

from stackctl.engines import engine
from stackctl.plan.planner import PlanInputs, make_plan
from stackctl.resources import data_folder
from stackctl.sources.catalogue import find_repo, read_entry
from stackctl.sources.profiles import Profiles
from stackctl.values.cpu_list import CpuList
from stackctl.values.engine_facts import EngineFacts, EngineOption
from stackctl.values.generation import Generation, Outcome, UnitFile, UnitSet
from stackctl.values.host import (
    L3,
    UNLIMITED,
    Bandwidth,
    CdiSpec,
    Cpu,
    Gpu,
    Host,
    Limits,
    Memory,
    NumaNode,
    Tools,
)
from stackctl.values.model import KvLayout, Model, ModelFile
from stackctl.values.plan import Plan
from stackctl.values.profile import EngineArgument, Overrides, PlacementRequest, Profile

MIB, GIB = 2**20, 2**30
SHARED = Path(__file__).resolve().parents[2].parent / "shared"
LLAMA_CPP = engine("llama.cpp")
IMAGE = LLAMA_CPP.default_image

SERVER = Tools(
    os="Debian GNU/Linux 13 (trixie)",
    podman="5.4.2",
    quadlet_generator="/usr/lib/systemd/system-generators/podman-system-generator",
    systemd="257",
    systemd_running=True,
    cgroup_version=2,
    cgroup_controllers=("cpuset", "cpu", "io", "memory", "pids"),
)
#: What user services get where nobody has changed anything.
USER = msgspec.structs.replace(
    SERVER, cgroup_controllers=("cpu", "memory", "pids"), podman="4.9.3", systemd="255"
)


def machine(
    *,
    cores: Sequence[str],
    nodes: Sequence[str],
    memory: int,
    sockets: int = 1,
    model: str = "Test CPU",
    allowed: str | None = None,
    scope: Literal["user", "system"] = "system",
    tools: Tools = SERVER,
    memlock: int | None = UNLIMITED,
    l3: Sequence[str] = (),
    isa: Sequence[str] = (),
    bandwidth: float | None = None,
    gpus: Sequence[Gpu] = (),
) -> Host:
    """A machine from the CPU lists of its cores and nodes; nodes have equal memory."""
    per_core = len(cores[0].replace("-", ",").split(","))
    threads = len(cores) * per_core
    online = CpuList(range(threads))
    rows = [[10 if a == b else 20 for b in range(len(nodes))] for a in range(len(nodes))]
    return Host(
        scope=scope,
        cpu=Cpu(
            model=model,
            architecture="x86_64",
            sockets=sockets,
            cores=len(cores),
            threads=threads,
            threads_per_core=per_core,
            online=online,
            allowed=CpuList.parse(allowed) if allowed is not None else online,
            siblings=tuple(CpuList.parse(core) for core in cores),
            isa=tuple(isa),
            smt=per_core > 1,
            l3=tuple(
                L3(id=n, bytes=32 * MIB, cpus=CpuList.parse(cpus)) for n, cpus in enumerate(l3)
            ),
            numa=tuple(
                NumaNode(
                    id=n,
                    cpus=CpuList.parse(cpus),
                    memory_bytes=memory // len(nodes),
                    distances=tuple(rows[n]),
                )
                for n, cpus in enumerate(nodes)
            ),
        ),
        memory=Memory(
            total_bytes=memory,
            available_bytes=memory * 9 // 10,
            bandwidth_bytes_s=Bandwidth(theoretical=bandwidth),
        ),
        gpus=tuple(gpus),
        tools=tools,
        limits=Limits(memlock_bytes=memlock, nofile=524288),
    )


#: Instruction sets that matter, of Zen 4 and 5.
ISA = ("sse4_2", "avx", "avx2", "fma", "f16c", "avx512f", "avx512_vnni", "avx512_bf16", "avx_vnni")
#: As NVML reports the reference box's card.
CARD = Gpu(
    index=0,
    name="NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition",
    uuid="GPU-00000000-0000-4000-8000-000000000000",
    memory_bytes=97887 * MIB,
    compute_capability="12.0",
    driver="580.95.05",
    pci="0000:c1:00.0",
    numa_node=0,
    cdi="nvidia.com/gpu=0",
    free_bytes=97000 * MIB,
    bandwidth_bytes_s=1.79e12,
    cuda="13.0",
    power_limit_w=300,
    pcie="gen5 x16",
)
EPYC_MODEL = "AMD EPYC 9175F 16-Core Processor"
EPYC_MEMORY = 809_984_000_000
#: Twelve channels of DDR5-6400.
EPYC_BANDWIDTH = 614.4e9
EPYC = machine(
    isa=ISA,
    bandwidth=EPYC_BANDWIDTH,
    model=EPYC_MODEL,
    cores=[str(n) for n in range(16)],
    nodes=["0-15"],
    l3=[str(n) for n in range(16)],
    memory=EPYC_MEMORY,
)
EPYC_GPU = msgspec.structs.replace(
    EPYC,
    gpus=(CARD,),
    tools=msgspec.structs.replace(
        SERVER,
        cdi=(
            CdiSpec(
                path="/etc/cdi/nvidia.yaml",
                version="0.6.0",
                devices=("nvidia.com/gpu=0", "nvidia.com/gpu=all"),
            ),
        ),
    ),
)
HOSTS: Mapping[str, Host] = {
    "epyc-nps1": EPYC,
    "epyc-gpu": EPYC_GPU,
    "epyc-smt": machine(
        isa=ISA,
        bandwidth=EPYC_BANDWIDTH,
        model=EPYC_MODEL,
        cores=[f"{n},{n + 16}" for n in range(16)],
        nodes=["0-31"],
        l3=[f"{n},{n + 16}" for n in range(16)],
        memory=EPYC_MEMORY,
    ),
    "epyc-l3numa": machine(
        isa=ISA,
        bandwidth=EPYC_BANDWIDTH,
        model=EPYC_MODEL,
        cores=[str(n) for n in range(16)],
        nodes=[str(n) for n in range(16)],
        l3=[str(n) for n in range(16)],
        memory=EPYC_MEMORY,
    ),
    "dual-nps4": machine(
        isa=ISA,
        bandwidth=2 * 12 * 8 * 4800e6,
        model="AMD EPYC 9654 96-Core Processor",
        sockets=2,
        cores=[str(n) for n in range(192)],
        nodes=[f"{first}-{first + 23}" for first in range(0, 192, 24)],
        l3=[f"{first}-{first + 7}" for first in range(0, 192, 8)],
        memory=1536 * GIB,
    ),
    "desktop": machine(
        isa=ISA,
        bandwidth=2 * 8 * 5200e6,
        model="AMD Ryzen 7 7700 8-Core Processor",
        cores=[f"{n},{n + 8}" for n in range(8)],
        nodes=["0-15"],
        l3=["0-15"],
        memory=64 * GIB,
        scope="user",
        tools=USER,
        memlock=8 * MIB,
    ),
    "lab": machine(
        isa=ISA,
        cores=["0", "1"],
        nodes=["0-1"],
        l3=["0-1"],
        memory=8 * GIB,
        scope="user",
        tools=msgspec.structs.replace(USER, podman="5.4.2"),
        memlock=8 * MIB,
    ),
}

#: A dense 40B model as IQuest-Coder-V1-40B-Instruct is built, in Q5_K_M.
IQUEST = Model(
    source="file:/srv/models/IQuest-Coder-V1-40B-Instruct.Q5_K_M.gguf",
    name="IQuest Coder V1 40B Instruct",
    architecture="llama",
    parameters=39_800_000_000,
    quantization="Q5_K_M",
    weights_bytes=28_400_000_000,
    layers=80,
    context=131072,
    embedding=5120,
    feed_forward=27648,
    vocabulary=76800,
    kv=KvLayout(kv_heads=(8,) * 80, key_dim=128, value_dim=128),
    chat_template=True,
    files=(
        ModelFile(
            path="/srv/models/IQuest-Coder-V1-40B-Instruct.Q5_K_M.gguf", bytes=28_400_500_000
        ),
    ),
)
#: Gemma 3 270M: 18 layers, one KV head of 256; every sixth layer sees all, the others 512 tokens.
GEMMA = Model(
    source="file:/srv/models/gemma-3-270m-it-Q4_K_M.gguf",
    name="Gemma 3 270m It",
    architecture="gemma3",
    parameters=268_098_176,
    quantization="Q4_K_M",
    weights_bytes=246_587_904,
    layers=18,
    context=32768,
    embedding=640,
    feed_forward=2048,
    vocabulary=262144,
    kv=KvLayout(
        kv_heads=(1,) * 18,
        key_dim=256,
        value_dim=256,
        sliding_window=512,
        sliding_layers=15,
        sliding=tuple(n % 6 < 5 for n in range(18)),
    ),
    chat_template=True,
    files=(ModelFile(path="/srv/models/gemma-3-270m-it-Q4_K_M.gguf", bytes=253_000_000),),
)
MODELS: Mapping[str, Model] = {"iquest-40b": IQUEST, "gemma-270m": GEMMA}


def shipped(name: str, **overrides: Any) -> Profile:
    """A shipped profile, without those that this machine may have."""
    return Profiles([data_folder("profiles")]).resolve(name, Overrides(**overrides))


LATENCY = shipped("cpu-latency")
THROUGHPUT = shipped("cpu-throughput")


def profile(base: Profile = LATENCY, **changes: Any) -> Profile:
    """A profile with changes; ``engine_args`` as a mapping, ``placement`` as one."""
    if "engine_args" in changes:
        changes["engine_args"] = tuple(
            EngineArgument(name=name, values=values)
            for name, values in changes["engine_args"].items()
        )
    if isinstance(changes.get("placement"), dict):
        changes["placement"] = PlacementRequest(**changes["placement"])
    return msgspec.structs.replace(base, **changes)


def shipped_model(wish: Profile) -> Model:
    """The model of a shipped profile, by the catalogue; the demo has the file that it fetches, and
    the profiles that are two lines long have the 40B that the owner tried on the CPU."""
    if wish.name in ("cpu-latency", "cpu-throughput"):
        return IQUEST
    if wish.name == "demo":
        return GEMMA
    kind, _, name = (wish.model or "").partition(":")
    if kind == "catalogue":
        return read_entry(name)
    if kind == "hf":
        found = find_repo(name, None)
        assert found is not None, name
        return msgspec.structs.replace(found, source=f"hf:{name}")
    raise AssertionError(wish.name)


def plan(
    host: Host = EPYC,
    model: Model = IQUEST,
    wish: Profile = LATENCY,
    facts: EngineFacts | None = None,
    **more: Any,
) -> Plan:
    """A plan of the profile's image, else of the engine's default one."""
    image = wish.image or engine(wish.engine).default_image
    known = PlanInputs(image=image, image_reason="test", facts=facts, **more)
    return make_plan(host=host, model=model, profile=wish, inputs=known)


def facts_of(options: tuple[EngineOption, ...], version: str | None = "11669") -> EngineFacts:
    """Facts of an image whose engine has these options."""
    return EngineFacts(
        engine="llama.cpp",
        image_id="0" * 64,
        reference=IMAGE,
        pinned=IMAGE + "@sha256:" + "0" * 64,
        seen="2026-11-21T12:00:00Z",
        version=version,
        options=options,
    )


#: The help of a llama-server of mid 2025, shortened: bare --flash-attn, --mlock, no --load-mode.
OLD_HELP = """\
----- common params -----

-h,    --help, --usage                  print usage and exit
--version                               show version and build info
-t,    --threads N                      number of threads to use during generation (default: -1)
                                        (env: LLAMA_ARG_THREADS)
-tb,   --threads-batch N                number of threads to use during batch and prompt processing (default:
                                        same as --threads)
-c,    --ctx-size N                     size of the prompt context (default: 4096, 0 = loaded from model)
-b,    --batch-size N                   logical maximum batch size (default: 2048)
-ub,   --ubatch-size N                  physical maximum batch size (default: 512)
-fa,   --flash-attn                     enable Flash Attention (default: disabled)
                                        (env: LLAMA_ARG_FLASH_ATTN)
-ctk,  --cache-type-k TYPE              KV cache data type for K
                                        allowed values: f32, f16, bf16, q8_0, q4_0
-ctv,  --cache-type-v TYPE              KV cache data type for V
--mlock                                 force system to keep model in RAM rather than swapping or compressing
                                        (env: LLAMA_ARG_MLOCK)
--no-mmap                               do not memory-map model (slower load but may reduce pageouts if not
                                        using mlock)
--numa TYPE                             attempt optimizations that help on some NUMA systems
                                        - distribute: spread execution evenly over all nodes
-np,   --parallel N                     number of parallel sequences to decode (default: 1)

----- example-specific params -----

-a,    --alias STRING                   set alias for model name (to be used by REST API)
-m,    --model FNAME                    model path
--host HOST                             ip address to listen (default: 127.0.0.1)
--port PORT                             port to listen (default: 8080)
--cache-reuse N                         min chunk size to attempt reusing from the cache via KV shifting
--jinja                                 use jinja template for chat (default: disabled)
--metrics                               enable prometheus compatible metrics endpoint (default: disabled)
"""  # noqa: E501


def served(planned: Plan, number: int = 1, **changes: Any) -> Generation:
    """A generation of the stack "cpu" that is ready."""
    made = Generation(
        number=number,
        stack="cpu",
        created="2026-11-28T12:00:00Z",
        image="ghcr.io/x@sha256:00",
        image_id="0" * 64,
        units=UnitSet(
            stack="cpu",
            service="cpu.service",
            container="stackctl-cpu",
            files=(UnitFile(name="cpu.container", text=""),),
        ),
        plan=planned,
        host=EPYC,
        outcome=Outcome(state="ready", changed="2026-11-28T12:00:05Z"),
    )
    return msgspec.structs.replace(made, **changes)
