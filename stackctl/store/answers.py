"""What a server's answers mean for a download."""

from __future__ import annotations

import email.utils
import re
import time
from typing import Final

from stackctl.errors import StackctlError
from stackctl.machine.transfer import Lost, Response, host_of
from stackctl.store.wanted import Wanted

#: A server that wants one to wait longer is as good as down.
_MOST_WAIT_S: Final = 300.0


def refusal(name: str, response: Response) -> StackctlError:
    """The error for a status that more attempts do not change."""
    where, status = host_of(response.url), response.status
    code = response.header("X-Error-Code") or ""
    if status in (401, 403):
        if code == "GatedRepo":
            return StackctlError(
                f"{name}: its owner asks for consent ({status})",
                hint=f"ask for access on {where}, then log in here: a token in HF_TOKEN, or in\n"
                "the file that HF_TOKEN_PATH names (usually ~/.cache/huggingface/token)",
            )
        return StackctlError(
            f"{name}: {where} refuses it ({status}): private, or there is no such repository",
            hint="a token in HF_TOKEN or in ~/.cache/huggingface/token opens private ones;\n"
            "one that has expired opens nothing",
        )
    if status == 404:
        what = {"RevisionNotFound": "has no such revision", "EntryNotFound": "has no such file"}
        return StackctlError(f"{name}: {where} {what.get(code, 'does not know it')} (404)")
    return StackctlError(f"{name}: {where} answers with status {status}")


def check_hop(wanted: Wanted, answer: Response) -> None:
    """What a hub says of a file when it redirects must be what was announced.

    Raises:
        StackctlError: it is not.
    """
    size, etag = answer.header("X-Linked-Size"), (answer.header("X-Linked-ETag") or "").strip('"')
    hashed = wanted.sha256 is not None and re.fullmatch(r"[0-9a-f]{64}", etag)
    if (size and size != str(wanted.size)) or (hashed and etag != wanted.sha256):
        raise StackctlError(
            f"{wanted.name} has changed on {host_of(answer.url)} since the download was planned",
            hint="look again (stackctl model show), or name a commit: hf:ORG/REPO@COMMIT",
        )


def check_range(wanted: Wanted, response: Response, first: int, last: int) -> None:
    """A partial answer must be of the bytes that were asked for. Raises Lost."""
    where = host_of(response.url)
    told = response.header("Content-Range") or ""
    match = re.fullmatch(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18})", told)
    if match is None or (int(match[1]), int(match[3])) != (first, wanted.size):
        told = ascii(told[:60])[1:-1] or "no range"
        raise Lost(f"{where} sent {told}, not bytes {first}-{last}/{wanted.size}")
    if response.length is not None and response.length != last - first + 1:
        raise Lost(f"{where} would send {response.length} bytes, not {last - first + 1}")


def retry_after(text: str | None) -> float:
    """Seconds of a Retry-After: a number, or a date (RFC 9110, 10.2.3)."""
    if text is None:
        return 0.0
    if re.fullmatch(r"[0-9]{1,6}", text.strip()):
        return min(float(text), _MOST_WAIT_S)
    try:
        when = email.utils.parsedate_to_datetime(text).timestamp()
    except (TypeError, ValueError, OverflowError):
        return 0.0
    return min(max(0.0, when - time.time()), _MOST_WAIT_S)
