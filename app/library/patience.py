"""How long to wait for the hub, and how often to try again."""

from __future__ import annotations

import random
from dataclasses import dataclass

from app.library.hub_errors import Interruption


@dataclass(frozen=True)
class Patience:
    """Times in seconds."""

    connect_s: float = 10.0
    stall_s: float = 30.0
    """A connection that brings no byte for this long is given up."""
    attempts: int = 8
    """Failures in a row, with nothing gained in between, until a file is given up."""
    first_wait_s: float = 1.0
    """Before the second attempt; doubles with each one."""
    longest_wait_s: float = 30.0
    longest_retry_after_s: float = 300.0
    """A server that asks for a longer pause is not waited for."""

    def wait_s(self, failures: int, error: Interruption) -> float | None:
        """Seconds to wait after that many failures in a row; None is: give up."""
        if failures >= self.attempts:
            return None
        if error.retry_after is not None:
            if error.retry_after > self.longest_retry_after_s:
                return None
            return error.retry_after
        # Not all clients of a hub that comes back should return in the same moment.
        doubled: float = self.first_wait_s * 2 ** (failures - 1)
        return min(self.longest_wait_s, doubled) * random.uniform(0.75, 1.25)
