"""A simulated GPU: NVML that answers with the recorded facts of an RTX PRO 6000.

The Python package that calls the library and CDI files for the GPU belong to it.
"""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path

from .host import CHECKOUT, cached, call, fingerprint, need, pip

HERE = Path(__file__).parent
FACTS = json.loads((HERE.parent / "machines/nvml-rtx-pro-6000-max-q.json").read_text())
DRIVER = FACTS["driver"]
#: A library of the driver that the CDI file mounts.
LIBRARY = f"/srv/gpu/libcuda.so.{DRIVER}"
#: The file exists if the driver is loaded.
DEVICE = "/dev/nvidiactl"


def cdi(*, version: str = "0.5.0", library: str = LIBRARY, hook: str | None = None) -> str:
    """Return a CDI file for the GPU under its number and as "all"."""
    edits: dict[str, object] = {
        "env": ["LAB_GPU=edited"],
        "mounts": [
            {"hostPath": library, "containerPath": "/opt/libcuda.so", "options": ["ro", "rbind"]}
        ],
    }
    if hook is not None:
        edits["hooks"] = [{"hookName": "createContainer", "path": hook, "args": [hook]}]
    names = [{"name": name, "containerEdits": {"env": [f"GPU_{name}=1"]}} for name in ("0", "all")]
    document = {"cdiVersion": version, "kind": "nvidia.com/gpu", "devices": names}
    # JSON is YAML.
    return json.dumps({**document, "containerEdits": edits})


def build() -> Path:
    """Return a folder with libnvidia-ml.so.1 and pynvml.py."""
    pinned = CHECKOUT / "pyproject.toml"
    return cached("card", fingerprint(HERE / "nvml.c", FACTS, pinned, 1), _build)


def _build(target: Path) -> None:
    need({"gcc": "gcc"})
    target.mkdir()
    device = FACTS["devices"][0]
    major, minor = device["compute_capability"].split(".")
    texts = {"DRIVER": DRIVER, "NAME": device["name"], "UUID": device["uuid"]}
    numbers = {"TOTAL": f"{device['memory_bytes']}ULL", "FREE": f"{device['free_bytes']}ULL",
               "MAJOR": major, "MINOR": minor}  # fmt: skip
    words: list[str | os.PathLike[str]] = ["gcc", "-shared", "-fPIC", "-O1"]
    words += ["-o", target / "libnvidia-ml.so.1", HERE / "nvml.c"]
    words += [f'-D{key}="{value}"' for key, value in texts.items()]
    call([*words, *(f"-D{key}={value}" for key, value in numbers.items())])
    wheels = target.with_name("wheels")
    call([*pip(), "download", "--quiet", "--no-deps", "--dest", wheels, "nvidia-ml-py"])
    (wheel,) = wheels.glob("nvidia_ml_py-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (target / "pynvml.py").write_bytes(archive.read("pynvml.py"))


#: A toolkit from before it had a service: the program is a stand-in, the package is a real one. It
#: copies the CDI file beside it as soon as the driver is loaded.
TOOLKIT = r"""
set -e
top=$1
mkdir -p $top/tree/DEBIAN $top/tree/usr/bin
printf 'Package: nvidia-container-toolkit\nVersion: 1.17.8-1\nArchitecture: all\n'\
'Maintainer: lab <lab@localhost>\nDescription: stands in\n' >$top/tree/DEBIAN/control
cat >$top/tree/usr/bin/nvidia-ctk <<END
#!/bin/sh
[ -e /dev/nvidiactl ] || { echo no driver is loaded >&2; exit 1; }
for word; do :; done
cp $top/cdi.json "\${word#--output=}"
END
chmod 755 $top/tree/usr/bin/nvidia-ctk
dpkg-deb -b $top/tree $top/toolkit.deb
cd $top
{ cat tree/DEBIAN/control; echo Filename: ./toolkit.deb; echo "Size: $(stat -c%s toolkit.deb)"
  echo "SHA256: $(sha256sum toolkit.deb | cut -d' ' -f1)"; } >Packages
echo "deb [trusted=yes] file:$top ./" >/etc/apt/sources.list.d/toolkit.list
"""
