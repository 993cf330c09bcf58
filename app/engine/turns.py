"""Whose turn it is among clients that wait for the same thing."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Collection, Mapping, Sequence
from typing import Protocol, TypeVar

# In a row, by clients served before it. Names cost nothing: whoever takes a new one for every
# request would otherwise come first for ever.
_MOST_PASSED = 64
# Clients whose last turn is remembered; the longest ago is forgotten first, and counts as never.
_MOST_REMEMBERED = 1024


class Waiting(Protocol):
    """Something that waits for a client."""

    @property
    def client(self) -> str: ...


W = TypeVar("W", bound=Waiting)


class Turns:
    """Order among clients: first the one with the fewest being served, of those the one served
    longest ago, of those the one waiting longest. Within a client first in, first out.

    So a client with many requests shares with one that has a single one as if it had a single one
    too. A client passed over 64 times in a row comes before all others.
    """

    def __init__(self) -> None:
        self._served: dict[str, int] = {}
        """When each client was last served, as a count of services; longest ago first."""
        self._passed: dict[str, int] = {}
        """How often in a row each waiting client was passed over."""
        self._count = 0

    def first(self, waiting: Sequence[W], serving: Mapping[str, int]) -> W:
        """Who is to be served next.

        Args:
            waiting: In order of arrival, at least one.
            serving: How many requests of each client are being served now.
        """
        heads: dict[str, W] = {}
        for one in waiting:
            heads.setdefault(one.client, one)
        return heads[self._next(heads, serving)]

    def order(self, waiting: Sequence[W], serving: Mapping[str, int]) -> list[W]:
        """All of them in the order in which they will be served if nothing else happens."""
        lanes: dict[str, deque[W]] = {}
        for one in waiting:
            lanes.setdefault(one.client, deque()).append(one)
        ahead, counts = Turns(), Counter(serving)
        ahead._served = {name: at for name, at in self._served.items() if name in lanes}
        ahead._passed, ahead._count = dict(self._passed), self._count
        ordered = []
        while lanes:
            client = ahead._next(lanes, counts)
            ordered.append(lanes[client].popleft())
            counts[client] += 1
            if not lanes[client]:
                del lanes[client]
            ahead.serve(client, lanes)
        return ordered

    def serve(self, client: str, others: Collection[str]) -> None:
        """Note that a client was served while `others` still wait; it may be one of them."""
        self._count += 1
        self._served.pop(client, None)
        self._served[client] = self._count
        if len(self._served) > _MOST_REMEMBERED:
            del self._served[next(iter(self._served))]
        self._passed = {name: self._passed.get(name, 0) + 1 for name in others if name != client}

    def _next(self, clients: Collection[str], serving: Mapping[str, int]) -> str:
        def rank(client: str) -> tuple[bool, int, int]:
            fresh = self._passed.get(client, 0) < _MOST_PASSED
            return fresh, serving.get(client, 0) if fresh else 0, self._served.get(client, 0)

        return min(clients, key=rank)
