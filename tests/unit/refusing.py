"""Run Python code in a process whose kernel refuses one system call (seccomp(2))."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

#: Numbers of the system calls, by architecture.
_CALLS = {"x86_64": {"bind": 49, "flock": 73}, "aarch64": {"bind": 200, "flock": 32}}

# The filter: load the number of the call; return the error for that call, allow all others.
_FILTER = """
import ctypes, struct
code = b"".join(
    struct.pack("=HBBI", *step)
    for step in (
        (0x20, 0, 0, 0), (0x15, 0, 1, {number}), (0x06, 0, 0, 0x50000 | {error}),
        (0x06, 0, 0, 0x7FFF0000),
    )
)
program = ctypes.create_string_buffer(code, len(code))
table = ctypes.create_string_buffer(struct.pack("@HP", 4, ctypes.addressof(program)))
libc = ctypes.CDLL(None, use_errno=True)
if libc.prctl(38, 1, 0, 0, 0) or libc.prctl(22, 2, table, 0, 0):
    print("no seccomp"); raise SystemExit(99)
"""


def run_without(call: str, error: int, code: str) -> subprocess.CompletedProcess[str]:
    """Run code in a Python process where a system call fails with this errno."""
    number = _CALLS.get(platform.machine(), {}).get(call)
    if number is None:
        pytest.skip(f"the number of {call} is not known on {platform.machine()}")
    whole = _FILTER.format(number=number, error=error) + code
    done = subprocess.run(
        [sys.executable, "-c", whole], capture_output=True, text=True, check=False
    )
    if done.returncode == 99:
        pytest.skip("this kernel has no seccomp filters")
    return done
