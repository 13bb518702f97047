"""Check the answers of a server during a download."""

from __future__ import annotations

import email.utils
import re
import time
from typing import Final

from stackctl.errors import StackctlError
from stackctl.machine.http_download import ConnectionLost, Response, host_of
from stackctl.store.download_types import DownloadRequest

#: The longest wait that a server may ask for; a longer one is cut to this.
_MOST_WAIT_S: Final = 300.0


class HubRefusal(StackctlError):
    """A server's answer that a file or repository does not exist, or is not for this user."""


def status_error(name: str, response: Response) -> StackctlError:
    """Return the error for an HTTP status that another attempt does not change.

    It is a HubRefusal for the statuses 401, 403 and 404.
    """
    where, status = host_of(response.url), response.status
    code = response.header("X-Error-Code") or ""
    if status in (401, 403):
        if code == "GatedRepo":
            return HubRefusal(
                f"{name}: its owner asks for consent ({status})",
                hint=f"ask for access on {where}, then log in here: a token in HF_TOKEN, or in\n"
                "the file that HF_TOKEN_PATH names (usually ~/.cache/huggingface/token)",
            )
        return HubRefusal(
            f"{name}: {where} refuses it ({status}): private, or there is no such repository",
            hint="a token in HF_TOKEN or in ~/.cache/huggingface/token opens private ones;\n"
            "one that has expired opens nothing",
        )
    if status == 404:
        what = {"RevisionNotFound": "has no such revision", "EntryNotFound": "has no such file"}
        return HubRefusal(f"{name}: {where} {what.get(code, 'does not know it')} (404)")
    return StackctlError(f"{name}: {where} answers with status {status}")


def check_redirect(request: DownloadRequest, answer: Response) -> None:
    """Check that size and hash in a hub's redirect are those of its file list.

    Raises:
        StackctlError: they differ, so the file has changed on the hub.
    """
    size, etag = answer.header("X-Linked-Size"), (answer.header("X-Linked-ETag") or "").strip('"')
    hashed = request.sha256 is not None and re.fullmatch(r"[0-9a-f]{64}", etag)
    if (size and size != str(request.size)) or (hashed and etag != request.sha256):
        raise StackctlError(
            f"{request.name} has changed on {host_of(answer.url)} since the download was planned",
            hint="look again (stackctl model show), or name a commit: hf:ORG/REPO@COMMIT",
        )


def check_range(size: int, response: Response, first: int, last: int) -> None:
    """Check that a partial answer holds the requested bytes of a file of ``size`` bytes.

    Raises ConnectionLost if it does not.
    """
    where = host_of(response.url)
    told = response.header("Content-Range") or ""
    match = re.fullmatch(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18})", told)
    if match is None or (int(match[1]), int(match[3])) != (first, size):
        told = ascii(told[:60])[1:-1] or "no range"
        raise ConnectionLost(f"{where} sent {told}, not bytes {first}-{last}/{size}")
    if response.length is not None and response.length != last - first + 1:
        raise ConnectionLost(f"{where} would send {response.length} bytes, not {last - first + 1}")


def retry_after(text: str | None) -> float:
    """Return the seconds of a Retry-After, a number or a date (RFC 9110, 10.2.3), at most 300.

    0 if the header is absent or invalid.
    """
    if text is None:
        return 0.0
    if re.fullmatch(r"[0-9]{1,6}", text.strip()):
        return min(float(text), _MOST_WAIT_S)
    try:
        when = email.utils.parsedate_to_datetime(text).timestamp()
    except (TypeError, ValueError, OverflowError):
        return 0.0
    return min(max(0.0, when - time.time()), _MOST_WAIT_S)
