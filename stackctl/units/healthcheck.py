"""The health command that Podman runs inside an engine's container, as shell text."""

from __future__ import annotations

from stackctl.values.metrics import WORKING_SHARE

#: Seconds that an engine has for its answer, and seconds for which its CPU time is measured after
#: that. Their sum stays well below the unit's HealthTimeout, to leave room on a slow machine.
ANSWER_S = 5
WATCH_S = 5
#: An engine that uses at least so many clock ticks in WATCH_S is working (proc(5): 100 ticks per
#: second). The check itself costs one or two.
BUSY_TICKS = round(WORKING_SHARE * 100 * WATCH_S)
#: curl's exit status for "Operation timed out" (curl(1), EXIT CODES).
_TIMED_OUT = 28

#: Adds up utime and stime (fields 14 and 15 of proc_pid_stat(5)) of all processes of the container.
#: The cgroup's cpu.stat is no substitute: the content of /sys/fs/cgroup depends on Podman's
#: settings.
_TICKS = (
    "t() { s=0; for f in /proc/[0-9]*/stat; do read -r l <$f && set -- ${l##*) } && "
    "s=$((s+${12}+${13})); done 2>/dev/null; echo $s; }"
)


def startup_command(port: int, health_path: str) -> str:
    """Return a shell command that succeeds if the engine's health path answers with success."""
    return (
        f"curl --fail --silent --show-error --max-time {ANSWER_S} "
        f"http://127.0.0.1:{port}{health_path}"
    )


def health_command(port: int, health_path: str) -> str:
    """Return a shell command that succeeds if the engine is healthy, or late because it works.

    An engine that computes a long prompt answers late and must not be killed; a process that hangs
    uses no CPU. A refused connection and an error status fail at once. The command needs curl,
    sleep and any POSIX shell. It contains no text from the user.
    """
    return (
        f"{startup_command(port, health_path)}; r=$?; [ $r = {_TIMED_OUT} ] || exit $r; {_TICKS}; "
        f"a=$(t); sleep {WATCH_S}; b=$(t); echo $((b-a)) ticks in {WATCH_S} s; "
        f"[ $((b-a)) -ge {BUSY_TICKS} ]"
    )
