"""How long a model stays in memory after its last request."""

from __future__ import annotations

import time

# More than a thread can wait for on some systems, and than a process lives.
_FOR_EVER_S = 10 * 365 * 86400.0


class KeepAlive:
    """Counts from the end of the last work; what the latest request asked for decides.

    Args:
        default_s: For requests that ask for nothing. 0 is "at once", negative or infinite "never".
    """

    def __init__(self, default_s: float) -> None:
        self._default_s = default_s
        self.asked(None)

    def asked(self, seconds: float | None) -> None:
        """A request has begun that wants this."""
        self._keep_s = self._default_s if seconds is None else seconds
        self.used()

    def used(self) -> None:
        """Something runs."""
        self._used_s = time.monotonic()

    @property
    def deadline_s(self) -> float | None:
        """When the model is to go, by `time.monotonic`; None for never."""
        if self._keep_s < 0 or self._keep_s > _FOR_EVER_S:
            return None
        return self._used_s + self._keep_s

    def remaining_s(self) -> float | None:
        """Seconds until the model is to go, 0 when they are over; None for never."""
        deadline_s = self.deadline_s
        return None if deadline_s is None else max(0.0, deadline_s - time.monotonic())
