"""How often a streaming answer is painted."""

from __future__ import annotations

import time
from collections.abc import Callable

SHORTEST_S = 1 / 15
LONGEST_S = 1.0
SHARE = 0.3
"""Of one core, spent on painting: the engine needs the rest on a small machine."""


class Pace:
    """Spaces repaints by what they cost, measured as CPU time of the thread that paints.

    Appending to a Markdown block costs more the longer the block is (13 to 50 ms on two Linux
    cores), and the layout and painting that follow happen after the append returns; all of it is
    in the CPU time between two calls.
    """

    def __init__(self, clock: Callable[[], float] = time.thread_time) -> None:
        self._clock = clock
        self._last = clock()

    def next_interval(self) -> float:
        """Seconds to leave until the next repaint, given what the last one cost."""
        now = self._clock()
        cost, self._last = now - self._last, now
        return min(max(cost / SHARE, SHORTEST_S), LONGEST_S)
