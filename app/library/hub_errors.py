"""What the hub's refusals mean for a person, and which of its failures may pass by themselves."""

from __future__ import annotations

import email.utils
import re
import time

import httpx2
from huggingface_hub import constants

from app.errors import GryphonError

_PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})


class Interruption(Exception):
    """A request failed in a way that trying again may cure."""

    def __init__(
        self, code: str, reason: str, *, retry_after: float | None = None, offline: bool = False
    ) -> None:
        super().__init__(reason)
        self.code = code
        """Of the GryphonError that it becomes when it does not pass."""
        self.reason = reason
        """Completes "The download was interrupted: …"."""
        self.retry_after = retry_after
        """Seconds the server asked to wait."""
        self.offline = offline
        """No connection came about at all."""


class RepositoryChanged(Exception):
    """A file is not the one that the repository's metadata announced."""


def one_line(text: str, limit: int = 200) -> str:
    """What somebody else wrote, fit for a terminal: no control characters, no novels."""
    return "".join(char if char.isprintable() else "?" for char in text[:limit])


def failed_answer(response: httpx2.Response, name: str, *, has_token: bool) -> Exception:
    """Why the hub did not answer with what was asked for: a GryphonError or an Interruption.

    Args:
        name: Repository, ORG/NAME.
        has_token: The request carried a token.
    """
    status = response.status_code
    error_code = response.headers.get("X-Error-Code", "")
    said = response.headers.get("X-Error-Message", "")
    if status in _PASSING:
        code = "rate_limited" if status == 429 else "hub_unavailable"
        reason = f"{response.url.host} answers {status}"
        return Interruption(code, reason, retry_after=_retry_after(response))
    if error_code == "EntryNotFound":
        return RepositoryChanged(f"a file of {name} is gone")
    if error_code == "RevisionNotFound":
        return GryphonError(
            "revision_not_found",
            f"{name} has no such branch, tag or commit. Leave the revision out for the main "
            f"branch, or pick one of {_page(name)}/tree/main.",
        )
    if "is disabled" in said:
        return GryphonError(
            "repository_disabled",
            f"The hub has closed {name}, for everyone. Look at {_page(name)} for the reason, and "
            "pull another model.",
        )
    if status == 401 and has_token:
        return GryphonError(
            "token_invalid",
            "The hub does not accept your Hugging Face token: it has expired or was revoked. Make "
            f"another at {constants.ENDPOINT}/settings/tokens and run `hf auth login`, or set "
            "HF_TOKEN.",
        )
    if status == 401 and error_code == "GatedRepo":
        return GryphonError(
            "token_missing",
            f"{name} asks for an account: accept its conditions at {_page(name)}, make a token at "
            f"{constants.ENDPOINT}/settings/tokens, run `hf auth login` or set HF_TOKEN, then pull "
            "again.",
        )
    if status == 401:
        return GryphonError(
            "model_not_found",
            f"The hub shows no model {name}: there is none, or it is private. Check the name at "
            f"{_page(name)}; for a private one, run `hf auth login` or set HF_TOKEN.",
        )
    if status == 403 and error_code == "GatedRepo":
        return GryphonError(
            "licence_not_accepted",
            f"Your account has no access to {name} yet. Accept its conditions, or ask for access, "
            f"at {_page(name)}, then pull again.",
        )
    if status == 403 and "fine-grained" in said:
        return GryphonError(
            "token_scope",
            f"Your Hugging Face token may not read {name}: it lacks the permission for public "
            f"gated repositories. Tick it at {constants.ENDPOINT}/settings/tokens, or use a token "
            "of type read.",
        )
    if status == 404:
        return GryphonError(
            "model_not_found",
            f"The hub has no model {name}, or your token may not see it. Check the name at "
            f"{_page(name)}; it may have been removed.",
        )
    return GryphonError(
        "hub_refused",
        f"{response.url.host} answers {status} for {name}"
        f"{': ' + one_line(said) if said else ''}. Look at {_page(name)}.",
    )


def failed_connection(error: httpx2.HTTPError, host: str, stall_s: float) -> Interruption:
    """A connection that did not come about, broke, or went silent."""
    if isinstance(error, httpx2.ReadTimeout | httpx2.WriteTimeout):
        return Interruption("hub_unavailable", f"no bytes from {host} for {stall_s:g} seconds")
    if isinstance(error, httpx2.ConnectError | httpx2.ConnectTimeout | httpx2.ProxyError):
        return Interruption(
            "hub_unreachable", f"no connection to {host} ({one_line(str(error))})", offline=True
        )
    return Interruption("hub_unavailable", f"the connection to {host} was cut")


def lasting(error: Interruption, name: str) -> GryphonError:
    """The error for a failure that did not pass."""
    if error.code == "hub_unreachable":
        what = (
            f"The hub cannot be reached: {error.reason}. Check the network, a proxy or HF_ENDPOINT "
            "if you use one, then try again. `gryphon list` shows the models that are here."
        )
    elif error.code == "rate_limited":
        wait = f"in {error.retry_after:.0f} seconds" if error.retry_after else "in a few minutes"
        what = (
            f"The hub limits how often it is asked: {error.reason}. Try again {wait}; a token "
            "(`hf auth login`) raises the limit."
        )
    else:
        what = f"{name} could not be fetched: {error.reason}, again and again. Try again later."
    return GryphonError(error.code, what, retry_after=error.retry_after)


def offline_mode() -> GryphonError:
    return GryphonError(
        "offline_mode",
        "HF_HUB_OFFLINE is set, so the hub is not asked. Unset it to pull or search; `gryphon "
        "list` shows the models that are here.",
    )


def renamed(name: str, now: str) -> GryphonError:
    return GryphonError(
        "repository_renamed",
        f"{name} is called {one_line(now)} now. If that is what you want, run `gryphon pull "
        f"{one_line(now)}`.",
    )


def _page(name: str) -> str:
    return f"{constants.ENDPOINT}/{name}"


def _retry_after(response: httpx2.Response) -> float | None:
    text = response.headers.get("Retry-After", "").strip()
    if text.isascii() and text.isdigit():
        return float(text)
    if text:
        try:
            moment = email.utils.parsedate_to_datetime(text)
        except (ValueError, OverflowError):
            return None
        return max(0.0, moment.timestamp() - time.time())
    # The hub's own header, of a draft standard: `"api";r=0;t=55`, requests left and seconds.
    spent = re.search(r";\s*r=0\s*;\s*t=(\d{1,9})", response.headers.get("RateLimit", ""))
    return float(spent[1]) if spent else None
