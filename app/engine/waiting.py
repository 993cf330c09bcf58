"""Requests that wait to be admitted: which is next, how many may wait, how many are ahead.

Clients take turns (`app.engine.turns`). So do models, because only one is resident: what has waited
longest decides which is loaded next, and with it go all requests for it that wait by then. Later
ones for a resident model wait behind those for another, once the model had its turn. That lasts a
few times as long as loading it took, so that swapping back and forth costs a part of the time and
never most of it; a model for which nothing is left gives way at once.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from app.engine.protocol import ModelRef, Progress
from app.engine.turns import Turns
from app.errors import GryphonError

if TYPE_CHECKING:
    from app.engine.batch import Row

MAX_QUEUE = 64
MAX_QUEUE_PER_CLIENT = 32
_RETRY_AFTER_S = 1.0
# While others wait, a model is used this many times as long as its loading took, at least ...
TURN_PER_LOAD = 4.0
# ... but nobody waits longer than this for its sake.
MAX_TURN_S = 30.0


def check_room(client: str, waiting: list[str], what: str = "waiting") -> None:
    """Refuse one more where the limits are reached.

    Args:
        client: Who asks.
        waiting: The client of each that waits now.
        what: What they do, for the message.

    Raises:
        GryphonError: "queue_full", with `retry_after`.
    """
    of_client = waiting.count(client)
    if len(waiting) >= MAX_QUEUE:
        message = f"{len(waiting)} requests are {what} already, of {MAX_QUEUE} at most."
    elif of_client >= MAX_QUEUE_PER_CLIENT:
        message = (
            f"{of_client} requests of this client are {what} already, of "
            f"{MAX_QUEUE_PER_CLIENT} at most."
        )
    else:
        return
    raise GryphonError(
        "queue_full", f"{message} Try again in a moment.", retry_after=_RETRY_AFTER_S
    )


class WaitingQueue:
    """The rows that wait, in order of arrival as far as iteration goes."""

    def __init__(self) -> None:
        self._arrivals: dict[Row, int] = {}
        self._count = 0
        self._turns = Turns()
        self._turn_began = 0
        """What had arrived when the resident model was loaded goes with it."""
        self._turn_ends_s = 0.0
        self._told: dict[Row, int] = {}
        """How many each row was told are ahead of it."""
        self._told_of: tuple[int, int, int] | None = None
        """What those numbers depend on."""

    def __len__(self) -> int:
        return len(self._arrivals)

    def __iter__(self) -> Iterator[Row]:
        return iter(self._arrivals)

    def add(self, row: Row) -> None:
        """Let a row wait.

        Raises:
            GryphonError: "queue_full", with `retry_after`.
        """
        check_room(row.client, [waiting.client for waiting in self._arrivals])
        self._count += 1
        self._arrivals[row] = self._count

    def remove(self, row: Row) -> None:
        """Forget a row, whether it waits or not."""
        self._arrivals.pop(row, None)
        self._told.pop(row, None)

    def admit(self, row: Row) -> None:
        """Let a row go on: its client had a turn."""
        self.remove(row)
        self._turns.serve(row.client, {waiting.client for waiting in self._arrivals})

    def begin_turn(self, load_s: float) -> None:
        """A model became resident, which took `load_s` seconds."""
        self._turn_began = self._count
        self._turn_ends_s = time.monotonic() + min(TURN_PER_LOAD * load_s, MAX_TURN_S)

    def next(self, resident: ModelRef | None, running: Mapping[str, int]) -> Row:
        """The row to go on with, where one waits; one for another model waits for that first.

        Args:
            resident: The model that is loaded.
            running: How many rows of each client are prefilled or decoded now.
        """
        return self._turns.first(self._whose_turn([*self._arrivals], resident), running)

    def _whose_turn(self, rows: list[Row], resident: ModelRef | None) -> list[Row]:
        """Those of `rows`, in order of arrival, whose model is to be served now."""
        other = next((row for row in rows if row.request.model != resident), None)
        if other is None:
            return rows
        mine = [row for row in rows if row.request.model == resident]
        if time.monotonic() >= self._turn_ends_s:
            before = max(self._arrivals[other], self._turn_began + 1)
            mine = [row for row in mine if self._arrivals[row] < before]
        return mine or [row for row in rows if row.request.model == other.request.model]

    def tell_positions(
        self, resident: ModelRef | None, running: Mapping[str, int], ahead: int
    ) -> None:
        """Tell the rows how many are ahead of them, those for whom that has changed.

        Args:
            ahead: Requests ahead of all of these, as the one being prefilled.
        """
        depends_on = self._count, len(self), ahead
        if depends_on == self._told_of:
            return
        self._told_of = depends_on
        for row in self._in_order(resident, running):
            if self._told.get(row, 0) != ahead:
                self._told[row] = ahead
                row.emit(Progress(row.request.id, "queue", 0, ahead))
            ahead += 1

    def _in_order(self, resident: ModelRef | None, running: Mapping[str, int]) -> list[Row]:
        """All rows in the order in which they will go on if nothing else happens."""
        rest = [*self._arrivals]
        ordered: list[Row] = []
        while rest:
            turn = self._whose_turn(rest, resident)
            ordered += self._turns.order(turn, running)
            rest = [row for row in rest if row not in turn]
            resident, running = None, {}  # then others have ended, and the oldest one's model comes
        return ordered
