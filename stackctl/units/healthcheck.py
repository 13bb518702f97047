"""The health command that Podman runs inside an engine's container, as shell text."""

from __future__ import annotations

from stackctl.values.activity import WORKING_SHARE

#: Seconds that an engine has for its answer, and for which its processors are watched after that.
#: Together they stay below the unit's HealthTimeout, also on a machine where all is slow.
ANSWER_S = 5
WATCH_S = 5
#: Clock ticks (proc(5): 100 a second) in that time from which on an engine is at work. The check
#: itself costs one or two.
BUSY_TICKS = round(WORKING_SHARE * 100 * WATCH_S)
#: curl's exit status for "Operation timed out" (curl(1), EXIT CODES).
_TIMED_OUT = 28

#: Adds up utime and stime (fields 14 and 15 of proc_pid_stat(5)) of all processes that the
#: container has. Not cpu.stat: what is under /sys/fs/cgroup there depends on Podman's settings.
_TICKS = (
    "t() { s=0; for f in /proc/[0-9]*/stat; do read -r l <$f && set -- ${l##*) } && "
    "s=$((s+${12}+${13})); done 2>/dev/null; echo $s; }"
)


def startup_command(port: int, health_path: str) -> str:
    """Succeeds when the engine answers that it is well."""
    return (
        f"curl --fail --silent --show-error --max-time {ANSWER_S} "
        f"http://127.0.0.1:{port}{health_path}"
    )


def command(port: int, health_path: str) -> str:
    """Succeeds when the engine answers that it is well, or answers nothing in time while it works.

    A processor busy with a long prompt answers late, and must not be killed for it; a process that
    hangs uses no processor. A refused connection and an answer that says "not well" count at once.
    Needs curl, sleep and any POSIX shell; holds no text of a user's.
    """
    return (
        f"{startup_command(port, health_path)}; r=$?; [ $r = {_TIMED_OUT} ] || exit $r; {_TICKS}; "
        f"a=$(t); sleep {WATCH_S}; b=$(t); echo $((b-a)) ticks in {WATCH_S} s; "
        f"[ $((b-a)) -ge {BUSY_TICKS} ]"
    )
